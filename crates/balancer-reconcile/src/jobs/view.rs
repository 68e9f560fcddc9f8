//! The facts of all jobs, kept up to date by the loop while somebody asks for them, and published to other threads.
//! [`JobsView`] is pure: the clock is the caller's.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{JobId, SpotState};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::JobFacts;
use crate::audit::RecordAudit;
use crate::index::ClusterIndex;
use crate::state::State;

/// For so long after a request, facts are kept up to date.
const ASKED_FOR: Duration = Duration::from_secs(30);
/// From one publication to the next.
const PERIOD: Duration = Duration::from_secs(1);
/// Jobs whose facts are computed before others have their turn in the loop, however large these jobs are.
const STEP: usize = 512;
/// In so many rounds, each job is computed again although nothing is known to have changed.
const ROUNDS: usize = 10;
/// Facts that were published longer ago than this are not shown.
const MAX_AGE: Duration = Duration::from_secs(4);
/// The longest that a request waits for facts.
const WAIT: Duration = Duration::from_secs(5);

/// What the loop has published last.
#[derive(Clone, Debug, Default)]
enum Published {
    /// Nothing yet.
    #[default]
    Nothing,
    /// Another process leads.
    StandingBy {
        leader: Option<Arc<str>>,
        at: Instant,
    },
    Jobs {
        jobs: Jobs,
        at: Instant,
    },
}

/// The facts of all jobs, in no order.
pub(crate) type Jobs = Arc<[Arc<JobFacts>]>;

impl Published {
    fn is_at_least(&self, oldest: Instant) -> bool {
        match self {
            Self::Nothing => false,
            Self::StandingBy { at, .. } | Self::Jobs { at, .. } => *at >= oldest,
        }
    }
}

/// Why there are no facts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoFacts {
    #[error("this replica stands by, and the leader is not known; retry, or read the holder of the Lease")]
    StandsBy,
    #[error("this replica stands by; ask the leader, {0}")]
    Follows(Arc<str>),
    #[error("the reconciler has published nothing within {WAIT:?}: it starts, or waits for the cluster; retry")]
    Nothing,
}

/// Both ends of what the loop publishes.
pub fn channel() -> (Publisher, Reader) {
    let (asked, is_asked) = watch::channel(None);
    let (sender, published) = watch::channel(Published::default());
    (Publisher { asked: is_asked, published: sender }, Reader { asked: Arc::new(asked), published })
}

/// The end of the loop.
#[derive(Debug)]
pub struct Publisher {
    /// When facts were asked for last.
    asked: watch::Receiver<Option<Instant>>,
    published: watch::Sender<Published>,
}

impl Publisher {
    /// Whether facts were asked for lately.
    fn is_asked(&self, now: Instant) -> bool {
        self.asked.borrow().is_some_and(|asked| now.saturating_duration_since(asked) < ASKED_FOR)
    }

    /// Sees each request.
    pub(crate) fn requests(&self) -> Requests {
        Requests(self.asked.clone())
    }

    /// Publishes the facts of all jobs, as they are now.
    pub fn publish(&self, jobs: Arc<[Arc<JobFacts>]>) {
        self.published.send_replace(Published::Jobs { jobs, at: Instant::now() });
    }

    /// Nobody has asked for a while.
    fn give_up(&self) {
        self.published.send_replace(Published::Nothing);
    }

    /// Publishes that another process leads.
    pub fn stand_by(&self, leader: Option<Arc<str>>) {
        self.published.send_replace(Published::StandingBy { leader, at: Instant::now() });
    }
}

/// The requests for facts.
#[derive(Debug)]
pub(crate) struct Requests(watch::Receiver<Option<Instant>>);

impl Requests {
    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            // Nobody is left to ask.
            std::future::pending().await
        }
    }
}

/// The end of those who show the facts. Clones share it.
#[derive(Clone, Debug)]
pub struct Reader {
    asked: Arc<watch::Sender<Option<Instant>>>,
    published: watch::Receiver<Published>,
}

impl Reader {
    /// The facts of all jobs. The first request waits until they are computed.
    pub(crate) async fn read(&mut self) -> Result<Jobs, NoFacts> {
        let now = Instant::now();
        self.asked.send_replace(Some(now));
        let oldest = now.checked_sub(MAX_AGE).unwrap_or(now);
        let published = timeout(WAIT, self.published.wait_for(|published| published.is_at_least(oldest))).await;
        match published.map(|published| published.map(|published| published.clone())) {
            Ok(Ok(Published::Jobs { jobs, .. })) => Ok(jobs),
            Ok(Ok(Published::StandingBy { leader, .. })) => Err(leader.map_or(NoFacts::StandsBy, NoFacts::Follows)),
            Ok(Ok(Published::Nothing) | Err(_)) | Err(_) => Err(NoFacts::Nothing),
        }
    }
}

/// The facts of all jobs, as far as somebody asks for them. They are computed in rounds, one a second; a round computes the
/// jobs that have changed, and a tenth of the others, and takes as many turns of the loop as it needs.
#[derive(Debug, Default)]
pub(crate) struct JobsView {
    facts: HashMap<Arc<JobId>, Arc<JobFacts>>,
    /// The jobs that have changed since the round began.
    changed: HashSet<Arc<JobId>>,
    /// The jobs that are left in the round.
    round: Vec<Arc<JobId>>,
    /// All jobs in the order in which each is computed again, and the first one of the next round.
    turns: (Vec<Arc<JobId>>, usize),
    published: Jobs,
    /// Whether facts differ from those that were published.
    differs: bool,
    /// When the next step is due; `None` if nobody asks.
    due: Option<Instant>,
}

impl JobsView {
    /// Something about the job has changed.
    pub(crate) fn insert(&mut self, job: &Arc<JobId>) {
        if self.due.is_some() && !self.changed.contains(job) {
            self.changed.insert(Arc::clone(job));
        }
    }

    /// When the next step is due.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Somebody asks.
    fn start(&mut self, now: Instant) {
        self.due.get_or_insert(now);
    }

    /// Computes some of the facts. Returns what to publish if that ends a round.
    fn step(&mut self, index: &ClusterIndex, audit: &RecordAudit, now: Instant) -> Option<Jobs> {
        if self.round.is_empty() {
            self.begin_round(index);
        }
        for _ in 0..STEP {
            let Some(job) = self.round.pop() else { return Some(self.end_round(now)) };
            let stored = audit.policy(&job, index.desired_driver(&job));
            let spot = audit.steering(&job).map_or(&SpotState::Open, |steering| &steering.spot);
            let facts = index.facts(&job, stored, spot);
            self.set(job, facts);
        }
        None
    }

    /// The next round is due. The first one has all jobs.
    fn begin_round(&mut self, index: &ClusterIndex) {
        if self.facts.is_empty() {
            self.changed.clear();
            self.round.extend(index.jobs().cloned());
            return;
        }
        let Self { changed, round, turns: (all, next), facts, .. } = self;
        if *next >= all.len() {
            (*all, *next) = (facts.keys().cloned().collect(), 0);
        }
        let again = all.iter().skip(*next).take(facts.len().div_ceil(ROUNDS)).filter(|job| !changed.contains(*job));
        round.extend(again.cloned());
        *next += facts.len().div_ceil(ROUNDS);
        round.extend(changed.drain());
    }

    /// The job's facts are these; `None` if it has ended.
    fn set(&mut self, job: Arc<JobId>, facts: Option<JobFacts>) {
        match facts {
            None => self.differs |= self.facts.remove(&job).is_some(),
            Some(facts) if self.facts.get(&job).is_some_and(|known| **known == facts) => {}
            Some(facts) => {
                self.facts.insert(job, Arc::new(facts));
                self.differs = true;
            }
        }
    }

    /// The round has ended. Returns what to publish.
    fn end_round(&mut self, now: Instant) -> Jobs {
        self.due = Some(now + PERIOD);
        if std::mem::take(&mut self.differs) {
            self.published = self.facts.values().cloned().collect();
        }
        Arc::clone(&self.published)
    }
}

impl<L> State<'_, L> {
    /// Takes up or gives up the view, by whether somebody asks for it.
    pub(crate) fn follow_jobs_requests(&mut self) {
        let now = Instant::now();
        if self.reconciler.jobs.is_asked(now) {
            self.jobs_view.start(now);
        } else if self.jobs_view.due.is_some() {
            self.jobs_view = JobsView::default();
            self.reconciler.jobs.give_up();
        }
    }

    /// Only the leader's facts are complete, once it has seen each ledger: those of the ledgers are what it has left there.
    fn shows_jobs(&self) -> bool {
        self.terms.leads() && self.has_resynced
    }

    /// Computes some of the facts, and publishes all of them when a round ends.
    pub(crate) fn update_jobs_view(&mut self) {
        let now = Instant::now();
        if !self.shows_jobs() {
            if self.plan.has_listed() && self.reconciler.leadership.follows() {
                self.reconciler.jobs.stand_by(self.reconciler.leadership.leader());
            }
            self.jobs_view = JobsView { due: Some(now + PERIOD), ..JobsView::default() };
            return;
        }
        let Self { index, audit, jobs_view: view, .. } = self;
        if let Some(jobs) = view.step(index, audit, now) {
            self.reconciler.jobs.publish(jobs);
        }
    }
}

#[cfg(test)]
mod tests {
    use balancer_core::{Conventions, Pod, Policy};
    use serde_json::json;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn job(id: usize) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.to_string() })
    }

    fn facts(job: &JobId, spot: u64) -> Option<JobFacts> {
        Some(JobFacts { namespace: job.namespace.clone(), job_id: job.app_id.clone(), spot, ..JobFacts::default() })
    }

    /// A cluster with so many jobs of three executors each.
    fn index(jobs: usize) -> ClusterIndex {
        let mut index = ClusterIndex::new(Arc::new(Conventions::default()), Policy::default());
        for id in 0..jobs {
            for executor in 0..3 {
                let metadata = json!({
                    "name": format!("{id}-{executor}"), "namespace": "etl", "uid": format!("{id}-{executor}"),
                    "labels": {"spark-role": "executor", "spark-app-selector": id.to_string()},
                });
                let pod = json!({"metadata": metadata, "spec": {}}).to_string();
                index.apply_pod(&serde_json::from_str::<Pod<'_>>(&pod).expect("a pod"), None);
            }
        }
        index
    }

    /// A view of this cluster after its first round.
    fn view(index: &ClusterIndex, now: Instant) -> JobsView {
        let mut view = JobsView::default();
        view.start(now);
        assert_eq!(view.step(index, &RecordAudit::default(), now).map(|jobs| jobs.len()), Some(index.jobs().count()));
        view
    }

    #[test]
    fn nothing_is_kept_while_nobody_asks() {
        let mut view = JobsView::default();
        view.insert(&job(1));
        assert!(view.changed.is_empty() && view.due().is_none());
    }

    #[test]
    fn one_turn_computes_a_part_of_many_jobs_and_all_of_them_are_published_in_the_end() {
        let (index, audit, now) = (index(5000), RecordAudit::default(), Instant::now());
        let mut view = JobsView::default();
        view.start(now);
        for turn in 1..=5000 / STEP {
            assert!(view.step(&index, &audit, now).is_none() && view.due() == Some(now));
            assert_eq!(view.facts.len(), turn * STEP);
        }
        let published = view.step(&index, &audit, now).expect("the end of the round");
        assert_eq!((published.len(), view.due()), (5000, Some(now + SECOND)));
        assert_eq!(published.iter().map(|facts| facts.pending).sum::<u64>(), 15_000);
    }

    #[test]
    fn a_round_has_each_changed_job_once_and_a_tenth_of_the_others() {
        let (index, now) = (index(100), Instant::now());
        let mut view = view(&index, now);
        let mut seen = HashSet::new();
        for _ in 0..ROUNDS {
            [7, 7, 8].into_iter().for_each(|id| view.insert(&job(id)));
            view.begin_round(&index);
            let round: Vec<_> = view.round.drain(..).collect();
            let distinct: HashSet<_> = round.iter().cloned().collect();
            assert!((10..=12).contains(&round.len()) && distinct.len() == round.len(), "{round:?}");
            assert!(distinct.contains(&job(7)) && distinct.contains(&job(8)));
            seen.extend(distinct);
        }
        assert_eq!(seen.len(), 100, "each job had its turn");
    }

    #[test]
    fn what_has_not_changed_is_published_as_it_is() {
        let now = Instant::now();
        let mut view = view(&index(3), now);
        view.set(job(1), facts(&job(1), 0));
        let before = view.end_round(now);
        view.set(job(1), facts(&job(1), 0));
        assert!(Arc::ptr_eq(&before, &view.end_round(now)));
        view.set(job(1), facts(&job(1), 5));
        let after = view.end_round(now);
        assert_eq!(after.iter().map(|facts| facts.spot).sum::<u64>(), 5);
        view.set(job(1), None);
        assert_eq!(view.end_round(now).len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_for_the_first_facts_and_gets_no_old_ones() {
        let (publisher, mut reader) = channel();
        assert!(!publisher.is_asked(Instant::now()));
        assert_eq!(reader.read().await, Err(NoFacts::Nothing));
        assert!(publisher.is_asked(Instant::now()));
        let mut waiting = reader.clone();
        let read = tokio::spawn(async move { waiting.read().await });
        tokio::time::sleep(SECOND).await;
        publisher.publish(Arc::new([]));
        assert!(read.await.expect("a task").is_ok());
        tokio::time::sleep(2 * MAX_AGE).await;
        assert_eq!(reader.read().await, Err(NoFacts::Nothing));
        publisher.stand_by(Some("pod-1".into()));
        assert_eq!(reader.read().await, Err(NoFacts::Follows("pod-1".into())));
        tokio::time::sleep(2 * ASKED_FOR).await;
        assert!(!publisher.is_asked(Instant::now()));
    }
}
