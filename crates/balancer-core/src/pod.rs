//! The fields of a pod that a placement needs. All other fields are skipped.

use std::borrow::Cow;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny};
use serde_json::Value;

use crate::json::{JsonError, Pairs, Scan, Scanner};
use crate::k8s_names::is_dns_subdomain;
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
        #[serde(bound(deserialize = "'de: 'a"))]
        $vis struct $name<$a> {
            $($(#[$field_meta])* #[serde(rename = $key, default)] $field_vis $field: $type,)*
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
                let present = scanner.members(|scanner, key, _| {
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
        /// See [`Pod::owner`].
        #[serde(deserialize_with = "optional_list")]
        pub(crate) owner_references: Option<Vec<OwnerReference<'a>>> = "ownerReferences",
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
        /// Which taints of a node the pod accepts.
        pub(crate) tolerations: Option<Tolerations<'a>> = "tolerations",
        /// How the pod is spread over nodes, among others.
        pub(crate) spread_constraints: Option<SpreadConstraints<'a>> = "topologySpreadConstraints",
    }

    /// One of `status.conditions`.
    pub(crate) struct PodCondition<'a> {
        kind: Option<Text<'a>> = "type",
        status: Option<Text<'a>> = "status",
        reason: Option<Text<'a>> = "reason",
        message: Option<Text<'a>> = "message",
        last_transition: Option<Text<'a>> = "lastTransitionTime",
    }

    /// What owns a pod.
    pub struct OwnerReference<'a> {
        #[serde(deserialize_with = "null_is_default")]
        kind: Text<'a> = "kind",
        /// The owner's name.
        #[serde(deserialize_with = "null_is_default")]
        pub name: Text<'a> = "name",
        /// The owner's uid.
        #[serde(deserialize_with = "null_is_default")]
        pub uid: Text<'a> = "uid",
        #[serde(deserialize_with = "null_is_default")]
        controller: bool = "controller",
    }

    /// `status`.
    pub(crate) struct PodStatus<'a> {
        /// `Pending`, `Running`, `Succeeded` or `Failed`.
        pub(crate) phase: Option<Text<'a>> = "phase",
        /// See [`Pod::unschedulable`].
        #[serde(deserialize_with = "optional_list")]
        pub(crate) conditions: Option<Vec<PodCondition<'a>>> = "conditions",
        /// The node on which the scheduler makes room for the pod, or that is being added for it.
        pub(crate) nominated_node: Option<Text<'a>> = "nominatedNodeName",
    }
}

pod_part! {
    /// A toleration.
    pub(crate) struct PodToleration<'a> {
        /// Empty for every key.
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) key: Text<'a> = "key",
        /// `Exists`, or `Equal`, which empty means too.
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) operator: Text<'a> = "operator",
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) value: Text<'a> = "value",
        /// Empty for every effect.
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) effect: Text<'a> = "effect",
        /// After how many seconds the pod is evicted nevertheless. Only its presence is read.
        pub(crate) seconds: Option<IgnoredAny> = "tolerationSeconds",
    }
}

/// The tolerations of a pod. Every pod has some, and few are needed, so a review's are decoded when they are.
#[derive(Clone, Debug)]
pub(crate) enum Tolerations<'a> {
    Decoded(Vec<PodToleration<'a>>),
    Json(&'a [u8]),
}

/// The topologySpreadConstraints of a pod. Few executors need them, so a review's are decoded when they are. Each has
/// fields of which any can tell it from ours, so nothing of it is left out.
#[derive(Clone, Debug)]
pub(crate) enum SpreadConstraints<'a> {
    Decoded(Value),
    Json(&'a [u8]),
}

pod_part! {
    /// `spec.affinity`, reduced to the rules about nodes.
    pub(crate) struct Affinity<'a> {
        pub(crate) node_affinity: Option<NodeAffinity<'a>> = "nodeAffinity",
    }
}

pod_part! {
    /// The rules about nodes.
    pub(crate) struct NodeAffinity<'a> {
        /// What the node must be.
        pub(crate) required: Option<NodeSelector<'a>> = "requiredDuringSchedulingIgnoredDuringExecution",
        /// What the node should be.
        #[serde(deserialize_with = "optional_list")]
        pub(crate) preferred: Option<Vec<PreferredTerm<'a>>> = "preferredDuringSchedulingIgnoredDuringExecution",
    }
}

pod_part! {
    /// The node must match one of the terms.
    pub(crate) struct NodeSelector<'a> {
        #[serde(deserialize_with = "list")]
        pub(crate) terms: Vec<NodeSelectorTerm<'a>> = "nodeSelectorTerms",
    }
}

pod_part! {
    /// A node that matches the term is preferred by the weight.
    pub(crate) struct PreferredTerm<'a> {
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) weight: i32 = "weight",
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) term: NodeSelectorTerm<'a> = "preference",
    }
}

pod_part! {
    /// The node must meet every requirement. A term without requirements matches no node.
    pub(crate) struct NodeSelectorTerm<'a> {
        /// Requirements on the node's labels.
        #[serde(deserialize_with = "optional_list")]
        pub(crate) expressions: Option<Vec<NodeSelectorRequirement<'a>>> = "matchExpressions",
        /// Requirements on the node's name.
        #[serde(deserialize_with = "list")]
        pub(crate) fields: Vec<NodeSelectorRequirement<'a>> = "matchFields",
    }
}

pod_part! {
    /// A requirement on one label or field of the node.
    pub(crate) struct NodeSelectorRequirement<'a> {
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) key: Text<'a> = "key",
        #[serde(deserialize_with = "null_is_default")]
        pub(crate) operator: Text<'a> = "operator",
        #[serde(deserialize_with = "list")]
        pub(crate) values: Vec<Text<'a>> = "values",
    }
}

impl<'a> Scan<'a> for Metadata<'a> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        Ok(Option::<Self>::scan(scanner)?.unwrap_or_default())
    }
}

/// Few pods have an affinity, and it is nested deeply, so serde reads it.
impl<'a> Scan<'a> for Option<Affinity<'a>> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        scanner.deserialize("an affinity")
    }
}

impl<'a> Scan<'a> for Option<Tolerations<'a>> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        Ok(scanner.raw()?.map(Tolerations::Json))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Tolerations<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        list(deserializer).map(Self::Decoded)
    }
}

impl IntoOwned for Tolerations<'_> {
    type Owned = Tolerations<'static>;

    fn into_owned(self) -> Tolerations<'static> {
        Tolerations::Decoded(self.decoded().into_owned().into_owned())
    }
}

impl PartialEq for Tolerations<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.decoded() == other.decoded()
    }
}

impl<'a> Tolerations<'a> {
    /// The tolerations. The apiserver refuses a pod with invalid ones, so they count as none.
    pub(crate) fn decoded(&self) -> Cow<'_, [PodToleration<'a>]> {
        match self {
            Self::Decoded(tolerations) => Cow::Borrowed(tolerations),
            Self::Json(json) => match serde_json::from_slice(json) {
                Ok(Self::Decoded(tolerations)) => Cow::Owned(tolerations),
                _ => Cow::default(),
            },
        }
    }
}

impl<'a> Scan<'a> for Option<SpreadConstraints<'a>> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        Ok(scanner.raw()?.map(SpreadConstraints::Json))
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for SpreadConstraints<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::Decoded)
    }
}

impl IntoOwned for SpreadConstraints<'_> {
    type Owned = SpreadConstraints<'static>;

    fn into_owned(self) -> SpreadConstraints<'static> {
        SpreadConstraints::Decoded(self.decoded().into_owned())
    }
}

impl PartialEq for SpreadConstraints<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.decoded() == other.decoded()
    }
}

impl SpreadConstraints<'_> {
    /// The constraints; `None` if they are not a list, which the apiserver refuses.
    pub(crate) fn list(&self) -> Option<Vec<Value>> {
        match self.decoded().into_owned() {
            Value::Array(list) => Some(list),
            _ => None,
        }
    }

    fn decoded(&self) -> Cow<'_, Value> {
        match self {
            Self::Decoded(value) => Cow::Borrowed(value),
            Self::Json(json) => Cow::Owned(serde_json::from_slice(json).unwrap_or_default()),
        }
    }
}

impl<'a> PodSpec<'a> {
    /// The rules about nodes.
    pub(crate) fn node_affinity(&self) -> Option<&NodeAffinity<'a>> {
        self.affinity.as_ref()?.node_affinity.as_ref()
    }

    /// The terms of which the node must match one; `None` if every node matches.
    pub(crate) fn required_terms(&self) -> Option<&[NodeSelectorTerm<'a>]> {
        self.node_affinity()?.required.as_ref().map(|required| required.terms.as_slice())
    }

    /// What the node should be.
    pub(crate) fn preferred_terms(&self) -> &[PreferredTerm<'a>] {
        self.node_affinity().and_then(|own| own.preferred.as_deref()).unwrap_or_default()
    }

    /// Whether the pod is bound to a node.
    pub(crate) fn is_bound(&self) -> bool {
        self.node_name.as_deref().is_some_and(|node| !node.is_empty())
    }
}

impl Pod<'_> {
    /// Whether the pod counts as live: it has not finished, and no deletion of it was accepted.
    pub fn is_live(&self) -> bool {
        let phase = self.status.as_ref().and_then(|status| status.phase.as_deref());
        self.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
    }

    /// The pod that owns this one as its controller. Spark makes the driver's pod the owner of its executors. The API server
    /// accepts any text as the owner's name, but no pod has one that is not the name of a pod.
    pub fn owner(&self) -> Option<&OwnerReference<'_>> {
        let mut owners = self.metadata.owner_references.iter().flatten();
        owners.find(|owner| owner.controller && owner.kind.as_str() == "Pod" && is_dns_subdomain(&owner.name))
    }

    /// Why the scheduler finds no node for the pod, in the scheduler's words; `None` unless it has tried in vain, and while
    /// a node is nominated for the pod.
    pub fn unschedulable(&self) -> Option<&str> {
        Some(self.unschedulable_condition()?.message.as_deref().unwrap_or_default())
    }

    /// When the scheduler first found no node for a pod that is [`unschedulable`](Self::unschedulable), as RFC 3339 on
    /// the scheduler's clock.
    pub fn unschedulable_since(&self) -> Option<&str> {
        self.unschedulable_condition()?.last_transition.as_deref()
    }

    fn unschedulable_condition(&self) -> Option<&PodCondition<'_>> {
        let status = self.status.as_ref()?;
        if status.nominated_node.as_deref().is_some_and(|node| !node.is_empty()) {
            return None;
        }
        let mut conditions = status.conditions.iter().flatten();
        let scheduled = conditions.find(|condition| condition.kind.as_deref() == Some("PodScheduled"))?;
        let is_unschedulable =
            scheduled.status.as_deref() == Some("False") && scheduled.reason.as_deref() == Some("Unschedulable");
        is_unschedulable.then_some(scheduled)
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

/// Kubernetes decodes `null` in a list as a value without any fields.
fn optional_list<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<Option<Vec<T>>, D::Error> {
    let list: Option<Vec<Option<T>>> = Option::deserialize(d)?;
    Ok(list.map(|list| list.into_iter().map(Option::unwrap_or_default).collect()))
}

fn list<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<Vec<T>, D::Error> {
    Ok(optional_list(d)?.unwrap_or_default())
}
