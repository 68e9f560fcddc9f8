//! The settings of the webhook, parsed once into a typed configuration.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Conventions, Policy};
use balancer_reconcile::{ReconcileArguments, ReconcileSettings};
use balancer_runtime::arguments::{ConventionArguments, DefaultArguments, TelemetryArguments, number, switch};
use balancer_runtime::store::{StoreArguments, StoreSettings};
use clap::Parser;

use crate::tls::CertificateSource;

/// Gives every Spark job its own mix of spot and on-demand executors.
///
/// A mutating and validating admission webhook. Every setting is an environment variable and a flag.
#[derive(Clone, Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Arguments {
    /// Most time of one admission in seconds, including the driver lookup. Accepted: 1 to 30. The timeoutSeconds of the
    /// webhook configurations must be higher
    #[arg(long, env, default_value_t = 5, value_parser = number::<u64>(1..=30))]
    webhook_timeout_seconds: u64,

    /// Port of the HTTPS webhook. Accepted: 0 to 65535; 0 selects a free port
    #[arg(long, env, default_value_t = 8443, value_parser = number::<u16>(0..=65_535))]
    port: u16,

    /// File of the certificate chain, in PEM. A changed file is loaded within five seconds, without a restart
    #[arg(long, env, default_value = "/tls/tls.crt")]
    tls_cert_path: PathBuf,

    /// File of the certificate's private key, in PEM. A changed file is loaded like the certificate
    #[arg(long, env, default_value = "/tls/tls.key")]
    tls_key_path: PathBuf,

    /// Run without a cluster, to try the webhook: memory store, generated certificate, no reconciler, no driver lookup
    #[arg(long)]
    dev: bool,

    #[command(flatten)]
    defaults: DefaultArguments,
    /// Whether the webhook's process also runs the reconciler. Accepted: true or false. Never with --dev [default: true
    /// with the memory store, which no other process can reconcile, and false with redis]
    #[arg(long, env, value_parser = switch, num_args = 0..=1, default_missing_value = "true", help_heading = "Reconciling")]
    reconcile_enabled: Option<bool>,

    #[command(flatten)]
    reconcile: ReconcileArguments,
    #[command(flatten)]
    conventions: ConventionArguments,
    #[command(flatten)]
    store: StoreArguments,
    #[command(flatten)]
    telemetry: TelemetryArguments,
}

/// The checked settings of the webhook.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) conventions: Arc<Conventions>,
    pub(crate) defaults: Policy,
    /// How long one admission may wait for the Kubernetes API.
    pub(crate) lookup_limit: Duration,
    pub(crate) port: u16,
    pub(crate) certificate: CertificateSource,
    /// `None` if this process does not run the reconciler.
    pub(crate) reconcile: Option<ReconcileSettings>,
    pub(crate) store: StoreSettings,
    pub(crate) telemetry: TelemetryArguments,
    pub(crate) dev: bool,
}

impl Arguments {
    pub(crate) fn settings(self) -> anyhow::Result<Settings> {
        let Self {
            defaults,
            webhook_timeout_seconds,
            port,
            tls_cert_path,
            tls_key_path,
            dev,
            reconcile_enabled,
            reconcile,
            conventions,
            store,
            telemetry,
        } = self;
        let budget = Duration::from_secs(webhook_timeout_seconds);
        // An admission calls the store at most twice, and the Kubernetes API at most once. Each gets half of the time.
        let store = store.settings(dev)?.within(budget / 4);
        // Without a cluster there is nothing to reconcile with.
        let reconciles = !dev && reconcile_enabled.unwrap_or(store.in_memory());
        Ok(Settings {
            conventions: Arc::new(conventions.conventions()?),
            defaults: defaults.policy(),
            lookup_limit: budget.saturating_sub(2 * store.timeout()),
            port,
            certificate: if dev {
                CertificateSource::SelfSigned
            } else {
                CertificateSource::Files { certificate: tls_cert_path, key: tls_key_path }
            },
            reconcile: reconciles.then(|| reconcile.settings()),
            store,
            telemetry,
            dev,
        })
    }
}
