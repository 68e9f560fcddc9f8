//! The two kinds of capacity an executor can run on, and how many of each a job has.

use std::fmt;

/// Where an executor runs: on capacity that the cloud may reclaim, or on capacity that stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Capacity {
    /// Cheap, and reclaimed with short notice.
    Spot,
    /// Full price, and never reclaimed.
    OnDemand,
}

impl Capacity {
    /// The value that node labels, selectors, annotations and the ledger use: `spot` or `on-demand`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Spot => "spot",
            Self::OnDemand => "on-demand",
        }
    }

    /// Reads what [`Capacity::as_str`] writes; anything else is `None`.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "spot" => Some(Self::Spot),
            "on-demand" => Some(Self::OnDemand),
            _ => None,
        }
    }

    /// What a node's (or a selector's) capacity label value counts as. Only `spot` is reclaimed:
    /// every other value, such as Karpenter's `reserved`, is as lasting as on-demand.
    pub fn of_label(value: &str) -> Self {
        if value == Self::Spot.as_str() { Self::Spot } else { Self::OnDemand }
    }
}

impl fmt::Display for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A job's live executors by capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Executors on spot.
    pub spot: u64,
    /// Executors on on-demand.
    pub on_demand: u64,
}

impl Counts {
    /// All executors of the job.
    pub const fn total(self) -> u64 {
        self.spot + self.on_demand
    }

    /// One executor more.
    pub fn add(&mut self, capacity: Capacity) {
        *self.slot(capacity) += 1;
    }

    /// One executor less; never below none.
    pub fn remove(&mut self, capacity: Capacity) {
        let slot = self.slot(capacity);
        *slot = slot.saturating_sub(1);
    }

    fn slot(&mut self, capacity: Capacity) -> &mut u64 {
        match capacity {
            Capacity::Spot => &mut self.spot,
            Capacity::OnDemand => &mut self.on_demand,
        }
    }
}
