//! The ledger of one job: the capacity of each live executor. It is the reference for every store, which only adds
//! where the ledger is kept, a clock and atomicity.

use std::collections::{HashMap, VecDeque};

use crate::action::Executor;
use crate::capacity::{Capacity, Counts};
use crate::decide::decide;
use crate::policy::{Policy, PolicyOverrides};
use crate::ratio::SpotRatio;
use crate::steering::{SpotAnswer, SpotState, Spread, Steer, SteerOutcome, Steering};
use crate::term::{Millis, Term};

/// A request to place one executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceRequest<'a> {
    /// The executor's key in the ledger: its name, or the placeholder of a pod without a name.
    pub key: &'a str,
    /// The capacity that the pod requires by itself. The executor counts as this, whatever the ratio.
    pub required: Option<Capacity>,
    /// What the executor itself states. It precedes the job's policy for this executor.
    pub overrides: PolicyOverrides,
    /// The job's policy, if the caller has looked it up. The ledger stores it if it has no policy.
    pub policy: Option<Policy>,
    /// Whether the job may get a ledger if it has none.
    pub may_create: bool,
    /// The name of the pod that drives the job, if it is known: the owner of the executor. The ledger stores it if it has
    /// none.
    pub driver: Option<&'a str>,
}

impl<'a> PlaceRequest<'a> {
    /// A request for this executor, without a policy of the job.
    pub fn of(executor: &'a Executor<'_>) -> Self {
        Self {
            key: executor.key,
            required: executor.required,
            overrides: executor.overrides,
            policy: None,
            may_create: true,
            driver: executor.driver,
        }
    }
}

/// The answer to a [`PlaceRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlaceOutcome {
    /// The executor is in the ledger.
    Placed(Placed),
    /// Neither the request nor the ledger has the job's policy. Look up the driver and ask again.
    NeedPolicy,
    /// The job has no ledger, and the request may not create one. Nothing was added.
    NoLedger,
    /// The job is opted out, and the executor states no ratio of its own. The executor was not added.
    OptedOut {
        /// Whether this request created the job's ledger, which holds nothing but the policy.
        is_new_job: bool,
    },
}

/// A placed executor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The capacity.
    pub capacity: Capacity,
    /// Whether the ratio alone has decided on it.
    pub spot: SpotAnswer,
    /// Where on spot it should run; empty for an executor on on-demand.
    pub spread: Spread,
    /// Whether this request added the executor; `false` if it already was in the ledger.
    pub is_new: bool,
    /// Whether this request created the job's ledger.
    pub is_new_job: bool,
    /// The job's executors, this one included.
    pub counts: Counts,
}

/// The answer to a request to store a job's policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LearnOutcome {
    /// The policy is in the ledger.
    Stored {
        /// Whether this request created the job's ledger.
        is_new_job: bool,
    },
    /// The job has no ledger, and the request may not create one. Nothing was stored.
    NoLedger,
    /// It is not certain that the ledger is this driver's. The policy was not stored, and one that may be out of date was
    /// dropped: the next placement asks for it.
    NotStored,
}

/// One executor in the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The capacity that the executor counts as.
    pub capacity: Capacity,
    /// The pod's uid, after a reconcile has found the pod. An admission does not know it.
    pub uid: Option<String>,
    /// The time of the last placement.
    pub placed_at: Millis,
}

/// A live executor pod, as the reconciler found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveExecutor<'a> {
    /// The executor's key in the ledger.
    pub key: &'a str,
    /// The pod's uid.
    pub uid: &'a str,
    /// The capacity that the pod runs on or must run on; `None` while it is not known.
    pub capacity: Option<Capacity>,
    /// Whether the executor states a ratio of its own. Then it counts in a job that is opted out, too.
    pub states_ratio: bool,
}

/// What is known of a job in the cluster: some of its executors, and the job as a whole.
///
/// A reconcile corrects the entries of the executors that are named here, and leaves all others as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobState<'a> {
    /// Live executors, each once.
    pub live: &'a [LiveExecutor<'a>],
    /// Keys of executors that are not live. None of them is in `live`.
    pub gone: &'a [&'a str],
    /// The policy fields that the driver states. Each replaces the stored one. The fields that another driver has stored
    /// are dropped.
    pub overrides: PolicyOverrides,
    /// Whether the job has neither a driver nor an executor left. The policy is then removed with the last entry.
    pub ended: bool,
    /// The name of the pod that drives the job, if it is known. It replaces the stored one.
    pub driver: Option<&'a str>,
}

/// A placement for which no pod was found: its creation was refused, is still under way, or was not reported yet. The
/// API server knows which.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unconfirmed {
    /// The time of the placement, on the store's clock. A later placement of the same executor has another one.
    pub placed_at: Millis,
    /// The executor's key in the ledger.
    pub key: String,
}

/// A placement whose pod no reconcile has found yet. The caller knows whether the pod is there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Waiting {
    /// The placement.
    pub placement: Unconfirmed,
    /// How long ago it was, in milliseconds.
    pub age: Millis,
}

/// What was invalid in a ledger. A reconcile repairs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LedgerFault {
    /// The term was later than [`Term::MAX`], or more than [`Term::MAX_AHEAD`] ahead.
    Term,
    /// The store held something else than a ledger.
    Type,
}

/// The result of a reconcile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReconcileOutcome {
    /// The ledger now matches the cluster.
    Done(ReconcileSummary),
    /// Nothing was changed, because the ledger was already reconciled in this later term.
    Superseded(Term),
}

/// The result of the removal of unconfirmed placements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovalOutcome {
    /// The placements that were still unconfirmed were removed.
    Done {
        /// How many were removed.
        removed: u64,
        /// The executors on each capacity that remain.
        counts: Counts,
    },
    /// Nothing was changed, because the ledger was already reconciled in this later term.
    Superseded(Term),
}

/// What a reconcile has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReconcileSummary {
    /// What it corrected.
    pub drift: Drift,
    /// The executors on each capacity, including placements that wait for their pods.
    pub counts: Counts,
    /// The job's policy.
    pub policy: Option<Policy>,
    /// Whether the counts are certainly those of the entries. A store that had to estimate them says no; then all entries
    /// have to be compared, and the counts corrected.
    pub has_exact_counts: bool,
    /// The placements that wait for their pods, named or not: at most [`JobLedger::WAITING_REPORTED`], the oldest first.
    pub waiting: Vec<Waiting>,
    /// Whether more placements wait.
    pub more_waiting: bool,
    /// The named live executors that were released so recently that they may only appear to be live: when to name them
    /// again, in milliseconds. `None` if there is none.
    pub recheck_after: Option<Millis>,
    /// What was invalid, and is repaired.
    pub fault: Option<LedgerFault>,
    /// The job's steering.
    pub steering: Steering,
}

/// How the ledger differed from the cluster before a reconcile corrected it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drift {
    /// Live executors that were not in the ledger. They were added.
    pub missing: u64,
    /// Entries without a live executor. They were removed.
    pub stale: u64,
    /// Entries with the other capacity. They were corrected.
    pub wrong_capacity: u64,
}

impl Drift {
    /// Whether the ledger matched the cluster.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

impl std::ops::AddAssign for Drift {
    fn add_assign(&mut self, other: Self) {
        self.missing += other.missing;
        self.stale += other.stale;
        self.wrong_capacity += other.wrong_capacity;
    }
}

/// The ledger of one job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobLedger {
    policy: Option<Policy>,
    driver: Option<String>,
    counts: Counts,
    entries: HashMap<String, Entry>,
    released: VecDeque<(String, Millis)>,
    term: Term,
    steering: Steering,
}

impl JobLedger {
    /// How many released uids a ledger remembers. The end of one pod causes two or three reviews in quick
    /// succession. This is enough for several pods that end at once, and takes little memory in Redis.
    pub const RELEASED_REMEMBERED: usize = 16;

    /// How long a released executor may still appear to be live, in milliseconds; at most the grace period. A
    /// deletion is reviewed before it shows in the cluster. An executor whose deletion is refused after the review
    /// is added to the ledger again after this time.
    pub const RELEASE_GRACE: Millis = 2_000;

    /// How many waiting placements one reconcile reports. Spark's largest usual batch of executors is 50.
    pub const WAITING_REPORTED: usize = 64;

    /// A ledger from the parts that a store keeps. `released` is in the order of [`JobLedger::released`]. The counts
    /// are those of the entries.
    pub fn from_parts(
        policy: Option<Policy>,
        driver: Option<String>,
        entries: HashMap<String, Entry>,
        released: impl IntoIterator<Item = (String, Millis)>,
        term: Term,
        steering: Steering,
    ) -> Self {
        let released = released.into_iter().collect();
        let mut ledger = Self { policy, driver, counts: Counts::default(), entries, released, term, steering };
        ledger.recount();
        ledger
    }

    /// Decides on a capacity and adds the executor, in one step. A repeated request gets the same answer, and the
    /// executor counts once.
    ///
    /// In a job that is opted out, only an executor that states a ratio of its own is added, and one that is in the
    /// ledger already keeps its place. The policy of the request is stored all the same, so that the next executor
    /// needs no lookup.
    pub fn place(&mut self, request: &PlaceRequest<'_>, now: Millis) -> PlaceOutcome {
        let outcome = self.peek(request, now);
        let may_store = match outcome {
            PlaceOutcome::Placed(_) => true,
            PlaceOutcome::OptedOut { is_new_job } => is_new_job || !self.is_empty(),
            PlaceOutcome::NeedPolicy | PlaceOutcome::NoLedger => false,
        };
        if may_store {
            self.policy = self.policy.or(request.policy);
            if self.driver.is_none() {
                self.driver = request.driver.map(str::to_owned);
            }
        }
        if let PlaceOutcome::Placed(placed) = &outcome {
            if placed.spot == SpotAnswer::Probe
                && let SpotState::Starved { since, .. } | SpotState::Probing { since, .. } = self.steering.spot
            {
                self.steering.spot = SpotState::Probing { since, executor: request.key.to_owned() };
            }
            // A known name may belong to a new pod, so the uid is unknown again.
            let entry = Entry { capacity: placed.capacity, uid: None, placed_at: now };
            self.entries.insert(request.key.to_owned(), entry);
            self.counts = placed.counts;
        }
        outcome
    }

    /// What [`JobLedger::place`] would return. Nothing is added; this is for a dry run.
    pub fn peek(&self, request: &PlaceRequest<'_>, now: Millis) -> PlaceOutcome {
        let PlaceRequest { key, required, overrides, policy, may_create, driver: _ } = *request;
        let is_new_job = self.is_empty();
        let known = self.entries.get(key).map(|entry| entry.capacity);
        let jobs = self.policy.or(policy);
        let ratio = overrides.spot_ratio.or(jobs.map(|policy| policy.spot_ratio));
        if known.is_none() && ratio == Some(SpotRatio::Off) {
            return PlaceOutcome::OptedOut { is_new_job: is_new_job && may_create && policy.is_some() };
        }
        if is_new_job && !may_create {
            return PlaceOutcome::NoLedger;
        }
        let mut counts = self.counts;
        let decided = required.or(known).or_else(|| decide(counts, overrides.or(jobs)?));
        let Some(mut capacity) = decided else { return PlaceOutcome::NeedPolicy };
        let is_decided = required.is_none() && known.is_none();
        let spot = match capacity {
            Capacity::Spot => self.answer_of_spot(key, is_decided, now),
            Capacity::OnDemand => SpotAnswer::Unchanged,
        };
        if spot == SpotAnswer::Closed {
            capacity = Capacity::OnDemand;
        }
        let spread = match capacity {
            Capacity::Spot => Spread {
                max_executors_per_node: overrides
                    .max_executors_per_node
                    .or(jobs.map(|policy| policy.max_executors_per_node)),
                avoid: self.steering.avoid.clone(),
            },
            Capacity::OnDemand => Spread::default(),
        };
        if let Some(known) = known {
            counts.remove(known);
        }
        counts.add(capacity);
        PlaceOutcome::Placed(Placed { capacity, spot, spread, is_new: known.is_none(), is_new_job, counts })
    }

    /// What the state of spot changes for an executor that would go to spot. `is_decided` if nothing but the ratio sends it
    /// there.
    fn answer_of_spot(&self, key: &str, is_decided: bool, now: Millis) -> SpotAnswer {
        match &self.steering.spot {
            SpotState::Probing { executor, .. } if executor == key => SpotAnswer::Probe,
            _ if !is_decided => SpotAnswer::Unchanged,
            state => {
                state.answer(now, |probe| self.entries.get(probe).is_some_and(|probe| probe.capacity == Capacity::Spot))
            }
        }
    }

    /// Changes what later placements of the job follow, unless the ledger was already reconciled in a later term.
    pub fn steer(&mut self, steer: Steer<'_>, term: Term, now: Millis) -> SteerOutcome {
        if let Some(later) = self.later_term(term) {
            return SteerOutcome::Superseded(later);
        }
        if self.is_empty() {
            return SteerOutcome::NoLedger;
        }
        match steer {
            Steer::CloseSpot { retry_after } => self.steering.spot = self.steering.spot.closed(retry_after, now),
            Steer::OpenSpot => self.steering.spot = SpotState::Open,
            Steer::Avoid(types) => self.steering.avoid = Steering::avoidable(types).map(str::to_owned).collect(),
        }
        SteerOutcome::Done
    }

    /// Whether a call that names this driver is for this ledger: unless both names are known, and differ. Of several live
    /// drivers with one job id each has a ledger of its own: see [`JobId::of_driver`](crate::JobId::of_driver). Each method
    /// of a ledger takes for granted that the call is for it.
    pub fn belongs_to(&self, driver: Option<&str>) -> bool {
        self.driver.as_deref().is_none_or(|own| driver.is_none_or(|driver| own == driver))
    }

    /// Whether the policy of this driver is for this ledger: see [`JobLedger::learn`].
    pub fn learns_from(&self, driver: Option<&str>) -> bool {
        self.entries.is_empty() || self.belongs_to(driver)
    }

    /// Removes an executor. Returns the capacity that it counted as, or `None` if nothing was removed.
    ///
    /// Several callers review the deletion of one pod, and such a review may arrive after the placement of the next
    /// pod with the same name. Therefore an entry with another uid stays, and so does an entry without a uid if
    /// `uid` was already released. Without `uid`, only an entry without a uid is removed: an entry with one has a pod,
    /// whose deletion states the uid.
    pub fn release(&mut self, executor: &str, uid: Option<&str>, now: Millis) -> Option<Capacity> {
        let known = self.entries.get(executor).and_then(|entry| entry.uid.as_deref());
        if uid.is_none() && known.is_some() {
            return None;
        }
        if let Some(uid) = uid {
            let again = self.released.iter().any(|(released, _)| released == uid);
            // An entry with this uid is a pod that outlived its release. It is released again, and its
            // RELEASE_GRACE starts again.
            if known.map_or(again, |known| known != uid) {
                return None;
            }
            self.released.retain(|(released, _)| released != uid);
            self.released.truncate(Self::RELEASED_REMEMBERED - 1);
            self.released.push_front((uid.to_owned(), now));
        }
        let removed = self.entries.remove(executor).map(|entry| entry.capacity);
        if let Some(capacity) = removed {
            self.counts.remove(capacity);
        }
        self.forget_if_empty();
        removed
    }

    /// Stores the policy of the job's driver, and replaces an older one. Without `may_create` a job without a ledger gets
    /// none.
    ///
    /// The newest driver takes over a ledger without executors. With executors it stays with its driver, which may be
    /// another one if the ledger does not name it. A policy is stored only for a driver with a name,
    /// because nobody could say later whose it is. In both cases the stored policy is dropped, unless it is certain that it
    /// is another driver's: then the lookup for the next executor finds the driver that owns the executor.
    pub fn learn(&mut self, policy: Policy, driver: Option<&str>, may_create: bool) -> LearnOutcome {
        let has_executors = !self.entries.is_empty();
        let Some(driver) = driver.filter(|_| self.driver.is_some() || !has_executors) else {
            if self.driver.is_none() || !has_executors {
                self.policy = None;
                self.forget_if_empty();
            }
            return LearnOutcome::NotStored;
        };
        let is_new_job = self.is_empty();
        if is_new_job && !may_create {
            return LearnOutcome::NoLedger;
        }
        self.policy = Some(policy);
        if !has_executors {
            self.driver = Some(driver.to_owned());
        }
        LearnOutcome::Stored { is_new_job }
    }

    /// Corrects the entries of the executors that `state` names, unless the ledger was already reconciled in a later term.
    ///
    /// An entry whose executor is gone is removed: at once if it has a uid, because then its pod has existed, and
    /// otherwise when the placement is `grace` milliseconds old. If the clock was set back behind a placement, its age
    /// starts again at zero. A live executor of known capacity that is missing is added, unless it was released less than
    /// [`JobLedger::RELEASE_GRACE`] ago; such an executor is not matched to an entry without a uid either, because the
    /// entry belongs to the next pod of that name. In a job that is opted out only those that state a ratio of their own
    /// are added, because its other executors are not counted. Entries that are not named stay as they are.
    pub fn reconcile(&mut self, state: &JobState<'_>, grace: Millis, term: Term, now: Millis) -> ReconcileOutcome {
        let fault = (!self.term.is_possible(term)).then_some(LedgerFault::Term);
        if let Some(later) = self.later_term(term) {
            return ReconcileOutcome::Superseded(later);
        }
        let JobState { live, gone, overrides, ended, driver } = *state;
        // What another driver wanted is no policy of this one.
        let stored = self.policy.filter(|_| self.belongs_to(driver));
        let ratio = overrides.spot_ratio.or(stored.map(|policy| policy.spot_ratio));
        let is_opted_out = ratio == Some(SpotRatio::Off);
        let (mut drift, mut recheck_after) = (Drift::default(), None::<Millis>);
        for entry in self.entries.values_mut().filter(|entry| entry.uid.is_none()) {
            entry.placed_at = entry.placed_at.min(now);
        }
        for &key in gone {
            let is_stale = |entry: &Entry| entry.uid.is_some() || now - entry.placed_at.min(now) >= grace;
            if self.entries.get(key).is_some_and(is_stale) {
                self.entries.remove(key);
                drift.stale += 1;
            }
        }
        // How long each released pod may still appear to be live. If the clock was set back, a release can lie in
        // the future; it is no reason to wait.
        let left =
            |at: Millis| Self::RELEASE_GRACE.min(grace).checked_sub(now.checked_sub(at)?).filter(|left| *left > 0);
        let excused: HashMap<&str, Millis> =
            self.released.iter().filter_map(|(uid, at)| Some((uid.as_str(), left(*at)?))).collect();
        for &LiveExecutor { key: executor, uid, capacity, states_ratio } in live {
            let entry = self.entries.get_mut(executor);
            if let Some(left) = excused.get(uid).filter(|_| entry.as_ref().is_none_or(|entry| entry.uid.is_none())) {
                recheck_after = Some(recheck_after.unwrap_or(Millis::MAX).min(*left));
                continue;
            }
            match (entry, capacity) {
                (Some(entry), capacity) => {
                    if let Some(capacity) = capacity.filter(|capacity| *capacity != entry.capacity) {
                        entry.capacity = capacity;
                        drift.wrong_capacity += 1;
                    }
                    entry.uid = Some(uid.to_owned());
                }
                (None, Some(capacity)) if states_ratio || !is_opted_out => {
                    let entry = Entry { capacity, uid: Some(uid.to_owned()), placed_at: now };
                    self.entries.insert(executor.to_owned(), entry);
                    drift.missing += 1;
                }
                (None, _) => {}
            }
        }
        self.recount();
        self.term = term;
        self.policy = overrides.or(stored).or(stored);
        if let Some(driver) = driver {
            self.driver = Some(driver.to_owned());
        }
        if ended && self.entries.is_empty() {
            self.policy = None;
        }
        self.forget_if_empty();
        let (waiting, more_waiting) = self.waiting(now);
        ReconcileOutcome::Done(ReconcileSummary {
            drift,
            counts: self.counts,
            has_exact_counts: true,
            policy: self.policy,
            waiting,
            more_waiting,
            recheck_after,
            fault,
            steering: self.steering.clone(),
        })
    }

    /// The placements that wait for their pods, the oldest first, and whether there are more than are reported.
    fn waiting(&self, now: Millis) -> (Vec<Waiting>, bool) {
        let waiting = self.entries.iter().filter(|(_, entry)| entry.uid.is_none()).map(|(key, entry)| Waiting {
            placement: Unconfirmed { placed_at: entry.placed_at, key: key.clone() },
            age: now.saturating_sub(entry.placed_at),
        });
        let mut waiting: Vec<_> = waiting.collect();
        waiting.sort_unstable();
        let more_waiting = waiting.len() > Self::WAITING_REPORTED;
        waiting.truncate(Self::WAITING_REPORTED);
        (waiting, more_waiting)
    }

    /// Removes placements whose pods do not exist, as the API server has confirmed. One that was placed again, or has
    /// its pod by now, stays.
    pub fn remove_unconfirmed(&mut self, absent: &[Unconfirmed], term: Term) -> RemovalOutcome {
        if let Some(later) = self.later_term(term) {
            return RemovalOutcome::Superseded(later);
        }
        let mut removed = 0;
        for Unconfirmed { key, placed_at } in absent {
            let is_unconfirmed = |entry: &Entry| entry.uid.is_none() && entry.placed_at == *placed_at;
            if self.entries.get(key).is_some_and(is_unconfirmed) {
                self.entries.remove(key);
                removed += 1;
            }
        }
        self.recount();
        self.forget_if_empty();
        RemovalOutcome::Done { removed, counts: self.counts }
    }

    /// The term of the ledger, if it is later than `term` and can be one.
    fn later_term(&self, term: Term) -> Option<Term> {
        Some(self.term).filter(|own| *own > term && own.is_possible(term))
    }

    /// Whether there is neither a policy nor an executor.
    fn is_empty(&self) -> bool {
        self.policy.is_none() && self.entries.is_empty()
    }

    /// A ledger without a policy and executors is none, and no store keeps it.
    fn forget_if_empty(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }

    fn recount(&mut self) {
        self.counts = Counts::default();
        for entry in self.entries.values() {
            self.counts.add(entry.capacity);
        }
    }

    /// The number of executors on each capacity.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The name of the pod that drives the job, if it is known.
    pub fn driver(&self) -> Option<&str> {
        self.driver.as_deref()
    }

    /// The stored policy.
    pub fn policy(&self) -> Option<Policy> {
        self.policy
    }

    /// The uids of the last releases and their times, the newest first.
    pub fn released(&self) -> impl Iterator<Item = (&str, Millis)> {
        self.released.iter().map(|(uid, at)| (uid.as_str(), *at))
    }

    /// The term of the last reconcile.
    pub fn term(&self) -> Term {
        self.term
    }

    /// What later placements follow besides the policy.
    pub fn steering(&self) -> &Steering {
        &self.steering
    }

    /// The entries by key.
    pub fn entries(&self) -> &HashMap<String, Entry> {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ratio::{Ratio, SpotRatio};
    use proptest::prelude::*;

    const ALL_SPOT: Policy = Policy { spot_ratio: SpotRatio::ONE, ..Policy::DEFAULT };
    const ALL_ON_DEMAND: Policy = Policy { spot_ratio: SpotRatio::ZERO, ..Policy::DEFAULT };
    const POLICY: Policy = Policy { on_demand_base: 1, ..ALL_SPOT };

    fn request(executor: &str) -> PlaceRequest<'_> {
        PlaceRequest {
            key: executor,
            required: None,
            overrides: PolicyOverrides::default(),
            policy: Some(POLICY),
            may_create: true,
            driver: None,
        }
    }

    /// Names all executors: those that are live, and all others in the ledger as gone.
    fn reconcile(ledger: &mut JobLedger, live: &[LiveExecutor<'_>], grace: Millis, now: Millis) -> ReconcileSummary {
        let is_gone = |key: &&String| live.iter().all(|live| live.key != **key);
        let gone: Vec<String> = ledger.entries().keys().filter(is_gone).cloned().collect();
        let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
        done(ledger.reconcile(&JobState { live, gone: &gone, ..JobState::default() }, grace, Term(1), now))
    }

    fn done(outcome: ReconcileOutcome) -> ReconcileSummary {
        match outcome {
            ReconcileOutcome::Done(summary) => summary,
            ReconcileOutcome::Superseded(by) => panic!("superseded by {by}"),
        }
    }

    /// The keys and ages of the placements that wait.
    fn waiting(summary: &ReconcileSummary) -> Vec<(&str, Millis)> {
        summary.waiting.iter().map(|waiting| (waiting.placement.key.as_str(), waiting.age)).collect()
    }

    #[test]
    fn without_a_policy_place_asks_for_one_and_adds_nothing() {
        let mut ledger = JobLedger::default();
        assert_eq!(ledger.place(&PlaceRequest { policy: None, ..request("e1") }, 0), PlaceOutcome::NeedPolicy);
        assert_eq!(ledger, JobLedger::default());
    }

    #[test]
    fn an_executors_own_ratio_needs_the_jobs_base_and_is_not_stored() {
        let mut ledger = JobLedger::default();
        let own = PolicyOverrides { spot_ratio: Some(SpotRatio::ZERO), ..PolicyOverrides::default() };
        let asking = PlaceRequest { overrides: own, policy: None, ..request("e1") };
        assert_eq!(ledger.place(&asking, 0), PlaceOutcome::NeedPolicy);
        ledger.learn(ALL_SPOT, Some("d1"), true);
        assert!(matches!(ledger.place(&asking, 0), PlaceOutcome::Placed(Placed { capacity: Capacity::OnDemand, .. })));
        assert_eq!(ledger.policy().map(|p| p.spot_ratio), Some(SpotRatio::ONE));
    }

    const OFF: Policy = Policy { spot_ratio: SpotRatio::Off, ..POLICY };
    const KNOWN_JOB_IS_OPTED_OUT: PlaceOutcome = PlaceOutcome::OptedOut { is_new_job: false };

    #[test]
    fn a_job_that_is_opted_out_stores_its_policy_and_counts_only_executors_with_a_ratio() {
        let mut ledger = JobLedger::default();
        let asking = |key| PlaceRequest { policy: Some(OFF), ..request(key) };
        assert_eq!(
            ledger.place(&PlaceRequest { may_create: false, ..asking("e1") }, 0),
            KNOWN_JOB_IS_OPTED_OUT,
            "nothing may be stored"
        );
        assert_eq!(ledger, JobLedger::default());
        assert_eq!(ledger.place(&asking("e1"), 0), PlaceOutcome::OptedOut { is_new_job: true });
        let stored = ledger.clone();
        assert_eq!((stored.policy(), stored.counts()), (Some(OFF), Counts::default()));
        let unknown = PlaceRequest { policy: None, may_create: false, ..request("e2") };
        let base = PolicyOverrides { on_demand_base: Some(3), ..PolicyOverrides::default() };
        for required in [None, Some(Capacity::Spot)] {
            for overrides in [PolicyOverrides::default(), base] {
                assert_eq!(ledger.place(&PlaceRequest { required, overrides, ..unknown }, 0), KNOWN_JOB_IS_OPTED_OUT);
            }
        }
        assert_eq!(ledger, stored);
        let own = PolicyOverrides::from(ALL_SPOT);
        for (key, required) in [("e1", None), ("e2", Some(Capacity::OnDemand))] {
            ledger.place(&PlaceRequest { required, overrides: own, ..request(key) }, 0);
        }
        assert_eq!(ledger.counts(), Counts { spot: 1, on_demand: 1 });
    }

    #[test]
    fn an_executor_that_is_opted_out_by_itself_leaves_no_ledger() {
        let mut ledger = JobLedger::default();
        let overrides = PolicyOverrides { spot_ratio: Some(SpotRatio::Off), ..PolicyOverrides::default() };
        let asking = PlaceRequest { overrides, policy: None, driver: Some("d"), ..request("e1") };
        assert_eq!(ledger.place(&asking, 0), KNOWN_JOB_IS_OPTED_OUT);
        assert_eq!(ledger, JobLedger::default());
    }

    #[test]
    fn a_job_that_is_switched_off_keeps_its_executors_and_gets_no_further_ones_until_it_is_switched_on() {
        let mut ledger = JobLedger::default();
        ledger.place(&PlaceRequest { driver: Some("d1"), ..request("e1") }, 0);
        ledger.learn(OFF, Some("d1"), true);
        assert!(matches!(
            ledger.place(&request("e1"), 0),
            PlaceOutcome::Placed(Placed { capacity: Capacity::OnDemand, is_new: false, .. })
        ));
        assert_eq!(ledger.place(&request("e2"), 0), KNOWN_JOB_IS_OPTED_OUT);
        let live =
            ["e1", "e2"].map(|key| LiveExecutor { key, uid: key, capacity: Some(Capacity::Spot), states_ratio: false });
        let ReconcileSummary { drift, counts, .. } = reconcile(&mut ledger, &live, 0, 1);
        assert_eq!(drift, Drift { wrong_capacity: 1, ..Drift::default() });
        assert_eq!(counts, Counts { spot: 1, on_demand: 0 });
        assert_eq!(reconcile(&mut ledger, &live[1..], 0, 2).drift, Drift { stale: 1, ..Drift::default() });
        ledger.learn(POLICY, Some("d1"), true);
        assert_eq!(reconcile(&mut ledger, &live, 0, 3).drift, Drift { missing: 2, ..Drift::default() });
    }

    #[test]
    fn a_reconcile_obeys_the_ratio_that_the_driver_states_now() {
        let live = [LiveExecutor { key: "e1", uid: "u", capacity: Some(Capacity::Spot), states_ratio: false }];
        for (stored, stated, missing) in [(POLICY, OFF, 0), (OFF, POLICY, 1)] {
            let mut ledger = JobLedger::default();
            ledger.learn(stored, Some("d1"), true);
            let spot_ratio = Some(stated.spot_ratio);
            let overrides = PolicyOverrides { spot_ratio, ..PolicyOverrides::default() };
            let state = JobState { live: &live, overrides, ..JobState::default() };
            let outcome = ledger.reconcile(&state, 0, Term(1), 0);
            assert!(matches!(&outcome, ReconcileOutcome::Done(done) if done.drift.missing == missing), "{outcome:?}");
            assert_eq!(ledger.policy(), Some(stated));
        }
    }

    #[test]
    fn the_first_driver_that_is_named_owns_the_ledger_until_a_reconcile_names_another() {
        let mut ledger = JobLedger::default();
        let of = |driver, key| PlaceRequest { driver, ..request(key) };
        ledger.place(&of(None, "e1"), 0);
        assert!(ledger.driver().is_none() && ledger.belongs_to(Some("d1")));
        ledger.place(&of(Some("d1"), "e2"), 0);
        ledger.place(&of(None, "e3"), 0);
        assert_eq!(ledger.driver(), Some("d1"));
        assert!(ledger.belongs_to(Some("d1")) && ledger.belongs_to(None) && !ledger.belongs_to(Some("d2")));
        let before = ledger.clone();
        assert_eq!(ledger.learn(ALL_SPOT, None, true), LearnOutcome::NotStored);
        assert_eq!(ledger, before);
        assert_eq!(ledger.learn(ALL_SPOT, Some("d1"), true), LearnOutcome::Stored { is_new_job: false });
        for (driver, owner) in [(None, "d1"), (Some("d2"), "d2")] {
            let state = JobState { driver, ..JobState::default() };
            ledger.reconcile(&state, 100, Term(1), 1);
            assert_eq!(ledger.driver(), Some(owner));
        }
        let gone = ["e1", "e2", "e3"];
        let ended = JobState { gone: &gone, ended: true, driver: Some("d2"), ..JobState::default() };
        ledger.reconcile(&ended, 0, Term(1), 2);
        assert_eq!(ledger, JobLedger::default());
    }

    #[test]
    fn the_newest_driver_takes_over_a_ledger_without_executors() {
        let mut ledger = JobLedger::default();
        let stored = LearnOutcome::Stored { is_new_job: false };
        ledger.learn(ALL_SPOT, Some("d1"), true);
        assert!(!ledger.belongs_to(Some("d2")) && ledger.learns_from(Some("d2")));
        for (policy, driver) in [(ALL_ON_DEMAND, "d2"), (ALL_SPOT, "d3")] {
            assert_eq!(ledger.learn(policy, Some(driver), true), stored);
            assert_eq!((ledger.policy(), ledger.driver()), (Some(policy), Some(driver)));
        }
        ledger.place(&request("e1"), 0);
        assert!(!ledger.learns_from(Some("d2")) && ledger.learns_from(Some("d3")));
    }

    #[test]
    fn a_policy_is_stored_only_if_it_is_certain_that_it_is_the_ledgers_drivers() {
        let named = |driver, executors: &[&str]| {
            let mut ledger = JobLedger::default();
            if driver == Some("d1") {
                ledger.learn(POLICY, driver, true);
            }
            for executor in executors {
                ledger.place(&PlaceRequest { driver, ..request(executor) }, 0);
            }
            ledger
        };
        for (mut ledger, driver, left) in [
            (named(None, &[]), None, None),
            (named(Some("d1"), &[]), None, None),
            (named(None, &["e1"]), None, None),
            (named(None, &["e1"]), Some("d2"), None),
            (named(Some("d1"), &["e1"]), None, Some(POLICY)),
        ] {
            let before = ledger.clone();
            assert_eq!(ledger.learn(ALL_ON_DEMAND, driver, true), LearnOutcome::NotStored, "{before:?}");
            assert_eq!((ledger.policy(), ledger.counts()), (left, before.counts()), "{driver:?} {before:?}");
            let next = PlaceRequest { policy: None, ..request("next") };
            assert_eq!(ledger.peek(&next, 0) == PlaceOutcome::NeedPolicy, left.is_none(), "{driver:?} {before:?}");
        }
    }

    #[test]
    fn a_ledger_that_gets_another_driver_forgets_what_the_former_one_stated() {
        let ledger = || {
            let mut ledger = JobLedger::default();
            ledger.learn(POLICY, Some("d1"), true);
            ledger.place(&request("e1"), 0);
            ledger
        };
        let base = PolicyOverrides { on_demand_base: Some(7), ..PolicyOverrides::default() };
        let all = PolicyOverrides::from(ALL_ON_DEMAND);
        for (driver, overrides, left) in [
            (Some("d2"), PolicyOverrides::default(), None),
            (Some("d2"), base, None),
            (Some("d2"), all, Some(ALL_ON_DEMAND)),
            (Some("d1"), base, Some(Policy { on_demand_base: 7, ..POLICY })),
            (None, base, Some(Policy { on_demand_base: 7, ..POLICY })),
        ] {
            let mut ledger = ledger();
            let state = JobState { driver, overrides, ..JobState::default() };
            ledger.reconcile(&state, 100, Term(1), 1);
            assert_eq!(ledger.policy(), left, "{driver:?} {overrides:?}");
        }
        // Nobody has stated a policy of an executor without an owner for another driver.
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        ledger.reconcile(&JobState { driver: Some("d1"), ..JobState::default() }, 100, Term(1), 1);
        assert_eq!(ledger.policy(), Some(POLICY));
    }

    #[test]
    fn a_looked_up_policy_does_not_replace_a_learned_one() {
        let mut ledger = JobLedger::default();
        ledger.learn(ALL_ON_DEMAND, Some("d1"), true);
        ledger.place(&request("e1"), 0);
        assert_eq!(ledger.policy(), Some(ALL_ON_DEMAND));
        assert_eq!(ledger.counts(), Counts { spot: 0, on_demand: 1 });
    }

    #[test]
    fn a_required_capacity_replaces_the_one_in_the_ledger() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        let required = PlaceRequest { required: Some(Capacity::Spot), ..request("e1") };
        ledger.place(&required, 0);
        assert_eq!(ledger.counts(), Counts { spot: 1, on_demand: 0 });
    }

    #[test]
    fn releasing_an_older_pod_of_the_same_name_removes_nothing() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        reconcile(
            &mut ledger,
            &[LiveExecutor { key: "e1", uid: "new", capacity: None, states_ratio: false }],
            60_000,
            1,
        );
        assert_eq!(ledger.release("e1", Some("old"), 0), None);
        assert_eq!(ledger.release("e1", Some("new"), 0), Some(Capacity::OnDemand));
        assert_eq!(ledger.release("e1", Some("new"), 0), None);
    }

    #[test]
    fn a_repeated_release_after_the_name_was_reused_removes_nothing() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        assert_eq!(ledger.release("e1", Some("first"), 0), Some(Capacity::OnDemand));
        ledger.place(&request("e1"), 1);
        assert_eq!(ledger.release("e1", Some("first"), 0), None);
        assert_eq!(ledger.counts().total(), 1);
        assert_eq!(ledger.release("e1", Some("second"), 0), Some(Capacity::OnDemand));
    }

    #[test]
    fn released_uids_are_remembered_up_to_a_bound() {
        let mut ledger = JobLedger::default();
        for i in 0..1000 {
            ledger.place(&request("e1"), i);
            ledger.release("e1", Some(&format!("uid-{i}")), i);
        }
        assert_eq!(ledger.released().count(), JobLedger::RELEASED_REMEMBERED);
        assert_eq!(ledger.released().next(), Some(("uid-999", 999)));
    }

    #[test]
    fn a_placement_waits_for_its_pod_but_a_pod_that_is_gone_is_removed_at_once() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("seen"), 0);
        ledger.place(&request("waiting"), 0);
        let seen = [LiveExecutor { key: "seen", uid: "u", capacity: None, states_ratio: false }];
        assert_eq!(waiting(&reconcile(&mut ledger, &seen, 100, 10)), [("waiting", 10)]);
        let removed = Drift { stale: 1, ..Drift::default() };
        let summary = reconcile(&mut ledger, &[], 100, 99);
        assert_eq!((summary.drift, summary.counts.total(), waiting(&summary)), (removed, 1, vec![("waiting", 99)]));
        let summary = reconcile(&mut ledger, &[], 100, 100);
        assert_eq!((summary.drift, summary.counts.total(), waiting(&summary)), (removed, 0, vec![]));
    }

    #[test]
    fn executors_that_are_not_named_stay_as_they_are_and_wait_for_as_long_as_they_are_not_named() {
        let mut ledger = JobLedger::default();
        for key in ["seen", "old", "young"] {
            ledger.place(&request(key), 0);
        }
        let live = |key, capacity| [LiveExecutor { key, uid: key, capacity: Some(capacity), states_ratio: false }];
        let mut name = |state: JobState<'_>, now| done(ledger.reconcile(&state, 100, Term(1), now));
        let seen = live("seen", Capacity::Spot);
        let summary = name(JobState { live: &seen, ..JobState::default() }, 1_000);
        assert_eq!((summary.counts.total(), waiting(&summary)), (3, vec![("old", 1_000), ("young", 1_000)]));
        let summary = name(JobState { gone: &["old", "unknown"], ..JobState::default() }, 1_001);
        assert_eq!((summary.drift.stale, summary.counts.total(), waiting(&summary)), (1, 2, vec![("young", 1_001)]));
        let summary = name(JobState { gone: &["seen"], ended: true, ..JobState::default() }, 1_002);
        assert_eq!((summary.drift.stale, summary.counts.total(), summary.policy), (1, 1, Some(POLICY)));
    }

    #[test]
    fn the_placements_that_wait_are_reported_up_to_a_bound_the_oldest_first() {
        let mut ledger = JobLedger::default();
        for number in (0..JobLedger::WAITING_REPORTED as u64 + 1).rev() {
            ledger.place(&request(&format!("e{number}")), number);
        }
        let summary = done(ledger.reconcile(&JobState::default(), 100, Term(1), 1_000));
        assert_eq!((summary.waiting.len(), summary.more_waiting), (JobLedger::WAITING_REPORTED, true));
        assert!(summary.waiting.is_sorted() && waiting(&summary)[0] == ("e0", 1_000));
        ledger.release("e0", None, 1_001);
        let summary = done(ledger.reconcile(&JobState::default(), 100, Term(1), 1_001));
        assert_eq!((summary.waiting.len(), summary.more_waiting), (JobLedger::WAITING_REPORTED, false));
    }

    #[test]
    fn a_released_executor_that_stays_live_is_added_again_after_the_release_grace() {
        let mut ledger = JobLedger::default();
        ledger.learn(POLICY, Some("d1"), true);
        let live = [LiveExecutor { key: "e1", uid: "u1", capacity: Some(Capacity::Spot), states_ratio: false }];
        reconcile(&mut ledger, &live, 10, 0);
        for released in [100, 200] {
            ledger.release("e1", Some("u1"), released);
            // A repeated review changes nothing.
            ledger.release("e1", Some("u1"), released + 5);
            let ReconcileSummary { drift, counts, recheck_after, .. } = reconcile(&mut ledger, &live, 10, released + 9);
            assert_eq!((drift, counts.total(), recheck_after), (Drift::default(), 0, Some(1)));
            let ReconcileSummary { drift, counts, recheck_after, .. } =
                reconcile(&mut ledger, &live, 10, released + 10);
            assert_eq!((drift.missing, counts.total(), recheck_after), (1, 1, None));
        }
        ledger.release("e1", Some("u1"), 300);
        assert_eq!(reconcile(&mut ledger, &live, Millis::MAX, 300).recheck_after, Some(JobLedger::RELEASE_GRACE));
        assert_eq!(reconcile(&mut ledger, &live, Millis::MAX, 299).drift.missing, 1, "the clock went back");
    }

    #[test]
    fn a_released_pod_is_not_taken_for_the_next_one_of_its_name() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        let live = [LiveExecutor { key: "e1", uid: "u1", capacity: Some(Capacity::Spot), states_ratio: false }];
        reconcile(&mut ledger, &live, 100, 1);
        ledger.release("e1", Some("u1"), 2);
        ledger.place(&request("e1"), 3);
        let ReconcileSummary { drift, counts, recheck_after, .. } = reconcile(&mut ledger, &live, 100, 4);
        assert_eq!((drift, counts, recheck_after), (Drift::default(), Counts { spot: 0, on_demand: 1 }, Some(98)));
        // The old pod is gone, and the new one does not exist yet.
        assert_eq!(reconcile(&mut ledger, &[], 100, 5).counts.total(), 1);
    }

    #[test]
    fn an_earlier_term_changes_nothing() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        let nothing = JobState::default();
        assert!(matches!(ledger.reconcile(&nothing, 100, Term(3), 0), ReconcileOutcome::Done(_)));
        let before = ledger.clone();
        assert_eq!(ledger.reconcile(&nothing, 0, Term(2), 0), ReconcileOutcome::Superseded(Term(3)));
        assert_eq!(ledger, before);
    }

    #[test]
    fn a_term_that_no_lease_can_reach_is_ignored_and_repaired() {
        let corrupt = |term| JobLedger::from_parts(Some(POLICY), None, HashMap::new(), [], term, Steering::default());
        let reconcile = |ledger: &mut JobLedger| ledger.reconcile(&JobState::default(), 100, Term(3), 0);
        for term in [Term(Term::MAX_AHEAD + 4), Term(Term::MAX.0 + 1), Term(3_000_000_000), Term(u64::MAX)] {
            let mut ledger = corrupt(term);
            assert_eq!(
                ledger.remove_unconfirmed(&[], Term(3)),
                RemovalOutcome::Done { removed: 0, counts: Counts::default() }
            );
            let ReconcileOutcome::Done(summary) = reconcile(&mut ledger) else { panic!("superseded by {term}") };
            assert_eq!((summary.fault, ledger.term()), (Some(LedgerFault::Term), Term(3)));
            let ReconcileOutcome::Done(summary) = reconcile(&mut ledger) else { panic!("superseded") };
            assert_eq!(summary.fault, None);
        }
        let later = Term(Term::MAX_AHEAD + 3);
        assert_eq!(reconcile(&mut corrupt(later)), ReconcileOutcome::Superseded(later));
    }

    #[test]
    fn only_placements_that_are_still_unconfirmed_are_removed() {
        let mut ledger = JobLedger::default();
        let absent = ["refused", "again", "alive", "unknown"].map(|key| Unconfirmed { placed_at: 7, key: key.into() });
        for placement in &absent[..3] {
            ledger.place(&request(&placement.key), 7);
        }
        ledger.place(&request("again"), 8);
        reconcile(&mut ledger, &[LiveExecutor { key: "alive", uid: "u", capacity: None, states_ratio: false }], 100, 9);
        let before = ledger.clone();
        assert_eq!(ledger.remove_unconfirmed(&absent, Term(0)), RemovalOutcome::Superseded(Term(1)));
        assert_eq!(ledger, before);
        let RemovalOutcome::Done { removed, counts } = ledger.remove_unconfirmed(&absent, Term(1)) else {
            panic!("superseded")
        };
        assert_eq!((removed, counts.total(), ledger.counts()), (1, 2, counts));
        assert!(!ledger.entries().contains_key("refused"));
    }

    #[test]
    fn a_placement_in_the_future_waits_for_the_grace_from_now_on() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 3_600_000);
        assert_eq!(waiting(&reconcile(&mut ledger, &[], 100, 1_000)), [("e1", 0)]);
        assert_eq!(reconcile(&mut ledger, &[], 100, 1_099).counts.total(), 1);
        assert_eq!(reconcile(&mut ledger, &[], 100, 1_100).counts.total(), 0);
    }

    #[test]
    fn without_permission_no_ledger_is_created_and_a_known_job_is_served() {
        let mut ledger = JobLedger::default();
        let existing = PlaceRequest { may_create: false, ..request("e1") };
        assert_eq!(ledger.place(&existing, 0), PlaceOutcome::NoLedger);
        assert_eq!(ledger.learn(POLICY, Some("d1"), false), LearnOutcome::NoLedger);
        assert_eq!(ledger, JobLedger::default());
        assert_eq!(ledger.learn(POLICY, Some("d1"), true), LearnOutcome::Stored { is_new_job: true });
        assert_eq!(ledger.learn(POLICY, Some("d1"), false), LearnOutcome::Stored { is_new_job: false });
        assert!(matches!(
            ledger.place(&existing, 0),
            PlaceOutcome::Placed(Placed { is_new: true, is_new_job: false, .. })
        ));
    }

    #[test]
    fn a_release_without_a_uid_removes_only_an_executor_whose_uid_is_unknown() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        reconcile(&mut ledger, &[LiveExecutor { key: "e1", uid: "u", capacity: None, states_ratio: false }], 100, 1);
        assert_eq!(ledger.release("e1", None, 2), None);
        assert_eq!(ledger.counts().total(), 1);
        ledger.place(&request("e1"), 3);
        assert_eq!(ledger.release("e1", None, 4), Some(Capacity::OnDemand));
    }

    #[test]
    fn each_stated_policy_field_replaces_the_stored_one() {
        let mut ledger = JobLedger::default();
        let ratio = |ratio| JobState {
            overrides: PolicyOverrides { spot_ratio: Some(ratio), ..PolicyOverrides::default() },
            ..JobState::default()
        };
        ledger.reconcile(&ratio(SpotRatio::ZERO), 0, Term(1), 0);
        assert_eq!(ledger, JobLedger::default(), "an incomplete policy is not stored");
        ledger.learn(POLICY, Some("d1"), true);
        ledger.reconcile(&ratio(SpotRatio::ZERO), 0, Term(1), 0);
        assert_eq!(ledger.policy(), Some(Policy { spot_ratio: SpotRatio::ZERO, ..POLICY }));
    }

    #[test]
    fn the_policy_of_an_ended_job_is_removed_with_its_last_entry() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        let ended = JobState { gone: &["e1"], ended: true, ..JobState::default() };
        ledger.reconcile(&ended, 100, Term(1), 99);
        assert_eq!(ledger.policy(), Some(POLICY));
        ledger.reconcile(&ended, 100, Term(1), 100);
        assert_eq!(ledger, JobLedger::default());
    }

    const EXECUTORS: [&str; 4] = ["e1", "e2", "e3", "e4"];

    /// A ledger whose ratio sends everything to spot, with spot closed at the time 100 until 110.
    fn starved() -> JobLedger {
        let mut ledger = JobLedger::default();
        ledger.learn(ALL_SPOT, Some("d1"), true);
        assert_eq!(ledger.steer(Steer::CloseSpot { retry_after: 10 }, Term(1), 100), SteerOutcome::Done);
        ledger
    }

    /// Places an executor, and returns its capacity and what spot's state has changed about it. A repeated request must
    /// get the same answer, and so must a dry run before, which changes nothing.
    fn answer(ledger: &mut JobLedger, executor: &str, now: Millis) -> (Capacity, SpotAnswer) {
        let before = ledger.clone();
        let peeked = ledger.peek(&request(executor), now);
        assert_eq!(*ledger, before);
        let outcome = ledger.place(&request(executor), now);
        assert_eq!(outcome, peeked);
        let PlaceOutcome::Placed(placed) = outcome else { panic!("{outcome:?}") };
        let after = ledger.clone();
        let PlaceOutcome::Placed(again) = ledger.place(&request(executor), now) else { panic!("not placed again") };
        assert_eq!(*ledger, after);
        let is_probe = |answer| answer == SpotAnswer::Probe;
        assert_eq!((again.capacity, is_probe(again.spot)), (placed.capacity, is_probe(placed.spot)));
        (placed.capacity, placed.spot)
    }

    const CLOSED: (Capacity, SpotAnswer) = (Capacity::OnDemand, SpotAnswer::Closed);
    const PROBE: (Capacity, SpotAnswer) = (Capacity::Spot, SpotAnswer::Probe);
    const ON_SPOT: (Capacity, SpotAnswer) = (Capacity::Spot, SpotAnswer::Unchanged);

    #[test]
    fn while_spot_is_closed_executors_go_to_on_demand_until_the_first_after_the_retry_time_probes_it() {
        let mut ledger = starved();
        assert_eq!(answer(&mut ledger, "e1", 100), CLOSED);
        assert_eq!(answer(&mut ledger, "e2", 109), CLOSED);
        assert_eq!(answer(&mut ledger, "e3", 110), PROBE);
        assert_eq!(answer(&mut ledger, "e4", 1_000), CLOSED);
        assert_eq!(answer(&mut ledger, "e3", 1_000), PROBE);
        let probing = SpotState::Probing { since: 100, executor: "e3".to_owned() };
        assert_eq!(ledger.steering().spot, probing);
        assert_eq!(ledger.steer(Steer::OpenSpot, Term(1), 1_001), SteerOutcome::Done);
        assert_eq!(answer(&mut ledger, "e5", 1_001), ON_SPOT);
        // One that was closed out stays where it is.
        let known = ledger.place(&request("e1"), 1_001);
        assert!(matches!(&known, PlaceOutcome::Placed(placed) if placed.capacity == Capacity::OnDemand), "{known:?}");
    }

    #[test]
    fn a_probe_that_leaves_hands_over_to_the_next_executor() {
        let live = |key, capacity| LiveExecutor { key, uid: key, capacity: Some(capacity), states_ratio: false };
        for way in 0..5 {
            let mut ledger = starved();
            assert_eq!(answer(&mut ledger, "e1", 200), PROBE);
            assert_eq!(answer(&mut ledger, "e2", 200), CLOSED);
            match way {
                0 => assert_eq!(ledger.release("e1", Some("u1"), 201), Some(Capacity::Spot)),
                1 => drop(reconcile(&mut ledger, &[live("e2", Capacity::OnDemand)], 0, 201)),
                2 => {
                    let absent = [Unconfirmed { placed_at: 200, key: "e1".to_owned() }];
                    ledger.remove_unconfirmed(&absent, Term(1));
                }
                // It runs on on-demand, or must.
                3 => drop(reconcile(&mut ledger, &[live("e1", Capacity::OnDemand)], 100, 201)),
                _ => {
                    let required = Some(Capacity::OnDemand);
                    ledger.place(&PlaceRequest { required, ..request("e1") }, 201);
                }
            }
            assert_eq!(answer(&mut ledger, "e3", 201), PROBE, "way {way}");
            assert_eq!(answer(&mut ledger, "e4", 201), CLOSED, "way {way}");
            let probing = SpotState::Probing { since: 100, executor: "e3".to_owned() };
            assert_eq!(ledger.steering().spot, probing, "way {way}");
        }
    }

    #[test]
    fn spot_that_is_closed_again_keeps_when_it_was_closed_first_and_waits_anew() {
        let mut ledger = starved();
        answer(&mut ledger, "e1", 200);
        for (now, retry_after, retry_at) in [(201, 10, 211), (205, 0, 205), (206, Millis::MAX, Millis::MAX)] {
            ledger.steer(Steer::CloseSpot { retry_after }, Term(1), now);
            assert_eq!(ledger.steering().spot, SpotState::Starved { since: 100, retry_at });
        }
        assert_eq!(answer(&mut ledger, "e2", 1_000), CLOSED);
        ledger.steer(Steer::OpenSpot, Term(1), 1_001);
        ledger.steer(Steer::CloseSpot { retry_after: 1 }, Term(1), 1_002);
        assert_eq!(ledger.steering().spot, SpotState::Starved { since: 1_002, retry_at: 1_003 });
    }

    #[test]
    fn closed_spot_affects_no_executor_that_requires_it_or_is_known_and_none_of_a_job_that_is_opted_out() {
        let mut ledger = JobLedger::default();
        ledger.learn(ALL_SPOT, Some("d1"), true);
        ledger.place(&request("known"), 0);
        ledger.steer(Steer::CloseSpot { retry_after: 10 }, Term(1), 0);
        for now in [1, 100] {
            let required = PlaceRequest { required: Some(Capacity::Spot), ..request("required") };
            for asked in [required, request("known")] {
                let outcome = ledger.place(&asked, now);
                let PlaceOutcome::Placed(placed) = &outcome else { panic!("{outcome:?}") };
                assert_eq!((placed.capacity, placed.spot), ON_SPOT);
            }
        }
        let required = PlaceRequest { required: Some(Capacity::OnDemand), ..request("on-demand") };
        let outcome = ledger.place(&required, 1);
        assert!(matches!(&outcome, PlaceOutcome::Placed(placed) if placed.spot == SpotAnswer::Unchanged));
        assert_eq!(ledger.steering().spot, SpotState::Starved { since: 0, retry_at: 10 }, "nobody has probed it");
        ledger.learn(OFF, Some("d1"), true);
        assert_eq!(ledger.place(&request("e1"), 100), KNOWN_JOB_IS_OPTED_OUT);
    }

    #[test]
    fn a_clock_that_is_set_back_does_not_keep_spot_closed() {
        let mut ledger = starved();
        assert_eq!(answer(&mut ledger, "e1", 99), PROBE);
        ledger.steer(Steer::CloseSpot { retry_after: 10 }, Term(1), 50);
        assert_eq!(ledger.steering().spot, SpotState::Starved { since: 50, retry_at: 60 });
        assert_eq!(answer(&mut ledger, "e2", 59), CLOSED);
        assert_eq!(answer(&mut ledger, "e3", 60), PROBE);
    }

    #[test]
    fn an_executor_that_the_ratio_sends_to_on_demand_does_not_probe() {
        let mut ledger = JobLedger::default();
        ledger.learn(POLICY, Some("d1"), true);
        ledger.steer(Steer::CloseSpot { retry_after: 0 }, Term(1), 0);
        assert_eq!(answer(&mut ledger, "e1", 1), (Capacity::OnDemand, SpotAnswer::Unchanged));
        assert_eq!(answer(&mut ledger, "e2", 1), PROBE);
    }

    #[test]
    fn an_earlier_term_steers_nothing_and_a_job_without_a_ledger_has_no_steering() {
        let steers = [Steer::CloseSpot { retry_after: 1 }, Steer::OpenSpot, Steer::Avoid(&[])];
        let mut ledger = JobLedger::default();
        for steer in steers {
            assert_eq!(ledger.steer(steer, Term(1), 0), SteerOutcome::NoLedger);
            assert_eq!(ledger, JobLedger::default());
        }
        ledger.learn(ALL_SPOT, Some("d1"), true);
        ledger.reconcile(&JobState::default(), 0, Term(3), 0);
        ledger.steer(Steer::CloseSpot { retry_after: 5 }, Term(3), 0);
        let before = ledger.clone();
        for steer in steers {
            assert_eq!(ledger.steer(steer, Term(2), 9), SteerOutcome::Superseded(Term(3)));
        }
        assert_eq!(ledger, before);
    }

    #[test]
    fn a_ledger_keeps_its_steering_for_another_driver_and_forgets_it_when_it_is_empty() {
        let avoid = ["m5.large".to_owned()];
        let steer = |ledger: &mut JobLedger| {
            ledger.steer(Steer::CloseSpot { retry_after: 10 }, Term(1), 100);
            ledger.steer(Steer::Avoid(&avoid), Term(1), 100);
            Steering { spot: SpotState::Starved { since: 100, retry_at: 110 }, avoid: avoid.to_vec() }
        };
        for way in 0..3 {
            let mut ledger = JobLedger::default();
            ledger.learn(ALL_SPOT, Some("d1"), true);
            let steering = steer(&mut ledger);
            ledger.learn(ALL_SPOT, Some("d2"), true);
            ledger.place(&request("e1"), 101);
            let state = JobState { driver: Some("d3"), ..JobState::default() };
            let ReconcileOutcome::Done(summary) = ledger.reconcile(&state, 100, Term(1), 101) else {
                panic!("superseded")
            };
            assert_eq!((&summary.steering, ledger.steering()), (&steering, &steering));
            assert_eq!(ledger.policy(), None, "it was another driver's");
            match way {
                0 => assert_eq!(ledger.release("e1", None, 102), Some(Capacity::OnDemand)),
                1 => drop(ledger.remove_unconfirmed(&[Unconfirmed { placed_at: 101, key: "e1".to_owned() }], Term(1))),
                _ => assert_eq!(reconcile(&mut ledger, &[], 0, 102).steering, Steering::default()),
            }
            assert_eq!(ledger, JobLedger::default(), "way {way}");
        }
    }

    #[test]
    fn executors_on_spot_get_the_instance_types_to_avoid_and_the_cap() {
        let types = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let long = "x".repeat(64);
        let mut ledger = JobLedger::default();
        ledger.learn(Policy { max_executors_per_node: 2, ..POLICY }, Some("d1"), true);
        let asked = types(&["", "a b", "a,b", "-a", &long, "t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8", "t9"]);
        ledger.steer(Steer::Avoid(&asked), Term(1), 0);
        let stored = types(&["t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8"]);
        assert_eq!(ledger.steering().avoid, stored);
        let spread = |ledger: &mut JobLedger, asked| match ledger.place(&asked, 0) {
            PlaceOutcome::Placed(placed) => placed.spread,
            other => panic!("{other:?}"),
        };
        assert_eq!(spread(&mut ledger, request("e1")), Spread::default(), "it is on on-demand");
        let wanted = Spread { max_executors_per_node: Some(2), avoid: stored.clone() };
        assert_eq!(spread(&mut ledger, request("e2")), wanted);
        assert_eq!(spread(&mut ledger, request("e2")), wanted);
        let overrides = PolicyOverrides { max_executors_per_node: Some(0), ..PolicyOverrides::default() };
        let own = Spread { max_executors_per_node: Some(0), avoid: stored };
        assert_eq!(spread(&mut ledger, PlaceRequest { overrides, ..request("e2") }), own);
        ledger.steer(Steer::Avoid(&[]), Term(1), 0);
        assert_eq!(spread(&mut ledger, request("e3")), Spread { avoid: Vec::new(), ..wanted });
        let unknown = PlaceRequest { required: Some(Capacity::Spot), policy: None, ..request("e1") };
        assert_eq!(spread(&mut JobLedger::default(), unknown), Spread::default(), "nobody knows the policy");
    }

    proptest! {
        #[test]
        fn counts_are_always_those_of_the_entries(steps in proptest::collection::vec((0u8..6, 0u8..12, any::<bool>()), 0..120)) {
            let mut ledger = JobLedger::default();
            for (now, (step, executor, flag)) in steps.into_iter().enumerate() {
                let name = format!("e{executor}");
                let required = flag.then_some(Capacity::Spot);
                let before = ledger.clone();
                let asked = PlaceRequest { required: required.filter(|_| step == 1), ..request(&name) };
                match step {
                    0 | 1 => {
                        let peeked = ledger.peek(&asked, now as Millis);
                        prop_assert_eq!(&ledger, &before);
                        prop_assert_eq!(ledger.place(&asked, now as Millis), peeked);
                        let once = ledger.counts();
                        ledger.place(&asked, now as Millis);
                        prop_assert_eq!(ledger.counts(), once);
                    }
                    2 => { ledger.release(&name, None, now as Millis); }
                    3 => { ledger.release(&name, Some("other"), now as Millis); }
                    4 => { reconcile(&mut ledger, &[LiveExecutor { key: &name, uid: "u", capacity: required, states_ratio: false }], 5, now as Millis); }
                    _ => { ledger.learn(POLICY, Some("d1"), true); }
                }
                let mut counts = Counts::default();
                for entry in ledger.entries().values() {
                    counts.add(entry.capacity);
                }
                prop_assert_eq!(ledger.counts(), counts);
            }
        }

        #[test]
        fn a_reconcile_in_any_parts_ends_like_one_of_all(
            placed in proptest::collection::vec(0usize..EXECUTORS.len(), 0..12),
            live in proptest::collection::vec((0usize..EXECUTORS.len(), any::<bool>()), 0..12),
            parts in proptest::collection::vec((0usize..EXECUTORS.len(), any::<bool>()), 0..12),
            grace in 0u64..20,
        ) {
            let mut at_once = JobLedger::default();
            at_once.learn(POLICY, Some("d1"), true);
            for (now, executor) in placed.into_iter().enumerate() {
                at_once.place(&request(EXECUTORS[executor]), now as Millis);
            }
            let mut in_parts = at_once.clone();
            let live: HashMap<&str, LiveExecutor<'_>> = live.into_iter().map(|(executor, is_spot)| {
                let capacity = Some(if is_spot { Capacity::Spot } else { Capacity::OnDemand });
                let key = EXECUTORS[executor];
                (key, LiveExecutor { key, uid: key, capacity, states_ratio: false })
            }).collect();
            let all: Vec<_> = live.values().copied().collect();
            reconcile(&mut at_once, &all, grace, 20);
            // In some order, some of them again, and then the rest.
            let rest = EXECUTORS.iter().enumerate().map(|(executor, _)| (executor, false));
            for (executor, _) in parts.into_iter().chain(rest) {
                let key = EXECUTORS[executor];
                let (live, gone) = (live.get(key), [key]);
                let gone = if live.is_none() { &gone[..] } else { &[] };
                let state = JobState { live: live.map(std::slice::from_ref).unwrap_or_default(), gone, ..JobState::default() };
                done(in_parts.reconcile(&state, grace, Term(1), 20));
            }
            prop_assert_eq!(in_parts, at_once);
        }

        #[test]
        fn at_most_one_executor_probes_and_none_goes_to_spot_while_it_is_closed(
            steps in proptest::collection::vec((0u8..9, 0usize..EXECUTORS.len(), 0u64..12), 0..80),
        ) {
            let mut ledger = JobLedger::default();
            ledger.learn(ALL_SPOT, Some("d1"), true);
            let mut now = 0;
            for (step, executor, passes) in steps {
                now += passes;
                let key = EXECUTORS[executor];
                let (state, is_known) = (ledger.steering().spot.clone(), ledger.entries().contains_key(key));
                let on_spot = |ledger: &JobLedger, key: &str| {
                    ledger.entries().get(key).is_some_and(|entry| entry.capacity == Capacity::Spot)
                };
                match step {
                    0..=3 => {
                        let (capacity, spot) = answer(&mut ledger, key, now);
                        match state {
                            SpotState::Open => prop_assert_eq!(spot, SpotAnswer::Unchanged),
                            SpotState::Starved { retry_at, .. } if now < retry_at && !is_known => {
                                prop_assert_eq!((capacity, spot), CLOSED);
                            }
                            SpotState::Probing { executor, .. } if executor != key && !is_known => {
                                let wanted = if on_spot(&ledger, &executor) { CLOSED } else { PROBE };
                                prop_assert_eq!((capacity, spot), wanted);
                            }
                            _ => {}
                        }
                        if spot == SpotAnswer::Probe {
                            let probe = matches!(&ledger.steering().spot, SpotState::Probing { executor, .. } if executor == key);
                            prop_assert!(probe && on_spot(&ledger, key));
                        }
                    }
                    4 => drop(ledger.steer(Steer::CloseSpot { retry_after: passes }, Term(1), now)),
                    5 => drop(ledger.steer(Steer::OpenSpot, Term(1), now)),
                    6 => drop(ledger.release(key, None, now)),
                    7 => {
                        let live = [LiveExecutor { key, uid: "u", capacity: None, states_ratio: false }];
                        reconcile(&mut ledger, &live, passes, now);
                    }
                    _ => {
                        let absent = Unconfirmed { placed_at: now - passes, key: key.to_owned() };
                        ledger.remove_unconfirmed(&[absent], Term(1));
                    }
                }
            }
        }

        #[test]
        fn when_spot_is_open_again_the_ratio_restores_the_share_to_within_one(
            billionths in 1u32..900_000_000, before in 0u64..20, during in 0u64..20,
        ) {
            let ratio = Ratio::from_billionths(billionths).unwrap();
            let mut ledger = JobLedger::default();
            ledger.learn(Policy { spot_ratio: ratio.into(), ..Policy::DEFAULT }, Some("d1"), true);
            let mut all = 0;
            let mut place = |ledger: &mut JobLedger, number: u64| {
                for _ in 0..number {
                    all += 1;
                    ledger.place(&request(&format!("e{all}")), 0);
                }
            };
            place(&mut ledger, before);
            ledger.steer(Steer::CloseSpot { retry_after: 1 }, Term(1), 0);
            let spot = ledger.counts().spot;
            place(&mut ledger, during);
            prop_assert_eq!(ledger.counts().spot, spot);
            ledger.steer(Steer::OpenSpot, Term(1), 0);
            // What is missing is at most what was closed out. The ratio sends all of these to spot until the share is right.
            let share = f64::from(billionths) / f64::from(Ratio::ONE_IN_BILLIONTHS);
            let wanted = |ledger: &JobLedger| share * ledger.counts().total() as f64;
            for _ in 0..10_000 {
                if wanted(&ledger) - ledger.counts().spot as f64 <= 1.0 {
                    break;
                }
                let spot = ledger.counts().spot;
                place(&mut ledger, 1);
                prop_assert_eq!(ledger.counts().spot, spot + 1);
            }
            for _ in 0..50 {
                place(&mut ledger, 1);
                let off = ledger.counts().spot as f64 - wanted(&ledger);
                prop_assert!(off.abs() <= 1.000_001, "{off} with {:?}", ledger.counts());
            }
        }
    }
}
