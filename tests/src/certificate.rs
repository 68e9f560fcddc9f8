//! Certificates for servers on this machine, all signed by one authority of this test process.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Result, anyhow};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::process::scratch_path;

/// The name by which pods call the apiserver.
pub const APISERVER: &str = "kubernetes.default.svc";

/// The authority that signs; its certificate is what clients trust.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate, DER.
    pub der: Vec<u8>,
    /// Its certificate, PEM.
    pub pem: String,
    /// The file that holds `pem`.
    pub path: PathBuf,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("path", &self.path).finish_non_exhaustive()
    }
}

/// The authority of this test process.
pub fn authority() -> Result<&'static Authority> {
    static AUTHORITY: OnceLock<std::result::Result<Authority, String>> = OnceLock::new();
    AUTHORITY
        .get_or_init(|| Authority::new().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("no certificate authority: {error}"))
}

impl Authority {
    /// Another authority than that of the servers.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "Spot Balancer tests");
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let (der, pem) = (certificate.der().to_vec(), certificate.pem());
        let path = scratch_path("ca.crt")?;
        std::fs::write(&path, &pem)?;
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, der, pem, path })
    }

    /// A new certificate for `localhost`, `127.0.0.1` and the name by which pods call the apiserver, in files
    /// of its own.
    pub fn issue(&self) -> Result<ServerCertificate> {
        let certificate = ServerCertificate { path: scratch_path("tls.crt")?, key_path: scratch_path("tls.key")? };
        self.renew(&certificate)?;
        Ok(certificate)
    }

    /// Puts a new certificate and key into the same files.
    pub fn renew(&self, certificate: &ServerCertificate) -> Result<()> {
        self.renew_until(certificate, 4096)
    }

    /// The same with a certificate that expires when this year begins.
    pub fn renew_until(&self, certificate: &ServerCertificate, year: i32) -> Result<()> {
        let names = ["localhost", "127.0.0.1", APISERVER].map(str::to_owned);
        let mut params = CertificateParams::new(names)?;
        params.not_after = date_time_ymd(year, 1, 1);
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let signed = params.signed_by(&key, &self.issuer)?;
        write_whole(&certificate.key_path, &key.serialize_pem())?;
        write_whole(&certificate.path, &signed.pem())
    }
}

/// A server's certificate and key, as files.
#[derive(Debug, Clone)]
pub struct ServerCertificate {
    /// The certificate, PEM.
    pub path: PathBuf,
    /// Its private key, PEM.
    pub key_path: PathBuf,
}

impl ServerCertificate {
    /// What a server serves it by.
    pub fn config(&self) -> Result<ServerConfig> {
        let (chain, key) = self.identity()?;
        Ok(ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?)
    }

    /// The chain and the key, by which a client can identify itself too.
    pub fn identity(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let chain = CertificateDer::pem_file_iter(&self.path)?.collect::<Result<Vec<_>, _>>()?;
        Ok((chain, PrivateKeyDer::from_pem_file(&self.key_path)?))
    }

    /// The certificate that the file holds now, DER: what a client is shown.
    pub fn der(&self) -> Result<Vec<u8>> {
        Ok(CertificateDer::from_pem_file(&self.path)?.to_vec())
    }
}

/// Replaces a file by a rename, so that no reader sees half of it.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let next = path.with_extension("next");
    std::fs::write(&next, text)?;
    Ok(std::fs::rename(next, path)?)
}
