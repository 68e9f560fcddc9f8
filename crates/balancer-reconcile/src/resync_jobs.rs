//! Reconciles all ledgers, some at a time: jobs that change meanwhile do not wait for the others.

use std::collections::HashMap;
use std::sync::Arc;
use std::vec::IntoIter;

use balancer_core::JobId;
use balancer_store::{Cursor, Ledger};
use tokio::time::Instant;

use crate::comparisons::Comparisons;
use crate::queue::{Due, MAX_NAMED};
use crate::reconcile_jobs::{BATCH, IN_ONE_TURN};
use crate::resync::Resync;
use crate::state::{Parts, Progress, State};

/// A resync that has begun.
#[derive(Debug)]
pub(crate) struct ResyncRun {
    resync: Resync,
    started_at: Instant,
    /// The jobs of the cluster that are still to come.
    jobs: IntoIter<Arc<JobId>>,
    /// The next page of the jobs that the store has; `None` after the last one.
    page: Option<Option<Cursor>>,
    /// The jobs whose comparison this resync has requested, and how many of theirs have to end until that one has. Others may
    /// request comparisons all the time.
    comparing: HashMap<Arc<JobId>, usize>,
    number: usize,
    ended: usize,
}

/// The ledgers that a resync has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached {
    All,
    /// The store is up, but cannot list its jobs.
    Some,
    /// The store is down, or another process leads.
    Interrupted,
    /// Others are still to come.
    NotAll,
}

impl ResyncRun {
    /// A comparison of the job has ended.
    pub(crate) fn compared(&mut self, job: &JobId) {
        if let Some(left) = self.comparing.get_mut(job) {
            *left -= 1;
            if *left == 0 {
                self.comparing.remove(job);
            }
        }
    }

    /// Whether comparisons that it has requested are under way. One that has failed is repeated without it.
    fn is_comparing(&self, comparisons: &Comparisons) -> bool {
        self.comparing.keys().any(|job| comparisons.until_requested(job) > 0)
    }
}

impl<L: Ledger> State<'_, L> {
    /// Starts to reconcile all ledgers: of the jobs in the cluster, and of those that only the store has.
    pub(crate) fn start_resync(&mut self, resync: Resync) {
        self.plan.begin();
        // It compares these jobs anyway.
        self.auditing.clear();
        let started_at = resync.lists_started_at.unwrap_or_else(Instant::now);
        let jobs: Vec<_> = self.index.jobs().cloned().collect();
        let number = jobs.len();
        let (jobs, comparing) = (jobs.into_iter(), HashMap::new());
        self.resync = Some(ResyncRun { resync, started_at, jobs, page: Some(None), comparing, number, ended: 0 });
    }

    /// Whether the resync goes on at once. At its end it waits for the comparisons that it has started.
    pub(crate) fn has_resync_step(&self) -> bool {
        self.resync.as_ref().is_some_and(|run| {
            run.jobs.len() > 0 || run.page.is_some() || !run.is_comparing(&self.comparisons) || !self.may_write()
        })
    }

    /// Reconciles some ledgers more. A resync that is interrupted or incomplete stays pending.
    pub(crate) async fn resync_step(&mut self) {
        let Some(mut run) = self.resync.take() else { return };
        match self.go_on(&mut run).await {
            Reached::NotAll => self.resync = Some(run),
            Reached::All => {
                let Parts { metrics, .. } = &self.reconciler.parts;
                let ResyncRun { resync, started_at, number, ended, .. } = run;
                let (took, cause) = (started_at.elapsed(), resync.cause);
                metrics.resynced(cause, took);
                tracing::info!(cause = cause.as_str(), jobs = number, ended, ?took, "resync finished");
                self.plan.finish();
                self.has_resynced = true;
                self.reach(Progress::Synced);
            }
            Reached::Some => self.plan.postpone(Instant::now()),
            Reached::Interrupted => self.plan.interrupt(),
        }
    }

    async fn go_on(&mut self, run: &mut ResyncRun) -> Reached {
        if !self.may_write() {
            return Reached::Interrupted;
        }
        let (mut jobs, mut names) = (Vec::new(), 0);
        // So many executors may have to be named, if the store has lost them.
        while jobs.len() < BATCH && names < MAX_NAMED {
            let Some(job) = run.jobs.next() else { break };
            names += self.index.executors(&job).min(IN_ONE_TURN);
            let due = Due { compares_all: true, ..self.queue.remove(&job).unwrap_or_else(|| Due::all(job)) };
            names += due.executors.len();
            jobs.push(due);
        }
        let batch = if !jobs.is_empty() {
            jobs
        } else if let Some(cursor) = run.page.take() {
            if cursor.is_none() {
                self.plan.forget_skipped();
            }
            let Parts { ledger, metrics, .. } = &self.reconciler.parts;
            match ledger.list_jobs(cursor).await {
                Ok(listed) => {
                    run.page = listed.next.map(Some);
                    let ended = self.ended_of(listed.jobs);
                    run.ended += ended.len();
                    ended
                }
                Err(error) => {
                    metrics.store_failed(&error);
                    if !self.is_store_up().await {
                        return Reached::Interrupted;
                    }
                    tracing::warn!(store = error.kind(), %error, "cannot list the jobs of the store; retrying the resync");
                    return Reached::Some;
                }
            }
        } else {
            return if run.is_comparing(&self.comparisons) { Reached::NotAll } else { Reached::All };
        };
        let requested: Vec<_> = batch.iter().map(|due| Arc::clone(&due.job)).collect();
        if !self.reconcile_batch(batch).await {
            return Reached::Interrupted;
        }
        for job in requested {
            let left = self.comparisons.until_requested(&job);
            run.comparing.insert(job, left);
        }
        run.comparing.retain(|_, left| *left > 0);
        Reached::NotAll
    }

    /// Those of the jobs that have no live pod, in the namespaces that are in sync.
    fn ended_of(&mut self, jobs: Vec<JobId>) -> Vec<Due> {
        let settings = &self.reconciler.parts.settings;
        let is_unknown = |job: &JobId| settings.watches(&job.namespace) && !self.index.contains(job);
        let (ended, skipped): (Vec<_>, Vec<_>) =
            jobs.into_iter().filter(is_unknown).partition(|job| self.sync.is_synced(&job.namespace));
        for job in skipped {
            self.plan.skip(&job.namespace);
        }
        ended.into_iter().map(|job| Due::all(Arc::new(job))).collect()
    }
}
