//! The watches: of executors and drivers, and of nodes as far as their metadata tells.
//!
//! Each is a list and then a watch from there, taken up again where it broke off, as client-go's reflector
//! does it. It is ours, and not kube's `watcher`, since it has to tell when it is out of step with the
//! cluster and when it is in step again: a view that does not see must not have anything struck.

use std::collections::{HashMap, HashSet};
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use balancer_core::{Conventions, Profile};
use balancer_runtime::cluster;
use futures::TryStreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, PartialObjectMeta, WatchEvent, WatchParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::metrics::{Metrics, WatchedLabel};
use crate::view::View;
use crate::watched::WatchedPod;

/// Pods in one answer: some 4 MB of them.
const PAGE: u32 = 500;
/// From asking for a page to having all of it.
const PAGE_LIMIT: Duration = Duration::from_secs(60);
/// From asking for a watch to its beginning, where the watch itself lasts no shorter: meanwhile nothing is
/// heard.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);
/// A watch that has not ended so long after it should have is dead.
const OVERDUE: Duration = Duration::from_secs(2);
/// No answer of the API is silent for so long: neither a watch nor a page lasts longer than a minute.
pub(crate) const SILENCE: Duration = Duration::from_secs(75);
/// Between two attempts, from the first to the last, doubling.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LAST: Duration = Duration::from_secs(2);
/// A watch that goes on after a break first tells what has happened meanwhile. So long that takes, at most.
const CATCH_UP: Duration = Duration::from_secs(1);
/// How long lists that cannot be had are tried again while others can: a namespace that is not there, or is
/// forbidden, is no reason to leave the others.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often an outage is told while it lasts.
pub(crate) const TELL_EVERY: Duration = Duration::from_secs(30);
/// Words that wait to be heard; the watches wait for those.
const MOST_UNHEARD: usize = 1024;

/// What is watched: whose, and where.
#[derive(Clone)]
pub(crate) struct Sources {
    pub(crate) client: Client,
    pub(crate) conventions: Arc<Conventions>,
    /// Empty for all.
    pub(crate) namespaces: Vec<Arc<str>>,
    /// How long a placement may wait for its pod.
    pub(crate) grace: Duration,
}

/// One word from a watch.
pub(crate) struct Word(Said);

#[expect(clippy::large_enum_variant, reason = "a box for each pod would cost more than the room")]
enum Said {
    /// Of a namespace's pods, or of all.
    Pods(Option<Arc<str>>, News<WatchedPod>),
    /// Of the nodes.
    Nodes(News<PartialObjectMeta<Node>>),
}

/// What a watch has to tell.
enum News<K> {
    ListBegins,
    Listed(K),
    /// What the list did not name is gone.
    ListEnds,
    Now(K),
    Gone(K),
    /// It sees no longer what happens, and why.
    Broken(Ended),
    /// It sees again.
    Mended,
}

/// A source that does not see what happens.
#[derive(Clone, Copy, Debug)]
struct Blind {
    /// Until when, once it sees again: it has to catch up.
    until: Option<Instant>,
    /// When it was last told.
    told: Instant,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Source {
    Pods(Option<Arc<str>>),
    Nodes,
}

/// All that is watched, from the beginning. Dropping it ends it.
pub(crate) struct Watches {
    words: mpsc::Receiver<Word>,
    /// Whose lists were never complete yet.
    unlisted: HashSet<Source>,
    blind: HashMap<Source, Blind>,
    /// Since when some of it is seen.
    sees_since: Option<Instant>,
    tasks: JoinSet<()>,
}

impl Sources {
    /// Begins to watch.
    pub(crate) fn watch(&self, metrics: &Arc<Metrics>) -> Watches {
        let Self { client, conventions, namespaces, grace } = self;
        let Conventions { workload_role_label, driver_role_value, executor_role_value, .. } = &**conventions;
        // A connection that the network has dropped without a word is noticed when its watch should have
        // ended: within the grace, or placements would be struck whose pods we did not hear of.
        let seconds = u32::try_from(grace.as_secs() / 2).unwrap_or(u32::MAX).clamp(2, 60);
        let (say, words) = mpsc::channel(MOST_UNHEARD);
        let (mut tasks, mut unlisted) = (JoinSet::new(), HashSet::from([Source::Nodes]));
        let nodes = Follow {
            api: Api::<PartialObjectMeta<Node>>::all(client.clone()),
            selector: None,
            seconds,
            words: say.clone(),
            word: Box::new(|news| Word(Said::Nodes(news))),
            watched: WatchedLabel::Nodes,
            metrics: Arc::clone(metrics),
        };
        tasks.spawn(nodes.run());
        let scopes = match namespaces.as_slice() {
            [] => vec![None],
            some => some.iter().cloned().map(Some).collect(),
        };
        for scope in scopes {
            unlisted.insert(Source::Pods(scope.clone()));
            let api: Api<WatchedPod> = match &scope {
                None => Api::all(client.clone()),
                Some(namespace) => Api::namespaced(client.clone(), namespace),
            };
            let pods = Follow {
                api,
                selector: Some(format!("{workload_role_label} in ({driver_role_value},{executor_role_value})")),
                seconds,
                words: say.clone(),
                word: Box::new(move |news| Word(Said::Pods(scope.clone(), news))),
                watched: WatchedLabel::Pods,
                metrics: Arc::clone(metrics),
            };
            tasks.spawn(pods.run());
        }
        Watches { words, unlisted, blind: HashMap::new(), sees_since: None, tasks }
    }

    /// Whether the namespace's pods are watched.
    pub(crate) fn covers(&self, namespace: &str) -> bool {
        self.namespaces.is_empty() || self.namespaces.iter().any(|watched| **watched == *namespace)
    }
}

impl Watches {
    /// The next word; the watches never end.
    pub(crate) async fn next(&mut self) -> Word {
        loop {
            tokio::select! {
                biased;
                Some(word) = self.words.recv() => return word,
                // A watch that has panicked tells nothing any more: the loop has to begin anew.
                Some(Err(error)) = self.tasks.join_next() => if let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic)
                },
                else => std::future::pending().await,
            }
        }
    }

    /// Whether every list was complete at least once.
    pub(crate) fn listed(&self) -> bool {
        self.unlisted.is_empty()
    }

    /// Whether each list is complete, or could not be had at the last attempt.
    fn settled(&self) -> bool {
        let broken = |source| self.blind.get(source).is_some_and(|blind: &Blind| blind.until.is_none());
        self.unlisted.iter().all(broken)
    }

    /// Whether the lists that are missing cannot be had, and the others have to do: some of what is watched
    /// has been seen for a while, and the rest was tried again and again meanwhile.
    pub(crate) fn can_do_without(&mut self, watched: &[Arc<str>], now: Instant) -> bool {
        if !self.sight(now).sees_any(watched) {
            self.sees_since = None;
            return false;
        }
        let since = *self.sees_since.get_or_insert(now);
        now.duration_since(since) > PATIENCE && self.settled()
    }

    /// Whether the list of nodes was complete at least once.
    pub(crate) fn knows_nodes(&self) -> bool {
        !self.unlisted.contains(&Source::Nodes)
    }

    /// What happens to whose pods is seen now.
    pub(crate) fn sight(&mut self, now: Instant) -> Sight {
        self.blind.retain(|_, blind| blind.until.is_none_or(|until| until > now));
        let pods = |source: &Source| match source {
            Source::Pods(namespace) => Some(namespace.clone()),
            Source::Nodes => None,
        };
        Sight { blind: self.unlisted.iter().chain(self.blind.keys()).filter_map(pods).collect() }
    }

    /// Tells the view.
    pub(crate) fn tell(&mut self, view: &mut View, word: Word, profile: Profile<'_>) {
        match word.0 {
            Said::Pods(namespace, news) => {
                let of = namespace.as_ref();
                match news {
                    News::ListBegins => view.begin_pods(of),
                    News::Listed(pod) => {
                        view.see_pod(&pod.pod, of);
                        self.note_listing(&Source::Pods(namespace));
                    }
                    News::Now(pod) => view.see_pod(&pod.pod, of),
                    News::Gone(pod) => view.forget_pod(&pod.namespace().unwrap_or_default(), &pod.name_any()),
                    News::ListEnds => {
                        view.end_pods(of);
                        self.note_list(&Source::Pods(namespace));
                    }
                    News::Broken(why) => self.note_broken(Source::Pods(namespace), &why),
                    News::Mended => self.note_mended(&Source::Pods(namespace)),
                }
            }
            Said::Nodes(news) => match news {
                News::ListBegins => view.begin_nodes(),
                News::Listed(node) | News::Now(node) => {
                    let labels = node.labels();
                    view.see_node(&node.name_any(), profile.of_node(|key| labels.get(key).map(String::as_str)));
                }
                News::Gone(node) => view.forget_node(&node.name_any()),
                News::ListEnds => {
                    view.end_nodes();
                    self.note_list(&Source::Nodes);
                }
                News::Broken(why) => self.note_broken(Source::Nodes, &why),
                News::Mended => self.note_mended(&Source::Nodes),
            },
        }
    }

    /// A first list is underway: it can be had, though it is not seen yet.
    fn note_listing(&mut self, source: &Source) {
        if self.unlisted.contains(source) {
            self.blind.remove(source);
        }
    }

    fn note_list(&mut self, source: &Source) {
        self.unlisted.remove(source);
        if self.blind.remove(source).is_some_and(|blind| blind.until.is_none()) {
            source.tell_of_the_end();
        }
    }

    fn note_mended(&mut self, source: &Source) {
        let Some(blind) = self.blind.get_mut(source) else { return };
        if blind.until.is_none() {
            blind.until = Some(Instant::now() + CATCH_UP);
            source.tell_of_the_end();
        }
    }

    /// An outage is told when it begins, and now and then as long as it lasts.
    fn note_broken(&mut self, source: Source, why: &Ended) {
        let now = Instant::now();
        let told = self.blind.get(&source).filter(|blind| blind.until.is_none()).map(|blind| blind.told);
        let silent = told.filter(|told| now.duration_since(*told) < TELL_EVERY);
        let (watched, namespace) = source.names();
        if matches!(why, Ended::Expired) {
            tracing::info!(watched, namespace, "{why}; all is listed again");
        } else if silent.is_none() {
            tracing::warn!(watched, namespace, error = cluster::chain(why), "a watch broke off; it is tried again");
        }
        self.blind.insert(source, Blind { until: None, told: silent.unwrap_or(now) });
    }
}

impl Source {
    fn names(&self) -> (&'static str, Option<&str>) {
        match self {
            Self::Pods(namespace) => (WatchedLabel::Pods.as_str(), namespace.as_deref()),
            Self::Nodes => (WatchedLabel::Nodes.as_str(), None),
        }
    }

    fn tell_of_the_end(&self) {
        let (watched, namespace) = self.names();
        tracing::info!(watched, namespace, "the watch sees again");
    }
}

/// Whose pods are seen.
#[derive(Debug, Default)]
pub(crate) struct Sight {
    /// The namespaces that are not, or `None` for all.
    blind: HashSet<Option<Arc<str>>>,
}

impl Sight {
    /// Whether what happens to the namespace's pods is seen: what is not seen is no reason to strike
    /// anything.
    pub(crate) fn covers(&self, namespace: &str) -> bool {
        self.blind.iter().all(|blind| blind.as_ref().is_some_and(|blind| **blind != *namespace))
    }

    /// Whether anything is seen of what is watched: these namespaces, or all if there are none.
    pub(crate) fn sees_any(&self, watched: &[Arc<str>]) -> bool {
        self.blind.is_empty() || watched.iter().any(|namespace| self.covers(namespace))
    }
}

/// Follows one source for ever.
struct Follow<K> {
    api: Api<K>,
    selector: Option<String>,
    /// How long one watch request lasts.
    seconds: u32,
    words: mpsc::Sender<Word>,
    word: Box<dyn Fn(News<K>) -> Word + Send + Sync>,
    watched: WatchedLabel,
    metrics: Arc<Metrics>,
}

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    /// The reconciler listens no more.
    #[error("nobody listens")]
    Unheard,
    /// The past that it wants to go on from is forgotten: all has to be listed again.
    #[error("the Kubernetes API has forgotten where the watch was")]
    Expired,
    #[error(transparent)]
    Api(Box<kube::Error>),
    /// The API told an error in the middle of a watch.
    #[error("the Kubernetes API ended the watch: {0}")]
    Told(String),
    #[error("the Kubernetes API did not answer within {0:?}")]
    Silent(Duration),
}

impl From<kube::Error> for Ended {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 410 => Self::Expired,
            error => Self::Api(Box::new(error)),
        }
    }
}

impl<K: Resource + Clone + DeserializeOwned + Debug + Send + 'static> Follow<K> {
    async fn run(self) {
        // Where to go on; nothing where all has to be listed.
        let mut at = None;
        let pauses = ExponentialBuilder::default().with_min_delay(PAUSE_FIRST).with_max_delay(PAUSE_LAST);
        let pauses = pauses.with_factor(2.0).with_jitter().without_max_times();
        let mut pause = pauses.build();
        loop {
            let begun = Instant::now();
            let ended = match at.clone() {
                None => self.list(&mut at).await,
                Some(version) => self.watch(version, &mut at).await,
            };
            let Err(ended) = ended else {
                // A watch that ends as it begins is no reason to hurry.
                sleep(PAUSE_FIRST.saturating_sub(begun.elapsed())).await;
                continue;
            };
            if matches!(ended, Ended::Expired) {
                at = None;
            }
            if matches!(ended, Ended::Unheard) || self.say(News::Broken(ended)).await.is_err() {
                return;
            }
            self.metrics.watch_broke(self.watched);
            // One that lasted was no failure at its start.
            if begun.elapsed() > PAUSE_LAST {
                pause = pauses.build();
            }
            sleep(pause.next().unwrap_or(PAUSE_LAST)).await;
        }
    }

    async fn say(&self, news: News<K>) -> Result<(), Ended> {
        self.words.send((self.word)(news)).await.map_err(|_| Ended::Unheard)
    }

    /// Tells all that there is, and notes where the watch is to begin.
    async fn list(&self, at: &mut Option<String>) -> Result<(), Ended> {
        self.say(News::ListBegins).await?;
        let mut list = ListParams { label_selector: self.selector.clone(), limit: Some(PAGE), ..ListParams::default() };
        loop {
            let page = timeout(PAGE_LIMIT, self.api.list(&list)).await.map_err(|_| Ended::Silent(PAGE_LIMIT))??;
            for item in page.items {
                self.say(News::Listed(item)).await?;
            }
            list.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if list.continue_token.is_none() {
                self.say(News::ListEnds).await?;
                *at = page.metadata.resource_version;
                return Ok(());
            }
        }
    }

    /// Tells what happens from a version on, until the watch ends in peace; notes where it is.
    async fn watch(&self, from: String, at: &mut Option<String>) -> Result<(), Ended> {
        let selector = self.selector.clone();
        let params = WatchParams { label_selector: selector, timeout: Some(self.seconds), ..WatchParams::default() };
        let lasts = Duration::from_secs(self.seconds.into());
        let limit = BEGIN_LIMIT.min(lasts);
        let watch = timeout(limit, self.api.watch(&params, &from)).await.map_err(|_| Ended::Silent(limit))??;
        self.say(News::Mended).await?;
        let mut watch = pin!(watch);
        let most = lasts + OVERDUE;
        while let Some(event) = timeout(most, watch.try_next()).await.map_err(|_| Ended::Silent(most))?? {
            let news = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    *at = object.resource_version();
                    News::Now(object)
                }
                WatchEvent::Deleted(object) => {
                    *at = object.resource_version();
                    News::Gone(object)
                }
                WatchEvent::Bookmark(bookmark) => {
                    *at = Some(bookmark.metadata.resource_version);
                    continue;
                }
                WatchEvent::Error(status) if status.code == 410 => return Err(Ended::Expired),
                WatchEvent::Error(status) => return Err(Ended::Told(status.message)),
            };
            self.say(news).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use balancer_core::Policy;

    use super::*;

    struct Bench {
        watches: Watches,
        view: View,
        _say: mpsc::Sender<Word>,
    }

    /// Watches of these namespaces that nobody runs.
    fn bench(namespaces: &[&str]) -> Bench {
        let (say, words) = mpsc::channel(1);
        let pods = namespaces.iter().map(|namespace| Source::Pods(Some((*namespace).into())));
        let watches = Watches {
            words,
            unlisted: pods.chain([Source::Nodes]).collect(),
            blind: HashMap::new(),
            sees_since: None,
            tasks: JoinSet::new(),
        };
        let view = View::new(Arc::new(Conventions::default()), Policy::default());
        Bench { watches, view, _say: say }
    }

    impl Bench {
        fn pods(&mut self, namespace: &str, news: News<WatchedPod>) {
            self.watches.tell(
                &mut self.view,
                Word(Said::Pods(Some(namespace.into()), news)),
                Conventions::default().profile(),
            );
        }

        fn nodes(&mut self, news: News<PartialObjectMeta<Node>>) {
            self.watches.tell(&mut self.view, Word(Said::Nodes(news)), Conventions::default().profile());
        }

        fn sees(&mut self, namespace: &str, at: Instant) -> bool {
            self.watches.sight(at).covers(namespace)
        }
    }

    fn pod(namespace: &str) -> WatchedPod {
        let pod = serde_json::json!({"metadata": {"name": "e1", "namespace": namespace}});
        serde_json::from_value(pod).expect("a pod")
    }

    fn broken<K>() -> News<K> {
        News::Broken(Ended::Silent(BEGIN_LIMIT))
    }

    #[test]
    fn a_namespace_is_seen_from_its_first_whole_list_on_and_others_do_not_matter() {
        let (mut bench, now) = (bench(&["etl", "ml"]), Instant::now());
        assert!(!bench.sees("etl", now));
        bench.pods("etl", News::ListBegins);
        bench.pods("ml", broken());
        assert!(!bench.sees("etl", now) && !bench.watches.settled());
        bench.pods("etl", News::ListEnds);
        assert!(bench.sees("etl", now) && !bench.sees("ml", now));
        bench.nodes(News::ListEnds);
        assert!(bench.watches.settled() && !bench.watches.listed());
        bench.pods("ml", News::ListEnds);
        assert!(bench.sees("ml", now) && bench.watches.listed());
    }

    #[test]
    fn what_cannot_be_had_is_done_without_once_the_others_were_seen_for_a_while() {
        let (mut bench, start) = (bench(&["etl", "ml"]), Instant::now());
        let watched: [Arc<str>; 2] = ["etl".into(), "ml".into()];
        let can = |bench: &mut Bench, after: Duration| bench.watches.can_do_without(&watched, start + after);
        bench.nodes(News::ListEnds);
        bench.pods("ml", broken());
        bench.pods("etl", broken());
        assert!(!can(&mut bench, 5 * PATIENCE), "nothing is seen");
        bench.pods("etl", News::ListEnds);
        assert!(!can(&mut bench, 6 * PATIENCE), "it is seen only now");
        assert!(!can(&mut bench, 7 * PATIENCE));
        assert!(can(&mut bench, 8 * PATIENCE));
        bench.pods("ml", News::ListBegins);
        bench.pods("ml", News::Listed(pod("ml")));
        assert!(!can(&mut bench, 9 * PATIENCE), "it is being listed");
        assert!(!bench.sees("ml", start), "half a list is no sight");
        bench.pods("ml", broken());
        assert!(can(&mut bench, 9 * PATIENCE));
    }

    #[test]
    fn a_watch_that_goes_on_sees_again_once_it_has_caught_up_and_stays_so_when_it_is_renewed() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", News::ListEnds);
        bench.pods("etl", broken());
        let now = Instant::now();
        assert!(!bench.sees("etl", now + 100 * CATCH_UP));
        bench.pods("etl", News::Mended);
        assert!(!bench.sees("etl", now));
        assert!(bench.sees("etl", Instant::now() + CATCH_UP));
        for _ in 0..3 {
            bench.pods("etl", News::Mended);
            assert!(bench.sees("etl", now));
        }
    }

    #[test]
    fn a_new_list_sees_at_once() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", News::ListEnds);
        bench.pods("etl", broken());
        bench.pods("etl", News::ListBegins);
        assert!(!bench.sees("etl", Instant::now()));
        bench.pods("etl", News::ListEnds);
        assert!(bench.sees("etl", Instant::now()));
    }

    #[test]
    fn nodes_that_are_not_seen_have_no_executor_struck() {
        let mut bench = bench(&["etl"]);
        bench.pods("etl", News::ListEnds);
        bench.nodes(broken());
        assert!(bench.sees("etl", Instant::now()));
    }
}
