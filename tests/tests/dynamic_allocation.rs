//! A job that grows and shrinks for as long as it runs, as Spark's dynamic allocation has it, and loses
//! executors by every means there is.

use anyhow::{Context, Result, ensure};
use balancer_core::{Capacity, Counts as Placed, Policy, decide};
use balancer_tests::need;
use balancer_tests::pods::{self, set_phase};
use balancer_tests::random::Random;
use balancer_tests::scenario::{Counts, REPAIRED, Scenario};
use kube::api::{DeleteParams, EvictParams};

const JOB: &str = "etl";
const RATIO: f64 = 0.7;
const ROUNDS: usize = 15;

/// What a job with these executors comes to by so many more, decided one after the other.
fn grown(counts: Counts, more: usize) -> Result<Counts> {
    let policy = Policy { spot_ratio: RATIO.to_string().parse()?, ..Policy::default() };
    let mut placed = Placed { spot: u64::try_from(counts.spot)?, on_demand: u64::try_from(counts.on_demand)? };
    for _ in 0..more {
        let capacity: Capacity = decide(placed, policy).context("opted out")?;
        placed.add(capacity);
    }
    Ok(Counts { spot: usize::try_from(placed.spot)?, on_demand: usize::try_from(placed.on_demand)? })
}

#[tokio::test]
async fn a_job_that_grows_and_shrinks_stays_within_one_executor_of_its_ratio() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut random = Random::seeded()?;
    let scenario = Scenario::reconciled("dynamic", 2, 1).await?;
    scenario.grow(JOB, &RATIO.to_string(), 12).await?;
    for round in 1..=ROUNDS {
        let mut live: Vec<String> = scenario.real(JOB).await?.into_keys().collect();
        for way in 0..live.len() / 3 {
            let name = live.swap_remove(random.below(live.len())?);
            let pods = scenario.pods();
            match way % 4 {
                0 => drop(pods.delete(&name, &DeleteParams::default()).await?),
                1 => pods::remove(&pods, &name).await?,
                2 => drop(pods.evict(&name, &EvictParams::default()).await?),
                _ => set_phase(&pods, &name, "Failed").await?,
            }
        }
        let context = || format!("in round {round}");
        let shrunk = scenario.until_ledger_matches_pods(JOB, REPAIRED).await.with_context(context)?;
        // As many as come, or as it takes to bring what is left back to its ratio.
        let mut more = 5 + random.below(16)?;
        while grown(shrunk, more)?.ensure_near(RATIO, 1.0).is_err() {
            more += 1;
            ensure!(more <= 40, "no number of executors brings {shrunk:?} to {RATIO}");
        }
        scenario.executors(JOB, scenario.fresh_ids().take(more), 8).await.with_context(context)?;
        let counts = scenario.until_ledger_matches_pods(JOB, REPAIRED).await.with_context(context)?;
        // To the executor: with a true ledger there is only one way to grow.
        assert_eq!(counts, grown(shrunk, more)?, "{}: {more} more than {shrunk:?}", context());
        counts.ensure_near(RATIO, 1.0).with_context(context)?;
    }
    for webhook in &scenario.webhooks {
        let placed = webhook.metrics().await?.sum("spot_balancer_placements_total", &[("source", "ledger")]);
        ensure!(placed > Some(0.0), "one of the webhooks placed nothing");
    }
    let memory = scenario.reconcilers[0].process().resident_mb()?;
    ensure!(memory < 64.0, "the reconciler has {memory} MB");
    Ok(())
}
