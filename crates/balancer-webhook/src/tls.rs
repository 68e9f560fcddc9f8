//! The certificate that the webhook serves: loaded before the port is bound, and reloaded when it changes, so that
//! cert-manager can rotate it without a restart.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::metrics::CertificateMetrics;

/// The kubelet replaces a whole folder by a symbolic link, which file watches miss. So the files are read and compared.
const POLL_INTERVAL: Duration = Duration::from_secs(5);
/// A chain and a key have a few KiB; a wrong path may lead to a file of any size.
const MAX_BYTES: u64 = 1 << 20;

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

/// The certificate in use.
#[derive(Debug)]
pub struct Certificate {
    source: CertificateSource,
    config: ArcSwap<ServerConfig>,
    /// The source of `config`.
    pem: Mutex<Pem>,
    metrics: CertificateMetrics,
}

#[derive(Clone, PartialEq, Eq)]
struct Pem {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pem(…)")
    }
}

impl CertificateSource {
    /// Reads and checks the certificate.
    ///
    /// # Errors
    /// The certificate cannot be served. The error names the setting.
    pub fn load(self, metrics: CertificateMetrics) -> anyhow::Result<Certificate> {
        let pem = self.read()?;
        let (config, expires) = self.configure(&pem)?;
        metrics.expiry.set(expires);
        Ok(Certificate { source: self, config: ArcSwap::from_pointee(config), pem: Mutex::new(pem), metrics })
    }

    fn read(&self) -> anyhow::Result<Pem> {
        match self {
            Self::Files { certificate, key } => {
                Ok(Pem { certificate: read(certificate, "TLS_CERT_PATH")?, key: read(key, "TLS_KEY_PATH")? })
            }
            Self::SelfSigned => {
                let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
                Ok(Pem {
                    certificate: made.cert.pem().into_bytes(),
                    key: made.signing_key.serialize_pem().into_bytes(),
                })
            }
        }
    }

    fn configure(&self, pem: &Pem) -> anyhow::Result<(ServerConfig, i64)> {
        let (chain_name, key_name) = match self {
            Self::Files { certificate, key } => {
                (format!("TLS_CERT_PATH {}", certificate.display()), format!("TLS_KEY_PATH {}", key.display()))
            }
            Self::SelfSigned => ("the certificate".to_owned(), "the key".to_owned()),
        };
        let chain = CertificateDer::pem_slice_iter(&pem.certificate)
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("{chain_name} is not PEM; accepted: a PEM certificate chain"))?;
        let Some(leaf) = chain.first() else {
            bail!("{chain_name} contains no certificate; accepted: a PEM certificate chain");
        };
        let (_, parsed) = X509Certificate::from_der(leaf)
            .with_context(|| format!("{chain_name}: the first certificate is invalid"))?;
        let expires = parsed.validity().not_after.timestamp();
        let key = PrivateKeyDer::from_pem_slice(&pem.key)
            .with_context(|| format!("{key_name} contains no private key; accepted: a private key in PEM"))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .with_context(|| format!("{chain_name} and {key_name} do not belong together"))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok((config, expires))
    }
}

impl Certificate {
    /// The configuration for the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.config.load_full()
    }

    /// Polls the files. A changed certificate is used for new connections. If it is invalid, the failure is logged and
    /// counted, and the previous certificate stays in use.
    pub async fn keep_fresh(self: Arc<Self>) -> Infallible {
        let mut logged = None;
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            let this = Arc::clone(&self);
            let refreshed = tokio::task::spawn_blocking(move || this.refresh()).await;
            let problem = match refreshed {
                Ok(Ok(changed)) => {
                    if changed {
                        tracing::info!(expires = self.metrics.expiry.get(), "certificate reloaded");
                    }
                    None
                }
                Ok(Err(error)) => Some(format!("{error:#}")),
                Err(error) => Some(error.to_string()),
            };
            // Counted at every poll, so that an alert lasts as long as the problem: a rotation may be half-written at one
            // poll. Logged once.
            self.metrics.reload_failures.inc_by(problem.is_some().into());
            if problem != logged {
                if let Some(error) = &problem {
                    tracing::error!(error, "cannot load the changed certificate; the previous one stays in use");
                }
                logged = problem;
            }
        }
    }

    fn refresh(&self) -> anyhow::Result<bool> {
        let CertificateSource::Files { .. } = self.source else { return Ok(false) };
        let pem = self.source.read()?;
        let mut current = self.pem.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == pem {
            return Ok(false);
        }
        let (config, expires) = self.source.configure(&pem)?;
        self.config.store(Arc::new(config));
        self.metrics.expiry.set(expires);
        *current = pem;
        Ok(true)
    }
}

fn read(path: &PathBuf, setting: &str) -> anyhow::Result<Vec<u8>> {
    use std::io::Read;
    let file = std::fs::File::open(path).with_context(|| format!("{setting}: cannot open {}", path.display()))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES)
        .read_to_end(&mut bytes)
        .with_context(|| format!("{setting}: cannot read {}", path.display()))?;
    Ok(bytes)
}
