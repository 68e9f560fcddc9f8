//! Creations that are refused after our webhook has placed them: by validation, a quota, a limit, another webhook, a
//! name that is taken. What lives is within one executor of the ratio all the same, with default settings.
//!
//! Each case runs with the ledger in Redis, behind one webhook and behind two, and with the ledger in memory. The
//! pauses of a case are its input: they are what a user has seen.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::{ControlPlane, Options, Plane};
use balancer_tests::other_webhook::{Behaviour, OtherWebhook, unwanted};
use balancer_tests::pods::{self, PodBuilder, Posted, executor};
use balancer_tests::registration::Registration;
use balancer_tests::samples::Samples;
use balancer_tests::scenario::{Counts, GRACE, REPAIRED, Scenario, placed, strict};
use balancer_tests::setup::Setup;
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::{in_each_setup, need, quota};
use futures::future::try_join_all;
use kube::ResourceExt;
use kube::api::DeleteParams;
use redis::AsyncCommands;
use tokio::sync::OnceCell;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

const JOB: &str = "etl";
/// How long a leader that is gone still counts as one, and the time to find that out.
const LEASE: Duration = Duration::from_secs(18);
/// How long a job runs against a full quota.
const FULL: Duration = Duration::from_secs(36);
/// Between two of its executors that end.
const ENDS: Duration = Duration::from_secs(3);
/// What another webhook takes where creations are slow.
const SLOW: Behaviour = Behaviour::Delays(Duration::from_secs(2));
/// Ids of executors that are refused.
const REFUSED: u32 = 1000;

in_each_setup! {
    every_second_creation_is_invalid
    every_second_creation_is_refused_by_another_webhook
    every_second_creation_exceeds_a_limit
    every_second_name_is_taken
    every_second_creation_of_a_generated_name_is_refused
    a_refused_name_is_accepted_later
    dry_runs_come_between_refusals
    a_base_comes_after_refusals_by_a_quota
    a_quota_stays_full
    a_batch_of_ten_of_which_three_fit
    a_job_that_is_refused_for_a_while
    every_creation_is_slow
    slow_creations_fill_the_base
}

/// A namespace with default settings, except STRICT.
async fn start(setup: Setup, purpose: &str) -> Result<Scenario> {
    let mut scenario = Scenario::bare(plane().await?, purpose).await?;
    scenario.grace = None;
    setup.serve(&mut scenario, &strict()).await?;
    Ok(scenario)
}

/// The control plane of these tests, which counts quotas.
async fn plane() -> Result<Plane> {
    static PLANE: OnceCell<ControlPlane> = OnceCell::const_new();
    let options = Options { scheduler: true, controller_manager: true, ..Options::default() };
    Ok(Plane::Shared(PLANE.get_or_try_init(|| ControlPlane::start(options)).await?))
}

/// A job with a driver. Its executors are owned by the real one: those of another would be collected as garbage.
struct Job<'a> {
    scenario: &'a Scenario,
    driver: String,
}

impl<'a> Job<'a> {
    async fn start(scenario: &'a Scenario, ratio: &str, base: u32) -> Result<Self> {
        let driver = pods::driver(JOB)
            .annotation("workload/spot-ratio", ratio)
            .annotation("workload/on-demand-base", &base.to_string());
        let driver = scenario.post(&driver).await?.pod()?.uid().context("a driver without a uid")?;
        Ok(Self { scenario, driver })
    }

    fn executor(&self, id: u32) -> PodBuilder {
        executor(JOB, id).owned_by(&format!("{JOB}-driver"), &self.driver)
    }

    async fn accepted(&self, id: u32) -> Result<String> {
        placed(&self.scenario.post(&self.executor(id)).await?.pod()?)
    }

    /// Posts a pod and fails unless it is refused with this status, after our webhook has placed it.
    async fn refused(&self, pod: &PodBuilder, status: u16) -> Result<Posted> {
        let before = self.placements().await?;
        let posted = self.scenario.post(pod).await?;
        ensure!(posted.status == status, "status {}, not {status}: {}", posted.status, posted.object);
        ensure!(self.placements().await? > before, "it was refused before our webhook had it: {}", posted.object);
        Ok(posted)
    }

    async fn placements(&self) -> Result<f64> {
        self.scenario.metric("spot_balancer_placements_total", &[]).await
    }

    /// What is live, where it is within one executor of the ratio.
    async fn ensure_near(&self, ratio: f64) -> Result<Counts> {
        let counts = self.scenario.counts(JOB).await?;
        counts.ensure_near(ratio, 1.0).with_context(|| format!("{counts:?} are live"))?;
        Ok(counts)
    }

    /// Fails unless the ledger comes to what is live; that of a webhook's memory is seen by what it does.
    async fn ensure_ledger_follows(&self, setup: Setup) -> Result<()> {
        if setup != Setup::Memory {
            self.scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
        }
        Ok(())
    }

    /// Ten times: an executor that is refused, and after a while one that is accepted.
    async fn alternate(&self, refused: impl AsyncFn(u32) -> Result<()>) -> Result<()> {
        for id in 1..=10 {
            refused(id).await?;
            sleep(Duration::from_millis(1200)).await;
            self.accepted(id).await?;
        }
        let counts = self.ensure_near(0.5).await?;
        assert_eq!(counts.spot + counts.on_demand, 10);
        Ok(())
    }
}

async fn every_second_creation_is_invalid(setup: Setup) -> Result<()> {
    let scenario = start(setup, "invalid").await?;
    let job = Job::start(&scenario, "0.5", 0).await?;
    job.alternate(async |id| job.refused(&job.executor(REFUSED + id).invalid(), 422).await.map(drop)).await?;
    job.ensure_ledger_follows(setup).await
}

async fn every_second_creation_is_refused_by_another_webhook(setup: Setup) -> Result<()> {
    let scenario = start(setup, "unwanted").await?;
    let _other = OtherWebhook::start(&scenario, Behaviour::Refuses).await?;
    let job = Job::start(&scenario, "0.5", 0).await?;
    job.alternate(async |id| job.refused(&unwanted(job.executor(REFUSED + id)), 400).await.map(drop)).await?;
    job.ensure_ledger_follows(setup).await
}

async fn every_second_creation_exceeds_a_limit(setup: Setup) -> Result<()> {
    let scenario = start(setup, "limit").await?;
    quota::limit_cpu(&scenario.client, &scenario.namespace, 4).await?;
    let job = Job::start(&scenario, "0.5", 0).await?;
    let large = |id| quota::with_cpus(job.executor(REFUSED + id), 5);
    job.alternate(async |id| job.refused(&large(id), 403).await.map(drop)).await?;
    job.ensure_ledger_follows(setup).await
}

/// By pods that are no executors: the API server has a pod of each name.
async fn every_second_name_is_taken(setup: Setup) -> Result<()> {
    let scenario = start(setup, "taken").await?;
    let job = Job::start(&scenario, "0.5", 0).await?;
    for id in 1..=10 {
        let other = job.executor(REFUSED + id).without_label("spark-role").without_label("spark-exec-id");
        scenario.post(&other).await?.pod()?;
    }
    job.alternate(async |id| job.refused(&job.executor(REFUSED + id), 409).await.map(drop)).await?;
    job.ensure_ledger_follows(setup).await
}

async fn every_second_creation_of_a_generated_name_is_refused(setup: Setup) -> Result<()> {
    let scenario = start(setup, "nameless").await?;
    let job = Job::start(&scenario, "0.5", 0).await?;
    let nameless = |id| job.executor(id).generate_name(&format!("{JOB}-exec-"));
    for id in 1..=10 {
        job.refused(&nameless(REFUSED + id).invalid(), 422).await?;
        sleep(Duration::from_millis(1200)).await;
        placed(&scenario.post(&nameless(id)).await?.pod()?)?;
    }
    job.ensure_near(0.5).await?;
    job.ensure_ledger_follows(setup).await
}

/// As a StatefulSet repeats them.
async fn a_refused_name_is_accepted_later(setup: Setup) -> Result<()> {
    let scenario = start(setup, "again").await?;
    let job = Job::start(&scenario, "0.7", 0).await?;
    for id in 1..=10 {
        for _ in 0..3 {
            let posted = scenario.post(&job.executor(id).invalid()).await?;
            ensure!(posted.status == 422, "{posted:?}");
            sleep(Duration::from_millis(500)).await;
        }
        job.accepted(id).await?;
    }
    job.ensure_near(0.7).await?;
    job.ensure_ledger_follows(setup).await
}

async fn dry_runs_come_between_refusals(setup: Setup) -> Result<()> {
    let scenario = start(setup, "dry").await?;
    let job = Job::start(&scenario, "0.5", 0).await?;
    let dry_run = async |id| {
        let posted = job.executor(id).dry_run(&scenario.client, &scenario.namespace).await?;
        ensure!(posted.status == 201, "{posted:?}");
        anyhow::Ok(())
    };
    job.alternate(async |id| {
        dry_run(id).await?;
        job.refused(&job.executor(REFUSED + id).invalid(), 422).await?;
        dry_run(2 * REFUSED + id).await
    })
    .await?;
    job.ensure_ledger_follows(setup).await
}

async fn a_base_comes_after_refusals_by_a_quota(setup: Setup) -> Result<()> {
    let scenario = start(setup, "base").await?;
    let job = Job::start(&scenario, "1", 2).await?;
    // Taken by the driver.
    quota::set(&scenario.client, &scenario.namespace, 1).await?;
    for id in 1..=2 {
        job.refused(&job.executor(id), 403).await?;
    }
    let later = Instant::now() + Duration::from_millis(2500);
    quota::set(&scenario.client, &scenario.namespace, 5).await?;
    sleep_until(later).await;
    for id in 3..=6 {
        job.accepted(id).await?;
    }
    assert_eq!(scenario.counts(JOB).await?, Counts { spot: 2, on_demand: 2 });
    job.ensure_ledger_follows(setup).await
}

/// Ten executors have room, one more is tried every half a second, and one ends every three seconds.
async fn a_quota_stays_full(setup: Setup) -> Result<()> {
    let scenario = start(setup, "full").await?;
    let job = Job::start(&scenario, "0.7", 0).await?;
    quota::set(&scenario.client, &scenario.namespace, 11).await?;
    let over = Instant::now() + FULL;
    let trying = async {
        let (mut ticks, mut id, mut refusals) = (interval(Duration::from_millis(500)), 0, 0);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while Instant::now() < over {
            ticks.tick().await;
            id += 1;
            let posted = scenario.post(&job.executor(id)).await?;
            ensure!([201, 403].contains(&posted.status), "{posted:?}");
            refusals += u32::from(posted.status == 403);
        }
        ensure!(refusals >= 20, "only {refusals} of {id} were refused");
        Ok(())
    };
    let ending = async {
        let mut ticks = interval(ENDS);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            if Instant::now() >= over {
                break;
            }
            // Always on on-demand: where replacements go by anything except what is live, the job drifts to spot.
            for name in scenario.some(JOB, "on-demand", 1).await? {
                scenario.pods().delete(&name, &DeleteParams::default()).await?;
            }
        }
        Ok(())
    };
    let both = async { tokio::try_join!(trying, ending) };
    let (samples, _) = Samples::during(&scenario, JOB, both).await?;
    println!("{setup:?}: at worst {:.2} executors from 0.7: {samples}", samples.worst(0.7));
    quota::ensure_full(samples.most(), 10).with_context(|| samples.to_string())?;
    samples.ensure_near(0.7, 1.0)?;
    job.ensure_ledger_follows(setup).await
}

/// Which of a batch fit, chance decides. What comes after makes up for it.
async fn a_batch_of_ten_of_which_three_fit(setup: Setup) -> Result<()> {
    let scenario = start(setup, "batch").await?;
    let job = Job::start(&scenario, "0.5", 0).await?;
    quota::set(&scenario.client, &scenario.namespace, 4).await?;
    let posting = (1..=10).map(async |id| scenario.post(&job.executor(id)).await);
    let posted = try_join_all(posting).await?;
    let accepted = posted.iter().filter(|posted| posted.status == 201).count();
    quota::ensure_full(accepted, 3).with_context(|| format!("{posted:?}"))?;
    let later = Instant::now() + Duration::from_millis(2500);
    quota::set(&scenario.client, &scenario.namespace, 15).await?;
    sleep_until(later).await;
    for id in 11..=20 {
        job.accepted(id).await?;
    }
    job.ensure_near(0.5).await?;
    job.ensure_ledger_follows(setup).await
}

async fn a_job_that_is_refused_for_a_while(setup: Setup) -> Result<()> {
    let scenario = start(setup, "while").await?;
    let job = Job::start(&scenario, "0.7", 2).await?;
    for id in 1..=30 {
        let posted = scenario.post(&job.executor(REFUSED + id).invalid()).await?;
        ensure!(posted.status == 422, "{posted:?}");
        sleep(Duration::from_millis(250)).await;
    }
    sleep(Duration::from_secs(2)).await;
    for id in 1..=12 {
        job.accepted(id).await?;
    }
    let counts = scenario.counts(JOB).await?;
    // Two are the base; of the other ten the ratio is asked.
    Counts { on_demand: counts.on_demand.saturating_sub(2), ..counts }.ensure_near(0.7, 1.0)?;
    job.ensure_ledger_follows(setup).await
}

/// Posts executors a little apart, each of which is admitted after another webhook's two seconds.
async fn create_slowly(job: &Job<'_>, ids: std::ops::RangeInclusive<u32>) -> Result<()> {
    let posting = ids.zip(1..).map(async |(id, turn)| {
        sleep(Duration::from_millis(300) * turn).await;
        job.accepted(id).await
    });
    try_join_all(posting).await?;
    Ok(())
}

async fn every_creation_is_slow(setup: Setup) -> Result<()> {
    let scenario = start(setup, "slow").await?;
    let _other = OtherWebhook::start(&scenario, SLOW).await?;
    let job = Job::start(&scenario, "0.7", 0).await?;
    create_slowly(&job, 1..=20).await?;
    let counts = job.ensure_near(0.7).await?;
    assert_eq!(counts.spot + counts.on_demand, 20);
    job.ensure_ledger_follows(setup).await
}

/// Until the first pod of a job is there, nobody can tell its slow creations from refused ones, and more than its base
/// may go to on-demand. From then on it gets no more of it.
async fn slow_creations_fill_the_base(setup: Setup) -> Result<()> {
    let scenario = start(setup, "slow-base").await?;
    let _other = OtherWebhook::start(&scenario, SLOW).await?;
    let job = Job::start(&scenario, "1", 2).await?;
    create_slowly(&job, 1..=4).await?;
    let first = scenario.counts(JOB).await?;
    ensure!(first.on_demand >= 2, "the base is not filled: {first:?}");
    create_slowly(&job, 5..=16).await?;
    let counts = scenario.counts(JOB).await?;
    ensure!(counts.on_demand <= first.on_demand + 1, "{first:?}, and {counts:?} after twelve more");
    job.ensure_ledger_follows(setup).await
}

/// Executors that came and went unseen, and whose DELETE reviews are lost, because no webhook responded.
async fn live_and_die(scenario: &Scenario, ids: std::ops::RangeInclusive<u32>) -> Result<()> {
    for id in ids.clone() {
        scenario.executor(JOB, id).await?;
    }
    scenario.balance.send_to(&[]);
    for id in ids {
        pods::remove(&scenario.pods(), &format!("{JOB}-exec-{id}")).await?;
    }
    scenario.send_to_webhooks();
    ensure!(scenario.ensure_ledger_matches_pods(JOB).await.is_err(), "their deletion was not lost");
    Ok(())
}

/// A namespace on the shared plane whose configurations ignore webhooks that do not respond, as a cluster's do.
async fn start_ignoring(purpose: &str, webhooks: usize) -> Result<Scenario> {
    let mut scenario = Scenario::bare(Plane::shared().await?, purpose).await?;
    scenario.grace = None;
    scenario.start_webhooks(webhooks, strict()).await?;
    Registration { failure_policy: "Ignore", ..scenario.registration() }.apply(&scenario.plane).await?;
    scenario.start_reconcilers(1).await?;
    Ok(scenario)
}

#[tokio::test]
async fn executors_that_lived_and_died_unseen_are_gone_when_the_next_leader_has_listed() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    for webhooks in [1, 2] {
        let mut scenario = start_ignoring("unseen", webhooks).await?;
        scenario.grow(JOB, "0.5", 4).await?;
        scenario.reconcilers.pop().context("no reconciler")?.kill();
        live_and_die(&scenario, 11..=16).await?;
        // Ready after it has listed all, and it leads when the lease of the killed one has expired.
        scenario.start_reconcilers(1).await?;
        until_true(LEASE, "the next one to lead", async || scenario.reconcilers[0].leads().await).await?;
        let counts = scenario.until_ledger_matches_pods(JOB, REPAIRED).await?;
        assert_eq!(counts, Counts { spot: 2, on_demand: 2 });
        scenario.ensure_ratio_recovers(JOB, 0.5).await?;
    }
    Ok(())
}

/// The standby has followed everything when it begins to lead, and a webhook is killed too.
#[tokio::test]
async fn executors_that_lived_and_died_unseen_are_gone_when_the_standby_leads() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let mut scenario = start_ignoring("standby", 2).await?;
    scenario.start_reconcilers(1).await?;
    scenario.grow(JOB, "0.5", 4).await?;
    let leader = scenario.leader().await?.context("no leader")?;
    scenario.reconcilers.remove(leader).kill();
    scenario.webhooks.remove(0).kill();
    scenario.send_to_webhooks();
    scenario.until_placing(JOB).await?;
    live_and_die(&scenario, 11..=16).await?;
    until_true(LEASE, "the standby to lead", async || scenario.reconcilers[0].leads().await).await?;
    assert_eq!(scenario.until_ledger_matches_pods(JOB, REPAIRED).await?, Counts { spot: 2, on_demand: 2 });
    scenario.ensure_ratio_recovers(JOB, 0.5).await
}

/// All refused: neither a driver nor an executor of these jobs ever was.
#[tokio::test]
async fn jobs_without_any_pod_leave_no_keys_after_the_grace() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler);
    for webhooks in [1, 2] {
        let mut scenario = Scenario::bare(plane().await?, "nobody").await?;
        scenario.start_webhooks(webhooks, strict()).await?;
        scenario.registration().apply(&scenario.plane).await?;
        scenario.start_reconcilers(1).await?;
        quota::set(&scenario.client, &scenario.namespace, 0).await?;
        let mut redis = scenario.redis.connection().await?;
        let ours = format!("exec-*:{{{}:*}}", scenario.namespace);
        for job in 1..=10 {
            let posted = scenario.post(&executor(&format!("nobody-{job}"), 1)).await?;
            ensure!(posted.status == 403, "{posted:?}");
        }
        let keys: Vec<String> = redis.keys(&ours).await?;
        ensure!(!keys.is_empty(), "they were refused before our webhook had them");
        let mut left = keys;
        let gone = until_true(GRACE + REPAIRED, "the keys to be gone", async || {
            left = redis.keys(&ours).await?;
            Ok(left.is_empty())
        });
        gone.await.with_context(|| format!("left: {left:?}"))?;
    }
    Ok(())
}

/// A creation that is repeated under the name of a live executor is refused, and leaves that one counted once.
#[tokio::test]
async fn a_repeated_creation_of_a_live_executor_leaves_it_counted_once() -> Result<()> {
    need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler);
    let scenario = start(Setup::Redis { webhooks: 2 }, "repeated").await?;
    let job = Job::start(&scenario, "0.5", 0).await?;
    for id in 1..=8 {
        job.accepted(id).await?;
        let posted = scenario.post(&job.executor(id)).await?;
        ensure!(posted.status == 409, "{posted:?}");
        sleep(Duration::from_millis(600)).await;
    }
    until_true(SOON, "all to be live", async || Ok(scenario.live(JOB).await?.len() == 8)).await?;
    assert_eq!(job.ensure_near(0.5).await?, Counts { spot: 4, on_demand: 4 });
    job.ensure_ledger_follows(Setup::Redis { webhooks: 2 }).await
}
