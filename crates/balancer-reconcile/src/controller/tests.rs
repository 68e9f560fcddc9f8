//! The whole reconciler, on a Kubernetes API and a store whose answers the test gives, in paused time.

use std::sync::Mutex;
use std::time::Duration;

use balancer_core::{
    Capacity, Conventions, Counts, JobId, JobLedger, JobRef, JobState, LearnOutcome, LiveExecutor, PlaceOutcome,
    PlaceRequest, Policy, ReconcileOutcome, RemovalOutcome, SpotRatio, Steer, SteerOutcome, Term, Unconfirmed, millis,
};
use balancer_runtime::admin;
use balancer_runtime::tasks::{NotAlive, Task, Tasks};
use balancer_store::{Cursor, EntryPage, JobPage, JobRecord, MemoryLedger, StoreError};
use futures::FutureExt;
use http::{Request, Response};
use kube::Client;
use kube::client::Body;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::time::sleep;
use tower_test::mock::{self, Handle};

use super::*;
use crate::arguments::ReconcileSettings;
use crate::jobs::SpotFacts;
use crate::metrics::Metrics;
use crate::watch::{Event as WatchEvent, WatchError};
use crate::{Running, start_with};

const SECOND: Duration = Duration::from_secs(1);
const JOB: JobRef<'_> = JobRef { namespace: "etl", app_id: "spark-1" };

/// A call of the reconciler to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Reconcile,
    BeginCount,
    Entries,
    Record,
    ListJobs,
    Heartbeat,
    Steer,
}

pub(crate) type Script = Box<dyn FnMut(Call, &MemoryLedger) -> Result<(), StoreError> + Send>;

/// A ledger in memory whose calls fail, or panic, as a script says.
pub(crate) struct Scripted {
    pub(crate) memory: MemoryLedger,
    script: Mutex<Script>,
    /// How long it takes to steer a job.
    steer_takes: Mutex<Duration>,
    /// The entries on a page.
    pub(crate) per_page: Mutex<usize>,
    /// The pages that were read and the executors that were named, until they are taken.
    work: Mutex<Vec<Work>>,
}

/// A page of a job's entries, or a reconcile that names so many executors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Page(String),
    Named(String, usize),
}

impl Scripted {
    /// A ledger whose clock is the paused time.
    pub(crate) fn new(script: impl FnMut(Call, &MemoryLedger) -> Result<(), StoreError> + Send + 'static) -> Self {
        let started_at = Instant::now();
        Self {
            memory: MemoryLedger::with_clock(Duration::from_secs(86_400), move || millis(started_at.elapsed())),
            steer_takes: Mutex::default(),
            script: Mutex::new(Box::new(script)),
            per_page: Mutex::new(usize::MAX),
            work: Mutex::default(),
        }
    }

    /// What was done since the last call.
    pub(crate) fn take_work(&self) -> Vec<Work> {
        std::mem::take(&mut *self.work.lock().expect("a lock"))
    }

    fn note(&self, work: Work) {
        self.work.lock().expect("a lock").push(work);
    }

    pub(crate) fn play(&self, script: impl FnMut(Call, &MemoryLedger) -> Result<(), StoreError> + Send + 'static) {
        *self.script.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Box::new(script);
    }

    fn before(&self, call: Call) -> Result<(), StoreError> {
        (*self.script.lock().unwrap_or_else(std::sync::PoisonError::into_inner))(call, &self.memory)
    }
}

impl Ledger for Scripted {
    async fn place(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        self.memory.place(job, request).await
    }

    async fn peek(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        self.memory.peek(job, request).await
    }

    async fn release(
        &self,
        job: JobRef<'_>,
        executor: &str,
        uid: Option<&str>,
        driver: Option<&str>,
    ) -> Result<Option<Capacity>, StoreError> {
        self.memory.release(job, executor, uid, driver).await
    }

    async fn learn(
        &self,
        job: JobRef<'_>,
        policy: Policy,
        driver: Option<&str>,
        may_create: bool,
    ) -> Result<LearnOutcome, StoreError> {
        self.memory.learn(job, policy, driver, may_create).await
    }

    async fn reconcile(
        &self,
        job: JobRef<'_>,
        state: &JobState<'_>,
        grace: Duration,
        term: Term,
    ) -> Result<ReconcileOutcome, StoreError> {
        self.before(Call::Reconcile)?;
        self.note(Work::Named(job.app_id.to_owned(), state.live.len() + state.gone.len()));
        self.memory.reconcile(job, state, grace, term).await
    }

    async fn entries(&self, job: JobRef<'_>, cursor: Option<Cursor>) -> Result<EntryPage, StoreError> {
        self.before(Call::Entries)?;
        self.note(Work::Page(job.app_id.to_owned()));
        let EntryPage { mut entries, .. } = self.memory.entries(job, None).await?;
        entries.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let first = cursor.as_ref().map_or("", Cursor::as_str).to_owned();
        let mut rest = entries.split_off(entries.partition_point(|(key, _)| *key < first));
        let per_page = (*self.per_page.lock().expect("a lock")).min(rest.len());
        let next = rest.split_off(per_page).first().map(|(key, _)| Cursor::new(key));
        Ok(EntryPage { entries: rest, next })
    }

    async fn begin_count(&self, job: JobRef<'_>, term: Term) -> Result<(), StoreError> {
        self.before(Call::BeginCount)?;
        self.memory.begin_count(job, term).await
    }

    async fn correct_counts(&self, job: JobRef<'_>, found: Counts, term: Term) -> Result<bool, StoreError> {
        self.memory.correct_counts(job, found, term).await
    }

    async fn steer(&self, job: JobRef<'_>, steer: Steer<'_>, term: Term) -> Result<SteerOutcome, StoreError> {
        self.before(Call::Steer)?;
        let takes = *self.steer_takes.lock().expect("a lock");
        sleep(takes).await;
        self.memory.steer(job, steer, term).await
    }

    async fn remove_unconfirmed(
        &self,
        job: JobRef<'_>,
        absent: &[Unconfirmed],
        term: Term,
    ) -> Result<RemovalOutcome, StoreError> {
        self.memory.remove_unconfirmed(job, absent, term).await
    }

    async fn take_placed(&self) -> Result<Vec<JobId>, StoreError> {
        self.memory.take_placed().await
    }

    async fn record(&self, job: JobRef<'_>) -> Result<Option<JobRecord>, StoreError> {
        self.before(Call::Record)?;
        self.memory.record(job).await
    }

    async fn list_jobs(&self, cursor: Option<Cursor>) -> Result<JobPage, StoreError> {
        self.before(Call::ListJobs)?;
        self.memory.list_jobs(cursor).await
    }

    async fn heartbeat(&self, heartbeat: u64) -> Result<Option<u64>, StoreError> {
        self.before(Call::Heartbeat)?;
        self.memory.heartbeat(heartbeat).await
    }

    async fn get(&self, job: JobRef<'_>) -> Result<Option<JobLedger>, StoreError> {
        self.memory.get(job).await
    }
}

/// A reconciler that runs, alone, and what it works with.
struct Bench {
    ledger: Arc<Scripted>,
    registry: Registry,
    tasks: Tasks,
    running: Running,
    events: Events,
    deletions: Events,
}

/// The Events that the reconciler has created, or the deletions that it has requested.
type Events = Arc<Mutex<Vec<Value>>>;

/// Starts a reconciler in a cluster with these pods, and a store that answers by this script.
async fn bench(
    pods: Vec<Value>,
    script: impl FnMut(Call, &MemoryLedger) -> Result<(), StoreError> + Send + 'static,
) -> Bench {
    bench_with(Conventions::default(), pods, script).await
}

/// The same in a cluster with these conventions.
async fn bench_with(
    conventions: Conventions,
    pods: Vec<Value>,
    script: impl FnMut(Call, &MemoryLedger) -> Result<(), StoreError> + Send + 'static,
) -> Bench {
    let (service, api) = mock::pair();
    let (events, deletions) = (Events::default(), Events::default());
    tokio::spawn(serve(api, pods, Arc::clone(&events), Arc::clone(&deletions)));
    let mut registry = admin::registry("test");
    let tasks = Tasks::register(&mut registry);
    let ledger = Arc::new(Scripted::new(script));
    let parts = parts(&ledger, conventions, &mut registry, &tasks);
    let running = start_with(Client::new(service, "default"), parts);
    Bench { ledger, registry, tasks, running, events, deletions }
}

/// The parts of a reconciler that leads alone.
pub(crate) fn parts(
    ledger: &Arc<Scripted>,
    conventions: Conventions,
    registry: &mut Registry,
    tasks: &Tasks,
) -> Parts<Scripted> {
    let settings = ReconcileSettings {
        interval: Duration::from_secs(1800),
        grace: Duration::from_secs(5),
        namespaces: Vec::new(),
        lease: "leases".into(),
    };
    Parts {
        ledger: Arc::clone(ledger),
        shared: false,
        conventions: Arc::new(conventions),
        defaults: Policy::DEFAULT,
        settings,
        metrics: Arc::new(Metrics::register(registry)),
        tasks: tasks.clone(),
    }
}

/// Lists these pods, and [`nodes`]. Watches end at once, and report nothing. Of the pods that are read by name, those whose
/// names begin with `spark-1-exec` exist, and those that begin with `forbidden` may not be read or deleted. A node is on its
/// way for the first executor of each job.
async fn serve(mut api: Handle<Request<Body>, Response<Body>>, pods: Vec<Value>, events: Events, deletions: Events) {
    while let Some((request, answer)) = api.next_request().await {
        if request.uri().path() == "/apis/events.k8s.io/v1/namespaces/etl/events" {
            let body = request.into_body().collect_bytes().await.expect("the body of a request");
            events.lock().expect("a lock").push(serde_json::from_slice(&body).expect("an Event"));
            answer.send_response(Response::new(Body::from(body.to_vec())));
            continue;
        }
        let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
        let (path, query) = (path.as_str(), query.as_str());
        if request.method() == http::Method::DELETE {
            let body = request.into_body().collect_bytes().await.expect("the body of a request");
            let options: Value = serde_json::from_slice(&body).expect("the options of a deletion");
            deletions.lock().expect("a lock").push(json!({"path": path, "preconditions": options["preconditions"]}));
            let code = if path.contains("/forbidden") { 403 } else { 200 };
            let body = Body::from(status(code, "Forbidden").into_bytes());
            answer.send_response(Response::builder().status(code).body(body).expect("a response"));
            continue;
        }
        let list = |items: &[Value]| json!({"metadata": {"resourceVersion": "1"}, "items": items}).to_string();
        let body = match path {
            _ if query.contains("watch=") => String::new(),
            "/api/v1/pods" => list(&pods),
            "/api/v1/namespaces/etl/events" if query.contains("-exec-1&") => {
                list(&[json!({"metadata": {}, "involvedObject": {}, "reason": "Nominated"})])
            }
            "/api/v1/nodes" => list(&nodes()),
            _ => list(&[]),
        };
        let (status, body) = match path.strip_prefix("/api/v1/namespaces/etl/pods/").map(|name| name.rsplit_once('-')) {
            Some(Some(("spark-1-exec", id))) => (200, executor("spark-1", id.parse().unwrap_or_default()).to_string()),
            Some(Some(("forbidden-exec", _))) => (403, status(403, "Forbidden")),
            Some(_) => (404, status(404, "NotFound")),
            None => (200, body),
        };
        let response = Response::builder().status(status).body(Body::from(body.into_bytes()));
        answer.send_response(response.expect("a response"));
    }
}

/// The answer of the Kubernetes API to a request that it refuses.
pub(crate) fn refusal(code: u16, reason: &str) -> Response<Body> {
    let body = Body::from(status(code, reason).into_bytes());
    Response::builder().status(code).body(body).expect("a response")
}

fn status(code: u16, reason: &str) -> String {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": reason, "reason": reason})
        .to_string()
}

/// Two spot nodes, each named for its instance type.
fn nodes() -> [Value; 2] {
    ["m5", "m6"].map(|instance_type| {
        let labels = json!({
            "karpenter.sh/capacity-type": "spot",
            "node.kubernetes.io/instance-type": instance_type,
            "topology.kubernetes.io/zone": "a",
        });
        json!({"metadata": {"name": instance_type, "labels": labels}})
    })
}

pub(crate) fn executor(job: &str, id: u32) -> Value {
    let labels = json!({"spark-role": "executor", "spark-app-selector": job});
    let name = format!("{job}-exec-{id}");
    json!({
        "metadata": {"name": name, "namespace": "etl", "uid": format!("uid-{name}"), "labels": labels},
        "spec": {"nodeSelector": {"karpenter.sh/capacity-type": "spot"}},
    })
}

impl Bench {
    fn metric(&self, series: &str) -> f64 {
        metric(&self.registry, series)
    }

    async fn leads(&self) -> bool {
        sleep(Duration::from_millis(10)).await;
        self.metric("reconcile_leader") == 1.0
    }

    async fn until_synced(&self) {
        let mut progress = self.running.progress();
        progress.wait_for(|progress| *progress == Progress::Synced).await.expect("it runs");
    }

    async fn executors(&self, job: JobRef<'_>) -> usize {
        self.ledger.get(job).await.expect("a ledger").map_or(0, |ledger| ledger.entries().len())
    }
}

/// The value of a series without its prefix, such as `tasks_died_total{task="log"}`.
pub(crate) fn metric(registry: &Registry, series: &str) -> f64 {
    let mut text = String::new();
    encode(&mut text, registry).expect("a text");
    let value = text.lines().find_map(|line| line.strip_prefix(&format!("spot_balancer_{series} ")));
    value.unwrap_or_else(|| panic!("no {series} in {text}")).parse().expect("a number")
}

pub(crate) fn down() -> StoreError {
    StoreError::NoConnection("for the test".into())
}

#[tokio::test(start_paused = true)]
async fn the_leader_gauge_is_1_only_while_the_lists_are_complete_and_the_store_is_up() {
    let bench = bench(vec![executor("spark-1", 1)], |_, _| Ok(())).await;
    assert_eq!(bench.metric("reconcile_leader"), 0.0, "nothing is listed yet");
    bench.until_synced().await;
    assert!(bench.leads().await);
    assert_eq!(bench.executors(JOB).await, 1);
    bench.ledger.play(|_, _| Err(down()));
    sleep(2 * SECOND).await;
    assert!(!bench.leads().await);
    bench.ledger.play(|_, _| Ok(()));
    sleep(2 * SECOND).await;
    assert!(bench.leads().await);
    let Bench { running, registry, .. } = bench;
    running.shut_down().await;
    assert_eq!(metric(&registry, "reconcile_leader"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_store_without_memory_is_up_and_loses_dead_entries() {
    let bench = bench(vec![executor("spark-1", 1)], |call, _| match call {
        Call::Heartbeat => Err(StoreError::Full("used memory > maxmemory".into())),
        _ => Ok(()),
    })
    .await;
    bench.until_synced().await;
    // The entry of an executor that has ended: its pod was seen.
    let (one, two) = ("spark-1-exec-1", "spark-1-exec-2");
    let live =
        [one, two].map(|key| LiveExecutor { key, uid: key, capacity: Some(Capacity::Spot), states_ratio: false });
    let (state, grace) = (JobState { live: &live, ..JobState::default() }, 5 * SECOND);
    bench.ledger.memory.reconcile(JOB, &state, grace, Term(1)).await.expect("a reconcile");
    assert_eq!(bench.executors(JOB).await, 2);
    sleep(10 * SECOND).await;
    assert_eq!(bench.executors(JOB).await, 1);
    assert!(bench.leads().await);
    assert!(bench.metric("reconcile_store_errors_total{kind=\"full\"}") >= 9.0);
}

#[tokio::test(start_paused = true)]
async fn a_loss_is_followed_while_everything_is_listed_again() {
    const LISTS_AGAIN_FOR: Duration = Duration::from_secs(40);
    let pods: Vec<Value> = (1..=2).map(|id| executor("spark-1", id)).collect();
    let list = |items: &[Value]| json!({"metadata": {"resourceVersion": "1"}, "items": items}).to_string();
    let (service, mut api) = mock::pair::<Request<Body>, Response<Body>>();
    let (started, has_started) = watch::channel(false);
    tokio::spawn(async move {
        let (mut lists, mut has_lost) = (0, false);
        while let Some((request, answer)) = api.next_request().await {
            let (path, query) = (request.uri().path(), request.uri().query().unwrap_or_default());
            let (mut body, mut takes) = (list(&[]), Duration::ZERO);
            if query.contains("watch=") {
                body = String::new();
                if path == "/api/v1/pods" && lists > 1 && !std::mem::replace(&mut has_lost, true) {
                    let mut lost = executor("spark-1", 2);
                    lost["metadata"]["resourceVersion"] = json!("2");
                    body = json!({"type": "DELETED", "object": lost}).to_string();
                }
            } else if path == "/api/v1/pods" {
                lists += 1;
                // The other list has the state from before the loss.
                body = list(&pods);
                if lists > 1 {
                    takes = LISTS_AGAIN_FOR;
                    started.send_replace(true);
                }
            } else if path == "/api/v1/nodes" {
                body = list(&nodes());
            }
            tokio::spawn(async move {
                sleep(takes).await;
                answer.send_response(Response::new(Body::from(body.into_bytes())));
            });
        }
    });
    let mut registry = admin::registry("test");
    let tasks = Tasks::register(&mut registry);
    let ledger = Arc::new(Scripted::new(|_, _| Ok(())));
    let running =
        start_with(Client::new(service, "default"), parts(&ledger, Conventions::default(), &mut registry, &tasks));
    let executors = async || ledger.get(JOB).await.expect("a ledger").map_or(0, |ledger| ledger.entries().len());
    let _ = running.progress().wait_for(|progress| *progress == Progress::Synced).await.expect("it runs");
    assert_eq!(executors().await, 2);
    let _ = has_started.clone().wait_for(|has_started| *has_started).await.expect("lists are served");
    sleep(SECOND).await;
    assert_eq!(executors().await, 1);
    sleep(LISTS_AGAIN_FOR + 5 * SECOND).await;
    assert_eq!(executors().await, 1, "the list brings nothing back");
    assert_eq!(metric(&registry, "reconcile_resyncs_total{cause=\"interval\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_outage_ends_a_second_after_there_was_room_for_all_that_the_watch_reports() {
    let bench = crate::reconcile_jobs::tests::Bench::new();
    let mut state = bench.state([]);
    let (mut watches, sender) = WatchSet::of_test();
    let send = |event| sender.try_send((ClusterEvent::Pods(None, event), None)).is_ok();
    assert!(send(WatchEvent::Disconnected(WatchError::Expired)) && send(WatchEvent::Resumed));
    state.receive(&mut watches);
    while send(WatchEvent::Resumed) {}
    let reports = async |number| {
        for _ in 0..number {
            let _ = sender.send((ClusterEvent::Pods(None, WatchEvent::Resumed), None)).await;
        }
    };
    let mut waiting = pin!(reports(3));
    assert!(futures::poll!(&mut waiting).is_pending(), "there is no room");
    sleep(60 * SECOND).await;
    // The one that is received makes room, which the watch has not used yet.
    let event = watches.next().await;
    state.apply(event);
    state.receive(&mut watches);
    assert!(!state.sync.is_synced("etl"), "others may wait");
    waiting.await;
    state.receive(&mut watches);
    assert!(!state.sync.is_synced("etl"), "the watch had no second for them");
    sleep(SECOND).await;
    state.receive(&mut watches);
    assert!(state.sync.is_synced("etl"));
}

#[tokio::test(start_paused = true)]
async fn a_loss_behind_many_listed_objects_is_queued_in_the_same_turn() {
    let bench = crate::reconcile_jobs::tests::Bench::new();
    let mut state = bench.state([executor("spark-1", 1)]);
    let (mut watches, sender) = WatchSet::of_test();
    let [node, _] = nodes();
    for _ in 0..1000 {
        let node = serde_json::from_value(node.clone()).expect("a node");
        sender.try_send((ClusterEvent::Nodes(WatchEvent::RelistApply(node)), None)).map_err(drop).expect("room");
    }
    let lost = serde_json::from_value(executor("spark-1", 1)).expect("a pod");
    sender.try_send((ClusterEvent::Pods(None, WatchEvent::Delete(lost)), None)).map_err(drop).expect("room");
    state.receive(&mut watches);
    assert!(state.queue.next_due().is_some_and(|due| due <= Instant::now() + SECOND / 10));
}

#[tokio::test(start_paused = true)]
async fn a_list_that_fails_after_it_was_waited_for_leads_to_another_one_within_a_minute() {
    let bench = crate::reconcile_jobs::tests::Bench::new();
    let mut state = bench.state([]);
    let (mut watches, sender) = WatchSet::of_test();
    let failed = WatchEvent::RelistFailed(WatchError::ListTooSlow(300 * SECOND));
    sender.try_send((ClusterEvent::Pods(None, failed), None)).map_err(drop).expect("room");
    sleep(300 * SECOND).await;
    assert!(!state.plan.is_listing());
    state.receive(&mut watches);
    let in_a_minute = Instant::now() + 60 * SECOND;
    assert!(state.plan.relist_at().is_some_and(|at| at <= in_a_minute), "{:?}", state.plan.relist_at());
}

#[tokio::test(start_paused = true)]
async fn data_lost_while_a_resync_runs_leads_to_another_resync() {
    let pods = (0..200).map(|job| executor(&format!("spark-{job}"), 1)).collect();
    let mut reconciles = 0;
    let bench = bench(pods, move |call, _| {
        reconciles += i32::from(call == Call::Reconcile);
        match (call, reconciles) {
            // An error makes the resync check the store in its middle, by a heartbeat.
            (Call::Reconcile, 100) => Err(StoreError::InvalidReply("for the test".into())),
            _ => Ok(()),
        }
    })
    .await;
    bench.until_synced().await;
    sleep(3 * SECOND).await;
    assert_eq!(bench.metric("reconcile_resyncs_total{cause=\"store\"}"), 0.0, "nothing was lost");

    // Another number in the place of the heartbeat is how a loss shows.
    let mut reconciles = 0;
    bench.ledger.play(move |call, memory| {
        reconciles += i32::from(call == Call::Reconcile);
        let lose = || memory.heartbeat(7).now_or_never().expect("it does not wait").map(drop);
        match (call, reconciles) {
            (Call::Heartbeat, 0) => lose(),
            (Call::Reconcile, 100) => lose().and(Err(StoreError::InvalidReply("for the test".into()))),
            _ => Ok(()),
        }
    });
    sleep(5 * SECOND).await;
    assert_eq!(bench.metric("reconcile_resyncs_total{cause=\"store\"}"), 2.0);
}

#[tokio::test(start_paused = true)]
async fn a_resync_that_cannot_list_the_jobs_is_repeated_until_it_can() {
    let bench = bench(vec![executor("spark-1", 1)], |call, _| match call {
        Call::ListJobs => Err(StoreError::Refused { code: "NOPERM".into(), detail: "for the test".into() }),
        _ => Ok(()),
    })
    .await;
    sleep(10 * SECOND).await;
    assert_eq!(bench.executors(JOB).await, 1, "the jobs of the cluster are reconciled");
    assert_eq!(*bench.running.progress().borrow(), Progress::Listing);
    assert_eq!(bench.metric("reconcile_resyncs_total{cause=\"start\"}"), 0.0);
    let failed = bench.metric("reconcile_store_errors_total{kind=\"refused\"}");
    assert!((2.0..5.0).contains(&failed), "{failed}");
    bench.ledger.play(|_, _| Ok(()));
    bench.until_synced().await;
    assert_eq!(bench.metric("reconcile_resyncs_total{cause=\"start\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_loop_that_panics_is_restarted_with_the_gauge_at_0_meanwhile() {
    let mut panics = 1;
    let bench = bench(vec![executor("spark-1", 1)], move |call, _| {
        if call == Call::Reconcile && panics > 0 {
            panics -= 1;
            panic!("a panic of the test's own");
        }
        Ok(())
    })
    .await;
    sleep(SECOND / 2).await;
    assert_eq!((bench.metric("tasks_died_total{task=\"reconciler\"}"), bench.metric("reconcile_leader")), (1.0, 0.0));
    bench.until_synced().await;
    assert!(bench.leads().await);
    assert_eq!((bench.executors(JOB).await, bench.tasks.liveness().problem()), (1, None));
}

#[tokio::test(start_paused = true)]
async fn a_process_whose_loop_keeps_panicking_is_not_alive() {
    let bench = bench(vec![executor("spark-1", 1)], |_, _| panic!("a panic of the test's own")).await;
    sleep(10 * SECOND).await;
    assert_eq!(bench.tasks.liveness().problem(), None);
    sleep(20 * SECOND).await;
    assert_eq!(bench.tasks.liveness().problem(), Some(NotAlive::Dies(Task::Reconciler)));
}

#[tokio::test(start_paused = true)]
async fn a_process_whose_store_is_down_for_long_is_alive() {
    let bench = bench(vec![executor("spark-1", 1)], |_, _| Err(down())).await;
    sleep(600 * SECOND).await;
    assert_eq!(bench.tasks.liveness().problem(), None);
}

#[tokio::test(start_paused = true)]
async fn placements_go_soon_if_their_pods_do_not_exist_and_stay_if_they_may() {
    let bench = bench(Vec::new(), |_, _| Ok(())).await;
    bench.until_synced().await;
    let names = ["spark-1-exec-1", "refused-exec-1", "forbidden-exec-1", "refused-exec-2"];
    for key in names {
        let request = PlaceRequest {
            key,
            required: Some(Capacity::Spot),
            overrides: Default::default(),
            policy: None,
            may_create: true,
            driver: None,
        };
        bench.ledger.place(JOB, &request).await.expect("a placement");
        // Each placement after the first comes while the pods of earlier ones are looked up.
        sleep(Duration::from_millis(150)).await;
    }
    sleep(2 * SECOND).await;
    let ledger = bench.ledger.get(JOB).await.expect("an answer").expect("a ledger");
    let mut left: Vec<_> = ledger.entries().keys().map(String::as_str).collect();
    left.sort_unstable();
    assert_eq!(left, ["forbidden-exec-1", "spark-1-exec-1"]);
    assert_eq!(bench.metric("reconcile_refused_placements_total"), 2.0);
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_something_else_has_changed_is_restored_within_ten_seconds() {
    let bench = bench(vec![executor("spark-1", 1), driver("spark-1", "0.3")], |_, _| Ok(())).await;
    let policy = async |job| bench.ledger.get(job).await.expect("a ledger").and_then(|ledger| ledger.policy());
    bench.until_synced().await;
    let (stated, forged) = (ratio("0.3"), ratio("1"));
    assert_eq!(policy(JOB).await, Some(stated));
    bench.ledger.learn(JOB, forged, Some("spark-1"), true).await.expect("a policy");
    sleep(10 * SECOND).await;
    assert_eq!(policy(JOB).await, Some(stated));
    assert_eq!(bench.metric("reconcile_repaired_ledgers_total{fault=\"policy\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn the_policy_of_a_job_without_a_driver_is_restored_to_what_the_last_reconcile_left() {
    let bench = bench(vec![executor("spark-1", 1)], |_, _| Ok(())).await;
    let policy = async |job| bench.ledger.get(job).await.expect("a ledger").and_then(|ledger| ledger.policy());
    bench.until_synced().await;
    assert_eq!(policy(JOB).await, None);
    // The first policy of such a job comes from an admission.
    let store = async |policy: Policy| {
        let live = [LiveExecutor { key: "spark-1-exec-1", uid: "uid", capacity: None, states_ratio: false }];
        let state = JobState { live: &live, overrides: policy.into(), ..JobState::default() };
        let grace = 60 * SECOND;
        let term = bench.ledger.get(JOB).await.expect("a ledger").unwrap_or_default().term();
        bench.ledger.memory.reconcile(JOB, &state, grace, term).await.expect("a policy");
    };
    store(ratio("0.3")).await;
    sleep(10 * SECOND).await;
    assert_eq!(policy(JOB).await, Some(ratio("0.3")));
    assert_eq!(bench.metric("reconcile_repaired_ledgers_total{fault=\"policy\"}"), 0.0);
    store(ratio("1")).await;
    sleep(10 * SECOND).await;
    assert_eq!(policy(JOB).await, Some(ratio("0.3")));
    assert_eq!(bench.metric("reconcile_repaired_ledgers_total{fault=\"policy\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn placements_without_a_pod_follow_their_driver_into_the_ledger_that_it_takes_over() {
    let labels = json!({"spark-role": "driver", "spark-app-selector": "spark-1"});
    let driver = json!({"metadata": {"name": "d2", "namespace": "etl", "uid": "u2", "labels": labels}});
    // The pods of the last moments before the first driver has ended are not reported yet.
    let bench = bench(vec![driver], |_, memory| {
        let place = |driver, key, capacity| {
            let overrides = balancer_core::PolicyOverrides::default();
            let (required, policy) = (Some(capacity), Some(Policy::DEFAULT));
            let request = PlaceRequest { key, required, overrides, policy, may_create: true, driver: Some(driver) };
            memory.place(JOB, &request).now_or_never().expect("no wait").expect("a placement");
        };
        if memory.list_jobs(None).now_or_never().expect("no wait").expect("jobs").jobs.is_empty() {
            place("d1", "d1-exec-1", Capacity::Spot);
            place("d2", "spark-1-exec-7", Capacity::OnDemand);
            place("d2", "refused-exec-1", Capacity::Spot);
        }
        Ok(())
    })
    .await;
    bench.until_synced().await;
    sleep(Duration::from_millis(10)).await;
    let ledger = async || bench.ledger.get(JOB).await.expect("a ledger").unwrap_or_default();
    let names = |ledger: &JobLedger| ledger.entries().keys().cloned().collect::<std::collections::BTreeSet<_>>();
    let held = ledger().await;
    assert_eq!(held.driver(), Some("d2"));
    assert!(names(&held).is_superset(&["refused-exec-1", "spark-1-exec-7"].map(String::from).into()), "{held:?}");
    sleep(2 * SECOND).await;
    let held = ledger().await;
    assert_eq!(names(&held), ["spark-1-exec-7".to_owned()].into(), "the one whose pod exists");
    assert_eq!((held.counts().spot, held.counts().on_demand), (0, 1));
    assert_eq!(bench.ledger.get(JobId::of_driver(JOB, "d2").as_job_ref()).await.expect("no error"), None);
}

#[tokio::test(start_paused = true)]
async fn submitters_are_warned_of_a_ratio_without_effect_and_of_executors_that_find_no_node() {
    let waiting = |id| {
        let mut pod = executor("spark-2", id);
        pod["metadata"]["annotations"] = json!({"workload/capacity-type": "on-demand"});
        pod["metadata"]["ownerReferences"] =
            json!([{"kind": "Pod", "name": "notebook", "uid": "uid-notebook", "controller": true}]);
        pod["spec"]["nodeSelector"] =
            json!({"karpenter.sh/capacity-type": "on-demand", "spark-role": "executor", "pool": "cheap"});
        pod["status"] = json!({"phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/7 nodes are available",
        }]});
        pod
    };
    // All executors of the first job select spot by themselves.
    let mut pods = vec![driver("spark-1", "0.7"), waiting(1), waiting(2)];
    pods.extend((1..=3).map(|id| executor("spark-1", id)));
    let bench = bench(pods, |_, _| Ok(())).await;
    let events = || {
        let events = bench.events.lock().expect("a lock");
        let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
        let of = |event: &Value| (text(&event["regarding"], "uid"), text(event, "reason"), text(event, "note"));
        events.iter().map(of).collect::<Vec<_>>()
    };
    bench.until_synced().await;
    sleep(58 * SECOND).await;
    let without_effect = (
        "uid-spark-1".to_owned(),
        "SpotRatioWithoutEffect".to_owned(),
        "workload/spot-ratio: 0.7, workload/on-demand-base: 0 has no effect, because the executors' own nodeSelector or \
         affinity requires spot"
            .to_owned(),
    );
    assert_eq!((events(), bench.metric("unschedulable_executors")), (vec![without_effect.clone()], 0.0));
    sleep(60 * SECOND).await;
    let events = events();
    let [first, (uid, reason, note)] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!((first, uid.as_str(), reason.as_str()), (&without_effect, "uid-notebook", "ExecutorsUnschedulable"));
    for part in ["2 executors", "spark-2-exec-1", "karpenter.sh/capacity-type", "pool", "0/7 nodes are available"] {
        assert!(note.contains(part), "no {part:?} in {note}");
    }
    assert_eq!(bench.metric("unschedulable_executors"), 2.0);
}

/// An executor that was placed on spot, and finds no node there.
fn stuck(job: &str, id: u32) -> Value {
    let mut pod = executor(job, id);
    pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
    pod["metadata"]["resourceVersion"] = json!("7");
    pod["status"] = json!({"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/7 nodes are available",
    }]});
    pod
}

/// The driver of a job whose executors may find no spot node for 100 seconds.
fn falls_back(job: &str) -> Value {
    let mut driver = driver(job, "1");
    driver["metadata"]["annotations"]["workload/spot-fallback-seconds"] = json!("100");
    driver
}

fn strict() -> Conventions {
    Conventions { spot_preference: balancer_core::SpotPreference::Strict, ..Conventions::default() }
}

impl Bench {
    async fn spot(&self, job: JobRef<'_>) -> balancer_core::SpotState {
        self.ledger.get(job).await.expect("an answer").expect("a ledger").steering().spot.clone()
    }

    fn reasons(&self) -> Vec<String> {
        let events = self.events.lock().expect("a lock");
        events.iter().map(|event| format!("{} {}", event["type"], event["reason"]).replace('"', "")).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn an_executor_that_finds_no_spot_node_is_replaced_unless_a_node_is_on_its_way() {
    let pods = (1..=3).map(|id| stuck("spark-1", id)).chain([falls_back("spark-1")]).collect();
    let bench = bench_with(strict(), pods, |_, _| Ok(())).await;
    bench.until_synced().await;
    sleep(98 * SECOND).await;
    assert_eq!((bench.spot(JOB).await, bench.metric("spot_closed_jobs")), (balancer_core::SpotState::Open, 0.0));
    sleep(20 * SECOND).await;
    assert!(matches!(bench.spot(JOB).await, balancer_core::SpotState::Starved { .. }));
    assert_eq!((bench.metric("spot_closed_jobs"), bench.metric("spot_transitions_total{to=\"closed\"}")), (1.0, 1.0));
    assert!(bench.reasons().contains(&"Warning SpotClosed".to_owned()), "{:?}", bench.reasons());
    // The watch does not report that it is gone, so no other one is deleted.
    sleep(100 * SECOND).await;
    let path = "/api/v1/namespaces/etl/pods/spark-1-exec-2";
    let preconditions = json!({"uid": "uid-spark-1-exec-2", "resourceVersion": "7"});
    assert_eq!(*bench.deletions.lock().expect("a lock"), [json!({"path": path, "preconditions": preconditions})]);
    assert_eq!(bench.metric("executors_replaced_total{outcome=\"deleted\"}"), 1.0);
    assert!(bench.metric("spot_closed_oldest_seconds") >= 99.0);

    // What the store has lost is stored again, although the counts are right.
    let term = bench.ledger.get(JOB).await.expect("a ledger").unwrap_or_default().term();
    bench.ledger.memory.steer(JOB, Steer::OpenSpot, term).await.expect("an answer");
    sleep(10 * SECOND).await;
    assert!(matches!(bench.spot(JOB).await, balancer_core::SpotState::Starved { .. }));
    assert_eq!(bench.metric("spot_transitions_total{to=\"closed\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn the_facts_of_a_job_show_soon_that_spot_was_closed() {
    let pods = (1..=3).map(|id| stuck("spark-1", id)).chain([falls_back("spark-1")]).collect();
    let bench = bench_with(strict(), pods, |_, _| Ok(())).await;
    bench.until_synced().await;
    let mut reader = bench.running.jobs();
    let mut facts = async || reader.read().await.expect("facts").first().expect("a job").clone();
    let before = facts().await;
    assert_eq!((before.pending, before.pending_spot, &before.spot_state), (3, 3, &SpotFacts::Open));
    while bench.spot(JOB).await == balancer_core::SpotState::Open {
        facts().await;
        sleep(SECOND).await;
    }
    sleep(SECOND).await;
    let after = facts().await;
    assert!(matches!(&after.spot_state, SpotFacts::Closed { since: Some(_), retry_at: Some(_) }), "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn spot_is_opened_for_a_job_whose_executors_may_now_run_anywhere() {
    for (conventions, is_open) in [(Conventions::default(), true), (strict(), false)] {
        let bench = bench_with(conventions, vec![falls_back("spark-1"), executor("spark-1", 1)], |_, _| Ok(())).await;
        bench.until_synced().await;
        let term = bench.ledger.get(JOB).await.expect("an answer").expect("a ledger").term();
        let close = Steer::CloseSpot { retry_after: 600_000 };
        bench.ledger.memory.steer(JOB, close, term).await.expect("an answer");
        sleep(60 * SECOND).await;
        assert_eq!(bench.spot(JOB).await == balancer_core::SpotState::Open, is_open);
    }
}

#[tokio::test(start_paused = true)]
async fn without_the_right_to_delete_spot_is_closed_and_the_driver_is_told_once() {
    let pods = (2..=3).map(|id| stuck("forbidden", id)).chain([falls_back("forbidden")]).collect();
    let bench = bench_with(strict(), pods, |_, _| Ok(())).await;
    bench.until_synced().await;
    sleep(800 * SECOND).await;
    let job = JobRef { app_id: "forbidden", ..JOB };
    assert!(matches!(bench.spot(job).await, balancer_core::SpotState::Starved { .. }));
    // One attempt in five minutes.
    assert_eq!(bench.metric("executors_replaced_total{outcome=\"forbidden\"}"), 3.0);
    let reasons = bench.reasons();
    assert!(reasons.contains(&"Warning ExecutorReplacementForbidden".to_owned()), "{reasons:?}");
}

#[tokio::test(start_paused = true)]
async fn each_live_driver_with_the_same_job_id_has_its_own_ledger() {
    let owned = |id, driver: &str| {
        let mut pod = executor("spark-1", id);
        pod["metadata"]["ownerReferences"] =
            json!([{"kind": "Pod", "name": driver, "uid": format!("uid-{driver}"), "controller": true}]);
        pod
    };
    let mut later = driver("spark-1", "0.3");
    later["metadata"]["name"] = json!("later");
    later["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:01Z");
    let pods = vec![later, driver("spark-1", "0.7"), owned(1, "later"), owned(2, "later"), owned(3, "spark-1")];
    let bench = bench(pods, |_, _| Ok(())).await;
    bench.until_synced().await;
    let other = JobId::of_driver(JOB, "later");
    assert_eq!((bench.executors(JOB).await, bench.executors(other.as_job_ref()).await), (1, 2));
    for (job, stated) in [(JOB, "0.7"), (other.as_job_ref(), "0.3")] {
        let ledger = bench.ledger.get(job).await.expect("an answer").expect("a ledger");
        assert_eq!(ledger.policy(), Some(ratio(stated)));
    }
    // A placement in the ledger of the other driver is none of its own, although the pod exists.
    let request = PlaceRequest {
        key: "spark-1-exec-3",
        required: Some(Capacity::Spot),
        overrides: Default::default(),
        policy: None,
        may_create: true,
        driver: Some("later"),
    };
    bench.ledger.place(other.as_job_ref(), &request).await.expect("a placement");
    sleep(3 * SECOND).await;
    assert_eq!(bench.metric("reconcile_refused_placements_total"), 1.0);
    assert_eq!((bench.executors(JOB).await, bench.executors(other.as_job_ref()).await), (1, 2));
}

fn ratio(text: &str) -> Policy {
    Policy { spot_ratio: text.parse::<SpotRatio>().expect("a ratio"), ..Policy::DEFAULT }
}

pub(crate) fn driver(job: &str, ratio: &str) -> Value {
    let labels = json!({"spark-role": "driver", "spark-app-selector": job});
    let annotations = json!({"workload/spot-ratio": ratio});
    json!({
        "metadata": {
            "name": job, "namespace": "etl", "uid": format!("uid-{job}"), "labels": labels, "annotations": annotations,
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
    })
}

#[tokio::test(start_paused = true)]
async fn a_ledger_is_told_to_avoid_a_type_once_and_again_after_it_was_lost() {
    let on = |job: &str, id, node: &str| {
        let mut pod = executor(job, id);
        pod["spec"]["nodeName"] = json!(node);
        pod
    };
    let mut limited = driver("spark-1", "1");
    limited["metadata"]["annotations"]["workload/max-pool-share"] = json!("0.4");
    let mut pods = vec![limited, on("spark-1", 1, "m5"), on("spark-1", 2, "m5"), on("spark-1", 3, "m6")];
    // A job that states no share is not steered.
    pods.extend([driver("spark-2", "1"), on("spark-2", 1, "m5"), on("spark-2", 2, "m5")]);
    let steered = Arc::new(Mutex::new(0));
    let calls = Arc::clone(&steered);
    let count = move |call| *calls.lock().expect("a lock") += u32::from(call == Call::Steer);
    // The first call fails.
    let first = count.clone();
    let mut has_failed = false;
    let bench = bench(pods, move |call, _| {
        first(call);
        if call == Call::Steer && !std::mem::replace(&mut has_failed, true) { Err(down()) } else { Ok(()) }
    })
    .await;
    bench.until_synced().await;
    let avoided = async || bench.ledger.get(JOB).await.expect("a ledger").expect("a job").steering().avoid.clone();
    sleep(3 * SECOND).await;
    assert_eq!(avoided().await, ["m5"]);
    sleep(60 * SECOND).await;
    assert_eq!(*steered.lock().expect("a lock"), 2, "calls without a change");

    let mut is_lost = false;
    bench.ledger.play(move |call, memory| {
        count(call);
        if call == Call::Heartbeat && !std::mem::replace(&mut is_lost, true) {
            memory.heartbeat(7).now_or_never().expect("it does not wait")?;
            let gone = ["spark-1-exec-1", "spark-1-exec-2", "spark-1-exec-3"];
            let ended = JobState { gone: &gone, ended: true, ..JobState::default() };
            memory.reconcile(JOB, &ended, Duration::ZERO, Term(1)).now_or_never().expect("nor this")?;
            assert_eq!(memory.get(JOB).now_or_never().expect("nor this")?, None);
        }
        Ok(())
    });
    sleep(5 * SECOND).await;
    assert_eq!((avoided().await, *steered.lock().expect("a lock")), (vec!["m5".to_owned()], 3));
}

/// When the store got heartbeats, which the loop stores between everything else.
#[derive(Clone, Default)]
struct Heartbeats(Arc<Mutex<Vec<Instant>>>);

impl Heartbeats {
    fn record(&self) {
        self.0.lock().expect("a lock").push(Instant::now());
    }

    /// A script of the store that records them.
    fn recorder(&self) -> impl FnMut(Call, &MemoryLedger) -> Result<(), StoreError> + Send + 'static {
        let beats = self.clone();
        move |call, _| {
            if call == Call::Heartbeat {
                beats.record();
            }
            Ok(())
        }
    }

    fn longest_pause(&self) -> Option<Duration> {
        self.0.lock().expect("a lock").windows(2).map(|beats| beats[1] - beats[0]).max()
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_steers_slowly_does_not_hold_up_the_loop() {
    let mut pods = Vec::new();
    for job in 0..200 {
        let job = format!("spark-{job}");
        let (mut driver, mut executor) = (driver(&job, "1"), executor(&job, 1));
        driver["metadata"]["annotations"]["workload/max-pool-share"] = json!("0.4");
        executor["spec"]["nodeName"] = json!("m5");
        pods.extend([driver, executor]);
    }
    let beats = Heartbeats::default();
    let bench = bench(pods, beats.recorder()).await;
    *bench.ledger.steer_takes.lock().expect("a lock") = Duration::from_millis(400);
    bench.until_synced().await;
    beats.record();
    sleep(60 * SECOND).await;
    for job in 0..200 {
        let app_id = &*format!("spark-{job}");
        let ledger = bench.ledger.get(JobRef { app_id, ..JOB }).await.expect("an answer").expect("a ledger");
        assert_eq!(ledger.steering().avoid, ["m5"]);
    }
    let longest = beats.longest_pause();
    assert!(longest < Some(6 * SECOND), "{longest:?}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_opens_spot_slowly_does_not_hold_up_the_loop() {
    let jobs: Vec<String> = (0..60).map(|job| format!("spark-{job}")).collect();
    let job = |app_id| JobRef { app_id, ..JOB };
    let pods = jobs.iter().flat_map(|job| [driver(job, "1"), executor(job, 1)]).collect();
    let beats = Heartbeats::default();
    let bench = bench(pods, beats.recorder()).await;
    bench.until_synced().await;
    let term = bench.ledger.get(JOB).await.expect("a ledger").unwrap_or_default().term();
    for id in &jobs {
        let close = Steer::CloseSpot { retry_after: 300_000 };
        assert_eq!(bench.ledger.memory.steer(job(id), close, term).await.expect("an answer"), SteerOutcome::Done);
    }
    // The fallback is off, so spot is opened for all of them.
    *bench.ledger.steer_takes.lock().expect("a lock") = Duration::from_millis(400);
    sleep(200 * SECOND).await;
    for id in &jobs {
        assert_eq!(bench.spot(job(id)).await, balancer_core::SpotState::Open);
    }
    let longest = beats.longest_pause();
    assert!(longest < Some(6 * SECOND), "{longest:?}");
}

#[tokio::test(start_paused = true)]
async fn a_job_that_would_lose_too_much_at_once_is_counted_and_its_driver_is_warned_once() {
    let mut pods = vec![driver("spark-1", "1")];
    pods.extend((1..=10).map(|id| {
        let mut pod = executor("spark-1", id);
        pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
        pod["spec"]["nodeName"] = json!(if id <= 7 { "m5" } else { "m6" });
        pod
    }));
    let bench = bench(pods, |_, _| Ok(())).await;
    bench.until_synced().await;
    sleep(30 * SECOND).await;
    for gauge in ["jobs_by_largest_node_share", "jobs_by_largest_pool_share"] {
        let jobs = |le| bench.metric(&format!("{gauge}{{le=\"{le}\"}}"));
        assert_eq!([jobs("0.6"), jobs("0.7"), jobs("1.0"), jobs("+Inf")], [0.0, 1.0, 1.0, 1.0]);
    }
    let warned = || {
        let events = bench.events.lock().expect("a lock");
        let reasons = events.iter().filter_map(|event| event["reason"].as_str()).map(str::to_owned);
        reasons.filter(|reason| reason.starts_with("Large")).collect::<Vec<_>>()
    };
    assert_eq!(warned(), [""; 0]);
    sleep(100 * SECOND).await;
    assert_eq!(warned(), ["LargeNodeShare", "LargePoolShare"]);
    let Bench { running, registry, .. } = bench;
    running.shut_down().await;
    assert_eq!(metric(&registry, "jobs_by_largest_pool_share{le=\"+Inf\"}"), 0.0);
}
