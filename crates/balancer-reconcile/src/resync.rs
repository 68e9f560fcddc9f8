//! When everything is listed again, and when all ledgers are reconciled. Pure: the clock is the caller's.

use std::collections::HashSet;
use std::mem;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use tokio::time::Instant;

use crate::metrics::Cause;

/// A new leader does not list again what was listed so recently. Before, it may have been cut off from the cluster.
const RECENT: Duration = Duration::from_secs(1);
/// From a list that has failed to the next lists. Each time that they fail again, it doubles, up to the interval.
const AFTER_FAILED_LISTS: Duration = Duration::from_secs(60);
/// The longest pause after a resync that could not reach all ledgers. It goes through all jobs each time.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// The pauses after such resyncs in succession.
const PAUSES: ExponentialBuilder =
    ExponentialBuilder::new().with_min_delay(Duration::from_secs(2)).with_max_delay(LONGEST_PAUSE).without_max_times();

/// A pass over all ledgers: of the jobs in the cluster, and of those that only the store has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Resync {
    pub(crate) cause: Cause,
    /// When the lists before it were started; `None` for a resync without new lists.
    pub(crate) lists_started_at: Option<Instant>,
}

/// The lists and the resyncs, under way and to come.
#[derive(Debug)]
pub(crate) struct ResyncPlan {
    /// From one list of everything to the next.
    interval: Duration,
    lists_started_at: Instant,
    /// When everything is listed again, while it is not.
    relist_at: Instant,
    /// Whether one of the lists that were started last has failed, and the pauses after lists that fail in succession.
    has_list_failed: bool,
    pauses_of_lists: ExponentialBackoff,
    is_listing: bool,
    /// Whether new watches follow the last lists, or those that are under way.
    starts_watches: bool,
    /// Whether the index was complete once. A partial one would remove live executors.
    has_listed: bool,
    pending: Option<Resync>,
    /// Whether the pending resync runs.
    is_running: bool,
    /// Why another resync has to follow the one that runs: the ledgers that it has passed may be wrong again.
    requested: Option<Cause>,
    /// When an incomplete resync may run again, and how long the pause after the next incomplete one is.
    retry_at: Option<Instant>,
    pauses: ExponentialBackoff,
    /// Namespaces that the last resync left out, because they were not in sync.
    skipped: HashSet<Box<str>>,
}

impl ResyncPlan {
    /// The first lists start `now`.
    pub(crate) fn new(interval: Duration, now: Instant) -> Self {
        Self {
            interval,
            lists_started_at: now,
            relist_at: now + interval,
            has_list_failed: false,
            pauses_of_lists: pauses_of_lists(interval),
            is_listing: true,
            starts_watches: true,
            has_listed: false,
            pending: None,
            is_running: false,
            requested: None,
            retry_at: None,
            pauses: PAUSES.build(),
            skipped: HashSet::new(),
        }
    }

    /// Whether lists are under way.
    pub(crate) fn is_listing(&self) -> bool {
        self.is_listing
    }

    /// Whether all lists were complete once, as far as they could be had.
    pub(crate) fn has_listed(&self) -> bool {
        self.has_listed
    }

    /// When everything has to be listed again; `None` while lists are under way.
    pub(crate) fn relist_at(&self) -> Option<Instant> {
        (!self.is_listing).then_some(self.relist_at)
    }

    /// A list of those that were started last has failed. What its watch has lost must not stay unknown for an interval.
    pub(crate) fn list_failed(&mut self, now: Instant) {
        if !mem::replace(&mut self.has_list_failed, true) {
            let pause = self.pauses_of_lists.next().unwrap_or(self.interval);
            self.relist_at = self.relist_at.min(now + pause);
        }
    }

    /// Whether a new leader has to start all lists and watches anew: it may have been cut off from the cluster. It need not
    /// while they start, or if they have started just now.
    pub(crate) fn is_outdated(&self, now: Instant) -> bool {
        !self.starts_watches || !self.is_listing && now.duration_since(self.lists_started_at) > RECENT
    }

    /// All lists start anew, and the watches too if `starts_watches`.
    pub(crate) fn lists_started(&mut self, starts_watches: bool, now: Instant) {
        (self.lists_started_at, self.is_listing, self.starts_watches) = (now, true, starts_watches);
        self.relist_at = now + self.interval;
        if !mem::take(&mut self.has_list_failed) {
            self.pauses_of_lists = pauses_of_lists(self.interval);
        }
    }

    /// All lists are complete, or are not available now. `is_new_term` says whether they are the first of a term, `leads`
    /// whether this process may write.
    pub(crate) fn lists_done(&mut self, is_new_term: bool, leads: bool) {
        let cause = if is_new_term || !self.has_listed { Cause::Start } else { Cause::Interval };
        (self.is_listing, self.has_listed, self.retry_at) = (false, true, None);
        if leads && self.is_running {
            self.requested = Some(cause);
        } else if leads {
            self.pending = Some(Resync { cause, lists_started_at: Some(self.lists_started_at) });
        }
    }

    /// Requests a resync without new lists, unless one is pending that has not begun.
    pub(crate) fn request(&mut self, cause: Cause) {
        if cause == Cause::Store {
            // A store that has lost its ledgers does not wait.
            self.retry_at = None;
        }
        if self.is_running {
            self.requested.get_or_insert(cause);
        } else {
            self.pending.get_or_insert(Resync { cause, lists_started_at: None });
        }
    }

    /// Requests a resync if a namespace that the last one left out is in sync now.
    pub(crate) fn request_if_synced(&mut self, is_synced: impl Fn(&str) -> bool) {
        if self.skipped.iter().any(|namespace| is_synced(namespace)) {
            self.request(Cause::Interval);
        }
    }

    /// The pending resync, unless it was incomplete and has to wait.
    pub(crate) fn due(&self, now: Instant) -> Option<Resync> {
        self.pending.filter(|_| self.retry_at.is_none_or(|at| at <= now))
    }

    /// The pending resync begins.
    pub(crate) fn begin(&mut self) {
        (self.is_running, self.requested) = (true, None);
    }

    /// The term has changed: what was pending belongs to the former one.
    pub(crate) fn cancel(&mut self) {
        (self.pending, self.requested, self.is_running, self.retry_at) = (None, None, false, None);
    }

    /// A resync comes to the jobs that only the store has.
    pub(crate) fn forget_skipped(&mut self) {
        self.skipped.clear();
    }

    /// The resync leaves a namespace out.
    pub(crate) fn skip(&mut self, namespace: &str) {
        self.skipped.insert(namespace.into());
    }

    /// The resync that runs cannot go on now. It stays pending, and then begins anew.
    pub(crate) fn interrupt(&mut self) {
        self.is_running = false;
    }

    /// The resync that runs could not reach all ledgers, although the store is up. It begins anew after a pause.
    pub(crate) fn postpone(&mut self, now: Instant) {
        self.is_running = false;
        self.retry_at = Some(now + self.pauses.next().unwrap_or(LONGEST_PAUSE));
    }

    /// The resync that runs is finished. Another one follows if it was requested meanwhile.
    pub(crate) fn finish(&mut self) {
        (self.is_running, self.retry_at, self.pauses) = (false, None, PAUSES.build());
        self.pending = self.requested.take().map(|cause| Resync { cause, lists_started_at: None });
    }
}

/// The pauses after lists of which one has failed, up to the interval.
fn pauses_of_lists(interval: Duration) -> ExponentialBackoff {
    let first = interval.min(AFTER_FAILED_LISTS);
    ExponentialBuilder::new().with_min_delay(first).with_max_delay(interval).without_max_times().build()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(1800);

    fn plan() -> (ResyncPlan, Instant) {
        let now = Instant::now();
        (ResyncPlan::new(INTERVAL, now), now)
    }

    fn cause(plan: &ResyncPlan) -> Option<Cause> {
        plan.pending.map(|resync| resync.cause)
    }

    #[test]
    fn everything_is_listed_again_an_interval_after_the_last_start_and_not_while_listing() {
        let (mut plan, start) = plan();
        assert!(plan.is_listing() && !plan.has_listed() && plan.relist_at().is_none());
        plan.lists_done(false, true);
        assert!(!plan.is_listing() && plan.has_listed());
        assert_eq!(plan.relist_at(), Some(start + INTERVAL));
        plan.lists_started(false, start + 2 * INTERVAL);
        assert!(plan.is_listing() && plan.has_listed() && plan.relist_at().is_none());
        plan.lists_done(false, true);
        assert_eq!(plan.relist_at(), Some(start + 3 * INTERVAL));
    }

    #[test]
    fn lists_that_fail_are_repeated_soon_and_then_more_and_more_rarely() {
        let (mut plan, mut now) = plan();
        for pause in [1, 2, 4, 8, 16, 30, 30] {
            plan.lists_done(false, true);
            // The failure of a list that hangs is known late. Those of several lists are one.
            now += AFTER_FAILED_LISTS;
            plan.list_failed(now);
            plan.list_failed(now);
            let next = plan.relist_at().expect("nothing is listed");
            assert_eq!(next.duration_since(now), (pause * AFTER_FAILED_LISTS).min(INTERVAL - AFTER_FAILED_LISTS));
            now = next;
            plan.lists_started(false, now);
        }
        plan.lists_done(false, true);
        assert_eq!(plan.relist_at(), Some(now + INTERVAL));
        plan.lists_started(false, now + INTERVAL);
        plan.list_failed(now + INTERVAL);
        plan.lists_done(false, true);
        assert_eq!(plan.relist_at(), Some(now + INTERVAL + AFTER_FAILED_LISTS), "the pauses begin anew");
    }

    #[test]
    fn a_new_leader_lists_again_unless_the_lists_are_recent_or_under_way() {
        let (mut plan, start) = plan();
        assert!(!plan.is_outdated(start + INTERVAL), "under way");
        plan.lists_done(false, false);
        assert!(!plan.is_outdated(start + RECENT));
        assert!(plan.is_outdated(start + RECENT + Duration::from_millis(1)));
        plan.lists_started(true, start + INTERVAL);
        assert!(!plan.is_outdated(start + 2 * INTERVAL));
        plan.lists_done(false, false);
        // The watches are old, whenever their lists were repeated.
        plan.lists_started(false, start + 3 * INTERVAL);
        assert!(plan.is_outdated(start + 3 * INTERVAL));
        plan.lists_done(false, false);
        assert!(plan.is_outdated(start + 3 * INTERVAL));
    }

    #[test]
    fn complete_lists_lead_to_a_resync_whose_cause_is_the_start_for_the_first_of_a_process_or_term() {
        let (mut plan, start) = plan();
        plan.lists_done(false, true);
        assert_eq!(plan.pending, Some(Resync { cause: Cause::Start, lists_started_at: Some(start) }));
        plan.finish();
        assert_eq!(plan.pending, None);
        plan.lists_started(false, start + INTERVAL);
        plan.lists_done(false, true);
        let interval = Resync { cause: Cause::Interval, lists_started_at: Some(start + INTERVAL) };
        assert_eq!(plan.pending, Some(interval));
        plan.lists_started(false, start + 2 * INTERVAL);
        plan.lists_done(true, true);
        assert_eq!(cause(&plan), Some(Cause::Start));
    }

    #[test]
    fn a_follower_makes_no_resync_of_its_lists() {
        let (mut plan, _) = plan();
        plan.lists_done(false, false);
        assert_eq!(plan.pending, None);
    }

    #[test]
    fn a_request_does_not_replace_the_pending_resync() {
        let (mut plan, start) = plan();
        plan.request(Cause::Store);
        assert_eq!(plan.pending, Some(Resync { cause: Cause::Store, lists_started_at: None }));
        plan.request(Cause::Interval);
        assert_eq!(cause(&plan), Some(Cause::Store));
        plan.lists_done(false, true);
        assert_eq!(plan.pending, Some(Resync { cause: Cause::Start, lists_started_at: Some(start) }), "lists do");
        plan.cancel();
        assert_eq!(plan.pending, None);
    }

    #[test]
    fn a_skipped_namespace_leads_to_a_resync_when_it_is_synced() {
        let (mut plan, _) = plan();
        plan.skip("etl");
        plan.request_if_synced(|namespace| namespace == "ml");
        assert_eq!(plan.pending, None);
        plan.request_if_synced(|namespace| namespace == "etl");
        assert_eq!(plan.pending, Some(Resync { cause: Cause::Interval, lists_started_at: None }));
        plan.forget_skipped();
        plan.finish();
        plan.request_if_synced(|_| true);
        assert_eq!(plan.pending, None);
    }
    #[test]
    fn a_request_during_a_resync_leads_to_another_one() {
        let (mut plan, start) = plan();
        plan.lists_done(false, true);
        plan.begin();
        plan.request(Cause::Store);
        plan.request(Cause::Interval);
        assert_eq!(cause(&plan), Some(Cause::Start));
        plan.finish();
        assert_eq!(plan.due(start), Some(Resync { cause: Cause::Store, lists_started_at: None }));
        plan.begin();
        plan.finish();
        assert_eq!(plan.pending, None, "nothing was requested");
    }

    #[test]
    fn an_interrupted_resync_stays_pending_and_covers_what_was_requested_before_it_begins_anew() {
        let (mut plan, start) = plan();
        plan.lists_done(false, true);
        plan.begin();
        plan.request(Cause::Store);
        plan.interrupt();
        assert!(plan.due(start).is_some());
        plan.request(Cause::Store);
        plan.begin();
        plan.finish();
        assert_eq!(plan.pending, None);
    }

    #[test]
    fn an_incomplete_resync_begins_anew_after_pauses_that_double() {
        let (mut plan, mut now) = plan();
        plan.lists_done(false, true);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            plan.begin();
            plan.postpone(now);
            let before = now;
            while plan.due(now).is_none() {
                assert!(plan.pending.is_some());
                now += Duration::from_secs(1);
            }
            pauses.push((now - before).as_secs());
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60]);
        plan.begin();
        plan.finish();
        assert_eq!(plan.pending, None);
        plan.request(Cause::Store);
        assert!(plan.due(now).is_some(), "a later resync does not wait");
        plan.begin();
        plan.postpone(now);
        assert!(plan.due(now + Duration::from_secs(2)).is_some(), "the pauses start anew");
        plan.request(Cause::Interval);
        assert!(plan.due(now).is_none());
        plan.request(Cause::Store);
        assert!(plan.due(now).is_some(), "a store that has lost its ledgers does not wait");
    }

    #[test]
    fn a_new_term_cancels_the_pause_and_what_was_requested() {
        let (mut plan, start) = plan();
        plan.lists_done(false, true);
        plan.begin();
        plan.request(Cause::Store);
        plan.postpone(start);
        plan.cancel();
        assert_eq!(plan.pending, None);
        plan.lists_done(true, true);
        assert!(plan.due(start).is_some());
        plan.begin();
        plan.finish();
        assert_eq!(plan.pending, None);
    }
}
