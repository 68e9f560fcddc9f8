//! A client that posts reviews without a pause while its connections end at their age.

use super::*;

use std::sync::atomic::{AtomicU32, Ordering};

use balancer_core::Policy;
use balancer_store::MemoryLedger;
use bytes::Bytes;
use futures::future::join_all;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prometheus_client::registry::Registry;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::copy_bidirectional;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;

use crate::admit::Admission;
use crate::drivers::{DriverLookup, DriverSource};
use crate::metrics::Metrics;
use crate::new_jobs::NewJobs;
use crate::tls::{CertificateSource, TlsSettings};

const REVIEW: &str = include_str!("../../../../tests/fixtures/k8s-1.36-spark-3.5-create-executor.json");
/// Long enough for several ends of connections, which are checked once a second.
const DURATION: Duration = Duration::from_secs(8);

/// A replica whose connections end soon.
struct Replica {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
    /// Connections made to it.
    connections: Arc<AtomicU32>,
}

async fn replica(source: CertificateSource) -> Replica {
    let metrics = Arc::new(Metrics::register(&mut Registry::default()));
    let admission = Admission {
        ledger: Arc::new(MemoryLedger::new(Duration::from_secs(3600))),
        drivers: DriverLookup::new(DriverSource::None, Duration::from_secs(1)),
        conventions: Arc::default(),
        defaults: Policy::default(),
        server_version: Arc::default(),
        new_jobs: NewJobs::new(1_000, std::time::Instant::now()),
        metrics: Arc::clone(&metrics),
    };
    let settings = TlsSettings { certificate: source, client_ca: None };
    let certificate = Arc::new(settings.load(metrics.certificate()).unwrap());
    let mut server = Server::bind(0, certificate).await.unwrap();
    server.max_age = Duration::from_millis(200)..Duration::from_millis(1500);
    let address = SocketAddr::from(([127, 0, 0, 1], server.address().port()));
    let (stop, stopped) = oneshot::channel::<()>();
    let router = Router::new(Arc::new(admission), None, metrics);
    let task = tokio::spawn(server.run(router, async {
        let _ = stopped.await;
        Shutdown::Immediate
    }));
    Replica { address, stop, task, connections: Arc::default() }
}

/// Passes each connection to the next replica, like a load balancer of TCP connections.
async fn round_robin(replicas: Vec<(SocketAddr, Arc<AtomicU32>)>) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for (replica, connections) in replicas.iter().cycle() {
            let (mut client, _) = listener.accept().await.unwrap();
            connections.fetch_add(1, Ordering::Relaxed);
            let mut server = TcpStream::connect(*replica).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut client, &mut server).await });
        }
    });
    address
}

type Body = Full<Bytes>;

enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

struct Client {
    address: SocketAddr,
    tls: TlsConnector,
    is_http2: bool,
}

impl Client {
    fn new(address: SocketAddr, certificate: CertificateDer<'static>, is_http2: bool) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![if is_http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        Self { address, tls: TlsConnector::from(Arc::new(config)), is_http2 }
    }

    async fn connect(&self) -> Sender {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let stream = self.tls.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
        if self.is_http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            Sender::Http2(sender)
        } else {
            let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            Sender::Http1(sender)
        }
    }

    /// Posts reviews until the time is over. Returns how many were answered. Like an apiserver, it connects again if the
    /// server has closed the connection before a request, and sends a request again only if the server stated that it
    /// has not processed it.
    async fn post_for(&self, time: Duration) -> u32 {
        let end = Instant::now() + time;
        let mut answered = 0;
        let mut sender = self.connect().await;
        while Instant::now() < end {
            let is_ready = match &mut sender {
                Sender::Http1(sender) => sender.ready().await.is_ok(),
                Sender::Http2(sender) => sender.ready().await.is_ok(),
            };
            if !is_ready {
                sender = self.connect().await;
                continue;
            }
            let request = Request::builder()
                .method(Method::POST)
                .uri("https://localhost/mutate?timeout=3s")
                .header("host", "localhost")
                .header("content-type", "application/json")
                .body(Full::from(REVIEW))
                .unwrap();
            let sent = match &mut sender {
                Sender::Http1(sender) => sender.try_send_request(request).await,
                Sender::Http2(sender) => sender.try_send_request(request).await,
            };
            let answer = match sent {
                Ok(answer) => answer,
                Err(mut error) => {
                    let (was_sent, error) = (error.take_message().is_none(), format!("{:?}", error.into_error()));
                    assert!(!was_sent || error.contains("GoAway") && error.contains("Remote"), "lost: {error}");
                    continue;
                }
            };
            assert_eq!(answer.status(), StatusCode::OK);
            let body = answer.into_body().collect().await.expect("the whole answer").to_bytes();
            assert!(body.windows(14).any(|part| part == br#""allowed":true"#), "{body:?}");
            answered += 1;
        }
        answered
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_end_at_their_age_without_losing_a_review_and_all_replicas_get_a_share() {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = std::env::temp_dir().join(format!("spot-balancer-age-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (certificate, key) = (folder.join("tls.crt"), folder.join("tls.key"));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let trusted = CertificateDer::from_pem_file(&certificate).unwrap();

    let source = CertificateSource::Files { certificate, key };
    let replicas = [replica(source.clone()).await, replica(source).await];
    std::fs::remove_dir_all(&folder).unwrap();
    for is_http2 in [true, false] {
        let each = replicas.iter().map(|replica| (replica.address, Arc::clone(&replica.connections))).collect();
        let client = Client::new(round_robin(each).await, trusted.clone(), is_http2);
        let before: Vec<u32> = replicas.iter().map(|replica| replica.connections.load(Ordering::Relaxed)).collect();
        let answered = join_all((0..4).map(|_| client.post_for(DURATION / 2))).await;
        assert!(answered.iter().all(|answered| *answered > 0), "{answered:?}");
        for (replica, before) in replicas.iter().zip(before) {
            // Four clients, each of which connects anew at least once.
            let connections = replica.connections.load(Ordering::Relaxed) - before;
            assert!(connections >= 4, "HTTP/2: {is_http2}, {connections} connections");
        }
    }
    for replica in replicas {
        replica.stop.send(()).unwrap();
        replica.task.await.unwrap();
    }
}
