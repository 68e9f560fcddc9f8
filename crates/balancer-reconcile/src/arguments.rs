//! The settings of the reconciler, parsed once into a typed configuration.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use balancer_core::{Conventions, Policy};
use balancer_runtime::arguments::{ConventionArguments, DefaultArguments, TelemetryArguments, number};
use balancer_runtime::k8s_names::{is_dns_label, is_dns_subdomain};
use balancer_runtime::store::{StoreArguments, StoreSettings};
use clap::{Args, Parser};

use crate::jobs::PORT;

/// Corrects the counts of spot and on-demand executors that have drifted from the cluster.
///
/// Run it next to the webhooks, with the same Redis. Of several replicas one works, and the others stand by.
/// Every setting is an environment variable and a flag.
#[derive(Clone, Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub struct Arguments {
    #[command(flatten)]
    reconcile: ReconcileArguments,
    #[command(flatten)]
    defaults: DefaultArguments,
    #[command(flatten)]
    conventions: ConventionArguments,
    #[command(flatten)]
    store: StoreArguments,
    #[command(flatten)]
    telemetry: TelemetryArguments,

    /// Port of the page of jobs and of /jobs, on the loopback address alone, for kubectl port-forward. Accepted: 0 to
    /// 65535; 0 for none
    #[arg(long, env, default_value_t = PORT, value_parser = number::<u16>(0..=65_535), help_heading = "Logs, probes and metrics")]
    page_port: u16,
}

/// What is reconciled, and when; also for a webhook that reconciles by itself.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Reconciling")]
pub struct ReconcileArguments {
    /// Seconds between two passes over all jobs; changes in between are reconciled at once. Accepted: 10 to
    /// 86400
    #[arg(long, env, default_value_t = 1800, value_parser = number::<u64>(10..=86_400))]
    reconcile_interval_seconds: u64,

    /// Seconds that a placement may wait for its pod before it is removed. Accepted: 5 to 3600
    // Not less, because a connection to the API that was dropped silently is noticed within four seconds.
    #[arg(long, env, default_value_t = 60, value_parser = number::<u64>(5..=3600))]
    reconcile_grace_seconds: u64,

    /// Namespaces whose jobs are reconciled, comma-separated; empty for all
    #[arg(long, env, default_value = "", value_parser = namespaces)]
    watch_namespaces: Namespaces,

    /// Name of the Lease that elects the leader of all replicas, in their own namespace; reconcilers of other
    /// ledgers in that namespace need another name
    #[arg(long, env, default_value = "spot-balancer-reconciler", value_parser = lease)]
    reconcile_lease: Arc<str>,
}

/// A list of namespaces.
#[derive(Clone, Debug)]
struct Namespaces(Vec<Arc<str>>);

fn namespaces(text: &str) -> anyhow::Result<Namespaces> {
    let mut namespaces = Vec::new();
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        if !is_dns_label(name) {
            bail!("{name:?} is not a namespace; accepted: 1 to 63 of a-z, 0-9 and '-', no '-' at either end");
        }
        if !namespaces.iter().any(|known: &Arc<str>| **known == *name) {
            namespaces.push(name.into());
        }
    }
    Ok(Namespaces(namespaces))
}

fn lease(name: &str) -> anyhow::Result<Arc<str>> {
    if !is_dns_subdomain(name) {
        bail!(
            "{name:?} is not a Lease's name; accepted: 1 to 253 of a-z, 0-9, '-' and '.', no '-' or '.' at either end"
        );
    }
    Ok(name.into())
}

/// What is reconciled, and when.
#[derive(Clone, Debug)]
pub struct ReconcileSettings {
    /// From one pass over all jobs to the next.
    pub interval: Duration,
    /// How long a placement may wait for its pod.
    pub grace: Duration,
    /// Whose pods are watched; empty for all.
    pub namespaces: Vec<Arc<str>>,
    /// Name of the Lease that elects the leader.
    pub lease: Arc<str>,
}

impl ReconcileSettings {
    /// Whether the namespace's pods are watched.
    pub(crate) fn watches(&self, namespace: &str) -> bool {
        self.namespaces.is_empty() || self.namespaces.iter().any(|watched| **watched == *namespace)
    }
}

impl ReconcileArguments {
    /// The settings.
    pub fn settings(self) -> ReconcileSettings {
        let Self { reconcile_interval_seconds, reconcile_grace_seconds, watch_namespaces, reconcile_lease } = self;
        ReconcileSettings {
            interval: Duration::from_secs(reconcile_interval_seconds),
            grace: Duration::from_secs(reconcile_grace_seconds),
            namespaces: watch_namespaces.0,
            lease: reconcile_lease,
        }
    }
}

/// The checked settings of the reconciler.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) reconcile: ReconcileSettings,
    pub(crate) conventions: Arc<Conventions>,
    pub(crate) defaults: Policy,
    pub(crate) store: StoreSettings,
    pub(crate) telemetry: TelemetryArguments,
    /// `None` if the page of jobs is not served.
    pub(crate) page_port: Option<u16>,
}

impl Arguments {
    pub(crate) fn settings(self) -> anyhow::Result<Settings> {
        let Self { reconcile, defaults, conventions, store, telemetry, page_port } = self;
        let store = store.settings(false)?;
        if store.in_memory() {
            bail!(
                "STORE is memory, which no other process can reconcile; accepted: redis, or the webhook alone, which \
                 reconciles its own memory"
            );
        }
        Ok(Settings {
            reconcile: reconcile.settings(),
            conventions: Arc::new(conventions.conventions()?),
            defaults: defaults.policy(),
            store,
            telemetry,
            page_port: Some(page_port).filter(|port| *port != 0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_name_is_a_dns_subdomain_and_another_is_rejected() {
        for name in ["a", "spot-balancer-reconciler", "a.b", &"a".repeat(253)] {
            assert!(lease(name).is_ok_and(|lease| *lease == *name));
        }
        for wrong in ["", "A", "a..b", "-a", "a.", &"a".repeat(254)] {
            assert!(lease(wrong).is_err_and(|error| error.to_string().contains(&format!("{wrong:?}"))));
        }
    }

    #[test]
    fn namespaces_are_a_comma_separated_list_of_dns_labels() {
        let read = |text| namespaces(text).map(|namespaces| namespaces.0.join("|")).map_err(|error| error.to_string());
        assert_eq!(read("").as_deref(), Ok(""));
        assert_eq!(read(" etl, ml ,etl,").as_deref(), Ok("etl|ml"));
        for wrong in ["Etl", "a_b", "-a", "a-", &"a".repeat(64)] {
            assert!(
                read(wrong).is_err_and(|error| error.contains(&format!("{wrong:?}")) && error.contains("accepted"))
            );
        }
    }
}
