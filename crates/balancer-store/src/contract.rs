//! The tests that every store must pass.
//!
//! [`contract!`](crate::contract!) makes a test of each, given how to make an empty ledger; that may
//! also return from the test, where the store's server is not there. Each uses a job of its own, so one
//! ledger may serve them all. The crate that calls it needs `tokio` (multi-threaded) and `anyhow`.
//!
//! ```
//! # mod tests {
//! use balancer_store::MemoryLedger;
//!
//! balancer_store::contract!(MemoryLedger::new(std::time::Duration::from_secs(60)));
//! # }
//! ```
//!
//! What takes a server's clock or a look at its memory is left to the store's own tests: how long a
//! ledger lives, that a peek or a superseded reconcile prolongs no life, and which placement waits longest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use balancer_core::{
    Capacity, Counts, Drift, Entry, JobId, JobLedger, JobRef, JobState, LearnOutcome, LiveExecutor, PlaceOutcome,
    PlaceRequest, Placed, Policy, PolicyOverrides, Ratio, ReconcileOutcome, ReconcileSummary, RemovalOutcome,
    SpotAnswer, SpotRatio, SpotState, Spread, Steer, SteerOutcome, Steering, Term, Unconfirmed, Waiting, millis,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::runtime::Handle;

use crate::{EntryPage, JobPage, JobRecord, Ledger, StoreError};

use Capacity::{OnDemand, Spot};
const NEW: bool = true;
const KNOWN: bool = false;

/// Makes a test of each part of the contract. See [the module](mod@crate::contract).
#[macro_export]
macro_rules! contract {
    ($ledger:expr) => {
        $crate::contract!($ledger;
            placing_twice_counts_once,
            executors_follow_the_ratio_after_the_base,
            every_ratio_decides_like_the_reference,
            peek_returns_what_place_would_and_writes_nothing,
            without_a_policy_nothing_is_placed,
            a_looked_up_policy_is_stored,
            a_looked_up_policy_does_not_replace_a_learned_one,
            the_newest_learned_policy_wins,
            overrides_apply_to_their_executor_only,
            complete_overrides_need_no_policy,
            a_required_capacity_needs_no_policy,
            a_required_capacity_replaces_the_stored_one,
            a_reused_name_keeps_its_capacity_and_loses_its_uid,
            releasing_twice_releases_once,
            a_release_of_an_older_pod_removes_nothing,
            a_repeated_release_does_not_remove_the_next_pod,
            a_release_without_a_uid_removes_only_what_waits_for_its_pod,
            reconcile_corrects_all_kinds_of_drift,
            reconcile_changes_nothing_without_drift,
            only_a_placement_without_a_pod_has_the_grace,
            a_reconcile_leaves_the_executors_that_it_does_not_name,
            a_reconcile_in_parts_ends_like_one_of_all,
            a_released_executor_is_not_added_during_the_release_grace,
            a_live_executor_of_unknown_capacity_is_not_added,
            a_reconciled_policy_replaces_the_stored_one,
            a_reconciled_field_replaces_the_stored_one,
            an_ended_jobs_policy_goes_with_its_last_executor,
            an_earlier_term_changes_nothing,
            a_dropped_ledger_loses_its_term,
            calls_do_not_create_a_ledger_for_an_unknown_job,
            a_record_is_right_and_creates_no_ledger,
            every_job_with_a_ledger_is_listed,
            a_heartbeat_returns_the_one_before,
            only_placements_that_are_still_unconfirmed_are_removed,
            many_waiting_placements_are_reported_in_parts,
            an_entry_waits_until_its_pod_is_found_and_again_after_its_next_placement,
            a_new_job_is_reported_once,
            without_permission_no_ledger_is_created,
            a_job_that_is_opted_out_places_no_executor,
            an_executors_own_ratio_precedes_off,
            a_job_that_is_switched_off_keeps_its_executors_and_gets_no_further_ones,
            live_drivers_of_one_job_keep_apart_in_any_order,
            a_retried_driver_keeps_the_ledger,
            a_release_goes_to_the_ledger_of_its_driver,
            the_policy_of_a_driver_without_a_name_is_left_to_the_lookup_of_its_first_executor,
            a_driver_of_unknown_name_does_not_replace_the_policy_of_another,
            a_ledger_that_does_not_name_its_driver_stays_as_it_is_but_for_its_policy,
            a_reconcile_hands_the_ledger_to_another_driver,
            an_executor_with_a_ratio_of_its_own_is_found_again_in_a_job_that_is_opted_out,
            the_newest_driver_takes_over_a_ledger_without_executors,
            a_ledger_that_is_handed_over_keeps_no_policy_of_the_former_driver,
            jobs_with_placements_are_taken_once,
            names_can_be_any_text,
            jobs_are_independent,
            concurrent_placements_count_once_each,
            ten_thousand_executors_fit_in_a_job,
            closed_spot_is_probed_by_one_executor_at_a_time,
            executors_on_spot_get_the_cap_and_the_instance_types_to_avoid,
            a_whole_policy_replaces_every_field,
            an_earlier_term_steers_nothing,
            steering_is_kept_for_another_driver_and_forgotten_with_the_ledger,
            random_histories_match_the_reference,
        );
    };
    ($ledger:expr; $($name:ident,)+) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() -> anyhow::Result<()> {
                let ledger = $ledger;
                Ok($crate::contract::$name(&ledger).await?)
            }
        )+
    };
}

type Checked = Result<(), StoreError>;

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(86_400);

fn job(id: &str) -> JobRef<'_> {
    JobRef { namespace: "contract", app_id: id }
}

fn policy(ratio: u32, base: u32) -> Policy {
    let ratio_only =
        Policy { spot_ratio: Ratio::from_billionths(ratio).unwrap_or(Ratio::ONE).into(), ..Policy::DEFAULT };
    Policy { on_demand_base: base, ..ratio_only }
}

fn all_spot() -> Policy {
    policy(Ratio::ONE_IN_BILLIONTHS, 0)
}

fn all_on_demand() -> Policy {
    policy(0, 0)
}

/// The policy of a job that is opted out.
fn off() -> Policy {
    Policy { spot_ratio: SpotRatio::Off, ..policy(0, 2) }
}

const OPTED_OUT: PlaceOutcome = PlaceOutcome::OptedOut { is_new_job: false };

fn request(executor: &str, policy: Option<Policy>) -> PlaceRequest<'_> {
    PlaceRequest {
        key: executor,
        required: None,
        overrides: PolicyOverrides::default(),
        policy,
        may_create: true,
        driver: None,
    }
}

fn placed(capacity: Capacity, is_new: bool, spot: u64, on_demand: u64) -> PlaceOutcome {
    PlaceOutcome::Placed(Placed {
        capacity,
        spot: SpotAnswer::Unchanged,
        spread: Spread { max_executors_per_node: (capacity == Spot).then_some(0), avoid: Vec::new() },
        is_new,
        is_new_job: false,
        counts: Counts { spot, on_demand },
    })
}

/// The outcome as if the job had had a ledger before.
fn of_known_job(outcome: PlaceOutcome) -> PlaceOutcome {
    match outcome {
        PlaceOutcome::Placed(placed) => PlaceOutcome::Placed(Placed { is_new_job: false, ..placed }),
        other => other,
    }
}

fn live<'a>(executor: &'a str, uid: &'a str, capacity: Option<Capacity>) -> LiveExecutor<'a> {
    LiveExecutor { key: executor, uid, capacity, states_ratio: false }
}

/// The state of a job whose driver states no policy.
fn seen<'a>(live: &'a [LiveExecutor<'a>]) -> JobState<'a> {
    JobState { live, ..JobState::default() }
}

/// The state of a job without executors, whose driver states this policy.
fn asking(policy: Policy) -> JobState<'static> {
    JobState { overrides: overrides(policy), ..JobState::default() }
}

fn overrides_of(spot_ratio: Option<SpotRatio>, on_demand_base: Option<u32>) -> PolicyOverrides {
    let ratio_only = PolicyOverrides { spot_ratio, ..PolicyOverrides::default() };
    PolicyOverrides { on_demand_base, ..ratio_only }
}

fn overrides(policy: Policy) -> PolicyOverrides {
    policy.into()
}

/// The keys of all entries.
async fn keys(ledger: &impl Ledger, job: JobRef<'_>) -> Result<BTreeSet<String>, StoreError> {
    let (mut keys, mut cursor) = (BTreeSet::new(), None);
    loop {
        let EntryPage { entries, next } = ledger.entries(job, cursor).await?;
        keys.extend(entries.into_iter().map(|(key, _)| key));
        match next {
            Some(next) => cursor = Some(next),
            None => return Ok(keys),
        }
    }
}

/// A reconcile that names all executors: those that are live, and all others in the ledger as gone.
async fn reconcile_all(
    ledger: &impl Ledger,
    job: JobRef<'_>,
    state: JobState<'_>,
    grace: Duration,
    term: Term,
) -> Result<ReconcileOutcome, StoreError> {
    let keys = keys(ledger, job).await?;
    let live: BTreeSet<&str> = state.live.iter().map(|live| live.key).collect();
    let gone: Vec<&str> = keys.iter().map(String::as_str).filter(|key| !live.contains(key)).collect();
    ledger.reconcile(job, &JobState { gone: &gone, ..state }, grace, term).await
}

/// The same in the first term.
async fn reconcile(
    ledger: &impl Ledger,
    job: JobRef<'_>,
    state: JobState<'_>,
    grace: Duration,
) -> Result<ReconcileSummary, StoreError> {
    match reconcile_all(ledger, job, state, grace, Term(1)).await? {
        ReconcileOutcome::Done(summary) => Ok(summary),
        ReconcileOutcome::Superseded(by) => Err(StoreError::InvalidReply(format!("superseded by {by}"))),
    }
}

async fn counts(ledger: &impl Ledger, job: JobRef<'_>) -> Result<(u64, u64), StoreError> {
    let counts = ledger.get(job).await?.map(|ledger| ledger.counts()).unwrap_or_default();
    Ok((counts.spot, counts.on_demand))
}

/// The apiserver repeats a call that took too long.
pub async fn placing_twice_counts_once(ledger: &impl Ledger) -> Checked {
    let job = job("twice");
    let asked = request("e1", Some(policy(500_000_000, 0)));
    assert_eq!(of_known_job(ledger.place(job, &asked).await?), placed(Spot, NEW, 1, 0));
    assert_eq!(of_known_job(ledger.place(job, &asked).await?), placed(Spot, KNOWN, 1, 0));
    assert_eq!(of_known_job(ledger.place(job, &request("e2", None)).await?), placed(OnDemand, NEW, 1, 1));
    // By now another executor would go to spot; a known one stays what it is.
    assert_eq!(of_known_job(ledger.place(job, &request("e2", None)).await?), placed(OnDemand, KNOWN, 1, 1));
    assert_eq!(counts(ledger, job).await?, (1, 1));
    Ok(())
}

/// Exactly, from an empty job.
pub async fn executors_follow_the_ratio_after_the_base(ledger: &impl Ledger) -> Checked {
    let job = job("ratio");
    ledger.learn(job, policy(700_000_000, 2), Some("d1"), true).await?;
    let mut on_demand = Vec::new();
    for number in 1..=22 {
        let name = format!("e{number}");
        let outcome = ledger.place(job, &request(&name, None)).await?;
        assert_ne!(outcome, PlaceOutcome::NeedPolicy, "the policy was taught");
        if matches!(outcome, PlaceOutcome::Placed(placed) if placed.capacity == OnDemand) {
            on_demand.push(number);
        }
    }
    assert_eq!(on_demand, [1, 2, 4, 7, 10, 14, 17, 20]);
    assert_eq!(counts(ledger, job).await?, (14, 8));
    Ok(())
}

/// Ratios with nine places, at and next to the ends.
pub async fn every_ratio_decides_like_the_reference(ledger: &impl Ledger) -> Checked {
    for ratio in [0, 1, 10, 333_333_333, 500_000_000, 512_500_000, 666_666_667, 700_000_001, 999_999_999, 1_000_000_000]
    {
        for base in [0, 3, 1_000_000] {
            let id = format!("ratio-{ratio}-{base}");
            let mut reference = JobLedger::default();
            reference.learn(policy(ratio, base), Some("d1"), true);
            ledger.learn(job(&id), policy(ratio, base), Some("d1"), true).await?;
            // As many as bring 0.5125, which no binary fraction is, to an exact tie.
            for number in 0..85 {
                let name = format!("e{number}");
                let asked = request(&name, None);
                assert_eq!(ledger.place(job(&id), &asked).await?, reference.place(&asked, 0), "{id}, {name}");
            }
        }
    }
    Ok(())
}

/// For dry runs.
pub async fn peek_returns_what_place_would_and_writes_nothing(ledger: &impl Ledger) -> Checked {
    let job = job("peek");
    let asked = request("e1", Some(all_spot()));
    assert_eq!(ledger.peek(job, &request("e1", None)).await?, PlaceOutcome::NeedPolicy);
    assert_eq!(of_known_job(ledger.peek(job, &asked).await?), placed(Spot, NEW, 1, 0));
    assert_eq!(ledger.get(job).await?, None);

    ledger.place(job, &asked).await?;
    let before = ledger.get(job).await?;
    let required = PlaceRequest { required: Some(OnDemand), ..asked };
    assert_eq!(of_known_job(ledger.peek(job, &asked).await?), placed(Spot, KNOWN, 1, 0));
    assert_eq!(of_known_job(ledger.peek(job, &required).await?), placed(OnDemand, KNOWN, 0, 1));
    assert_eq!(of_known_job(ledger.peek(job, &request("e2", Some(all_on_demand()))).await?), placed(Spot, NEW, 2, 0));
    assert_eq!(ledger.get(job).await?, before);
    Ok(())
}

/// The webhook then looks the driver up.
pub async fn without_a_policy_nothing_is_placed(ledger: &impl Ledger) -> Checked {
    let job = job("no-policy");
    let half = PlaceRequest {
        overrides: PolicyOverrides { spot_ratio: Some(SpotRatio::ONE), ..PolicyOverrides::default() },
        ..request("e1", None)
    };
    for asked in [request("e1", None), half] {
        assert_eq!(ledger.place(job, &asked).await?, PlaceOutcome::NeedPolicy);
    }
    assert_eq!(ledger.get(job).await?, None);
    Ok(())
}

/// So that the driver is looked up once for each job.
pub async fn a_looked_up_policy_is_stored(ledger: &impl Ledger) -> Checked {
    let job = job("looked-up");
    assert_eq!(of_known_job(ledger.place(job, &request("e1", Some(policy(1, 1)))).await?), placed(OnDemand, NEW, 0, 1));
    assert_eq!(of_known_job(ledger.place(job, &request("e2", None)).await?), placed(Spot, NEW, 1, 1));
    assert_eq!(of_known_job(ledger.place(job, &request("e3", None)).await?), placed(OnDemand, NEW, 1, 2));
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(policy(1, 1)));
    Ok(())
}

/// The driver's own creation is the better source.
pub async fn a_looked_up_policy_does_not_replace_a_learned_one(ledger: &impl Ledger) -> Checked {
    let job = job("taught");
    ledger.learn(job, all_on_demand(), Some("d1"), true).await?;
    assert_eq!(ledger.place(job, &request("e1", Some(all_spot()))).await?, placed(OnDemand, NEW, 0, 1));
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(all_on_demand()));
    Ok(())
}

/// An edited driver takes effect at once.
pub async fn the_newest_learned_policy_wins(ledger: &impl Ledger) -> Checked {
    let job = job("taught-twice");
    ledger.learn(job, all_on_demand(), Some("d1"), true).await?;
    ledger.place(job, &request("e1", None)).await?;
    ledger.learn(job, all_spot(), Some("d1"), true).await?;
    assert_eq!(of_known_job(ledger.place(job, &request("e2", None)).await?), placed(Spot, NEW, 1, 1));
    Ok(())
}

/// Its ratio with the job's base, or its base with the job's ratio.
pub async fn overrides_apply_to_their_executor_only(ledger: &impl Ledger) -> Checked {
    let job = job("own");
    ledger.learn(job, policy(Ratio::ONE_IN_BILLIONTHS, 1), Some("d1"), true).await?;
    let ratio = PlaceRequest { overrides: overrides_of(Some(SpotRatio::ZERO), None), ..request("e1", None) };
    let base = PlaceRequest { overrides: overrides_of(None, Some(3)), ..request("e2", None) };
    assert_eq!(of_known_job(ledger.place(job, &ratio).await?), placed(OnDemand, NEW, 0, 1));
    assert_eq!(
        of_known_job(ledger.place(job, &PlaceRequest { key: "e3", ..ratio }).await?),
        placed(OnDemand, NEW, 0, 2)
    );
    assert_eq!(of_known_job(ledger.place(job, &base).await?), placed(OnDemand, NEW, 0, 3));
    assert_eq!(of_known_job(ledger.place(job, &request("e4", None)).await?), placed(Spot, NEW, 1, 3));
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(policy(Ratio::ONE_IN_BILLIONTHS, 1)));
    Ok(())
}

/// No driver lookup is needed.
pub async fn complete_overrides_need_no_policy(ledger: &impl Ledger) -> Checked {
    let job = job("own-all");
    let overrides = overrides(all_spot());
    assert_eq!(
        of_known_job(ledger.place(job, &PlaceRequest { overrides, ..request("e1", None) }).await?),
        placed(Spot, NEW, 1, 0)
    );
    assert_eq!(ledger.place(job, &request("e2", None)).await?, PlaceOutcome::NeedPolicy);
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), None);
    Ok(())
}

/// Whatever the ratio says.
pub async fn a_required_capacity_needs_no_policy(ledger: &impl Ledger) -> Checked {
    let job = job("required");
    let required = PlaceRequest { required: Some(Spot), driver: Some("d1"), ..request("e1", None) };
    let outcome = ledger.place(job, &required).await?;
    assert!(matches!(outcome, PlaceOutcome::Placed(Placed { capacity: Spot, is_new: NEW, .. })), "{outcome:?}");
    ledger.learn(job, all_on_demand(), Some("d1"), true).await?;
    assert_eq!(
        of_known_job(ledger.place(job, &PlaceRequest { key: "e2", ..required }).await?),
        placed(Spot, NEW, 2, 0)
    );
    let looked_up = PlaceRequest { policy: Some(all_spot()), required: Some(OnDemand), ..request("e3", None) };
    assert_eq!(of_known_job(ledger.place(job, &looked_up).await?), placed(OnDemand, NEW, 2, 1));
    Ok(())
}

/// A pod was made again by hand, with a selector of its own.
pub async fn a_required_capacity_replaces_the_stored_one(ledger: &impl Ledger) -> Checked {
    let job = job("changes-sides");
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    let required = PlaceRequest { required: Some(OnDemand), ..request("e1", None) };
    assert_eq!(of_known_job(ledger.place(job, &required).await?), placed(OnDemand, KNOWN, 0, 1));
    assert_eq!(of_known_job(ledger.place(job, &request("e1", None)).await?), placed(OnDemand, KNOWN, 0, 1));
    assert_eq!(counts(ledger, job).await?, (0, 1));
    Ok(())
}

/// The uid of the next pod is not known yet.
pub async fn a_reused_name_keeps_its_capacity_and_loses_its_uid(ledger: &impl Ledger) -> Checked {
    let job = job("again");
    let uid = async |name: &str| -> Result<Option<String>, StoreError> {
        Ok(ledger.get(job).await?.and_then(|ledger| ledger.entries().get(name).and_then(|entry| entry.uid.clone())))
    };
    ledger.place(job, &PlaceRequest { driver: Some("d1"), ..request("e1", Some(all_spot())) }).await?;
    reconcile(ledger, job, seen(&[live("e1", "first", None)]), LONG).await?;
    assert_eq!(uid("e1").await?.as_deref(), Some("first"));
    ledger.learn(job, all_on_demand(), Some("d1"), true).await?;
    assert_eq!(of_known_job(ledger.place(job, &request("e1", None)).await?), placed(Spot, KNOWN, 1, 0));
    assert_eq!(uid("e1").await?, None);
    Ok(())
}

/// One end of an executor is two to three DELETE reviews.
pub async fn releasing_twice_releases_once(ledger: &impl Ledger) -> Checked {
    let job = job("release");
    assert_eq!(ledger.release(job, "e1", Some("u"), None).await?, None);
    ledger.place(job, &PlaceRequest { driver: Some("d1"), ..request("e1", Some(all_spot())) }).await?;
    ledger.place(job, &request("e2", None)).await?;
    assert_eq!(ledger.release(job, "e1", Some("u"), None).await?, Some(Spot));
    assert_eq!(ledger.release(job, "e1", Some("u"), None).await?, None);
    assert_eq!(ledger.release(job, "unknown", None, None).await?, None);
    assert_eq!(counts(ledger, job).await?, (1, 0));
    ledger.learn(job, all_on_demand(), Some("d1"), true).await?;
    ledger.place(job, &request("e3", None)).await?;
    assert_eq!(ledger.release(job, "e3", None, None).await?, Some(OnDemand));
    assert_eq!(ledger.release(job, "e2", None, None).await?, Some(Spot));
    assert_eq!(counts(ledger, job).await?, (0, 0));
    Ok(())
}

/// A newer pod has taken it.
pub async fn a_release_of_an_older_pod_removes_nothing(ledger: &impl Ledger) -> Checked {
    let job = job("older");
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    reconcile(ledger, job, seen(&[live("e1", "newer", None)]), LONG).await?;
    assert_eq!(ledger.release(job, "e1", Some("older"), None).await?, None);
    assert_eq!(counts(ledger, job).await?, (1, 0));
    assert_eq!(ledger.release(job, "e1", Some("newer"), None).await?, Some(Spot));
    assert_eq!(counts(ledger, job).await?, (0, 0));
    Ok(())
}

/// One pod's deletion is reviewed several times, by several callers at once, and a review may come
/// after the next pod's placement.
pub async fn a_repeated_release_does_not_remove_the_next_pod(ledger: &impl Ledger) -> Checked {
    let job = job("comes-again");
    for pod in 0..JobLedger::RELEASED_REMEMBERED + 2 {
        ledger.place(job, &request("e1", Some(all_spot()))).await?;
        for before in pod.saturating_sub(3)..pod {
            assert_eq!(ledger.release(job, "e1", Some(&format!("pod {before}")), None).await?, None);
        }
        assert_eq!(counts(ledger, job).await?, (1, 0));
        assert_eq!(ledger.release(job, "e1", Some(&format!("pod {pod}")), None).await?, Some(Spot));
    }
    let remembered = ledger.get(job).await?.map(|ledger| ledger.released().count());
    assert_eq!(remembered, Some(JobLedger::RELEASED_REMEMBERED));
    Ok(())
}

/// A pod that was found states its uid when it is deleted.
pub async fn a_release_without_a_uid_removes_only_what_waits_for_its_pod(ledger: &impl Ledger) -> Checked {
    let job = job("no-uid");
    reconcile(ledger, job, seen(&[live("e1", "u", Some(OnDemand))]), LONG).await?;
    assert_eq!(ledger.release(job, "e1", None, None).await?, None);
    assert_eq!(counts(ledger, job).await?, (0, 1));
    ledger.place(job, &PlaceRequest { required: Some(Spot), ..request("e2", None) }).await?;
    assert_eq!(ledger.release(job, "e2", None, None).await?, Some(Spot));
    assert_eq!(counts(ledger, job).await?, (0, 1));
    Ok(())
}

/// It returns how many of each kind.
pub async fn reconcile_corrects_all_kinds_of_drift(ledger: &impl Ledger) -> Checked {
    let job = job("reconcile");
    // The last is gone too, though a pod has its name for a uid.
    for name in ["right", "wrong", "gone", "u1"] {
        ledger.place(job, &request(name, Some(all_spot()))).await?;
    }
    let now = [
        live("right", "u1", Some(Spot)),
        live("wrong", "u2", Some(OnDemand)),
        live("new-1", "u3", Some(OnDemand)),
        live("new-2", "u4", Some(OnDemand)),
        live("new-3", "u5", Some(Spot)),
        // Told twice, counted once.
        live("new-3", "u5", Some(Spot)),
    ];
    let summary = reconcile(ledger, job, seen(&now), Duration::ZERO).await?;
    let (drift, counts) = (Drift { missing: 3, stale: 2, wrong_capacity: 1 }, Counts { spot: 2, on_demand: 3 });
    let policy = Some(all_spot());
    assert_eq!(
        summary,
        ReconcileSummary { drift, counts, has_exact_counts: true, policy, ..ReconcileSummary::default() }
    );
    let shown = ledger.get(job).await?.unwrap_or_default();
    assert_eq!(shown.counts(), counts);
    assert_eq!(shown.policy(), Some(all_spot()));
    let mut uids: Vec<_> =
        shown.entries().iter().map(|(name, entry)| (name.as_str(), entry.uid.as_deref().unwrap_or_default())).collect();
    uids.sort_unstable();
    assert_eq!(uids, [("new-1", "u3"), ("new-2", "u4"), ("new-3", "u5"), ("right", "u1"), ("wrong", "u2")]);
    // What was entered counts for the next placing.
    assert_eq!(of_known_job(ledger.place(job, &request("next", None)).await?), placed(Spot, NEW, 3, 3));
    Ok(())
}

/// Nor does it change anything.
pub async fn reconcile_changes_nothing_without_drift(ledger: &impl Ledger) -> Checked {
    let job = job("right");
    assert!(reconcile(ledger, job, seen(&[]), LONG).await?.drift.is_none());
    let now = [live("e1", "u1", Some(Spot)), live("e2", "u2", Some(OnDemand))];
    assert_eq!(reconcile(ledger, job, seen(&now), LONG).await?.drift.missing, 2);
    let before = ledger.get(job).await?;
    assert!(reconcile(ledger, job, seen(&now), Duration::ZERO).await?.drift.is_none());
    assert_eq!(ledger.get(job).await?, before);
    Ok(())
}

/// An admission comes before its pod; a pod that was seen has no excuse.
pub async fn only_a_placement_without_a_pod_has_the_grace(ledger: &impl Ledger) -> Checked {
    let job = job("grace");
    ledger.place(job, &request("waiting", Some(all_spot()))).await?;
    ledger.place(job, &request("seen", None)).await?;
    let of = |summary: &ReconcileSummary| -> Vec<String> {
        summary.waiting.iter().map(|waiting| waiting.placement.key.clone()).collect()
    };
    let both = reconcile(ledger, job, seen(&[live("seen", "u", None)]), LONG).await?;
    assert_eq!((both.drift, both.counts), (Drift::default(), Counts { spot: 2, on_demand: 0 }));
    assert_eq!(of(&both), ["waiting"]);

    let one = reconcile(ledger, job, seen(&[]), LONG).await?;
    assert_eq!((one.drift, one.counts), (Drift { stale: 1, ..Drift::default() }, Counts { spot: 1, on_demand: 0 }));
    assert_eq!((of(&one), one.recheck_after), (vec!["waiting".to_owned()], None));
    assert_eq!(ledger.release(job, "seen", None, None).await?, None);
    assert!(reconcile(ledger, job, seen(&[]), Duration::MAX).await?.drift.is_none());

    let none_left = reconcile(ledger, job, seen(&[]), Duration::ZERO).await?;
    let drift = Drift { stale: 1, ..Drift::default() };
    assert_eq!((none_left.drift, none_left.counts.total(), none_left.waiting), (drift, 0, Vec::new()));
    assert_eq!(counts(ledger, job).await?, (0, 0));
    Ok(())
}

/// However the others differ from the cluster.
pub async fn a_reconcile_leaves_the_executors_that_it_does_not_name(ledger: &impl Ledger) -> Checked {
    let job = job("unnamed");
    let all = ["e1", "e2", "e3", "e4"].map(|name| live(name, name, Some(Spot)));
    ledger.learn(job, all_spot(), Some("d1"), true).await?;
    reconcile(ledger, job, seen(&all), LONG).await?;
    ledger.place(job, &request("e5", None)).await?;
    let moved = [live("e2", "e2", Some(OnDemand))];
    let state = JobState { live: &moved, gone: &["e3", "e5", "unknown"], ..JobState::default() };
    let ReconcileOutcome::Done(summary) = ledger.reconcile(job, &state, LONG, Term(1)).await? else {
        return Err(StoreError::InvalidReply("superseded".to_owned()));
    };
    assert_eq!(summary.drift, Drift { stale: 1, wrong_capacity: 1, ..Drift::default() });
    assert_eq!((summary.counts, summary.has_exact_counts), (Counts { spot: 3, on_demand: 1 }, true));
    assert_eq!(keys(ledger, job).await?.iter().map(String::as_str).collect::<Vec<_>>(), ["e1", "e2", "e4", "e5"]);
    let ended = JobState { gone: &["e5"], ended: true, ..JobState::default() };
    let ReconcileOutcome::Done(summary) = ledger.reconcile(job, &ended, Duration::ZERO, Term(1)).await? else {
        return Err(StoreError::InvalidReply("superseded".to_owned()));
    };
    assert_eq!((summary.drift.stale, summary.counts.total(), summary.policy), (1, 3, Some(all_spot())));
    Ok(())
}

/// Whatever order the changes are named in, and however often.
pub async fn a_reconcile_in_parts_ends_like_one_of_all(ledger: &impl Ledger) -> Checked {
    let (parts, whole) = (job("in-parts"), job("in-one-call"));
    let names: Vec<String> = (0..600).map(|number| format!("e{number}")).collect();
    let now: Vec<_> = names.iter().skip(100).map(|name| live(name, name, Some(Spot))).collect();
    for job in [parts, whole] {
        ledger.learn(job, policy(500_000_000, 0), Some("d1"), true).await?;
        for name in names.iter().take(300) {
            ledger.place(job, &request(name, None)).await?;
        }
    }
    reconcile(ledger, whole, seen(&now), Duration::ZERO).await?;
    let gone: Vec<&str> = names.iter().take(100).map(String::as_str).collect();
    for (live, gone) in now.chunks(37).rev().map(|live| (live, [].as_slice())).chain([([].as_slice(), gone.as_slice())])
    {
        for _ in 0..2 {
            ledger.reconcile(parts, &JobState { live, gone, ..JobState::default() }, Duration::ZERO, Term(1)).await?;
        }
    }
    let (parts, whole) = (ledger.get(parts).await?.unwrap_or_default(), ledger.get(whole).await?.unwrap_or_default());
    assert_eq!(without_times(&parts), without_times(&whole));
    assert_eq!(whole.counts(), Counts { spot: 500, on_demand: 0 });
    Ok(())
}

/// A deletion is reviewed before the cluster shows it; one that was refused after that comes back.
pub async fn a_released_executor_is_not_added_during_the_release_grace(ledger: &impl Ledger) -> Checked {
    let job = job("going");
    let now = [live("e1", "u 1", Some(Spot)), live("e2", "u2", Some(Spot))];
    ledger.learn(job, all_spot(), Some("d1"), true).await?;
    reconcile(ledger, job, seen(&now), LONG).await?;
    assert_eq!(ledger.release(job, "e1", Some("u 1"), None).await?, Some(Spot));
    let ReconcileSummary { drift, counts: one, recheck_after, .. } = reconcile(ledger, job, seen(&now), LONG).await?;
    assert_eq!((drift, one), (Drift::default(), Counts { spot: 1, on_demand: 0 }));
    assert!(
        recheck_after.is_some_and(|recheck_after| (1..=JobLedger::RELEASE_GRACE).contains(&recheck_after)),
        "{recheck_after:?}"
    );
    // A new executor by its name waits for a pod of its own.
    ledger.place(job, &request("e1", None)).await?;
    let ReconcileSummary { drift, counts: two, .. } = reconcile(ledger, job, seen(&now), LONG).await?;
    assert_eq!((drift, two), (Drift::default(), Counts { spot: 2, on_demand: 0 }));
    let unseen = ledger.get(job).await?.and_then(|ledger| ledger.entries().get("e1").cloned());
    assert_eq!(unseen.map(|entry| entry.uid), Some(None));
    assert_eq!(ledger.release(job, "e1", None, None).await?, Some(Spot));
    let summary = reconcile(ledger, job, seen(&now), Duration::ZERO).await?;
    let drift = Drift { missing: 1, ..Drift::default() };
    let (counts, policy) = (Counts { spot: 2, on_demand: 0 }, Some(all_spot()));
    let has_exact_counts = true;
    assert_eq!(summary, ReconcileSummary { drift, counts, has_exact_counts, policy, ..ReconcileSummary::default() });
    Ok(())
}

/// It may not be bound yet, and carry no decision.
pub async fn a_live_executor_of_unknown_capacity_is_not_added(ledger: &impl Ledger) -> Checked {
    let job = job("unknown-capacity");
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    let now = [live("e1", "u1", None), live("e2", "u2", None)];
    assert!(reconcile(ledger, job, seen(&now), Duration::ZERO).await?.drift.is_none());
    assert_eq!(counts(ledger, job).await?, (1, 0));
    Ok(())
}

/// Without one the noted one stays.
pub async fn a_reconciled_policy_replaces_the_stored_one(ledger: &impl Ledger) -> Checked {
    let job = job("reconciled-policy");
    reconcile(ledger, job, asking(all_spot()), LONG).await?;
    assert_eq!(of_known_job(ledger.place(job, &request("e1", None)).await?), placed(Spot, NEW, 1, 0));
    reconcile(ledger, job, asking(all_on_demand()), LONG).await?;
    reconcile(ledger, job, seen(&[]), LONG).await?;
    assert_eq!(of_known_job(ledger.place(job, &request("e2", None)).await?), placed(OnDemand, NEW, 1, 1));
    Ok(())
}

/// A driver may state a ratio and no base, or one of them wrongly.
pub async fn a_reconciled_field_replaces_the_stored_one(ledger: &impl Ledger) -> Checked {
    let job = job("overrides-in-part");
    let noted = async || -> Result<Option<Policy>, StoreError> {
        Ok(ledger.get(job).await?.and_then(|ledger| ledger.policy()))
    };
    let ratio = JobState {
        overrides: PolicyOverrides { spot_ratio: Some(SpotRatio::ZERO), ..PolicyOverrides::default() },
        ..seen(&[])
    };
    let base =
        JobState { overrides: PolicyOverrides { on_demand_base: Some(7), ..PolicyOverrides::default() }, ..seen(&[]) };
    let there = [live("e1", "u", Some(Spot))];
    for part in [ratio, base] {
        reconcile(ledger, job, part, LONG).await?;
        assert_eq!(ledger.get(job).await?, None);
        reconcile(ledger, job, JobState { live: &there, ..part }, LONG).await?;
        assert_eq!(noted().await?, None);
        assert_eq!(ledger.place(job, &request("e2", None)).await?, PlaceOutcome::NeedPolicy);
        reconcile(ledger, job, seen(&[]), LONG).await?;
    }
    ledger.learn(job, policy(300_000_000, 2), Some("d1"), true).await?;
    reconcile(ledger, job, ratio, LONG).await?;
    assert_eq!(noted().await?, Some(policy(0, 2)));
    reconcile(ledger, job, base, LONG).await?;
    assert_eq!(noted().await?, Some(policy(0, 7)));
    Ok(())
}

/// A placement may still wait for its pod.
pub async fn an_ended_jobs_policy_goes_with_its_last_executor(ledger: &impl Ledger) -> Checked {
    let job = job("ended");
    let ended = JobState { ended: true, ..seen(&[]) };
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    ledger.place(job, &request("e2", None)).await?;
    ledger.release(job, "e2", Some("u2"), None).await?;
    reconcile(ledger, job, ended, LONG).await?;
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(all_spot()));
    reconcile(ledger, job, seen(&[]), Duration::ZERO).await?;
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(all_spot()));
    // Whatever was known of its driver.
    reconcile(ledger, job, JobState { ended: true, ..asking(all_on_demand()) }, Duration::ZERO).await?;
    assert_eq!(ledger.get(job).await?, None);
    // Nothing of it is left for a later job by that id, neither its policy nor what was released.
    assert_eq!(ledger.place(job, &request("e3", None)).await?, PlaceOutcome::NeedPolicy);
    ledger.place(job, &request("e2", Some(all_spot()))).await?;
    assert_eq!(ledger.release(job, "e2", Some("u2"), None).await?, Some(Spot));
    Ok(())
}

/// Its leader does not know yet that another has taken over.
pub async fn an_earlier_term_changes_nothing(ledger: &impl Ledger) -> Checked {
    for (earlier, later) in [(0, 1), (9, 10), (10, 11), (999_999_999, Term::MAX.0)] {
        let id = format!("term-{later}");
        let job = job(&id);
        let now = [live("e1", "u1", Some(Spot))];
        let all = JobState { live: &now, overrides: overrides(all_spot()), ..JobState::default() };
        let none = JobState { overrides: overrides(all_on_demand()), ended: true, ..JobState::default() };
        for term in [earlier, earlier, later, later] {
            let reconciled = reconcile_all(ledger, job, all, Duration::ZERO, Term(term)).await?;
            assert!(matches!(reconciled, ReconcileOutcome::Done(_)), "{term}: {reconciled:?}");
        }
        ledger.place(job, &request("e2", None)).await?;
        ledger.release(job, "e1", None, None).await?;
        let before = ledger.get(job).await?;
        assert_eq!(before.as_ref().map(JobLedger::term), Some(Term(later)));
        let reconciled = reconcile_all(ledger, job, none, Duration::ZERO, Term(earlier)).await?;
        assert_eq!(reconciled, ReconcileOutcome::Superseded(Term(later)), "{earlier}");
        assert_eq!(ledger.get(job).await?, before);
    }
    Ok(())
}

/// A job that comes back by its id may be under leaders who count anew.
pub async fn a_dropped_ledger_loses_its_term(ledger: &impl Ledger) -> Checked {
    let job = job("forgotten");
    let now = [live("e1", "u1", Some(Spot))];
    for way in 0..3 {
        let reconciled = reconcile_all(ledger, job, seen(&now), Duration::ZERO, Term(5)).await?;
        assert!(matches!(reconciled, ReconcileOutcome::Done(_)), "after way {way}: {reconciled:?}");
        match way {
            0 => drop(ledger.release(job, "e1", Some("u1"), None).await?),
            1 => drop(reconcile_all(ledger, job, seen(&[]), Duration::ZERO, Term(5)).await?),
            _ => {
                ledger.learn(job, all_spot(), Some("d1"), true).await?;
                let ended = JobState { ended: true, ..seen(&[]) };
                reconcile_all(ledger, job, ended, Duration::ZERO, Term(5)).await?;
            }
        }
        assert_eq!(ledger.get(job).await?, None, "way {way}");
        let reconciled = reconcile_all(ledger, job, seen(&now), Duration::ZERO, Term(4)).await?;
        assert!(matches!(reconciled, ReconcileOutcome::Done(_)), "way {way}: {reconciled:?}");
    }
    Ok(())
}

/// Place, release, reconcile and the others alike.
pub async fn calls_do_not_create_a_ledger_for_an_unknown_job(ledger: &impl Ledger) -> Checked {
    let job = job("unknown");
    ledger.place(job, &request("e1", None)).await?;
    ledger.release(job, "e1", Some("u"), None).await?;
    reconcile(ledger, job, seen(&[]), Duration::ZERO).await?;
    reconcile(ledger, job, seen(&[live("e1", "u", None)]), Duration::ZERO).await?;
    assert_eq!(ledger.get(job).await?, None);
    Ok(())
}

/// Of a job with executors, of one that has a policy alone, and of none.
pub async fn a_record_is_right_and_creates_no_ledger(ledger: &impl Ledger) -> Checked {
    let job = job("counts");
    assert_eq!(ledger.record(job).await?, None);
    assert_eq!(ledger.get(job).await?, None);
    ledger.learn(job, policy(500_000_000, 0), Some("d1"), true).await?;
    let half = Some(policy(500_000_000, 0));
    assert_eq!(ledger.record(job).await?, Some(JobRecord { policy: half, ..JobRecord::default() }));
    for name in ["e1", "e2", "e3", "e4", "e5"] {
        ledger.place(job, &request(name, None)).await?;
    }
    ledger.release(job, "e2", None, None).await?;
    let before = ledger.get(job).await?;
    assert_eq!(
        ledger.record(job).await?,
        Some(JobRecord { counts: Counts { spot: 3, on_demand: 1 }, policy: half, ..JobRecord::default() })
    );
    assert_eq!(ledger.get(job).await?, before);
    reconcile(ledger, job, JobState { ended: true, ..seen(&[]) }, Duration::ZERO).await?;
    assert_eq!(ledger.record(job).await?, None);
    // Executors without a policy.
    ledger.place(job, &PlaceRequest { required: Some(OnDemand), ..request("e1", None) }).await?;
    assert_eq!(
        ledger.record(job).await?,
        Some(JobRecord { counts: Counts { spot: 0, on_demand: 1 }, ..JobRecord::default() })
    );
    Ok(())
}

/// Page by page, whatever the names are, and without jobs whose ledger is gone.
pub async fn every_job_with_a_ledger_is_listed(ledger: &impl Ledger) -> Checked {
    let mut all: Vec<String> = (0..2_000).map(|number| format!("spark-{number}")).collect();
    all.extend(TEXTS.map(str::to_owned));
    let of = |id| JobRef { namespace: "contract-jobs", app_id: id };
    for (number, id) in all.iter().enumerate() {
        if number % 2 == 0 {
            ledger.learn(of(id), all_spot(), Some("d1"), true).await?;
        } else {
            ledger.place(of(id), &PlaceRequest { required: Some(Spot), ..request("e1", None) }).await?;
        }
    }
    reconcile(ledger, of("spark-0"), JobState { ended: true, ..seen(&[]) }, Duration::ZERO).await?;
    ledger.release(of("spark-1"), "e1", None, None).await?;

    let (mut told, mut from, mut pages) = (BTreeSet::new(), Some(None), 0);
    while let Some(cursor) = from {
        let JobPage { jobs, next } = ledger.list_jobs(cursor).await?;
        told.extend(jobs.into_iter().filter(|job| job.namespace == "contract-jobs").map(|job| job.app_id));
        from = next.map(Some);
        pages += 1;
        assert!(pages < 10_000, "there is always another page");
    }
    assert_eq!(told, all.into_iter().skip(2).collect());
    Ok(())
}

/// From it, a reconciler detects that the store has lost changes.
pub async fn a_heartbeat_returns_the_one_before(ledger: &impl Ledger) -> Checked {
    let mut before = None;
    for mark in [7, 7, u64::MAX, 0, 8] {
        assert_eq!(ledger.heartbeat(mark).await?, before);
        before = Some(mark);
    }
    Ok(())
}

/// One was refused; one was placed again, one has its pod by now, and one is unknown.
pub async fn only_placements_that_are_still_unconfirmed_are_removed(ledger: &impl Ledger) -> Checked {
    let job = job("refused");
    for name in ["refused", "again", "alive"] {
        ledger.place(job, &request(name, Some(all_spot()))).await?;
    }
    let reconciled = ledger.reconcile(job, &seen(&[]), LONG, Term(2)).await?;
    let mut unconfirmed = waiting(&reconciled)?;
    let mut names: Vec<_> = unconfirmed.iter().map(|placement| placement.key.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["again", "alive", "refused"]);
    // A placement in the same millisecond would not be another one.
    let first = unconfirmed.iter().map(|placement| placement.placed_at).max();
    let again = async || -> Result<Option<u64>, StoreError> {
        ledger.place(job, &request("again", None)).await?;
        Ok(ledger.get(job).await?.and_then(|ledger| ledger.entries().get("again").map(|entry| entry.placed_at)))
    };
    while again().await? == first {}
    ledger.reconcile(job, &seen(&[live("alive", "u", None)]), LONG, Term(2)).await?;
    unconfirmed.push(Unconfirmed { placed_at: 0, key: "unknown".to_owned() });

    let before = ledger.get(job).await?;
    let earlier = ledger.remove_unconfirmed(job, &unconfirmed, Term(1)).await?;
    assert_eq!(earlier, RemovalOutcome::Superseded(Term(2)));
    assert_eq!(ledger.get(job).await?, before);
    let done = RemovalOutcome::Done { removed: 1, counts: Counts { spot: 2, on_demand: 0 } };
    assert_eq!(ledger.remove_unconfirmed(job, &unconfirmed, Term(2)).await?, done);
    assert_eq!(counts(ledger, job).await?, (2, 0));
    let none = RemovalOutcome::Done { removed: 0, counts: Counts { spot: 2, on_demand: 0 } };
    assert_eq!(ledger.remove_unconfirmed(job, &unconfirmed, Term(2)).await?, none);
    Ok(())
}

/// The placements that a reconcile has reported as waiting.
fn waiting(reconciled: &ReconcileOutcome) -> Result<Vec<Unconfirmed>, StoreError> {
    match reconciled {
        ReconcileOutcome::Done(summary) => {
            Ok(summary.waiting.iter().map(|waiting| waiting.placement.clone()).collect())
        }
        ReconcileOutcome::Superseded(_) => Err(StoreError::InvalidReply(format!("{reconciled:?}"))),
    }
}

/// The oldest first, even if no executor is named.
pub async fn many_waiting_placements_are_reported_in_parts(ledger: &impl Ledger) -> Checked {
    let job = job("many-refused");
    let all = JobLedger::WAITING_REPORTED + 10;
    for number in 0..all {
        let name = format!("e{number}");
        ledger.place(job, &PlaceRequest { required: Some(Spot), ..request(&name, None) }).await?;
    }
    let mut left = all as u64;
    while left > 0 {
        let reconciled = ledger.reconcile(job, &seen(&[]), LONG, Term(1)).await?;
        let waiting = waiting(&reconciled)?;
        assert_eq!(waiting.len() as u64, left.min(JobLedger::WAITING_REPORTED as u64));
        assert!(waiting.is_sorted_by_key(|placement| placement.placed_at), "{waiting:?}");
        left -= waiting.len() as u64;
        let more_waiting = matches!(reconciled, ReconcileOutcome::Done(summary) if summary.more_waiting);
        assert_eq!(more_waiting, left > 0);
        let counts = Counts { spot: left, on_demand: 0 };
        let done = RemovalOutcome::Done { removed: waiting.len() as u64, counts };
        assert_eq!(ledger.remove_unconfirmed(job, &waiting, Term(1)).await?, done);
    }
    assert_eq!(ledger.get(job).await?, None);
    Ok(())
}

/// Each change of an entry, as far as it concerns its pod.
pub async fn an_entry_waits_until_its_pod_is_found_and_again_after_its_next_placement(ledger: &impl Ledger) -> Checked {
    let job = job("waiting");
    let found = [live("e1", "u1", None)];
    let shows = async |state: JobState<'_>| -> Result<Vec<String>, StoreError> {
        let reconciled = ledger.reconcile(job, &state, LONG, Term(1)).await?;
        Ok(waiting(&reconciled)?.into_iter().map(|placement| placement.key).collect())
    };
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    assert_eq!(shows(seen(&[])).await?, ["e1"]);
    assert_eq!(shows(JobState { gone: &["e1"], ..seen(&[]) }).await?, ["e1"], "younger than the grace");
    assert!(shows(seen(&found)).await?.is_empty());
    ledger.place(job, &request("e1", None)).await?;
    assert_eq!(shows(seen(&[])).await?, ["e1"], "it may be another pod");
    assert!(shows(seen(&found)).await?.is_empty());
    ledger.release(job, "e1", Some("u1"), None).await?;
    ledger.place(job, &request("e2", Some(all_spot()))).await?;
    assert_eq!(shows(seen(&[])).await?, ["e2"]);
    ledger.release(job, "e2", None, None).await?;
    ledger.place(job, &request("e3", Some(all_spot()))).await?;
    assert_eq!(shows(seen(&[])).await?, ["e3"]);
    Ok(())
}

/// By the first executor or by the driver.
pub async fn a_new_job_is_reported_once(ledger: &impl Ledger) -> Checked {
    let is_new_job = |outcome| matches!(outcome, PlaceOutcome::Placed(Placed { is_new_job: true, .. }));
    let placed = job("new-by-an-executor");
    assert!(is_new_job(ledger.place(placed, &request("e1", Some(all_spot()))).await?));
    assert!(!is_new_job(ledger.place(placed, &request("e1", None)).await?));
    ledger.release(placed, "e1", None, None).await?;
    assert!(!is_new_job(ledger.place(placed, &request("e2", None)).await?), "the ledger has a policy");
    let learned = job("new-by-a-driver");
    assert_eq!(ledger.learn(learned, all_spot(), Some("d1"), true).await?, LearnOutcome::Stored { is_new_job: true });
    assert_eq!(ledger.learn(learned, all_spot(), Some("d1"), true).await?, LearnOutcome::Stored { is_new_job: false });
    assert!(!is_new_job(ledger.place(learned, &request("e1", None)).await?));
    Ok(())
}

/// A namespace has created too many.
pub async fn without_permission_no_ledger_is_created(ledger: &impl Ledger) -> Checked {
    let job = job("not-allowed");
    let existing = PlaceRequest { may_create: false, ..request("e1", Some(all_spot())) };
    let required = PlaceRequest { required: Some(OnDemand), ..existing };
    for asked in [existing, required] {
        assert_eq!(ledger.peek(job, &asked).await?, PlaceOutcome::NoLedger);
        assert_eq!(ledger.place(job, &asked).await?, PlaceOutcome::NoLedger);
    }
    assert_eq!(ledger.learn(job, all_spot(), Some("d1"), false).await?, LearnOutcome::NoLedger);
    assert_eq!(ledger.get(job).await?, None);
    ledger.learn(job, all_spot(), Some("d1"), true).await?;
    assert_eq!(
        ledger.learn(job, all_on_demand(), Some("d1"), false).await?,
        LearnOutcome::Stored { is_new_job: false }
    );
    assert_eq!(ledger.place(job, &existing).await?, placed(OnDemand, NEW, 0, 1));
    Ok(())
}

/// Its policy is stored, so that it is looked up once.
pub async fn a_job_that_is_opted_out_places_no_executor(ledger: &impl Ledger) -> Checked {
    let job = job("opted-out");
    let asked = PlaceRequest { driver: Some("d1"), ..request("e1", Some(off())) };
    let not_allowed = PlaceRequest { may_create: false, ..asked };
    assert_eq!(ledger.place(job, &not_allowed).await?, OPTED_OUT);
    let by_itself = PlaceRequest { policy: None, overrides: overrides_of(Some(SpotRatio::Off), None), ..asked };
    assert_eq!(ledger.place(job, &by_itself).await?, OPTED_OUT);
    let new = PlaceOutcome::OptedOut { is_new_job: true };
    assert_eq!(ledger.peek(job, &asked).await?, new);
    assert_eq!(ledger.get(job).await?, None);
    assert_eq!(ledger.place(job, &asked).await?, new);
    assert_eq!(ledger.record(job).await?, Some(JobRecord { policy: Some(off()), ..JobRecord::default() }));
    let before = ledger.get(job).await?;
    assert_eq!(before.as_ref().and_then(JobLedger::driver), Some("d1"));
    for required in [None, Some(Spot), Some(OnDemand)] {
        for (may_create, on_demand_base) in [(true, None), (false, Some(1))] {
            let overrides = overrides_of(None, on_demand_base);
            let asked = PlaceRequest { required, may_create, overrides, ..request("e2", Some(all_spot())) };
            assert_eq!(ledger.peek(job, &asked).await?, OPTED_OUT);
            assert_eq!(ledger.place(job, &asked).await?, OPTED_OUT);
        }
    }
    assert_eq!(ledger.get(job).await?, before);
    // Nothing is left of it.
    reconcile(ledger, job, JobState { ended: true, ..seen(&[]) }, LONG).await?;
    assert_eq!(ledger.get(job).await?, None);
    Ok(())
}

/// It is counted, whatever its job states.
pub async fn an_executors_own_ratio_precedes_off(ledger: &impl Ledger) -> Checked {
    let job = job("own-ratio-in-an-opted-out-job");
    ledger.learn(job, off(), Some("d1"), true).await?;
    let own = PlaceRequest { overrides: overrides_of(Some(SpotRatio::ONE), None), ..request("e1", None) };
    // The base is the job's.
    for (executor, outcome) in
        [("e1", placed(OnDemand, NEW, 0, 1)), ("e2", placed(OnDemand, NEW, 0, 2)), ("e3", placed(Spot, NEW, 1, 2))]
    {
        assert_eq!(ledger.place(job, &PlaceRequest { key: executor, ..own }).await?, outcome);
    }
    let required = PlaceRequest { required: Some(OnDemand), key: "e4", ..own };
    assert_eq!(ledger.place(job, &required).await?, placed(OnDemand, NEW, 1, 3));
    assert_eq!(ledger.place(job, &request("e5", None)).await?, OPTED_OUT);
    assert_eq!(counts(ledger, job).await?, (1, 3));
    // In a job with a ratio, an executor that is opted out is not placed.
    ledger.learn(job, all_spot(), Some("d1"), true).await?;
    let out = PlaceRequest { overrides: overrides_of(Some(SpotRatio::Off), None), ..request("e5", None) };
    assert_eq!(ledger.place(job, &out).await?, OPTED_OUT);
    assert_eq!(ledger.place(job, &request("e5", None)).await?, placed(Spot, NEW, 2, 3));
    Ok(())
}

/// Until it states a ratio again.
pub async fn a_job_that_is_switched_off_keeps_its_executors_and_gets_no_further_ones(ledger: &impl Ledger) -> Checked {
    let job = job("switched-off");
    ledger.place(job, &PlaceRequest { driver: Some("d1"), ..request("e1", Some(all_spot())) }).await?;
    ledger.place(job, &request("e2", None)).await?;
    ledger.learn(job, off(), Some("d1"), true).await?;
    assert_eq!(ledger.place(job, &request("e1", None)).await?, placed(Spot, KNOWN, 2, 0));
    assert_eq!(ledger.place(job, &request("e3", None)).await?, OPTED_OUT);
    let now = [live("e1", "u1", Some(OnDemand)), live("e3", "u3", Some(Spot))];
    let ReconcileSummary { drift, counts: kept, policy, .. } =
        reconcile(ledger, job, seen(&now), Duration::ZERO).await?;
    assert_eq!(drift, Drift { missing: 0, stale: 1, wrong_capacity: 1 });
    assert_eq!((kept, policy), (Counts { spot: 0, on_demand: 1 }, Some(off())));
    assert_eq!(counts(ledger, job).await?, (0, 1));
    // The driver states a ratio again, and then it does not.
    let stated = |spot_ratio| JobState { live: &now, overrides: overrides_of(Some(spot_ratio), None), ..seen(&[]) };
    let drift = reconcile(ledger, job, stated(SpotRatio::HALF), LONG).await?.drift;
    assert_eq!(drift, Drift { missing: 1, ..Drift::default() });
    assert_eq!(ledger.release(job, "e3", Some("u3"), None).await?, Some(Spot));
    assert!(reconcile(ledger, job, stated(SpotRatio::Off), Duration::ZERO).await?.drift.is_none());
    assert_eq!(counts(ledger, job).await?, (0, 1));
    Ok(())
}

/// A submission was repeated while the first one runs. One wants only on-demand, the other only spot.
pub async fn live_drivers_of_one_job_keep_apart_in_any_order(ledger: &impl Ledger) -> Checked {
    // Of each driver, either its policy is learned or its first executor brings it.
    for order in 0..8 {
        let id = format!("two-drivers-{order}");
        let job = job(&id);
        let mut drivers = [("d1", all_on_demand(), OnDemand), ("d 2}", all_spot(), Spot)];
        if order & 4 != 0 {
            drivers.reverse();
        }
        for (bit, (driver, policy, _)) in drivers.iter().enumerate() {
            if order & (1 << bit) != 0 {
                // The second one takes over a ledger without executors.
                let stored = LearnOutcome::Stored { is_new_job: order & 0b11 != 0b11 || bit == 0 };
                assert_eq!(ledger.learn(job, *policy, Some(driver), true).await?, stored, "{order}");
            }
        }
        for number in 0..4 {
            for (driver, policy, capacity) in drivers {
                let name = format!("{driver}-exec-{number}");
                let asked = PlaceRequest { driver: Some(driver), ..request(&name, Some(policy)) };
                assert_eq!(
                    of_known_job(ledger.peek(job, &asked).await?),
                    of_known_job(ledger.place(job, &asked).await?),
                    "{name}"
                );
                let PlaceOutcome::Placed(placed) = ledger.place(job, &asked).await? else {
                    return Err(StoreError::InvalidReply(name));
                };
                assert_eq!((placed.capacity, placed.counts.total()), (capacity, number + 1), "{order}, {name}");
            }
        }
        // One of them has the job's ledger.
        let first = ledger.get(job).await?.unwrap_or_default();
        let first_driver = first.driver().unwrap_or_default().to_owned();
        for (driver, policy, _) in drivers {
            let own = JobId::of_driver(job, driver);
            let used = if driver == first_driver { job } else { own.as_job_ref() };
            let held = ledger.get(used).await?.unwrap_or_default();
            assert_eq!(
                (held.driver(), held.policy(), held.counts().total()),
                (Some(driver), Some(policy), 4),
                "{order}, {driver}"
            );
            // A call for the driver's own ledger is for that, whatever is stored there.
            if used != job {
                let asked = PlaceRequest { driver: Some(driver), ..request("by its own job id", None) };
                assert!(matches!(ledger.place(used, &asked).await?, PlaceOutcome::Placed(placed) if placed.is_new));
                assert_eq!(ledger.get(used).await?.map(|ledger| ledger.counts().total()), Some(5));
            }
        }
    }
    Ok(())
}

/// An operator creates it anew under the same name.
pub async fn a_retried_driver_keeps_the_ledger(ledger: &impl Ledger) -> Checked {
    let job = job("retried");
    let first = PlaceRequest { driver: Some("d"), ..request("e1", Some(all_on_demand())) };
    ledger.place(job, &first).await?;
    for policy in [all_spot(), all_on_demand(), all_spot()] {
        let stored = LearnOutcome::Stored { is_new_job: false };
        assert_eq!(ledger.learn(job, policy, Some("d"), true).await?, stored);
        let asked = PlaceRequest { driver: Some("d"), ..request("e1", None) };
        assert_eq!(ledger.place(job, &asked).await?, placed(OnDemand, KNOWN, 0, 1));
        assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(policy));
    }
    Ok(())
}

/// Both drivers may have given an executor the same name.
pub async fn a_release_goes_to_the_ledger_of_its_driver(ledger: &impl Ledger) -> Checked {
    let job = job("two-releases");
    let second = JobId::of_driver(job, "d2");
    for (driver, policy) in [("d1", all_on_demand()), ("d2", all_spot())] {
        ledger.place(job, &PlaceRequest { driver: Some(driver), ..request("e1", Some(policy)) }).await?;
    }
    assert_eq!(ledger.release(job, "e1", Some("u2"), Some("d2")).await?, Some(Spot));
    assert_eq!((counts(ledger, job).await?, counts(ledger, second.as_job_ref()).await?), ((0, 1), (0, 0)));
    assert_eq!(ledger.release(job, "e1", None, Some("d2")).await?, None);
    assert_eq!(ledger.release(job, "e1", Some("u1"), Some("d1")).await?, Some(OnDemand));
    ledger.place(job, &PlaceRequest { driver: Some("d1"), ..request("e2", None) }).await?;
    // Without a driver it is the job's.
    assert_eq!(ledger.release(job, "e2", Some("u3"), None).await?, Some(OnDemand));
    assert_eq!(counts(ledger, job).await?, (0, 0));
    Ok(())
}

/// The apiserver generates the names of all drivers after their admissions.
pub async fn the_policy_of_a_driver_without_a_name_is_left_to_the_lookup_of_its_first_executor(
    ledger: &impl Ledger,
) -> Checked {
    let job = job("generated-name");
    for policy in [all_on_demand(), all_spot(), all_spot()] {
        for may_create in [true, false] {
            assert_eq!(ledger.learn(job, policy, None, may_create).await?, LearnOutcome::NotStored);
            assert_eq!(ledger.get(job).await?, None);
        }
    }
    // Both drivers run, and each executor is of the driver that owns it.
    for (driver, policy, capacity) in [("d2", all_spot(), Spot), ("d1", all_on_demand(), OnDemand)] {
        let asked = PlaceRequest { driver: Some(driver), ..request("e1", None) };
        assert_eq!(ledger.place(job, &asked).await?, PlaceOutcome::NeedPolicy, "{driver}");
        let outcome = ledger.place(job, &PlaceRequest { policy: Some(policy), ..asked }).await?;
        assert!(matches!(&outcome, PlaceOutcome::Placed(placed) if placed.capacity == capacity), "{outcome:?}");
    }
    Ok(())
}

/// What it has stored for the executors of another driver stays.
pub async fn a_driver_of_unknown_name_does_not_replace_the_policy_of_another(ledger: &impl Ledger) -> Checked {
    let job = job("generated-second-name");
    let stored = LearnOutcome::Stored { is_new_job: true };
    assert_eq!(ledger.learn(job, all_on_demand(), Some("d1"), true).await?, stored);
    ledger.place(job, &PlaceRequest { driver: Some("d1"), ..request("e1", None) }).await?;
    let before = ledger.get(job).await?;
    for may_create in [true, false] {
        assert_eq!(ledger.learn(job, all_spot(), None, may_create).await?, LearnOutcome::NotStored);
    }
    assert_eq!(ledger.get(job).await?, before);
    // The other driver's ledger is a new one, too.
    assert_eq!(ledger.learn(job, all_spot(), Some("d2"), false).await?, LearnOutcome::NoLedger);
    assert_eq!(ledger.learn(job, all_spot(), Some("d2"), true).await?, LearnOutcome::Stored { is_new_job: true });
    let asked = PlaceRequest { driver: Some("d3"), may_create: false, ..request("e1", Some(all_spot())) };
    assert_eq!(ledger.place(job, &asked).await?, PlaceOutcome::NoLedger);
    assert_eq!(ledger.get(job).await?, before);
    Ok(())
}

/// It has the executors of a driver that it does not name: an earlier version did not, and not every executor names one.
pub async fn a_ledger_that_does_not_name_its_driver_stays_as_it_is_but_for_its_policy(ledger: &impl Ledger) -> Checked {
    for driver in [None, Some("d2")] {
        let id = format!("unnamed-{}", driver.is_some());
        let job = job(&id);
        ledger.place(job, &request("e1", Some(all_on_demand()))).await?;
        for policy in [all_spot(), all_on_demand()] {
            assert_eq!(ledger.learn(job, policy, driver, true).await?, LearnOutcome::NotStored, "{driver:?}");
            let held = ledger.get(job).await?.unwrap_or_default();
            assert_eq!((held.policy(), held.driver(), held.counts().total()), (None, None, 1), "{driver:?}");
            // Until then everything that is in it counts.
            assert_eq!(ledger.place(job, &request("e1", None)).await?, placed(OnDemand, KNOWN, 0, 1));
            assert_eq!(ledger.place(job, &request("e2", None)).await?, PlaceOutcome::NeedPolicy);
        }
        let asked = PlaceRequest { driver: Some("d1"), ..request("e2", Some(all_on_demand())) };
        assert_eq!(ledger.place(job, &asked).await?, placed(OnDemand, NEW, 0, 2));
        assert_eq!(ledger.learn(job, all_spot(), Some("d2"), true).await?, LearnOutcome::Stored { is_new_job: true });
        assert_eq!(ledger.get(job).await?.unwrap_or_default().policy(), Some(all_on_demand()));
    }
    Ok(())
}

/// The first driver has ended, and the second one lives on.
pub async fn a_reconcile_hands_the_ledger_to_another_driver(ledger: &impl Ledger) -> Checked {
    let job = job("handed-over");
    let second = JobId::of_driver(job, "d2");
    for (driver, policy) in [("d1", all_on_demand()), ("d2", all_spot())] {
        ledger.learn(job, policy, Some(driver), true).await?;
        ledger.place(job, &PlaceRequest { driver: Some(driver), ..request(driver, None) }).await?;
    }
    let now = [live("d2", "u2", Some(Spot))];
    let state = JobState { live: &now, driver: Some("d2"), ..asking(all_spot()) };
    let drift = reconcile(ledger, job, state, Duration::ZERO).await?.drift;
    assert_eq!(drift, Drift { missing: 1, stale: 1, wrong_capacity: 0 });
    reconcile(ledger, second.as_job_ref(), JobState { ended: true, ..seen(&[]) }, Duration::ZERO).await?;
    assert_eq!(ledger.get(second.as_job_ref()).await?, None);
    let next = PlaceRequest { driver: Some("d2"), ..request("next", None) };
    assert_eq!(ledger.place(job, &next).await?, placed(Spot, NEW, 2, 0));
    assert_eq!(ledger.get(job).await?.as_ref().and_then(JobLedger::driver), Some("d2"));
    // It keeps its driver while none is known.
    reconcile(ledger, job, seen(&now), LONG).await?;
    assert_eq!(ledger.get(job).await?.as_ref().and_then(JobLedger::driver), Some("d2"));
    reconcile(ledger, job, JobState { ended: true, driver: Some("d2"), ..seen(&[]) }, Duration::ZERO).await?;
    assert_eq!(ledger.get(job).await?, None);
    Ok(())
}

/// After the store has lost its data, or the webhook was down.
pub async fn an_executor_with_a_ratio_of_its_own_is_found_again_in_a_job_that_is_opted_out(
    ledger: &impl Ledger,
) -> Checked {
    let job = job("found-again");
    let now = [
        LiveExecutor { states_ratio: true, ..live("e1", "u1", Some(Spot)) },
        LiveExecutor { states_ratio: true, ..live("e2", "u2", Some(OnDemand)) },
        LiveExecutor { states_ratio: true, ..live("e3", "u3", None) },
        live("e4", "u4", Some(Spot)),
    ];
    for missing in [2, 0] {
        let state = JobState { live: &now, ..asking(off()) };
        let drift = reconcile(ledger, job, state, LONG).await?.drift;
        assert_eq!(drift, Drift { missing, ..Drift::default() });
        assert_eq!(counts(ledger, job).await?, (1, 1));
    }
    Ok(())
}

/// A submission was repeated before the first one had an executor.
pub async fn the_newest_driver_takes_over_a_ledger_without_executors(ledger: &impl Ledger) -> Checked {
    let job = job("taken-over");
    ledger.learn(job, all_on_demand(), Some("d1"), true).await?;
    let stored = LearnOutcome::Stored { is_new_job: false };
    for (policy, driver) in [(all_on_demand(), "d2"), (all_spot(), "d3")] {
        assert_eq!(ledger.learn(job, policy, Some(driver), true).await?, stored);
        let held = ledger.get(job).await?.unwrap_or_default();
        assert_eq!((held.policy(), held.driver()), (Some(policy), Some(driver)));
    }
    assert_eq!(ledger.place(job, &request("e1", None)).await?, placed(Spot, NEW, 1, 0));
    let is_new = LearnOutcome::Stored { is_new_job: true };
    assert_eq!(ledger.learn(job, all_on_demand(), Some("d4"), true).await?, is_new);
    assert_eq!(ledger.get(job).await?.as_ref().and_then(JobLedger::driver), Some("d3"));
    Ok(())
}

/// The driver of the former policy has ended, and the next one states none, or a part of one.
pub async fn a_ledger_that_is_handed_over_keeps_no_policy_of_the_former_driver(ledger: &impl Ledger) -> Checked {
    let job = job("handed-over-without-a-policy");
    for (driver, stated) in [("d2", overrides_of(None, None)), ("d3", overrides_of(None, Some(2)))] {
        ledger.learn(job, all_spot(), Some("d1"), true).await?;
        ledger.place(job, &PlaceRequest { driver: Some("d1"), ..request("e1", None) }).await?;
        let now = [live("e1", "u1", Some(Spot))];
        let state = JobState { driver: Some(driver), overrides: stated, ..seen(&now) };
        assert_eq!(reconcile(ledger, job, state, LONG).await?.policy, None);
        let asked = PlaceRequest { driver: Some(driver), ..request("e2", None) };
        assert_eq!(ledger.place(job, &asked).await?, PlaceOutcome::NeedPolicy);
        assert_eq!(counts(ledger, job).await?, (1, 0));
        // A policy that is looked up then stays.
        let asked = PlaceRequest { policy: Some(all_on_demand()), ..asked };
        assert_eq!(ledger.place(job, &asked).await?, placed(OnDemand, NEW, 1, 1));
        let state = JobState { driver: Some(driver), ..seen(&now) };
        assert_eq!(reconcile(ledger, job, state, LONG).await?.policy, Some(all_on_demand()));
        reconcile(ledger, job, JobState { ended: true, ..seen(&[]) }, Duration::ZERO).await?;
        assert_eq!(ledger.get(job).await?, None);
    }
    Ok(())
}

/// A dry run is no placement, nor is a request without an answer. It is the ledger that was used.
pub async fn jobs_with_placements_are_taken_once(ledger: &impl Ledger) -> Checked {
    let [first, second, other] = ["placed-1", "placed:2", "not-placed"].map(job);
    ledger.peek(other, &request("e1", Some(all_spot()))).await?;
    ledger.place(other, &request("e1", None)).await?;
    for job in [first, second] {
        ledger.place(job, &request("e1", Some(all_spot()))).await?;
        ledger.place(job, &request("e2", Some(all_spot()))).await?;
    }
    for driver in ["d1", "d2"] {
        let asked = PlaceRequest { driver: Some(driver), ..request(driver, Some(all_spot())) };
        ledger.place(first, &asked).await?;
    }
    let mut taken = BTreeSet::new();
    // A store may note a job a little after its placement. Other tests place executors too.
    for _ in 0..1_000 {
        let jobs = ledger.take_placed().await?;
        taken.extend(jobs.into_iter().map(|job| job.app_id).filter(|id| id.contains("placed")));
        if taken.len() >= 3 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(taken, ["placed-1", "placed-1/d2", "placed:2"].map(str::to_owned).into());
    Ok(())
}

/// Texts that a server, a script or a key might take for something else.
const TEXTS: [&str; 12] = [
    "e1",
    "an executor",
    " ",
    "}{",
    "{e}",
    "e\0one",
    "e\r\n1",
    "spot 0 -",
    "-",
    "été-執行者-🦀",
    "*3\r\n$3\r\nDEL",
    "'; return 1 --",
];

/// As executor, as uid and as job id.
pub async fn names_can_be_any_text(ledger: &impl Ledger) -> Checked {
    for id in TEXTS {
        let id = format!("any {id}");
        let job = job(&id);
        for name in TEXTS {
            ledger.place(job, &request(name, Some(all_spot()))).await?;
            let uid = format!("uid {name}");
            // Removes the executor that was live before it.
            reconcile(ledger, job, seen(&[live(name, &uid, None)]), LONG).await?;
            let shown = ledger.get(job).await?.unwrap_or_default();
            let held: Vec<_> =
                shown.entries().iter().map(|(name, entry)| (name.as_str(), entry.uid.as_deref())).collect();
            assert_eq!(held, [(name, Some(uid.as_str()))], "{id:?}");
        }
        for name in TEXTS {
            ledger.place(job, &request(name, None)).await?;
        }
        assert_eq!(counts(ledger, job).await?, (TEXTS.len() as u64, 0), "{id:?}");
        for name in TEXTS {
            assert_eq!(
                ledger.release(job, name, Some(&format!("uid {name}")), None).await?,
                Some(Spot),
                "{name:?} of {id:?}"
            );
        }
        assert_eq!(counts(ledger, job).await?, (0, 0), "{id:?}");
    }
    Ok(())
}

/// The same executor names, the same job id in another namespace, an id within an id.
pub async fn jobs_are_independent(ledger: &impl Ledger) -> Checked {
    let jobs = [("team-a", "job"), ("team-b", "job"), ("team-a", "job-1"), ("team-a", "JOB"), ("team-a", "job}")]
        .map(|(namespace, id)| JobRef { namespace, app_id: id });
    for (ratio, job) in (0u32..).zip(jobs) {
        ledger.learn(job, policy(ratio, 0), Some("d1"), true).await?;
        ledger.place(job, &request("e1", None)).await?;
        ledger.place(job, &request(job.app_id, None)).await?;
    }
    ledger.release(jobs[0], "e1", None, None).await?;
    reconcile(ledger, jobs[1], asking(policy(1_000, 0)), Duration::ZERO).await?;
    let mut shown = Vec::new();
    for job in jobs {
        let ledger = ledger.get(job).await?.unwrap_or_default();
        shown.push((ledger.policy().map(|policy| policy.spot_ratio.to_string()), ledger.counts().total()));
    }
    assert_eq!(
        shown,
        [("0", 1), ("0.000001", 0), ("0.000000002", 2), ("0.000000003", 2), ("0.000000004", 2)]
            .map(|(ratio, total)| (Some(ratio.to_owned()), total))
    );
    Ok(())
}

/// Spark asks for its executors in batches, and calls are repeated.
pub async fn concurrent_placements_count_once_each(ledger: &impl Ledger) -> Checked {
    let job = job("at-once");
    ledger.learn(job, policy(500_000_000, 0), Some("d1"), true).await?;
    for round in 0..8 {
        let place = async |number: usize| {
            let name = format!("e{round}-{number}");
            ledger.place(job, &request(&name, None)).await
        };
        let answers = tokio::try_join!(place(1), place(1), place(2), place(2), place(3), place(3), place(4), place(4))?;
        let (a, b, ..) = answers;
        let capacity = |outcome| match outcome {
            PlaceOutcome::Placed(placed) => Some(placed.capacity),
            PlaceOutcome::NeedPolicy | PlaceOutcome::NoLedger | PlaceOutcome::OptedOut { .. } => None,
        };
        assert_eq!(capacity(a), capacity(b), "the same executor was placed in two ways");
    }
    // The first goes to spot, and from there each is within one of the ratio: 17 or 16 of 32.
    assert_eq!(counts(ledger, job).await?, (16, 16));
    Ok(())
}

/// In one job, and in one reconcile.
pub async fn ten_thousand_executors_fit_in_a_job(ledger: &impl Ledger) -> Checked {
    const ALL: usize = 10_000;
    let job = job("large");
    let names: Vec<String> = (0..ALL).map(|number| format!("etl-7abe5c93a6f4-exec-{number}")).collect();
    let uids: Vec<String> = (0..ALL).map(|number| format!("0d5c9a54-7f5b-4a0b-9d6e-{number:012}")).collect();
    let all: Vec<LiveExecutor<'_>> =
        names.iter().zip(&uids).map(|(name, uid)| live(name, uid, Some(OnDemand))).collect();
    let (half, rest) = all.split_at(ALL / 2);

    for executor in half {
        ledger.place(job, &request(executor.key, Some(all_spot()))).await?;
    }
    assert_eq!(counts(ledger, job).await?, (5_000, 0));
    let drift = reconcile(ledger, job, seen(&all), Duration::ZERO).await?.drift;
    assert_eq!(drift, Drift { missing: 5_000, stale: 0, wrong_capacity: 5_000 });
    assert_eq!(of_known_job(ledger.place(job, &request("one more", None)).await?), placed(Spot, NEW, 1, 10_000));
    let drift = reconcile(ledger, job, seen(rest), Duration::ZERO).await?.drift;
    assert_eq!(drift, Drift { missing: 0, stale: 5_001, wrong_capacity: 0 });
    assert_eq!(counts(ledger, job).await?, (0, 5_000));
    Ok(())
}

/// What the state of spot has changed about the placement of an executor that requires nothing.
async fn answer_of_spot(
    ledger: &impl Ledger,
    job: JobRef<'_>,
    executor: &str,
) -> Result<(Capacity, SpotAnswer), StoreError> {
    let asked = request(executor, None);
    let peeked = ledger.peek(job, &asked).await?;
    let outcome = ledger.place(job, &asked).await?;
    assert_eq!(outcome, peeked, "{executor}");
    match outcome {
        PlaceOutcome::Placed(placed) => Ok((placed.capacity, placed.spot)),
        other => Err(StoreError::InvalidReply(format!("{other:?}"))),
    }
}

const CLOSED: (Capacity, SpotAnswer) = (OnDemand, SpotAnswer::Closed);
const PROBE: (Capacity, SpotAnswer) = (Spot, SpotAnswer::Probe);

/// Longer than any test takes, in milliseconds.
const LONG_MILLIS: u64 = 86_400_000;

/// As every way to read it shows it.
async fn steering(ledger: &impl Ledger, job: JobRef<'_>) -> Result<Steering, StoreError> {
    let shown = ledger.get(job).await?.unwrap_or_default().steering().clone();
    assert_eq!(ledger.record(job).await?.unwrap_or_default().steering, shown);
    assert_eq!(reconcile(ledger, job, seen(&[]), LONG).await?.steering, shown);
    Ok(shown)
}

/// There is no spot capacity.
pub async fn closed_spot_is_probed_by_one_executor_at_a_time(ledger: &impl Ledger) -> Checked {
    let job = job("starved");
    ledger.learn(job, all_spot(), Some("d1"), true).await?;
    assert_eq!(answer_of_spot(ledger, job, "known").await?, (Spot, SpotAnswer::Unchanged));
    let close = async |retry_after| {
        let steered = ledger.steer(job, Steer::CloseSpot { retry_after }, Term(1)).await;
        assert!(matches!(steered, Ok(SteerOutcome::Done)), "{steered:?}");
        steering(ledger, job).await
    };
    let SpotState::Starved { since: first, retry_at } = close(LONG_MILLIS).await?.spot else {
        return Err(StoreError::InvalidReply("spot is not closed".to_owned()));
    };
    assert_eq!(retry_at - first, LONG_MILLIS);
    for executor in ["e1", "e2"] {
        assert_eq!(answer_of_spot(ledger, job, executor).await?, CLOSED);
    }
    assert_eq!(answer_of_spot(ledger, job, "known").await?, (Spot, SpotAnswer::Unchanged));
    let required = PlaceRequest { required: Some(Spot), ..request("required", None) };
    assert_eq!(ledger.place(job, &required).await?, placed(Spot, NEW, 2, 2));
    // No number is too large.
    let endless = close(u64::MAX).await?.spot;
    assert!(matches!(endless, SpotState::Starved { since, retry_at } if since == first && retry_at > LONG_MILLIS));
    assert_eq!(answer_of_spot(ledger, job, "e3").await?, CLOSED);

    let again = close(0).await?.spot;
    assert!(matches!(again, SpotState::Starved { since, retry_at } if since == first && retry_at >= first));
    for (probe, next) in [("p 1", "p\0}2"), ("p\0}2", "🦀")] {
        assert_eq!(answer_of_spot(ledger, job, probe).await?, PROBE);
        assert_eq!(answer_of_spot(ledger, job, next).await?, CLOSED);
        assert_eq!(answer_of_spot(ledger, job, probe).await?, PROBE, "a repeated request");
        let probing = SpotState::Probing { since: first, executor: probe.to_owned() };
        assert_eq!(steering(ledger, job).await?.spot, probing);
        ledger.release(job, next, None, None).await?;
        ledger.release(job, probe, None, None).await?;
    }
    assert_eq!(answer_of_spot(ledger, job, "p3").await?, PROBE);
    // It found no node.
    close(LONG_MILLIS).await?;
    assert_eq!(answer_of_spot(ledger, job, "e4").await?, CLOSED);
    assert_eq!(ledger.steer(job, Steer::OpenSpot, Term(1)).await?, SteerOutcome::Done);
    assert_eq!(steering(ledger, job).await?, Steering::default());
    assert_eq!(answer_of_spot(ledger, job, "e5").await?, (Spot, SpotAnswer::Unchanged));
    Ok(())
}

/// A pool has too large a share of the job.
pub async fn executors_on_spot_get_the_cap_and_the_instance_types_to_avoid(ledger: &impl Ledger) -> Checked {
    let job = job("avoids");
    let spread = async |asked: PlaceRequest<'_>| -> Result<Spread, StoreError> {
        match ledger.place(job, &asked).await? {
            PlaceOutcome::Placed(placed) => Ok(placed.spread),
            other => Err(StoreError::InvalidReply(format!("{other:?}"))),
        }
    };
    let capped = |cap| PolicyOverrides { max_executors_per_node: Some(cap), ..PolicyOverrides::default() };
    let required = PlaceRequest { required: Some(Spot), ..request("e1", None) };
    assert_eq!(spread(required).await?, Spread::default(), "nobody knows the policy");
    let own = PlaceRequest { overrides: capped(5), ..required };
    assert_eq!(spread(own).await?.max_executors_per_node, Some(5));
    assert_eq!(spread(PlaceRequest { overrides: capped(0), ..required }).await?.max_executors_per_node, Some(0));
    let looked_up = Policy { max_executors_per_node: 3, ..policy(Ratio::ONE_IN_BILLIONTHS, 1) };
    assert_eq!(spread(PlaceRequest { policy: Some(looked_up), ..required }).await?.max_executors_per_node, Some(3));

    let long = "x".repeat(64);
    let names = ["", "a b", "a,b", "-a", &long, "m5.large", "t2", "t_3", "T-4", "t5", "t6", "t7", "t8", "t9"];
    let types = names.map(str::to_owned);
    assert_eq!(ledger.steer(job, Steer::Avoid(&types), Term(1)).await?, SteerOutcome::Done);
    let avoid = types[5..13].to_vec();
    assert_eq!(steering(ledger, job).await?, Steering { spot: SpotState::Open, avoid: avoid.clone() });
    for (asked, cap) in [(request("e1", None), 3), (own, 5)] {
        assert_eq!(spread(asked).await?, Spread { max_executors_per_node: Some(cap), avoid: avoid.clone() });
    }
    assert_eq!(spread(request("e2", None)).await?, Spread::default(), "it is on on-demand");
    ledger.steer(job, Steer::Avoid(&types[5..6]), Term(1)).await?;
    assert_eq!(spread(request("e3", None)).await?.avoid, ["m5.large"]);
    ledger.steer(job, Steer::Avoid(&[]), Term(1)).await?;
    assert_eq!(spread(request("e4", None)).await?, Spread { max_executors_per_node: Some(3), avoid: Vec::new() });
    Ok(())
}

/// A default too, which a store need not keep.
pub async fn a_whole_policy_replaces_every_field(ledger: &impl Ledger) -> Checked {
    let job = job("all-fields");
    let full = Policy {
        max_executors_per_node: 2,
        max_pool_share: Ratio::HALF,
        spot_fallback_seconds: 60,
        spot_retry_seconds: 61,
        ..policy(0, 3)
    };
    for whole in [full, Policy::DEFAULT, full, all_spot()] {
        ledger.learn(job, whole, Some("d1"), true).await?;
        assert_eq!(ledger.record(job).await?.and_then(|record| record.policy), Some(whole));
    }
    // A part replaces that part, with the default too.
    reconcile(ledger, job, asking(full), LONG).await?;
    let overrides = PolicyOverrides { max_executors_per_node: Some(0), ..PolicyOverrides::default() };
    let summary = reconcile(ledger, job, JobState { overrides, ..seen(&[]) }, LONG).await?;
    assert_eq!(summary.policy, Some(Policy { max_executors_per_node: 0, ..full }));
    reconcile(ledger, job, asking(Policy::DEFAULT), LONG).await?;
    assert_eq!(ledger.record(job).await?.and_then(|record| record.policy), Some(Policy::DEFAULT));
    Ok(())
}

/// Its leader does not know yet that another has taken over.
pub async fn an_earlier_term_steers_nothing(ledger: &impl Ledger) -> Checked {
    let job = job("steered-too-late");
    let types = ["m5.large".to_owned()];
    let steers = [Steer::CloseSpot { retry_after: 1 }, Steer::OpenSpot, Steer::Avoid(&types), Steer::Avoid(&[])];
    for steer in steers {
        assert_eq!(ledger.steer(job, steer, Term(1)).await?, SteerOutcome::NoLedger);
        assert_eq!(ledger.get(job).await?, None);
    }
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    reconcile_all(ledger, job, seen(&[]), LONG, Term(10)).await?;
    for steer in [Steer::CloseSpot { retry_after: LONG_MILLIS }, Steer::Avoid(&types)] {
        assert_eq!(ledger.steer(job, steer, Term(10)).await?, SteerOutcome::Done);
    }
    let before = ledger.get(job).await?;
    for steer in steers {
        assert_eq!(ledger.steer(job, steer, Term(9)).await?, SteerOutcome::Superseded(Term(10)));
    }
    assert_eq!(ledger.get(job).await?, before);
    Ok(())
}

/// It is about the job's nodes and not about its driver.
pub async fn steering_is_kept_for_another_driver_and_forgotten_with_the_ledger(ledger: &impl Ledger) -> Checked {
    let job = job("steered-and-handed-over");
    let avoid = ["m5.large".to_owned()];
    for way in 0..3 {
        ledger.learn(job, all_spot(), Some("d1"), true).await?;
        ledger.steer(job, Steer::CloseSpot { retry_after: 0 }, Term(1)).await?;
        ledger.steer(job, Steer::Avoid(&avoid), Term(1)).await?;
        ledger.learn(job, all_spot(), Some("d2"), true).await?;
        assert_eq!(answer_of_spot(ledger, job, "e1").await?, PROBE);
        let summary = reconcile(ledger, job, JobState { driver: Some("d3"), ..seen(&[]) }, LONG).await?;
        assert!(matches!(&summary.steering.spot, SpotState::Probing { executor, .. } if executor == "e1"));
        assert_eq!((&summary.steering, summary.policy), (&steering(ledger, job).await?, None));
        assert_eq!(summary.steering.avoid, avoid);
        match way {
            0 => drop(ledger.release(job, "e1", None, None).await?),
            1 => {
                let placed_at = ledger.get(job).await?.and_then(|ledger| Some(ledger.entries().get("e1")?.placed_at));
                let absent = placed_at.map(|placed_at| Unconfirmed { placed_at, key: "e1".to_owned() });
                ledger.remove_unconfirmed(job, absent.as_slice(), Term(1)).await?;
            }
            _ => {
                let steering = reconcile(ledger, job, seen(&[]), Duration::ZERO).await?.steering;
                assert_eq!(steering, Steering::default());
            }
        }
        assert_eq!(ledger.get(job).await?, None, "way {way}");
        let asked = PlaceRequest { required: Some(Spot), ..request("e2", None) };
        ledger.place(job, &asked).await?;
        assert_eq!(steering(ledger, job).await?, Steering::default(), "way {way}");
        ledger.release(job, "e2", None, None).await?;
    }
    Ok(())
}

/// One call of a random history.
#[derive(Clone, Debug)]
enum Step {
    Place(Ask),
    Peek(Ask),
    Release {
        executor: &'static str,
        uid: Option<&'static str>,
        driver: Option<&'static str>,
    },
    Learn {
        policy: Policy,
        driver: Option<&'static str>,
        may_create: bool,
    },
    Reconcile {
        /// Whose ledger: the job's, or that of one of several drivers.
        ledger_of: Option<&'static str>,
        driver: Option<&'static str>,
        live: Vec<LiveExecutor<'static>>,
        /// The other executors that are named.
        gone: Vec<&'static str>,
        overrides: PolicyOverrides,
        ended: bool,
        term: Term,
        is_patient: bool,
        /// Whether the placements that wait are then removed.
        removes: bool,
    },
    Steer {
        ledger_of: Option<&'static str>,
        steer: RandomSteer,
        term: Term,
    },
    Count,
}

#[derive(Clone, Debug)]
enum RandomSteer {
    Close { retry_after: u64 },
    Open,
    Avoid(Vec<String>),
}

impl RandomSteer {
    fn steer(&self) -> Steer<'_> {
        match self {
            Self::Close { retry_after } => Steer::CloseSpot { retry_after: *retry_after },
            Self::Open => Steer::OpenSpot,
            Self::Avoid(types) => Steer::Avoid(types),
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Ask {
    executor: &'static str,
    required: Option<Capacity>,
    overrides: PolicyOverrides,
    policy: Option<Policy>,
    driver: Option<&'static str>,
    may_create: bool,
}

impl Ask {
    fn request(&self) -> PlaceRequest<'_> {
        let Self { executor, required, overrides, policy, driver, may_create } = *self;
        PlaceRequest { key: executor, required, overrides, policy, may_create, driver }
    }
}

/// The executors of a random history.
const EXECUTORS: [&str; 7] = ["e1", "e2", "e3", "e4", "e 5", "e\0}{6", "🦀"];

/// The drivers of a random history.
const DRIVERS: [&str; 2] = ["d1", "d\0 2}"];

fn some_steps() -> impl Strategy<Value = Vec<Step>> {
    // A few names, so that most calls are about an executor that was there before.
    let executor = || prop::sample::select(EXECUTORS.to_vec());
    let uid = || prop::sample::select(vec!["u1", "u2", "u 3"]);
    let capacity = || prop::sample::select(vec![Spot, OnDemand]);
    let ratio = || {
        prop_oneof![
            Just(0),
            Just(1),
            Just(500_000_000),
            Just(999_999_999),
            Just(Ratio::ONE_IN_BILLIONTHS),
            0..=1u32 << 29
        ]
        .prop_map(|billionths| policy(billionths, 0).spot_ratio)
    };
    let ratio = move || prop_oneof![6 => ratio(), 1 => Just(SpotRatio::Off)];
    let driver = || prop::option::weighted(0.6, prop::sample::select(DRIVERS.to_vec()));
    let base = || 0u32..4;
    let cap = || 0u32..3;
    let policy = move || {
        (ratio(), base(), cap(), 299..301u32).prop_map(|(spot_ratio, base, max_executors_per_node, retry)| {
            let decisive = Policy { spot_ratio, ..policy(0, base) };
            Policy { max_executors_per_node, spot_retry_seconds: retry, ..decisive }
        })
    };
    let some_overrides = move |ratio: BoxedStrategy<SpotRatio>| {
        let of = (prop::option::weighted(0.2, ratio), prop::option::weighted(0.2, base()));
        (of, prop::option::weighted(0.2, cap())).prop_map(|((ratio, base), max_executors_per_node)| PolicyOverrides {
            max_executors_per_node,
            ..overrides_of(ratio, base)
        })
    };
    let ask = move || {
        (
            executor(),
            prop::option::weighted(0.15, capacity()),
            some_overrides(ratio().boxed()),
            prop::option::weighted(0.6, policy()),
            driver(),
            prop::bool::weighted(0.8),
        )
            .prop_map(|(executor, required, overrides, policy, driver, may_create)| Ask {
                executor,
                required,
                overrides,
                policy,
                driver,
                may_create,
            })
    };
    let live = (executor(), uid(), prop::option::weighted(0.7, capacity()), prop::bool::weighted(0.3)).prop_map(
        |(executor, uid, capacity, states_ratio)| LiveExecutor { key: executor, uid, capacity, states_ratio },
    );
    let overrides = some_overrides(ratio().boxed());
    // Mostly the same, so that most reconciles are not superseded; the largest is seldom the first.
    let term = || prop_oneof![1 => Just(9), 12 => Just(10), 1 => Just(11)].prop_map(Term);
    let types = prop::sample::subsequence(vec!["m5.large", "c5.large", "no type"], 0..=3);
    // The retry time has passed at once, or does not pass.
    let steer = prop_oneof![
        3 => prop_oneof![Just(0), Just(LONG_MILLIS)].prop_map(|retry_after| RandomSteer::Close { retry_after }),
        1 => Just(RandomSteer::Open),
        1 => types.prop_map(|types| RandomSteer::Avoid(types.into_iter().map(str::to_owned).collect())),
    ];
    let ledger_of = || prop::option::weighted(0.3, prop::sample::select(DRIVERS.to_vec()));
    let few = prop_oneof![prop::collection::vec(live.clone(), 0..8), Just(Vec::new())];
    let of = (ledger_of(), driver());
    // Often all, as after a list.
    let gone = prop_oneof![
        1 => prop::sample::subsequence(EXECUTORS.to_vec(), 0..=EXECUTORS.len()),
        1 => Just(EXECUTORS.to_vec()),
    ];
    let named = (few, gone).prop_map(|(live, mut gone)| {
        gone.retain(|key| live.iter().all(|live: &LiveExecutor<'_>| live.key != *key));
        (live, gone)
    });
    let reconcile = (of, named, overrides, any::<bool>(), term(), any::<bool>(), any::<bool>()).prop_map(
        |((ledger_of, driver), (live, gone), overrides, ended, term, is_patient, removes)| Step::Reconcile {
            ledger_of,
            driver,
            live,
            gone,
            overrides,
            ended,
            term,
            is_patient,
            removes,
        },
    );
    let step = prop_oneof![
        8 => ask().prop_map(Step::Place),
        2 => ask().prop_map(Step::Peek),
        4 => (executor(), prop::option::of(uid()), driver())
            .prop_map(|(executor, uid, driver)| Step::Release { executor, uid, driver }),
        1 => (policy(), driver(), any::<bool>())
            .prop_map(|(policy, driver, may_create)| Step::Learn { policy, driver, may_create }),
        4 => reconcile,
        2 => (ledger_of(), steer, term())
            .prop_map(|(ledger_of, steer, term)| Step::Steer { ledger_of, steer, term }),
        1 => Just(Step::Count),
    ];
    prop::collection::vec(step, 1..40)
}

/// Every answer, and what is held after every step.
pub async fn random_histories_match_the_reference(ledger: &impl Ledger) -> Checked {
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::default() });
    let history = AtomicU32::new(0);
    let result = runner.run(&some_steps(), |steps| {
        let id = format!("history-{}", history.fetch_add(1, Ordering::Relaxed));
        // Proptest does not know of async.
        tokio::task::block_in_place(|| Handle::current().block_on(play(ledger, job(&id), &steps)))
            .map_err(|error| TestCaseError::fail(error.to_string()))
    });
    assert!(result.is_ok(), "{}", result.err().map(|error| error.to_string()).unwrap_or_default());
    Ok(())
}

/// The reference of a random history: the ledgers of a job.
struct References<'a> {
    job: JobRef<'a>,
    ledgers: BTreeMap<JobId, JobLedger>,
}

impl<'a> References<'a> {
    /// With an empty ledger of the job, and one of each driver.
    fn new(job: JobRef<'a>) -> Self {
        let of_drivers = DRIVERS.map(|driver| JobId::of_driver(job, driver));
        let ledgers = [job.to_job_id()].into_iter().chain(of_drivers);
        Self { job, ledgers: ledgers.map(|job| (job, JobLedger::default())).collect() }
    }

    /// The ledger that a call is for if it names this driver.
    fn naming(&mut self, driver: Option<&str>) -> &mut JobLedger {
        self.naming_if(driver, |own| own.belongs_to(driver))
    }

    /// The same, where the job's ledger is the right one if `is_right` returns so.
    fn naming_if(&mut self, driver: Option<&str>, is_right: impl Fn(&JobLedger) -> bool) -> &mut JobLedger {
        let job = self.job.to_job_id();
        let is_for_driver = !self.ledgers.get(&job).is_none_or(is_right);
        let own = driver.filter(|_| is_for_driver).map(|driver| JobId::of_driver(self.job, driver));
        self.ledgers.entry(own.unwrap_or(job)).or_default()
    }
}

async fn play(ledger: &impl Ledger, job: JobRef<'_>, steps: &[Step]) -> Checked {
    let mut references = References::new(job);
    for step in steps {
        match step {
            Step::Place(ask) => {
                let wanted = references.naming(ask.driver).place(&ask.request(), 0);
                assert_eq!(ledger.place(job, &ask.request()).await?, wanted, "{step:?}");
            }
            Step::Peek(ask) => {
                let wanted = references.naming(ask.driver).peek(&ask.request(), 0);
                assert_eq!(ledger.peek(job, &ask.request()).await?, wanted, "{step:?}");
            }
            Step::Release { executor, uid, driver } => {
                let wanted = references.naming(*driver).release(executor, *uid, 0);
                assert_eq!(ledger.release(job, executor, *uid, *driver).await?, wanted, "{step:?}");
            }
            Step::Learn { policy, driver, may_create } => {
                let wanted =
                    references.naming_if(*driver, |own| own.learns_from(*driver)).learn(*policy, *driver, *may_create);
                assert_eq!(ledger.learn(job, *policy, *driver, *may_create).await?, wanted, "{step:?}");
            }
            Step::Count => {
                for (job, reference) in &references.ledgers {
                    let none = reference.policy().is_none() && reference.entries().is_empty();
                    let record = JobRecord {
                        counts: reference.counts(),
                        policy: reference.policy(),
                        steering: without_time(reference.steering()),
                    };
                    let stored = ledger.record(job.as_job_ref()).await?;
                    let stored = stored.map(|record| JobRecord { steering: without_time(&record.steering), ..record });
                    assert_eq!(stored, (!none).then_some(record));
                }
            }
            Step::Steer { ledger_of, steer, term } => {
                let job = ledger_of.map_or(job.to_job_id(), |driver| JobId::of_driver(job, driver));
                let wanted = references.ledgers.entry(job.clone()).or_default().steer(steer.steer(), *term, 0);
                assert_eq!(ledger.steer(job.as_job_ref(), steer.steer(), *term).await?, wanted, "{step:?}");
            }
            Step::Reconcile { ledger_of, driver, live, gone, overrides, ended, term, is_patient, removes } => {
                let job = ledger_of.map_or(job.to_job_id(), |driver| JobId::of_driver(job, driver));
                let reference = references.ledgers.entry(job.clone()).or_default();
                let job = job.as_job_ref();
                // No history takes as long as the one grace, nor less than the other: no clock matters.
                let grace = if *is_patient { LONG } else { Duration::ZERO };
                let state = JobState { live, gone, overrides: *overrides, ended: *ended, driver: *driver };
                let grace_ms = millis(grace);
                let wanted = reference.reconcile(&state, grace_ms, *term, 0);
                let reconciled = ledger.reconcile(job, &state, grace, *term).await?;
                if let (ReconcileOutcome::Done(_), true) = (&reconciled, *removes) {
                    let absent = &waiting(&reconciled)?;
                    let at_zero = absent.iter().map(|placement| Unconfirmed { placed_at: 0, ..placement.clone() });
                    let wanted = reference.remove_unconfirmed(&at_zero.collect::<Vec<_>>(), *term);
                    assert_eq!(ledger.remove_unconfirmed(job, absent, *term).await?, wanted, "{step:?}");
                }
                assert_eq!(without_waits(reconciled), without_waits(wanted), "{step:?}");
            }
        }
        for (job, reference) in &references.ledgers {
            let shown = ledger.get(job.as_job_ref()).await?.unwrap_or_default();
            assert_eq!(without_times(&shown), without_times(reference), "{job:?} after {step:?}");
        }
    }
    Ok(())
}

fn without_times(ledger: &JobLedger) -> JobLedger {
    let at_zero = |(name, entry): (&String, &Entry)| (name.clone(), Entry { placed_at: 0, ..entry.clone() });
    let released = ledger.released().map(|(uid, _)| (uid.to_owned(), 0));
    let entries = ledger.entries().iter().map(at_zero).collect();
    JobLedger::from_parts(
        ledger.policy(),
        ledger.driver().map(str::to_owned),
        entries,
        released,
        ledger.term(),
        without_time(ledger.steering()),
    )
}

/// With the times 0 or [`LONG_MILLIS`].
fn without_time(steering: &Steering) -> Steering {
    let spot = match &steering.spot {
        SpotState::Open => SpotState::Open,
        SpotState::Starved { since, retry_at } => {
            let is_long = retry_at.saturating_sub(*since) >= LONG_MILLIS;
            SpotState::Starved { since: 0, retry_at: if is_long { LONG_MILLIS } else { 0 } }
        }
        SpotState::Probing { executor, .. } => SpotState::Probing { since: 0, executor: executor.clone() },
    };
    Steering { spot, avoid: steering.avoid.clone() }
}

fn without_waits(reconciled: ReconcileOutcome) -> ReconcileOutcome {
    match reconciled {
        ReconcileOutcome::Done(summary) => {
            let at_zero =
                |waiting: Waiting| Waiting { placement: Unconfirmed { placed_at: 0, ..waiting.placement }, age: 0 };
            let mut waiting: Vec<_> = summary.waiting.into_iter().map(at_zero).collect();
            waiting.sort_unstable();
            let recheck_after = summary.recheck_after.map(|_| 0);
            let steering = without_time(&summary.steering);
            ReconcileOutcome::Done(ReconcileSummary { recheck_after, waiting, steering, ..summary })
        }
        superseded @ ReconcileOutcome::Superseded(_) => superseded,
    }
}
