//! How a [`RedisLedger`](super::RedisLedger) reaches its servers, and how long it keeps a ledger.

use std::path::PathBuf;
use std::time::Duration;

use super::address::{InvalidRedisUrl, RedisUrl};

/// How the servers work together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RedisMode {
    /// The servers are asked.
    #[default]
    Auto,
    /// One server, or an endpoint that always leads to the primary.
    Single,
    /// Redis Cluster: the URL names some of its nodes.
    Cluster,
    /// Redis Sentinel: the URL names the sentinels.
    Sentinel,
}

impl RedisMode {
    /// The value of `REDIS_MODE`; `None` if the servers are asked.
    pub(super) const fn name(self) -> Option<&'static str> {
        match self {
            Self::Auto => None,
            Self::Single => Some("single"),
            Self::Cluster => Some("cluster"),
            Self::Sentinel => Some("sentinel"),
        }
    }
}

/// Where the password comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RedisPassword {
    /// From the URL, which may have none.
    #[default]
    Url,
    /// From a file, which is read again every ten seconds and when a server refuses the password.
    File(PathBuf),
    /// A token of AWS, which is renewed before it expires. Needs the cargo feature `aws-iam`.
    AwsIam(AwsIam),
}

/// What a token of AWS is for. The user is the one in the URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwsIam {
    /// The service that runs the servers.
    pub service: AwsService,
    /// The name of the cache, the replication group or the cluster.
    pub cache_name: String,
}

/// A service of AWS that accepts tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AwsService {
    /// ElastiCache with nodes.
    ElastiCache,
    /// ElastiCache Serverless.
    ElastiCacheServerless,
    /// MemoryDB.
    MemoryDb,
}

/// How a [`RedisLedger`](super::RedisLedger) behaves.
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// The most that one call may take.
    pub timeout: Duration,
    /// How long a job's ledger is kept after the last call for the job, at least. At most half as long again.
    pub ttl: Duration,
    /// How the servers work together.
    pub mode: RedisMode,
    /// Where the password for the Redis servers comes from.
    pub password: RedisPassword,
    /// The name of the primary that the sentinels watch. Sentinels need it.
    pub sentinel_master: Option<String>,
    /// The user for the sentinels; the default user without one.
    pub sentinel_username: Option<String>,
    /// The file with the password for the sentinels; they are not logged in to without one.
    pub sentinel_password_file: Option<PathBuf>,
}

impl RedisOptions {
    /// With this time limit and lifetime: the servers are asked how they work together, and the URL has the password.
    pub fn new(timeout: Duration, ttl: Duration) -> Self {
        Self {
            timeout,
            ttl,
            mode: RedisMode::Auto,
            password: RedisPassword::Url,
            sentinel_master: None,
            sentinel_username: None,
            sentinel_password_file: None,
        }
    }

    /// Checks what contradicts the URL, or itself, before a server is asked.
    pub(super) fn check(&self, url: &RedisUrl) -> Result<(), ConnectError> {
        self.contradiction(url).map_or(Ok(()), |sentence| Err(ConnectError::Mode(sentence)))
    }

    fn contradiction(&self, url: &RedisUrl) -> Option<String> {
        let password = match &self.password {
            RedisPassword::Url => (url.user.is_some() && url.password.is_none()).then(|| {
                "REDIS_URL has a user and no password; accepted: a password in it, REDIS_PASSWORD_FILE or REDIS_AWS_IAM"
                    .to_owned()
            }),
            RedisPassword::File(_) => url.password.as_ref().map(|_| {
                "REDIS_PASSWORD_FILE is set, but REDIS_URL has a password too; accepted: one of them".to_owned()
            }),
            RedisPassword::AwsIam(iam) => self.contradiction_of_aws_iam(iam, url),
        };
        password.or_else(|| self.contradiction_of_mode(url))
    }

    fn contradiction_of_aws_iam(&self, iam: &AwsIam, url: &RedisUrl) -> Option<String> {
        if !cfg!(feature = "aws-iam") {
            return Some(
                "REDIS_AWS_IAM is set, but this program was built without it; accepted: a build with the cargo feature \
                 aws-iam"
                    .to_owned(),
            );
        }
        if !is_aws_name(&iam.cache_name) {
            return Some(format!("REDIS_AWS_CACHE_NAME is {:?}; accepted: letters, digits and '-'", iam.cache_name));
        }
        let wrong = match &url.user {
            _ if url.password.is_some() => "has a password; accepted: a user without one, because tokens replace it",
            None => "has no user; accepted: the user that the token is for, as in rediss://USER@HOST",
            Some(user) if !is_aws_name(user) => "has a user with other characters than letters, digits and '-'",
            Some(_) if !url.tls => "is without TLS; accepted: rediss://, because anyone who reads a token can log in",
            Some(_) if self.mode == RedisMode::Sentinel || self.sentinel_master.is_some() => {
                return Some("REDIS_AWS_IAM is set, but AWS has no sentinels; accepted: REDIS_MODE=auto".to_owned());
            }
            Some(_) => return None,
        };
        Some(format!("REDIS_AWS_IAM is set, but REDIS_URL {wrong}"))
    }

    fn contradiction_of_mode(&self, url: &RedisUrl) -> Option<String> {
        let sentinel_settings = [
            ("REDIS_SENTINEL_MASTER", self.sentinel_master.is_some()),
            ("REDIS_SENTINEL_USERNAME", self.sentinel_username.is_some()),
            ("REDIS_SENTINEL_PASSWORD_FILE", self.sentinel_password_file.is_some()),
        ];
        let sentinel_setting = sentinel_settings.iter().find(|(_, is_set)| *is_set).map(|(name, _)| name);
        match (self.mode, sentinel_setting) {
            (mode @ (RedisMode::Single | RedisMode::Cluster), Some(setting)) => {
                return Some(format!(
                    "{setting} is set, but REDIS_MODE={}; accepted: REDIS_MODE=sentinel or auto",
                    mode.name().unwrap_or("auto")
                ));
            }
            (RedisMode::Single, None) if url.servers.len() > 1 => {
                let hosts = url.servers.len();
                return Some(format!(
                    "REDIS_MODE=single, but REDIS_URL has {hosts} hosts; accepted: one host, or another mode"
                ));
            }
            (RedisMode::Cluster, None) if url.database != 0 => {
                let database = url.database;
                return Some(format!(
                    "REDIS_MODE=cluster, but REDIS_URL has database {database}; accepted: 0, because clusters have no other"
                ));
            }
            (RedisMode::Sentinel, _) if self.sentinel_master.as_deref().is_none_or(str::is_empty) => {
                return Some(
                    "REDIS_MODE=sentinel, but REDIS_SENTINEL_MASTER is not set; accepted: the name of the master that \
                     the sentinels watch, such as mymaster"
                        .to_owned(),
                );
            }
            (RedisMode::Auto, _) if self.sentinel_master.as_deref() == Some("") => {
                return Some(
                    "REDIS_SENTINEL_MASTER is empty; accepted: the name of the master that the sentinels watch, such as \
                     mymaster"
                        .to_owned(),
                );
            }
            _ => {}
        }
        let needs =
            |setting: &str, other: &str| Some(format!("{setting} is set, but {other} is not; accepted: both or none"));
        match (&self.sentinel_master, &self.sentinel_password_file, &self.sentinel_username) {
            (_, None, Some(_)) => needs("REDIS_SENTINEL_USERNAME", "REDIS_SENTINEL_PASSWORD_FILE"),
            (None, Some(_), _) => needs("REDIS_SENTINEL_PASSWORD_FILE", "REDIS_SENTINEL_MASTER"),
            _ => None,
        }
    }
}

/// Names of caches and users of AWS have no other characters, so that they need no escapes in a token.
fn is_aws_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Why a [`RedisLedger`](super::RedisLedger) cannot be made. A server that cannot be reached is no reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The URL is invalid.
    #[error(transparent)]
    Url(#[from] InvalidRedisUrl),
    /// The servers do not work together as the options say, or the options contradict each other. One sentence.
    #[error("{0}")]
    Mode(String),
    /// A file with a password has none that can be used. One sentence.
    #[error("{0}")]
    PasswordFile(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> RedisOptions {
        RedisOptions::new(Duration::from_secs(1), Duration::from_secs(60))
    }

    fn refusal(options: &RedisOptions, url: &str) -> String {
        let url = RedisUrl::parse(url, 6379).expect("a URL");
        let error = options.check(&url).expect_err("refused").to_string();
        assert!(!error.contains("s3cret"), "{error}");
        error
    }

    #[test]
    fn a_password_comes_from_one_place() {
        let file = RedisOptions { password: RedisPassword::File("/password".into()), ..options() };
        assert!(
            refusal(&file, "redis://:s3cret@host").contains("REDIS_PASSWORD_FILE is set, but REDIS_URL has a pass")
        );
        for accepted in ["redis://host", "redis://user@host"] {
            assert_eq!(file.check(&RedisUrl::parse(accepted, 6379).expect("a URL")), Ok(()), "{accepted}");
        }
        assert!(refusal(&options(), "redis://user@host").contains("REDIS_URL has a user and no password"));
        assert_eq!(options().check(&RedisUrl::parse("redis://user:s3cret@host/3", 6379).expect("a URL")), Ok(()));
    }

    #[test]
    fn settings_that_the_mode_has_no_use_for_are_refused() {
        let sentinel =
            RedisOptions { mode: RedisMode::Sentinel, sentinel_master: Some("mymaster".into()), ..options() };
        assert_eq!(sentinel.check(&RedisUrl::parse("redis://host/3", 6379).expect("a URL")), Ok(()));
        for (options, url, part) in [
            (RedisOptions { mode: RedisMode::Single, ..sentinel.clone() }, "redis://host", "but REDIS_MODE=single"),
            (
                RedisOptions { mode: RedisMode::Cluster, sentinel_password_file: Some("/f".into()), ..options() },
                "redis://host",
                "REDIS_SENTINEL_PASSWORD_FILE is set, but REDIS_MODE=cluster; accepted: REDIS_MODE=sentinel or auto",
            ),
            (
                RedisOptions { mode: RedisMode::Sentinel, ..options() },
                "redis://host",
                "REDIS_MODE=sentinel, but REDIS_SENTINEL_MASTER is not set",
            ),
            (
                RedisOptions { sentinel_username: Some("watcher".into()), ..sentinel },
                "redis://host",
                "REDIS_SENTINEL_PASSWORD_FILE is not",
            ),
            (
                RedisOptions { sentinel_master: Some(String::new()), ..options() },
                "redis://host",
                "REDIS_SENTINEL_MASTER is empty; accepted: the name",
            ),
            (RedisOptions { mode: RedisMode::Cluster, ..options() }, "redis://host/3", "database 3; accepted: 0"),
            (RedisOptions { mode: RedisMode::Single, ..options() }, "redis://a,b", "has 2 hosts; accepted: one host"),
        ] {
            let error = refusal(&options, url);
            assert!(error.contains(part), "{error}");
        }
    }

    fn aws_iam(cache_name: &str) -> RedisOptions {
        let iam = AwsIam { service: AwsService::ElastiCache, cache_name: cache_name.to_owned() };
        RedisOptions { password: RedisPassword::AwsIam(iam), ..options() }
    }

    #[cfg(not(feature = "aws-iam"))]
    #[test]
    fn a_build_without_aws_iam_names_the_feature() {
        let error = refusal(&aws_iam("my-cache"), "rediss://user@host");
        assert!(error.contains("REDIS_AWS_IAM") && error.contains("cargo feature aws-iam"), "{error}");
    }

    #[cfg(feature = "aws-iam")]
    #[test]
    fn a_token_needs_a_user_a_cache_and_tls_and_no_password() {
        assert_eq!(aws_iam("my-cache").check(&RedisUrl::parse("rediss://user@host", 6379).expect("a URL")), Ok(()));
        let of_sentinels = RedisOptions { sentinel_master: Some("mymaster".into()), ..aws_iam("my-cache") };
        for (options, url, part) in [
            (aws_iam("my-cache"), "rediss://user:s3cret@host", "REDIS_URL has a password"),
            (aws_iam("my-cache"), "rediss://host", "REDIS_URL has no user"),
            (aws_iam("my-cache"), "rediss://us%20er@host", "letters, digits"),
            (aws_iam("my-cache"), "redis://user@host", "without TLS"),
            (aws_iam("my cache"), "rediss://user@host", "REDIS_AWS_CACHE_NAME is \"my cache\"; accepted: letters"),
            (aws_iam(""), "rediss://user@host", "REDIS_AWS_CACHE_NAME is \"\""),
            (of_sentinels, "rediss://user@host", "no sentinels"),
        ] {
            let error = refusal(&options, url);
            assert!(error.contains(part), "{error}");
        }
    }
}
