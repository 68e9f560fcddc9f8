//! The elector's decisions: when to renew, acquire, wait or give up. Pure: the clocks are the caller's.
//!
//! Other processes are judged by our own clock alone, as client-go does: a Lease is free once it was observed unchanged
//! for its duration.

use std::time::Duration;

use balancer_core::Term;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::ObjectMeta;
use tokio::time::Instant;

/// How long other processes wait for a leader that no longer renews.
const DURATION: Duration = Duration::from_secs(15);
/// The longest that an unchanged Lease of another process is respected, whatever duration it states. A duration of many
/// years, which nobody renews, would keep every process from leading.
const LONGEST_DURATION: Duration = Duration::from_secs(60);
/// The duration of a Lease that is released, as client-go writes it. The API does not accept 0.
const RELEASED_DURATION: Duration = Duration::from_secs(1);
/// How long after its last renewal a leader may write. The rest of the duration is for calls under way.
const LEADS_FOR: Duration = Duration::from_secs(10);

/// Whether this process leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaderState {
    /// The Lease was not read yet.
    Unknown,
    /// Another process leads, or none.
    Follower,
    /// This process leads until then; forever if there is no other process.
    Leader { term: Term, until: Option<Instant> },
}

impl LeaderState {
    /// After the Lease was written in a call that started at `called_at`.
    pub(crate) fn leader(lease: &Lease, called_at: Instant) -> Self {
        Self::Leader { term: term_of(lease), until: Some(called_at + LEADS_FOR) }
    }

    /// The term in which this process may write now.
    pub(crate) fn term(self, now: Instant) -> Option<Term> {
        match self {
            Self::Leader { term, until } => until.is_none_or(|until| now < until).then_some(term),
            Self::Unknown | Self::Follower => None,
        }
    }

    /// Whether a leader has to give up, because it could not renew in time.
    pub(crate) fn has_expired(self, now: Instant) -> bool {
        matches!(self, Self::Leader { until: Some(until), .. } if until < now)
    }
}

/// What to do after the Lease was read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Decision {
    /// There is no Lease: create this one.
    Create(Lease),
    /// The Lease is free, or belongs to this process: replace it by this one.
    Acquire(Lease),
    /// Another process leads.
    Wait,
}

/// What a candidate knows of the Lease.
#[derive(Clone, Debug)]
pub(crate) struct Election {
    /// The Lease's name.
    name: String,
    identity: String,
    /// The Lease as this process last wrote it, while it holds it.
    held: Option<Lease>,
    /// The Lease of another process, and when it was first observed like this.
    observed: Option<(Lease, Instant)>,
}

impl Election {
    pub(crate) fn new(name: String, identity: String) -> Self {
        Self { name, identity, held: None, observed: None }
    }

    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// The identity of the process that holds the Lease instead of this one, as it was read last.
    pub(crate) fn other_leader(&self) -> Option<&str> {
        let (lease, _) = self.observed.as_ref()?;
        lease.spec.as_ref()?.holder_identity.as_deref()
    }

    /// The renewed Lease, if this process holds it. `superseded` is the latest term that a ledger has shown. If it is
    /// later than ours, the Lease has lost count, for it is this process that holds it.
    pub(crate) fn renewal(&self, superseded: Term, time: MicroTime) -> Option<Lease> {
        let held = self.held.as_ref()?;
        let term = term_of(held);
        let term = if superseded > term { after(superseded) } else { term };
        Some(self.write(held, Some(term), DURATION, time))
    }

    /// Decides after the Lease was read; `None` if there is none.
    pub(crate) fn decide(&mut self, lease: Option<Lease>, superseded: Term, now: Instant, time: MicroTime) -> Decision {
        let next = |last: Term| Some(after(last.max(superseded)));
        let Some(lease) = lease else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let empty = Lease { metadata, spec: None };
            return Decision::Create(self.write(&empty, next(Term(0)), DURATION, time));
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if !holder.is_empty() && holder != self.identity {
            let duration = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
            let duration = duration.map_or(DURATION, Duration::from_secs).min(LONGEST_DURATION);
            let since = match &self.observed {
                Some((observed, since)) if observed.spec == lease.spec => *since,
                _ => now,
            };
            if now.duration_since(since) < duration {
                self.observed = Some((lease, since));
                return Decision::Wait;
            }
        }
        Decision::Acquire(self.write(&lease, next(term_of(&lease)), DURATION, time))
    }

    /// This process has written the Lease, and holds it.
    pub(crate) fn hold(&mut self, lease: Lease) {
        self.held = Some(lease);
    }

    /// Another process may have changed the Lease.
    pub(crate) fn lose(&mut self) {
        self.held = None;
    }

    /// The Lease to write so that another process need not wait, if this process holds it. From now on it does not.
    pub(crate) fn release(&mut self, time: MicroTime) -> Option<Lease> {
        let held = self.held.take()?;
        Some(self.write(&held, None, RELEASED_DURATION, time))
    }

    /// The Lease with another spec. With a term it belongs to this process, without one to nobody.
    fn write(&self, lease: &Lease, term: Option<Term>, duration: Duration, time: MicroTime) -> Lease {
        let before = lease.spec.clone().unwrap_or_default();
        let before_term = term_of(lease);
        let acquire_time = if term == Some(before_term) { before.acquire_time.clone() } else { Some(time.clone()) };
        let spec = LeaseSpec {
            holder_identity: Some(if term.is_some() { self.identity.clone() } else { String::new() }),
            lease_duration_seconds: i32::try_from(duration.as_secs()).ok(),
            lease_transitions: Some(i32::try_from(term.unwrap_or(before_term).0).unwrap_or(i32::MAX)),
            acquire_time,
            renew_time: Some(time),
            ..before
        };
        Lease { metadata: lease.metadata.clone(), spec: Some(spec) }
    }
}

/// The term is the Lease's count of transitions. A count that no Lease reaches was not counted by an elector: the term
/// is then 0, and the ledgers show the term that follows.
pub(crate) fn term_of(lease: &Lease) -> Term {
    let transitions = lease.spec.as_ref().and_then(|spec| spec.lease_transitions);
    let term = transitions.and_then(|transitions| u64::try_from(transitions).ok()).map(Term);
    term.filter(|term| *term <= Term::MAX).unwrap_or_default()
}

/// The term after this one. [`Term::MAX`] is the last, and goes on forever: a ledger accepts a term again.
fn after(term: Term) -> Term {
    Term(term.0.saturating_add(1)).min(Term::MAX)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    const NEVER: Term = Term(0);

    fn time(seconds: i64) -> MicroTime {
        MicroTime(Timestamp::from_second(seconds).expect("a time"))
    }

    fn election(identity: &str) -> Election {
        Election::new("lease".into(), identity.into())
    }

    /// A Lease of this holder, renewed at this time.
    fn lease(holder: &str, term: i32, renewed: i64) -> Lease {
        let spec = LeaseSpec {
            holder_identity: Some(holder.into()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(term),
            acquire_time: Some(time(1)),
            renew_time: Some(time(renewed)),
            ..LeaseSpec::default()
        };
        Lease { metadata: ObjectMeta::default(), spec: Some(spec) }
    }

    fn acquired(decision: Decision) -> Option<(String, Term)> {
        match decision {
            Decision::Create(lease) | Decision::Acquire(lease) => {
                let term = term_of(&lease);
                Some((lease.spec?.holder_identity?, term))
            }
            Decision::Wait => None,
        }
    }

    #[test]
    fn a_missing_lease_is_created_in_a_term_after_every_known_one() {
        for (superseded, term) in [(NEVER, Term(1)), (Term(7), Term(8))] {
            let decision = election("me").decide(None, superseded, Instant::now(), time(5));
            let Decision::Create(lease) = decision else { panic!("{decision:?}") };
            assert_eq!((term_of(&lease), lease.metadata.name.as_deref()), (term, Some("lease")));
            let spec = lease.spec.unwrap_or_default();
            assert_eq!((spec.holder_identity.as_deref(), spec.lease_duration_seconds), (Some("me"), Some(15)));
            assert_eq!((spec.acquire_time, spec.renew_time), (Some(time(5)), Some(time(5))));
        }
    }

    #[test]
    fn a_lease_that_is_free_or_our_own_is_acquired_at_once_in_a_new_term() {
        for holder in ["", "me"] {
            let decision = election("me").decide(Some(lease(holder, 3, 1)), NEVER, Instant::now(), time(5));
            assert!(matches!(decision, Decision::Acquire(_)));
            assert_eq!(acquired(decision), Some(("me".into(), Term(4))));
        }
        let decision = election("me").decide(Some(lease("", 3, 1)), Term(9), Instant::now(), time(5));
        assert_eq!(acquired(decision), Some(("me".into(), Term(10))));
    }

    #[test]
    fn the_lease_of_another_process_is_acquired_once_it_was_unchanged_for_its_duration() {
        let (mut election, start) = (election("me"), Instant::now());
        let mut decide = |renewed, seconds| {
            let now = start + Duration::from_secs(seconds);
            acquired(election.decide(Some(lease("other", 3, renewed)), NEVER, now, time(99)))
        };
        assert_eq!(decide(1, 0), None, "its age is not known");
        assert_eq!(decide(1, 14), None);
        assert_eq!(decide(2, 15), None, "it was renewed");
        assert_eq!(decide(2, 29), None);
        assert_eq!(decide(2, 30), Some(("me".into(), Term(4))));
    }

    #[test]
    fn the_lease_of_another_process_is_respected_for_a_minute_at_most_whatever_it_states() {
        let absurd = |edit: fn(&mut LeaseSpec)| {
            let (mut election, start) = (election("me"), Instant::now());
            let mut lease = lease("other", 3, 1);
            edit(lease.spec.get_or_insert_default());
            let mut decide = |seconds| {
                let now = start + Duration::from_secs(seconds);
                acquired(election.decide(Some(lease.clone()), NEVER, now, time(99)))
            };
            let free_after = (0..100).find(|seconds| decide(*seconds).is_some());
            free_after.map(Duration::from_secs)
        };
        let far_future = |spec: &mut LeaseSpec| spec.renew_time = Some(time(99_999_999_999));
        for (edit, free_after) in [
            ((|spec| spec.lease_duration_seconds = Some(i32::MAX)) as fn(&mut LeaseSpec), LONGEST_DURATION),
            (|spec| spec.lease_duration_seconds = Some(61), LONGEST_DURATION),
            (|spec| spec.lease_duration_seconds = Some(59), Duration::from_secs(59)),
            (|spec| spec.lease_duration_seconds = Some(-1), DURATION),
            (|spec| spec.lease_duration_seconds = None, DURATION),
            (far_future, DURATION),
            (|spec| spec.renew_time = None, DURATION),
            (|spec| spec.acquire_time = Some(time(99_999_999_999)), DURATION),
        ] {
            assert_eq!(absurd(edit), Some(free_after));
        }
    }

    #[test]
    fn transitions_that_no_lease_reaches_count_as_none() {
        for transitions in [i32::MIN, -1, 0, 1_000_000_001, i32::MAX] {
            let decision = election("me").decide(Some(lease("", transitions, 1)), NEVER, Instant::now(), time(5));
            assert_eq!(acquired(decision), Some(("me".into(), Term(1))), "{transitions}");
            let decision = election("me").decide(Some(lease("", transitions, 1)), Term(7), Instant::now(), time(5));
            assert_eq!(acquired(decision), Some(("me".into(), Term(8))), "{transitions}");
        }
    }

    #[test]
    fn the_last_term_is_followed_by_itself() {
        let decision = election("me").decide(Some(lease("", 1_000_000_000, 1)), NEVER, Instant::now(), time(5));
        assert_eq!(acquired(decision), Some(("me".into(), Term::MAX)));
        for (held, superseded) in [(3, Term::MAX), (3, Term(u64::MAX)), (1_000_000_000, Term::MAX)] {
            let mut election = election("me");
            election.hold(lease("me", held, 1));
            let renewed = election.renewal(superseded, time(9)).expect("a renewal");
            assert_eq!(term_of(&renewed), Term::MAX, "{held} {superseded}");
            let decision = election.decide(None, superseded, Instant::now(), time(5));
            assert_eq!(acquired(decision), Some(("me".into(), Term::MAX)));
        }
    }

    #[test]
    fn a_renewal_keeps_the_term_and_the_time_of_acquisition_unless_a_ledger_knows_a_later_term() {
        let mut election = election("me");
        assert_eq!(election.renewal(NEVER, time(9)), None, "nothing is held");
        election.hold(lease("me", 3, 1));
        let renewed = election.renewal(Term(3), time(9)).and_then(|lease| lease.spec).unwrap_or_default();
        assert_eq!((renewed.lease_transitions, renewed.acquire_time), (Some(3), Some(time(1))));
        assert_eq!(renewed.renew_time, Some(time(9)));
        let later = election.renewal(Term(5), time(9)).and_then(|lease| lease.spec).unwrap_or_default();
        assert_eq!((later.lease_transitions, later.acquire_time), (Some(6), Some(time(9))));
        election.lose();
        assert_eq!(election.renewal(NEVER, time(9)), None);
    }

    #[test]
    fn a_released_lease_belongs_to_nobody_and_keeps_its_term() {
        let mut election = election("me");
        assert_eq!(election.release(time(9)), None);
        election.hold(lease("me", 3, 1));
        let released = election.release(time(9)).and_then(|lease| lease.spec).unwrap_or_default();
        assert_eq!((released.holder_identity.as_deref(), released.lease_transitions), (Some(""), Some(3)));
        assert_eq!(released.lease_duration_seconds, Some(1));
        assert_eq!(election.release(time(9)), None, "it is held no longer");
    }

    #[test]
    fn a_leader_may_write_for_a_time_after_its_last_renewal_and_then_gives_up() {
        let start = Instant::now();
        let leader = LeaderState::leader(&lease("me", 3, 1), start);
        let just_before = start + LEADS_FOR - Duration::from_millis(1);
        assert_eq!((leader.term(just_before), leader.has_expired(just_before)), (Some(Term(3)), false));
        let after = start + LEADS_FOR + Duration::from_millis(1);
        assert_eq!((leader.term(after), leader.has_expired(after)), (None, true));
        let alone = LeaderState::Leader { term: Term(1), until: None };
        assert_eq!((alone.term(after), alone.has_expired(after)), (Some(Term(1)), false));
        for state in [LeaderState::Unknown, LeaderState::Follower] {
            assert_eq!((state.term(start), state.has_expired(after)), (None, false));
        }
    }
}
