//! The capacity of each node, and which jobs' executors are bound to it.

use std::collections::HashMap;
use std::sync::Arc;

use balancer_core::{Capacity, JobId};

/// The nodes that exist, or to which an executor is bound.
#[derive(Debug, Default)]
pub(super) struct NodeIndex {
    nodes: HashMap<Arc<str>, Node>,
    /// How many lists were started.
    generation: u32,
}

#[derive(Debug, Default)]
struct Node {
    /// Remembered after the node is gone, for the executors that are still bound to it.
    capacity: Option<Capacity>,
    exists: bool,
    /// The jobs with executors bound to the node, and how many.
    jobs: Vec<(Arc<JobId>, u32)>,
    /// In which list, or after which, it was reported last.
    generation: u32,
}

impl NodeIndex {
    pub(super) fn init(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    pub(super) fn init_done(&mut self) {
        for node in self.nodes.values_mut().filter(|node| node.generation != self.generation) {
            node.exists = false;
        }
        self.nodes.retain(|_, node| node.exists || !node.jobs.is_empty());
    }

    /// Stores the capacity of a node. Returns the jobs whose executors are affected by a change.
    pub(super) fn apply(&mut self, name: &str, capacity: Option<Capacity>) -> impl Iterator<Item = &Arc<JobId>> {
        let generation = self.generation;
        let node = self.node(name);
        let has_changed = node.capacity != capacity;
        (node.capacity, node.exists, node.generation) = (capacity, true, generation);
        node.jobs.iter().filter(move |_| has_changed).map(|(job, _)| job)
    }

    pub(super) fn delete(&mut self, name: &str) {
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

    /// Counts one more executor of the job on the node. Returns the node's own copy of its name.
    pub(super) fn bind(&mut self, name: &str, job: &Arc<JobId>) -> Arc<str> {
        let node = self.node(name);
        match node.jobs.iter_mut().find(|(bound, _)| bound == job) {
            Some((_, executors)) => *executors += 1,
            None => node.jobs.push((Arc::clone(job), 1)),
        }
        self.nodes.get_key_value(name).map_or_else(|| name.into(), |(name, _)| Arc::clone(name))
    }

    /// Counts one executor of the job less on the node.
    pub(super) fn unbind(&mut self, name: &str, job: &Arc<JobId>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if let Some(at) = node.jobs.iter().position(|(bound, _)| bound == job)
            && let Some((_, executors)) = node.jobs.get_mut(at)
        {
            *executors -= 1;
            if *executors == 0 {
                node.jobs.swap_remove(at);
            }
        }
        if node.jobs.is_empty() && !node.exists {
            self.nodes.remove(name);
        }
    }

    fn node(&mut self, name: &str) -> &mut Node {
        let new = Node { generation: self.generation, ..Node::default() };
        self.nodes.entry(name.into()).or_insert(new)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use Capacity::{OnDemand, Spot};

    fn job(id: &str) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.into() })
    }

    fn affected(nodes: &mut NodeIndex, name: &str, capacity: Option<Capacity>) -> Vec<String> {
        nodes.apply(name, capacity).map(|job| job.app_id.clone()).collect()
    }

    #[test]
    fn a_changed_capacity_affects_the_jobs_that_are_bound_to_the_node() {
        let mut nodes = NodeIndex::default();
        for id in ["a", "a", "b"] {
            nodes.bind("n", &job(id));
        }
        nodes.bind("other", &job("c"));
        assert_eq!(affected(&mut nodes, "n", Some(Spot)), ["a", "b"]);
        assert!(affected(&mut nodes, "n", Some(Spot)).is_empty());
        nodes.unbind("n", &job("a"));
        nodes.unbind("n", &job("b"));
        assert_eq!(affected(&mut nodes, "n", None), ["a"]);
        assert_eq!(nodes.capacity("n"), None);
    }

    #[test]
    fn a_deleted_node_is_remembered_while_executors_are_bound_to_it() {
        let mut nodes = NodeIndex::default();
        nodes.apply("n", Some(OnDemand)).for_each(drop);
        nodes.bind("n", &job("a"));
        nodes.delete("n");
        nodes.init();
        nodes.init_done();
        assert_eq!(nodes.capacity("n"), Some(OnDemand));
        nodes.unbind("n", &job("a"));
        assert_eq!(nodes.len(), 0);
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
