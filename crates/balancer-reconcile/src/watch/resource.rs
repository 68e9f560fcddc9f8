//! Lists and watches one kind of object in one place, forever, and lists it again when asked.

use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder, Retryable};
use futures::TryStreamExt;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::Waiting;
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
/// Another list is attempted so often, and then given up until it is asked for again.
const RELISTS: usize = 5;
/// The most that all attempts may take: meanwhile the names of all objects that change are kept.
const RELIST_TIMEOUT: Duration = Duration::from_secs(300);

/// A list followed by a watch, resumed when it is interrupted.
pub(super) struct ResourceWatch<K> {
    pub(super) api: Api<K>,
    pub(super) selector: Option<String>,
    /// How long one watch request lasts.
    pub(super) seconds: u32,
    pub(super) events: mpsc::Sender<Waiting>,
    /// Room for listed objects among the events that wait.
    pub(super) list_room: Arc<Semaphore>,
    pub(super) wrap: Box<dyn Fn(Event<K>) -> ClusterEvent + Send + Sync>,
    pub(super) label: WatchedLabel,
    pub(super) metrics: Arc<Metrics>,
    /// Held during a list, because a list ends with the removal of what it did not contain.
    pub(super) listing: Mutex<()>,
    /// Whether the watch cannot go on without a list of its own. Another list is given up for it: it is as good as that one,
    /// and the source is out of sync until its end.
    pub(super) needs_list: watch::Sender<bool>,
}

impl<K: Resource + Clone + DeserializeOwned + Debug + Send + 'static> ResourceWatch<K> {
    /// Starts to list and watch, and to list again whenever that is `asked` for.
    pub(super) fn start(self, asked: &watch::Receiver<()>, tasks: &mut JoinSet<()>) {
        let both = Arc::new(self);
        tasks.spawn(Arc::clone(&both).run());
        tasks.spawn(both.run_relists(asked.clone()));
    }

    /// Runs until nobody receives its events.
    async fn run(self: Arc<Self>) {
        // The resource version to resume from; `None` if a list is needed.
        let mut version = None;
        let pauses = ExponentialBuilder::default().with_min_delay(FIRST_PAUSE).with_max_delay(LAST_PAUSE);
        let pauses = pauses.with_factor(2.0).with_jitter().without_max_times();
        let mut pause = pauses.build();
        loop {
            let started = Instant::now();
            self.needs_list.send_replace(version.is_none());
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
        self.events.send(((self.wrap)(event), None)).await.map_err(|_| WatchError::ReceiverDropped)
    }

    async fn send_listed(&self, event: Event<K>) -> Result<(), WatchError> {
        let room = Arc::clone(&self.list_room).acquire_owned().await.map_err(|_| WatchError::ReceiverDropped)?;
        self.events.send(((self.wrap)(event), Some(room))).await.map_err(|_| WatchError::ReceiverDropped)
    }

    /// Lists again whenever that is asked for, until nobody can ask or receives the events.
    async fn run_relists(self: Arc<Self>, mut asked: watch::Receiver<()>) {
        let pauses = ExponentialBuilder::default().with_min_delay(LAST_PAUSE / 2).with_max_delay(LAST_PAUSE);
        let mut needs_list = self.needs_list.subscribe();
        while asked.changed().await.is_ok() {
            let attempts = async {
                // The time of the attempts begins when they may.
                let _listing = self.listing.lock().await;
                let may_retry = |error: &WatchError| !matches!(error, WatchError::ReceiverDropped);
                let relist = || self.relist();
                let retried = relist.retry(pauses.with_max_times(RELISTS - 1)).sleep(sleep).when(may_retry);
                timeout(RELIST_TIMEOUT, retried).await.unwrap_or(Err(WatchError::ListTooSlow(RELIST_TIMEOUT)))
            };
            let result = tokio::select! {
                biased;
                _ = needs_list.wait_for(|needs_list| *needs_list) => continue,
                result = attempts => result,
            };
            let Err(error) = result else { continue };
            self.metrics.relist_failed(self.label);
            if self.send(Event::RelistFailed(error)).await.is_err() {
                return;
            }
        }
    }

    async fn relist(&self) -> Result<(), WatchError> {
        // Before the request: the list contains all that the watch has reported until then.
        self.send(Event::Relist).await?;
        self.list_pages(Event::RelistApply).await?;
        self.send(Event::RelistDone).await
    }

    /// Reports all objects, and stores the version from which to watch.
    async fn list(&self, version: &mut Option<String>) -> Result<(), WatchError> {
        let _listing = self.listing.lock().await;
        self.send(Event::Init).await?;
        let listed = self.list_pages(Event::InitApply).await?;
        // Before its end is known, because another list may be asked for then.
        self.needs_list.send_replace(false);
        self.send(Event::InitDone).await?;
        *version = listed;
        Ok(())
    }

    /// Reports all objects. Returns the version of the list.
    async fn list_pages(&self, event: impl Fn(K) -> Event<K>) -> Result<Option<String>, WatchError> {
        let mut list = ListParams { label_selector: self.selector.clone(), limit: Some(PAGE), ..ListParams::default() };
        loop {
            let page = timeout(PAGE_TIMEOUT, self.api.list(&list)).await;
            let page = page.map_err(|_| WatchError::TimedOut(PAGE_TIMEOUT))?.map_err(|error| match error.into() {
                WatchError::Expired => WatchError::ListExpired,
                error => error,
            })?;
            for item in page.items {
                self.send_listed(event(item)).await?;
            }
            list.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if list.continue_token.is_none() {
                return Ok(page.metadata.resource_version);
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

#[cfg(test)]
mod tests {
    use balancer_runtime::admin;
    use http::{Request, Response};
    use kube::Client;
    use kube::client::Body;
    use prometheus_client::registry::Registry;
    use serde_json::{Value, json};
    use tower_test::mock::{self, Handle, SendResponse};

    use super::super::pod::WatchedPod;
    use super::*;
    use crate::controller::tests::{metric, refusal};

    /// Listed objects that may wait.
    const LIST_ROOM: usize = 8;

    /// A watch of pods whose API is the test.
    struct Bench {
        api: Handle<Request<Body>, Response<Body>>,
        ask: watch::Sender<()>,
        events: mpsc::Receiver<Waiting>,
        registry: Registry,
        _tasks: JoinSet<()>,
    }

    impl Bench {
        /// Its first list has ended, and its watch is under way.
        async fn watching() -> (Self, SendResponse<Response<Body>>) {
            let (service, api) = mock::pair();
            let (events, received) = mpsc::channel(64);
            let mut registry = admin::registry("test");
            let metrics = Arc::new(Metrics::register(&mut registry));
            let (ask, asked) = watch::channel(());
            let mut tasks = JoinSet::new();
            let pods = ResourceWatch {
                api: Api::<WatchedPod>::all(Client::new(service, "default")),
                selector: None,
                seconds: 30,
                events,
                list_room: Arc::new(Semaphore::new(LIST_ROOM)),
                wrap: Box::new(|event| ClusterEvent::Pods(None, event)),
                label: WatchedLabel::Pods,
                metrics,
                listing: Mutex::default(),
                needs_list: watch::Sender::new(true),
            };
            pods.start(&asked, &mut tasks);
            let mut bench = Self { api, ask, events: received, registry, _tasks: tasks };
            bench.answer_list().await;
            let (query, watching) = bench.request().await;
            assert!(query.contains("watch="), "{query}");
            assert_eq!([bench.event().await, bench.event().await], ["Init", "InitDone"]);
            (bench, watching)
        }

        async fn request(&mut self) -> (String, SendResponse<Response<Body>>) {
            next_request_of(&mut self.api).await
        }

        async fn answer_list(&mut self) {
            let (query, list) = self.request().await;
            assert!(!query.contains("watch="), "{query}");
            list.send_response(ok(&json!({"metadata": {"resourceVersion": "7"}, "items": []})));
        }

        async fn event(&mut self) -> &'static str {
            event_of(&mut self.events).await
        }
    }

    async fn next_request_of(
        api: &mut Handle<Request<Body>, Response<Body>>,
    ) -> (String, SendResponse<Response<Body>>) {
        let (request, answer) = api.next_request().await.expect("a request");
        (request.uri().query().unwrap_or_default().to_owned(), answer)
    }

    async fn event_of(events: &mut mpsc::Receiver<Waiting>) -> &'static str {
        match events.recv().await {
            Some((ClusterEvent::Pods(None, event), _)) => match event {
                Event::Init => "Init",
                Event::InitDone => "InitDone",
                Event::Relist => "Relist",
                Event::RelistApply(_) => "RelistApply",
                Event::RelistDone => "RelistDone",
                Event::RelistFailed(WatchError::ListTooSlow(_)) => "RelistTooSlow",
                Event::RelistFailed(_) => "RelistFailed",
                Event::Disconnected(WatchError::Expired) => "Expired",
                Event::Resumed => "Resumed",
                Event::Delete(_) => "Delete",
                _ => "another event",
            },
            _ => "nothing",
        }
    }

    fn ok(body: &Value) -> Response<Body> {
        Response::new(Body::from(body.to_string().into_bytes()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_next_to_the_watch_gives_way_to_the_list_that_the_watch_needs() {
        let (mut bench, watching) = Bench::watching().await;
        bench.ask.send_replace(());
        let (_, _hangs) = bench.request().await;
        assert_eq!(bench.event().await, "Relist");
        let started = Instant::now();
        watching.send_response(refusal(410, "Expired"));
        bench.answer_list().await;
        let events = [bench.event().await, bench.event().await, bench.event().await];
        assert_eq!(events, ["Expired", "Init", "InitDone"]);
        assert!(started.elapsed() < LAST_PAUSE, "{:?}", started.elapsed());
        // The watch's list was as good as that one. The next is made when it is asked for.
        let (query, watching) = bench.request().await;
        assert!(query.contains("watch=") && query.contains("resourceVersion=7"), "{query}");
        watching.send_response(ok(&json!({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "8"}}})));
        assert_eq!(bench.event().await, "Resumed");
        bench.ask.send_replace(());
        loop {
            let (query, answer) = bench.request().await;
            if !query.contains("watch=") {
                answer.send_response(ok(&json!({"metadata": {"resourceVersion": "9"}, "items": []})));
                break;
            }
        }
        let mut seen = Vec::new();
        while seen.last() != Some(&"RelistDone") {
            seen.push(bench.event().await);
        }
        assert!(seen.contains(&"Relist"), "{seen:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_next_to_the_watch_is_attempted_some_times_and_its_failure_is_counted_once() {
        let (mut bench, _watching) = Bench::watching().await;
        bench.ask.send_replace(());
        for _ in 0..RELISTS {
            let (query, answer) = bench.request().await;
            assert!(!query.contains("watch="), "{query}");
            assert_eq!(bench.event().await, "Relist");
            answer.send_response(refusal(500, "InternalError"));
        }
        assert_eq!(bench.event().await, "RelistFailed");
        assert_eq!(metric(&bench.registry, "reconcile_relist_failures_total{resource=\"pods\"}"), 1.0);
        // The watch, which gets no answer here, goes on.
        for _ in 0..3 {
            let (query, _) = bench.request().await;
            assert!(query.contains("watch="), "it is not attempted again: {query}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_watch_reports_finds_room_next_to_a_long_list() {
        let (mut bench, watching) = Bench::watching().await;
        bench.ask.send_replace(());
        let (_, list) = bench.request().await;
        let items: Vec<_> = (0..1000).map(|id| json!({"metadata": {"name": id.to_string()}})).collect();
        list.send_response(ok(&json!({"metadata": {"resourceVersion": "9"}, "items": items})));
        sleep(LAST_PAUSE).await;
        let object = json!({"metadata": {"name": "0", "resourceVersion": "10"}});
        watching.send_response(ok(&json!({"type": "DELETED", "object": object})));
        sleep(FIRST_PAUSE / 2).await;
        let waiting = bench.events.len();
        let mut events = Vec::new();
        for _ in 0..waiting {
            events.push(bench.event().await);
        }
        let listed = ["RelistApply"; LIST_ROOM];
        assert_eq!(events, [&["Relist"], &listed[..], &["Resumed", "Delete"]].concat());
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_that_is_asked_for_after_that_of_the_watch_is_made() {
        let (mut bench, watching) = Bench::watching().await;
        watching.send_response(refusal(410, "Expired"));
        bench.answer_list().await;
        assert_eq!([bench.event().await, bench.event().await, bench.event().await], ["Expired", "Init", "InitDone"]);
        bench.ask.send_replace(());
        let (query, _list) = bench.request().await;
        assert!(!query.contains("watch="), "{query}");
        assert_eq!(bench.event().await, "Relist");
    }

    #[tokio::test(start_paused = true)]
    async fn the_attempts_of_a_list_next_to_the_watch_have_a_time_together() {
        let (mut bench, _watching) = Bench::watching().await;
        bench.ask.send_replace(());
        let started = Instant::now();
        let mut seen = Vec::new();
        let mut unanswered = Vec::new();
        while !seen.last().is_some_and(|event: &&str| event.starts_with("Relist") && *event != "Relist") {
            tokio::select! {
                (query, answer) = next_request_of(&mut bench.api) => {
                    // Pages without end: each is answered in time, and another one follows.
                    if query.contains("watch=") {
                        unanswered.push(answer);
                    } else {
                        sleep(PAGE_TIMEOUT / 2).await;
                        answer.send_response(ok(&json!({"metadata": {"resourceVersion": "9", "continue": "more"}, "items": []})));
                    }
                }
                event = event_of(&mut bench.events) => seen.push(event),
            }
        }
        assert_eq!(seen.last(), Some(&"RelistTooSlow"));
        assert!(started.elapsed() < RELIST_TIMEOUT + PAGE_TIMEOUT, "{:?}", started.elapsed());
        assert_eq!(metric(&bench.registry, "reconcile_relist_failures_total{resource=\"pods\"}"), 1.0);
    }
}
