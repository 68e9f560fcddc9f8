//! Accepts connections, up to a maximum, and shuts down without losing an admission.

mod connection;
mod deadlines;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use balancer_runtime::admin::{listen, pause_after_failed_accept};
use balancer_runtime::shutdown::Shutdown;
use balancer_store::Ledger;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::routes::Router;
use crate::tls::Certificate;

/// An apiserver keeps a few connections. At the maximum, new ones wait in the kernel until one ends.
const MAX_CONNECTIONS: usize = 1024;
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
        Ok(Self { listener, address, certificate })
    }

    /// The address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown` completes. Returns when all in-flight requests are answered, or after a time limit.
    pub async fn run<L: Ledger>(self, router: Router<L>, shutdown: impl Future<Output = Shutdown>) {
        let (phase, phases) = watch::channel(Phase::Serving);
        let connections = Connections {
            permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            certificate: self.certificate,
            router,
            phase: phases,
        };
        let mode = tokio::select! {
            mode = shutdown => mode,
            never = connections.accept(&self.listener) => match never {},
        };
        if mode == Shutdown::Graceful {
            let _ = phase.send(Phase::Lingering);
            let _ = timeout(LINGER, connections.accept(&self.listener)).await;
        }
        // Clients that have connected, but are not accepted yet, are served too.
        let _ = timeout(BACKLOG_LIMIT, connections.accept(&self.listener)).await;
        drop(self.listener);
        let _ = phase.send(Phase::Closing);
        if timeout(DRAIN_LIMIT, connections.all_closed()).await.is_err() {
            tracing::warn!("some connections did not finish in time");
        }
    }
}

struct Connections<L> {
    permits: Arc<Semaphore>,
    certificate: Arc<Certificate>,
    router: Router<L>,
    phase: watch::Receiver<Phase>,
}

impl<L: Ledger> Connections<L> {
    async fn accept(&self, listener: &TcpListener) -> Infallible {
        loop {
            // The semaphore is never closed.
            let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else { continue };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let serving = self.serve(stream);
                    tokio::spawn(async move {
                        serving.await;
                        drop(permit);
                    });
                }
                Err(error) => pause_after_failed_accept(&error).await,
            }
        }
    }

    async fn all_closed(&self) {
        let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
        let _ = self.permits.acquire_many(all).await;
    }

    fn serve(&self, stream: TcpStream) -> impl Future<Output = ()> + 'static {
        let (config, router, phase) = (self.certificate.config(), self.router.clone(), self.phase.clone());
        async move {
            let _open = router.metrics().connected();
            let answer = move |request| {
                let router = router.clone();
                async move { router.answer(request).await }
            };
            connection::serve_tls(stream, config, phase, answer).await;
        }
    }
}
