//! A job on a cluster whose spot comes and goes, with the ledger of core, and calls that fail.

use std::collections::{BTreeMap, HashSet};

use balancer_core::{
    Capacity, JobLedger, PlaceOutcome, PlaceRequest, Policy, PolicyOverrides, SpotRatio, Steer, SteerOutcome, Steering,
    Term,
};
use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const FALLBACK: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(300);
const POLICY: Policy = Policy { spot_ratio: SpotRatio::ONE, ..Policy::DEFAULT };
/// How many executors Spark requests at once.
const SPARK_BATCH: usize = 5;
/// How long the watch takes to report a change of a pod.
const WATCH_LAG: Duration = Duration::from_secs(2);

/// An executor pod, as the watch shows it.
#[derive(Clone, Debug)]
struct Pod {
    version: PodVersion,
    capacity: Capacity,
    is_bound: bool,
    since: Instant,
    /// When the watch reports that it is gone.
    gone_at: Option<Instant>,
    /// When the watch reports that it has changed.
    changed_at: Option<Instant>,
}

/// What happens.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Nothing,
    SpotGoes,
    SpotComes,
    /// Another process leads.
    Restart,
    /// The store loses what the job is steered by.
    StoreLoses,
    /// A node is on its way for an executor, or no longer.
    NodeComes(u8),
    NodeFails,
    ExecutorEnds(u8),
    /// The next deletions and checks have this outcome.
    Deletions(Deletion),
    Checks(Option<Failure>),
}

struct World {
    id: Arc<JobId>,
    fallback: Fallback,
    ledger: JobLedger,
    start: Instant,
    now: Instant,
    pods: BTreeMap<String, Pod>,
    created: u32,
    executors: usize,
    has_spot: bool,
    coming: HashSet<String>,
    deletions: Deletion,
    checks: Option<Failure>,
    answer: Option<Step>,
    /// What this leader has deleted: versions that must not be deleted again.
    attempted: HashSet<PodVersion>,
    last_delete: Option<Instant>,
    store_calls: u32,
    deletes: u32,
}

impl World {
    fn new(executors: usize, has_spot: bool) -> Self {
        let start = Instant::now() + 7 * MAX_BACKOFF;
        let mut ledger = JobLedger::default();
        ledger.learn(POLICY, None, true);
        Self {
            id: Arc::new(JobId { namespace: "etl".into(), app_id: "j".into() }),
            fallback: Fallback::default(),
            ledger,
            start,
            now: start,
            pods: BTreeMap::new(),
            created: 0,
            executors,
            has_spot,
            coming: HashSet::new(),
            deletions: Deletion::Deleted,
            checks: None,
            answer: None,
            attempted: HashSet::new(),
            last_delete: None,
            store_calls: 0,
            deletes: 0,
        }
    }

    fn millis(&self) -> u64 {
        balancer_core::millis(self.now - self.start)
    }

    /// One second passes.
    fn tick(&mut self, happening: Happening) {
        self.now += SECOND;
        self.happen(happening);
        self.report_pods();
        self.schedule();
        self.create_executors();
        self.fallback.observe(&self.id, &self.ledger.steering().spot, Duration::ZERO, self.now);
        self.answer_calls();
        self.follow();
    }

    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.tick(Happening::Nothing);
        }
    }

    fn happen(&mut self, happening: Happening) {
        let nth =
            |pods: &BTreeMap<String, Pod>, which: u8| pods.keys().nth(usize::from(which) % pods.len().max(1)).cloned();
        match happening {
            Happening::Nothing => {}
            Happening::SpotGoes => self.has_spot = false,
            Happening::SpotComes => self.has_spot = true,
            Happening::Restart => {
                (self.fallback, self.answer, self.last_delete) = (Fallback::default(), None, None);
                self.attempted.clear();
            }
            Happening::StoreLoses => {
                let entries = self.ledger.entries().clone();
                let (policy, term) = (self.ledger.policy(), self.ledger.term());
                self.ledger = JobLedger::from_parts(policy, None, entries, [], term, Steering::default());
            }
            Happening::NodeComes(which) => self.coming.extend(nth(&self.pods, which)),
            Happening::NodeFails => self.coming.clear(),
            Happening::ExecutorEnds(which) => {
                if let Some(name) = nth(&self.pods, which) {
                    self.end(&name);
                }
            }
            Happening::Deletions(deletion) => self.deletions = deletion,
            Happening::Checks(failure) => self.checks = failure,
        }
    }

    fn end(&mut self, name: &str) {
        self.pods.remove(name);
        self.ledger.release(name, None, self.millis());
    }

    fn report_pods(&mut self) {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= self.now);
        let gone: Vec<_> =
            self.pods.values().filter(|pod| is_due(pod.gone_at)).map(|pod| pod.version.name.clone()).collect();
        for pod in self.pods.values_mut().filter(|pod| is_due(pod.changed_at)) {
            pod.changed_at = None;
            pod.version.resource_version.push('1');
        }
        for name in gone {
            self.end(&name);
        }
    }

    fn schedule(&mut self) {
        for pod in self.pods.values_mut().filter(|pod| pod.gone_at.is_none()) {
            pod.is_bound |= self.has_spot || pod.capacity == Capacity::OnDemand;
        }
    }

    fn create_executors(&mut self) {
        let missing = self.executors.saturating_sub(self.pods.len());
        for _ in 0..missing.min(SPARK_BATCH) {
            self.created += 1;
            let name = format!("e{:05}", self.created);
            let request = PlaceRequest {
                key: &name,
                required: None,
                overrides: PolicyOverrides::default(),
                policy: Some(POLICY),
                may_create: true,
                driver: None,
            };
            let PlaceOutcome::Placed(placed) = self.ledger.place(&request, self.millis()) else { panic!("not placed") };
            let version = PodVersion { name: name.clone(), uid: name.clone(), resource_version: "1".into() };
            let (capacity, since) = (placed.capacity, self.now);
            let pod = Pod { version, capacity, is_bound: false, since, gone_at: None, changed_at: None };
            self.pods.insert(name, pod);
        }
    }

    fn stuck(&self) -> Vec<StuckExecutor> {
        let is_stuck = |pod: &&Pod| !pod.is_bound && pod.capacity == Capacity::Spot;
        let stuck =
            |pod: &Pod| StuckExecutor { pod: pod.version.clone(), key: pod.version.name.clone(), since: pod.since };
        self.pods.values().filter(is_stuck).map(stuck).collect()
    }

    /// The calls of the last second are answered.
    fn answer_calls(&mut self) {
        match self.answer.take() {
            Some(Step::Check(pods)) => {
                let (served, clear) = pods.into_iter().partition(|pod| self.coming.contains(&pod.uid));
                let checked = match self.checks {
                    None => Checked { clear, served, failure: None },
                    failure => Checked { failure, ..Checked::default() },
                };
                self.fallback.checked(&self.id, checked, self.now);
            }
            Some(Step::Delete(pods)) => {
                let answer: Vec<_> = pods.into_iter().map(|pod| (pod, self.deletions)).collect();
                for (version, _) in &answer {
                    let Some(pod) = self.pods.get_mut(&version.name) else { continue };
                    match self.deletions {
                        Deletion::Deleted | Deletion::Gone => pod.gone_at = Some(self.now + WATCH_LAG),
                        Deletion::Changed => pod.changed_at = Some(self.now + WATCH_LAG),
                        Deletion::Failed(_) => {
                            self.attempted.remove(version);
                        }
                    }
                }
                self.fallback.deleted(&self.id, &answer, self.now);
            }
            _ => {}
        }
    }

    fn follow(&mut self) {
        let stuck = self.stuck();
        let probe = match self.fallback.probe(&self.id).and_then(|key| self.pods.get(key)) {
            Some(pod) if pod.is_bound && pod.capacity == Capacity::Spot => Probe::OnSpot,
            _ => Probe::Waits,
        };
        let view = View { fallback: Some(FALLBACK), retry: RETRY, live: self.pods.len(), stuck: &stuck, probe };
        for _ in 0..3 {
            let step = self.fallback.step(&self.id, view, self.now);
            let now = self.millis();
            let mut steer = |steer| assert_eq!(self.ledger.steer(steer, Term(1), now), SteerOutcome::Done);
            match step {
                Step::None => return,
                Step::Close { retry_after } => {
                    steer(Steer::CloseSpot { retry_after: balancer_core::millis(retry_after) });
                    self.fallback.closed_spot(&self.id, retry_after, self.now);
                    self.store_calls += 1;
                }
                Step::Open => {
                    steer(Steer::OpenSpot);
                    self.fallback.opened_spot(&self.id, self.now);
                    self.store_calls += 1;
                }
                Step::Check(_) => {
                    assert!(self.answer.is_none(), "calls of the job are under way");
                    self.answer = Some(step);
                    return;
                }
                Step::Delete(ref pods) => {
                    self.check_deletion(pods, &stuck);
                    self.answer = Some(step);
                    return;
                }
            }
        }
    }

    /// What holds of every deletion.
    fn check_deletion(&mut self, pods: &[PodVersion], stuck: &[StuckExecutor]) {
        assert!(self.answer.is_none(), "calls of the job are under way");
        assert!(!pods.is_empty() && pods.len() <= (self.pods.len() / 10).max(1), "{} at once", pods.len());
        assert_ne!(self.ledger.steering().spot, SpotState::Open, "the replacement would go to spot");
        for pod in pods {
            let stuck = stuck.iter().find(|stuck| stuck.pod == *pod).expect("the version that the watch has reported");
            assert!(self.now - stuck.since >= FALLBACK, "it has not waited for long enough");
            assert!(!self.coming.contains(&pod.uid), "a node is on its way");
            assert!(self.attempted.insert(pod.clone()), "this version was deleted before");
        }
        if let Some(last) = self.last_delete.replace(self.now) {
            assert!(self.now - last >= MIN_PAUSE, "{:?} after the step before", self.now - last);
        }
        assert!(self.pods.values().all(|pod| pod.gone_at.is_none()), "some of the step before are not gone yet");
        self.deletes += 1;
    }

    fn is_open(&self) -> bool {
        self.ledger.steering().spot == SpotState::Open
    }

    fn all_run(&self) -> bool {
        self.pods.len() == self.executors && self.pods.values().all(|pod| pod.is_bound)
    }
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    let deletion = prop::sample::select(vec![
        Deletion::Deleted,
        Deletion::Gone,
        Deletion::Changed,
        Deletion::Failed(Failure::Forbidden),
        Deletion::Failed(Failure::Unavailable),
    ]);
    let failure = prop::sample::select(vec![None, None, Some(Failure::Forbidden), Some(Failure::Unavailable)]);
    prop_oneof![
        2 => Just(SpotGoes),
        1 => Just(SpotComes),
        1 => Just(Restart),
        1 => Just(StoreLoses),
        2 => any::<u8>().prop_map(NodeComes),
        1 => Just(NodeFails),
        2 => any::<u8>().prop_map(ExecutorEnds),
        2 => deletion.prop_map(Deletions),
        1 => failure.prop_map(Checks),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// The checks are in `check_deletion`. In the end, without failures and without spot, every executor runs.
    #[test]
    fn whatever_happens_few_executors_are_replaced_at_once_and_in_the_end_all_run(
        executors in 1usize..40,
        happenings in prop::collection::vec((happening(), 1u64..90), 1..30),
    ) {
        let mut world = World::new(executors, true);
        for (happening, seconds) in happenings {
            world.tick(happening);
            world.run(Duration::from_secs(seconds));
        }
        for happening in
            [Happening::SpotGoes, Happening::NodeFails, Happening::Deletions(Deletion::Deleted), Happening::Checks(None)]
        {
            world.tick(happening);
        }
        world.run(FALLBACK + MAX_BACKOFF + FORBIDDEN_FOR + LOOK_AGAIN_AFTER);
        let mut left = 40 * 20;
        while !world.all_run() && left > 0 {
            world.tick(Happening::Nothing);
            left -= 1;
        }
        prop_assert!(world.all_run(), "{:?}", world.stuck());
    }

    #[test]
    fn a_job_returns_to_spot_within_one_retry_period(
        executors in 1usize..40,
        restarts in any::<bool>(),
        outage in 100u64..2_000,
    ) {
        let mut world = World::new(executors, false);
        for second in 0..outage {
            world.tick(if restarts && second % 97 == 0 { Happening::Restart } else { Happening::Nothing });
        }
        prop_assert!(!world.is_open());
        world.tick(Happening::SpotComes);
        let until = world.now + RETRY + 15 * SECOND;
        // Executors come and go, as they do in every job.
        let mut which = 0u8;
        while !world.is_open() && world.now < until {
            which = which.wrapping_add(7);
            world.tick(Happening::ExecutorEnds(which));
            world.run(4 * SECOND);
        }
        prop_assert!(world.is_open(), "{:?}", world.ledger.steering());
    }

    #[test]
    fn at_rest_nothing_is_done(executors in 1usize..40, happenings in prop::collection::vec(happening(), 0..10)) {
        let mut world = World::new(executors, true);
        for happening in happenings {
            world.tick(happening);
        }
        for happening in [Happening::SpotComes, Happening::StoreLoses, Happening::Restart] {
            world.tick(happening);
        }
        world.run(RETRY);
        let before = (world.store_calls, world.deletes);
        world.run(2 * RETRY);
        prop_assert_eq!((world.store_calls, world.deletes), before);
    }
}

#[test]
fn a_job_that_finds_no_spot_gets_on_demand_in_steps_of_a_tenth() {
    let mut world = World::new(30, false);
    world.run(FALLBACK);
    assert_eq!((world.is_open(), world.deletes), (true, 0), "the first was created a second after the start");
    world.run(30 * SECOND);
    assert!(!world.is_open());
    world.run(Duration::from_secs(90));
    assert!(world.all_run(), "{:?}", world.stuck());
    assert!(world.deletes >= 10);
    let on = world.pods.values().map(|pod| pod.capacity).collect::<Vec<_>>();
    assert!(on.iter().all(|capacity| *capacity == Capacity::OnDemand), "{on:?}");
}

#[test]
fn a_probe_that_finds_no_spot_closes_it_for_another_period() {
    let mut world = World::new(10, false);
    world.run(Duration::from_secs(200));
    assert!(world.all_run());
    world.run(RETRY);
    world.tick(Happening::ExecutorEnds(3));
    world.run(2 * SECOND);
    assert!(matches!(world.ledger.steering().spot, SpotState::Probing { .. }), "{:?}", world.ledger.steering());
    let calls = world.store_calls;
    world.run(FALLBACK + 10 * SECOND);
    assert!(matches!(world.ledger.steering().spot, SpotState::Starved { .. }), "{:?}", world.ledger.steering());
    assert_eq!(world.store_calls, calls + 1);
    assert!(world.all_run());
}

#[test]
fn what_the_store_has_lost_is_closed_again_for_the_rest_of_the_period() {
    let mut world = World::new(10, false);
    world.run(Duration::from_secs(200));
    let retry_at = |world: &World| match world.ledger.steering().spot {
        SpotState::Starved { retry_at, .. } => retry_at,
        ref other => panic!("{other:?}"),
    };
    let before = retry_at(&world);
    world.tick(Happening::StoreLoses);
    assert_eq!(retry_at(&world), before);
    world.run(RETRY);
    world.tick(Happening::StoreLoses);
    assert!(world.is_open(), "the period is over");
}

#[test]
fn a_state_that_another_reconciler_has_left_is_opened_if_the_fallback_is_off() {
    let mut world = World::new(1, true);
    let view = View { fallback: None, retry: RETRY, live: 1, stuck: &[], probe: Probe::Waits };
    assert_eq!(world.fallback.step(&world.id, view, world.now), Step::None);
    let spot = SpotState::Starved { since: 1, retry_at: 2 };
    world.fallback.observe(&world.id, &spot, Duration::from_secs(40), world.now);
    assert_eq!(world.fallback.closed(world.now), (1, Duration::from_secs(40)));
    assert_eq!(world.fallback.step(&world.id, view, world.now), Step::Open);
    assert_eq!(world.fallback.opened_spot(&world.id, world.now), Duration::from_secs(40));
    // An older copy of the store's data has it still.
    world.fallback.observe(&world.id, &spot, Duration::ZERO, world.now);
    let on = View { fallback: Some(FALLBACK), ..view };
    assert_eq!(world.fallback.step(&world.id, on, world.now), Step::Open);
}

#[test]
fn without_the_right_spot_is_closed_and_nothing_is_deleted() {
    let mut world = World::new(10, false);
    world.tick(Happening::Checks(Some(Failure::Forbidden)));
    world.run(Duration::from_secs(200));
    assert_eq!((world.is_open(), world.deletes, world.store_calls), (false, 0, 1));
    world.tick(Happening::Checks(None));
    world.run(FORBIDDEN_FOR);
    assert!(world.deletes > 0);
}

#[test]
fn a_right_that_is_missing_in_one_namespace_stops_no_replacement_in_another() {
    let (mut fallback, now) = (Fallback::default(), Instant::now() + FALLBACK);
    let job = |namespace: &str| Arc::new(JobId { namespace: namespace.into(), app_id: "j".into() });
    let pod = PodVersion { name: "e".into(), uid: "u".into(), resource_version: "1".into() };
    let stuck = [StuckExecutor { pod: pod.clone(), key: "e".into(), since: now - FALLBACK }];
    let view = View { fallback: Some(FALLBACK), retry: RETRY, live: 1, stuck: &stuck, probe: Probe::Waits };
    assert_eq!(fallback.step(&job("a"), view, now), Step::Check(vec![pod.clone()]));
    fallback.checked(&job("a"), Checked { failure: Some(Failure::Forbidden), ..Checked::default() }, now);
    assert_eq!(fallback.step(&job("a"), view, now + MIN_PAUSE), Step::Close { retry_after: RETRY });
    assert_eq!(fallback.step(&job("b"), view, now + MIN_PAUSE), Step::Check(vec![pod]));
    fallback.retain(|job| job.namespace == "b");
    assert!(fallback.forbidden.is_empty(), "the namespace has no job left");
}

#[test]
fn the_jobs_that_have_ended_are_forgotten() {
    let mut world = World::new(1, false);
    world.run(Duration::from_secs(100));
    assert_eq!((world.fallback.jobs().count(), world.fallback.closed(world.now).0), (1, 1));
    world.fallback.retain(|_| false);
    assert_eq!((world.fallback.jobs().count(), world.fallback.closed(world.now).0), (0, 0));
}
