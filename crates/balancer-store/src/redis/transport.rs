//! What a ledger needs from the servers that hold its keys.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use redis::{Cmd, Value};

use super::scripts::Script;
use crate::{Cursor, StoreError};

/// Sends commands to the servers that hold the keys.
///
/// A call never waits for a connection. It fails at once while there is no connection to the server that it needs,
/// and after a time limit of the transport's if that server does not answer.
pub(super) trait Transport: fmt::Debug + Send + Sync {
    /// Runs a script, by its hash, on the server that holds the keys of `command`. All keys of a command are in one
    /// hash slot. One round trip, or three if the server does not have the script yet.
    fn run(&self, script: &Script, command: Cmd) -> impl Future<Output = Result<Value, StoreError>> + Send;

    /// Like [`run`](Self::run), for a script that may take longer than others by `extra`. The connection stays open
    /// for it, although other calls time out meanwhile.
    fn run_longer(
        &self,
        script: &Script,
        command: Cmd,
        extra: Duration,
    ) -> impl Future<Output = Result<Value, StoreError>> + Send;

    /// Runs the heartbeat script on every server that holds a part of the ledgers, because each of them may lose its
    /// part. Returns the value stored before, or nil if a server stored none or another one.
    fn heartbeat(
        &self,
        script: &Script,
        ttl: &str,
        value: u64,
    ) -> impl Future<Output = Result<Value, StoreError>> + Send;

    /// A page of the hashes whose keys match `pattern`, from all servers; the first page without a cursor. A key that
    /// exists during the whole listing is returned at least once.
    fn list_keys(
        &self,
        pattern: &str,
        cursor: Option<Cursor>,
    ) -> impl Future<Output = Result<KeyPage, StoreError>> + Send;
}

/// A page of keys.
#[derive(Debug)]
pub(super) struct KeyPage {
    /// The keys, as the server returned them. The same key may be returned twice.
    pub(super) keys: Vec<Value>,
    /// Where the next page begins; `None` after the last page.
    pub(super) next: Option<Cursor>,
}
