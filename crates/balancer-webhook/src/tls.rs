//! The certificate that the webhook serves, and the CAs whose clients it accepts: loaded before the port is bound, and
//! reloaded when they change, so that cert-manager can rotate them without a restart.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::metrics::CertificateMetrics;
use crate::reload::{Reload, read};

/// Where the certificate comes from.
#[derive(Clone, Debug)]
pub enum CertificateSource {
    /// PEM files, as a `kubernetes.io/tls` Secret mounts them.
    Files {
        /// The chain, `TLS_CERT_PATH`.
        certificate: PathBuf,
        /// The key, `TLS_KEY_PATH`.
        key: PathBuf,
    },
    /// Generated at the start, for `--dev`.
    SelfSigned,
}

/// What a connection's TLS depends on.
#[derive(Clone, Debug)]
pub struct TlsSettings {
    /// Where the certificate comes from.
    pub certificate: CertificateSource,
    /// `CLIENT_CA_PATH`: the CAs in PEM. If set, a client needs a certificate of one of them.
    pub client_ca: Option<PathBuf>,
}

/// The certificate in use.
#[derive(Debug)]
pub struct Certificate {
    settings: TlsSettings,
    config: ArcSwap<ServerConfig>,
    /// The source of `config`.
    pem: Mutex<Pem>,
    metrics: CertificateMetrics,
}

#[derive(Clone, PartialEq, Eq)]
struct Pem {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pem(…)")
    }
}

impl TlsSettings {
    /// Reads and checks the certificate and the CAs of clients.
    ///
    /// # Errors
    /// The certificate cannot be served, or there is no CA. The error names the setting.
    pub fn load(self, metrics: CertificateMetrics) -> anyhow::Result<Certificate> {
        let pem = self.read()?;
        let (config, expires) = self.configure(&pem)?;
        metrics.expiry.set(expires);
        Ok(Certificate { settings: self, config: ArcSwap::from_pointee(config), pem: Mutex::new(pem), metrics })
    }

    fn read(&self) -> anyhow::Result<Pem> {
        let (certificate, key) = match &self.certificate {
            CertificateSource::Files { certificate, key } => {
                (read(certificate, "TLS_CERT_PATH")?, read(key, "TLS_KEY_PATH")?)
            }
            CertificateSource::SelfSigned => {
                let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
                (made.cert.pem().into_bytes(), made.signing_key.serialize_pem().into_bytes())
            }
        };
        let client_ca = self.client_ca.as_deref().map(|path| read(path, "CLIENT_CA_PATH")).transpose()?;
        Ok(Pem { certificate, key, client_ca })
    }

    fn configure(&self, pem: &Pem) -> anyhow::Result<(ServerConfig, i64)> {
        let (chain_name, key_name) = match &self.certificate {
            CertificateSource::Files { certificate, key } => {
                (format!("TLS_CERT_PATH {}", certificate.display()), format!("TLS_KEY_PATH {}", key.display()))
            }
            CertificateSource::SelfSigned => ("the certificate".to_owned(), "the key".to_owned()),
        };
        let chain = certificates(&pem.certificate)
            .with_context(|| format!("{chain_name} is not PEM; accepted: a PEM certificate chain"))?;
        let Some(leaf) = chain.first() else {
            bail!("{chain_name} contains no certificate; accepted: a PEM certificate chain");
        };
        let (_, parsed) = X509Certificate::from_der(leaf)
            .with_context(|| format!("{chain_name}: the first certificate is invalid"))?;
        let expires = parsed.validity().not_after.timestamp();
        let key = PrivateKeyDer::from_pem_slice(&pem.key)
            .with_context(|| format!("{key_name} contains no private key; accepted: a private key in PEM"))?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?;
        let config = match (&self.client_ca, &pem.client_ca) {
            (Some(path), Some(pem)) => config.with_client_cert_verifier(client_verifier(path, pem)?),
            _ => config.with_no_client_auth(),
        };
        let mut config = config
            .with_single_cert(chain, key)
            .with_context(|| format!("{chain_name} and {key_name} do not belong together"))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok((config, expires))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(pem).collect()
}

/// Verifies that a client has a certificate of one of these CAs.
fn client_verifier(path: &Path, pem: &[u8]) -> anyhow::Result<Arc<dyn ClientCertVerifier>> {
    let name = format!("CLIENT_CA_PATH {}", path.display());
    let mut roots = RootCertStore::empty();
    for ca in certificates(pem).with_context(|| format!("{name} is not PEM; accepted: CA certificates in PEM"))? {
        roots.add(ca).with_context(|| format!("{name} contains an invalid CA certificate"))?;
    }
    if roots.is_empty() {
        bail!("{name} contains no certificate; accepted: CA certificates in PEM");
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()));
    verifier.build().with_context(|| name)
}

impl Certificate {
    /// The configuration for the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.config.load_full()
    }
}

/// A changed certificate is used for new connections.
impl Reload for Certificate {
    fn reload(&self) -> anyhow::Result<bool> {
        let CertificateSource::Files { .. } = self.settings.certificate else { return Ok(false) };
        let pem = self.settings.read()?;
        let mut current = self.pem.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == pem {
            return Ok(false);
        }
        let (config, expires) = self.settings.configure(&pem)?;
        self.config.store(Arc::new(config));
        self.metrics.expiry.set(expires);
        *current = pem;
        Ok(true)
    }

    fn failures(&self) -> &Counter {
        &self.metrics.reload_failures
    }

    fn log_change(&self) {
        tracing::info!(expires = self.metrics.expiry.get(), "certificate reloaded");
    }

    fn log_failure(&self, error: &str) {
        tracing::error!(error, "cannot load the changed certificate; the previous one stays in use");
    }
}
