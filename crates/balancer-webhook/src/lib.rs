//! The admission webhook: each new Spark executor goes to spot or on-demand at its job's ratio, and
//! each deleted one leaves the ledger.
//!
//! [`server`] and [`tls`] know connections, [`routes`] knows HTTP, [`admit`] is the one place where
//! a review meets the ledger, [`drivers`] asks the cluster for a job's policy.
#![deny(missing_docs)]

pub mod admit;
pub mod arguments;
pub mod dev;
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

pub use arguments::Arguments;

/// Runs the webhook until a signal ends it.
///
/// Everything that can fail at a start fails here, before the port is bound: settings, certificate,
/// cluster access. A Redis that is down does not: admissions are then placed without the ledger.
pub async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let settings = arguments.settings()?;
    let _log = balancer_runtime::log::start(settings.telemetry);
    let mut signals = Signals::catch()?;
    let metrics = Arc::new(metrics::Metrics::new());

    let certificate = Arc::new(settings.certificate.load()?);
    let finder = drivers::DriverSource::new(settings.dev, Arc::clone(&settings.conventions)).await?;
    let ledger = Arc::new(settings.store.open().await?);
    let admission = Arc::new(admit::Admission {
        ledger: Arc::clone(&ledger),
        drivers: drivers::DriverLookup::new(finder, settings.look_up_limit),
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
        store = admission.ledger.name(),
        "serving"
    );
    if settings.dev {
        dev::greet(server.address());
    }
    let mut registry = admin::registry(env!("CARGO_PKG_VERSION"));
    metrics.register(&mut registry, &certificate);
    let reconciling = match settings.reconcile {
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
    let first_round = reconciling.as_ref().filter(|_| ledger.in_memory()).map(Running::progress);
    let ready = async {
        // Ledgers that no other process keeps have to be known first.
        if let Some(mut progress) = first_round {
            let _ = progress.wait_for(|progress| *progress == Progress::Synced).await;
        }
        readiness.set(true);
        std::future::pending::<Infallible>().await
    };
    let router = routes::Router::new(admission, metrics);
    let leave = async {
        let leave = tokio::select! {
            leave = signals.wait() => leave,
            never = ready => match never {},
        };
        tracing::info!("leaving: answering what was begun");
        readiness.set(false);
        leave
    };
    server.run(router, leave).await;
    if let Some(reconciling) = reconciling {
        reconciling.shut_down().await;
    }
    tracing::info!("left");
    Ok(())
}
