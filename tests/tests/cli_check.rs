//! `kubectl spot-balancer check` on the real control plane: nothing for a healthy installation of the chart, and for each of
//! many faults its finding and no other.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};

use anyhow::{Context, Result, ensure};
use balancer_tests::account::{Account, PODS};
use balancer_tests::control_plane::{ControlPlane, Options};
use balancer_tests::deployed::{
    self, CERTIFICATE, JOBS, RECONCILER, TOKENS, WEBHOOK, as_deployed, cluster, deployment, in_sandbox, tokens,
};
use balancer_tests::helm::RELEASE;
use balancer_tests::reconciler::Reconciler;
use balancer_tests::redis::RedisServer;
use balancer_tests::release::Release;
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::webhook::Webhook;
use balancer_tests::{endpoint, need, nodes, plugin, pods};
use k8s_openapi::ByteString;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use serde_json::{Value, json};

const RATIO: &str = "workload/spot-ratio";
/// The name by which the apiserver calls the webhook.
const HOST: &str = "spot-balancer-webhook.spot-balancer.svc";
const MUTATING: &str = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/spot-balancer";
const VALIDATING: &str = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/spot-balancer";
const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/spot-balancer/leases/spot-balancer-reconciler";
const SPOT_NODE: &str = "/api/v1/nodes/spot-0";

/// A release of the chart whose programs run next to the cluster, with the objects that controllers and kubelets would make.
struct Installation {
    plane: ControlPlane,
    client: Client,
    redis: RedisServer,
    reconciler: Option<Reconciler>,
    _webhook: Webhook,
}

/// An address of this machine to which the apiserver connects: it refuses loopback ones.
fn address() -> Result<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // Nothing is sent.
    socket.connect("198.51.100.1:9")?;
    let address = socket.local_addr()?.ip();
    ensure!(!address.is_loopback(), "this machine has only loopback addresses");
    Ok(address)
}

/// Makes the pod of a program, as its Deployment would.
async fn pod(client: &Client, name: &str, program: &Release) -> Result<()> {
    let labels = &deployment(client, name).await?["spec"]["template"]["metadata"]["labels"];
    let ports = json!([{"name": "admin", "containerPort": program.admin_port}]);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": [{"name": "main", "image": "spot-balancer", "ports": ports}]},
    });
    let answer = endpoint::post(client, &format!("/api/v1/namespaces/{RELEASE}/pods"), &pod).await?;
    ensure!(answer.status == 201, "{}", answer.text);
    let status = json!({"status": {
        "phase": "Running", "podIP": address()?, "podIPs": [{"ip": address()?}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }});
    let path = format!("/api/v1/namespaces/{RELEASE}/pods/{name}/status");
    send(client, http::Request::patch(path).header("content-type", "application/merge-patch+json"), &status).await
}

async fn send(client: &Client, request: http::request::Builder, body: &Value) -> Result<()> {
    client.request::<Value>(request.body(serde_json::to_vec(body)?)?).await?;
    Ok(())
}

impl Installation {
    async fn start() -> Result<Self> {
        let (plane, mut helm) = cluster(Options { calls_endpoints: true, ..Options::default() }, &[JOBS]).await?;
        let client = plane.client()?;
        let mut values = in_sandbox();
        values["webhook"] = json!({"replicas": 1});
        values["reconciler"] = json!({"replicas": 1});
        values["settings"]["nodeRoleSelector"] = true.into();
        helm.install(&values).await?;
        let redis = RedisServer::start().await?;
        let tls = deployed::certificate(&client).await?;
        let settings = as_deployed(&plane, WEBHOOK, "/balancer-webhook", &redis).await?;
        let settings = settings.env("TLS_CERT_PATH", &tls.path).env("TLS_KEY_PATH", &tls.key_path);
        let webhook = Webhook::start(settings).await?;
        let settings = as_deployed(&plane, RECONCILER, "/balancer-reconcile", &redis).await?;
        let reconciler = Reconciler::start(settings).await?;
        until_true(SOON, "the reconciler to lead", async || reconciler.leads().await).await?;
        pod(&client, WEBHOOK, &webhook).await?;
        pod(&client, RECONCILER, &reconciler).await?;
        let endpoints = json!({
            "apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": WEBHOOK},
            "subsets": [{"addresses": [{"ip": address()?}], "ports": [{"name": "https", "port": webhook.port}]}],
        });
        let answer = endpoint::post(&client, &format!("/api/v1/namespaces/{RELEASE}/endpoints"), &endpoints).await?;
        ensure!(answer.status == 201, "{}", answer.text);
        for capacity in ["spot", "on-demand"] {
            nodes::ensure(&client, capacity, 1).await?;
        }
        pods::driver("etl").annotation(RATIO, "0.7").post(&client, JOBS).await?.pod()?;
        Ok(Self { plane, client, redis, reconciler: Some(reconciler), _webhook: webhook })
    }

    /// What the administrator is told; the exit code says whether it is something.
    async fn check(&self) -> Result<Value> {
        let output = plugin::run(self.plane.kubeconfig(), &["check", "--output", "json"]).await?;
        let report: Value = serde_json::from_str(&output.out).with_context(|| format!("{output:?}"))?;
        let code = if report["healthy"] == true { 0 } else { 1 };
        ensure!(output.code == Some(code) && output.err.is_empty(), "{output:?}");
        let tokens = tokens(&self.client).await.unwrap_or_default();
        ensure!(!tokens.lines().any(|token| output.out.contains(token)), "a token is shown");
        Ok(report)
    }

    /// A user who may see what Kubernetes' role `view` shows is told what was left out, and of no problem.
    async fn ensure_notes_for_a_viewer(&self) -> Result<()> {
        let viewer = Account::new(&self.plane, JOBS, "viewer").await?;
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": "viewer"},
            // What the controller manager makes the role `view` of.
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:aggregate-to-view"},
            "subjects": [{"kind": "ServiceAccount", "name": "viewer", "namespace": JOBS}],
        });
        let path = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
        let answer = endpoint::post(&self.client, path, &binding).await?;
        ensure!(answer.status == 201, "{}", answer.text);
        let notes = ["the webhook configurations", "the Secret", "the Lease", "the nodes", "the rights", "Redis"];
        until_true(SOON, "the viewer to be told what was left out", async || {
            let output = plugin::run(&viewer.kubeconfig, &["check"]).await?;
            ensure!(output.code == Some(0) && output.out == "No problems found in what was checked.\n", "{output:?}");
            ensure!(notes.iter().all(|note| output.err.contains(&format!("not checked: {note}"))), "{output:?}");
            ensure!(!output.err.contains("the Deployments"), "{output:?}");
            Ok(true)
        })
        .await
    }

    /// Makes the changes, waits until these are the checks that find something, and undoes the changes.
    async fn until_found_with(&self, edits: &[Edit], what: &str, wanted: &[&str]) -> Result<Value> {
        let mut before = Vec::new();
        for edit in edits {
            before.push(edit.make(&self.client).await.with_context(|| what.to_owned())?);
        }
        let report = self.until_found(what, wanted).await?;
        for (edit, before) in edits.iter().zip(&before) {
            edit.undo(&self.client, before).await.with_context(|| what.to_owned())?;
        }
        Ok(report)
    }

    /// Waits until these are the checks that find something.
    async fn until_found(&self, what: &str, wanted: &[&str]) -> Result<Value> {
        let wanted: BTreeSet<&str> = wanted.iter().copied().collect();
        until(SOON, &format!("{wanted:?} alone: {what}"), async || {
            let report = self.check().await?;
            let found: BTreeSet<&str> =
                report["findings"].as_array().into_iter().flatten().filter_map(|one| one["check"].as_str()).collect();
            ensure!(found == wanted, "{report:#}");
            Ok(Some(report))
        })
        .await
    }
}

/// A change of one object.
enum Edit {
    /// By a JSON patch.
    Patch(String, Value),
    Delete(String),
}

fn replace(path: &str, pointer: &str, value: Value) -> Edit {
    Edit::Patch(path.to_owned(), json!([{"op": "add", "path": pointer, "value": value}]))
}

/// The same in both webhook configurations.
fn in_both(pointer: &str, value: &Value) -> Vec<Edit> {
    [MUTATING, VALIDATING].map(|path| replace(path, pointer, value.clone())).into()
}

impl Edit {
    fn path(&self) -> &str {
        let (Self::Patch(path, _) | Self::Delete(path)) = self;
        path
    }

    /// Makes the change, and returns the object as it was.
    async fn make(&self, client: &Client) -> Result<Value> {
        let mut before = endpoint::get(client, self.path()).await?.json()?;
        let metadata = before["metadata"].as_object_mut().with_context(|| format!("no {}", self.path()))?;
        for field in ["resourceVersion", "uid", "creationTimestamp", "managedFields", "generation"] {
            metadata.remove(field);
        }
        match self {
            Self::Patch(path, operations) => {
                let request = http::Request::patch(path).header("content-type", "application/json-patch+json");
                send(client, request, operations).await?;
            }
            Self::Delete(path) => send(client, http::Request::delete(path), &Value::Null).await?,
        }
        Ok(before)
    }

    async fn undo(&self, client: &Client, before: &Value) -> Result<()> {
        let json = ("content-type", "application/json");
        match self {
            Self::Patch(path, _) => {
                let now = endpoint::get(client, path).await?.json()?;
                let mut before = before.clone();
                before["metadata"]["resourceVersion"] = now["metadata"]["resourceVersion"].clone();
                send(client, http::Request::put(path).header(json.0, json.1), &before).await
            }
            Self::Delete(path) => {
                let (parent, _) = path.rsplit_once('/').context("no parent")?;
                send(client, http::Request::post(parent).header(json.0, json.1), before).await
            }
        }
    }
}

/// A certificate for this name that ends on this day, in the webhook's Secret, and its CA in both configurations: next to
/// these others, as while a CA is replaced, because the webhook still serves the former certificate.
fn certificate(others: &str, host: &str, end: (i32, u8, u8)) -> Result<Vec<Edit>> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "another CA");
    let key = KeyPair::generate()?;
    let bundle = format!("{others}{}", params.self_signed(&key)?.pem());
    let issuer = Issuer::new(params, key);
    let mut params = CertificateParams::new([host.to_owned()])?;
    params.not_after = date_time_ymd(end.0, end.1, end.2);
    let signed = params.signed_by(&KeyPair::generate()?, &issuer)?.pem();
    let mut edits = in_both("/webhooks/0/clientConfig/caBundle", &json!(ByteString(bundle.into_bytes())));
    edits.push(replace(&secret(CERTIFICATE), "/data/tls.crt", json!(ByteString(signed.into()))));
    Ok(edits)
}

fn secret(name: &str) -> String {
    format!("/api/v1/namespaces/{RELEASE}/secrets/{name}")
}

fn of_release(name: &str) -> String {
    format!("/apis/apps/v1/namespaces/{RELEASE}/deployments/{name}")
}

/// Another value of a setting of the webhook.
async fn setting(client: &Client, name: &str, value: &str) -> Result<Vec<Edit>> {
    let webhook = deployment(client, WEBHOOK).await?;
    let variables = webhook["spec"]["template"]["spec"]["containers"][0]["env"].as_array().context("no variables")?;
    let number = variables.iter().position(|variable| variable["name"] == name).context("no such variable")?;
    let pointer = format!("/spec/template/spec/containers/0/env/{number}/value");
    Ok(vec![replace(&of_release(WEBHOOK), &pointer, value.into())])
}

/// Each fault: what it is, which check finds it, and how it is planted.
async fn faults(client: &Client) -> Result<Vec<(&'static str, &'static str, Vec<Edit>)>> {
    let soon = Timestamp::from_second(Timestamp::now().as_second() + 7 * 86_400)?.to_string();
    let number = |range: std::ops::Range<usize>| soon.get(range).context("no date");
    let soon = (number(0..4)?.parse()?, number(5..7)?.parse()?, number(8..10)?.parse()?);
    let service = format!("/api/v1/namespaces/{RELEASE}/services/{WEBHOOK}");
    let endpoints = format!("/api/v1/namespaces/{RELEASE}/endpoints/{WEBHOOK}");
    let status = |pod: &str| format!("/api/v1/namespaces/{RELEASE}/pods/{pod}/status");
    let is_not_ready = |pod: &str| replace(&status(pod), "/status/conditions/0/status", json!("False"));
    let bundle = endpoint::get(client, MUTATING).await?.json()?["webhooks"][0]["clientConfig"]["caBundle"].take();
    let bundle = String::from_utf8(serde_json::from_value::<ByteString>(bundle)?.0)?;
    let stuck = json!({
        "replicas": 2, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1, "unavailableReplicas": 1,
        "conditions": [{
            "type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded",
            "message": "ReplicaSet \"spot-balancer-webhook-1\" has timed out progressing.",
        }],
    });
    let mut invalid = setting(client, "DEFAULT_SPOT_RATIO", "lots").await?;
    invalid.push(is_not_ready(WEBHOOK));
    let role = format!("/apis/rbac.authorization.k8s.io/v1/clusterroles/{RECONCILER}-reconcile");
    let driver = format!("/api/v1/namespaces/{JOBS}/pods/etl-driver");
    let capacity = "/metadata/labels/karpenter.sh~1capacity-type";
    let foreign = json!([
        {"op": "remove", "path": capacity},
        {"op": "add", "path": "/metadata/labels/eks.amazonaws.com~1capacityType", "value": "SPOT"},
    ]);
    let without_role = json!([{"op": "remove", "path": "/metadata/labels/spark-role"}]);
    let taint = json!([{"key": "cloud.google.com/gke-spot", "value": "true", "effect": "NoSchedule"}]);
    Ok(vec![
        ("no configuration for creations", "webhook-missing", vec![Edit::Delete(MUTATING.into())]),
        ("no configuration for deletions", "webhook-missing", vec![Edit::Delete(VALIDATING.into())]),
        ("pods are refused", "webhook-failure-policy", in_both("/webhooks/0/failurePolicy", &json!("Fail"))),
        ("creations time out", "webhook-timeout", vec![replace(MUTATING, "/webhooks/0/timeoutSeconds", json!(1))]),
        ("no creations", "webhook-rules", vec![replace(MUTATING, "/webhooks/0/rules/0/operations", json!(["UPDATE"]))]),
        (
            "no executors",
            "webhook-pods",
            in_both("/webhooks/0/objectSelector/matchExpressions/0/values", &json!(["driver", "connect-server"])),
        ),
        (
            "not the namespace of the jobs",
            "webhook-namespaces",
            in_both("/webhooks/0/namespaceSelector", &json!({"matchLabels": {"spot-balancer": "enabled"}})),
        ),
        ("another Service", "webhook-service", in_both("/webhooks/0/clientConfig/service/name", &json!("other"))),
        ("another port", "webhook-service", in_both("/webhooks/0/clientConfig/service/port", &json!(8443))),
        (
            "a Service of other pods",
            "webhook-service",
            vec![replace(&service, "/spec/selector", json!({"app": "other"}))],
        ),
        // The apiserver deletes its Endpoints with it, so they are made again too.
        ("no Service", "webhook-service", vec![Edit::Delete(endpoints.clone()), Edit::Delete(service)]),
        (
            "another token",
            "admission-token",
            vec![replace(MUTATING, "/webhooks/0/clientConfig/service/path", json!("/mutate/0123456789abcdef"))],
        ),
        (
            "no token",
            "admission-token",
            vec![replace(VALIDATING, "/webhooks/0/clientConfig/service/path", json!("/validate"))],
        ),
        ("no Secret with tokens", "admission-token", vec![Edit::Delete(secret(TOKENS))]),
        (
            "no CA",
            "ca-bundle",
            vec![Edit::Patch(MUTATING.into(), json!([{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]))],
        ),
        ("another CA", "ca-bundle", certificate("", HOST, (4000, 1, 1))?.into_iter().take(2).collect()),
        ("no certificate", "certificate-missing", vec![Edit::Delete(secret(CERTIFICATE))]),
        ("an expired certificate", "certificate-expired", certificate(&bundle, HOST, (2020, 1, 1))?),
        ("a certificate that expires soon", "certificate-expires", certificate(&bundle, HOST, soon)?),
        ("a certificate for another name", "certificate-name", certificate(&bundle, "localhost", (4000, 1, 1))?),
        (
            "the apiserver cannot connect to the webhook",
            "webhook-unreached",
            vec![replace(&endpoints, "/subsets/0/ports/0/port", json!(1))],
        ),
        ("no webhook is ready", "no-ready-replica", vec![replace(&endpoints, "/subsets", json!([]))]),
        (
            "a rollout that is stuck",
            "rollout-stuck",
            vec![replace(&format!("{}/status", of_release(WEBHOOK)), "/status", stuck)],
        ),
        (
            "one webhook is missing",
            "replica-not-ready",
            vec![replace(&of_release(WEBHOOK), "/spec/replicas", json!(2))],
        ),
        ("no reconciler is ready", "no-ready-replica", vec![is_not_ready(RECONCILER)]),
        ("no reconciler", "no-reconciler", vec![Edit::Delete(of_release(RECONCILER))]),
        ("no webhook", "deployment-missing", vec![Edit::Delete(of_release(WEBHOOK))]),
        ("an invalid setting, with which no replica is ready", "settings-invalid", invalid),
        ("different settings", "settings-differ", setting(client, "DEFAULT_SPOT_RATIO", "0.9").await?),
        ("the reconciler may not watch pods", "missing-right", vec![replace(&role, "/rules/0/verbs", json!(["get"]))]),
        ("nodes of another platform", "node-profile", vec![Edit::Patch(SPOT_NODE.into(), foreign)]),
        ("a capacity in capitals", "node-capacity", vec![replace(SPOT_NODE, capacity, json!("SPOT"))]),
        ("a taint of spot", "node-taints", vec![replace(SPOT_NODE, "/spec/taints", taint)]),
        ("no nodes for executors", "node-role", vec![Edit::Patch(SPOT_NODE.into(), without_role)]),
        (
            "an invalid ratio",
            "invalid-annotation",
            vec![replace(&driver, "/metadata/annotations/workload~1spot-ratio", json!("much"))],
        ),
    ])
}

#[tokio::test]
async fn check_finds_each_planted_fault_and_nothing_in_a_healthy_installation() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook, Reconciler, Plugin);
    let mut installation = Installation::start().await?;
    let client = installation.client.clone();
    let healthy = installation.until_found("healthy", &[]).await?;
    assert_eq!(healthy["notChecked"], json!([]), "the administrator may read everything");
    installation.ensure_notes_for_a_viewer().await?;
    for (what, id, edits) in faults(&client).await? {
        let report = installation.until_found_with(&edits, what, &[id]).await?;
        for finding in report["findings"].as_array().into_iter().flatten() {
            let texts =
                ["object", "problem", "fix", "documentation"].map(|field| finding[field].as_str().unwrap_or(""));
            ensure!(texts.iter().all(|text| !text.is_empty()), "{finding}");
        }
    }
    installation.until_found("all faults are undone", &[]).await?;

    // The apiserver's error quotes the path with the token.
    let endpoints = format!("/api/v1/namespaces/{RELEASE}/endpoints/{WEBHOOK}");
    let mut edits = in_both("/webhooks/0/failurePolicy", &json!("Fail"));
    edits.push(replace(&endpoints, "/subsets/0/ports/0/port", json!(1)));
    let wanted = ["webhook-failure-policy", "webhook-unreached"];
    let report = installation.until_found_with(&edits, "pods are refused", &wanted).await?;
    ensure!(report["findings"].to_string().contains("/mutate/…"), "{report:#}");
    installation.until_found("pods are no longer refused", &[]).await?;

    let other = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": "other"},
        "webhooks": [{
            "name": "x.other.local", "failurePolicy": "Fail", "sideEffects": "None", "admissionReviewVersions": ["v1"],
            "clientConfig": {"url": endpoint::https(1)},
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": JOBS}},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        }],
    });
    let (configurations, _) = MUTATING.rsplit_once('/').context("no parent")?;
    let answer = endpoint::post(&client, configurations, &other).await?;
    ensure!(answer.status == 201, "{}", answer.text);
    installation.until_found("another webhook is down", &["other-webhook"]).await?;
    Edit::Delete(format!("{configurations}/other")).make(&client).await?;
    installation.until_found("the other webhook is gone", &[]).await?;

    installation.redis.stop();
    let report = installation.until_found("Redis is down", &["store"]).await?;
    ensure!(report["findings"][0]["problem"].as_str().is_some_and(|text| text.contains("no connection")), "{report:#}");
    installation.redis.start_again_empty().await?;
    installation.until_found("Redis is back", &[]).await?;

    installation.reconciler = None;
    Edit::Delete(LEASE.into()).make(&client).await?;
    installation.until_found("nobody leads", &["no-leader"]).await?;
    Ok(())
}

#[tokio::test]
async fn check_tells_a_user_who_may_only_read_pods_what_it_could_not_check() -> Result<()> {
    need!(Helm, ControlPlane, Plugin);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    helm.install(&in_sandbox()).await?;
    let client = plane.client()?;
    pods::driver("etl").annotation(RATIO, "much").post(&client, JOBS).await?.pod()?;
    let user = Account::new(&plane, JOBS, "user").await?;
    user.allow(&plane, JOBS, PODS).await?;
    let output = plugin::run(&user.kubeconfig, &["check"]).await?;
    ensure!(output.code == Some(1) && output.out.contains("invalid-annotation"), "{output:?}");
    let notes = ["the webhook configurations", "the Deployments of Spot Balancer", "the jobs outside of the namespace"];
    for note in notes {
        ensure!(output.err.contains(&format!("not checked: {note}")), "{note}: {output:?}");
    }
    pods::annotate(&kube::Api::namespaced(client, JOBS), "etl-driver", RATIO, Some("0.7")).await?;
    let output = plugin::run(&user.kubeconfig, &["check"]).await?;
    ensure!(output.code == Some(0) && output.out == "No problems found in what was checked.\n", "{output:?}");
    Ok(())
}

#[tokio::test]
async fn check_says_that_there_is_no_installation() -> Result<()> {
    need!(ControlPlane, Plugin);
    let plane = ControlPlane::start(Options::default()).await?;
    let output = plugin::run(plane.kubeconfig(), &["check"]).await?;
    ensure!(output.code == Some(1) && output.err.starts_with("error: there is no Spot Balancer"), "{output:?}");
    Ok(())
}
