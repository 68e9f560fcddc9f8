//! The version of Kubernetes in this cluster, for what an older one lacks. The webhook works without it.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::time::{sleep, timeout};

/// How long one request may take.
const LIMIT: Duration = Duration::from_secs(5);
/// How often the version is read, because a cluster is upgraded while webhooks run.
const INTERVAL: Duration = Duration::from_secs(3600);
/// How long to wait after a failure.
const RETRY: Duration = Duration::from_secs(60);

/// A version of Kubernetes, without the patch level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u16,
    minor: u16,
}

impl Version {
    /// The first one whose apiserver keeps `minDomains` of a topologySpreadConstraint unless that is turned off. An older
    /// one drops the field.
    const MIN_DOMAINS: Self = Self { major: 1, minor: 27 };

    /// Reads what the apiserver states. Some vendors append a sign, as in `27+`.
    pub(crate) fn parse(major: &str, minor: &str) -> Option<Self> {
        let number = |text: &str| text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
        Some(Self { major: number(major)?, minor: number(minor)? })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The version that was read last. Until the first answer it is taken for a current one.
#[derive(Debug, Default)]
pub struct ServerVersion(AtomicU32);

impl ServerVersion {
    /// The version, if it is one that ignores `minDomains`.
    pub fn without_min_domains(&self) -> Option<Version> {
        let [a, b, c, d] = self.0.load(Ordering::Relaxed).to_be_bytes();
        let version = Version { major: u16::from_be_bytes([a, b]), minor: u16::from_be_bytes([c, d]) };
        Some(version).filter(|version| version.major > 0 && *version < Version::MIN_DOMAINS)
    }

    /// Stores a version.
    pub(crate) fn set(&self, Version { major, minor }: Version) {
        self.0.store((u32::from(major) << 16) | u32::from(minor), Ordering::Relaxed);
    }
}

/// Reads the version at once, and then every hour.
pub(crate) async fn keep_fresh(client: kube::Client, version: Arc<ServerVersion>) -> Infallible {
    loop {
        let pause = match timeout(LIMIT, client.apiserver_version()).await {
            Ok(Ok(info)) => {
                match Version::parse(&info.major, &info.minor) {
                    Some(read) => version.set(read),
                    None => {
                        tracing::warn!(
                            major = info.major,
                            minor = info.minor,
                            "the version of Kubernetes is not a number"
                        );
                    }
                }
                INTERVAL
            }
            Ok(Err(error)) => {
                let error = balancer_runtime::cluster::chain(&error);
                tracing::warn!(error, "cannot read the version of Kubernetes; trying again");
                RETRY
            }
            Err(_) => {
                tracing::warn!(limit = ?LIMIT, "the Kubernetes API did not return its version in time; trying again");
                RETRY
            }
        };
        sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use http::{Request, Response};
    use kube::client::Body;
    use serde_json::json;

    #[test]
    fn only_versions_before_1_27_ignore_min_domains() {
        for (major, minor, ignores) in [
            ("1", "20", Some("1.20")),
            ("1", "26+", Some("1.26")),
            ("1", "27", None),
            ("1", "33+", None),
            ("2", "0", None),
        ] {
            let version = ServerVersion::default();
            assert_eq!(version.without_min_domains(), None, "not known yet");
            version.set(Version::parse(major, minor).expect("a version"));
            assert_eq!(version.without_min_domains().map(|version| version.to_string()).as_deref(), ignores);
        }
        for (major, minor) in [("", "20"), ("1", ""), ("1", "+"), ("one", "20"), ("1", "99999")] {
            assert_eq!(Version::parse(major, minor), None, "{major} {minor}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_version_is_read_again_after_an_upgrade_and_after_failures() {
        let (service, mut api) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
        let version = Arc::new(ServerVersion::default());
        tokio::spawn(keep_fresh(kube::Client::new(service, "default"), Arc::clone(&version)));
        let info = |minor: &str| {
            json!({
                "major": "1", "minor": minor, "gitVersion": "", "gitCommit": "", "gitTreeState": "", "buildDate": "",
                "goVersion": "", "compiler": "", "platform": "",
            })
        };
        let (_, hung) = api.next_request().await.expect("a first request");
        let began = tokio::time::Instant::now();
        let (_, answer) = api.next_request().await.expect("a request after one without an answer");
        assert_eq!(began.elapsed(), LIMIT + RETRY);
        drop(hung);
        answer.send_error("refused");
        let (request, answer) = api.next_request().await.expect("a request after a failure");
        assert_eq!(request.uri().path(), "/version");
        answer.send_response(Response::new(Body::from(info("26").to_string().into_bytes())));
        let (_, answer) = api.next_request().await.expect("a request after an hour");
        assert_eq!(version.without_min_domains().map(|version| version.minor), Some(26));
        answer.send_response(Response::new(Body::from(info("27").to_string().into_bytes())));
        let (_, _answer) = api.next_request().await.expect("a request after another hour");
        assert_eq!(version.without_min_domains(), None);
        assert!(began.elapsed() >= 2 * INTERVAL);
    }
}
