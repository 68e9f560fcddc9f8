//! The reconciler: it watches executors, drivers and nodes, and corrects every job's ledger that has drifted from the
//! cluster. Evictions, lost nodes and finished executors call no webhook, some placements never become pods, and stores
//! lose data; the reconciler corrects the ledgers soon afterwards.
//!
//! `watch` lists and watches the cluster and produces events; [`index`] keeps the state that they describe. `queue` and
//! `audit` choose which job is reconciled when. `fallback` decides when spot is closed to a job and its executors without
//! a node are replaced; `spot` and `replace` do it. `controller` is the loop over them; `term`, `resync` and `store_epoch`
//! are its decisions. `leader` elects the one of all replicas that may write. The same loop runs in a process of its
//! own by [`run`], and inside the webhook by [`start`]. [`jobs`] shows people what the loop knows.

mod apply;
mod arguments;
mod audit;
mod blast_radius;
mod compare;
mod comparisons;
mod confirmation;
mod controller;
#[cfg(test)]
mod convergence;
mod doubts;
mod election;
mod events;
mod fallback;
pub mod index;
pub mod jobs;
mod leader;
mod log_limit;
mod metrics;
mod pod_lookup;
mod pool_steering;
mod queue;
mod reconcile_jobs;
#[cfg(test)]
mod refusals;
mod replace;
mod resync;
mod resync_jobs;
mod spot;
mod state;
mod store_check;
mod store_epoch;
mod stuck;
mod term;
mod unconfirmed;
mod unschedulable;
mod waiting;
mod warnings;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use balancer_core::SpotPreference;
use balancer_runtime::admin::{self, Admin, Readiness};
use balancer_runtime::cluster;
use balancer_runtime::shutdown::Signals;
use balancer_runtime::tasks::{Task, Tasks};
use balancer_store::Ledger;
use kube::Client;
use tokio::sync::watch as channel;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use arguments::{Arguments, ReconcileArguments, ReconcileSettings};
pub use events::WarningReason;
use jobs::{JobsPage, Reader};
use leader::{Elector, Leadership};
pub use metrics::Metrics;
use state::Reconciler;
pub use state::{Parts, Progress};
pub use watch::WatchedPod;

/// The most that a shutdown may take: calls under way end, and the Lease is released.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// A running reconciler.
#[derive(Debug)]
pub struct Running {
    task: JoinHandle<()>,
    shutdown: channel::Sender<bool>,
    progress: channel::Receiver<Progress>,
    jobs: Reader,
}

impl Running {
    /// How far the reconciler has come.
    pub fn progress(&self) -> channel::Receiver<Progress> {
        self.progress.clone()
    }

    /// The facts of all jobs.
    pub fn jobs(&self) -> Reader {
        self.jobs.clone()
    }

    /// Stops writing, and then releases the Lease.
    pub async fn shut_down(self) {
        self.shutdown.send_replace(true);
        if timeout(SHUTDOWN_TIMEOUT, self.task).await.is_err() {
            tracing::warn!("the reconciler did not shut down in time");
        }
    }
}

/// Starts a reconciler on the current runtime. It waits for a cluster or a store that does not answer.
///
/// # Errors
/// If the process has no access to a cluster.
pub async fn start<L: Ledger>(parts: Parts<L>) -> anyhow::Result<Running> {
    let seconds = parts.defaults.spot_fallback_seconds;
    if seconds > 0 && parts.conventions.spot_preference == SpotPreference::BestEffort {
        tracing::warn!(
            "SPOT_FALLBACK_SECONDS={seconds} has no effect: SPOT_PREFERENCE=BEST_EFFORT holds no executor to spot"
        );
    }
    Ok(start_with(cluster::client(watch::READ_TIMEOUT).await?, parts))
}

fn start_with<L: Ledger>(client: Client, parts: Parts<L>) -> Running {
    let (elector, leadership) = if parts.shared {
        let lease = Arc::clone(&parts.settings.lease);
        let (elector, leadership) = Elector::new(client.clone(), lease);
        (Some(elector), leadership)
    } else {
        (None, Leadership::alone())
    };
    let tasks = parts.tasks.clone();
    let (publisher, jobs) = jobs::channel();
    let reconciler = Arc::new(Reconciler { parts, client, leadership, jobs: publisher });
    let (shutdown, is_shutting_down) = channel::channel(false);
    let (progress_sender, progress) = channel::channel(Progress::default());
    let task = tokio::spawn(async move {
        let (retire, is_retired) = channel::channel(false);
        let electing = async {
            if let Some(elector) = elector {
                tasks.keep(Task::Elector, || elector.clone().run(is_set(is_retired.clone()))).await;
            }
        };
        let reconciling = async {
            let start = || Arc::clone(&reconciler).run(progress_sender.clone(), is_set(is_shutting_down.clone()));
            tasks.keep(Task::Reconciler, start).await;
            // Only now nothing more is written, and another process may lead.
            retire.send_replace(true);
        };
        tokio::join!(electing, reconciling);
    });
    Running { task, shutdown, progress, jobs }
}

/// Waits until the flag is set, or its sender is gone.
async fn is_set(mut flag: channel::Receiver<bool>) {
    let _ = flag.wait_for(|flag| *flag).await;
}

/// Runs a reconciler as a process of its own until a signal ends it. If Redis or the Kubernetes API is down, it waits
/// for them and is not ready.
///
/// # Errors
/// If a setting is invalid, the process has no access to a cluster, or the admin port is taken.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let settings = arguments.settings()?;
    let mut registry = admin::registry(env!("CARGO_PKG_VERSION"));
    let tasks = Tasks::register(&mut registry);
    let _log = balancer_runtime::log::start(settings.telemetry, tasks.clone());
    let mut signals = Signals::catch()?;
    let metrics = Arc::new(Metrics::register(&mut registry));

    let readiness = Readiness::default();
    let admin = Admin::bind(settings.telemetry.admin_port).await?;
    let address = admin.address();
    let ledger = Arc::new(settings.store.open(&tasks).await?);
    let running = start(Parts {
        ledger,
        shared: true,
        conventions: settings.conventions,
        defaults: settings.defaults,
        settings: settings.reconcile,
        metrics,
        tasks: tasks.clone(),
    })
    .await?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), admin = %address, "reconciling");
    if let Some(port) = settings.page_port {
        serve_jobs(port, running.jobs(), tasks.clone()).await;
    }
    tokio::spawn(admin.keep_serving(Arc::new(registry), readiness.clone(), tasks));
    let mut progress = running.progress();
    tokio::select! {
        _ = signals.wait() => {}
        () = async {
            // A follower is useful as soon as its index is complete.
            let _ = progress.wait_for(|progress| *progress >= Progress::StandingBy).await;
            readiness.set(true);
            std::future::pending().await
        } => {}
    }
    tracing::info!("shutting down");
    readiness.set(false);
    running.shut_down().await;
    tracing::info!("shut down");
    Ok(())
}

/// Serves the page of jobs in the background. Without it the reconciler does all of its work.
async fn serve_jobs(port: u16, jobs: Reader, tasks: Tasks) {
    match JobsPage::bind(port, jobs).await {
        Ok(page) => {
            tracing::info!(address = %page.address(), "serving the page of jobs");
            // A defect of the page is no reason to restart the process.
            tokio::spawn(page.keep_serving(tasks.for_optional_part()));
        }
        Err(error) => tracing::warn!(%error, "PAGE_PORT: cannot listen on {port}; the page of jobs is not served"),
    }
}
