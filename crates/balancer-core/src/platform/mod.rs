//! The platforms whose nodes Spot Balancer knows, and the labels by which nodes show their capacity.

mod built_in;
mod name;

pub(crate) use built_in::{OtherLabel, Platform};
pub use name::CapacityProfileError;

/// The platforms whose nodes Spot Balancer knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CapacityProfile {
    /// Karpenter, EKS Auto Mode, Azure Node Auto Provisioning, OCI's Karpenter provider.
    Karpenter,
    /// EKS managed node groups.
    Eks,
    /// Google Kubernetes Engine.
    Gke,
    /// Azure Kubernetes Service.
    Aks,
    /// OpenShift machine sets.
    Openshift,
    /// Oracle Kubernetes Engine.
    Oke,
    /// Alibaba Cloud Container Service.
    Ack,
    /// Spot Ocean.
    Ocean,
    /// CAST AI.
    CastAi,
}

/// The values of a node label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelValues {
    /// `*`: any value; the key exists.
    Any,
    /// One of these.
    OneOf(Vec<String>),
}

/// A toleration that spot executors get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toleration {
    /// The taint's key.
    pub key: String,
    /// The taint's value; `None` tolerates any.
    pub value: Option<String>,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`.
    pub effect: String,
}

/// How nodes show their capacity, and what a pod needs to run on them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapacityLabels {
    /// `CAPACITY_PROFILE`.
    pub profile: CapacityProfile,
    /// `CAPACITY_TYPE_LABEL`: the key of the node label.
    pub label: String,
    /// `SPOT_VALUES`: its values on spot nodes.
    pub spot_values: LabelValues,
    /// `ON_DEMAND_VALUES`: its values on the nodes for on-demand executors; empty for every node that is not spot.
    pub on_demand_values: Vec<String>,
    /// `SPOT_TOLERATIONS`.
    pub spot_tolerations: Vec<Toleration>,
}
