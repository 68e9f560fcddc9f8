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
use crate::log_limit::LogLimit;

const RENEW_EVERY: Duration = Duration::from_secs(5);
/// How often a follower reads the Lease, and a leader whose renewal failed retries.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// The most that one call to the API may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// Whether this process leads. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Leadership {
    state: watch::Receiver<LeaderState>,
    /// The identity of the process that leads instead of this one, if it is known.
    leader: watch::Receiver<Option<Arc<str>>>,
    superseded: Arc<watch::Sender<Term>>,
}

impl Leadership {
    /// Of a process whose ledgers are its own: it leads forever.
    pub(crate) fn alone() -> Self {
        let leader = LeaderState::Leader { term: Term(1), until: None };
        Self {
            state: watch::channel(leader).1,
            leader: watch::channel(None).1,
            superseded: Arc::new(watch::channel(Term(0)).0),
        }
    }

    /// Of a process that leads until then.
    #[cfg(test)]
    pub(crate) fn until(until: Instant) -> Self {
        let leader = LeaderState::Leader { term: Term(1), until: Some(until) };
        Self { state: watch::channel(leader).1, ..Self::alone() }
    }

    /// The term in which this process may write now; `None` if another process leads, or may lead.
    pub(crate) fn term(&self) -> Option<Term> {
        self.state.borrow().term(Instant::now())
    }

    /// Whether it is certain that this process does not lead.
    pub(crate) fn follows(&self) -> bool {
        *self.state.borrow() == LeaderState::Follower
    }

    /// The identity of the process that leads instead of this one, if it is known.
    pub(crate) fn leader(&self) -> Option<Arc<str>> {
        self.leader.borrow().clone()
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

/// Acquires and renews the Lease. A clone that was not run yet can take over from one that has panicked.
#[derive(Clone)]
pub(crate) struct Elector {
    leases: Api<Lease>,
    /// The Lease's name.
    name: Arc<str>,
    election: Election,
    state: watch::Sender<LeaderState>,
    leader: watch::Sender<Option<Arc<str>>>,
    superseded: watch::Receiver<Term>,
    /// Of the current outage of the API.
    logged: LogLimit,
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
    pub(crate) fn new(client: Client, name: Arc<str>) -> (Self, Leadership) {
        let (state, receiver) = watch::channel(LeaderState::Unknown);
        let (leader, leader_receiver) = watch::channel(None);
        let (supersede, superseded) = watch::channel(Term(0));
        // A process that was restarted in the same pod is another candidate.
        let identity = format!("{}_{:016x}", host(), RandomState::new().hash_one(()));
        let election = Election::new((*name).to_owned(), identity);
        let leases = Api::default_namespaced(client);
        let elector = Self { leases, name, election, state, leader, superseded, logged: LogLimit::default() };
        (elector, Leadership { state: receiver, leader: leader_receiver, superseded: Arc::new(supersede) })
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
                self.logged.reset();
                let state = LeaderState::leader(&lease, started_at);
                self.election.hold(lease);
                self.lead(state);
                RENEW_EVERY
            }
            Ok(None) => {
                self.logged.reset();
                self.leader.send_replace(self.election.other_leader().map(Into::into));
                self.stop_leading("another process leads");
                RETRY_EVERY
            }
            Err(error) => {
                if self.logged.is_due(started_at) {
                    tracing::warn!(error = cluster::chain(&error), "cannot determine the leader; retrying");
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
    }

    fn stop_leading(&self, reason: &'static str) {
        if let LeaderState::Leader { .. } = self.state.send_replace(LeaderState::Follower) {
            tracing::info!(reason, "no longer leading");
        }
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

#[cfg(test)]
mod tests {
    use http::{Method, Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;
    use tower_test::mock::{self, Handle, SendResponse};

    use super::*;
    use crate::controller::tests::refusal;

    type Api = Handle<Request<Body>, Response<Body>>;

    /// An elector that runs, and the API whose answers the test gives.
    struct Bench {
        api: Api,
        leadership: Leadership,
        shutdown: oneshot::Sender<()>,
        running: JoinHandle<()>,
    }

    /// What the elector has asked the API for.
    struct Call {
        method: Method,
        lease: Value,
        answer: SendResponse<Response<Body>>,
    }

    fn bench() -> Bench {
        let (service, api) = mock::pair();
        let (elector, leadership) = Elector::new(Client::new(service, "balancer"), "leases".into());
        let (shutdown, is_shutting_down) = oneshot::channel();
        let running = tokio::spawn(elector.run(async move { drop(is_shutting_down.await) }));
        Bench { api, leadership, shutdown, running }
    }

    impl Bench {
        async fn call(&mut self) -> Call {
            let (request, answer) = self.api.next_request().await.expect("no request to the API");
            let (parts, body) = request.into_parts();
            let path = parts.uri.path();
            assert!(path.starts_with("/apis/coordination.k8s.io/v1/namespaces/balancer/leases"), "{path}");
            let body = body.collect_bytes().await.expect("the body of a request");
            let lease = serde_json::from_slice(&body).unwrap_or_default();
            Call { method: parts.method, lease, answer }
        }

        /// Lets the elector write the Lease, and returns what it wrote.
        async fn accept(&mut self, method: Method) -> Value {
            let call = self.call().await;
            assert_eq!(call.method, method, "{}", call.lease);
            let lease = call.lease.clone();
            call.succeed(&lease);
            // The elector reads the answer.
            tokio::task::yield_now().await;
            sleep(Duration::from_millis(1)).await;
            lease["spec"].clone()
        }

        /// Answers a read of the Lease.
        async fn read(&mut self, lease: Option<Value>) {
            let call = self.call().await;
            assert_eq!(call.method, Method::GET);
            match lease {
                Some(lease) => call.succeed(&lease),
                None => call.fail(404, "NotFound"),
            }
        }

        fn term(&self) -> Option<u64> {
            self.leadership.term().map(|term| term.0)
        }
    }

    impl Call {
        fn succeed(self, lease: &Value) {
            self.answer.send_response(Response::new(Body::from(lease.to_string().into_bytes())));
        }

        fn fail(self, code: u16, reason: &str) {
            self.answer.send_response(refusal(code, reason));
        }
    }

    fn lease(holder: &str, transitions: i64, duration: i64) -> Value {
        let spec = json!({
            "holderIdentity": holder, "leaseTransitions": transitions, "leaseDurationSeconds": duration,
            "renewTime": "2026-01-01T00:00:00.000000Z",
        });
        json!({"metadata": {"name": "leases", "resourceVersion": "1"}, "spec": spec})
    }

    async fn leading(transitions: u64) -> Bench {
        let mut bench = bench();
        bench.read(Some(lease("", transitions.try_into().expect("a small number"), 15))).await;
        bench.accept(Method::PUT).await;
        assert_eq!(bench.term(), Some(transitions + 1));
        bench
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_lease_is_created_and_renewed_every_five_seconds() {
        let mut bench = bench();
        bench.read(None).await;
        let created = bench.accept(Method::POST).await;
        assert_eq!((created["leaseTransitions"].as_i64(), bench.term()), (Some(1), Some(1)));
        for _ in 0..3 {
            let before = Instant::now();
            let renewed = bench.accept(Method::PUT).await;
            assert_eq!((renewed["leaseTransitions"].as_i64(), bench.term()), (Some(1), Some(1)));
            assert!(before.elapsed().abs_diff(RENEW_EVERY) < Duration::from_millis(10), "{:?}", before.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_superseded_leader_continues_at_once_in_a_later_term() {
        let mut bench = leading(3).await;
        for (superseded, transitions) in [(9, 10), (500_000_000, 500_000_001), (999_999_999, 1_000_000_000)] {
            let before = Instant::now();
            bench.leadership.superseded(Term(superseded));
            let renewed = bench.accept(Method::PUT).await;
            assert_eq!(renewed["leaseTransitions"].as_u64(), Some(transitions));
            assert_eq!(bench.term(), Some(transitions));
            assert!(before.elapsed() < Duration::from_millis(100), "{:?}", before.elapsed());
        }
        bench.leadership.superseded(Term::MAX);
        let renewed = bench.accept(Method::PUT).await;
        assert_eq!((renewed["leaseTransitions"].as_u64(), bench.term()), (Some(Term::MAX.0), Some(Term::MAX.0)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_whose_api_does_not_answer_stops_in_time_and_continues_in_the_same_term() {
        let mut bench = leading(3).await;
        let renewed_at = Instant::now();
        let mut silent = Vec::new();
        while bench.term().is_some() {
            // Each call is silent until its timeout.
            tokio::select! {
                call = bench.call() => silent.push(call),
                () = sleep(Duration::from_millis(100)) => {}
            }
        }
        let stopped = renewed_at.elapsed();
        assert!(stopped > Duration::from_secs(9) && stopped < Duration::from_millis(10_200), "{stopped:?}");
        drop(silent);
        // The Lease is still its own, and nobody has changed it.
        let renewed = bench.accept(Method::PUT).await;
        assert_eq!((renewed["leaseTransitions"].as_u64(), bench.term()), (Some(4), Some(4)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_whose_lease_another_process_has_taken_follows() {
        let mut bench = leading(3).await;
        let call = bench.call().await;
        assert_eq!(call.method, Method::PUT);
        call.fail(409, "Conflict");
        bench.read(Some(lease("other", 5, 15))).await;
        sleep(Duration::from_millis(1)).await;
        assert!(bench.term().is_none() && bench.leadership.follows());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_of_a_silent_process_is_taken_within_a_minute_whatever_it_states() {
        for (duration, longest) in [(15, 17), (2_147_483_647, 62)] {
            let (mut bench, begin) = (bench(), Instant::now());
            loop {
                let call = bench.call().await;
                if call.method == Method::PUT {
                    assert_eq!(call.lease["spec"]["leaseTransitions"].as_u64(), Some(6));
                    break;
                }
                call.succeed(&lease("other", 5, duration));
            }
            assert!(begin.elapsed() < Duration::from_secs(longest), "{:?}", begin.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_shutdown_releases_the_lease() {
        let mut bench = leading(3).await;
        let leadership = bench.leadership.clone();
        bench.shutdown.send(()).expect("it runs");
        let (request, answer) = bench.api.next_request().await.expect("no request to the API");
        assert!(leadership.term().is_none() && leadership.follows(), "it has stopped before");
        let body = request.into_body().collect_bytes().await.expect("the body of a request");
        let released: Value = serde_json::from_slice(&body).expect("a Lease");
        assert_eq!(
            (&released["spec"]["holderIdentity"], &released["spec"]["leaseTransitions"]),
            (&json!(""), &json!(4))
        );
        answer.send_response(Response::new(Body::from(body.to_vec())));
        bench.running.await.expect("it ends");
    }

    #[tokio::test(start_paused = true)]
    async fn an_elector_that_is_started_again_after_a_panic_leads_again_in_a_later_term() {
        let (service, api) = mock::pair();
        let (elector, leadership) = Elector::new(Client::new(service, "balancer"), "leases".into());
        let (_shutdown, never) = oneshot::channel::<()>();
        let mut bench = Bench { api, leadership, shutdown: oneshot::channel().0, running: tokio::spawn(async {}) };
        let first = tokio::spawn(elector.clone().run(std::future::pending()));
        bench.read(Some(lease("", 3, 15))).await;
        let held = bench.accept(Method::PUT).await;
        // As after a panic, nothing of it is left.
        first.abort();
        assert!(first.await.is_err());
        let _second = tokio::spawn(elector.run(async move { drop(never.await) }));
        let mut read = lease("", 4, 15);
        read["spec"] = held;
        bench.read(Some(read)).await;
        bench.accept(Method::PUT).await;
        assert_eq!(bench.term(), Some(5));
    }
}
