//! The few fields of a pod that placing needs. Everything else in the pod is passed over unread.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::text::Text;

/// A view of a pod. Absent, `null` and empty mean the same.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Pod<'a> {
    /// Name, labels, annotations …
    #[serde(borrow, default, deserialize_with = "null_is_default")]
    pub metadata: Metadata<'a>,
    /// Where it may run.
    #[serde(borrow, default)]
    pub spec: Option<PodSpec<'a>>,
    /// How it is.
    #[serde(borrow, default)]
    pub status: Option<PodStatus<'a>>,
}

/// `metadata`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata<'a> {
    /// Unique among the live pods of a namespace; absent at creation where the apiserver makes it.
    #[serde(borrow, default)]
    pub name: Option<Text<'a>>,
    /// What the apiserver makes a name from.
    #[serde(borrow, default)]
    pub generate_name: Option<Text<'a>>,
    /// Absent in what Spark posts to older apiservers: use the request's.
    #[serde(borrow, default)]
    pub namespace: Option<Text<'a>>,
    /// Not yet known at creation.
    #[serde(borrow, default)]
    pub uid: Option<Text<'a>>,
    /// Which state of the object this is; absent at creation.
    #[serde(borrow, default)]
    pub resource_version: Option<Text<'a>>,
    /// RFC 3339, UTC: compares as text.
    #[serde(borrow, default)]
    pub creation_timestamp: Option<Text<'a>>,
    /// Present once it is being deleted.
    #[serde(borrow, default)]
    pub deletion_timestamp: Option<Text<'a>>,
    /// Labels.
    #[serde(borrow, default)]
    pub labels: Option<Pairs<'a>>,
    /// Annotations.
    #[serde(borrow, default)]
    pub annotations: Option<Pairs<'a>>,
}

/// `spec`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec<'a> {
    /// The node it is bound to.
    #[serde(borrow, default)]
    pub node_name: Option<Text<'a>>,
    /// Labels that its node must have.
    #[serde(borrow, default)]
    pub node_selector: Option<Pairs<'a>>,
    /// Its affinity.
    #[serde(borrow, default)]
    pub affinity: Option<Affinity<'a>>,
}

/// `status`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct PodStatus<'a> {
    /// `Pending`, `Running`, `Succeeded`, `Failed`.
    #[serde(borrow, default)]
    pub phase: Option<Text<'a>>,
}

/// `spec.affinity`, as far as it binds the pod to nodes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Affinity<'a> {
    #[serde(borrow, default)]
    node_affinity: Option<NodeAffinity<'a>>,
}

impl<'a> Affinity<'a> {
    pub(crate) fn required(&self) -> Option<&NodeSelector<'a>> {
        self.node_affinity.as_ref()?.required_during_scheduling_ignored_during_execution.as_ref()
    }
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct NodeAffinity<'a> {
    #[serde(borrow, default)]
    required_during_scheduling_ignored_during_execution: Option<NodeSelector<'a>>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NodeSelector<'a> {
    #[serde(borrow, default, deserialize_with = "null_is_default")]
    pub(crate) node_selector_terms: Vec<NodeSelectorTerm<'a>>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NodeSelectorTerm<'a> {
    #[serde(borrow, default)]
    pub(crate) match_expressions: Option<Vec<NodeSelectorRequirement<'a>>>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct NodeSelectorRequirement<'a> {
    #[serde(borrow)]
    pub(crate) key: Text<'a>,
    #[serde(borrow)]
    pub(crate) operator: Text<'a>,
    #[serde(borrow, default)]
    pub(crate) values: Option<Vec<Text<'a>>>,
}

impl Pod<'_> {
    /// Whether it counts: not finished, and not being deleted (DESIGN section 7).
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
}

/// A view that outlives the bytes it was read from.
impl Pod<'_> {
    /// The same, borrowing nothing.
    pub fn into_owned(self) -> Pod<'static> {
        let Self { metadata, spec, status } = self;
        Pod {
            metadata: metadata.into_owned(),
            spec: spec.map(PodSpec::into_owned),
            status: status.map(|PodStatus { phase }| PodStatus { phase: phase.map(Text::into_owned) }),
        }
    }
}

impl Metadata<'_> {
    fn into_owned(self) -> Metadata<'static> {
        let Self {
            name,
            generate_name,
            namespace,
            uid,
            resource_version,
            creation_timestamp,
            deletion_timestamp,
            labels,
            annotations,
        } = self;
        Metadata {
            name: name.map(Text::into_owned),
            generate_name: generate_name.map(Text::into_owned),
            namespace: namespace.map(Text::into_owned),
            uid: uid.map(Text::into_owned),
            resource_version: resource_version.map(Text::into_owned),
            creation_timestamp: creation_timestamp.map(Text::into_owned),
            deletion_timestamp: deletion_timestamp.map(Text::into_owned),
            labels: labels.map(Pairs::into_owned),
            annotations: annotations.map(Pairs::into_owned),
        }
    }
}

impl PodSpec<'_> {
    fn into_owned(self) -> PodSpec<'static> {
        let Self { node_name, node_selector, affinity } = self;
        PodSpec {
            node_name: node_name.map(Text::into_owned),
            node_selector: node_selector.map(Pairs::into_owned),
            affinity: affinity.map(|Affinity { node_affinity }| Affinity {
                node_affinity: node_affinity.map(NodeAffinity::into_owned),
            }),
        }
    }
}

impl NodeAffinity<'_> {
    fn into_owned(self) -> NodeAffinity<'static> {
        let Self { required_during_scheduling_ignored_during_execution: required } = self;
        let requirement = |NodeSelectorRequirement { key, operator, values }: NodeSelectorRequirement<'_>| {
            let values = values.map(|values| values.into_iter().map(Text::into_owned).collect());
            NodeSelectorRequirement { key: key.into_owned(), operator: operator.into_owned(), values }
        };
        let term = |NodeSelectorTerm { match_expressions }: NodeSelectorTerm<'_>| NodeSelectorTerm {
            match_expressions: match_expressions.map(|all| all.into_iter().map(requirement).collect()),
        };
        NodeAffinity {
            required_during_scheduling_ignored_during_execution: required.map(
                |NodeSelector { node_selector_terms }| NodeSelector {
                    node_selector_terms: node_selector_terms.into_iter().map(term).collect(),
                },
            ),
        }
    }
}

/// A JSON object of strings, in the order given. A pod has a handful: looking through them beats
/// building a map.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs<'a>(Vec<(Text<'a>, Text<'a>)>);

impl Pairs<'_> {
    fn into_owned(self) -> Pairs<'static> {
        Pairs(self.0.into_iter().map(|(key, value)| (key.into_owned(), value.into_owned())).collect())
    }
}

impl<'a> Pairs<'a> {
    pub(crate) fn new(pairs: Vec<(Text<'a>, Text<'a>)>) -> Self {
        Self(pairs)
    }

    /// The value of a key; the last, where it is given twice.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(name, _)| name.as_str() == key).map(|(_, value)| value.as_str())
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Pairs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::with_capacity(8);
                while let Some(pair) = map.next_entry::<Text<'de>, Option<Text<'de>>>()? {
                    // Go reads a null into a string as the empty string.
                    pairs.push((pair.0, pair.1.unwrap_or_default()));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// `null` stands for absent, as Go's JSON has it.
fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}
