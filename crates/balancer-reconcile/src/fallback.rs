//! When spot is closed and opened for a job, and when its executors that find no spot node are replaced. Pure: the clock
//! is the caller's, and so is every call. The ledger keeps what matters, so another reconciler goes on where this one ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{JobId, SpotState, Steering};
use tokio::time::Instant;

use crate::stuck::{PodVersion, StuckExecutor};

/// From one step of a job to the next, at least.
const MIN_PAUSE: Duration = Duration::from_millis(Steering::REPLACEMENT_PAUSE);
/// An answer about the nodes of executors that is older than this is asked for again.
const CLEARED_FOR: Duration = Duration::from_secs(5);
/// Calls that have not answered after this time never will. Each has a deadline of its own, so this is a defect.
const LOST_AFTER: Duration = Duration::from_secs(120);
/// An executor with a node on its way is looked at again after this time.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(30);
/// After a refusal for want of a right, nothing is replaced in the namespace for this time.
const FORBIDDEN_FOR: Duration = Duration::from_secs(300);
/// After a failure, a job waits for this time, and for twice as long after each further one.
const FIRST_BACKOFF: Duration = Duration::from_secs(30);
const MAX_BACKOFF: Duration = Duration::from_secs(300);

/// What the cluster shows of a job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    /// How long an executor may find no spot node; `None` if it may do so forever.
    pub(crate) fallback: Option<Duration>,
    /// How long spot stays closed.
    pub(crate) retry: Duration,
    /// How many executors are live.
    pub(crate) live: usize,
    pub(crate) stuck: &'a [StuckExecutor],
    pub(crate) probe: Probe,
}

/// Where the executor is that probes spot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Probe {
    /// It has no node, or is not known.
    #[default]
    Waits,
    OnSpot,
    OnOnDemand,
}

/// What to do next for a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    None,
    /// Close spot in the ledger.
    Close {
        retry_after: Duration,
    },
    /// Open spot in the ledger.
    Open,
    /// Ask whether nodes are on their way for these pods.
    Check(Vec<PodVersion>),
    /// Delete these pods.
    Delete(Vec<PodVersion>),
}

/// Why a call about pods has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    /// The Kubernetes API did not answer, or cannot do it now.
    Unavailable,
    /// This process lacks the right.
    Forbidden,
}

/// The answer to [`Step::Check`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Checked {
    /// The pods that have no node on its way.
    pub(crate) clear: Vec<PodVersion>,
    /// The pods that may have one.
    pub(crate) served: Vec<PodVersion>,
    pub(crate) failure: Option<Failure>,
}

/// What became of the deletion of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deletion {
    Deleted,
    /// The pod did not exist.
    Gone,
    /// The pod has changed, or another one has its name.
    Changed,
    Failed(Failure),
}

/// The jobs whose spot is closed, or that have executors that find no spot node.
#[derive(Debug, Default)]
pub(crate) struct Fallback {
    jobs: HashMap<Arc<JobId>, Job>,
    /// The namespaces in which a right is missing, and until when nothing is attempted there.
    forbidden: HashMap<String, Instant>,
}

#[derive(Debug, Default)]
struct Job {
    /// What the ledger has, as far as it is known.
    stored: Spot,
    /// What this reconciler has stored last; `None` if it has stored nothing that still matters.
    wanted: Option<Wanted>,
    closed_since: Option<Instant>,
    phase: Phase,
    /// The pods with a node on its way, by uid, and when to look at them again.
    served: HashMap<String, Instant>,
    not_before: Option<Instant>,
    /// The last pause after a failure.
    backoff: Option<Duration>,
}

/// A [`SpotState`] without the times, which are those of the store's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Spot {
    #[default]
    Open,
    Closed,
    Probing(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Open,
    Closed { retry_at: Instant },
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Idle,
    /// Calls are under way.
    Waiting { since: Instant },
    /// These pods may be deleted, once spot is closed.
    Cleared { pods: Vec<PodVersion>, at: Instant },
    /// The watch has not reported yet what became of these pods.
    Going { deleted: Vec<PodVersion>, changed: Vec<PodVersion> },
}

impl Fallback {
    /// The job's ledger was found with this state, in which spot was closed `age` ago.
    pub(crate) fn observe(&mut self, job: &Arc<JobId>, spot: &SpotState, age: Duration, now: Instant) {
        let stored = match spot {
            SpotState::Open => Spot::Open,
            SpotState::Starved { .. } => Spot::Closed,
            SpotState::Probing { executor, .. } => Spot::Probing(executor.clone()),
        };
        if stored == Spot::Open && !self.jobs.contains_key(job) {
            return;
        }
        let job = self.jobs.entry(Arc::clone(job)).or_default();
        if stored != Spot::Open {
            job.closed_since.get_or_insert(now.checked_sub(age).unwrap_or(now));
        } else if !matches!(job.wanted, Some(Wanted::Closed { .. })) {
            job.closed_since = None;
        }
        job.stored = stored;
    }

    /// The key of the executor that probes spot for the job.
    pub(crate) fn probe(&self, job: &JobId) -> Option<&str> {
        match &self.jobs.get(job)?.stored {
            Spot::Probing(executor) => Some(executor),
            Spot::Open | Spot::Closed => None,
        }
    }

    /// The jobs that may need a step although they have no stuck executor.
    pub(crate) fn jobs(&self) -> impl Iterator<Item = &Arc<JobId>> {
        self.jobs.keys()
    }

    /// Forgets the jobs that have ended.
    pub(crate) fn retain(&mut self, is_live: impl Fn(&JobId) -> bool) {
        let Self { jobs, forbidden } = self;
        jobs.retain(|job, _| is_live(job));
        forbidden.retain(|namespace, _| jobs.keys().any(|job| job.namespace == *namespace));
    }

    /// For how many jobs spot is closed, and for how long for the first of them.
    pub(crate) fn closed(&self, now: Instant) -> (usize, Duration) {
        let closed = self.jobs.values().filter(|job| job.stored != Spot::Open).filter_map(|job| job.closed_since);
        closed.fold((0, Duration::ZERO), |(jobs, oldest), since| (jobs + 1, oldest.max(now.duration_since(since))))
    }

    /// What to do for the job now.
    pub(crate) fn step(&mut self, id: &Arc<JobId>, view: View<'_>, now: Instant) -> Step {
        let is_forbidden = self.forbidden.get(&id.namespace).is_some_and(|until| now < *until);
        if !self.jobs.contains_key(id) && (view.stuck.is_empty() || view.fallback.is_none()) {
            return Step::None;
        }
        self.jobs.entry(Arc::clone(id)).or_default().step(view, is_forbidden, now)
    }

    /// Spot was closed in the job's ledger. Returns whether it was open before.
    pub(crate) fn closed_spot(&mut self, id: &Arc<JobId>, retry_after: Duration, now: Instant) -> bool {
        let job = self.jobs.entry(Arc::clone(id)).or_default();
        job.wanted = Some(Wanted::Closed { retry_at: now + retry_after });
        job.stored = Spot::Closed;
        let is_first = job.closed_since.is_none();
        job.closed_since.get_or_insert(now);
        is_first
    }

    /// Spot was opened in the job's ledger. Returns for how long it was closed.
    pub(crate) fn opened_spot(&mut self, id: &JobId, now: Instant) -> Duration {
        let Some(job) = self.jobs.get_mut(id) else { return Duration::ZERO };
        (job.stored, job.wanted) = (Spot::Open, Some(Wanted::Open));
        job.closed_since.take().map(|since| now.duration_since(since)).unwrap_or_default()
    }

    /// The answer to [`Step::Check`].
    pub(crate) fn checked(&mut self, id: &JobId, answer: Checked, now: Instant) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Checked { clear, served, failure } = answer;
        job.served.extend(served.into_iter().map(|pod| (pod.uid, now + LOOK_AGAIN_AFTER)));
        job.not_before = Some(now + MIN_PAUSE);
        job.phase = if clear.is_empty() { Phase::Idle } else { Phase::Cleared { pods: clear, at: now } };
        self.failed(id, failure, now);
    }

    /// The answer to [`Step::Delete`].
    pub(crate) fn deleted(&mut self, id: &JobId, answer: &[(PodVersion, Deletion)], now: Instant) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let of = |is_meant: &dyn Fn(Deletion) -> bool| {
            answer.iter().filter(|(_, deletion)| is_meant(*deletion)).map(|(pod, _)| pod.clone()).collect::<Vec<_>>()
        };
        let deleted = of(&|deletion| matches!(deletion, Deletion::Deleted | Deletion::Gone));
        if !deleted.is_empty() {
            job.backoff = None;
        }
        job.phase = Phase::Going { deleted, changed: of(&|deletion| deletion == Deletion::Changed) };
        job.not_before = Some(now + MIN_PAUSE);
        self.failed(id, worst_failure(answer), now);
    }

    fn failed(&mut self, id: &JobId, failure: Option<Failure>, now: Instant) {
        match (failure, self.jobs.get_mut(id)) {
            (Some(Failure::Forbidden), _) => {
                self.forbidden.insert(id.namespace.clone(), now + FORBIDDEN_FOR);
            }
            (Some(Failure::Unavailable), Some(job)) => {
                let backoff = job.backoff.map_or(FIRST_BACKOFF, |last| (2 * last).min(MAX_BACKOFF));
                (job.backoff, job.not_before) = (Some(backoff), Some(now + backoff));
            }
            (Some(Failure::Unavailable), None) | (None, _) => {}
        }
    }
}

/// The failure that matters most.
pub(crate) fn worst_failure(answer: &[(PodVersion, Deletion)]) -> Option<Failure> {
    let failures = answer.iter().filter_map(|(_, deletion)| match deletion {
        Deletion::Failed(failure) => Some(*failure),
        Deletion::Deleted | Deletion::Gone | Deletion::Changed => None,
    });
    failures.max()
}

impl Job {
    fn step(&mut self, view: View<'_>, is_forbidden: bool, now: Instant) -> Step {
        self.served.retain(|uid, until| now < *until && view.stuck.iter().any(|stuck| stuck.pod.uid == *uid));
        let Some(fallback) = view.fallback else {
            (self.phase, self.wanted) = (Phase::Idle, None);
            return if self.stored == Spot::Open { Step::None } else { Step::Open };
        };
        if let Some(step) = self.restore(now).or_else(|| self.end_probe(view)) {
            return step;
        }
        let is_ripe = |stuck: &&StuckExecutor| now.duration_since(stuck.since) >= fallback;
        if is_forbidden {
            self.phase = Phase::Idle;
            let is_due = view.stuck.iter().filter(is_ripe).any(|stuck| self.closes(stuck));
            return if is_due { Step::Close { retry_after: view.retry } } else { Step::None };
        }
        let most = Steering::replaced_at_once(view.live);
        match &mut self.phase {
            Phase::Waiting { since } if now.duration_since(*since) < LOST_AFTER => Step::None,
            Phase::Going { deleted, changed } => {
                deleted.retain(|pod| view.stuck.iter().any(|stuck| stuck.pod.uid == pod.uid));
                changed.retain(|pod| view.stuck.iter().any(|stuck| stuck.pod == *pod));
                if deleted.is_empty() && changed.is_empty() {
                    self.phase = Phase::Idle;
                }
                Step::None
            }
            Phase::Cleared { pods, at } if now.duration_since(*at) < CLEARED_FOR => {
                pods.retain(|pod| view.stuck.iter().any(|stuck| stuck.pod == *pod));
                pods.truncate(most);
                let pods = pods.clone();
                if pods.is_empty() {
                    self.phase = Phase::Idle;
                    return Step::None;
                }
                // Otherwise the replacements would be placed on spot again.
                if view.stuck.iter().any(|stuck| pods.contains(&stuck.pod) && self.closes(stuck)) {
                    return Step::Close { retry_after: view.retry };
                }
                self.phase = Phase::Waiting { since: now };
                Step::Delete(pods)
            }
            Phase::Idle | Phase::Waiting { .. } | Phase::Cleared { .. } => {
                self.phase = Phase::Idle;
                if self.not_before.is_some_and(|not_before| now < not_before) {
                    return Step::None;
                }
                let is_served = |stuck: &&StuckExecutor| self.served.contains_key(&stuck.pod.uid);
                let mut ripe: Vec<_> = view.stuck.iter().filter(is_ripe).filter(|stuck| !is_served(stuck)).collect();
                if ripe.is_empty() {
                    return Step::None;
                }
                ripe.sort_by_key(|stuck| (stuck.since, &stuck.pod.name));
                self.phase = Phase::Waiting { since: now };
                Step::Check(ripe.into_iter().take(most).map(|stuck| stuck.pod.clone()).collect())
            }
        }
    }

    /// Restores what this reconciler has stored, if the store has lost it.
    fn restore(&mut self, now: Instant) -> Option<Step> {
        match (&self.stored, self.wanted) {
            (Spot::Open, Some(Wanted::Closed { retry_at })) => match retry_at.checked_duration_since(now) {
                Some(retry_after) if !retry_after.is_zero() => Some(Step::Close { retry_after }),
                _ => {
                    (self.wanted, self.closed_since) = (None, None);
                    None
                }
            },
            (Spot::Closed | Spot::Probing(_), Some(Wanted::Open)) => Some(Step::Open),
            _ => None,
        }
    }

    /// Opens spot if the probe has found a node there.
    fn end_probe(&self, view: View<'_>) -> Option<Step> {
        match (&self.stored, view.probe) {
            (Spot::Probing(_), Probe::OnSpot) => Some(Step::Open),
            // Something else has sent it to on-demand, so it has shown nothing.
            (Spot::Probing(_), Probe::OnOnDemand) => Some(Step::Close { retry_after: view.retry }),
            _ => None,
        }
    }

    /// Whether spot has to be closed because this executor is stuck.
    fn closes(&self, stuck: &StuckExecutor) -> bool {
        match &self.stored {
            Spot::Open => true,
            Spot::Probing(executor) => *executor == stuck.key,
            Spot::Closed => false,
        }
    }
}

#[cfg(test)]
mod tests;
