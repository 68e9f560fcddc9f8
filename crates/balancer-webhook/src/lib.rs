//! The admission webhook: it places each new Spark executor on spot or on-demand by its job's ratio, and releases each
//! deleted one from the ledger.
//!
//! [`server`] and [`tls`] handle connections, [`routes`] HTTP, [`tokens`] who may send reviews, [`admit`] reviews and the
//! ledger, and [`drivers`] looks up a job's policy in the cluster.

pub mod admit;
pub mod arguments;
mod body;
mod dev;
pub mod drivers;
mod lookup_slots;
pub mod metrics;
mod namespace_rate;
pub mod new_jobs;
mod reload;
pub mod routes;
pub mod server;
pub mod server_version;
mod test_admission;
pub mod tls;
pub mod tokens;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use balancer_reconcile::{Parts, Progress, Running};
use balancer_runtime::admin::{self, Admin, Readiness};
use balancer_runtime::shutdown::Signals;
use balancer_runtime::tasks::{Task, Tasks};
use tokio::sync::watch;

pub use arguments::Arguments;

/// Runs the webhook until a signal ends it, or the test that `--test-admission` asks for.
///
/// # Errors
/// Settings, certificate, admission tokens, access to the cluster, or a port: all are checked before the webhook serves. A Redis that is
/// down is no error, because executors are then placed without it.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    if let Some(test) = arguments.admission_test()? {
        return test.run().await;
    }
    let settings = arguments.settings()?;
    let mut registry = admin::registry(env!("CARGO_PKG_VERSION"));
    let tasks = Tasks::register(&mut registry);
    let _log = balancer_runtime::log::start(settings.telemetry, tasks.clone());
    let mut signals = Signals::catch()?;
    let metrics = Arc::new(metrics::Metrics::register(&mut registry));

    let certificate = Arc::new(settings.tls.load(metrics.certificate())?);
    let tokens = match settings.admission_tokens {
        Some(path) => Some(Arc::new(tokens::Tokens::load(path, metrics.token_reload_failures())?)),
        None => None,
    };
    let drivers = drivers::DriverSource::new(settings.dev, Arc::clone(&settings.conventions)).await?;
    let server_version = Arc::new(server_version::ServerVersion::default());
    if let Some(client) = drivers.client() {
        let (tasks, version) = (tasks.for_optional_part(), Arc::clone(&server_version));
        tasks.spawn(Task::ServerVersion, move || server_version::keep_fresh(client.clone(), Arc::clone(&version)));
    }
    let ledger = Arc::new(settings.store.open(&tasks).await?);
    let admission = Arc::new(admit::Admission {
        ledger: Arc::clone(&ledger),
        drivers: drivers::DriverLookup::new(drivers, settings.lookup_limit),
        new_jobs: new_jobs::NewJobs::new(settings.max_new_jobs_per_minute, Instant::now()),
        conventions: Arc::clone(&settings.conventions),
        defaults: settings.defaults,
        server_version,
        metrics: Arc::clone(&metrics),
    });

    let readiness = Readiness::default();
    let admin = Admin::bind(settings.telemetry.admin_port).await?;
    let server = server::Server::bind(settings.port, Arc::clone(&certificate))
        .await
        .with_context(|| format!("PORT: cannot listen on {}", settings.port))?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        address = %server.address(),
        admin = %admin.address(),
        store = ledger.name(),
        "serving"
    );
    if settings.dev {
        dev::print_greeting(server.address());
    }
    let reconciler = match settings.reconcile {
        Some(reconcile) => {
            let metrics = Arc::new(balancer_reconcile::Metrics::register(&mut registry));
            let (shared, conventions, defaults) = (!ledger.in_memory(), settings.conventions, settings.defaults);
            // Admissions go on without it.
            let tasks = tasks.for_optional_part();
            let ledger = Arc::clone(&ledger);
            let parts = Parts { ledger, shared, conventions, defaults, settings: reconcile, metrics, tasks };
            Some(balancer_reconcile::start(parts).await?)
        }
        None => None,
    };
    tokio::spawn(admin.keep_serving(Arc::new(registry), readiness.clone(), tasks.clone()));
    if let Some(tokens) = &tokens {
        let (tasks, tokens) = (tasks.clone(), Arc::clone(tokens));
        tokio::spawn(
            async move { tasks.keep(Task::AdmissionTokens, || reload::keep_fresh(Arc::clone(&tokens))).await },
        );
    }
    tokio::spawn(async move { tasks.keep(Task::Certificate, || reload::keep_fresh(Arc::clone(&certificate))).await });
    // The counts in memory are complete only after the first resync.
    let first_resync = reconciler.as_ref().filter(|_| ledger.in_memory()).map(Running::progress);
    let router = routes::Router::new(admission, tokens, metrics);
    let shutdown = async {
        let mode = tokio::select! {
            mode = signals.wait() => mode,
            never = set_ready_after(first_resync, &readiness) => match never {},
        };
        tracing::info!("shutting down");
        readiness.set(false);
        mode
    };
    server.run(router, shutdown).await;
    if let Some(reconciler) = reconciler {
        reconciler.shut_down().await;
    }
    tracing::info!("shut down");
    Ok(())
}

async fn set_ready_after(first_resync: Option<watch::Receiver<Progress>>, readiness: &Readiness) -> Infallible {
    if let Some(mut progress) = first_resync {
        let _ = progress.wait_for(|progress| *progress == Progress::Synced).await;
    }
    readiness.set(true);
    std::future::pending().await
}
