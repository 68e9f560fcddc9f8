//! The two capacities that an executor can run on, and the number of a job's executors on each.

use std::fmt;

/// The capacity that an executor runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Capacity {
    /// Cheap; the cloud can reclaim it at short notice.
    Spot,
    /// At full price; the cloud does not reclaim it.
    OnDemand,
}

impl Capacity {
    /// `spot` or `on-demand`, as in node labels, nodeSelectors, annotations and the ledger.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Spot => "spot",
            Self::OnDemand => "on-demand",
        }
    }

    /// Parses what [`Capacity::as_str`] returns; `None` for any other text.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "spot" => Some(Self::Spot),
            "on-demand" => Some(Self::OnDemand),
            _ => None,
        }
    }
}

impl fmt::Display for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The number of a job's executors on each capacity.
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

    /// Adds one executor.
    pub fn add(&mut self, capacity: Capacity) {
        *self.slot(capacity) += 1;
    }

    /// Removes one executor. The number of executors does not fall below 0.
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
