//! The labels, annotations and values by which a cluster names roles, jobs and capacity, and what is
//! written on an executor once it is placed.

use std::str::FromStr;

use crate::action::Executor;
use crate::capacity::Capacity;
use crate::patch::Patch;
use crate::pod::Pod;
use crate::policy::{InvalidField, PolicyField, PolicyOverrides};
use crate::text::shorten;

/// How firmly a spot executor is held to spot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpotPreference {
    /// Spot executors are pinned to spot and wait for it.
    Strict,
    /// Spot executors get no selector: Karpenter prefers spot by itself and falls back.
    #[default]
    BestEffort,
}

/// A text that is no [`SpotPreference`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a spot_preference; accepted: STRICT or BEST_EFFORT")]
pub struct SpotPreferenceError(String);

impl FromStr for SpotPreference {
    type Err = SpotPreferenceError;
    fn from_str(text: &str) -> Result<Self, SpotPreferenceError> {
        match text.trim() {
            name if name.eq_ignore_ascii_case("STRICT") => Ok(Self::Strict),
            name if name.eq_ignore_ascii_case("BEST_EFFORT") => Ok(Self::BestEffort),
            other => Err(SpotPreferenceError(shorten(other))),
        }
    }
}

/// The names that a cluster goes by (DESIGN section 3). The default is what Spark, Karpenter and
/// EMR on EKS write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conventions {
    /// `SPOT_PREFERENCE`.
    pub spot_preference: SpotPreference,
    /// `CAPACITY_TYPE_LABEL`: node label and nodeSelector key.
    pub capacity_type_label: String,
    /// `WORKLOAD_ROLE_LABEL`: the pod label that tells the role.
    pub workload_role_label: String,
    /// `DRIVER_ROLE_VALUE`.
    pub driver_role_value: String,
    /// `EXECUTOR_ROLE_VALUE`.
    pub executor_role_value: String,
    /// `JOB_ID_LABEL`: the first one present on the pod is the job id.
    pub job_id_label: Vec<String>,
    /// `SPOT_RATIO_ANNOTATION`.
    pub spot_ratio_annotation: String,
    /// `ON_DEMAND_BASE_ANNOTATION`.
    pub on_demand_base_annotation: String,
    /// `DECISION_ANNOTATION`; `None` writes none.
    pub decision_annotation: Option<String>,
    /// `NODE_ROLE_SELECTOR`: whether a pinned executor is also held to nodes labelled for executors.
    pub node_role_selector: bool,
}

impl Default for Conventions {
    fn default() -> Self {
        Self {
            spot_preference: SpotPreference::default(),
            capacity_type_label: "karpenter.sh/capacity-type".into(),
            workload_role_label: "spark-role".into(),
            driver_role_value: "driver".into(),
            executor_role_value: "executor".into(),
            job_id_label: vec!["emr-containers.amazonaws.com/job.id".into(), "spark-app-selector".into()],
            spot_ratio_annotation: PolicyField::SpotRatio.default_annotation().into(),
            on_demand_base_annotation: PolicyField::OnDemandBase.default_annotation().into(),
            decision_annotation: Some("workload/capacity-type".into()),
            node_role_selector: true,
        }
    }
}

impl Conventions {
    /// The annotation that states a field of the policy.
    pub fn annotation(&self, field: PolicyField) -> &str {
        match field {
            PolicyField::SpotRatio => &self.spot_ratio_annotation,
            PolicyField::OnDemandBase => &self.on_demand_base_annotation,
            #[allow(unreachable_patterns, reason = "every field has a setting today; one without uses its default")]
            other => other.default_annotation(),
        }
    }

    /// The policy fields that the pod's annotations state, and the ones that are invalid.
    pub fn overrides(&self, pod: &Pod<'_>) -> (PolicyOverrides, Vec<InvalidField>) {
        PolicyOverrides::parse(|field| pod.annotation(self.annotation(field)))
    }

    /// What to write on a placed executor: its selectors, merged into its own, and the decision. An
    /// executor that pins its capacity is left as it is.
    pub fn patch(&self, executor: &Executor<'_>, capacity: Capacity) -> Patch {
        let mut patch = Patch::default();
        let spec = executor.pod.spec.as_ref();
        let pins = match (capacity, self.spot_preference) {
            (Capacity::OnDemand, _) | (Capacity::Spot, SpotPreference::Strict) => true,
            (Capacity::Spot, SpotPreference::BestEffort) => false,
        };
        if pins && executor.required.is_none() {
            let own = spec.and_then(|spec| spec.node_selector.as_ref());
            let mut wanted = vec![(self.capacity_type_label.as_str(), capacity.as_str())];
            // The pod's own value of the role key stays: nothing of the pod's own is lost.
            if self.node_role_selector && own.is_none_or(|own| own.get(&self.workload_role_label).is_none()) {
                wanted.push((&self.workload_role_label, &self.executor_role_value));
            }
            if spec.is_none() {
                patch.add_parent(&["spec"]);
            }
            patch.merge(&["spec", "nodeSelector"], own.is_some(), &wanted);
        }
        if let Some(key) = self.decision_annotation.as_deref()
            && (executor.required.is_none() || executor.placeholder.is_some())
        {
            let decision = match executor.placeholder {
                Some(id) => format!("{capacity}/{id}"),
                None => capacity.as_str().to_owned(),
            };
            let own = executor.pod.metadata.annotations.as_ref();
            // A reinvoked admission finds our own words there.
            if own.and_then(|own| own.get(key)) != Some(decision.as_str()) {
                patch.merge(&["metadata", "annotations"], own.is_some(), &[(key, &decision)]);
            }
        }
        patch
    }
}
