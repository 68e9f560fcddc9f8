//! Which primaries stay unreachable: each is reported once, and once when it is back. Pure: the clock is the caller's.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::super::address::Address;
use crate::StoreError;

/// A primary that is back within this time is not reported.
const REPORTED_AFTER: Duration = Duration::from_secs(2);

/// The primaries that cannot be reached now.
#[derive(Debug, Default)]
pub(super) struct Outages(BTreeMap<Address, Outage>);

#[derive(Debug)]
struct Outage {
    since: Instant,
    is_reported: bool,
}

/// What has become of a primary.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// It stays unreachable.
    Unreachable { primary: Address, cause: StoreError },
    /// One that was reported can be reached again.
    Back { primary: Address, after: Duration },
    /// One that was reported has no slots any more.
    Replaced { primary: Address, after: Duration },
}

impl Outages {
    /// Takes the primaries of now, with the reason if there is no connection to one. Returns what is new.
    pub(super) fn update(
        &mut self,
        primaries: impl IntoIterator<Item = (Address, Option<StoreError>)>,
        now: Instant,
    ) -> Vec<Report> {
        let mut before = std::mem::take(&mut self.0);
        let mut reports = Vec::new();
        for (primary, problem) in primaries {
            let outage = before.remove(&primary);
            match (problem, outage) {
                (Some(cause), outage) => {
                    let mut outage = outage.unwrap_or(Outage { since: now, is_reported: false });
                    if !outage.is_reported && now - outage.since >= REPORTED_AFTER {
                        outage.is_reported = true;
                        reports.push(Report::Unreachable { primary: primary.clone(), cause });
                    }
                    self.0.insert(primary, outage);
                }
                (None, Some(Outage { since, is_reported: true })) => {
                    reports.push(Report::Back { primary, after: now - since });
                }
                (None, _) => {}
            }
        }
        let replaced = before.into_iter().filter(|(_, outage)| outage.is_reported);
        reports.extend(replaced.map(|(primary, outage)| Report::Replaced { primary, after: now - outage.since }));
        reports
    }
}

impl Report {
    /// Writes it to the log.
    pub(super) fn log(&self) {
        match self {
            Self::Unreachable { primary, cause } => {
                tracing::warn!(%primary, error = %cause, "primary of the Redis Cluster not reachable; retrying");
            }
            Self::Back { primary, after } => {
                tracing::warn!(%primary, ?after, "primary of the Redis Cluster is reachable again");
            }
            Self::Replaced { primary, after } => {
                tracing::warn!(%primary, ?after, "unreachable primary of the Redis Cluster was replaced");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn primary(port: u16) -> Address {
        Address { host: "h".to_owned(), port }
    }

    fn lost() -> Option<StoreError> {
        Some(StoreError::NoConnection("h:1: refused".to_owned()))
    }

    #[test]
    fn a_primary_that_stays_unreachable_is_reported_once_and_once_when_it_is_back() {
        let start = Instant::now();
        let mut outages = Outages::default();
        let second = |number: u32| start + number * Duration::from_secs(1);
        assert_eq!(outages.update([(primary(1), lost()), (primary(2), None)], second(0)), []);
        assert_eq!(outages.update([(primary(1), lost()), (primary(2), None)], second(1)), []);
        let cause = StoreError::NoConnection("h:1: refused".to_owned());
        let unreachable = Report::Unreachable { primary: primary(1), cause };
        assert_eq!(outages.update([(primary(1), lost()), (primary(2), None)], second(2)), [unreachable]);
        for number in 3..100 {
            assert_eq!(outages.update([(primary(1), lost()), (primary(2), None)], second(number)), []);
        }
        let back = Report::Back { primary: primary(1), after: second(100) - start };
        assert_eq!(outages.update([(primary(1), None), (primary(2), None)], second(100)), [back]);
        assert_eq!(outages.update([(primary(1), None), (primary(2), None)], second(101)), []);
        assert!(outages.0.is_empty());
    }

    #[test]
    fn a_primary_that_is_back_soon_is_not_reported() {
        let start = Instant::now();
        let mut outages = Outages::default();
        for number in 0..10 {
            let now = start + number * Duration::from_secs(1);
            let problem = lost().filter(|_| number % 2 == 0);
            assert_eq!(outages.update([(primary(1), problem)], now), []);
        }
    }

    #[test]
    fn a_reported_primary_that_is_replaced_is_reported_once_more() {
        let start = Instant::now();
        let mut outages = Outages::default();
        outages.update([(primary(1), lost())], start);
        let later = start + REPORTED_AFTER;
        assert_eq!(outages.update([(primary(1), lost())], later).len(), 1);
        let replaced = Report::Replaced { primary: primary(1), after: REPORTED_AFTER };
        assert_eq!(outages.update([(primary(2), lost())], later), [replaced]);
        assert_eq!(outages.update([(primary(2), None)], later), []);
    }
}
