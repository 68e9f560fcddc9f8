//! The settings of the webhook, parsed once into a typed configuration.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use balancer_core::{Conventions, Policy};
use balancer_reconcile::{ReconcileArguments, ReconcileSettings};
use balancer_runtime::arguments::{ConventionArguments, DefaultArguments, TelemetryArguments, number, switch};
use balancer_runtime::k8s_names::is_dns_label;
use balancer_runtime::store::{StoreArguments, StoreSettings};
use clap::Parser;

use crate::test_admission::AdmissionTest;
use crate::tls::{CertificateSource, TlsSettings};

/// Gives every Spark job its own mix of spot and on-demand executors.
///
/// A mutating and validating admission webhook. Every setting is an environment variable and a flag.
#[derive(Clone, Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Arguments {
    /// Most time of one admission in seconds, including the driver lookup. Accepted: 1 to 30. The timeoutSeconds of the
    /// webhook configuration for creations must be higher. A deletion makes one call to the store, which takes at most a
    /// quarter of this time
    #[arg(long, env, default_value_t = 2, value_parser = number::<u64>(1..=30))]
    webhook_timeout_seconds: u64,

    /// Most jobs of one namespace that get a new ledger within a minute, in each webhook. Beyond it, executors of jobs
    /// without a ledger are placed by the fallback formula. Accepted: 1 to 1000000
    #[arg(long, env, default_value_t = 1000, value_parser = number::<u32>(1..=1_000_000))]
    max_new_jobs_per_minute: u32,

    /// Port of the HTTPS webhook. Accepted: 0 to 65535; 0 selects a free port
    #[arg(long, env, default_value_t = 8443, value_parser = number::<u16>(0..=65_535))]
    port: u16,

    /// File of the certificate chain, in PEM. A changed file is loaded within five seconds, without a restart
    #[arg(long, env, default_value = "/tls/tls.crt")]
    tls_cert_path: PathBuf,

    /// File of the certificate's private key, in PEM. A changed file is loaded like the certificate
    #[arg(long, env, default_value = "/tls/tls.key")]
    tls_key_path: PathBuf,

    /// File of CA certificates, in PEM. If set, every client of the HTTPS port needs a certificate that one of these CAs
    /// signed. A changed file is loaded like the certificate
    #[arg(long, env)]
    client_ca_path: Option<PathBuf>,

    /// File of 1 to 3 secret tokens, one on each line. Accepted: tokens of 16 to 128 letters, digits, '-' and '_'. If set,
    /// reviews are accepted only at /mutate/TOKEN and /validate/TOKEN. A changed file is loaded like the certificate
    #[arg(long, env)]
    admission_token_path: Option<PathBuf>,

    /// Run without a cluster, to try the webhook: memory store, generated certificate, no reconciler, no driver lookup
    #[arg(long)]
    dev: bool,

    /// Create an executor in this namespace by a dry run, print whether the webhook placed it, and end. The cluster is that
    /// of the service account or of KUBECONFIG. Set the labels and annotations as for the webhook
    #[arg(long, value_name = "NAMESPACE", value_parser = namespace, conflicts_with = "dev")]
    test_admission: Option<String>,

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
    /// In each namespace.
    pub(crate) max_new_jobs_per_minute: u32,
    pub(crate) port: u16,
    pub(crate) tls: TlsSettings,
    /// The file of the admission tokens.
    pub(crate) admission_tokens: Option<PathBuf>,
    /// `None` if this process does not run the reconciler.
    pub(crate) reconcile: Option<ReconcileSettings>,
    pub(crate) store: StoreSettings,
    pub(crate) telemetry: TelemetryArguments,
    pub(crate) dev: bool,
}

impl Arguments {
    /// The test that `--test-admission` asks for, which needs no other settings.
    pub(crate) fn admission_test(&self) -> anyhow::Result<Option<AdmissionTest>> {
        let Some(namespace) = self.test_admission.clone() else { return Ok(None) };
        Ok(Some(AdmissionTest { namespace, conventions: self.conventions.clone().conventions()? }))
    }

    pub(crate) fn settings(self) -> anyhow::Result<Settings> {
        let Self {
            defaults,
            webhook_timeout_seconds,
            max_new_jobs_per_minute,
            port,
            tls_cert_path,
            tls_key_path,
            client_ca_path,
            admission_token_path,
            dev,
            test_admission: _,
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
            max_new_jobs_per_minute,
            port,
            tls: TlsSettings {
                certificate: if dev {
                    CertificateSource::SelfSigned
                } else {
                    CertificateSource::Files { certificate: tls_cert_path, key: tls_key_path }
                },
                client_ca: client_ca_path,
            },
            admission_tokens: admission_token_path,
            reconcile: reconciles.then(|| reconcile.settings()),
            store,
            telemetry,
            dev,
        })
    }
}

/// The name of a namespace; a parser for a flag.
fn namespace(text: &str) -> anyhow::Result<String> {
    if !is_dns_label(text) {
        bail!("{text:?} is not the name of a namespace; accepted: 1 to 63 of a-z, 0-9 and '-'");
    }
    Ok(text.to_owned())
}
