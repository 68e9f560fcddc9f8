//! Which capacity a node has.

use crate::capacity::Capacity;
use crate::platform::{CapacityProfile, LabelValues, Platform};

use super::Profile;

impl Profile<'_> {
    /// The capacity of a node; `None` if nothing tells it. `label` returns the value of one of the node's labels.
    ///
    /// The labels of the configured platform come first, then those of the other ones. A node without any of these labels
    /// is on-demand if every node that is not spot is.
    pub fn of_node<'v>(self, label: impl Fn(&str) -> Option<&'v str>) -> Option<Capacity> {
        let configured = &self.0.capacity_labels;
        let unlabelled = || configured.on_demand_values.is_empty().then_some(Capacity::OnDemand);
        Platform::all(configured).find_map(|platform| platform.of_node(&label)).or_else(unlabelled)
    }

    /// Another platform than the configured one, if only its labels show that the node is spot. `label` as for
    /// [`Profile::of_node`].
    pub fn other_platform_of_spot_node<'v>(self, label: impl Fn(&str) -> Option<&'v str>) -> Option<CapacityProfile> {
        let mut platforms = Platform::all(&self.0.capacity_labels);
        let configured = platforms.next()?;
        if configured.of_node(&label).is_some() {
            return None;
        }
        platforms
            .find_map(|platform| Some((platform.of_node(&label)?, platform.labels.profile)))
            .filter(|(capacity, _)| *capacity == Capacity::Spot)
            .map(|(_, profile)| profile)
    }
}

impl Platform<'_> {
    /// The capacity of a node; `None` if it has none of the platform's labels, or only ones that do not tell it.
    fn of_node<'v>(self, label: impl Fn(&str) -> Option<&'v str>) -> Option<Capacity> {
        let marked = |capacity| {
            let mut others = self.others.iter().filter(|other| other.means == capacity);
            others.any(|other| label(other.label).is_some_and(|value| other.values.contains(&value)))
        };
        if marked(Capacity::OnDemand) {
            return Some(Capacity::OnDemand);
        }
        if marked(Capacity::Spot) {
            return Some(Capacity::Spot);
        }
        match label(&self.labels.label) {
            // Only spot nodes are reclaimed. Every other value, such as Karpenter's `reserved`, counts as on-demand.
            Some(value) if self.labels.spot_values.contains(value) => Some(Capacity::Spot),
            Some(_) => Some(Capacity::OnDemand),
            None => {
                let is_known = self.labels.on_demand_values.is_empty()
                    && self.others.iter().any(|other| label(other.label).is_some());
                is_known.then_some(Capacity::OnDemand)
            }
        }
    }
}

impl LabelValues {
    /// Whether a label with this value has one of the values.
    pub(super) fn contains(&self, value: &str) -> bool {
        match self {
            Self::Any => true,
            Self::OneOf(values) => values.iter().any(|one| one == value),
        }
    }
}
