//! The deadlines of one connection, and when it may be closed to make room: a pure value that receives the time and
//! events, and returns what to do.

use std::time::Duration;

use balancer_runtime::connections::AmongEquals;
use tokio::time::Instant;

/// From the first byte of a request to the end of its head. An apiserver sends a head in one piece, and heads are small,
/// so this is a minimum rate too.
pub(super) const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// From the handshake to the first byte, and over HTTP/2 to the end of the first request's head.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// Between requests. Longer than the 90 s after which an apiserver closes an idle connection: if the webhook closed it
/// first, the apiserver's next request could be lost.
pub(super) const IDLE_LIMIT: Duration = Duration::from_secs(150);
/// How long a new connection may wait for its first byte during a shutdown: a client that has just connected sends one.
pub(super) const NEW_CONNECTION_GRACE: Duration = Duration::from_secs(1);
/// How long a client that has been asked to close may stay without a request.
pub(super) const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// What to do with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Keep the connection.
    Continue,
    /// Answer the requests in flight, and then close. Returned once.
    Close,
    /// Drop the connection.
    Abort(&'static str),
}

/// Which connections are closed first to make room for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub(super) class: Class,
    /// Since when it is in its class. None if its client's address decides instead: in a flood of new connections, the
    /// oldest one is the next to be served.
    since: Option<Instant>,
}

impl Rank {
    /// Which of several connections of the same rank is closed first.
    pub(super) fn among_equals(self) -> AmongEquals {
        if self.since.is_some() { AmongEquals::Oldest } else { AmongEquals::LargestSource }
    }
}

/// What is known about the client of a connection that may be closed to make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// It had time for a request and has completed none.
    NoRequest,
    /// None of its requests was a review that was accepted.
    NoReview,
    /// It has posted reviews, and for a second has sent no complete request of those that it began.
    Stalled,
    /// It has just connected, and its handshake is not complete.
    Handshake,
    /// Its handshake was complete just now: an apiserver's first review may be on its way.
    New,
    /// It has posted reviews, and has none in flight.
    Idle,
    /// It has posted reviews, and the bodies of all requests in flight are incomplete.
    Incomplete,
}

/// The state of a connection.
#[derive(Debug)]
pub(super) struct Deadlines {
    is_http2: bool,
    is_handshake_done: bool,
    /// When it was accepted, and then when its handshake was complete.
    opened: Instant,
    /// When it is to be closed, so that its client connects to another replica.
    retires: Instant,
    /// Requests whose head is complete and whose answer is not.
    in_flight: u32,
    /// Whether a review was accepted.
    had_review: bool,
    last_answer: Option<Instant>,
    /// The first byte since the last answer.
    first_byte: Option<Instant>,
    is_leaving: bool,
    /// When [`Verdict::Close`] was returned.
    closing: Option<Instant>,
}

impl Deadlines {
    /// A connection that was accepted, and is to be closed at the age of `max_age`.
    pub(super) fn new(max_age: Duration, now: Instant) -> Self {
        Self {
            is_http2: false,
            is_handshake_done: false,
            opened: now,
            retires: now + max_age,
            in_flight: 0,
            had_review: false,
            last_answer: None,
            first_byte: None,
            is_leaving: false,
            closing: None,
        }
    }

    /// The handshake is complete.
    pub(super) fn handshake_done(&mut self, is_http2: bool, now: Instant) {
        self.is_http2 = is_http2;
        self.is_handshake_done = true;
        self.opened = now;
    }

    /// The client sent something. Calls `now` only if the time matters.
    pub(super) fn bytes_received(&mut self, now: impl FnOnce() -> Instant) {
        if self.in_flight == 0 && self.first_byte.is_none() {
            self.first_byte = Some(now());
        }
    }

    /// The head of a request is complete.
    pub(super) fn request_started(&mut self) {
        self.in_flight += 1;
    }

    /// A request was answered. Returns whether the answer must ask an HTTP/1.1 client to reconnect.
    pub(super) fn answered(&mut self, is_accepted_review: bool, now: Instant) -> bool {
        self.had_review |= is_accepted_review;
        self.last_answer = Some(now);
        self.first_byte = None;
        self.in_flight = self.in_flight.saturating_sub(1);
        now >= self.retires
    }

    /// The client gave up a request. That is no answer, so it makes the connection no better.
    pub(super) fn cancelled(&mut self, now: Instant) {
        self.first_byte = Some(now);
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// The connection is to be closed as soon as that loses no request.
    pub(super) fn leave(&mut self) {
        self.is_leaving = true;
    }

    /// Whether a close loses no request, because the protocol tells the client which requests were not processed.
    pub(super) fn can_leave(&self) -> bool {
        self.is_http2
    }

    /// Which connections go first to make room. None: this one stays, because a review is in flight that has arrived
    /// completely. `incomplete` is the
    /// number of requests whose bodies have not arrived completely: they may be any client's.
    pub(super) fn rank(&self, incomplete: u32, now: Instant) -> Option<Rank> {
        if self.in_flight > incomplete {
            return None;
        }
        let is_new = now.saturating_duration_since(self.opened) < NEW_CONNECTION_GRACE;
        let (class, since) = match self.last_answer {
            Some(answered) if self.had_review && self.in_flight > 0 => {
                let since = self.first_byte.map_or(answered, |first_byte| first_byte.max(answered));
                let is_stalled = now.saturating_duration_since(since) >= NEW_CONNECTION_GRACE;
                (if is_stalled { Class::Stalled } else { Class::Incomplete }, Some(since))
            }
            Some(answered) if self.had_review => (Class::Idle, Some(answered)),
            Some(answered) => (Class::NoReview, Some(answered)),
            None if is_new && !self.is_handshake_done => (Class::Handshake, None),
            None if is_new => (Class::New, None),
            None => (Class::NoRequest, Some(self.opened)),
        };
        Some(Rank { class, since })
    }

    /// What to do now.
    pub(super) fn check(&mut self, now: Instant) -> Verdict {
        let verdict = self.verdict(now);
        match (verdict, self.closing) {
            (Verdict::Close, None) => self.closing = Some(now),
            (Verdict::Close, Some(_)) => return Verdict::Continue,
            (Verdict::Continue | Verdict::Abort(_), _) => {}
        }
        verdict
    }

    fn verdict(&self, now: Instant) -> Verdict {
        let is_past = |start: Instant, limit: Duration| now.saturating_duration_since(start) > limit;
        if self.in_flight == 0 {
            // A client that does not read does not notice the close either.
            let leaving = self.closing.max(self.last_answer).filter(|_| self.closing.is_some());
            if leaving.is_some_and(|since| is_past(since, LEAVE_LIMIT)) {
                return Verdict::Abort("the client does not close a connection that it was asked to close");
            }
            match self.last_answer.filter(|_| !self.is_receiving_head()) {
                None => {
                    let limit = if self.is_receiving_head() { HEAD_LIMIT } else { SILENCE_LIMIT };
                    if is_past(self.first_byte.unwrap_or(self.opened), limit) {
                        return Verdict::Abort("the client took too long to send a request");
                    }
                }
                Some(answered) if is_past(answered, IDLE_LIMIT) => return Verdict::Close,
                Some(_) => {}
            }
        }
        // Over HTTP/1.1 only an answer can close a connection without a risk to the next request.
        let is_retiring = self.is_http2 && now >= self.retires;
        match (self.is_leaving || is_retiring) && !self.may_have_request_on_its_way(now) {
            true => Verdict::Close,
            false => Verdict::Continue,
        }
    }

    /// Whether the head of a request is incomplete. Over HTTP/2 it is not known: clients send frames between requests
    /// too, such as pings.
    fn is_receiving_head(&self) -> bool {
        self.first_byte.is_some() && !self.is_http2
    }

    /// Whether hyper would drop a request if the connection were closed now: the head is incomplete, or the connection
    /// is so new that the request can be on its way.
    fn may_have_request_on_its_way(&self, now: Instant) -> bool {
        let is_new = self.last_answer.is_none() && now.saturating_duration_since(self.opened) < NEW_CONNECTION_GRACE;
        self.in_flight == 0 && (self.is_receiving_head() || is_new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_millis(1);

    const MAX_AGE: Duration = Duration::from_secs(1000);

    /// A connection whose handshake was complete at the returned time.
    fn open(is_http2: bool) -> (Deadlines, Instant) {
        let now = Instant::now();
        let mut deadlines = Deadlines::new(MAX_AGE, now);
        deadlines.handshake_done(is_http2, now);
        (deadlines, now)
    }

    /// A connection that has answered one request at the returned time.
    fn idle(is_http2: bool) -> (Deadlines, Instant) {
        let (mut deadlines, now) = open(is_http2);
        deadlines.bytes_received(|| now);
        deadlines.request_started();
        deadlines.answered(true, now);
        (deadlines, now)
    }

    #[track_caller]
    fn assert_aborts(deadlines: &mut Deadlines, at: Instant) {
        assert_eq!(deadlines.check(at), Verdict::Continue);
        assert!(matches!(deadlines.check(at + MOMENT), Verdict::Abort(_)));
    }

    #[test]
    fn a_silent_client_is_dropped_after_the_silence_limit() {
        for is_http2 in [false, true] {
            let (mut deadlines, opened) = open(is_http2);
            assert_aborts(&mut deadlines, opened + SILENCE_LIMIT);
        }
    }

    #[test]
    fn a_slow_head_is_dropped_after_the_head_limit() {
        for is_http2 in [false, true] {
            let (mut deadlines, opened) = open(is_http2);
            let first_byte = opened + Duration::from_secs(5);
            for seconds in 0..5 {
                deadlines.bytes_received(|| first_byte + Duration::from_secs(seconds));
            }
            assert_aborts(&mut deadlines, first_byte + if is_http2 { SILENCE_LIMIT } else { HEAD_LIMIT });
        }
        let (mut deadlines, answered) = idle(false);
        deadlines.bytes_received(|| answered + MOMENT);
        assert_aborts(&mut deadlines, answered + MOMENT + HEAD_LIMIT);
    }

    #[test]
    fn a_request_in_flight_has_no_deadline_here() {
        let (mut deadlines, opened) = open(false);
        deadlines.request_started();
        assert_eq!(deadlines.check(opened + 10 * IDLE_LIMIT), Verdict::Continue);
    }

    #[test]
    fn an_idle_client_is_closed_once_and_dropped_if_it_does_not_close() {
        for is_http2 in [false, true] {
            let (mut deadlines, answered) = idle(is_http2);
            assert_eq!(deadlines.check(answered + IDLE_LIMIT), Verdict::Continue);
            let closed = answered + IDLE_LIMIT + MOMENT;
            assert_eq!(deadlines.check(closed), Verdict::Close);
            assert_aborts(&mut deadlines, closed + LEAVE_LIMIT);
        }
    }

    #[test]
    fn pings_over_http2_start_no_request() {
        let (mut deadlines, answered) = idle(true);
        deadlines.bytes_received(|| answered + MOMENT);
        assert_eq!(deadlines.check(answered + IDLE_LIMIT), Verdict::Continue);
        deadlines.leave();
        assert_eq!(deadlines.check(answered + 2 * MOMENT), Verdict::Close);
    }

    #[test]
    fn a_shutdown_closes_idle_and_busy_connections_at_once() {
        let (mut deadlines, answered) = idle(false);
        deadlines.leave();
        assert_eq!(deadlines.check(answered), Verdict::Close);
        assert_eq!(deadlines.check(answered), Verdict::Continue);

        let (mut deadlines, opened) = open(false);
        deadlines.request_started();
        deadlines.leave();
        assert_eq!(deadlines.check(opened), Verdict::Close);
    }

    #[test]
    fn a_shutdown_waits_for_an_incomplete_head() {
        let (mut deadlines, answered) = idle(false);
        deadlines.bytes_received(|| answered);
        deadlines.leave();
        assert_eq!(deadlines.check(answered + HEAD_LIMIT), Verdict::Continue);
        deadlines.request_started();
        assert_eq!(deadlines.check(answered + HEAD_LIMIT), Verdict::Close);
    }

    #[test]
    fn a_shutdown_waits_for_the_first_request_of_a_new_connection() {
        for is_http2 in [false, true] {
            let (mut deadlines, opened) = open(is_http2);
            deadlines.leave();
            assert_eq!(deadlines.check(opened + NEW_CONNECTION_GRACE - MOMENT), Verdict::Continue);
            assert_eq!(deadlines.check(opened + NEW_CONNECTION_GRACE), Verdict::Close);
        }
    }

    #[test]
    fn a_slow_head_of_a_later_request_is_dropped() {
        let (mut deadlines, answered) = idle(false);
        let first_byte = answered + Duration::from_secs(60);
        deadlines.bytes_received(|| first_byte);
        assert_aborts(&mut deadlines, first_byte + HEAD_LIMIT);
    }

    #[test]
    fn http2_is_told_to_leave_at_its_age_while_requests_are_in_flight() {
        for requests in [0, 3] {
            let (mut deadlines, opened) = idle(true);
            for _ in 0..requests {
                deadlines.request_started();
            }
            deadlines.answered(true, opened + MAX_AGE - 2 * MOMENT);
            deadlines.request_started();
            assert_eq!(deadlines.check(opened + MAX_AGE - MOMENT), Verdict::Continue);
            assert_eq!(deadlines.check(opened + MAX_AGE), Verdict::Close);
            assert_eq!(deadlines.check(opened + 2 * MAX_AGE), Verdict::Continue);
        }
    }

    #[test]
    fn http1_is_closed_at_its_age_by_an_answer_alone() {
        let (mut deadlines, opened) = open(false);
        deadlines.request_started();
        assert!(!deadlines.answered(true, opened + MAX_AGE - MOMENT));
        assert_eq!(deadlines.check(opened + MAX_AGE + MOMENT), Verdict::Continue);
        deadlines.request_started();
        assert!(deadlines.answered(true, opened + MAX_AGE));
    }

    #[test]
    fn a_client_that_ignores_that_it_should_leave_is_dropped_after_its_last_answer() {
        let (mut deadlines, opened) = idle(true);
        deadlines.request_started();
        assert_eq!(deadlines.check(opened + MAX_AGE), Verdict::Close);
        let answered = opened + MAX_AGE + 2 * LEAVE_LIMIT;
        assert_eq!(deadlines.check(answered), Verdict::Continue);
        deadlines.answered(true, answered);
        assert_aborts(&mut deadlines, answered + LEAVE_LIMIT);
    }

    #[test]
    fn a_request_that_the_client_gives_up_is_no_answer() {
        let (mut deadlines, opened) = open(true);
        let cancelled = opened + Duration::from_secs(3);
        deadlines.request_started();
        deadlines.cancelled(cancelled);
        assert_eq!(deadlines.rank(0, cancelled).unwrap().class, Class::NoRequest);
        assert_aborts(&mut deadlines, cancelled + SILENCE_LIMIT);
    }

    #[test]
    fn connections_are_closed_from_those_without_a_request_to_those_with_reviews() {
        let now = Instant::now();
        let later = now + 10 * NEW_CONNECTION_GRACE;
        let connection = |opened: Instant, answers: &[(bool, Instant)]| {
            let mut deadlines = Deadlines::new(MAX_AGE, opened);
            deadlines.handshake_done(true, opened);
            for &(is_accepted_review, at) in answers {
                deadlines.request_started();
                deadlines.answered(is_accepted_review, at);
            }
            deadlines.rank(0, later).unwrap()
        };
        let in_handshake = |opened| Deadlines::new(MAX_AGE, opened).rank(0, later).unwrap();
        let begun = |at: Instant| {
            let (mut deadlines, _) = idle(true);
            deadlines.bytes_received(|| at);
            deadlines.request_started();
            deadlines.rank(1, later).unwrap()
        };
        let order = [
            in_handshake(now - MOMENT),
            connection(now, &[]),
            connection(now + MOMENT, &[]),
            connection(now, &[(false, now + MOMENT)]),
            connection(now, &[(false, now), (false, later - MOMENT)]),
            begun(later - NEW_CONNECTION_GRACE),
            in_handshake(later),
            connection(later - NEW_CONNECTION_GRACE + MOMENT, &[]),
            connection(later, &[]),
            connection(now, &[(true, now), (false, now + MOMENT)]),
            connection(now, &[(false, now), (true, later)]),
            begun(later),
        ];
        assert!(order.is_sorted(), "{order:?}");
    }

    #[test]
    fn a_review_in_flight_keeps_its_connection_and_an_incomplete_body_does_not() {
        let (mut stranger, opened) = open(true);
        let later = opened + 2 * NEW_CONNECTION_GRACE;
        stranger.request_started();
        assert_eq!(stranger.rank(0, later), None);
        assert_eq!(stranger.rank(1, later).unwrap().class, Class::NoRequest);
        stranger.request_started();
        assert_eq!(stranger.rank(1, later), None);

        let (mut known, later) = idle(true);
        known.request_started();
        assert_eq!(known.rank(0, later), None);
        assert_eq!(known.rank(1, later).unwrap().class, Class::Incomplete);
        known.request_started();
        assert_eq!(known.rank(1, later), None);
    }
}
