//! The transport for one server: one connection that carries all calls at once.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, Value};
use tokio::sync::{Notify, watch};

use super::address::Address;
use super::dial::Dial;
use super::reply;
use super::scripts::Script;
use super::supervisor::{Status, keep_supervising};
use super::transport::{KeyPage, Transport};
use crate::{Cursor, StoreError};

/// How many of the server's keys it goes through for one page, at about 1 µs each.
const KEYS_PER_PAGE: usize = 500;
const HEARTBEAT_KEY: &str = "exec-heartbeat";

/// One server. A task reconnects to it whenever the connection breaks.
pub(super) struct SingleServer<D = Address> {
    server: Arc<D>,
    timeout: Duration,
    status: watch::Receiver<Status>,
    reconnect_now: Arc<Notify>,
}

impl<D: Dial> SingleServer<D> {
    /// Starts the task that connects, and waits for its first attempt, at most for `timeout`. `on_panic` is called each
    /// time the task has panicked.
    pub(super) async fn connect(server: D, timeout: Duration, on_panic: impl Fn() + Send + 'static) -> Self {
        let server = Arc::new(server);
        let connecting = StoreError::NoConnection(format!("still connecting to {server}"));
        let (sender, mut status) = watch::channel(Err(connecting));
        let reconnect_now = Arc::new(Notify::new());
        tokio::spawn(keep_supervising(Arc::clone(&server), timeout, Arc::clone(&reconnect_now), sender, on_panic));
        // The transport is usable in any case.
        let _ = tokio::time::timeout(timeout, status.changed()).await;
        Self { server, timeout, status, reconnect_now }
    }

    fn connection(&self) -> Status {
        self.status.borrow().clone().inspect_err(|_| self.reconnect_now.notify_one())
    }
}

impl<D: Dial + fmt::Debug> Transport for SingleServer<D> {
    async fn run(&self, script: &Script, command: Cmd) -> Result<Value, StoreError> {
        self.connection()?.call(Some(script), &command, self.timeout).await
    }

    async fn run_longer(&self, script: &Script, command: Cmd, extra: Duration) -> Result<Value, StoreError> {
        let connection = self.connection()?;
        let _in_flight = connection.begin(extra);
        connection.call(Some(script), &command, connection.time_in_flight(self.timeout)).await
    }

    async fn heartbeat(&self, script: &Script, ttl: &str, value: u64) -> Result<Value, StoreError> {
        let mut command = redis::cmd("EVALSHA");
        command.arg(script.sha()).arg(1).arg(HEARTBEAT_KEY).arg(ttl).arg(value);
        self.run(script, command).await
    }

    async fn list_keys(&self, pattern: &str, cursor: Option<Cursor>) -> Result<KeyPage, StoreError> {
        let mut command = redis::cmd("SCAN");
        command.arg(cursor.as_ref().map_or("0", Cursor::as_str));
        command.arg("MATCH").arg(pattern).arg("COUNT").arg(KEYS_PER_PAGE).arg("TYPE").arg("hash");
        let reply = self.connection()?.call(None, &command, self.timeout).await?;
        reply::key_page(&reply)
    }
}

impl<D: fmt::Debug> fmt::Debug for SingleServer<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SingleServer")
            .field("server", &self.server)
            .field("status", &self.status.borrow().as_ref().map(|_| "connected"))
            .field("timeout", &self.timeout)
            .finish()
    }
}

#[cfg(test)]
mod tests;
