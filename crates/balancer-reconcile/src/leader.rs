//! Who writes: one of all replicas, by a Lease (coordination.k8s.io). What others do is judged by our
//! own clock alone, as client-go does: a Lease is free once we have seen it unchanged for its duration.
//!
//! The Lease keeps them apart as long as clocks run and processes are not stopped. For the rest there
//! is the term, the Lease's count of transitions, which goes into the ledgers with every change: a
//! leader of the past that wakes up in the middle of a call changes nothing that its successor has
//! reconciled (see [`Term`]).

use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use balancer_core::Term;
use balancer_runtime::cluster;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::metrics::Metrics;
use crate::watch::LOG_EVERY;

/// How long others wait for a leader that no longer renews.
const DURATION: Duration = Duration::from_secs(15);
/// How long after its last renewal a leader still writes. The difference is for what is under way.
const LEADS_FOR: Duration = Duration::from_secs(10);
const RENEW_EVERY: Duration = Duration::from_secs(5);
/// How often a follower looks, and a leader whose renewal failed tries again.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The most that one call to the API may take.
const CALL_LIMIT: Duration = Duration::from_secs(3);

/// Whether this process leads. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Leadership {
    standing: watch::Receiver<Standing>,
    superseded: Arc<watch::Sender<Term>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Nobody has told yet who leads.
    Unknown,
    /// Another leads, or nobody.
    Follows,
    /// This process leads, until then; for ever where there is nobody else.
    Leads { term: Term, until: Option<Instant> },
}

impl Leadership {
    /// Of a process whose ledgers are its own: it leads for ever.
    pub(crate) fn alone() -> Self {
        let leads = Standing::Leads { term: Term(1), until: None };
        Self { standing: watch::channel(leads).1, superseded: Arc::new(watch::channel(Term(0)).0) }
    }

    /// The term in which this process may write now; `None` where another leads, or may.
    pub(crate) fn term(&self) -> Option<Term> {
        match *self.standing.borrow() {
            Standing::Leads { term, until } => until.is_none_or(|until| Instant::now() < until).then_some(term),
            Standing::Unknown | Standing::Follows => None,
        }
    }

    /// Whether it is known that this process does not lead.
    pub(crate) fn follows(&self) -> bool {
        *self.standing.borrow() == Standing::Follows
    }

    /// A ledger knows a later term than ours. Whoever truly leads goes on in a term later than that.
    pub(crate) fn superseded(&self, by: Term) {
        self.superseded.send_if_modified(|known| {
            let later = by > *known;
            *known = by.max(*known);
            later
        });
    }

    /// Waits until it may have changed who leads.
    pub(crate) async fn changed(&mut self) {
        if self.standing.changed().await.is_err() {
            // Nobody is there any more to change it.
            std::future::pending().await
        }
    }
}

/// Stands for election, with a Lease.
pub(crate) struct Elector {
    leases: Api<Lease>,
    /// The Lease's name.
    name: Arc<str>,
    identity: String,
    standing: watch::Sender<Standing>,
    superseded: watch::Receiver<Term>,
    metrics: Arc<Metrics>,
    /// The Lease as we last wrote it, while we hold it.
    held: Option<Lease>,
    /// The Lease of another as we last saw it, and since when it looks like that.
    seen: Option<(Lease, Instant)>,
    /// When it was last told, in this outage, that the API does not answer.
    told: Option<Instant>,
}

impl fmt::Debug for Elector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Elector").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Why we do not know who leads.
#[derive(Debug, thiserror::Error)]
enum ElectionError {
    #[error("the Kubernetes API did not tell: {0}")]
    Api(#[source] Box<kube::Error>),
    #[error("the Kubernetes API did not answer within {CALL_LIMIT:?}")]
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
}

impl Elector {
    /// Stands for the Lease of this name in the client's own namespace, which it does not ask for yet.
    pub(crate) fn new(client: Client, name: Arc<str>, metrics: Arc<Metrics>) -> (Self, Leadership) {
        let (standing, watching) = watch::channel(Standing::Unknown);
        let (supersede, superseded) = watch::channel(Term(0));
        // A process that was started again in the same pod is another one.
        let identity = format!("{}_{:016x}", host(), RandomState::new().hash_one(()));
        let leases = Api::default_namespaced(client);
        let elector =
            Self { leases, name, identity, standing, superseded, metrics, held: None, seen: None, told: None };
        (elector, Leadership { standing: watching, superseded: Arc::new(supersede) })
    }

    /// Leads when it can, until `leave`; then gives the Lease back, so that another need not wait.
    pub(crate) async fn run(mut self, leave: impl Future<Output = ()>) {
        tokio::pin!(leave);
        loop {
            let pause = self.step().await;
            tokio::select! {
                () = sleep(pause) => {}
                Ok(()) = self.superseded.changed() => {}
                () = &mut leave => break,
            }
        }
        self.stop_leading("leaving");
        self.give_back().await;
    }

    /// Renews or looks, once; answers how long to wait until the next time.
    async fn step(&mut self) -> Duration {
        let begun = Instant::now();
        let answer = match self.held.take() {
            Some(lease) => self.renew(lease).await,
            None => self.look().await,
        };
        match answer {
            Ok(Some(lease)) => {
                self.told = None;
                let term = term_of(&lease);
                let until = Some(begun + LEADS_FOR);
                let before = self.standing.send_replace(Standing::Leads { term, until });
                if !matches!(before, Standing::Leads { term: before, .. } if before == term) {
                    tracing::info!(term = term.0, identity = self.identity, "leading");
                }
                self.metrics.set_leads(true);
                self.held = Some(lease);
                RENEW_EVERY
            }
            Ok(None) => {
                self.told = None;
                self.stop_leading("another leads");
                LOOK_EVERY
            }
            Err(error) => {
                if self.told.is_none_or(|told| begun.duration_since(told) > LOG_EVERY) {
                    tracing::warn!(error = cluster::chain(&error), "cannot tell who leads; it is tried again");
                    self.told = Some(begun);
                }
                let standing = *self.standing.borrow();
                if matches!(standing, Standing::Leads { until, .. } if until < Some(Instant::now())) {
                    self.stop_leading("the Lease could not be renewed in time");
                }
                LOOK_EVERY
            }
        }
    }

    fn stop_leading(&self, why: &'static str) {
        if let Standing::Leads { .. } = self.standing.send_replace(Standing::Follows) {
            tracing::info!(why, "no longer leading");
        }
        self.metrics.set_leads(false);
    }

    /// Renews a Lease that we hold.
    async fn renew(&mut self, lease: Lease) -> Result<Option<Lease>, ElectionError> {
        // Who holds the Lease and is told of a later term has lost count, not the Lease.
        let later = *self.superseded.borrow_and_update();
        let term = if later > term_of(&lease) { Term(later.0 + 1) } else { term_of(&lease) };
        match self.write(&lease, Some(term), DURATION).await {
            Ok(lease) => Ok(Some(lease)),
            // Someone has changed it: perhaps our own renewal that was answered too late.
            Err(error) if matches!(error.code(), Some(404 | 409)) => self.look().await,
            Err(error) => {
                self.held = Some(lease);
                Err(error)
            }
        }
    }

    /// Takes the Lease if it is free, or ours.
    async fn look(&mut self) -> Result<Option<Lease>, ElectionError> {
        let lease = match within(self.leases.get_opt(&self.name)).await? {
            Some(lease) => lease,
            None => {
                let metadata = ObjectMeta { name: Some((*self.name).to_owned()), ..ObjectMeta::default() };
                let mut lease = Lease { metadata, spec: None };
                let first = self.next_term(Term(0));
                lease.spec = Some(self.spec(&lease, Some(first), DURATION));
                let made = within(self.leases.create(&PostParams::default(), &lease)).await;
                return match made {
                    Ok(lease) => Ok(Some(lease)),
                    Err(error) if error.code() == Some(409) => Ok(None),
                    Err(error) => Err(error),
                };
            }
        };
        let now = Instant::now();
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if !holder.is_empty() && holder != self.identity {
            let duration = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
            let duration = duration.map_or(DURATION, Duration::from_secs);
            let since = match &self.seen {
                Some((seen, since)) if seen.spec == lease.spec => *since,
                _ => now,
            };
            if now.duration_since(since) < duration {
                self.seen = Some((lease, since));
                return Ok(None);
            }
        }
        let term = self.next_term(term_of(&lease));
        match self.write(&lease, Some(term), DURATION).await {
            Ok(lease) => Ok(Some(lease)),
            // Another was quicker.
            Err(error) if matches!(error.code(), Some(404 | 409)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn next_term(&mut self, last: Term) -> Term {
        Term(last.max(*self.superseded.borrow_and_update()).0 + 1)
    }

    /// Writes the Lease, if it is still as we know it. With a term it is ours, without it nobody's.
    async fn write(&self, lease: &Lease, term: Option<Term>, duration: Duration) -> Result<Lease, ElectionError> {
        let spec = Some(self.spec(lease, term, duration));
        let lease = Lease { metadata: lease.metadata.clone(), spec };
        within(self.leases.replace(&self.name, &PostParams::default(), &lease)).await
    }

    fn spec(&self, before: &Lease, term: Option<Term>, duration: Duration) -> LeaseSpec {
        let (now, before_term) = (MicroTime(Timestamp::now()), term_of(before));
        let before = before.spec.clone().unwrap_or_default();
        let transitions = term.unwrap_or(before_term).0;
        let acquired = if term == Some(before_term) { before.acquire_time.clone() } else { Some(now.clone()) };
        LeaseSpec {
            holder_identity: Some(if term.is_some() { self.identity.clone() } else { String::new() }),
            lease_duration_seconds: i32::try_from(duration.as_secs()).ok(),
            lease_transitions: Some(i32::try_from(transitions).unwrap_or(i32::MAX)),
            acquire_time: acquired,
            renew_time: Some(now),
            ..before
        }
    }

    async fn give_back(&mut self) {
        let Some(lease) = self.held.take() else { return };
        // A second, as client-go writes it: there is no such thing as no duration.
        match self.write(&lease, None, Duration::from_secs(1)).await {
            Ok(_) => tracing::info!("gave the Lease back"),
            Err(error) => {
                tracing::warn!(error = cluster::chain(&error), "could not give the Lease back; it will run out")
            }
        }
    }
}

/// Which of the replicas this is: a pod's host name is its own.
pub(crate) fn host() -> String {
    std::env::var("HOSTNAME").ok().filter(|host| !host.is_empty()).unwrap_or_else(|| "balancer-reconcile".into())
}

fn term_of(lease: &Lease) -> Term {
    let transitions = lease.spec.as_ref().and_then(|spec| spec.lease_transitions);
    Term(transitions.and_then(|transitions| u64::try_from(transitions).ok()).unwrap_or_default())
}

async fn within<T>(call: impl Future<Output = Result<T, kube::Error>>) -> Result<T, ElectionError> {
    match timeout(CALL_LIMIT, call).await {
        Ok(answer) => answer.map_err(|error| ElectionError::Api(Box::new(error))),
        Err(_) => Err(ElectionError::TimedOut),
    }
}
