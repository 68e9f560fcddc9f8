//! One job's ledger: which live executor counts as which capacity. The reference for every store:
//! a store adds only where it is kept, a clock and a lock (DESIGN sections 5 and 6).

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;

use crate::action::Executor;
use crate::capacity::{Capacity, Counts};
use crate::decide::decide;
use crate::policy::{Policy, PolicyOverrides};

/// How often the leadership of the reconcilers has changed hands. A ledger that was reconciled in one
/// term takes no reconciling of an earlier one: a leader that was stopped for a while, and does not know
/// yet that another has taken over, sees a cluster of the past.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub u64);

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Milliseconds on the store's clock; only differences matter.
pub type Millis = u64;

/// A request to place one executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaceRequest<'a> {
    /// The executor's key in the ledger: its name, or the id stamped on a pod without one.
    pub key: &'a str,
    /// The capacity that the pod itself asks for; it is counted as that, whatever the ratio.
    pub required: Option<Capacity>,
    /// What the executor itself states; it wins over the job's policy, for this executor alone.
    pub overrides: PolicyOverrides,
    /// The job's policy, if the caller has looked it up; noted where the ledger knows none.
    pub policy: Option<Policy>,
}

impl<'a> PlaceRequest<'a> {
    /// A placing of this executor, with no policy looked up.
    pub fn of(executor: &'a Executor<'_>) -> Self {
        Self { key: executor.key, required: executor.required, overrides: executor.overrides, policy: None }
    }
}

/// The answer to a [`PlaceRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaceOutcome {
    /// The executor is in the ledger.
    Placed(Placed),
    /// Neither the request nor the ledger knows the job's policy: look the driver up and ask again.
    NeedPolicy,
}

/// Where an executor was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its capacity.
    pub capacity: Capacity,
    /// Whether this request added it; `false` if it was in the ledger already, and counts once.
    pub is_new: bool,
    /// The job's executors with this one.
    pub counts: Counts,
}

/// One executor in the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it counts as.
    pub capacity: Capacity,
    /// The pod's uid, once the reconciler has seen the pod; an admission cannot know it.
    pub uid: Option<String>,
    /// When it was last placed.
    pub placed_at: Millis,
}

/// A live executor pod as the reconciler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveExecutor<'a> {
    /// Its key in the ledger.
    pub key: &'a str,
    /// The pod's uid.
    pub uid: &'a str,
    /// Where it runs or must run; `None` while nothing tells.
    pub capacity: Option<Capacity>,
}

/// What the cluster says of one job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobState<'a> {
    /// Its live executors, each once.
    pub live: &'a [LiveExecutor<'a>],
    /// What its driver asks for, as far as that is known; each part replaces the noted one.
    pub overrides: PolicyOverrides,
    /// Whether neither a driver nor an executor of it is left: its policy then goes with its last entry.
    pub ended: bool,
}

/// What a reconcile came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReconcileOutcome {
    /// The ledger is what was observed.
    Done(ReconcileSummary),
    /// Nothing was changed: the ledger was reconciled in this later term.
    Superseded(Term),
}

/// A ledger that is what was observed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReconcileSummary {
    /// What had to be changed.
    pub drift: Drift,
    /// The executors by capacity, those that wait for their pods included.
    pub counts: Counts,
    /// In how many milliseconds the job is to be looked at again, since the first placement that has no
    /// pod yet will then have waited for the grace, or the first released executor that still seems to live
    /// will have had its time to go; `None` where there are none.
    pub recheck_after: Option<Millis>,
}

/// What a reconcile found wrong, and mended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drift {
    /// Live executors that the ledger did not have: entered.
    pub missing: u64,
    /// Entries without a live executor: struck.
    pub stale: u64,
    /// Entries under the other capacity: corrected.
    pub wrong_capacity: u64,
}

impl Drift {
    /// Whether the ledger was right already.
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

/// The ledger of one job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JobLedger {
    policy: Option<Policy>,
    counts: Counts,
    entries: HashMap<String, Entry>,
    released: VecDeque<(String, Millis)>,
    term: Term,
}

impl JobLedger {
    /// How many released uids a ledger remembers. One pod's end is reviewed two or three times within
    /// moments; this outlasts the reviews of several pods that end at once, and costs Redis little.
    pub const RELEASED_REMEMBERED: usize = 16;

    /// How long a released executor has to show that it goes, in milliseconds; no longer than the grace. A
    /// deletion is reviewed before the cluster shows it; one that is refused after its review has to come
    /// back into the ledger.
    pub const RELEASE_GRACE: Millis = 2_000;

    /// A ledger of what a store holds: `released` as [`JobLedger::released`] tells them. The counts
    /// are taken from the entries.
    pub fn from_parts(
        policy: Option<Policy>,
        entries: HashMap<String, Entry>,
        released: impl IntoIterator<Item = (String, Millis)>,
        term: Term,
    ) -> Self {
        let released = released.into_iter().collect();
        let mut ledger = Self { policy, counts: Counts::default(), entries, released, term };
        ledger.recount();
        ledger
    }

    /// Decides and enters, in one step. Asked again for the same executor it gives the same answer
    /// and counts once.
    pub fn place(&mut self, request: &PlaceRequest<'_>, now: Millis) -> PlaceOutcome {
        let outcome = self.peek(request);
        self.policy = self.policy.or(request.policy);
        if let PlaceOutcome::Placed(placed) = outcome {
            // A known name may be a new pod by that name: its uid is again unknown.
            let entry = Entry { capacity: placed.capacity, uid: None, placed_at: now };
            self.entries.insert(request.key.to_owned(), entry);
            self.counts = placed.counts;
        }
        outcome
    }

    /// What [`JobLedger::place`] would answer, with nothing entered: for a dry run.
    pub fn peek(&self, request: &PlaceRequest<'_>) -> PlaceOutcome {
        let PlaceRequest { key, required, overrides, policy } = *request;
        let known = self.entries.get(key).map(|entry| entry.capacity);
        let mut counts = self.counts;
        let capacity = match (known, required) {
            (Some(known), None) => known,
            (Some(known), Some(required)) => {
                counts.remove(known);
                counts.add(required);
                required
            }
            (None, required) => {
                let capacity = match (required, overrides.or(self.policy.or(policy))) {
                    (Some(required), _) => required,
                    (None, Some(policy)) => decide(counts, policy),
                    (None, None) => return PlaceOutcome::NeedPolicy,
                };
                counts.add(capacity);
                capacity
            }
        };
        PlaceOutcome::Placed(Placed { capacity, is_new: known.is_none(), counts })
    }

    /// Strikes an executor; answers what it counted as, or `None` where nothing was struck.
    ///
    /// Releasing twice is harmless, also when a newer pod has taken the name in between: an entry
    /// known under another uid stays, and so does one of unknown uid where this uid was released already.
    /// (One pod's deletion is reviewed several times, by several callers, and a review may come after
    /// the next pod's placement, whose uid is not known yet.)
    pub fn release(&mut self, executor: &str, uid: Option<&str>, now: Millis) -> Option<Capacity> {
        if let Some(uid) = uid {
            let known = self.entries.get(executor).and_then(|entry| entry.uid.as_deref());
            let again = self.released.iter().any(|(released, _)| released == uid);
            // A pod that was seen to live on after its release has to be released again, and its time to go
            // begins anew.
            if known.map_or(again, |known| known != uid) {
                return None;
            }
            self.released.retain(|(released, _)| released != uid);
            self.released.truncate(Self::RELEASED_REMEMBERED - 1);
            self.released.push_front((uid.to_owned(), now));
        }
        let struck = self.entries.remove(executor).map(|entry| entry.capacity);
        if let Some(capacity) = struck {
            self.counts.remove(capacity);
        }
        self.forget_if_empty();
        struck
    }

    /// Notes the job's policy; the newest wins.
    pub fn learn(&mut self, policy: Policy) {
        self.policy = Some(policy);
    }

    /// Makes the ledger what the cluster says, unless it was reconciled in a later term.
    ///
    /// Struck are entries with no live executor: at once where the pod had been seen (its uid is
    /// known), else once the placement is `grace` old. Entered are live executors of known capacity
    /// that are missing, unless they were released so recently that they may still be seen to live; nor does
    /// such a one become the pod of an entry that waits for its own. Counts are taken anew from the entries.
    pub fn reconcile(&mut self, seen: &JobState<'_>, grace: Millis, term: Term, now: Millis) -> ReconcileOutcome {
        if self.term > term {
            return ReconcileOutcome::Superseded(self.term);
        }
        let JobState { live, overrides, ended } = *seen;
        let (mut drift, mut recheck_after) = (Drift::default(), None::<Millis>);
        let names: HashSet<&str> = live.iter().map(|executor| executor.key).collect();
        self.entries.retain(|name, entry| {
            if names.contains(name.as_str()) {
                return true;
            }
            let age = now.saturating_sub(entry.placed_at);
            let keep = entry.uid.is_none() && age < grace;
            if keep {
                recheck_after = Some(recheck_after.unwrap_or(Millis::MAX).min(grace - age));
            }
            drift.stale += u64::from(!keep);
            keep
        });
        // How long pods that were released may still be seen to live. One that is yet to be released, by a clock
        // that went back, is no reason to wait.
        let left =
            |at: Millis| Self::RELEASE_GRACE.min(grace).checked_sub(now.checked_sub(at)?).filter(|left| *left > 0);
        let going: HashMap<&str, Millis> =
            self.released.iter().filter_map(|(uid, at)| Some((uid.as_str(), left(*at)?))).collect();
        for &LiveExecutor { key: executor, uid, capacity } in live {
            let entry = self.entries.get_mut(executor);
            if let Some(left) = going.get(uid).filter(|_| entry.as_ref().is_none_or(|entry| entry.uid.is_none())) {
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
                (None, Some(capacity)) => {
                    let entry = Entry { capacity, uid: Some(uid.to_owned()), placed_at: now };
                    self.entries.insert(executor.to_owned(), entry);
                    drift.missing += 1;
                }
                (None, None) => {}
            }
        }
        self.recount();
        self.term = term;
        self.policy = overrides.or(self.policy).or(self.policy);
        if ended && self.entries.is_empty() {
            self.policy = None;
        }
        self.forget_if_empty();
        ReconcileOutcome::Done(ReconcileSummary { drift, counts: self.counts, recheck_after })
    }

    /// Without policy and executors there is no ledger, and no store keeps one.
    fn forget_if_empty(&mut self) {
        if self.policy.is_none() && self.entries.is_empty() {
            *self = Self::default();
        }
    }

    fn recount(&mut self) {
        self.counts = Counts::default();
        for entry in self.entries.values() {
            self.counts.add(entry.capacity);
        }
    }

    /// The executors by capacity.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The noted policy.
    pub fn policy(&self) -> Option<Policy> {
        self.policy
    }

    /// The uids of the last releases and when they were, the newest first.
    pub fn released(&self) -> impl Iterator<Item = (&str, Millis)> {
        self.released.iter().map(|(uid, at)| (uid.as_str(), *at))
    }

    /// The term in which it was last reconciled.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The entries by executor.
    pub fn entries(&self) -> &HashMap<String, Entry> {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ratio::Ratio;
    use proptest::prelude::*;

    const ALL_SPOT: Policy = Policy { spot_ratio: Ratio::ONE, ..Policy::DEFAULT };
    const ALL_ON_DEMAND: Policy = Policy { spot_ratio: Ratio::ZERO, ..Policy::DEFAULT };
    const POLICY: Policy = Policy { on_demand_base: 1, ..ALL_SPOT };

    fn request(executor: &str) -> PlaceRequest<'_> {
        PlaceRequest { key: executor, required: None, overrides: PolicyOverrides::default(), policy: Some(POLICY) }
    }

    fn mend(ledger: &mut JobLedger, live: &[LiveExecutor<'_>], grace: Millis, now: Millis) -> ReconcileSummary {
        match ledger.reconcile(&JobState { live, ..JobState::default() }, grace, Term(1), now) {
            ReconcileOutcome::Done(mended) => mended,
            ReconcileOutcome::Superseded(by) => panic!("superseded by {by}"),
        }
    }

    #[test]
    fn without_any_policy_it_asks_for_one_and_enters_nothing() {
        let mut ledger = JobLedger::default();
        assert_eq!(ledger.place(&PlaceRequest { policy: None, ..request("e1") }, 0), PlaceOutcome::NeedPolicy);
        assert_eq!(ledger, JobLedger::default());
    }

    #[test]
    fn an_executors_own_ratio_needs_the_jobs_base_and_is_not_noted_for_the_job() {
        let mut ledger = JobLedger::default();
        let own = PolicyOverrides { spot_ratio: Some(Ratio::ZERO), ..PolicyOverrides::default() };
        let asking = PlaceRequest { overrides: own, policy: None, ..request("e1") };
        assert_eq!(ledger.place(&asking, 0), PlaceOutcome::NeedPolicy);
        ledger.learn(ALL_SPOT);
        assert!(matches!(ledger.place(&asking, 0), PlaceOutcome::Placed(Placed { capacity: Capacity::OnDemand, .. })));
        assert_eq!(ledger.policy().map(|p| p.spot_ratio), Some(Ratio::ONE));
    }

    #[test]
    fn a_looked_up_policy_does_not_replace_the_one_that_a_driver_taught() {
        let mut ledger = JobLedger::default();
        ledger.learn(ALL_ON_DEMAND);
        ledger.place(&request("e1"), 0);
        assert_eq!(ledger.policy(), Some(ALL_ON_DEMAND));
        assert_eq!(ledger.counts(), Counts { spot: 0, on_demand: 1 });
    }

    #[test]
    fn a_pinned_executor_counts_as_what_it_asks_for_even_if_it_was_known_as_the_other() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        let required = PlaceRequest { required: Some(Capacity::Spot), ..request("e1") };
        ledger.place(&required, 0);
        assert_eq!(ledger.counts(), Counts { spot: 1, on_demand: 0 });
    }

    #[test]
    fn a_release_for_an_older_pod_of_the_same_name_strikes_nothing() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        mend(&mut ledger, &[LiveExecutor { key: "e1", uid: "new", capacity: None }], 60_000, 1);
        assert_eq!(ledger.release("e1", Some("old"), 0), None);
        assert_eq!(ledger.release("e1", Some("new"), 0), Some(Capacity::OnDemand));
        assert_eq!(ledger.release("e1", Some("new"), 0), None);
    }

    #[test]
    fn a_release_that_comes_again_after_the_name_was_taken_anew_strikes_nothing() {
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
    fn a_placement_waits_for_its_pod_for_the_grace_but_a_seen_pod_that_is_gone_is_struck_at_once() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("seen"), 0);
        ledger.place(&request("waiting"), 0);
        let seen = [LiveExecutor { key: "seen", uid: "u", capacity: None }];
        assert_eq!(mend(&mut ledger, &seen, 100, 10).recheck_after, Some(90));
        let struck = Drift { stale: 1, ..Drift::default() };
        let ReconcileSummary { drift, counts, recheck_after } = mend(&mut ledger, &[], 100, 99);
        assert_eq!((drift, counts.total(), recheck_after), (struck, 1, Some(1)));
        let ReconcileSummary { drift, counts, recheck_after } = mend(&mut ledger, &[], 100, 100);
        assert_eq!((drift, counts.total(), recheck_after), (struck, 0, None));
    }

    #[test]
    fn an_executor_that_was_just_released_has_its_time_to_go_and_comes_back_if_it_does_not() {
        let mut ledger = JobLedger::default();
        ledger.learn(POLICY);
        let live = [LiveExecutor { key: "e1", uid: "u1", capacity: Some(Capacity::Spot) }];
        mend(&mut ledger, &live, 10, 0);
        for released in [100, 200] {
            ledger.release("e1", Some("u1"), released);
            // A review that comes again changes nothing of it.
            ledger.release("e1", Some("u1"), released + 5);
            let ReconcileSummary { drift, counts, recheck_after } = mend(&mut ledger, &live, 10, released + 9);
            assert_eq!((drift, counts.total(), recheck_after), (Drift::default(), 0, Some(1)));
            let ReconcileSummary { drift, counts, recheck_after } = mend(&mut ledger, &live, 10, released + 10);
            assert_eq!((drift.missing, counts.total(), recheck_after), (1, 1, None));
        }
        ledger.release("e1", Some("u1"), 300);
        assert_eq!(mend(&mut ledger, &live, Millis::MAX, 300).recheck_after, Some(JobLedger::RELEASE_GRACE));
        assert_eq!(mend(&mut ledger, &live, Millis::MAX, 299).drift.missing, 1, "the clock went back");
    }

    #[test]
    fn a_pod_that_is_going_is_not_taken_for_the_next_one_of_its_name() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        let live = [LiveExecutor { key: "e1", uid: "u1", capacity: Some(Capacity::Spot) }];
        mend(&mut ledger, &live, 100, 1);
        ledger.release("e1", Some("u1"), 2);
        ledger.place(&request("e1"), 3);
        let ReconcileSummary { drift, counts, recheck_after } = mend(&mut ledger, &live, 100, 4);
        assert_eq!((drift, counts, recheck_after), (Drift::default(), Counts { spot: 0, on_demand: 1 }, Some(98)));
        // The old one is gone, and the new one is yet to be seen.
        assert_eq!(mend(&mut ledger, &[], 100, 5).counts.total(), 1);
    }

    #[test]
    fn what_an_earlier_term_saw_changes_nothing() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        let nothing = JobState::default();
        assert!(matches!(ledger.reconcile(&nothing, 100, Term(3), 0), ReconcileOutcome::Done(_)));
        let before = ledger.clone();
        assert_eq!(ledger.reconcile(&nothing, 0, Term(2), 0), ReconcileOutcome::Superseded(Term(3)));
        assert_eq!(ledger, before);
    }

    #[test]
    fn each_part_of_a_policy_that_is_observed_replaces_the_noted_one() {
        let mut ledger = JobLedger::default();
        let ratio = |ratio| JobState {
            overrides: PolicyOverrides { spot_ratio: Some(ratio), ..PolicyOverrides::default() },
            ..JobState::default()
        };
        ledger.reconcile(&ratio(Ratio::ZERO), 0, Term(1), 0);
        assert_eq!(ledger, JobLedger::default(), "half of a policy is none");
        ledger.learn(POLICY);
        ledger.reconcile(&ratio(Ratio::ZERO), 0, Term(1), 0);
        assert_eq!(ledger.policy(), Some(Policy { spot_ratio: Ratio::ZERO, ..POLICY }));
    }

    #[test]
    fn the_policy_of_an_ended_job_goes_with_its_last_entry() {
        let mut ledger = JobLedger::default();
        ledger.place(&request("e1"), 0);
        let ended = JobState { ended: true, ..JobState::default() };
        ledger.reconcile(&ended, 100, Term(1), 99);
        assert_eq!(ledger.policy(), Some(POLICY));
        ledger.reconcile(&ended, 100, Term(1), 100);
        assert_eq!(ledger, JobLedger::default());
    }

    proptest! {
        #[test]
        fn counts_are_always_the_sum_of_the_entries(steps in proptest::collection::vec((0u8..6, 0u8..12, any::<bool>()), 0..120)) {
            let mut ledger = JobLedger::default();
            for (now, (step, executor, flag)) in steps.into_iter().enumerate() {
                let name = format!("e{executor}");
                let required = flag.then_some(Capacity::Spot);
                let before = ledger.clone();
                let asked = PlaceRequest { required: required.filter(|_| step == 1), ..request(&name) };
                match step {
                    0 | 1 => {
                        let peeked = ledger.peek(&asked);
                        prop_assert_eq!(&ledger, &before);
                        prop_assert_eq!(ledger.place(&asked, now as Millis), peeked);
                        let once = ledger.counts();
                        ledger.place(&asked, now as Millis);
                        prop_assert_eq!(ledger.counts(), once);
                    }
                    2 => { ledger.release(&name, None, now as Millis); }
                    3 => { ledger.release(&name, Some("other"), now as Millis); }
                    4 => { mend(&mut ledger, &[LiveExecutor { key: &name, uid: "u", capacity: required }], 5, now as Millis); }
                    _ => ledger.learn(POLICY),
                }
                let mut counts = Counts::default();
                for entry in ledger.entries().values() {
                    counts.add(entry.capacity);
                }
                prop_assert_eq!(ledger.counts(), counts);
            }
        }
    }
}
