//! The fields of a pod that a placement needs. All other fields are skipped.

use serde::Deserialize;
use serde::de::Deserializer;

use crate::json::{JsonError, Pairs, Scan, Scanner};
use crate::text::{IntoOwned, Text};

/// Defines a part of a pod: a struct, how serde decodes it, and its conversion into an owned value. Each line
/// is a field, its type and its JSON key. Absent and `null` mean the same.
macro_rules! pod_part {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident<$a:lifetime> {
            $($(#[$field_meta:meta])* $field_vis:vis $field:ident: $type:ty = $key:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        $vis struct $name<$a> {
            $($(#[$field_meta])* #[serde(rename = $key, borrow, default)] $field_vis $field: $type,)*
        }

        impl IntoOwned for $name<'_> {
            type Owned = $name<'static>;

            fn into_owned(self) -> $name<'static> {
                $name { $($field: IntoOwned::into_owned(self.$field),)* }
            }
        }
    };
}

/// Defines parts of a pod that [`Scanner`] reads as well. It must return what serde returns.
macro_rules! scanned_pod_parts {
    ($(
        $(#[$meta:meta])*
        $vis:vis struct $name:ident<$a:lifetime> {
            $($(#[$field_meta:meta])* $field_vis:vis $field:ident: $type:ty = $key:literal,)*
        }
    )*) => {$(
        pod_part! {
            $(#[$meta])*
            $vis struct $name<$a> {
                $($(#[$field_meta])* $field_vis $field: $type = $key,)*
            }
        }

        impl<$a> Scan<$a> for Option<$name<$a>> {
            fn scan(scanner: &mut Scanner<$a>) -> Result<Self, JsonError> {
                let mut part = $name::default();
                let present = scanner.members(|scanner, key| {
                    $(if key == $key.as_bytes() {
                        part.$field = Scan::scan(scanner)?;
                        return Ok(());
                    })*
                    scanner.skip()
                })?;
                Ok(present.then_some(part))
            }
        }
    )*};
}

scanned_pod_parts! {
    /// A pod.
    pub struct Pod<'a> {
        /// Name, labels, annotations and timestamps.
        #[serde(deserialize_with = "null_is_default")]
        pub metadata: Metadata<'a> = "metadata",
        /// Which nodes may run the pod.
        pub(crate) spec: Option<PodSpec<'a>> = "spec",
        /// Whether the pod still runs.
        pub(crate) status: Option<PodStatus<'a>> = "status",
    }

    /// `metadata`.
    pub struct Metadata<'a> {
        /// Unique among the pods of a namespace. Absent at creation if the apiserver generates it.
        pub name: Option<Text<'a>> = "name",
        /// The prefix of a generated name.
        pub generate_name: Option<Text<'a>> = "generateName",
        /// Absent from what Spark sends to older apiservers; the review's request has it.
        pub namespace: Option<Text<'a>> = "namespace",
        /// Absent at creation.
        pub uid: Option<Text<'a>> = "uid",
        /// Absent at creation.
        pub resource_version: Option<Text<'a>> = "resourceVersion",
        /// RFC 3339 in UTC, so that comparing texts compares times.
        pub creation_timestamp: Option<Text<'a>> = "creationTimestamp",
        /// Present once a deletion of the pod was accepted.
        pub deletion_timestamp: Option<Text<'a>> = "deletionTimestamp",
        /// See [`Pod::label`].
        pub(crate) labels: Option<Pairs<'a>> = "labels",
        /// See [`Pod::annotation`].
        pub(crate) annotations: Option<Pairs<'a>> = "annotations",
    }

    /// `spec`.
    pub(crate) struct PodSpec<'a> {
        /// The node that the pod is bound to.
        pub(crate) node_name: Option<Text<'a>> = "nodeName",
        /// The labels that the node must have.
        pub(crate) node_selector: Option<Pairs<'a>> = "nodeSelector",
        /// Rules about nodes and other pods.
        pub(crate) affinity: Option<Affinity<'a>> = "affinity",
    }

    /// `status`.
    pub(crate) struct PodStatus<'a> {
        /// `Pending`, `Running`, `Succeeded` or `Failed`.
        pub(crate) phase: Option<Text<'a>> = "phase",
    }
}

pod_part! {
    /// `spec.affinity`, reduced to the rules about nodes.
    pub(crate) struct Affinity<'a> {
        node_affinity: Option<NodeAffinity<'a>> = "nodeAffinity",
    }
}

pod_part! {
    struct NodeAffinity<'a> {
        required: Option<NodeSelector<'a>> = "requiredDuringSchedulingIgnoredDuringExecution",
    }
}

pod_part! {
    /// The node must match one of the terms.
    pub(crate) struct NodeSelector<'a> {
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) terms: Vec<NodeSelectorTerm<'a>> = "nodeSelectorTerms",
    }
}

pod_part! {
    /// The node must meet every requirement.
    pub(crate) struct NodeSelectorTerm<'a> {
        pub(crate) match_expressions: Option<Vec<NodeSelectorRequirement<'a>>> = "matchExpressions",
    }
}

pod_part! {
    /// A requirement on one label of the node.
    pub(crate) struct NodeSelectorRequirement<'a> {
        pub(crate) key: Text<'a> = "key",
        pub(crate) operator: Text<'a> = "operator",
        pub(crate) values: Option<Vec<Text<'a>>> = "values",
    }
}

impl<'a> Scan<'a> for Metadata<'a> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        Ok(Option::scan(scanner)?.unwrap_or_default())
    }
}

/// Few pods have an affinity, and it is nested deeply, so serde reads it.
impl<'a> Scan<'a> for Option<Affinity<'a>> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        scanner.deserialize("an affinity")
    }
}

impl<'a> Affinity<'a> {
    /// What the pod requires of its node.
    pub(crate) fn required(&self) -> Option<&NodeSelector<'a>> {
        self.node_affinity.as_ref()?.required.as_ref()
    }
}

impl Pod<'_> {
    /// Whether the pod counts as live: it has not finished, and no deletion of it was accepted.
    pub fn is_live(&self) -> bool {
        let phase = self.status.as_ref().and_then(|status| status.phase.as_deref());
        self.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
    }

    /// The value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.metadata.labels.as_ref()?.get(key)
    }

    /// The value of an annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.metadata.annotations.as_ref()?.get(key)
    }

    /// The same pod, borrowing nothing from the bytes that it was read from.
    pub fn into_owned(self) -> Pod<'static> {
        IntoOwned::into_owned(self)
    }
}

/// Kubernetes decodes `null` as absent.
fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}
