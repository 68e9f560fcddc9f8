//! Encodes the AdmissionReview that answers another one. It always allows the request, and can carry a patch and
//! warnings.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::patch::Patch;
use crate::text::push_json_text;

/// The answer to one review.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    uid: &'a str,
    /// What to change in the pod.
    pub patch: Patch,
    /// Messages for the person who submits the pod.
    pub warnings: Vec<String>,
}

impl<'a> Reply<'a> {
    /// Allows the request and changes nothing. A reply never denies a request.
    pub fn allow(uid: &'a str) -> Self {
        Self { uid, patch: Patch::default(), warnings: Vec::new() }
    }

    /// The body of the reply.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(1024);
        body.extend_from_slice(br#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","response":{"uid":"#);
        push_json_text(&mut body, self.uid);
        body.extend_from_slice(br#","allowed":true"#);
        if !self.patch.is_empty() {
            body.extend_from_slice(br#","patchType":"JSONPatch","patch":""#);
            push_base64(&mut body, self.patch.as_json());
            body.push(b'"');
        }
        for (i, warning) in self.warnings.iter().enumerate() {
            body.extend_from_slice(if i == 0 { &br#","warnings":["#[..] } else { b"," });
            push_json_text(&mut body, warning);
        }
        body.extend_from_slice(if self.warnings.is_empty() { &b"}}"[..] } else { b"]}}" });
        body
    }
}

/// Appends bytes in base64.
fn push_base64(body: &mut Vec<u8>, bytes: &[u8]) {
    let start = body.len();
    body.resize(start + bytes.len().div_ceil(3) * 4, 0);
    let written = STANDARD.encode_slice(bytes, body.get_mut(start..).unwrap_or_default());
    debug_assert!(written.is_ok());
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn each_warning_is_a_string_of_its_own() {
        let mut reply = Reply::allow("u1");
        reply.warnings = vec!["a \"ratio\"".into(), "é".into()];
        let body: Value = serde_json::from_slice(&reply.encode()).unwrap();
        assert_eq!(body["response"], json!({"uid": "u1", "allowed": true, "warnings": ["a \"ratio\"", "é"]}));
    }
}
