//! A healthy installation has no findings, and each fault has exactly its own.

use super::*;

use std::collections::BTreeSet;

use balancer_core::Capacity;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::Timestamp;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::check::metrics::Metrics;
use crate::check::problem::Problem;
use crate::check::snapshot::{Component, DryRun, Hook, HookKind, Node, RECONCILER, Read, Right, Sample, WEBHOOK};

const TOKEN: &str = "0123456789abcdef-current";
const NAMESPACE: &str = "spot-balancer";

fn of<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("an object")
}

struct Authority(Issuer<'static, KeyPair>, String);

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().expect("a key");
    let pem = params.self_signed(&key).expect("a certificate").pem();
    Authority(Issuer::new(params, key), pem)
}

/// A certificate for this name that is valid for the years from the first until the second begins.
fn certificate(Authority(issuer, _): &Authority, name: &str, years: (i32, i32)) -> Secret {
    let mut params = CertificateParams::new([name.to_owned()]).expect("parameters");
    params.not_before = date_time_ymd(years.0, 1, 1);
    params.not_after = date_time_ymd(years.1, 1, 1);
    let signed = params.signed_by(&KeyPair::generate().expect("a key"), issuer).expect("a certificate");
    secret("tls.crt", signed.pem())
}

fn secret(key: &str, value: String) -> Secret {
    Secret { data: Some([(key.to_owned(), ByteString(value.into_bytes()))].into()), ..Secret::default() }
}

fn hook(kind: HookKind, ca: &str, roles: &[&str]) -> Hook {
    let (operation, path) = (kind.operation(), kind.path());
    let bundle = ByteString(ca.as_bytes().to_vec());
    let webhook = of(json!({
        "name": "place.spot-balancer.local", "admissionReviewVersions": ["v1"], "sideEffects": "NoneOnDryRun",
        "failurePolicy": "Ignore", "timeoutSeconds": 3,
        "clientConfig": {
            "service": {
                "name": "spot-balancer-webhook", "namespace": NAMESPACE, "path": format!("{path}/{TOKEN}"), "port": 443,
            },
            "caBundle": bundle,
        },
        "rules": [{
            "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": [operation],
            "scope": "Namespaced",
        }],
        "namespaceSelector": {"matchExpressions": [
            {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system", NAMESPACE]},
            {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["jobs"]},
        ]},
        "objectSelector": {"matchExpressions": [{"key": "spark-role", "operator": "In", "values": roles}]},
    }));
    Hook { kind, configuration: "spot-balancer".into(), webhook }
}

fn component(name: &str, environment: &[(&str, &str)]) -> Component {
    let object = format!("spot-balancer-{name}");
    let shared = [("STORE", "redis"), ("CAPACITY_PROFILE", "karpenter"), ("NODE_ROLE_SELECTOR", "true")];
    let variables = shared.iter().chain(environment);
    let variables: Vec<Value> = variables.map(|(name, value)| json!({"name": name, "value": value})).collect();
    Component::of(of(json!({
        "metadata": {
            "name": object, "namespace": NAMESPACE, "labels": {"app.kubernetes.io/component": name},
        },
        "spec": {
            "replicas": 2,
            "selector": {},
            "template": {"metadata": {"labels": {"app": name}}, "spec": {
                "serviceAccountName": object,
                "containers": [{
                    "name": name,
                    "env": variables,
                    "volumeMounts": [
                        {"name": "tls", "mountPath": "/tls"}, {"name": "token", "mountPath": "/admission-token"},
                    ],
                }],
                "volumes": [
                    {"name": "tls", "secret": {"secretName": "spot-balancer-webhook-tls"}},
                    {"name": "token", "secret": {
                        "secretName": "spot-balancer-webhook-token", "items": [{"key": "tokens", "path": "tokens"}],
                    }},
                ],
            }},
        },
    })))
}

fn webhook(more: &[(&str, &str)]) -> Component {
    let own = [
        ("TLS_CERT_PATH", "/tls/tls.crt"),
        ("ADMISSION_TOKEN_PATH", "/admission-token/tokens"),
        ("RECONCILE_ENABLED", "false"),
        ("WEBHOOK_TIMEOUT_SECONDS", "2"),
        ("STORE_TIMEOUT_MILLISECONDS", "500"),
    ];
    component(WEBHOOK, &own.iter().chain(more).copied().collect::<Vec<_>>())
}

fn reconciler() -> Component {
    component(
        RECONCILER,
        &[
            ("RECONCILE_LEASE", "spot-balancer-reconciler"),
            ("WATCH_NAMESPACES", "jobs"),
            ("STORE_TIMEOUT_MILLISECONDS", "500"),
        ],
    )
}

fn pod(component: &str, ready: &str) -> k8s_openapi::api::core::v1::Pod {
    of(json!({
        "metadata": {"name": component, "labels": {"app.kubernetes.io/component": component}},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
    }))
}

fn node(name: &str, labels: Value, taints: Value) -> Node {
    Node { name: name.into(), labels: of(labels), taints: of(taints) }
}

fn spot_node() -> Node {
    node("spot-0", json!({"karpenter.sh/capacity-type": "spot", "spark-role": "executor"}), json!([]))
}

fn sample(component: &str, page: &str) -> Sample {
    let metrics = Metrics(page.to_owned());
    Sample { component: component.to_owned(), before: metrics.clone(), after: metrics }
}

fn driver(annotations: Value) -> balancer_core::Pod<'static> {
    let driver = json!({
        "metadata": {
            "name": "etl-driver", "namespace": "jobs", "uid": "u1", "annotations": annotations,
            "labels": {"spark-role": "driver", "spark-app-selector": "etl"},
        },
        "status": {"phase": "Running"},
    });
    serde_json::from_str::<balancer_core::Pod<'_>>(&driver.to_string()).expect("a pod").into_owned()
}

fn now() -> Timestamp {
    "2030-06-01T00:00:00Z".parse().expect("a time")
}

const HOST: &str = "spot-balancer-webhook.spot-balancer.svc";

fn healthy() -> Snapshot {
    let authority = authority("Spot Balancer CA");
    let (mutating, validating) = (["driver", "connect-server", "executor"], ["executor"]);
    Snapshot {
        namespace: NAMESPACE.into(),
        hooks: Some(vec![
            hook(HookKind::Mutating, &authority.1, &mutating),
            hook(HookKind::Validating, &authority.1, &validating),
        ]),
        other_hooks: Vec::new(),
        components: Some(vec![webhook(&[]), reconciler()]),
        pods: Some([WEBHOOK, WEBHOOK, RECONCILER, RECONCILER].map(|name| pod(name, "True")).to_vec()),
        service: Read::Found(of(json!({
            "metadata": {"name": "spot-balancer-webhook", "namespace": NAMESPACE},
            "spec": {"ports": [{"port": 443}]},
        }))),
        endpoints: Read::Found(of(json!({"subsets": [{"addresses": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]}]}))),
        certificate: Read::Found(certificate(&authority, HOST, (2030, 2031))),
        tokens: Read::Found(secret("tokens", format!("{TOKEN}\n0123456789abcdef-next\n"))),
        lease: Read::Found(of(json!({"spec": {
            "holderIdentity": "one", "leaseDurationSeconds": 15, "renewTime": "2030-05-31T23:59:50.000000Z",
        }}))),
        missing_rights: Vec::new(),
        metrics: vec![
            sample(WEBHOOK, "spot_balancer_store_errors_total{kind=\"timed_out\"} 3\n"),
            sample(RECONCILER, "spot_balancer_reconcile_leader 1\n"),
            sample(RECONCILER, "spot_balancer_reconcile_leader 0\n"),
        ],
        dry_run: DryRun::Placed,
        namespaces: Some(
            ["jobs", "kube-system", NAMESPACE]
                .map(|name| of(json!({"metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}}})))
                .to_vec(),
        ),
        nodes: Some(vec![
            spot_node(),
            node(
                "tainted",
                json!({"karpenter.sh/capacity-type": "spot"}),
                json!([{"key": "team", "value": "ml", "effect": "NoSchedule"}]),
            ),
            node("on-demand-0", json!({"karpenter.sh/capacity-type": "on-demand"}), json!([])),
            node("reserved", json!({"karpenter.sh/capacity-type": "reserved"}), json!([])),
            node("other", json!({"eks.amazonaws.com/capacityType": "SPOT"}), json!([])),
        ]),
        drivers: vec![driver(json!({"workload/spot-ratio": "0.7"})), driver(json!({}))],
        tolerations: Vec::new(),
        executor_nodes: BTreeSet::new(),
        spot_is_pending: false,
        now: now(),
    }
}

fn hooks(snapshot: &mut Snapshot) -> &mut Vec<Hook> {
    snapshot.hooks.as_mut().expect("hooks")
}

/// Changes the JSON of both webhooks.
fn edit(snapshot: &mut Snapshot, change: impl Fn(&mut Value)) {
    for hook in hooks(snapshot) {
        let mut webhook = serde_json::to_value(&hook.webhook).expect("JSON");
        change(&mut webhook);
        hook.webhook = of(webhook);
    }
}

fn ids(snapshot: &Snapshot) -> Vec<&'static str> {
    let ids: BTreeSet<&str> = findings(snapshot).iter().map(|finding| finding.problem.id()).collect();
    ids.into_iter().collect()
}

#[test]
fn a_healthy_installation_has_no_findings() {
    assert_eq!(findings(&healthy()), []);
}

#[test]
fn what_cannot_be_read_is_no_finding() {
    let nothing = Snapshot { now: now(), ..Snapshot::default() };
    assert_eq!(findings(&nothing), []);
    let only_pods = Snapshot { drivers: vec![driver(json!({"workload/spot-ratio": "much"}))], ..nothing };
    assert_eq!(ids(&only_pods), ["invalid-annotation"]);
    let parts: [fn(&mut Snapshot); 12] = [
        |it| it.hooks = None,
        |it| it.components = None,
        |it| it.pods = None,
        |it| it.service = Read::Unknown,
        |it| it.endpoints = Read::Unknown,
        |it| it.certificate = Read::Unknown,
        |it| it.tokens = Read::Unknown,
        |it| it.lease = Read::Unknown,
        |it| it.metrics.clear(),
        |it| it.namespaces = None,
        |it| it.nodes = None,
        |it| it.drivers.clear(),
    ];
    for (number, forget) in parts.into_iter().enumerate() {
        let mut snapshot = healthy();
        forget(&mut snapshot);
        assert_eq!(findings(&snapshot), [], "{number}");
    }
}

type Fault = fn(&mut Snapshot);

const FAULTS: &[(&str, &str, Fault)] = &[
    ("no configuration for creations", "webhook-missing", |it| hooks(it).retain(|one| one.kind != HookKind::Mutating)),
    ("no configuration for deletions", "webhook-missing", |it| {
        hooks(it).retain(|one| one.kind != HookKind::Validating)
    }),
    ("pods are refused", "webhook-failure-policy", |it| edit(it, |one| one["failurePolicy"] = json!("Fail"))),
    ("pods are refused by default", "webhook-failure-policy", |it| edit(it, |one| one["failurePolicy"] = Value::Null)),
    ("the apiserver waits too short", "webhook-timeout", |it| edit(it, |one| one["timeoutSeconds"] = json!(2))),
    ("another operation", "webhook-rules", |it| edit(it, |one| one["rules"][0]["operations"] = json!(["UPDATE"]))),
    ("other resources", "webhook-rules", |it| edit(it, |one| one["rules"][0]["resources"] = json!(["pods/status"]))),
    ("objects of the cluster", "webhook-rules", |it| edit(it, |one| one["rules"][0]["scope"] = json!("Cluster"))),
    ("no rules", "webhook-rules", |it| edit(it, |one| one["rules"] = json!([]))),
    ("another role", "webhook-pods", |it| {
        edit(it, |one| one["objectSelector"]["matchExpressions"][0]["values"] = json!(["worker"]));
    }),
    ("a namespace is left out", "webhook-namespaces", |it| {
        edit(it, |one| one["namespaceSelector"]["matchExpressions"][1]["values"] = json!(["other"]));
    }),
    ("a namespace has no label", "webhook-namespaces", |it| {
        it.namespaces.as_mut().expect("namespaces")[0].metadata.labels = None;
    }),
    ("a namespace does not exist", "webhook-namespaces", |it| {
        it.namespaces.as_mut().expect("namespaces").remove(0);
    }),
    ("a job in a namespace that is left out", "webhook-namespaces", |it| unserved(it)),
    ("a match condition", "webhook-conditions", |it| {
        edit(it, |one| one["matchConditions"] = json!([{"name": "mine", "expression": "false"}]));
    }),
    ("a dry run comes back unchanged", "webhook-unreached", |it| {
        it.dry_run = DryRun::Unchanged { namespace: "jobs".into() };
    }),
    ("a dry run is refused", "webhook-unreached", |it| {
        it.dry_run = DryRun::NotCalled { error: "failed calling webhook".into() };
    }),
    ("another webhook decides", "other-webhook", |it| {
        it.dry_run = DryRun::Overridden { namespace: "jobs".into(), capacity: Capacity::Spot };
    }),
    ("another webhook is down", "other-webhook", |it| {
        it.dry_run = DryRun::OtherNotCalled { namespace: "jobs".into(), error: "failed calling webhook \"x\"".into() };
    }),
    ("another Service", "webhook-service", |it| edit(it, |one| one["clientConfig"]["service"]["name"] = json!("x"))),
    ("another port", "webhook-service", |it| edit(it, |one| one["clientConfig"]["service"]["port"] = json!(8443))),
    ("a Service of other pods", "webhook-service", |it| {
        let Read::Found(service) = &mut it.service else { panic!("a Service") };
        service.spec.as_mut().expect("a spec").selector = Some(of(json!({"app": "other"})));
    }),
    ("no Service", "webhook-service", |it| it.service = Read::Absent),
    ("another namespace", "webhook-service", |it| {
        edit(it, |one| one["clientConfig"]["service"]["namespace"] = json!("x"));
    }),
    ("another token", "admission-token", |it| it.tokens = Read::Found(secret("tokens", "0123456789abcdef-x".into()))),
    ("no tokens", "admission-token", |it| it.tokens = Read::Absent),
    ("no token in the path", "admission-token", |it| {
        for hook in hooks(it) {
            let service = hook.webhook.client_config.service.as_mut().expect("a service");
            service.path = Some(hook.kind.path().to_owned());
        }
    }),
    ("another path", "admission-token", |it| {
        edit(it, |one| one["clientConfig"]["service"]["path"] = json!("/"));
    }),
    ("tokens are off", "admission-token", |it| {
        let webhook = &mut it.components.as_mut().expect("components")[0];
        webhook.environment.remove("ADMISSION_TOKEN_PATH");
    }),
    ("an empty bundle", "ca-bundle", |it| edit(it, |one| one["clientConfig"]["caBundle"] = Value::Null)),
    ("a bundle that is none", "ca-bundle", |it| {
        edit(it, |one| one["clientConfig"]["caBundle"] = json!(ByteString(b"x".to_vec())));
    }),
    ("another CA of the same name", "ca-bundle", |it| {
        let Authority(_, pem) = authority("Spot Balancer CA");
        edit(it, |one| one["clientConfig"]["caBundle"] = json!(ByteString(pem.clone().into_bytes())));
    }),
    ("no certificate", "certificate-missing", |it| it.certificate = Read::Absent),
    ("an empty certificate", "certificate-missing", |it| {
        it.certificate = Read::Found(secret("tls.crt", String::new()))
    }),
    ("an expired certificate", "certificate-expired", |it| signed(it, HOST, (2029, 2030))),
    ("a certificate of the future", "certificate-expired", |it| signed(it, HOST, (2031, 2032))),
    ("a certificate that expires", "certificate-expires", |it| {
        it.now = "2030-12-25T00:00:00Z".parse().expect("a time");
        it.lease = Read::Unknown;
    }),
    ("a certificate for another name", "certificate-name", |it| signed(it, "other.spot-balancer.svc", (2030, 2031))),
    ("no webhook", "deployment-missing", |it| {
        it.components.as_mut().expect("components").remove(0);
    }),
    ("no reconciler", "no-reconciler", |it| {
        it.components.as_mut().expect("components").remove(1);
    }),
    ("an invalid setting", "settings-invalid", |it| {
        set_components(it, vec![webhook(&[("DEFAULT_SPOT_RATIO", "lots")]), reconciler()]);
        it.pods = Some(
            [(WEBHOOK, "False"), (RECONCILER, "True"), (RECONCILER, "True")]
                .map(|(name, ready)| pod(name, ready))
                .to_vec(),
        );
    }),
    ("different settings", "settings-differ", |it| {
        set_components(it, vec![webhook(&[("DEFAULT_SPOT_RATIO", "0.9")]), reconciler()]);
    }),
    ("a rollout that is stuck", "rollout-stuck", |it| {
        let status = json!({
            "replicas": 3, "readyReplicas": 2, "updatedReplicas": 1,
            "conditions": [{"type": "Progressing", "status": "False", "message": "ReplicaSet \"x\" has timed out progressing."}],
        });
        it.components.as_mut().expect("components")[0].deployment.status = of(status);
    }),
    ("a ledger for each replica", "memory-replicas", |it| {
        for component in it.components.iter_mut().flatten() {
            component.environment.insert("STORE".into(), "memory".into());
        }
    }),
    ("no webhook is ready", "no-ready-replica", |it| it.endpoints = Read::Found(of(json!({})))),
    ("no endpoints", "no-ready-replica", |it| it.endpoints = Read::Absent),
    ("a webhook is not ready", "replica-not-ready", |it| {
        it.endpoints = Read::Found(of(json!({"subsets": [{"addresses": [{"ip": "10.0.0.1"}]}]})));
    }),
    ("no reconciler is ready", "no-ready-replica", |it| it.pods = Some(vec![pod(RECONCILER, "False")])),
    ("a reconciler is not ready", "replica-not-ready", |it| {
        it.pods = Some(vec![pod(RECONCILER, "False"), pod(RECONCILER, "True")]);
    }),
    ("the last reconciler is ending", "no-ready-replica", |it| {
        let mut ending = pod(RECONCILER, "True");
        ending.metadata.deletion_timestamp = Some(of(json!("2030-06-01T00:00:30Z")));
        it.pods = Some(vec![ending]);
    }),
    ("no Lease", "no-leader", |it| it.lease = Read::Absent),
    ("nobody leads", "no-leader", |it| it.lease = Read::Found(of(json!({"spec": {"holderIdentity": ""}})))),
    ("the leader is late", "no-leader", |it| it.now = "2030-06-01T00:02:00Z".parse().expect("a time")),
    ("no right", "missing-right", |it| {
        it.missing_rights = rights::needed(it).into_iter().filter(|right| right.resource == "leases").collect();
    }),
    ("Redis is down", "store", |it| {
        it.metrics[0].after = Metrics("spot_balancer_store_errors_total{kind=\"timed_out\"} 4\n".into());
        it.metrics[1] = sample(RECONCILER, "spot_balancer_reconcile_leader 0\n");
    }),
    ("nobody may change ledgers", "not-reconciling", |it| {
        it.metrics[1] = sample(RECONCILER, "spot_balancer_reconcile_leader 0\n");
    }),
    ("another platform", "node-profile", |it| {
        it.nodes.as_mut().expect("nodes").retain(|node| ["other", "on-demand-0"].contains(&node.name.as_str()));
        set_components(it, [webhook(&[]), reconciler()].map(without_node_role).to_vec());
    }),
    ("a value in capitals", "node-capacity", |it| {
        let labels = json!({"karpenter.sh/capacity-type": "Spot"});
        it.nodes.as_mut().expect("nodes").push(node("odd", labels, json!([])));
    }),
    ("an executor on a node without a label", "node-unlabelled", |it| {
        it.nodes.as_mut().expect("nodes").push(node("bare", json!({}), json!([])));
        it.executor_nodes = ["bare".to_owned()].into();
    }),
    ("a taint of spot", "node-taints", |it| {
        taint_all(it, json!({"key": "cloud.google.com/gke-spot", "value": "true"}))
    }),
    ("a taint that no executor tolerates", "node-taints", |it| {
        it.tolerations = vec![of(json!({"key": "other", "operator": "Exists"}))];
        it.spot_is_pending = true;
        taint_all(it, json!({"key": "team", "value": "ml"}));
    }),
    ("a new taint of a node that executors run on", "node-taints", |it| {
        it.tolerations = vec![of(json!({"key": "other", "operator": "Exists"}))];
        it.executor_nodes = ["tainted".to_owned()].into();
        taint_all(it, json!({"key": "team", "value": "ml"}));
    }),
    ("a short-lived certificate that is not renewed", "certificate-expires", |it| {
        lasting_three_days(it);
        it.now = "2030-01-03T00:00:01Z".parse().expect("a time");
        it.lease = Read::Unknown;
    }),
    ("no nodes for executors", "node-role", |it| {
        for node in it.nodes.iter_mut().flatten() {
            node.labels.remove("spark-role");
        }
    }),
    ("an invalid ratio", "invalid-annotation", |it| it.drivers.push(driver(json!({"workload/spot-ratio": "much"})))),
    ("an invalid base", "invalid-annotation", |it| it.drivers.push(driver(json!({"workload/on-demand-base": "-1"})))),
];

/// A job asks for a ratio in a namespace that no webhook selects.
fn unserved(snapshot: &mut Snapshot) {
    let labels = json!({"kubernetes.io/metadata.name": "ml"});
    snapshot.namespaces.as_mut().expect("namespaces").push(of(json!({"metadata": {"name": "ml", "labels": labels}})));
    let mut driver = driver(json!({"workload/spot-ratio": "0.7"}));
    driver.metadata.namespace = Some("ml".into());
    snapshot.drivers.push(driver);
}

#[test]
fn a_job_in_a_namespace_of_another_installation_or_that_is_opted_out_is_served() {
    let mut snapshot = healthy();
    unserved(&mut snapshot);
    snapshot.other_hooks = hooks(&mut snapshot).clone();
    for hook in &mut snapshot.other_hooks {
        hook.webhook.namespace_selector = None;
    }
    assert_eq!(findings(&snapshot), []);
    let mut snapshot = healthy();
    unserved(&mut snapshot);
    let mut off = driver(json!({"workload/spot-ratio": "off"}));
    off.metadata.namespace = Some("ml".into());
    *snapshot.drivers.last_mut().expect("a driver") = off;
    assert_eq!(findings(&snapshot), []);
}

#[test]
fn a_webhook_may_be_called_by_a_url_and_run_elsewhere() {
    let mut snapshot = healthy();
    edit(&mut snapshot, |one| {
        one["clientConfig"] = json!({"url": "https://x/", "caBundle": one["clientConfig"]["caBundle"]});
    });
    assert_eq!((findings(&snapshot), unchecked(&snapshot)), (vec![], vec![]));
    snapshot.components.as_mut().expect("components").remove(0);
    (snapshot.service, snapshot.endpoints) = (Read::Unknown, Read::Unknown);
    assert_eq!(findings(&snapshot), []);
    let notes: Vec<String> =
        unchecked(&snapshot).into_iter().map(|note| format!("{}: {}", note.what, note.why)).collect();
    assert_eq!(notes, ["the webhook and its settings: its configurations call a URL, and no Deployment of it is here"]);
}

#[test]
fn an_unchanged_executor_is_no_finding_if_something_else_explains_it_or_its_labels_may_be_wrong() {
    let mut snapshot = healthy();
    snapshot.dry_run = DryRun::Unchanged { namespace: "jobs".into() };
    edit(&mut snapshot, |one| one["clientConfig"]["caBundle"] = Value::Null);
    assert_eq!(ids(&snapshot), ["ca-bundle"]);
    snapshot.dry_run = DryRun::NotCalled { error: "failed calling webhook".into() };
    assert_eq!(ids(&snapshot), ["ca-bundle", "webhook-unreached"]);
    for dry_run in [
        DryRun::Unchanged { namespace: "jobs".into() },
        DryRun::Overridden { namespace: "jobs".into(), capacity: Capacity::OnDemand },
    ] {
        let mut snapshot = healthy();
        (snapshot.dry_run, snapshot.components) = (dry_run, None);
        assert_eq!(findings(&snapshot), []);
        let notes = unchecked(&snapshot);
        assert!(notes.len() == 1 && notes[0].why.contains("the settings are not known"), "{notes:?}");
    }
}

#[test]
fn executors_are_tried_only_where_the_webhook_is_asked() {
    let mut snapshot = healthy();
    assert_eq!(served(&snapshot, "kube-system", 3), ["jobs"]);
    edit(&mut snapshot, |one| {
        one["namespaceSelector"]["matchExpressions"].as_array_mut().expect("expressions").truncate(1);
    });
    let team = json!({"metadata": {"name": "team", "labels": {"kubernetes.io/metadata.name": "team"}}});
    snapshot.namespaces.as_mut().expect("namespaces").push(of(team));
    assert_eq!(served(&snapshot, "team", 3), ["team", "jobs"]);
    assert_eq!(served(&snapshot, "team", 1), ["team"]);
    snapshot.namespaces = None;
    assert_eq!(served(&snapshot, "other", 3), ["other", "jobs"]);
    edit(&mut snapshot, |one| {
        one["namespaceSelector"]["matchExpressions"] = json!([{"key": "spot-balancer", "operator": "DoesNotExist"}]);
    });
    assert!(served(&snapshot, "other", 3).is_empty(), "nobody knows the labels");
    snapshot.hooks = None;
    assert!(served(&snapshot, "other", 3).is_empty());
}

#[test]
fn a_leader_that_has_just_ended_is_no_finding() {
    let mut snapshot = healthy();
    snapshot.metrics[1] = sample(RECONCILER, "spot_balancer_reconcile_leader 0\n");
    let started = |at: &str| {
        of(json!([{
            "name": "c", "ready": true, "restartCount": 1, "image": "", "imageID": "", "state": {"running": {"startedAt": at}},
        }]))
    };
    for (at, found) in [("2030-05-31T23:59:40Z", &[""; 0][..]), ("2030-05-31T23:50:00Z", &["not-reconciling"])] {
        let status = snapshot.pods.as_mut().expect("pods")[2].status.as_mut().expect("a status");
        status.container_statuses = Some(started(at));
        assert_eq!(ids(&snapshot), found, "{at}");
    }
}

#[test]
fn only_settings_that_both_programs_need_are_compared() {
    let own = ["PAGE_PORT", "ADMIN_PORT", "TLS_CERT_PATH", "REDIS_URL", "OF_A_NEWER_VERSION"].map(|name| (name, "1"));
    let mut snapshot = healthy();
    set_components(&mut snapshot, vec![webhook(&own), reconciler()]);
    assert_eq!(findings(&snapshot), []);
    let settings = [&own[..], &[("DEFAULT_SPOT_RATIO", "0.9"), ("SPARK_ROLE_LABEL", "role")]].concat();
    set_components(&mut snapshot, vec![webhook(&settings), reconciler()]);
    let differ = findings(&snapshot).into_iter().find(|found| found.problem == Problem::SettingsDiffer);
    let text = differ.expect("a finding").text;
    assert!(text.ends_with("spot-balancer-reconciler: DEFAULT_SPOT_RATIO, SPARK_ROLE_LABEL."), "{text}");
}

fn set_components(snapshot: &mut Snapshot, components: Vec<Component>) {
    snapshot.components = Some(components);
}

fn without_node_role(mut component: Component) -> Component {
    component.environment.insert("NODE_ROLE_SELECTOR".into(), "false".into());
    component
}

/// Gives the webhook a certificate of the same CA: a new CA, which the bundles get too.
fn signed(snapshot: &mut Snapshot, name: &str, years: (i32, i32)) {
    let authority = authority("Spot Balancer CA");
    snapshot.certificate = Read::Found(certificate(&authority, name, years));
    edit(snapshot, |one| one["clientConfig"]["caBundle"] = json!(ByteString(authority.1.clone().into_bytes())));
}

/// Gives the webhook a certificate that is its own CA, and valid for the first three days of the year.
fn lasting_three_days(snapshot: &mut Snapshot) {
    let mut params = CertificateParams::new([HOST.to_owned()]).expect("parameters");
    (params.not_before, params.not_after) = (date_time_ymd(2030, 1, 1), date_time_ymd(2030, 1, 4));
    let pem = params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").pem();
    snapshot.certificate = Read::Found(secret("tls.crt", pem.clone()));
    edit(snapshot, |one| one["clientConfig"]["caBundle"] = json!(ByteString(pem.clone().into_bytes())));
}

fn taint_all(snapshot: &mut Snapshot, mut taint: Value) {
    taint["effect"] = json!("NoSchedule");
    for node in snapshot.nodes.iter_mut().flatten() {
        node.taints = vec![of(taint.clone())];
    }
}

#[test]
fn each_fault_has_its_finding_and_no_other() {
    for (what, id, plant) in FAULTS {
        let mut snapshot = healthy();
        plant(&mut snapshot);
        assert_eq!(ids(&snapshot), [*id], "{what}: {:#?}", findings(&snapshot));
    }
    let planted: BTreeSet<&str> = FAULTS.iter().map(|(_, id, _)| *id).collect();
    let all: BTreeSet<&str> = Problem::ALL.iter().map(|problem| problem.id()).collect();
    assert_eq!(planted, all, "each problem is planted");
}

#[test]
fn no_finding_shows_a_token() {
    for (_, _, plant) in FAULTS {
        let mut snapshot = healthy();
        plant(&mut snapshot);
        let text = format!("{:?}", findings(&snapshot));
        assert!(!text.contains("0123456789abcdef"), "{text}");
    }
}

#[test]
fn during_a_rotation_each_token_of_the_secret_is_accepted() {
    let mut snapshot = healthy();
    snapshot.tokens = Read::Found(secret("tokens", format!("0123456789abcdef-next\n0123456789abcdef-x\n {TOKEN}\r\n")));
    assert_eq!(ids(&snapshot), [""; 0]);
}

#[test]
fn a_certificate_that_is_its_own_ca_is_trusted() {
    let mut snapshot = healthy();
    let mut params = CertificateParams::new([HOST.to_owned()]).expect("parameters");
    (params.not_before, params.not_after) = (date_time_ymd(2030, 1, 1), date_time_ymd(2031, 1, 1));
    let pem = params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate").pem();
    snapshot.certificate = Read::Found(secret("tls.crt", pem.clone()));
    edit(&mut snapshot, |one| one["clientConfig"]["caBundle"] = json!(ByteString(pem.clone().into_bytes())));
    assert_eq!(ids(&snapshot), [""; 0]);
}

#[test]
fn an_expired_ca_is_found_where_the_certificate_is_valid() {
    let mut snapshot = healthy();
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    (params.not_before, params.not_after) = (date_time_ymd(2029, 1, 1), date_time_ymd(2030, 3, 1));
    let key = KeyPair::generate().expect("a key");
    let pem = params.self_signed(&key).expect("a certificate").pem();
    snapshot.certificate =
        Read::Found(certificate(&Authority(Issuer::new(params, key), pem.clone()), HOST, (2030, 2031)));
    edit(&mut snapshot, |one| one["clientConfig"]["caBundle"] = json!(ByteString(pem.clone().into_bytes())));
    let found = findings(&snapshot);
    assert_eq!(ids(&snapshot), ["ca-bundle"]);
    assert!(found[0].text.contains("not valid now"), "{found:?}");
}

#[test]
fn taints_that_executors_tolerate_or_that_pass_are_no_finding() {
    for taint in [
        json!({"key": "team", "value": "ml"}),
        json!({"key": "spark-role", "value": "executor"}),
        json!({"key": "node.kubernetes.io/not-ready"}),
    ] {
        let mut snapshot = healthy();
        taint_all(&mut snapshot, taint.clone());
        assert_eq!(ids(&snapshot), [""; 0], "{taint}, and no executor lives");
    }
    let mut snapshot = healthy();
    snapshot.tolerations = vec![of(json!({"key": "team", "value": "ml"}))];
    taint_all(&mut snapshot, json!({"key": "team", "value": "ml"}));
    assert_eq!(ids(&snapshot), [""; 0], "an executor tolerates it");
}

#[test]
fn spot_nodes_of_others_are_no_finding_while_no_executor_waits_for_spot() {
    let mut snapshot = healthy();
    snapshot.tolerations = vec![of(json!({"key": "other", "operator": "Exists"}))];
    snapshot.executor_nodes = ["on-demand-0".to_owned()].into();
    taint_all(&mut snapshot, json!({"key": "team", "value": "ml"}));
    assert_eq!(ids(&snapshot), [""; 0]);
}

#[test]
fn a_short_lived_certificate_is_healthy_until_a_third_of_its_life_is_left() {
    let mut snapshot = healthy();
    lasting_three_days(&mut snapshot);
    snapshot.lease = Read::Unknown;
    snapshot.now = "2030-01-02T23:59:59Z".parse().expect("a time");
    assert_eq!(ids(&snapshot), [""; 0]);
}

#[test]
fn a_setting_that_only_a_newer_program_knows_is_not_checked() {
    let mut snapshot = healthy();
    assert_eq!(unchecked(&snapshot), []);
    set_components(&mut snapshot, vec![webhook(&[("CAPACITY_PROFILE", "mars")]), reconciler()]);
    let note = |snapshot: &Snapshot| match unchecked(snapshot).as_slice() {
        [Unchecked { what, why }] => format!("{what}: {why}"),
        other => panic!("{other:?}"),
    };
    assert_eq!(ids(&snapshot), [""; 0]);
    let text = note(&snapshot);
    assert!(
        text.starts_with("the settings of the Deployment spot-balancer/spot-balancer-webhook: this plugin"),
        "{text}"
    );
    assert!(text.contains("'mars'"), "{text}");
    snapshot.pods = None;
    assert_eq!((ids(&snapshot), note(&snapshot)), (Vec::new(), text));
    snapshot.pods = Some(vec![pod(RECONCILER, "True"), pod(RECONCILER, "True")]);
    assert_eq!((ids(&snapshot), unchecked(&snapshot)), (vec!["settings-invalid"], Vec::new()));
}

#[test]
fn settings_that_are_not_literal_are_not_checked() {
    let mut snapshot = healthy();
    let webhook = &mut snapshot.components.as_mut().expect("components")[0];
    let pod = webhook.deployment.spec.as_mut().and_then(|spec| spec.template.spec.as_mut()).expect("a pod");
    let source = json!({"name": "DEFAULT_SPOT_RATIO", "valueFrom": {"configMapKeyRef": {"name": "x", "key": "y"}}});
    pod.containers[0].env.as_mut().expect("variables").push(of(source));
    assert_eq!(ids(&snapshot), [""; 0]);
    let [Unchecked { what, why }] = &*unchecked(&snapshot) else { panic!("not one note") };
    assert!(what.ends_with("spot-balancer-webhook") && why.ends_with(": DEFAULT_SPOT_RATIO"), "{what}: {why}");
}

#[test]
fn replacing_executors_needs_rights_only_if_a_job_or_a_setting_asks_for_it() {
    let deletes = |snapshot: &Snapshot| rights::needed(snapshot).iter().any(|right| right.verb == "delete");
    let mut snapshot = healthy();
    assert!(!deletes(&snapshot));
    snapshot.drivers.push(driver(json!({"workload/spot-fallback-seconds": "60"})));
    assert!(deletes(&snapshot));
    let mut snapshot = healthy();
    set_components(&mut snapshot, vec![webhook(&[("SPOT_FALLBACK_SECONDS", "60")]), reconciler()]);
    assert!(deletes(&snapshot));
}

#[test]
fn rights_are_needed_in_the_watched_namespaces_or_in_all() {
    let places = |snapshot: &Snapshot| -> BTreeSet<Option<String>> {
        let rights = rights::needed(snapshot).into_iter();
        rights.filter(|right: &Right| right.resource == "pods").map(|right| right.namespace).collect()
    };
    let mut snapshot = healthy();
    assert_eq!(places(&snapshot), [Some("jobs".to_owned())].into());
    let mut without_reconciler = snapshot.clone();
    without_reconciler.components = Some(vec![webhook(&[])]);
    assert_eq!(places(&without_reconciler), [Some("jobs".to_owned())].into());
    for component in snapshot.components.iter_mut().flatten() {
        component.environment.remove("WATCH_NAMESPACES");
    }
    assert_eq!(places(&snapshot), [None].into());
}

#[test]
fn other_kinds_of_installations_are_healthy_too() {
    let mut without_token = healthy();
    for component in without_token.components.iter_mut().flatten() {
        component.environment.remove("ADMISSION_TOKEN_PATH");
    }
    for hook in hooks(&mut without_token) {
        hook.webhook.client_config.service.as_mut().expect("a service").path = Some(hook.kind.path().to_owned());
    }
    without_token.tokens = Read::Unknown;
    assert_eq!(findings(&without_token), [], "without a token");

    let mut in_memory = healthy();
    let mut webhook = webhook(&[]);
    for (name, value) in [("STORE", "memory"), ("RECONCILE_ENABLED", "on"), ("WATCH_NAMESPACES", "jobs")] {
        webhook.environment.insert(name.into(), value.into());
    }
    webhook.deployment.spec.as_mut().expect("a spec").replicas = Some(1);
    in_memory.components = Some(vec![webhook]);
    in_memory.pods = Some(vec![pod(WEBHOOK, "True")]);
    (in_memory.lease, in_memory.metrics) = (Read::Unknown, vec![sample(WEBHOOK, "spot_balancer_reconcile_leader 1\n")]);
    assert_eq!(findings(&in_memory), [], "with the ledger in memory");
    in_memory.metrics = vec![sample(WEBHOOK, "spot_balancer_reconcile_leader 0\n")];
    assert_eq!(ids(&in_memory), ["not-reconciling"]);

    let mut everywhere = healthy();
    for component in everywhere.components.iter_mut().flatten() {
        component.environment.remove("WATCH_NAMESPACES");
    }
    edit(&mut everywhere, |one| {
        one["namespaceSelector"]["matchExpressions"].as_array_mut().expect("expressions").truncate(1);
    });
    assert_eq!(findings(&everywhere), [], "in all namespaces");
}
