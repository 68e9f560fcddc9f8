//! The live pods of one job, and what its ledger should contain.

use std::collections::HashMap;
use std::sync::Arc;

use balancer_core::{Capacity, InvalidField, JobState, LiveExecutor, PolicyOverrides};

/// The live pods of one job, by their names.
#[derive(Debug, Default)]
pub(super) struct JobPods {
    pub(super) executors: HashMap<Arc<str>, Executor>,
    pub(super) drivers: HashMap<Arc<str>, Driver>,
}

#[derive(Debug)]
pub(super) struct Executor {
    /// The key in the ledger, if it is not the pod's name.
    pub(super) key: Option<Box<str>>,
    pub(super) uid: Box<str>,
    pub(super) node: Option<Arc<str>>,
    pub(super) asked: Option<Capacity>,
    /// In which list, or after which, it was reported last.
    pub(super) generation: u32,
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) uid: Box<str>,
    pub(super) created: Box<str>,
    /// Each field: the last valid value, or the default if the driver states none; `None` if no valid value was seen.
    pub(super) overrides: PolicyOverrides,
    pub(super) invalid: Vec<InvalidField>,
    /// In which list, or after which, it was reported last.
    pub(super) generation: u32,
}

impl JobPods {
    pub(super) fn is_empty(&self) -> bool {
        self.executors.is_empty() && self.drivers.is_empty()
    }

    /// The names of the pods that a list of this generation did not contain.
    pub(super) fn missing_from(&self, generation: u32) -> impl Iterator<Item = &Arc<str>> {
        let executors = self.executors.iter().map(|(name, executor)| (name, executor.generation));
        let drivers = self.drivers.iter().map(|(name, driver)| (name, driver.generation));
        executors.chain(drivers).filter(move |(_, reported)| *reported != generation).map(|(name, _)| name)
    }

    /// The policy of the newest driver: there are several while an earlier attempt of the job still runs.
    pub(super) fn overrides(&self) -> PolicyOverrides {
        let newest = self.drivers.values().max_by_key(|driver| (&driver.created, &driver.uid));
        newest.map(|driver| driver.overrides).unwrap_or_default()
    }
}

/// What the ledger of a job should contain, according to the cluster.
#[derive(Debug, Default)]
pub struct DesiredState<'a> {
    pub(super) live: Vec<LiveExecutor<'a>>,
    pub(super) overrides: PolicyOverrides,
    pub(super) ended: bool,
}

impl DesiredState<'_> {
    /// How many executors are live.
    pub(crate) fn executors(&self) -> u32 {
        u32::try_from(self.live.len()).unwrap_or(u32::MAX)
    }

    /// The same, as a ledger accepts it.
    pub fn job_state(&self) -> JobState<'_> {
        JobState { live: &self.live, overrides: self.overrides, ended: self.ended }
    }
}
