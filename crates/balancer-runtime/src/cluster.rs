//! Access to the Kubernetes API, as the environment gives it.

use std::time::Duration;

use anyhow::{Context, anyhow};

/// How long a connection to the API may take to come about.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A client by the pod's service account, or by `KUBECONFIG`. Where nothing comes for `silence`, the
/// connection counts as dead: set it above every deadline of the caller's own.
pub async fn client(silence: Duration) -> anyhow::Result<kube::Client> {
    let mut config = kube::Config::infer().await.map_err(|error| {
        anyhow!("no access to a cluster; accepted: a pod's service account, or KUBECONFIG: {}", chain(&error))
    })?;
    config.connect_timeout = Some(CONNECT_LIMIT);
    config.read_timeout = Some(silence);
    kube::Client::try_from(config).context("cannot make a Kubernetes client")
}

/// An error with its causes, each told once: many of the client's errors repeat what caused them.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source()).map(ToString::to_string);
    causes.fold(error.to_string(), |told, cause| if told.contains(&cause) { told } else { format!("{told}: {cause}") })
}
