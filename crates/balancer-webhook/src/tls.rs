//! The certificate that the webhook serves: loaded before a port is bound, and read again when it
//! changes, so that cert-manager can rotate it without a restart.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

/// The kubelet swaps a whole folder by a symbolic link, which file watches miss: we read and compare.
const POLL: Duration = Duration::from_secs(5);
/// A chain and a key are a few KiB; a mistaken path may be anything.
const MOST_BYTES: u64 = 1 << 20;

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
    /// Made at the start, for `--dev`.
    SelfSigned,
}

/// The certificate that is served now.
#[derive(Debug)]
pub struct Certificate {
    source: CertificateSource,
    config: ArcSwap<ServerConfig>,
    /// What `config` was made of.
    pem: Mutex<Pem>,
    expiry: Gauge,
    failures: Counter,
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
    /// Reads and checks the certificate. Fails where it cannot be served; the error names the setting.
    pub fn load(self) -> anyhow::Result<Certificate> {
        let pem = self.read()?;
        let (config, expires) = self.configure(&pem)?;
        let certificate = Certificate {
            source: self,
            config: ArcSwap::from_pointee(config),
            pem: Mutex::new(pem),
            expiry: Gauge::default(),
            failures: Counter::default(),
        };
        certificate.expiry.set(expires);
        Ok(certificate)
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
            bail!("{chain_name} holds no certificate; accepted: a PEM certificate chain");
        };
        let (_, parsed) = X509Certificate::from_der(leaf)
            .with_context(|| format!("{chain_name}: the first certificate cannot be read"))?;
        let expires = parsed.validity().not_after.timestamp();
        let key = PrivateKeyDer::from_pem_slice(&pem.key)
            .with_context(|| format!("{key_name} holds no private key; accepted: one in PEM"))?;
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

    pub(crate) fn expiry(&self) -> Gauge {
        self.expiry.clone()
    }

    pub(crate) fn failures(&self) -> Counter {
        self.failures.clone()
    }

    /// Reads the files again and again; a changed certificate serves the connections that come after.
    /// One that cannot be used is told and counted, and the one before is served on.
    pub async fn keep_fresh(self: Arc<Self>) -> Infallible {
        let mut told = None;
        loop {
            tokio::time::sleep(POLL).await;
            let this = Arc::clone(&self);
            let refreshed = tokio::task::spawn_blocking(move || this.refresh()).await;
            let problem = match refreshed {
                Ok(Ok(changed)) => {
                    if changed {
                        tracing::info!(expires = self.expiry.get(), "serving the changed certificate");
                    }
                    None
                }
                Ok(Err(error)) => Some(format!("{error:#}")),
                Err(error) => Some(error.to_string()),
            };
            // Counted as often as it is seen, so that an alert ends with the problem and not before: a
            // rotation in progress may be half-written for a poll. Told once, not every five seconds.
            self.failures.inc_by(problem.is_some().into());
            if problem != told {
                if let Some(error) = &problem {
                    tracing::error!(error, "cannot use the changed certificate");
                }
                told = problem;
            }
        }
    }

    fn refresh(&self) -> anyhow::Result<bool> {
        let CertificateSource::Files { .. } = self.source else { return Ok(false) };
        let pem = self.source.read()?;
        let mut served = self.pem.lock().unwrap_or_else(PoisonError::into_inner);
        if *served == pem {
            return Ok(false);
        }
        let (config, expires) = self.source.configure(&pem)?;
        self.config.store(Arc::new(config));
        self.expiry.set(expires);
        *served = pem;
        Ok(true)
    }
}

fn read(path: &PathBuf, setting: &str) -> anyhow::Result<Vec<u8>> {
    use std::io::Read;
    let file = std::fs::File::open(path).with_context(|| format!("{setting}: cannot open {}", path.display()))?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES)
        .read_to_end(&mut bytes)
        .with_context(|| format!("{setting}: cannot read {}", path.display()))?;
    Ok(bytes)
}
