//! Accepts every connection, closes others to make room for it, and shuts down without losing an admission.

mod connection;
mod deadlines;
mod turns;

use std::convert::Infallible;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use balancer_runtime::connections;
use balancer_runtime::http_port::{listen, pause_after_failed_accept};
use balancer_runtime::shutdown::Shutdown;
use balancer_store::Ledger;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout};

use self::connection::{Handshake, SharedDeadlines};
use self::deadlines::{Class, Rank};
use self::turns::Turns;
use crate::body::BodyMemory;
use crate::metrics::EvictReason;
use crate::routes::Router;
use crate::tls::Certificate;

/// An apiserver keeps a few connections. At the maximum, one is closed for each new one. Fewer if the process may open few
/// files. ARCHITECTURE.md has the memory that this many can take.
const MAX_CONNECTIONS: usize = 384;
/// How many connections may finish after they made room for others.
const MAX_LEAVING: usize = 32;
/// If no connection can be closed, because each has a review in flight, this is how often that is tried again.
const ROOM_INTERVAL: Duration = Duration::from_millis(20);
/// At which age connections are closed. A current apiserver keeps one HTTP/2 connection, and would use one replica for as
/// long as that lives. At random ages, the connections of several apiservers do not return together.
const MAX_AGE: Range<Duration> = Duration::from_secs(60)..Duration::from_secs(120);
/// How long new connections are still served after SIGTERM: the cluster takes some seconds to stop sending them.
const LINGER: Duration = Duration::from_secs(5);
/// How long connections in the kernel's queue are accepted before the port is closed.
const BACKLOG_LIMIT: Duration = Duration::from_millis(50);
/// How long connections may then take to finish. All together is less than a pod's default grace period of 30 s.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// A bound server that does not serve yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    certificate: Arc<Certificate>,
    max_age: Range<Duration>,
}

/// The phases of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Phase {
    /// No shutdown.
    Serving,
    /// Each answer asks its client to reconnect, which leads it to another replica.
    Lingering,
    /// Idle connections are closed, and busy ones after their answers.
    Closing,
}

impl Server {
    /// Binds the port on all addresses.
    ///
    /// # Errors
    /// The port is in use, or not permitted.
    pub async fn bind(port: u16, certificate: Arc<Certificate>) -> io::Result<Self> {
        let listener = listen(port).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, certificate, max_age: MAX_AGE })
    }

    /// The address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` completes. Returns when all in-flight requests are answered, or after a time limit.
    pub async fn run<L: Ledger>(self, router: Router<L>, shutdown: impl Future<Output = Shutdown>) {
        let (phase, phases) = watch::channel(Phase::Serving);
        let max = connections::max_connections(MAX_CONNECTIONS);
        let connections = Connections {
            max,
            permits: Arc::new(Semaphore::new(max + MAX_LEAVING)),
            open: connections::Connections::new(max),
            // Half of the processors are left to the admissions.
            turns: Turns::new(available_parallelism().map_or(1, |all| all.get().div_ceil(2))),
            max_age: self.max_age,
            random: RandomState::new(),
            certificate: self.certificate,
            router,
            phase: phases,
        };
        {
            // One future for all phases: it may hold a connection that waits for room.
            let mut accept = pin!(connections.accept(&self.listener));
            let mode = tokio::select! {
                mode = shutdown => mode,
                never = &mut accept => match never {},
            };
            if mode == Shutdown::Graceful {
                let _ = phase.send(Phase::Lingering);
                let _ = timeout(LINGER, &mut accept).await;
            }
            // Clients that have connected, but are not accepted yet, are served too.
            let _ = timeout(BACKLOG_LIMIT, &mut accept).await;
        }
        drop(self.listener);
        let _ = phase.send(Phase::Closing);
        if timeout(DRAIN_LIMIT, connections.all_closed()).await.is_err() {
            tracing::warn!("some connections did not finish in time");
        }
    }
}

/// A connection, as the table of connections has it.
struct Peer {
    deadlines: SharedDeadlines,
    bodies: Arc<BodyMemory>,
}

struct Connections<L> {
    /// How many may be open, without those that are leaving.
    max: usize,
    /// One for each connection until its end, those that are leaving too.
    permits: Arc<Semaphore>,
    open: connections::Connections<Peer>,
    turns: Turns,
    max_age: Range<Duration>,
    random: RandomState,
    certificate: Arc<Certificate>,
    router: Router<L>,
    phase: watch::Receiver<Phase>,
}

impl<L: Ledger> Connections<L> {
    async fn accept(&self, listener: &TcpListener) -> Infallible {
        loop {
            match listener.accept().await {
                Ok((stream, client)) => {
                    let permit = self.make_room().await;
                    self.serve(stream, client, permit);
                }
                Err(error) => pause_after_failed_accept(&error).await,
            }
        }
    }

    /// Waits until there is room for a connection, which is at once unless all others have a review in flight.
    async fn make_room(&self) -> OwnedSemaphorePermit {
        loop {
            if self.open.is_full() {
                self.evict();
            }
            let room = async {
                if self.open.is_full() {
                    return std::future::pending().await;
                }
                Arc::clone(&self.permits).acquire_owned().await
            };
            // The semaphore is never closed.
            if let Ok(Ok(permit)) = timeout(ROOM_INTERVAL, room).await {
                return permit;
            }
        }
    }

    fn evict(&self) {
        let now = Instant::now();
        let Some(evicted) = self.open.evict(|Peer { deadlines, bodies }| {
            deadlines.lock().rank(bodies.incomplete(), now).map(|rank| (rank, rank.among_equals()))
        }) else {
            return;
        };
        let Rank { class, .. } = evicted.rank;
        self.router.metrics().evicted(match class {
            Class::NoRequest | Class::Handshake | Class::New => EvictReason::NoRequest,
            Class::NoReview => EvictReason::NoReview,
            Class::Stalled | Class::Idle | Class::Incomplete => EvictReason::Idle,
        });
        let mut deadlines = evicted.connection.deadlines.lock();
        if class == Class::Idle && deadlines.can_leave() && self.permits.available_permits() > 0 {
            deadlines.leave();
        } else {
            drop(deadlines);
            evicted.abort();
        }
    }

    async fn all_closed(&self) {
        let all = u32::try_from(self.max + MAX_LEAVING).unwrap_or(u32::MAX);
        let _ = self.permits.acquire_many(all).await;
    }

    fn serve(&self, stream: TcpStream, client: SocketAddr, permit: OwnedSemaphorePermit) {
        let (router, phase) = (self.router.for_connection(), self.phase.clone());
        let source = client.ip();
        let handshake = Handshake { source, config: self.certificate.config(), turns: self.turns.clone() };
        let deadlines = SharedDeadlines::new(self.max_age(client));
        let peer = Peer { deadlines: deadlines.clone(), bodies: Arc::clone(router.body_memory()) };
        self.open.spawn(source, peer, async move {
            let _permit = permit;
            let _open = router.metrics().connected();
            let answer = move |request| {
                let router = router.clone();
                async move { router.answer(request).await }
            };
            connection::serve_tls(stream, handshake, phase, deadlines, answer).await;
        });
    }

    /// A random age for a connection.
    fn max_age(&self, client: SocketAddr) -> Duration {
        let Range { start, end } = &self.max_age;
        // A hash with random keys, of what is different for each connection.
        let random = self.random.hash_one((client, Instant::now())) >> 32;
        *start + end.saturating_sub(*start) * u32::try_from(random).unwrap_or_default().rem_euclid(1 << 10) / (1 << 10)
    }
}

#[cfg(test)]
mod tests;
