//! The turns of the loop, one by one, on a store whose pages, failures and work the test sees, in paused time.

use std::future::Future;

use balancer_core::{Capacity, Conventions, JobRef, LiveExecutor, Pod};
use balancer_runtime::admin;
use balancer_runtime::tasks::Tasks;
use balancer_store::MemoryLedger;
use http::{Request, Response};
use kube::Client;
use kube::client::Body;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::advance;

use super::*;
use crate::controller::tests::{Call, Scripted, Work, down, driver, executor, metric, parts};
use crate::index::Change;
use crate::jobs;
use crate::leader::Leadership;
use crate::metrics::Cause;
use crate::state::Progress;
use crate::watch::{Event, Source, SyncStatus};

/// The entries on a page.
const PER_PAGE: usize = 500;

/// A reconciler whose turns the test takes.
pub(crate) struct Bench {
    ledger: Arc<Scripted>,
    registry: Registry,
    reconciler: Reconciler<Scripted>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let mut registry = admin::registry("test");
        let tasks = Tasks::register(&mut registry);
        let ledger = Arc::new(Scripted::new(|_, _| Ok(())));
        *ledger.per_page.lock().expect("a lock") = PER_PAGE;
        let parts = parts(&ledger, Conventions::default(), &mut registry, &tasks);
        let api = tower_test::mock::pair::<Request<Body>, Response<Body>>().0;
        let client = Client::new(api, "default");
        Self {
            ledger,
            registry,
            reconciler: Reconciler { parts, client, leadership: Leadership::alone(), jobs: jobs::channel().0 },
        }
    }

    /// What the loop works with, when everything is in sync and these pods are live.
    pub(crate) fn state(&self, pods: impl IntoIterator<Item = Value>) -> State<'_, Scripted> {
        let mut sync = SyncStatus::new([None]);
        for source in [Source::Pods(None), Source::Nodes] {
            sync.observe(&source, &Event::<()>::InitDone, Instant::now());
        }
        let mut state = State::new(&self.reconciler, sync, watch::channel(Progress::default()).0);
        state.terms.follow(self.reconciler.leadership.term());
        state.plan.lists_done(false, false);
        for pod in pods {
            apply(&mut state, &pod);
        }
        state.index.take_changed();
        state
    }

    /// The entries of a job, by the key of the executor.
    fn fill(&self, job: &JobId, keys: impl IntoIterator<Item = String>) {
        let keys: Vec<_> = keys.into_iter().collect();
        let uids: Vec<_> = keys.iter().map(|key| format!("uid-{key}")).collect();
        let live = |(key, uid)| LiveExecutor { key, uid, capacity: Some(Capacity::Spot), states_ratio: false };
        let live: Vec<_> = keys.iter().map(String::as_str).zip(uids.iter().map(String::as_str)).map(live).collect();
        let state = balancer_core::JobState { live: &live, ..Default::default() };
        let reconcile = self.ledger.memory.reconcile(job.as_job_ref(), &state, Duration::ZERO, Term(1));
        now(reconcile).expect("a reconcile");
    }

    fn entries(&self, job: &JobId) -> usize {
        now(self.ledger.memory.get(job.as_job_ref())).expect("an answer").map_or(0, |ledger| ledger.entries().len())
    }

    fn metric(&self, series: &str) -> f64 {
        metric(&self.registry, series)
    }
}

/// The result of a call to the store in memory, which never waits.
fn now<T>(call: impl Future<Output = T>) -> T {
    futures::FutureExt::now_or_never(call).expect("it does not wait")
}

fn apply(state: &mut State<'_, Scripted>, pod: &Value) {
    state.index.apply_pod(&serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod"), None);
}

fn job(app_id: &str) -> Arc<JobId> {
    Arc::new(JobRef { namespace: "etl", app_id }.to_job_id())
}

fn executors(job: &str, number: u32) -> impl Iterator<Item = Value> {
    (0..number).map(move |id| executor(job, id))
}

/// Takes the turn of the jobs that are due, and returns what it did; `None` if no job is due.
async fn turn(state: &mut State<'_, Scripted>) -> Option<Vec<Work>> {
    let due = state.queue.take_due(Instant::now(), BATCH);
    if due.is_empty() {
        return None;
    }
    assert!(state.reconcile_batch(due).await);
    Some(state.reconciler.parts.ledger.take_work())
}

/// Takes turns until no job is due, and returns what each of them did.
async fn turns(state: &mut State<'_, Scripted>) -> Vec<Vec<Work>> {
    let mut turns = Vec::new();
    while let Some(work) = turn(state).await {
        turns.push(work);
        assert!(turns.len() < 1000, "it does not end");
    }
    turns
}

fn named(work: &[Work]) -> usize {
    work.iter().map(|work| if let Work::Named(_, number) = work { *number } else { 0 }).sum()
}

/// The jobs of the pages, one for each page.
fn pages(work: &[Work]) -> Vec<&str> {
    work.iter().filter_map(|work| if let Work::Page(job) = work { Some(&**job) } else { None }).collect()
}

#[tokio::test(start_paused = true)]
async fn a_large_ledger_that_was_lost_is_filled_in_turns_between_which_others_have_theirs() {
    let bench = Bench::new();
    let mut state = bench.state(executors("large", 10_000).chain(executors("small", 1)));
    state.queue.enqueue_at(job("large"), Executors::All, Instant::now());
    let mut largest = 0;
    for at in 0.. {
        if at == 1 {
            state.queue.enqueue(job("small"), Change::Loss, Executors::one("small-exec-0".into()), Instant::now());
            advance(Duration::from_millis(20)).await;
        }
        let Some(work) = turn(&mut state).await else { break };
        assert!(
            work.iter().all(|work| !matches!(work, Work::Named(_, NAMED_AT_ONCE..))
                || matches!(work, Work::Named(_, NAMED_AT_ONCE)))
        );
        largest = largest.max(named(&work));
        if at == 1 {
            assert!(bench.entries(&job("large")) < 10_000 && bench.entries(&job("small")) == 1);
        }
    }
    assert!(largest <= Executors::MAX + 1, "{largest} in one turn");
    assert_eq!(bench.entries(&job("large")), 10_000);
    assert_eq!(bench.metric("reconcile_drift_total{kind=\"missing\"}"), 10_001.0);
}

#[tokio::test(start_paused = true)]
async fn two_large_ledgers_are_compared_at_once_and_the_others_in_their_turn() {
    let bench = Bench::new();
    let jobs = ["a", "b", "c", "d", "e"];
    let mut state = bench.state(jobs.iter().flat_map(|job| executors(job, 3_000)));
    for id in jobs {
        bench.fill(&job(id), (0..3_000).map(|at| format!("{id}-exec-{at}")));
        state.queue.enqueue_at(job(id), Executors::All, Instant::now());
    }
    let (mut compared, mut turns) = (BTreeSet::new(), 0);
    while let Some(work) = turn(&mut state).await {
        turns += 1;
        let of: BTreeSet<_> = pages(&work).into_iter().map(str::to_owned).collect();
        assert!(of.len() <= 2 && pages(&work).len() <= 2 * PAGES_PER_TURN, "{work:?}");
        compared.extend(of);
    }
    assert_eq!(compared.len(), jobs.len(), "after {turns} turns");
    assert!(jobs.iter().all(|id| state.comparisons.until_requested(&job(id)) == 0));
    // Each comparison is one attempt, and so is what could be done about each of the three jobs that had to wait.
    assert_eq!(bench.metric("reconcile_jobs_total{outcome=\"in_sync\"}"), 5.0 + 3.0);
}

#[tokio::test(start_paused = true)]
async fn a_loss_in_a_job_whose_comparison_waits_is_reconciled_at_once() {
    let bench = Bench::new();
    let jobs = ["a", "b", "c"];
    let mut state = bench.state(jobs.iter().flat_map(|job| executors(job, 3_000)));
    for id in jobs {
        bench.fill(&job(id), (0..3_000).map(|at| format!("{id}-exec-{at}")));
        state.queue.enqueue_at(job(id), Executors::All, Instant::now());
    }
    for id in jobs {
        state.index.delete_pod("etl", &format!("{id}-exec-7"));
        state.queue.enqueue(job(id), Change::Loss, Executors::one(format!("{id}-exec-7").into()), Instant::now());
    }
    advance(Duration::from_millis(20)).await;
    turn(&mut state).await;
    for id in jobs {
        assert_eq!(bench.entries(&job(id)), 2_999, "of {id}");
    }
    turns(&mut state).await;
    assert_eq!(bench.metric("reconcile_drift_total{kind=\"stale\"}"), 3.0);
}

#[tokio::test(start_paused = true)]
async fn a_comparison_that_is_requested_again_goes_on_and_is_then_repeated() {
    let bench = Bench::new();
    let mut state = bench.state(executors("large", 3_000));
    bench.fill(&job("large"), (0..3_000).map(|at| format!("large-exec-{at}")));
    state.queue.enqueue_at(job("large"), Executors::All, Instant::now());
    let mut read = 0;
    for at in 0.. {
        let Some(work) = turn(&mut state).await else { break };
        read += pages(&work).len();
        if at == 0 {
            state.queue.enqueue_at(job("large"), Executors::All, Instant::now());
        }
    }
    assert_eq!(read, 12);
}

#[tokio::test(start_paused = true)]
async fn what_was_corrected_before_a_call_fails_is_counted_once() {
    let bench = Bench::new();
    let mut state = bench.state(executors("large", 3_000));
    let mut calls = 0;
    bench.ledger.play(move |call, _| {
        calls += u32::from(call == Call::Reconcile);
        if calls == 6 && call == Call::Reconcile { Err(down()) } else { Ok(()) }
    });
    state.queue.enqueue_at(job("large"), Executors::All, Instant::now());
    turns(&mut state).await;
    assert_eq!(bench.metric("reconcile_jobs_total{outcome=\"failed\"}"), 1.0);
    let before = bench.entries(&job("large"));
    assert_eq!(bench.metric("reconcile_drift_total{kind=\"missing\"}"), before as f64);
    advance(RETRY_AFTER).await;
    turns(&mut state).await;
    assert_eq!((before < 3_000, bench.entries(&job("large"))), (true, 3_000));
    assert_eq!(bench.metric("reconcile_drift_total{kind=\"missing\"}"), 3_000.0);
    assert_eq!(bench.metric("reconcile_jobs_total{outcome=\"corrected\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_executor_that_is_named_while_a_comparison_runs_is_corrected_and_counted_once() {
    let bench = Bench::new();
    let mut state = bench.state(executors("large", 3_000));
    // The last ones on the pages are missing, and two of them are named before the comparison comes to them.
    bench.fill(&job("large"), (0..2_990).map(|at| format!("large-exec-{at}")));
    state.queue.enqueue_at(job("large"), Executors::All, Instant::now());
    turn(&mut state).await;
    let keys = ["large-exec-2990", "large-exec-2999"].map(Arc::from);
    state.queue.enqueue_at(job("large"), Executors::Some(keys.into()), Instant::now());
    let work = turns(&mut state).await.concat();
    assert_eq!(named(&work), 10, "nobody is named twice");
    assert_eq!(bench.metric("reconcile_drift_total{kind=\"missing\"}"), 10.0);
    assert_eq!(bench.metric("reconcile_jobs_total{outcome=\"corrected\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn placements_of_a_large_ledger_are_moved_a_few_pages_at_a_time() {
    let bench = Bench::new();
    let mut driver = driver("spark-1", "1");
    driver["metadata"]["name"] = json!("d2");
    let mut state = bench.state([driver]);
    let from = Arc::new(JobId::of_driver(JobRef { namespace: "etl", app_id: "spark-1" }, "d2"));
    bench.fill(&from, (0..20 * PER_PAGE).map(|at| format!("exec-{at:05}")));
    for key in ["exec-00001-waits", "exec-09000-waits", "exec-09999-waits"] {
        let overrides = PolicyOverrides { spot_ratio: Some(SpotRatio::ONE), ..PolicyOverrides::default() };
        let (required, policy) = (Some(Capacity::Spot), None);
        let request = PlaceRequest { key, required, overrides, policy, may_create: true, driver: Some("d2") };
        now(bench.ledger.memory.place(from.as_job_ref(), &request)).expect("a placement");
    }
    // The end of the others is not due yet.
    state.queue.enqueue_at(Arc::clone(&from), Executors::default(), Instant::now());
    let work = turns(&mut state).await;
    let longest = work.iter().map(|work| pages(work).len()).max();
    assert!(longest <= Some(2 * PAGES_PER_TURN), "{longest:?} pages in one turn");
    let to = now(bench.ledger.memory.get(JobRef { namespace: "etl", app_id: "spark-1" })).expect("an answer");
    let mut moved: Vec<_> = to.expect("a ledger").entries().keys().cloned().collect();
    moved.sort_unstable();
    assert_eq!(moved, ["exec-00001-waits", "exec-09000-waits", "exec-09999-waits"]);
}

/// A large job in sync, after its first reconcile.
async fn in_sync<'a>(bench: &'a Bench, number: u32) -> State<'a, Scripted> {
    let mut state = bench.state(executors("large", number));
    state.queue.enqueue_at(job("large"), Executors::All, Instant::now());
    turns(&mut state).await;
    assert_eq!(bench.entries(&job("large")), number as usize);
    state
}

/// Audits the job, and takes the turns of the next seconds.
async fn audit(state: &mut State<'_, Scripted>, mut meanwhile: impl FnMut(&mut State<'_, Scripted>)) -> Vec<Work> {
    state.reconciler.parts.ledger.take_work();
    // All jobs are audited in one second, because the grace is five.
    state.start_audit();
    state.audit_step().await;
    let mut work = turns(state).await.concat();
    meanwhile(state);
    for _ in 0..30 {
        advance(Duration::from_millis(100)).await;
        work.extend(turns(state).await.concat());
    }
    work
}

fn release(memory: &MemoryLedger, id: u32) {
    let (key, uid) = (format!("large-exec-{id}"), format!("uid-large-exec-{id}"));
    let job = job("large");
    now(memory.release(job.as_job_ref(), &key, Some(&uid), None)).expect("an answer").expect("an executor");
}

fn place(memory: &MemoryLedger, id: u32, capacity: Capacity) {
    let key = format!("large-exec-{id}");
    let overrides = PolicyOverrides::default();
    let (required, policy) = (Some(capacity), Some(balancer_core::Policy::DEFAULT));
    let request = PlaceRequest { key: &key, required, overrides, policy, may_create: true, driver: None };
    now(memory.place(job("large").as_job_ref(), &request)).expect("a placement");
}

#[tokio::test(start_paused = true)]
async fn releases_in_flight_in_a_large_job_lead_to_no_comparison() {
    let bench = Bench::new();
    let mut state = in_sync(&bench, 3_000).await;
    release(&bench.ledger.memory, 1);
    release(&bench.ledger.memory, 2);
    let work = audit(&mut state, |state| {
        for id in [1, 2] {
            state.index.delete_pod("etl", &format!("large-exec-{id}"));
        }
        for (job, changes) in state.index.take_changed() {
            state.queue.enqueue(job, changes.change, changes.executors, Instant::now());
        }
        // The next ones are in flight when the first are decided on.
        release(&bench.ledger.memory, 3);
        release(&bench.ledger.memory, 4);
    })
    .await;
    assert_eq!(pages(&work), [""; 0]);
    // A release and a placement on the other capacity leave the total as it was.
    release(&bench.ledger.memory, 5);
    place(&bench.ledger.memory, 3_000, Capacity::OnDemand);
    let work = audit(&mut state, |state| {
        for id in [3, 4, 5] {
            state.index.delete_pod("etl", &format!("large-exec-{id}"));
        }
        let mut pod = executor("large", 3_000);
        pod["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "on-demand"});
        apply(state, &pod);
        for (job, changes) in state.index.take_changed() {
            state.queue.enqueue(job, changes.change, changes.executors, Instant::now());
        }
    })
    .await;
    assert_eq!(pages(&work), [""; 0]);
    assert_eq!(bench.entries(&job("large")), 2_996);
}

#[tokio::test(start_paused = true)]
async fn executors_that_a_large_ledger_has_lost_are_found_by_the_audit() {
    let bench = Bench::new();
    let mut state = in_sync(&bench, 3_000).await;
    // As if it were released, except that nothing ends.
    release(&bench.ledger.memory, 1);
    let work = audit(&mut state, |_| {}).await;
    assert!(!pages(&work).is_empty());
    advance(Duration::from_secs(3)).await;
    turns(&mut state).await;
    assert_eq!(bench.entries(&job("large")), 3_000);
}

#[tokio::test(start_paused = true)]
async fn a_large_ledger_that_is_gone_is_compared_at_once() {
    let bench = Bench::new();
    let mut state = in_sync(&bench, 3_000).await;
    let gone: Vec<_> = (0..3_000).map(|id| format!("large-exec-{id}")).collect();
    let gone: Vec<_> = gone.iter().map(String::as_str).collect();
    let ended = balancer_core::JobState { gone: &gone, ended: true, ..Default::default() };
    now(bench.ledger.memory.reconcile(job("large").as_job_ref(), &ended, Duration::ZERO, Term(1))).expect("an answer");
    assert_eq!(bench.entries(&job("large")), 0);
    state.start_audit();
    state.audit_step().await;
    turns(&mut state).await;
    assert_eq!(bench.entries(&job("large")), 3_000);
}

#[tokio::test(start_paused = true)]
async fn a_full_store_is_compared_although_it_cannot_count() {
    let bench = Bench::new();
    let mut state = in_sync(&bench, 3_000).await;
    state.index.delete_pod("etl", "large-exec-1");
    state.index.take_changed();
    bench.ledger.play(|call, _| match call {
        Call::BeginCount => Err(StoreError::Full("OOM".to_owned())),
        _ => Ok(()),
    });
    state.queue.enqueue_at(job("large"), Executors::All, Instant::now());
    turns(&mut state).await;
    assert_eq!(bench.entries(&job("large")), 2_999);
}

#[tokio::test(start_paused = true)]
async fn executors_whose_loss_was_hidden_by_others_are_found_when_the_job_is_quiet() {
    let bench = Bench::new();
    let mut state = in_sync(&bench, 3_000).await;
    // One falls out of the ledger. Another one ends before that is decided on, which could be the reason.
    release(&bench.ledger.memory, 1);
    let work = audit(&mut state, |state| {
        state.index.delete_pod("etl", "large-exec-2");
        for (job, changes) in state.index.take_changed() {
            state.queue.enqueue(job, changes.change, changes.executors, Instant::now());
        }
    })
    .await;
    assert_eq!(pages(&work), [""; 0]);
    assert_eq!(bench.entries(&job("large")), 2_998);
    audit(&mut state, |_| {}).await;
    advance(Duration::from_secs(3)).await;
    turns(&mut state).await;
    assert_eq!(bench.entries(&job("large")), 2_999);
}

#[tokio::test(start_paused = true)]
async fn counts_that_a_comparison_could_not_confirm_are_compared_again_later_and_not_with_each_change() {
    let bench = Bench::new();
    // The entries came while the comparison ran, so what it has found says nothing.
    let mut state = in_sync(&bench, 3_000).await;
    bench.ledger.take_work();
    for id in 1..=20 {
        state.index.delete_pod("etl", &format!("large-exec-{id}"));
        for (job, changes) in state.index.take_changed() {
            state.queue.enqueue(job, changes.change, changes.executors, Instant::now());
        }
        advance(Duration::from_secs(1)).await;
        let work = turns(&mut state).await.concat();
        assert_eq!((pages(&work), named(&work)), (Vec::new(), 1));
    }
    advance(COUNT_AGAIN_AFTER).await;
    assert!(!pages(&turns(&mut state).await.concat()).is_empty());
    advance(COUNT_AGAIN_AFTER).await;
    assert!(pages(&turns(&mut state).await.concat()).is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_records_of_many_jobs_are_read_in_several_turns() {
    let bench = Bench::new();
    let names: Vec<String> = (0..200).map(|id| format!("job-{id}")).collect();
    let mut state = bench.state(names.iter().flat_map(|name| executors(name, 1)));
    names.iter().for_each(|name| state.queue.enqueue_at(job(name), Executors::All, Instant::now()));
    while turn(&mut state).await.is_some() {}
    let mut left = Vec::new();
    for _ in 0..3 {
        state.start_audit();
        left.push(state.auditing.len());
        state.audit_step().await;
    }
    // What is left is audited next to what is due, and nothing is added to more than that.
    assert_eq!(left, [200, 136 + 200, 72 + 200]);
}

#[tokio::test(start_paused = true)]
async fn a_resync_ends_with_the_comparisons_that_it_has_requested_whatever_others_request() {
    let bench = Bench::new();
    let mut state = bench.state(executors("large", 10_000));
    let others = [job("other-1"), job("other-2")];
    let start = |state: &mut State<'_, Scripted>| {
        for other in &others {
            state.comparisons.wait(other, None);
        }
        state.plan.request(Cause::Interval);
        state.auditing = vec![job("large")];
        let resync = state.plan.due(Instant::now()).expect("a resync");
        state.start_resync(resync);
        assert!(state.auditing.is_empty(), "it compares these jobs anyway");
    };
    start(&mut state);
    let mut turns = 0;
    while state.resync.is_some() {
        if state.has_resync_step() {
            state.resync_step().await;
        } else {
            // The others wait all the time.
            let due = state.queue.take_due(Instant::now(), BATCH).into_iter().filter(|due| due.job == job("large"));
            let due: Vec<_> = due.collect();
            assert!(!due.is_empty(), "the resync waits for nothing of its own");
            assert!(state.reconcile_batch(due).await);
        }
        turns += 1;
        assert!(turns < 100, "it does not end");
    }
    assert_eq!(bench.entries(&job("large")), 10_000);
    assert!(others.iter().all(|other| state.comparisons.is_waiting(other)));
}
