//! Good admissions posted steadily, while a test does something to the webhook.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::raw::{Connection, Protocol, Unanswered};
use crate::reviews;

/// Posts one creation after the other, by turns on a connection of its own and on one that is kept,
/// until it is stopped. Dropping it ends it without a result.
#[derive(Debug)]
pub struct Steady {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<Answered>>,
}

/// The admissions, all of which were answered correctly.
#[derive(Debug, Clone, Copy)]
pub struct Answered {
    /// How many there were.
    pub count: u64,
    /// From the first byte of the connection, where it was new, to the last of the answer.
    pub slowest: Duration,
}

impl Steady {
    /// Starts posting to a webhook on the current runtime, one admission every so often.
    pub fn start(port: u16, protocol: Protocol, every: Duration) -> Self {
        Self::with(port, protocol, every, |number| {
            Ok(("/mutate?timeout=10s".to_owned(), reviews::creation("steady", number)?))
        })
    }

    /// The same with other reviews: `review` returns the path and the review of each number.
    pub fn with(
        port: u16,
        protocol: Protocol,
        every: Duration,
        review: impl Fn(u64) -> Result<(String, Value)> + Send + 'static,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        Self { stop, task: tokio::spawn(post(port, protocol, every, review, stopped)) }
    }

    /// Ends it; fails where any admission did.
    pub async fn stop(self) -> Result<Answered> {
        let _ = self.stop.send(());
        self.task.await?.context("an admission beside the test")
    }
}

async fn post(
    port: u16,
    protocol: Protocol,
    every: Duration,
    review: impl Fn(u64) -> Result<(String, Value)>,
    mut stopped: oneshot::Receiver<()>,
) -> Result<Answered> {
    let mut answered = Answered { count: 0, slowest: Duration::ZERO };
    let mut kept = Connection::open(port, protocol).await?;
    let mut ticks = tokio::time::interval(every);
    // A slow answer counts as slow; no faster ticks make up for it.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = &mut stopped => return Ok(answered),
            _ = ticks.tick() => {}
        }
        let (path, review) = review(answered.count)?;
        let begun = Instant::now();
        let answer = if answered.count.is_multiple_of(2) {
            Connection::open(port, protocol).await?.post(&path, &review).await?
        } else {
            match kept.post(&path, &review).await {
                // A server may end a connection between two requests.
                Err(Unanswered::Refused(_)) => {
                    kept = Connection::open(port, protocol).await?;
                    kept.post(&path, &review).await?
                }
                answer => answer?,
            }
        };
        reviews::patch(&review, &answer)?;
        answered.slowest = answered.slowest.max(begun.elapsed());
        answered.count += 1;
    }
}
