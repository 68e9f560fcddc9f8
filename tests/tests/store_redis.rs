//! The Redis ledger keeps the contract, and keeps its two keys true whatever happens to them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use balancer_core::{
    Capacity, Counts, Drift, JobId, JobRef, JobState, LedgerFault, LiveExecutor, PlaceOutcome, PlaceRequest, Placed,
    Policy, PolicyOverrides, ReconcileOutcome, ReconcileSummary, SpotAnswer, Steer, SteerOutcome, Steering, Term,
};
use balancer_store::{Ledger, RedisLedger, RedisOptions, StoreError};
use balancer_tests::need;
use balancer_tests::placement::request;
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
    Ok(RedisLedger::connect(&server.url(), RedisOptions::new(Duration::from_secs(10), ttl)).await?)
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
        let now: (u64, u64) = self.ask(&cmd("TIME")).await?;
        self.ask(cmd("HSET").arg(COUNT).arg("kept-until").arg((now.0 + 1_000) * 1_000)).await
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

    /// A reconcile in the first term that names all executors: those that are live, and all others in the ledger as gone.
    async fn mend(
        &self,
        live: &[LiveExecutor<'_>],
        policy: Option<Policy>,
        grace: Duration,
    ) -> Result<ReconcileSummary> {
        let overrides = policy.map(PolicyOverrides::from).unwrap_or_default();
        let mut connection = self.redis.clone();
        // A key of another type has none.
        let keys: Vec<String> = cmd("HKEYS").arg(PODS).query_async(&mut connection).await.unwrap_or_default();
        let known: HashSet<&str> = live.iter().map(|live| live.key).collect();
        let gone: Vec<&str> = keys.iter().map(String::as_str).filter(|key| !known.contains(key)).collect();
        let seen = JobState { live, gone: &gone, overrides, ..JobState::default() };
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

fn live(executor: &str, capacity: Option<Capacity>) -> LiveExecutor<'_> {
    LiveExecutor { key: executor, uid: "9f1c", capacity, states_ratio: false }
}

fn counts(outcome: PlaceOutcome) -> Option<(u64, u64)> {
    match outcome {
        PlaceOutcome::Placed(placed) => Some((placed.counts.spot, placed.counts.on_demand)),
        PlaceOutcome::NoLedger | PlaceOutcome::NeedPolicy | PlaceOutcome::OptedOut { .. } => None,
    }
}

/// Places an executor that states nothing.
async fn place(bench: &Bench, executor: &str) -> Result<Placed> {
    match bench.ledger.place(JOB, &request(executor)).await? {
        PlaceOutcome::Placed(placed) => Ok(placed),
        other => anyhow::bail!("{other:?}"),
    }
}

#[tokio::test]
async fn a_person_can_read_the_two_keys_of_a_job() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("0.7", 1)?, Some("etl-driver"), true).await?;
    for executor in ["a", "b", "c"] {
        bench.ledger.place(JOB, &request(executor)).await?;
    }
    bench.mend(&[live("a", None)], None, DAY).await?;
    let policy = "spot-ratio=0.7 on-demand-base=1";
    let fields =
        [("driver", "etl-driver"), ("on-demand", "2"), ("policy", policy), ("spot", "1"), ("term", "1"), ("v", "1")];
    let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut record = bench.hash(COUNT).await?;
    let kept_until: u64 = record.remove("kept-until").context("no kept-until")?.parse()?;
    let waiting: Vec<_> = ["b", "c"].map(|executor| record.remove(&format!("wait:{executor}"))).into();
    assert_eq!(record, BTreeMap::from(fields));

    let (seconds, _): (i64, i64) = bench.ask(&cmd("TIME")).await?;
    let pods = bench.hash(PODS).await?;
    let mut entries = Vec::new();
    for (executor, entry) in &pods {
        let [capacity, placed, uid] = entry.splitn(3, ' ').collect::<Vec<_>>()[..] else { anyhow::bail!("{entry}") };
        assert!((seconds - placed.parse::<i64>()? / 1_000).abs() < 60, "{entry}");
        entries.push((executor.as_str(), capacity, uid));
        let waits = waiting.iter().any(|since| since.as_deref() == Some(placed));
        assert!(uid != "-" || waits, "{executor} waits, and its record does not say so");
    }
    let day_and_half = u64::try_from(seconds)? * 1_000 + 129_600_000;
    assert!(kept_until.abs_diff(day_and_half) < 60_000, "{kept_until}");
    assert_eq!(entries, [("a", "on-demand", "9f1c"), ("b", "spot", "-"), ("c", "on-demand", "-")]);
    Ok(())
}

#[tokio::test]
async fn a_job_that_is_opted_out_has_a_record_with_its_policy_alone() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let asked = PlaceRequest { policy: Some(policy("off", 0)?), driver: Some("etl-driver"), ..request("e1") };
    assert_eq!(bench.ledger.place(JOB, &asked).await?, PlaceOutcome::OptedOut { is_new_job: true });
    let policy_text = "spot-ratio=off on-demand-base=0";
    let fields = [("driver", "etl-driver"), ("policy", policy_text), ("v", "1")];
    let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let mut record = bench.hash(COUNT).await?;
    assert!(record.remove("kept-until").is_some());
    assert_eq!(record, BTreeMap::from(fields));
    assert!(bench.hash(PODS).await?.is_empty());
    // Half of a policy is none, as in a job with a ratio.
    for half in ["spot-ratio=off", "spot-ratio=off on-demand-base=-1", "spot-ratio=offer on-demand-base=0"] {
        bench.ask::<()>(cmd("HSET").arg(COUNT).arg("policy").arg(half)).await?;
        assert_eq!(bench.ledger.place(JOB, &request("e1")).await?, PlaceOutcome::NeedPolicy, "{half}");
    }
    Ok(())
}

#[tokio::test]
async fn a_record_without_a_driver_gets_the_first_that_is_named() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let of = |driver, executor| PlaceRequest { driver: Some(driver), ..request(executor) };
    for way in 0..3 {
        bench.ask::<()>(&cmd("FLUSHALL")).await?;
        bench.fill(2).await?;
        assert_eq!(bench.hash(COUNT).await?.get("driver"), None);
        bench.ledger.place(JOB, &request("e0")).await?;
        bench.ledger.release(JOB, "e1", Some("u"), Some("etl-driver")).await?;
        bench.ledger.peek(JOB, &of("etl-driver", "new")).await?;
        assert_eq!(bench.hash(COUNT).await?.get("driver"), None, "no executor of it was placed");
        let state = JobState { live: &[live("e0", None)], driver: Some("etl-driver"), ..JobState::default() };
        match way {
            0 => drop(bench.ledger.place(JOB, &of("etl-driver", "new")).await?),
            1 => drop(bench.ledger.place(JOB, &of("etl-driver", "e0")).await?),
            _ => drop(bench.ledger.reconcile(JOB, &state, DAY, Term(1)).await?),
        }
        bench.ledger.place(JOB, &of("etl-driver-2", "e0")).await?;
        assert_eq!(bench.hash(COUNT).await?.get("driver").map(String::as_str), Some("etl-driver"), "way {way}");
    }
    Ok(())
}

#[tokio::test]
async fn a_call_for_another_driver_changes_nothing_in_the_ledger_of_the_first() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("0.5", 0)?, Some("first"), true).await?;
    bench.ledger.place(JOB, &request("e1")).await?;
    bench.shorten_lives().await?;
    let dump = async |bench: &mut Bench| -> Result<[Vec<u8>; 2]> {
        Ok([bench.ask(cmd("DUMP").arg(COUNT)).await?, bench.ask(cmd("DUMP").arg(PODS)).await?])
    };
    let before = dump(&mut bench).await?;
    let asked = PlaceRequest { driver: Some("second"), policy: Some(policy("1", 0)?), ..request("e1") };
    bench.ledger.peek(JOB, &asked).await?;
    assert_eq!(counts(bench.ledger.place(JOB, &asked).await?), Some((1, 0)));
    bench.ledger.learn(JOB, policy("0", 0)?, Some("second"), true).await?;
    bench.ledger.learn(JOB, policy("0", 0)?, Some("d1"), true).await?;
    let second = bench.hash("exec-count:{etl:spark-1/second}").await?;
    assert_eq!(second.get("policy").map(String::as_str), Some("spot-ratio=0 on-demand-base=0"));
    assert_eq!(bench.ledger.release(JOB, "e1", None, Some("second")).await?, Some(Capacity::Spot));
    assert_eq!(dump(&mut bench).await?, before);
    let (count, pods) = bench.lives().await?;
    assert!(count <= 1_000 && pods <= 1_000, "{count} s and {pods} s");
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
            2 => drop(bench.ledger.release(JOB, "e1", None, None).await?),
            3 => drop(bench.ledger.release(JOB, "unknown", None, None).await?),
            4 => drop(bench.ledger.learn(JOB, policy("0.1", 0)?, Some("d1"), true).await?),
            5 => drop(bench.ledger.record(JOB).await?),
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
    bench.ledger.learn(JOB, policy("0.5", 0)?, Some("d1"), true).await?;
    bench.ledger.heartbeat(1).await?;
    let begin = Instant::now();
    bench.ledger.place(JOB, &request("e1")).await?;
    let ledger = &bench.ledger;
    wait::until_true(Duration::from_secs(10), "the ledger to go", async || Ok(ledger.get(JOB).await?.is_none()))
        .await?;
    assert!(begin.elapsed() >= ttl, "gone after {:?}", begin.elapsed());
    assert_eq!((bench.ledger.record(JOB).await?, told(&bench.ledger).await?.0), (None, Vec::new()));
    // The note of the placement may have been made a little later than the placement.
    wait::until_true(Duration::from_secs(10), "all keys to go", async || {
        Ok(bench.ask::<u64>(&cmd("DBSIZE")).await? == 0)
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn a_broken_record_is_repaired_by_the_next_reconcile() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let now = [live("e1", Some(Capacity::Spot)), live("e2", Some(Capacity::OnDemand))];
    let term = |value: &str| cmd("HSET").arg(COUNT).arg("term").arg(value).to_owned();
    let text = |key: &str| cmd("SET").arg(key).arg("text").to_owned();
    let edits = [
        (vec![term("3000000000")], Some(LedgerFault::Term)),
        (vec![term("1000002")], Some(LedgerFault::Term)),
        (vec![term("1000000001")], Some(LedgerFault::Term)),
        (vec![term("18446744073709551616")], Some(LedgerFault::Term)),
        (vec![term("-1")], Some(LedgerFault::Term)),
        (vec![term("1e3")], Some(LedgerFault::Term)),
        (vec![term("")], Some(LedgerFault::Term)),
        (vec![term("0000000000000")], None),
        (vec![text(COUNT)], Some(LedgerFault::Type)),
        (vec![text(PODS)], Some(LedgerFault::Type)),
        (vec![cmd("DEL").arg(PODS).to_owned(), cmd("RPUSH").arg(PODS).arg("e1").to_owned()], Some(LedgerFault::Type)),
        (vec![cmd("HSET").arg(COUNT).arg("spot").arg("-5").arg("on-demand").arg("7").to_owned()], None),
        (vec![cmd("HSET").arg(COUNT).arg("spot").arg("inf").to_owned()], None),
        (vec![cmd("HSET").arg(COUNT).arg("spot").arg("0x1").to_owned()], None),
        (vec![cmd("HSET").arg(COUNT).arg("released").arg("9999999999999:").to_owned()], None),
        (vec![cmd("HSET").arg(PODS).arg("e1").arg("spot 99999999999999999999999 -").to_owned()], None),
    ];
    for (edit, fault) in edits {
        bench.ask::<()>(&cmd("FLUSHALL")).await?;
        bench.mend(&now, Some(policy("0.5", 0)?), DAY).await?;
        for command in &edit {
            bench.ask::<()>(command).await?;
        }
        // An admission and an audit may come first; they must not fail for another reason than the type.
        let placed = bench.ledger.place(JOB, &request("e2")).await;
        let record = bench.ledger.record(JOB).await;
        if fault != Some(LedgerFault::Type) {
            assert!(placed.is_ok() && record.is_ok(), "{edit:?}: {placed:?} {record:?}");
        }
        let summary = bench.mend(&now, Some(policy("0.5", 0)?), DAY).await?;
        assert_eq!((summary.fault, summary.counts), (fault, Counts { spot: 1, on_demand: 1 }), "{edit:?}");
        let summary = bench.mend(&now, Some(policy("0.5", 0)?), DAY).await?;
        assert_eq!((summary.fault, summary.drift), (None, Drift::default()), "{edit:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_state_of_spot_that_no_script_wrote_counts_as_open() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("1", 0)?, Some("d1"), true).await?;
    let later = "99999999999999";
    let close = Steer::CloseSpot { retry_after: 86_400_000 };
    let edits = [
        String::new(),
        "open".to_owned(),
        "starved".to_owned(),
        "starved 1".to_owned(),
        format!("starved x {later}"),
        format!("starved -1 {later}"),
        format!("starved  1 {later}"),
        format!("starved 1 {later}99"),
        format!("starved 1 {later} 1"),
        format!("Starved 1 {later}"),
        format!("closed 1 {later}"),
        "probing 1 ".to_owned(),
        "probing x e0".to_owned(),
    ];
    for (number, edit) in edits.iter().enumerate() {
        bench.ask::<()>(cmd("HSET").arg(COUNT).arg("spot-state").arg(edit)).await?;
        let executor = format!("e{number}");
        let placed = place(&bench, &executor).await?;
        assert_eq!((placed.capacity, placed.spot), (Capacity::Spot, SpotAnswer::Unchanged), "{edit:?}");
        let record = bench.ledger.record(JOB).await?.context("no record")?;
        let ledger = bench.ledger.get(JOB).await?.context("no ledger")?;
        let summary = bench.mend(&[], None, DAY).await?;
        for steering in [&record.steering, ledger.steering(), &summary.steering] {
            assert_eq!(*steering, Steering::default(), "{edit:?}");
        }
        assert_eq!(bench.ledger.steer(JOB, close, Term(1)).await?, SteerOutcome::Done);
        let executor = format!("f{number}");
        let closed = place(&bench, &executor).await?;
        assert_eq!((closed.capacity, closed.spot), (Capacity::OnDemand, SpotAnswer::Closed), "{edit:?}");
    }
    Ok(())
}

#[tokio::test]
async fn instance_types_to_avoid_that_no_script_wrote_count_as_none() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("1", 0)?, Some("d1"), true).await?;
    let nine = ["a"; 9].join(" ");
    let (long, longer) = ("a".repeat(64), "a ".repeat(300));
    for edit in ["", " ", "a,b", "a  b", " a", "a ", "-a", "a probe", "\u{e4}", "a\0", &nine, &long, &longer] {
        bench.ask::<()>(cmd("HSET").arg(COUNT).arg("avoid").arg(edit)).await?;
        let avoid = if edit == "a probe" { vec!["a".to_owned(), "probe".to_owned()] } else { Vec::new() };
        let placed = place(&bench, "e1").await?;
        assert_eq!((placed.spot, &placed.spread.avoid), (SpotAnswer::Unchanged, &avoid), "{edit:?}");
        let record = bench.ledger.record(JOB).await?.context("no record")?;
        let ledger = bench.ledger.get(JOB).await?.context("no ledger")?;
        let summary = bench.mend(&[], None, DAY).await?;
        for steering in [&record.steering, ledger.steering(), &summary.steering] {
            assert_eq!(steering.avoid, avoid, "{edit:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn spot_that_was_closed_in_the_future_as_the_clock_goes_is_probed() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("1", 0)?, Some("d1"), true).await?;
    let state = "starved 99999999999998 99999999999999";
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg("spot-state").arg(state)).await?;
    assert_eq!(place(&bench, "e1").await?.spot, SpotAnswer::Probe);
    // If it finds no node, spot is closed from now on.
    bench.ledger.steer(JOB, Steer::CloseSpot { retry_after: 86_400_000 }, Term(1)).await?;
    assert_eq!(place(&bench, "e2").await?.spot, SpotAnswer::Closed);
    Ok(())
}

#[tokio::test]
async fn a_placement_in_the_future_waits_for_the_grace_from_now_on() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(1).await?;
    bench.ask::<()>(cmd("HSET").arg(PODS).arg("e1").arg("spot 99999999999999 -")).await?;
    let grace = Duration::from_secs(60);
    let summary = bench.mend(&[], None, grace).await?;
    let [waiting] = &summary.waiting[..] else { anyhow::bail!("{summary:?}") };
    assert_eq!((waiting.placement.key.as_str(), waiting.age), ("e1", 0));
    assert_eq!(bench.mend(&[], None, Duration::ZERO).await?.counts, Counts::default());
    Ok(())
}

#[tokio::test]
async fn an_unknown_job_leaves_no_key() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.place(JOB, &request("e1")).await?;
    bench.ledger.release(JOB, "e1", Some("u"), None).await?;
    bench.mend(&[live("e1", None)], None, Duration::ZERO).await?;
    bench.ledger.record(JOB).await?;
    assert_eq!(bench.ask::<u64>(&cmd("DBSIZE")).await?, 0);
    Ok(())
}

#[tokio::test]
async fn an_empty_ledger_leaves_no_key() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let seen = [live("e1", Some(Capacity::Spot)), live("e2", Some(Capacity::OnDemand))];
    let ended = JobState { ended: true, gone: &["e2"], ..JobState::default() };
    for way in 0..3 {
        bench.mend(&seen, None, DAY).await?;
        bench.ledger.release(JOB, "e1", Some("9f1c"), None).await?;
        match way {
            0 => drop(bench.ledger.release(JOB, "e2", Some("9f1c"), None).await?),
            1 => drop(bench.mend(&[], None, DAY).await?),
            _ => {
                bench.ledger.learn(JOB, policy("0.5", 0)?, Some("d1"), true).await?;
                bench.ledger.reconcile(JOB, &ended, DAY, Term(1)).await?;
            }
        }
        // What Redis frees in the background is no longer a key.
        assert_eq!(bench.ask::<u64>(&cmd("DBSIZE")).await?, 0, "way {way}");
    }
    Ok(())
}

#[tokio::test]
async fn the_stored_counts_match_the_entries_after_every_change() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("0.5", 1)?, Some("d1"), true).await?;
    let required = |executor, capacity| PlaceRequest { required: Some(capacity), ..request(executor) };
    for step in 0..9 {
        match step {
            0 => drop(bench.ledger.place(JOB, &request("a")).await?),
            1 => drop(bench.ledger.place(JOB, &request("b")).await?),
            2 => drop(bench.ledger.place(JOB, &request("a")).await?),
            3 => drop(bench.ledger.place(JOB, &required("a", Capacity::Spot)).await?),
            4 => drop(bench.ledger.place(JOB, &required("c", Capacity::OnDemand)).await?),
            5 => drop(bench.ledger.release(JOB, "c", None, None).await?),
            6 => drop(bench.ledger.release(JOB, "b", None, None).await?),
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
async fn lost_counts_are_counted_again_from_the_entries() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let names: Vec<String> = (0..7).map(|number| format!("e{number}")).collect();
    let mut all: Vec<_> = names.iter().map(|name| live(name, Some(Capacity::Spot))).collect();
    all.push(live("o", Some(Capacity::OnDemand)));
    let edits = [
        cmd("DEL").arg(COUNT).to_owned(),
        cmd("HDEL").arg(COUNT).arg("spot").to_owned(),
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
        bench.ledger.release(JOB, "e2", Some("9f1c"), None).await?;
        assert_eq!(bench.noted().await?, ("7".to_owned(), "1".to_owned()), "{edit:?}");
    }
    Ok(())
}

/// A placement trusts them, because it costs the same in every job. The audit reads the record of each job in turn.
#[tokio::test]
async fn edited_counts_and_lost_entries_are_corrected_by_the_next_record_or_reconcile() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let edits: [(Cmd, (u64, u64)); 2] =
        [(cmd("HSET").arg(COUNT).arg("spot").arg(100).to_owned(), (6, 0)), (cmd("DEL").arg(PODS).to_owned(), (1, 0))];
    for (edit, (spot, on_demand)) in edits {
        for by_reconcile in [false, true] {
            bench.ask::<()>(&cmd("FLUSHALL")).await?;
            bench.fill(5).await?;
            bench.ask::<()>(&edit).await?;
            place(&bench, "new").await.ok();
            let required = PlaceRequest { required: Some(Capacity::Spot), ..request("new") };
            bench.ledger.place(JOB, &required).await?;
            let counts = if by_reconcile {
                let outcome = bench.ledger.reconcile(JOB, &JobState::default(), DAY, Term(1)).await?;
                let ReconcileOutcome::Done(summary) = outcome else { anyhow::bail!("{outcome:?}") };
                summary.counts
            } else {
                bench.ledger.record(JOB).await?.context("no record")?.counts
            };
            assert_eq!(counts, Counts { spot, on_demand }, "{edit:?}");
            assert_eq!(bench.noted().await?, (spot.to_string(), on_demand.to_string()), "{edit:?}");
            let lives = bench.lives().await?;
            assert!(lives.0 > 86_390 && lives.1 > 86_390, "{edit:?}: {lives:?}");
        }
    }
    Ok(())
}

/// No script goes through so many entries. The reconciler then lists them in pages, and corrects the counts.
#[tokio::test]
async fn a_large_ledger_that_has_lost_its_counts_gets_an_estimate_until_they_are_corrected() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let names: Vec<String> = (0..3_000).map(|number| format!("e{number}")).collect();
    let capacity = |number| Some(if number % 3 == 0 { Capacity::OnDemand } else { Capacity::Spot });
    let all: Vec<_> = names.iter().enumerate().map(|(number, name)| live(name, capacity(number))).collect();
    let right = Counts { spot: 2_000, on_demand: 1_000 };
    assert_eq!(bench.mend(&all, Some(policy("0.5", 0)?), DAY).await?.counts, right);
    bench.ask::<()>(cmd("HDEL").arg(COUNT).arg("spot").arg("on-demand")).await?;
    let name_none = async |bench: &Bench| {
        let outcome = bench.ledger.reconcile(JOB, &JobState::default(), DAY, Term(1)).await?;
        let ReconcileOutcome::Done(summary) = outcome else { anyhow::bail!("{outcome:?}") };
        Ok((summary.counts, summary.has_exact_counts))
    };
    let placed = place(&bench, "new").await?;
    assert_eq!(placed.counts.total(), 3_001);
    bench.ledger.release(JOB, "new", None, None).await?;
    let (estimate, is_exact) = name_none(&bench).await?;
    assert!(!is_exact && estimate.total() == 3_000 && estimate.spot.abs_diff(2_000) < 300, "{estimate:?}");
    let correct = async |bench: &Bench, found, term| bench.ledger.correct_counts(JOB, found, Term(term)).await;
    assert!(!correct(&bench, right, 1).await?, "nobody began to count");
    bench.ledger.begin_count(JOB, Term(0)).await?;
    assert!(!bench.ask::<bool>(cmd("HEXISTS").arg(COUNT).arg("counting")).await?, "the term is an earlier one");
    bench.ledger.begin_count(JobRef { app_id: "spark-2", ..JOB }, Term(1)).await?;
    assert!(!bench.ask::<bool>(cmd("EXISTS").arg("exec-count:{etl:spark-2}")).await?, "there is nothing to count");
    bench.ledger.begin_count(JOB, Term(1)).await?;
    assert!(!correct(&bench, Counts { spot: 2_001, ..right }, 1).await?, "another number");
    assert!(!correct(&bench, right, 2).await?, "another term began");
    assert!(!correct(&bench, right, 0).await?);
    assert!(correct(&bench, right, 1).await?);
    assert!(!correct(&bench, right, 1).await?, "it has ended");
    assert_eq!(name_none(&bench).await?, (right, true));
    Ok(())
}

/// Each change leaves as many entries as before, so nothing else shows that a listing may have missed one.
#[tokio::test]
async fn counts_are_not_corrected_once_an_entry_has_changed_meanwhile() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let names: Vec<String> = (0..600).map(|number| format!("e{number}")).collect();
    let all: Vec<_> = names.iter().map(|name| live(name, Some(Capacity::Spot))).collect();
    let wrong = Counts { spot: 599, on_demand: 1 };
    for change in ["none", "place", "release", "reconcile", "remove"] {
        bench.ask::<()>(&cmd("FLUSHALL")).await?;
        bench.mend(&all, Some(policy("1", 0)?), DAY).await?;
        place(&bench, "waiting").await?;
        bench.ledger.begin_count(JOB, Term(1)).await?;
        // Placing again changes nothing.
        place(&bench, "waiting").await?;
        assert_eq!(bench.ask::<String>(cmd("HGET").arg(COUNT).arg("counting")).await?, "1", "it has begun");
        let state = JobState { gone: &["waiting"], ..JobState::default() };
        match change {
            "none" => {}
            "place" => drop(place(&bench, "another").await?),
            "release" => drop(bench.ledger.release(JOB, "e1", Some("9f1c"), None).await?),
            "reconcile" => drop(bench.ledger.reconcile(JOB, &state, Duration::ZERO, Term(1)).await?),
            _ => {
                let outcome = bench.ledger.reconcile(JOB, &state, DAY, Term(1)).await?;
                let ReconcileOutcome::Done(summary) = outcome else { anyhow::bail!("{outcome:?}") };
                let absent: Vec<_> = summary.waiting.into_iter().map(|waiting| waiting.placement).collect();
                bench.ledger.remove_unconfirmed(JOB, &absent, Term(1)).await?;
            }
        }
        let number: u64 = bench.ask(cmd("HLEN").arg(PODS)).await?;
        let found = Counts { spot: number - wrong.on_demand, ..wrong };
        assert_eq!(bench.ledger.correct_counts(JOB, found, Term(1)).await?, change == "none", "{change}");
    }
    Ok(())
}

#[tokio::test]
async fn counts_below_the_entries_never_become_negative() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(600).await?;
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg("spot").arg(0).arg("on-demand").arg(600)).await?;
    // One of these moves to the other capacity, and one goes.
    let required = PlaceRequest { required: Some(Capacity::OnDemand), ..request("e1") };
    let moved = counts(bench.ledger.place(JOB, &required).await?).context("not placed")?;
    assert_eq!(moved.0 + moved.1, 600);
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg("spot").arg(0).arg("on-demand").arg(600)).await?;
    let state = JobState { gone: &["e2"], ..JobState::default() };
    let outcome = bench.ledger.reconcile(JOB, &state, Duration::ZERO, Term(1)).await?;
    let ReconcileOutcome::Done(summary) = outcome else { anyhow::bail!("{outcome:?}") };
    assert_eq!(summary.counts.total(), 599);
    assert!(!bench.noted().await?.0.starts_with('-'));
    Ok(())
}

#[tokio::test]
async fn the_last_executor_takes_the_ledger_with_it_whatever_its_counts_say() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let required = PlaceRequest { required: Some(Capacity::Spot), ..request("only") };
    bench.ledger.place(JOB, &required).await?;
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg("spot").arg(7)).await?;
    bench.ledger.release(JOB, "only", None, None).await?;
    assert_eq!(bench.ask::<Vec<String>>(cmd("KEYS").arg("exec-[cp]o*")).await?, Vec::<String>::new());
    Ok(())
}

/// A key alone may be evicted if the server may do so.
#[tokio::test]
async fn a_key_that_was_written_anew_expires_after_the_next_reconcile() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(5).await?;
    bench.ask::<()>(cmd("DEL").arg(PODS)).await?;
    place(&bench, "new").await?;
    bench.ledger.reconcile(JOB, &JobState::default(), DAY, Term(1)).await?;
    let lives = bench.lives().await?;
    assert!(lives.0 > 86_390 && lives.1 > 86_390, "{lives:?}");
    Ok(())
}

/// A server without free memory lets a script write that has removed something before.
#[tokio::test]
async fn a_reconcile_on_a_full_server_removes_what_is_gone() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let full = async |bench: &mut Bench, limit: u64| {
        bench.ask::<()>(cmd("CONFIG").arg("SET").arg("maxmemory").arg(limit)).await
    };
    bench.ledger.learn(JOB, policy("1", 0)?, Some("d1"), true).await?;
    place(&bench, "old").await?;
    place(&bench, "young").await?;
    bench.mend(&[live("old", Some(Capacity::Spot))], None, DAY).await?;
    full(&mut bench, 1).await?;
    // A young placement is no reason to write.
    let reconcile = async |bench: &Bench, live: &[LiveExecutor<'_>], gone: &[&str]| {
        let state = JobState { live, gone, ..JobState::default() };
        let outcome = bench.ledger.reconcile(JOB, &state, DAY, Term(1)).await?;
        let ReconcileOutcome::Done(summary) = outcome else { anyhow::bail!("{outcome:?}") };
        anyhow::Ok((summary.counts.total(), summary.waiting.len()))
    };
    assert_eq!(reconcile(&bench, &[], &["young"]).await?, (2, 1));
    assert_eq!(reconcile(&bench, &[], &["old", "young"]).await?, (1, 1));
    full(&mut bench, 0).await?;
    bench.ledger.release(JOB, "young", None, None).await?;
    bench.mend(&[live("last", Some(Capacity::Spot))], None, DAY).await?;
    full(&mut bench, 1).await?;
    // The last entry goes, and another one comes.
    assert_eq!(reconcile(&bench, &[live("next", Some(Capacity::Spot))], &["last"]).await?, (1, 0));
    Ok(())
}

/// What another version has written, and goes on writing while it is replaced.
#[tokio::test]
async fn entries_of_the_version_before_are_found_by_name_and_wait_from_then_on() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    let (seconds, _): (i64, i64) = bench.ask(&cmd("TIME")).await?;
    let policy_text = "spot-ratio=0.5 on-demand-base=0";
    let record = [("v", "1"), ("spot", "2"), ("on-demand", "0"), ("policy", policy_text)];
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg(&record)).await?;
    let entry = |age: i64| format!("spot {} -", (seconds - age) * 1_000);
    bench.ask::<()>(cmd("HSET").arg(PODS).arg("young").arg(entry(1)).arg("old").arg(entry(600))).await?;
    // Its release does not remove the field that this version has written.
    place(&bench, "left").await?;
    bench.ask::<()>(cmd("HDEL").arg(PODS).arg("left")).await?;
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg("on-demand").arg(0)).await?;
    let name = async |bench: &Bench, gone: &[&str]| {
        let state = JobState { gone, ..JobState::default() };
        let outcome = bench.ledger.reconcile(JOB, &state, Duration::from_secs(60), Term(1)).await?;
        let ReconcileOutcome::Done(summary) = outcome else { anyhow::bail!("{outcome:?}") };
        let waiting: Vec<_> = summary.waiting.into_iter().map(|waiting| waiting.placement.key).collect();
        Ok((summary.counts.total(), waiting))
    };
    assert_eq!(name(&bench, &[]).await?, (2, Vec::new()), "nobody knows that they wait");
    assert!(!bench.hash(COUNT).await?.contains_key("wait:left"));
    assert_eq!(name(&bench, &["young", "old"]).await?, (1, vec!["young".to_owned()]));
    assert_eq!(name(&bench, &[]).await?, (1, vec!["young".to_owned()]));
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
    bench
        .ask::<()>(cmd("HSET").arg(COUNT).arg(&[("v", "2"), ("policy", stored), ("driver", "d1"), ("closed", "soon")]))
        .await?;
    assert_eq!(counts(bench.ledger.place(JOB, &request("e1")).await?), Some((1, 0)));
    let expect = async |bench: &mut Bench, known: &str| -> Result<()> {
        let record = bench.hash(COUNT).await?;
        let field = |name| record.get(name).map(String::as_str);
        assert_eq!((field("v"), field("closed")), (Some("2"), Some("soon")));
        assert_eq!(field("policy"), Some(format!("zones=3 {known} x=").as_str()));
        Ok(())
    };
    expect(&mut bench, "spot-ratio=0.5 on-demand-base=0").await?;
    bench.ledger.learn(JOB, policy("0.7", 2)?, Some("d1"), true).await?;
    expect(&mut bench, "spot-ratio=0.7 on-demand-base=2").await?;
    bench.mend(&[live("e1", None)], Some(policy("0.9", 1)?), DAY).await?;
    expect(&mut bench, "spot-ratio=0.9 on-demand-base=1").await?;
    bench.ledger.release(JOB, "e1", None, None).await?;
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
    bench.ask::<()>(cmd("HSET").arg(COUNT).arg(&[("policy", "lots of spot"), ("driver", "d1")])).await?;
    assert_eq!(bench.ledger.get(JOB).await?.and_then(|ledger| ledger.policy()), None);
    bench.ledger.learn(JOB, policy("0.7", 2)?, Some("d1"), true).await?;
    assert_eq!(bench.hash(COUNT).await?.remove("policy").as_deref(), Some("spot-ratio=0.7 on-demand-base=2"));
    Ok(())
}

#[tokio::test]
async fn an_invalid_entry_counts_as_on_demand_until_the_next_reconcile() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.fill(1).await?;
    bench.ask::<()>(cmd("HSET").arg(PODS).arg("x").arg("rubbish").arg("y").arg("").arg("z").arg("spot\0 1 -")).await?;
    bench.ledger.place(JOB, &request("y")).await?;
    assert_eq!(bench.ledger.record(JOB).await?.context("no record")?.counts, Counts { spot: 1, on_demand: 3 });
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
async fn the_age_of_a_placement_is_measured_on_the_servers_clock() -> Result<()> {
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
        // One that was placed in the future, as the clock goes, was placed when that was noticed.
        ("ahead", ago(-1_000, "-")),
    ];
    bench.ask::<()>(cmd("HSET").arg(PODS).arg(&entries)).await?;
    let mended = bench.mend(&[live("live", None)], None, DAY).await?;
    assert_eq!((mended.drift.stale, mended.counts), (2, Counts { spot: 4, on_demand: 0 }));
    let ages: Vec<_> =
        mended.waiting.iter().map(|waiting| (waiting.placement.key.as_str(), waiting.age / 1_000)).collect();
    let [("first", first), ("late", late), ("ahead", ahead)] = ages[..] else { anyhow::bail!("{ages:?}") };
    for (age, expected) in [(first, 80_000), (late, 50_000), (ahead, 0)] {
        assert!((expected..expected + 100).contains(&age), "{ages:?}");
    }
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
        let live = [LiveExecutor { key: executor, uid: executor, capacity: Some(Capacity::Spot), states_ratio: false }];
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
    bench.ledger.learn(odd, policy("0.5", 0)?, Some("d1"), true).await?;
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
        bench.ledger.learn(JobRef { namespace: "etl", app_id: &id }, policy("0.5", 0)?, Some("d1"), true).await?;
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
        bench.ledger.learn(JOB, policy("0.5", 0)?, Some("d1"), true).await?;
        bench.mend(&[live("e1", None)], None, DAY).await?;
        bench.ledger.release(JOB, "unknown", None, None).await?;
        assert!(bench.ledger.record(JOB).await?.is_some());
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
    // A moment later, by a script of its own, its job is added to a set.
    wait::until(wait::SOON, "the job in the set", async || {
        Ok(bench.commands().await?.contains_key("sadd").then_some(()))
    })
    .await?;
    bench.ledger.peek(JOB, &request("new")).await?;
    bench.ledger.release(JOB, "new", None, None).await?;
    bench.ledger.record(JOB).await?;
    bench.ledger.heartbeat(1).await?;
    // Spark's executors name their driver, whose creation has named it before.
    let asked = PlaceRequest { driver: Some("etl-driver"), ..request("new") };
    for executors in [10, 10_000] {
        bench.ask::<()>(cmd("DEL").arg(COUNT).arg(PODS)).await?;
        bench.fill(executors).await?;
        bench.ask::<()>(cmd("HSET").arg(COUNT).arg("driver").arg(asked.driver)).await?;
        bench.ledger.learn(JOB, policy("0.5", 0)?, asked.driver, true).await?;

        // None of these costs more in a larger hash.
        let expected: [(&str, &[&str]); 6] = [
            ("a new executor", &["evalsha", "hget", "hmget", "hset", "hset", "time"]),
            ("a known one", &["evalsha", "hget", "hmget", "hset", "hset", "time"]),
            ("a dry run", &["evalsha", "hget", "hmget"]),
            ("a release", &["evalsha", "hdel", "hdel", "hget", "hlen", "hmget", "hset", "time"]),
            ("a record", &["evalsha", "hlen", "hmget", "time"]),
            ("a mark", &["evalsha", "get", "set"]),
        ];
        for (number, (what, commands)) in expected.iter().enumerate() {
            bench.forget_commands().await?;
            match number {
                0 | 1 => drop(bench.ledger.place(JOB, &asked).await?),
                2 => drop(bench.ledger.peek(JOB, &asked).await?),
                3 => drop(bench.ledger.release(JOB, "new", None, asked.driver).await?),
                4 => drop(bench.ledger.record(JOB).await?),
                _ => drop(bench.ledger.heartbeat(1).await?),
            }
            let mut ran = bench.commands().await?;
            // Soon after a placement its job is added to a set, by a script of its own. It may run during any of the calls.
            if ran.remove("sadd").is_some() {
                for command in ["evalsha", "scard", "pexpire"] {
                    ran.entry(command.to_owned()).and_modify(|calls| *calls -= 1);
                }
            }
            ran.retain(|_, calls| *calls > 0);
            let ran: Vec<&str> =
                ran.iter().flat_map(|(name, calls)| std::iter::repeat_n(name.as_str(), *calls as usize)).collect();
            assert_eq!(&ran, commands, "{what} in a job of {executors}");
        }
    }
    Ok(())
}

/// The time is printed and not checked, because it depends on the machine. That nothing goes through the entries does not.
#[tokio::test]
async fn no_call_goes_through_the_entries_of_a_job_of_a_hundred_thousand_executors() -> Result<()> {
    need!(Redis);
    let mut bench = Bench::start().await?;
    bench.ledger.learn(JOB, policy("0.5", 0)?, Some("d1"), true).await?;
    let names: Vec<String> = (0..100_000).map(|number| format!("e{number}")).collect();
    let all: Vec<_> = names.iter().map(|name| live(name, Some(Capacity::Spot))).collect();
    bench.ask::<()>(cmd("CONFIG").arg("SET").arg("slowlog-log-slower-than").arg(0)).await?;
    bench.ask::<()>(cmd("CONFIG").arg("SET").arg("slowlog-max-len").arg(10_000)).await?;
    for live in all.chunks(256) {
        bench.ledger.reconcile(JOB, &JobState { live, ..JobState::default() }, DAY, Term(1)).await?;
    }
    // A small ledger is counted one by one.
    bench.forget_commands().await?;
    for number in 0..100 {
        bench.ledger.place(JOB, &request(&format!("new{number}"))).await?;
    }
    let gone: Vec<&str> = names.iter().take(256).map(String::as_str).collect();
    let state = JobState { gone: &gone, ..JobState::default() };
    let outcome = bench.ledger.reconcile(JOB, &state, DAY, Term(1)).await?;
    let ReconcileOutcome::Done(summary) = outcome else { anyhow::bail!("{outcome:?}") };
    assert_eq!((summary.counts.total(), summary.has_exact_counts), (99_844, true));
    let absent: Vec<_> = summary.waiting.into_iter().map(|waiting| waiting.placement).collect();
    bench.ledger.remove_unconfirmed(JOB, &absent, Term(1)).await?;
    bench.ledger.release(JOB, "e500", Some("9f1c"), None).await?;
    let (mut listed, mut cursor) = (0, None);
    loop {
        let page = bench.ledger.entries(JOB, cursor).await?;
        listed += page.entries.len();
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    let record = bench.ledger.record(JOB).await?.context("no record")?;
    assert!(listed as u64 >= record.counts.total(), "{listed} of {:?}", record.counts);
    let ran = bench.commands().await?;
    assert!(!ran.contains_key("hgetall") && !ran.contains_key("hvals") && !ran.contains_key("hkeys"), "{ran:?}");
    let slowest: Vec<(i64, i64, u64)> = bench
        .ask::<Vec<(i64, i64, u64, Vec<String>, String, String)>>(cmd("SLOWLOG").arg("GET").arg(-1))
        .await?
        .into_iter()
        .map(|(id, at, micros, ..)| (id, at, micros))
        .collect();
    println!("longest of {} commands: {:?} µs", slowest.len(), slowest.iter().map(|(.., micros)| micros).max());
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
    assert!(matches!(&error, StoreError::Full(_)), "{error}");
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
    bench.ledger.learn(JOB, policy("0.5", 0)?, Some("d1"), true).await?;
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
