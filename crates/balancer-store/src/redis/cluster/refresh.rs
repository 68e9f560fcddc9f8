//! When the nodes are asked for the slots again. Pure: the clock is the caller's.

use std::time::Duration;

use tokio::time::Instant;

/// While all is well.
const INTERVAL: Duration = Duration::from_secs(10);
/// While a slot has no primary, or a primary is not connected.
const INTERVAL_IN_TROUBLE: Duration = Duration::from_millis(250);
/// From one refresh to the next at least: while slots move, each call may ask for one.
const PAUSE: Duration = Duration::from_millis(50);

/// When the next refresh is due.
#[derive(Debug)]
pub(super) struct RefreshTimer {
    due: Instant,
    /// The next refresh is not due earlier.
    not_before: Instant,
}

impl RefreshTimer {
    /// The first one is due now.
    pub(super) fn new(now: Instant) -> Self {
        Self { due: now, not_before: now }
    }

    /// When the next one is due.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// A call has found out that something has changed.
    pub(super) fn request(&mut self, now: Instant) {
        self.due = self.due.min(now.max(self.not_before));
    }

    /// The nodes have been asked.
    pub(super) fn asked(&mut self, is_healthy: bool, now: Instant) {
        self.not_before = now + PAUSE;
        self.due = now + Self::interval(is_healthy);
    }

    /// Their answers have been used. What was requested meanwhile is still due.
    pub(super) fn used(&mut self, is_healthy: bool, now: Instant) {
        self.due = self.due.min(now + Self::interval(is_healthy));
    }

    fn interval(is_healthy: bool) -> Duration {
        if is_healthy { INTERVAL } else { INTERVAL_IN_TROUBLE }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_refresh_is_due_at_once_then_in_an_interval_or_when_it_is_requested() {
        let start = Instant::now();
        let mut timer = RefreshTimer::new(start);
        assert_eq!(timer.due(), start);
        timer.asked(true, start);
        assert_eq!(timer.due(), start + INTERVAL);
        timer.request(start + 300 * MS);
        assert_eq!(timer.due(), start + 300 * MS);
        timer.asked(false, start + 400 * MS);
        assert_eq!(timer.due(), start + 400 * MS + INTERVAL_IN_TROUBLE);
    }

    #[test]
    fn requests_that_come_together_lead_to_one_refresh_after_a_pause() {
        let start = Instant::now();
        let mut timer = RefreshTimer::new(start);
        timer.asked(true, start);
        for at in 0..40 {
            timer.request(start + at * MS);
            assert_eq!(timer.due(), start + PAUSE);
        }
    }

    #[test]
    fn a_request_while_nodes_answer_is_not_lost() {
        let start = Instant::now();
        let mut timer = RefreshTimer::new(start);
        timer.asked(false, start);
        timer.request(start + MS);
        timer.used(true, start + 40 * MS);
        assert_eq!(timer.due(), start + PAUSE);
        timer.asked(true, start + PAUSE);
        timer.used(false, start + PAUSE);
        assert_eq!(timer.due(), start + PAUSE + INTERVAL_IN_TROUBLE);
    }
}
