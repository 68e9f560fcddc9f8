//! What a ledger needs from the servers that hold its keys.

use std::fmt;
use std::future::Future;

use redis::{Cmd, Value};

use super::scripts::Script;
use crate::{Cursor, StoreError};

/// The heartbeat of a server. In a cluster, a hash tag follows.
pub(super) const HEARTBEAT_KEY: &str = "exec-heartbeat";
/// The jobs of which executors were placed. In a cluster, a hash tag follows.
pub(super) const PLACED_KEY: &str = "exec-placed";

/// Sends commands to the servers that hold the keys.
///
/// A call never waits for a connection. It fails at once while there is no connection to the server that it needs,
/// and after a time limit of the transport's if that server does not answer.
pub(super) trait Transport: fmt::Debug + Send + Sync {
    /// Runs a script, by its hash, on the server that holds the keys of `command`. All keys of a command are in one
    /// hash slot. One round trip, or three if the server does not have the script yet.
    fn run(&self, script: &Script, command: Cmd) -> impl Future<Output = Result<Value, StoreError>> + Send;

    /// Runs the heartbeat script on every server that holds a part of the ledgers, because each of them may lose its
    /// part. Returns the value stored before if all that answered had the same; nil if one of them had none or another
    /// one. It is an error only if no server answers: one that does not answer now has an older value later.
    fn heartbeat(
        &self,
        script: &Script,
        ttl: &str,
        value: u64,
    ) -> impl Future<Output = Result<Value, StoreError>> + Send;

    /// Runs the script that notes jobs, each `<namespace>:<job id>`, on the servers that hold their ledgers. It is an
    /// error if a server does not answer.
    fn note_placed(
        &self,
        script: &Script,
        ttl: &str,
        most: usize,
        jobs: Vec<String>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Runs the script that takes noted jobs, at most `most` from each server. It is an error only if no server answers.
    fn take_placed(&self, script: &Script, most: usize) -> impl Future<Output = Result<Vec<Value>, StoreError>> + Send;

    /// Runs a command that is not a script on the server that holds the key, which is the command's first argument.
    fn read(&self, command: Cmd) -> impl Future<Output = Result<Value, StoreError>> + Send;

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
