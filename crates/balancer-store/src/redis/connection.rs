//! One connection to a server: commands and their replies, and how long they may take.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, ErrorKind, RedisConnectionInfo, RedisError, Value};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::credentials::Login;
use super::scripts::Script;
use crate::{StoreError, coalesce_wakeups};

/// The error code of a server that has reached its `maxmemory`.
const FULL: &str = "OOM";
/// The error code of a read-only replica.
pub(super) const READ_ONLY: &str = "READONLY";
/// The error code of a server that wants a password first.
pub(super) const NOT_LOGGED_IN: &str = "NOAUTH";
/// The error code of a server that wants another password.
const WRONG_PASSWORD: &str = "WRONGPASS";

/// Whether a command is for a slot that is moving to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asking {
    No,
    Yes,
}

/// A connection that carries all calls at once.
pub(super) struct Connection {
    redis: MultiplexedConnection,
    /// A call timed out: does the server still answer?
    pub(super) probe_now: Notify,
    /// The server has become a read-only replica: another server is the master now.
    pub(super) read_only: Notify,
    /// The server asks for a password, or for another one.
    pub(super) not_logged_in: Notify,
}

impl Connection {
    /// Speaks Redis on a stream. Nothing is sent yet. The connection breaks when the task is dropped.
    pub(super) async fn on<S>(stream: S) -> Result<(Self, IoTask), StoreError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Each call has a time limit of its own.
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let silent = RedisConnectionInfo::default().set_skip_set_lib_name();
        let (redis, io) = MultiplexedConnection::new_with_config(&silent, stream, config)
            .await
            .map_err(|error| store_error(&error))?;
        let (probe_now, read_only, not_logged_in) = (Notify::new(), Notify::new(), Notify::new());
        let connection = Self { redis, probe_now, read_only, not_logged_in };
        Ok((connection, IoTask(tokio::spawn(coalesce_wakeups(io)))))
    }

    /// Sends a command.
    pub(super) async fn send(&self, command: &Cmd) -> Result<Value, StoreError> {
        answer(self.redis.clone().send_packed_command(command).await)
    }

    /// Logs in, or logs in again.
    pub(super) async fn authenticate(&self, login: &Login) -> Result<(), StoreError> {
        // Not left to the redis crate, which reports every error as a wrong password.
        let mut auth = redis::cmd("AUTH");
        auth.arg(login.user.as_deref()).arg(&login.password);
        match self.send(&auth).await {
            Ok(_) => Ok(()),
            Err(StoreError::Refused { code, detail }) => {
                Err(StoreError::Refused { code, detail: login.redact(&detail) })
            }
            Err(error) => Err(error),
        }
    }

    /// Sends a command, with a script that it runs, and limits the time that it may take.
    pub(super) async fn call(
        &self,
        script: Option<&Script>,
        command: &Cmd,
        limit: Duration,
    ) -> Result<Value, StoreError> {
        timeout(limit, self.run(script, command, Asking::No)).await.unwrap_or_else(|_| {
            self.probe_now.notify_one();
            Err(StoreError::TimedOut(limit))
        })
    }

    /// Sends a command, with a script that it runs.
    pub(super) async fn run(
        &self,
        script: Option<&Script>,
        command: &Cmd,
        asking: Asking,
    ) -> Result<Value, StoreError> {
        let reply = match (self.send_as(command, asking).await, script) {
            // The server was restarted, or got SCRIPT FLUSH.
            (Err(StoreError::Refused { code, .. }), Some(script)) if code == "NOSCRIPT" => {
                self.send(redis::cmd("SCRIPT").arg("LOAD").arg(script.code())).await?;
                self.send_as(command, asking).await
            }
            (reply, _) => reply,
        };
        match &reply {
            Err(error) if is_read_only(error) => self.read_only.notify_one(),
            Err(StoreError::Refused { code, .. }) if code == NOT_LOGGED_IN || code == WRONG_PASSWORD => {
                self.not_logged_in.notify_one();
            }
            _ => {}
        }
        reply
    }

    async fn send_as(&self, command: &Cmd, asking: Asking) -> Result<Value, StoreError> {
        match asking {
            Asking::No => self.send(command).await,
            // In one message, because others use the connection too.
            Asking::Yes => {
                let mut both = redis::pipe();
                both.cmd("ASKING").add_command(command.clone());
                let mut connection = self.redis.clone();
                answer(connection.send_packed_commands(&both, 1, 1).await.map(
                    |replies| match replies.into_iter().next() {
                        Some(reply) => reply,
                        None => Value::Nil,
                    },
                ))
            }
        }
    }

    /// Whether the server answers at all. An error is an answer too.
    pub(super) async fn still_answers(&self, usual: Duration) -> bool {
        match timeout(usual, self.send(&redis::cmd("PING"))).await {
            Ok(Ok(_) | Err(StoreError::Refused { .. } | StoreError::Full(_))) => true,
            Ok(Err(_)) | Err(_) => false,
        }
    }
}

/// The task that reads from and writes to a connection. It ends when this is dropped, or the connection breaks.
pub(super) struct IoTask(JoinHandle<()>);

impl IoTask {
    /// Waits until the connection breaks.
    pub(super) async fn ended(&mut self) {
        // A panic breaks the connection too.
        let _ = (&mut self.0).await;
    }
}

impl Drop for IoTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn answer(reply: Result<Value, RedisError>) -> Result<Value, StoreError> {
    match reply {
        Ok(Value::ServerError(refusal)) => Err(refused(refusal.code(), refusal.details().unwrap_or_default())),
        Ok(reply) => Ok(reply),
        Err(error) => Err(store_error(&error)),
    }
}

fn store_error(error: &RedisError) -> StoreError {
    match error.kind() {
        ErrorKind::Parse => StoreError::InvalidReply(error.to_string()),
        _ => StoreError::NoConnection(error.to_string()),
    }
}

/// What a server's error means.
fn refused(code: &str, detail: &str) -> StoreError {
    if has_code(code, detail, FULL) {
        StoreError::Full(detail.to_owned())
    } else {
        StoreError::Refused { code: code.to_owned(), detail: detail.to_owned() }
    }
}

fn is_read_only(error: &StoreError) -> bool {
    matches!(error, StoreError::Refused { code, detail } if has_code(code, detail, READ_ONLY))
}

/// Whether an error has the code `expected`. Up to Redis 6, the error of a command in a script is quoted in an `ERR`.
fn has_code(code: &str, detail: &str, expected: &str) -> bool {
    let quoted = || detail.split(" -").skip(1).any(|rest| rest.split(' ').next() == Some(expected));
    code == expected || code == "ERR" && quoted()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_server_is_recognised_in_the_words_of_redis_6_and_7() {
        let detail = "command not allowed when used memory > 'maxmemory'.";
        assert_eq!(refused("OOM", detail), StoreError::Full(detail.to_owned()));
        let quoted = format!("Error running script (call to f_0): @user_script:9: @user_script: 9: -OOM {detail}");
        assert_eq!(refused("ERR", &quoted), StoreError::Full(quoted));
        for (code, detail) in [("WRONGTYPE", "of a key -OOM "), ("ERR", "OOM"), ("ERR", "the key -OOMPH "), ("ERR", "")]
        {
            assert_eq!(refused(code, detail).kind(), "refused", "{code} {detail}");
        }
    }

    #[test]
    fn a_read_only_replica_is_recognised_in_the_words_of_redis_6_and_7() {
        let quoted = "Error running script (call to f_0): @user_script: 57: -READONLY You can't write";
        assert!(is_read_only(&refused("READONLY", "You can't write")) && is_read_only(&refused("ERR", quoted)));
        assert!(!is_read_only(&refused("ERR", "READONLY")) && !is_read_only(&refused("OOM", "no memory")));
    }
}
