//! Builders of values for the tests of this crate and of others.
#![allow(clippy::expect_used, reason = "a panic fails the test that asks for an impossible value")]

use std::sync::Arc;

use crate::pools::{Pool, Shares};
use crate::ratio::Ratio;

/// The nodes of an instance type in a zone.
pub fn pool(instance_type: &str, zone: &str) -> Arc<Pool> {
    Arc::new(Pool { instance_type: instance_type.into(), zone: zone.into() })
}

/// A ratio, from a percentage.
///
/// # Panics
/// Above 100.
pub fn share(percent: u32) -> Ratio {
    Ratio::from_billionths(percent * 10_000_000).expect("at most 100 %")
}

/// Spot executors by the instance types of their nodes, all in one zone.
pub fn spot(pools: &[(&str, u32)]) -> Shares {
    let spot = pools.iter().map(|(_, bound)| bound).sum();
    let pools = pools.iter().map(|(instance_type, bound)| (pool(instance_type, "a"), *bound)).collect();
    Shares { bound: spot, on_one_node: 1, spot, pools, waiting: 0 }
}
