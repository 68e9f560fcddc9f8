//! Another project's admission webhook, which the apiserver calls after ours.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::certificate::authority;
use crate::endpoint::https;
use crate::pods::{JOB_ID_LABEL, PodBuilder, executor};
use crate::scenario::Scenario;
use crate::wait::{SOON, until_true};

/// The label of the pods that it refuses.
const UNWANTED: &str = "tests/unwanted";

/// What it does with the creations of executors.
#[derive(Debug, Clone, Copy)]
pub enum Behaviour {
    /// Refuses those of [`unwanted`].
    Refuses,
    /// Allows all after this time.
    Delays(Duration),
    /// Adds a requirement: that the node has this label, with this value. It adds none that is there.
    Requires(By, &'static str, &'static str),
}

/// How a requirement is expressed.
#[derive(Debug, Clone, Copy)]
pub enum By {
    /// By the nodeSelector.
    Selector,
    /// By a required node affinity, in each term.
    Affinity,
}

impl By {
    /// The spec of a pod with the requirement.
    fn require(self, mut spec: Value, key: &str, value: &str) -> Value {
        match self {
            Self::Selector => spec["nodeSelector"][key] = value.into(),
            Self::Affinity => {
                let required = &mut spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
                let requirement = json!({"key": key, "operator": "In", "values": [value]});
                match required["nodeSelectorTerms"].as_array_mut() {
                    None => required["nodeSelectorTerms"] = json!([{"matchExpressions": [requirement]}]),
                    Some(terms) => {
                        for term in terms {
                            match term["matchExpressions"].as_array_mut() {
                                None => term["matchExpressions"] = json!([requirement]),
                                Some(own) if own.contains(&requirement) => {}
                                Some(own) => own.push(requirement.clone()),
                            }
                        }
                    }
                }
            }
        }
        spec
    }
}

/// The webhook, at work for one namespace. Dropping it ends it.
#[derive(Debug)]
pub struct OtherWebhook(JoinHandle<()>);

impl OtherWebhook {
    /// Starts it on the current runtime and waits until the apiserver calls it.
    pub async fn start(scenario: &Scenario, behaviour: Behaviour) -> Result<Self> {
        let acceptor = TlsAcceptor::from(Arc::new(authority()?.issue()?.config()?));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = https(listener.local_addr()?.port());
        let calls = Arc::new(AtomicU64::new(0));
        let webhook = Self(tokio::spawn(serve(listener, acceptor, behaviour, calls.clone())));

        // The apiserver calls mutating webhooks in the order of their names.
        let name = format!("zz-other.{}.spot-balancer.test", scenario.namespace);
        let configuration = json!({
            "metadata": {"name": name},
            "webhooks": [{
                "name": name,
                "admissionReviewVersions": ["v1"],
                "clientConfig": {"url": url, "caBundle": ByteString(authority()?.pem.clone().into_bytes())},
                "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": scenario.namespace}},
                "objectSelector": {"matchLabels": {"spark-role": "executor"}},
                "sideEffects": "None",
                "failurePolicy": "Fail",
                "timeoutSeconds": 10,
            }],
        });
        let (client, params) = (&scenario.client, PostParams::default());
        match behaviour {
            Behaviour::Refuses => {
                let configuration: ValidatingWebhookConfiguration = serde_json::from_value(configuration)?;
                Api::all(client.clone()).create(&params, &configuration).await?;
            }
            Behaviour::Delays(_) | Behaviour::Requires(..) => {
                let configuration: MutatingWebhookConfiguration = serde_json::from_value(configuration)?;
                Api::all(client.clone()).create(&params, &configuration).await?;
            }
        }
        let probe = executor("probe", 0).without_label(JOB_ID_LABEL).without_label("spark-app-selector");
        until_true(SOON, "the other webhook to be called", async || {
            probe.dry_run(client, &scenario.namespace).await?;
            Ok(calls.load(Ordering::Relaxed) > 0)
        })
        .await?;
        Ok(webhook)
    }
}

impl Drop for OtherWebhook {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A pod that the other webhook refuses.
pub fn unwanted(pod: PodBuilder) -> PodBuilder {
    pod.label(UNWANTED, "yes")
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, behaviour: Behaviour, calls: Arc<AtomicU64>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(converse(stream, acceptor.clone(), behaviour, calls.clone()));
        while connections.try_join_next().is_some() {}
    }
}

async fn converse(stream: TcpStream, acceptor: TlsAcceptor, behaviour: Behaviour, calls: Arc<AtomicU64>) {
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let service = service_fn(|request: Request<Incoming>| async {
        calls.fetch_add(1, Ordering::Relaxed);
        let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        let review: Value = serde_json::from_slice(&body).unwrap_or_default();
        let mut response = json!({"uid": review["request"]["uid"], "allowed": true});
        match behaviour {
            Behaviour::Refuses => {
                response["allowed"] = review["request"]["object"]["metadata"]["labels"][UNWANTED].is_null().into();
            }
            Behaviour::Delays(time) => tokio::time::sleep(time).await,
            Behaviour::Requires(by, key, value) => {
                let spec = by.require(review["request"]["object"]["spec"].clone(), key, value);
                let patch = json!([{"op": "replace", "path": "/spec", "value": spec}]);
                response["patchType"] = "JSONPatch".into();
                response["patch"] = json!(ByteString(patch.to_string().into_bytes()));
            }
        }
        let answer = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response});
        let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
        Ok::<_, Infallible>(response)
    });
    // A broken connection is the client's concern.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}
