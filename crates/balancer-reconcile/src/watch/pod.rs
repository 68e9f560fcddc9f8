//! A pod of a watch: of its several kilobytes only the fields that matter are decoded.

use std::borrow::Cow;

use balancer_core::{Pod, Text};
use kube::api::ObjectMeta;
use serde::{Deserialize, Deserializer};

/// The few fields of a pod. It exists until the index has applied it.
#[derive(Clone, Debug)]
pub struct WatchedPod {
    /// For the watch: the name and the resource version.
    metadata: ObjectMeta,
    /// For the index.
    pub pod: Pod<'static>,
}

impl<'de> Deserialize<'de> for WatchedPod {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pod = Pod::deserialize(deserializer)?.into_owned();
        let text = |text: &Option<Text<'_>>| text.as_ref().map(|text| text.as_str().to_owned());
        let metadata = ObjectMeta {
            name: text(&pod.metadata.name),
            namespace: text(&pod.metadata.namespace),
            resource_version: text(&pod.metadata.resource_version),
            ..ObjectMeta::default()
        };
        Ok(Self { metadata, pod })
    }
}

impl kube::Resource for WatchedPod {
    type DynamicType = ();
    type Scope = k8s_openapi::NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Pod".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "pods".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
