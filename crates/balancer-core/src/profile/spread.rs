//! Where on spot an executor should run: how many of the job on one node, and on which instance types rather not.

use serde_json::{Map, Value, json};

use crate::patch::{Object, Patch};
use crate::platform::Platform;
use crate::pod::{Pod, PodSpec, PreferredTerm, SpreadConstraints};
use crate::steering::Spread;

use super::Profile;
use super::apply::{PREFERRED, append, remove_preferred};
use super::request::{Expression, MatchExpressions, Preferred, Request, WEIGHT};

const CONSTRAINTS: &str = "topologySpreadConstraints";
const HOSTNAME: &str = "kubernetes.io/hostname";
const DO_NOT_SCHEDULE: &str = "DoNotSchedule";
const INSTANCE_TYPE: &str = "node.kubernetes.io/instance-type";

/// A node may have `maxSkew` executors more than the node with the fewest. If fewer nodes than this are eligible, the
/// scheduler takes 0 for the fewest, so that `maxSkew` is the most executors of a node. Kubernetes supports 5000 nodes.
const MIN_DOMAINS: u32 = 10_000;

/// What the patch has changed in the pod's node affinity before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Edited<'r> {
    /// The request that was removed.
    pub(super) removed: Option<&'r Request<'r>>,
    /// The request that the pod has now.
    pub(super) added: Option<&'r Request<'r>>,
}

impl Profile<'_> {
    /// Whether the pod has a constraint of its own on its executors per node. It precedes the one of Spot Balancer, because
    /// the apiserver accepts only one for each topology.
    pub fn spreads_itself(self, pod: &Pod<'_>) -> bool {
        let Some(selector) = self.selector(pod) else { return false };
        let constraints = pod.spec.as_ref().and_then(|spec| spec.spread_constraints.as_ref());
        let constraints = constraints.and_then(SpreadConstraints::list).unwrap_or_default();
        let is_placed = self.0.decision(pod).is_some();
        constraints.iter().any(|own| limits_nodes(own) && !is_ours(own, &selector, is_placed))
    }

    /// Changes where on spot the pod should run; without `spread` it may run anywhere. What Spot Balancer has added in an
    /// earlier call of the same admission is removed if it is outdated.
    pub(super) fn apply_spread(self, patch: &mut Patch, pod: &Pod<'_>, spread: Option<&Spread>, edited: Edited<'_>) {
        let limit = spread.and_then(|spread| spread.max_executors_per_node).filter(|limit| *limit > 0);
        let avoid = spread.map(|spread| spread.avoid.as_slice()).unwrap_or_default();
        let is_placed = self.0.decision(pod).is_some();
        let spec = pod.spec.as_ref();
        let own = spec.and_then(|spec| spec.spread_constraints.as_ref());
        if limit.is_some() || (is_placed && own.is_some()) {
            self.limit_executors(patch, pod, limit, is_placed);
        }
        if !avoid.is_empty() || is_placed {
            self.avoid_types(patch, spec, avoid, is_placed, edited);
        }
    }

    fn limit_executors(self, patch: &mut Patch, pod: &Pod<'_>, limit: Option<u32>, is_placed: bool) {
        let Some(selector) = self.selector(pod) else { return };
        let own = pod.spec.as_ref().and_then(|spec| spec.spread_constraints.as_ref());
        // The apiserver refuses a pod whose constraints are not a list.
        let Some(list) = own.map_or(Some(Vec::new()), SpreadConstraints::list) else { return };
        let ours = list.iter().position(|own| is_ours(own, &selector, is_placed));
        let limits_itself = list.iter().enumerate().any(|(i, own)| Some(i) != ours && limits_nodes(own));
        let limit = limit.filter(|_| !limits_itself);
        let written = ours.and_then(|at| list.get(at)?.get("maxSkew")?.as_u64());
        if written.is_some() && written == limit.map(u64::from) {
            return;
        }
        if let Some(at) = ours {
            patch.remove(&["spec", CONSTRAINTS, &at.to_string()]);
        }
        if let Some(limit) = limit {
            let constraint = Object(&[
                ("labelSelector", &selector),
                ("maxSkew", &Value::from(limit)),
                ("minDomains", &Value::from(MIN_DOMAINS)),
                ("topologyKey", &HOSTNAME),
                ("whenUnsatisfiable", &DO_NOT_SCHEDULE),
            ]);
            append(patch, &[("spec", true)], (CONSTRAINTS, own.is_some()), &[constraint]);
        }
    }

    /// Only nodes that are spot profit from the preference. An executor that may run on on-demand nodes too must not prefer
    /// them because of their instance type.
    ///
    /// Of the preferences with the largest weight Karpenter follows the first alone, until it finds no node with it.
    /// Therefore this one stands before the one for spot.
    fn avoid_types(
        self,
        patch: &mut Patch,
        spec: Option<&PodSpec<'_>>,
        avoid: &[String],
        is_placed: bool,
        edited: Edited<'_>,
    ) {
        let spot = Platform::configured(&self.0.capacity_labels).spot();
        let values = avoid.iter().map(String::as_str).collect();
        let avoids = Expression { key: INSTANCE_TYPE, operator: "NotIn", values };
        let own = spec.map(PodSpec::preferred_terms).unwrap_or_default();
        let removed = match (spec, edited.removed) {
            (Some(spec), Some(Request::Preferred(expression))) => expression.preferred_at(spec),
            _ => None,
        };
        let has_preferred = matches!(edited.added, Some(Request::Preferred(_)));
        // The one for spot, which the patch has appended if the pod did not have it.
        let mut spot_at = match (spec, edited.added) {
            (Some(spec), Some(Request::Preferred(expression))) => expression.preferred_at(spec).unwrap_or(own.len()),
            _ => own.len(),
        };
        let mut is_written = false;
        // From the end, so that the places of the others do not change.
        for (at, own) in own.iter().enumerate().rev() {
            let Some(types) = avoided_types(own, &spot) else { continue };
            if !avoid.is_empty() && !is_written && types.eq(avoid.iter().map(String::as_str)) {
                is_written = true;
            } else if is_placed {
                let is_behind = removed.is_some_and(|removed| removed < at);
                remove_preferred(patch, at - usize::from(is_behind));
                spot_at -= usize::from(at < spot_at);
            }
        }
        if avoid.is_empty() || is_written {
            return;
        }
        let affinity = spec.and_then(|spec| spec.affinity.as_ref());
        let node_affinity = affinity.and_then(|affinity| affinity.node_affinity.as_ref());
        let preferred = node_affinity.and_then(|own| own.preferred.as_ref());
        let has_affinity = matches!(edited.added, Some(Request::Preferred(_) | Request::Required(_)));
        let parents = [
            ("spec", true),
            ("affinity", affinity.is_some() || has_affinity),
            ("nodeAffinity", node_affinity.is_some() || has_affinity),
        ];
        let term = Preferred(MatchExpressions(&[spot, avoids]));
        if has_preferred {
            patch.add_value(&[&parents[..], &[(PREFERRED, true)]].concat(), &spot_at.to_string(), &term);
        } else {
            append(patch, &parents, (PREFERRED, preferred.is_some()), &[term]);
        }
    }

    /// The labelSelector of the job's executors; `None` if the pod has no job id.
    fn selector(self, pod: &Pod<'_>) -> Option<Value> {
        let (label, job) = self.0.job(pod)?;
        let mut labels = Map::new();
        labels.insert(self.0.workload_role_label.clone(), self.0.executor_role_value.as_str().into());
        labels.insert(label.to_owned(), job.into());
        Some(json!({"matchLabels": labels}))
    }
}

/// Whether the constraint is one of which the apiserver accepts no second.
fn limits_nodes(constraint: &Value) -> bool {
    let is = |key, value| constraint.get(key).and_then(Value::as_str) == Some(value);
    is("topologyKey", HOSTNAME) && is("whenUnsatisfiable", DO_NOT_SCHEDULE)
}

/// Whether Spot Balancer has written the constraint. An apiserver that does not know `minDomains` has dropped it, so that
/// only the decision in a pod that `is_placed` tells the constraint from one of the pod's own.
fn is_ours(constraint: &Value, selector: &Value, is_placed: bool) -> bool {
    const FIELDS: [&str; 5] = ["labelSelector", "maxSkew", "minDomains", "topologyKey", "whenUnsatisfiable"];
    let Some(fields) = constraint.as_object() else { return false };
    let is_minimum = match fields.get("minDomains") {
        None | Some(Value::Null) => is_placed,
        Some(minimum) => minimum.as_u64() == Some(MIN_DOMAINS.into()),
    };
    is_minimum
        && limits_nodes(constraint)
        && fields.get("labelSelector") == Some(selector)
        && fields.iter().all(|(key, value)| value.is_null() || FIELDS.contains(&key.as_str()))
}

/// The instance types that a preferred term of Spot Balancer avoids; `None` for any other term.
fn avoided_types<'t>(own: &'t PreferredTerm<'_>, spot: &Expression<'_>) -> Option<impl Iterator<Item = &'t str>> {
    match own.term.expressions.as_deref() {
        Some([first, second])
            if own.weight == WEIGHT
                && own.term.fields.is_empty()
                && spot.equals(first)
                && second.key.as_str() == INSTANCE_TYPE
                && second.operator.as_str() == "NotIn" =>
        {
            Some(second.values.iter().map(|value| value.as_str()))
        }
        _ => None,
    }
}
