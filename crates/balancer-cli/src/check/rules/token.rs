//! Checks the admission token: whether the path in the webhook configurations is one that the webhook accepts. No finding
//! contains a token.

use k8s_openapi::ByteString;

use super::webhooks::called;
use crate::check::problem::{Finding, Problem};
use crate::check::snapshot::{Read, Snapshot, WEBHOOK};

/// The path of each configuration is one that the webhook accepts.
pub(super) fn token(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(webhook) = snapshot.component(WEBHOOK) else { return Vec::new() };
    let has_tokens = webhook.has_tokens();
    let secret = webhook.token_secret();
    let key = secret.as_ref().map_or("tokens", |(_, key)| key);
    let tokens = match &snapshot.tokens {
        Read::Found(secret) => secret.data.as_ref().and_then(|data| data.get(key)).map(lines),
        Read::Absent if has_tokens => {
            let name = secret.as_ref().map_or("with the tokens", |(name, _)| name);
            return vec![Finding::new(
                Problem::AdmissionToken,
                snapshot.object("Secret", name),
                "It does not exist, and the webhook does not start without its tokens.",
                "Upgrade the release, which makes it, or create the Secret of admissionToken.existingSecret.",
            )];
        }
        Read::Absent | Read::Unknown => None,
    };
    let mut findings = Vec::new();
    for hook in snapshot.hooks.iter().flatten() {
        let Some((_, path)) = called(&hook.webhook) else { continue };
        let rest = path.strip_prefix(hook.kind.path());
        let candidate = rest.and_then(|rest| rest.strip_prefix('/'));
        let text = match (rest, candidate) {
            (Some(""), _) if !has_tokens => continue,
            (Some(""), _) => "Its path has no token, and the webhook accepts no review without one.",
            (Some(_), Some(_)) if !has_tokens => "Its path has a token, and the webhook has none.",
            (Some(_), Some(candidate)) => match &tokens {
                None => continue,
                Some(tokens) if tokens.contains(&candidate.as_bytes()) => continue,
                Some(_) => "Its path has another token than the webhook's Secret.",
            },
            _ => "Its path is not one of the webhook's.",
        };
        let fix = "Run `helm upgrade` again, and wait three minutes until the pods have read the Secret.";
        findings.push(Finding::new(Problem::AdmissionToken, hook.object(), text, fix));
    }
    findings
}

fn lines(ByteString(file): &ByteString) -> Vec<&[u8]> {
    file.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty()).collect()
}
