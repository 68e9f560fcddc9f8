//! Which of several answers about the slots is right. Pure: the clock is the caller's.

use std::time::Duration;

use tokio::time::Instant;

use super::slots::SlotMap;

/// After the first answer, others are waited for no longer than this: a frozen node does not delay a map.
const WAIT_FOR_OTHERS: Duration = Duration::from_millis(50);
/// An earlier election is that of another cluster, made anew at the same addresses, if no node has known of the one in
/// use for as long as this. Nodes that were cut off refuse changes by then.
const MAX_BEHIND: Duration = Duration::from_secs(30);

/// What a node knows about the slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// The number of the latest election that it knows of, if it says that.
    pub(super) epoch: Option<u64>,
    pub(super) map: SlotMap,
}

/// The answers of a round, in which several nodes are asked at once, and the map in use.
#[derive(Debug, Default)]
pub(super) struct Answers {
    round: u64,
    /// Those of this round, and how many nodes gave each.
    given: Vec<(Answer, usize)>,
    decide_at: Option<Instant>,
    in_use: Option<Answer>,
    /// Since when nodes have known only of earlier elections than the map in use.
    behind_since: Option<Instant>,
}

impl Answers {
    /// Nodes are asked anew. Returns the number of the round.
    pub(super) fn begin_round(&mut self) -> u64 {
        self.round += 1;
        self.given.clear();
        self.round
    }

    /// A node has answered that was asked in this round. One of an earlier round is out of date if it knows of no later
    /// election.
    pub(super) fn add(&mut self, round: u64, answer: Answer, now: Instant) {
        let is_late = round != self.round && !self.is_newer(&answer);
        if is_late || answer.map.ranges.is_empty() {
            return;
        }
        if self.is_behind(&answer) {
            let since = *self.behind_since.get_or_insert(now);
            if now - since < MAX_BEHIND {
                return;
            }
        } else {
            self.behind_since = None;
        }
        self.decide_at.get_or_insert(now + WAIT_FOR_OTHERS);
        // Nodes learn of lost replicas at different times.
        let is_same = |given: &Answer| given.epoch == answer.epoch && given.map.ranges == answer.map.ranges;
        match self.given.iter_mut().find(|(given, _)| is_same(given)) {
            Some((_, nodes)) => *nodes += 1,
            None => self.given.push((answer, 1)),
        }
    }

    /// When to decide; `None` before the first answer.
    pub(super) fn decide_at(&self) -> Option<Instant> {
        self.decide_at
    }

    /// Returns the map to use from now on if it is another one: that of the latest election, and of several of these the
    /// one that most nodes know. Further answers of the round are compared with those before.
    pub(super) fn decide(&mut self) -> Option<SlotMap> {
        self.decide_at = None;
        let rank = |(answer, nodes): &(Answer, usize)| {
            let is_in_use = self.in_use.as_ref().is_some_and(|in_use| in_use.map.ranges == answer.map.ranges);
            (answer.epoch, *nodes, answer.map.covered(), is_in_use)
        };
        let (best, _) = self.given.iter().max_by_key(|given| rank(given))?.clone();
        let is_other = self.in_use.as_ref().is_none_or(|in_use| in_use.map != best.map);
        let map = is_other.then(|| best.map.clone());
        self.in_use = Some(best);
        map
    }

    fn epoch_in_use(&self) -> Option<u64> {
        self.in_use.as_ref()?.epoch
    }

    fn is_newer(&self, answer: &Answer) -> bool {
        answer.epoch > self.epoch_in_use()
    }

    /// Nodes that do not say which election they know of are not behind.
    fn is_behind(&self, answer: &Answer) -> bool {
        answer.epoch.zip(self.epoch_in_use()).is_some_and(|(epoch, in_use)| epoch < in_use)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::address::Address;
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// An answer with a map that has the number `primary` in it.
    fn answer(epoch: impl Into<Option<u64>>, primary: u16) -> Answer {
        let ranges = vec![(0..=16_383, Address { host: "h".to_owned(), port: primary })];
        Answer { epoch: epoch.into(), map: SlotMap { ranges, replicas: Vec::new() } }
    }

    /// The number of the map that is used after a round with these answers, if it is another one.
    fn decide(answers: &mut Answers, given: impl IntoIterator<Item = Answer>, now: Instant) -> Option<u16> {
        let round = answers.begin_round();
        given.into_iter().for_each(|answer| answers.add(round, answer, now));
        Some(answers.decide()?.ranges.first()?.1.port)
    }

    #[test]
    fn others_are_waited_for_only_a_short_time() {
        let now = Instant::now();
        let mut answers = Answers::default();
        let round = answers.begin_round();
        assert_eq!(answers.decide_at(), None);
        answers.add(round, answer(1, 1), now);
        answers.add(round, answer(2, 2), now + 20 * MS);
        assert_eq!(answers.decide_at(), Some(now + WAIT_FOR_OTHERS));
        assert_eq!(answers.decide(), Some(answer(2, 2).map));
        assert_eq!(answers.decide_at(), None);
    }

    #[test]
    fn the_latest_election_counts_most_then_the_number_of_nodes() {
        let now = Instant::now();
        let mut answers = Answers::default();
        let given = [answer(2, 1), answer(1, 2), answer(1, 2), answer(None, 3), answer(None, 3)];
        assert_eq!(decide(&mut answers, given, now), Some(1));
        assert_eq!(decide(&mut answers, [answer(2, 1), answer(2, 2), answer(2, 2)], now), Some(2));
        assert_eq!(decide(&mut answers, [answer(2, 1), answer(2, 2)], now), None, "the map in use stays");
        let mut silent = Answers::default();
        assert_eq!(decide(&mut silent, [answer(None, 1), answer(None, 2), answer(None, 2)], now), Some(2));
        assert_eq!(decide(&mut silent, [answer(None, 1)], now), Some(1));
    }

    #[test]
    fn nodes_that_know_other_replicas_agree_about_the_slots() {
        let now = Instant::now();
        let with_replica = |port| {
            let mut answer = answer(1, 2);
            answer.map.replicas.push(Address { host: "h".to_owned(), port });
            answer
        };
        let mut answers = Answers::default();
        let given = [answer(1, 1), answer(1, 1), with_replica(7), with_replica(8), with_replica(9)];
        assert_eq!(decide(&mut answers, given, now), Some(2));
        assert_eq!(decide(&mut answers, [with_replica(8)], now), Some(2), "other replicas are used");
    }

    #[test]
    fn an_empty_map_is_no_answer() {
        let mut answers = Answers::default();
        let empty = Answer { epoch: Some(9), map: SlotMap::default() };
        assert_eq!(decide(&mut answers, [empty], Instant::now()), None);
        assert_eq!(answers.decide_at(), None);
    }

    #[test]
    fn a_node_that_knows_only_of_an_earlier_election_is_heard_when_no_other_was_for_long() {
        let now = Instant::now();
        let mut answers = Answers::default();
        decide(&mut answers, [answer(7, 1)], now);
        let late = now + MAX_BEHIND;
        assert_eq!(decide(&mut answers, [answer(6, 2)], now), None);
        assert_eq!(answers.decide_at(), None, "others are waited for");
        assert_eq!(decide(&mut answers, [answer(6, 2)], late - MS), None);
        // Another node knows of it.
        assert_eq!(decide(&mut answers, [answer(6, 2), answer(7, 1)], late), None);
        assert_eq!(decide(&mut answers, [answer(6, 2)], late + MS), None);
        assert_eq!(decide(&mut answers, [answer(6, 2)], late + MS + MAX_BEHIND), Some(2));
        assert_eq!(decide(&mut answers, [answer(6, 3)], late + 2 * MAX_BEHIND), Some(3));
    }

    #[test]
    fn a_late_answer_counts_in_its_round_and_later_only_if_it_is_newer() {
        let now = Instant::now();
        let mut answers = Answers::default();
        let first = answers.begin_round();
        answers.add(first, answer(1, 1), now);
        assert!(answers.decide().is_some());
        answers.add(first, answer(1, 2), now + 60 * MS);
        answers.add(first, answer(1, 2), now + 60 * MS);
        assert_eq!(answers.decide(), Some(answer(1, 2).map));
        answers.begin_round();
        answers.add(first, answer(1, 1), now);
        assert_eq!((answers.decide_at(), answers.decide()), (None, None));
        answers.add(first, answer(2, 3), now);
        assert_eq!(answers.decide(), Some(answer(2, 3).map));
    }
}
