//! The transport for a cluster: a connection to each primary, and the slots of each.
//!
//! It is our own and not the redis crate's, because a call for one node may not wait for another node, nor for the slots to
//! be asked for anew (ARCHITECTURE, section "The store's transport"). Calls read the slots from a value that one task in
//! the background replaces.

mod answers;
mod dial_times;
mod discovery;
mod outages;
mod redirect_targets;
mod refresh;
mod slots;
#[cfg(test)]
mod tests;
mod topology;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use redis::{Arg, Cmd, Value};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use self::discovery::keep_refreshing;
use self::redirect_targets::RedirectTargets;
use self::slots::{SlotMap, redirected, slot_of};
use self::topology::{Primary, Topology};
use super::address::Address;
use super::connection::{Asking, Connection};
use super::credentials::Credentials;
use super::dial::{Network, Server, Tcp};
use super::scripts::Script;
use super::servers::OnPanic;
use super::single_server::SingleServer;
use super::supervisor::restart_after_panics;
use super::transport::{HEARTBEAT_KEY, KeyPage, PLACED_KEY, Transport};
use crate::{Cursor, StoreError};

/// How often one call follows a slot from node to node. More is a cluster that does not agree with itself.
const MAX_HOPS: usize = 3;
/// While a slot moves, a node may have one of a ledger's keys only. The slot's node is asked again after this time.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(5);
/// The error code of a node in a cluster of which a part is not served.
const CLUSTER_DOWN: &str = "CLUSTERDOWN";
/// How often a listing starts anew because the slots have moved.
const MAX_RESTARTS: u32 = 3;

/// A primary. A task reconnects to it whenever the connection breaks.
pub(super) struct Node<N: Network = Tcp> {
    address: Address,
    server: SingleServer<Server<N>>,
}

impl<N: Network> Node<N> {
    fn is_connected(&self) -> bool {
        self.server.is_connected()
    }

    /// Why there is no connection, if there is none.
    fn problem(&self) -> Option<StoreError> {
        self.server.status().err()
    }
}

impl<N: Network> fmt::Debug for Node<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.address, if self.is_connected() { "" } else { " (not connected)" })
    }
}

/// A cluster.
pub(super) struct Cluster<N: Network = Tcp> {
    shared: Arc<Shared<N>>,
    /// Ends the task in the background when it is dropped.
    _used: watch::Receiver<()>,
}

struct Shared<N: Network> {
    network: N,
    seeds: Vec<Address>,
    credentials: Credentials,
    timeout: Duration,
    on_panic: OnPanic,
    topology: watch::Sender<Arc<Topology<N>>>,
    /// Nodes that are not in the topology.
    redirect_targets: Mutex<RedirectTargets<Node<N>>>,
    /// Why no slots are known, as long as none are.
    unknown: Mutex<StoreError>,
    /// Something has shown that the slots have moved.
    refresh_now: Notify,
}

impl<N: Network> Cluster<N> {
    /// Starts the task that finds the nodes, and waits for its first attempt, at most for `timeout`. `on_panic` is called
    /// each time a task has panicked.
    pub(super) async fn connect(
        network: N,
        seeds: Vec<Address>,
        credentials: Credentials,
        timeout: Duration,
        on_panic: OnPanic,
    ) -> Self {
        let (topology, mut changed) = watch::channel(Arc::default());
        let refresh_now = Notify::new();
        let shared = Arc::new(Shared {
            network,
            seeds,
            credentials,
            timeout,
            on_panic,
            topology,
            redirect_targets: Mutex::default(),
            unknown: Mutex::new(StoreError::NoConnection("no node of the cluster has answered yet".to_owned())),
            refresh_now,
        });
        let (sender, used) = watch::channel(());
        let (refreshed, on_panic) = (Arc::clone(&shared), Arc::clone(&shared.on_panic));
        let refreshing = move || keep_refreshing(Arc::clone(&refreshed), sender.clone());
        tokio::spawn(restart_after_panics(refreshing, move || on_panic()));
        // The transport is usable in any case.
        let _ = tokio::time::timeout(timeout, async {
            let _ = changed.changed().await;
            let nodes = shared.topology();
            while !nodes.primaries.iter().all(|primary| primary.node.is_connected()) {
                sleep(TRY_AGAIN_AFTER).await;
            }
        })
        .await;
        Self { shared, _used: used }
    }
}

impl<N: Network> Shared<N> {
    fn topology(&self) -> Arc<Topology<N>> {
        Arc::clone(&self.topology.borrow())
    }

    fn redirect_targets(&self) -> MutexGuard<'_, RedirectTargets<Node<N>>> {
        self.redirect_targets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why no slots are known.
    fn unknown(&self) -> MutexGuard<'_, StoreError> {
        self.unknown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a command to the primary of the slot, and follows the slot if it has moved. The time limit is for everything.
    /// The connection that was asked last is probed if it has not answered.
    async fn call(&self, script: Option<&Script>, command: &Cmd, slot: u16) -> Result<Value, StoreError> {
        let asked = Mutex::new(None);
        let reply = timeout(self.timeout, self.follow(script, command, slot, &asked)).await.unwrap_or_else(|_| {
            if let Some(connection) = asked.lock().unwrap_or_else(PoisonError::into_inner).take() {
                let connection: Arc<Connection> = connection;
                connection.probe_now.notify_one();
            }
            Err(StoreError::TimedOut(self.timeout))
        });
        self.checked(reply)
    }

    /// The reply to a call. If it may be due to other slots, they are asked for.
    fn checked(&self, reply: Result<Value, StoreError>) -> Result<Value, StoreError> {
        if reply.as_ref().is_err_and(is_about_slots) {
            self.refresh_now.notify_one();
        }
        reply.map_err(|error| match error {
            // The node answers, but there is no node that has the slots.
            StoreError::Refused { code, detail } if code == CLUSTER_DOWN => {
                StoreError::NoConnection(format!("{code} {detail}"))
            }
            error => error,
        })
    }

    /// The primary of a slot.
    fn owner<'a>(&self, topology: &'a Topology<N>, slot: u16) -> Result<&'a Primary<N>, StoreError> {
        if topology.primaries.is_empty() { Err(self.unknown().clone()) } else { topology.owner(slot) }
    }

    async fn follow(
        &self,
        script: Option<&Script>,
        command: &Cmd,
        slot: u16,
        asked: &Mutex<Option<Arc<Connection>>>,
    ) -> Result<Value, StoreError> {
        let topology = self.topology();
        let mut node = Arc::clone(&self.owner(&topology, slot)?.node);
        let (mut asking, mut hops) = (Asking::No, 0);
        let patient_until = Instant::now() + self.timeout / 2;
        loop {
            let connection = node.server.connection().map_err(|error| match error {
                StoreError::NoConnection(cause) if hops > 0 => {
                    StoreError::NoConnection(format!("slot {slot} has moved to {}: {cause}", node.address))
                }
                error => error,
            })?;
            *asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&connection));
            let reply = connection.run(script, command, asking).await;
            let Err(StoreError::Refused { code, detail }) = &reply else { return reply };
            let to = match code.as_str() {
                "MOVED" => {
                    self.refresh_now.notify_one();
                    asking = Asking::No;
                    redirected(detail, &node.address)
                }
                "ASK" => {
                    asking = Asking::Yes;
                    redirected(detail, &node.address)
                }
                "TRYAGAIN" if Instant::now() < patient_until => {
                    sleep(TRY_AGAIN_AFTER).await;
                    continue;
                }
                _ => return reply,
            };
            let Some(to) = to.filter(|_| hops < MAX_HOPS) else { return reply };
            hops += 1;
            // A task connects to a node that is new. No call waits for that.
            node = self
                .topology()
                .node(&to)
                .unwrap_or_else(|| self.redirect_targets().get(&to, Instant::now(), || self.connect(to.clone())));
        }
    }

    /// Runs a command on each primary at once, and returns its reply. `command` gets the tag that is in one of its slots.
    async fn on_each(&self, script: &Script, command: impl Fn(u32) -> Cmd) -> Vec<Result<Value, StoreError>> {
        let topology = self.topology();
        let calls = topology.primaries.iter().map(|primary| self.call_primary(script, command(primary.tag), primary));
        let replies = join_all(calls).await;
        match replies.is_empty() {
            true => vec![Err(self.unknown().clone())],
            false => replies,
        }
    }

    /// Sends a command to this primary. If its slot has moved, that is an error.
    async fn call_primary(&self, script: &Script, command: Cmd, primary: &Primary<N>) -> Result<Value, StoreError> {
        self.checked(primary.node.server.run(script, command).await)
    }
}

/// Whether another node may have the slots by now.
fn is_about_slots(error: &StoreError) -> bool {
    match error {
        StoreError::NoConnection(_) | StoreError::TimedOut(_) => true,
        StoreError::Refused { code, .. } => {
            ["MOVED", "ASK", "TRYAGAIN", CLUSTER_DOWN, "READONLY", "MASTERDOWN"].contains(&code.as_str())
        }
        StoreError::Full(_) | StoreError::InvalidReply(_) => false,
    }
}

impl<N: Network> Shared<N> {
    /// Uses other slots from now on. Connections to nodes that have none are closed after the calls in flight.
    fn replace(&self, map: SlotMap) {
        let before = self.topology();
        if before.map == map {
            return;
        }
        let connect = |address: Address| {
            let redirected = self.redirect_targets().take(&address);
            redirected.unwrap_or_else(|| self.connect(address))
        };
        drop(self.topology.send_replace(Arc::new(before.next(map, connect))));
        let linger = self.timeout;
        tokio::spawn(async move {
            sleep(linger).await;
            drop(before);
        });
    }

    /// A node, to which a task connects from now on.
    fn connect(&self, address: Address) -> Arc<Node<N>> {
        let on_panic = Arc::clone(&self.on_panic);
        let server = SingleServer::start(self.server(address.clone()), self.timeout, move || on_panic());
        Arc::new(Node { address, server })
    }

    fn server(&self, address: Address) -> Server<N> {
        Server { address, network: self.network.clone(), database: 0, credentials: self.credentials.clone() }
    }
}

/// The slot of the key that is the argument `at` of a command.
fn slot_of_argument(command: &Cmd, at: usize) -> u16 {
    match command.args_iter().nth(at) {
        Some(Arg::Simple(key)) => slot_of(key),
        _ => 0,
    }
}

impl<N: Network> Transport for Cluster<N> {
    async fn run(&self, script: &Script, command: Cmd) -> Result<Value, StoreError> {
        // After EVALSHA, the hash and the number of keys.
        self.shared.call(Some(script), &command, slot_of_argument(&command, 3)).await
    }

    async fn read(&self, command: Cmd) -> Result<Value, StoreError> {
        self.shared.call(None, &command, slot_of_argument(&command, 1)).await
    }

    async fn heartbeat(&self, script: &Script, ttl: &str, value: u64) -> Result<Value, StoreError> {
        let command = |tag| {
            let mut command = script.on_key(format!("{HEARTBEAT_KEY}:{{{tag}}}"));
            command.arg(ttl).arg(value);
            command
        };
        let mut before: Option<Value> = None;
        let mut failed = None;
        for reply in self.shared.on_each(script, command).await {
            match reply {
                Ok(value) if before.as_ref().is_none_or(|before| *before == value) => before = Some(value),
                Ok(_) => return Ok(Value::Nil),
                Err(error) => failed = Some(error),
            }
        }
        match (before, failed) {
            (Some(before), _) => Ok(before),
            (None, Some(error)) => Err(error),
            (None, None) => Ok(Value::Nil),
        }
    }

    async fn note_placed(&self, script: &Script, ttl: &str, most: usize, jobs: Vec<String>) -> Result<(), StoreError> {
        let topology = self.shared.topology();
        let (mut of_primaries, mut result) = (BTreeMap::<u32, (&Primary<N>, Vec<String>)>::new(), Ok(()));
        for job in jobs {
            match self.shared.owner(&topology, slot_of(format!("exec-count:{{{job}}}").as_bytes())) {
                Ok(primary) => of_primaries.entry(primary.tag).or_insert((primary, Vec::new())).1.push(job),
                Err(error) => result = Err(error),
            }
        }
        let calls = of_primaries.into_iter().map(|(tag, (primary, jobs))| {
            let mut command = script.on_key(format!("{PLACED_KEY}:{{{tag}}}"));
            command.arg(ttl).arg(most).arg(jobs);
            self.shared.call_primary(script, command, primary)
        });
        for reply in join_all(calls).await {
            result = result.and(reply.map(drop));
        }
        result
    }

    async fn take_placed(&self, script: &Script, most: usize) -> Result<Vec<Value>, StoreError> {
        let command = |tag| {
            let mut command = script.on_key(format!("{PLACED_KEY}:{{{tag}}}"));
            command.arg(most);
            command
        };
        let (mut taken, mut failed) = (Vec::new(), None);
        for reply in self.shared.on_each(script, command).await {
            match reply {
                Ok(jobs) => taken.push(jobs),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if taken.is_empty() => Err(error),
            _ => Ok(taken),
        }
    }

    async fn list_keys(&self, pattern: &str, cursor: Option<Cursor>) -> Result<KeyPage, StoreError> {
        let topology = self.shared.topology();
        let mut place = Place::read(cursor.as_ref())?;
        if place.topology != topology.number {
            // Keys may have moved from a node that is still to come to one that is done.
            let restarts = if cursor.is_some() { place.restarts + 1 } else { 0 };
            if restarts > MAX_RESTARTS {
                return Err(StoreError::NoConnection("slots keep moving while jobs are listed".to_owned()));
            }
            place = Place { restarts, topology: topology.number, ..Place::default() };
        }
        let Some(primary) = topology.primaries.get(place.primary) else {
            self.shared.refresh_now.notify_one();
            return Err(self.shared.unknown().clone());
        };
        if !primary.node.is_connected() {
            self.shared.refresh_now.notify_one();
        }
        let cursor = Cursor::new(place.cursor.to_string());
        let page = primary.node.server.list_keys(pattern, Some(cursor)).await?;
        let next = match page.next.as_ref().and_then(|next| next.as_str().parse().ok()) {
            Some(cursor) => Some(Place { cursor, ..place }),
            None => Some(Place { primary: place.primary + 1, cursor: 0, ..place })
                .filter(|next| next.primary < topology.primaries.len()),
        };
        Ok(KeyPage { keys: page.keys, next: next.map(Place::write) })
    }
}

/// How far a listing has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    restarts: u32,
    /// The topology in which the nodes are numbered.
    topology: u64,
    primary: usize,
    cursor: u64,
}

impl Place {
    fn write(self) -> Cursor {
        let Self { restarts, topology, primary, cursor } = self;
        Cursor::new(format!("{restarts} {topology} {primary} {cursor}"))
    }

    fn read(cursor: Option<&Cursor>) -> Result<Self, StoreError> {
        let Some(cursor) = cursor else { return Ok(Self::default()) };
        let read = || {
            let mut numbers = cursor.as_str().split(' ');
            Some(Self {
                restarts: numbers.next()?.parse().ok()?,
                topology: numbers.next()?.parse().ok()?,
                primary: numbers.next()?.parse().ok()?,
                cursor: numbers.next()?.parse().ok()?,
            })
        };
        read().ok_or_else(|| StoreError::InvalidReply(format!("not a cursor of a cluster: {}", cursor.as_str())))
    }
}

impl<N: Network> fmt::Debug for Cluster<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let topology = self.shared.topology();
        let primaries: Vec<_> = topology.primaries.iter().map(|primary| &primary.node).collect();
        f.debug_struct("Cluster").field("seeds", &self.shared.seeds).field("primaries", &primaries).finish()
    }
}
