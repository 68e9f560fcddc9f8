//! TLS to the server. Trusts the certificate authorities that the system trusts: its certificate store, or what
//! `SSL_CERT_FILE` and `SSL_CERT_DIR` name.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How long the certificate store is not read again. A renewed one takes effect after this time.
const KEPT: Duration = Duration::from_secs(60);

/// The settings that were made last, and when.
static LAST: Mutex<Option<(Instant, Arc<ClientConfig>)>> = Mutex::new(None);

pub(super) async fn secure(stream: TcpStream, host: &str) -> io::Result<TlsStream<TcpStream>> {
    let server = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    TlsConnector::from(current().await?).connect(server, stream).await
}

async fn current() -> io::Result<Arc<ClientConfig>> {
    if let Some((made, config)) = &*LAST.lock().unwrap_or_else(PoisonError::into_inner)
        && made.elapsed() < KEPT
    {
        return Ok(Arc::clone(config));
    }
    // On a thread for blocking work, because it reads many files.
    let config = Arc::new(tokio::task::spawn_blocking(config).await.map_err(io::Error::other)??);
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), Arc::clone(&config)));
    Ok(config)
}

fn config() -> io::Result<ClientConfig> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (trusted, _) = roots.add_parsable_certificates(found.certs);
    if trusted == 0 {
        let reasons: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        let reasons = if reasons.is_empty() { "none was found".to_owned() } else { reasons.join("; ") };
        return Err(io::Error::other(format!(
            "no certificate authority to trust: {reasons}; install the system's CA certificates or set SSL_CERT_FILE"
        )));
    }
    // Chosen here, so that another part of the program cannot change it.
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}
