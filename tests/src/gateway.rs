//! Where pods reach the apiserver: it stands for one that is new enough for Spark.
//!
//! Spark applies its driver's Service on the server's side, with ports that state no protocol. Apiservers before
//! 1.21 refuse that. So it is stated here; all else passes as it came, with the token of whoever sent it.

use std::net::SocketAddrV4;
use std::sync::Arc;

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
pub(crate) struct Gateway(JoinHandle<()>);

impl Gateway {
    /// Starts it at an address before the apiserver on this port, on the current runtime.
    pub(crate) async fn start(address: SocketAddrV4, apiserver: u16, certificate: &ServerCertificate) -> Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let acceptor = TlsAcceptor::from(Arc::new(certificate.config()?));
        // Without a time for reading: a watch may be silent for long.
        let mut config = kube::Config::new(https(apiserver).parse()?);
        config.root_cert = Some(vec![authority()?.der.clone()]);
        config.read_timeout = None;
        let client = Client::try_from(config)?;
        Ok(Self(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                // A caller that went away at once is no reason to be there for no other.
                let Ok((stream, _)) = listener.accept().await else { continue };
                connections.spawn(serve(stream, acceptor.clone(), client.clone()));
                while connections.try_join_next().is_some() {}
            }
        })))
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An error of either side ends the connection.
async fn serve(stream: TcpStream, acceptor: TlsAcceptor, client: Client) {
    if let Ok(stream) = acceptor.accept(stream).await {
        let service = service_fn(|request| pass(request, client.clone()));
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        let _ = connection.with_upgrades().await;
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
