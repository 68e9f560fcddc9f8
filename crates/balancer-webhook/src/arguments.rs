//! The settings of the webhook, parsed once into a typed configuration.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Conventions, Policy};
use balancer_reconcile::{ReconcileArguments, ReconcileSettings};
use balancer_runtime::arguments::{ConventionArguments, DefaultArguments, TelemetryArguments, number, yes_or_no};
use balancer_runtime::store::{StoreArguments, StoreSettings};
use clap::Parser;

use crate::tls::CertificateSource;

/// Gives every Spark job its own mix of spot and on-demand executors.
///
/// A mutating and validating admission webhook. Every setting is an environment variable and a flag.
#[derive(Clone, Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Arguments {
    /// Budget of one admission in seconds, look-ups included; 1 to 30
    #[arg(long, env, default_value_t = 5, value_parser = number::<u64>(1..=30))]
    webhook_timeout_seconds: u64,

    /// Port of the HTTPS webhook; 0 takes a free one
    #[arg(long, env, default_value_t = 8443, value_parser = number::<u16>(0..=65_535))]
    port: u16,

    /// Certificate chain in PEM; read again when it changes
    #[arg(long, env, default_value = "/tls/tls.crt")]
    tls_cert_path: PathBuf,

    /// Its private key in PEM
    #[arg(long, env, default_value = "/tls/tls.key")]
    tls_key_path: PathBuf,

    /// Try it without a cluster: memory store, and a certificate made at the start
    #[arg(long)]
    dev: bool,

    #[command(flatten)]
    defaults: DefaultArguments,
    /// Whether this process also keeps the counts what the cluster says [default: true with the memory
    /// store, whose counts nobody else can keep, false with redis]
    #[arg(long, env, value_parser = yes_or_no, num_args = 0..=1, default_missing_value = "true", help_heading = "Reconciling")]
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

/// What the webhook runs by.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) conventions: Arc<Conventions>,
    pub(crate) defaults: Policy,
    /// How long one admission may wait for the Kubernetes API.
    pub(crate) look_up_limit: Duration,
    pub(crate) port: u16,
    pub(crate) certificate: CertificateSource,
    /// `None` where this process does not reconcile.
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
        // An admission asks the store, at most twice, and the Kubernetes API, at most once: half of the
        // budget for each.
        let store = store.settings(dev)?.within(budget / 4);
        // Without a cluster there is nothing to reconcile by.
        let reconciles = !dev && reconcile_enabled.unwrap_or(store.in_memory());
        Ok(Settings {
            conventions: Arc::new(conventions.conventions()?),
            defaults: defaults.policy(),
            look_up_limit: budget.saturating_sub(2 * store.timeout()),
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
