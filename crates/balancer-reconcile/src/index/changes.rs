//! What has changed in a job since its ledger was last reconciled: the executors whose entries may be wrong, and how urgent
//! it is.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use balancer_core::JobId;

/// How urgent a change is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Something that the ledger may contain already, or that can wait.
    #[default]
    Other,
    /// An executor is gone, so Spark may request another one at any moment.
    Loss,
}

/// The executors whose entries may differ from the cluster, by their keys in the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executors {
    /// These, if any. What the ledger has of the job as a whole may differ too.
    Some(BTreeSet<Arc<str>>),
    /// Any: the whole ledger has to be compared.
    All,
}

impl Executors {
    /// More than this count as all of them: a whole comparison needs less memory than their names.
    pub const MAX: usize = 4096;

    /// One executor.
    pub fn one(key: Arc<str>) -> Self {
        Self::Some(BTreeSet::from([key]))
    }

    /// These and the others.
    pub fn merge(&mut self, others: Self) {
        match (&mut *self, others) {
            (Self::Some(keys), Self::Some(others)) if keys.len() + others.len() <= Self::MAX => keys.extend(others),
            _ => *self = Self::All,
        }
    }
}

impl Default for Executors {
    /// None.
    fn default() -> Self {
        Self::Some(BTreeSet::new())
    }
}

/// The changes of one job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The most urgent one.
    pub change: Change,
    /// The executors that they are about.
    pub executors: Executors,
}

/// The jobs that have changed, until they are taken.
pub type ChangedJobs = HashMap<Arc<JobId>, Changes>;

/// Adds a change of a job.
pub(super) fn add_change(changed: &mut ChangedJobs, job: Arc<JobId>, change: Change, executors: Executors) {
    let known = changed.entry(job).or_default();
    known.change = change.max(known.change);
    known.executors.merge(executors);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(keys: &[&str]) -> Executors {
        Executors::Some(keys.iter().map(|key| Arc::from(*key)).collect())
    }

    #[test]
    fn executors_add_up_and_all_stays_all() {
        let mut executors = some(&["e1"]);
        executors.merge(some(&["e1", "e2"]));
        assert_eq!(executors, some(&["e1", "e2"]));
        executors.merge(Executors::All);
        executors.merge(some(&["e3"]));
        assert_eq!(executors, Executors::All);
    }

    #[test]
    fn so_many_that_their_names_take_much_memory_are_all() {
        let mut executors = Executors::default();
        for number in 0..Executors::MAX {
            executors.merge(Executors::one(number.to_string().into()));
            assert_ne!(executors, Executors::All);
        }
        executors.merge(Executors::one("one more".into()));
        assert_eq!(executors, Executors::All);
    }
}
