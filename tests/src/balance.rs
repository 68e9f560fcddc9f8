//! One address before several processes, as a Service is in a cluster.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Where connections lead.
#[derive(Debug, Clone)]
struct Way {
    backends: Arc<[u16]>,
    /// Whether anything passes.
    open: bool,
}

/// A TCP forwarder that sends each new connection to the next backend that accepts it. Dropping it
/// ends it and its connections.
#[derive(Debug)]
pub struct Balance {
    /// Where it listens.
    pub port: u16,
    way: watch::Sender<Way>,
    task: JoinHandle<()>,
}

impl Balance {
    /// Starts it before the servers on these ports, on the current runtime. Without any it breaks each
    /// connection at once.
    pub async fn start(backends: &[u16]) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let (way, mut told) = watch::channel(Way { backends: backends.into(), open: true });
        let task = tokio::spawn(async move {
            let turn = Arc::new(AtomicUsize::new(0));
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    changed = told.changed() => match changed {
                        Ok(()) if told.borrow().open => connections.shutdown().await,
                        Ok(()) => {}
                        Err(_) => return,
                    },
                    accepted = listener.accept() => {
                        let Ok((client, _)) = accepted else { return };
                        connections.spawn(forward(client, told.clone(), turn.clone()));
                        while connections.try_join_next().is_some() {}
                    }
                }
            }
        });
        Ok(Self { port, way, task })
    }

    /// Goes on before other servers, or before none. Every connection that there is breaks.
    pub fn send_to(&self, backends: &[u16]) {
        self.way.send_replace(Way { backends: backends.into(), open: true });
    }

    /// Nothing passes any more and nothing breaks, as in a network that loses all packets, until it is
    /// given a target by [`send`](Self::send_to) again.
    pub fn swallow(&self) {
        self.way.send_modify(|way| way.open = false);
    }
}

impl Drop for Balance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends when either side does; an error of one side breaks the other, as a lost pod would.
async fn forward(mut client: TcpStream, mut way: watch::Receiver<Way>, turn: Arc<AtomicUsize>) {
    let turn = turn.fetch_add(1, Ordering::Relaxed);
    let backends = way.borrow().backends.clone();
    for port in backends.iter().cycle().skip(turn % backends.len().max(1)).take(backends.len()) {
        if let Ok(mut backend) = TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).await {
            let swallowed = async { way.wait_for(|way| !way.open).await.is_ok() };
            tokio::select! {
                _ = copy_bidirectional(&mut client, &mut backend) => {}
                true = swallowed => std::future::pending().await,
            }
            return;
        }
    }
}
