//! A stand-in for the Python original: what it does to a pod, by how it counts and what it writes, and its
//! objects in the cluster as its manifests name them.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::certificate::authority;
use crate::endpoint::https;
use crate::nodes;
use crate::pods::JOB_ID_LABEL;

/// The stand-in at work, `STRICT`, with one ratio for all jobs. Dropping it ends it.
#[derive(Debug)]
pub struct Original {
    port: u16,
    counts: Arc<Mutex<Counts>>,
    _serving: JoinSet<()>,
}

/// What it believes to run, and how often it was asked to place one.
#[derive(Debug, Default)]
struct Counts {
    ratio: f64,
    jobs: HashMap<String, (i64, i64)>,
    placed: usize,
}

impl Original {
    /// Starts it on a free port.
    pub async fn start(ratio: f64) -> Result<Self> {
        let certificate = authority()?.issue()?;
        let acceptor = TlsAcceptor::from(Arc::new(certificate.config()?));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let counts = Arc::new(Mutex::new(Counts { ratio, ..Counts::default() }));
        let mut serving = JoinSet::new();
        let seen = Arc::clone(&counts);
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                connections.spawn(serve(acceptor.clone(), stream, Arc::clone(&seen)));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { port, counts, _serving: serving })
    }

    /// How many executors it placed, and would count again if they were posted again.
    pub fn placed(&self) -> usize {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).placed
    }

    /// Makes what its manifests make in the whole cluster: roles, and webhook configurations for the
    /// namespaces whose label `name` is this.
    pub async fn install(&self, client: &Client, namespace: &str) -> Result<()> {
        let params = PostParams::default();
        let name = "spot-balancer-webhook";
        let role: ClusterRole = serde_json::from_value(json!({
            "metadata": {"name": name},
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}],
        }))?;
        Api::all(client.clone()).create(&params, &role).await?;
        let binding: ClusterRoleBinding = serde_json::from_value(json!({
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "spark-tools"}],
        }))?;
        Api::all(client.clone()).create(&params, &binding).await?;
        let mutating = self.configuration(name, "/mutate", "CREATE", namespace)?;
        let mutating: MutatingWebhookConfiguration = serde_json::from_value(mutating)?;
        Api::all(client.clone()).create(&params, &mutating).await?;
        let validating = self.configuration(&format!("{name}-validate"), "/validate", "DELETE", namespace)?;
        let validating: ValidatingWebhookConfiguration = serde_json::from_value(validating)?;
        Api::all(client.clone()).create(&params, &validating).await?;
        Ok(())
    }

    fn configuration(&self, name: &str, path: &str, operation: &str, namespace: &str) -> Result<Value> {
        let bundle = ByteString(authority()?.pem.clone().into_bytes());
        Ok(json!({
            "metadata": {"name": name},
            "webhooks": [{
                "name": format!("{name}.admission.k8s.local"),
                "admissionReviewVersions": ["v1"],
                "sideEffects": "None",
                "timeoutSeconds": 10,
                "failurePolicy": "Ignore",
                "namespaceSelector": {
                    "matchExpressions": [{"key": "name", "operator": "In", "values": [namespace]}],
                },
                "objectSelector": {"matchLabels": {"spark-role": "executor"}},
                "clientConfig": {"url": format!("{}{path}", https(self.port)), "caBundle": bundle},
                "rules": [{
                    "apiGroups": [""], "apiVersions": ["v1"], "operations": [operation], "resources": ["pods"],
                    "scope": "Namespaced",
                }],
            }],
        }))
    }
}

async fn serve(acceptor: TlsAcceptor, stream: TcpStream, counts: Arc<Mutex<Counts>>) {
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let service = service_fn(|request: Request<Incoming>| {
        let counts = Arc::clone(&counts);
        async move {
            let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            let review = serde_json::from_slice(&body).unwrap_or_default();
            let answer = counts.lock().unwrap_or_else(PoisonError::into_inner).answer(&review);
            let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
            response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
            Ok::<_, Infallible>(response)
        }
    });
    // A broken connection is the apiserver's concern.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

impl Counts {
    /// Places and releases by bare counts, by no names; the selector is replaced as a whole.
    #[expect(clippy::cast_precision_loss, reason = "a test's few executors, counted as the original counts them")]
    fn answer(&mut self, review: &Value) -> Value {
        let request = &review["request"];
        let deleted = request["operation"] == "DELETE";
        let pod = if deleted { &request["oldObject"] } else { &request["object"] };
        let job = pod["metadata"]["labels"][JOB_ID_LABEL].as_str().unwrap_or_default();
        let (spot, on_demand) = self.jobs.entry(job.to_owned()).or_default();
        let mut response = json!({"uid": request["uid"], "allowed": true});
        if deleted {
            let count = if pod["spec"]["nodeSelector"][nodes::CAPACITY] == "on-demand" { on_demand } else { spot };
            *count = (*count - 1).max(0);
        } else {
            let all = *spot + *on_demand;
            let to_spot = all == 0 || *spot as f64 / all as f64 <= self.ratio;
            *(if to_spot { spot } else { on_demand }) += 1;
            self.placed += 1;
            let capacity = if to_spot { "spot" } else { "on-demand" };
            let selector = json!({"spark-role": "executor", nodes::CAPACITY: capacity});
            let patch = json!([{"op": "add", "path": "/spec/nodeSelector", "value": selector}]);
            response["patchType"] = "JSONPatch".into();
            response["patch"] = json!(ByteString(patch.to_string().into_bytes()));
        }
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})
    }
}
