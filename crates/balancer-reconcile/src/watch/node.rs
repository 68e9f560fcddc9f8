//! A node of a watch: of its many kilobytes only the name, the version and the labels are decoded.

use std::borrow::Cow;
use std::collections::BTreeMap;

use kube::api::ObjectMeta;
use serde::{Deserialize, Deserializer};

/// The few fields of a node. It exists until the index has applied it, which keeps the capacity alone.
#[derive(Clone, Debug)]
pub(crate) struct WatchedNode {
    metadata: ObjectMeta,
}

impl<'de> Deserialize<'de> for WatchedNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Node {
            metadata: Metadata,
        }

        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            name: Option<String>,
            resource_version: Option<String>,
            labels: Option<BTreeMap<String, String>>,
        }

        let Node { metadata: Metadata { name, resource_version, labels } } = Node::deserialize(deserializer)?;
        Ok(Self { metadata: ObjectMeta { name, resource_version, labels, ..ObjectMeta::default() } })
    }
}

impl kube::Resource for WatchedNode {
    type DynamicType = ();
    type Scope = k8s_openapi::ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Node".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use kube::ResourceExt;

    use super::*;

    #[test]
    fn only_the_name_the_version_and_the_labels_of_a_node_are_kept() {
        let node = r#"{
            "metadata": {"name": "n", "resourceVersion": "7", "labels": {"a": "b"}, "annotations": {"c": "d"},
                "managedFields": [{"manager": "kubelet"}]},
            "spec": {"taints": []}, "status": {"images": []}
        }"#;
        let node: WatchedNode = serde_json::from_str(node).expect("a node");
        assert_eq!((node.name_any(), node.resource_version()), ("n".into(), Some("7".into())));
        assert_eq!(node.labels().iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>(), ["a=b"]);
        assert!(node.annotations().is_empty() && node.managed_fields().is_empty());
    }
}
