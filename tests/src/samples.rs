//! A job's live executors, looked at once a second: what counts for a user is each moment, not the end.

use std::fmt;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::{MissedTickBehavior, interval};

use crate::scenario::{Counts, Scenario};

/// Between two samples.
const EVERY: Duration = Duration::from_secs(1);

/// The samples of one job.
#[derive(Debug)]
pub struct Samples(Vec<Counts>);

impl Samples {
    /// Takes one sample a second for as long as something happens, and returns them with its result.
    pub async fn during<T>(
        scenario: &Scenario,
        job: &str,
        happening: impl Future<Output = Result<T>>,
    ) -> Result<(Self, T)> {
        let (mut ticks, mut samples, mut happening) = (interval(EVERY), Vec::new(), pin!(happening));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let sampling = async {
            loop {
                ticks.tick().await;
                samples.push(scenario.counts(job).await?);
            }
        };
        let result = tokio::select! {
            result = &mut happening => result?,
            failed = sampling => return failed,
        };
        Ok((Self(samples), result))
    }

    /// The largest number of live executors.
    pub fn most(&self) -> usize {
        self.0.iter().map(|counts| counts.spot + counts.on_demand).max().unwrap_or(0)
    }

    /// The largest distance from the ratio, in executors.
    pub fn worst(&self, ratio: f64) -> f64 {
        self.0.iter().map(|counts| counts.distance(ratio)).fold(0.0, f64::max)
    }

    /// Fails unless every sample is within `most` executors of the ratio.
    pub fn ensure_near(&self, ratio: f64, most: f64) -> Result<()> {
        let worst = self.worst(ratio);
        ensure!(worst <= most + 1e-9, "a sample is {worst:.2} executors from {ratio}, more than {most}: {self}");
        Ok(())
    }
}

impl fmt::Display for Samples {
    /// Spot/on-demand of each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for counts in &self.0 {
            write!(f, "{}/{} ", counts.spot, counts.on_demand)?;
        }
        Ok(())
    }
}
