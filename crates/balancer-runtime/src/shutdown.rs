//! When to leave: SIGTERM from the cluster, SIGINT from a person.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Who asks us to leave, and so how patient to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// SIGTERM: the cluster is still taking us out of its endpoints.
    Graceful,
    /// SIGINT: somebody waits at a terminal.
    Immediate,
}

/// The signals, caught from here on.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Starts catching the signals. Fails where the process may not.
    pub fn catch() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot catch SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot catch SIGINT")?,
        })
    }

    /// Waits for the next one.
    pub async fn wait(&mut self) -> Shutdown {
        tokio::select! {
            _ = self.terminate.recv() => Shutdown::Graceful,
            _ = self.interrupt.recv() => Shutdown::Immediate,
        }
    }
}
