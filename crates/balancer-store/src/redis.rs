//! Ledgers in Redis: each job two keys, each change one atomic script (DESIGN section 6).

mod address;
mod link;
mod scripts;
mod tls;

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use balancer_core::{
    Capacity, Counts, Drift, Entry, JobId, JobLedger, LiveExecutor, Outcome, Placed, Placing, Policy, Standing, Stated,
};
use redis::{Cmd, RedisWrite, Value};

use self::address::Address;
pub use self::address::InvalidRedisUrl;
use self::link::Link;
use self::scripts::{Script, Scripts};
use crate::{Ledger, StoreError};

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
/// An ACL user of its own needs the keys `exec-count:*` and `exec-pods:*` and the commands `evalsha`,
/// `script|load`, `time`, `exists`, `pexpire`, `hget`, `hmget`, `hlen`, `hset`, `hdel`, `hvals` and
/// `hgetall`.
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
        // Redis adds it to the time now, in 64 bits; three hundred thousand years are enough.
        let ttl = options.ttl.as_millis().min(1 << 53).to_string();
        let link = Link::open(Address::parse(url)?, options.timeout).await;
        Ok(Self { link, scripts: Scripts::default(), ttl })
    }

    /// `EVALSHA` of a script on a job's two keys, with room for so many more arguments.
    fn command(script: &Script, job: JobId<'_>, arguments: usize, bytes: usize) -> Cmd {
        let JobId { namespace, id } = job;
        let keys = 2 * (namespace.len() + id.len()) + "exec-count:{:}exec-pods:{:}".len();
        let mut command = Cmd::with_capacity(5 + arguments, "EVALSHA2".len() + script.sha().len() + keys + bytes);
        command.write_arg(b"EVALSHA");
        command.write_arg(script.sha().as_bytes());
        command.write_arg(b"2");
        command.write_arg_fmt(format_args!("exec-count:{{{namespace}:{id}}}"));
        command.write_arg_fmt(format_args!("exec-pods:{{{namespace}:{id}}}"));
        command
    }

    async fn ask(&self, script: &Script, job: JobId<'_>, placing: &Placing<'_>) -> Result<Outcome, StoreError> {
        let Placing { executor, pinned, stated, policy } = *placing;
        // Forty bytes hold two ratios and two bases.
        let mut command = Self::command(script, job, 7, self.ttl.len() + executor.len() + 40);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg(executor.as_bytes());
        // The usual executor tells nothing more.
        if pinned.is_some() || stated != Stated::default() || policy.is_some() {
            command.write_arg(text(pinned).as_bytes());
            write_or_nothing(&mut command, stated.ratio);
            write_or_nothing(&mut command, stated.base);
            write_policy(&mut command, policy);
        }
        match self.link.run(script, command).await? {
            Value::Nil => Ok(Outcome::NeedPolicy),
            Value::Int(number) if number >= 0 => Ok(Outcome::Placed(read_placed(number.unsigned_abs()))),
            other => Err(unreadable(&other)),
        }
    }
}

impl Ledger for RedisLedger {
    async fn place(&self, job: JobId<'_>, placing: &Placing<'_>) -> Result<Outcome, StoreError> {
        self.ask(&self.scripts.place, job, placing).await
    }

    async fn peek(&self, job: JobId<'_>, placing: &Placing<'_>) -> Result<Outcome, StoreError> {
        self.ask(&self.scripts.peek, job, placing).await
    }

    async fn release(&self, job: JobId<'_>, executor: &str, uid: Option<&str>) -> Result<Option<Capacity>, StoreError> {
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

    async fn learn(&self, job: JobId<'_>, policy: Policy) -> Result<(), StoreError> {
        let script = &self.scripts.learn;
        let mut command = Self::command(script, job, 3, self.ttl.len() + 20);
        command.write_arg(self.ttl.as_bytes());
        write_policy(&mut command, Some(policy));
        self.link.run(script, command).await.map(drop)
    }

    async fn reconcile(
        &self,
        job: JobId<'_>,
        live: &[LiveExecutor<'_>],
        policy: Option<Policy>,
        grace: Duration,
    ) -> Result<Drift, StoreError> {
        let script = &self.scripts.reconcile;
        let names: usize = live.iter().map(|live| live.executor.len() + live.uid.len() + "on-demand".len()).sum();
        let mut command = Self::command(script, job, 4 + 3 * live.len(), self.ttl.len() + 40 + names);
        command.write_arg(self.ttl.as_bytes());
        command.write_arg_fmt(grace.as_millis());
        write_policy(&mut command, policy);
        for &LiveExecutor { executor, uid, capacity } in live {
            command.write_arg(executor.as_bytes());
            command.write_arg(uid.as_bytes());
            command.write_arg(text(capacity).as_bytes());
        }
        let answer = self.link.run(script, command).await?;
        let [missing, stale, wrong_capacity] = read_numbers(&answer)?;
        Ok(Drift { missing, stale, wrong_capacity })
    }

    async fn show(&self, job: JobId<'_>) -> Result<Option<JobLedger>, StoreError> {
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
    write_or_nothing(command, policy.map(|policy| policy.ratio));
    write_or_nothing(command, policy.map(|policy| policy.base));
}

/// See `answer.lua`.
fn read_placed(number: u64) -> Placed {
    Placed {
        capacity: if number & 1 == 1 { Capacity::Spot } else { Capacity::OnDemand },
        standing: if number & 2 == 2 { Standing::Known } else { Standing::New },
        counts: Counts { spot: number >> 2 & 0xff_ffff, on_demand: number >> 26 },
    }
}

fn read_numbers<const N: usize>(answer: &Value) -> Result<[u64; N], StoreError> {
    let read = || {
        let Value::Array(values) = answer else { return None };
        let values: &[Value; N] = values.as_slice().try_into().ok()?;
        let mut numbers = [0; N];
        for (number, value) in numbers.iter_mut().zip(values) {
            let Value::Int(value) = value else { return None };
            *number = u64::try_from(*value).ok()?;
        }
        Some(numbers)
    };
    read().ok_or_else(|| unreadable(answer))
}

fn read_ledger(answer: &Value) -> Option<JobLedger> {
    let Value::Array(parts) = answer else { return None };
    let [ratio, base, released, Value::Array(pods)] = parts.as_slice() else { return None };
    let policy = match (read_text(ratio), read_text(base)) {
        (Some(ratio), Some(base)) => Some(Policy { ratio: ratio.parse().ok()?, base: base.parse().ok()? }),
        _ => None,
    };
    let mut entries = HashMap::with_capacity(pods.len() / 2);
    for pod in pods.chunks_exact(2) {
        let [executor, entry] = pod else { return None };
        entries.insert(read_text(executor)?.to_owned(), read_entry(read_text(entry)?)?);
    }
    Some(JobLedger::from_parts(policy, entries, read_released(released)?))
}

fn read_entry(text: &str) -> Option<Entry> {
    let mut parts = text.splitn(3, ' ');
    let capacity = Capacity::parse(parts.next()?)?;
    let placed_at = parts.next()?.parse().ok()?;
    let uid = parts.next()?;
    Some(Entry { capacity, placed_at, uid: (uid != "-").then(|| uid.to_owned()) })
}

/// Texts, each behind its length in bytes and a colon.
fn read_released(value: &Value) -> Option<Vec<String>> {
    let mut rest = read_text(value).unwrap_or_default();
    let mut released = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_once(':')?;
        let (uid, after) = after.split_at_checked(length.parse().ok()?)?;
        released.push(uid.to_owned());
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
