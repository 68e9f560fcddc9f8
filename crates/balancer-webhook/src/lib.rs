//! The admission webhook: it places each new Spark executor on spot or on-demand by its job's ratio, and releases each
//! deleted one from the ledger.
//!
//! [`server`] and [`tls`] handle connections, [`routes`] HTTP, [`admit`] reviews and the ledger, and [`drivers`] looks
//! up a job's policy in the cluster.

pub mod admit;
pub mod arguments;
mod dev;
pub mod drivers;
pub mod metrics;
pub mod routes;
pub mod server;
pub mod tls;

use std::convert::Infallible;
use std::sync::Arc;

use anyhow::Context;
use balancer_reconcile::{Parts, Progress, Running};
use balancer_runtime::admin::{self, Admin, Readiness};
use balancer_runtime::shutdown::Signals;
use tokio::sync::watch;

pub use arguments::Arguments;

/// Runs the webhook until a signal ends it.
///
/// # Errors
/// Settings, certificate, access to the cluster, or a port: all are checked before the webhook serves. A Redis that is
/// down is no error, because executors are then placed without it.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let settings = arguments.settings()?;
    let _log = balancer_runtime::log::start(settings.telemetry);
    let mut signals = Signals::catch()?;
    let mut registry = admin::registry(env!("CARGO_PKG_VERSION"));
    let metrics = Arc::new(metrics::Metrics::register(&mut registry));

    let certificate = Arc::new(settings.certificate.load(metrics.certificate())?);
    let drivers = drivers::DriverSource::new(settings.dev, Arc::clone(&settings.conventions)).await?;
    let ledger = Arc::new(settings.store.open().await?);
    let admission = Arc::new(admit::Admission {
        ledger: Arc::clone(&ledger),
        drivers: drivers::DriverLookup::new(drivers, settings.lookup_limit),
        conventions: Arc::clone(&settings.conventions),
        defaults: settings.defaults,
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
            let parts =
                Parts { ledger: Arc::clone(&ledger), shared, conventions, defaults, settings: reconcile, metrics };
            Some(balancer_reconcile::start(parts).await?)
        }
        None => None,
    };
    tokio::spawn(admin.run(Arc::new(registry), readiness.clone()));
    tokio::spawn(certificate.keep_fresh());
    // The counts in memory are complete only after the first resync.
    let first_resync = reconciler.as_ref().filter(|_| ledger.in_memory()).map(Running::progress);
    let router = routes::Router::new(admission, metrics);
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
