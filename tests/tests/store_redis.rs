//! The Redis ledger keeps the contract, and keeps its two keys true whatever happens to them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use balancer_core::{
    Capacity, Counts, Drift, JobId, JobRef, JobState, LiveExecutor, PlaceOutcome, PlaceRequest, Policy,
    PolicyOverrides, ReconcileOutcome, ReconcileSummary, Term,
};
use balancer_store::{Ledger, RedisLedger, RedisOptions, StoreError};
use balancer_tests::need;
use balancer_tests::redis::RedisServer;
use balancer_tests::wait;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, FromRedisValue, cmd};
use tokio::sync::OnceCell;

const DAY: Duration = Duration::from_secs(86_400);
const JOB: JobRef<'_> = JobRef { namespace: "etl", app_id: "spark-1" };
const COUNT: &str = "exec-count:{etl:spark-1}";
const PODS: &str = "exec-pods:{etl:spark-1}";
const MARK: &str = "exec-heartbeat";

async fn connect(server: &RedisServer, ttl: Duration) -> Result<RedisLedger> {
    Ok(RedisLedger::connect(&server.url(), RedisOptions { timeout: Duration::from_secs(10), ttl }).await?)
}

/// A server for the contract's tests together: each has a job of its own.
async fn shared() -> Result<RedisLedger> {
    static SERVER: OnceCell<RedisServer> = OnceCell::const_new();
    connect(SERVER.get_or_try_init(RedisServer::start).await?, DAY).await
}

balancer_store::contract!({
    need!(Redis);
    shared().await?
});

/// A server, a ledger in it, and a look past the ledger.
struct Bench {
    server: RedisServer,
    ledger: RedisLedger,
    redis: MultiplexedConnection,
}

impl Bench {
    async fn start() -> Result<Self> {
        let server = RedisServer::start().await?;
        Ok(Self { ledger: connect(&server, DAY).await?, redis: server.connection().await?, server })
    }

    async fn ask<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T> {
        Ok(command.query_async(&mut self.redis).await?)
    }

    async fn hash(&mut self, key: &str) -> Result<BTreeMap<String, String>> {
        self.ask(cmd("HGETALL").arg(key)).await
    }

    /// The counts as the job's key tells them, spot and on-demand.
    async fn noted(&mut self) -> Result<(String, String)> {
        self.ask(cmd("HMGET").arg(COUNT).arg("spot").arg("on-demand")).await
    }

    /// Everything in the server, as it would be restored.
    async fn dump(&mut self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut dump = BTreeMap::new();
        for key in self.ask::<Vec<String>>(cmd("KEYS").arg("*")).await? {
            let value = self.ask(cmd("DUMP").arg(&key)).await?;
            dump.insert(key, value);
        }
        Ok(dump)
    }

    /// How long both keys will live, in seconds.
    async fn lives(&mut self) -> Result<(i64, i64)> {
        Ok((self.ask(cmd("TTL").arg(COUNT)).await?, self.ask(cmd("TTL").arg(PODS)).await?))
    }

    async fn shorten_lives(&mut self) -> Result<()> {
        for key in [COUNT, PODS] {
            self.ask::<()>(cmd("EXPIRE").arg(key).arg(1_000)).await?;
        }
        Ok(())
    }

    /// How often the server ran each command, those inside scripts included.
    async fn commands(&mut self) -> Result<BTreeMap<String, u64>> {
        let page: String = self.ask(cmd("INFO").arg("commandstats")).await?;
        page.lines()
            .filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(":calls="))
            .filter(|(name, _)| !name.starts_with("config") && *name != "info")
            .map(|(name, rest)| Ok((name.to_owned(), rest.split(',').next().unwrap_or_default().parse()?)))
            .collect()
    }

    /// How many connections the server has.
    async fn clients(&mut self) -> Result<usize> {
        Ok(self.ask::<String>(cmd("CLIENT").arg("LIST")).await?.lines().count())
    }

    async fn forget_commands(&mut self) -> Result<()> {
        self.ask(cmd("CONFIG").arg("RESETSTAT")).await
    }

    /// A reconcile in the first term.
    async fn mend(
        &self,
        live: &[LiveExecutor<'_>],
        policy: Option<Policy>,
        grace: Duration,
    ) -> Result<ReconcileSummary> {
        let overrides = policy.map(PolicyOverrides::from).unwrap_or_default();
        let seen = JobState { live, overrides, ended: false };
        match self.ledger.reconcile(JOB, &seen, grace, Term(1)).await? {
            ReconcileOutcome::Done(mended) => Ok(mended),
            ReconcileOutcome::Superseded(by) => anyhow::bail!("superseded by {by}"),
        }
    }

    async fn fill(&self, executors: usize) -> Result<()> {
        let names: Vec<String> = (0..executors).map(|number| format!("e{number}")).collect();
        let live: Vec<_> = names.iter().map(|name| live(name, Some(Capacity::Spot))).collect();
        self.mend(&live, Some(policy("0.5", 0)?), DAY).await?;
        Ok(())
    }
}

fn policy(ratio: &str, base: u32) -> Result<Policy> {
    Ok(Policy { on_demand_base: base, ..Policy { spot_ratio: ratio.parse()?, ..Policy::default() } })
}

fn request(executor: &str) -> PlaceRequest<'_> {
    PlaceRequest { key: executor, required: None, overrides: PolicyOverrides::default(), policy: None }
}

fn live(executor: &str, capacity: Option<Capacity>) -> LiveExecutor<'_> {
    LiveExecutor { key: executor, uid: "9f1c", capacity }
}

fn counts(outcome: PlaceOutcome) -> Option<(u64, u64)> {
    match outcome {
        PlaceOutcome::Placed(placed) => Some((placed.counts.spot, placed.counts.on_demand)),
        PlaceOutcome::NeedPolicy => None,
    }
}

#[tokio::test]
async fn a_person_can_read_the_two_keys_of_a_job() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("0.7", 1)?).await?;
    for executor in ["a", "b", "c"] {
        bench.ledger.place(JOB, &request(executor)).await?;
    }
    bench.mend(&[live("a", None)], None, DAY).await?;
    let policy = "spot-ratio=0.7 on-demand-base=1";
    let fields = [("on-demand", "2"), ("policy", policy), ("spot", "1"), ("term", "1"), ("v", "1")];
    let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(bench.hash(COUNT).await?, BTreeMap::from(fields));

    let (seconds, _): (i64, i64) = bench.ask(&cmd("TIME")).await?;
    let pods = bench.hash(PODS).await?;
    let mut entries = Vec::new();
    for (executor, entry) in &pods {
        let [capacity, placed, uid] = entry.splitn(3, ' ').collect::<Vec<_>>()[..] else { anyhow::bail!("{entry}") };
        assert!((seconds - placed.parse::<i64>()? / 1_000).abs() < 60, "{entry}");
        entries.push((executor.as_str(), capacity, uid));
    }
    assert_eq!(entries, [("a", "on-demand", "9f1c"), ("b", "spot", "-"), ("c", "on-demand", "-")]);
    Ok(())
}

#[tokio::test]
async fn peek_and_get_write_nothing_and_renew_no_ttl() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(3).await?;
    bench.shorten_lives().await?;
    let before = bench.dump().await?;
    let looked_up = PlaceRequest { policy: Some(policy("1", 0)?), ..request("new") };
    for job in [JOB, JobRef { namespace: "etl", app_id: "unknown" }] {
        for asked in
            [request("e1"), request("new"), looked_up, PlaceRequest { required: Some(Capacity::Spot), ..looked_up }]
        {
            bench.ledger.peek(job, &asked).await?;
        }
        bench.ledger.get(job).await?;
        bench.ledger.list_jobs(None).await?;
    }
    assert_eq!(bench.dump().await?, before);
    let (count, pods) = bench.lives().await?;
    assert!(count <= 1_000 && pods <= 1_000, "{count} s and {pods} s");
    Ok(())
}

#[tokio::test]
async fn every_change_renews_the_ttl_of_both_keys() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(3).await?;
    for touch in 0..7 {
        bench.shorten_lives().await?;
        match touch {
            0 => drop(bench.ledger.place(JOB, &request("new")).await?),
            1 => drop(bench.ledger.place(JOB, &request("e1")).await?),
            2 => drop(bench.ledger.release(JOB, "e1", None).await?),
            3 => drop(bench.ledger.release(JOB, "unknown", None).await?),
            4 => bench.ledger.learn(JOB, policy("0.1", 0)?).await?,
            5 => drop(bench.ledger.counts(JOB).await?),
            _ => drop(bench.mend(&[live("e2", None)], None, DAY).await?),
        }
        let (count, pods) = bench.lives().await?;
        assert!(count > 86_000 && pods > 86_000, "touch {touch}: {count} s and {pods} s");
    }
    Ok(())
}

#[tokio::test]
async fn a_ledger_expires_the_ttl_after_its_last_use() -> Result<()> {
    need!(Redis);
    let ttl = Duration::from_millis(500);
    let mut bench = Bench::start().await?;
    bench.ledger = connect(&bench.server, ttl).await?;
    bench.ledger.learn(JOB, policy("0.5", 0)?).await?;
    bench.ledger.heartbeat(1).await?;
    let begin = Instant::now();
    bench.ledger.place(JOB, &request("e1")).await?;
    let ledger = &bench.ledger;
    wait::until_true(Duration::from_secs(10), "the ledger to go", async || Ok(ledger.get(JOB).await?.is_none()))
        .await?;
    assert!(begin.elapsed() >= ttl, "gone after {:?}", begin.elapsed());
    assert_eq!((bench.ledger.counts(JOB).await?, told(&bench.ledger).await?.0), (None, Vec::new()));
    assert_eq!(bench.ask::<u64>(cmd("EXISTS").arg(MARK)).await?, 0);
    assert_eq!(bench.ask::<u64>(&cmd("DBSIZE")).await?, 0);
    Ok(())
}

#[tokio::test]
async fn an_unknown_job_leaves_no_key() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.place(JOB, &request("e1")).await?;
    bench.ledger.release(JOB, "e1", Some("u")).await?;
    bench.mend(&[live("e1", None)], None, Duration::ZERO).await?;
    bench.ledger.counts(JOB).await?;
    assert_eq!(bench.ask::<u64>(&cmd("DBSIZE")).await?, 0);
    Ok(())
}

#[tokio::test]
async fn an_empty_ledger_leaves_no_key() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let seen = [live("e1", Some(Capacity::Spot)), live("e2", Some(Capacity::OnDemand))];
    let ended = JobState { ended: true, ..JobState::default() };
    for way in 0..4 {
        bench.mend(&seen, None, DAY).await?;
        bench.ledger.release(JOB, "e1", Some("9f1c")).await?;
        match way {
            0 => drop(bench.ledger.release(JOB, "e2", Some("9f1c")).await?),
            1 => drop(bench.ledger.release(JOB, "e2", None).await?),
            2 => drop(bench.mend(&[], None, DAY).await?),
            _ => {
                bench.ledger.learn(JOB, policy("0.5", 0)?).await?;
                bench.ledger.reconcile(JOB, &ended, DAY, Term(1)).await?;
            }
        }
        assert_eq!(bench.ask::<u64>(&cmd("DBSIZE")).await?, 0, "way {way}");
    }
    Ok(())
}

#[tokio::test]
async fn the_stored_counts_match_the_entries_after_every_change() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("0.5", 1)?).await?;
    let required = |executor, capacity| PlaceRequest { required: Some(capacity), ..request(executor) };
    for step in 0..9 {
        match step {
            0 => drop(bench.ledger.place(JOB, &request("a")).await?),
            1 => drop(bench.ledger.place(JOB, &request("b")).await?),
            2 => drop(bench.ledger.place(JOB, &request("a")).await?),
            3 => drop(bench.ledger.place(JOB, &required("a", Capacity::Spot)).await?),
            4 => drop(bench.ledger.place(JOB, &required("c", Capacity::OnDemand)).await?),
            5 => drop(bench.ledger.release(JOB, "c", None).await?),
            6 => drop(bench.ledger.release(JOB, "b", None).await?),
            7 => drop(bench.mend(&[live("x", Some(Capacity::OnDemand))], None, DAY).await?),
            _ => drop(bench.mend(&[], None, Duration::ZERO).await?),
        }
        let counts = bench.ledger.get(JOB).await?.context("the job is gone")?.counts();
        let noted = bench.noted().await?;
        assert_eq!(noted, (counts.spot.to_string(), counts.on_demand.to_string()), "after step {step}");
    }
    Ok(())
}

#[tokio::test]
async fn lost_or_edited_counts_are_counted_again_from_the_entries() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let names: Vec<String> = (0..7).map(|number| format!("e{number}")).collect();
    let mut all: Vec<_> = names.iter().map(|name| live(name, Some(Capacity::Spot))).collect();
    all.push(live("o", Some(Capacity::OnDemand)));
    let edits = [
        cmd("DEL").arg(COUNT).to_owned(),
        cmd("HDEL").arg(COUNT).arg("spot").to_owned(),
        cmd("HSET").arg(COUNT).arg("spot").arg(100).to_owned(),
        cmd("HSET").arg(COUNT).arg("on-demand").arg("many").to_owned(),
    ];
    for edit in edits {
        for (executor, expected) in [("e1", (7, 1)), ("new", (8, 1))] {
            let asked = PlaceRequest { policy: Some(policy("1", 0)?), ..request(executor) };
            bench.ask::<()>(&cmd("FLUSHALL")).await?;
            bench.mend(&all, Some(policy("1", 0)?), DAY).await?;
            bench.ask::<()>(&edit).await?;
            assert_eq!(counts(bench.ledger.peek(JOB, &asked).await?), Some(expected), "{edit:?}");
            assert_eq!(counts(bench.ledger.place(JOB, &asked).await?), Some(expected), "{edit:?}");
            assert_eq!(bench.noted().await?, (expected.0.to_string(), expected.1.to_string()), "{edit:?}");
        }
        bench.ask::<()>(&edit).await?;
        bench.ledger.release(JOB, "e2", None).await?;
        assert_eq!(bench.noted().await?, ("7".to_owned(), "1".to_owned()), "{edit:?}");
        bench.ask::<()>(&edit).await?;
        assert_eq!(bench.ledger.counts(JOB).await?, Some(Counts { spot: 7, on_demand: 1 }), "{edit:?}");
        assert_eq!(bench.noted().await?, ("7".to_owned(), "1".to_owned()), "{edit:?}");
    }
    Ok(())
}

#[tokio::test]
async fn lost_entries_are_no_longer_counted() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(9).await?;
    bench.ask::<()>(cmd("DEL").arg(PODS)).await?;
    assert_eq!(counts(bench.ledger.place(JOB, &request("e1")).await?), Some((1, 0)));
    assert_eq!(bench.ledger.release(JOB, "e2", None).await?, None);
    let shown = bench.ledger.get(JOB).await?.context("the job is gone")?;
    assert_eq!((shown.counts(), shown.policy()), (Counts { spot: 1, on_demand: 0 }, Some(policy("0.5", 0)?)));
    Ok(())
}

#[tokio::test]
async fn a_lost_policy_is_requested_again() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    for change in [
        cmd("DEL").arg(COUNT).to_owned(),
        cmd("HDEL").arg(COUNT).arg("policy").to_owned(),
        cmd("HSET").arg(COUNT).arg("policy").arg("lots").to_owned(),
        cmd("HSET").arg(COUNT).arg("policy").arg("spot-ratio=0.5").to_owned(),
        cmd("HSET").arg(COUNT).arg("policy").arg("spot-ratio=lots on-demand-base=0").to_owned(),
        cmd("HSET").arg(COUNT).arg("policy").arg("spot-ratio=1.5 on-demand-base=0").to_owned(),
        cmd("HSET").arg(COUNT).arg("policy").arg("spot-ratio=0.5 on-demand-base=-1").to_owned(),
    ] {
        bench.ask::<()>(&cmd("FLUSHALL")).await?;
        bench.fill(4).await?;
        bench.ask::<()>(&change).await?;
        assert_eq!(bench.ledger.place(JOB, &request("new")).await?, PlaceOutcome::NeedPolicy, "{change:?}");
        let looked_up = PlaceRequest { policy: Some(policy("0.25", 2)?), ..request("new") };
        assert_eq!(counts(bench.ledger.place(JOB, &looked_up).await?), Some((4, 1)), "{change:?}");
        let shown = bench.ledger.get(JOB).await?.context("the job is gone")?;
        assert_eq!(shown.policy(), looked_up.policy, "{change:?}");
    }
    Ok(())
}

#[tokio::test]
async fn fields_and_policy_words_of_a_newer_version_survive() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let stored = "zones=3 spot-ratio=0.5 on-demand-base=0 x=";
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg(&[("v", "2"), ("policy", stored), ("closed", "soon")])).await?;
    assert_eq!(counts(bench.ledger.place(JOB, &request("e1")).await?), Some((1, 0)));
    let expect = async |bench: &mut Bench, known: &str| -> Result<()> {
        let record = bench.hash(COUNT).await?;
        let field = |name| record.get(name).map(String::as_str);
        assert_eq!((field("v"), field("closed")), (Some("2"), Some("soon")));
        assert_eq!(field("policy"), Some(format!("zones=3 {known} x=").as_str()));
        Ok(())
    };
    expect(&mut bench, "spot-ratio=0.5 on-demand-base=0").await?;
    bench.ledger.learn(JOB, policy("0.7", 2)?).await?;
    expect(&mut bench, "spot-ratio=0.7 on-demand-base=2").await?;
    bench.mend(&[live("e1", None)], Some(policy("0.9", 1)?), DAY).await?;
    expect(&mut bench, "spot-ratio=0.9 on-demand-base=1").await?;
    bench.ledger.release(JOB, "e1", None).await?;
    expect(&mut bench, "spot-ratio=0.9 on-demand-base=1").await?;

    // A first policy is merged too.
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg("policy").arg("zones=3 spot-ratio=lots x=")).await?;
    let looked_up = PlaceRequest { policy: Some(policy("0.25", 2)?), ..request("e2") };
    bench.ledger.place(JOB, &looked_up).await?;
    let merged = bench.hash(COUNT).await?.remove("policy");
    assert_eq!(merged.as_deref(), Some("zones=3 spot-ratio=0.25 x= on-demand-base=2"));
    assert_eq!(bench.ledger.get(JOB).await?.and_then(|ledger| ledger.policy()), looked_up.policy);
    Ok(())
}

#[tokio::test]
async fn an_invalid_policy_is_replaced() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(1).await?;
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg("policy").arg("lots of spot")).await?;
    assert_eq!(bench.ledger.get(JOB).await?.and_then(|ledger| ledger.policy()), None);
    bench.ledger.learn(JOB, policy("0.7", 2)?).await?;
    assert_eq!(bench.hash(COUNT).await?.remove("policy").as_deref(), Some("spot-ratio=0.7 on-demand-base=2"));
    Ok(())
}

#[tokio::test]
async fn an_invalid_entry_counts_as_on_demand_until_the_next_reconcile() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(1).await?;
    bench.ask::<()>(cmd("HSET").arg(PODS).arg("x").arg("rubbish").arg("y").arg("").arg("z").arg("spot\0 1 -")).await?;
    assert_eq!(counts(bench.ledger.place(JOB, &request("y")).await?), Some((1, 3)));
    let error = bench.ledger.get(JOB).await.err().context("rubbish was read")?;
    assert_eq!(error.kind(), "invalid_reply");
    let drift = bench.mend(&[live("e0", None), live("x", Some(Capacity::Spot))], None, DAY).await?.drift;
    assert_eq!(drift, Drift { missing: 0, stale: 1, wrong_capacity: 1 });
    let shown = bench.ledger.get(JOB).await?.context("the job is gone")?;
    assert_eq!(shown.counts(), Counts { spot: 2, on_demand: 1 });
    Ok(())
}

#[tokio::test]
async fn the_grace_is_measured_on_the_servers_clock() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let (seconds, _): (i64, i64) = bench.ask(&cmd("TIME")).await?;
    let ago = |age: i64| format!("spot {} -", (seconds - age) * 1_000);
    bench
        .ask::<()>(cmd("HSET").arg(PODS).arg("old").arg(ago(90)).arg("young").arg(ago(30)).arg("ahead").arg(ago(-90)))
        .await?;
    let drift = bench.mend(&[], None, Duration::from_secs(60)).await?.drift;
    assert_eq!(drift, Drift { stale: 1, ..Drift::default() });
    assert_eq!(bench.hash(PODS).await?.into_keys().collect::<Vec<_>>(), ["ahead", "young"]);
    Ok(())
}

#[tokio::test]
async fn the_recheck_is_due_on_the_servers_clock() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let (seconds, _): (i64, i64) = bench.ask(&cmd("TIME")).await?;
    let ago = |age: i64, uid: &str| format!("spot {} {uid}", (seconds - age) * 1_000);
    let entries = [
        ("late", ago(50_000, "-")),
        ("first", ago(80_000, "-")),
        ("live", ago(86_000, "-")),
        ("gone", ago(86_100, "9f1c")),
        ("too long", ago(86_401, "-")),
        ("ahead", ago(-1_000, "-")),
    ];
    bench.ask::<()>(cmd("HSET").arg(PODS).arg(&entries)).await?;
    let mended = bench.mend(&[live("live", None)], None, DAY).await?;
    assert_eq!((mended.drift.stale, mended.counts), (2, Counts { spot: 4, on_demand: 0 }));
    let recheck_after = mended.recheck_after.context("none recheck_after")?;
    assert!((6_300_000..=6_401_000).contains(&recheck_after), "{recheck_after} ms");

    bench.ask::<()>(cmd("HDEL").arg(PODS).arg("first").arg("late")).await?;
    // One that was placed in the future, as the clock goes, was placed just now.
    assert_eq!(bench.mend(&[], None, DAY).await?.recheck_after, Some(86_400_000));
    Ok(())
}

#[tokio::test]
async fn the_release_grace_is_measured_on_the_servers_clock_and_a_future_release_has_none() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let (seconds, _): (i64, i64) = bench.ask(&cmd("TIME")).await?;
    // One will have been released within the last moments once its second has begun; another was long ago, and
    // one will be in an hour.
    for (executor, age, entered) in [("now", -1, false), ("past", 5, true), ("future", -3_600, true)] {
        // Its name is its uid too.
        let release = format!("{} {executor}", (seconds - age) * 1_000);
        let release = format!("{}:{release}", release.len());
        bench.ask::<()>(cmd("HSET").arg(COUNT).arg("released").arg(&release)).await?;
        if age == -1 {
            wait::until_true(Duration::from_secs(5), "the release to be past", async || {
                let (now, _): (i64, i64) = bench.ask(&cmd("TIME")).await?;
                Ok(now > seconds)
            })
            .await?;
        }
        let live = [LiveExecutor { key: executor, uid: executor, capacity: Some(Capacity::Spot) }];
        let mended = bench.mend(&live, Some(policy("0.5", 0)?), DAY).await?;
        assert_eq!(mended.drift.missing, u64::from(entered), "{executor}");
        assert_eq!(mended.recheck_after.is_some(), !entered, "{executor}");
    }
    Ok(())
}

#[tokio::test]
async fn a_superseded_reconcile_writes_nothing_and_renews_no_ttl() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(3).await?;
    bench.shorten_lives().await?;
    let before = bench.dump().await?;
    let seen = JobState { live: &[live("e1", Some(Capacity::OnDemand))], ..JobState::default() };
    let reconciled = bench.ledger.reconcile(JOB, &seen, Duration::ZERO, Term(0)).await?;
    assert_eq!(reconciled, ReconcileOutcome::Superseded(Term(1)));
    assert_eq!(bench.dump().await?, before);
    let (count, pods) = bench.lives().await?;
    assert!(count <= 1_000 && pods <= 1_000, "{count} s and {pods} s");
    Ok(())
}

#[tokio::test]
async fn an_invalid_term_counts_as_none() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(1).await?;
    for term in ["", "later", "-5", "9e9"] {
        bench.ask::<()>(cmd("HSET").arg(COUNT).arg("term").arg(term)).await?;
        bench.mend(&[live("e1", None)], None, DAY).await?;
        assert_eq!(bench.hash(COUNT).await?.get("term").map(String::as_str), Some("1"), "{term:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_heartbeat_is_returned_until_the_data_is_lost() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    for _ in 0..2 {
        assert_eq!(bench.ledger.heartbeat(1).await?, None);
        assert_eq!(bench.ledger.heartbeat(2).await?, Some(1));
        bench.server.flush().await?;
    }
    for edited in ["", "many", "-1", "18446744073709551616"] {
        bench.ask::<()>(cmd("SET").arg(MARK).arg(edited)).await?;
        assert_eq!(bench.ledger.heartbeat(3).await?, None, "{edited:?}");
        assert_eq!(bench.ledger.heartbeat(3).await?, Some(3));
    }
    Ok(())
}

/// The jobs that are told, and in how many pages.
async fn told(ledger: &RedisLedger) -> Result<(Vec<JobId>, usize)> {
    let (mut jobs, mut from, mut pages) = (BTreeSet::new(), Some(None), 0);
    while let Some(cursor) = from {
        let page = ledger.list_jobs(cursor).await?;
        anyhow::ensure!(page.jobs.len() < 1_000, "{} jobs in a page", page.jobs.len());
        jobs.extend(page.jobs);
        from = page.next.map(Some);
        pages += 1;
    }
    Ok((jobs.into_iter().collect(), pages))
}

#[tokio::test]
async fn keys_of_other_kinds_are_skipped() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(1).await?;
    let odd = JobRef { namespace: "etl", app_id: "}:{a:b}:" };
    bench.ledger.learn(odd, policy("0.5", 0)?).await?;
    let hashes: [&[u8]; 9] = [
        b"exec-count:etl:a",
        b"exec-count:{etl}",
        b"exec-count:{etl:a",
        b"exec-count:{etl:a}b",
        b"exec-counts:{etl:a}",
        b"an-exec-count:{etl:a}",
        b"exec-pods:{etl:a}",
        b"EXEC-COUNT:{etl:a}",
        b"exec-count:{etl:\xff\xfe}",
    ];
    for key in hashes {
        bench.ask::<()>(cmd("HSET").arg(key).arg("spot").arg(1)).await?;
    }
    bench.ask::<()>(cmd("SET").arg("exec-count:{etl:text}").arg(1)).await?;
    bench.ask::<()>(cmd("RPUSH").arg("exec-count:{etl:list}").arg(1)).await?;
    assert_eq!(told(&bench.ledger).await?.0, [JOB.to_job_id(), odd.to_job_id()]);
    Ok(())
}

#[tokio::test]
async fn jobs_are_listed_in_pages_that_cost_the_server_little() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    const JOBS: usize = 3_000;
    for number in 0..JOBS {
        let id = format!("spark-{number}");
        bench.ledger.learn(JobRef { namespace: "etl", app_id: &id }, policy("0.5", 0)?).await?;
    }
    // Others have keys there too.
    for number in 0..20 {
        let pairs: Vec<String> = (0..1_000).flat_map(|key| [format!("other-{number}-{key}"), String::new()]).collect();
        bench.ask::<()>(cmd("MSET").arg(pairs)).await?;
    }
    bench.forget_commands().await?;
    let (jobs, pages) = told(&bench.ledger).await?;
    assert_eq!(jobs.len(), JOBS);
    assert!((30..100).contains(&pages), "{pages} pages");
    assert_eq!(bench.commands().await?, BTreeMap::from([("scan".to_owned(), pages as u64)]));
    Ok(())
}

#[tokio::test]
async fn scripts_that_the_server_lost_are_loaded_again() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(2).await?;
    for _ in 0..2 {
        bench.ask::<()>(cmd("SCRIPT").arg("FLUSH")).await?;
        assert!(counts(bench.ledger.place(JOB, &request("e1")).await?).is_some());
        bench.ledger.peek(JOB, &request("e1")).await?;
        bench.ledger.learn(JOB, policy("0.5", 0)?).await?;
        bench.mend(&[live("e1", None)], None, DAY).await?;
        bench.ledger.release(JOB, "unknown", None).await?;
        assert!(bench.ledger.counts(JOB).await?.is_some());
        bench.ledger.heartbeat(1).await?;
        assert!(bench.ledger.get(JOB).await?.is_some());
    }
    Ok(())
}

#[tokio::test]
async fn one_call_is_one_command_to_the_server_however_large_the_job() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(1).await?;
    // So that the server knows the scripts.
    bench.ledger.place(JOB, &request("new")).await?;
    bench.ledger.peek(JOB, &request("new")).await?;
    bench.ledger.release(JOB, "new", None).await?;
    bench.ledger.counts(JOB).await?;
    bench.ledger.heartbeat(1).await?;
    for executors in [10, 10_000] {
        bench.ask::<()>(cmd("DEL").arg(COUNT).arg(PODS)).await?;
        bench.fill(executors).await?;

        // None of these costs more in a larger hash.
        let expected: [(&str, &[&str]); 6] = [
            ("a new executor", &["evalsha", "hget", "hlen", "hmget", "hset", "hset", "pexpire", "pexpire", "time"]),
            ("a known one", &["evalsha", "hget", "hlen", "hmget", "hset", "pexpire", "pexpire", "time"]),
            ("a dry run", &["evalsha", "hget", "hlen", "hmget"]),
            ("a release", &["evalsha", "hdel", "hget", "hlen", "hmget", "hset", "pexpire", "pexpire"]),
            ("a tally", &["evalsha", "hlen", "hmget", "pexpire", "pexpire"]),
            ("a mark", &["evalsha", "get", "set"]),
        ];
        for (number, (what, commands)) in expected.iter().enumerate() {
            bench.forget_commands().await?;
            match number {
                0 | 1 => drop(bench.ledger.place(JOB, &request("new")).await?),
                2 => drop(bench.ledger.peek(JOB, &request("new")).await?),
                3 => drop(bench.ledger.release(JOB, "new", None).await?),
                4 => drop(bench.ledger.counts(JOB).await?),
                _ => drop(bench.ledger.heartbeat(1).await?),
            }
            let ran = bench.commands().await?;
            let ran: Vec<&str> =
                ran.iter().flat_map(|(name, calls)| std::iter::repeat_n(name.as_str(), *calls as usize)).collect();
            assert_eq!(&ran, commands, "{what} in a job of {executors}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_full_server_refuses_and_nothing_is_half_written() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(2).await?;
    let before = bench.dump().await?;
    bench.ask::<()>(cmd("CONFIG").arg("SET").arg("maxmemory").arg(1)).await?;
    let error = bench.ledger.place(JOB, &request("new")).await.err().context("there was memory")?;
    assert!(
        matches!(&error, StoreError::Refused { code, detail } if format!("{code} {detail}").contains("OOM")),
        "{error}"
    );
    bench.ask::<()>(cmd("CONFIG").arg("SET").arg("maxmemory").arg(0)).await?;
    assert_eq!(bench.dump().await?, before);
    assert_eq!(counts(bench.ledger.place(JOB, &request("new")).await?), Some((2, 1)));
    Ok(())
}

#[tokio::test]
async fn a_key_of_another_type_is_refused_and_nothing_is_half_written() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    for (text, whole) in [(COUNT, PODS), (PODS, COUNT)] {
        bench.ask::<()>(&cmd("FLUSHALL")).await?;
        bench.ask::<()>(cmd("SET").arg(text).arg("12")).await?;
        let looked_up = PlaceRequest { policy: Some(policy("1", 0)?), ..request("new") };
        let error = bench.ledger.place(JOB, &looked_up).await.err().context("a string was read as a hash")?;
        assert_eq!(error.kind(), "refused");
        assert!(error.to_string().contains("WRONGTYPE"), "{error}");
        assert!(bench.hash(whole).await?.is_empty());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_calls_at_once_share_one_connection() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("0.5", 0)?).await?;
    // Its own and the ledger's; the one by which the server was seen to start may still be closing.
    let clients = 2;
    wait::until_true(Duration::from_secs(10), "the connections", async || Ok(bench.clients().await? == clients))
        .await?;
    let ledger = std::sync::Arc::new(connect(&bench.server, DAY).await?);
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..3_000 {
        let ledger = std::sync::Arc::clone(&ledger);
        calls.spawn(async move { ledger.place(JOB, &request(&format!("e{number}"))).await });
    }
    for outcome in calls.join_all().await {
        outcome?;
    }
    assert_eq!(bench.clients().await?, clients + 1);
    assert_eq!(bench.noted().await?, ("1500".to_owned(), "1500".to_owned()));

    // The last handle takes the connection with it.
    drop(ledger);
    wait::until_true(Duration::from_secs(10), "the connection to close", async || Ok(bench.clients().await? == clients))
        .await
}
