//! Access to the Kubernetes API, from the environment.

use std::time::Duration;

use anyhow::{Context, anyhow};

/// How long connecting to the API may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A client with the pod's service account, or with `KUBECONFIG`. A connection that receives nothing for `read_timeout`
/// is closed, so it must be longer than every deadline of the caller.
///
/// # Errors
/// There is neither a service account nor a valid kubeconfig.
pub async fn client(read_timeout: Duration) -> anyhow::Result<kube::Client> {
    let mut config = kube::Config::infer().await.map_err(|error| {
        anyhow!("no access to a cluster; accepted: a pod's service account, or KUBECONFIG: {}", chain(&error))
    })?;
    config.connect_timeout = Some(CONNECT_LIMIT);
    config.read_timeout = Some(read_timeout);
    kube::Client::try_from(config).context("cannot create a Kubernetes client")
}

/// An error with its causes, each once: many errors of the Kubernetes client repeat their cause.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source()).map(ToString::to_string);
    causes.fold(error.to_string(), |text, cause| if text.contains(&cause) { text } else { format!("{text}: {cause}") })
}
