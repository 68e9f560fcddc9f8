//! Which sources are in sync with the cluster. Pure: the clock is the caller's.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use balancer_runtime::cluster;
use tokio::time::Instant;

use super::event::{Event, Source, WatchError};
use crate::log_limit::LogLimit;

/// A resumed watch first reports what happened meanwhile, which takes at most so long.
const CATCH_UP: Duration = Duration::from_secs(1);
/// How long lists that fail are retried while others succeed. A namespace that does not exist, or is forbidden, is no
/// reason to ignore the others.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the lists of everything next to the watches are waited for. What comes later is taken into account all the same.
const RELIST_PATIENCE: Duration = Duration::from_secs(60);

/// Which sources are in sync: their list was complete, and their watch reports every change.
#[derive(Debug)]
pub(crate) struct SyncStatus {
    pods: Vec<Source>,
    /// The sources whose list was never complete.
    unlisted: HashSet<Source>,
    outages: HashMap<Source, Outage>,
    /// The sources that are listed again, and in sync all the same; until when each is waited for.
    relisting: HashMap<Source, Instant>,
    /// Whether one of these lists has failed.
    has_relist_failed: bool,
    /// When some pods were in sync first, without interruption.
    partly_synced_since: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Outage {
    /// When a resumed watch has caught up; `None` while the watch is disconnected.
    caught_up_at: Option<Instant>,
    logged: LogLimit,
}

impl SyncStatus {
    /// Nothing is in sync yet. `pods` are the namespaces whose pods are watched; `None` is all of them.
    pub(crate) fn new(pods: impl IntoIterator<Item = Option<Arc<str>>>) -> Self {
        let pods: Vec<_> = pods.into_iter().map(Source::Pods).collect();
        let unlisted = pods.iter().cloned().chain([Source::Nodes]).collect();
        Self {
            pods,
            unlisted,
            outages: HashMap::new(),
            relisting: HashMap::new(),
            has_relist_failed: false,
            partly_synced_since: None,
        }
    }

    /// Everything is listed again, except what was never listed: its watch does that. It stays in sync meanwhile.
    pub(crate) fn relist(&mut self, now: Instant) {
        let all = self.pods.iter().cloned().chain([Source::Nodes]);
        let listed = all.filter(|source| !self.unlisted.contains(source));
        self.relisting = listed.map(|source| (source, now + RELIST_PATIENCE)).collect();
    }

    /// A watch may have waited until there was room for its events, so it may not have caught up: its time begins anew.
    pub(crate) fn restart_catch_up(&mut self, now: Instant) {
        for at in self.outages.values_mut().filter_map(|outage| outage.caught_up_at.as_mut()) {
            *at = now + CATCH_UP;
        }
    }

    /// Whether a list of everything next to the watches has failed since the last call.
    pub(crate) fn take_relist_failed(&mut self) -> bool {
        mem::take(&mut self.has_relist_failed)
    }

    /// Takes one event into account, and logs when an outage starts, lasts and ends.
    pub(crate) fn observe<K>(&mut self, source: &Source, event: &Event<K>, now: Instant) {
        match event {
            Event::Init | Event::Apply(_) | Event::Delete(_) | Event::Relist | Event::RelistApply(_) => {}
            // A first list of pods is under way: it is not complete, but it is not failing either. Nodes that were listed
            // before are not waited for.
            Event::InitApply(_) => {
                if *source != Source::Nodes && self.unlisted.contains(source) {
                    self.outages.remove(source);
                }
            }
            Event::InitDone => {
                self.unlisted.remove(source);
                // It has taken the place of the list next to the watch.
                self.relisting.remove(source);
                if self.outages.remove(source).is_some_and(|outage| outage.caught_up_at.is_none()) {
                    log_resumed(source);
                }
            }
            Event::RelistDone => drop(self.relisting.remove(source)),
            Event::RelistFailed(why) => {
                self.relisting.remove(source);
                self.has_relist_failed = true;
                let (resource, namespace) = source.names();
                let error = cluster::chain(why);
                tracing::warn!(resource, namespace, error, "cannot list everything again; retrying later");
            }
            Event::Disconnected(why) => self.disconnected(source, why, now),
            Event::Resumed => {
                let Some(outage) = self.outages.get_mut(source) else { return };
                if outage.caught_up_at.is_none() {
                    outage.caught_up_at = Some(now + CATCH_UP);
                    log_resumed(source);
                }
            }
        }
    }

    fn disconnected(&mut self, source: &Source, why: &WatchError, now: Instant) {
        let known = self.outages.get(source).filter(|outage| outage.caught_up_at.is_none());
        let mut logged = known.map(|outage| outage.logged).unwrap_or_default();
        let (is_due, (resource, namespace)) = (logged.is_due(now), source.names());
        if matches!(why, WatchError::Expired) {
            tracing::info!(resource, namespace, "{why}; listing everything again");
        } else if is_due {
            tracing::warn!(resource, namespace, error = cluster::chain(why), "watch disconnected; retrying");
        }
        let outage = Outage { caught_up_at: None, logged };
        self.outages.insert(source.clone(), outage);
    }

    /// Ends the outages of the watches that have caught up by now. Call it only after the events that waited were applied,
    /// and there was room for others, because from then on entries may be removed.
    pub(crate) fn advance(&mut self, now: Instant) {
        self.outages.retain(|_, outage| outage.caught_up_at.is_none_or(|at| at > now));
    }

    /// Whether the namespace's pods are in sync. If not, an executor that is missing from the index may be alive.
    pub(crate) fn is_synced(&self, namespace: &str) -> bool {
        let concerns = |source: &Source| match source {
            Source::Pods(scope) => scope.as_ref().is_none_or(|scope| **scope == *namespace),
            Source::Nodes => false,
        };
        !self.unlisted.iter().chain(self.outages.keys()).any(concerns)
    }

    /// Whether any of the watched pods are in sync.
    pub(crate) fn is_any_synced(&self) -> bool {
        self.pods.iter().any(|source| !self.unlisted.contains(source) && !self.outages.contains_key(source))
    }

    /// Whether the lists are ready: all were complete at least once, or the missing ones are not available now. Nodes
    /// may be missing only if `had_nodes_before`, because executors would count as what they were meant for.
    pub(crate) fn is_ready(&mut self, had_nodes_before: bool, now: Instant) -> bool {
        if self.relisting.values().any(|until| *until > now) {
            return false;
        }
        if self.unlisted.is_empty() {
            return true;
        }
        (had_nodes_before || !self.unlisted.contains(&Source::Nodes)) && self.has_waited_enough(now)
    }

    /// Whether some pods have been in sync for a while, and each missing list failed at its last attempt.
    fn has_waited_enough(&mut self, now: Instant) -> bool {
        if !self.is_any_synced() {
            self.partly_synced_since = None;
            return false;
        }
        let since = *self.partly_synced_since.get_or_insert(now);
        now.duration_since(since) > PATIENCE && self.is_settled()
    }

    /// Whether each list was complete, or failed at its last attempt.
    fn is_settled(&self) -> bool {
        let is_failing = |source| self.outages.get(source).is_some_and(|outage| outage.caught_up_at.is_none());
        self.unlisted.iter().all(is_failing)
    }
}

fn log_resumed(source: &Source) {
    let (resource, namespace) = source.names();
    tracing::info!(resource, namespace, "watch resumed");
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        status: SyncStatus,
        now: Instant,
    }

    fn bench(namespaces: &[&str]) -> Bench {
        let status = SyncStatus::new(namespaces.iter().map(|namespace| Some((*namespace).into())));
        Bench { status, now: Instant::now() }
    }

    /// The pods of these namespaces and the nodes were listed.
    fn listed(namespaces: &[&str]) -> Bench {
        let mut bench = bench(namespaces);
        for namespace in namespaces {
            bench.pods(namespace, Event::InitDone);
        }
        bench.nodes(Event::InitDone);
        bench
    }

    impl Bench {
        fn pods(&mut self, namespace: &str, event: Event<()>) {
            self.status.observe(&Source::Pods(Some(namespace.into())), &event, self.now);
        }

        fn nodes(&mut self, event: Event<()>) {
            self.status.observe(&Source::Nodes, &event, self.now);
        }

        fn after(&mut self, time: Duration) -> &mut Self {
            self.now += time;
            self.status.advance(self.now);
            self
        }

        fn is_synced(&self, namespace: &str) -> bool {
            self.status.is_synced(namespace)
        }

        fn is_ready(&mut self, had_nodes_before: bool) -> bool {
            self.status.is_ready(had_nodes_before, self.now)
        }
    }

    fn disconnected() -> Event<()> {
        Event::Disconnected(WatchError::TimedOut(Duration::ZERO))
    }

    #[test]
    fn each_namespace_is_synced_from_its_first_complete_list_on() {
        let mut bench = bench(&["etl", "ml"]);
        assert!(!bench.is_synced("etl"));
        bench.pods("etl", Event::Init);
        bench.pods("ml", disconnected());
        assert!(!bench.is_synced("etl") && !bench.status.is_settled() && !bench.status.is_any_synced());
        bench.pods("etl", Event::InitDone);
        assert!(bench.is_synced("etl") && !bench.is_synced("ml") && bench.status.is_any_synced());
        bench.nodes(Event::InitDone);
        assert!(bench.status.is_settled() && !bench.is_ready(true));
        bench.pods("ml", Event::InitDone);
        assert!(bench.is_synced("ml") && bench.is_ready(false));
    }

    #[test]
    fn a_source_of_all_namespaces_concerns_each_of_them() {
        let mut status = SyncStatus::new([None]);
        let (source, now) = (Source::Pods(None), Instant::now());
        assert!(!status.is_synced("etl") && !status.is_any_synced());
        status.observe(&source, &Event::<()>::InitDone, now);
        assert!(status.is_synced("etl") && status.is_any_synced());
        status.observe(&source, &disconnected(), now);
        assert!(!status.is_synced("etl") && !status.is_any_synced());
    }

    #[test]
    fn missing_lists_are_no_longer_waited_for_once_others_were_synced_for_a_while() {
        let mut bench = bench(&["etl", "ml"]);
        bench.nodes(Event::InitDone);
        bench.pods("ml", disconnected());
        bench.pods("etl", disconnected());
        assert!(!bench.after(5 * PATIENCE).is_ready(true), "nothing is synced");
        bench.pods("etl", Event::InitDone);
        assert!(!bench.after(PATIENCE).is_ready(true), "the first sync is recent");
        assert!(!bench.after(PATIENCE).is_ready(true));
        assert!(bench.after(PATIENCE).is_ready(true));
        bench.pods("ml", Event::Init);
        assert!(bench.is_ready(true), "nothing was received yet");
        bench.pods("ml", Event::InitApply(()));
        assert!(!bench.after(PATIENCE).is_ready(true), "the list is under way");
        assert!(!bench.is_synced("ml"), "half a list is not enough");
        bench.pods("ml", disconnected());
        assert!(bench.is_ready(true));
        bench.pods("etl", disconnected());
        assert!(!bench.is_ready(true), "nothing is synced any more");
        bench.pods("etl", Event::InitDone);
        assert!(!bench.is_ready(true), "the wait starts anew");
    }

    #[test]
    fn nodes_have_to_be_listed_once() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", Event::InitDone);
        bench.nodes(disconnected());
        assert!(!bench.is_ready(true));
        assert!(bench.after(2 * PATIENCE).is_ready(true));
        assert!(!bench.is_ready(false));
    }

    #[test]
    fn a_resumed_watch_is_synced_after_the_catch_up_and_stays_so_when_renewed() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", Event::InitDone);
        bench.pods("etl", disconnected());
        assert!(!bench.after(100 * CATCH_UP).is_synced("etl"));
        bench.pods("etl", Event::Resumed);
        assert!(!bench.is_synced("etl"));
        assert!(!bench.after(CATCH_UP / 2).is_synced("etl"));
        bench.pods("etl", Event::Resumed);
        assert!(bench.after(CATCH_UP / 2).is_synced("etl"), "renewal does not start the catch-up anew");
        for _ in 0..3 {
            bench.pods("etl", Event::Resumed);
            assert!(bench.is_synced("etl"));
        }
    }

    #[test]
    fn a_watch_that_disconnects_while_it_catches_up_is_not_synced() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", Event::InitDone);
        bench.pods("etl", disconnected());
        bench.pods("etl", Event::Resumed);
        bench.pods("etl", disconnected());
        assert!(!bench.after(100 * CATCH_UP).is_synced("etl"));
    }

    #[test]
    fn a_new_list_is_synced_at_once() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", Event::InitDone);
        bench.pods("etl", disconnected());
        bench.pods("etl", Event::Init);
        bench.pods("etl", Event::InitApply(()));
        assert!(!bench.is_synced("etl"));
        bench.pods("etl", Event::InitDone);
        assert!(bench.is_synced("etl"));
    }

    #[test]
    fn a_list_of_nodes_under_way_is_not_waited_for_if_nodes_are_known() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", Event::InitDone);
        bench.nodes(disconnected());
        assert!(!bench.is_ready(true), "the first sync is recent");
        bench.after(PATIENCE).nodes(Event::InitApply(()));
        assert!(bench.after(PATIENCE).is_ready(true));
        assert!(!bench.is_ready(false), "nodes were never listed");
    }

    #[test]
    fn what_is_listed_again_stays_in_sync_and_an_outage_does_not_end_by_it() {
        let mut bench = listed(&["etl", "ml"]);
        bench.status.relist(bench.now);
        assert!(bench.is_synced("etl") && !bench.is_ready(true));
        bench.pods("ml", disconnected());
        for event in [Event::Relist, Event::RelistApply(()), Event::RelistDone] {
            bench.pods("ml", event);
        }
        assert!(bench.is_synced("etl") && !bench.is_synced("ml"));
        bench.pods("etl", Event::RelistFailed(WatchError::TimedOut(Duration::ZERO)));
        assert!(bench.is_synced("etl") && !bench.is_ready(true), "the nodes are missing");
        bench.nodes(Event::RelistDone);
        assert!(bench.is_ready(true));
        assert!(bench.status.take_relist_failed() && !bench.status.take_relist_failed());
    }

    #[test]
    fn a_list_that_hangs_next_to_its_watch_is_waited_for_a_while() {
        let mut bench = listed(&["etl", "ml"]);
        bench.status.relist(bench.now);
        bench.pods("etl", Event::RelistDone);
        bench.nodes(Event::RelistDone);
        assert!(!bench.after(RELIST_PATIENCE / 2).is_ready(true));
        assert!(bench.after(RELIST_PATIENCE / 2).is_ready(true));
        bench.status.relist(bench.now);
        assert!(!bench.is_ready(true), "the wait starts anew");
    }

    #[test]
    fn what_was_never_listed_is_not_waited_for_when_everything_is_listed_again() {
        let mut bench = bench(&["etl", "forbidden"]);
        bench.pods("etl", Event::InitDone);
        bench.nodes(Event::InitDone);
        bench.pods("forbidden", disconnected());
        assert!(!bench.is_ready(true));
        assert!(bench.after(2 * PATIENCE).is_ready(true));
        bench.status.relist(bench.now);
        bench.pods("etl", Event::RelistDone);
        bench.nodes(Event::RelistDone);
        assert!(bench.is_ready(true));
    }

    #[test]
    fn the_list_of_a_watch_takes_the_place_of_one_next_to_it() {
        let mut bench = listed(&["etl"]);
        bench.status.relist(bench.now);
        bench.nodes(Event::RelistDone);
        bench.pods("etl", Event::Disconnected(WatchError::Expired));
        bench.pods("etl", Event::Init);
        assert!(!bench.is_ready(true));
        bench.pods("etl", Event::InitDone);
        assert!(bench.is_ready(true) && bench.is_synced("etl") && !bench.status.take_relist_failed());
    }

    #[test]
    fn disconnected_nodes_do_not_concern_pods() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", Event::InitDone);
        bench.nodes(disconnected());
        assert!(bench.is_synced("etl") && bench.status.is_any_synced());
    }
}
