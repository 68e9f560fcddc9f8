//! The servers that hold the ledgers, however they work together. It is found out in the background.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use backon::BackoffBuilder;
use redis::{Cmd, Value};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::cluster::Cluster;
use super::dial::{Server, Tcp};
use super::mode::{Detection, Kind, Undetected};
use super::scripts::Script;
use super::sentinel::Primary;
use super::single_server::SingleServer;
use super::supervisor::{BACKOFF, MAX_PAUSE, restart_after_panics};
use super::transport::{KeyPage, Transport};
use crate::{Cursor, StoreError};

/// Reports a panic of a task.
pub(super) type OnPanic = Arc<dyn Fn() + Send + Sync>;

/// The servers. Calls fail at once until it is known how they work together.
pub(super) struct Servers {
    found: Arc<OnceLock<Found>>,
    /// Why it is not known.
    status: watch::Receiver<Option<Undetected>>,
}

#[derive(Debug)]
enum Found {
    Single(SingleServer<Server>),
    Sentinel(SingleServer<Primary<Tcp>>),
    Cluster(Cluster),
}

/// What it takes to use the servers.
pub(super) struct Target {
    pub(super) detection: Detection<Tcp>,
    /// For sentinels.
    pub(super) sentinel_master: Option<String>,
    /// The most that one call may take.
    pub(super) timeout: Duration,
    pub(super) on_panic: OnPanic,
}

impl Servers {
    /// Starts a task that finds out how the servers work together, and waits for it, at most for `target.timeout`. It is
    /// an error if they do not work together as the settings say; servers that do not answer are none.
    pub(super) async fn connect(target: Target) -> Result<Self, String> {
        let (limit, on_panic) = (target.timeout, Arc::clone(&target.on_panic));
        let names = target.detection.servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let connecting = Undetected::NoAnswer(StoreError::NoConnection(format!("still connecting to {names}")));
        let (sender, mut status) = watch::channel(Some(connecting));
        let (target, found) = (Arc::new(target), Arc::new(OnceLock::new()));
        let finding = Arc::clone(&found);
        let find = move || find(Arc::clone(&target), Arc::clone(&finding), sender.clone());
        tokio::spawn(restart_after_panics(find, move || on_panic()));
        let _ = timeout(limit, status.changed()).await;
        match &*status.borrow() {
            Some(Undetected::Mistake(text)) => return Err(text.clone()),
            Some(Undetected::NoAnswer(_)) | None => {}
        }
        Ok(Self { found, status })
    }

    fn found(&self) -> Result<&Found, StoreError> {
        self.found.get().ok_or_else(|| match &*self.status.borrow() {
            Some(Undetected::NoAnswer(error)) => error.clone(),
            Some(Undetected::Mistake(text)) => StoreError::NoConnection(text.clone()),
            None => StoreError::NoConnection("still connecting".to_owned()),
        })
    }
}

/// Finds out how the servers work together, and connects to them. Ends when it has, or after the last receiver.
async fn find(target: Arc<Target>, found: Arc<OnceLock<Found>>, status: watch::Sender<Option<Undetected>>) {
    let mut backoff = BACKOFF.build();
    let mut credentials = [target.detection.credentials.clone(), target.detection.sentinel_credentials.clone()];
    loop {
        // Those that come meanwhile are used right after.
        credentials.iter_mut().for_each(|credentials| drop(credentials.current()));
        let detected = tokio::select! {
            detected = target.detection.detect() => detected,
            () = status.closed() => return,
        };
        match detected {
            Ok(kind) => match target.connect(kind).await {
                Ok(servers) => {
                    let _ = found.set(servers);
                    drop(status.send_replace(None));
                    return;
                }
                Err(mistake) => drop(status.send_replace(Some(Undetected::Mistake(mistake)))),
            },
            Err(reason) => drop(status.send_replace(Some(reason))),
        }
        let [redis, sentinel] = &mut credentials;
        tokio::select! {
            () = sleep(backoff.next().unwrap_or(MAX_PAUSE)) => {}
            () = redis.changed() => {}
            () = sentinel.changed() => {}
            () = status.closed() => return,
        }
    }
}

impl Target {
    async fn connect(&self, kind: Kind) -> Result<Found, String> {
        let Self { detection, sentinel_master, timeout, on_panic } = self;
        let Detection { network, servers, credentials, sentinel_credentials, database, .. } = detection.clone();
        let on_panic = Arc::clone(on_panic);
        match kind {
            Kind::Standalone => {
                let Some(address) = servers.into_iter().next() else { return Err("REDIS_URL has no host".to_owned()) };
                let server = Server { address, network, database, credentials };
                Ok(Found::Single(SingleServer::connect(server, *timeout, move || on_panic()).await))
            }
            Kind::Sentinel => {
                let name = sentinel_master.clone().unwrap_or_default();
                let primary = Primary::new(network, (servers, sentinel_credentials), name, database, credentials);
                Ok(Found::Sentinel(SingleServer::connect(primary, *timeout, move || on_panic()).await))
            }
            Kind::ClusterNode => {
                Ok(Found::Cluster(Cluster::connect(network, servers, credentials, *timeout, on_panic).await))
            }
        }
    }
}

/// Passes a call on.
macro_rules! pass {
    ($servers:expr, $call:ident($($argument:expr),*)) => {
        match $servers.found()? {
            Found::Single(server) => server.$call($($argument),*).await,
            Found::Sentinel(server) => server.$call($($argument),*).await,
            Found::Cluster(cluster) => cluster.$call($($argument),*).await,
        }
    };
}

impl Transport for Servers {
    async fn run(&self, script: &Script, command: Cmd) -> Result<Value, StoreError> {
        pass!(self, run(script, command))
    }

    async fn heartbeat(&self, script: &Script, ttl: &str, value: u64) -> Result<Value, StoreError> {
        pass!(self, heartbeat(script, ttl, value))
    }

    async fn note_placed(&self, script: &Script, ttl: &str, most: usize, jobs: Vec<String>) -> Result<(), StoreError> {
        pass!(self, note_placed(script, ttl, most, jobs))
    }

    async fn take_placed(&self, script: &Script, most: usize) -> Result<Vec<Value>, StoreError> {
        pass!(self, take_placed(script, most))
    }

    async fn read(&self, command: Cmd) -> Result<Value, StoreError> {
        pass!(self, read(command))
    }

    async fn list_keys(&self, pattern: &str, cursor: Option<Cursor>) -> Result<KeyPage, StoreError> {
        pass!(self, list_keys(pattern, cursor))
    }
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.found.get() {
            Some(found) => found.fmt(f),
            None => f.debug_tuple("Servers").field(&self.status.borrow()).finish(),
        }
    }
}
