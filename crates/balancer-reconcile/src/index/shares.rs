//! How the executors of a job are spread over nodes and over pools of spot nodes. Kept with each change, at a cost that
//! does not grow with the job.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use balancer_core::{Capacity, JobId, Policy, Pool, Shares};

use super::ClusterIndex;
use super::job::ByCapacity;

/// The [`Shares`] of one team, and what is shown of it.
#[derive(Debug, Default)]
pub(super) struct TeamShares {
    /// The executors that are bound to a node, by what they count as: what the node is, or else what they were sent to.
    bound: ByCapacity,
    /// How many there are on each node. The last one has the most; of several the one whose name comes first.
    nodes: BTreeSet<(u32, Reverse<Arc<str>>)>,
    /// Those on spot nodes.
    spot: usize,
    /// A team has few pools.
    pools: Vec<(Arc<Pool>, u32)>,
    /// The executors without a node, by what they were sent to.
    pending: ByCapacity,
}

impl TeamShares {
    /// The node has got one more executor, and now has so many.
    pub(super) fn bind(&mut self, node: &Arc<str>, executors: u32) {
        let node = Reverse(Arc::clone(node));
        let before = (executors.saturating_sub(1), node);
        self.nodes.remove(&before);
        self.nodes.insert((executors, before.1));
    }

    /// The node has lost an executor of so many.
    pub(super) fn unbind(&mut self, node: &Arc<str>, executors: u32) {
        let Some((_, node)) = self.nodes.take(&(executors, Reverse(Arc::clone(node)))) else { return };
        if executors > 1 {
            self.nodes.insert((executors - 1, node));
        }
    }

    /// So many executors are bound to a node of this capacity and pool.
    pub(super) fn add(&mut self, capacity: Option<Capacity>, pool: Option<&Arc<Pool>>, executors: ByCapacity) {
        self.bound.add(executors.on(capacity));
        if capacity != Some(Capacity::Spot) {
            return;
        }
        self.spot += executors.total();
        let Some(pool) = pool else { return };
        let executors = small(executors.total());
        match self.pools.iter_mut().find(|(known, _)| Arc::ptr_eq(known, pool)) {
            Some((_, bound)) => *bound += executors,
            None => self.pools.push((Arc::clone(pool), executors)),
        }
    }

    /// So many executors are no longer bound to a node of this capacity and pool.
    pub(super) fn remove(&mut self, capacity: Option<Capacity>, pool: Option<&Arc<Pool>>, executors: ByCapacity) {
        self.bound.remove(executors.on(capacity));
        if capacity != Some(Capacity::Spot) {
            return;
        }
        self.spot = self.spot.saturating_sub(executors.total());
        let at = pool.and_then(|pool| self.pools.iter().position(|(known, _)| Arc::ptr_eq(known, pool)));
        if let Some(at) = at
            && let Some((_, bound)) = self.pools.get_mut(at)
        {
            *bound = bound.saturating_sub(small(executors.total()));
            if *bound == 0 {
                self.pools.swap_remove(at);
            }
        }
    }

    /// What an executor adds to those without a node.
    pub(super) fn set_pending(&mut self, before: ByCapacity, now: ByCapacity) {
        self.pending.remove(before);
        self.pending.add(now);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bound.total() == 0 && self.pending.total() == 0
    }
}

fn small(executors: usize) -> u32 {
    u32::try_from(executors).unwrap_or(u32::MAX)
}

/// The executors of a job, by what they count as.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ExecutorCounts {
    /// Those that are bound to a node.
    pub(super) bound: ByCapacity,
    /// Those without a node, by what they were sent to.
    pub(super) pending: ByCapacity,
    /// The node with the most of them, and how many it has.
    pub(super) largest_node: Option<(Arc<str>, usize)>,
}

impl ClusterIndex {
    /// How the job's executors are spread.
    pub fn shares(&self, job: &JobId) -> Shares {
        let mut shares = Shares::default();
        let largest = self.largest_node(job).map(|(_, executors)| small(executors));
        shares.on_one_node = largest.unwrap_or_default();
        for (_, TeamShares { bound, spot, pools, pending, .. }) in self.team_shares(job) {
            shares.bound += small(bound.total());
            shares.spot += small(*spot);
            shares.waiting += small(pending.spot);
            if shares.pools.is_empty() {
                shares.pools.clone_from(pools);
                continue;
            }
            let mut merged: HashMap<Arc<Pool>, u32> = shares.pools.drain(..).collect();
            for (pool, bound) in pools {
                *merged.entry(Arc::clone(pool)).or_default() += bound;
            }
            shares.pools.extend(merged);
        }
        shares
    }

    /// How many executors the job has, at a cost that does not grow with them, and with its nodes only if it has executors of
    /// its driver and others without an owner.
    pub(super) fn executors_by_capacity(&self, job: &JobId) -> ExecutorCounts {
        let largest_node = self.largest_node(job).map(|(node, executors)| (Arc::clone(node), executors));
        let mut executors = ExecutorCounts { largest_node, ..ExecutorCounts::default() };
        for (_, TeamShares { bound, pending, .. }) in self.team_shares(job) {
            executors.bound.add(*bound);
            executors.pending.add(*pending);
        }
        executors
    }

    /// The node with the most executors of the job, and how many it has. A job may have executors of its driver and
    /// without an owner on the same node: both are gone through from their largest nodes down, until what is left of both
    /// together is no more than the most that was found.
    fn largest_node(&self, job: &JobId) -> Option<(&Arc<str>, usize)> {
        let executors_on = |node: &str| self.team_shares(job).map(|(team, _)| self.nodes.executors(node, team)).sum();
        let mut orders: Vec<_> = self.team_shares(job).map(|(_, shares)| shares.nodes.iter().rev()).collect();
        let mut largest = None;
        loop {
            let mut most_left = 0;
            for (executors, Reverse(node)) in orders.iter_mut().filter_map(Iterator::next) {
                most_left += usize::try_from(*executors).unwrap_or(usize::MAX);
                largest = largest.max(Some((executors_on(node), Reverse(node))));
            }
            if largest.is_none_or(|(most, _)| most_left <= most) {
                return largest.map(|(executors, Reverse(node))| (node, executors));
            }
        }
    }

    /// The teams whose executors are the job's and are spread or pending, and how they are.
    fn team_shares(&self, job: &JobId) -> impl Iterator<Item = (&Arc<JobId>, &TeamShares)> {
        self.teams_of(job).filter_map(|team| {
            let id = self.groups.get(&team.group)?.teams.get(&team.owner)?;
            Some((id, self.nodes.shares(id)?))
        })
    }

    /// The job's policy: what its driver states, else what its ledger has, else the settings.
    pub(crate) fn policy(&self, job: &JobId, stored: Option<Policy>) -> Policy {
        self.overrides(job).or_default(stored.unwrap_or(self.defaults))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use balancer_core::{Conventions, Pod};

    fn pod(name: u8, owner: u8, asked: Option<Capacity>, node: Option<u8>) -> Pod<'static> {
        let mut pod = json!({
            "metadata": {
                "name": format!("e{name}"), "namespace": "etl", "uid": format!("{name}"),
                "labels": {"spark-role": "executor", "spark-app-selector": "j"},
            },
            "spec": {},
        });
        if owner > 0 {
            let owner = format!("d{owner}");
            let owner = json!({"apiVersion": "v1", "kind": "Pod", "name": owner, "uid": owner, "controller": true});
            pod["metadata"]["ownerReferences"] = json!([owner]);
        }
        if let Some(asked) = asked {
            pod["metadata"]["annotations"] = json!({"workload/capacity-type": asked.as_str()});
        }
        if let Some(node) = node {
            pod["spec"]["nodeName"] = json!(format!("n{node}"));
        }
        serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod").into_owned()
    }

    #[derive(Clone, Debug)]
    enum Step {
        Pod { name: u8, owner: u8, asked: Option<Capacity>, node: Option<u8> },
        Gone { name: u8 },
        Node { node: u8, capacity: Option<Capacity>, pool: Option<u8> },
        NodeGone { node: u8 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let capacity = || prop_oneof![Just(None), Just(Some(Capacity::OnDemand)), Just(Some(Capacity::Spot))];
        let (name, node) = (|| 0u8..12, || 0u8..4);
        prop_oneof![
            6 => (name(), 0u8..3, capacity(), proptest::option::of(node()))
                .prop_map(|(name, owner, asked, node)| Step::Pod { name, owner, asked, node }),
            2 => name().prop_map(|name| Step::Gone { name }),
            3 => (node(), capacity(), proptest::option::of(0u8..3))
                .prop_map(|(node, capacity, pool)| Step::Node { node, capacity, pool }),
            1 => node().prop_map(|node| Step::NodeGone { node }),
        ]
    }

    /// What a job's shares are, from the executors and nodes as the index has them.
    fn counted(index: &ClusterIndex, job: &JobId) -> Shares {
        let mut shares = Shares::default();
        let (mut pools, mut nodes) = (HashMap::<Arc<Pool>, u32>::new(), HashMap::<&str, u32>::new());
        for team in index.teams_of(job) {
            for executor in team.executors.values() {
                let Some(node) = &executor.node else {
                    shares.waiting += u32::from(executor.asked == Some(Capacity::Spot));
                    continue;
                };
                shares.bound += 1;
                *nodes.entry(node).or_default() += 1;
                if index.nodes.capacity(node) == Some(Capacity::Spot) {
                    shares.spot += 1;
                    if let Some(pool) = index.nodes.pool(node) {
                        *pools.entry(Arc::clone(pool)).or_default() += 1;
                    }
                }
            }
        }
        shares.on_one_node = nodes.into_values().max().unwrap_or(0);
        shares.pools = pools.into_iter().collect();
        sorted(shares)
    }

    /// The same for what is shown of it, except that of several nodes with the most executors any may be the largest one.
    fn counted_executors(index: &ClusterIndex, job: &JobId) -> (ExecutorCounts, HashMap<Arc<str>, usize>) {
        let (mut counted, mut nodes) = (ExecutorCounts::default(), HashMap::<Arc<str>, usize>::new());
        for executor in index.teams_of(job).flat_map(|team| team.executors.values()) {
            let Some(node) = &executor.node else {
                counted.pending.add(ByCapacity::one(executor.asked));
                continue;
            };
            counted.bound.add(ByCapacity::one(index.capacity(executor)));
            *nodes.entry(Arc::clone(node)).or_default() += 1;
        }
        (counted, nodes)
    }

    fn sorted(mut shares: Shares) -> Shares {
        shares.pools.sort();
        shares
    }

    proptest! {
        /// Executors come, move between owners, are bound and go, and nodes change and go, in any order.
        #[test]
        fn shares_that_are_kept_equal_those_that_are_counted(steps in proptest::collection::vec(step(), 0..80)) {
            let mut index = ClusterIndex::new(Arc::new(Conventions::default()), Policy::default());
            for step in steps {
                match step {
                    Step::Pod { name, owner, asked, node } => index.apply_pod(&pod(name, owner, asked, node), None),
                    Step::Gone { name } => index.delete_pod("etl", &format!("e{name}")),
                    Step::Node { node, capacity, pool } => {
                        let pool = pool.map(|pool| Pool { instance_type: format!("m{pool}").into(), zone: "a".into() });
                        index.apply_node(&format!("n{node}"), capacity);
                        index.set_pool(&format!("n{node}"), pool);
                    }
                    Step::NodeGone { node } => index.delete_node(&format!("n{node}")),
                }
                for job in index.jobs().cloned().collect::<Vec<_>>() {
                    prop_assert_eq!(sorted(index.shares(&job)), counted(&index, &job));
                    let ExecutorCounts { bound, pending, largest_node } = index.executors_by_capacity(&job);
                    let (expected, nodes) = counted_executors(&index, &job);
                    prop_assert_eq!((bound, pending), (expected.bound, expected.pending));
                    let largest = nodes.iter().max_by(|(one, of_one), (other, of_other)| {
                        of_one.cmp(of_other).then_with(|| other.cmp(one))
                    });
                    if index.teams_of(&job).count() == 1 {
                        prop_assert_eq!(largest_node, largest.map(|(node, executors)| (Arc::clone(node), *executors)));
                    } else if let Some((node, executors)) = largest_node {
                        prop_assert_eq!(nodes.get(&node), Some(&executors));
                        prop_assert_eq!(largest.map(|(_, most)| *most), Some(executors));
                    } else {
                        prop_assert!(nodes.is_empty());
                    }
                }
            }
            for name in 0..12 {
                index.delete_pod("etl", &format!("e{name}"));
            }
            prop_assert_eq!(index.nodes.teams(), 0);
        }
    }

    #[test]
    fn a_node_without_a_zone_or_without_an_instance_type_has_no_pool() {
        let of = |labels: &[&str]| Pool::of_node(|key| labels.contains(&key).then_some("x"));
        assert!(of(&[Pool::INSTANCE_TYPE_LABEL, Pool::ZONE_LABEL]).is_some());
        assert_eq!([of(&[]), of(&[Pool::INSTANCE_TYPE_LABEL]), of(&[Pool::ZONE_LABEL])], [None, None, None]);
    }
}
