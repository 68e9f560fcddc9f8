//! Keeps the map of the slots: one task asks the nodes for it, and replaces it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join;
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};

use super::super::address::Address;
use super::super::connection::Connection;
use super::super::dial::{Dial, Network, name_refusing, name_server, within};
use super::super::reply::text;
use super::Shared;
use super::answers::{Answer, Answers};
use super::dial_times::DialTimes;
use super::outages::{Outages, Report};
use super::refresh::RefreshTimer;
use super::slots::SlotMap;
use crate::StoreError;

/// The most that a node may take to say which slots it knows of. No call waits for it.
const ASK_TIMEOUT: Duration = Duration::from_millis(500);
/// The same, if it has to be connected to first.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// The addresses that are dialled at once.
const MAX_DIALLED: usize = 32;

/// What the task remembers from one refresh to the next.
struct Discovery {
    timer: RefreshTimer,
    answers: Answers,
    dial_times: DialTimes,
    outages: Outages,
    /// Nodes that have not answered yet.
    asking: JoinSet<Result<Answer, StoreError>>,
    asked: HashMap<Id, Asked>,
}

struct Asked {
    address: Address,
    round: u64,
    is_dialled: bool,
}

/// Keeps the topology, until the last user of the cluster is gone.
pub(super) async fn keep_refreshing<N: Network>(shared: Arc<Shared<N>>, used: watch::Sender<()>) {
    let mut discovery = Discovery {
        timer: RefreshTimer::new(Instant::now()),
        answers: Answers::default(),
        dial_times: DialTimes::default(),
        outages: Outages::default(),
        asking: JoinSet::new(),
        asked: HashMap::new(),
    };
    loop {
        let due = discovery.due();
        tokio::select! {
            () = used.closed() => return,
            () = shared.refresh_now.notified() => discovery.timer.request(Instant::now()),
            Some(answered) = discovery.asking.join_next_with_id() => discovery.take(answered, &shared),
            () = sleep_until(due) => {
                if discovery.answers.decide_at().is_some() {
                    discovery.decide(&shared);
                } else {
                    discovery.ask(&shared);
                }
            }
        }
    }
}

impl Discovery {
    /// When to decide, or to ask again. Nobody is asked while answers wait for a decision.
    fn due(&self) -> Instant {
        match self.answers.decide_at() {
            // All have answered.
            Some(_) if self.asked.is_empty() => Instant::now(),
            Some(decide_at) => decide_at,
            None => self.timer.due(),
        }
    }

    /// Asks the nodes for the slots: the primaries and, if the topology may be out of date because of them, others too. A
    /// node that has not answered yet is not asked again.
    fn ask<N: Network>(&mut self, shared: &Arc<Shared<N>>) {
        let (now, topology) = (Instant::now(), shared.topology());
        self.timer.asked(topology.is_healthy(), now);
        shared.redirect_targets().expire(now);
        let problems = topology.primaries.iter().map(|primary| (primary.node.address.clone(), primary.node.problem()));
        self.outages.update(problems, now).iter().for_each(Report::log);
        let round = self.answers.begin_round();
        let is_asked = |asked: &HashMap<Id, Asked>, address: &Address| asked.values().any(|it| it.address == *address);
        for primary in &topology.primaries {
            let address = primary.node.address.clone();
            if let Ok(connection) = primary.node.server.status()
                && !is_asked(&self.asked, &address)
            {
                let answering = address.clone();
                let ask = async move { within(ASK_TIMEOUT, &answering, ask(&connection, &answering)).await };
                let id = self.asking.spawn(ask).id();
                self.asked.insert(id, Asked { address, round, is_dialled: false });
            }
        }
        let mut others = BTreeSet::new();
        if topology.needs_others() {
            // The task of each primary dials it. The node that becomes primary when another one fails is among the replicas.
            let known: BTreeSet<_> = topology.primaries.iter().map(|primary| &primary.node.address).collect();
            let candidates = topology.map.replicas.iter().chain(&shared.seeds);
            others.extend(candidates.filter(|address| !known.contains(address)).cloned());
        }
        let dialling = self.asked.values().filter(|asked| asked.is_dialled).count();
        let due = self.dial_times.due(others, now);
        let due = due.into_iter().filter(|address| !is_asked(&self.asked, address));
        for address in due.take(MAX_DIALLED.saturating_sub(dialling)).collect::<Vec<_>>() {
            let server = shared.server(address.clone());
            let dial = async move {
                let asked = async {
                    let dialled = server.dial().await;
                    let (connection, _io) = dialled.map_err(|error| name_refusing(error, &server.address))?;
                    ask(&connection, &server.address).await
                };
                within(DIAL_TIMEOUT, &server.address, asked).await
            };
            let id = self.asking.spawn(dial).id();
            self.asked.insert(id, Asked { address, round, is_dialled: true });
        }
    }

    /// Uses the right one of the answers.
    fn decide<N: Network>(&mut self, shared: &Shared<N>) {
        if let Some(map) = self.answers.decide() {
            shared.replace(map);
        }
        self.timer.used(shared.topology().is_healthy(), Instant::now());
    }

    /// Takes what a node has answered.
    fn take<N: Network>(&mut self, answered: Result<(Id, Result<Answer, StoreError>), JoinError>, shared: &Shared<N>) {
        let now = Instant::now();
        let (id, answer) = match answered {
            Ok((id, answer)) => (id, Some(answer)),
            // A task that has panicked has no answer.
            Err(error) => (error.id(), None),
        };
        let Some(Asked { address, round, is_dialled }) = self.asked.remove(&id) else { return };
        match (is_dialled, &answer) {
            (true, Some(Ok(_))) => self.dial_times.answered(address, now),
            (true, _) => self.dial_times.failed(address, now),
            // Its task connects to it.
            (false, _) => {}
        }
        match answer {
            Some(Ok(answer)) => self.answers.add(round, answer, now),
            Some(Err(error)) => *shared.unknown() = error,
            None => {}
        }
    }
}

/// Asks a node for the slots that it knows of, and for the number of the latest election that it knows of.
async fn ask(connection: &Connection, address: &Address) -> Result<Answer, StoreError> {
    let (mut info, mut slots) = (redis::cmd("CLUSTER"), redis::cmd("CLUSTER"));
    info.arg("INFO");
    slots.arg("SLOTS");
    // In this order: the map is not older than the number.
    let (info, slots) = join(connection.send(&info), connection.send(&slots)).await;
    let slots = slots.map_err(|error| name_refusing(name_server(error, address), address))?;
    // A managed cluster may not answer that.
    let epoch = info.ok().as_ref().and_then(text).and_then(|info| {
        info.lines().find_map(|line| line.strip_prefix("cluster_current_epoch:")?.trim().parse().ok())
    });
    Ok(Answer { epoch, map: SlotMap::parse(&slots, address)? })
}
