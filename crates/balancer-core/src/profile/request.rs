//! What a pod needs to be scheduled on a capacity, and how to find it again in a pod.

use serde_json::Value;

use crate::capacity::Capacity;
use crate::conventions::SpotPreference;
use crate::patch::{Field, Object, ToJson};
use crate::platform::{LabelValues, Platform};
use crate::pod::{NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, PreferredTerm};

use super::Profile;

/// The largest weight. Karpenter gives up the preferences with the largest weights last.
pub(super) const WEIGHT: i32 = 100;

/// A requirement on a label, as Spot Balancer writes it.
#[derive(Debug)]
pub(super) struct Expression<'a> {
    pub(super) key: &'a str,
    pub(super) operator: &'static str,
    pub(super) values: Vec<&'a str>,
}

/// What a pod needs to be scheduled on a capacity.
#[derive(Debug)]
pub(super) enum Request<'a> {
    /// A nodeSelector: key and value.
    Selector(&'a str, &'a str),
    /// Required node affinity.
    Required(Vec<Expression<'a>>),
    /// Preferred node affinity.
    Preferred(Expression<'a>),
}

/// What Spot Balancer has added to a pod for its decision.
#[derive(Debug)]
pub(super) struct Added<'a> {
    pub(super) capacity: Capacity,
    pub(super) request: Request<'a>,
}

impl ToJson for Expression<'_> {
    fn push_to(&self, json: &mut Vec<u8>) {
        let (key, operator): (Field<'_>, Field<'_>) = (("key", &self.key), ("operator", &self.operator));
        match self.values.as_slice() {
            [] => Object(&[key, operator]).push_to(json),
            values => Object(&[key, operator, ("values", &values)]).push_to(json),
        }
    }
}

/// A term of node affinity that consists of these requirements.
pub(super) struct MatchExpressions<'a>(pub(super) &'a [Expression<'a>]);

impl ToJson for MatchExpressions<'_> {
    fn push_to(&self, json: &mut Vec<u8>) {
        Object(&[("matchExpressions", &self.0)]).push_to(json);
    }
}

/// That term as a preferred one.
pub(super) struct Preferred<'a>(pub(super) MatchExpressions<'a>);

impl ToJson for Preferred<'_> {
    fn push_to(&self, json: &mut Vec<u8>) {
        Object(&[("preference", &self.0), ("weight", &Value::from(WEIGHT))]).push_to(json);
    }
}

impl Expression<'_> {
    pub(super) fn equals(&self, own: &NodeSelectorRequirement<'_>) -> bool {
        let values = own.values.iter().map(|value| value.as_str());
        self.key == own.key.as_str() && self.operator == own.operator.as_str() && values.eq(self.values.iter().copied())
    }

    pub(super) fn is_preferred_by(&self, own: &PreferredTerm<'_>) -> bool {
        let expressions = own.term.expressions.as_deref().unwrap_or_default();
        own.weight == WEIGHT
            && own.term.fields.is_empty()
            && matches!(expressions, [expression] if self.equals(expression))
    }

    /// The place of that term among the pod's.
    pub(super) fn preferred_at(&self, spec: &PodSpec<'_>) -> Option<usize> {
        spec.preferred_terms().iter().position(|own| self.is_preferred_by(own))
    }
}

impl Request<'_> {
    /// Whether the pod has it.
    pub(super) fn is_in(&self, spec: &PodSpec<'_>) -> bool {
        match self {
            Self::Selector(key, value) => {
                spec.node_selector.as_ref().and_then(|selector| selector.get(key)) == Some(value)
            }
            Self::Required(expressions) => {
                let mut terms = spec.required_terms().into_iter().flatten().filter(|term| !term.is_empty()).peekable();
                terms.peek().is_some() && terms.all(|term| expressions.iter().all(|ours| ours.is_in(term)))
            }
            Self::Preferred(expression) => expression.preferred_at(spec).is_some(),
        }
    }

    /// Whether a nodeSelector with this key belongs to it.
    pub(super) fn has_selector(&self, key: &str) -> bool {
        matches!(self, Self::Selector(own, _) if *own == key)
    }

    /// Whether a required expression belongs to it.
    pub(super) fn has_expression(&self, own: &NodeSelectorRequirement<'_>) -> bool {
        matches!(self, Self::Required(expressions) if expressions.iter().any(|ours| ours.equals(own)))
    }

    /// Whether the term consists of it alone.
    pub(super) fn is_all_of(&self, term: &NodeSelectorTerm<'_>) -> bool {
        !term.is_empty()
            && term.fields.is_empty()
            && term.expressions.iter().flatten().all(|own| self.has_expression(own))
    }
}

impl Expression<'_> {
    fn is_in(&self, term: &NodeSelectorTerm<'_>) -> bool {
        term.expressions.iter().flatten().any(|own| self.equals(own))
    }
}

impl<'a> Profile<'a> {
    /// What an executor that is placed on `capacity` needs.
    pub(super) fn request(self, capacity: Capacity) -> Request<'a> {
        let platform = Platform::configured(&self.0.capacity_labels);
        match (capacity, self.0.spot_preference) {
            (Capacity::Spot, SpotPreference::BestEffort) => Request::Preferred(platform.spot()),
            (Capacity::Spot, SpotPreference::Strict) => platform.require_spot(),
            (Capacity::OnDemand, _) => platform.require_on_demand(),
        }
    }

    /// What Spot Balancer has added to the pod: the pod has its decision, and exactly what it writes for that decision.
    pub(super) fn added(self, pod: &Pod<'_>) -> Option<Added<'a>> {
        let (capacity, _) = self.0.decision(pod)?;
        let request = self.request(capacity);
        request.is_in(pod.spec.as_ref()?).then_some(Added { capacity, request })
    }

    /// Whether Spot Balancer has placed the pod in an earlier call of the same admission. `required` is the capacity that the
    /// pod requires.
    ///
    /// A template can have the decision annotation of another pod. The pods of a copied annotation alone have nothing of what
    /// Spot Balancer adds. A template that was copied from a live executor with all of it cannot be told from a pod that was
    /// placed, and neither can one that requires a capacity by itself, whose placement does not depend on any counts.
    pub(crate) fn was_placed(self, pod: &Pod<'_>, required: Option<Capacity>) -> bool {
        self.0.decision(pod).is_some() && (required.is_some() || self.added(pod).is_some())
    }
}

impl<'a> Platform<'a> {
    pub(super) fn spot(self) -> Expression<'a> {
        let key = self.labels.label.as_str();
        match &self.labels.spot_values {
            LabelValues::Any => Expression { key, operator: "Exists", values: Vec::new() },
            LabelValues::OneOf(values) => Expression { key, operator: "In", values: borrowed(values) },
        }
    }

    fn require_spot(self) -> Request<'a> {
        match &self.labels.spot_values {
            LabelValues::OneOf(values) if let [value] = values.as_slice() => {
                Request::Selector(&self.labels.label, value)
            }
            _ => Request::Required(vec![self.spot()]),
        }
    }

    pub(super) fn require_on_demand(self) -> Request<'a> {
        let key = self.labels.label.as_str();
        let on_demand = match (self.labels.on_demand_values.as_slice(), &self.labels.spot_values) {
            ([value], _) => return Request::Selector(key, value),
            ([], LabelValues::Any) => Expression { key, operator: "DoesNotExist", values: Vec::new() },
            ([], LabelValues::OneOf(values)) => Expression { key, operator: "NotIn", values: borrowed(values) },
            (values, _) => Expression { key, operator: "In", values: borrowed(values) },
        };
        let excluded = self.others.iter().filter(|other| other.is_excluded).map(|other| Expression {
            key: other.label,
            operator: "NotIn",
            values: other.values.to_vec(),
        });
        Request::Required([on_demand].into_iter().chain(excluded).collect())
    }
}

fn borrowed(values: &[String]) -> Vec<&str> {
    values.iter().map(String::as_str).collect()
}
