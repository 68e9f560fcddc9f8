//! What one job wants and has, from a snapshot. Pure.

use std::collections::{BTreeMap, HashMap};

use balancer_core::{Counts, JobId, JobPod, Ratio, SpotRatio};
use balancer_reconcile::index::{ClusterIndex, distance, wanted_spot};
use balancer_reconcile::jobs::share;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use crate::output::rounded;
use crate::settings::{Origin, Settings};
use crate::snapshot::{self, Missing, RatioSource, Snapshot, SpotState};

/// The jobs, and what they were read by.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) settings: Profile,
    pub(crate) missing: Vec<Missing>,
    pub(crate) jobs: Vec<JobStatus>,
    /// `None` for all namespaces.
    #[serde(skip)]
    pub(crate) namespace: Option<String>,
    /// The one that is shown; `None` for all jobs.
    #[serde(skip)]
    pub(crate) job: Option<String>,
    #[serde(skip)]
    pub(crate) now: Timestamp,
}

/// By which settings the cluster was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Profile {
    pub(crate) capacity_profile: String,
    #[serde(flatten)]
    pub(crate) origin: Origin,
    /// For people alone.
    #[serde(skip)]
    pub(crate) doubt: Option<String>,
}

/// What a job wants and has.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct JobStatus {
    pub(crate) namespace: String,
    pub(crate) job: String,
    pub(crate) driver: Option<String>,
    /// The wanted share of spot; `None` if it is not known, or the job is opted out.
    pub(crate) spot_ratio: Option<f64>,
    pub(crate) opted_out: bool,
    pub(crate) on_demand_base: Option<u32>,
    pub(crate) ratio_source: RatioSource,
    /// Executors with a node.
    pub(crate) spot: u64,
    pub(crate) on_demand: u64,
    pub(crate) unknown: u64,
    /// Executors without a node.
    pub(crate) pending: u64,
    pub(crate) pending_spot: u64,
    pub(crate) pending_on_demand: u64,
    /// Executors that require a capacity by themselves.
    pub(crate) fixed: u64,
    /// How many executors should be on spot.
    pub(crate) wanted_spot: Option<f64>,
    /// How many whole executors more than that are on spot or wait for it.
    pub(crate) distance: Option<i64>,
    pub(crate) largest_node: Option<LargestNode>,
    pub(crate) largest_pool: Option<LargestPool>,
    pub(crate) spot_state: SpotWord,
    pub(crate) spot_closed_since: Option<String>,
    pub(crate) created: Option<String>,
}

/// The node with the most executors of a job.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct LargestNode {
    pub(crate) name: String,
    pub(crate) executors: u64,
    /// Of the executors with a node.
    pub(crate) share: f64,
}

/// The pool with the most spot executors of a job.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LargestPool {
    pub(crate) instance_type: String,
    pub(crate) zone: String,
    pub(crate) executors: u64,
    /// Of the executors with a node.
    pub(crate) share: f64,
}

/// Whether a job's executors are sent to spot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum SpotWord {
    Open,
    Closed,
    Unknown,
}

/// The executors of a job, counted.
#[derive(Clone, Debug, Default)]
struct Executors {
    bound: Counts,
    bound_unknown: u64,
    pending: Counts,
    pending_unknown: u64,
    fixed: u64,
    nodes: BTreeMap<String, u64>,
    oldest: Option<Timestamp>,
}

impl Report {
    /// The jobs of the snapshot, by namespace and name.
    pub(crate) fn of(snapshot: &Snapshot, namespace: Option<&str>) -> Self {
        let index = snapshot.index();
        let executors = count(snapshot, &index);
        let mut jobs: Vec<JobStatus> = index
            .jobs()
            .map(|job| JobStatus::of(snapshot, &index, job, executors.get(&**job).cloned().unwrap_or_default()))
            .collect();
        jobs.sort_by(|one, other| (&one.namespace, &one.job).cmp(&(&other.namespace, &other.job)));
        Self {
            settings: Profile::of(&snapshot.settings),
            missing: snapshot.missing(),
            jobs,
            namespace: namespace.map(str::to_owned),
            job: None,
            now: snapshot.now,
        }
    }

    /// Whether nothing but time has changed.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        (&self.settings, &self.missing, &self.jobs) == (&other.settings, &other.missing, &other.jobs)
    }

    /// What the caller may not read, and what is not known without it.
    pub(crate) fn note(&self) -> Option<String> {
        snapshot::note(&self.missing, &self.settings.origin, self.settings.doubt.as_deref())
    }
}

impl Profile {
    pub(crate) fn of(settings: &Settings) -> Self {
        let capacity_profile = settings.conventions.capacity_labels.profile.to_string();
        Self { capacity_profile, origin: settings.origin.clone(), doubt: settings.doubt.clone() }
    }

    /// The same in words.
    pub(crate) fn words(&self) -> String {
        let origin = match &self.origin {
            Origin::Defaults { error: Some(error) } => format!("default settings, because {error}"),
            Origin::Defaults { error: None } => {
                "default settings, because the webhook's Deployment was not read".to_owned()
            }
            origin => format!("settings of the Deployment {origin}"),
        };
        format!("Capacity profile {}; {origin}.", self.capacity_profile)
    }
}

impl JobStatus {
    /// How one job of the snapshot stands.
    pub(crate) fn of_one(snapshot: &Snapshot, index: &ClusterIndex, job: &JobId) -> Self {
        Self::of(snapshot, index, job, count(snapshot, index).remove(job).unwrap_or_default())
    }

    fn of(snapshot: &Snapshot, index: &ClusterIndex, job: &JobId, executors: Executors) -> Self {
        let driver = index.driver(job);
        let policy = snapshot.policy(driver.as_ref());
        let Executors { bound, bound_unknown, pending, pending_unknown, fixed, nodes, oldest } = executors;
        let all = Counts { spot: bound.spot + pending.spot, on_demand: bound.on_demand + pending.on_demand };
        let ratio = policy.fields.spot_ratio;
        let wanted = ratio.and_then(SpotRatio::share).zip(policy.fields.on_demand_base.map(u64::from));
        let with_node = bound.total() + bound_unknown;
        // Of nodes with as many, the first by name.
        let largest_node = nodes.into_iter().rev().max_by_key(|(_, executors)| *executors);
        let shares = index.shares(job);
        let largest_pool = shares.pools.iter().max_by_key(|(pool, executors)| (*executors, std::cmp::Reverse(pool)));
        let state = snapshot.spot_state(driver.as_ref(), &policy);
        let closed_since = match state {
            SpotState::Closed(since) => Some(since.to_string()),
            SpotState::Open | SpotState::Unknown => None,
        };
        Self {
            namespace: job.namespace.clone(),
            job: job.app_id.clone(),
            created: policy.driver.and_then(snapshot::created).or(oldest).map(|created| created.to_string()),
            driver: driver.map(|driver| driver.name),
            spot_ratio: ratio.and_then(SpotRatio::share).map(share_of),
            opted_out: ratio == Some(SpotRatio::Off),
            on_demand_base: policy.fields.on_demand_base,
            ratio_source: policy.source,
            spot: bound.spot,
            on_demand: bound.on_demand,
            unknown: bound_unknown,
            pending: pending.total() + pending_unknown,
            pending_spot: pending.spot,
            pending_on_demand: pending.on_demand,
            fixed,
            wanted_spot: wanted.map(|(ratio, base)| rounded(wanted_spot(all.total(), base, ratio))),
            distance: wanted.map(|(ratio, base)| distance(all.spot, all.on_demand, base, ratio)),
            largest_node: largest_node.map(|(name, executors)| LargestNode {
                name,
                executors,
                share: rounded(share(executors, with_node)),
            }),
            largest_pool: largest_pool.map(|(pool, executors)| LargestPool {
                instance_type: pool.instance_type.to_string(),
                zone: pool.zone.to_string(),
                executors: u64::from(*executors),
                share: rounded(share((*executors).into(), with_node)),
            }),
            spot_state: match state {
                SpotState::Open => SpotWord::Open,
                SpotState::Closed(_) => SpotWord::Closed,
                SpotState::Unknown => SpotWord::Unknown,
            },
            spot_closed_since: closed_since,
        }
    }

    /// Whether this is the job's id or its driver's name.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.job == name || self.driver.as_deref() == Some(name)
    }
}

/// Counts the executors of each job.
fn count(snapshot: &Snapshot, index: &ClusterIndex) -> HashMap<JobId, Executors> {
    let mut jobs = HashMap::<JobId, Executors>::new();
    for pod in snapshot.pods.values() {
        let Some(JobPod::Executor(executor)) = JobPod::of(pod, &snapshot.settings.conventions) else { continue };
        let Some(name) = pod.metadata.name.as_deref() else { continue };
        let Some(job) = index.job_of_executor(executor.job.namespace, name) else { continue };
        let capacity = index.live(&job, executor.key).and_then(|live| live.capacity);
        let counted = jobs.entry(JobId::clone(&job)).or_default();
        counted.fixed += u64::from(executor.fixed.is_some());
        if let Some(created) = snapshot::created(pod) {
            counted.oldest = Some(counted.oldest.map_or(created, |oldest| oldest.min(created)));
        }
        let (counts, unknown) = match executor.node {
            Some(node) => {
                *counted.nodes.entry(node.to_owned()).or_default() += 1;
                (&mut counted.bound, &mut counted.bound_unknown)
            }
            None => (&mut counted.pending, &mut counted.pending_unknown),
        };
        match capacity {
            Some(capacity) => counts.add(capacity),
            None => *unknown += 1,
        }
    }
    jobs
}

/// A ratio for people.
pub(crate) fn share_of(ratio: Ratio) -> f64 {
    f64::from(ratio.billionths()) / f64::from(Ratio::ONE_IN_BILLIONTHS)
}
