//! Labels of metrics. They are enums: how many there can be is fixed when it is compiled, and nothing
//! from outside can make a series.

use balancer_core::{Capacity, Invalid};
use prometheus_client::encoding::EncodeLabelSet;

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
            /// Every value that there is.
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
        /// Nothing tells yet.
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

label! {
    /// Which part of a policy was stated wrongly.
    InvalidPart {
        /// The ratio.
        Ratio = "ratio",
        /// The on-demand base.
        Base = "base",
    }
}

impl From<&Invalid> for InvalidPart {
    fn from(invalid: &Invalid) -> Self {
        match invalid {
            Invalid::Ratio(_) => Self::Ratio,
            Invalid::Base(_) => Self::Base,
        }
    }
}

/// Why the store gave no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StoreErrorLabels {
    /// [`StoreError::kind`](balancer_store::StoreError::kind).
    pub kind: &'static str,
}
