//! What a pod requires of its node, in words.

use std::fmt::{self, Display};

use crate::pod::{NodeSelectorRequirement, NodeSelectorTerm, Pod};
use crate::text::shorten_to;

use super::request::{Expression, Request};
use super::{NodeRequirements, Profile};

/// The most requirements that are described, and the most characters of each.
const MAX_REQUIREMENTS: usize = 16;
const MAX_CHARS: usize = 256;

impl Profile<'_> {
    /// What a pod requires of its node: by what Spot Balancer added for its placement, and by itself.
    pub fn requirements(self, pod: &Pod<'_>) -> NodeRequirements {
        let Some(spec) = pod.spec.as_ref() else { return NodeRequirements::default() };
        let added = self.added(pod).filter(|added| !matches!(added.request, Request::Preferred(_)));
        let request = added.as_ref().map(|added| &added.request);
        let role = (self.0.workload_role_label.as_str(), self.0.executor_role_value.as_str());
        let mut found = NodeRequirements {
            placed: added.as_ref().map(|added| added.capacity),
            own_capacity: self.required_by(spec, request),
            ..NodeRequirements::default()
        };
        if let Some(Request::Required(expressions)) = request {
            found.ours.extend(expressions.iter().map(ToString::to_string));
        }
        for (key, value) in spec.node_selector.iter().flat_map(|selector| &selector.0) {
            let (key, value) = (key.as_str(), value.as_str());
            let is_ours = request.is_some_and(|request| {
                request.has_selector(key) || (self.0.node_role_selector && (key, value) == role)
            });
            let list = if is_ours { &mut found.ours } else { &mut found.own };
            push(list, Expression { key, operator: "In", values: vec![value] });
        }
        let is_left = |term: &&NodeSelectorTerm<'_>| request.is_none_or(|request| !request.is_all_of(term));
        let terms: Vec<String> =
            spec.required_terms().into_iter().flatten().filter(is_left).map(|term| describe(term, request)).collect();
        match terms.as_slice() {
            _ if request.is_some() && terms.is_empty() => {}
            _ if spec.required_terms().is_none() => {}
            [] => push(&mut found.own, "no node"),
            [term] => push(&mut found.own, term),
            terms => push(&mut found.own, format!("({})", terms.join(") or ("))),
        }
        found
    }
}

/// A term without the requirements of `without`.
fn describe(term: &NodeSelectorTerm<'_>, without: Option<&Request<'_>>) -> String {
    let expressions = term.expressions.iter().flatten();
    let own = expressions.filter(|own| without.is_none_or(|without| !without.has_expression(own)));
    let words: Vec<String> = own.chain(&term.fields).take(MAX_REQUIREMENTS).map(ToString::to_string).collect();
    if words.is_empty() { "no node".to_owned() } else { words.join(" and ") }
}

fn push(list: &mut Vec<String>, requirement: impl Display) {
    if list.len() < MAX_REQUIREMENTS {
        list.push(shorten_to(&requirement.to_string(), MAX_CHARS));
    }
}

/// A requirement in words.
fn write_words<'v>(
    f: &mut fmt::Formatter<'_>,
    key: &str,
    operator: &str,
    values: impl Iterator<Item = &'v str>,
) -> fmt::Result {
    let values = values.collect::<Vec<_>>().join(", ");
    match operator {
        "In" => write!(f, "{key} in ({values})"),
        "NotIn" => write!(f, "{key} not in ({values})"),
        "Exists" => write!(f, "{key} exists"),
        "DoesNotExist" => write!(f, "{key} does not exist"),
        "Gt" => write!(f, "{key} > {values}"),
        "Lt" => write!(f, "{key} < {values}"),
        other => write!(f, "{key} {other} ({values})"),
    }
}

impl Display for NodeSelectorRequirement<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_words(f, &self.key, &self.operator, self.values.iter().map(|value| value.as_str()))
    }
}

impl Display for Expression<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_words(f, self.key, self.operator, self.values.iter().copied())
    }
}
