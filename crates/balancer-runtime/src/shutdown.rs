//! When to leave: SIGTERM from the cluster, SIGINT from a person.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Who asks us to leave, and so how patient to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// SIGTERM: the cluster is still taking us out of its endpoints.
    Gently,
    /// SIGINT: somebody waits at a terminal.
    AtOnce,
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
    pub async fn wait(&mut self) -> Leave {
        tokio::select! {
            _ = self.terminate.recv() => Leave::Gently,
            _ = self.interrupt.recv() => Leave::AtOnce,
        }
    }
}
