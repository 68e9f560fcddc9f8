//! A Redis Cluster of a test's own: three primaries with a replica each, every node a redis-server.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::{join_all, try_join_all};
use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, cmd};

use crate::port;
use crate::redis::{RedisServer, ServerOptions, Servers};
use crate::wait::{SOON, until, until_true};

/// Node `n + PRIMARIES` begins as the replica of node `n`.
pub const PRIMARIES: usize = 3;
const SLOTS: u16 = 16_384;
/// How long a node is not heard of until the others replace it, in milliseconds. Less would replace nodes of a busy
/// machine.
const NODE_TIMEOUT: u32 = 1_500;
/// How long a replica may take to replace its primary before it is asked once more.
const FAIL_OVER: Duration = Duration::from_secs(6);

/// A running cluster without persistence. Dropping it kills its nodes.
#[derive(Debug)]
pub struct RedisCluster {
    /// The nodes. Which of them are primaries may change.
    pub nodes: Vec<RedisServer>,
}

/// A node by what its own list of the cluster tells.
#[derive(Debug, Clone)]
struct Member {
    id: String,
    /// The id of its primary, if it is a replica.
    replicates: Option<String>,
    epoch: u64,
    /// First and last slots of its ranges.
    slots: BTreeSet<(u16, u16)>,
    port: u16,
    is_asked: bool,
    is_failed: bool,
}

impl Member {
    /// The members by the answer to `CLUSTER NODES`.
    fn list(answer: &str) -> Result<Vec<Self>> {
        answer.lines().map(|line| Self::parse(line).with_context(|| line.to_owned())).collect()
    }

    fn parse(line: &str) -> Result<Self> {
        let mut words = line.split(' ');
        let mut word = || words.next().context("a word is missing");
        let (id, address, flags, primary) = (word()?, word()?, word()?, word()?);
        let (_sent, _received, epoch, _link) = (word()?, word()?, word()?, word()?);
        let (_, port) = address.split_once('@').context("no bus")?.0.rsplit_once(':').context("no port")?;
        let range = |word: &str| {
            let (first, last) = word.split_once('-').unwrap_or((word, word));
            Ok((first.parse()?, last.parse()?))
        };
        // A slot that is on its way is in brackets, and also in the ranges of its present node.
        let slots = words.filter(|word| !word.starts_with('[')).map(range).collect::<Result<_>>()?;
        let has = |flag| flags.split(',').any(|word| word == flag);
        Ok(Self {
            id: id.to_owned(),
            replicates: Some(primary).filter(|_| has("slave")).map(str::to_owned),
            epoch: epoch.parse()?,
            slots,
            port: port.parse()?,
            is_asked: has("myself"),
            is_failed: has("fail") || has("fail?") || has("handshake") || has("noaddr"),
        })
    }

    fn has(&self, slot: u16) -> bool {
        self.replicates.is_none() && self.slots.iter().any(|(first, last)| (*first..=*last).contains(&slot))
    }
}

/// The slot of a key, as its servers compute it: by what is in its first braces.
pub fn slot(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let bits = tag.filter(|tag| !tag.is_empty()).unwrap_or(key).bytes().fold(0_u16, |sum, byte| {
        (0..8).fold(sum ^ (u16::from(byte) << 8), |sum, _| (sum << 1) ^ if sum & 0x8000 == 0 { 0 } else { 0x1021 })
    });
    bits % SLOTS
}

/// A slot on its way from one node to another.
#[derive(Debug, Clone, Copy)]
pub struct Migration {
    slot: u16,
    from: usize,
    to: usize,
}

impl RedisCluster {
    /// Starts a cluster and waits until all its nodes know it and the replicas follow their primaries.
    pub async fn start() -> Result<Self> {
        Self::start_with(ServerOptions::default()).await
    }

    /// The same with these options for each node.
    pub async fn start_with(options: ServerOptions) -> Result<Self> {
        let options = options.with(&format!(
            "--cluster-enabled yes --cluster-config-file nodes.conf --cluster-node-timeout {NODE_TIMEOUT} \
             --cluster-replica-validity-factor 0 --cluster-announce-ip 127.0.0.1 --repl-diskless-sync-delay 0"
        ));
        let start = async |_| RedisServer::start_on(port::free_for_node()?, options.clone()).await;
        let cluster = Self { nodes: try_join_all((0..2 * PRIMARIES).map(start)).await? };
        let mut ids = Vec::new();
        let share = usize::from(SLOTS).div_ceil(PRIMARIES);
        for (index, node) in cluster.nodes.iter().enumerate() {
            ids.push(node.ask::<String>(cmd("CLUSTER").arg("MYID")).await?);
            node.ask::<()>(cmd("CLUSTER").arg("SET-CONFIG-EPOCH").arg(index + 1)).await?;
            if index < PRIMARIES {
                let slots: Vec<usize> = (index * share..usize::from(SLOTS).min((index + 1) * share)).collect();
                node.ask::<()>(cmd("CLUSTER").arg("ADDSLOTS").arg(slots)).await?;
            }
        }
        // Each meets each, which is quicker than hearing of each other.
        for (index, node) in cluster.nodes.iter().enumerate() {
            for other in cluster.nodes.iter().skip(index + 1) {
                node.ask::<()>(cmd("CLUSTER").arg("MEET").arg("127.0.0.1").arg(other.port())).await?;
            }
        }
        for (replica, primary) in cluster.nodes.iter().skip(PRIMARIES).zip(&ids) {
            // It has to know the primary first.
            until(SOON, "a replica to know its primary", async || {
                Ok(Some(replica.ask::<()>(cmd("CLUSTER").arg("REPLICATE").arg(primary)).await?))
            })
            .await?;
        }
        cluster.until_healthy().await?;
        Ok(cluster)
    }

    /// Adds a primary without slots, and waits until all nodes know it. Returns its number.
    pub async fn add_primary(&mut self) -> Result<usize> {
        let options = self.nodes.first().context("no node")?.options().clone();
        let new = RedisServer::start_on(port::free_for_node()?, options).await?;
        for node in &self.nodes {
            node.ask::<()>(cmd("CLUSTER").arg("MEET").arg("127.0.0.1").arg(new.port())).await?;
        }
        let id = Self::own_of(&new).await?.id;
        self.nodes.push(new);
        until_true(SOON, "all nodes to know the new one", async || {
            let views = try_join_all(self.nodes.iter().map(Self::view)).await?;
            Ok(views.iter().all(|view| view.iter().any(|member| member.id == id && !member.is_failed)))
        })
        .await?;
        self.until_healthy().await?;
        Ok(self.nodes.len() - 1)
    }

    /// The node that now has the slot and takes changes of its keys.
    pub async fn primary_of_slot(&self, slot: u16) -> Result<usize> {
        let own = self.own().await;
        let has = |member: &Member| member.has(slot);
        let claims =
            own.iter().enumerate().filter_map(|(node, member)| Some((member.as_ref().filter(|it| has(it))?, node)));
        // One that was replaced and has not heard of it claims it in an older epoch.
        let (_, node) =
            claims.max_by_key(|(member, _)| member.epoch).with_context(|| format!("nobody has slot {slot}"))?;
        Ok(node)
    }

    /// The node that now has the key and takes changes of it.
    pub async fn primary_of(&self, key: &str) -> Result<usize> {
        self.primary_of_slot(slot(key)).await
    }

    /// The nodes that now have slots.
    pub async fn primaries(&self) -> Vec<usize> {
        let has_slots = |member: &Member| member.replicates.is_none() && !member.slots.is_empty();
        let own = self.own().await.into_iter().enumerate();
        own.filter(|(_, member)| member.as_ref().is_some_and(has_slots)).map(|(node, _)| node).collect()
    }

    /// The running replicas of a node.
    pub async fn replicas_of(&self, primary: usize) -> Result<Vec<usize>> {
        let own = self.own().await;
        let id = own.get(primary).and_then(Option::as_ref).context("the primary does not respond")?.id.clone();
        let replicates =
            |member: &Option<Member>| member.as_ref().is_some_and(|it| it.replicates.as_ref() == Some(&id));
        Ok(own.iter().enumerate().filter(|(_, member)| replicates(member)).map(|(node, _)| node).collect())
    }

    /// All keys that match, of all primaries.
    pub async fn keys(&self, pattern: &str) -> Result<Vec<String>> {
        let mut keys = Vec::new();
        for node in self.primaries().await {
            keys.extend(self.nodes[node].ask::<Vec<String>>(cmd("KEYS").arg(pattern)).await?);
        }
        Ok(keys)
    }

    /// The answers of all primaries to a command.
    pub async fn ask_primaries<T: FromRedisValue>(&self, command: &redis::Cmd) -> Result<Vec<T>> {
        try_join_all(self.primaries().await.into_iter().map(|node| self.nodes[node].ask(command))).await
    }

    /// Makes a replica the primary and its primary a replica, without the loss of a write, and waits until that is so.
    pub async fn fail_over(&self, replica: usize) -> Result<()> {
        let node = &self.nodes[replica];
        until(SOON, "a replica to become the primary", async || {
            node.ask::<()>(cmd("CLUSTER").arg("FAILOVER")).await?;
            let leads = async || {
                let own = Self::own_of(node).await?;
                Ok(own.replicates.is_none() && !own.slots.is_empty())
            };
            Ok(until_true(FAIL_OVER, "the failover", leads).await.is_ok().then_some(()))
        })
        .await
    }

    /// Begins to move a slot to another primary: from now on the keys that its present node does not have are asked for
    /// at the other.
    pub async fn open_slot(&self, slot: u16, to: usize) -> Result<Migration> {
        let from = self.primary_of_slot(slot).await?;
        ensure!(from != to, "node {to} has slot {slot} already");
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        let (source_id, target_id) = (Self::own_of(source).await?.id, Self::own_of(target).await?.id);
        target.ask::<()>(cmd("CLUSTER").arg("SETSLOT").arg(slot).arg("IMPORTING").arg(source_id)).await?;
        source.ask::<()>(cmd("CLUSTER").arg("SETSLOT").arg(slot).arg("MIGRATING").arg(target_id)).await?;
        Ok(Migration { slot, from, to })
    }

    /// Moves one key of the slot. Returns whether there was one.
    pub async fn move_key(&self, migration: Migration) -> Result<bool> {
        let Migration { slot, from, to } = migration;
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        let keys: Vec<String> = source.ask(cmd("CLUSTER").arg("GETKEYSINSLOT").arg(slot).arg(1)).await?;
        let Some(key) = keys.first() else { return Ok(false) };
        let mut migrate = cmd("MIGRATE");
        migrate.arg("127.0.0.1").arg(target.port()).arg("").arg(0).arg(5_000);
        if let Some(password) = target.options().password {
            migrate.arg("AUTH").arg(password);
        }
        let () = migrate.arg("KEYS").arg(key).query_async(&mut source.connection().await?).await?;
        Ok(true)
    }

    /// Ends the move of a slot whose keys have all moved.
    pub async fn close_slot(&self, migration: Migration) -> Result<()> {
        let Migration { slot, from, to } = migration;
        let id = Self::own_of(&self.nodes[to]).await?.id;
        // First the new node, then the former one; the others may also hear of it from these.
        let others = self.primaries().await.into_iter().filter(|node| ![to, from].contains(node));
        for node in [to, from].into_iter().chain(others) {
            self.nodes[node].ask::<()>(cmd("CLUSTER").arg("SETSLOT").arg(slot).arg("NODE").arg(&id)).await?;
        }
        Ok(())
    }

    /// Moves a slot and its keys to another primary, one key after the other, while others change them.
    pub async fn migrate_slot(&self, slot: u16, to: usize) -> Result<()> {
        let migration = self.open_slot(slot, to).await?;
        while self.move_key(migration).await? {}
        self.close_slot(migration).await
    }

    /// Waits until the running nodes agree about the cluster: each slot has a primary that runs, and all replicas that run
    /// follow their primaries.
    pub async fn until_healthy(&self) -> Result<()> {
        until_true(SOON, "the cluster to be healthy", async || {
            let running = || self.nodes.iter().filter(|node| node.runs());
            let views = try_join_all(running().map(Self::view)).await?;
            let owners = |view: &[Member]| {
                let primaries = view.iter().filter(|it| it.replicates.is_none() && !it.slots.is_empty());
                let owners = primaries.map(|it| (it.port, it.is_failed, it.slots.clone()));
                owners.collect::<BTreeSet<_>>()
            };
            let Some(first) = views.first().map(|view| owners(view)) else { return Ok(false) };
            let covered: usize =
                first.iter().flat_map(|(_, _, slots)| slots).map(|(first, last)| usize::from(last - first) + 1).sum();
            ensure!(covered == usize::from(SLOTS), "{covered} slots are served: {first:?}");
            ensure!(first.iter().all(|(_, is_failed, _)| !is_failed), "a primary fails: {first:?}");
            ensure!(views.iter().all(|view| owners(view) == first), "the nodes disagree: {views:?}");
            for node in running() {
                let state: String = node.ask(cmd("CLUSTER").arg("INFO")).await?;
                ensure!(state.contains("cluster_state:ok"), "port {}: {state}", node.port());
                let replication: String = node.ask(cmd("INFO").arg("replication")).await?;
                ensure!(!replication.contains("master_link_status:down"), "port {}: {replication}", node.port());
            }
            Ok(true)
        })
        .await
    }

    /// What each node tells of itself; `None` of those that do not respond.
    async fn own(&self) -> Vec<Option<Member>> {
        join_all(self.nodes.iter().map(async |node| match node.runs() {
            true => Self::own_of(node).await.ok(),
            false => None,
        }))
        .await
    }

    async fn own_of(node: &RedisServer) -> Result<Member> {
        Self::view(node).await?.into_iter().find(|member| member.is_asked).context("a node does not list itself")
    }

    async fn view(node: &RedisServer) -> Result<Vec<Member>> {
        Member::list(&node.ask::<String>(cmd("CLUSTER").arg("NODES")).await?)
    }
}

impl Servers for RedisCluster {
    fn url(&self) -> String {
        let ports = self.nodes.iter().map(RedisServer::port);
        self.nodes.first().map(|node| node.options().url(ports)).unwrap_or_default()
    }

    async fn connection_for(&self, key: &str) -> Result<MultiplexedConnection> {
        self.nodes[self.primary_of(key).await?].connection().await
    }
}
