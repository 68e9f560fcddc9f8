//! Reads the replies of the server and of the scripts. Each script describes its replies at its top.

use std::collections::HashMap;

use balancer_core::{
    Capacity, Counts, Drift, Entry, JobId, JobLedger, JobRef, LearnOutcome, LedgerFault, Millis, PlaceOutcome, Placed,
    Policy, ReconcileOutcome, ReconcileSummary, RemovalOutcome, SpotAnswer, SpotState, Spread, SteerOutcome, Steering,
    Term, Unconfirmed, Waiting,
};
use redis::Value;

use super::transport::KeyPage;
use crate::{Cursor, EntryPage, JobRecord, StoreError};

/// Whether a script has changed nothing, because the ledger belongs to another driver than the one that the call names.
pub(super) fn belongs_to_another_driver(reply: &Value) -> bool {
    text(reply) == Some("other")
}

/// The reply of `place.lua` and `peek.lua`.
pub(super) fn placed(reply: &Value) -> Result<PlaceOutcome, StoreError> {
    if *reply == Value::Nil {
        return Ok(PlaceOutcome::NeedPolicy);
    }
    match text(reply) {
        Some("none") => Ok(PlaceOutcome::NoLedger),
        Some("off") => Ok(PlaceOutcome::OptedOut { is_new_job: false }),
        Some("off new") => Ok(PlaceOutcome::OptedOut { is_new_job: true }),
        words => words.and_then(read_placed).map(PlaceOutcome::Placed).ok_or_else(|| invalid(reply)),
    }
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
    let (mut spot, mut spread, mut is_new_job) = (SpotAnswer::default(), Spread::default(), false);
    if capacity == Capacity::Spot {
        spread.max_executors_per_node = Some(0);
    }
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            ("new", _) => is_new_job = true,
            ("closed", _) => spot = SpotAnswer::Closed,
            ("probe", _) => spot = SpotAnswer::Probe,
            ("unknown", _) => spread.max_executors_per_node = None,
            ("cap", cap) => spread.max_executors_per_node = Some(cap.parse().ok()?),
            ("avoid", types) => spread.avoid = avoided(types, ','),
            _ => {}
        }
    }
    Some(Placed { capacity, spot, spread, is_new, is_new_job, counts })
}

/// Instance types with a separator between them; none if they are not as a script wrote them.
fn avoided(types: &str, separator: char) -> Vec<String> {
    let types: Vec<String> = types.split(separator).map(str::to_owned).collect();
    if Steering::avoidable(&types).eq(&types) { types } else { Vec::new() }
}

/// The state of spot and the instance types to avoid. What no script wrote counts as open and as none.
fn steering_of(spot_state: Option<&Value>, avoid: Option<&Value>) -> Steering {
    let spot = spot_state.and_then(text).and_then(read_spot_state).unwrap_or_default();
    let avoid = avoid.and_then(text).map(|types| avoided(types, ' ')).unwrap_or_default();
    Steering { spot, avoid }
}

/// As `read_spot_state` of the scripts reads it.
fn read_spot_state(text: &str) -> Option<SpotState> {
    let mut parts = text.splitn(3, ' ');
    let (state, since, rest) = (parts.next()?, whole(parts.next()?)?, parts.next()?);
    match state {
        "starved" => Some(SpotState::Starved { since, retry_at: whole(rest)? }),
        "probing" if !rest.is_empty() => Some(SpotState::Probing { since, executor: rest.to_owned() }),
        _ => None,
    }
}

/// A whole number, as the scripts read it.
fn whole(text: &str) -> Option<u64> {
    let is_whole = text.len() <= 15 && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_whole)
}

/// The reply of `steer.lua`.
pub(super) fn steered(reply: &Value) -> Result<SteerOutcome, StoreError> {
    match reply {
        Value::Nil => Ok(SteerOutcome::NoLedger),
        Value::Int(1) => Ok(SteerOutcome::Done),
        _ => later_term(reply).map(SteerOutcome::Superseded).ok_or_else(|| invalid(reply)),
    }
}

/// The reply of `learn.lua`.
pub(super) fn learned(reply: &Value) -> Result<LearnOutcome, StoreError> {
    match reply {
        Value::Nil => Ok(LearnOutcome::NoLedger),
        Value::Int(is_new_job @ 0..=1) => Ok(LearnOutcome::Stored { is_new_job: *is_new_job == 1 }),
        _ if text(reply) == Some("unstored") => Ok(LearnOutcome::NotStored),
        _ => Err(invalid(reply)),
    }
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
        if let Some(later) = later_term(reply) {
            return Some(ReconcileOutcome::Superseded(later));
        }
        let [missing, stale, wrong_capacity, spot, on_demand] = numbers(reply)?;
        let Value::Array(parts) = reply else { return None };
        let [Value::Int(is_exact), Value::Int(recheck_after), policy, fault, more @ ..] = parts.get(5..)? else {
            return None;
        };
        let [Value::Int(more_waiting), Value::Array(waiting), ..] = more else { return None };
        let fault = match text(fault)? {
            "" => None,
            "term" => Some(LedgerFault::Term),
            "type" => Some(LedgerFault::Type),
            _ => return None,
        };
        let waiting = waiting.chunks_exact(3).map(|placement| {
            let [placed_at, Value::Int(age), executor] = placement else { return None };
            let placement = Unconfirmed { placed_at: text(placed_at)?.parse().ok()?, key: text(executor)?.to_owned() };
            Some(Waiting { placement, age: u64::try_from(*age).ok()? })
        });
        Some(ReconcileOutcome::Done(ReconcileSummary {
            drift: Drift { missing, stale, wrong_capacity },
            counts: Counts { spot, on_demand },
            has_exact_counts: *is_exact == 1,
            policy: policy_of(policy),
            waiting: waiting.collect::<Option<_>>()?,
            more_waiting: *more_waiting == 1,
            recheck_after: u64::try_from(*recheck_after).ok(),
            fault,
            steering: steering_of(parts.get(11), parts.get(12)),
        }))
    };
    read().ok_or_else(|| invalid(reply))
}

/// The reply of `begin_count.lua`.
pub(super) fn nothing(reply: &Value) -> Result<(), StoreError> {
    if *reply == Value::Nil { Ok(()) } else { Err(invalid(reply)) }
}

/// The reply of `correct_counts.lua`.
pub(super) fn is_done(reply: &Value) -> Result<bool, StoreError> {
    match reply {
        Value::Int(is_done @ 0..=1) => Ok(*is_done == 1),
        _ => Err(invalid(reply)),
    }
}

/// The reply to `HSCAN` of a job's entries: the cursor of the next page, 0 after the last one, and names and entries. An
/// entry that no script wrote counts as it does for the scripts.
pub(super) fn entry_page(reply: &Value) -> Result<EntryPage, StoreError> {
    let Value::Array(parts) = reply else { return Err(invalid(reply)) };
    let [next, Value::Array(pods)] = parts.as_slice() else { return Err(invalid(reply)) };
    let Some(next) = text(next).and_then(|next| next.parse::<u64>().ok()) else { return Err(invalid(reply)) };
    let entries = pods.chunks_exact(2).filter_map(|pod| {
        let [executor, entry] = pod else { return None };
        let entry = text(entry)?;
        let is_spot = entry.starts_with("spot ");
        let unknown = || {
            let capacity = if is_spot { Capacity::Spot } else { Capacity::OnDemand };
            Entry { capacity, placed_at: 0, uid: None }
        };
        Some((text(executor)?.to_owned(), read_entry(entry).unwrap_or_else(unknown)))
    });
    Ok(EntryPage { entries: entries.collect(), next: (next != 0).then(|| Cursor::new(next.to_string())) })
}

/// The reply of `remove_unconfirmed.lua`.
pub(super) fn removed(reply: &Value) -> Result<RemovalOutcome, StoreError> {
    if let Some(later) = later_term(reply) {
        return Ok(RemovalOutcome::Superseded(later));
    }
    let [removed, spot, on_demand] = numbers(reply).ok_or_else(|| invalid(reply))?;
    Ok(RemovalOutcome::Done { removed, counts: Counts { spot, on_demand } })
}

/// The later term that a script returned instead of changing the ledger.
fn later_term(reply: &Value) -> Option<Term> {
    text(reply)?.parse().ok().map(Term)
}

/// The reply of `take_placed.lua`.
pub(super) fn jobs(reply: &Value) -> Result<Vec<JobId>, StoreError> {
    let Value::Array(jobs) = reply else { return Err(invalid(reply)) };
    Ok(jobs.iter().filter_map(text).filter_map(job_of).collect())
}

/// The reply of `record.lua`.
pub(super) fn record(reply: &Value) -> Result<Option<JobRecord>, StoreError> {
    if *reply == Value::Nil {
        return Ok(None);
    }
    let [spot, on_demand] = numbers(reply).ok_or_else(|| invalid(reply))?;
    let Value::Array(parts) = reply else { return Err(invalid(reply)) };
    Ok(Some(JobRecord {
        counts: Counts { spot, on_demand },
        policy: parts.get(2).and_then(policy_of),
        steering: steering_of(parts.get(3), parts.get(4)),
    }))
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
pub(super) fn key_page(reply: &Value) -> Result<KeyPage, StoreError> {
    let Value::Array(parts) = reply else { return Err(invalid(reply)) };
    let [next, Value::Array(keys)] = parts.as_slice() else { return Err(invalid(reply)) };
    let Some(next) = text(next).and_then(|next| next.parse::<u64>().ok()) else { return Err(invalid(reply)) };
    Ok(KeyPage { keys: keys.clone(), next: (next != 0).then(|| Cursor::new(next.to_string())) })
}

/// The job of a key `exec-count:{<namespace>:<job id>}`; `None` for any other key. A namespace contains no colon, a
/// job id may.
pub(super) fn job(key: &Value) -> Option<JobId> {
    job_of(text(key)?.strip_prefix("exec-count:{")?.strip_suffix('}')?)
}

/// The job that a script names by `<namespace>:<job id>`.
fn job_of(text: &str) -> Option<JobId> {
    let (namespace, app_id) = text.split_once(':')?;
    Some(JobRef { namespace, app_id }.to_job_id())
}

/// A policy in a reply. A text that is not a policy counts as none, as it does for the scripts.
fn policy_of(reply: &Value) -> Option<Policy> {
    Policy::decode(text(reply)?).ok()
}

/// The reply of `get.lua`.
pub(super) fn ledger(reply: &Value) -> Result<JobLedger, StoreError> {
    read_ledger(reply).ok_or_else(|| invalid(reply))
}

fn read_ledger(reply: &Value) -> Option<JobLedger> {
    let Value::Array(parts) = reply else { return None };
    let [policy, driver, released, term, Value::Array(pods), more @ ..] = parts.as_slice() else { return None };
    let (policy, driver) = (policy_of(policy), text(driver).map(str::to_owned));
    let mut entries = HashMap::with_capacity(pods.len() / 2);
    for pod in pods.chunks_exact(2) {
        let [executor, entry] = pod else { return None };
        entries.insert(text(executor)?.to_owned(), read_entry(text(entry)?)?);
    }
    // A term that is not a number counts as none, as it does for the scripts.
    let term = Term(text(term).and_then(|term| term.parse().ok()).unwrap_or_default());
    let steering = steering_of(more.first(), more.get(1));
    Some(JobLedger::from_parts(policy, driver, entries, read_released(released)?, term, steering))
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

pub(super) fn text(value: &Value) -> Option<&str> {
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
