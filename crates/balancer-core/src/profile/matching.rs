//! Which nodes meet a requirement, as Kubernetes defines it for node selectors.
//!
//! See <https://kubernetes.io/docs/concepts/scheduling-eviction/assign-pod-node/>. What that page leaves open is decided as
//! kube-scheduler does: a term with an invalid requirement matches no node, and so does a term without any.

use std::collections::HashSet;

use crate::k8s_names::{is_label_key, is_label_value};
use crate::pod::{NodeSelectorRequirement, NodeSelectorTerm};
use crate::text::Text;

/// The range of whole numbers that a label can have.
const LABEL_NUMBERS: (i64, i64) = (0, i64::MAX);

impl NodeSelectorTerm<'_> {
    /// Whether the term has no requirement. Such a term matches no node, and is no requirement to add others to.
    pub(super) fn is_empty(&self) -> bool {
        self.expressions.as_ref().is_none_or(Vec::is_empty) && self.fields.is_empty()
    }

    /// Whether the term can match a node.
    pub(super) fn is_valid(&self) -> bool {
        !self.is_empty()
            && self.expressions.iter().flatten().all(NodeSelectorRequirement::is_valid)
            && self.fields.iter().all(|field| {
                matches!(field.operator.as_str(), "In" | "NotIn") && matches!(field.values.as_slice(), [_])
            })
    }
}

impl NodeSelectorRequirement<'_> {
    /// Whether Kubernetes can evaluate the requirement on a label.
    fn is_valid(&self) -> bool {
        let is_complete = match self.operator.as_str() {
            "In" | "NotIn" => !self.values.is_empty(),
            "Exists" | "DoesNotExist" => self.values.is_empty(),
            "Gt" | "Lt" => self.number().is_some(),
            _ => false,
        };
        is_complete
            && is_label_key(&self.key)
            && self.values.iter().all(|value| value.is_empty() || is_label_value(value))
    }

    /// Whether a node meets the requirement, if this is the value of its label; `None` if it does not have the label.
    fn is_met_by(&self, value: Option<&str>) -> bool {
        let listed = |value: &str| self.values.iter().any(|own| own.as_str() == value);
        match (self.operator.as_str(), value) {
            ("In", Some(value)) => listed(value),
            // A node without the label meets it.
            ("NotIn", value) => !value.is_some_and(listed),
            ("Exists", value) => value.is_some(),
            ("DoesNotExist", value) => value.is_none(),
            ("Gt" | "Lt", Some(value)) => match (value.parse::<i64>(), self.number()) {
                (Ok(value), Some(own)) => {
                    if self.operator.as_str() == "Gt" {
                        value > own
                    } else {
                        value < own
                    }
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// What `Gt` and `Lt` compare with.
    fn number(&self) -> Option<i64> {
        match self.values.as_slice() {
            [value] => value.parse().ok(),
            _ => None,
        }
    }
}

/// One of the requirements on a label.
#[derive(Clone, Copy, Debug)]
pub(super) enum Requirement<'a> {
    /// The nodeSelector's: the label has this value.
    Value(&'a str),
    /// A node affinity's.
    Expression(&'a NodeSelectorRequirement<'a>),
}

impl<'a> Requirement<'a> {
    fn is(&self, operator: &str) -> bool {
        matches!(self, Self::Expression(expression) if expression.operator.as_str() == operator)
    }

    fn values(&self) -> impl Iterator<Item = &'a str> {
        let (one, many) = match *self {
            Self::Value(value) => (Some(value), [].as_slice()),
            Self::Expression(expression) => (None, expression.values.as_slice()),
        };
        one.into_iter().chain(many.iter().map(Text::as_str))
    }

    fn is_met_by(&self, value: Option<&str>) -> bool {
        match self {
            Self::Value(own) => value == Some(own),
            Self::Expression(expression) => expression.is_met_by(value),
        }
    }
}

/// All requirements on a label. A node must meet all of them.
#[derive(Debug)]
pub(super) struct LabelRequirements<'a>(pub(super) Vec<Requirement<'a>>);

impl LabelRequirements<'_> {
    /// Whether there is no requirement.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a node meets them, if this is the value of its label; `None` if it does not have the label.
    pub(super) fn are_met_by(&self, value: Option<&str>) -> bool {
        self.0.iter().all(|requirement| requirement.is_met_by(value))
    }

    /// Whether a node can meet them by a value that is not one of `excluded`.
    pub(super) fn are_met_by_another_value<'v>(&self, excluded: impl Iterator<Item = &'v str>) -> bool {
        if let Some(mut values) = self.listed_values() {
            for value in excluded {
                values.remove(value);
            }
            return !values.is_empty();
        }
        let (mut least, mut most) = LABEL_NUMBERS;
        let mut is_number = false;
        for requirement in &self.0 {
            let Requirement::Expression(expression) = requirement else { return false };
            match (expression.operator.as_str(), expression.number()) {
                ("NotIn" | "Exists", _) => {}
                ("Gt", Some(number)) if number < i64::MAX => (least, is_number) = (least.max(number + 1), true),
                ("Lt", Some(number)) if number > i64::MIN => (most, is_number) = (most.min(number - 1), true),
                _ => return false,
            }
        }
        // There are more values than a list excludes. Of numbers too, because they can be written with zeros in front.
        !is_number || least <= most
    }

    /// The values that meet them; `None` if they do not list any. Takes time in proportion to the lists, which a hostile pod
    /// can make long.
    fn listed_values(&self) -> Option<HashSet<&str>> {
        let list = |requirement: &Requirement<'_>| matches!(requirement, Requirement::Value(_)) || requirement.is("In");
        let mut values: HashSet<&str> = self.0.iter().find(|own| list(own))?.values().collect();
        for requirement in &self.0 {
            if requirement.is("NotIn") {
                for value in requirement.values() {
                    values.remove(value);
                }
            } else if list(requirement) {
                let others: HashSet<&str> = requirement.values().collect();
                values.retain(|value| others.contains(value));
            } else {
                values.retain(|value| requirement.is_met_by(Some(value)));
            }
        }
        Some(values)
    }
}
