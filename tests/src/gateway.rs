//! Where pods reach the apiserver: it stands for one that is new enough for Spark, and counts the lists of pods.
//!
//! Spark applies its driver's Service on the server's side, with ports that state no protocol. Apiservers before
//! 1.21 refuse that. So it is stated here; all else passes as it came, with the token of whoever sent it.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use serde_json::Value;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::certificate::{ServerCertificate, authority};
use crate::endpoint::https;

const APPLY: &[u8] = b"application/apply-patch+yaml";

/// Dropping it ends it and its connections, but for the WebSockets, which end with the test.
#[derive(Debug)]
pub struct Gateway {
    /// What passed so far.
    pub lists: Arc<PodLists>,
    task: JoinHandle<()>,
}

/// The lists of pods that passed.
#[derive(Debug, Default)]
pub struct PodLists {
    /// From the apiserver's cache.
    pub cached: AtomicUsize,
    /// Consistent ones.
    pub consistent: AtomicUsize,
    /// The most that were in flight at once.
    pub most_in_flight: AtomicUsize,
    in_flight: AtomicUsize,
}

impl Gateway {
    /// Starts it at an address before the apiserver on this port, on the current runtime.
    pub async fn start(address: SocketAddrV4, apiserver: u16, certificate: &ServerCertificate) -> Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let acceptor = TlsAcceptor::from(Arc::new(certificate.config()?));
        // Without a time for reading: a watch may be silent for long.
        let mut config = kube::Config::new(https(apiserver).parse()?);
        config.root_cert = Some(vec![authority()?.der.clone()]);
        config.read_timeout = None;
        let client = Client::try_from(config)?;
        let lists = Arc::new(PodLists::default());
        let counted = lists.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                // A caller that went away at once is no reason to be there for no other.
                let Ok((stream, _)) = listener.accept().await else { continue };
                connections.spawn(serve(stream, acceptor.clone(), client.clone(), counted.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { lists, task })
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An error of either side ends the connection.
async fn serve(stream: TcpStream, acceptor: TlsAcceptor, client: Client, lists: Arc<PodLists>) {
    if let Ok(stream) = acceptor.accept(stream).await {
        let service = service_fn(|request| lists.count(request, |request| pass(request, client.clone())));
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        let _ = connection.with_upgrades().await;
    }
}

impl PodLists {
    /// Counts the request, if it is a list of pods, until it is answered.
    async fn count<A: Future>(
        &self,
        request: Request<Incoming>,
        pass: impl FnOnce(Request<Incoming>) -> A,
    ) -> A::Output {
        let query = request.uri().query().unwrap_or_default();
        let lists = request.method() == Method::GET && request.uri().path().ends_with("/pods");
        if !lists || query.contains("watch=") {
            return pass(request).await;
        }
        let count = if query.contains("resourceVersion=0") { &self.cached } else { &self.consistent };
        count.fetch_add(1, Ordering::Relaxed);
        let in_flight = self.in_flight.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_in_flight.fetch_max(in_flight, Ordering::Relaxed);
        let answer = pass(request).await;
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        answer
    }
}

async fn pass(mut request: Request<Incoming>, client: Client) -> Result<Response<Body>> {
    let caller = hyper::upgrade::on(&mut request);
    let (mut head, body) = request.into_parts();
    let kind = head.headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let applies = kind.starts_with(APPLY);
    let mut body = body.collect().await?.to_bytes().to_vec();
    if head.method == Method::PATCH && applies && head.uri.path().contains("/services/") {
        body = with_protocols(&body)?;
        head.headers.insert(CONTENT_LENGTH, body.len().into());
    }
    let mut response = client.send(Request::from_parts(head, Body::from(body))).await?;
    // A watch over a WebSocket.
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let apiserver = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            if let (Ok(caller), Ok(apiserver)) = tokio::join!(caller, apiserver) {
                let _ = copy_bidirectional(&mut TokioIo::new(caller), &mut TokioIo::new(apiserver)).await;
            }
        });
    }
    Ok(response)
}

/// A Service, in JSON as Spark writes it, with the protocol that a port has where it states none.
fn with_protocols(service: &[u8]) -> Result<Vec<u8>> {
    let mut service: Value = serde_json::from_slice(service)?;
    for port in service["spec"]["ports"].as_array_mut().into_iter().flatten() {
        if port["protocol"].is_null() {
            port["protocol"] = "TCP".into();
        }
    }
    Ok(serde_json::to_vec(&service)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_port_without_a_protocol_gets_the_default_and_others_keep_theirs() -> Result<()> {
        let service = json!({"spec": {"ports": [{"port": 1}, {"port": 2, "protocol": "UDP"}], "clusterIP": "None"}});
        let stated: Value = serde_json::from_slice(&with_protocols(service.to_string().as_bytes())?)?;
        let ports = json!([{"port": 1, "protocol": "TCP"}, {"port": 2, "protocol": "UDP"}]);
        assert_eq!(stated, json!({"spec": {"ports": ports, "clusterIP": "None"}}));
        Ok(())
    }
}
