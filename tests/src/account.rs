//! A ServiceAccount that may do what it was allowed, and nothing else: RBAC authorizes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::{Api, PostParams};
use serde_json::{Value, json};

use crate::control_plane::ControlPlane;
use crate::wait::until_true;

const TAKES_EFFECT: Duration = Duration::from_secs(20);

/// A right: the verbs on the resources of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Right {
    group: &'static str,
    resource: &'static str,
    verbs: &'static [&'static str],
}

/// To look up a driver, as the webhook does.
pub const LIST_PODS: Right = Right { group: "", resource: "pods", verbs: &["list"] };
/// To follow executors and drivers, and to ask for the pod of a placement that no watch has shown.
pub const PODS: Right = Right { group: "", resource: "pods", verbs: &["list", "watch", "get"] };
/// To follow nodes.
pub const NODES: Right = Right { group: "", resource: "nodes", verbs: &["list", "watch"] };
/// To report an invalid annotation.
pub const EVENTS: Right = Right { group: "events.k8s.io", resource: "events", verbs: &["create"] };
/// To replace executors that find no spot node.
pub const DELETE_PODS: Right = Right { group: "", resource: "pods", verbs: &["delete"] };
/// To find out whether a node is on its way for a pod.
pub const READ_EVENTS: Right = Right { group: "", resource: "events", verbs: &["list", "get"] };
/// To lead.
pub const LEASES: Right =
    Right { group: "coordination.k8s.io", resource: "leases", verbs: &["get", "create", "update"] };

/// A ServiceAccount in the namespace that its programs run in.
#[derive(Debug)]
pub struct Account {
    namespace: String,
    name: &'static str,
    /// By which a program runs as this account, in this namespace.
    pub kubeconfig: PathBuf,
}

impl Account {
    /// Makes one that may do nothing yet.
    pub async fn new(plane: &ControlPlane, namespace: &str, name: &'static str) -> Result<Self> {
        let kubeconfig = plane.service_account(namespace, name).await?;
        Ok(Self { namespace: namespace.to_owned(), name, kubeconfig })
    }

    /// Makes one with the rights of a reconciler that follows these namespaces, or all if there are
    /// none.
    pub async fn for_reconciler(plane: &ControlPlane, namespace: &str, watched: &[&str]) -> Result<Self> {
        let account = Self::new(plane, namespace, "reconciler").await?;
        account.allow(plane, namespace, LEASES).await?;
        account.allow_everywhere(plane, NODES).await?;
        for right in [PODS, EVENTS] {
            if watched.is_empty() {
                account.allow_everywhere(plane, right).await?;
            }
            for watched in watched {
                account.allow(plane, watched, right).await?;
            }
        }
        Ok(account)
    }

    /// Grants a right in a namespace, and waits until the apiserver follows it.
    pub async fn allow(&self, plane: &ControlPlane, namespace: &str, right: Right) -> Result<()> {
        let (client, name) = (plane.client()?, self.role());
        let params = PostParams::default();
        let role: Role = serde_json::from_value(role(&name, right))?;
        Api::namespaced(client.clone(), namespace).create(&params, &role).await?;
        let binding: RoleBinding = serde_json::from_value(self.binding("Role", &name))?;
        Api::namespaced(client, namespace).create(&params, &binding).await?;
        self.until_allowed(plane, Some(namespace), right).await
    }

    /// Grants a right in the whole cluster, and waits until the apiserver follows it.
    pub async fn allow_everywhere(&self, plane: &ControlPlane, right: Right) -> Result<()> {
        let (client, name) = (plane.client()?, self.role());
        let params = PostParams::default();
        let role: ClusterRole = serde_json::from_value(role(&name, right))?;
        Api::all(client.clone()).create(&params, &role).await?;
        let binding: ClusterRoleBinding = serde_json::from_value(self.binding("ClusterRole", &name))?;
        Api::all(client).create(&params, &binding).await?;
        self.until_allowed(plane, None, right).await
    }

    async fn until_allowed(&self, plane: &ControlPlane, namespace: Option<&str>, right: Right) -> Result<()> {
        let verb = right.verbs.first().context("a right without verbs")?;
        let attributes =
            json!({"group": right.group, "resource": right.resource, "verb": verb, "namespace": namespace});
        let user = format!("system:serviceaccount:{}:{}", self.namespace, self.name);
        let review: SubjectAccessReview =
            serde_json::from_value(json!({"spec": {"user": user, "resourceAttributes": attributes}}))?;
        let reviews = Api::<SubjectAccessReview>::all(plane.client()?);
        until_true(TAKES_EFFECT, "the role to take effect", async || {
            let answer = reviews.create(&PostParams::default(), &review).await?;
            Ok(answer.status.is_some_and(|status| status.allowed))
        })
        .await
    }

    /// A name that no other role of the cluster has.
    fn role(&self) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        format!("{}-{}-{}", self.namespace, self.name, COUNT.fetch_add(1, Ordering::Relaxed))
    }

    fn binding(&self, kind: &str, role: &str) -> Value {
        json!({
            "metadata": {"name": role},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
            "subjects": [{"kind": "ServiceAccount", "name": self.name, "namespace": self.namespace}],
        })
    }
}

fn role(name: &str, right: Right) -> Value {
    let rule = json!({"apiGroups": [right.group], "resources": [right.resource], "verbs": right.verbs});
    json!({"metadata": {"name": name}, "rules": [rule]})
}
