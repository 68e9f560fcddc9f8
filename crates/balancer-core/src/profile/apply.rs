//! What to change in a pod, so that it is scheduled on a capacity.

use std::borrow::Cow;
use std::slice;

use crate::capacity::Capacity;
use crate::conventions::DriverCapacity;
use crate::patch::{APPEND, Field, Object, Patch, ToJson};
use crate::platform::{Platform, Toleration};
use crate::pod::{NodeSelectorTerm, Pod, PodSpec, PodToleration, Tolerations};
use crate::steering::Spread;

use super::Profile;
use super::request::{Added, MatchExpressions, Preferred, Request};
use super::spread::Edited;

const REQUIRED: &str = "requiredDuringSchedulingIgnoredDuringExecution";
pub(super) const PREFERRED: &str = "preferredDuringSchedulingIgnoredDuringExecution";

/// Keep autoscalers from moving a pod: Karpenter, and the cluster autoscaler.
const PROTECTION: [(&str, &str); 2] =
    [("karpenter.sh/do-not-disrupt", "true"), ("cluster-autoscaler.kubernetes.io/safe-to-evict", "false")];

impl Profile<'_> {
    /// What to change in an executor that was placed on `capacity`: what it needs to be scheduled there, and the decision
    /// annotation with the placeholder. Everything is added to what the pod has.
    ///
    /// A pod that requires a capacity by itself gets nothing for it. If Spot Balancer has placed the pod on the other
    /// capacity before, or a later webhook requires nodes of another platform, what it has added for that is removed. On
    /// spot, `spread` says where the pod should run, even if the pod requires spot by itself; a constraint of the pod's own precedes it.
    pub fn apply(self, pod: &Pod<'_>, capacity: Capacity, placeholder: Option<&str>, spread: &Spread) -> Patch {
        let mut patch = Patch::default();
        let conventions = self.0;
        let spec = pod.spec.as_ref();
        let is_outdated = |added: &Added<'_>| {
            added.capacity != capacity || spec.is_some_and(|spec| self.required_instead(spec, added).is_some())
        };
        let outdated = self.added(pod).filter(is_outdated).map(|added| added.request);
        let decides_itself = spec.is_some_and(|spec| self.required_by(spec, outdated.as_ref()).is_some());
        if let (Some(spec), Some(outdated)) = (spec, &outdated) {
            remove_request(&mut patch, spec, outdated);
        }
        if !decides_itself {
            self.add_to_spec(&mut patch, spec, capacity, outdated.as_ref());
        }
        if !spread.is_none() || conventions.decision(pod).is_some() {
            let spread = Some(spread).filter(|_| capacity == Capacity::Spot);
            let added = (!decides_itself).then(|| self.request(capacity));
            self.apply_spread(&mut patch, pod, spread, Edited { removed: outdated.as_ref(), added: added.as_ref() });
        }
        if let Some(key) = conventions.decision_annotation.as_deref() {
            let own = pod.annotation(key);
            // A pod that decides itself needs none, but keeps none that is wrong.
            if !decides_itself || placeholder.is_some() || own.is_some() {
                let decision = match placeholder {
                    Some(id) => format!("{capacity}/{id}").into(),
                    None => Cow::Borrowed(capacity.as_str()),
                };
                // On reinvocation the pod has it already.
                if own != Some(&*decision) {
                    annotate(&mut patch, pod, [(key, &*decision)].into_iter());
                }
            }
        }
        patch
    }

    /// What to remove from an executor that is opted out after it was placed: what it got to be scheduled on its capacity, and
    /// the decision annotation. The role's selector and the tolerations stay, because the pod may have had the same itself.
    pub fn withdraw(self, pod: &Pod<'_>) -> Patch {
        let mut patch = Patch::default();
        let removed = self.added(pod).map(|added| added.request);
        if let (Some(spec), Some(removed)) = (pod.spec.as_ref(), &removed) {
            remove_request(&mut patch, spec, removed);
        }
        self.apply_spread(&mut patch, pod, None, Edited { removed: removed.as_ref(), added: None });
        let decision = self.0.decision_annotation.as_deref().filter(|key| pod.annotation(key).is_some());
        if let Some(key) = decision {
            patch.remove(&["metadata", "annotations", key]);
        }
        patch
    }

    /// What to change in a driver: what it needs to be scheduled on on-demand, unless it chooses a capacity itself or is
    /// bound to a node; and what keeps autoscalers from moving it, unless it says so or otherwise itself. If a later webhook
    /// has chosen another capacity, what was added for on-demand is removed.
    pub fn apply_to_driver(self, pod: &Pod<'_>) -> Patch {
        let mut patch = Patch::default();
        let conventions = self.0;
        let spec = pod.spec.as_ref();
        if conventions.driver_capacity == DriverCapacity::OnDemand && spec.is_none_or(|spec| !spec.is_bound()) {
            let request = Platform::configured(&conventions.capacity_labels).require_on_demand();
            let pinned = spec.filter(|spec| request.is_in(spec));
            match pinned {
                // A driver has no decision annotation, so a requirement of its own can look like ours. It is removed only from a
                // driver that it would leave without a node, or that requires nodes of another platform.
                Some(spec) => {
                    let added = Added { capacity: Capacity::OnDemand, request };
                    if self.required_instead(spec, &added).is_some() {
                        remove_request(&mut patch, spec, &added.request);
                    }
                }
                None if spec.is_none_or(|spec| self.required_by(spec, None).is_none()) => {
                    require(&mut patch, spec, &request, None, None);
                }
                None => {}
            }
        }
        if conventions.protect_drivers {
            annotate(&mut patch, pod, PROTECTION.into_iter().filter(|(key, _)| pod.annotation(key).is_none()));
        }
        patch
    }

    /// `removed` is the request that the patch has removed before.
    fn add_to_spec(
        self,
        patch: &mut Patch,
        spec: Option<&PodSpec<'_>>,
        capacity: Capacity,
        removed: Option<&Request<'_>>,
    ) {
        let conventions = self.0;
        let request = self.request(capacity);
        let own = spec.and_then(|spec| spec.node_selector.as_ref());
        let role = conventions.workload_role_label.as_str();
        // An executor that may run anywhere needs none. The pod's own selector for the role stays.
        let selects_role = conventions.node_role_selector
            && !matches!(request, Request::Preferred(_))
            && own.is_none_or(|own| own.get(role).is_none());
        let role = selects_role.then_some((role, conventions.executor_role_value.as_str()));
        require(patch, spec, &request, role, removed);
        let wanted = &conventions.capacity_labels.spot_tolerations;
        if capacity == Capacity::Spot && !wanted.is_empty() {
            let own = spec.and_then(|spec| spec.tolerations.as_ref());
            let list = ("tolerations", own.is_some());
            let own = own.map(Tolerations::decoded).unwrap_or_default();
            let missing = wanted.iter().filter(|wanted| !own.iter().any(|own| wanted.is_covered_by(own)));
            append(patch, &[("spec", true)], list, &missing.collect::<Vec<_>>());
        }
    }
}

/// Adds a request and a nodeSelector for the role. `removed` is the request that the patch has removed before.
fn require(
    patch: &mut Patch,
    spec: Option<&PodSpec<'_>>,
    request: &Request<'_>,
    role: Option<(&str, &str)>,
    removed: Option<&Request<'_>>,
) {
    if spec.is_none() {
        patch.add_value(&[], "spec", &Object(&[]));
    }
    let capacity = match *request {
        Request::Selector(key, value) => Some((key, value)),
        _ => None,
    };
    let own = spec.and_then(|spec| spec.node_selector.as_ref());
    if capacity.is_some() || role.is_some() {
        let parents = [("spec", true), ("nodeSelector", own.is_some())];
        patch.add_pairs(&parents, capacity.into_iter().chain(role));
    }
    let affinity = spec.and_then(|spec| spec.affinity.as_ref());
    let node_affinity = affinity.and_then(|affinity| affinity.node_affinity.as_ref());
    let parents = [("spec", true), ("affinity", affinity.is_some()), ("nodeAffinity", node_affinity.is_some())];
    match request {
        Request::Selector(..) => {}
        Request::Preferred(expression) => {
            let own = node_affinity.and_then(|own| own.preferred.as_ref());
            if spec.is_none_or(|spec| expression.preferred_at(spec).is_none()) {
                append(
                    patch,
                    &parents,
                    (PREFERRED, own.is_some()),
                    &[Preferred(MatchExpressions(slice::from_ref(expression)))],
                );
            }
        }
        Request::Required(expressions) => {
            let is_left = |term: &&NodeSelectorTerm<'_>| removed.is_none_or(|removed| !removed.is_all_of(term));
            // If none is left, the patch has removed all of it.
            let has_left =
                |terms: &&[NodeSelectorTerm<'_>]| terms.is_empty() || terms.iter().any(|term| is_left(&term));
            match spec.and_then(PodSpec::required_terms).filter(has_left) {
                None => {
                    let terms = [MatchExpressions(expressions)];
                    patch.add_value(&parents, REQUIRED, &Object(&[("nodeSelectorTerms", &terms)]));
                }
                // The node must match one of the terms, so each of them needs the expressions. An empty term matches no
                // node, and would match some with them.
                Some(terms) => {
                    for (i, term) in terms.iter().filter(is_left).enumerate().filter(|(_, term)| !term.is_empty()) {
                        let i = i.to_string();
                        let mut parents = parents.to_vec();
                        parents.extend([(REQUIRED, true), ("nodeSelectorTerms", true), (&i, true)]);
                        append(patch, &parents, ("matchExpressions", term.expressions.is_some()), expressions);
                    }
                }
            }
        }
    }
}

const AFFINITY: [&str; 3] = ["spec", "affinity", "nodeAffinity"];

/// Removes the preferred term at this place.
pub(super) fn remove_preferred(patch: &mut Patch, at: usize) {
    patch.remove(&[&AFFINITY[..], &[PREFERRED, &at.to_string()]].concat());
}

/// Removes a request that the pod has, and what would be empty without it.
fn remove_request(patch: &mut Patch, spec: &PodSpec<'_>, request: &Request<'_>) {
    match request {
        Request::Selector(key, _) => patch.remove(&["spec", "nodeSelector", key]),
        Request::Preferred(expression) => {
            if let Some(at) = expression.preferred_at(spec) {
                remove_preferred(patch, at);
            }
        }
        Request::Required(_) => {
            let terms = spec.required_terms().unwrap_or_default();
            let required = [&AFFINITY[..], &[REQUIRED]].concat();
            if terms.iter().all(|term| request.is_all_of(term)) {
                return patch.remove(&required);
            }
            // From the end, so that the places of the others do not change.
            for (i, term) in terms.iter().enumerate().rev() {
                let i = i.to_string();
                let term_path = [&required[..], &["nodeSelectorTerms", &i]].concat();
                if request.is_all_of(term) {
                    patch.remove(&term_path);
                    continue;
                }
                let expressions = term.expressions.as_deref().unwrap_or_default().iter().enumerate().rev();
                for (at, _) in expressions.filter(|(_, own)| request.has_expression(own)) {
                    patch.remove(&[&term_path[..], &["matchExpressions", &at.to_string()]].concat());
                }
            }
        }
    }
}

/// Appends to the array `list.0` below `parents`. `list.1` is whether the pod has it.
pub(super) fn append(patch: &mut Patch, parents: &[(&str, bool)], list: (&str, bool), values: &[impl ToJson]) {
    match list {
        _ if values.is_empty() => {}
        (key, false) => patch.add_value(parents, key, &values),
        (_, true) => {
            let parents = [parents, &[list]].concat();
            values.iter().for_each(|value| patch.add_value(&parents, APPEND, value));
        }
    }
}

/// Adds annotations.
fn annotate<'a>(patch: &mut Patch, pod: &Pod<'_>, pairs: impl Iterator<Item = (&'a str, &'a str)>) {
    let mut pairs = pairs.peekable();
    if pairs.peek().is_some() {
        let has_annotations = pod.metadata.annotations.is_some();
        patch.add_pairs(&[("metadata", true), ("annotations", has_annotations)], pairs);
    }
}

impl ToJson for Toleration {
    fn push_to(&self, json: &mut Vec<u8>) {
        let (key, effect): (Field<'_>, Field<'_>) = (("key", &self.key), ("effect", &self.effect));
        match &self.value {
            Some(value) => Object(&[key, ("operator", &"Equal"), ("value", value), effect]).push_to(json),
            None => Object(&[key, ("operator", &"Exists"), effect]).push_to(json),
        }
    }
}

impl Toleration {
    /// Whether the pod's own toleration accepts every taint that this one accepts.
    fn is_covered_by(&self, own: &PodToleration<'_>) -> bool {
        let accepts_value = match (own.operator.as_str(), &self.value) {
            ("Exists", _) => own.key.is_empty() || *own.key == *self.key,
            ("Equal" | "", Some(value)) => *own.key == *self.key && *own.value == **value,
            _ => false,
        };
        // One with seconds accepts a taint for that time only.
        accepts_value && (own.effect.is_empty() || *own.effect == *self.effect) && own.seconds.is_none()
    }
}
