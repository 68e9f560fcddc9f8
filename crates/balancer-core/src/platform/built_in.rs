//! The platforms whose nodes Spot Balancer knows, as data.

use std::sync::LazyLock;

use crate::capacity::Capacity::{self, OnDemand, Spot};

use super::{CapacityLabels, CapacityProfile, LabelValues, Toleration};

/// A platform.
struct BuiltIn {
    name: &'static str,
    /// The node label.
    label: &'static str,
    /// Its values on spot nodes.
    spot: Values,
    /// Its values for on-demand executors; empty for every node that is not spot.
    on_demand: &'static [&'static str],
    /// All values that nodes have; empty if there may be others.
    known: &'static [&'static str],
    /// Key, value and effect. Without a value, the taint may have any.
    tolerations: &'static [(&'static str, Option<&'static str>, &'static str)],
    others: &'static [OtherLabel],
}

enum Values {
    Any,
    OneOf(&'static [&'static str]),
}

/// A further label that tells the capacity of some nodes.
#[derive(Debug)]
pub(crate) struct OtherLabel {
    pub(crate) label: &'static str,
    /// A node with one of these values has the capacity `means`, whatever its other labels say.
    pub(crate) values: &'static [&'static str],
    pub(crate) means: Capacity,
    /// Its value on the nodes that the platform's main label makes spot; `None` if they do not have it.
    pub(crate) on_spot: Option<&'static str>,
    /// Its value on the nodes that the platform's main label makes on-demand; `None` if they do not have it.
    pub(crate) on_on_demand: Option<&'static str>,
    /// Whether on-demand executors exclude the nodes with these values. It is not needed where the main label excludes
    /// them too.
    pub(crate) is_excluded: bool,
}

const KARPENTER: BuiltIn = BuiltIn {
    name: "karpenter",
    label: "karpenter.sh/capacity-type",
    spot: Values::OneOf(&["spot"]),
    on_demand: &["on-demand"],
    known: &[],
    tolerations: &[],
    others: &[
        interruptible_reservation("karpenter.k8s.aws/capacity-reservation-interruptible"),
        // As EKS Auto Mode writes it.
        interruptible_reservation("eks.amazonaws.com/capacity-reservation-interruptible"),
    ],
};

/// A capacity reservation that AWS takes back at two minutes' notice. The main label is `reserved`.
const fn interruptible_reservation(label: &'static str) -> OtherLabel {
    OtherLabel { label, values: &["true"], means: Spot, on_spot: None, on_on_demand: None, is_excluded: true }
}

const EKS: BuiltIn = BuiltIn {
    name: "eks",
    label: "eks.amazonaws.com/capacityType",
    spot: Values::OneOf(&["SPOT"]),
    on_demand: &["ON_DEMAND"],
    known: &[],
    tolerations: &[],
    others: &[],
};

const GKE: BuiltIn = BuiltIn {
    name: "gke",
    label: "cloud.google.com/gke-spot",
    spot: Values::OneOf(&["true"]),
    on_demand: &[],
    known: &["true", "false"],
    tolerations: &[("cloud.google.com/gke-spot", Some("true"), "NoSchedule")],
    others: &[
        OtherLabel {
            label: "cloud.google.com/gke-preemptible",
            values: &["true"],
            means: Spot,
            on_spot: None,
            on_on_demand: None,
            is_excluded: true,
        },
        OtherLabel {
            label: "cloud.google.com/gke-provisioning",
            values: &["spot", "preemptible"],
            means: Spot,
            on_spot: Some("spot"),
            on_on_demand: Some("standard"),
            is_excluded: false,
        },
    ],
};

const AKS: BuiltIn = BuiltIn {
    name: "aks",
    label: "kubernetes.azure.com/scalesetpriority",
    spot: Values::OneOf(&["spot"]),
    on_demand: &[],
    known: &["spot", "regular"],
    tolerations: &[("kubernetes.azure.com/scalesetpriority", Some("spot"), "NoSchedule")],
    others: &[OtherLabel {
        label: "kubernetes.azure.com/priority",
        values: &["spot"],
        means: Spot,
        on_spot: Some("spot"),
        on_on_demand: Some("regular"),
        is_excluded: true,
    }],
};

const OPENSHIFT: BuiltIn = BuiltIn {
    name: "openshift",
    label: "machine.openshift.io/interruptible-instance",
    spot: Values::Any,
    on_demand: &[],
    known: &[],
    tolerations: &[],
    others: &[],
};

const OKE: BuiltIn = BuiltIn {
    name: "oke",
    label: "oci.oraclecloud.com/oke-is-preemptible",
    spot: Values::OneOf(&["true"]),
    on_demand: &[],
    known: &[],
    tolerations: &[("oci.oraclecloud.com/oke-is-preemptible", None, "NoSchedule")],
    others: &[],
};

const ACK: BuiltIn = BuiltIn {
    name: "ack",
    label: "node.alibabacloud.com/spot-strategy",
    spot: Values::OneOf(&["SpotAsPriceGo", "SpotWithPriceLimit"]),
    on_demand: &[],
    known: &["NoSpot", "SpotAsPriceGo", "SpotWithPriceLimit"],
    tolerations: &[],
    others: &[],
};

const OCEAN: BuiltIn = BuiltIn {
    name: "ocean",
    label: "spotinst.io/node-lifecycle",
    spot: Values::OneOf(&["spot"]),
    on_demand: &["od"],
    known: &[],
    tolerations: &[],
    others: &[],
};

const CAST_AI: BuiltIn = BuiltIn {
    name: "cast-ai",
    label: "scheduling.cast.ai/spot",
    spot: Values::OneOf(&["true"]),
    on_demand: &[],
    known: &[],
    tolerations: &[("scheduling.cast.ai/spot", None, "NoSchedule")],
    others: &[OtherLabel {
        // An on-demand node that was made because there was no spot node. It has the labels of a spot node too.
        label: "scheduling.cast.ai/spot-fallback",
        values: &["true"],
        means: OnDemand,
        on_spot: None,
        on_on_demand: None,
        is_excluded: false,
    }],
};

impl CapacityProfile {
    /// All platforms.
    pub const ALL: [Self; 9] = [
        Self::Karpenter,
        Self::Eks,
        Self::Gke,
        Self::Aks,
        Self::Openshift,
        Self::Oke,
        Self::Ack,
        Self::Ocean,
        Self::CastAi,
    ];

    const fn built_in(self) -> &'static BuiltIn {
        match self {
            Self::Karpenter => &KARPENTER,
            Self::Eks => &EKS,
            Self::Gke => &GKE,
            Self::Aks => &AKS,
            Self::Openshift => &OPENSHIFT,
            Self::Oke => &OKE,
            Self::Ack => &ACK,
            Self::Ocean => &OCEAN,
            Self::CastAi => &CAST_AI,
        }
    }

    /// Its name in `CAPACITY_PROFILE`.
    pub const fn as_str(self) -> &'static str {
        self.built_in().name
    }
}

impl CapacityLabels {
    /// The defaults of a platform.
    pub fn of(profile: CapacityProfile) -> Self {
        let BuiltIn { label, spot, on_demand, tolerations, .. } = profile.built_in();
        let owned = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect();
        Self {
            profile,
            label: (*label).to_owned(),
            spot_values: match spot {
                Values::Any => LabelValues::Any,
                Values::OneOf(values) => LabelValues::OneOf(owned(values)),
            },
            on_demand_values: owned(on_demand),
            spot_tolerations: tolerations
                .iter()
                .map(|(key, value, effect)| Toleration {
                    key: (*key).to_owned(),
                    value: value.map(str::to_owned),
                    effect: (*effect).to_owned(),
                })
                .collect(),
        }
    }
}

/// The labels by which the nodes of a platform show their capacity.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Platform<'a> {
    pub(crate) labels: &'a CapacityLabels,
    /// All values of the main label that nodes have; empty if there may be others.
    pub(crate) known: &'static [&'static str],
    pub(crate) others: &'static [OtherLabel],
}

/// The platforms with their own labels.
static PLATFORMS: LazyLock<[CapacityLabels; CapacityProfile::ALL.len()]> =
    LazyLock::new(|| CapacityProfile::ALL.map(CapacityLabels::of));

impl<'a> Platform<'a> {
    /// The configured platform. The profile's known values and other labels count if the profile's main label is used.
    pub(crate) fn configured(labels: &'a CapacityLabels) -> Self {
        let BuiltIn { label, known, others, .. } = labels.profile.built_in();
        let (known, others) = if labels.label == *label { (*known, *others) } else { (&[][..], &[][..]) };
        Self { labels, known, others }
    }

    /// The configured platform, then the others. A label means what the configured platform says.
    pub(crate) fn all(configured: &'a CapacityLabels) -> impl Iterator<Item = Platform<'a>> {
        let others = PLATFORMS.iter().filter(|labels| labels.label != configured.label);
        [Self::configured(configured)].into_iter().chain(others.map(Self::configured))
    }
}
