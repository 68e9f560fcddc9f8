//! Writes the AdmissionReview that answers one: always allowed, with a patch and warnings where
//! there are any.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::patch::Patch;
use crate::text::push_json;

/// The answer to one review.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    uid: &'a str,
    /// What to change in the pod.
    pub patch: Patch,
    /// What the person who submitted the pod should see.
    pub warnings: Vec<String>,
}

impl<'a> Reply<'a> {
    /// Allows, and changes nothing. There is no other kind: a pod is never denied, a deletion never
    /// blocked.
    pub fn allow(uid: &'a str) -> Self {
        Self { uid, patch: Patch::default(), warnings: Vec::new() }
    }

    /// The body of the reply.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(1024);
        body.extend_from_slice(br#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","response":{"uid":"#);
        push_json(&mut body, self.uid);
        body.extend_from_slice(br#","allowed":true"#);
        if !self.patch.is_empty() {
            body.extend_from_slice(br#","patchType":"JSONPatch","patch":""#);
            body.extend_from_slice(STANDARD.encode(self.patch.to_json()).as_bytes());
            body.push(b'"');
        }
        for (i, warning) in self.warnings.iter().enumerate() {
            body.extend_from_slice(if i == 0 { &br#","warnings":["#[..] } else { b"," });
            push_json(&mut body, warning);
        }
        body.extend_from_slice(if self.warnings.is_empty() { &b"}}"[..] } else { b"]}}" });
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn warnings_are_told_each_by_itself() {
        let mut reply = Reply::allow("u1");
        reply.warnings = vec!["a \"ratio\"".into(), "é".into()];
        let body: Value = serde_json::from_slice(&reply.encode()).unwrap();
        assert_eq!(body["response"], json!({"uid": "u1", "allowed": true, "warnings": ["a \"ratio\"", "é"]}));
    }
}
