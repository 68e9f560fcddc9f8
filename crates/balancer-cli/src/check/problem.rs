//! What `check` can find: one row for each problem, with its name, its severity and the page that explains it.

use std::fmt;

use serde::Serialize;

use crate::output::address;

/// How urgent a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Severity {
    /// Jobs do not get what they ask for.
    Error,
    /// They may not, or not for long.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// Generates the problems. The doc comment of a row says what is wrong.
macro_rules! problems {
    ($($(#[doc = $doc:literal])* $name:ident = $id:literal, $severity:ident, $page:literal;)*) => {
        /// What can be wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Problem {
            $($(#[doc = $doc])* $name,)*
        }

        impl Problem {
            /// Every problem.
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name in the output.
            pub(crate) const fn id(self) -> &'static str {
                match self { $(Self::$name => $id,)* }
            }

            pub(crate) const fn severity(self) -> Severity {
                match self { $(Self::$name => Severity::$severity,)* }
            }

            /// The section of the documentation, from the root of the repository.
            #[cfg(test)]
            pub(crate) const fn page(self) -> &'static str {
                match self { $(Self::$name => $page,)* }
            }

            /// The address of that section.
            pub(crate) const fn documentation(self) -> &'static str {
                match self { $(Self::$name => address!($page),)* }
            }
        }
    };
}

problems! {
    /// There is no webhook configuration for creations, or none for deletions.
    WebhookMissing = "webhook-missing", Error,
        "docs/troubleshooting.md#executors-have-no-annotation-workloadcapacity-type";
    /// The failurePolicy is not Ignore.
    WebhookFailurePolicy = "webhook-failure-policy", Warning, "SECURITY.md#who-can-read-webhook-configurations";
    /// The apiserver stops waiting before the webhook has answered.
    WebhookTimeout = "webhook-timeout", Warning, "docs/failure-modes.md#admission";
    /// The rules leave out the operation or the pods.
    WebhookRules = "webhook-rules", Error,
        "docs/troubleshooting.md#executors-have-no-annotation-workloadcapacity-type";
    /// The objectSelector leaves out drivers or executors.
    WebhookPods = "webhook-pods", Error,
        "docs/troubleshooting.md#executors-have-no-annotation-workloadcapacity-type";
    /// The namespaceSelector leaves out a namespace of jobs.
    WebhookNamespaces = "webhook-namespaces", Error,
        "docs/troubleshooting.md#executors-have-no-annotation-workloadcapacity-type";
    /// There are matchConditions, which can leave out pods.
    WebhookConditions = "webhook-conditions", Warning,
        "docs/troubleshooting.md#executors-have-no-annotation-workloadcapacity-type";
    /// The configuration calls a Service or a port that there is not, or a Service of other pods.
    WebhookService = "webhook-service", Error, "docs/failure-modes.md#admission";
    /// The webhook gives the apiserver no valid answer: an executor that a dry run creates comes back unchanged.
    WebhookUnreached = "webhook-unreached", Error,
        "docs/troubleshooting.md#executors-have-no-annotation-workloadcapacity-type";
    /// A webhook of somebody else decides on the capacity of executors, or keeps them from being created.
    OtherWebhook = "other-webhook", Error,
        "docs/troubleshooting.md#executors-have-no-annotation-workloadcapacity-type";
    /// The path has no token that the webhook accepts, or the Secret with the tokens is missing.
    AdmissionToken = "admission-token", Error, "docs/troubleshooting.md#spotbalancerreviewswithouttoken";
    /// The CA bundle is empty, is no certificate, or is not the CA of the webhook's certificate.
    CaBundle = "ca-bundle", Error, "docs/install.md#certificates";
    /// The Secret with the webhook's certificate is missing or has none.
    CertificateMissing = "certificate-missing", Error, "docs/install.md#certificates";
    /// The certificate is not valid at this time.
    CertificateExpired = "certificate-expired", Error, "docs/troubleshooting.md#spotbalancercertificateexpires";
    /// The certificate expires soon.
    CertificateExpires = "certificate-expires", Warning, "docs/troubleshooting.md#spotbalancercertificateexpires";
    /// The certificate is not valid for the name of the Service.
    CertificateName = "certificate-name", Error, "docs/install.md#certificates";
    /// A Deployment is missing.
    DeploymentMissing = "deployment-missing", Error, "docs/install.md#verify";
    /// A Deployment has settings with which the program does not start.
    SettingsInvalid = "settings-invalid", Error, "docs/troubleshooting.md#installation";
    /// Webhook and reconciler have different settings.
    SettingsDiffer = "settings-differ", Error, "docs/configuration.md#general";
    /// Several replicas have a ledger in memory, each its own.
    MemoryReplicas = "memory-replicas", Error, "docs/configuration.md#store";
    /// No replica is ready.
    NoReadyReplica = "no-ready-replica", Error, "docs/troubleshooting.md#installation";
    /// Some replicas are not ready.
    ReplicaNotReady = "replica-not-ready", Warning, "docs/troubleshooting.md#installation";
    /// A new version of a program does not become ready, and an older one runs.
    RolloutStuck = "rollout-stuck", Warning, "docs/troubleshooting.md#installation";
    /// Nothing corrects the ledgers.
    NoReconciler = "no-reconciler", Warning, "docs/failure-modes.md#the-reconciler";
    /// No reconciler leads.
    NoLeader = "no-leader", Error, "docs/troubleshooting.md#spotbalancernoleader";
    /// A service account lacks a right.
    MissingRight = "missing-right", Error, "SECURITY.md#what-spot-balancer-can-do-in-a-cluster";
    /// Calls to Redis fail.
    Store = "store", Error, "docs/failure-modes.md#the-store";
    /// A reconciler leads, and may not change ledgers.
    NotReconciling = "not-reconciling", Error, "docs/troubleshooting.md#spotbalancernotreconciled";
    /// Spot nodes have the labels of another platform than the configured one.
    NodeProfile = "node-profile", Error, "docs/platforms.md#which-profile";
    /// Nodes have a value of the capacity label that differs from a known one in case alone.
    NodeCapacity = "node-capacity", Warning, "docs/platforms.md#how-a-node-is-recognised";
    /// Executors run on nodes that have no label of a known platform's capacity.
    NodeUnlabelled = "node-unlabelled", Warning, "docs/platforms.md#how-a-node-is-recognised";
    /// Every spot node has a taint that executors do not tolerate.
    NodeTaints = "node-taints", Warning, "docs/troubleshooting.md#executors-stay-pending";
    /// Executors select nodes for executors, and no spot node is labelled as one.
    NodeRole = "node-role", Warning, "docs/troubleshooting.md#executors-stay-pending";
    /// A driver states an invalid value.
    InvalidAnnotation = "invalid-annotation", Warning, "docs/how-it-decides.md#ask-for-a-ratio";
}

/// One problem of one object, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) problem: Problem,
    /// Kind and name, such as `Lease spot-balancer/spot-balancer-reconciler`.
    pub(crate) object: String,
    /// What is wrong, in one sentence.
    pub(crate) text: String,
    /// What to do, in one sentence.
    pub(crate) fix: String,
}

impl Finding {
    pub(crate) fn new(
        problem: Problem,
        object: impl Into<String>,
        text: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { problem, object: object.into(), text: text.into(), fix: fix.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeSet;
    use std::path::Path;

    fn repository(path: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// The anchor that GitHub gives a heading.
    fn anchor(heading: &str) -> String {
        let kept = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = kept.chars().filter(|letter| letter.is_alphanumeric() || matches!(letter, ' ' | '-' | '_'));
        kept.map(|letter| if letter == ' ' { '-' } else { letter }).collect()
    }

    #[test]
    fn each_problem_links_to_a_section_that_exists() {
        for problem in Problem::ALL {
            let (page, section) = problem.page().split_once('#').expect("a section");
            let found =
                repository(page).lines().filter(|line| line.starts_with('#')).any(|line| anchor(line) == section);
            assert!(found, "{problem:?}: {}", problem.page());
        }
    }

    #[test]
    fn each_problem_has_a_name_of_its_own_that_is_documented_with_its_severity() {
        let page = repository("docs/cli.md");
        for problem in Problem::ALL {
            let row = format!("| `{}` | {} |", problem.id(), problem.severity());
            assert!(page.contains(&row), "docs/cli.md has no row {row:?}");
        }
        let ids: BTreeSet<_> = Problem::ALL.iter().map(|problem| problem.id()).collect();
        assert_eq!(ids.len(), Problem::ALL.len());
    }
}
