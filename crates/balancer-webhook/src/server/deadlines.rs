//! The deadlines of one connection: a pure value that receives the time and events, and returns what to do.

use std::time::Duration;

use tokio::time::Instant;

/// From the first byte of a request to the end of its head, and from the handshake to the first byte.
pub(super) const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// Between requests. Longer than the 90 s after which an apiserver closes an idle connection: if the webhook closed it
/// first, the apiserver's next request could be lost.
pub(super) const IDLE_LIMIT: Duration = Duration::from_secs(150);
/// How long a new connection may wait for its first byte during a shutdown: a client that has just connected sends one.
pub(super) const NEW_CONNECTION_GRACE: Duration = Duration::from_secs(1);

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

/// The state of a connection after its handshake.
#[derive(Debug)]
pub(super) struct Deadlines {
    is_http2: bool,
    opened: Instant,
    /// Requests whose head is complete and whose answer is not.
    in_flight: u32,
    last_answer: Option<Instant>,
    /// The first byte since the last answer.
    first_byte: Option<Instant>,
    is_shutting_down: bool,
    /// When [`Verdict::Close`] was returned.
    closing: Option<Instant>,
}

impl Deadlines {
    pub(super) fn new(is_http2: bool, now: Instant) -> Self {
        Self {
            is_http2,
            opened: now,
            in_flight: 0,
            last_answer: None,
            first_byte: None,
            is_shutting_down: false,
            closing: None,
        }
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

    /// A request was answered.
    pub(super) fn answered(&mut self, now: Instant) {
        self.last_answer = Some(now);
        self.first_byte = None;
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// The connection is to be closed as soon as that loses no request.
    pub(super) fn shut_down(&mut self) {
        self.is_shutting_down = true;
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
            match self.last_answer.filter(|_| !self.is_receiving_head()) {
                None if is_past(self.first_byte.unwrap_or(self.opened), HEAD_LIMIT) => {
                    return Verdict::Abort("the client took too long to send a request");
                }
                Some(answered) if is_past(answered, IDLE_LIMIT) => {
                    // A client that does not read does not notice the close either.
                    return match self.closing.is_some_and(|closing| is_past(closing, HEAD_LIMIT)) {
                        true => Verdict::Abort("the client does not close an idle connection"),
                        false => Verdict::Close,
                    };
                }
                _ => {}
            }
        }
        match self.is_shutting_down && !self.may_have_request_on_its_way(now) {
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

    fn open(is_http2: bool) -> (Deadlines, Instant) {
        let now = Instant::now();
        (Deadlines::new(is_http2, now), now)
    }

    /// A connection that has answered one request at the returned time.
    fn idle(is_http2: bool) -> (Deadlines, Instant) {
        let (mut deadlines, now) = open(is_http2);
        deadlines.bytes_received(|| now);
        deadlines.request_started();
        deadlines.answered(now);
        (deadlines, now)
    }

    #[track_caller]
    fn assert_aborts(deadlines: &mut Deadlines, at: Instant) {
        assert_eq!(deadlines.check(at), Verdict::Continue);
        assert!(matches!(deadlines.check(at + MOMENT), Verdict::Abort(_)));
    }

    #[test]
    fn a_silent_client_is_dropped_after_the_head_limit() {
        for is_http2 in [false, true] {
            let (mut deadlines, opened) = open(is_http2);
            assert_aborts(&mut deadlines, opened + HEAD_LIMIT);
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
            assert_aborts(&mut deadlines, first_byte + HEAD_LIMIT);
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
            assert_aborts(&mut deadlines, closed + HEAD_LIMIT);
        }
    }

    #[test]
    fn pings_over_http2_start_no_request() {
        let (mut deadlines, answered) = idle(true);
        deadlines.bytes_received(|| answered + MOMENT);
        assert_eq!(deadlines.check(answered + IDLE_LIMIT), Verdict::Continue);
        deadlines.shut_down();
        assert_eq!(deadlines.check(answered + 2 * MOMENT), Verdict::Close);
    }

    #[test]
    fn a_shutdown_closes_idle_and_busy_connections_at_once() {
        let (mut deadlines, answered) = idle(false);
        deadlines.shut_down();
        assert_eq!(deadlines.check(answered), Verdict::Close);
        assert_eq!(deadlines.check(answered), Verdict::Continue);

        let (mut deadlines, opened) = open(false);
        deadlines.request_started();
        deadlines.shut_down();
        assert_eq!(deadlines.check(opened), Verdict::Close);
    }

    #[test]
    fn a_shutdown_waits_for_an_incomplete_head() {
        let (mut deadlines, answered) = idle(false);
        deadlines.bytes_received(|| answered);
        deadlines.shut_down();
        assert_eq!(deadlines.check(answered + HEAD_LIMIT), Verdict::Continue);
        deadlines.request_started();
        assert_eq!(deadlines.check(answered + HEAD_LIMIT), Verdict::Close);
    }

    #[test]
    fn a_shutdown_waits_for_the_first_request_of_a_new_connection() {
        for is_http2 in [false, true] {
            let (mut deadlines, opened) = open(is_http2);
            deadlines.shut_down();
            assert_eq!(deadlines.check(opened + NEW_CONNECTION_GRACE - MOMENT), Verdict::Continue);
            assert_eq!(deadlines.check(opened + NEW_CONNECTION_GRACE), Verdict::Close);
        }
    }
}
