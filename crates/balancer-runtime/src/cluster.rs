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

/// The paths of reviews. The apiserver quotes them when it cannot call the webhook, with the admission token after them.
const REVIEW_PATHS: [&str; 2] = ["/mutate/", "/validate/"];

/// An error with its causes, each once: many errors of the Kubernetes client repeat their cause. What the Kubernetes API
/// answers is its message alone, because the client's own text adds a dump of the whole answer. Admission tokens are left out.
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
    without_admission_tokens(&text)
}

fn without_admission_tokens(text: &str) -> String {
    let (mut shown, mut rest) = (String::new(), text);
    while let Some(end) = REVIEW_PATHS.iter().filter_map(|path| Some(rest.find(path)? + path.len())).min() {
        let (before, from_token) = rest.split_at(end);
        rest = from_token.trim_start_matches(|next: char| !next.is_whitespace() && !"?\"':".contains(next));
        shown.push_str(before);
        shown.push('…');
    }
    shown + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_the_api_is_told_by_its_message_alone() {
        let status = kube::core::Status::failure("pods is forbidden", "Forbidden").with_code(403);
        assert_eq!(chain(&kube::Error::Api(status.boxed())), "pods is forbidden");
    }

    #[test]
    fn an_admission_token_that_the_api_quotes_is_left_out() {
        let of = |path: &str| {
            let call = format!("failed calling webhook \"place.x\": Post \"https://w.b.svc:443{path}");
            chain(&kube::Error::Api(kube::core::Status::failure(&call, "InternalError").boxed()))
        };
        for (path, shown) in [
            ("/mutate/0123456789abcdef?timeout=3s\": EOF", "/mutate/…?timeout=3s\": EOF"),
            ("/validate/0123456789abcdef\": EOF, /mutate/0123", "/validate/…\": EOF, /mutate/…"),
            ("/mutate?timeout=3s\": EOF", "/mutate?timeout=3s\": EOF"),
        ] {
            assert!(of(path).ends_with(shown), "{}", of(path));
        }
    }
}
