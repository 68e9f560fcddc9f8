//! Whether the store answers, and whether it is still the store that was written to. Pure.

/// The heartbeats of this process in the store.
#[derive(Debug)]
pub(crate) struct StoreEpoch {
    /// The heartbeat that the store should return next; `None` if it may return anything.
    last: Option<u64>,
    is_up: bool,
}

/// The store has to be compared with the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoreReturned {
    /// Whether it is certain that the store has lost data. If not, the store was not reachable for a while.
    pub(crate) lost_data: bool,
}

impl Default for StoreEpoch {
    fn default() -> Self {
        Self { last: None, is_up: true }
    }
}

impl StoreEpoch {
    /// Whether the store answered the last heartbeat.
    pub(crate) fn is_up(&self) -> bool {
        self.is_up
    }

    /// The heartbeat to send next. `random` starts a new series, which no other process has used.
    pub(crate) fn next(&self, random: impl FnOnce() -> u64) -> u64 {
        // Half of the range is left to count in.
        self.last.map_or_else(|| random() >> 1, |last| last + 1)
    }

    /// The store has stored the heartbeat `sent`, and returned the one `before` it.
    pub(crate) fn answered(&mut self, sent: u64, before: Option<u64>) -> Option<StoreReturned> {
        let lost_data = self.last.is_some() && before != self.last;
        let was_up = self.is_up;
        (self.last, self.is_up) = (Some(sent), true);
        (lost_data || !was_up).then_some(StoreReturned { lost_data })
    }

    /// The store is up, and refused to store the heartbeat. What it has stored is not known.
    pub(crate) fn refused(&mut self) -> Option<StoreReturned> {
        let was_up = std::mem::replace(&mut self.is_up, true);
        (!was_up).then_some(StoreReturned { lost_data: false })
    }

    /// The store did not answer. Returns whether that is new.
    pub(crate) fn failed(&mut self) -> bool {
        std::mem::replace(&mut self.is_up, false)
    }

    /// Another process may have sent heartbeats meanwhile.
    pub(crate) fn forget(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACK: Option<StoreReturned> = Some(StoreReturned { lost_data: false });
    const LOST: Option<StoreReturned> = Some(StoreReturned { lost_data: true });

    #[test]
    fn heartbeats_count_up_from_a_random_number_with_room_to_count() {
        let mut epoch = StoreEpoch::default();
        assert_eq!(epoch.next(|| u64::MAX), u64::MAX / 2);
        epoch.answered(7, None);
        assert_eq!(epoch.next(|| panic!("a series is under way")), 8);
        epoch.forget();
        assert_eq!(epoch.next(|| 100), 50);
    }

    #[test]
    fn a_store_that_returns_the_last_heartbeat_has_lost_nothing() {
        let mut epoch = StoreEpoch::default();
        assert_eq!(epoch.answered(7, Some(99)), None, "the first answer may be anything");
        assert_eq!(epoch.answered(8, Some(7)), None);
        assert!(epoch.is_up());
    }

    #[test]
    fn a_store_that_returns_another_heartbeat_or_none_has_lost_data() {
        for before in [None, Some(6), Some(8)] {
            let mut epoch = StoreEpoch::default();
            epoch.answered(7, None);
            assert_eq!(epoch.answered(8, before), LOST);
            assert_eq!(epoch.answered(9, Some(8)), None, "it is reported once");
        }
    }

    #[test]
    fn a_store_that_is_back_is_reported_once_and_so_is_its_outage() {
        let mut epoch = StoreEpoch::default();
        epoch.answered(7, None);
        assert!(epoch.failed() && !epoch.is_up() && !epoch.failed());
        assert_eq!(epoch.next(|| 0), 8, "the failed heartbeat was perhaps not stored");
        assert_eq!((epoch.answered(8, Some(7)), epoch.is_up()), (BACK, true));
        assert_eq!(epoch.answered(9, Some(8)), None);
        assert!(epoch.failed());
        assert_eq!(epoch.answered(10, None), LOST);
    }

    #[test]
    fn a_store_that_refuses_the_heartbeat_is_up_and_keeps_the_last_one() {
        let mut epoch = StoreEpoch::default();
        epoch.answered(7, None);
        assert_eq!((epoch.refused(), epoch.is_up()), (None, true));
        assert_eq!(epoch.next(|| 0), 8);
        assert_eq!(epoch.answered(8, Some(7)), None, "the refused heartbeat was not stored");
        epoch.failed();
        assert_eq!((epoch.refused(), epoch.is_up()), (BACK, true));
        assert_eq!(epoch.refused(), None);
        assert_eq!(epoch.answered(9, None), LOST);
    }

    #[test]
    fn after_a_change_of_term_the_store_may_return_anything_but_an_outage_still_counts() {
        let mut epoch = StoreEpoch::default();
        epoch.answered(7, None);
        epoch.forget();
        assert_eq!(epoch.answered(20, Some(3)), None);
        epoch.failed();
        epoch.forget();
        assert!(!epoch.is_up());
        assert_eq!(epoch.answered(40, None), BACK);
    }
}
