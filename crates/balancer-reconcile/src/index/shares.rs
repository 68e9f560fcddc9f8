//! How the executors of a job are spread over nodes and over pools of spot nodes. Kept with each change, at a cost that
//! does not grow with the job.

use std::collections::HashMap;
use std::sync::Arc;

use balancer_core::{Capacity, JobId, Policy, Pool, Shares};

use super::ClusterIndex;

/// The [`Shares`] of one team.
#[derive(Debug, Default)]
pub(super) struct TeamShares {
    bound: u32,
    /// How many nodes have one executor of the team, how many have two, and so on.
    nodes: Vec<u32>,
    spot: u32,
    /// A team has few pools.
    pools: Vec<(Arc<Pool>, u32)>,
    waiting: u32,
}

impl TeamShares {
    /// A node has got one more executor, and now has so many.
    pub(super) fn bind(&mut self, executors: u32) {
        self.bound += 1;
        self.count(executors, true);
        self.count(executors.saturating_sub(1), false);
    }

    /// A node has lost an executor of so many.
    pub(super) fn unbind(&mut self, executors: u32) {
        self.bound = self.bound.saturating_sub(1);
        self.count(executors, false);
        self.count(executors.saturating_sub(1), true);
    }

    /// One node more, or less, has so many executors.
    fn count(&mut self, executors: u32, more: bool) {
        let Some(at) = executors.checked_sub(1).and_then(|at| usize::try_from(at).ok()) else { return };
        if more && self.nodes.len() <= at {
            self.nodes.resize(at + 1, 0);
        }
        if let Some(nodes) = self.nodes.get_mut(at) {
            *nodes = if more { *nodes + 1 } else { nodes.saturating_sub(1) };
        }
        while self.nodes.last() == Some(&0) {
            self.nodes.pop();
        }
    }

    /// So many executors are bound to a node of this capacity and pool.
    pub(super) fn add(&mut self, capacity: Option<Capacity>, pool: Option<&Arc<Pool>>, executors: u32) {
        if capacity != Some(Capacity::Spot) {
            return;
        }
        self.spot += executors;
        let Some(pool) = pool else { return };
        match self.pools.iter_mut().find(|(known, _)| Arc::ptr_eq(known, pool)) {
            Some((_, bound)) => *bound += executors,
            None => self.pools.push((Arc::clone(pool), executors)),
        }
    }

    /// So many executors are no longer bound to a node of this capacity and pool.
    pub(super) fn remove(&mut self, capacity: Option<Capacity>, pool: Option<&Arc<Pool>>, executors: u32) {
        if capacity != Some(Capacity::Spot) {
            return;
        }
        self.spot = self.spot.saturating_sub(executors);
        let at = pool.and_then(|pool| self.pools.iter().position(|(known, _)| Arc::ptr_eq(known, pool)));
        if let Some(at) = at
            && let Some((_, bound)) = self.pools.get_mut(at)
        {
            *bound = bound.saturating_sub(executors);
            if *bound == 0 {
                self.pools.swap_remove(at);
            }
        }
    }

    /// One executor more, or less, waits for a spot node.
    pub(super) fn wait(&mut self, more: bool) {
        self.waiting = if more { self.waiting + 1 } else { self.waiting.saturating_sub(1) };
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bound == 0 && self.waiting == 0
    }
}

impl ClusterIndex {
    /// How the job's executors are spread.
    pub fn shares(&self, job: &JobId) -> Shares {
        let mut shares = Shares::default();
        for team in self.teams_of(job) {
            let id = self.groups.get(&team.group).and_then(|group| group.teams.get(&team.owner));
            let Some(TeamShares { bound, nodes, spot, pools, waiting }) = id.and_then(|id| self.nodes.shares(id))
            else {
                continue;
            };
            shares.bound += bound;
            shares.spot += spot;
            shares.waiting += waiting;
            shares.on_one_node = shares.on_one_node.max(u32::try_from(nodes.len()).unwrap_or(u32::MAX));
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
        let mut pools = HashMap::<Arc<Pool>, u32>::new();
        for team in index.teams_of(job) {
            let mut nodes = HashMap::<&str, u32>::new();
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
            shares.on_one_node = shares.on_one_node.max(nodes.into_values().max().unwrap_or(0));
        }
        shares.pools = pools.into_iter().collect();
        sorted(shares)
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
