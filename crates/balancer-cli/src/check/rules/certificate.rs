//! Checks the webhook's certificate, and that the apiserver trusts it: as the apiserver does, by the CA bundles, the time and
//! the name of the Service.

use std::time::Duration;

use balancer_runtime::text::number_of;
use k8s_openapi::ByteString;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error, RootCertStore};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::check::problem::{Finding, Problem};
use crate::check::snapshot::{Read, Snapshot, WEBHOOK};

/// Renewal is at the latest when a third of the lifetime is left, as cert-manager has it. A long-lived certificate may be
/// renewed by hand, and two weeks are enough for that.
const RENEWED_AT_PART: i64 = 3;
const MOST_EXPIRES_SOON_DAYS: i64 = 14;
const DAY: i64 = 86_400;
const HOUR: i64 = 3_600;

const RENEW: &str = "With cert-manager, find out why the Certificate is not renewed; with certificates.source=helm, delete \
                     the Secret and upgrade the release; with your own Secret, put a new certificate into it.";
const TRUST: &str = "With cert-manager, check that its cainjector runs; else upgrade the release with the CA that has \
                     signed the certificate.";

/// The times between which a certificate is valid.
struct Validity {
    from: i64,
    until: i64,
}

impl Validity {
    fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let validity = parsed.validity();
        Some(Self { from: validity.not_before.timestamp(), until: validity.not_after.timestamp() })
    }
}

/// The webhook's certificate and those that follow it, from its Secret. What is wrong with the Secret is an error.
fn chain(snapshot: &Snapshot) -> Option<Result<Vec<CertificateDer<'static>>, &'static str>> {
    let (_, key) = snapshot.component(WEBHOOK)?.certificate_secret()?;
    let secret = match &snapshot.certificate {
        Read::Found(secret) => secret,
        Read::Absent => return Some(Err("It does not exist, and the webhook does not start without its certificate.")),
        Read::Unknown => return None,
    };
    let pem = secret.data.as_ref().and_then(|data| data.get(&key));
    let chain = pem.and_then(|ByteString(pem)| certificates(pem));
    Some(chain.ok_or("It has no certificate, so the webhook does not start."))
}

/// The certificates in PEM; `None` if there is none, or something else.
fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().ok()?;
    let are_valid = certificates.iter().all(|certificate| Validity::of(certificate).is_some());
    (!certificates.is_empty() && are_valid).then_some(certificates)
}

fn secret(snapshot: &Snapshot) -> String {
    let name = snapshot.component(WEBHOOK).and_then(|webhook| webhook.certificate_secret());
    snapshot.object("Secret", &name.map(|(name, _)| name).unwrap_or_default())
}

/// Each CA bundle has the CA that has signed the certificate, and that is valid now.
pub(super) fn bundle(snapshot: &Snapshot) -> Vec<Finding> {
    let chain = chain(snapshot).and_then(Result::ok);
    let now = snapshot.now.as_second();
    let check = |bundle: Option<&ByteString>| -> Option<String> {
        let Some(ByteString(pem)) = bundle.filter(|bundle| !bundle.0.is_empty()) else {
            return Some("The CA bundle is empty, so the apiserver does not trust the webhook.".to_owned());
        };
        let Some(roots) = certificates(pem) else {
            return Some("The CA bundle is no certificate in PEM.".to_owned());
        };
        let chain = chain.as_ref()?;
        let (leaf, others) = chain.split_first()?;
        // A certificate that is its own CA.
        if roots.contains(leaf) {
            return None;
        }
        // If the certificate itself has expired, that is a finding of its own.
        let validity = Validity::of(leaf)?;
        let time = now.clamp(validity.from, validity.until);
        match trust(leaf, others, &roots, time) {
            Trust::Trusted | Trust::Unknown => None,
            Trust::Expired => Some("The CA is not valid now, or one between it and the certificate.".to_owned()),
            Trust::Untrusted => {
                Some(format!("The CA bundle is not that of the certificate's issuer, {}.", issuer(leaf)))
            }
        }
    };
    let hooks = snapshot.hooks.iter().flatten();
    hooks
        .filter_map(|hook| {
            let text = check(hook.webhook.client_config.ca_bundle.as_ref())?;
            Some(Finding::new(Problem::CaBundle, hook.object(), text, TRUST))
        })
        .collect()
}

/// The certificate exists, and is valid now and for some time.
pub(super) fn validity(snapshot: &Snapshot) -> Vec<Finding> {
    let finding = |problem, text: String, fix: &str| vec![Finding::new(problem, secret(snapshot), text, fix)];
    let chain = match chain(snapshot) {
        None => return Vec::new(),
        Some(Err(text)) => {
            let fix = "With cert-manager, find out why the Certificate is not ready; else upgrade the release, or put a \
                       certificate into your own Secret.";
            return finding(Problem::CertificateMissing, text.to_owned(), fix);
        }
        Some(Ok(chain)) => chain,
    };
    let Some(Validity { from, until }) = chain.first().and_then(Validity::of) else { return Vec::new() };
    let now = snapshot.now.as_second();
    let day = |seconds| Timestamp::from_second(seconds).map(|time| time.to_string()).unwrap_or_default();
    if now < from {
        finding(Problem::CertificateExpired, format!("The certificate is not valid before {}.", day(from)), RENEW)
    } else if now >= until {
        finding(Problem::CertificateExpired, format!("The certificate expired at {}.", day(until)), RENEW)
    } else if until - now < ((until - from) / RENEWED_AT_PART).min(MOST_EXPIRES_SOON_DAYS * DAY) {
        let left = match until - now {
            seconds if seconds < DAY => number_of(seconds / HOUR, "hour"),
            seconds => number_of(seconds / DAY, "day"),
        };
        finding(Problem::CertificateExpires, format!("The certificate expires in {left}, at {}.", day(until)), RENEW)
    } else {
        Vec::new()
    }
}

/// The certificate is valid for the name by which the apiserver calls the webhook.
pub(super) fn name(snapshot: &Snapshot) -> Vec<Finding> {
    let Some(Ok(chain)) = chain(snapshot) else { return Vec::new() };
    let service = snapshot.component(WEBHOOK).map(|webhook| webhook.deployment.name_any());
    let Some((leaf, service)) = chain.first().zip(service) else { return Vec::new() };
    // The chart and the manifests give the Service the Deployment's name.
    let host = format!("{service}.{}.svc", snapshot.namespace);
    let is_valid = ServerName::try_from(host.as_str()).is_ok_and(|name| {
        ParsedCertificate::try_from(leaf).and_then(|certificate| verify_server_name(&certificate, &name)).is_ok()
    });
    if is_valid {
        return Vec::new();
    }
    let text = format!("The certificate is not valid for {host}, so the apiserver does not trust it.");
    let fix = format!("Issue a certificate with the DNS name {host}.");
    vec![Finding::new(Problem::CertificateName, secret(snapshot), text, fix)]
}

/// Whether an apiserver trusts a certificate.
enum Trust {
    Trusted,
    /// A CA that has signed it is not valid now.
    Expired,
    /// None of the CAs has signed it.
    Untrusted,
    /// The apiserver may know algorithms that are not known here.
    Unknown,
}

fn trust(
    leaf: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
    roots: &[CertificateDer<'static>],
    time: i64,
) -> Trust {
    // rustls does not look at the times of a root. The apiserver does.
    let is_valid = |root: &&CertificateDer<'_>| {
        Validity::of(root).is_some_and(|Validity { from, until }| (from..=until).contains(&time))
    };
    let valid: Vec<_> = roots.iter().filter(is_valid).cloned().collect();
    match (verify(leaf, others, &valid, time), verify(leaf, others, roots, time)) {
        (Ok(()), _) => Trust::Trusted,
        (_, Ok(()) | Err(Error::InvalidCertificate(CertificateError::ExpiredContext { .. }))) => Trust::Expired,
        (_, Err(Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature))) => {
            Trust::Untrusted
        }
        _ => Trust::Unknown,
    }
}

/// Whether one of the roots has signed the certificate, perhaps by others between them.
fn verify(
    leaf: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
    roots: &[CertificateDer<'static>],
    time: i64,
) -> Result<(), Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    let time = UnixTime::since_unix_epoch(Duration::from_secs(time.try_into().unwrap_or_default()));
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    verify_server_cert_signed_by_trust_anchor(&ParsedCertificate::try_from(leaf)?, &store, others, time, algorithms)
}

fn issuer(certificate: &CertificateDer<'_>) -> String {
    let parsed = X509Certificate::from_der(certificate);
    parsed.map(|(_, certificate)| certificate.issuer().to_string()).unwrap_or_default()
}
