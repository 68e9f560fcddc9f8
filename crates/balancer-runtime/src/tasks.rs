//! Keeps the essential tasks of a process running. A task that panics is restarted. A process whose task keeps dying, or
//! is stuck, reports on `/livez` that it is not alive, so that the kubelet restarts it.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::{label, label_sets};

/// Pauses before a restart double from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A task that has run for so long has recovered from its last death.
const RECOVERED_AFTER: Duration = Duration::from_secs(60);
/// After so many deaths without recovery, in a quarter of a minute or more, the process has to be restarted.
const MAX_DEATHS: u32 = 5;
/// A loop that has not turned for so long is stuck. It reports each of its calls too, and the longest deadline of a call is
/// some twenty seconds. The rest is room for a slow machine.
const STUCK_AFTER: Duration = Duration::from_secs(300);

label! {
    /// An essential task.
    Task {
        /// Serves probes and metrics.
        Admin = "admin",
        /// Reloads the admission tokens.
        AdmissionTokens = "admission_tokens",
        /// Reloads the certificate.
        Certificate = "certificate",
        /// Acquires and renews the Lease.
        Elector = "elector",
        /// Creates Events on drivers.
        Events = "events",
        /// Serves the page of jobs.
        JobsPage = "jobs_page",
        /// Writes log lines.
        Log = "log",
        /// Watches the cluster and corrects the ledgers.
        Reconciler = "reconciler",
        /// Reads the version of Kubernetes.
        ServerVersion = "server_version",
        /// Keeps the connection to the store.
        StoreConnection = "store_connection",
    }
}

label_sets! {
    TaskLabels { task: Task }
}

/// The essential tasks of a process. Clones share them.
#[derive(Clone, Debug)]
pub struct Tasks {
    died: Family<TaskLabels, Counter>,
    liveness: Liveness,
    /// Whether a task that keeps dying, or is stuck, ends the process.
    ends_process: bool,
}

impl Tasks {
    /// Registers the metric of the tasks that died.
    pub fn register(registry: &mut Registry) -> Self {
        let died = Family::<TaskLabels, Counter>::default();
        for &task in Task::ALL {
            drop(died.get_or_create(&TaskLabels { task }));
        }
        registry.register("tasks_died", "Tasks that panicked, and were restarted", died.clone());
        Self { died, liveness: Liveness::default(), ends_process: true }
    }

    /// The same tasks for a part of the process without which the rest is still useful: its tasks are restarted for
    /// ever, and never end the process.
    #[must_use]
    pub fn for_optional_part(&self) -> Self {
        Self { ends_process: false, ..self.clone() }
    }

    /// Whether the process is alive, as far as these tasks show.
    pub fn liveness(&self) -> Liveness {
        self.liveness.clone()
    }

    /// Runs a task to its end. If it panics, it is started again after a pause. Dropping the future ends the task.
    pub async fn keep<F>(&self, task: Task, mut start: impl FnMut() -> F) -> F::Output
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let mut restarts = Restarts::default();
        loop {
            let started_at = Instant::now();
            // The set ends the task when it is dropped.
            let mut running = JoinSet::new();
            running.spawn(start());
            match running.join_next().await {
                Some(Ok(output)) => return output,
                // The runtime shuts down.
                Some(Err(error)) if error.is_cancelled() => std::future::pending().await,
                Some(Err(_)) | None => {}
            }
            self.died(task);
            let pause = restarts.pause_after(started_at.elapsed());
            if self.ends_process && restarts.is_in_vain() && self.liveness.0.lost.set(task).is_ok() {
                tracing::error!(task = task.as_str(), "the task keeps dying; the process has to be restarted");
            }
            sleep(pause).await;
        }
    }

    /// Like [`keep`](Self::keep), in the background.
    pub fn spawn<F>(&self, task: Task, start: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let tasks = self.clone();
        tokio::spawn(async move { tasks.keep(task, start).await });
    }

    /// A task has panicked. It is restarted by its owner.
    pub fn died(&self, task: Task) {
        self.died.get_or_create(&TaskLabels { task }).inc();
        tracing::error!(task = task.as_str(), "a task has panicked; restarting it");
    }

    /// Watches a loop, which has to report each of its turns from now on.
    pub fn watch(&self, task: Task) -> Watchdog {
        let watchdog = Watchdog { task, liveness: self.ends_process.then(|| self.liveness.clone()) };
        watchdog.turned();
        watchdog
    }
}

/// Watches one loop until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    task: Task,
    /// `None` if the loop does not concern the process.
    liveness: Option<Liveness>,
}

impl Watchdog {
    /// The loop has turned, or has finished one step of a long turn.
    pub fn turned(&self) {
        self.set(Some(Instant::now()));
    }

    fn set(&self, turned_at: Option<Instant>) {
        let Some(liveness) = &self.liveness else { return };
        let mut loops = liveness.loops();
        loops.retain(|(task, _)| *task != self.task);
        loops.extend(turned_at.map(|turned_at| (self.task, turned_at)));
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.set(None);
    }
}

/// Whether `/livez` answers 200. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Liveness(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// The first task that kept dying.
    lost: OnceLock<Task>,
    /// When each watched loop has turned.
    loops: Mutex<Vec<(Task, Instant)>>,
}

/// Why a process is not alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAlive {
    /// A task keeps dying.
    Dies(Task),
    /// A loop does not turn.
    Stuck(Task),
}

impl fmt::Display for NotAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dies(task) => write!(f, "the task {} keeps dying", task.as_str()),
            Self::Stuck(task) => write!(f, "the task {} is stuck", task.as_str()),
        }
    }
}

impl Liveness {
    /// Why the process is not alive; `None` if it is.
    pub fn problem(&self) -> Option<NotAlive> {
        let stuck =
            || self.loops().iter().find(|(_, turned_at)| turned_at.elapsed() > STUCK_AFTER).map(|(task, _)| *task);
        self.0.lost.get().copied().map(NotAlive::Dies).or_else(|| stuck().map(NotAlive::Stuck))
    }

    fn loops(&self) -> MutexGuard<'_, Vec<(Task, Instant)>> {
        self.0.loops.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The deaths of one task. A pure value.
#[derive(Debug)]
struct Restarts {
    deaths: u32,
    pauses: ExponentialBackoff,
}

impl Default for Restarts {
    fn default() -> Self {
        let pauses = ExponentialBuilder::new().with_min_delay(FIRST_PAUSE).with_max_delay(LONGEST_PAUSE);
        Self { deaths: 0, pauses: pauses.with_factor(2.0).without_max_times().build() }
    }
}

impl Restarts {
    /// The task has died after it `lasted` for so long. Returns how long to wait before the restart.
    fn pause_after(&mut self, lasted: Duration) -> Duration {
        if lasted >= RECOVERED_AFTER {
            *self = Self::default();
        }
        self.deaths += 1;
        self.pauses.next().unwrap_or(LONGEST_PAUSE)
    }

    /// Whether another restart of the task will hardly help.
    fn is_in_vain(&self) -> bool {
        self.deaths >= MAX_DEATHS
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn tasks() -> Tasks {
        Tasks::register(&mut Registry::default())
    }

    fn deaths(tasks: &Tasks, task: Task) -> u64 {
        tasks.died.get_or_create(&TaskLabels { task }).get()
    }

    /// Panics `times` times, each time after it `lasted` for so long, and then returns how often it was started.
    async fn panic_first(tasks: &Tasks, times: u32, lasted: Duration) -> u32 {
        let started = Arc::new(AtomicU32::new(0));
        tasks
            .keep(Task::Elector, || {
                let started = Arc::clone(&started);
                async move {
                    let before = started.fetch_add(1, Ordering::Relaxed);
                    sleep(lasted).await;
                    assert!(before >= times, "a panic of the test's own");
                    before + 1
                }
            })
            .await
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_is_restarted_after_a_pause_and_counted() {
        let (tasks, begin) = (tasks(), Instant::now());
        assert_eq!(panic_first(&tasks, 3, Duration::ZERO).await, 4);
        assert_eq!(begin.elapsed().as_secs(), 1 + 2 + 4);
        assert_eq!((deaths(&tasks, Task::Elector), deaths(&tasks, Task::Log)), (3, 0));
        assert_eq!(tasks.liveness().problem(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_whose_task_keeps_dying_is_not_alive() {
        let tasks = tasks();
        panic_first(&tasks, MAX_DEATHS - 1, Duration::ZERO).await;
        assert_eq!(tasks.liveness().problem(), None);
        panic_first(&tasks.for_optional_part(), 2 * MAX_DEATHS, Duration::ZERO).await;
        assert_eq!(tasks.liveness().problem(), None, "the part is optional");
        panic_first(&tasks, MAX_DEATHS, Duration::ZERO).await;
        assert_eq!(tasks.liveness().problem(), Some(NotAlive::Dies(Task::Elector)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_recovers_between_its_deaths_is_restarted_for_ever() {
        let (tasks, begin) = (tasks(), Instant::now());
        panic_first(&tasks, 20, RECOVERED_AFTER).await;
        assert_eq!(begin.elapsed().as_secs(), 21 * RECOVERED_AFTER.as_secs() + 20 * FIRST_PAUSE.as_secs());
        assert_eq!(tasks.liveness().problem(), None);
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut restarts = Restarts::default();
        let pauses: Vec<u64> = (0..8).map(|_| restarts.pause_after(Duration::ZERO).as_secs()).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30, 30]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_task_ends() {
        let (tasks, ended) = (tasks(), Arc::new(AtomicU32::new(0)));
        struct Count(Arc<AtomicU32>);
        impl Drop for Count {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let kept = tasks.keep(Task::Events, || {
            let count = Count(Arc::clone(&ended));
            async move {
                let _count = count;
                std::future::pending::<()>().await;
            }
        });
        assert!(tokio::time::timeout(Duration::from_secs(1), kept).await.is_err());
        tokio::task::yield_now().await;
        assert_eq!(ended.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_whose_loop_is_stuck_is_not_alive_until_the_loop_turns_or_ends() {
        let tasks = tasks();
        let watchdog = tasks.watch(Task::Reconciler);
        sleep(STUCK_AFTER).await;
        assert_eq!(tasks.liveness().problem(), None);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(tasks.liveness().problem(), Some(NotAlive::Stuck(Task::Reconciler)));
        watchdog.turned();
        assert_eq!(tasks.liveness().problem(), None);
        sleep(2 * STUCK_AFTER).await;
        assert!(tasks.liveness().problem().is_some());
        drop(watchdog);
        assert_eq!(tasks.liveness().problem(), None, "a loop that is restarted is not stuck");
        let _optional = tasks.for_optional_part().watch(Task::Reconciler);
        sleep(2 * STUCK_AFTER).await;
        assert_eq!(tasks.liveness().problem(), None, "the part is optional");
    }
}
