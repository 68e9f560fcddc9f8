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

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use balancer_core::{
    Capacity, Counts, Drift, Entry, JobLedger, JobRef, JobState, LiveExecutor, PlaceOutcome, PlaceRequest, Placed,
    Policy, PolicyOverrides, Ratio, ReconcileOutcome, ReconcileSummary, Term,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::runtime::Handle;

use crate::{JobPage, Ledger, StoreError};

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
            a_release_without_a_uid_removes_any_pod_of_the_name,
            reconcile_corrects_all_kinds_of_drift,
            reconcile_changes_nothing_without_drift,
            only_a_placement_without_a_pod_has_the_grace,
            a_released_executor_is_not_added_during_the_release_grace,
            a_live_executor_of_unknown_capacity_is_not_added,
            a_reconciled_policy_replaces_the_stored_one,
            a_reconciled_field_replaces_the_stored_one,
            an_ended_jobs_policy_goes_with_its_last_executor,
            an_earlier_term_changes_nothing,
            a_dropped_ledger_loses_its_term,
            calls_do_not_create_a_ledger_for_an_unknown_job,
            counts_are_right_and_create_no_ledger,
            every_job_with_a_ledger_is_listed,
            a_heartbeat_returns_the_one_before,
            names_can_be_any_text,
            jobs_are_independent,
            concurrent_placements_count_once_each,
            ten_thousand_executors_fit_in_a_job,
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
    let ratio_only = Policy { spot_ratio: Ratio::from_billionths(ratio).unwrap_or(Ratio::ONE), ..Policy::DEFAULT };
    Policy { on_demand_base: base, ..ratio_only }
}

fn all_spot() -> Policy {
    policy(Ratio::ONE_IN_BILLIONTHS, 0)
}

fn all_on_demand() -> Policy {
    policy(0, 0)
}

fn request(executor: &str, policy: Option<Policy>) -> PlaceRequest<'_> {
    PlaceRequest { key: executor, required: None, overrides: PolicyOverrides::default(), policy }
}

fn placed(capacity: Capacity, is_new: bool, spot: u64, on_demand: u64) -> PlaceOutcome {
    PlaceOutcome::Placed(Placed { capacity, is_new, counts: Counts { spot, on_demand } })
}

fn live<'a>(executor: &'a str, uid: &'a str, capacity: Option<Capacity>) -> LiveExecutor<'a> {
    LiveExecutor { key: executor, uid, capacity }
}

/// The state of a job whose driver states no policy.
fn seen<'a>(live: &'a [LiveExecutor<'a>]) -> JobState<'a> {
    JobState { live, ..JobState::default() }
}

/// The state of a job without executors, whose driver states this policy.
fn asking(policy: Policy) -> JobState<'static> {
    JobState { overrides: overrides(policy), ..JobState::default() }
}

fn overrides_of(spot_ratio: Option<Ratio>, on_demand_base: Option<u32>) -> PolicyOverrides {
    let ratio_only = PolicyOverrides { spot_ratio, ..PolicyOverrides::default() };
    PolicyOverrides { on_demand_base, ..ratio_only }
}

fn overrides(policy: Policy) -> PolicyOverrides {
    policy.into()
}

/// A reconcile in the first term.
async fn reconcile(
    ledger: &impl Ledger,
    job: JobRef<'_>,
    seen: JobState<'_>,
    grace: Duration,
) -> Result<ReconcileSummary, StoreError> {
    match ledger.reconcile(job, &seen, grace, Term(1)).await? {
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
    assert_eq!(ledger.place(job, &asked).await?, placed(Spot, NEW, 1, 0));
    assert_eq!(ledger.place(job, &asked).await?, placed(Spot, KNOWN, 1, 0));
    assert_eq!(ledger.place(job, &request("e2", None)).await?, placed(OnDemand, NEW, 1, 1));
    // By now another executor would go to spot; a known one stays what it is.
    assert_eq!(ledger.place(job, &request("e2", None)).await?, placed(OnDemand, KNOWN, 1, 1));
    assert_eq!(counts(ledger, job).await?, (1, 1));
    Ok(())
}

/// Exactly, from an empty job.
pub async fn executors_follow_the_ratio_after_the_base(ledger: &impl Ledger) -> Checked {
    let job = job("ratio");
    ledger.learn(job, policy(700_000_000, 2)).await?;
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
            reference.learn(policy(ratio, base));
            ledger.learn(job(&id), policy(ratio, base)).await?;
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
    assert_eq!(ledger.peek(job, &asked).await?, placed(Spot, NEW, 1, 0));
    assert_eq!(ledger.get(job).await?, None);

    ledger.place(job, &asked).await?;
    let before = ledger.get(job).await?;
    let required = PlaceRequest { required: Some(OnDemand), ..asked };
    assert_eq!(ledger.peek(job, &asked).await?, placed(Spot, KNOWN, 1, 0));
    assert_eq!(ledger.peek(job, &required).await?, placed(OnDemand, KNOWN, 0, 1));
    assert_eq!(ledger.peek(job, &request("e2", Some(all_on_demand()))).await?, placed(Spot, NEW, 2, 0));
    assert_eq!(ledger.get(job).await?, before);
    Ok(())
}

/// The webhook then looks the driver up.
pub async fn without_a_policy_nothing_is_placed(ledger: &impl Ledger) -> Checked {
    let job = job("no-policy");
    let half = PlaceRequest {
        overrides: PolicyOverrides { spot_ratio: Some(Ratio::ONE), ..PolicyOverrides::default() },
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
    assert_eq!(ledger.place(job, &request("e1", Some(policy(1, 1)))).await?, placed(OnDemand, NEW, 0, 1));
    assert_eq!(ledger.place(job, &request("e2", None)).await?, placed(Spot, NEW, 1, 1));
    assert_eq!(ledger.place(job, &request("e3", None)).await?, placed(OnDemand, NEW, 1, 2));
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(policy(1, 1)));
    Ok(())
}

/// The driver's own creation is the better source.
pub async fn a_looked_up_policy_does_not_replace_a_learned_one(ledger: &impl Ledger) -> Checked {
    let job = job("taught");
    ledger.learn(job, all_on_demand()).await?;
    assert_eq!(ledger.place(job, &request("e1", Some(all_spot()))).await?, placed(OnDemand, NEW, 0, 1));
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(all_on_demand()));
    Ok(())
}

/// An edited driver takes effect at once.
pub async fn the_newest_learned_policy_wins(ledger: &impl Ledger) -> Checked {
    let job = job("taught-twice");
    ledger.learn(job, all_on_demand()).await?;
    ledger.place(job, &request("e1", None)).await?;
    ledger.learn(job, all_spot()).await?;
    assert_eq!(ledger.place(job, &request("e2", None)).await?, placed(Spot, NEW, 1, 1));
    Ok(())
}

/// Its ratio with the job's base, or its base with the job's ratio.
pub async fn overrides_apply_to_their_executor_only(ledger: &impl Ledger) -> Checked {
    let job = job("own");
    ledger.learn(job, policy(Ratio::ONE_IN_BILLIONTHS, 1)).await?;
    let ratio = PlaceRequest { overrides: overrides_of(Some(Ratio::ZERO), None), ..request("e1", None) };
    let base = PlaceRequest { overrides: overrides_of(None, Some(3)), ..request("e2", None) };
    assert_eq!(ledger.place(job, &ratio).await?, placed(OnDemand, NEW, 0, 1));
    assert_eq!(ledger.place(job, &PlaceRequest { key: "e3", ..ratio }).await?, placed(OnDemand, NEW, 0, 2));
    assert_eq!(ledger.place(job, &base).await?, placed(OnDemand, NEW, 0, 3));
    assert_eq!(ledger.place(job, &request("e4", None)).await?, placed(Spot, NEW, 1, 3));
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), Some(policy(Ratio::ONE_IN_BILLIONTHS, 1)));
    Ok(())
}

/// No driver lookup is needed.
pub async fn complete_overrides_need_no_policy(ledger: &impl Ledger) -> Checked {
    let job = job("own-all");
    let overrides = overrides(all_spot());
    assert_eq!(ledger.place(job, &PlaceRequest { overrides, ..request("e1", None) }).await?, placed(Spot, NEW, 1, 0));
    assert_eq!(ledger.place(job, &request("e2", None)).await?, PlaceOutcome::NeedPolicy);
    assert_eq!(ledger.get(job).await?.and_then(|ledger| ledger.policy()), None);
    Ok(())
}

/// Whatever the ratio says.
pub async fn a_required_capacity_needs_no_policy(ledger: &impl Ledger) -> Checked {
    let job = job("required");
    let required = PlaceRequest { required: Some(Spot), ..request("e1", None) };
    assert_eq!(ledger.place(job, &required).await?, placed(Spot, NEW, 1, 0));
    ledger.learn(job, all_on_demand()).await?;
    assert_eq!(ledger.place(job, &PlaceRequest { key: "e2", ..required }).await?, placed(Spot, NEW, 2, 0));
    let looked_up = PlaceRequest { policy: Some(all_spot()), required: Some(OnDemand), ..request("e3", None) };
    assert_eq!(ledger.place(job, &looked_up).await?, placed(OnDemand, NEW, 2, 1));
    Ok(())
}

/// A pod was made again by hand, with a selector of its own.
pub async fn a_required_capacity_replaces_the_stored_one(ledger: &impl Ledger) -> Checked {
    let job = job("changes-sides");
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    let required = PlaceRequest { required: Some(OnDemand), ..request("e1", None) };
    assert_eq!(ledger.place(job, &required).await?, placed(OnDemand, KNOWN, 0, 1));
    assert_eq!(ledger.place(job, &request("e1", None)).await?, placed(OnDemand, KNOWN, 0, 1));
    assert_eq!(counts(ledger, job).await?, (0, 1));
    Ok(())
}

/// The uid of the next pod is not known yet.
pub async fn a_reused_name_keeps_its_capacity_and_loses_its_uid(ledger: &impl Ledger) -> Checked {
    let job = job("again");
    let uid = async |name: &str| -> Result<Option<String>, StoreError> {
        Ok(ledger.get(job).await?.and_then(|ledger| ledger.entries().get(name).and_then(|entry| entry.uid.clone())))
    };
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    reconcile(ledger, job, seen(&[live("e1", "first", None)]), LONG).await?;
    assert_eq!(uid("e1").await?.as_deref(), Some("first"));
    ledger.learn(job, all_on_demand()).await?;
    assert_eq!(ledger.place(job, &request("e1", None)).await?, placed(Spot, KNOWN, 1, 0));
    assert_eq!(uid("e1").await?, None);
    Ok(())
}

/// One end of an executor is two to three DELETE reviews.
pub async fn releasing_twice_releases_once(ledger: &impl Ledger) -> Checked {
    let job = job("release");
    assert_eq!(ledger.release(job, "e1", Some("u")).await?, None);
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    ledger.place(job, &request("e2", None)).await?;
    assert_eq!(ledger.release(job, "e1", Some("u")).await?, Some(Spot));
    assert_eq!(ledger.release(job, "e1", Some("u")).await?, None);
    assert_eq!(ledger.release(job, "unknown", None).await?, None);
    assert_eq!(counts(ledger, job).await?, (1, 0));
    ledger.learn(job, all_on_demand()).await?;
    ledger.place(job, &request("e3", None)).await?;
    assert_eq!(ledger.release(job, "e3", None).await?, Some(OnDemand));
    assert_eq!(ledger.release(job, "e2", None).await?, Some(Spot));
    assert_eq!(counts(ledger, job).await?, (0, 0));
    Ok(())
}

/// A newer pod has taken it.
pub async fn a_release_of_an_older_pod_removes_nothing(ledger: &impl Ledger) -> Checked {
    let job = job("older");
    ledger.place(job, &request("e1", Some(all_spot()))).await?;
    reconcile(ledger, job, seen(&[live("e1", "newer", None)]), LONG).await?;
    assert_eq!(ledger.release(job, "e1", Some("older")).await?, None);
    assert_eq!(counts(ledger, job).await?, (1, 0));
    assert_eq!(ledger.release(job, "e1", Some("newer")).await?, Some(Spot));
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
            assert_eq!(ledger.release(job, "e1", Some(&format!("pod {before}"))).await?, None);
        }
        assert_eq!(counts(ledger, job).await?, (1, 0));
        assert_eq!(ledger.release(job, "e1", Some(&format!("pod {pod}"))).await?, Some(Spot));
    }
    let remembered = ledger.get(job).await?.map(|ledger| ledger.released().count());
    assert_eq!(remembered, Some(JobLedger::RELEASED_REMEMBERED));
    Ok(())
}

/// It cannot distinguish pods.
pub async fn a_release_without_a_uid_removes_any_pod_of_the_name(ledger: &impl Ledger) -> Checked {
    let job = job("no-uid");
    reconcile(ledger, job, seen(&[live("e1", "u", Some(OnDemand))]), LONG).await?;
    assert_eq!(ledger.release(job, "e1", None).await?, Some(OnDemand));
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
    assert_eq!(summary, ReconcileSummary { drift, counts, recheck_after: None });
    let shown = ledger.get(job).await?.unwrap_or_default();
    assert_eq!(shown.counts(), counts);
    assert_eq!(shown.policy(), Some(all_spot()));
    let mut uids: Vec<_> =
        shown.entries().iter().map(|(name, entry)| (name.as_str(), entry.uid.as_deref().unwrap_or_default())).collect();
    uids.sort_unstable();
    assert_eq!(uids, [("new-1", "u3"), ("new-2", "u4"), ("new-3", "u5"), ("right", "u1"), ("wrong", "u2")]);
    // What was entered counts for the next placing.
    assert_eq!(ledger.place(job, &request("next", None)).await?, placed(Spot, NEW, 3, 3));
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
    let nearly_long = LONG.as_secs() * 900..=LONG.as_secs() * 1_000;
    let ReconcileSummary { drift, counts: both, recheck_after } =
        reconcile(ledger, job, seen(&[live("seen", "u", None)]), LONG).await?;
    assert_eq!((drift, both), (Drift::default(), Counts { spot: 2, on_demand: 0 }));
    assert!(recheck_after.is_some_and(|recheck_after| nearly_long.contains(&recheck_after)), "{recheck_after:?}");

    let ReconcileSummary { drift, counts: one, recheck_after } = reconcile(ledger, job, seen(&[]), LONG).await?;
    assert_eq!((drift, one), (Drift { stale: 1, ..Drift::default() }, Counts { spot: 1, on_demand: 0 }));
    assert!(recheck_after.is_some_and(|recheck_after| nearly_long.contains(&recheck_after)), "{recheck_after:?}");
    assert_eq!(ledger.release(job, "seen", None).await?, None);

    let ReconcileSummary { drift, recheck_after, .. } = reconcile(ledger, job, seen(&[]), Duration::MAX).await?;
    assert!(drift.is_none() && recheck_after > Some(*nearly_long.end()), "{drift:?}, {recheck_after:?}");

    let none_left = reconcile(ledger, job, seen(&[]), Duration::ZERO).await?;
    let drift = Drift { stale: 1, ..Drift::default() };
    assert_eq!(none_left, ReconcileSummary { drift, ..ReconcileSummary::default() });
    assert_eq!(counts(ledger, job).await?, (0, 0));
    Ok(())
}

/// A deletion is reviewed before the cluster shows it; one that was refused after that comes back.
pub async fn a_released_executor_is_not_added_during_the_release_grace(ledger: &impl Ledger) -> Checked {
    let job = job("going");
    let now = [live("e1", "u 1", Some(Spot)), live("e2", "u2", Some(Spot))];
    ledger.learn(job, all_spot()).await?;
    reconcile(ledger, job, seen(&now), LONG).await?;
    assert_eq!(ledger.release(job, "e1", Some("u 1")).await?, Some(Spot));
    let ReconcileSummary { drift, counts: one, recheck_after } = reconcile(ledger, job, seen(&now), LONG).await?;
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
    assert_eq!(ledger.release(job, "e1", None).await?, Some(Spot));
    let summary = reconcile(ledger, job, seen(&now), Duration::ZERO).await?;
    let drift = Drift { missing: 1, ..Drift::default() };
    assert_eq!(summary, ReconcileSummary { drift, counts: Counts { spot: 2, on_demand: 0 }, recheck_after: None });
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
    assert_eq!(ledger.place(job, &request("e1", None)).await?, placed(Spot, NEW, 1, 0));
    reconcile(ledger, job, asking(all_on_demand()), LONG).await?;
    reconcile(ledger, job, seen(&[]), LONG).await?;
    assert_eq!(ledger.place(job, &request("e2", None)).await?, placed(OnDemand, NEW, 1, 1));
    Ok(())
}

/// A driver may state a ratio and no base, or one of them wrongly.
pub async fn a_reconciled_field_replaces_the_stored_one(ledger: &impl Ledger) -> Checked {
    let job = job("overrides-in-part");
    let noted = async || -> Result<Option<Policy>, StoreError> {
        Ok(ledger.get(job).await?.and_then(|ledger| ledger.policy()))
    };
    let ratio = JobState {
        overrides: PolicyOverrides { spot_ratio: Some(Ratio::ZERO), ..PolicyOverrides::default() },
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
    ledger.learn(job, policy(300_000_000, 2)).await?;
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
    ledger.release(job, "e2", Some("u2")).await?;
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
    assert_eq!(ledger.release(job, "e2", Some("u2")).await?, Some(Spot));
    Ok(())
}

/// Its leader does not know yet that another has taken over.
pub async fn an_earlier_term_changes_nothing(ledger: &impl Ledger) -> Checked {
    for (earlier, later) in [(0, 1), (9, 10), (10, 11), (9_007_199_254_740_992, 9_007_199_254_740_993), (8, u64::MAX)] {
        let id = format!("term-{later}");
        let job = job(&id);
        let now = [live("e1", "u1", Some(Spot))];
        let all = JobState { live: &now, overrides: overrides(all_spot()), ended: false };
        let none = JobState { live: &[], overrides: overrides(all_on_demand()), ended: true };
        for term in [earlier, earlier, later, later] {
            let reconciled = ledger.reconcile(job, &all, Duration::ZERO, Term(term)).await?;
            assert!(matches!(reconciled, ReconcileOutcome::Done(_)), "{term}: {reconciled:?}");
        }
        ledger.place(job, &request("e2", None)).await?;
        ledger.release(job, "e1", None).await?;
        let before = ledger.get(job).await?;
        assert_eq!(before.as_ref().map(JobLedger::term), Some(Term(later)));
        let reconciled = ledger.reconcile(job, &none, Duration::ZERO, Term(earlier)).await?;
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
        let reconciled = ledger.reconcile(job, &seen(&now), Duration::ZERO, Term(5)).await?;
        assert!(matches!(reconciled, ReconcileOutcome::Done(_)), "after way {way}: {reconciled:?}");
        match way {
            0 => drop(ledger.release(job, "e1", None).await?),
            1 => drop(ledger.reconcile(job, &seen(&[]), Duration::ZERO, Term(5)).await?),
            _ => {
                ledger.learn(job, all_spot()).await?;
                let ended = JobState { ended: true, ..seen(&[]) };
                ledger.reconcile(job, &ended, Duration::ZERO, Term(5)).await?;
            }
        }
        assert_eq!(ledger.get(job).await?, None, "way {way}");
        let reconciled = ledger.reconcile(job, &seen(&now), Duration::ZERO, Term(4)).await?;
        assert!(matches!(reconciled, ReconcileOutcome::Done(_)), "way {way}: {reconciled:?}");
    }
    Ok(())
}

/// Place, release, reconcile and the others alike.
pub async fn calls_do_not_create_a_ledger_for_an_unknown_job(ledger: &impl Ledger) -> Checked {
    let job = job("unknown");
    ledger.place(job, &request("e1", None)).await?;
    ledger.release(job, "e1", Some("u")).await?;
    reconcile(ledger, job, seen(&[]), Duration::ZERO).await?;
    reconcile(ledger, job, seen(&[live("e1", "u", None)]), Duration::ZERO).await?;
    assert_eq!(ledger.get(job).await?, None);
    Ok(())
}

/// Of a job with executors, of one that has a policy alone, and of none.
pub async fn counts_are_right_and_create_no_ledger(ledger: &impl Ledger) -> Checked {
    let job = job("counts");
    assert_eq!(ledger.counts(job).await?, None);
    assert_eq!(ledger.get(job).await?, None);
    ledger.learn(job, policy(500_000_000, 0)).await?;
    assert_eq!(ledger.counts(job).await?, Some(Counts::default()));
    for name in ["e1", "e2", "e3", "e4", "e5"] {
        ledger.place(job, &request(name, None)).await?;
    }
    ledger.release(job, "e2", None).await?;
    let before = ledger.get(job).await?;
    assert_eq!(ledger.counts(job).await?, Some(Counts { spot: 3, on_demand: 1 }));
    assert_eq!(ledger.get(job).await?, before);
    reconcile(ledger, job, JobState { ended: true, ..seen(&[]) }, Duration::ZERO).await?;
    assert_eq!(ledger.counts(job).await?, None);
    // Executors without a policy.
    ledger.place(job, &PlaceRequest { required: Some(OnDemand), ..request("e1", None) }).await?;
    assert_eq!(ledger.counts(job).await?, Some(Counts { spot: 0, on_demand: 1 }));
    Ok(())
}

/// Page by page, whatever the names are, and without jobs whose ledger is gone.
pub async fn every_job_with_a_ledger_is_listed(ledger: &impl Ledger) -> Checked {
    let mut all: Vec<String> = (0..2_000).map(|number| format!("spark-{number}")).collect();
    all.extend(TEXTS.map(str::to_owned));
    let of = |id| JobRef { namespace: "contract-jobs", app_id: id };
    for (number, id) in all.iter().enumerate() {
        if number % 2 == 0 {
            ledger.learn(of(id), all_spot()).await?;
        } else {
            ledger.place(of(id), &PlaceRequest { required: Some(Spot), ..request("e1", None) }).await?;
        }
    }
    reconcile(ledger, of("spark-0"), JobState { ended: true, ..seen(&[]) }, Duration::ZERO).await?;
    ledger.release(of("spark-1"), "e1", None).await?;

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
                ledger.release(job, name, Some(&format!("uid {name}"))).await?,
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
        ledger.learn(job, policy(ratio, 0)).await?;
        ledger.place(job, &request("e1", None)).await?;
        ledger.place(job, &request(job.app_id, None)).await?;
    }
    ledger.release(jobs[0], "e1", None).await?;
    reconcile(ledger, jobs[1], asking(policy(1_000, 0)), Duration::ZERO).await?;
    let mut shown = Vec::new();
    for job in jobs {
        let ledger = ledger.get(job).await?.unwrap_or_default();
        shown.push((ledger.policy().map(|policy| policy.spot_ratio.billionths()), ledger.counts().total()));
    }
    assert_eq!(shown, [(Some(0), 1), (Some(1_000), 0), (Some(2), 2), (Some(3), 2), (Some(4), 2)]);
    Ok(())
}

/// Spark asks for its executors in batches, and calls are repeated.
pub async fn concurrent_placements_count_once_each(ledger: &impl Ledger) -> Checked {
    let job = job("at-once");
    ledger.learn(job, policy(500_000_000, 0)).await?;
    for round in 0..8 {
        let place = async |number: usize| {
            let name = format!("e{round}-{number}");
            ledger.place(job, &request(&name, None)).await
        };
        let answers = tokio::try_join!(place(1), place(1), place(2), place(2), place(3), place(3), place(4), place(4))?;
        let (a, b, ..) = answers;
        let capacity = |outcome| match outcome {
            PlaceOutcome::Placed(placed) => Some(placed.capacity),
            PlaceOutcome::NeedPolicy => None,
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
    assert_eq!(ledger.place(job, &request("one more", None)).await?, placed(Spot, NEW, 1, 10_000));
    let drift = reconcile(ledger, job, seen(rest), Duration::ZERO).await?.drift;
    assert_eq!(drift, Drift { missing: 0, stale: 5_001, wrong_capacity: 0 });
    assert_eq!(counts(ledger, job).await?, (0, 5_000));
    Ok(())
}

/// One call of a random history.
#[derive(Clone, Debug)]
enum Step {
    Place(Ask),
    Peek(Ask),
    Release { executor: &'static str, uid: Option<&'static str> },
    Learn(Policy),
    Reconcile { live: Vec<LiveExecutor<'static>>, overrides: PolicyOverrides, ended: bool, term: Term, patient: bool },
    Count,
}

#[derive(Clone, Copy, Debug)]
struct Ask {
    executor: &'static str,
    required: Option<Capacity>,
    overrides: PolicyOverrides,
    policy: Option<Policy>,
}

impl Ask {
    fn request(&self) -> PlaceRequest<'_> {
        let Self { executor, required, overrides, policy } = *self;
        PlaceRequest { key: executor, required, overrides, policy }
    }
}

fn some_steps() -> impl Strategy<Value = Vec<Step>> {
    // A few names, so that most calls are about an executor that was there before.
    let executor = || prop::sample::select(vec!["e1", "e2", "e3", "e4", "e 5", "e\0}{6", "🦀"]);
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
    let base = || 0u32..4;
    let policy = move || (ratio(), base()).prop_map(|(ratio, base)| policy(ratio.billionths(), base));
    let seldom = |strategy: BoxedStrategy<_>| prop::option::weighted(0.2, strategy);
    let ask = move || {
        (
            executor(),
            prop::option::weighted(0.15, capacity()),
            seldom(ratio().boxed()),
            prop::option::weighted(0.2, base()),
            prop::option::weighted(0.6, policy()),
        )
            .prop_map(|(executor, required, ratio, base, policy)| Ask {
                executor,
                required,
                overrides: overrides_of(ratio, base),
                policy,
            })
    };
    let live = (executor(), uid(), prop::option::weighted(0.7, capacity()))
        .prop_map(|(executor, uid, capacity)| LiveExecutor { key: executor, uid, capacity });
    let overrides = (seldom(ratio().boxed()), prop::option::weighted(0.2, base()))
        .prop_map(|(ratio, base)| overrides_of(ratio, base));
    // Mostly the same, so that most reconciles are not superseded; the largest is seldom the first.
    let term = prop_oneof![1 => Just(9), 12 => Just(10), 1 => Just(11)].prop_map(Term);
    let few = prop_oneof![prop::collection::vec(live.clone(), 0..8), Just(Vec::new())];
    let reconcile = (few, overrides, any::<bool>(), term, any::<bool>())
        .prop_map(|(live, overrides, ended, term, patient)| Step::Reconcile { live, overrides, ended, term, patient });
    let step = prop_oneof![
        8 => ask().prop_map(Step::Place),
        2 => ask().prop_map(Step::Peek),
        4 => (executor(), prop::option::of(uid())).prop_map(|(executor, uid)| Step::Release { executor, uid }),
        1 => policy().prop_map(Step::Learn),
        4 => reconcile,
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

async fn play(ledger: &impl Ledger, job: JobRef<'_>, steps: &[Step]) -> Checked {
    let mut reference = JobLedger::default();
    for step in steps {
        match step {
            Step::Place(ask) => {
                assert_eq!(ledger.place(job, &ask.request()).await?, reference.place(&ask.request(), 0), "{step:?}");
            }
            Step::Peek(ask) => {
                assert_eq!(ledger.peek(job, &ask.request()).await?, reference.peek(&ask.request()), "{step:?}");
            }
            Step::Release { executor, uid } => {
                assert_eq!(
                    ledger.release(job, executor, *uid).await?,
                    reference.release(executor, *uid, 0),
                    "{step:?}"
                );
            }
            Step::Learn(policy) => {
                ledger.learn(job, *policy).await?;
                reference.learn(*policy);
            }
            Step::Count => {
                let none = reference.policy().is_none() && reference.entries().is_empty();
                assert_eq!(ledger.counts(job).await?, (!none).then(|| reference.counts()));
            }
            Step::Reconcile { live, overrides, ended, term, patient } => {
                // No history takes as long as the one grace, nor less than the other: no clock matters.
                let grace = if *patient { LONG } else { Duration::ZERO };
                let seen = JobState { live, overrides: *overrides, ended: *ended };
                let millis = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
                let wanted = reference.reconcile(&seen, millis, *term, 0);
                let reconciled = ledger.reconcile(job, &seen, grace, *term).await?;
                assert_eq!(without_waits(reconciled), without_waits(wanted), "{step:?}");
            }
        }
        let shown = ledger.get(job).await?.unwrap_or_default();
        assert_eq!(without_times(&shown), without_times(&reference), "after {step:?}");
    }
    Ok(())
}

fn without_times(ledger: &JobLedger) -> JobLedger {
    let at_zero = |(name, entry): (&String, &Entry)| (name.clone(), Entry { placed_at: 0, ..entry.clone() });
    let released = ledger.released().map(|(uid, _)| (uid.to_owned(), 0));
    let entries = ledger.entries().iter().map(at_zero).collect();
    JobLedger::from_parts(ledger.policy(), entries, released, ledger.term())
}

fn without_waits(reconciled: ReconcileOutcome) -> ReconcileOutcome {
    match reconciled {
        ReconcileOutcome::Done(summary) => {
            ReconcileOutcome::Done(ReconcileSummary { recheck_after: summary.recheck_after.map(|_| 0), ..summary })
        }
        superseded @ ReconcileOutcome::Superseded(_) => superseded,
    }
}
