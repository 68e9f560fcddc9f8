//! Plain requests to any of the servers under test, with status, headers and body as they came.

use std::time::Duration;

use anyhow::{Context, Result};
use http::{HeaderMap, Method, Request};
use kube::Client;
use kube::client::Body;
use serde_json::Value;

use crate::certificate::authority;

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The response's headers.
    pub headers: HeaderMap,
    /// The body.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.text).with_context(|| format!("status {}, not JSON: {}", self.status, self.text))
    }
}

/// The plain URL of a server on this machine.
pub fn http(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// The TLS URL of a server on this machine.
pub fn https(port: u16) -> String {
    format!("https://127.0.0.1:{port}")
}

/// A client for a server on this machine, `http` or `https`, that trusts the tests' authority. It
/// belongs to the runtime of the test that makes it, so tests do not share one.
pub fn client(url: &str) -> Result<Client> {
    client_with_token(url, None)
}

/// The same with a bearer token.
pub fn client_with_token(url: &str, token: Option<&str>) -> Result<Client> {
    let mut config = kube::Config::new(url.parse()?);
    config.root_cert = Some(vec![authority()?.der.clone()]);
    config.connect_timeout = Some(Duration::from_secs(5));
    config.read_timeout = Some(Duration::from_secs(30));
    config.reset_reader_on_write = true;
    // What a test sends goes out once.
    config.default_retry = false;
    config.auth_info.token = token.map(|token| token.to_owned().into());
    Ok(Client::try_from(config)?)
}

/// `GET path`.
pub async fn get(client: &Client, path: &str) -> Result<Answer> {
    send(client, Method::GET, path, None).await
}

/// `POST path` with a JSON body.
pub async fn post(client: &Client, path: &str, body: &Value) -> Result<Answer> {
    send(client, Method::POST, path, Some(body)).await
}

async fn send(client: &Client, method: Method, path: &str, body: Option<&Value>) -> Result<Answer> {
    let mut request = Request::builder().method(method).uri(path);
    if body.is_some() {
        request = request.header("content-type", "application/json");
    }
    let body = body.map(serde_json::to_vec).transpose()?;
    let response = client.send(request.body(Body::from(body.unwrap_or_default()))?);
    let (head, body) = response.await?.into_parts();
    Ok(Answer {
        status: head.status.as_u16(),
        headers: head.headers,
        text: String::from_utf8(body.collect_bytes().await?.to_vec())?,
    })
}
