//! How often a line is logged that repeats itself during an outage. Pure: the clock is the caller's.

use std::time::Duration;

use tokio::time::Instant;

/// How often an outage is logged while it lasts.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// When the line was last logged.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LogLimit(Option<Instant>);

impl LogLimit {
    /// Whether the line is to be logged now. If so, it is not due again for a while.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.0.is_none_or(|logged_at| now.duration_since(logged_at) >= LOG_EVERY);
        if is_due {
            self.0 = Some(now);
        }
        is_due
    }

    /// The outage is over: the first line of the next one is due.
    pub(crate) fn reset(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_due_at_once_and_then_every_thirty_seconds() {
        let (mut limit, start) = (LogLimit::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let due: Vec<bool> = [0, 1, 29, 30, 31, 60].map(|seconds| limit.is_due(after(seconds))).into();
        assert_eq!(due, [true, false, false, true, false, true]);
        limit.reset();
        assert!(limit.is_due(after(61)));
    }
}
