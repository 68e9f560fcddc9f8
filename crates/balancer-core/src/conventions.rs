//! The settings that name roles, jobs, capacities and annotations, and how a pod is read by them.

use std::str::FromStr;

use crate::capacity::Capacity;
use crate::platform::{CapacityLabels, CapacityProfile};
use crate::pod::Pod;
use crate::policy::{InvalidField, PolicyField, PolicyOverrides};
use crate::text::shorten;

/// Whether spot executors must run on spot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpotPreference {
    /// Spot executors get a nodeSelector for spot, and wait for spot capacity.
    Strict,
    /// Spot executors get no nodeSelector. Karpenter prefers spot, and uses on-demand if there is no spot.
    #[default]
    BestEffort,
}

/// A text that is not a [`SpotPreference`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a spot preference; accepted: STRICT or BEST_EFFORT")]
pub struct SpotPreferenceError(String);

impl FromStr for SpotPreference {
    type Err = SpotPreferenceError;

    /// Ignores case and surrounding white space.
    fn from_str(text: &str) -> Result<Self, SpotPreferenceError> {
        match text.trim() {
            name if name.eq_ignore_ascii_case("STRICT") => Ok(Self::Strict),
            name if name.eq_ignore_ascii_case("BEST_EFFORT") => Ok(Self::BestEffort),
            other => Err(SpotPreferenceError(shorten(other))),
        }
    }
}

/// Where drivers run that do not choose a capacity themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DriverCapacity {
    /// Anywhere.
    #[default]
    Any,
    /// On on-demand nodes.
    OnDemand,
}

/// The conventions of a cluster. The defaults are those of Spark, Karpenter and EMR on EKS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conventions {
    /// `SPOT_PREFERENCE`.
    pub spot_preference: SpotPreference,
    /// How nodes show their capacity, and what a pod needs to run on them.
    pub capacity_labels: CapacityLabels,
    /// `WORKLOAD_ROLE_LABEL`: the pod label whose value is the role.
    pub workload_role_label: String,
    /// `DRIVER_ROLE_VALUE`: the roles of pods that drive jobs.
    pub driver_role_values: Vec<String>,
    /// `EXECUTOR_ROLE_VALUE`.
    pub executor_role_value: String,
    /// `JOB_ID_LABEL`: the value of the first of these labels that a pod has is its job id.
    pub job_id_label: Vec<String>,
    /// `SPOT_RATIO_ANNOTATION`.
    pub spot_ratio_annotation: String,
    /// `ON_DEMAND_BASE_ANNOTATION`.
    pub on_demand_base_annotation: String,
    /// `DECISION_ANNOTATION`; `None` writes none.
    pub decision_annotation: Option<String>,
    /// `NODE_ROLE_SELECTOR`: whether an executor that gets a nodeSelector for its capacity also gets one for
    /// nodes that are labelled for executors.
    pub node_role_selector: bool,
    /// `DRIVER_CAPACITY`: where drivers run that do not choose a capacity themselves.
    pub driver_capacity: DriverCapacity,
    /// `PROTECT_DRIVERS`: whether drivers get annotations that keep autoscalers from moving them.
    pub protect_drivers: bool,
}

impl Default for Conventions {
    fn default() -> Self {
        Self {
            spot_preference: SpotPreference::default(),
            capacity_labels: CapacityLabels::of(CapacityProfile::Karpenter),
            workload_role_label: "spark-role".into(),
            driver_role_values: vec!["driver".into(), "connect-server".into()],
            executor_role_value: "executor".into(),
            job_id_label: vec!["emr-containers.amazonaws.com/job.id".into(), "spark-app-selector".into()],
            spot_ratio_annotation: PolicyField::SpotRatio.default_annotation().into(),
            on_demand_base_annotation: PolicyField::OnDemandBase.default_annotation().into(),
            decision_annotation: Some("workload/capacity-type".into()),
            node_role_selector: true,
            driver_capacity: DriverCapacity::Any,
            protect_drivers: false,
        }
    }
}

impl Conventions {
    /// Whether pods of this role drive jobs.
    pub fn is_driver_role(&self, role: &str) -> bool {
        self.driver_role_values.iter().any(|value| value == role)
    }

    /// The annotation that states a field of the policy.
    pub fn annotation(&self, field: PolicyField) -> &str {
        match field {
            PolicyField::SpotRatio => &self.spot_ratio_annotation,
            PolicyField::OnDemandBase => &self.on_demand_base_annotation,
            #[allow(unreachable_patterns, reason = "a field without a setting of its own uses its default annotation")]
            other => other.default_annotation(),
        }
    }

    /// The policy fields that the pod's annotations state, and the ones whose values are invalid.
    pub fn overrides(&self, pod: &Pod<'_>) -> (PolicyOverrides, Vec<InvalidField>) {
        PolicyOverrides::parse(|field| pod.annotation(self.annotation(field)))
    }

    /// The first job id label that the pod has, and its value.
    pub fn job<'a>(&'a self, pod: &'a Pod<'_>) -> Option<(&'a str, &'a str)> {
        self.job_id_label.iter().find_map(|label| Some((label.as_str(), pod.label(label).filter(|id| !id.is_empty())?)))
    }

    /// The id that replaces the name of a pod whose name the apiserver generates. It follows the capacity in
    /// the decision annotation.
    pub(crate) fn placeholder<'a>(&self, pod: &'a Pod<'_>) -> Option<&'a str> {
        // A pod with a name of its own is known by it, even if its decision annotation is a copy of another pod's.
        pod.metadata.generate_name.as_deref().filter(|prefix| !prefix.is_empty())?;
        self.decision(pod)?.1.filter(|id| !id.is_empty())
    }

    /// The value of the decision annotation: the capacity, and the placeholder if there is one.
    pub fn decision<'a>(&self, pod: &'a Pod<'_>) -> Option<(Capacity, Option<&'a str>)> {
        let decision = pod.annotation(self.decision_annotation.as_deref()?)?;
        let (capacity, id) = decision.split_once('/').map_or((decision, None), |(capacity, id)| (capacity, Some(id)));
        Some((Capacity::parse(capacity)?, id))
    }
}
