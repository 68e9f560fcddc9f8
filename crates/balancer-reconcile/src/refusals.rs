//! Live executors keep their ratio, whatever is refused: on the ledger, the index, the queue and the confirmations, in
//! simulated time, against a simulated Kubernetes API whose watch lags.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use balancer_core::testing::share;
use balancer_core::{
    Capacity, Conventions, Counts, JobId, JobLedger, Millis, PlaceOutcome, PlaceRequest, Pod, Policy, PolicyOverrides,
    Ratio, ReconcileOutcome, RemovalOutcome, Term, Unconfirmed, decide,
};
use proptest::prelude::*;
use serde_json::json;
use tokio::time::Instant;

use crate::confirmation::Confirmations;
use crate::index::{Changes, ClusterIndex, Executors};
use crate::queue::{Due, WorkQueue};
use crate::unconfirmed::{LOOK_UP_AGAIN_AFTER, SETTLE, TAKE_INTERVAL};
use crate::waiting::WaitingPlan;

const STEP: Millis = 10;
const GRACE: Millis = 60_000;
const TERM: Term = Term(1);
/// From the reconcile to the API's answer about a placement.
const ROUND_TRIP: Millis = 20;
/// Spark, or whatever creates executors, does not try again earlier after a refusal.
const RETRY: Millis = 500;

/// What a driver does next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// It creates an executor, which takes so long.
    Create { takes: Millis, then: Millis },
    /// Its creation is refused.
    Refused { takes: Millis, then: Millis },
    /// The webhook was called, and the creation has no effect.
    Vanished { then: Millis },
    /// An executor ends. Its deletion is reviewed.
    End { which: u8 },
}

struct World {
    start: Instant,
    now: Millis,
    lag: Millis,
    policy: Policy,
    ledger: JobLedger,
    index: ClusterIndex,
    queue: WorkQueue,
    confirmations: Confirmations,
    job: Arc<JobId>,
    /// The executors that exist, and when they began to.
    live: BTreeMap<String, (Capacity, Millis)>,
    created: u32,
    was_placed: bool,
    /// Pods that exist from a time on.
    creations: Vec<(Millis, String, Capacity)>,
    /// What the watch will report: when, which pod, and whether it exists.
    events: VecDeque<(Millis, String, Option<Capacity>)>,
    answers: VecDeque<(Millis, Vec<Unconfirmed>)>,
}

impl World {
    fn new(lag: Millis, policy: Policy) -> Self {
        let mut ledger = JobLedger::default();
        ledger.learn(policy, Some("d1"), true);
        Self {
            start: Instant::now(),
            now: 0,
            lag,
            policy,
            ledger,
            index: ClusterIndex::new(Arc::new(Conventions::default()), policy),
            queue: WorkQueue::default(),
            confirmations: Confirmations::default(),
            job: Arc::new(JobId { namespace: "etl".into(), app_id: "j".into() }),
            live: BTreeMap::new(),
            created: 0,
            was_placed: false,
            creations: Vec::new(),
            events: VecDeque::new(),
            answers: VecDeque::new(),
        }
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.live.values().for_each(|(capacity, _)| counts.add(*capacity));
        counts
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    /// The admission of the next executor.
    fn place(&mut self) -> (String, Capacity) {
        self.created += 1;
        let name = format!("j-exec-{}", self.created);
        let overrides = PolicyOverrides::default();
        // A job without pods loses its policy with its last placement. The webhook then looks it up again.
        let policy = Some(self.policy);
        let request = PlaceRequest { key: &name, required: None, overrides, policy, may_create: true, driver: None };
        let PlaceOutcome::Placed(placed) = self.ledger.place(&request, self.now) else { panic!("a policy was given") };
        self.was_placed = true;
        (name, placed.capacity)
    }

    /// Plays a step, to the time of the next one. Returns the capacity of an executor that was created, with the one
    /// that it should have.
    fn play(&mut self, step: Step) -> Option<(Capacity, Capacity)> {
        let right = decide(self.counts(), self.policy).expect("no job is opted out");
        match step {
            Step::Create { takes, then } => {
                let (name, capacity) = self.place();
                self.creations.push((self.now + takes, name, capacity));
                self.run(takes + STEP + then);
                return Some((capacity, right));
            }
            Step::Refused { takes, then } => {
                self.place();
                self.run(takes + RETRY + then);
            }
            Step::Vanished { then } => {
                self.place();
                self.run(RETRY + then);
            }
            Step::End { which } => {
                let name = self.live.keys().nth(usize::from(which) % self.live.len().max(1)).cloned();
                if let Some(name) = name {
                    self.live.remove(&name);
                    self.ledger.release(&name, Some(&name), self.now);
                    self.events.push_back((self.now + self.lag, name, None));
                }
            }
        }
        None
    }

    fn run(&mut self, time: Millis) {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            self.step();
        }
    }

    fn step(&mut self) {
        let now = self.now;
        let (exist, later) = std::mem::take(&mut self.creations).into_iter().partition(|(at, ..)| *at <= now);
        self.creations = later;
        for (_, name, capacity) in Vec::from_iter::<Vec<_>>(exist) {
            self.live.insert(name.clone(), (capacity, now));
            self.events.push_back((now + self.lag, name, Some(capacity)));
        }
        while self.events.front().is_some_and(|(at, ..)| *at <= now) {
            let Some((_, name, capacity)) = self.events.pop_front() else { break };
            match capacity {
                Some(capacity) => self.index.apply_pod(&pod(&name, capacity), None),
                None => self.index.delete_pod("etl", &name),
            }
        }
        for (job, Changes { change, executors }) in self.index.take_changed() {
            self.queue.enqueue(job, change, executors, self.instant());
        }
        if now.is_multiple_of(TAKE_INTERVAL.as_millis() as Millis) && std::mem::take(&mut self.was_placed) {
            self.queue.enqueue_at(Arc::clone(&self.job), Executors::default(), self.instant() + SETTLE);
        }
        for due in self.queue.take_due(self.instant(), 9) {
            self.reconcile(due);
        }
        while self.answers.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, unconfirmed)) = self.answers.pop_front() else { break };
            self.answer(unconfirmed);
        }
    }

    fn reconcile(&mut self, Due { executors: mut keys, compares_all, .. }: Due) {
        let (index, job) = (&self.index, &self.job);
        if compares_all {
            keys.extend(index.keys(job).chain(self.ledger.entries().keys().map(|key| key.as_str().into())));
        }
        let desired = index.desired(job, &keys);
        let outcome = self.ledger.reconcile(&desired.job_state(), GRACE, TERM, self.now);
        let ReconcileOutcome::Done(summary) = outcome else { panic!("{outcome:?}") };
        if summary.drift.missing > 0 {
            let now = self.start + ms(self.now);
            self.confirmations.added(job, |key| index.has_executor(job, key), now);
        }
        let confirm_after = self.confirmations.confirm_after("etl");
        let plan = WaitingPlan::new(
            summary.waiting,
            summary.more_waiting,
            |key| index.has_executor(job, key),
            GRACE,
            confirm_after,
        );
        let again = |executors, after| (Arc::clone(&self.job), executors, self.instant() + ms(after));
        let mut later = Vec::new();
        if let Some(recheck_after) = summary.recheck_after {
            later.push(again(Executors::Some(keys), recheck_after + 100));
        }
        if let Some(waits) = plan.recheck_after {
            later.push(again(Executors::default(), waits + 100));
        }
        if !plan.name.is_empty() {
            later.push(again(Executors::Some(plan.name), 0));
        }
        for (job, executors, due) in later {
            self.queue.enqueue_at(job, executors, due);
        }
        if !plan.look_up.is_empty() {
            self.answers.push_back((self.now + ROUND_TRIP, plan.look_up));
        }
    }

    fn answer(&mut self, unconfirmed: Vec<Unconfirmed>) {
        let (existing, absent): (Vec<_>, Vec<_>) =
            unconfirmed.into_iter().partition(|placement| self.live.contains_key(&placement.key));
        if !existing.is_empty() {
            self.queue.enqueue_at(Arc::clone(&self.job), Executors::default(), self.instant() + LOOK_UP_AGAIN_AFTER);
        }
        let RemovalOutcome::Done { removed, .. } = self.ledger.remove_unconfirmed(&absent, TERM) else {
            panic!("superseded")
        };
        let now = self.instant();
        self.confirmations.removed(&self.job, absent, removed, now);
    }
}

fn ms(millis: Millis) -> Duration {
    Duration::from_millis(millis)
}

fn pod(name: &str, capacity: Capacity) -> Pod<'static> {
    let pod = json!({
        "metadata": {
            "name": name, "namespace": "etl", "uid": name,
            "labels": {"spark-role": "executor", "spark-app-selector": "j"},
            "annotations": {"workload/capacity-type": capacity.as_str()},
        },
        "spec": {},
    });
    serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod").into_owned()
}

/// How far spot is from its share of the executors beyond the base.
fn distance(counts: Counts, policy: Policy) -> f64 {
    let beyond = counts.total().saturating_sub(policy.on_demand_base.into());
    let ratio = policy.spot_ratio.share().expect("no job is opted out");
    let share = f64::from(ratio.billionths()) / f64::from(Ratio::ONE_IN_BILLIONTHS);
    (counts.spot as f64 - share * beyond as f64).abs()
}

fn policies() -> impl Strategy<Value = Policy> {
    (prop::sample::select(vec![0, 10, 30, 50, 70, 90, 100]), 0u32..4).prop_map(|(percent, base)| {
        let spot_ratio = share(percent).into();
        Policy { on_demand_base: base, ..Policy { spot_ratio, ..Policy::DEFAULT } }
    })
}

/// Times are multiples of the simulation's step.
fn up_to(most: Millis) -> impl Strategy<Value = Millis> {
    (0..=most / STEP).prop_map(|steps| steps * STEP)
}

fn refusal() -> impl Strategy<Value = Step> {
    prop_oneof![
        (up_to(100), up_to(1_500)).prop_map(|(takes, then)| Step::Refused { takes, then }),
        up_to(1_500).prop_map(|then| Step::Vanished { then }),
    ]
}

fn creation(slowest: Millis) -> impl Strategy<Value = Step> {
    (up_to(slowest), prop_oneof![2 => Just(0), 1 => up_to(2_000)])
        .prop_map(|(takes, then)| Step::Create { takes, then })
}

proptest! {
    #[test]
    fn each_creation_gets_the_capacity_that_the_live_executors_need(
        lag in up_to(1_000),
        policy in policies(),
        steps in prop::collection::vec(
            prop_oneof![3 => creation(100), 3 => refusal(), 1 => any::<u8>().prop_map(|which| Step::End { which })],
            1..80,
        ),
    ) {
        let mut world = World::new(lag, policy);
        for step in steps {
            if let Some((capacity, right)) = world.play(step) {
                prop_assert_eq!(capacity, right, "of executor {} among {:?}", world.created, world.counts());
            }
        }
    }

    #[test]
    fn without_losses_the_base_is_live_and_the_ratio_holds_at_every_moment(
        lag in up_to(1_000),
        policy in policies(),
        steps in prop::collection::vec(prop_oneof![1 => creation(100), 2 => refusal()], 1..80),
    ) {
        let mut world = World::new(lag, policy);
        for step in steps {
            world.play(step);
            let counts = world.counts();
            prop_assert!(counts.on_demand >= counts.total().min(policy.on_demand_base.into()), "{counts:?}");
            prop_assert!(distance(counts, policy) <= 1.0, "{counts:?}");
        }
    }

    /// The first slow creations of a job are taken for refused ones. How far they take it from its ratio depends on how many
    /// come before the first of them exists.
    #[test]
    fn slow_creations_cost_a_job_little(
        lag in up_to(1_000),
        policy in policies(),
        steps in prop::collection::vec(prop_oneof![3 => creation(3_000), 1 => refusal()], 1..80),
    ) {
        let mut world = World::new(lag, policy);
        for step in steps {
            world.play(step);
            prop_assert!(distance(world.counts(), policy) <= 4.0, "{:?}", world.counts());
        }
    }

    #[test]
    fn nothing_is_left_of_what_never_lived(
        lag in up_to(1_000),
        policy in policies(),
        steps in prop::collection::vec(prop_oneof![1 => creation(3_000), 2 => refusal()], 1..40),
    ) {
        let mut world = World::new(lag, policy);
        for step in steps {
            world.play(step);
        }
        world.run(15_000);
        prop_assert_eq!(world.ledger.counts(), world.counts());
    }
}
