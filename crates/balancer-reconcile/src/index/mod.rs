//! The state of the cluster: every job's live pods, and the capacity of each node. Pure: no I/O and no clock.

mod invalid_annotation;
mod job;
mod nodes;

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;

use balancer_core::{
    Capacity, Conventions, DriverPod, ExecutorPod, JobId, JobPod, LiveExecutor, Pod, Policy, PolicyOverrides,
};

pub use invalid_annotation::InvalidAnnotation;
use invalid_annotation::InvalidAnnotations;
pub use job::DesiredState;
use job::{Driver, Executor, JobPods};
use nodes::NodeIndex;

/// All live executors and drivers by their jobs, and the capacities of the nodes.
///
/// It keeps of each executor its name, its uid, and three words more. It keeps a node while the node exists, or an
/// executor is bound to it.
#[derive(Debug)]
pub struct ClusterIndex {
    conventions: Arc<Conventions>,
    defaults: Policy,
    jobs: HashMap<Arc<JobId>, JobPods>,
    /// The job of each pod: namespace → pod → job.
    pods: HashMap<Box<str>, HashMap<Arc<str>, Arc<JobId>>>,
    nodes: NodeIndex,
    /// How many lists of each namespace's pods were started; `None` stands for all namespaces.
    generations: HashMap<Option<Arc<str>>, u32>,
    changed: HashMap<Arc<JobId>, Change>,
    invalid_annotations: InvalidAnnotations,
}

/// What has changed in a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Something that the ledger may contain already, or that can wait.
    Other,
    /// An executor is gone, so Spark may request another one at any moment.
    Loss,
}

/// The number of live jobs and executors, for the gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Jobs with a live pod.
    pub jobs: u64,
    /// Executors on spot.
    pub spot: u64,
    /// Executors on on-demand.
    pub on_demand: u64,
    /// Executors whose capacity is not known yet.
    pub unknown: u64,
}

/// Adds a change; the most urgent one of a job counts.
fn add_change(changed: &mut HashMap<Arc<JobId>, Change>, job: Arc<JobId>, change: Change) {
    let known = changed.entry(job).or_insert(change);
    *known = change.max(*known);
}

impl ClusterIndex {
    /// The index of a cluster of which nothing is known yet.
    pub fn new(conventions: Arc<Conventions>, defaults: Policy) -> Self {
        Self {
            conventions,
            defaults,
            jobs: HashMap::new(),
            pods: HashMap::new(),
            nodes: NodeIndex::default(),
            generations: HashMap::new(),
            changed: HashMap::new(),
            invalid_annotations: InvalidAnnotations::default(),
        }
    }

    /// A list of pods starts. `scope` is the namespace that is listed, or `None` for all.
    pub fn init_pods(&mut self, scope: Option<&Arc<str>>) {
        let generation = self.generations.entry(scope.cloned()).or_default();
        *generation = generation.wrapping_add(1);
    }

    /// The list is complete: pods that it did not contain are gone.
    pub fn init_pods_done(&mut self, scope: Option<&Arc<str>>) {
        let generation = self.generation(scope);
        let mut gone = Vec::new();
        for (job, pods) in &self.jobs {
            if scope.is_none_or(|scope| **scope == *job.namespace) {
                gone.extend(pods.missing_from(generation).map(|name| (Arc::clone(job), Arc::clone(name))));
            }
        }
        for (job, name) in gone {
            self.delete_pod(&job.namespace, &name);
        }
    }

    /// A pod was listed, added or changed. `scope` is the namespace that is watched, or `None` for all.
    pub fn apply_pod(&mut self, pod: &Pod<'_>, scope: Option<&Arc<str>>) {
        let conventions = Arc::clone(&self.conventions);
        let metadata = &pod.metadata;
        let (Some(namespace), Some(name)) = (metadata.namespace.as_deref(), metadata.name.as_deref()) else { return };
        let generation = self.generation(scope);
        match JobPod::of(pod, &conventions) {
            Some(JobPod::Executor(executor)) => self.apply_executor(name, executor, generation),
            Some(JobPod::Driver(driver)) => self.apply_driver(name, driver, generation),
            None => self.delete_pod(namespace, name),
        }
    }

    /// A pod is gone.
    pub fn delete_pod(&mut self, namespace: &str, name: &str) {
        let Some(pods) = self.pods.get_mut(namespace) else { return };
        let Some((name, id)) = pods.remove_entry(name) else { return };
        if pods.is_empty() {
            self.pods.remove(namespace);
        }
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let executor = job.executors.remove(&name);
        job.drivers.remove(&name);
        if job.is_empty() {
            self.jobs.remove(&id);
        }
        let change = if executor.is_some() { Change::Loss } else { Change::Other };
        if let Some(node) = executor.and_then(|executor| executor.node) {
            self.nodes.unbind(&node, &id);
        }
        self.invalid_annotations.remove(&id, name);
        add_change(&mut self.changed, id, change);
    }

    /// A list of the nodes starts.
    pub fn init_nodes(&mut self) {
        self.nodes.init();
    }

    /// The list is complete: nodes that it did not contain are gone.
    pub fn init_nodes_done(&mut self) {
        self.nodes.init_done();
    }

    /// A node was listed, added or changed.
    pub fn apply_node(&mut self, name: &str, capacity: Option<Capacity>) {
        for job in self.nodes.apply(name, capacity) {
            add_change(&mut self.changed, Arc::clone(job), Change::Other);
        }
    }

    /// A node is gone. Its capacity is remembered for the executors that are still bound to it.
    pub fn delete_node(&mut self, name: &str) {
        self.nodes.delete(name);
    }

    /// The jobs that have changed since the last call, and how.
    pub fn take_changed(&mut self) -> HashMap<Arc<JobId>, Change> {
        mem::take(&mut self.changed)
    }

    /// The annotations that became invalid since the last call.
    pub fn take_invalid_annotations(&mut self) -> Vec<InvalidAnnotation> {
        self.invalid_annotations.take()
    }

    /// All jobs with a live pod.
    pub fn jobs(&self) -> impl Iterator<Item = &Arc<JobId>> {
        self.jobs.keys()
    }

    /// Whether the job has a live pod.
    pub fn contains(&self, job: &JobId) -> bool {
        self.jobs.contains_key(job)
    }

    /// What the job's ledger should contain.
    pub fn desired(&self, job: &JobId) -> DesiredState<'_> {
        let Some(job) = self.jobs.get(job) else { return DesiredState { ended: true, ..DesiredState::default() } };
        let live = job.executors.iter().map(|(name, executor)| LiveExecutor {
            key: executor.key.as_deref().unwrap_or(name),
            uid: &executor.uid,
            capacity: self.capacity(executor),
        });
        DesiredState { live: live.collect(), overrides: job.overrides(), ended: false }
    }

    /// Counts everything that is live.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals { jobs: self.jobs.len() as u64, ..Totals::default() };
        for executor in self.jobs.values().flat_map(|job| job.executors.values()) {
            match self.capacity(executor) {
                Some(Capacity::Spot) => totals.spot += 1,
                Some(Capacity::OnDemand) => totals.on_demand += 1,
                None => totals.unknown += 1,
            }
        }
        totals
    }

    /// The capacity that the executor runs on or must run on. The node's label comes first.
    fn capacity(&self, executor: &Executor) -> Option<Capacity> {
        let of_node = executor.node.as_ref().and_then(|node| self.nodes.capacity(node));
        of_node.or(executor.asked)
    }

    fn apply_executor(&mut self, name: &str, executor: ExecutorPod<'_>, generation: u32) {
        let ExecutorPod { job, key, uid, node, asked } = executor;
        let (name, id) = self.enter(name, job.to_job_id());
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let was_driver = job.drivers.remove(&name).is_some();
        let before = job.executors.remove(&name);
        let is_same = before
            .as_ref()
            .is_some_and(|before| *before.uid == *uid && before.asked == asked && before.node.as_deref() == node);
        let mut bound = before.and_then(|before| before.node);
        if bound.as_deref() != node {
            if let Some(node) = bound.take() {
                self.nodes.unbind(&node, &id);
            }
            bound = node.map(|node| self.nodes.bind(node, &id));
        }
        let key = (key != &*name).then(|| key.into());
        job.executors.insert(name, Executor { key, uid: uid.into(), node: bound, asked, generation });
        if !is_same || was_driver {
            add_change(&mut self.changed, id, Change::Other);
        }
    }

    fn apply_driver(&mut self, name: &str, driver: DriverPod<'_>, generation: u32) {
        let DriverPod { job, uid, created, overrides, invalid } = driver;
        let (name, id) = self.enter(name, job.to_job_id());
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let as_executor = job.executors.remove(&name);
        let before = job.drivers.remove(&name).filter(|before| *before.uid == *uid);
        // The last valid value stays in use instead of an invalid one, the default instead of an absent one.
        let last = before.as_ref().map(|before| before.overrides).unwrap_or_default();
        let is_invalid = |field| invalid.iter().any(|invalid| invalid.field == field);
        let overrides = overrides
            .or_overrides(last.filter(is_invalid))
            .or_overrides(PolicyOverrides::from(self.defaults).filter(|field| !is_invalid(field)));
        let reported = before.as_ref().map(|before| before.invalid.as_slice()).unwrap_or_default();
        let annotation = InvalidAnnotation {
            job: Arc::clone(&id),
            driver: Arc::clone(&name),
            uid: uid.into(),
            invalid: invalid.iter().filter(|invalid| !reported.contains(invalid)).cloned().collect(),
            in_use: overrides,
        };
        self.invalid_annotations.update(annotation, &invalid);
        let is_same = before.is_some_and(|before| before.overrides == overrides);
        job.drivers.insert(name, Driver { uid: uid.into(), created: created.into(), overrides, invalid, generation });
        if let Some(executor) = as_executor {
            add_change(&mut self.changed, Arc::clone(&id), Change::Loss);
            if let Some(node) = executor.node {
                self.nodes.unbind(&node, &id);
            }
        }
        if !is_same {
            add_change(&mut self.changed, id, Change::Other);
        }
    }

    /// Stores to which job the pod belongs; a pod that belonged to another job leaves that one.
    fn enter(&mut self, name: &str, job: JobId) -> (Arc<str>, Arc<JobId>) {
        let known = self.pods.get(job.namespace.as_str()).and_then(|pods| pods.get_key_value(name));
        if let Some((name, known)) = known
            && **known == job
        {
            return (Arc::clone(name), Arc::clone(known));
        }
        if known.is_some() {
            self.delete_pod(&job.namespace, name);
        }
        let job = match self.jobs.get_key_value(&job) {
            Some((known, _)) => Arc::clone(known),
            None => {
                let job = Arc::new(job);
                self.jobs.insert(Arc::clone(&job), JobPods::default());
                job
            }
        };
        let name: Arc<str> = name.into();
        let pods = match self.pods.get_mut(job.namespace.as_str()) {
            Some(pods) => pods,
            None => self.pods.entry(job.namespace.as_str().into()).or_default(),
        };
        pods.insert(Arc::clone(&name), Arc::clone(&job));
        (name, job)
    }

    fn generation(&self, scope: Option<&Arc<str>>) -> u32 {
        self.generations.get(&scope.cloned()).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use balancer_core::{InvalidField, PolicyField};

    fn index() -> ClusterIndex {
        ClusterIndex::new(Arc::new(Conventions::default()), Policy::default())
    }

    fn job() -> JobId {
        JobId { namespace: "etl".into(), app_id: "j".into() }
    }

    fn apply(index: &mut ClusterIndex, name: &str, role: &str, change: impl FnOnce(&mut Value)) {
        index.apply_pod(&pod(name, role, change), None);
    }

    fn pod(name: &str, role: &str, change: impl FnOnce(&mut Value)) -> Pod<'static> {
        let mut pod = json!({
            "metadata": {
                "name": name, "namespace": "etl", "uid": format!("uid of {name}"),
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"spark-role": role, "spark-app-selector": "j"},
            },
            "spec": {},
        });
        change(&mut pod);
        serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod").into_owned()
    }

    fn apply_driver(index: &mut ClusterIndex, name: &str, annotations: Value) {
        apply(index, name, "driver", |pod| pod["metadata"]["annotations"] = annotations);
    }

    fn capacities(index: &ClusterIndex) -> Vec<Option<Capacity>> {
        index.desired(&job()).live.iter().map(|live| live.capacity).collect()
    }

    fn policy(index: &ClusterIndex) -> Option<(String, u32)> {
        let policy = index.desired(&job()).overrides.or(None)?;
        Some((policy.spot_ratio.to_string(), policy.on_demand_base))
    }

    #[test]
    fn a_deleted_node_keeps_its_capacity_for_the_executors_bound_to_it() {
        let mut index = index();
        index.apply_node("n", Some(Capacity::OnDemand));
        apply(&mut index, "e", "executor", |pod| {
            pod["spec"]["nodeName"] = json!("n");
            pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
        });
        index.delete_node("n");
        assert_eq!(capacities(&index), [Some(Capacity::OnDemand)]);
        index.init_nodes();
        index.init_nodes_done();
        assert_eq!(capacities(&index), [Some(Capacity::OnDemand)]);
        index.delete_pod("etl", "e");
        assert!(index.nodes.len() == 0, "{:?}", index.nodes);
    }

    #[test]
    fn nodes_without_executors_are_kept_while_they_exist() {
        let mut index = index();
        for node in ["a", "b", "c"] {
            index.apply_node(node, Some(Capacity::Spot));
        }
        index.delete_node("a");
        index.init_nodes();
        index.apply_node("b", Some(Capacity::Spot));
        index.init_nodes_done();
        assert_eq!(index.nodes.len(), 1);
    }

    #[test]
    fn deleted_pods_leave_nothing_in_the_index() {
        let mut index = index();
        for round in 0..3 {
            index.init_pods(None);
            for id in 0..10 {
                apply(&mut index, &format!("e{round}-{id}"), "executor", |pod| pod["spec"]["nodeName"] = json!("n"));
            }
            apply_driver(&mut index, "d", json!({"workload/spot-ratio": "x"}));
            index.init_pods_done(None);
            assert_eq!(index.desired(&job()).live.len(), 10);
        }
        index.init_pods(None);
        index.init_pods_done(None);
        assert_eq!(index.totals(), Totals::default());
        assert!(
            index.jobs.is_empty()
                && index.pods.is_empty()
                && index.nodes.len() == 0
                && index.invalid_annotations.is_empty()
        );
    }

    #[test]
    fn a_list_of_one_namespace_does_not_affect_another() {
        let (mut index, etl) = (index(), Arc::<str>::from("etl"));
        index.init_pods(Some(&etl));
        index.apply_pod(&pod("e", "executor", |_| {}), Some(&etl));
        index.init_pods_done(Some(&etl));
        let ml = Arc::<str>::from("ml");
        index.init_pods(Some(&ml));
        index.init_pods_done(Some(&ml));
        assert!(index.contains(&job()));
    }

    #[test]
    fn the_newest_driver_sets_the_policy_and_absent_fields_are_the_default() {
        let mut index = index();
        assert_eq!(policy(&index), None);
        apply_driver(&mut index, "old", json!({"workload/spot-ratio": "0.1", "workload/on-demand-base": "3"}));
        assert_eq!(policy(&index), Some(("0.1".into(), 3)));
        apply(&mut index, "new", "driver", |pod| pod["metadata"]["creationTimestamp"] = json!("2026-01-02T00:00:00Z"));
        assert_eq!(policy(&index), Some(("0.5".into(), 0)));
        index.delete_pod("etl", "new");
        assert_eq!(policy(&index), Some(("0.1".into(), 3)));
    }

    #[test]
    fn an_invalid_field_keeps_the_last_valid_value_and_is_reported_once() {
        let mut index = index();
        apply_driver(&mut index, "d", json!({"workload/spot-ratio": "0.7", "workload/on-demand-base": "2"}));
        assert!(index.take_invalid_annotations().is_empty());
        for _ in 0..3 {
            apply_driver(&mut index, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "4"}));
        }
        assert_eq!(policy(&index), Some(("0.7".into(), 4)));
        apply_driver(&mut index, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "5"}));
        let reported = index.take_invalid_annotations();
        let [annotation] = reported.as_slice() else { panic!("{reported:?}") };
        assert_eq!(annotation.fallback(&annotation.invalid[0]), "still using 0.7");
        apply_driver(&mut index, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "x"}));
        let reported = index.take_invalid_annotations();
        assert!(
            matches!(reported.as_slice(), [InvalidAnnotation { invalid, .. }] if matches!(invalid.as_slice(), [InvalidField { field: PolicyField::OnDemandBase, .. }])),
            "{reported:?}"
        );
        apply_driver(&mut index, "d", json!({"workload/on-demand-base": "4"}));
        assert_eq!(policy(&index), Some(("0.5".into(), 4)));
    }

    #[test]
    fn a_field_that_was_never_valid_is_left_to_the_ledger() {
        let mut index = index();
        apply_driver(&mut index, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "4"}));
        assert_eq!(
            index.desired(&job()).overrides,
            PolicyOverrides {
                spot_ratio: None,
                ..PolicyOverrides::from(Policy { on_demand_base: 4, ..Policy::DEFAULT })
            }
        );
        let reported = index.take_invalid_annotations();
        assert_eq!(reported[0].fallback(&reported[0].invalid[0]), "still using the previous value");
    }

    fn changed(index: &mut ClusterIndex) -> Vec<Change> {
        index.take_changed().into_values().collect()
    }

    #[test]
    fn only_real_changes_are_reported_and_a_loss_is_the_most_urgent() {
        let mut index = index();
        apply(&mut index, "e", "executor", |_| {});
        assert_eq!(changed(&mut index), [Change::Other]);
        apply(&mut index, "e", "executor", |_| {});
        assert_eq!(changed(&mut index), []);
        apply(&mut index, "e", "executor", |pod| pod["spec"]["nodeName"] = json!("n"));
        assert_eq!(changed(&mut index), [Change::Other]);
        index.apply_node("n", Some(Capacity::Spot));
        assert_eq!(changed(&mut index), [Change::Other]);
        index.delete_pod("etl", "e");
        apply(&mut index, "e2", "executor", |_| {});
        assert_eq!(changed(&mut index), [Change::Loss]);
        apply(&mut index, "e2", "driver", |_| {});
        assert_eq!(changed(&mut index), [Change::Loss], "a pod that is no executor any more");
        apply(&mut index, "e2", "executor", |_| {});
        assert_eq!(changed(&mut index), [Change::Other]);
    }

    #[test]
    fn a_pod_that_moves_to_another_job_or_node_leaves_the_former_one() {
        let mut index = index();
        index.apply_node("n2", Some(Capacity::Spot));
        apply(&mut index, "e", "executor", |pod| pod["spec"]["nodeName"] = json!("n"));
        apply(&mut index, "e", "executor", |pod| pod["spec"]["nodeName"] = json!("n2"));
        assert_eq!((capacities(&index), index.nodes.len()), (vec![Some(Capacity::Spot)], 1));
        apply(&mut index, "e", "executor", |pod| pod["metadata"]["labels"]["spark-app-selector"] = json!("k"));
        assert!(!index.contains(&job()) && index.jobs().count() == 1);
    }
}
