//! Reads the replies of the server and of the scripts. Each script describes its replies at its top.

use std::collections::HashMap;

use balancer_core::{
    Capacity, Counts, Drift, Entry, JobId, JobLedger, JobRef, Millis, PlaceOutcome, Placed, Policy, ReconcileOutcome,
    ReconcileSummary, Term,
};
use redis::Value;

use super::transport::KeyPage;
use crate::{Cursor, StoreError};

/// The reply of `place.lua` and `peek.lua`.
pub(super) fn placed(reply: &Value) -> Result<PlaceOutcome, StoreError> {
    if *reply == Value::Nil {
        return Ok(PlaceOutcome::NeedPolicy);
    }
    text(reply).and_then(read_placed).map(PlaceOutcome::Placed).ok_or_else(|| invalid(reply))
}

/// The words of `decide.lua`. A newer version may append more.
fn read_placed(text: &str) -> Option<Placed> {
    let mut words = text.split(' ');
    let capacity = Capacity::parse(words.next()?)?;
    let is_new = match words.next()? {
        "0" => false,
        "1" => true,
        _ => return None,
    };
    let counts = Counts { spot: words.next()?.parse().ok()?, on_demand: words.next()?.parse().ok()? };
    Some(Placed { capacity, is_new, counts })
}

/// The reply of `release.lua`.
pub(super) fn released_capacity(reply: &Value) -> Result<Option<Capacity>, StoreError> {
    match reply {
        Value::Nil => Ok(None),
        Value::Int(1) => Ok(Some(Capacity::Spot)),
        Value::Int(0) => Ok(Some(Capacity::OnDemand)),
        _ => Err(invalid(reply)),
    }
}

/// The reply of `reconcile.lua`.
pub(super) fn reconciled(reply: &Value) -> Result<ReconcileOutcome, StoreError> {
    let read = || {
        if let Some(later) = text(reply) {
            return Some(ReconcileOutcome::Superseded(Term(later.parse().ok()?)));
        }
        let ([missing, stale, wrong_capacity, spot, on_demand], recheck_after) = match numbers(reply) {
            Some([a, b, c, d, e, recheck_after]) => ([a, b, c, d, e], Some(recheck_after)),
            None => (numbers(reply)?, None),
        };
        let drift = Drift { missing, stale, wrong_capacity };
        Some(ReconcileOutcome::Done(ReconcileSummary { drift, counts: Counts { spot, on_demand }, recheck_after }))
    };
    read().ok_or_else(|| invalid(reply))
}

/// The reply of `counts.lua`.
pub(super) fn counts(reply: &Value) -> Result<Option<Counts>, StoreError> {
    if *reply == Value::Nil {
        return Ok(None);
    }
    let [spot, on_demand] = numbers(reply).ok_or_else(|| invalid(reply))?;
    Ok(Some(Counts { spot, on_demand }))
}

/// The reply of `heartbeat.lua`.
pub(super) fn heartbeat(reply: &Value) -> Result<Option<u64>, StoreError> {
    match reply {
        Value::Nil => Ok(None),
        // A value that is not a number was not stored by a ledger.
        _ => Ok(text(reply).ok_or_else(|| invalid(reply))?.parse().ok()),
    }
}

/// The reply to `SCAN`: the cursor of the next page, 0 after the last one, and some keys.
pub(super) fn key_page(reply: Value) -> Result<KeyPage, StoreError> {
    let next = |reply: &Value| match reply {
        Value::Array(parts) => match parts.as_slice() {
            [next, Value::Array(_)] => text(next)?.parse::<u64>().ok(),
            _ => None,
        },
        _ => None,
    };
    let Some(next) = next(&reply) else { return Err(invalid(&reply)) };
    let keys = match reply {
        Value::Array(mut parts) => match parts.pop() {
            Some(Value::Array(keys)) => keys,
            _ => Vec::new(),
        },
        _ => Vec::new(),
    };
    Ok(KeyPage { keys, next: (next != 0).then(|| Cursor::new(next.to_string())) })
}

/// The job of a key `exec-count:{<namespace>:<job id>}`; `None` for any other key. A namespace contains no colon, a
/// job id may.
pub(super) fn job(key: &Value) -> Option<JobId> {
    let job = text(key)?.strip_prefix("exec-count:{")?.strip_suffix('}')?;
    let (namespace, app_id) = job.split_once(':')?;
    Some(JobRef { namespace, app_id }.to_job_id())
}

/// The reply of `get.lua`.
pub(super) fn ledger(reply: &Value) -> Result<JobLedger, StoreError> {
    read_ledger(reply).ok_or_else(|| invalid(reply))
}

fn read_ledger(reply: &Value) -> Option<JobLedger> {
    let Value::Array(parts) = reply else { return None };
    let [policy, released, term, Value::Array(pods), ..] = parts.as_slice() else { return None };
    // A text that is not a policy counts as none, as it does for the scripts.
    let policy = text(policy).and_then(|policy| Policy::decode(policy).ok());
    let mut entries = HashMap::with_capacity(pods.len() / 2);
    for pod in pods.chunks_exact(2) {
        let [executor, entry] = pod else { return None };
        entries.insert(text(executor)?.to_owned(), read_entry(text(entry)?)?);
    }
    let term = Term(text(term).map_or(Some(0), |term| term.parse().ok())?);
    Some(JobLedger::from_parts(policy, entries, read_released(released)?, term))
}

fn read_entry(entry: &str) -> Option<Entry> {
    let mut parts = entry.splitn(3, ' ');
    let capacity = Capacity::parse(parts.next()?)?;
    let placed_at = parts.next()?.parse().ok()?;
    let uid = parts.next()?;
    Some(Entry { capacity, placed_at, uid: (uid != "-").then(|| uid.to_owned()) })
}

/// Times and uids of releases, each pair after its length in bytes and a colon.
fn read_released(value: &Value) -> Option<Vec<(String, Millis)>> {
    let mut rest = text(value).unwrap_or_default();
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

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        _ => None,
    }
}

/// The first numbers of an array. A newer version's script may return more.
fn numbers<const N: usize>(reply: &Value) -> Option<[u64; N]> {
    let Value::Array(values) = reply else { return None };
    let values: &[Value; N] = values.first_chunk()?;
    let mut numbers = [0; N];
    for (number, value) in numbers.iter_mut().zip(values) {
        let Value::Int(value) = value else { return None };
        *number = u64::try_from(*value).ok()?;
    }
    Some(numbers)
}

fn invalid(reply: &Value) -> StoreError {
    // A reply may be a whole ledger.
    StoreError::InvalidReply(format!("{reply:?}").chars().take(200).collect())
}
