//! The checks: each takes a snapshot and returns what it finds.

mod certificate;
mod drivers;
mod nodes;
pub(crate) mod rights;
mod store;
mod token;
mod webhooks;
mod workloads;

use super::problem::Finding;
use super::snapshot::{Snapshot, Unchecked};

pub(crate) use store::STORE_ERRORS;
pub(crate) use webhooks::{REACHED, served};

/// Every check.
const CHECKS: &[fn(&Snapshot) -> Vec<Finding>] = &[
    webhooks::presence,
    webhooks::failure_policy,
    webhooks::timeout,
    webhooks::rules,
    webhooks::pods,
    webhooks::namespaces,
    webhooks::conditions,
    webhooks::service,
    webhooks::others,
    token::token,
    certificate::bundle,
    certificate::validity,
    certificate::name,
    workloads::deployments,
    workloads::settings,
    workloads::memory,
    workloads::webhook_replicas,
    workloads::reconciler_replicas,
    workloads::rollouts,
    workloads::leader,
    rights::missing,
    store::store,
    nodes::profile,
    nodes::values,
    nodes::unlabelled,
    nodes::taints,
    nodes::role,
    drivers::annotations,
];

/// What all checks find, the most urgent first.
pub(crate) fn findings(snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings: Vec<Finding> = CHECKS.iter().flat_map(|check| check(snapshot)).collect();
    findings.extend(webhooks::reached(snapshot, &findings));
    findings.sort_by_key(|finding| finding.problem.severity());
    findings
}

/// What cannot be checked in this state of an installation.
pub(crate) fn unchecked(snapshot: &Snapshot) -> Vec<Unchecked> {
    let mut unchecked = workloads::unreadable(snapshot);
    unchecked.extend(workloads::not_literal(snapshot));
    unchecked.extend(workloads::elsewhere(snapshot));
    unchecked.extend(webhooks::doubtful(snapshot));
    unchecked
}

/// Words as a list for people, at most this many of them.
fn listed<T: AsRef<str>>(words: &[T]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<&str> = words.iter().take(SHOWN).map(AsRef::as_ref).collect();
    match words.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests;
