//! What is shown of one job. The fields are those of the JSON at `/jobs`.

use balancer_core::{Millis, SpotState};
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

/// What the cluster and the ledger show of one job. Namespace, job id and driver together identify it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct JobFacts {
    /// The namespace.
    pub namespace: String,
    /// The value of the job id label.
    pub job_id: String,
    /// The name of the pod that drives the job, if it is known.
    pub driver: Option<String>,
    /// The wanted share of spot among the executors beyond the base; `None` if the job is opted out.
    pub wanted_ratio: Option<f64>,
    /// The executors that must be on-demand before the ratio applies.
    pub on_demand_base: u32,
    /// Where the ratio comes from.
    pub source: RatioSource,
    /// The executors on nodes that count as spot.
    pub spot: u64,
    /// The executors on nodes that count as on-demand.
    pub on_demand: u64,
    /// The executors without a node.
    pub pending: u64,
    /// Those of them that were sent to spot.
    pub pending_spot: u64,
    /// The executors on nodes of which it is not known what they count as.
    pub unknown: u64,
    /// How many whole executors more than wanted are on spot or on their way there. Negative if there are too few.
    pub distance: i64,
    /// The largest share of the executors with a node that is lost with one node or with one pool.
    pub risk: f64,
    /// The node with the most executors.
    pub largest_node: Option<NodeShare>,
    /// The pool of spot nodes with the most executors.
    pub largest_pool: Option<PoolShare>,
    /// Whether executors are sent to spot.
    pub spot_state: SpotFacts,
    /// The annotations of the driver that are invalid.
    pub invalid_annotations: Vec<InvalidAnnotationFacts>,
}

/// Where a job's ratio comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RatioSource {
    /// The driver states it.
    Driver,
    /// The driver has stated it before, and states an invalid one now.
    Previous,
    /// The ledger has it, and no driver that is watched states one.
    Ledger,
    /// The settings have it.
    #[default]
    Default,
}

/// The executors of a job on one node.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeShare {
    /// The name of the node.
    pub name: String,
    /// How many there are.
    pub executors: u64,
    /// Their share of all executors with a node.
    pub share: f64,
}

/// The executors of a job in one pool of spot nodes.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolShare {
    /// The instance type.
    pub instance_type: String,
    /// The zone.
    pub zone: String,
    /// How many there are.
    pub executors: u64,
    /// Their share of all executors with a node.
    pub share: f64,
}

/// Whether executors of a job are sent to spot. Times are those of the store's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase", rename_all_fields = "camelCase")]
pub enum SpotFacts {
    /// The ratio decides.
    #[default]
    Open,
    /// They go to on-demand.
    Closed {
        /// When spot was closed.
        since: Option<String>,
        /// When the next executor may probe spot.
        retry_at: Option<String>,
    },
    /// One was sent to spot, and the others go to on-demand.
    Probing {
        /// When spot was closed.
        since: Option<String>,
        /// The executor that was sent to spot.
        executor: String,
    },
}

impl From<&SpotState> for SpotFacts {
    fn from(state: &SpotState) -> Self {
        match state {
            SpotState::Open => Self::Open,
            SpotState::Starved { since, retry_at } => Self::Closed { since: time(*since), retry_at: time(*retry_at) },
            SpotState::Probing { since, executor } => Self::Probing { since: time(*since), executor: executor.clone() },
        }
    }
}

/// RFC 3339; `None` for what no clock shows.
fn time(millis: Millis) -> Option<String> {
    let millis = i64::try_from(millis).ok()?;
    Some(Timestamp::from_millisecond(millis).ok()?.to_string())
}

/// An invalid annotation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InvalidAnnotationFacts {
    /// Its key.
    pub annotation: String,
    /// The value, and what is accepted.
    pub problem: String,
}

/// A share of all.
#[expect(clippy::cast_precision_loss, reason = "far fewer executors than 2^52")]
pub fn share(part: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { part as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_a_closed_spot_are_rfc_3339_and_impossible_ones_are_null() {
        let closed = SpotState::Starved { since: 1_700_000_000_000, retry_at: u64::MAX };
        let json = serde_json::to_value(SpotFacts::from(&closed)).expect("JSON");
        assert_eq!(json, serde_json::json!({"state": "closed", "since": "2023-11-14T22:13:20Z", "retryAt": null}));
    }
}
