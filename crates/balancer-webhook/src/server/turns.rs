//! Turns for handshakes, which are given to each source address in turn, so that a flood from one address leaves the others
//! theirs. The queue is a pure value.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::mem;
use std::net::IpAddr;
use std::ops::Bound::{Excluded, Unbounded};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use tokio::sync::oneshot;

/// Who waits for a turn.
#[derive(Debug)]
struct Queue<W> {
    /// Turns that nobody has. None while somebody waits.
    free: usize,
    next_ticket: u64,
    /// Whose turn was last.
    last: Option<IpAddr>,
    /// No address is without a waiter.
    waiting: BTreeMap<IpAddr, BTreeMap<u64, W>>,
}

impl<W> Queue<W> {
    fn new(free: usize) -> Self {
        Self { free, next_ticket: 0, last: None, waiting: BTreeMap::new() }
    }

    /// Takes a free turn.
    fn take(&mut self) -> bool {
        let is_free = self.free > 0;
        self.free -= usize::from(is_free);
        is_free
    }

    /// Returns the ticket of who waits from now on.
    fn wait(&mut self, source: IpAddr, waiter: W) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.waiting.entry(source).or_default().insert(ticket, waiter);
        ticket
    }

    /// Who waits no longer.
    fn forget(&mut self, source: IpAddr, ticket: u64) {
        if let Some(waiting) = self.waiting.get_mut(&source) {
            waiting.remove(&ticket);
            if waiting.is_empty() {
                self.waiting.remove(&source);
            }
        }
    }

    /// A turn has ended: who gets it. Of the next address it is who came last, because in a queue that is too long, who came
    /// first has given up. If nobody waits, the turn is free.
    fn pass_on(&mut self) -> Option<W> {
        let after = self.last.and_then(|last| self.waiting.range((Excluded(last), Unbounded)).next());
        let Some(source) = after.or_else(|| self.waiting.first_key_value()).map(|(source, _)| *source) else {
            self.free += 1;
            return None;
        };
        self.last = Some(source);
        let waiting = self.waiting.get_mut(&source)?;
        let next = waiting.pop_last();
        if waiting.is_empty() {
            self.waiting.remove(&source);
        }
        next.map(|(_, waiter)| waiter)
    }
}

/// The turns of all connections. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Turns(Arc<Mutex<Queue<oneshot::Sender<Turn>>>>);

impl Turns {
    /// As many turns at once as `count`.
    pub(super) fn new(count: usize) -> Self {
        Self(Arc::new(Mutex::new(Queue::new(count))))
    }

    fn lock(&self) -> MutexGuard<'_, Queue<oneshot::Sender<Turn>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, source: IpAddr) -> Turn {
        loop {
            let (given, _place) = {
                let mut queue = self.lock();
                if queue.take() {
                    return Turn(self.clone());
                }
                let (give, given) = oneshot::channel();
                let ticket = queue.wait(source, give);
                (given, Place { turns: self, source, ticket })
            };
            if let Ok(turn) = given.await {
                return turn;
            }
        }
    }

    /// Polls a handshake only while it has a turn. A handshake computes for a while when its client's message has arrived:
    /// many at once would keep the processors from everything else. While the handshake waits for its client, it holds no
    /// turn.
    pub(super) async fn run<F: Future>(&self, source: IpAddr, handshake: F) -> F::Output {
        let mut handshake = pin!(handshake);
        loop {
            let turn = self.take(source).await;
            if let Poll::Ready(output) = poll_fn(|cx| Poll::Ready(handshake.as_mut().poll(cx))).await {
                return output;
            }
            drop(turn);
            let mut is_woken = false;
            poll_fn(|_| if mem::replace(&mut is_woken, true) { Poll::Ready(()) } else { Poll::Pending }).await;
        }
    }
}

/// A turn until it is dropped.
#[derive(Debug)]
struct Turn(Turns);

impl Drop for Turn {
    fn drop(&mut self) {
        let next = self.0.lock().pass_on();
        if let Some(next) = next {
            // Who has given up meanwhile drops the turn, which passes it on.
            let _ = next.send(Turn(self.0.clone()));
        }
    }
}

/// A place in the queue until it is dropped.
struct Place<'a> {
    turns: &'a Turns,
    source: IpAddr,
    ticket: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.turns.lock().forget(self.source, self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn addresses_take_turns_and_of_one_address_the_last_goes_first() {
        let mut queue = Queue::new(1);
        assert!(queue.take());
        assert!(!queue.take());
        for number in 0..1000 {
            queue.wait(address(1), number);
        }
        queue.wait(address(2), 2000);
        queue.wait(address(3), 3000);
        let order: Vec<_> = (0..5).map(|_| queue.pass_on().unwrap()).collect();
        assert_eq!(order, [999, 2000, 3000, 998, 997]);
    }

    #[test]
    fn who_gives_up_leaves_nothing_behind_and_a_turn_that_nobody_wants_is_free() {
        let mut queue = Queue::new(1);
        assert!(queue.take());
        let tickets = [1, 1, 2].map(|last| (address(last), queue.wait(address(last), last)));
        for (source, ticket) in tickets {
            queue.forget(source, ticket);
        }
        assert!(queue.waiting.is_empty());
        assert_eq!(queue.pass_on(), None);
        assert!(queue.take());
    }

    #[tokio::test]
    async fn handshakes_take_turns_and_one_that_waits_for_its_client_holds_none() {
        let turns = Turns::new(1);
        let (client, server) = tokio::io::duplex(64);
        let mut silent = server;
        let waiting = turns.run(address(1), async move { silent.read_u8().await });
        let others = async {
            for number in 0..3 {
                assert_eq!(turns.run(address(1), async { number }).await, number);
            }
            let mut client = client;
            client.write_all(&[7]).await
        };
        let (waiting, others) = tokio::join!(waiting, others);
        others.unwrap();
        assert_eq!(waiting.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_turn_for_who_has_given_up_goes_to_the_next() {
        let turns = Turns::new(1);
        let turn = turns.take(address(1)).await;
        let mut gone = Box::pin(turns.take(address(1)));
        let mut next = Box::pin(turns.take(address(2)));
        assert!(futures::poll!(&mut gone).is_pending());
        assert!(futures::poll!(&mut next).is_pending());
        drop(turn);
        drop(gone);
        drop(next.await);
        assert_eq!(turns.lock().free, 1);
    }
}
