//! HTTPS under a test's own hands: which bytes go when and on which connection, and what became of a
//! request whose connection broke.

use std::convert::Infallible;
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{Stream, StreamExt};
use http::header::{CONTENT_TYPE, HOST, HeaderValue};
use http::{Request, Response, Uri};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::certificate::{ServerCertificate, authority};
use crate::endpoint::Answer;

/// Longer than any server under test may take for an answer.
const ANSWER: Duration = Duration::from_secs(30);

/// What a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// One request at a time, as apiservers up to 1.20 do.
    Http1,
    /// Several at once.
    Http2,
}

/// A request's body.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A body with a known length.
pub fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

/// A body of unknown length: `Transfer-Encoding: chunked` in HTTP/1.1.
pub fn pieces(pieces: impl Stream<Item = Bytes> + Send + 'static) -> Body {
    StreamBody::new(pieces.map(|piece| Ok(Frame::data(piece)))).boxed_unsync()
}

/// A TCP connection to a port of this machine.
pub async fn tcp(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A TLS connection to a server whose certificate the tests' authority signed.
pub async fn tls(port: u16, protocol: Protocol) -> Result<TlsStream<TcpStream>> {
    tls_as(port, protocol, None).await
}

/// The first message of a TLS handshake.
pub fn client_hello(protocol: Protocol) -> Result<Vec<u8>> {
    let mut client = rustls::ClientConnection::new(client_config(protocol, None)?, ServerName::try_from("localhost")?)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    Ok(hello)
}

/// The same of a client that identifies itself by a certificate.
async fn tls_as(port: u16, protocol: Protocol, client: Option<&ServerCertificate>) -> Result<TlsStream<TcpStream>> {
    let connector = TlsConnector::from(client_config(protocol, client)?);
    let connecting = connector.connect(ServerName::try_from("localhost")?, tcp(port).await?);
    Ok(timeout(ANSWER, connecting).await.context("the TLS handshake hangs")??)
}

fn client_config(protocol: Protocol, client: Option<&ServerCertificate>) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(authority()?.der.clone()))?;
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match client {
        Some(client) => {
            let (chain, key) = client.identity()?;
            config.with_client_auth_cert(chain, key)?
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![match protocol {
        Protocol::Http1 => b"http/1.1".to_vec(),
        Protocol::Http2 => b"h2".to_vec(),
    }];
    Ok(Arc::new(config))
}

/// Reads until the other side ends the connection, by whatever means, and answers what came.
pub async fn until_closed(stream: &mut (impl AsyncRead + Unpin), within: Duration) -> Result<Vec<u8>> {
    let mut came = Vec::new();
    let reading = async {
        // A reset is an end too.
        while let Ok(1..) = stream.read_buf(&mut came).await {}
    };
    if timeout(within, reading).await.is_err() {
        bail!("the connection is still open after {within:?}");
    }
    Ok(came)
}

/// One HTTPS connection. Nothing is sent twice, and nothing on another connection.
pub struct Connection {
    sender: Sender,
    authority: String,
    certificate: Vec<u8>,
}

enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

/// Why a request has no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// The connection was at its end before any byte of the request went out on it, or the server
    /// said, by HTTP/2's GOAWAY, that it had not looked at it. Clients send such a request again.
    Refused(hyper::Error),
    /// It was sent, in part at least, and no whole answer came.
    Lost(String),
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => write!(f, "refused: {error}"),
            Self::Lost(cause) => write!(f, "lost: {cause}"),
        }
    }
}

impl std::error::Error for Unanswered {}

impl Connection {
    /// Connects to a port of this machine.
    pub async fn open(port: u16, protocol: Protocol) -> Result<Self> {
        Self::over(tls(port, protocol).await?, port, protocol).await
    }

    /// The same of a client that identifies itself by a certificate.
    pub async fn open_as(port: u16, protocol: Protocol, client: &ServerCertificate) -> Result<Self> {
        Self::over(tls_as(port, protocol, Some(client)).await?, port, protocol).await
    }

    async fn over(stream: TlsStream<TcpStream>, port: u16, protocol: Protocol) -> Result<Self> {
        let certificates = stream.get_ref().1.peer_certificates();
        let certificate = certificates.and_then(<[_]>::first).context("the server showed no certificate")?.to_vec();
        let io = TokioIo::new(stream);
        // The requests on a connection get the reason of its end.
        let sender = match protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(io).await?;
                tokio::spawn(connection);
                Sender::Http1(sender)
            }
            Protocol::Http2 => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
                tokio::spawn(connection);
                Sender::Http2(sender)
            }
        };
        Ok(Self { sender, authority: format!("localhost:{port}"), certificate })
    }

    /// The certificate that the server showed, DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// A second handle, for requests at once on this connection; HTTP/1.1 has none.
    pub fn another_stream(&self) -> Option<Self> {
        let Sender::Http2(sender) = &self.sender else { return None };
        let (authority, certificate) = (self.authority.clone(), self.certificate.clone());
        Some(Self { sender: Sender::Http2(sender.clone()), authority, certificate })
    }

    /// Posts a review as an apiserver does.
    pub async fn post(&mut self, path: &str, review: &Value) -> Result<Answer, Unanswered> {
        let mut request = Request::new(whole(review.to_string()));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = path.parse().map_err(|error| Unanswered::Lost(format!("{path}: {error}")))?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.send(request).await
    }

    /// Sends a request, whose URI is a path, and waits for the whole answer.
    pub async fn send(&mut self, request: Request<Body>) -> Result<Answer, Unanswered> {
        let answering = async {
            let answer = self.start(request).await?;
            let (head, body) = answer.into_parts();
            let lost = |error: &dyn fmt::Display| Unanswered::Lost(format!("status {}, then {error}", head.status));
            let body = body.collect().await.map_err(|error| lost(&error))?.to_bytes();
            let text = String::from_utf8(body.to_vec()).map_err(|error| lost(&error))?;
            Ok(Answer { status: head.status.as_u16(), headers: head.headers, text })
        };
        timeout(ANSWER, answering).await.unwrap_or_else(|_| Err(Unanswered::Lost(format!("no answer in {ANSWER:?}"))))
    }

    async fn start(&mut self, mut request: Request<Body>) -> Result<Response<Incoming>, Unanswered> {
        match &mut self.sender {
            Sender::Http1(sender) => {
                sender.ready().await.map_err(Unanswered::Refused)?;
                let host =
                    HeaderValue::from_str(&self.authority).map_err(|error| Unanswered::Lost(error.to_string()))?;
                request.headers_mut().insert(HOST, host);
                sender.try_send_request(request).await.map_err(unanswered)
            }
            Sender::Http2(sender) => {
                sender.ready().await.map_err(Unanswered::Refused)?;
                let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
                *request.uri_mut() = Uri::builder()
                    .scheme("https")
                    .authority(self.authority.as_str())
                    .path_and_query(path)
                    .build()
                    .map_err(|error| Unanswered::Lost(error.to_string()))?;
                sender.try_send_request(request).await.map_err(unanswered)
            }
        }
    }
}

fn unanswered(mut error: TrySendError<Request<Body>>) -> Unanswered {
    let sent = error.take_message().is_none();
    let error = error.into_error();
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<h2::Error>());
    let gone_away = source.is_some_and(|error| error.is_go_away() && error.is_remote());
    if sent && !gone_away {
        return Unanswered::Lost(format!("{:#}", anyhow::Error::new(error)));
    }
    Unanswered::Refused(error)
}
