//! Reads a Redis URL: the servers, and the credentials for them.

use std::fmt;

use redis::{ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo};

/// Why a text is not the URL of a Redis server. It does not contain the text, which may contain a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not the URL of a Redis server: {reason}; accepted: redis:// or valkey:// or, for TLS, rediss:// or valkeys://, then \
     [[user]:password@]host[:port][,host[:port]...][/database]"
)]
pub struct InvalidRedisUrl {
    reason: String,
}

/// What a URL says.
pub(super) struct RedisUrl {
    /// At least one.
    pub(super) servers: Vec<Address>,
    pub(super) tls: bool,
    /// Without a password it needs one from elsewhere.
    pub(super) user: Option<String>,
    pub(super) password: Option<String>,
    pub(super) database: i64,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
}

impl RedisUrl {
    /// Reads a URL. A server without a port has the default port.
    pub(super) fn parse(text: &str, default_port: u16) -> Result<Self, InvalidRedisUrl> {
        let unreadable = || InvalidRedisUrl::because("it cannot be parsed");
        let (scheme, rest) = text.split_once("://").ok_or_else(unreadable)?;
        let tls = match scheme {
            "redis" | "valkey" => false,
            "rediss" | "valkeys" => true,
            other => return Err(InvalidRedisUrl::because(&format!("its scheme is {other}"))),
        };
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let (login, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
        let (first, others) = hosts.split_once(',').map_or((hosts, None), |(first, others)| (first, Some(others)));
        // The redis crate reads a URL with one host, and only the plain scheme: this crate makes the TLS connection.
        let (first, settings) = read(&format!("redis://{login}{first}{path}"), default_port)?;
        let mut servers = vec![first];
        for host in others.into_iter().flat_map(|others| others.split(',')) {
            let (server, _) = read(&format!("redis://{host}"), default_port)?;
            if !servers.contains(&server) {
                servers.push(server);
            }
        }
        Ok(Self {
            servers,
            tls,
            user: settings.username().map(str::to_owned),
            password: settings.password().map(str::to_owned),
            database: settings.db(),
        })
    }
}

/// Reads a URL with one host.
fn read(text: &str, default_port: u16) -> Result<(Address, RedisConnectionInfo), InvalidRedisUrl> {
    let url = redis::parse_redis_url(text).ok_or_else(|| InvalidRedisUrl::because("it cannot be parsed"))?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(InvalidRedisUrl::because("it has a part after ? or #"));
    }
    let port = url.port().unwrap_or(default_port);
    // Its errors say what is wrong, and never contain a value.
    let info = url.into_connection_info().map_err(|error| InvalidRedisUrl::because(&error.to_string()))?;
    match info.addr() {
        ConnectionAddr::Tcp(host, _) if !host.is_empty() => {
            Ok((Address { host: host.clone(), port }, info.redis_settings().clone()))
        }
        _ => Err(InvalidRedisUrl::because("it has no host")),
    }
}

impl InvalidRedisUrl {
    pub(super) fn because(reason: &str) -> Self {
        Self { reason: reason.to_owned() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RedisUrl, InvalidRedisUrl> {
        RedisUrl::parse(text, 6379)
    }

    fn servers(text: &str, default_port: u16) -> Vec<String> {
        let url = RedisUrl::parse(text, default_port).unwrap_or_else(|error| panic!("{text}: {error}"));
        url.servers.iter().map(Address::to_string).collect()
    }

    #[test]
    fn a_url_gives_server_tls_credentials_and_database() -> Result<(), InvalidRedisUrl> {
        let url = parse("rediss://bal%40ncer:p%2Fw@cache.example.com:6380/3")?;
        assert_eq!((url.servers[0].to_string().as_str(), url.tls, url.database), ("cache.example.com:6380", true, 3));
        assert_eq!((url.user.as_deref(), url.password.as_deref()), (Some("bal@ncer"), Some("p/w")));
        let url = parse("redis://[::1]")?;
        assert_eq!((url.servers[0].host.as_str(), url.servers[0].port, url.tls), ("::1", 6379, false));
        assert_eq!(url.password, None);
        assert_eq!(parse("redis://:pw@h")?.password.as_deref(), Some("pw"));
        let url = parse("redis://balancer@h")?;
        assert_eq!((url.user.as_deref(), url.password.as_deref()), (Some("balancer"), None));
        Ok(())
    }

    #[test]
    fn the_schemes_of_valkey_mean_the_same() -> Result<(), InvalidRedisUrl> {
        for (scheme, tls) in [("redis", false), ("rediss", true), ("valkey", false), ("valkeys", true)] {
            let url = parse(&format!("{scheme}://u:p@h/1"))?;
            assert_eq!((url.servers[0].to_string().as_str(), url.tls, url.database), ("h:6379", tls, 1));
        }
        Ok(())
    }

    #[test]
    fn a_url_may_name_several_servers() -> Result<(), InvalidRedisUrl> {
        assert_eq!(servers("redis://a,b:1,c/0", 26379), ["a:26379", "b:1", "c:26379"]);
        assert_eq!(
            servers("valkeys://u:p,@w@[::1]:7,[fd00::2],a,a:6379", 6379),
            ["[::1]:7", "[fd00::2]:6379", "a:6379"]
        );
        let url = parse("redis://u:p,@w@a,b:2/5")?;
        assert_eq!((url.user.as_deref(), url.password.as_deref(), url.database), (Some("u"), Some("p,@w"), 5));
        Ok(())
    }

    #[test]
    fn an_invalid_url_is_an_error_without_the_password() {
        for text in [
            "",
            "localhost:6379",
            "http://user:s3cret@host",
            "REDIS://user:s3cret@host",
            "valkeyss://user:s3cret@host",
            "unix:///run/redis.sock",
            "redis://",
            "redis:///1",
            "redis://,",
            "redis://user:s3cret@",
            "redis://user:s3cret@host,",
            "redis://user:s3cret@,host",
            "redis://user:s3cret@one,,two",
            "redis://user:s3cret@one two",
            "redis://user:s3cret@one:1:2,two",
            "redis://user:s3cret@[::1,two",
            "redis://user:s3cret@one,[::1",
            "redis://user:s3cret@host:notaport",
            "redis://user:s3cret@host:99999",
            "redis://user:s3cret@one,host:99999",
            "redis://user:s3cret@one,two:s3cret",
            "redis://user:s3cret@host/s3cret",
            "redis://user:s3cret@host/1,s3cret",
            "redis://user:s3cret@host/-s3cret",
            "redis://user:s3cret@host?protocol=s3cret",
            "redis://user:s3cret@one,two?protocol=s3cret",
            "redis://user:s3cret@one,two#s3cret",
            "rediss://user:s3cret@host/#insecure",
            "redis://user:s3cret?@host",
            "redis://user:s3cret#@host",
            "redis://user:s3cret/@host",
            "redis://user:s3cret%ff@host",
            "redis://user:s3cret@0.0.0.0",
        ] {
            let Err(error) = parse(text) else { panic!("{text:?} was accepted") };
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("s3cret") && shown.contains("rediss://"), "{text:?}: {shown}");
        }
    }
}
