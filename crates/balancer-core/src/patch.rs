//! The JSON Patch (RFC 6902) of a reply: only `add`, each key by itself, so that nothing of the
//! pod's own is lost. Written as JSON while it is made: a reply needs it as nothing else.

use crate::text::push_json;

/// A list of `add` operations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patch {
    /// The operations, comma-separated.
    operations: Vec<u8>,
}

impl Patch {
    /// Whether there is nothing to change.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    /// Adds each pair to the object at `parent`, which is made first where the pod has none.
    pub fn merge(&mut self, parent: &[&str], parent_exists: bool, pairs: &[(&str, &str)]) {
        if pairs.is_empty() {
            return;
        }
        if !parent_exists {
            self.add_parent(parent);
        }
        for (key, value) in pairs {
            self.begin(parent, Some(key));
            push_json(&mut self.operations, value);
            self.operations.push(b'}');
        }
    }

    /// Makes an empty object at `path`.
    pub fn add_parent(&mut self, path: &[&str]) {
        self.begin(path, None);
        self.operations.extend_from_slice(b"{}}");
    }

    /// The patch as JSON.
    pub fn to_json(&self) -> Vec<u8> {
        [b"[", &self.operations[..], b"]"].concat()
    }

    /// An operation up to its value.
    fn begin(&mut self, path: &[&str], key: Option<&str>) {
        if self.operations.is_empty() {
            // A placement's patch is about 300 bytes.
            self.operations.reserve(384);
        } else {
            self.operations.push(b',');
        }
        self.operations.extend_from_slice(br#"{"op":"add","path":"#);
        push_json(&mut self.operations, &pointer(path.iter().copied().chain(key)));
        self.operations.extend_from_slice(br#","value":"#);
    }
}

/// A JSON Pointer (RFC 6901).
fn pointer<'a>(tokens: impl Iterator<Item = &'a str>) -> String {
    let mut path = String::with_capacity(64);
    for token in tokens {
        path.push('/');
        let mut parts = token.split(['~', '/']);
        path.push_str(parts.next().unwrap_or_default());
        let special = token.bytes().filter(|byte| matches!(byte, b'~' | b'/'));
        for (byte, part) in special.zip(parts) {
            path.push_str(if byte == b'~' { "~0" } else { "~1" });
            path.push_str(part);
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_escaped_as_a_json_pointer_wants() {
        let mut patch = Patch::default();
        patch.merge(&["spec", "nodeSelector"], false, &[("karpenter.sh/capacity-type", "spot"), ("/a~b~/", "é\"")]);
        assert_eq!(
            String::from_utf8(patch.to_json()).unwrap(),
            concat!(
                r#"[{"op":"add","path":"/spec/nodeSelector","value":{}},"#,
                r#"{"op":"add","path":"/spec/nodeSelector/karpenter.sh~1capacity-type","value":"spot"},"#,
                r#"{"op":"add","path":"/spec/nodeSelector/~1a~0b~0~1","value":"é\""}]"#
            )
        );
    }
}
