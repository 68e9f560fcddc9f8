//! The live pods of one job id, and what the ledger of a job should contain.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use balancer_core::{Capacity, Counts, InvalidField, JobId, JobState, LiveExecutor, Policy, PolicyOverrides};

/// All live pods with one job id. Usually they are one job: a driver and its executors. Several drivers with one job id
/// are several jobs.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// The live drivers, by creation time and name: the first is the oldest, the last the newest.
    pub(super) drivers: BTreeSet<(Box<str>, Arc<str>)>,
    /// Those of them that own live executors.
    pub(super) busy: BTreeSet<(Box<str>, Arc<str>)>,
    /// The teams, by their owners.
    pub(super) teams: HashMap<Option<Arc<str>>, Arc<JobId>>,
    /// The owner whose team is the job of the job id itself. Every other owner's team is a job of its own.
    pub(super) primary: Option<Arc<str>>,
}

/// The live executors with one job id and one owner, by their names. A driver has a team from its start.
#[derive(Debug)]
pub(super) struct Team {
    /// The job of the group's job id.
    pub(super) group: Arc<JobId>,
    pub(super) owner: Option<Arc<str>>,
    /// The owner's uid, as the executor that was reported last states it.
    pub(super) owner_uid: Box<str>,
    pub(super) executors: HashMap<Arc<str>, Executor>,
    /// The names of those that have another key in the ledger, by that key.
    pub(super) generated: HashMap<Box<str>, Arc<str>>,
    /// What they require by themselves.
    pub(super) fixed: ByCapacity,
    pub(super) churn: Churn,
    /// Whether the owner is a live driver with the same job id.
    pub(super) has_driver: bool,
    /// Whether it was reported that the job's ratio has no effect.
    pub(super) is_reported: bool,
}

#[derive(Debug)]
pub(super) struct Executor {
    /// The key in the ledger, if it is not the pod's name.
    pub(super) key: Option<Box<str>>,
    pub(super) uid: Box<str>,
    pub(super) node: Option<Arc<str>>,
    pub(super) asked: Option<Capacity>,
    pub(super) fixed: Option<Capacity>,
    pub(super) states_ratio: bool,
    /// In which list, or after which, it was reported last.
    pub(super) generation: u32,
}

impl Team {
    /// Adds an executor, of whose name the team has none.
    pub(super) fn insert(&mut self, name: Arc<str>, executor: Executor) {
        if let Some(key) = &executor.key {
            self.generated.insert(key.clone(), Arc::clone(&name));
        }
        *self.fixed.of(executor.fixed) += 1;
        self.executors.insert(name, executor);
    }

    pub(super) fn remove(&mut self, name: &str) -> Option<Executor> {
        let executor = self.executors.remove(name)?;
        if let Some(key) = &executor.key {
            self.generated.remove(key);
        }
        *self.fixed.of(executor.fixed) -= 1;
        Some(executor)
    }
}

/// How many executors of a job came and went. Only differences matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Churn {
    /// Those that have become live.
    pub added: u64,
    /// Those that are live no longer.
    pub lost: u64,
}

/// What the counts of a ledger must be according to the live executors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CountBounds {
    /// The executors of known capacity, on each.
    pub(crate) least: Counts,
    /// All executors.
    pub(crate) most: u64,
}

impl CountBounds {
    /// Whether a ledger with these counts, of which so many placements wait for their pods, may be right.
    pub(crate) fn allow(self, counts: Counts, waiting: u64) -> bool {
        let Self { least, most } = self;
        counts.spot >= least.spot && counts.on_demand >= least.on_demand && counts.total() <= most + waiting
    }
}

/// How many executors have each capacity, and how many none: of what they require by themselves, were sent to, or run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ByCapacity {
    pub(super) spot: usize,
    pub(super) on_demand: usize,
    pub(super) none: usize,
}

impl ByCapacity {
    /// One executor.
    pub(super) fn one(capacity: Option<Capacity>) -> Self {
        let mut one = Self::default();
        *one.of(capacity) = 1;
        one
    }

    pub(super) fn of(&mut self, capacity: Option<Capacity>) -> &mut usize {
        match capacity {
            Some(Capacity::Spot) => &mut self.spot,
            Some(Capacity::OnDemand) => &mut self.on_demand,
            None => &mut self.none,
        }
    }

    pub(super) fn add(&mut self, others: Self) {
        self.spot += others.spot;
        self.on_demand += others.on_demand;
        self.none += others.none;
    }

    pub(super) fn remove(&mut self, others: Self) {
        self.spot = self.spot.saturating_sub(others.spot);
        self.on_demand = self.on_demand.saturating_sub(others.on_demand);
        self.none = self.none.saturating_sub(others.none);
    }

    /// The same executors on a node of this capacity; on one whose capacity is not known they stay what they are.
    pub(super) fn on(self, capacity: Option<Capacity>) -> Self {
        if capacity.is_none() {
            return self;
        }
        let mut on_node = Self::default();
        *on_node.of(capacity) = self.total();
        on_node
    }

    pub(super) fn total(self) -> usize {
        self.spot + self.on_demand + self.none
    }

    /// The capacity that all of them require.
    pub(super) fn common(self) -> Option<Capacity> {
        match self {
            Self { spot: 1.., on_demand: 0, none: 0 } => Some(Capacity::Spot),
            Self { spot: 0, on_demand: 1.., none: 0 } => Some(Capacity::OnDemand),
            _ => None,
        }
    }
}

impl Executor {
    /// The key in the ledger of the executor with this name.
    pub(super) fn key(&self, name: &Arc<str>) -> Arc<str> {
        self.key.as_deref().map_or_else(|| Arc::clone(name), Arc::from)
    }

    /// It, by what it was sent to, if it has no node yet.
    pub(super) fn pending(&self) -> ByCapacity {
        if self.node.is_none() { ByCapacity::one(self.asked) } else { ByCapacity::default() }
    }
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) uid: Box<str>,
    pub(super) created: Box<str>,
    /// The job of its job id; `None` for a driver of many jobs.
    pub(super) job: Option<Arc<JobId>>,
    /// Each field: the last valid value, or the default if the driver states none; `None` if no valid value was seen.
    pub(super) overrides: PolicyOverrides,
    /// Whether the driver itself states a valid ratio.
    pub(super) states_ratio: bool,
    /// Whether the ratio that is in use is one that it states, or stated before an invalid one.
    pub(super) has_stated_ratio: bool,
    pub(super) invalid: Vec<InvalidField>,
    /// In which list, or after which, it was reported last.
    pub(super) generation: u32,
}

impl Group {
    /// The owner whose team should be the job of the job id: the oldest driver that owns executors. If none does, it is the
    /// newest driver, whose policy executors without an owner get. Without a driver it is the owner that was it before, so
    /// that the ledgers of a group stay where they are. Without such an owner, or if it is not to be kept, it is the owner
    /// of the most executors.
    pub(super) fn elect(&self, keep: bool, teams: &HashMap<Arc<JobId>, Team>) -> Option<Arc<str>> {
        if let Some((_, driver)) = self.busy.first().or(self.drivers.last()) {
            return Some(Arc::clone(driver));
        }
        if keep && self.primary.is_some() && self.teams.contains_key(&self.primary) {
            return self.primary.clone();
        }
        let owners = self.teams.iter().filter_map(|(owner, team)| Some((owner.as_ref()?, teams.get(team)?)));
        let (owner, _) = owners.max_by_key(|(owner, team)| (team.executors.len(), Reverse(*owner)))?;
        Some(Arc::clone(owner))
    }

    /// Whether the team of this owner is the job of the job id itself, or a part of it.
    pub(super) fn is_primary(&self, owner: Option<&Arc<str>>) -> bool {
        owner.is_none() || owner == self.primary.as_ref()
    }
}

/// A pod that drives jobs. Events are about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DriverRef {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The uid.
    pub uid: String,
}

/// What the ledger of a job should contain of some executors, according to the cluster.
#[derive(Debug, Default)]
pub struct DesiredState<'a> {
    pub(super) live: Vec<LiveExecutor<'a>>,
    pub(super) gone: Vec<&'a str>,
    pub(super) overrides: PolicyOverrides,
    pub(super) ended: bool,
    pub(super) driver: Option<&'a str>,
}

impl DesiredState<'_> {
    /// With the fields of this policy that no driver states: whatever the ledger has instead comes from elsewhere.
    pub(crate) fn or_policy(mut self, policy: Option<Policy>) -> Self {
        if let Some(policy) = policy {
            self.overrides = self.overrides.or_overrides(policy.into());
        }
        self
    }

    /// The name of the pod that drives the job, if it is known.
    pub(crate) fn driver(&self) -> Option<&str> {
        self.driver
    }

    /// The same, as a ledger accepts it.
    pub fn job_state(&self) -> JobState<'_> {
        let Self { live, gone, overrides, ended, driver } = self;
        JobState { live, gone, overrides: *overrides, ended: *ended, driver: *driver }
    }
}

/// The capacity that all live executors of a job require by themselves, whatever the job's ratio is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FixedCapacity {
    pub(crate) capacity: Capacity,
    /// Whether the job's driver states a ratio; `None` if the driver is not watched.
    pub(super) states_ratio: Option<bool>,
}

impl FixedCapacity {
    /// Fewer executors than this are no reason to warn of a ratio.
    pub(super) const ENOUGH: usize = 3;

    /// Whether somebody has stated a ratio, and the executors' own capacity leaves it without effect. `policy` is what
    /// the ledger has.
    pub(crate) fn contradicts(self, policy: Policy, defaults: Policy) -> bool {
        // Nobody is told that a default has no effect.
        if !self.states_ratio.unwrap_or(policy.spot_ratio != defaults.spot_ratio) {
            return false;
        }
        let Some(ratio) = policy.spot_ratio.share() else { return false };
        match self.capacity {
            Capacity::Spot => ratio != balancer_core::Ratio::ONE || policy.on_demand_base > 0,
            Capacity::OnDemand => ratio != balancer_core::Ratio::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use balancer_core::testing;

    #[test]
    fn counts_outside_their_bounds_are_wrong() {
        let bounds = CountBounds { least: Counts { spot: 3, on_demand: 1 }, most: 5 };
        for (spot, on_demand, waiting, allowed) in [
            (3, 1, 0, true),
            (4, 1, 0, true),
            (3, 2, 0, true),
            (2, 2, 0, false),
            (4, 0, 0, false),
            (4, 2, 0, false),
            (4, 2, 1, true),
        ] {
            let counts = Counts { spot, on_demand };
            assert_eq!(bounds.allow(counts, waiting), allowed, "{counts:?}, {waiting} waiting");
        }
    }

    #[test]
    fn a_stated_ratio_is_without_effect_unless_it_is_what_all_executors_require() {
        let contradicts = |capacity, states_ratio, percent: Option<u32>, base| {
            let share = percent.map(|percent| testing::share(percent).into());
            let spot_ratio = share.unwrap_or(balancer_core::SpotRatio::Off);
            let policy = Policy { on_demand_base: base, ..Policy { spot_ratio, ..Policy::DEFAULT } };
            FixedCapacity { capacity, states_ratio }.contradicts(policy, Policy::DEFAULT)
        };
        use Capacity::{OnDemand, Spot};
        for (capacity, percent, base, without_effect) in [
            (Spot, Some(70), 0, true),
            (Spot, Some(100), 0, false),
            (Spot, Some(100), 1, true),
            (Spot, Some(0), 0, true),
            (OnDemand, Some(0), 0, false),
            (OnDemand, Some(0), 3, false),
            (OnDemand, Some(70), 0, true),
            (Spot, None, 0, false),
            (OnDemand, None, 0, false),
        ] {
            assert_eq!(
                contradicts(capacity, Some(true), percent, base),
                without_effect,
                "{capacity} {percent:?} {base}"
            );
            assert!(!contradicts(capacity, Some(false), percent, base), "nobody has stated a ratio");
        }
        assert!(contradicts(Spot, None, Some(70), 0), "an owner that is not watched has stated it");
        assert!(!contradicts(Spot, None, Some(50), 0), "it may be the default");
    }
}
