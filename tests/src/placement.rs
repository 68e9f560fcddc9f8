//! Requests to a ledger itself, without a webhook.

use balancer_core::{PlaceRequest, PolicyOverrides};

/// A request for an executor that states nothing, by a caller that does not know the job's policy.
pub fn request(key: &str) -> PlaceRequest<'_> {
    let overrides = PolicyOverrides::default();
    PlaceRequest { key, required: None, overrides, policy: None, may_create: true, driver: None }
}
