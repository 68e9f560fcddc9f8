//! How the executors of a job are spread over pools of spot nodes, and which instance types its next ones should avoid.

use std::sync::Arc;

use crate::ratio::Ratio;
use crate::steering::Steering;

/// `spark.kubernetes.allocation.batch.size`: Spark requests so many executors at once, and the ledger has no answer in
/// between.
const SPARK_BATCH: u32 = 5;

/// Nodes that a cloud takes back together: those of one instance type in one zone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pool {
    /// The instance type.
    pub instance_type: Box<str>,
    /// The zone.
    pub zone: Box<str>,
}

impl Pool {
    /// The label of a node's instance type.
    pub const INSTANCE_TYPE_LABEL: &str = "node.kubernetes.io/instance-type";
    /// The label of a node's zone.
    pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

    /// The pool of a node with these labels; `None` if it has not both.
    pub fn of_node<'a>(label: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let (instance_type, zone) = (label(Self::INSTANCE_TYPE_LABEL)?, label(Self::ZONE_LABEL)?);
        Some(Self { instance_type: instance_type.into(), zone: zone.into() })
    }
}

/// How the executors of a job are spread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    /// The executors that are bound to a node.
    pub bound: u32,
    /// The most of them on one node. Executors without an owner count apart from those of the job's driver.
    pub on_one_node: u32,
    /// Those on spot nodes.
    pub spot: u32,
    /// Those on spot nodes whose pool is known, by their pools.
    pub pools: Vec<(Arc<Pool>, u32)>,
    /// The executors that were sent to spot and are not bound yet.
    pub waiting: u32,
}

impl Shares {
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
    pub fn avoided(&self, most: Ratio) -> Vec<String> {
        if most == Ratio::ONE || self.pools.is_empty() {
            return Vec::new();
        }
        let types = |waiting: u32| {
            let exceeds =
                |bound: u32| most.is_exceeded_by(u64::from(bound + waiting), u64::from(self.spot + waiting) + 1);
            let mut pools: Vec<_> = self.pools.iter().filter(|(_, bound)| exceeds(*bound)).collect();
            pools.sort_by(|(one, of_one), (other, of_other)| of_other.cmp(of_one).then_with(|| one.cmp(other)));
            let mut types = Vec::<&str>::new();
            for (pool, _) in pools {
                if types.len() < Steering::MAX_AVOIDED && !types.contains(&&*pool.instance_type) {
                    types.push(&pool.instance_type);
                }
            }
            types
        };
        let has_other = |types: &[&str]| self.pools.iter().any(|(pool, _)| !types.contains(&&*pool.instance_type));
        let ahead = (0..SPARK_BATCH).rev().map(|next| types(self.waiting + next)).find(|types| has_other(types));
        let mut avoided = ahead.unwrap_or_else(|| types(0));
        avoided.sort_unstable();
        avoided.into_iter().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{share, spot};

    #[test]
    fn a_pool_above_its_share_is_avoided_and_without_a_share_none_is() {
        let shares = spot(&[("m5", 5), ("m6", 4), ("r5", 1)]);
        assert_eq!(shares.avoided(share(45)), ["m5", "m6"]);
        assert_eq!(shares.avoided(Ratio::ONE), [""; 0]);
        assert_eq!(spot(&[]).avoided(share(40)), [""; 0]);
        assert_eq!(shares.avoided(share(30)), ["m5", "m6"]);
    }

    #[test]
    fn a_pool_that_the_next_request_of_spark_would_fill_is_avoided_if_the_job_has_another_type() {
        // Five more make 14 of 30, and its share and one more is 13.
        assert_eq!(spot(&[("m5", 9), ("m6", 8), ("r5", 8)]).avoided(share(40)), ["m5"]);
        assert_eq!(spot(&[("m5", 8), ("m6", 8), ("r5", 9)]).avoided(share(40)), ["r5"]);
        // Three of the next five would be too many for each of them, and two for the first one.
        assert_eq!(spot(&[("m5", 3), ("m6", 2)]).avoided(share(50)), ["m5"]);
    }

    #[test]
    fn the_first_executor_of_a_job_already_sends_the_next_one_elsewhere() {
        assert_eq!(spot(&[("m5", 1)]).avoided(share(40)), ["m5"]);
    }

    #[test]
    fn executors_that_wait_count_in_each_pool_unless_that_excludes_every_type_of_the_job() {
        let shares = |waiting| Shares { waiting, ..spot(&[("m5", 40), ("m6", 30), ("r5", 20), ("r6", 10)]) };
        assert_eq!(shares(0).avoided(share(45)), [""; 0]);
        assert_eq!(shares(20).avoided(share(45)), ["m5"]);
        assert_eq!(shares(1_000).avoided(share(45)), [""; 0], "by what is bound alone");
    }

    #[test]
    fn at_most_as_many_types_as_a_ledger_takes_are_avoided_the_largest_pools_first() {
        let types: Vec<String> = (10..30).map(|number| format!("t{number}")).collect();
        let pools: Vec<(&str, u32)> = types.iter().map(String::as_str).zip(20..).collect();
        let avoided = spot(&pools).avoided(share(1));
        assert_eq!(avoided, types[12..], "{avoided:?}");
    }

    #[test]
    fn executors_on_spot_nodes_of_no_known_pool_are_a_part_of_the_whole() {
        let shares = Shares { spot: 20, bound: 20, ..spot(&[("m5", 5)]) };
        assert_eq!(shares.avoided(share(40)), [""; 0]);
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
            let avoided = shares.avoided(self.share);
            self.avoid = (0..self.pools.len()).map(|pool| avoided.contains(&format!("t{pool}"))).collect();
            let fits = |(pool, bound): &(Arc<Pool>, u32)| {
                let (of_pool, all) = (u64::from(bound + shares.waiting), u64::from(shares.spot + shares.waiting));
                avoided.iter().any(|name| **name == *pool.instance_type) || !self.share.is_exceeded_by(of_pool, all + 1)
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
}
