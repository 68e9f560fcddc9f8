//! Lists and watches one kind of object in one place, forever.

use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use futures::TryStreamExt;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::event::{ClusterEvent, Event, WatchError};
use crate::metrics::{Metrics, WatchedLabel};

/// Objects in one page of a list: some 4 MB of pods.
const PAGE: u32 = 500;
/// From the request of a page to its end.
const PAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// From the request of a watch to its start, unless the watch itself is shorter: until then no change is reported.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// A watch that has not ended so long after its time is dead.
const OVERDUE: Duration = Duration::from_secs(2);
/// The first and the longest pause between two attempts; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// A list followed by a watch, resumed when it is interrupted.
pub(super) struct ResourceWatch<K> {
    pub(super) api: Api<K>,
    pub(super) selector: Option<String>,
    /// How long one watch request lasts.
    pub(super) seconds: u32,
    pub(super) events: mpsc::Sender<ClusterEvent>,
    pub(super) wrap: Box<dyn Fn(Event<K>) -> ClusterEvent + Send + Sync>,
    pub(super) label: WatchedLabel,
    pub(super) metrics: Arc<Metrics>,
}

impl<K: Resource + Clone + DeserializeOwned + Debug + Send + 'static> ResourceWatch<K> {
    /// Runs until nobody receives its events.
    pub(super) async fn run(self) {
        // The resource version to resume from; `None` if a list is needed.
        let mut version = None;
        let pauses = ExponentialBuilder::default().with_min_delay(FIRST_PAUSE).with_max_delay(LAST_PAUSE);
        let pauses = pauses.with_factor(2.0).with_jitter().without_max_times();
        let mut pause = pauses.build();
        loop {
            let started = Instant::now();
            let result = match version.clone() {
                None => self.list(&mut version).await,
                Some(from) => self.watch(from, &mut version).await,
            };
            let Err(error) = result else {
                // A watch that ends at once must not be repeated at once.
                sleep(FIRST_PAUSE.saturating_sub(started.elapsed())).await;
                continue;
            };
            if matches!(error, WatchError::Expired) {
                version = None;
            }
            if matches!(error, WatchError::ReceiverDropped) || self.send(Event::Disconnected(error)).await.is_err() {
                return;
            }
            self.metrics.watch_restarted(self.label);
            // A watch that lasted for a while did not fail at its start.
            if started.elapsed() > LAST_PAUSE {
                pause = pauses.build();
            }
            sleep(pause.next().unwrap_or(LAST_PAUSE)).await;
        }
    }

    async fn send(&self, event: Event<K>) -> Result<(), WatchError> {
        self.events.send((self.wrap)(event)).await.map_err(|_| WatchError::ReceiverDropped)
    }

    /// Reports all objects, and stores the version from which to watch.
    async fn list(&self, version: &mut Option<String>) -> Result<(), WatchError> {
        self.send(Event::Init).await?;
        let mut list = ListParams { label_selector: self.selector.clone(), limit: Some(PAGE), ..ListParams::default() };
        loop {
            let page =
                timeout(PAGE_TIMEOUT, self.api.list(&list)).await.map_err(|_| WatchError::TimedOut(PAGE_TIMEOUT))??;
            for item in page.items {
                self.send(Event::InitApply(item)).await?;
            }
            list.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if list.continue_token.is_none() {
                self.send(Event::InitDone).await?;
                *version = page.metadata.resource_version;
                return Ok(());
            }
        }
    }

    /// Reports the changes since a version until the watch ends normally, and stores how far it came.
    async fn watch(&self, from: String, version: &mut Option<String>) -> Result<(), WatchError> {
        let selector = self.selector.clone();
        let params = WatchParams { label_selector: selector, timeout: Some(self.seconds), ..WatchParams::default() };
        let lasts = Duration::from_secs(self.seconds.into());
        let start_timeout = START_TIMEOUT.min(lasts);
        let watch = timeout(start_timeout, self.api.watch(&params, &from))
            .await
            .map_err(|_| WatchError::TimedOut(start_timeout))??;
        self.send(Event::Resumed).await?;
        let mut watch = pin!(watch);
        let end_timeout = lasts + OVERDUE;
        while let Some(event) =
            timeout(end_timeout, watch.try_next()).await.map_err(|_| WatchError::TimedOut(end_timeout))??
        {
            let event = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    *version = object.resource_version();
                    Event::Apply(object)
                }
                WatchEvent::Deleted(object) => {
                    *version = object.resource_version();
                    Event::Delete(object)
                }
                WatchEvent::Bookmark(bookmark) => {
                    *version = Some(bookmark.metadata.resource_version);
                    continue;
                }
                WatchEvent::Error(status) if status.code == 410 => return Err(WatchError::Expired),
                WatchEvent::Error(status) => return Err(WatchError::Ended(status.message)),
            };
            self.send(event).await?;
        }
        Ok(())
    }
}
