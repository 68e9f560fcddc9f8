//! The reconciler: it watches executors, drivers and nodes, and makes each job's ledger what the cluster
//! says. Evictions, lost nodes and finished executors call no webhook, placements may come to no pod, and
//! stores forget; whatever was missed is put right soon after (DESIGN section 7).
//!
//! `observe` asks the cluster, [`view`] keeps what it said, `schedule` and `tallies` know which job is
//! looked at when, `reconciler` is the loop, `leader` lets one of all replicas write. The same loop runs
//! in a process of its own by [`run`], and inside the webhook by [`start`].

mod arguments;
mod leader;
mod metrics;
mod observe;
mod reconciler;
mod report;
mod schedule;
mod tallies;
pub mod view;
mod watched;

use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Conventions, Policy};
use balancer_runtime::admin::{self, Admin, Readiness};
use balancer_runtime::cluster;
use balancer_runtime::shutdown::Signals;
use balancer_store::Ledger;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use arguments::{Arguments, ReconcileArguments, ReconcileSettings};
pub use leader::{Elector, Leadership};
pub use metrics::Metrics;
pub use reconciler::{Progress, Reconciler};

/// To leave, at most: to end what is under way, and to give the Lease back.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);
/// Before the loop begins anew after a panic.
const BREAKDOWN_PAUSE: Duration = Duration::from_secs(1);

/// What a reconciler is made of.
#[derive(Debug)]
pub struct Parts<L> {
    /// The ledgers to keep right.
    pub ledger: Arc<L>,
    /// Whether other processes reconcile them too, so that one has to be elected.
    pub shared: bool,
    /// How the cluster names things.
    pub conventions: Arc<Conventions>,
    /// What holds where a driver states nothing; the same as the webhook's.
    pub defaults: Policy,
    /// What is reconciled, and when.
    pub settings: ReconcileSettings,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// A reconciler at work.
#[derive(Debug)]
pub struct Running {
    task: JoinHandle<()>,
    leave: watch::Sender<bool>,
    progress: watch::Receiver<Progress>,
}

impl Running {
    /// How far it has come.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Has it leave: it stops writing, and then makes way for another.
    pub async fn leave(self) {
        self.leave.send_replace(true);
        if timeout(LEAVE_LIMIT, self.task).await.is_err() {
            tracing::warn!("the reconciler did not leave in time");
        }
    }
}

/// Starts a reconciler on the current runtime. Fails where there is no access to a cluster; a cluster or
/// a store that does not answer is waited for.
pub async fn start<L: Ledger>(parts: Parts<L>) -> anyhow::Result<Running> {
    let Parts { ledger, shared, conventions, defaults, settings, metrics } = parts;
    let ReconcileSettings { interval, grace, namespaces, lease } = settings;
    let client = cluster::client(observe::SILENCE).await?;
    let (elector, leadership) = if shared {
        let (elector, leadership) = Elector::new(client.clone(), lease, Arc::clone(&metrics));
        (Some(elector), leadership)
    } else {
        metrics.leads(true);
        (None, Leadership::alone())
    };
    let sources = observe::Sources { client, conventions, namespaces, grace };
    let reconciler = Arc::new(Reconciler { ledger, leadership, sources, defaults, interval, metrics });
    let (leave, leaving) = watch::channel(false);
    let (reached, progress) = watch::channel(Progress::default());
    let task = tokio::spawn(async move {
        let (retire, retired) = watch::channel(false);
        let electing = elector.map(|elector| tokio::spawn(elector.run(told(retired))));
        // A panic is a defect of ours, and no reason for the ledgers to be right no more.
        while let Err(error) = tokio::spawn(Arc::clone(&reconciler).run(reached.clone(), told(leaving.clone()))).await {
            tracing::error!(%error, "the reconciler broke down; it begins anew");
            tokio::time::sleep(BREAKDOWN_PAUSE).await;
        }
        retire.send_replace(true);
        if let Some(electing) = electing {
            let _ = electing.await;
        }
    });
    Ok(Running { task, leave, progress })
}

/// Waits until it is told so, or nobody is left to tell.
async fn told(mut telling: watch::Receiver<bool>) {
    let _ = telling.wait_for(|told| *told).await;
}

/// Runs a reconciler as a process of its own until a signal ends it.
///
/// Everything that can fail at a start fails here: settings, cluster access, the admin port. A Redis or
/// an API that is down does not: both are waited for, unready.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let settings = arguments.settings()?;
    let _log = balancer_runtime::log::start(settings.telemetry);
    let mut signals = Signals::catch()?;
    let metrics = Arc::new(Metrics::new());
    let mut registry = admin::registry(env!("CARGO_PKG_VERSION"));
    metrics.register(&mut registry);

    let readiness = Readiness::default();
    let admin = Admin::bind(settings.telemetry.admin_port).await?;
    let address = admin.address();
    let ledger = Arc::new(settings.store.open().await?);
    let running = start(Parts {
        ledger,
        shared: true,
        conventions: settings.conventions,
        defaults: settings.defaults,
        settings: settings.reconcile,
        metrics,
    })
    .await?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), admin = %address, "reconciling");
    tokio::spawn(admin.run(Arc::new(registry), readiness.clone()));
    let mut progress = running.progress();
    tokio::select! {
        _ = signals.wait() => {}
        () = async {
            // Whoever stands by is of use as soon as it knows the cluster.
            let _ = progress.wait_for(|progress| *progress >= Progress::StandingBy).await;
            readiness.set(true);
            std::future::pending().await
        } => {}
    }
    tracing::info!("leaving");
    readiness.set(false);
    running.leave().await;
    tracing::info!("left");
    Ok(())
}
