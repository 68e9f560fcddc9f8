//! Elects the one of all replicas that may write, by a Lease (coordination.k8s.io).
//!
//! The Lease keeps replicas apart as long as clocks run and processes are not stopped. For all other cases there is the
//! term, the Lease's count of transitions. It is stored in the ledgers with every change: a former leader that resumes
//! in the middle of a call changes nothing that its successor has reconciled (see [`Term`]).

use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use balancer_core::Term;
use balancer_runtime::cluster;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::election::{Decision, Election, LeaderState};
use crate::metrics::Metrics;
use crate::watch::LOG_EVERY;

const RENEW_EVERY: Duration = Duration::from_secs(5);
/// How often a follower reads the Lease, and a leader whose renewal failed retries.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// The most that one call to the API may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Whether this process leads. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Leadership {
    state: watch::Receiver<LeaderState>,
    superseded: Arc<watch::Sender<Term>>,
}

impl Leadership {
    /// Of a process whose ledgers are its own: it leads forever.
    pub(crate) fn alone() -> Self {
        let leader = LeaderState::Leader { term: Term(1), until: None };
        Self { state: watch::channel(leader).1, superseded: Arc::new(watch::channel(Term(0)).0) }
    }

    /// The term in which this process may write now; `None` if another process leads, or may lead.
    pub(crate) fn term(&self) -> Option<Term> {
        self.state.borrow().term(Instant::now())
    }

    /// Whether it is certain that this process does not lead.
    pub(crate) fn follows(&self) -> bool {
        *self.state.borrow() == LeaderState::Follower
    }

    /// A ledger was reconciled in a later term than ours. The process that holds the Lease continues in a term after
    /// that one.
    pub(crate) fn superseded(&self, by: Term) {
        self.superseded.send_if_modified(|latest| {
            let is_later = by > *latest;
            *latest = by.max(*latest);
            is_later
        });
    }

    /// Waits until the elector has written its state: this process may have started or stopped leading.
    pub(crate) async fn changed(&mut self) {
        if self.state.changed().await.is_err() {
            // Nobody is left to change it.
            std::future::pending().await
        }
    }
}

/// Acquires and renews the Lease.
pub(crate) struct Elector {
    leases: Api<Lease>,
    /// The Lease's name.
    name: Arc<str>,
    election: Election,
    state: watch::Sender<LeaderState>,
    superseded: watch::Receiver<Term>,
    metrics: Arc<Metrics>,
    /// When the current outage of the API was last logged.
    logged_at: Option<Instant>,
}

impl fmt::Debug for Elector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Elector").field("identity", &self.election.identity()).finish_non_exhaustive()
    }
}

/// Why the leader is not known.
#[derive(Debug, thiserror::Error)]
enum ElectionError {
    #[error("the Kubernetes API returned an error: {0}")]
    Api(#[source] Box<kube::Error>),
    #[error("the Kubernetes API did not answer within {CALL_TIMEOUT:?}")]
    TimedOut,
}

impl ElectionError {
    fn code(&self) -> Option<u16> {
        match self {
            Self::Api(error) => match &**error {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::TimedOut => None,
        }
    }

    /// Whether another process has changed or deleted the Lease that was to be replaced.
    fn is_conflict(&self) -> bool {
        matches!(self.code(), Some(404 | 409))
    }

    /// Whether another process has created the Lease meanwhile. A 404 means that the namespace is missing.
    fn already_exists(&self) -> bool {
        self.code() == Some(409)
    }
}

impl Elector {
    /// A candidate for the Lease of this name in the client's own namespace. It sends no request yet.
    pub(crate) fn new(client: Client, name: Arc<str>, metrics: Arc<Metrics>) -> (Self, Leadership) {
        let (state, receiver) = watch::channel(LeaderState::Unknown);
        let (supersede, superseded) = watch::channel(Term(0));
        // A process that was restarted in the same pod is another candidate.
        let identity = format!("{}_{:016x}", host(), RandomState::new().hash_one(()));
        let election = Election::new((*name).to_owned(), identity);
        let leases = Api::default_namespaced(client);
        let elector = Self { leases, name, election, state, superseded, metrics, logged_at: None };
        (elector, Leadership { state: receiver, superseded: Arc::new(supersede) })
    }

    /// Leads when it can, until `shutdown`. Then it releases the Lease, so that another process need not wait.
    pub(crate) async fn run(mut self, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        loop {
            let pause = self.step().await;
            tokio::select! {
                () = sleep(pause) => {}
                Ok(()) = self.superseded.changed() => {}
                () = &mut shutdown => break,
            }
        }
        self.stop_leading("shutting down");
        self.release().await;
    }

    /// Renews or reads the Lease once. Returns how long to wait until the next time.
    async fn step(&mut self) -> Duration {
        let started_at = Instant::now();
        match self.renew_or_acquire().await {
            Ok(Some(lease)) => {
                self.logged_at = None;
                let state = LeaderState::leader(&lease, started_at);
                self.election.hold(lease);
                self.lead(state);
                RENEW_EVERY
            }
            Ok(None) => {
                self.logged_at = None;
                self.stop_leading("another process leads");
                RETRY_EVERY
            }
            Err(error) => {
                if self.logged_at.is_none_or(|logged_at| started_at.duration_since(logged_at) > LOG_EVERY) {
                    tracing::warn!(error = cluster::chain(&error), "cannot determine the leader; retrying");
                    self.logged_at = Some(started_at);
                }
                let has_expired = self.state.borrow().has_expired(Instant::now());
                if has_expired {
                    self.stop_leading("the Lease could not be renewed in time");
                }
                RETRY_EVERY
            }
        }
    }

    fn lead(&self, state: LeaderState) {
        let before = self.state.send_replace(state);
        if let LeaderState::Leader { term, .. } = state
            && !matches!(before, LeaderState::Leader { term: before, .. } if before == term)
        {
            tracing::info!(term = term.0, identity = self.election.identity(), "leading");
        }
        self.metrics.set_leads(true);
    }

    fn stop_leading(&self, reason: &'static str) {
        if let LeaderState::Leader { .. } = self.state.send_replace(LeaderState::Follower) {
            tracing::info!(reason, "no longer leading");
        }
        self.metrics.set_leads(false);
    }

    /// Returns the Lease if this process holds it now.
    async fn renew_or_acquire(&mut self) -> Result<Option<Lease>, ElectionError> {
        let superseded = *self.superseded.borrow_and_update();
        if let Some(renewed) = self.election.renewal(superseded, now()) {
            match self.replace(&renewed).await {
                // Perhaps an earlier renewal of ours succeeded although it was answered too late.
                Err(error) if error.is_conflict() => self.election.lose(),
                answer => return answer.map(Some),
            }
        }
        let lease = with_timeout(self.leases.get_opt(&self.name)).await?;
        let superseded = *self.superseded.borrow_and_update();
        // If the call fails because of another process, that process was faster, and leads.
        match self.election.decide(lease, superseded, Instant::now(), now()) {
            Decision::Create(lease) => {
                let created = with_timeout(self.leases.create(&PostParams::default(), &lease)).await;
                none_if(created, ElectionError::already_exists)
            }
            Decision::Acquire(lease) => none_if(self.replace(&lease).await, ElectionError::is_conflict),
            Decision::Wait => Ok(None),
        }
    }

    /// Writes the Lease unless it was changed after it was read.
    async fn replace(&self, lease: &Lease) -> Result<Lease, ElectionError> {
        with_timeout(self.leases.replace(&self.name, &PostParams::default(), lease)).await
    }

    async fn release(&mut self) {
        let Some(released) = self.election.release(now()) else { return };
        match self.replace(&released).await {
            Ok(_) => tracing::info!("lease released"),
            Err(error) => {
                tracing::warn!(error = cluster::chain(&error), "failed to release the lease; it will expire");
            }
        }
    }
}

fn none_if<T>(
    answer: Result<T, ElectionError>,
    is_none: impl FnOnce(&ElectionError) -> bool,
) -> Result<Option<T>, ElectionError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_none(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn now() -> MicroTime {
    MicroTime(Timestamp::now())
}

/// The name of this replica: the host name of a pod is unique.
pub(crate) fn host() -> String {
    std::env::var("HOSTNAME").ok().filter(|host| !host.is_empty()).unwrap_or_else(|| "balancer-reconcile".into())
}

async fn with_timeout<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ElectionError> {
    match timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|error| ElectionError::Api(Box::new(error))),
        Err(_) => Err(ElectionError::TimedOut),
    }
}
