//! What orders the writers of a ledger: the fencing token of the reconcilers, and the store's clock.

use std::fmt;
use std::time::Duration;

/// A fencing token: how often the leader of the reconcilers has changed. A ledger that was reconciled in one term
/// ignores reconciles of earlier terms. They come from a leader that was paused, does not know its successor yet,
/// and has an outdated view of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub u64);

impl Term {
    /// The latest term that a ledger is believed to have. A Lease counts its transitions in 32 bits, and with one change
    /// of the leader each second this number takes 31 years. A later term in a ledger was not written by a reconciler.
    pub const MAX: Self = Self(1_000_000_000);

    /// How far the term of a ledger may be ahead of a reconciler's. A Lease that was deleted counts from zero again, after
    /// far fewer changes of the leader.
    pub const MAX_AHEAD: u64 = 1_000_000;

    /// Whether a reconciler of the term `other` believes that a ledger has this term.
    pub(crate) fn is_possible(self, other: Self) -> bool {
        self <= Self::MAX && self.0.saturating_sub(other.0) <= Self::MAX_AHEAD
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Milliseconds on the store's clock. Only differences matter.
pub type Millis = u64;

/// The whole milliseconds of a duration. One of more than 584 million years is that long.
pub fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(Millis::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_millisecond_does_not_count_and_the_longest_duration_fits() {
        assert_eq!(millis(Duration::from_micros(1_999)), 1);
        assert_eq!(millis(Duration::MAX), Millis::MAX);
    }
}
