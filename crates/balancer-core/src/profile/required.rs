//! Which capacity a pod requires by itself.

use std::iter;

use crate::capacity::Capacity;
use crate::platform::{CapacityLabels, LabelValues, OtherLabel, Platform};
use crate::pod::{NodeSelectorTerm, Pod, PodSpec};

use super::Profile;
use super::matching::{LabelRequirements, Requirement};
use super::request::{Added, Request};

/// On which nodes of each capacity something is possible.
#[derive(Clone, Copy, Debug, Default)]
struct OnCapacities {
    spot: bool,
    on_demand: bool,
}

/// The nodes that a pod can run on.
#[derive(Clone, Copy, Debug, Default)]
struct Permitted {
    /// Nodes of the configured platform that requests for these capacities reach: those of the main label, without those that
    /// another label makes something else. They may have the labels of other platforms too.
    reached: OnCapacities,
    /// Nodes of other platforms, without the labels of the configured one.
    elsewhere: OnCapacities,
    /// Nodes that another label than a platform's main one makes spot, and only such nodes.
    only_marked: bool,
    /// Whether each of the nodes must have a label of another platform than the configured one.
    needs_other_label: bool,
}

/// The nodes of one platform that meet what a pod requires of the platform's labels.
#[derive(Clone, Copy, Debug)]
struct Matched {
    /// Whether the pod mentions the labels.
    is_mentioned: bool,
    nodes: OnCapacities,
    /// Whether a node without these labels does.
    unlabelled: bool,
    only_marked: bool,
}

/// The requirements of a pod on its node, without those of `without`.
#[derive(Clone, Copy, Debug)]
struct NodeRules<'p> {
    spec: &'p PodSpec<'p>,
    without: Option<&'p Request<'p>>,
}

impl Profile<'_> {
    /// The capacity that the pod requires by its nodeSelector and required node affinity; `None` if it may run on both.
    ///
    /// A pod that may run on the configured platform's spot nodes but not on its on-demand nodes requires spot. A pod that
    /// may not run on spot counts as on-demand, even if it requires something else. A pod that only excludes the spot nodes
    /// of another platform may run on both: it says nothing about those of the configured platform. If another webhook has
    /// added a requirement for the other capacity after Spot Balancer had placed the pod, that requirement counts, because
    /// [`Profile::apply`] then removes Spot Balancer's own.
    pub fn required_capacity(self, pod: &Pod<'_>) -> Option<Capacity> {
        let spec = pod.spec.as_ref()?;
        let instead = self.added(pod).and_then(|added| self.required_instead(spec, &added));
        instead.or_else(|| self.required_by(spec, None))
    }

    /// The capacity that a pod requires, without the requirements of `without`.
    pub(super) fn required_by(self, spec: &PodSpec<'_>, without: Option<&Request<'_>>) -> Option<Capacity> {
        self.permitted(spec, without)?.required()
    }

    /// The capacity that a pod requires without what Spot Balancer has added, if that keeps the pod from it: both cannot be
    /// met, or only by a node that has the labels of another platform too, which few nodes have.
    pub(super) fn required_instead(self, spec: &PodSpec<'_>, added: &Added<'_>) -> Option<Capacity> {
        let without = self.permitted(spec, Some(&added.request)).filter(|without| without.is_possible())?;
        let with = self.permitted(spec, None)?;
        let is_met = match added.capacity {
            Capacity::Spot => with.reached.spot,
            Capacity::OnDemand => with.reached.on_demand,
        };
        without.required().filter(|_| !is_met || with.needs_other_label)
    }

    /// The nodes that a pod can run on, without the requirements of `without`; `None` if it requires nothing.
    fn permitted(self, spec: &PodSpec<'_>, without: Option<&Request<'_>>) -> Option<Permitted> {
        let rules = NodeRules { spec, without };
        if rules.are_none() {
            return None;
        }
        let permit = |term| rules.permit(term, &self.0.capacity_labels);
        Some(match rules.terms() {
            None => permit(None),
            // The node must match one of the terms.
            Some(terms) => {
                let valid = terms.filter(|term| term.is_valid());
                valid.map(|term| permit(Some(term))).reduce(Permitted::or).unwrap_or_default()
            }
        })
    }
}

impl OnCapacities {
    fn or(self, other: Self) -> Self {
        Self { spot: self.spot || other.spot, on_demand: self.on_demand || other.on_demand }
    }

    fn and(self, other: Self) -> Self {
        Self { spot: self.spot && other.spot, on_demand: self.on_demand && other.on_demand }
    }

    /// For both capacities, or for neither.
    fn both(is_possible: bool) -> Self {
        Self { spot: is_possible, on_demand: is_possible }
    }
}

impl Permitted {
    fn or(self, other: Self) -> Self {
        Self {
            reached: self.reached.or(other.reached),
            elsewhere: self.elsewhere.or(other.elsewhere),
            only_marked: self.only_marked || other.only_marked,
            needs_other_label: self.needs_other_label && other.needs_other_label,
        }
    }

    fn is_possible(self) -> bool {
        let OnCapacities { spot, on_demand } = self.reached.or(self.elsewhere);
        spot || on_demand || self.only_marked
    }

    fn required(self) -> Option<Capacity> {
        match self.reached {
            OnCapacities { spot: true, on_demand: true } => None,
            OnCapacities { spot: true, .. } => Some(Capacity::Spot),
            OnCapacities { on_demand: true, .. } => Some(Capacity::OnDemand),
            // No request would reach a node, so the pod is not given one.
            _ if (self.elsewhere.spot || self.only_marked) && !self.elsewhere.on_demand => Some(Capacity::Spot),
            _ => Some(Capacity::OnDemand),
        }
    }
}

impl<'p> NodeRules<'p> {
    fn are_none(self) -> bool {
        self.spec.node_selector.as_ref().is_none_or(|selector| selector.0.is_empty())
            && self.spec.required_terms().is_none()
    }

    /// The terms of which a node must match one; `None` if it need not match any.
    fn terms(self) -> Option<impl Iterator<Item = &'p NodeSelectorTerm<'p>>> {
        let is_left = move |term: &&NodeSelectorTerm<'_>| self.without.is_none_or(|without| !without.is_all_of(term));
        let terms = self.spec.required_terms()?;
        // If nothing is left, the pod had no terms.
        (terms.is_empty() || terms.iter().any(|term| is_left(&term))).then(|| terms.iter().filter(is_left))
    }

    /// The requirements on a label, by the nodeSelector and a term.
    fn on(self, label: &str, term: Option<&'p NodeSelectorTerm<'p>>) -> LabelRequirements<'p> {
        let without = self.without;
        let selector = self.spec.node_selector.as_ref().filter(|_| without.is_none_or(|own| !own.has_selector(label)));
        let value = selector.and_then(|selector| selector.get(label)).map(Requirement::Value);
        let expressions = term.and_then(|term| term.expressions.as_ref()).into_iter().flatten();
        let expressions = expressions.filter(|own| own.key.as_str() == label);
        let expressions = expressions.filter(|own| without.is_none_or(|without| !without.has_expression(own)));
        LabelRequirements(value.into_iter().chain(expressions.map(Requirement::Expression)).collect())
    }

    /// On which nodes the nodeSelector and one term permit the pod.
    ///
    /// A node has the labels of one platform, or those of several, as the nodes of Azure's node auto provisioning do. So a
    /// requirement on the label of another platform need not exclude a node of the configured one: `NotIn [SPOT]` and
    /// `DoesNotExist` are met by a node that does not have the label.
    fn permit(self, term: Option<&'p NodeSelectorTerm<'p>>, configured: &CapacityLabels) -> Permitted {
        let mut platforms =
            Platform::all(configured).map(|platform| (platform.labels.profile, self.matched(term, platform)));
        let Some((_, ours)) = platforms.next() else { return Permitted::default() };
        let mut met = OnCapacities::both(true);
        let mut mentioned = None::<OnCapacities>;
        let mut only_marked = ours.only_marked;
        let mut needs_other_label = false;
        for (profile, other) in platforms {
            met = met.and(other.nodes.or(OnCapacities::both(other.unlabelled)));
            if other.is_mentioned {
                mentioned = Some(mentioned.unwrap_or_default().or(other.nodes));
            }
            only_marked |= other.only_marked;
            // With a label of one's own, the nodes have those of the configured profile too.
            needs_other_label |= !other.unlabelled && profile != configured.profile;
        }
        // Of the platforms that the pod mentions, else of any.
        let others = mentioned.unwrap_or(OnCapacities::both(true));
        Permitted {
            reached: ours.nodes.and(met),
            elsewhere: others.and(met).and(OnCapacities::both(ours.unlabelled)),
            only_marked,
            needs_other_label,
        }
    }

    /// The nodes of a platform that meet what the nodeSelector and one term require of its labels.
    fn matched(self, term: Option<&'p NodeSelectorTerm<'p>>, platform: Platform<'_>) -> Matched {
        let main = self.on(&platform.labels.label, term);
        let mut matched = Matched {
            is_mentioned: !main.is_empty(),
            nodes: OnCapacities { spot: platform.has_spot(&main), on_demand: platform.has_on_demand(&main) },
            unlabelled: main.are_met_by(None),
            only_marked: false,
        };
        for other in platform.others {
            let requirements = self.on(other.label, term);
            matched.is_mentioned |= !requirements.is_empty();
            matched.nodes.spot &= requirements.are_met_by(other.on_spot);
            matched.nodes.on_demand &= requirements.are_met_by(other.on_on_demand);
            matched.unlabelled &= requirements.are_met_by(None);
            matched.only_marked |= other.is_demanded(&requirements);
        }
        matched
    }
}

impl Platform<'_> {
    /// Whether a spot node can meet the requirements on the main label.
    fn has_spot(self, main: &LabelRequirements<'_>) -> bool {
        match &self.labels.spot_values {
            _ if main.is_empty() => true,
            LabelValues::Any => main.are_met_by_another_value(iter::empty()),
            LabelValues::OneOf(values) => values.iter().any(|value| main.are_met_by(Some(value))),
        }
    }

    /// Whether an on-demand node can meet the requirements on the main label.
    fn has_on_demand(self, main: &LabelRequirements<'_>) -> bool {
        match (self.labels.on_demand_values.as_slice(), &self.labels.spot_values) {
            _ if main.is_empty() => true,
            ([], LabelValues::Any) => main.are_met_by(None),
            ([], LabelValues::OneOf(spot)) => {
                let mut known = self.known.iter().filter(|value| !self.labels.spot_values.contains(value));
                main.are_met_by(None)
                    || known.any(|value| main.are_met_by(Some(value)))
                    || (self.known.is_empty() && main.are_met_by_another_value(spot.iter().map(String::as_str)))
            }
            (values, _) => values.iter().any(|value| main.are_met_by(Some(value))),
        }
    }
}

impl OtherLabel {
    /// Whether the requirements demand one of the values that make a node spot.
    fn is_demanded(&self, requirements: &LabelRequirements<'_>) -> bool {
        self.means == Capacity::Spot
            && self.values.iter().any(|value| requirements.are_met_by(Some(value)))
            && !requirements.are_met_by(None)
            && !requirements.are_met_by_another_value(self.values.iter().copied())
    }
}
