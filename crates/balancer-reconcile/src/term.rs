//! The term in which this process may write. Pure.

use balancer_core::Term;

/// The current term, and what is known about it.
#[derive(Debug, Default)]
pub(crate) struct TermTracker {
    /// The term in which this process writes; `None` if another process leads.
    current: Option<Term>,
    /// A term of this process that a ledger has shown to be over, although the elector does not know it yet.
    superseded: Option<Term>,
    /// Whether the current term has had no list of its own yet.
    needs_list: bool,
}

/// What became of the term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TermChange {
    None,
    /// A new term of this process has started.
    Started,
    /// This process no longer leads.
    Ended,
}

impl TermTracker {
    /// Follows the elector, which leads in `term`.
    pub(crate) fn follow(&mut self, term: Option<Term>) -> TermChange {
        let term = term.filter(|term| Some(*term) != self.superseded);
        if term == self.current {
            return TermChange::None;
        }
        self.current = term;
        self.needs_list = term.is_some();
        if term.is_some() { TermChange::Started } else { TermChange::Ended }
    }

    /// A ledger was reconciled in a later term than the current one.
    pub(crate) fn supersede(&mut self) {
        self.superseded = self.current;
    }

    /// Whether this process leads, as far as the elector was followed.
    pub(crate) fn leads(&self) -> bool {
        self.current.is_some()
    }

    /// Whether this process may write while the elector leads in `term`: in the current term, unless a ledger has shown
    /// it to be over.
    pub(crate) fn may_write(&self, term: Option<Term>) -> bool {
        self.leads() && term == self.current && self.superseded != self.current
    }

    /// Whether the current term has had no list of its own yet. From now on it has.
    pub(crate) fn take_needs_list(&mut self) -> bool {
        std::mem::take(&mut self.needs_list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_starts_and_ends_once() {
        let mut terms = TermTracker::default();
        assert_eq!((terms.follow(None), terms.leads()), (TermChange::None, false));
        assert_eq!((terms.follow(Some(Term(3))), terms.leads()), (TermChange::Started, true));
        assert_eq!(terms.follow(Some(Term(3))), TermChange::None);
        assert_eq!(terms.follow(Some(Term(5))), TermChange::Started);
        assert_eq!((terms.follow(None), terms.leads()), (TermChange::Ended, false));
        assert_eq!(terms.follow(Some(Term(5))), TermChange::Started);
    }

    #[test]
    fn a_process_may_write_in_its_current_term_until_the_lease_expires_or_a_ledger_shows_a_later_one() {
        let mut terms = TermTracker::default();
        assert!(!terms.may_write(None) && !terms.may_write(Some(Term(3))), "the elector was not followed yet");
        terms.follow(Some(Term(3)));
        assert!(terms.may_write(Some(Term(3))));
        assert!(!terms.may_write(None), "the Lease has expired");
        assert!(!terms.may_write(Some(Term(4))), "the term was not started yet");
        terms.supersede();
        assert!(!terms.may_write(Some(Term(3))));
        terms.follow(Some(Term(9)));
        assert!(terms.may_write(Some(Term(9))));
    }

    #[test]
    fn each_new_term_needs_a_list_of_its_own() {
        let mut terms = TermTracker::default();
        assert!(!terms.take_needs_list());
        terms.follow(Some(Term(1)));
        assert!(terms.take_needs_list() && !terms.take_needs_list());
        terms.follow(Some(Term(1)));
        assert!(!terms.take_needs_list());
        terms.follow(Some(Term(2)));
        assert!(terms.take_needs_list());
        terms.follow(Some(Term(3)));
        terms.follow(None);
        assert!(!terms.take_needs_list(), "another process leads");
    }

    #[test]
    fn a_superseded_term_does_not_start_again_and_a_later_one_does() {
        let mut terms = TermTracker::default();
        terms.follow(Some(Term(3)));
        terms.supersede();
        assert_eq!((terms.follow(Some(Term(3))), terms.leads()), (TermChange::Ended, false));
        assert_eq!(terms.follow(Some(Term(3))), TermChange::None);
        assert_eq!((terms.follow(Some(Term(9))), terms.leads()), (TermChange::Started, true));
    }
}
