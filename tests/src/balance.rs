//! One address before several webhook processes, as a Service is in a cluster.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Result, ensure};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// A TCP forwarder that sends each new connection to the next backend that accepts it. Dropping it
/// ends it and its connections.
#[derive(Debug)]
pub struct Balance {
    /// Where it listens.
    pub port: u16,
    task: JoinHandle<()>,
}

impl Balance {
    /// Starts it before the servers on these ports, on the current runtime.
    pub async fn start(backends: &[u16]) -> Result<Self> {
        ensure!(!backends.is_empty(), "nothing to forward to");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let backends: Arc<[u16]> = backends.into();
        let task = tokio::spawn(async move {
            let turn = Arc::new(AtomicUsize::new(0));
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(forward(client, backends.clone(), turn.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { port, task })
    }
}

impl Drop for Balance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends when either side does; an error of one side breaks the other, as a lost pod would.
async fn forward(mut client: TcpStream, backends: Arc<[u16]>, turn: Arc<AtomicUsize>) {
    let first = turn.fetch_add(1, Ordering::Relaxed);
    for port in backends.iter().cycle().skip(first % backends.len()).take(backends.len()) {
        if let Ok(mut backend) = TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).await {
            let _ = copy_bidirectional(&mut client, &mut backend).await;
            return;
        }
    }
}
