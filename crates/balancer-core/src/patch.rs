//! Builds the JSON Patch (RFC 6902) of a reply. Every key is added by itself, so that the pod keeps its own.

use json_patch::jsonptr::{PointerBuf, Token};
use json_patch::{AddOperation, Patch, PatchOperation};
use serde_json::{Map, Value};

/// Longer than the pointers of the usual patch, so that the path is allocated once.
const USUAL_POINTER: usize = 64;

/// Adds each pair to the object below the nested `parents`. A parent is a key and whether the pod has it;
/// missing parents are added first.
pub(crate) fn add_pairs<'a>(
    patch: &mut Patch,
    parents: &[(&str, bool)],
    pairs: impl Iterator<Item = (&'a str, &'a str)>,
) {
    let mut path = String::with_capacity(USUAL_POINTER);
    for (key, exists) in parents {
        push_token(&mut path, key);
        if !exists {
            add(patch, &path, Map::new().into());
        }
    }
    let parent = path.len();
    for (key, value) in pairs {
        push_token(&mut path, key);
        add(patch, &path, value.into());
        path.truncate(parent);
    }
}

fn push_token(path: &mut String, key: &str) {
    path.push('/');
    path.push_str(Token::new(key).encoded());
}

fn add(patch: &mut Patch, path: &str, value: Value) {
    // A path of encoded tokens is a pointer.
    let path = PointerBuf::parse(path).unwrap_or_default();
    patch.0.push(PatchOperation::Add(AddOperation { path, value }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_parents_are_added_and_keys_escaped_as_json_pointers() {
        let mut patch = Patch::default();
        let pairs = [("karpenter.sh/capacity-type", "spot"), ("/a~b~/", "é\"")];
        add_pairs(&mut patch, &[("spec", true), ("nodeSelector", false)], pairs.into_iter());
        assert_eq!(
            serde_json::to_string(&patch).unwrap(),
            concat!(
                r#"[{"op":"add","path":"/spec/nodeSelector","value":{}},"#,
                r#"{"op":"add","path":"/spec/nodeSelector/karpenter.sh~1capacity-type","value":"spot"},"#,
                r#"{"op":"add","path":"/spec/nodeSelector/~1a~0b~0~1","value":"é\""}]"#
            )
        );
    }
}
