//! Looks up a job's driver in the Kubernetes API, or the pod that owns its executor, for jobs whose policy the ledger does
//! not have: at most one lookup in flight per job, few at once and per second in each namespace, each with a deadline, and
//! a short-lived cache of bounded size.

mod cluster;
#[cfg(test)]
mod tests;

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use balancer_core::{Executor, InvalidField, JobRef, Pod, PolicyOverrides};
use balancer_runtime::k8s_names::{is_dns_label, is_label_value};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use lru::LruCache;
use tokio::time::{Instant, timeout, timeout_at};

use cluster::{Cluster, Drivers, ListFrom};
pub use cluster::{DriverSource, LookupError};

use crate::lookup_slots::LookupSlots;
use crate::namespace_rate::NamespaceRate;

/// Jobs whose lookups are in flight or cached.
const MAX_CACHED: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// How long a policy is cached, for a ledger that is down and cannot store it.
const FOUND_TTL: Duration = Duration::from_secs(5);
/// How long a failure, or the absence of a driver, is cached.
const NOT_FOUND_TTL: Duration = Duration::from_secs(1);

/// The longest uid of a pod, which is a UUID. An owner reference can contain any text.
const MAX_UID_BYTES: usize = 36;

/// Lookups of one namespace: 200 at once, and 100 per second. That is enough when a store is down and every job of a
/// large namespace is looked up every five seconds.
const LOOKUPS: (u32, Duration) = (200, Duration::from_millis(10));
/// Consistent lists of one namespace: 20 at once, and 10 per second. Only jobs without a driver in the apiserver's cache
/// need them, unless a live pod owns the executor, and each such job once, before its policy is stored.
const CONSISTENT_LISTS: (u32, Duration) = (20, Duration::from_millis(100));
/// Log lines about refused lookups of one namespace.
const REPORTS: (u32, Duration) = (1, Duration::from_secs(60));

/// The result of a lookup.
#[derive(Debug)]
pub enum DriverPolicy {
    /// A live pod drives the job.
    Found {
        /// Which one.
        by: StatedBy,
        /// The valid fields of its annotations.
        overrides: PolicyOverrides,
        /// The invalid fields of its annotations.
        invalid: Vec<InvalidField>,
    },
    /// The job has no live driver, and no live pod owns the executor; or there is no cluster.
    NoDriver,
    /// Too many other lookups run or wait, so the job was not looked up.
    Busy,
    /// The Kubernetes API did not answer, or not in time.
    Failed(LookupError),
}

/// The pod whose annotations state a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatedBy {
    /// A driver with the job's id: the one that owns the executor, else the newest.
    Driver,
    /// The pod that owns the executor, because the job has no driver: a notebook, for example, or a Spark Connect server.
    Owner,
}

/// A job as one of its executors names it.
#[derive(Clone, Copy, Debug)]
pub struct JobQuery<'a> {
    /// The job.
    pub job: JobRef<'a>,
    /// The pod label that has the job id.
    pub label: &'a str,
    /// Name and uid of the pod that owns the executor: [`Pod::owner`], whose name is one that a pod can have.
    pub owner: Option<(&'a str, &'a str)>,
}

impl<'a> JobQuery<'a> {
    /// The job of this executor.
    pub fn of(executor: &Executor<'a>) -> Self {
        let owner = executor.pod.owner().map(|owner| (owner.name.as_str(), owner.uid.as_str()));
        Self { job: executor.job, label: executor.job_label, owner }
    }

    /// `None` if no driver can have these names. All of them come from a pod that is not validated yet, and are inserted into
    /// URLs and a selector. The API server refuses pods with other names, so no driver has them.
    fn key(&self) -> Option<JobKey> {
        let Self { job: JobRef { namespace, app_id }, label, owner } = *self;
        if !is_dns_label(namespace) || !is_label_value(app_id) {
            return None;
        }
        let owner = owner.filter(|(_, uid)| uid.len() <= MAX_UID_BYTES);
        Some(JobKey {
            namespace: namespace.into(),
            label: label.into(),
            app_id: app_id.into(),
            owner: owner.map(|(name, uid)| OwnerKey { name: name.into(), uid: uid.into() }),
        })
    }
}

/// The executors of a driver share a lookup. Several drivers may have one job id, so their executors do not.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct JobKey {
    namespace: String,
    label: String,
    app_id: String,
    owner: Option<OwnerKey>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct OwnerKey {
    name: String,
    uid: String,
}

impl OwnerKey {
    /// Whether this is the owner, and not another pod that has its name now.
    fn is(&self, pod: &Pod<'_>) -> bool {
        let Pod { metadata, .. } = pod;
        metadata.name.as_deref() == Some(&self.name) && metadata.uid.as_deref() == Some(&self.uid)
    }
}

type Inflight = Shared<BoxFuture<'static, Arc<DriverPolicy>>>;

/// Looks up drivers; concurrent lookups of one job share one request.
pub struct DriverLookup {
    /// `None` if there is no cluster.
    lookups: Option<Arc<Lookups>>,
    limit: Duration,
    inflight: Mutex<LruCache<JobKey, Cached>>,
}

/// The newest lookup of a job.
struct Cached {
    flight: Inflight,
    since: Instant,
    /// The driver that the last lookup with a result found.
    earlier: Option<Arc<DriverPolicy>>,
}

impl Cached {
    /// Whether the lookup can be shared: it is in flight, or its result has not expired.
    fn is_fresh(&self) -> bool {
        let ttl = match self.flight.peek().map(Arc::as_ref) {
            None => return true,
            Some(DriverPolicy::Found { .. }) => FOUND_TTL,
            Some(DriverPolicy::NoDriver | DriverPolicy::Busy | DriverPolicy::Failed(_)) => NOT_FOUND_TTL,
        };
        self.since.elapsed() < ttl
    }

    /// The driver that was found last, however long ago.
    fn last_found(&self) -> Option<Arc<DriverPolicy>> {
        match self.flight.peek() {
            Some(found) if matches!(**found, DriverPolicy::Found { .. }) => Some(Arc::clone(found)),
            Some(other) if matches!(**other, DriverPolicy::NoDriver) => None,
            _ => self.earlier.clone(),
        }
    }
}

impl fmt::Debug for DriverLookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverLookup").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl DriverLookup {
    /// Lookups in `source`, each of at most `limit`.
    pub fn new(source: DriverSource, limit: Duration) -> Self {
        let lookups = match source {
            DriverSource::Cluster { client, conventions } => {
                Some(Arc::new(Lookups::new(Cluster { client, conventions }, limit)))
            }
            DriverSource::None => None,
        };
        Self { lookups, limit, inflight: Mutex::new(LruCache::new(MAX_CACHED)) }
    }

    /// What the annotations of the job's driver state, or those of the pod that owns the executor if there is no driver.
    pub async fn policy(&self, query: JobQuery<'_>) -> Arc<DriverPolicy> {
        let (Some(lookups), Some(job)) = (&self.lookups, query.key()) else { return Arc::new(DriverPolicy::NoDriver) };
        let flight = {
            let mut inflight = self.inflight.lock().unwrap_or_else(PoisonError::into_inner);
            let cached = inflight.get(&job);
            match cached.filter(|cached| cached.is_fresh()) {
                Some(cached) => cached.flight.clone(),
                None => match lookups.start(job.clone()) {
                    Some(flight) => {
                        let earlier = cached.and_then(Cached::last_found);
                        inflight.put(job, Cached { flight: flight.clone(), since: Instant::now(), earlier });
                        flight
                    }
                    // Not cached, because an answer at once costs nothing, and the cache is for lookups.
                    None => return Arc::new(DriverPolicy::Busy),
                },
            }
        };
        // A caller that joins a lookup late waits at most as long as the first one.
        match timeout(self.limit, flight).await {
            Ok(policy) => policy,
            Err(_) => Arc::new(DriverPolicy::Failed(LookupError::TimedOut(self.limit))),
        }
    }

    /// The job's driver as it was last found, if the cache still has it: better than the defaults for a job whose lookup
    /// is refused or fails, but not certain.
    pub fn last_found(&self, query: JobQuery<'_>) -> Option<Arc<DriverPolicy>> {
        let job = query.key()?;
        self.inflight.lock().unwrap_or_else(PoisonError::into_inner).peek(&job).and_then(Cached::last_found)
    }
}

/// What all lookups share.
struct Lookups {
    cluster: Cluster,
    limit: Duration,
    slots: Arc<LookupSlots>,
    rates: Mutex<Rates>,
}

struct Rates {
    lookups: NamespaceRate,
    consistent_lists: NamespaceRate,
    reports: NamespaceRate,
}

impl Lookups {
    fn new(cluster: Cluster, limit: Duration) -> Self {
        let rate = |(burst, interval)| NamespaceRate::new(burst, interval);
        let rates = Rates { lookups: rate(LOOKUPS), consistent_lists: rate(CONSISTENT_LISTS), reports: rate(REPORTS) };
        Self { cluster, limit, slots: Arc::new(LookupSlots::new()), rates: Mutex::new(rates) }
    }

    /// Starts a lookup, or returns `None` if too many others run or wait.
    ///
    /// Spawns a task, because an admission that gives up must not cancel the lookup for the others.
    fn start(self: &Arc<Self>, job: JobKey) -> Option<Inflight> {
        let is_within_rate = self.take(|rates| &mut rates.lookups, &job.namespace);
        let Some(queued) = is_within_rate.then(|| self.slots.enter(&job.namespace)).flatten() else {
            self.report_busy(&job);
            return None;
        };
        let (lookups, limit) = (Arc::clone(self), self.limit);
        let task = tokio::spawn(async move {
            let deadline = Instant::now() + limit;
            // A lookup that begins in the second half of its time would hardly end in time.
            let policy = match timeout(limit / 2, queued.slot()).await {
                Ok(Some(_slot)) => match timeout_at(deadline, lookups.find(&job)).await {
                    Ok(Ok(policy)) => policy,
                    Ok(Err(error)) => DriverPolicy::Failed(error),
                    Err(_) => DriverPolicy::Failed(LookupError::TimedOut(limit)),
                },
                Ok(None) | Err(_) => DriverPolicy::Busy,
            };
            match &policy {
                DriverPolicy::Failed(error) => {
                    tracing::warn!(namespace = job.namespace, job = job.app_id, %error, "driver lookup failed");
                }
                DriverPolicy::Busy => lookups.report_busy(&job),
                DriverPolicy::Found { .. } | DriverPolicy::NoDriver => {}
            }
            Arc::new(policy)
        });
        // The task is never cancelled. If it panics, the policy is as unknown as after a timeout.
        let policy =
            task.map(move |done| done.unwrap_or_else(|_| Arc::new(DriverPolicy::Failed(LookupError::TimedOut(limit)))));
        Some(policy.boxed().shared())
    }

    /// The drivers in the apiserver's cache first: they cost the API server no read of its store. A driver that owns the
    /// executor is always preferred. If the cache does not have it, it may be a new one, or another pod is the owner; a read
    /// of that one pod shows which. If no live pod is the owner, the newest driver is used. If the cache has none, the whole
    /// job would get the default, so only a consistent list can say that there is no driver.
    async fn find(&self, job: &JobKey) -> Result<DriverPolicy, LookupError> {
        let Drivers { owner, newest: cached } = self.cluster.drivers(job, ListFrom::Cache).await?;
        if let Some(driver) = owner {
            return Ok(driver);
        }
        let owner = match &job.owner {
            Some(owner) => self.cluster.owner(job, owner).await?,
            None => None,
        };
        let found = match owner {
            Some(DriverPolicy::Found { by: StatedBy::Driver, .. }) => owner,
            // A driver goes before any other owner.
            owner => cached.or(owner),
        };
        if let Some(found) = found {
            return Ok(found);
        }
        if !self.take(|rates| &mut rates.consistent_lists, &job.namespace) {
            return Ok(DriverPolicy::Busy);
        }
        let Drivers { newest, .. } = self.cluster.drivers(job, ListFrom::Store).await?;
        Ok(newest.unwrap_or(DriverPolicy::NoDriver))
    }

    fn take(&self, rate: impl FnOnce(&mut Rates) -> &mut NamespaceRate, namespace: &str) -> bool {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        rate(&mut rates).take(namespace, Instant::now().into_std())
    }

    /// Logs one line per namespace and minute, because these lookups are many.
    fn report_busy(&self, job: &JobKey) {
        if self.take(|rates| &mut rates.reports, &job.namespace) {
            tracing::warn!(
                namespace = job.namespace,
                job = job.app_id,
                "too many driver lookups in this namespace; executors whose driver was never found get the default"
            );
        }
    }
}
