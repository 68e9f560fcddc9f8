//! Lists and watches executors, drivers and nodes, and reports what happens to them as events.
//!
//! Each source is a list followed by a watch, resumed where it was interrupted, as client-go's reflector does it. Another
//! list from time to time finds what a watch has missed, and nothing waits for it: the watch goes on. It is
//! not kube's `watcher`, because the reconciler has to know when it is out of sync with the cluster: entries must never
//! be removed because of an index that is out of sync.

mod event;
mod node;
mod pod;
mod resource;
mod sync;

use std::sync::Arc;
use std::time::Duration;

use balancer_core::Conventions;
use kube::{Api, Client};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::arguments::ReconcileSettings;
use crate::metrics::{Metrics, WatchedLabel};

#[cfg(test)]
pub(crate) use event::WatchError;
pub(crate) use event::{ClusterEvent, Event, Source};
pub(crate) use node::WatchedNode;
pub use pod::WatchedPod;
use resource::ResourceWatch;
pub(crate) use sync::SyncStatus;

/// No answer of the API takes so long without sending anything: neither a watch nor a page lasts longer than a minute.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(75);
/// Events that wait to be received; the watches wait until there is room.
const MAX_WAITING: usize = 1024;
/// Those of them that may be listed objects. Lists are long, and what the watches report must find room next to them.
const MAX_LISTED: usize = 512;

/// An event that waits to be received, and for a listed object the room that it takes.
type Waiting = (ClusterEvent, Option<OwnedSemaphorePermit>);

/// All lists and watches, from their start. Dropping it ends them.
pub(crate) struct WatchSet {
    events: mpsc::Receiver<Waiting>,
    tasks: JoinSet<()>,
    /// Asks for other lists.
    relists: watch::Sender<()>,
}

impl WatchSet {
    /// Starts to list and watch. Nothing is in sync yet.
    pub(crate) fn start(
        client: &Client,
        conventions: &Conventions,
        settings: &ReconcileSettings,
        metrics: &Arc<Metrics>,
    ) -> (Self, SyncStatus) {
        let Conventions { workload_role_label, driver_role_values, executor_role_value, .. } = conventions;
        let seconds = watch_seconds(settings.grace);
        let (sender, events) = mpsc::channel(MAX_WAITING);
        let (relists, asked) = watch::channel(());
        let list_room = Arc::new(Semaphore::new(MAX_LISTED));
        let mut tasks = JoinSet::new();
        let nodes = ResourceWatch {
            api: Api::<WatchedNode>::all(client.clone()),
            selector: None,
            seconds,
            events: sender.clone(),
            list_room: Arc::clone(&list_room),
            wrap: Box::new(ClusterEvent::Nodes),
            label: WatchedLabel::Nodes,
            metrics: Arc::clone(metrics),
            listing: Mutex::default(),
            needs_list: watch::Sender::new(true),
        };
        nodes.start(&asked, &mut tasks);
        for namespace in scopes(&settings.namespaces) {
            let api: Api<WatchedPod> = match &namespace {
                None => Api::all(client.clone()),
                Some(namespace) => Api::namespaced(client.clone(), namespace),
            };
            let pods = ResourceWatch {
                api,
                selector: Some(format!(
                    "{workload_role_label} in ({},{executor_role_value})",
                    driver_role_values.join(",")
                )),
                seconds,
                events: sender.clone(),
                list_room: Arc::clone(&list_room),
                wrap: Box::new(move |event| ClusterEvent::Pods(namespace.clone(), event)),
                label: WatchedLabel::Pods,
                metrics: Arc::clone(metrics),
                listing: Mutex::default(),
                needs_list: watch::Sender::new(true),
            };
            pods.start(&asked, &mut tasks);
        }
        (Self { events, tasks, relists }, SyncStatus::new(scopes(&settings.namespaces)))
    }

    /// Without watches: the test sends their events.
    #[cfg(test)]
    pub(crate) fn of_test() -> (Self, mpsc::Sender<Waiting>) {
        let (sender, events) = mpsc::channel(MAX_WAITING);
        (Self { events, tasks: JoinSet::new(), relists: watch::channel(()).0 }, sender)
    }

    /// Lists everything again. The watches go on meanwhile.
    pub(crate) fn relist(&self) {
        self.relists.send_replace(());
    }

    /// An event that has arrived. Unlike [`WatchSet::next`], it does not stop at the number of polls that tokio lets a task
    /// make in a row.
    pub(crate) fn try_next(&mut self) -> Option<ClusterEvent> {
        self.events.try_recv().ok().map(|(event, _)| event)
    }

    /// How many events have arrived.
    pub(crate) fn waiting(&self) -> usize {
        self.events.len()
    }

    /// Whether a watch may have more to report than there is room for. A watch that was given room and has not used it yet
    /// counts too.
    pub(crate) fn is_full(&self) -> bool {
        self.events.capacity() == 0
    }

    /// The next event. The watches never end.
    ///
    /// # Panics
    /// If a watch has panicked. Its source reports nothing any more, so the reconciler has to restart.
    pub(crate) async fn next(&mut self) -> ClusterEvent {
        loop {
            tokio::select! {
                biased;
                Some((event, _)) = self.events.recv() => return event,
                Some(Err(error)) = self.tasks.join_next() => if let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic)
                },
                else => std::future::pending().await,
            }
        }
    }
}

/// The namespaces whose pods are watched; `None` stands for all.
fn scopes(namespaces: &[Arc<str>]) -> Vec<Option<Arc<str>>> {
    match namespaces {
        [] => vec![None],
        some => some.iter().cloned().map(Some).collect(),
    }
}

/// How many seconds a watch request lasts. A connection that the network has dropped silently is noticed when its watch
/// should have ended. That has to be within the grace, or placements would be removed although their pods exist.
fn watch_seconds(grace: Duration) -> u32 {
    u32::try_from(grace.as_secs() / 2).unwrap_or(u32::MAX).clamp(2, 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[should_panic(expected = "in a watch")]
    async fn next_passes_on_the_panic_of_a_watch() {
        let (mut watches, _sender) = WatchSet::of_test();
        watches.tasks.spawn(async { panic!("in a watch") });
        let _ = watches.next().await;
    }

    #[tokio::test]
    async fn all_events_that_wait_are_received_at_once() {
        let (mut watches, sender) = WatchSet::of_test();
        while sender.try_send((ClusterEvent::Nodes(Event::Resumed), None)).is_ok() {}
        assert!(watches.is_full() && watches.waiting() == MAX_WAITING);
        assert_eq!(std::iter::from_fn(|| watches.try_next()).count(), MAX_WAITING);
    }

    #[test]
    fn a_dropped_connection_is_noticed_within_the_grace() {
        for (grace, seconds) in [(1, 2), (5, 2), (60, 30), (3600, 60)] {
            assert_eq!(watch_seconds(Duration::from_secs(grace)), seconds, "{grace}");
        }
    }

    #[test]
    fn without_namespaces_all_are_watched() {
        assert_eq!(scopes(&[]), [None]);
        assert_eq!(scopes(&["etl".into()]), [Some("etl".into())]);
    }
}
