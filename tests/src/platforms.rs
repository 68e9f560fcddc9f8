//! Nodes as each platform labels and taints them, and what each of them counts as.

/// One kind of node of a platform.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Its name among the platform's nodes.
    pub name: &'static str,
    /// What an executor on it counts as: `spot` or `on-demand`.
    pub capacity: &'static str,
    /// The labels by which the platform tells its capacity.
    pub labels: &'static [(&'static str, &'static str)],
    /// Key and value of the platform's `NoSchedule` taint.
    pub taint: Option<(&'static str, &'static str)>,
}

/// The nodes for which a capacity profile is made.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// The value of `CAPACITY_PROFILE`.
    pub profile: &'static str,
    /// Nodes on which an executor of their capacity runs with the profile's defaults.
    pub shapes: &'static [Shape],
}

const fn node(
    name: &'static str,
    capacity: &'static str,
    labels: &'static [(&'static str, &'static str)],
    taint: Option<(&'static str, &'static str)>,
) -> Shape {
    Shape { name, capacity, labels, taint }
}

const fn spot(name: &'static str, labels: &'static [(&'static str, &'static str)]) -> Shape {
    node(name, "spot", labels, None)
}

const fn on_demand(name: &'static str, labels: &'static [(&'static str, &'static str)]) -> Shape {
    node(name, "on-demand", labels, None)
}

/// A spot node of Karpenter.
pub const KARPENTER_SPOT: Shape = spot("spot", &[("karpenter.sh/capacity-type", "spot")]);
/// An on-demand node of Karpenter.
pub const KARPENTER_ON_DEMAND: Shape = on_demand("on-demand", &[("karpenter.sh/capacity-type", "on-demand")]);
/// A node of a capacity reservation.
pub const KARPENTER_RESERVED: Shape = on_demand("reserved", &[("karpenter.sh/capacity-type", "reserved")]);
/// A node of a capacity reservation that AWS may take back with a notice of two minutes.
pub const KARPENTER_INTERRUPTIBLE: Shape = spot(
    "interruptible",
    &[("karpenter.sh/capacity-type", "reserved"), ("karpenter.k8s.aws/capacity-reservation-interruptible", "true")],
);
/// A spot node of an EKS managed node group.
pub const EKS_SPOT: Shape = spot("spot", &[("eks.amazonaws.com/capacityType", "SPOT")]);
/// An on-demand node of an EKS managed node group.
pub const EKS_ON_DEMAND: Shape = on_demand("on-demand", &[("eks.amazonaws.com/capacityType", "ON_DEMAND")]);
/// A node of an EKS managed node group on a capacity block.
pub const EKS_CAPACITY_BLOCK: Shape = on_demand("block", &[("eks.amazonaws.com/capacityType", "CAPACITY_BLOCK")]);
/// A node of GKE's older kind of spot.
pub const GKE_PREEMPTIBLE: Shape = spot(
    "preemptible",
    &[("cloud.google.com/gke-preemptible", "true"), ("cloud.google.com/gke-provisioning", "preemptible")],
);
/// An on-demand node that CAST AI made because there was no spot capacity. It fits the selectors for spot.
pub const CAST_FALLBACK: Shape = node(
    "fallback",
    "on-demand",
    &[("scheduling.cast.ai/spot", "true"), ("scheduling.cast.ai/spot-fallback", "true")],
    Some(("scheduling.cast.ai/spot", "true")),
);

/// A spot node of AKS' Node Auto Provisioning, which is Karpenter.
pub const NAP_SPOT: Shape = spot(
    "nap-spot",
    &[
        ("karpenter.sh/capacity-type", "spot"),
        ("kubernetes.azure.com/scalesetpriority", "spot"),
        ("kubernetes.azure.com/priority", "spot"),
    ],
);
/// An on-demand node of the same.
pub const NAP_ON_DEMAND: Shape = on_demand(
    "nap-on-demand",
    &[
        ("karpenter.sh/capacity-type", "on-demand"),
        ("kubernetes.azure.com/scalesetpriority", "regular"),
        ("kubernetes.azure.com/priority", "regular"),
    ],
);

const GKE_TAINT: Option<(&str, &str)> = Some(("cloud.google.com/gke-spot", "true"));
const GKE_SPOT: &[(&str, &str)] =
    &[("cloud.google.com/gke-spot", "true"), ("cloud.google.com/gke-provisioning", "spot")];
const AKS_TAINT: Option<(&str, &str)> = Some(("kubernetes.azure.com/scalesetpriority", "spot"));

/// All platforms with a profile of their own.
pub const PLATFORMS: [Platform; 9] = [
    Platform {
        profile: "karpenter",
        shapes: &[
            KARPENTER_SPOT,
            KARPENTER_ON_DEMAND,
            // EKS Auto Mode.
            spot("auto-spot", &[("karpenter.sh/capacity-type", "spot"), ("eks.amazonaws.com/compute-type", "auto")]),
            NAP_SPOT,
            NAP_ON_DEMAND,
        ],
    },
    Platform { profile: "eks", shapes: &[EKS_SPOT, EKS_ON_DEMAND] },
    Platform {
        profile: "gke",
        shapes: &[
            node("spot", "spot", GKE_SPOT, GKE_TAINT),
            // A pool made by hand has the labels alone.
            spot("by-hand", GKE_SPOT),
            on_demand("standard", &[("cloud.google.com/gke-provisioning", "standard")]),
            on_demand("unlabelled", &[]),
        ],
    },
    Platform {
        profile: "aks",
        shapes: &[
            node(
                "spot",
                "spot",
                &[("kubernetes.azure.com/scalesetpriority", "spot"), ("kubernetes.azure.com/priority", "spot")],
                AKS_TAINT,
            ),
            node("old-spot", "spot", &[("kubernetes.azure.com/scalesetpriority", "spot")], AKS_TAINT),
            on_demand("regular", &[("kubernetes.azure.com/priority", "regular")]),
            on_demand("unlabelled", &[]),
            NAP_SPOT,
            NAP_ON_DEMAND,
        ],
    },
    Platform {
        profile: "openshift",
        shapes: &[spot("spot", &[("machine.openshift.io/interruptible-instance", "")]), on_demand("unlabelled", &[])],
    },
    Platform {
        profile: "oke",
        shapes: &[
            node(
                "spot",
                "spot",
                &[("oci.oraclecloud.com/oke-is-preemptible", "true")],
                Some(("oci.oraclecloud.com/oke-is-preemptible", "present")),
            ),
            on_demand("unlabelled", &[]),
        ],
    },
    Platform {
        profile: "ack",
        shapes: &[
            spot("market", &[("node.alibabacloud.com/spot-strategy", "SpotAsPriceGo")]),
            spot("limit", &[("node.alibabacloud.com/spot-strategy", "SpotWithPriceLimit")]),
            on_demand("no-spot", &[("node.alibabacloud.com/spot-strategy", "NoSpot")]),
            on_demand("old", &[]),
        ],
    },
    Platform {
        profile: "ocean",
        shapes: &[
            spot("spot", &[("spotinst.io/node-lifecycle", "spot")]),
            on_demand("od", &[("spotinst.io/node-lifecycle", "od")]),
        ],
    },
    Platform {
        profile: "cast-ai",
        shapes: &[
            node("spot", "spot", &[("scheduling.cast.ai/spot", "true")], Some(("scheduling.cast.ai/spot", "true"))),
            on_demand("unlabelled", &[]),
        ],
    },
];
