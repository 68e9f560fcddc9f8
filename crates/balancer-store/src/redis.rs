//! Ledgers in Redis: each job two keys, each change one atomic script (DESIGN section 6).

mod address;
mod link;
mod scripts;
mod tls;

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use balancer_core::{
    Capacity, Counts, Drift, Entry, JobId, JobLedger, JobRef, JobState, LiveExecutor, Millis, PlaceOutcome,
    PlaceRequest, Placed, Policy, PolicyOverrides, ReconcileOutcome, ReconcileSummary, Term,
};
use redis::{Cmd, RedisWrite, Value};

use self::address::Address;
pub use self::address::InvalidRedisUrl;
use self::link::Link;
use self::scripts::{Script, Scripts};
use crate::{JobPage, Ledger, StoreError};

/// How much longer than other calls a reconcile may take, for each live executor that it tells. The
/// server is at each for about 5 µs, and answers nobody meanwhile: 100,000 of them take as long as the
/// usual time-out. This leaves room for a server or a network four times as slow.
const PER_LIVE_EXECUTOR: Duration = Duration::from_micros(20);

/// How many of the server's keys are gone through for a page of jobs, at about 1 µs each.
const KEYS_PER_PAGE: usize = 500;

/// How a [`RedisLedger`] behaves.
#[derive(Clone, Copy, Debug)]
pub struct RedisOptions {
    /// The most that one call may take.
    pub timeout: Duration,
    /// How long a job's ledger outlives its last touch.
    pub ttl: Duration,
}

/// The ledgers in a Redis or Valkey server, 6.0 or newer.
///
/// One connection carries all calls at once. While there is none, or the server has stopped
/// answering on it, calls fail at once, and a task of this ledger's connects anew.
///
/// An ACL user of its own needs the keys `exec-count:*`, `exec-pods:*` and `exec-reconciler` and the
/// commands `evalsha`, `script|load`, `time`, `pexpire`, `hget`, `hmget`, `hlen`, `hset`, `hdel`, `hvals`,
/// `hgetall`, `del`, `scan`, `get` and `set`.
pub struct RedisLedger {
    link: Link,
    scripts: Scripts,
    /// In milliseconds, as the scripts take it.
    ttl: String,
}

impl RedisLedger {
    /// Connects to the server that the URL names.
    ///
    /// It waits for the connection for `options.timeout` at most, and succeeds without one too: a
    /// server that is down now is connected to once it is up. Only a URL that cannot be read is an
    /// error. Has to be called on a Tokio runtime.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self, InvalidRedisUrl> {
        let ttl = millis(options.ttl).to_string();
        let link = Link::open(Address::parse(url)?, options.timeout).await;
        Ok(Self { link, scripts: Scripts::default(), ttl })
    }

    /// `EVALSHA` of a script on a job's two keys, with room for so many more arguments.
    fn command(script: &Script, job: JobRef<'_>, arguments: usize, bytes: usize) -> Cmd {
        let JobRef { namespace, app_id: id } = job;
        let keys = 2 * (namespace.len() + id.len()) + "exec-count:{:}exec-pods:{:}".len();
        let mut command = Cmd::with_capacity(5 + arguments, "EVALSHA2".len() + script.sha().len() + keys + bytes);
        command.write_arg(b"EVALSHA");
        command.write_arg(script.sha().as_bytes());
        command.write_arg(b"2");
        command.write_arg_fmt(format_args!("exec-count:{{{namespace}:{id}}}"));
        command.write_arg_fmt(format_args!("exec-pods:{{{namespace}:{id}}}"));
        command
    }

    async fn ask(
        &self,
        script: &Script,
        job: JobRef<'_>,
        request: &PlaceRequest<'_>,
    ) -> Result<PlaceOutcome, StoreError> {
        let PlaceRequest { key: executor, required, overrides, policy } = *request;
        // Forty bytes hold two ratios and two bases.
        let mut command = Self::command(script, job, 7, self.ttl.len() + executor.len() + 40);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg(executor.as_bytes());
        // The usual executor tells nothing more.
        if required.is_some() || overrides != PolicyOverrides::default() || policy.is_some() {
            command.write_arg(text(required).as_bytes());
            write_or_nothing(&mut command, overrides.spot_ratio);
            write_or_nothing(&mut command, overrides.on_demand_base);
            write_policy(&mut command, policy);
        }
        match self.link.run(script, command).await? {
            Value::Nil => Ok(PlaceOutcome::NeedPolicy),
            Value::Int(number) if number >= 0 => Ok(PlaceOutcome::Placed(read_placed(number.unsigned_abs()))),
            other => Err(unreadable(&other)),
        }
    }
}

impl Ledger for RedisLedger {
    async fn place(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        self.ask(&self.scripts.place, job, request).await
    }

    async fn peek(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        self.ask(&self.scripts.peek, job, request).await
    }

    async fn release(
        &self,
        job: JobRef<'_>,
        executor: &str,
        uid: Option<&str>,
    ) -> Result<Option<Capacity>, StoreError> {
        let script = &self.scripts.release;
        let bytes = self.ttl.len() + executor.len() + uid.map_or(0, str::len);
        let mut command = Self::command(script, job, 4, bytes + 2);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg(executor.as_bytes());
        if let Some(uid) = uid {
            command.write_arg(uid.as_bytes());
            command.write_arg_fmt(JobLedger::RELEASED_REMEMBERED);
        }
        match self.link.run(script, command).await? {
            Value::Nil => Ok(None),
            Value::Int(1) => Ok(Some(Capacity::Spot)),
            Value::Int(0) => Ok(Some(Capacity::OnDemand)),
            other => Err(unreadable(&other)),
        }
    }

    async fn learn(&self, job: JobRef<'_>, policy: Policy) -> Result<(), StoreError> {
        let script = &self.scripts.learn;
        let mut command = Self::command(script, job, 3, self.ttl.len() + 20);
        command.write_arg(self.ttl.as_bytes());
        write_policy(&mut command, Some(policy));
        self.link.run(script, command).await.map(drop)
    }

    async fn reconcile(
        &self,
        job: JobRef<'_>,
        seen: &JobState<'_>,
        grace: Duration,
        term: Term,
    ) -> Result<ReconcileOutcome, StoreError> {
        let script = &self.scripts.reconcile;
        let JobState { live, overrides, ended } = *seen;
        let names: usize = live.iter().map(|live| live.key.len() + live.uid.len() + "on-demand".len()).sum();
        // Sixty bytes hold the grace, a ratio, a base and a term.
        let mut command = Self::command(script, job, 6 + 3 * live.len(), self.ttl.len() + 60 + names);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg_fmt(millis(grace));
        write_or_nothing(&mut command, overrides.spot_ratio);
        write_or_nothing(&mut command, overrides.on_demand_base);
        command.write_arg_fmt(term);
        command.write_arg(if ended { b"ended" } else { b"" });
        for &LiveExecutor { key: executor, uid, capacity } in live {
            command.write_arg(executor.as_bytes());
            command.write_arg(uid.as_bytes());
            command.write_arg(text(capacity).as_bytes());
        }
        let longer = PER_LIVE_EXECUTOR.saturating_mul(u32::try_from(live.len()).unwrap_or(u32::MAX));
        let answer = self.link.run_longer(script, command, longer).await?;
        read_reconciled(&answer).ok_or_else(|| unreadable(&answer))
    }

    async fn counts(&self, job: JobRef<'_>) -> Result<Option<Counts>, StoreError> {
        let script = &self.scripts.tally;
        let mut command = Self::command(script, job, 1, self.ttl.len());
        command.write_arg(self.ttl.as_bytes());
        match self.link.run(script, command).await? {
            Value::Nil => Ok(None),
            answer => match read_numbers(&answer) {
                Some([spot, on_demand]) => Ok(Some(Counts { spot, on_demand })),
                None => Err(unreadable(&answer)),
            },
        }
    }

    async fn list_jobs(&self, from: u64) -> Result<JobPage, StoreError> {
        let mut command = redis::cmd("SCAN");
        command.arg(from).arg("MATCH").arg("exec-count:{*:*}").arg("COUNT").arg(KEYS_PER_PAGE);
        // A key of another type is not ours.
        command.arg("TYPE").arg("hash");
        let answer = self.link.ask(command).await?;
        read_page(&answer).ok_or_else(|| unreadable(&answer))
    }

    async fn heartbeat(&self, mark: u64) -> Result<Option<u64>, StoreError> {
        let script = &self.scripts.mark;
        let mut command = redis::cmd("EVALSHA");
        command.arg(script.sha()).arg(1).arg("exec-reconciler").arg(&self.ttl).arg(mark);
        match self.link.run(script, command).await? {
            Value::Nil => Ok(None),
            answer => match read_text(&answer) {
                // One that is no number was noted by nobody here.
                Some(before) => Ok(before.parse().ok()),
                None => Err(unreadable(&answer)),
            },
        }
    }

    async fn get(&self, job: JobRef<'_>) -> Result<Option<JobLedger>, StoreError> {
        let script = &self.scripts.show;
        let answer = self.link.run(script, Self::command(script, job, 0, 0)).await?;
        let ledger = read_ledger(&answer).ok_or_else(|| unreadable(&answer))?;
        Ok(Some(ledger).filter(|ledger| ledger.policy().is_some() || !ledger.entries().is_empty()))
    }
}

impl fmt::Debug for RedisLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLedger").field("link", &self.link).field("ttl", &self.ttl).finish_non_exhaustive()
    }
}

/// As the scripts take it. Redis adds it to the time now, in 64 bits, and a Lua number is exact up to
/// here; three hundred thousand years are enough.
fn millis(duration: Duration) -> u128 {
    duration.as_millis().min(1 << 53)
}

const fn text(capacity: Option<Capacity>) -> &'static str {
    match capacity {
        Some(capacity) => capacity.as_str(),
        None => "",
    }
}

fn write_or_nothing(command: &mut Cmd, value: Option<impl fmt::Display>) {
    match value {
        Some(value) => command.write_arg_fmt(value),
        None => command.write_arg(b""),
    }
}

fn write_policy(command: &mut Cmd, policy: Option<Policy>) {
    write_or_nothing(command, policy.map(|policy| policy.spot_ratio));
    write_or_nothing(command, policy.map(|policy| policy.on_demand_base));
}

/// See `answer.lua`.
fn read_placed(number: u64) -> Placed {
    Placed {
        capacity: if number & 1 == 1 { Capacity::Spot } else { Capacity::OnDemand },
        is_new: number & 2 == 0,
        counts: Counts { spot: number >> 2 & 0xff_ffff, on_demand: number >> 26 },
    }
}

fn read_numbers<const N: usize>(answer: &Value) -> Option<[u64; N]> {
    let Value::Array(values) = answer else { return None };
    let values: &[Value; N] = values.as_slice().try_into().ok()?;
    let mut numbers = [0; N];
    for (number, value) in numbers.iter_mut().zip(values) {
        let Value::Int(value) = value else { return None };
        *number = u64::try_from(*value).ok()?;
    }
    Some(numbers)
}

/// See `reconcile.lua`.
fn read_reconciled(answer: &Value) -> Option<ReconcileOutcome> {
    if let Some(later) = read_text(answer) {
        return Some(ReconcileOutcome::Superseded(Term(later.parse().ok()?)));
    }
    let ([missing, stale, wrong_capacity, spot, on_demand], recheck_after) = match read_numbers(answer) {
        Some([a, b, c, d, e, recheck_after]) => ([a, b, c, d, e], Some(recheck_after)),
        None => (read_numbers(answer)?, None),
    };
    let drift = Drift { missing, stale, wrong_capacity };
    Some(ReconcileOutcome::Done(ReconcileSummary { drift, counts: Counts { spot, on_demand }, recheck_after }))
}

/// The answer to `SCAN`: where to go on, 0 for nowhere, and some keys.
fn read_page(answer: &Value) -> Option<JobPage> {
    let Value::Array(parts) = answer else { return None };
    let [next, Value::Array(keys)] = parts.as_slice() else { return None };
    let next: u64 = read_text(next)?.parse().ok()?;
    Some(JobPage { jobs: keys.iter().filter_map(read_key).collect(), next: Some(next).filter(|next| *next != 0) })
}

/// The job of a key; `None` for a key that is not ours. A namespace has no colon, a job id may.
fn read_key(key: &Value) -> Option<JobId> {
    let job = read_text(key)?.strip_prefix("exec-count:{")?.strip_suffix('}')?;
    let (namespace, id) = job.split_once(':')?;
    Some(JobRef { namespace, app_id: id }.to_job_id())
}

fn read_ledger(answer: &Value) -> Option<JobLedger> {
    let Value::Array(parts) = answer else { return None };
    let [ratio, base, released, term, Value::Array(pods)] = parts.as_slice() else { return None };
    let policy = match (read_text(ratio), read_text(base)) {
        (Some(ratio), Some(base)) => {
            Policy::decode(&format!("spot-ratio={ratio} on-demand-base={base}")).map(Some).ok()?
        }
        _ => None,
    };
    let mut entries = HashMap::with_capacity(pods.len() / 2);
    for pod in pods.chunks_exact(2) {
        let [executor, entry] = pod else { return None };
        entries.insert(read_text(executor)?.to_owned(), read_entry(read_text(entry)?)?);
    }
    let term = Term(read_text(term).map_or(Some(0), |term| term.parse().ok())?);
    Some(JobLedger::from_parts(policy, entries, read_released(released)?, term))
}

fn read_entry(text: &str) -> Option<Entry> {
    let mut parts = text.splitn(3, ' ');
    let capacity = Capacity::parse(parts.next()?)?;
    let placed_at = parts.next()?.parse().ok()?;
    let uid = parts.next()?;
    Some(Entry { capacity, placed_at, uid: (uid != "-").then(|| uid.to_owned()) })
}

/// Times and uids, each of both behind its length in bytes and a colon.
fn read_released(value: &Value) -> Option<Vec<(String, Millis)>> {
    let mut rest = read_text(value).unwrap_or_default();
    let mut released = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_once(':')?;
        let (release, after) = after.split_at_checked(length.parse().ok()?)?;
        let (at, uid) = release.split_once(' ')?;
        released.push((uid.to_owned(), at.parse().ok()?));
        rest = after;
    }
    Some(released)
}

fn read_text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        _ => None,
    }
}

fn unreadable(answer: &Value) -> StoreError {
    // An answer may be a whole ledger.
    StoreError::Unreadable(format!("{answer:?}").chars().take(200).collect())
}
