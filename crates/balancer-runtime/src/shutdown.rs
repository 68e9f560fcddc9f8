//! The signals that end a program: SIGTERM from the cluster, SIGINT from a person.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How to shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// After SIGTERM: keep serving for a while, because the cluster still removes the pod from its endpoints.
    Graceful,
    /// After SIGINT: a person waits at a terminal.
    Immediate,
}

/// The caught signals.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Starts catching the signals.
    ///
    /// # Errors
    /// The process is not permitted to.
    pub fn catch() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot catch SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot catch SIGINT")?,
        })
    }

    /// Waits for the next signal.
    pub async fn wait(&mut self) -> Shutdown {
        tokio::select! {
            _ = self.terminate.recv() => Shutdown::Graceful,
            _ = self.interrupt.recv() => Shutdown::Immediate,
        }
    }
}
