//! The ledger of one job: the capacity of each live executor. It is the reference for every store, which only adds
//! where the ledger is kept, a clock and atomicity.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;

use crate::action::Executor;
use crate::capacity::{Capacity, Counts};
use crate::decide::decide;
use crate::policy::{Policy, PolicyOverrides};

/// A fencing token: how often the leader of the reconcilers has changed. A ledger that was reconciled in one term
/// ignores reconciles of earlier terms. They come from a leader that was paused, does not know its successor yet,
/// and has an outdated view of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub u64);

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Milliseconds on the store's clock. Only differences matter.
pub type Millis = u64;

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
}

impl<'a> PlaceRequest<'a> {
    /// A request for this executor, without a policy of the job.
    pub fn of(executor: &'a Executor<'_>) -> Self {
        Self { key: executor.key, required: executor.required, overrides: executor.overrides, policy: None }
    }
}

/// The answer to a [`PlaceRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlaceOutcome {
    /// The executor is in the ledger.
    Placed(Placed),
    /// Neither the request nor the ledger has the job's policy. Look up the driver and ask again.
    NeedPolicy,
}

/// A placed executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The capacity.
    pub capacity: Capacity,
    /// Whether this request added the executor; `false` if it already was in the ledger.
    pub is_new: bool,
    /// The job's executors, this one included.
    pub counts: Counts,
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
}

/// The state of one job in the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobState<'a> {
    /// The live executors, each once.
    pub live: &'a [LiveExecutor<'a>],
    /// The policy fields that the driver states. Each replaces the stored one.
    pub overrides: PolicyOverrides,
    /// Whether the job has neither a driver nor an executor left. The policy is then removed with the last entry.
    pub ended: bool,
}

/// The result of a reconcile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReconcileOutcome {
    /// The ledger now matches the cluster.
    Done(ReconcileSummary),
    /// Nothing was changed, because the ledger was already reconciled in this later term.
    Superseded(Term),
}

/// What a reconcile has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReconcileSummary {
    /// What it corrected.
    pub drift: Drift,
    /// The executors on each capacity, including placements that wait for their pods.
    pub counts: Counts,
    /// When to reconcile the job again, in milliseconds: when the first placement without a pod has waited for the
    /// grace period, or [`JobLedger::RELEASE_GRACE`] ends for the first released executor that still appears to
    /// be live. `None` if there is neither.
    pub recheck_after: Option<Millis>,
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
    /// How many released uids a ledger remembers. The end of one pod causes two or three reviews in quick
    /// succession. This is enough for several pods that end at once, and takes little memory in Redis.
    pub const RELEASED_REMEMBERED: usize = 16;

    /// How long a released executor may still appear to be live, in milliseconds; at most the grace period. A
    /// deletion is reviewed before it shows in the cluster. An executor whose deletion is refused after the review
    /// is added to the ledger again after this time.
    pub const RELEASE_GRACE: Millis = 2_000;

    /// A ledger from the parts that a store keeps. `released` is in the order of [`JobLedger::released`]. The counts
    /// are those of the entries.
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

    /// Decides on a capacity and adds the executor, in one step. A repeated request gets the same answer, and the
    /// executor counts once.
    pub fn place(&mut self, request: &PlaceRequest<'_>, now: Millis) -> PlaceOutcome {
        let outcome = self.peek(request);
        self.policy = self.policy.or(request.policy);
        if let PlaceOutcome::Placed(placed) = outcome {
            // A known name may belong to a new pod, so the uid is unknown again.
            let entry = Entry { capacity: placed.capacity, uid: None, placed_at: now };
            self.entries.insert(request.key.to_owned(), entry);
            self.counts = placed.counts;
        }
        outcome
    }

    /// What [`JobLedger::place`] would return. Nothing is added; this is for a dry run.
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

    /// Removes an executor. Returns the capacity that it counted as, or `None` if nothing was removed.
    ///
    /// Several callers review the deletion of one pod, and such a review may arrive after the placement of the next
    /// pod with the same name. Therefore an entry with another uid stays, and so does an entry without a uid if
    /// `uid` was already released.
    pub fn release(&mut self, executor: &str, uid: Option<&str>, now: Millis) -> Option<Capacity> {
        if let Some(uid) = uid {
            let known = self.entries.get(executor).and_then(|entry| entry.uid.as_deref());
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

    /// Stores the job's policy, and replaces an older one.
    pub fn learn(&mut self, policy: Policy) {
        self.policy = Some(policy);
    }

    /// Makes the ledger match the cluster, unless it was already reconciled in a later term.
    ///
    /// An entry without a live executor is removed: at once if it has a uid, because then its pod has existed, and
    /// otherwise when the placement is older than `grace`. A live executor of known capacity that is missing is
    /// added, unless it was released less than [`JobLedger::RELEASE_GRACE`] ago; such an executor is not matched to
    /// an entry without a uid either, because the entry belongs to the next pod of that name. The counts are
    /// computed again from the entries.
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
        // How long each released pod may still appear to be live. If the clock was set back, a release can lie in
        // the future; it is no reason to wait.
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

    /// A ledger without a policy and executors is none, and no store keeps it.
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

    /// The number of executors on each capacity.
    pub fn counts(&self) -> Counts {
        self.counts
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

    /// The entries by key.
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

    fn reconcile(ledger: &mut JobLedger, live: &[LiveExecutor<'_>], grace: Millis, now: Millis) -> ReconcileSummary {
        match ledger.reconcile(&JobState { live, ..JobState::default() }, grace, Term(1), now) {
            ReconcileOutcome::Done(summary) => summary,
            ReconcileOutcome::Superseded(by) => panic!("superseded by {by}"),
        }
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
        let own = PolicyOverrides { spot_ratio: Some(Ratio::ZERO), ..PolicyOverrides::default() };
        let asking = PlaceRequest { overrides: own, policy: None, ..request("e1") };
        assert_eq!(ledger.place(&asking, 0), PlaceOutcome::NeedPolicy);
        ledger.learn(ALL_SPOT);
        assert!(matches!(ledger.place(&asking, 0), PlaceOutcome::Placed(Placed { capacity: Capacity::OnDemand, .. })));
        assert_eq!(ledger.policy().map(|p| p.spot_ratio), Some(Ratio::ONE));
    }

    #[test]
    fn a_looked_up_policy_does_not_replace_a_learned_one() {
        let mut ledger = JobLedger::default();
        ledger.learn(ALL_ON_DEMAND);
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
        reconcile(&mut ledger, &[LiveExecutor { key: "e1", uid: "new", capacity: None }], 60_000, 1);
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
        let seen = [LiveExecutor { key: "seen", uid: "u", capacity: None }];
        assert_eq!(reconcile(&mut ledger, &seen, 100, 10).recheck_after, Some(90));
        let removed = Drift { stale: 1, ..Drift::default() };
        let ReconcileSummary { drift, counts, recheck_after } = reconcile(&mut ledger, &[], 100, 99);
        assert_eq!((drift, counts.total(), recheck_after), (removed, 1, Some(1)));
        let ReconcileSummary { drift, counts, recheck_after } = reconcile(&mut ledger, &[], 100, 100);
        assert_eq!((drift, counts.total(), recheck_after), (removed, 0, None));
    }

    #[test]
    fn a_released_executor_that_stays_live_is_added_again_after_the_release_grace() {
        let mut ledger = JobLedger::default();
        ledger.learn(POLICY);
        let live = [LiveExecutor { key: "e1", uid: "u1", capacity: Some(Capacity::Spot) }];
        reconcile(&mut ledger, &live, 10, 0);
        for released in [100, 200] {
            ledger.release("e1", Some("u1"), released);
            // A repeated review changes nothing.
            ledger.release("e1", Some("u1"), released + 5);
            let ReconcileSummary { drift, counts, recheck_after } = reconcile(&mut ledger, &live, 10, released + 9);
            assert_eq!((drift, counts.total(), recheck_after), (Drift::default(), 0, Some(1)));
            let ReconcileSummary { drift, counts, recheck_after } = reconcile(&mut ledger, &live, 10, released + 10);
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
        let live = [LiveExecutor { key: "e1", uid: "u1", capacity: Some(Capacity::Spot) }];
        reconcile(&mut ledger, &live, 100, 1);
        ledger.release("e1", Some("u1"), 2);
        ledger.place(&request("e1"), 3);
        let ReconcileSummary { drift, counts, recheck_after } = reconcile(&mut ledger, &live, 100, 4);
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
    fn each_stated_policy_field_replaces_the_stored_one() {
        let mut ledger = JobLedger::default();
        let ratio = |ratio| JobState {
            overrides: PolicyOverrides { spot_ratio: Some(ratio), ..PolicyOverrides::default() },
            ..JobState::default()
        };
        ledger.reconcile(&ratio(Ratio::ZERO), 0, Term(1), 0);
        assert_eq!(ledger, JobLedger::default(), "an incomplete policy is not stored");
        ledger.learn(POLICY);
        ledger.reconcile(&ratio(Ratio::ZERO), 0, Term(1), 0);
        assert_eq!(ledger.policy(), Some(Policy { spot_ratio: Ratio::ZERO, ..POLICY }));
    }

    #[test]
    fn the_policy_of_an_ended_job_is_removed_with_its_last_entry() {
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
        fn counts_are_always_those_of_the_entries(steps in proptest::collection::vec((0u8..6, 0u8..12, any::<bool>()), 0..120)) {
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
                    4 => { reconcile(&mut ledger, &[LiveExecutor { key: &name, uid: "u", capacity: required }], 5, now as Millis); }
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
