//! The floor that the webhook is measured against: the same stack (TLS, HTTP, the whole body, one call
//! of a trivial Redis script where `REDIS_URL` is set) and nothing else. Decides nothing.

use std::convert::Infallible;
use std::env;
use std::sync::Arc;

use anyhow::{Context, Result};
use balancer_tests::certificate::ServerCertificate;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use redis::aio::MultiplexedConnection;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// As long as a real reply.
const REPLY: &[u8] = &[b' '; 420];

#[tokio::main]
async fn main() -> Result<()> {
    let path = |name| env::var(name).with_context(|| format!("{name} is not set"));
    let (certificate, key) = (path("TLS_CERT_PATH")?.into(), path("TLS_KEY_PATH")?.into());
    let mut config = ServerCertificate { path: certificate, key_path: key }.config()?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let store = match env::var("REDIS_URL") {
        Ok(url) => Some(Script::load(&url).await?),
        Err(_) => None,
    };
    let listener = TcpListener::bind(("127.0.0.1", path("PORT")?.parse()?)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (acceptor, store) = (acceptor.clone(), store.clone());
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let service = service_fn(|request| answer(request, store.clone()));
            let io = TokioIo::new(stream);
            // A broken connection is the client's concern.
            let _ = if http2 {
                http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await
            } else {
                http1::Builder::new().header_read_timeout(None).serve_connection(io, service).await
            };
        });
    }
}

#[derive(Clone)]
struct Script {
    connection: MultiplexedConnection,
    sha: Arc<str>,
}

impl Script {
    async fn load(url: &str) -> Result<Self> {
        let mut connection = redis::Client::open(url)?.get_multiplexed_async_connection().await?;
        let sha: String = redis::cmd("SCRIPT").arg("LOAD").arg("return 1").query_async(&mut connection).await?;
        Ok(Self { connection, sha: sha.into() })
    }
}

async fn answer(request: Request<Incoming>, store: Option<Script>) -> Result<Response<Full<Bytes>>, Infallible> {
    let whole = request.into_body().collect().await.is_ok();
    if let (true, Some(Script { mut connection, sha })) = (whole, store) {
        let _: Result<u64, _> = redis::cmd("EVALSHA").arg(&*sha).arg(1).arg("floor").query_async(&mut connection).await;
    }
    Ok(Response::new(Full::new(Bytes::from_static(REPLY))))
}
