//! Builds snapshots for unit tests: jobs of the namespace `etl` at a fixed time.

use std::collections::BTreeSet;
use std::sync::Arc;

use balancer_core::Pod;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

use crate::cluster::Cluster;
use crate::settings::{Origin, Settings};

use super::{Event, Node, Snapshot};

pub(crate) const NOW: &str = "2026-01-01T12:00:00Z";
const CREATED: &str = "2026-01-01T11:50:00Z";

/// What a caller sees who may read everything. `STRICT`, so that spot can be closed.
pub(crate) fn snapshot(pods: &[Value]) -> Snapshot {
    let mut snapshot = without_rights(pods);
    snapshot.nodes = Some(vec![
        node("s1", "spot", Some(("m6i.xlarge", "a"))),
        node("s2", "spot", Some(("c6i.xlarge", "b"))),
        node("o1", "on-demand", Some(("m6i.xlarge", "a"))),
    ]);
    snapshot.events = Some(Vec::new());
    snapshot.settings = settings(&[("SPOT_PREFERENCE", "STRICT")]);
    snapshot
}

/// What a caller sees who may only read pods.
pub(crate) fn without_rights(pods: &[Value]) -> Snapshot {
    Snapshot {
        settings: Settings::default(),
        pods: Snapshot::by_name(pods.iter().map(core_pod)),
        unread_owners: BTreeSet::new(),
        nodes: None,
        events: None,
        registered: None,
        is_selected: None,
        now: time(NOW),
    }
}

/// The settings of a webhook with this environment.
pub(crate) fn settings(environment: &[(&str, &str)]) -> Settings {
    let origin = Origin::Deployment { namespace: "spot-balancer".into(), name: "spot-balancer-webhook".into() };
    Settings::of_environment(environment.iter().copied(), origin).expect("settings")
}

pub(crate) fn time(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

pub(crate) fn core_pod(pod: &Value) -> Pod<'static> {
    serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod").into_owned()
}

/// A pod of job `j`.
pub(crate) fn pod(name: &str, role: &str) -> Value {
    json!({
        "metadata": {
            "name": name, "namespace": "etl", "uid": format!("uid of {name}"), "creationTimestamp": CREATED,
            "labels": {"spark-role": role, "spark-app-selector": "j"},
        },
        "spec": {"containers": []},
        "status": {"phase": "Pending"},
    })
}

/// The driver `d` with these annotations.
pub(crate) fn driver(annotations: Value) -> Value {
    let mut pod = pod("d", "driver");
    pod["metadata"]["annotations"] = annotations;
    pod["status"]["phase"] = "Running".into();
    pod
}

/// An executor of `d`, as no webhook has touched it.
pub(crate) fn untouched(name: &str) -> Value {
    let mut pod = pod(name, "executor");
    pod["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "Pod", "name": "d", "uid": "uid of d", "controller": true}]);
    pod
}

/// An executor of `d` that was placed by a `STRICT` webhook.
pub(crate) fn placed(name: &str, capacity: &str) -> Value {
    let mut pod = untouched(name);
    pod["metadata"]["annotations"]["workload/capacity-type"] = capacity.into();
    pod["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] = capacity.into();
    pod
}

/// The same, bound to a node.
pub(crate) fn running(name: &str, capacity: &str, node: &str) -> Value {
    on_node(placed(name, capacity), node)
}

pub(crate) fn on_node(mut pod: Value, node: &str) -> Value {
    pod["spec"]["nodeName"] = node.into();
    pod["status"]["phase"] = "Running".into();
    pod
}

pub(crate) fn node(name: &str, capacity: &str, pool: Option<(&str, &str)>) -> Node {
    let mut labels = vec![("karpenter.sh/capacity-type".to_owned(), capacity.to_owned())];
    if let Some((instance_type, zone)) = pool {
        labels.push(("node.kubernetes.io/instance-type".to_owned(), instance_type.to_owned()));
        labels.push(("topology.kubernetes.io/zone".to_owned(), zone.to_owned()));
    }
    Node { name: name.to_owned(), labels }
}

pub(crate) fn event(pod: &str, reporter: &str, reason: &str, note: &str, at: &str) -> Event {
    Event {
        namespace: "etl".into(),
        pod: pod.into(),
        uid: format!("uid of {pod}"),
        reason: reason.into(),
        note: note.into(),
        reporter: reporter.into(),
        at: time(at),
    }
}

/// Cluster with an API that answers each request by its method, path and query: with a status and an object.
pub(crate) async fn cluster(answer: impl Fn(&str) -> (u16, Value) + Send + Sync + 'static) -> Cluster {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let answer = Arc::clone(&answer);
            tokio::spawn(async move {
                let mut lines = BufReader::new(&mut stream).lines();
                let first = lines.next_line().await.ok().flatten().unwrap_or_default();
                let mut length = 0;
                while let Ok(Some(line)) = lines.next_line().await
                    && !line.is_empty()
                {
                    let line = line.to_ascii_lowercase();
                    length = line.strip_prefix("content-length: ").map_or(length, |own| own.parse().expect("a number"));
                }
                let mut body = vec![0; length];
                // A client that has gone away needs no answer.
                let _ = lines.get_mut().read_exact(&mut body).await;
                let (status, body) = answer(first.trim_end_matches(" HTTP/1.1"));
                let body = body.to_string();
                let head = format!("HTTP/1.1 {status} x\r\ncontent-type: application/json\r\nconnection: close\r\n");
                let text = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
                let _ = stream.write_all(text.as_bytes()).await;
            });
        }
    });
    let config = kube::Config::new(format!("http://{address}").parse().expect("an address"));
    Cluster::of(config, "etl".into()).expect("a client")
}

/// A list as the API has it.
pub(crate) fn items(items: Vec<Value>) -> (u16, Value) {
    (200, json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": items}))
}

/// What the API answers to a caller who lacks a right.
pub(crate) fn forbidden() -> (u16, Value) {
    refusal(403, "Forbidden", "no")
}

/// What the API answers to a request that it refuses.
pub(crate) fn refusal(code: u16, reason: &str, message: &str) -> (u16, Value) {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code,
    });
    (code, status)
}
