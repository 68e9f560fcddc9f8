//! Ledgers in this process's memory: the reference, for one replica and for development.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use balancer_core::{
    Capacity, Counts, JobId, JobLedger, JobRef, JobState, LearnOutcome, Millis, PlaceOutcome, PlaceRequest, Policy,
    ReconcileOutcome, RemovalOutcome, Steer, SteerOutcome, Term, Unconfirmed, millis,
};

use crate::{Cursor, EntryPage, JobPage, JobRecord, Ledger, StoreError};

/// Jobs in which executors were placed, until a reconciler takes them. Nobody may be there to take them.
const MAX_PLACED: usize = 10_000;

/// [`JobLedger`]s under a lock. It never fails.
///
/// A ledger expires the TTL after its last use. A later call, for any job, frees its memory an eighth of the TTL later at
/// most, so that no task has to run.
pub struct MemoryLedger {
    ttl: Millis,
    clock: Box<dyn Fn() -> Millis + Send + Sync>,
    jobs: Mutex<Jobs>,
}

#[derive(Debug, Default)]
struct Jobs {
    kept: HashMap<JobId, Kept>,
    next_sweep: Millis,
    heartbeat: Option<u64>,
    /// The jobs whose [`Kept::was_placed`] is set, until they are taken.
    placed: Vec<JobId>,
}

#[derive(Debug, Default)]
struct Kept {
    ledger: JobLedger,
    touched: Millis,
    /// Whether an executor was placed since the last [`Ledger::take_placed`].
    was_placed: bool,
}

/// A call for the ledger of a job.
#[derive(Clone, Copy)]
struct Call<'a> {
    job: JobRef<'a>,
    /// The driver that the call names.
    driver: Option<&'a str>,
    /// Whether the job's ledger is the right one for a call that names this driver. If it is not, that of the driver is.
    is_for: fn(&JobLedger, Option<&str>) -> bool,
}

impl<'a> Call<'a> {
    /// A call that is for the job's own ledger in any case.
    fn to(job: JobRef<'a>) -> Self {
        Self::naming(job, None)
    }

    /// A call that names this driver.
    fn naming(job: JobRef<'a>, driver: Option<&'a str>) -> Self {
        Self { job, driver, is_for: JobLedger::belongs_to }
    }
}

impl MemoryLedger {
    /// No ledgers yet; each expires `ttl` after its last use.
    pub fn new(ttl: Duration) -> Self {
        let start = Instant::now();
        Self::with_clock(ttl, move || millis(start.elapsed()))
    }

    /// Like [`new`](Self::new), on the caller's clock, which must not go backwards.
    pub fn with_clock(ttl: Duration, clock: impl Fn() -> Millis + Send + Sync + 'static) -> Self {
        Self { ttl: millis(ttl), clock: Box::new(clock), jobs: Mutex::default() }
    }

    /// Changes a job's ledger, and renews its TTL.
    fn change<T>(&self, job: JobRef<'_>, change: impl FnOnce(&mut JobLedger, Millis) -> T) -> T {
        self.enter(Call::to(job), |kept, now| {
            kept.touched = now;
            change(&mut kept.ledger, now)
        })
    }

    /// Calls `change` with the ledger that the call is for. An empty ledger is not kept.
    fn enter<T>(&self, call: Call<'_>, change: impl FnOnce(&mut Kept, Millis) -> T) -> T {
        let mut jobs = self.lock();
        let now = (self.clock)();
        if now >= jobs.next_sweep {
            jobs.kept.retain(|_, kept| self.lives(kept, now));
            jobs.next_sweep = now.saturating_add(self.ttl / 8);
        }
        let job = self.job_for(&jobs, call, now);
        let Jobs { kept, placed, .. } = &mut *jobs;
        let mut kept = match kept.entry(job) {
            Entry::Occupied(kept) => kept,
            Entry::Vacant(none) => none.insert_entry(Kept::default()),
        };
        if !self.lives(kept.get(), now) {
            kept.get_mut().ledger = JobLedger::default();
        }
        let was_placed = kept.get().was_placed;
        let answer = change(kept.get_mut(), now);
        if kept.get().was_placed && !was_placed {
            if placed.len() < MAX_PLACED {
                placed.push(kept.key().clone());
            } else {
                kept.get_mut().was_placed = false;
            }
        }
        if holds_nothing(&kept.get().ledger) {
            kept.remove();
        }
        answer
    }

    /// Calls `read` with the ledger that the call is for, if there is one.
    fn read<T>(&self, call: Call<'_>, read: impl FnOnce(Option<&JobLedger>, Millis) -> T) -> T {
        let jobs = self.lock();
        let now = (self.clock)();
        read(self.live(&jobs, &self.job_for(&jobs, call, now), now), now)
    }

    /// The job whose ledger the call is for: see [`Ledger`].
    fn job_for(&self, jobs: &Jobs, Call { job, driver, is_for }: Call<'_>, now: Millis) -> JobId {
        let own = job.to_job_id();
        match driver.filter(|_| job.driver() != driver) {
            Some(driver) if !self.live(jobs, &own, now).is_none_or(|ledger| is_for(ledger, Some(driver))) => {
                JobId::of_driver(job, driver)
            }
            _ => own,
        }
    }

    fn live<'a>(&self, jobs: &'a Jobs, job: &JobId, now: Millis) -> Option<&'a JobLedger> {
        jobs.kept.get(job).filter(|kept| self.lives(kept, now)).map(|kept| &kept.ledger)
    }

    fn lives(&self, kept: &Kept, now: Millis) -> bool {
        now.saturating_sub(kept.touched) < self.ttl
    }

    /// A panic under the lock happened in one job's change. The other ledgers are whole, and the reconciler corrects that
    /// one.
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn holds_nothing(ledger: &JobLedger) -> bool {
    ledger.policy().is_none() && ledger.entries().is_empty()
}

impl fmt::Debug for MemoryLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryLedger").field("ttl", &self.ttl).field("jobs", &self.lock().kept.len()).finish()
    }
}

impl Ledger for MemoryLedger {
    async fn place(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        Ok(self.enter(Call::naming(job, request.driver), |kept, now| {
            kept.touched = now;
            let outcome = kept.ledger.place(request, now);
            kept.was_placed |= matches!(outcome, PlaceOutcome::Placed(_));
            outcome
        }))
    }

    async fn peek(&self, job: JobRef<'_>, request: &PlaceRequest<'_>) -> Result<PlaceOutcome, StoreError> {
        Ok(self.read(Call::naming(job, request.driver), |ledger, now| match ledger {
            Some(ledger) => ledger.peek(request, now),
            None => JobLedger::default().peek(request, now),
        }))
    }

    async fn release(
        &self,
        job: JobRef<'_>,
        executor: &str,
        uid: Option<&str>,
        driver: Option<&str>,
    ) -> Result<Option<Capacity>, StoreError> {
        Ok(self.enter(Call::naming(job, driver), |kept, now| {
            kept.touched = now;
            kept.ledger.release(executor, uid, now)
        }))
    }

    async fn learn(
        &self,
        job: JobRef<'_>,
        policy: Policy,
        driver: Option<&str>,
        may_create: bool,
    ) -> Result<LearnOutcome, StoreError> {
        Ok(self.enter(Call { job, driver, is_for: JobLedger::learns_from }, |kept, now| {
            kept.touched = now;
            kept.ledger.learn(policy, driver, may_create)
        }))
    }

    async fn reconcile(
        &self,
        job: JobRef<'_>,
        state: &JobState<'_>,
        grace: Duration,
        term: Term,
    ) -> Result<ReconcileOutcome, StoreError> {
        Ok(self.enter(Call::to(job), |kept, now| {
            let reconciled = kept.ledger.reconcile(state, millis(grace), term, now);
            if let ReconcileOutcome::Done(_) = reconciled {
                kept.touched = now;
            }
            reconciled
        }))
    }

    /// All entries are on one page, because a map has no order in which a next page could begin.
    async fn entries(&self, job: JobRef<'_>, _cursor: Option<Cursor>) -> Result<EntryPage, StoreError> {
        Ok(self.read(Call::to(job), |ledger, _| {
            let entries = ledger.into_iter().flat_map(JobLedger::entries);
            EntryPage { entries: entries.map(|(key, entry)| (key.clone(), entry.clone())).collect(), next: None }
        }))
    }

    /// The counts are always those of the entries.
    async fn begin_count(&self, _: JobRef<'_>, _: Term) -> Result<(), StoreError> {
        Ok(())
    }

    async fn correct_counts(&self, job: JobRef<'_>, found: Counts, term: Term) -> Result<bool, StoreError> {
        let is_right = |ledger: &JobLedger| ledger.counts() == found && ledger.term() <= term;
        Ok(self.read(Call::to(job), |ledger, _| ledger.is_some_and(is_right)))
    }

    async fn remove_unconfirmed(
        &self,
        job: JobRef<'_>,
        absent: &[Unconfirmed],
        term: Term,
    ) -> Result<RemovalOutcome, StoreError> {
        Ok(self.enter(Call::to(job), |kept, now| {
            let outcome = kept.ledger.remove_unconfirmed(absent, term);
            if let RemovalOutcome::Done { .. } = outcome {
                kept.touched = now;
            }
            outcome
        }))
    }

    async fn steer(&self, job: JobRef<'_>, steer: Steer<'_>, term: Term) -> Result<SteerOutcome, StoreError> {
        Ok(self.enter(Call::to(job), |kept, now| {
            let outcome = kept.ledger.steer(steer, term, now);
            if outcome == SteerOutcome::Done {
                kept.touched = now;
            }
            outcome
        }))
    }

    async fn take_placed(&self) -> Result<Vec<JobId>, StoreError> {
        let mut jobs = self.lock();
        let taken = std::mem::take(&mut jobs.placed);
        for job in &taken {
            if let Some(kept) = jobs.kept.get_mut(job) {
                kept.was_placed = false;
            }
        }
        Ok(taken)
    }

    async fn record(&self, job: JobRef<'_>) -> Result<Option<JobRecord>, StoreError> {
        let record = |ledger: &mut JobLedger, _| JobRecord {
            counts: ledger.counts(),
            policy: ledger.policy(),
            steering: ledger.steering().clone(),
        };
        Ok(Some(self.change(job, record)).filter(|record| record.policy.is_some() || record.counts.total() > 0))
    }

    /// All jobs are on one page, because a map has no order in which a next page could begin.
    async fn list_jobs(&self, _cursor: Option<Cursor>) -> Result<JobPage, StoreError> {
        let jobs = self.lock();
        let now = (self.clock)();
        let living = jobs.kept.iter().filter(|(_, kept)| self.lives(kept, now));
        Ok(JobPage { jobs: living.map(|(job, _)| job.clone()).collect(), next: None })
    }

    async fn heartbeat(&self, heartbeat: u64) -> Result<Option<u64>, StoreError> {
        Ok(self.lock().heartbeat.replace(heartbeat))
    }

    async fn get(&self, job: JobRef<'_>) -> Result<Option<JobLedger>, StoreError> {
        Ok(self.read(Call::to(job), |ledger, _| ledger.cloned()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use balancer_core::{LiveExecutor, PolicyOverrides, SpotRatio};

    use super::*;

    const TTL: Duration = Duration::from_millis(800);
    const POLICY: Policy = Policy { spot_ratio: SpotRatio::ONE, ..Policy::DEFAULT };

    fn job(id: &str) -> JobRef<'_> {
        JobRef { namespace: "etl", app_id: id }
    }

    fn request(executor: &str) -> PlaceRequest<'_> {
        PlaceRequest {
            key: executor,
            required: None,
            overrides: PolicyOverrides::default(),
            policy: Some(POLICY),
            may_create: true,
            driver: None,
        }
    }

    async fn executors(ledger: &MemoryLedger, id: &str) -> Result<u64, StoreError> {
        Ok(ledger.get(job(id)).await?.unwrap_or_default().counts().total())
    }

    /// A ledger, and the hand of its clock.
    fn at_zero() -> (MemoryLedger, Arc<AtomicU64>) {
        let hand = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&hand);
        (MemoryLedger::with_clock(TTL, move || clock.load(Ordering::Relaxed)), hand)
    }

    #[tokio::test]
    async fn a_ledger_is_kept_for_the_ttl_after_its_last_use() -> Result<(), StoreError> {
        let (ledger, hand) = at_zero();
        ledger.place(job("a"), &request("e1")).await?;
        hand.store(700, Ordering::Relaxed);
        ledger.release(job("a"), "unknown", None, None).await?;
        hand.store(1_499, Ordering::Relaxed);
        assert!(ledger.get(job("a")).await?.is_some());
        ledger.peek(job("a"), &request("e2")).await?;
        hand.store(1_500, Ordering::Relaxed);
        assert_eq!(ledger.get(job("a")).await?, None);
        ledger.place(job("a"), &request("e2")).await?;
        assert_eq!(executors(&ledger, "a").await?, 1, "a dropped ledger came back");
        Ok(())
    }

    #[tokio::test]
    async fn reconcile_and_counts_renew_the_ttl_but_a_superseded_reconcile_does_not() -> Result<(), StoreError> {
        let (ledger, hand) = at_zero();
        let live = [LiveExecutor { key: "e1", uid: "u", capacity: Some(Capacity::Spot), states_ratio: false }];
        let seen = JobState { live: &live, ..JobState::default() };
        ledger.reconcile(job("a"), &seen, TTL, Term(1)).await?;
        hand.store(700, Ordering::Relaxed);
        ledger.reconcile(job("a"), &seen, TTL, Term(2)).await?;
        hand.store(1_400, Ordering::Relaxed);
        assert_eq!(ledger.record(job("a")).await?.map(|record| record.counts.total()), Some(1));
        hand.store(2_100, Ordering::Relaxed);
        assert_eq!(ledger.reconcile(job("a"), &seen, TTL, Term(1)).await?, ReconcileOutcome::Superseded(Term(2)));
        assert_eq!(ledger.list_jobs(None).await?.jobs, [job("a").to_job_id()]);
        hand.store(2_200, Ordering::Relaxed);
        assert_eq!(ledger.list_jobs(None).await?, JobPage::default());
        assert_eq!(ledger.record(job("a")).await?, None);
        Ok(())
    }

    #[tokio::test]
    async fn the_age_of_a_placement_is_measured_on_the_ledgers_clock() -> Result<(), StoreError> {
        let (ledger, hand) = at_zero();
        for (now, executor) in [(0, "e1"), (100, "e2"), (200, "e3")] {
            hand.store(now, Ordering::Relaxed);
            ledger.place(job("a"), &request(executor)).await?;
        }
        let reconciled = ledger.reconcile(job("a"), &JobState::default(), TTL, Term(1)).await?;
        let ReconcileOutcome::Done(summary) = reconciled else { panic!("{reconciled:?}") };
        assert_eq!(summary.waiting.iter().map(|waiting| waiting.age).collect::<Vec<_>>(), [200, 100, 0]);
        Ok(())
    }

    #[tokio::test]
    async fn peek_ignores_an_expired_ledger() -> Result<(), StoreError> {
        let (ledger, hand) = at_zero();
        ledger.learn(job("a"), POLICY, Some("d"), true).await?;
        hand.store(800, Ordering::Relaxed);
        let asking = PlaceRequest { policy: None, ..request("e1") };
        assert_eq!(ledger.peek(job("a"), &asking).await?, PlaceOutcome::NeedPolicy);
        Ok(())
    }

    #[tokio::test]
    async fn calls_for_other_jobs_free_expired_ledgers() -> Result<(), StoreError> {
        let (ledger, hand) = at_zero();
        for second in 0..10_000u64 {
            hand.store(second * 10, Ordering::Relaxed);
            ledger.place(job(&second.to_string()), &request("e1")).await?;
            // The 80 jobs of the last TTL, and those of an eighth of one more.
            assert!(ledger.lock().kept.len() <= 91, "{} jobs are kept", ledger.lock().kept.len());
        }
        Ok(())
    }

    #[tokio::test]
    async fn unknown_jobs_take_no_memory() -> Result<(), StoreError> {
        let (ledger, _) = at_zero();
        let asking = PlaceRequest { policy: None, ..request("e1") };
        assert_eq!(ledger.place(job("a"), &asking).await?, PlaceOutcome::NeedPolicy);
        ledger.release(job("b"), "e1", None, None).await?;
        ledger.reconcile(job("c"), &JobState::default(), TTL, Term(1)).await?;
        assert_eq!(ledger.record(job("d")).await?, None);
        assert_eq!(ledger.lock().kept.len(), 0);
        Ok(())
    }

    #[tokio::test]
    async fn a_panic_under_the_lock_leaves_the_store_usable() -> Result<(), StoreError> {
        let (ledger, _) = at_zero();
        ledger.place(job("a"), &request("e1")).await?;
        let panics = std::panic::AssertUnwindSafe(|| ledger.change(job("b"), |_, _| panic!("on purpose")));
        assert!(std::panic::catch_unwind(panics).is_err());
        assert!(ledger.jobs.is_poisoned());
        ledger.place(job("a"), &request("e2")).await?;
        assert_eq!(executors(&ledger, "a").await?, 2);
        Ok(())
    }
}
