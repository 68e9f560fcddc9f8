//! Labels of metrics. They are enums: how many there can be is fixed when it is compiled, and nothing
//! from outside can make a series.

use std::fmt::{self, Write as _};

use balancer_core::{Capacity, PolicyField};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

#[doc(hidden)]
pub use prometheus_client;

/// Defines enums whose values are known to metrics and logs by a text.
#[macro_export]
macro_rules! label {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant,)* }

        impl $name {
            /// Every value.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The value in metrics and logs.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl $crate::metric_labels::prometheus_client::encoding::EncodeLabelValue for $name {
            fn encode(
                &self,
                encoder: &mut $crate::metric_labels::prometheus_client::encoding::LabelValueEncoder<'_>,
            ) -> std::fmt::Result {
                std::fmt::Write::write_str(encoder, self.as_str())
            }
        }
    };
}

/// Defines sets of one label each.
#[macro_export]
macro_rules! label_sets {
    ($($name:ident { $key:ident: $value:ty })*) => {
        $(
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prometheus_client::encoding::EncodeLabelSet)]
            struct $name { $key: $value }
        )*
    };
}

label! {
    /// A capacity, or that it is not known yet.
    CapacityLabel {
        /// Spot.
        Spot = "spot",
        /// On-demand.
        OnDemand = "on-demand",
        /// Not known yet.
        Unknown = "unknown",
    }
}

impl From<Capacity> for CapacityLabel {
    fn from(capacity: Capacity) -> Self {
        match capacity {
            Capacity::Spot => Self::Spot,
            Capacity::OnDemand => Self::OnDemand,
        }
    }
}

/// A field of a policy, as the metric label that the policy table gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FieldLabel(pub PolicyField);

impl EncodeLabelValue for FieldLabel {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        encoder.write_str(self.0.metric_label())
    }
}

/// The label of metrics that count invalid values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct InvalidFieldLabels {
    /// The invalid field.
    pub field: FieldLabel,
}

impl InvalidFieldLabels {
    /// One set of labels for each field of a policy.
    pub fn all() -> impl Iterator<Item = Self> {
        PolicyField::ALL.iter().map(|&field| Self { field: FieldLabel(field) })
    }
}

impl From<PolicyField> for InvalidFieldLabels {
    fn from(field: PolicyField) -> Self {
        Self { field: FieldLabel(field) }
    }
}

/// Why the store gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StoreErrorLabels {
    /// [`StoreError::kind`](balancer_store::StoreError::kind).
    pub kind: &'static str,
}
