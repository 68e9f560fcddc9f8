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

/// An error with its causes, each once: many errors of the Kubernetes client repeat their cause. What the Kubernetes API
/// answers is its message alone, because the client's own text adds a dump of the whole answer.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let (mut text, mut next) = (String::new(), Some(error));
    while let Some(error) = next {
        let own = match error.downcast_ref() {
            Some(kube::Error::Api(status)) if !status.message.is_empty() => {
                next = None;
                status.message.clone()
            }
            _ => {
                next = error.source();
                error.to_string()
            }
        };
        if !text.contains(&own) {
            let separator = if text.is_empty() { "" } else { ": " };
            text = format!("{text}{separator}{own}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_the_api_is_told_by_its_message_alone() {
        let status = kube::core::Status::failure("pods is forbidden", "Forbidden").with_code(403);
        assert_eq!(chain(&kube::Error::Api(status.boxed())), "pods is forbidden");
    }
}
