//! Checks the rights of the service accounts.

use std::collections::BTreeMap;

use crate::check::problem::{Finding, Problem};
use crate::check::snapshot::{Right, Snapshot, WEBHOOK};

/// Of how many namespaces the rights are checked.
pub(crate) const MAX_NAMESPACES: usize = 20;

/// The rights that the programs need.
pub(crate) fn needed(snapshot: &Snapshot) -> Vec<Right> {
    let mut rights = Vec::new();
    let watched = snapshot.watched();
    let namespaces: Vec<Option<String>> = match watched.is_empty() {
        true => vec![None],
        false => watched.into_iter().take(MAX_NAMESPACES).map(Some).collect(),
    };
    let in_namespaces = |account: &str, group, resource, verbs: &[&'static str]| -> Vec<Right> {
        let right = |namespace: &Option<String>, verb| {
            let (account, namespace) = (account.to_owned(), namespace.clone());
            Right { account, verb, group, resource, name: None, namespace }
        };
        let verbs = verbs.iter();
        verbs.flat_map(|verb| namespaces.iter().map(|namespace| right(namespace, *verb))).collect()
    };
    if let Some(webhook) = snapshot.component(WEBHOOK) {
        rights.extend(in_namespaces(&webhook.account(), "", "pods", &["get", "list"]));
    }
    let Some(reconciling) = snapshot.reconciling() else { return rights };
    let account = reconciling.account();
    rights.extend(in_namespaces(&account, "", "pods", &["get", "list", "watch"]));
    rights.extend(in_namespaces(&account, "events.k8s.io", "events", &["create"]));
    if replaces_executors(snapshot) {
        rights.extend(in_namespaces(&account, "", "pods", &["delete"]));
        rights.extend(in_namespaces(&account, "", "events", &["list"]));
    }
    let one = |verb, group, resource, name, namespace| Right {
        account: account.clone(),
        verb,
        group,
        resource,
        name,
        namespace,
    };
    rights.extend(["list", "watch"].map(|verb| one(verb, "", "nodes", None, None)));
    if let Some(lease) = snapshot.lease_name() {
        let group = "coordination.k8s.io";
        let namespace = || Some(snapshot.namespace.clone());
        rights.push(one("create", group, "leases", None, namespace()));
        rights.extend(["get", "update"].map(|verb| one(verb, group, "leases", Some(lease.to_owned()), namespace())));
    }
    rights.dedup();
    rights
}

/// Whether executors that find no spot node are replaced, by the settings or for the job of a driver.
fn replaces_executors(snapshot: &Snapshot) -> bool {
    let settings = snapshot.settings();
    let asks = |driver: &balancer_core::Pod<'_>| {
        settings.conventions.overrides(driver).0.spot_fallback_seconds.is_some_and(|seconds| seconds > 0)
    };
    settings.defaults.spot_fallback_seconds > 0 || snapshot.drivers.iter().any(asks)
}

/// No right is missing: one finding for each service account.
pub(super) fn missing(snapshot: &Snapshot) -> Vec<Finding> {
    let mut by_account = BTreeMap::<&str, Vec<String>>::new();
    for right in &snapshot.missing_rights {
        let group = if right.group.is_empty() { String::new() } else { format!(".{}", right.group) };
        let place = match (&right.namespace, right.resource) {
            (Some(namespace), _) => format!(" in {namespace}"),
            (None, "nodes") => String::new(),
            (None, _) => " in all namespaces".to_owned(),
        };
        let text = format!("{} {}{group}{place}", right.verb, right.resource);
        by_account.entry(&right.account).or_default().push(text);
    }
    by_account
        .into_iter()
        .map(|(account, rights)| {
            let text = format!("It may not {}.", super::listed(&rights));
            let is_replacing = rights.iter().any(|right| right.starts_with("delete pods"));
            let fix = if is_replacing {
                "Set reconciler.allowSpotFallback to true, and upgrade the release."
            } else {
                "Upgrade the release, which makes its roles and bindings again."
            };
            Finding::new(Problem::MissingRight, snapshot.object("ServiceAccount", account), text, fix)
        })
        .collect()
}
