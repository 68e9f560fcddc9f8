//! TLS to the server. Trusts the certificate authorities that the system trusts: its certificate store, or what
//! `SSL_CERT_FILE` and `SSL_CERT_DIR` name.

use std::io;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub(super) async fn secure(stream: TcpStream, host: &str) -> io::Result<TlsStream<TcpStream>> {
    let server = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    // Once for each connection, so that a renewed certificate store takes effect; on a thread for blocking work,
    // because it reads many files.
    let config = tokio::task::spawn_blocking(config).await.map_err(io::Error::other)??;
    TlsConnector::from(Arc::new(config)).connect(server, stream).await
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
