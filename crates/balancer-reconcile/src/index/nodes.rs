//! The capacity and the pool of each node, and which jobs' executors are bound to it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use balancer_core::{Capacity, CapacityProfile, JobId, Pool};

use super::job::ByCapacity;
use super::shares::TeamShares;

/// The nodes that exist, or to which an executor is bound.
#[derive(Debug, Default)]
pub(super) struct NodeIndex {
    nodes: HashMap<Arc<str>, Node>,
    /// How the executors of each team are spread over them.
    teams: HashMap<Arc<JobId>, TeamShares>,
    /// The pools of the nodes, each once.
    pools: HashSet<Arc<Pool>>,
    /// How many lists were started.
    generation: u32,
    /// The nodes that the watch has reported during the list that is under way.
    watched: Option<HashSet<Box<str>>>,
}

#[derive(Debug, Default)]
struct Node {
    /// Remembered after the node is gone, for the executors that are still bound to it.
    capacity: Option<Capacity>,
    /// Its pool, remembered likewise.
    pool: Option<Arc<Pool>>,
    /// The platform that shows that the node is spot, if it is not the configured one.
    other_platform: Option<CapacityProfile>,
    exists: bool,
    /// The jobs with executors bound to the node, and these. A virtual node may have very many of both.
    jobs: HashMap<Arc<JobId>, Bound>,
    /// In which list, or after which, it was reported last.
    generation: u32,
}

/// The executors of a job that are bound to a node.
#[derive(Debug, Default)]
struct Bound {
    names: HashSet<Arc<str>>,
    /// How many they are, by what they were sent to.
    asked: ByCapacity,
}

impl NodeIndex {
    pub(super) fn init(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.watched = Some(HashSet::new());
    }

    pub(super) fn init_failed(&mut self) {
        self.watched = None;
    }

    pub(super) fn is_known_better(&self, name: &str) -> bool {
        self.watched.as_ref().is_some_and(|watched| watched.contains(name))
    }

    pub(super) fn init_done(&mut self) {
        self.watched = None;
        for node in self.nodes.values_mut().filter(|node| node.generation != self.generation) {
            node.exists = false;
        }
        self.nodes.retain(|_, node| node.exists || !node.jobs.is_empty());
        self.pools.retain(|pool| Arc::strong_count(pool) > 1);
    }

    /// Stores the capacity of a node. Returns the jobs that are affected by a change, and the names of their executors on
    /// the node.
    pub(super) fn apply(
        &mut self,
        name: &str,
        capacity: Option<Capacity>,
    ) -> impl Iterator<Item = (&Arc<JobId>, &HashSet<Arc<str>>)> {
        self.note(name);
        let generation = self.generation;
        let (node, teams) = self.node(name);
        let has_changed = node.capacity != capacity;
        if has_changed {
            node.change(teams, |node| node.capacity = capacity);
        }
        (node.exists, node.generation) = (true, generation);
        node.jobs.iter().filter(move |_| has_changed).map(|(job, bound)| (job, &bound.names))
    }

    /// Stores the pool of a node. Returns the jobs whose executors are affected by a change.
    pub(super) fn set_pool(&mut self, name: &str, pool: Option<Pool>) -> impl Iterator<Item = &Arc<JobId>> {
        let Self { nodes, teams, pools, .. } = self;
        let node = nodes.get_mut(name).filter(|node| node.pool.as_deref() != pool.as_ref());
        let node = node.map(|node| {
            let pool = pool.map(|pool| {
                let pool = pools.get(&pool).cloned().unwrap_or_else(|| Arc::new(pool));
                pools.insert(Arc::clone(&pool));
                pool
            });
            node.change(teams, |node| node.pool = pool);
            &*node
        });
        node.into_iter().flat_map(|node| node.jobs.keys())
    }

    /// Stores that another platform than the configured one shows that the node is spot.
    pub(super) fn set_other_platform(&mut self, name: &str, platform: Option<CapacityProfile>) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.other_platform = platform;
        }
    }

    /// A platform whose labels spot nodes have, while no spot node has those of the configured one: its nodes are probably
    /// not those of the configured profile.
    pub(super) fn likely_platform(&self) -> Option<CapacityProfile> {
        let mut spot = self.nodes.values().filter(|node| node.exists && node.capacity == Some(Capacity::Spot));
        let first = spot.next()?.other_platform?;
        spot.all(|node| node.other_platform.is_some()).then_some(first)
    }

    pub(super) fn delete(&mut self, name: &str) {
        self.note(name);
        if let Some(node) = self.nodes.get_mut(name) {
            node.exists = false;
            if node.jobs.is_empty() {
                self.nodes.remove(name);
            }
        }
    }

    pub(super) fn capacity(&self, name: &str) -> Option<Capacity> {
        self.nodes.get(name)?.capacity
    }

    #[cfg(test)]
    pub(super) fn pool(&self, name: &str) -> Option<&Arc<Pool>> {
        self.nodes.get(name)?.pool.as_ref()
    }

    /// How the executors of the team are spread, if it has any.
    pub(super) fn shares(&self, team: &JobId) -> Option<&TeamShares> {
        self.teams.get(team)
    }

    /// How many executors of the team are bound to the node.
    pub(super) fn executors(&self, name: &str, team: &JobId) -> usize {
        let bound = self.nodes.get(name).and_then(|node| node.jobs.get(team));
        bound.map_or(0, |bound| bound.names.len())
    }

    /// What an executor of the team adds to those without a node.
    pub(super) fn set_pending(&mut self, team: &Arc<JobId>, before: ByCapacity, now: ByCapacity) {
        if before != now {
            shares_of(&mut self.teams, team).set_pending(before, now);
            forget_if_empty(&mut self.teams, team);
        }
    }

    /// Stores that an executor of the job, which was sent to a capacity, is bound to the node. Returns the node's own copy
    /// of its name.
    pub(super) fn bind(
        &mut self,
        name: &str,
        job: &Arc<JobId>,
        executor: &Arc<str>,
        asked: Option<Capacity>,
    ) -> Arc<str> {
        let new = Node { generation: self.generation, ..Node::default() };
        self.nodes.entry(name.into()).or_insert(new);
        let name = self.nodes.get_key_value(name).map_or_else(|| name.into(), |(name, _)| Arc::clone(name));
        let Some(node) = self.nodes.get_mut(&name) else { return name };
        let bound = node.jobs.entry(Arc::clone(job)).or_default();
        if bound.names.insert(Arc::clone(executor)) {
            *bound.asked.of(asked) += 1;
            let shares = shares_of(&mut self.teams, job);
            shares.bind(&name, number(&bound.names));
            shares.add(node.capacity, node.pool.as_ref(), ByCapacity::one(asked));
        }
        name
    }

    /// Stores that an executor of the job, which was sent to a capacity, is no longer bound to the node.
    pub(super) fn unbind(&mut self, name: &Arc<str>, job: &Arc<JobId>, executor: &str, asked: Option<Capacity>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if let Some(bound) = node.jobs.get_mut(job)
            && bound.names.contains(executor)
        {
            if let Some(shares) = self.teams.get_mut(job) {
                shares.unbind(name, number(&bound.names));
                shares.remove(node.capacity, node.pool.as_ref(), ByCapacity::one(asked));
            }
            forget_if_empty(&mut self.teams, job);
            bound.names.remove(executor);
            bound.asked.remove(ByCapacity::one(asked));
            if bound.names.is_empty() {
                node.jobs.remove(job);
            }
        }
        if node.jobs.is_empty() && !node.exists {
            self.nodes.remove(name);
        }
    }

    /// Stores that an executor of the job, which is bound to the node, counts as sent to another capacity.
    pub(super) fn set_asked(&mut self, name: &str, job: &Arc<JobId>, before: Option<Capacity>, now: Option<Capacity>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        let (Some(bound), Some(shares)) = (node.jobs.get_mut(job), self.teams.get_mut(job)) else { return };
        let (before, now) = (ByCapacity::one(before), ByCapacity::one(now));
        bound.asked.remove(before);
        bound.asked.add(now);
        shares.remove(node.capacity, node.pool.as_ref(), before);
        shares.add(node.capacity, node.pool.as_ref(), now);
    }

    /// The node was reported. One that a list has reported is not listed again.
    fn note(&mut self, name: &str) {
        if let Some(watched) = &mut self.watched {
            watched.insert(name.into());
        }
    }

    fn node(&mut self, name: &str) -> (&mut Node, &mut HashMap<Arc<JobId>, TeamShares>) {
        let new = Node { generation: self.generation, ..Node::default() };
        (self.nodes.entry(name.into()).or_insert(new), &mut self.teams)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    #[cfg(test)]
    pub(super) fn teams(&self) -> usize {
        self.teams.len()
    }
}

impl Node {
    /// Changes its capacity or its pool, and with it what is kept of the executors that are bound to it.
    fn change(&mut self, teams: &mut HashMap<Arc<JobId>, TeamShares>, change: impl FnOnce(&mut Self)) {
        for (team, bound) in &self.jobs {
            if let Some(shares) = teams.get_mut(team) {
                shares.remove(self.capacity, self.pool.as_ref(), bound.asked);
            }
        }
        change(self);
        for (team, bound) in &self.jobs {
            if let Some(shares) = teams.get_mut(team) {
                shares.add(self.capacity, self.pool.as_ref(), bound.asked);
            }
        }
    }
}

fn number(executors: &HashSet<Arc<str>>) -> u32 {
    u32::try_from(executors.len()).unwrap_or(u32::MAX)
}

fn shares_of<'a>(teams: &'a mut HashMap<Arc<JobId>, TeamShares>, team: &Arc<JobId>) -> &'a mut TeamShares {
    teams.entry(Arc::clone(team)).or_default()
}

fn forget_if_empty(teams: &mut HashMap<Arc<JobId>, TeamShares>, team: &JobId) {
    if teams.get(team).is_some_and(TeamShares::is_empty) {
        teams.remove(team);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    use Capacity::{OnDemand, Spot};

    fn job(id: &str) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.into() })
    }

    fn affected(nodes: &mut NodeIndex, name: &str, capacity: Option<Capacity>) -> Vec<String> {
        let affected = nodes.apply(name, capacity);
        let affected = affected.map(|(job, executors)| {
            let executors: BTreeSet<_> = executors.iter().map(|executor| &**executor).collect();
            format!("{}: {}", job.app_id, executors.into_iter().collect::<Vec<_>>().join(" "))
        });
        affected.collect::<BTreeSet<_>>().into_iter().collect()
    }

    #[test]
    fn a_changed_capacity_affects_the_executors_that_are_bound_to_the_node() {
        let mut nodes = NodeIndex::default();
        for (id, executor) in [("a", "a1"), ("a", "a2"), ("b", "b1")] {
            nodes.bind("n", &job(id), &executor.into(), None);
        }
        nodes.bind("other", &job("a"), &"a3".into(), None);
        assert_eq!(affected(&mut nodes, "n", Some(Spot)), ["a: a1 a2", "b: b1"]);
        assert!(affected(&mut nodes, "n", Some(Spot)).is_empty());
        nodes.unbind(&"n".into(), &job("a"), "a1", None);
        nodes.unbind(&"n".into(), &job("b"), "b1", None);
        nodes.unbind(&"n".into(), &job("a"), "a3", None);
        assert_eq!(affected(&mut nodes, "n", None), ["a: a2"]);
        assert_eq!(nodes.capacity("n"), None);
    }

    #[test]
    fn a_deleted_node_is_remembered_while_executors_are_bound_to_it() {
        let mut nodes = NodeIndex::default();
        nodes.apply("n", Some(OnDemand)).for_each(drop);
        nodes.bind("n", &job("a"), &"a1".into(), None);
        nodes.delete("n");
        nodes.init();
        nodes.init_done();
        assert_eq!(nodes.capacity("n"), Some(OnDemand));
        nodes.unbind(&"n".into(), &job("a"), "a1", None);
        assert_eq!(nodes.len(), 0);
    }

    #[test]
    fn another_platform_is_likely_only_if_all_spot_nodes_have_its_labels() {
        let mut nodes = NodeIndex::default();
        nodes.apply("on-demand", Some(OnDemand)).for_each(drop);
        assert_eq!(nodes.likely_platform(), None);
        nodes.apply("spot", Some(Spot)).for_each(drop);
        nodes.set_other_platform("spot", Some(CapacityProfile::Gke));
        assert_eq!(nodes.likely_platform(), Some(CapacityProfile::Gke));
        nodes.apply("own", Some(Spot)).for_each(drop);
        assert_eq!(nodes.likely_platform(), None);
        nodes.delete("own");
        assert_eq!(nodes.likely_platform(), Some(CapacityProfile::Gke));
    }

    #[test]
    fn a_list_removes_the_nodes_that_it_does_not_contain() {
        let mut nodes = NodeIndex::default();
        for name in ["a", "b"] {
            nodes.apply(name, Some(Spot)).for_each(drop);
        }
        nodes.init();
        nodes.apply("b", Some(Spot)).for_each(drop);
        nodes.init_done();
        assert_eq!((nodes.capacity("a"), nodes.capacity("b"), nodes.len()), (None, Some(Spot), 1));
    }
}
