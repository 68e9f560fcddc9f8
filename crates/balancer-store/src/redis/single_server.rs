//! The transport for one server: one connection that carries all calls at once.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, Value};
use tokio::sync::{Notify, watch};

use super::dial::{Dial, Server};
use super::reply;
use super::scripts::Script;
use super::supervisor::{Status, keep_supervising};
use super::transport::{HEARTBEAT_KEY, KeyPage, PLACED_KEY, Transport};
use crate::{Cursor, StoreError};

/// How many of the server's keys it goes through for one page, at about 1 µs each.
const KEYS_PER_PAGE: usize = 500;

/// One server. A task reconnects to it whenever the connection breaks.
pub(super) struct SingleServer<D = Server> {
    server: Arc<D>,
    timeout: Duration,
    status: watch::Receiver<Status>,
    reconnect_now: Arc<Notify>,
}

impl<D: Dial> SingleServer<D> {
    /// Starts the task that connects, and waits for its first attempt, at most for `timeout`. `on_panic` is called each
    /// time the task has panicked.
    pub(super) async fn connect(server: D, timeout: Duration, on_panic: impl Fn() + Send + 'static) -> Self {
        let mut connecting = Self::start(server, timeout, on_panic);
        connecting.first_attempt().await;
        connecting
    }

    /// Starts the task that connects, and does not wait for it.
    pub(super) fn start(server: D, timeout: Duration, on_panic: impl Fn() + Send + 'static) -> Self {
        let server = Arc::new(server);
        let connecting = StoreError::NoConnection(format!("still connecting to {server}"));
        let (sender, status) = watch::channel(Err(connecting));
        let reconnect_now = Arc::new(Notify::new());
        tokio::spawn(keep_supervising(Arc::clone(&server), timeout, Arc::clone(&reconnect_now), sender, on_panic));
        Self { server, timeout, status, reconnect_now }
    }

    /// Waits for the first attempt to connect. The transport is usable in any case.
    async fn first_attempt(&mut self) {
        let _ = tokio::time::timeout(self.timeout, self.status.changed()).await;
    }

    /// Whether there is a connection.
    pub(super) fn is_connected(&self) -> bool {
        self.status.borrow().is_ok()
    }

    /// The connection now, or why there is none. The task connects when it is time.
    pub(super) fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// The same for a call. Without a connection the task connects soon.
    pub(super) fn connection(&self) -> Status {
        self.status().inspect_err(|_| self.reconnect_now.notify_one())
    }
}

impl<D: Dial + fmt::Debug> Transport for SingleServer<D> {
    async fn run(&self, script: &Script, command: Cmd) -> Result<Value, StoreError> {
        self.connection()?.call(Some(script), &command, self.timeout).await
    }

    async fn heartbeat(&self, script: &Script, ttl: &str, value: u64) -> Result<Value, StoreError> {
        let mut command = script.on_key(HEARTBEAT_KEY);
        command.arg(ttl).arg(value);
        self.run(script, command).await
    }

    async fn note_placed(&self, script: &Script, ttl: &str, most: usize, jobs: Vec<String>) -> Result<(), StoreError> {
        let mut command = script.on_key(PLACED_KEY);
        command.arg(ttl).arg(most).arg(jobs);
        self.run(script, command).await.map(drop)
    }

    async fn take_placed(&self, script: &Script, most: usize) -> Result<Vec<Value>, StoreError> {
        let mut command = script.on_key(PLACED_KEY);
        command.arg(most);
        Ok(vec![self.run(script, command).await?])
    }

    async fn read(&self, command: Cmd) -> Result<Value, StoreError> {
        self.connection()?.call(None, &command, self.timeout).await
    }

    async fn list_keys(&self, pattern: &str, cursor: Option<Cursor>) -> Result<KeyPage, StoreError> {
        let mut command = redis::cmd("SCAN");
        command.arg(cursor.as_ref().map_or("0", Cursor::as_str));
        command.arg("MATCH").arg(pattern).arg("COUNT").arg(KEYS_PER_PAGE).arg("TYPE").arg("hash");
        reply::key_page(&self.read(command).await?)
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
