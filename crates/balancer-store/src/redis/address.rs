//! Reads a Redis URL: the server, and the credentials for it.

use std::fmt;

use redis::{ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo};

/// Why a text is not the URL of a Redis server. It does not contain the text, which may contain a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "not the URL of a Redis server: {reason}; accepted: redis:// or, for TLS, rediss://, then \
     [[user]:password@]host[:port][/database]"
)]
pub struct InvalidRedisUrl {
    reason: String,
}

/// A server, and the credentials for it.
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: bool,
    /// User, password, database.
    pub(super) credentials: RedisConnectionInfo,
}

impl Address {
    pub(super) fn parse(text: &str) -> Result<Self, InvalidRedisUrl> {
        let invalid = |reason: &str| InvalidRedisUrl { reason: reason.to_owned() };
        let mut url = redis::parse_redis_url(text).ok_or_else(|| invalid("it cannot be parsed"))?;
        let tls = match url.scheme() {
            "redis" => false,
            "rediss" => true,
            other => return Err(invalid(&format!("its scheme is {other}"))),
        };
        if url.query().is_some() || url.fragment().is_some() {
            return Err(invalid("it has a part after ? or #"));
        }
        if !url.username().is_empty() && url.password().is_none() {
            return Err(invalid("it has a user and no password"));
        }
        // This crate makes the TLS connection; the redis crate only has to read the rest of the URL.
        url.set_scheme("redis").map_err(|()| invalid("it cannot be parsed"))?;
        // Its errors say what is wrong, and never contain a value.
        let info = url.into_connection_info().map_err(|error| invalid(&error.to_string()))?;
        let ConnectionAddr::Tcp(host, port) = info.addr() else {
            return Err(invalid("it has no host"));
        };
        if host.is_empty() {
            return Err(invalid("it has no host"));
        }
        Ok(Self { host: host.clone(), port: *port, tls, credentials: info.redis_settings().clone() })
    }

    /// The text without the password: some servers repeat in their errors what they received.
    pub(super) fn without_password(&self, text: &str) -> String {
        match self.credentials.password() {
            Some(password) if !password.is_empty() => text.replace(password, "<password>"),
            _ => text.to_owned(),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl fmt::Debug for Address {
    /// Without the credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}{}", if self.tls { " over TLS" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_gives_server_tls_credentials_and_database() -> Result<(), InvalidRedisUrl> {
        let address = Address::parse("rediss://bal%40ncer:p%2Fw@cache.example.com:6380/3")?;
        assert_eq!((address.to_string().as_str(), address.tls), ("cache.example.com:6380", true));
        assert_eq!(address.credentials.username(), Some("bal@ncer"));
        assert_eq!(address.credentials.password(), Some("p/w"));
        assert_eq!(address.credentials.db(), 3);
        let address = Address::parse("redis://[::1]")?;
        assert_eq!((address.host.as_str(), address.port, address.tls), ("::1", 6379, false));
        assert_eq!(address.credentials.password(), None);
        assert_eq!(Address::parse("redis://:pw@h")?.credentials.password(), Some("pw"));
        Ok(())
    }

    #[test]
    fn an_invalid_url_is_an_error_without_the_password() {
        for text in [
            "",
            "localhost:6379",
            "http://user:s3cret@host",
            "valkey://user:s3cret@host",
            "unix:///run/redis.sock",
            "redis://",
            "redis:///1",
            "redis://user:s3cret@host:notaport",
            "redis://user:s3cret@host:99999",
            "redis://user:s3cret@host/s3cret",
            "redis://user:s3cret@host/-s3cret",
            "redis://user:s3cret@host?protocol=s3cret",
            "rediss://user:s3cret@host/#insecure",
            "redis://s3cret@host",
            "redis://user:s3cret%ff@host",
            "redis://user:s3cret@0.0.0.0",
        ] {
            let Err(error) = Address::parse(text) else { panic!("{text:?} was accepted") };
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("s3cret") && shown.contains("rediss://"), "{text:?}: {shown}");
        }
    }
}
