//! When nodes to which there is no connection may be asked for the slots. Pure: the clock is the caller's.

use std::collections::{BTreeMap, BTreeSet};

use backon::{BackoffBuilder, ExponentialBackoff};
use tokio::time::Instant;

use super::super::address::Address;
use super::super::supervisor::{BACKOFF, MAX_PAUSE};

/// When nodes may be dialled, by what came of it before.
#[derive(Debug, Default)]
pub(super) struct DialTimes(BTreeMap<Address, DialTime>);

#[derive(Debug)]
struct DialTime {
    not_before: Instant,
    backoff: ExponentialBackoff,
}

impl DialTimes {
    /// The nodes of these that may be dialled, first those that were not for the longest time. Forgets all others.
    pub(super) fn due(&mut self, nodes: BTreeSet<Address>, now: Instant) -> Vec<Address> {
        self.0.retain(|address, _| nodes.contains(address));
        let not_before = |address: &Address| self.0.get(address).map(|time| time.not_before);
        let mut due: Vec<_> =
            nodes.into_iter().filter(|address| not_before(address).is_none_or(|time| time <= now)).collect();
        due.sort_by_key(not_before);
        due
    }

    /// The node has not answered.
    pub(super) fn failed(&mut self, address: Address, now: Instant) {
        let time = self.0.entry(address).or_insert_with(|| DialTime { not_before: now, backoff: BACKOFF.build() });
        time.not_before = now + time.backoff.next().unwrap_or(MAX_PAUSE);
    }

    /// The node has answered.
    pub(super) fn answered(&mut self, address: Address, now: Instant) {
        self.0.insert(address, DialTime { not_before: now, backoff: BACKOFF.build() });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn nodes(ports: impl IntoIterator<Item = u16>) -> BTreeSet<Address> {
        ports.into_iter().map(|port| Address { host: "h".to_owned(), port }).collect()
    }

    fn ports(due: &[Address]) -> Vec<u16> {
        due.iter().map(|address| address.port).collect()
    }

    #[test]
    fn a_node_that_does_not_answer_is_dialled_less_and_less_often() {
        let start = Instant::now();
        let (mut times, mut dialled, mut now) = (DialTimes::default(), 0, start);
        while now < start + Duration::from_secs(60) {
            for address in times.due(nodes([1]), now) {
                times.failed(address, now);
                dialled += 1;
            }
            now += Duration::from_millis(10);
        }
        assert!((30..=70).contains(&dialled), "{dialled}");
        // One that answers may be dialled at once.
        let [address] = nodes([1]).into_iter().collect::<Vec<_>>().try_into().expect("one");
        times.answered(address, now);
        assert_eq!(ports(&times.due(nodes([1]), now)), [1]);
    }

    #[test]
    fn all_nodes_get_their_turn() {
        let mut now = Instant::now();
        let (mut times, mut dialled) = (DialTimes::default(), BTreeSet::new());
        for _ in 0..5 {
            now += Duration::from_secs(10);
            for address in times.due(nodes(1..=10), now).into_iter().take(2) {
                dialled.insert(address.port);
                times.failed(address, now);
            }
        }
        assert_eq!(dialled.len(), 10, "{dialled:?}");
    }

    #[test]
    fn only_nodes_of_now_are_remembered() {
        let now = Instant::now();
        let mut times = DialTimes::default();
        nodes(1..=100).into_iter().for_each(|address| times.failed(address, now));
        times.due(nodes([7]), now);
        assert_eq!(times.0.len(), 1);
    }
}
