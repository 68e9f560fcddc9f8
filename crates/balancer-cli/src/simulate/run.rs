//! Simulates each policy many times, and estimates what to expect of it.
//!
//! Most jobs lose nothing, and their outcome is known without a simulation. So only jobs that lose something are simulated,
//! and weighted with the exact probability of that: a few thousand runs tell enough about rare losses.

use balancer_core::Policy;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use serde::Serialize;

use super::model::{Model, Outcome, Scenario};

/// Above this share of the executors a loss counts as a risk.
const RISKY_SHARE: f64 = 1.0 / 3.0;
/// What the simulation may do in about ten minutes on one processor. With a release build and `RAYON_NUM_THREADS=1`, 14 inputs
/// that a limit cut took 0.8 s to 5.8 s for each hundred million steps: jobs of 2 to 100,000 executors, on 1 to 100 pools, with
/// and without ready nodes, shares and fallback. So this is what the slowest of them does in ten minutes.
const MOST_STEPS: u64 = 10_000_000_000;
/// So few jobs show how much there is to do.
const TRIALS: u32 = 4;
/// The fewest jobs that say anything.
pub(super) const FEWEST_RUNS: u32 = 100;
/// Of a normal distribution, 95 % are within so many standard deviations.
const Z: f64 = 1.96;

/// How often to simulate, and with which random numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampling {
    pub(crate) runs: u32,
    pub(crate) seed: u64,
}

/// An estimate, with the bounds within which the exact value is with a probability of 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Estimate {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Estimate {
    /// How far the further bound is from the value.
    pub(crate) fn error(self) -> f64 {
        (self.high - self.value).max(self.value - self.low)
    }
}

/// How a value is spread over jobs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Spread {
    pub(crate) mean: Estimate,
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    /// The largest one of the simulated jobs.
    pub(crate) max: f64,
}

/// What happens if the pool with the most executors is lost just before a stage ends.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LargestPool {
    pub(crate) name: String,
    pub(crate) executors: u32,
    /// Of all executors.
    pub(crate) share: f64,
    pub(crate) cost: f64,
    pub(crate) hours: f64,
}

/// What to expect of a job with one ratio and one base.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Forecast {
    pub(crate) ratio: String,
    pub(crate) base: u32,
    /// Executors at the start of the job.
    pub(crate) spot: u64,
    pub(crate) on_demand: u64,
    /// Costs are in relation to the job on on-demand alone.
    pub(crate) cost_without_losses: f64,
    pub(crate) cost: Estimate,
    pub(crate) hours: Spread,
    /// The probability that any executor is lost.
    pub(crate) any_loss: f64,
    /// The probability that more than a third of the executors is lost at once.
    pub(crate) risk: Estimate,
    /// The largest share of the executors that is lost at once.
    pub(crate) largest_loss: Spread,
    /// Work that is done again, in relation to the work of the job.
    pub(crate) recomputed: Estimate,
    /// Executor-hours without a node because there was no spot.
    pub(crate) waited: Estimate,
    /// The share of the jobs that takes so long that the simulation gave up.
    pub(crate) unfinished: f64,
    /// `None` without spot executors.
    pub(crate) largest_pool: Option<LargestPool>,
}

/// Why nothing is simulated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error(
        "--executors {executors} and --hours {hours}: even --runs {FEWEST_RUNS} would take more than about 10 minutes; \
         accepted: what takes less, by fewer --ratios or --bases, fewer executors or hours, lower --rates, or more --stages"
    )]
    TooLong { executors: u32, hours: f64 },
}

/// So many runs, or as many as take about ten minutes. The same input gives the same number on any machine.
///
/// # Errors
/// If even the fewest runs would take longer.
pub(crate) fn affordable_runs(scenario: &Scenario, policies: &[Policy], sampling: Sampling) -> Result<u32, RunError> {
    affordable(scenario, policies, sampling, MOST_STEPS)
}

fn affordable(scenario: &Scenario, policies: &[Policy], sampling: Sampling, most: u64) -> Result<u32, RunError> {
    let most_of_a_run = most / u64::from(FEWEST_RUNS);
    let mut of_all_trials = 0;
    for policy in policies {
        let model = Model::new(scenario, *policy);
        let trials = (0..TRIALS).into_par_iter().filter(|_| model.disturbance() > 0.0);
        of_all_trials +=
            trials.map(|run| model.disturbed(&mut random(sampling, run), most_of_a_run).steps).sum::<u64>();
        // Not after the last one, so that many policies are not tried for long.
        if of_all_trials / u64::from(TRIALS) >= most_of_a_run {
            return Err(RunError::TooLong { executors: scenario.job.executors, hours: scenario.job.hours });
        }
    }
    let runs = (most * u64::from(TRIALS)).checked_div(of_all_trials);
    Ok(runs.and_then(|runs| u32::try_from(runs).ok()).map_or(sampling.runs, |runs| runs.min(sampling.runs)))
}

/// A stream for each job, so the order in which threads take them changes nothing, and each policy meets the same luck.
fn random(sampling: Sampling, run: u32) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
    random.set_stream(run.into());
    random
}

/// Simulates each policy. `finished` is called after each simulated job.
pub(crate) fn forecasts(
    scenario: &Scenario,
    policies: &[Policy],
    sampling: Sampling,
    finished: impl Fn() + Sync,
) -> Vec<Forecast> {
    policies.iter().map(|policy| forecast(scenario, *policy, sampling, &finished)).collect()
}

fn forecast(scenario: &Scenario, policy: Policy, sampling: Sampling, finished: &(impl Fn() + Sync)) -> Forecast {
    let model = Model::new(scenario, policy);
    let (counts, any_loss, undisturbed) = (model.counts(), model.disturbance(), model.undisturbed());
    let outcomes: Vec<Outcome> = (0..sampling.runs)
        .into_par_iter()
        .filter(|_| any_loss > 0.0)
        .map(|run| {
            let outcome = model.disturbed(&mut random(sampling, run), u64::MAX);
            finished();
            outcome
        })
        .collect();
    let mixture = Mixture { disturbed: &outcomes, undisturbed, any_loss };
    let largest_pool =
        model.largest_pool().zip(model.largest_pool_lost()).map(|((name, executors), outcome)| LargestPool {
            name: name.to_owned(),
            executors,
            share: outcome.largest_loss,
            cost: outcome.cost,
            hours: outcome.hours,
        });
    Forecast {
        ratio: policy.spot_ratio.to_string(),
        base: policy.on_demand_base,
        spot: counts.spot,
        on_demand: counts.on_demand,
        cost_without_losses: undisturbed.cost,
        cost: mixture.mean(|outcome| outcome.cost),
        hours: mixture.spread(|outcome| outcome.hours),
        any_loss,
        risk: mixture.probability(|outcome| outcome.largest_loss > RISKY_SHARE),
        largest_loss: mixture.spread(|outcome| outcome.largest_loss),
        recomputed: mixture.mean(|outcome| outcome.recomputed),
        waited: mixture.mean(|outcome| outcome.waited),
        unfinished: mixture.probability(|outcome| outcome.is_unfinished).value,
        largest_pool,
    }
}

/// Jobs that lose something, and all others.
struct Mixture<'a> {
    disturbed: &'a [Outcome],
    undisturbed: Outcome,
    /// The probability of the first ones.
    any_loss: f64,
}

impl Mixture<'_> {
    fn count(&self) -> f64 {
        f64::from(u32::try_from(self.disturbed.len()).unwrap_or(u32::MAX))
    }

    fn mean(&self, of: impl Fn(&Outcome) -> f64) -> Estimate {
        let undisturbed = of(&self.undisturbed);
        if self.disturbed.is_empty() {
            return Estimate { value: undisturbed, low: undisturbed, high: undisturbed };
        }
        let count = self.count();
        // What a loss adds, so that rounding does not grow with the value.
        let more = |outcome: &Outcome| of(outcome) - undisturbed;
        let mean = self.disturbed.iter().map(more).sum::<f64>() / count;
        let squares = self.disturbed.iter().map(|outcome| (more(outcome) - mean).powi(2)).sum::<f64>();
        let error = Z * (squares / (count - 1.0).max(1.0) / count).sqrt();
        let at = |more: f64| undisturbed + self.any_loss * more;
        Estimate { value: at(mean), low: at(mean - error), high: at(mean + error) }
    }

    /// The probability of something that needs a loss.
    fn probability(&self, of: impl Fn(&Outcome) -> bool) -> Estimate {
        if self.disturbed.is_empty() {
            return Estimate { value: 0.0, low: 0.0, high: 0.0 };
        }
        let count = self.count();
        let share = self.disturbed.iter().map(|outcome| if of(outcome) { 1.0 } else { 0.0 }).sum::<f64>() / count;
        // Wilson's interval: it is right for rare and for frequent outcomes too.
        let z = Z * Z / count;
        let middle = (share + z / 2.0) / (1.0 + z);
        let half = Z / (1.0 + z) * (share * (1.0 - share) / count + z / (4.0 * count)).sqrt();
        let at = |share: f64| self.any_loss * share.clamp(0.0, 1.0);
        Estimate { value: at(share), low: at(middle - half), high: at(middle + half) }
    }

    /// Quantiles are those of all jobs. No value is below that of a job without losses.
    fn spread(&self, of: impl Fn(&Outcome) -> f64) -> Spread {
        let mut sorted: Vec<f64> = self.disturbed.iter().map(&of).collect();
        sorted.sort_by(f64::total_cmp);
        let quantile = |share: f64| {
            let among_disturbed = (share - (1.0 - self.any_loss)) / self.any_loss;
            if sorted.is_empty() || among_disturbed <= 0.0 {
                return of(&self.undisturbed);
            }
            sorted.get(index(among_disturbed * self.count())).or(sorted.last()).copied().unwrap_or_default()
        };
        Spread {
            mean: self.mean(&of),
            p50: quantile(0.5),
            p95: quantile(0.95),
            p99: quantile(0.99),
            p999: quantile(0.999),
            max: sorted.last().copied().unwrap_or(of(&self.undisturbed)),
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is positive and small")]
fn index(position: f64) -> usize {
    position.floor() as usize
}

#[cfg(test)]
mod tests;
