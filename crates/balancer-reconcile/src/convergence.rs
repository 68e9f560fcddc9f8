//! Convergence: whatever happens, and however late, often or rarely it is reported, the ledgers equal the cluster once
//! nothing more happens and the grace is over. On the pure parts alone, against a simulated cluster.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use balancer_core::{
    Capacity, Conventions, Drift, JobId, JobLedger, JobState, LiveExecutor, Millis, PlaceOutcome, PlaceRequest, Pod,
    Policy, PolicyOverrides, ReconcileOutcome, SpotRatio, Term,
};
use balancer_store::{Cursor, EntryPage};
use proptest::prelude::*;
use serde_json::json;

use crate::compare::Comparison;
use crate::index::{ClusterIndex, Executors};
use crate::waiting::WaitingPlan;

const GRACE: Millis = 60;
/// The entries on a page.
const PER_PAGE: usize = 3;
const POLICY: Policy = Policy { on_demand_base: 2, ..ALL_SPOT };
const ALL_SPOT: Policy = Policy { spot_ratio: SpotRatio::ONE, ..Policy::DEFAULT };
const JOBS: [&str; 2] = ["a", "b"];
const NODES: [&str; 3] = ["n0", "n1", "n2"];

/// What happens. Numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    /// An executor is created through the webhook; `rejected` ones never become a pod.
    Admit { name: u8, required: Option<Capacity>, rejected: bool },
    /// An executor is created while the webhook is away.
    Create { name: u8, asked: Option<Capacity> },
    /// An executor is deleted, with so many reviews at once and so many that come later.
    Delete { name: u8, reviews: u8, late: u8 },
    /// An executor starts to terminate: it is no longer live, but still exists.
    Terminate { name: u8, reviews: u8 },
    /// An executor has finished.
    Finish { name: u8 },
    /// An executor is bound to a node.
    Bind { name: u8, node: u8 },
    /// A node's capacity label is set, or taken away.
    Label { node: u8, capacity: Option<Capacity> },
    /// A late review comes.
    Review { which: u8 },
    /// The next event is received: of the pods, or of the nodes.
    Receive { nodes: bool },
    /// An event is received before earlier ones.
    ReceiveEarly { which: u8 },
    /// An event is received, and will be received again.
    ReceiveTwice { which: u8 },
    /// An event is lost.
    Lose { which: u8 },
    /// Everything is listed.
    List,
    /// The changed jobs are reconciled: a page of each that is compared.
    Reconcile,
    /// A page of a comparison is read, and is compared later.
    Read { job: bool },
    /// A call of the next reconciles fails: the one after so many others.
    Fail { after: u8, effect: Effect },
    /// A call of a former leader takes effect.
    Late { which: u8 },
    /// Another reconciler leads. The calls of the former one may still take effect.
    HandOver,
    /// The driver of a job appears or changes: its job is opted out, or in again.
    Opt { job: bool, out: bool },
    /// The store loses all data.
    Flush,
    /// Time goes by.
    Wait { time: u8 },
}

/// What becomes of a call that fails.
#[derive(Clone, Copy, Debug)]
enum Effect {
    None,
    Now,
    /// Before the next call in the same term, or at any time in a later one.
    Later,
}

/// A call of a reconciler that is under way.
struct LateCall {
    job: &'static str,
    term: Term,
    live: Vec<(String, String, Option<Capacity>)>,
    gone: Vec<String>,
    overrides: PolicyOverrides,
    driver: Option<String>,
}

/// A reconcile has failed.
struct Failed;

#[derive(Clone, Debug)]
struct Executor {
    uid: String,
    asked: Option<Capacity>,
    node: Option<u8>,
    live: bool,
}

#[derive(Clone, Debug)]
enum Event {
    Pod { name: u8, now: Executor },
    PodGone { name: u8 },
    Driver { job: &'static str, is_out: bool },
    Node { node: u8, capacity: Option<Capacity> },
}

struct World {
    executors: BTreeMap<u8, Executor>,
    nodes: BTreeMap<u8, Option<Capacity>>,
    pod_events: VecDeque<Event>,
    node_events: VecDeque<Event>,
    late_reviews: Vec<(u8, String)>,
    index: ClusterIndex,
    ledgers: BTreeMap<&'static str, JobLedger>,
    /// The drivers, and whether each has opted its job out.
    drivers: BTreeMap<&'static str, bool>,
    /// The jobs to reconcile, of which executors, and whether all of their entries are compared.
    changed: BTreeMap<&'static str, (BTreeSet<Arc<str>>, bool)>,
    /// The comparisons that go on.
    comparisons: BTreeMap<&'static str, Comparison>,
    /// The pages that were read for them.
    pages: BTreeMap<&'static str, EntryPage>,
    term: Term,
    fails: Option<(u8, Effect)>,
    late_calls: Vec<LateCall>,
    now: Millis,
    made: u32,
}

/// Names are few, so that they are used again; each belongs to one job.
fn job_of(name: u8) -> &'static str {
    JOBS[usize::from(name % 2)]
}

fn executor(name: u8) -> String {
    format!("{}-exec-{name}", job_of(name))
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            executors: BTreeMap::new(),
            nodes: (0..NODES.len() as u8).map(|node| (node, None)).collect(),
            pod_events: VecDeque::new(),
            node_events: VecDeque::new(),
            late_reviews: Vec::new(),
            index: ClusterIndex::new(Arc::new(Conventions::default()), Policy::default()),
            ledgers: JOBS.iter().map(|job| (*job, JobLedger::default())).collect(),
            drivers: BTreeMap::new(),
            changed: BTreeMap::new(),
            comparisons: BTreeMap::new(),
            pages: BTreeMap::new(),
            term: Term(1),
            fails: None,
            late_calls: Vec::new(),
            now: 1_000,
            made: 0,
        };
        world.list();
        world
    }

    fn ledger(&mut self, job: &str) -> &mut JobLedger {
        self.ledgers.get_mut(job).expect("a job")
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Admit { name, required, rejected } => {
                let now = self.now;
                let key = executor(name);
                let request = PlaceRequest {
                    key: &key,
                    required,
                    overrides: PolicyOverrides::default(),
                    policy: Some(POLICY),
                    may_create: true,
                    driver: None,
                };
                let capacity = match self.ledger(job_of(name)).place(&request, now) {
                    PlaceOutcome::Placed(placed) => Some(placed.capacity),
                    PlaceOutcome::OptedOut { .. } => required,
                    outcome => panic!("a policy was given: {outcome:?}"),
                };
                if !rejected {
                    self.create(name, capacity);
                }
            }
            Step::Create { name, asked } => self.create(name, asked),
            Step::Delete { name, reviews, late } => {
                let now = self.now;
                if let Some(gone) = self.executors.remove(&name) {
                    for _ in 0..reviews {
                        self.ledger(job_of(name)).release(&executor(name), Some(&gone.uid), now);
                    }
                    self.late_reviews.extend((0..late).map(|_| (name, gone.uid.clone())));
                    self.pod_events.push_back(Event::PodGone { name });
                }
            }
            Step::Terminate { name, reviews } => {
                let Some(ending) = self.executors.get_mut(&name) else { return };
                ending.live = false;
                let (uid, now) = (ending.uid.clone(), self.now);
                for _ in 0..reviews {
                    self.ledger(job_of(name)).release(&executor(name), Some(&uid), now);
                }
                self.report(name);
            }
            Step::Finish { name } => self.change(name, |executor| executor.live = false),
            // A pod is bound once.
            Step::Bind { name, node } => {
                self.change(name, |executor| executor.node = executor.node.or(Some(node % NODES.len() as u8)));
            }
            Step::Label { node, capacity } => {
                let node = node % NODES.len() as u8;
                self.nodes.insert(node, capacity);
                self.node_events.push_back(Event::Node { node, capacity });
            }
            Step::Review { which } => {
                if !self.late_reviews.is_empty() {
                    let (name, uid) = self.late_reviews.remove(usize::from(which) % self.late_reviews.len());
                    let (now, key, job) = (self.now, executor(name), job_of(name));
                    let removed = self.ledger(job).release(&key, Some(&uid), now);
                    // A second placement of a live executor has made its uid unknown, so the review of an older pod
                    // removes it. The audit finds that by the counts.
                    if removed.is_some() && self.executors.get(&name).is_some_and(|now| now.live && now.uid != uid) {
                        self.add(job, Executors::All);
                    }
                }
            }
            Step::Receive { nodes } => {
                let events = if nodes { &mut self.node_events } else { &mut self.pod_events };
                if let Some(event) = events.pop_front() {
                    self.receive(&event);
                }
            }
            Step::ReceiveEarly { which } => {
                if let Some(event) = self.pick(which).and_then(|at| self.pod_events.remove(at)) {
                    self.receive(&event);
                }
            }
            Step::ReceiveTwice { which } => {
                if let Some(event) = self.pick(which).and_then(|at| self.pod_events.get(at).cloned()) {
                    self.receive(&event);
                }
            }
            Step::Lose { which } => drop(self.pick(which).and_then(|at| self.pod_events.remove(at))),
            Step::List => self.list(),
            Step::Reconcile => {
                self.reconcile_changed();
            }
            Step::Read { job } => {
                let job = JOBS[usize::from(job)];
                if let Some(comparison) = self.comparisons.get(job)
                    && !comparison.has_all_pages()
                {
                    let page = self.page(job, comparison.cursor());
                    self.pages.insert(job, page);
                }
            }
            Step::Fail { after, effect } => self.fails = Some((after, effect)),
            Step::Late { which } => {
                let former: Vec<_> =
                    (0..self.late_calls.len()).filter(|at| self.late_calls[*at].term < self.term).collect();
                if !former.is_empty() {
                    let call = self.late_calls.remove(former[usize::from(which) % former.len()]);
                    self.take_effect(&call);
                }
            }
            Step::HandOver => {
                self.term = Term(self.term.0 + 1);
                (self.comparisons, self.pages, self.fails) = (BTreeMap::new(), BTreeMap::new(), None);
                // A new term begins with a resync.
                self.changed = JOBS.iter().map(|job| (*job, (BTreeSet::new(), true))).collect();
            }
            Step::Opt { job, out } => {
                let job = JOBS[usize::from(job)];
                self.drivers.insert(job, out);
                self.pod_events.push_back(Event::Driver { job, is_out: out });
            }
            Step::Flush => {
                for ledger in self.ledgers.values_mut() {
                    *ledger = JobLedger::default();
                }
                for job in JOBS {
                    self.add(job, Executors::All);
                }
            }
            Step::Wait { time } => self.now += Millis::from(time),
        }
    }

    fn pick(&self, which: u8) -> Option<usize> {
        usize::from(which).checked_rem(self.pod_events.len())
    }

    /// The API refuses a name that is taken.
    fn create(&mut self, name: u8, asked: Option<Capacity>) {
        if !self.executors.contains_key(&name) {
            self.made += 1;
            self.executors.insert(name, Executor { uid: format!("uid-{}", self.made), asked, node: None, live: true });
            self.report(name);
        }
    }

    fn change(&mut self, name: u8, change: impl FnOnce(&mut Executor)) {
        if let Some(executor) = self.executors.get_mut(&name).filter(|executor| executor.live) {
            change(executor);
            self.report(name);
        }
    }

    fn report(&mut self, name: u8) {
        let now = self.executors[&name].clone();
        self.pod_events.push_back(Event::Pod { name, now });
    }

    fn receive(&mut self, event: &Event) {
        match event {
            Event::Pod { name, now } => self.index.apply_pod(&pod(*name, now), None),
            Event::Driver { job, is_out } => self.index.apply_pod(&driver(job, *is_out), None),
            Event::PodGone { name } => self.index.delete_pod("etl", &executor(*name)),
            Event::Node { node, capacity } => {
                self.index.apply_node(NODES[usize::from(*node)], *capacity);
            }
        }
        self.add_changed();
    }

    fn list(&mut self) {
        self.index.init_pods(None);
        for (name, executor) in &self.executors {
            self.index.list_pod(&pod(*name, executor), None);
        }
        for (job, is_out) in &self.drivers {
            self.index.list_pod(&driver(job, *is_out), None);
        }
        self.index.init_pods_done(None);
        self.index.init_nodes();
        for (node, capacity) in &self.nodes {
            self.index.apply_node(NODES[usize::from(*node)], *capacity);
        }
        self.index.init_nodes_done();
        self.add_changed();
    }

    fn add_changed(&mut self) {
        for (job, changes) in self.index.take_changed() {
            if let Some(known) = JOBS.iter().find(|known| **known == job.app_id) {
                self.add(known, changes.executors);
            }
        }
    }

    fn add(&mut self, job: &'static str, executors: Executors) {
        let (names, compares_all) = self.changed.entry(job).or_default();
        match executors {
            Executors::Some(executors) => names.extend(executors),
            Executors::All => *compares_all = true,
        }
    }

    /// Reconciles the changed jobs; one with a waiting placement is reconciled again later. Returns what was corrected.
    fn reconcile_changed(&mut self) -> Drift {
        let mut all = Drift::default();
        for (job, (names, compares_all)) in std::mem::take(&mut self.changed) {
            let was_comparing = compares_all || self.comparisons.contains_key(job);
            match self.turn(job, &names, compares_all) {
                Ok(drift) => all += drift,
                // A comparison starts anew, because it has lost a page.
                Err(Failed) => {
                    self.comparisons.remove(job);
                    self.pages.remove(job);
                    self.add(job, Executors::Some(names));
                    self.changed.entry(job).or_default().1 |= was_comparing;
                }
            }
        }
        all
    }

    /// Names executors, and compares a page.
    fn turn(&mut self, job: &'static str, names: &BTreeSet<Arc<str>>, compares_all: bool) -> Result<Drift, Failed> {
        let id = JobId { namespace: "etl".into(), app_id: job.into() };
        let mut running = self.comparisons.remove(job);
        let is_repeated = running.is_some() && compares_all;
        if compares_all && running.is_none() {
            running = Some(Comparison::new(self.index.keys(&id)));
        }
        let mut drift = self.name_all(&id, job, names)?;
        if let Some(mut comparison) = running {
            comparison.exclude(names);
            let page = self.pages.remove(job).unwrap_or_else(|| self.page(job, comparison.cursor()));
            let compared = comparison.add(page, |key| self.index.live(&id, key));
            drift += self.name_all(&id, job, &compared.differ)?;
            if !compared.is_last {
                self.comparisons.insert(job, comparison);
                self.add(job, Executors::default());
            }
            if is_repeated {
                self.add(job, Executors::All);
            }
        }
        Ok(drift)
    }

    /// A page of the job's entries, in the order of their keys.
    fn page(&self, job: &str, cursor: Option<Cursor>) -> EntryPage {
        let first = cursor.as_ref().map_or("", Cursor::as_str);
        let entries: BTreeMap<_, _> = self.ledgers[job].entries().iter().collect();
        let mut rest = entries.range::<String, _>(first.to_owned()..);
        let page = rest.by_ref().take(PER_PAGE).map(|(key, entry)| ((*key).clone(), (*entry).clone())).collect();
        EntryPage { entries: page, next: rest.next().map(|(key, _)| Cursor::new(*key)) }
    }

    /// Names few at a time, and nobody in a call of its own if there are none.
    fn name_all(&mut self, id: &JobId, job: &'static str, names: &BTreeSet<Arc<str>>) -> Result<Drift, Failed> {
        let names: Vec<_> = names.iter().collect();
        let parts: Vec<&[_]> = if names.is_empty() { vec![&[]] } else { names.chunks(2).collect() };
        let (mut drift, mut later, mut has_later) = (Drift::default(), BTreeSet::new(), false);
        for part in parts {
            let desired = self.index.desired(id, part.iter().copied());
            let state = desired.job_state();
            let call = LateCall {
                job,
                term: self.term,
                live: state.live.iter().map(|live| (live.key.into(), live.uid.into(), live.capacity)).collect(),
                gone: state.gone.iter().map(|key| (*key).to_owned()).collect(),
                overrides: state.overrides,
                driver: state.driver.map(str::to_owned),
            };
            while let Some(at) = self.late_calls.iter().position(|late| late.job == job && late.term == self.term) {
                let late = self.late_calls.remove(at);
                self.take_effect(&late);
            }
            match &mut self.fails {
                Some((0, effect)) => {
                    let effect = *effect;
                    self.fails = None;
                    match effect {
                        Effect::None => {}
                        Effect::Now => drop(self.take_effect(&call)),
                        Effect::Later => self.late_calls.push(call),
                    }
                    return Err(Failed);
                }
                Some((after, _)) => *after -= 1,
                None => {}
            }
            let summary = match self.take_effect(&call) {
                ReconcileOutcome::Done(summary) => summary,
                ReconcileOutcome::Superseded(by) => panic!("superseded by {by}"),
            };
            drift += summary.drift;
            if summary.recheck_after.is_some() {
                later.extend(part.iter().map(|key| Arc::clone(key)));
            }
            let is_live = |key: &str| self.index.has_executor(id, key);
            let plan = WaitingPlan::new(summary.waiting, summary.more_waiting, is_live, GRACE, GRACE);
            has_later = plan.recheck_after.is_some() || !plan.name.is_empty();
            later.extend(plan.name);
        }
        if has_later || !later.is_empty() {
            self.add(job, Executors::Some(later));
        }
        Ok(drift)
    }

    /// A call takes effect.
    fn take_effect(&mut self, call: &LateCall) -> ReconcileOutcome {
        let live: Vec<_> = call
            .live
            .iter()
            .map(|(key, uid, capacity)| LiveExecutor { key, uid, capacity: *capacity, states_ratio: false })
            .collect();
        let gone: Vec<_> = call.gone.iter().map(String::as_str).collect();
        let driver = call.driver.as_deref();
        let state = JobState { live: &live, gone: &gone, overrides: call.overrides, ended: false, driver };
        let now = self.now;
        self.ledger(call.job).reconcile(&state, GRACE, call.term, now)
    }

    /// Compares all ledgers. Returns what was corrected.
    fn reconcile_all(&mut self) -> Drift {
        JOBS.iter().for_each(|job| self.add(job, Executors::All));
        self.settle()
    }

    /// Reconciles until nothing is left to do. Few turns are needed: a job has few pages.
    fn settle(&mut self) -> Drift {
        let mut drift = Drift::default();
        for _ in 0..30 {
            drift += self.reconcile_changed();
        }
        drift
    }

    /// What the job's ledger should contain.
    fn expected(&self, job: &str) -> BTreeMap<String, (String, Capacity)> {
        let live = self.executors.iter().filter(|(name, executor)| job_of(**name) == job && executor.live);
        live.filter_map(|(name, now)| {
            let landed = now.node.and_then(|node| self.nodes[&node]);
            Some((executor(*name), (now.uid.clone(), landed.or(now.asked)?)))
        })
        .collect()
    }

    fn assert_converged(&self) {
        for (job, ledger) in &self.ledgers {
            let entry = |(name, entry): (&String, &balancer_core::Entry)| {
                (name.clone(), (entry.uid.clone().unwrap_or_default(), entry.capacity))
            };
            let entries: BTreeMap<_, _> = ledger.entries().iter().map(entry).collect();
            let known = self.expected(job);
            // An executor of unknown capacity counts as what it was placed on, if it was placed.
            let unknown =
                |name: &String| self.executors.iter().any(|(number, now)| executor(*number) == *name && now.live);
            // What was placed or added while the job was opted in stays. Others are not added while it is out.
            let is_out = self.drivers.get(job) == Some(&true);
            for (name, expected) in known.iter().filter(|(name, _)| !is_out || entries.contains_key(*name)) {
                assert_eq!(entries.get(name), Some(expected), "of {name}");
            }
            for name in entries.keys() {
                assert!(known.contains_key(name) || unknown(name), "{name} is in the ledger of {job}, but not live");
            }
        }
    }
}

fn pod(name: u8, now: &Executor) -> Pod<'static> {
    let mut pod = json!({
        "metadata": {
            "name": executor(name), "namespace": "etl", "uid": now.uid,
            "labels": {"spark-role": "executor", "spark-app-selector": job_of(name)},
        },
        "spec": {},
        "status": {"phase": if now.live { "Running" } else { "Failed" }},
    });
    if let Some(asked) = now.asked {
        pod["metadata"]["annotations"] = json!({"workload/capacity-type": asked.as_str()});
    }
    if let Some(node) = now.node {
        pod["spec"]["nodeName"] = json!(NODES[usize::from(node)]);
    }
    serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod").into_owned()
}

/// The driver of a job. Executors without an owner are its own.
fn driver(job: &str, is_out: bool) -> Pod<'static> {
    let pod = json!({
        "metadata": {
            "name": format!("{job}-driver"), "namespace": "etl", "uid": format!("uid-{job}"),
            "labels": {"spark-role": "driver", "spark-app-selector": job},
            "annotations": {"workload/spot-ratio": if is_out { "off" } else { "1" }},
        },
    });
    serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod").into_owned()
}

fn capacity() -> impl Strategy<Value = Capacity> {
    prop_oneof![Just(Capacity::Spot), Just(Capacity::OnDemand)]
}

/// What may happen if the watches report every change in order.
fn with_reliable_watches() -> BoxedStrategy<Step> {
    let name = || 0u8..10;
    prop_oneof![
        6 => (name(), proptest::option::weighted(0.2, capacity()), proptest::bool::weighted(0.2))
            .prop_map(|(name, required, rejected)| Step::Admit { name, required, rejected }),
        1 => (name(), proptest::option::of(capacity())).prop_map(|(name, asked)| Step::Create { name, asked }),
        3 => (name(), 0u8..3, 0u8..3).prop_map(|(name, reviews, late)| Step::Delete { name, reviews, late }),
        1 => (name(), 0u8..3).prop_map(|(name, reviews)| Step::Terminate { name, reviews }),
        1 => name().prop_map(|name| Step::Finish { name }),
        2 => (name(), 0u8..3).prop_map(|(name, node)| Step::Bind { name, node }),
        1 => (0u8..3, proptest::option::weighted(0.8, capacity())).prop_map(|(node, capacity)| Step::Label { node, capacity }),
        2 => any::<u8>().prop_map(|which| Step::Review { which }),
        8 => proptest::bool::weighted(0.2).prop_map(|nodes| Step::Receive { nodes }),
        4 => Just(Step::Reconcile),
        1 => any::<bool>().prop_map(|job| Step::Read { job }),
        1 => (0u8..5, prop_oneof![Just(Effect::None), Just(Effect::Now), Just(Effect::Later)])
            .prop_map(|(after, effect)| Step::Fail { after, effect }),
        1 => any::<u8>().prop_map(|which| Step::Late { which }),
        1 => Just(Step::HandOver),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(job, out)| Step::Opt { job, out }),
        1 => Just(Step::Flush),
        2 => (0u8..100).prop_map(|time| Step::Wait { time }),
    ]
    .boxed()
}

/// What may happen at all.
fn with_unreliable_watches() -> BoxedStrategy<Step> {
    prop_oneof![
        12 => with_reliable_watches(),
        1 => any::<u8>().prop_map(|which| Step::ReceiveEarly { which }),
        1 => any::<u8>().prop_map(|which| Step::ReceiveTwice { which }),
        1 => any::<u8>().prop_map(|which| Step::Lose { which }),
        1 => Just(Step::List),
    ]
    .boxed()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn ledgers_converge_after_a_list_and_the_grace(
        steps in proptest::collection::vec(with_unreliable_watches(), 0..120)
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        world.list();
        world.now += GRACE;
        world.reconcile_all();
        world.assert_converged();
        let drift = world.reconcile_all();
        prop_assert!(drift.is_none() && world.changed.is_empty(), "{drift:?} although nothing had drifted");
    }

    /// Only those executors are named that the index reports as changed, or that wait for their pods. Whole ledgers are
    /// compared only where the index, a failure or a new term requires it.
    #[test]
    fn with_reliable_watches_ledgers_converge_without_a_list(
        steps in proptest::collection::vec(with_reliable_watches(), 0..120)
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        while !world.late_reviews.is_empty() {
            world.step(&Step::Review { which: 0 });
        }
        while !(world.pod_events.is_empty() && world.node_events.is_empty()) {
            world.step(&Step::Receive { nodes: false });
            world.step(&Step::Receive { nodes: true });
        }
        for job in JOBS {
            if world.ledgers[job].entries().values().any(|entry| entry.uid.is_none()) {
                // Each placement notes its job.
                world.add(job, Executors::default());
            }
        }
        world.reconcile_changed();
        world.now += GRACE;
        world.settle();
        world.assert_converged();
    }
}
