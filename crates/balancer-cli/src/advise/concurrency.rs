//! How many tasks ran at one time while a run did most of its work, in bounded memory.

/// How many spans of time are told apart. They are half a second long in a run of four hours, so gaps between its stages
/// show; more would tell little more.
const MOST_SPANS: usize = 1 << 15;

/// The time of tasks in spans of equal length, which grow with the run.
#[derive(Debug)]
pub(super) struct Concurrency {
    origin: Option<u64>,
    /// The length of a span, in milliseconds.
    width: u64,
    spans: Vec<u64>,
}

impl Default for Concurrency {
    fn default() -> Self {
        Self { origin: None, width: 1, spans: vec![0; MOST_SPANS] }
    }
}

impl Concurrency {
    /// Sets the time before which no task ran. Otherwise it is the launch of the task that is added first.
    pub(super) fn begin(&mut self, time: u64) {
        self.origin.get_or_insert(time);
    }

    /// Adds a task that ran between these times.
    pub(super) fn add(&mut self, from: u64, until: u64) {
        let origin = *self.origin.get_or_insert(from);
        let (from, until) = (from.saturating_sub(origin), until.saturating_sub(origin));
        if until <= from {
            return;
        }
        while (until - 1) / self.width >= MOST_SPANS as u64 {
            self.widen();
        }
        let mut begins = from / self.width * self.width;
        let first = usize::try_from(from / self.width).unwrap_or(usize::MAX);
        for span in self.spans.iter_mut().skip(first) {
            let ends = begins.saturating_add(self.width);
            *span = span.saturating_add(until.min(ends) - from.max(begins));
            if ends >= until {
                break;
            }
            begins = ends;
        }
    }

    /// Makes one span of two.
    fn widen(&mut self) {
        let sum = |spans: &[u64]| spans.iter().fold(0_u64, |sum, &time| sum.saturating_add(time));
        self.spans = self.spans.chunks(2).map(sum).collect();
        self.spans.resize(MOST_SPANS, 0);
        self.width *= 2;
    }

    /// The mean number of tasks at one time, in which each moment counts by the number of its tasks: a long time with one
    /// task hardly changes it.
    pub(super) fn weighted(&self) -> u64 {
        let sum = |value: fn(u128) -> u128| {
            self.spans.iter().fold(0_u128, |sum, &time| sum.saturating_add(value(u128::from(time))))
        };
        let times = sum(|time| time).saturating_mul(u128::from(self.width));
        // Rounded to the nearest.
        let rounded = sum(|time| time * time).saturating_add(times / 2).checked_div(times);
        rounded.map_or(0, |count| u64::try_from(count).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60_000;

    fn concurrency(tasks: impl IntoIterator<Item = (u64, u64)>) -> Concurrency {
        let mut concurrency = Concurrency::default();
        concurrency.begin(1000);
        for (from, until) in tasks {
            concurrency.add(1000 + from, 1000 + until);
        }
        concurrency
    }

    #[test]
    fn a_serial_tail_hardly_changes_it() {
        let wide = (0..400).map(|_| (0, 30 * MINUTE));
        assert_eq!(concurrency(wide.clone()).weighted(), 400);
        let tail = [(30 * MINUTE, 120 * MINUTE)];
        assert_eq!(concurrency(wide.chain(tail)).weighted(), 397);
    }

    #[test]
    fn stages_at_the_same_time_are_added_and_gaps_between_stages_do_not_count() {
        let both = (0..40).map(|n| (n % 2 * MINUTE / 2, 60 * MINUTE));
        assert_eq!(concurrency(both).weighted(), 40);
        // Two seconds of work, and two of rest.
        let gaps = (0..900).flat_map(|n| std::iter::repeat_n((n * 4000, n * 4000 + 2000), 40));
        assert!((39..=40).contains(&concurrency(gaps).weighted()));
    }

    #[test]
    fn a_run_of_any_length_needs_bounded_memory_and_no_task_time_is_lost() {
        let mut concurrency = concurrency([(0, 10), (5, 10_000_000), (3, 3), (9, 4)]);
        assert_eq!(concurrency.spans.iter().sum::<u64>(), 10 + 9_999_995);
        concurrency.add(0, u64::MAX);
        concurrency.add(u64::MAX - 1, u64::MAX);
        assert_eq!((concurrency.spans.len(), concurrency.weighted()), (MOST_SPANS, 1));
        assert_eq!(Concurrency::default().weighted(), 0);
    }
}
