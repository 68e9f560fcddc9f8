//! How much of each job is lost with one node, or with one pool of spot nodes: which instance types a job's next executors
//! should avoid, which jobs are warned of, and the numbers for the gauges. Pure: the clock is the caller's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::{JobId, Ratio, Steering};
use tokio::time::Instant;

use crate::index::{Pool, Shares};

/// A job with fewer bound executors than this is not warned of.
const ENOUGH: u32 = 10;
/// The share of a job in one pool above which it is warned of, unless the job states a share.
const LARGE_POOL_SHARE: Ratio = Ratio::HALF;
/// The share of a job on one node above which it is warned of, in tenths.
const LARGE_NODE_TENTHS: u64 = 3;
/// `spark.kubernetes.allocation.batch.size`: Spark requests so many executors at once, and the ledger has no answer in
/// between.
const SPARK_BATCH: u32 = 5;
/// For so long a share has to be too large, because a job that starts has few nodes at first.
const PATIENCE: Duration = Duration::from_secs(60);
/// Jobs with fewer bound executors than this have no share to show.
const SHOWN: u32 = 2;
/// The shares of the gauges: one tenth, two tenths, and so on.
pub(crate) const TENTHS: usize = 10;

/// The instance types that the next spot executors of a job should avoid, so that none of its pools gets more than the
/// share `most` of its spot executors and one more. In alphabetic order, and at most [`Steering::MAX_AVOIDED`].
///
/// A pool that has more than `most` of the spot executors, the next one included, may get none. If one executor after the
/// other is bound and there is a node of any other type, this alone keeps the promise: fewer than `1 / most` pools can be
/// that large at once, so among `1 / most` instance types or more there is one that is not avoided.
///
/// Spark requests several executors at once, and they wait for their nodes. Those that wait, and those of the next
/// request, count as if all of them went to the pool in question. If that excluded every type that the job has, fewer of
/// the next request count, and in the end none that waits. So if the next `n` executors were counted, a pool that the job
/// has gets its share and one more at most, even if all of them go there. Of those that were not counted, `m`, all but its
/// share may be too many: it gets `most * all + (1 - most) * m + 1` at most.
///
/// If even what is bound excludes every type that the job has, all are avoided: it is a preference, so executors find a node
/// all the same, and an autoscaler adds a node of another type.
pub(crate) fn avoided(shares: &Shares, most: Ratio) -> Vec<String> {
    if most == Ratio::ONE || shares.pools.is_empty() {
        return Vec::new();
    }
    let types = |waiting: u32| {
        let exceeds = |bound: u32| exceeds(u64::from(bound + waiting), u64::from(shares.spot + waiting) + 1, most);
        let mut pools: Vec<_> = shares.pools.iter().filter(|(_, bound)| exceeds(*bound)).collect();
        pools.sort_by(|(one, of_one), (other, of_other)| of_other.cmp(of_one).then_with(|| one.cmp(other)));
        let mut types = Vec::<&str>::new();
        for (pool, _) in pools {
            if types.len() < Steering::MAX_AVOIDED && !types.contains(&&*pool.instance_type) {
                types.push(&pool.instance_type);
            }
        }
        types
    };
    let has_other = |types: &[&str]| shares.pools.iter().any(|(pool, _)| !types.contains(&&*pool.instance_type));
    let ahead = (0..SPARK_BATCH).rev().map(|next| types(shares.waiting + next)).find(|types| has_other(types));
    let mut avoided = ahead.unwrap_or_else(|| types(0));
    avoided.sort_unstable();
    avoided.into_iter().map(str::to_owned).collect()
}

/// Whether `part` is more than this share of `all`.
fn exceeds(part: u64, all: u64, share: Ratio) -> bool {
    part * u64::from(Ratio::ONE_IN_BILLIONTHS) > all * u64::from(share.billionths())
}

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
            exceeds(in_pool, u64::from(shares.bound), LARGE_POOL_SHARE)
        } else {
            exceeds(in_pool.saturating_sub(1), u64::from(shares.spot), most)
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
    use proptest::prelude::*;

    use super::*;

    fn pool(instance_type: &str, zone: &str) -> Arc<Pool> {
        Arc::new(Pool { instance_type: instance_type.into(), zone: zone.into() })
    }

    fn share(percent: u32) -> Ratio {
        Ratio::from_billionths(percent * 10_000_000).expect("a ratio")
    }

    /// Spot executors by the instance types of their nodes, all in one zone.
    fn spot(pools: &[(&str, u32)]) -> Shares {
        let spot = pools.iter().map(|(_, bound)| bound).sum();
        let pools = pools.iter().map(|(instance_type, bound)| (pool(instance_type, "a"), *bound)).collect();
        Shares { bound: spot, on_one_node: 1, spot, pools, waiting: 0 }
    }

    fn job(id: &str) -> Arc<JobId> {
        Arc::new(JobId { namespace: "etl".into(), app_id: id.into() })
    }

    #[test]
    fn a_pool_above_its_share_is_avoided_and_without_a_share_none_is() {
        let shares = spot(&[("m5", 5), ("m6", 4), ("r5", 1)]);
        assert_eq!(avoided(&shares, share(45)), ["m5", "m6"]);
        assert_eq!(avoided(&shares, Ratio::ONE), [""; 0]);
        assert_eq!(avoided(&spot(&[]), share(40)), [""; 0]);
        assert_eq!(avoided(&shares, share(30)), ["m5", "m6"]);
    }

    #[test]
    fn a_pool_that_the_next_request_of_spark_would_fill_is_avoided_if_the_job_has_another_type() {
        // Five more make 14 of 30, and its share and one more is 13.
        assert_eq!(avoided(&spot(&[("m5", 9), ("m6", 8), ("r5", 8)]), share(40)), ["m5"]);
        assert_eq!(avoided(&spot(&[("m5", 8), ("m6", 8), ("r5", 9)]), share(40)), ["r5"]);
        // Three of the next five would be too many for each of them, and two for the first one.
        assert_eq!(avoided(&spot(&[("m5", 3), ("m6", 2)]), share(50)), ["m5"]);
    }

    #[test]
    fn the_first_executor_of_a_job_already_sends_the_next_one_elsewhere() {
        assert_eq!(avoided(&spot(&[("m5", 1)]), share(40)), ["m5"]);
    }

    #[test]
    fn executors_that_wait_count_in_each_pool_unless_that_excludes_every_type_of_the_job() {
        let shares = |waiting| Shares { waiting, ..spot(&[("m5", 40), ("m6", 30), ("r5", 20), ("r6", 10)]) };
        assert_eq!(avoided(&shares(0), share(45)), [""; 0]);
        assert_eq!(avoided(&shares(20), share(45)), ["m5"]);
        assert_eq!(avoided(&shares(1_000), share(45)), [""; 0], "by what is bound alone");
    }

    #[test]
    fn at_most_as_many_types_as_a_ledger_takes_are_avoided_the_largest_pools_first() {
        let types: Vec<String> = (10..30).map(|number| format!("t{number}")).collect();
        let pools: Vec<(&str, u32)> = types.iter().map(String::as_str).zip(20..).collect();
        let avoided = avoided(&spot(&pools), share(1));
        assert_eq!(avoided, types[12..], "{avoided:?}");
    }

    #[test]
    fn executors_on_spot_nodes_of_no_known_pool_are_a_part_of_the_whole() {
        let shares = Shares { spot: 20, bound: 20, ..spot(&[("m5", 5)]) };
        assert_eq!(avoided(&shares, share(40)), [""; 0]);
    }

    /// A scheduler that follows the preference, and otherwise does the worst: of the pools that an executor may use, it
    /// takes the fullest one.
    struct World {
        /// The spot executors in each pool.
        pools: Vec<u32>,
        share: Ratio,
        /// The pools that the ledger says to avoid.
        avoid: Vec<bool>,
        /// The preferences of the executors that wait for a node.
        waiting: Vec<Vec<bool>>,
    }

    impl World {
        fn new(pools: usize, share: Ratio) -> Self {
            Self { pools: vec![0; pools], share, avoid: vec![false; pools], waiting: Vec::new() }
        }

        fn shares(&self) -> Shares {
            let names: Vec<String> = (0..self.pools.len()).map(|pool| format!("t{pool}")).collect();
            let bound = names.iter().map(String::as_str).zip(self.pools.iter().copied());
            let waiting = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
            Shares { waiting, ..spot(&bound.filter(|(_, bound)| *bound > 0).collect::<Vec<_>>()) }
        }

        /// Returns whether the executors that wait were counted.
        fn steer(&mut self) -> bool {
            let shares = self.shares();
            let avoided = avoided(&shares, self.share);
            self.avoid = (0..self.pools.len()).map(|pool| avoided.contains(&format!("t{pool}"))).collect();
            let fits = |(pool, bound): &(Arc<Pool>, u32)| {
                let (of_pool, all) = (u64::from(bound + shares.waiting), u64::from(shares.spot + shares.waiting));
                avoided.iter().any(|name| **name == *pool.instance_type) || !exceeds(of_pool, all + 1, self.share)
            };
            self.waiting.is_empty() || (avoided.len() < shares.pools.len() && shares.pools.iter().all(fits))
        }

        fn place(&mut self, executors: usize) {
            self.waiting.extend(std::iter::repeat_n(self.avoid.clone(), executors));
        }

        /// Binds the executor that has waited longest, and returns its pool.
        fn bind(&mut self) -> usize {
            let avoid = self.waiting.remove(0);
            let fullest = |pools: &mut dyn Iterator<Item = usize>| pools.max_by_key(|pool| self.pools[*pool]);
            let chosen = fullest(&mut (0..self.pools.len()).filter(|pool| !avoid[*pool]));
            let pool = chosen.or_else(|| fullest(&mut (0..self.pools.len()))).expect("a pool");
            self.pools[pool] += 1;
            pool
        }

        /// By how many executors, in billionths, a pool has more than its share.
        fn excess(&self, pool: usize) -> i64 {
            let all: u32 = self.pools.iter().sum();
            i64::from(self.pools[pool]) * 1_000_000_000 - i64::from(all) * i64::from(self.share.billionths())
        }
    }

    fn share_and_pools() -> impl Strategy<Value = (u32, usize)> {
        (12u32..90).prop_flat_map(|percent| {
            let enough = 100usize.div_ceil(percent as usize);
            (Just(percent), enough..enough + 4)
        })
    }

    proptest! {
        #[test]
        fn no_pool_gets_more_than_its_share_and_one_executor_while_others_have_room(
            (percent, pools) in share_and_pools(),
            steps in proptest::collection::vec((any::<bool>(), any::<u8>()), 0..300),
        ) {
            let mut world = World::new(pools, share(percent));
            for (is_loss, which) in steps {
                let pool = usize::from(which) % pools;
                if is_loss && world.pools[pool] > 0 && which > 100 {
                    world.pools[pool] -= 1;
                } else {
                    world.place(1);
                    let pool = world.bind();
                    prop_assert!(world.excess(pool) <= 1_000_000_000, "{:?} with {percent} %", world.pools);
                }
                world.steer();
            }
        }

        /// `n` is what was placed with one answer, and what waited then unless it was counted.
        #[test]
        fn executors_that_are_placed_at_once_exceed_the_share_by_no_more_than_is_stated(
            (percent, pools) in share_and_pools(),
            batches in proptest::collection::vec((1usize..12, 0usize..30), 1..40),
        ) {
            let mut world = World::new(pools, share(percent));
            // For each executor that waits: what its pool may have beyond the share.
            let mut bounds = std::collections::VecDeque::new();
            for (batch, binds) in batches {
                let waited = world.waiting.len();
                let is_counted = world.steer();
                let placed = batch + if is_counted { 0 } else { waited };
                let most = i64::from(share(percent).billionths());
                let bound = (1_000_000_000 - most) * i64::try_from(placed).unwrap_or(i64::MAX) + most;
                bounds.extend(std::iter::repeat_n(bound, batch));
                world.place(batch);
                for _ in 0..binds.min(world.waiting.len()) {
                    let pool = world.bind();
                    let bound = bounds.pop_front().expect("a bound");
                    prop_assert!(world.excess(pool) <= bound, "{:?} with {percent} %, {placed}", world.pools);
                }
            }
        }
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
