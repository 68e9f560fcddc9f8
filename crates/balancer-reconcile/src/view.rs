//! What the cluster says of every job, kept by what the watches tell. Pure: no I/O and no clock.

use std::collections::{BTreeMap, HashMap};
use std::mem;
use std::sync::Arc;

use balancer_core::{
    Capacity, Conventions, DriverPod, ExecutorPod, InvalidField, JobId, JobPod, JobState, LiveExecutor, Pod, Policy,
    PolicyOverrides,
};

/// All live executors and drivers, by their jobs, and the capacities of the nodes.
///
/// What is kept per executor is its name, its uid, and three words more; nodes are kept while they
/// exist, or an executor is bound to them.
#[derive(Debug)]
pub struct View {
    conventions: Arc<Conventions>,
    defaults: Policy,
    jobs: HashMap<Arc<JobId>, Job>,
    /// Which job a pod is of: namespace → pod → job.
    pods: HashMap<Box<str>, HashMap<Arc<str>, Arc<JobId>>>,
    nodes: HashMap<Arc<str>, Node>,
    /// How many lists of each namespace's pods were begun; all namespaces count as `None`.
    pod_lists: HashMap<Option<Arc<str>>, u32>,
    node_lists: u32,
    changed: HashMap<Arc<JobId>, Change>,
    complaints: BTreeMap<(Arc<JobId>, Arc<str>), Complaint>,
}

#[derive(Debug, Default)]
struct Job {
    executors: HashMap<Arc<str>, Executor>,
    drivers: HashMap<Arc<str>, Driver>,
}

#[derive(Debug)]
struct Executor {
    /// In the ledger, where it is not the pod's name.
    key: Option<Box<str>>,
    uid: Box<str>,
    node: Option<Arc<str>>,
    asked: Option<Capacity>,
    /// In which list, or after which, it was seen last.
    list: u32,
}

#[derive(Debug)]
struct Driver {
    uid: Box<str>,
    created: Box<str>,
    /// What it last stated validly, or the default where it states nothing; `None` where it never
    /// stated anything that can be read.
    overrides: PolicyOverrides,
    invalid: Vec<InvalidField>,
    list: u32,
}

#[derive(Debug, Default)]
struct Node {
    /// By its label; remembered after the node is gone, for the executors that are yet to follow.
    capacity: Option<Capacity>,
    exists: bool,
    /// The jobs with executors bound to it, and how many.
    jobs: Vec<(Arc<JobId>, u32)>,
    list: u32,
}

/// What has changed of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Something that the ledger may know already, or that can wait.
    Other,
    /// An executor is gone, so that Spark may ask for another at any moment.
    Loss,
}

/// Live pods by what they are, for the gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Jobs with a live pod.
    pub jobs: u64,
    /// Executors on spot.
    pub spot: u64,
    /// Executors on on-demand.
    pub on_demand: u64,
    /// Executors of which nothing tells yet where they run.
    pub unknown: u64,
}

/// A driver of which something cannot be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Complaint {
    /// Its job.
    pub job: Arc<JobId>,
    /// The driver's name.
    pub driver: Arc<str>,
    /// The driver's uid.
    pub uid: Box<str>,
    /// What is stated wrongly, and was not told yet.
    pub invalid: Vec<InvalidField>,
    /// What holds instead, as far as it is known here.
    pub holds: PolicyOverrides,
}

/// What the view says of one job, ready for its ledger.
#[derive(Debug, Default)]
pub struct Observed<'a> {
    live: Vec<LiveExecutor<'a>>,
    overrides: PolicyOverrides,
    ended: bool,
}

impl Observed<'_> {
    /// How many are live.
    pub(crate) fn executors(&self) -> u32 {
        u32::try_from(self.live.len()).unwrap_or(u32::MAX)
    }

    /// As the ledger takes it.
    pub fn observation(&self) -> JobState<'_> {
        JobState { live: &self.live, overrides: self.overrides, ended: self.ended }
    }
}

/// Notes a change; the gravest of a job's counts.
fn note(changed: &mut HashMap<Arc<JobId>, Change>, job: Arc<JobId>, change: Change) {
    let noted = changed.entry(job).or_insert(change);
    *noted = change.max(*noted);
}

impl View {
    /// Of a cluster of which nothing is known yet.
    pub fn new(conventions: Arc<Conventions>, defaults: Policy) -> Self {
        Self {
            conventions,
            defaults,
            jobs: HashMap::new(),
            pods: HashMap::new(),
            nodes: HashMap::new(),
            pod_lists: HashMap::new(),
            node_lists: 0,
            changed: HashMap::new(),
            complaints: BTreeMap::new(),
        }
    }

    /// A list of the namespace's pods, or of all namespaces', begins.
    pub fn begin_pods(&mut self, namespace: Option<&Arc<str>>) {
        let list = self.pod_lists.entry(namespace.cloned()).or_default();
        *list = list.wrapping_add(1);
    }

    /// The list is complete: pods that it did not name are gone.
    pub fn end_pods(&mut self, namespace: Option<&Arc<str>>) {
        let list = self.list(namespace);
        let mut gone = Vec::new();
        for (key, job) in &self.jobs {
            if namespace.is_none_or(|namespace| **namespace == *key.namespace) {
                let executors = job.executors.iter().map(|(name, executor)| (name, executor.list));
                let drivers = job.drivers.iter().map(|(name, driver)| (name, driver.list));
                let missing = executors.chain(drivers).filter(|(_, seen)| *seen != list);
                gone.extend(missing.map(|(name, _)| (Arc::clone(key), Arc::clone(name))));
            }
        }
        for (job, name) in gone {
            self.forget_pod(&job.namespace, &name);
        }
    }

    /// A pod is, or is now, like this. `namespace` is what is watched: one namespace, or `None` for all.
    pub fn see_pod(&mut self, pod: &Pod<'_>, namespace: Option<&Arc<str>>) {
        let conventions = Arc::clone(&self.conventions);
        let (Some(of), Some(name)) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref()) else { return };
        let list = self.list(namespace);
        match JobPod::of(pod, &conventions) {
            Some(JobPod::Executor(seen)) => self.see_executor(name, seen, list),
            Some(JobPod::Driver(seen)) => self.see_driver(name, seen, list),
            None => self.forget_pod(of, name),
        }
    }

    /// A pod is gone.
    pub fn forget_pod(&mut self, namespace: &str, name: &str) {
        let Some(pods) = self.pods.get_mut(namespace) else { return };
        let Some((name, key)) = pods.remove_entry(name) else { return };
        if pods.is_empty() {
            self.pods.remove(namespace);
        }
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let executor = job.executors.remove(&name);
        let was_executor = executor.is_some();
        job.drivers.remove(&name);
        if job.executors.is_empty() && job.drivers.is_empty() {
            self.jobs.remove(&key);
        }
        if let Some(node) = executor.and_then(|executor| executor.node) {
            self.unbind(&node, &key);
        }
        self.complaints.remove(&(Arc::clone(&key), name));
        note(&mut self.changed, key, if was_executor { Change::Loss } else { Change::Other });
    }

    /// A list of the nodes begins.
    pub fn begin_nodes(&mut self) {
        self.node_lists = self.node_lists.wrapping_add(1);
    }

    /// The list is complete: nodes that it did not name are gone.
    pub fn end_nodes(&mut self) {
        let list = self.node_lists;
        for node in self.nodes.values_mut().filter(|node| node.list != list) {
            node.exists = false;
        }
        self.nodes.retain(|_, node| node.exists || !node.jobs.is_empty());
    }

    /// A node has, or has now, this value of the capacity label.
    pub fn see_node(&mut self, name: &str, capacity: Option<Capacity>) {
        let list = self.node_lists;
        let name = self.node(name);
        let Some(node) = self.nodes.get_mut(&name) else { return };
        if node.capacity != capacity {
            for (job, _) in &node.jobs {
                note(&mut self.changed, Arc::clone(job), Change::Other);
            }
        }
        (node.capacity, node.exists, node.list) = (capacity, true, list);
    }

    /// A node is gone. Its capacity is remembered for the executors that are still bound to it.
    pub fn forget_node(&mut self, name: &str) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.exists = false;
            if node.jobs.is_empty() {
                self.nodes.remove(name);
            }
        }
    }

    /// The jobs of which something has changed since this was asked last, and what.
    pub fn take_changed(&mut self) -> HashMap<Arc<JobId>, Change> {
        mem::take(&mut self.changed)
    }

    /// What is to be told of drivers since this was asked last: one complaint for each wording.
    pub fn take_complaints(&mut self) -> Vec<Complaint> {
        mem::take(&mut self.complaints).into_values().collect()
    }

    /// All jobs with a live pod.
    pub fn jobs(&self) -> impl Iterator<Item = &Arc<JobId>> {
        self.jobs.keys()
    }

    /// Whether the job has a live pod.
    pub fn knows(&self, job: &JobId) -> bool {
        self.jobs.contains_key(job)
    }

    /// What is to be in the job's ledger.
    pub fn observe(&self, job: &JobId) -> Observed<'_> {
        let Some(job) = self.jobs.get(job) else { return Observed { ended: true, ..Observed::default() } };
        let live = job.executors.iter().map(|(name, executor)| LiveExecutor {
            key: executor.key.as_deref().unwrap_or(name),
            uid: &executor.uid,
            capacity: self.capacity(executor),
        });
        // Of several drivers, such as those of an earlier attempt, the newest speaks.
        let newest = job.drivers.values().max_by_key(|driver| (&driver.created, &driver.uid));
        Observed {
            live: live.collect(),
            overrides: newest.map(|driver| driver.overrides).unwrap_or_default(),
            ended: false,
        }
    }

    /// Counts all that is live.
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

    /// Where it runs or must run: the node's label first (DESIGN section 7).
    fn capacity(&self, executor: &Executor) -> Option<Capacity> {
        let landed = executor.node.as_ref().and_then(|node| self.nodes.get(node)?.capacity);
        landed.or(executor.asked)
    }

    fn see_executor(&mut self, name: &str, seen: ExecutorPod<'_>, list: u32) {
        let ExecutorPod { job, key, uid, node, asked } = seen;
        let (name, job) = self.enter(name, job.to_job_id());
        let node = node.map(|node| self.node(node));
        let key = (key != &*name).then(|| key.into());
        let now = Executor { key, uid: uid.into(), node: node.clone(), asked, list };
        let Some(known) = self.jobs.get_mut(&job) else { return };
        let as_a_driver = known.drivers.remove(&name).is_some();
        let before = known.executors.insert(name, now);
        let bound = before.as_ref().and_then(|before| before.node.clone());
        let same = before.is_some_and(|before| *before.uid == *uid && before.asked == asked && before.node == node);
        if bound != node {
            if let Some(node) = bound {
                self.unbind(&node, &job);
            }
            if let Some(node) = node {
                self.bind(&node, &job);
            }
        }
        if !same || as_a_driver {
            note(&mut self.changed, job, Change::Other);
        }
    }

    fn see_driver(&mut self, name: &str, seen: DriverPod<'_>, list: u32) {
        let DriverPod { job, uid, created, overrides, invalid } = seen;
        let (name, job) = self.enter(name, job.to_job_id());
        let Some(known) = self.jobs.get_mut(&job) else { return };
        let as_an_executor = known.executors.remove(&name);
        let before = known.drivers.remove(&name).filter(|before| *before.uid == *uid);
        // A part that cannot be read leaves in force what was read last; one that is not there, the default.
        let last = before.as_ref().map(|before| before.overrides).unwrap_or_default();
        let is_invalid = |field| invalid.iter().any(|invalid| invalid.field == field);
        let overrides = overrides
            .or_overrides(last.filter(is_invalid))
            .or_overrides(PolicyOverrides::from(self.defaults).filter(|field| !is_invalid(field)));
        let told = before.as_ref().map(|before| before.invalid.as_slice()).unwrap_or_default();
        let untold: Vec<_> = invalid.iter().filter(|invalid| !told.contains(invalid)).cloned().collect();
        let same = before.is_some_and(|before| before.overrides == overrides);
        let about = (Arc::clone(&job), Arc::clone(&name));
        // One that was not taken yet may be of what is mended by now.
        let mut complaining = self.complaints.remove(&about).map(|complaint| complaint.invalid).unwrap_or_default();
        complaining.retain(|earlier| invalid.contains(earlier));
        complaining.extend(untold);
        if !complaining.is_empty() {
            let (job, driver) = about.clone();
            let complaint = Complaint { job, driver, uid: uid.into(), invalid: complaining, holds: overrides };
            self.complaints.insert(about, complaint);
        }
        known.drivers.insert(name, Driver { uid: uid.into(), created: created.into(), overrides, invalid, list });
        if as_an_executor.is_some() {
            note(&mut self.changed, Arc::clone(&job), Change::Loss);
        }
        if let Some(node) = as_an_executor.and_then(|executor| executor.node) {
            self.unbind(&node, &job);
        }
        if !same {
            note(&mut self.changed, job, Change::Other);
        }
    }

    /// Notes of which job the pod is; one that was of another job leaves that.
    fn enter(&mut self, name: &str, job: JobId) -> (Arc<str>, Arc<JobId>) {
        let known = self.pods.get(job.namespace.as_str()).and_then(|pods| pods.get_key_value(name));
        if let Some((name, known)) = known
            && **known == job
        {
            return (Arc::clone(name), Arc::clone(known));
        }
        if known.is_some() {
            self.forget_pod(&job.namespace, name);
        }
        let job = match self.jobs.get_key_value(&job) {
            Some((known, _)) => Arc::clone(known),
            None => {
                let job = Arc::new(job);
                self.jobs.insert(Arc::clone(&job), Job::default());
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

    /// The node's own copy of its name.
    fn node(&mut self, name: &str) -> Arc<str> {
        if let Some((name, _)) = self.nodes.get_key_value(name) {
            return Arc::clone(name);
        }
        let name: Arc<str> = name.into();
        self.nodes.insert(Arc::clone(&name), Node { list: self.node_lists, ..Node::default() });
        name
    }

    fn bind(&mut self, node: &str, job: &Arc<JobId>) {
        let Some(node) = self.nodes.get_mut(node) else { return };
        match node.jobs.iter_mut().find(|(known, _)| known == job) {
            Some((_, executors)) => *executors += 1,
            None => node.jobs.push((Arc::clone(job), 1)),
        }
    }

    fn unbind(&mut self, name: &str, job: &Arc<JobId>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if let Some(at) = node.jobs.iter().position(|(known, _)| known == job)
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

    fn list(&self, namespace: Option<&Arc<str>>) -> u32 {
        self.pod_lists.get(&namespace.cloned()).copied().unwrap_or_default()
    }
}

/// What holds of a part, in words for the person who edited it.
pub(crate) fn in_words(holds: PolicyOverrides, invalid: &InvalidField) -> String {
    let value = holds.value(invalid.field);
    value.map_or_else(|| "what held before holds on".to_owned(), |value| format!("{value} holds on"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use balancer_core::PolicyField;

    fn view() -> View {
        View::new(Arc::new(Conventions::default()), Policy::default())
    }

    fn job() -> JobId {
        JobId { namespace: "etl".into(), app_id: "j".into() }
    }

    fn see(view: &mut View, name: &str, role: &str, change: impl FnOnce(&mut Value)) {
        view.see_pod(&pod(name, role, change), None);
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

    fn drive(view: &mut View, name: &str, annotations: Value) {
        see(view, name, "driver", |pod| pod["metadata"]["annotations"] = annotations);
    }

    fn capacities(view: &View) -> Vec<Option<Capacity>> {
        view.observe(&job()).live.iter().map(|live| live.capacity).collect()
    }

    fn policy(view: &View) -> Option<(String, u32)> {
        let policy = view.observe(&job()).overrides.or(None)?;
        Some((policy.spot_ratio.to_string(), policy.on_demand_base))
    }

    #[test]
    fn the_capacity_of_a_node_that_is_gone_is_remembered_for_its_executors_and_no_longer() {
        let mut view = view();
        view.see_node("n", Some(Capacity::OnDemand));
        see(&mut view, "e", "executor", |pod| {
            pod["spec"]["nodeName"] = json!("n");
            pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
        });
        view.forget_node("n");
        assert_eq!(capacities(&view), [Some(Capacity::OnDemand)]);
        view.begin_nodes();
        view.end_nodes();
        assert_eq!(capacities(&view), [Some(Capacity::OnDemand)]);
        view.forget_pod("etl", "e");
        assert!(view.nodes.is_empty(), "{:?}", view.nodes);
    }

    #[test]
    fn nodes_without_executors_are_kept_while_they_exist() {
        let mut view = view();
        for node in ["a", "b", "c"] {
            view.see_node(node, Some(Capacity::Spot));
        }
        view.forget_node("a");
        view.begin_nodes();
        view.see_node("b", Some(Capacity::Spot));
        view.end_nodes();
        assert_eq!(view.nodes.len(), 1);
    }

    #[test]
    fn nothing_is_kept_of_pods_that_are_gone() {
        let mut view = view();
        for round in 0..3 {
            view.begin_pods(None);
            for id in 0..10 {
                see(&mut view, &format!("e{round}-{id}"), "executor", |pod| pod["spec"]["nodeName"] = json!("n"));
            }
            drive(&mut view, "d", json!({"workload/spot-ratio": "x"}));
            view.end_pods(None);
            assert_eq!(view.observe(&job()).live.len(), 10);
        }
        view.begin_pods(None);
        view.end_pods(None);
        assert_eq!(view.totals(), Totals::default());
        assert!(view.jobs.is_empty() && view.pods.is_empty() && view.nodes.is_empty() && view.complaints.is_empty());
    }

    #[test]
    fn a_list_of_one_namespace_says_nothing_of_another() {
        let (mut view, etl) = (view(), Arc::<str>::from("etl"));
        view.begin_pods(Some(&etl));
        view.see_pod(&pod("e", "executor", |_| {}), Some(&etl));
        view.end_pods(Some(&etl));
        let ml = Arc::<str>::from("ml");
        view.begin_pods(Some(&ml));
        view.end_pods(Some(&ml));
        assert!(view.knows(&job()));
    }

    #[test]
    fn the_newest_driver_speaks_for_its_job_and_what_it_leaves_out_is_the_default() {
        let mut view = view();
        assert_eq!(policy(&view), None);
        drive(&mut view, "old", json!({"workload/spot-ratio": "0.1", "workload/on-demand-base": "3"}));
        assert_eq!(policy(&view), Some(("0.1".into(), 3)));
        see(&mut view, "new", "driver", |pod| pod["metadata"]["creationTimestamp"] = json!("2026-01-02T00:00:00Z"));
        assert_eq!(policy(&view), Some(("0.5".into(), 0)));
        view.forget_pod("etl", "new");
        assert_eq!(policy(&view), Some(("0.1".into(), 3)));
    }

    #[test]
    fn what_cannot_be_read_leaves_the_last_good_part_in_force_and_is_told_once() {
        let mut view = view();
        drive(&mut view, "d", json!({"workload/spot-ratio": "0.7", "workload/on-demand-base": "2"}));
        assert!(view.take_complaints().is_empty());
        for _ in 0..3 {
            drive(&mut view, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "4"}));
        }
        assert_eq!(policy(&view), Some(("0.7".into(), 4)));
        drive(&mut view, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "5"}));
        let told = view.take_complaints();
        let [Complaint { invalid, holds, .. }] = told.as_slice() else { panic!("{told:?}") };
        assert_eq!(in_words(*holds, &invalid[0]), "0.7 holds on");
        drive(&mut view, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "x"}));
        let told = view.take_complaints();
        assert!(
            matches!(told.as_slice(), [Complaint { invalid, .. }] if matches!(invalid.as_slice(), [InvalidField { field: PolicyField::OnDemandBase, .. }])),
            "{told:?}"
        );
        drive(&mut view, "d", json!({"workload/on-demand-base": "4"}));
        assert_eq!(policy(&view), Some(("0.5".into(), 4)));
    }

    #[test]
    fn a_part_that_was_never_read_is_left_to_the_ledger() {
        let mut view = view();
        drive(&mut view, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "4"}));
        assert_eq!(
            view.observe(&job()).overrides,
            PolicyOverrides {
                spot_ratio: None,
                ..PolicyOverrides::from(Policy { on_demand_base: 4, ..Policy::DEFAULT })
            }
        );
        let told = view.take_complaints();
        assert_eq!(in_words(told[0].holds, &told[0].invalid[0]), "what held before holds on");
    }
}
