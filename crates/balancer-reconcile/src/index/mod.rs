//! The state of the cluster: every job's live pods, and the capacity of each node. Pure: no I/O and no clock.

mod changes;
mod facts;
mod invalid_annotation;
mod job;
mod nodes;
mod shares;

use std::collections::{HashMap, HashSet};
use std::iter::once;
use std::mem;
use std::sync::Arc;

use balancer_core::{
    Capacity, CapacityProfile, Conventions, DriverPod, ExecutorPod, JobId, JobPod, JobRef, LiveExecutor, Pod, Policy,
    PolicyField, PolicyOverrides, Pool, SpotRatio,
};

use changes::add_change;
pub use changes::{Change, ChangedJobs, Changes, Executors};
pub use facts::{distance, wanted_spot};
pub use invalid_annotation::InvalidAnnotation;
use invalid_annotation::InvalidAnnotations;
pub(crate) use job::CountBounds;
pub(crate) use job::FixedCapacity;
use job::{ByCapacity, Driver, Executor, Group, Team};
pub use job::{Churn, DesiredState, DriverRef};
use nodes::NodeIndex;

/// All live executors and drivers by their jobs, and the capacities of the nodes.
///
/// Executors with one job id and one owner are a team. The team of the primary owner, which is the oldest driver of the
/// job id that owns executors, and the executors without an owner are the job of the job id itself. Every other team is a
/// job of its own, see [`JobId::of_driver`].
///
/// It keeps of each executor its name, its uid, and eight words more; the owner once for the team. It keeps a node while
/// the node exists, or an executor is bound to it.
#[derive(Debug)]
pub struct ClusterIndex {
    conventions: Arc<Conventions>,
    defaults: Policy,
    /// By the job of the job id.
    groups: HashMap<Arc<JobId>, Group>,
    /// A team's key is the job that it would be by itself.
    teams: HashMap<Arc<JobId>, Team>,
    namespaces: HashMap<Box<str>, Namespace>,
    nodes: NodeIndex,
    /// The lists of each namespace's pods; `None` stands for all namespaces.
    lists: HashMap<Option<Arc<str>>, Lists>,
    /// The lists of pods that are under way, and what the watch has reported meanwhile.
    listing: HashMap<Option<Arc<str>>, Watched>,
    changed: ChangedJobs,
    invalid_annotations: InvalidAnnotations,
}

/// The lists of a scope.
#[derive(Debug, Default)]
struct Lists {
    /// How many were started.
    started: u32,
    /// Whether one was completed.
    is_listed: bool,
}

/// The names of pods, by their namespaces.
type Watched = HashMap<Box<str>, HashSet<Box<str>>>;

/// The pods of a namespace, by their names.
#[derive(Debug, Default)]
struct Namespace {
    /// The team of each executor.
    executors: HashMap<Arc<str>, Arc<JobId>>,
    drivers: HashMap<Arc<str>, Driver>,
    /// The teams of each owner. An owner may have executors with several job ids.
    teams: HashMap<Arc<str>, Vec<Arc<JobId>>>,
}

/// The number of live jobs and executors, for the gauges. Jobs that have opted out are not counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    /// Jobs with a live pod.
    pub jobs: u64,
    /// Executors on spot.
    pub spot: u64,
    /// Executors on on-demand.
    pub on_demand: u64,
    /// Executors whose capacity is not known yet.
    pub unknown: u64,
    /// Of the jobs with a ratio, by their namespaces: those with the most executors, and the others together.
    pub namespaces: Vec<NamespaceTotals>,
}

/// The executors of a namespace's jobs with a ratio.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NamespaceTotals {
    /// The namespace; [`NamespaceTotals::OTHERS`] for several.
    pub namespace: String,
    /// Executors on spot.
    pub spot: u64,
    /// All executors.
    pub executors: u64,
    /// How many of them the jobs' ratios and bases want on spot.
    pub wanted_spot: f64,
}

impl NamespaceTotals {
    /// Stands for the namespaces that have no row of their own. No namespace has such a name.
    pub const OTHERS: &str = "(others)";
    /// Rows at most, besides that of the others: each is a series.
    pub const MAX: usize = 20;

    fn add(&mut self, other: &Self) {
        self.spot += other.spot;
        self.executors += other.executors;
        self.wanted_spot += other.wanted_spot;
    }

    /// Those with the most executors, and the others together.
    fn largest(namespaces: HashMap<&str, Self>) -> Vec<Self> {
        let mut rows: Vec<Self> = namespaces
            .into_iter()
            .map(|(namespace, totals)| Self { namespace: namespace.to_owned(), ..totals })
            .collect();
        rows.sort_by(|a, b| b.executors.cmp(&a.executors).then_with(|| a.namespace.cmp(&b.namespace)));
        let mut others = Self { namespace: Self::OTHERS.to_owned(), ..Self::default() };
        for row in rows.drain(rows.len().min(Self::MAX)..) {
            others.add(&row);
        }
        rows.push(others);
        rows
    }
}

/// Whether an executor with the job's label value and this owner belongs to the job, if `primary` is the primary owner.
pub(crate) fn is_of_job(job: JobRef<'_>, owner: Option<&str>, primary: Option<&str>) -> bool {
    match job.driver() {
        Some(driver) => owner == Some(driver) && primary != Some(driver),
        // Without a primary owner the first one that the index gets to know will be it.
        None => owner.is_none() || primary.is_none() || owner == primary,
    }
}

impl ClusterIndex {
    /// The index of a cluster of which nothing is known yet.
    pub fn new(conventions: Arc<Conventions>, defaults: Policy) -> Self {
        Self {
            conventions,
            defaults,
            groups: HashMap::new(),
            teams: HashMap::new(),
            namespaces: HashMap::new(),
            nodes: NodeIndex::default(),
            lists: HashMap::new(),
            listing: HashMap::new(),
            changed: HashMap::new(),
            invalid_annotations: InvalidAnnotations::default(),
        }
    }

    /// A list of pods starts. `scope` is the namespace that is listed, or `None` for all. A watch may go on meanwhile: from
    /// now on it knows better than the list, which has a state of after now.
    pub fn init_pods(&mut self, scope: Option<&Arc<str>>) {
        let lists = self.lists.entry(scope.cloned()).or_default();
        lists.started = lists.started.wrapping_add(1);
        self.listing.insert(scope.cloned(), Watched::new());
    }

    /// A pod was listed. Returns whether it was applied: the watch may have reported it meanwhile.
    pub fn list_pod(&mut self, pod: &Pod<'_>, scope: Option<&Arc<str>>) -> bool {
        let (namespace, name) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref());
        let (Some(namespace), Some(name)) = (namespace, name) else { return false };
        let watched = self.listing.get(&scope.cloned()).and_then(|watched| watched.get(namespace));
        let is_new = !watched.is_some_and(|names| names.contains(name));
        if is_new {
            self.put_pod(pod, namespace, name, scope);
        }
        is_new
    }

    /// The list could not be completed. Nothing is known to be gone.
    pub fn init_pods_failed(&mut self, scope: Option<&Arc<str>>) {
        self.listing.remove(&scope.cloned());
    }

    /// The list is complete: pods that it did not contain are gone.
    pub fn init_pods_done(&mut self, scope: Option<&Arc<str>>) {
        self.listing.remove(&scope.cloned());
        let generation = self.generation(scope);
        let is_listed = |namespace: &str| scope.is_none_or(|scope| **scope == *namespace);
        let mut gone = Vec::new();
        for (id, team) in self.teams.iter().filter(|(id, _)| is_listed(&id.namespace)) {
            let missing = team.executors.iter().filter(|(_, executor)| executor.generation != generation);
            gone.extend(missing.map(|(name, _)| (id.namespace.clone(), Arc::clone(name))));
        }
        for (namespace, pods) in self.namespaces.iter().filter(|(namespace, _)| is_listed(namespace)) {
            let missing = pods.drivers.iter().filter(|(_, driver)| driver.generation != generation);
            gone.extend(missing.map(|(name, _)| (namespace.to_string(), Arc::clone(name))));
        }
        for (namespace, name) in gone {
            self.remove_pod(&namespace, &name);
        }
        // Later lists change nothing: the ledgers of a group stay where they are.
        if self.lists.get_mut(&scope.cloned()).is_none_or(|lists| mem::replace(&mut lists.is_listed, true)) {
            return;
        }
        // The order of a list is no reason to prefer an owner.
        let is_open = |group: &Group| group.drivers.is_empty() && group.teams.len() > 1;
        let open = self.groups.iter().filter(|(id, group)| is_listed(&id.namespace) && is_open(group));
        for id in open.map(|(id, _)| Arc::clone(id)).collect::<Vec<_>>() {
            self.elect(&id, false);
        }
    }

    /// A pod was added or changed. `scope` is the namespace that is watched, or `None` for all.
    pub fn apply_pod(&mut self, pod: &Pod<'_>, scope: Option<&Arc<str>>) {
        let metadata = &pod.metadata;
        let (Some(namespace), Some(name)) = (metadata.namespace.as_deref(), metadata.name.as_deref()) else { return };
        self.watched_pod(namespace, name);
        self.put_pod(pod, namespace, name, scope);
    }

    /// A pod is gone.
    pub fn delete_pod(&mut self, namespace: &str, name: &str) {
        self.watched_pod(namespace, name);
        self.remove_pod(namespace, name);
    }

    /// A watch has reported that the pod with this uid is gone. Returns `false` if another pod of this name is known: a list
    /// has shown a later one already, which the watch will report too.
    pub(crate) fn delete_watched_pod(&mut self, namespace: &str, name: &str, uid: &str) -> bool {
        self.watched_pod(namespace, name);
        self.remove_pod_of(namespace, name, Some(uid))
    }

    /// The uid of the live executor or driver of this name.
    fn uid(&self, namespace: &str, name: &str) -> Option<&str> {
        let pods = self.namespaces.get(namespace)?;
        let executor = || self.teams.get(pods.executors.get(name)?)?.executors.get(name).map(|executor| &*executor.uid);
        executor().or_else(|| pods.drivers.get(name).map(|driver| &*driver.uid))
    }

    /// The watch has reported the pod, so a list that is under way has nothing to say about it.
    fn watched_pod(&mut self, namespace: &str, name: &str) {
        for (scope, watched) in &mut self.listing {
            if scope.as_deref().is_none_or(|scope| scope == namespace) {
                watched.entry(namespace.into()).or_default().insert(name.into());
            }
        }
    }

    fn put_pod(&mut self, pod: &Pod<'_>, namespace: &str, name: &str, scope: Option<&Arc<str>>) {
        let conventions = Arc::clone(&self.conventions);
        let generation = self.generation(scope);
        match JobPod::of(pod, &conventions) {
            Some(JobPod::Executor(executor)) => self.apply_executor(name, executor, generation),
            Some(JobPod::Driver(driver)) => self.apply_driver(name, driver, generation),
            // What ends may be the former pod of this name.
            None => {
                self.remove_pod_of(namespace, name, pod.metadata.uid.as_deref());
            }
        }
    }

    /// Removes the pod, unless the live one of this name has another uid. Returns `false` then.
    fn remove_pod_of(&mut self, namespace: &str, name: &str, uid: Option<&str>) -> bool {
        let is_other = uid.zip(self.uid(namespace, name)).is_some_and(|(uid, known)| uid != known);
        if !is_other {
            self.remove_pod(namespace, name);
        }
        !is_other
    }

    fn remove_pod(&mut self, namespace: &str, name: &str) {
        self.delete_executor(namespace, name);
        self.delete_driver(namespace, name);
    }

    /// A list of the nodes starts.
    pub fn init_nodes(&mut self) {
        self.nodes.init();
    }

    /// The list is complete: nodes that it did not contain are gone.
    pub fn init_nodes_done(&mut self) {
        self.nodes.init_done();
    }

    /// The list could not be completed. Nothing is known to be gone.
    pub fn init_nodes_failed(&mut self) {
        self.nodes.init_failed();
    }

    /// Whether the watch has reported the node after the list that is under way has started. Then it knows better.
    pub fn is_known_better(&self, name: &str) -> bool {
        self.nodes.is_known_better(name)
    }

    /// A node was listed, added or changed.
    pub fn apply_node(&mut self, name: &str, capacity: Option<Capacity>) {
        let Self { groups, teams, nodes, changed, .. } = self;
        for (id, bound) in nodes.apply(name, capacity) {
            let (Some(job), Some(team)) = (job_of(groups, teams, id), teams.get(id)) else { continue };
            let key = |name| Some(team.executors.get(name)?.key(name));
            add_change(changed, job, Change::Other, Executors::Some(bound.iter().filter_map(key).collect()));
        }
    }

    /// A node that was applied is of this pool.
    pub fn set_pool(&mut self, name: &str, pool: Option<Pool>) {
        let Self { groups, teams, nodes, changed, .. } = self;
        for team in nodes.set_pool(name, pool) {
            if let Some(job) = job_of(groups, teams, team) {
                add_change(changed, job, Change::Other, Executors::default());
            }
        }
    }

    /// Another platform than the configured one shows that this node is spot.
    pub fn set_other_platform(&mut self, name: &str, platform: Option<CapacityProfile>) {
        self.nodes.set_other_platform(name, platform);
    }

    /// A platform whose labels the spot nodes have, if none has those of the configured one.
    pub fn likely_platform(&self) -> Option<CapacityProfile> {
        self.nodes.likely_platform()
    }

    /// A node is gone. Its capacity is remembered for the executors that are still bound to it.
    pub fn delete_node(&mut self, name: &str) {
        self.nodes.delete(name);
    }

    /// The jobs that have changed since the last call, and how.
    pub fn take_changed(&mut self) -> ChangedJobs {
        mem::take(&mut self.changed)
    }

    /// The annotations that became invalid and were not taken yet, of at most so many drivers.
    pub fn take_invalid_annotations(&mut self, most: usize) -> Vec<InvalidAnnotation> {
        self.invalid_annotations.take(most)
    }

    /// All jobs with a live pod.
    pub fn jobs(&self) -> impl Iterator<Item = &Arc<JobId>> {
        self.groups.iter().flat_map(|(id, group)| {
            let others = group.teams.iter().filter(|(owner, _)| !group.is_primary(owner.as_ref()));
            once(id).chain(others.map(|(_, team)| team))
        })
    }

    /// Whether the job has a live pod.
    pub fn contains(&self, job: &JobId) -> bool {
        self.teams_of(job).next().is_some()
    }

    /// Whether the job has a live executor of this key.
    pub(crate) fn has_executor(&self, job: &JobId, key: &str) -> bool {
        self.executor(job, key).is_some()
    }

    /// The job's live executor of this key, and the name of its pod.
    fn executor(&self, job: &JobId, key: &str) -> Option<(&Arc<str>, &Executor)> {
        self.teams_of(job).find_map(|team| {
            let by_name = team.executors.get_key_value(key).filter(|(_, executor)| executor.key.is_none());
            by_name.or_else(|| team.executors.get_key_value(team.generated.get(key)?))
        })
    }

    /// The job of a live executor, by the name of its pod.
    pub fn job_of_executor(&self, namespace: &str, name: &str) -> Option<Arc<JobId>> {
        job_of(&self.groups, &self.teams, self.namespaces.get(namespace)?.executors.get(name)?)
    }

    /// How many live executors the job has.
    pub(crate) fn executors(&self, job: &JobId) -> usize {
        self.teams_of(job).map(|team| team.executors.len()).sum()
    }

    /// How many executors of the job came and went so far.
    pub(crate) fn churn(&self, job: &JobId) -> Churn {
        self.teams_of(job).fold(Churn::default(), |all, Team { churn, .. }| Churn {
            added: all.added + churn.added,
            lost: all.lost + churn.lost,
        })
    }

    /// The capacity of the node of the job's executor of this key; `None` if it has no node.
    pub(crate) fn bound_capacity(&self, job: &JobId, key: &str) -> Option<Capacity> {
        let (_, executor) = self.executor(job, key)?;
        executor.node.as_ref()?;
        self.capacity(executor)
    }

    /// Whether a pod is a live executor.
    pub(crate) fn is_executor(&self, namespace: &str, name: &str) -> bool {
        self.namespaces.get(namespace).is_some_and(|pods| pods.executors.contains_key(name))
    }

    /// The primary owner of the executors with the job's job id.
    pub(crate) fn primary(&self, job: JobRef<'_>) -> Option<&Arc<str>> {
        self.groups.get(&group_of(job))?.primary.as_ref()
    }

    /// The pod that drives the job, if it is known.
    pub fn driver(&self, job: &JobId) -> Option<DriverRef> {
        let name = self.driver_name(job)?;
        let driver = self.driver_pod(&job.namespace, name).map(|driver| &driver.uid);
        let team = || self.teams.get(&JobId::of_driver(group_of(job.as_job_ref()).as_job_ref(), name));
        let uid = driver.or_else(|| team().map(|team| &team.owner_uid))?.to_string();
        Some(DriverRef { namespace: job.namespace.clone(), name: name.to_string(), uid })
    }

    /// Stores that something about the job was reported. Returns whether it is for the first time.
    pub(crate) fn report_once(&mut self, job: &JobId) -> bool {
        let owner = self.driver_name(job).cloned();
        let group = self.groups.get(&group_of(job.as_job_ref()));
        let Some(team) = group.and_then(|group| group.teams.get(&owner)) else { return false };
        self.teams.get_mut(team).is_some_and(|team| !mem::replace(&mut team.is_reported, true))
    }

    /// The driver that the job's ledger should name.
    pub(crate) fn desired_driver(&self, job: &JobId) -> Option<&str> {
        self.teams_of(job).find_map(|team| team.owner.as_deref())
    }

    /// The job in which the executors of this job's driver count, if that is the job of the job id: the driver has become
    /// the primary owner.
    pub(crate) fn moved_to(&self, job: &JobId) -> Option<&Arc<JobId>> {
        let job = job.as_job_ref();
        let driver = job.driver()?;
        let (id, group) = self.groups.get_key_value(&group_of(job))?;
        (group.primary.as_deref() == Some(driver)).then_some(id)
    }

    /// The keys of the job's live executors.
    pub fn keys(&self, job: &JobId) -> impl Iterator<Item = Arc<str>> {
        self.teams_of(job).flat_map(|team| team.executors.iter().map(|(name, executor)| executor.key(name)))
    }

    /// The job's live executor of this key, as its entry should be.
    pub fn live(&self, job: &JobId, key: &str) -> Option<LiveExecutor<'_>> {
        let (name, executor) = self.executor(job, key)?;
        let key = executor.key.as_deref().unwrap_or(name);
        let (capacity, states_ratio) = (self.capacity(executor), executor.states_ratio);
        Some(LiveExecutor { key, uid: &executor.uid, capacity, states_ratio })
    }

    /// What the job's ledger should contain of the executors with these keys, and what it should say about the job.
    pub fn desired<'a>(&'a self, job: &JobId, keys: impl IntoIterator<Item = &'a Arc<str>>) -> DesiredState<'a> {
        let mut desired = DesiredState {
            overrides: self.overrides(job),
            ended: !self.contains(job),
            driver: self.desired_driver(job),
            ..DesiredState::default()
        };
        for key in keys {
            match self.live(job, key) {
                Some(live) => desired.live.push(live),
                None => desired.gone.push(key),
            }
        }
        desired
    }

    /// The counts that the job's ledger must have at least and at most, without placements that wait for their pods. It goes
    /// through all executors.
    pub(crate) fn bounds(&self, job: &JobId, is_opted_out: bool) -> CountBounds {
        let mut bounds = CountBounds::default();
        for executor in self.teams_of(job).flat_map(|team| team.executors.values()) {
            bounds.most += 1;
            // In a job that is opted out, others may be there, but need not.
            if let Some(capacity) = self.capacity(executor).filter(|_| executor.states_ratio || !is_opted_out) {
                bounds.least.add(capacity);
            }
        }
        bounds
    }

    /// What all of the job's live executors require by themselves, if they require the same capacity.
    pub(crate) fn fixed(&self, job: &JobId) -> Option<FixedCapacity> {
        let mut all = ByCapacity::default();
        self.teams_of(job).for_each(|team| all.add(team.fixed));
        // During a migration some may be of the original, which left no mark on those that it has placed.
        let capacity = all.common().filter(|_| all.total() >= FixedCapacity::ENOUGH)?;
        Some(FixedCapacity { capacity, states_ratio: self.stated(job).map(|driver| driver.states_ratio) })
    }

    /// Counts everything that is live. `policy` returns what a job's ledger has, for those whose driver is not watched.
    pub fn totals(&self, policy: impl Fn(&JobId) -> Option<Policy>) -> Totals {
        let mut totals = Totals::default();
        let mut namespaces: HashMap<&str, NamespaceTotals> = HashMap::new();
        for job_id in self.jobs() {
            let stored = policy(job_id);
            let stated = self.overrides(job_id).spot_ratio.or_else(|| stored.map(|policy| policy.spot_ratio));
            if stated == Some(SpotRatio::Off) {
                continue;
            }
            let (mut spot, mut on_demand, mut unknown) = (0, 0, 0);
            for executor in self.teams_of(job_id).flat_map(|team| team.executors.values()) {
                match self.capacity(executor) {
                    Some(Capacity::Spot) => spot += 1,
                    Some(Capacity::OnDemand) => on_demand += 1,
                    None => unknown += 1,
                }
            }
            totals.jobs += 1;
            totals.spot += spot;
            totals.on_demand += on_demand;
            totals.unknown += unknown;
            let policy = self.policy(job_id, stored);
            if let Some(ratio) = policy.spot_ratio.share() {
                let executors: u64 = spot + on_demand + unknown;
                let wanted_spot = facts::wanted_spot(executors, policy.on_demand_base.into(), ratio);
                let job = NamespaceTotals { namespace: String::new(), spot, executors, wanted_spot };
                namespaces.entry(&job_id.namespace).or_default().add(&job);
            }
        }
        totals.namespaces = NamespaceTotals::largest(namespaces);
        totals
    }

    /// The capacity that the executor runs on or must run on. The node's label comes first.
    fn capacity(&self, executor: &Executor) -> Option<Capacity> {
        let of_node = executor.node.as_ref().and_then(|node| self.nodes.capacity(node));
        of_node.or(executor.asked)
    }

    /// The teams whose executors are the job's: none if the job has no live pod, and the primary one first.
    fn teams_of(&self, job: &JobId) -> impl Iterator<Item = &Team> {
        let (primary, other) = match job.as_job_ref().driver() {
            Some(_) => {
                let is_primary = |team: &Team| {
                    self.groups.get(&team.group).is_some_and(|group| group.is_primary(team.owner.as_ref()))
                };
                (None, self.teams.get(job).filter(|team| !is_primary(team)))
            }
            None => {
                let group = self.groups.get(job);
                let team = |owner: &Option<Arc<str>>| self.teams.get(group?.teams.get(owner)?);
                let primary = group.map(|group| &group.primary).filter(|primary| primary.is_some());
                (primary.and_then(team), team(&None))
            }
        };
        primary.into_iter().chain(other)
    }

    /// The name of the pod that drives the job.
    fn driver_name(&self, job: &JobId) -> Option<&Arc<str>> {
        match job.as_job_ref().driver() {
            Some(_) => self.teams.get(job)?.owner.as_ref(),
            None => self.groups.get(job)?.primary.as_ref(),
        }
    }

    fn driver_pod(&self, namespace: &str, name: &str) -> Option<&Driver> {
        self.namespaces.get(namespace)?.drivers.get(name)
    }

    /// The driver whose annotations are the job's policy, if it is watched.
    fn stated(&self, job: &JobId) -> Option<&Driver> {
        self.driver_pod(&job.namespace, self.driver_name(job)?)
    }

    /// The policy fields that the job's driver states, if it is watched.
    fn overrides(&self, job: &JobId) -> PolicyOverrides {
        self.stated(job).map(|driver| driver.overrides).unwrap_or_default()
    }

    fn apply_executor(&mut self, name: &str, executor: ExecutorPod<'_>, generation: u32) {
        let ExecutorPod { job, key, uid, driver: owner, driver_uid, node, asked, fixed, states_ratio } = executor;
        let was_driver = self.delete_driver(job.namespace, name);
        let (name, id) = self.enter(name, job, owner);
        let Some(team) = self.teams.get_mut(&id) else { return };
        if let Some(owner_uid) = driver_uid.filter(|owner_uid| **owner_uid != *team.owner_uid) {
            team.owner_uid = owner_uid.into();
        }
        let before = team.remove(&name);
        team.churn.added += u64::from(before.is_none());
        let is_same = before.as_ref().is_some_and(|before| {
            let is_same_pod = *before.uid == *uid && before.states_ratio == states_ratio;
            is_same_pod && before.asked == asked && before.node.as_deref() == node
        });
        let pending_before = before.as_ref().map(Executor::pending).unwrap_or_default();
        let asked_before = before.as_ref().and_then(|before| before.asked);
        let key_before = before.as_ref().map(|before| before.key(&name));
        let mut bound = before.and_then(|before| before.node);
        if bound.as_deref() != node {
            if let Some(node) = bound.take() {
                self.nodes.unbind(&node, &id, &name, asked_before);
            }
            bound = node.map(|node| self.nodes.bind(node, &id, &name, asked));
        } else if let Some(node) = &bound
            && asked_before != asked
        {
            self.nodes.set_asked(node, &id, asked_before, asked);
        }
        let key = (key != &*name).then(|| key.into());
        let uid = uid.into();
        let executor = Executor { key, uid, node: bound, asked, fixed, states_ratio, generation };
        self.nodes.set_pending(&id, pending_before, executor.pending());
        let mut changed = Executors::one(executor.key(&name));
        if let Some(before) = key_before {
            changed.merge(Executors::one(before));
        }
        team.insert(name, executor);
        let is_first = team.executors.len() == 1;
        if is_first {
            self.note_busy(&id);
        }
        if !is_same || was_driver {
            self.change(&id, Change::Other, changed);
        }
    }

    /// Stores to which team the executor belongs; one that belonged to another team leaves that one.
    fn enter(&mut self, name: &str, job: JobRef<'_>, owner: Option<&str>) -> (Arc<str>, Arc<JobId>) {
        let known = self.namespaces.get(job.namespace).and_then(|pods| pods.executors.get_key_value(name));
        if let Some((name, team)) = known {
            let of_team = team.as_job_ref();
            if (of_team.label_value(), of_team.driver()) == (job.app_id, owner) {
                return (Arc::clone(name), Arc::clone(team));
            }
            self.delete_executor(job.namespace, name.to_string().as_str());
        }
        let id = self.team(job, owner);
        let name: Arc<str> = name.into();
        self.namespace(job.namespace).executors.insert(Arc::clone(&name), Arc::clone(&id));
        (name, id)
    }

    fn delete_executor(&mut self, namespace: &str, name: &str) {
        let Some(pods) = self.namespaces.get_mut(namespace) else { return };
        let Some((name, id)) = pods.executors.remove_entry(name) else { return };
        let executor = self.teams.get_mut(&id).and_then(|team| {
            team.churn.lost += 1;
            team.remove(&name)
        });
        let key = executor.as_ref().map_or_else(|| Arc::clone(&name), |executor| executor.key(&name));
        let pending = executor.as_ref().map(Executor::pending).unwrap_or_default();
        self.nodes.set_pending(&id, pending, ByCapacity::default());
        if let Some(Executor { node: Some(node), asked, .. }) = executor {
            self.nodes.unbind(&node, &id, &name, asked);
        }
        self.change(&id, Change::Loss, Executors::one(key));
        self.note_busy(&id);
        self.leave(&id);
        self.forget_namespace(namespace);
    }

    fn apply_driver(&mut self, name: &str, driver: DriverPod<'_>, generation: u32) {
        let DriverPod { namespace, job, uid, created, overrides, invalid } = driver;
        self.delete_executor(namespace, name);
        let is_same_pod = |before: &Driver| {
            let job_before = before.job.as_ref().map(|job| job.as_job_ref());
            *before.uid == *uid && *before.created == *created && job_before == job
        };
        if self.driver_pod(namespace, name).is_some_and(|before| !is_same_pod(before)) {
            self.delete_driver(namespace, name);
        }
        let known = self.namespace(namespace).drivers.remove_entry(name);
        let (name, before) = known.map_or_else(|| (Arc::from(name), None), |(name, before)| (name, Some(before)));
        // The last valid value stays in use instead of an invalid one, the default instead of an absent one.
        let last = before.as_ref().map(|before| before.overrides).unwrap_or_default();
        let states_ratio = overrides.spot_ratio.is_some();
        let is_invalid = |field| invalid.iter().any(|invalid| invalid.field == field);
        let stated_before = before.as_ref().is_some_and(|before| before.has_stated_ratio);
        let has_stated_ratio = states_ratio || (stated_before && is_invalid(PolicyField::SpotRatio));
        let overrides = overrides
            .or_overrides(last.filter(is_invalid))
            .or_overrides(PolicyOverrides::from(self.defaults).filter(|field| !is_invalid(field)));
        let team = job.map(|job| self.team(job, Some(&name)));
        let job = team.as_ref().and_then(|team| self.teams.get(team)).map(|team| Arc::clone(&team.group));
        let reported = before.as_ref().map(|before| before.invalid.as_slice()).unwrap_or_default();
        let annotation = InvalidAnnotation {
            job: job.clone(),
            driver: DriverRef { namespace: namespace.to_owned(), name: name.to_string(), uid: uid.to_owned() },
            invalid: invalid.iter().filter(|invalid| !reported.contains(invalid)).cloned().collect(),
            in_use: overrides,
        };
        self.invalid_annotations.update(annotation, &invalid);
        let is_same = before.as_ref().is_some_and(|before| before.overrides == overrides);
        let is_off = |overrides: &PolicyOverrides| overrides.spot_ratio == Some(SpotRatio::Off);
        // In a job that was off, its executors were not added.
        let was_off = before.is_none_or(|before| is_off(&before.overrides));
        let counted = if was_off && !is_off(&overrides) { Executors::All } else { Executors::default() };
        let driver = Driver {
            uid: uid.into(),
            created: created.into(),
            job: job.clone(),
            overrides,
            states_ratio,
            has_stated_ratio,
            invalid,
            generation,
        };
        self.namespace(namespace).drivers.insert(Arc::clone(&name), driver);
        if let (Some(job), Some(team)) = (job, team.and_then(|team| self.teams.get_mut(&team)))
            && !mem::replace(&mut team.has_driver, true)
        {
            let has_executors = !team.executors.is_empty();
            if let Some(group) = self.groups.get_mut(&job) {
                group.drivers.insert((created.into(), Arc::clone(&name)));
                if has_executors {
                    group.busy.insert((created.into(), Arc::clone(&name)));
                }
            }
            self.elect(&job, true);
        }
        if !is_same {
            self.change_owned(namespace, &name, &counted);
        }
    }

    /// Returns whether there was such a driver.
    fn delete_driver(&mut self, namespace: &str, name: &str) -> bool {
        let Some(pods) = self.namespaces.get_mut(namespace) else { return false };
        let Some((name, driver)) = pods.drivers.remove_entry(name) else { return false };
        self.invalid_annotations.remove(namespace, &name);
        self.change_owned(namespace, &name, &Executors::default());
        if let Some(job) = driver.job {
            if let Some(group) = self.groups.get_mut(&job) {
                let driver = (driver.created, Arc::clone(&name));
                group.drivers.remove(&driver);
                group.busy.remove(&driver);
            }
            let team = JobId::of_driver(job.as_job_ref(), &name);
            if let Some(team) = self.teams.get_mut(&team) {
                team.has_driver = false;
            }
            self.leave(&team);
            self.elect(&job, true);
        }
        self.forget_namespace(namespace);
        true
    }

    /// The team with this job id and owner. A new one may change which owner is the primary one.
    fn team(&mut self, job: JobRef<'_>, owner: Option<&str>) -> Arc<JobId> {
        let group = job.to_job_id();
        let id = owner.map_or_else(|| group.clone(), |owner| JobId::of_driver(job, owner));
        if let Some((id, _)) = self.teams.get_key_value(&id) {
            return Arc::clone(id);
        }
        let id = Arc::new(id);
        let group = match self.groups.get_key_value(&group) {
            Some((known, _)) => Arc::clone(known),
            // The team of no owner has the same key.
            None if owner.is_none() => Arc::clone(&id),
            None => Arc::new(group),
        };
        let owner: Option<Arc<str>> = owner.map(Into::into);
        if let Some(owner) = &owner {
            self.namespace(job.namespace).teams.entry(Arc::clone(owner)).or_default().push(Arc::clone(&id));
        }
        self.groups.entry(Arc::clone(&group)).or_default().teams.insert(owner.clone(), Arc::clone(&id));
        let team = Team {
            group: Arc::clone(&group),
            owner,
            owner_uid: Box::default(),
            executors: HashMap::new(),
            generated: HashMap::new(),
            fixed: ByCapacity::default(),
            churn: Churn::default(),
            has_driver: false,
            is_reported: false,
        };
        self.teams.insert(Arc::clone(&id), team);
        self.elect(&group, true);
        id
    }

    /// Removes a team that has no pod left.
    fn leave(&mut self, id: &JobId) {
        if self.teams.get(id).is_none_or(|team| team.has_driver || !team.executors.is_empty()) {
            return;
        }
        let Some(Team { group: job, owner, .. }) = self.teams.remove(id) else { return };
        if let Some(owner) = &owner
            && let Some(pods) = self.namespaces.get_mut(id.namespace.as_str())
            && let Some(teams) = pods.teams.get_mut(owner)
        {
            teams.retain(|team| **team != *id);
            if teams.is_empty() {
                pods.teams.remove(owner);
            }
        }
        let Some(group) = self.groups.get_mut(&job) else { return };
        group.teams.remove(&owner);
        if group.teams.is_empty() {
            self.groups.remove(&job);
        } else if owner == group.primary {
            self.elect(&job, true);
        }
    }

    /// The team has got its first executor, or lost one. If its owner is a driver, the primary owner may be another one.
    fn note_busy(&mut self, id: &JobId) {
        let Some(team) = self.teams.get(id).filter(|team| team.has_driver) else { return };
        let (job, has_executors) = (Arc::clone(&team.group), !team.executors.is_empty());
        let Some(name) = team.owner.clone() else { return };
        let Some(driver) = self.driver_pod(&id.namespace, &name) else { return };
        let driver = (driver.created.clone(), name);
        let Some(group) = self.groups.get_mut(&job) else { return };
        let is_changed = if has_executors { group.busy.insert(driver) } else { group.busy.remove(&driver) };
        if is_changed {
            self.elect(&job, true);
        }
    }

    /// Chooses the primary owner of a group again. If it is another one, executors belong to other jobs.
    fn elect(&mut self, id: &JobId, keep: bool) {
        let Some((id, group)) = self.groups.get_key_value(id) else { return };
        let primary = group.elect(keep, &self.teams);
        if primary == group.primary {
            return;
        }
        let id = Arc::clone(id);
        let Some(group) = self.groups.get_mut(&id) else { return };
        let before = mem::replace(&mut group.primary, primary.clone());
        // Without a primary owner before, no team was a job of its own.
        if before.is_some() {
            let owners = [before, primary].into_iter().filter(Option::is_some);
            for team in owners.filter_map(|owner| group.teams.get(&owner)) {
                add_change(&mut self.changed, Arc::clone(team), Change::Other, Executors::All);
            }
        }
        add_change(&mut self.changed, id, Change::Other, Executors::All);
    }

    /// The job to which the team belongs has changed.
    fn change(&mut self, team: &JobId, change: Change, executors: Executors) {
        if let Some(job) = job_of(&self.groups, &self.teams, team) {
            add_change(&mut self.changed, job, change, executors);
        }
    }

    /// The policy of the jobs whose executors this pod owns may have changed. `executors` are those that count now and
    /// did not before.
    fn change_owned(&mut self, namespace: &str, owner: &str, executors: &Executors) {
        let teams = self.namespaces.get(namespace).and_then(|pods| pods.teams.get(owner));
        for team in teams.into_iter().flatten() {
            if let Some(job) = job_of(&self.groups, &self.teams, team) {
                add_change(&mut self.changed, job, Change::Other, executors.clone());
            }
        }
    }

    fn namespace(&mut self, name: &str) -> &mut Namespace {
        self.namespaces.entry(name.into()).or_default()
    }

    fn forget_namespace(&mut self, name: &str) {
        let is_empty = |pods: &Namespace| pods.executors.is_empty() && pods.drivers.is_empty() && pods.teams.is_empty();
        if self.namespaces.get(name).is_some_and(is_empty) {
            self.namespaces.remove(name);
        }
    }

    fn generation(&self, scope: Option<&Arc<str>>) -> u32 {
        self.lists.get(&scope.cloned()).map(|lists| lists.started).unwrap_or_default()
    }
}

/// The job of the job id.
fn group_of(job: JobRef<'_>) -> JobId {
    JobRef { app_id: job.label_value(), ..job }.to_job_id()
}

/// The job to which the team belongs.
fn job_of(groups: &HashMap<Arc<JobId>, Group>, teams: &HashMap<Arc<JobId>, Team>, team: &JobId) -> Option<Arc<JobId>> {
    let (id, team) = teams.get_key_value(team)?;
    let is_primary = groups.get(&team.group)?.is_primary(team.owner.as_ref());
    Some(Arc::clone(if is_primary { &team.group } else { id }))
}

#[cfg(test)]
mod tests;
