//! Finds out how the servers work together, by asking one of them.

use std::time::Duration;

use redis::{Cmd, Value};
use tokio::task::JoinSet;

use super::address::Address;
use super::connection::{Connection, NOT_LOGGED_IN};
use super::credentials::Credentials;
use super::dial::{Network, name_refusing, name_server, within};
use super::options::RedisMode;
use super::reply::text;
use crate::StoreError;

/// The most that a server may take to say what it is.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A server of its own, or a primary with replicas.
    Standalone,
    ClusterNode,
    Sentinel,
}

/// What is asked for, and what the settings say about the servers.
#[derive(Clone, Debug)]
pub(super) struct Detection<N> {
    pub(super) network: N,
    /// At least one.
    pub(super) servers: Vec<Address>,
    pub(super) credentials: Credentials,
    pub(super) sentinel_credentials: Credentials,
    pub(super) mode: RedisMode,
    pub(super) has_sentinel_master: bool,
    pub(super) database: i64,
}

/// Why the mode is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Undetected {
    /// No server has said what it is.
    NoAnswer(StoreError),
    /// The servers are not what the settings say: one sentence.
    Mistake(String),
}

impl<N: Network> Detection<N> {
    /// Asks all servers at once, and returns the mode by the first answer, or why it is not known.
    pub(super) async fn detect(&self) -> Result<Kind, Undetected> {
        let mut tasks = JoinSet::new();
        for server in self.servers.clone() {
            let detection = self.clone();
            tasks.spawn(async move {
                let kind = within(TIMEOUT, &server, detection.ask(&server)).await;
                (server, kind)
            });
        }
        let (mut unclear, mut failed) = (None, None);
        while let Some(answer) = tasks.join_next().await {
            match answer {
                Ok((server, Ok(Some(kind)))) => return self.check(&server, kind),
                Ok((_, Ok(None))) => unclear = Some(self.expected()),
                // That of a server that answers says more.
                Ok((_, Err(error @ StoreError::Refused { .. }))) => failed = Some(error),
                Ok((_, Err(error))) => failed = failed.or(Some(error)),
                Err(_) => {}
            }
        }
        let panicked = || StoreError::NoConnection("no server was asked what it is".to_owned());
        unclear.ok_or_else(|| Undetected::NoAnswer(failed.unwrap_or_else(panicked)))
    }

    /// What the settings expect of servers that do not say what they are.
    fn expected(&self) -> Kind {
        match self.mode {
            RedisMode::Single => Kind::Standalone,
            RedisMode::Cluster => Kind::ClusterNode,
            RedisMode::Sentinel => Kind::Sentinel,
            RedisMode::Auto if self.has_sentinel_master => Kind::Sentinel,
            RedisMode::Auto if self.servers.len() > 1 => Kind::ClusterNode,
            RedisMode::Auto => Kind::Standalone,
        }
    }

    /// Compares what a server is with what the settings say.
    fn check(&self, server: &Address, kind: Kind) -> Result<Kind, Undetected> {
        let mistake = |text: String| Err(Undetected::Mistake(text));
        let (is, right) = match kind {
            Kind::Standalone => ("neither a node of a cluster nor a sentinel", "single"),
            Kind::ClusterNode => ("a node of a cluster", "cluster"),
            Kind::Sentinel => ("a sentinel", "sentinel"),
        };
        if let Some(set) = self.mode.name().filter(|set| *set != right) {
            return mistake(format!("REDIS_MODE={set}, but {server} is {is}; set REDIS_MODE={right} or auto"));
        }
        match kind {
            Kind::Sentinel if !self.has_sentinel_master => mistake(format!(
                "{server} is a sentinel; set REDIS_SENTINEL_MASTER to the name of the master that it watches"
            )),
            Kind::Standalone | Kind::ClusterNode if self.has_sentinel_master => mistake(format!(
                "REDIS_SENTINEL_MASTER is set, but {server} is {is}; name the sentinels in REDIS_URL, usually with port 26379"
            )),
            Kind::Standalone if self.servers.len() > 1 => {
                mistake(format!("REDIS_URL names several servers, but {server} is {is}; name one server"))
            }
            Kind::ClusterNode if self.database != 0 => mistake(format!(
                "REDIS_URL names database {}, but {server} is a node of a cluster, which has only database 0",
                self.database
            )),
            kind => Ok(kind),
        }
    }

    /// Asks one server. `None` if it answers, but not what it is.
    async fn ask(&self, server: &Address) -> Result<Option<Kind>, StoreError> {
        let (connection, _io) = self.network.open(server, &server.host).await?;
        self.ask_on(&connection).await.map_err(|error| name_refusing(name_server(error, server), server))
    }

    async fn ask_on(&self, connection: &Connection) -> Result<Option<Kind>, StoreError> {
        // No ACL forbids this command. Before the login, because sentinels often have no password while the servers do.
        let mut hello = redis::cmd("HELLO");
        hello.arg(2);
        match answer(connection, &hello).await {
            Ok(reply) => {
                if let Some(kind) = reply.as_ref().and_then(mode_in_hello) {
                    return Ok(Some(kind));
                }
            }
            Err(StoreError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        self.log_in(connection).await?;
        if let Some(kind) = answer(connection, &hello).await?.as_ref().and_then(mode_in_hello) {
            return Ok(Some(kind));
        }
        let info = answer(connection, redis::cmd("INFO").arg("server")).await?;
        if let Some(kind) = info.as_ref().and_then(mode_in_info) {
            return Ok(Some(kind));
        }
        let slots = answer(connection, redis::cmd("CLUSTER").arg("SLOTS")).await?;
        Ok(match slots {
            Some(Value::Array(ranges)) => match ranges.first() {
                Some(Value::Array(range)) if matches!(range.as_slice(), [Value::Int(_), Value::Int(_), ..]) => {
                    Some(Kind::ClusterNode)
                }
                _ => None,
            },
            _ => None,
        })
    }

    /// Logs in with the credentials that the server is likely to want, or with the other ones.
    async fn log_in(&self, connection: &Connection) -> Result<(), StoreError> {
        let (redis, sentinel) = (&self.credentials, &self.sentinel_credentials);
        let expects_sentinel = self.mode == RedisMode::Sentinel || self.has_sentinel_master;
        let mut result = Ok(());
        for credentials in if expects_sentinel { [sentinel, redis] } else { [redis, sentinel] } {
            let Some(login) = credentials.clone().current()? else { continue };
            match connection.authenticate(&login).await {
                Ok(()) => return Ok(()),
                Err(error) => result = result.and(Err(credentials.refused(error))),
            }
        }
        result
    }
}

/// The reply to a command; `None` if the server refuses it. Only a server that wants a password first is an error.
async fn answer(connection: &Connection, command: &Cmd) -> Result<Option<Value>, StoreError> {
    match connection.send(command).await {
        Ok(reply) => Ok(Some(reply)),
        Err(StoreError::Refused { code, detail }) if code == NOT_LOGGED_IN => Err(StoreError::Refused { code, detail }),
        Err(StoreError::Refused { .. } | StoreError::Full(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The mode in the reply to `HELLO`: an array of names and values.
fn mode_in_hello(reply: &Value) -> Option<Kind> {
    let Value::Array(fields) = reply else { return None };
    fields.chunks_exact(2).find_map(|field| match field {
        [name, mode] if text(name) == Some("mode") => kind_of(text(mode)?),
        _ => None,
    })
}

/// The mode in the reply to `INFO server`, in the words of Redis or of Valkey.
fn mode_in_info(reply: &Value) -> Option<Kind> {
    text(reply)?.lines().find_map(|line| match line.trim_end().split_once(':')? {
        ("redis_mode" | "server_mode", mode) => kind_of(mode),
        _ => None,
    })
}

fn kind_of(mode: &str) -> Option<Kind> {
    match mode {
        "standalone" => Some(Kind::Standalone),
        "cluster" => Some(Kind::ClusterNode),
        "sentinel" => Some(Kind::Sentinel),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
