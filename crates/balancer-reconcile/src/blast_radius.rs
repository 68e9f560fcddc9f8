//! How much of each job is lost with one node, or with one pool of spot nodes: which instance types a job's next executors
//! should avoid, which jobs are warned of, and the numbers for the gauges. Pure: the clock is the caller's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{JobId, Pool, Ratio, Shares};
use tokio::time::Instant;

/// A job with fewer bound executors than this is not warned of.
const ENOUGH: u32 = 10;
/// The share of a job in one pool above which it is warned of, unless the job states a share.
const LARGE_POOL_SHARE: Ratio = Ratio::HALF;
/// The share of a job on one node above which it is warned of, in tenths.
const LARGE_NODE_TENTHS: u64 = 3;
/// For so long a share has to be too large, because a job that starts has few nodes at first.
const PATIENCE: Duration = Duration::from_secs(60);
/// Jobs with fewer bound executors than this have no share to show.
const SHOWN: u32 = 2;
/// The shares of the gauges: one tenth, two tenths, and so on.
pub(crate) const TENTHS: usize = 10;

/// Where too much of a job is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Node,
    Pool(Arc<Pool>),
}

/// A job that would lose too much at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) job: Arc<JobId>,
    pub(crate) place: Place,
    /// How many of its executors are there.
    executors: u32,
    /// How many there are, on any node.
    bound: u32,
}

impl Report {
    /// For the people whose job it is.
    pub(crate) fn note(&self) -> String {
        let Self { place, executors, bound, .. } = self;
        match place {
            Place::Node => format!("{executors} of {bound} executors are on one node, and are lost with it"),
            Place::Pool(pool) => {
                let Pool { instance_type, zone } = &**pool;
                format!(
                    "{executors} of {bound} executors are on spot nodes of the type {instance_type} in the zone {zone}, \
                     which are often reclaimed together"
                )
            }
        }
    }
}

/// What is known of one job.
#[derive(Debug, Default)]
struct Radius {
    bound: u32,
    on_one_node: u32,
    largest_pool: Option<(Arc<Pool>, u32)>,
    node: Warned,
    pool: Warned,
}

/// Whether a share is too large.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Warned {
    #[default]
    No,
    /// It is, and has been for a while.
    Since(Instant),
    /// It is, and this was reported.
    Reported,
}

impl Warned {
    fn update(&mut self, is_large: bool, now: Instant) {
        match (is_large, *self) {
            (false, _) => *self = Self::No,
            (true, Self::No) => *self = Self::Since(now),
            (true, Self::Since(_) | Self::Reported) => {}
        }
    }

    fn take_due(&mut self, now: Instant) -> bool {
        let is_due = matches!(*self, Self::Since(since) if now.duration_since(since) >= PATIENCE);
        if is_due {
            *self = Self::Reported;
        }
        is_due
    }
}

/// For each number of tenths, from one to [`TENTHS`]: how many jobs have a largest share of at most this.
pub(crate) type Tenths = [u64; TENTHS];

/// The jobs with bound executors.
#[derive(Debug, Default)]
pub(crate) struct BlastRadius {
    jobs: HashMap<Arc<JobId>, Radius>,
}

impl BlastRadius {
    /// The job's executors are spread like this now. `most` is its largest share of a pool.
    pub(crate) fn update(&mut self, job: &Arc<JobId>, shares: &Shares, most: Ratio, now: Instant) {
        if shares.bound == 0 {
            self.remove(job);
            return;
        }
        let largest = shares.pools.iter().max_by(|(one, of_one), (other, of_other)| {
            // The same one each time.
            of_one.cmp(of_other).then_with(|| other.cmp(one))
        });
        let in_pool = u64::from(largest.map_or(0, |(_, bound)| *bound));
        let is_enough = shares.bound >= ENOUGH;
        let is_large_pool = if most == Ratio::ONE {
            LARGE_POOL_SHARE.is_exceeded_by(in_pool, u64::from(shares.bound))
        } else {
            most.is_exceeded_by(in_pool.saturating_sub(1), u64::from(shares.spot))
        };
        let is_large_node = u64::from(shares.on_one_node) * 10 > u64::from(shares.bound) * LARGE_NODE_TENTHS;
        let radius = self.jobs.entry(Arc::clone(job)).or_default();
        (radius.bound, radius.on_one_node) = (shares.bound, shares.on_one_node);
        radius.largest_pool = largest.cloned();
        radius.node.update(is_enough && is_large_node, now);
        radius.pool.update(is_enough && is_large_pool, now);
    }

    /// The job has ended.
    pub(crate) fn remove(&mut self, job: &JobId) {
        self.jobs.remove(job);
    }

    /// The jobs that have had too large a share for a while, each once until the share is smaller again; at most `room` of
    /// them, in namespaces that are in sync. The others follow.
    pub(crate) fn take_reports(&mut self, now: Instant, room: usize, is_synced: impl Fn(&str) -> bool) -> Vec<Report> {
        let mut reports = Vec::new();
        for (job, radius) in self.jobs.iter_mut().filter(|(job, _)| is_synced(&job.namespace)) {
            let bound = radius.bound;
            if reports.len() < room && radius.node.take_due(now) {
                let (job, executors) = (Arc::clone(job), radius.on_one_node);
                reports.push(Report { job, place: Place::Node, executors, bound });
            }
            if let Some((pool, executors)) = &radius.largest_pool
                && reports.len() < room
                && radius.pool.take_due(now)
            {
                let (job, place, executors) = (Arc::clone(job), Place::Pool(Arc::clone(pool)), *executors);
                reports.push(Report { job, place, executors, bound });
            }
        }
        reports
    }

    /// The jobs by their largest share on one node, and by their largest share in one pool.
    pub(crate) fn by_share(&self) -> (Tenths, Tenths) {
        let (mut nodes, mut pools) = (Tenths::default(), Tenths::default());
        for radius in self.jobs.values().filter(|radius| radius.bound >= SHOWN) {
            let in_pool = radius.largest_pool.as_ref().map_or(0, |(_, executors)| *executors);
            for (tenths, executors) in [(&mut nodes, radius.on_one_node), (&mut pools, in_pool)] {
                for (jobs, tenth) in tenths.iter_mut().zip(1u64..) {
                    *jobs += u64::from(u64::from(executors) * TENTHS as u64 <= u64::from(radius.bound) * tenth);
                }
            }
        }
        (nodes, pools)
    }
}

#[cfg(test)]
mod tests {
    use balancer_core::testing::{share, spot};

    use super::*;

    fn job(id: &str) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.into() })
    }

    #[test]
    fn a_large_share_is_reported_after_a_minute_and_once_until_it_is_smaller_again() {
        let (mut radius, start) = (BlastRadius::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let (large, small) = (spot(&[("m5", 6), ("m6", 4)]), spot(&[("m5", 5), ("m6", 5)]));
        let reported = |radius: &mut BlastRadius, seconds| radius.take_reports(after(seconds), 9, |_| true).len();
        radius.update(&job("a"), &large, Ratio::ONE, start);
        assert_eq!(reported(&mut radius, 59), 0);
        radius.update(&job("a"), &large, Ratio::ONE, after(59));
        let reports = radius.take_reports(after(60), 9, |_| true);
        assert_eq!(
            reports.iter().map(Report::note).collect::<Vec<_>>(),
            ["6 of 10 executors are on spot nodes of the type m5 in the zone a, which are often reclaimed together"]
        );
        assert_eq!(reported(&mut radius, 500), 0);
        radius.update(&job("a"), &small, Ratio::ONE, after(500));
        radius.update(&job("a"), &large, Ratio::ONE, after(501));
        assert_eq!((reported(&mut radius, 560), reported(&mut radius, 561)), (0, 1));
    }

    #[test]
    fn what_is_too_large_depends_on_the_jobs_own_share() {
        let due = |shares: &Shares, most| {
            let (mut radius, start) = (BlastRadius::default(), Instant::now());
            radius.update(&job("a"), shares, most, start);
            let places = radius.take_reports(start + PATIENCE, 9, |_| true).into_iter();
            places.map(|report| report.place == Place::Node).collect::<Vec<_>>()
        };
        assert!(due(&spot(&[("m5", 5), ("m6", 5)]), share(40)).is_empty(), "its share and one more");
        assert_eq!(due(&spot(&[("m5", 6), ("m6", 5)]), share(40)), [false]);
        assert!(due(&spot(&[("m5", 6), ("m6", 4)]), share(80)).is_empty());
        assert!(due(&spot(&[("m5", 9)]), Ratio::ONE).is_empty(), "too few executors");
        let on_node = |on_one_node| Shares { bound: 10, on_one_node, ..Shares::default() };
        assert!(due(&on_node(3), Ratio::ONE).is_empty());
        assert_eq!(due(&on_node(4), Ratio::ONE), [true]);
    }

    #[test]
    fn reports_wait_for_room_and_for_namespaces_in_sync_and_end_with_the_job() {
        let (mut radius, start) = (BlastRadius::default(), Instant::now());
        for id in ["a", "b", "c"] {
            radius.update(&job(id), &spot(&[("m5", 10)]), Ratio::ONE, start);
        }
        let later = start + PATIENCE;
        assert!(radius.take_reports(later, 9, |_| false).is_empty());
        assert_eq!(radius.take_reports(later, 2, |_| true).len(), 2);
        assert_eq!(radius.take_reports(later, 9, |_| true).len(), 1);
        radius.update(&job("a"), &Shares::default(), Ratio::ONE, later);
        radius.remove(&job("b"));
        assert_eq!(radius.jobs.len(), 1);
    }

    #[test]
    fn jobs_are_counted_by_their_largest_shares() {
        let (mut radius, now) = (BlastRadius::default(), Instant::now());
        radius.update(&job("a"), &Shares { on_one_node: 2, ..spot(&[("m5", 5), ("m6", 5)]) }, Ratio::ONE, now);
        radius.update(&job("b"), &Shares { bound: 2, on_one_node: 2, ..Shares::default() }, Ratio::ONE, now);
        radius.update(&job("c"), &spot(&[("m5", 1)]), Ratio::ONE, now);
        let (nodes, pools) = radius.by_share();
        assert_eq!(nodes, [0, 1, 1, 1, 1, 1, 1, 1, 1, 2]);
        assert_eq!(pools, [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]);
    }
}
