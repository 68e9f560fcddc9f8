//! A comparison of all of a job's entries with the cluster, a page at a time. Pure: the pages are the caller's.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use balancer_core::{Counts, Entry, LiveExecutor};
use balancer_store::{Cursor, EntryPage};

/// How far the comparison of a job has come.
#[derive(Debug)]
pub(crate) struct Comparison {
    /// Where the next page begins; `None` for the first.
    cursor: Option<Cursor>,
    /// The live executors that no page has shown yet.
    unseen: HashSet<Arc<str>>,
    /// The counts of the entries on the pages.
    found: Counts,
}

/// What a page has shown.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Compared {
    /// The executors whose entries differ, or are missing.
    pub(crate) differ: BTreeSet<Arc<str>>,
    /// Whether this was the last page.
    pub(crate) is_last: bool,
}

impl Comparison {
    /// A comparison with these live executors, by their keys.
    pub(crate) fn new(live: impl Iterator<Item = Arc<str>>) -> Self {
        Self { cursor: None, unseen: live.collect(), found: Counts::default() }
    }

    /// Where the next page begins.
    pub(crate) fn cursor(&self) -> Option<Cursor> {
        self.cursor.clone()
    }

    /// Compares a page. `live` returns the live executor of a key.
    pub(crate) fn add<'a>(&mut self, page: EntryPage, live: impl Fn(&str) -> Option<LiveExecutor<'a>>) -> Compared {
        let mut differ = BTreeSet::new();
        for (key, entry) in page.entries {
            self.unseen.remove(key.as_str());
            self.found.add(entry.capacity);
            if differs(&entry, live(&key)) {
                differ.insert(key.into());
            }
        }
        let is_last = page.next.is_none();
        self.cursor = page.next;
        if is_last {
            // Those that have ended meanwhile are named by their own change.
            differ.extend(self.unseen.drain().filter(|key| live(key).is_some()));
        }
        Compared { differ, is_last }
    }

    /// The counts of the entries on all pages so far.
    pub(crate) fn found(&self) -> Counts {
        self.found
    }
}

/// Whether the entry has to be named. An entry without a pod that waits for it is named too, because another version may
/// not have noted that it waits.
fn differs(entry: &Entry, live: Option<LiveExecutor<'_>>) -> bool {
    live.is_none_or(|live| {
        entry.uid.as_deref() != Some(live.uid) || live.capacity.is_some_and(|capacity| capacity != entry.capacity)
    })
}

#[cfg(test)]
mod tests {
    use balancer_core::Capacity::{self, OnDemand, Spot};

    use super::*;

    fn entry(key: &str, capacity: Capacity, uid: Option<&str>) -> (String, Entry) {
        (key.to_owned(), Entry { capacity, uid: uid.map(str::to_owned), placed_at: 0 })
    }

    /// Live executors on spot, whose uids are their keys.
    fn live(keys: &[&'static str]) -> impl Fn(&str) -> Option<LiveExecutor<'static>> {
        let keys = keys.to_vec();
        move |key| {
            let key = *keys.iter().find(|live| **live == key)?;
            Some(LiveExecutor { key, uid: key, capacity: Some(Spot), states_ratio: false })
        }
    }

    fn start(keys: &[&str]) -> Comparison {
        Comparison::new(keys.iter().map(|key| Arc::from(*key)))
    }

    fn differ(compared: &Compared) -> Vec<&str> {
        compared.differ.iter().map(|key| &**key).collect()
    }

    #[test]
    fn each_kind_of_difference_is_named_and_nothing_else() {
        let keys = ["same", "moved", "other-uid", "unconfirmed", "missing"];
        let mut comparison = start(&keys);
        let first = EntryPage {
            entries: vec![
                entry("same", Spot, Some("same")),
                entry("moved", OnDemand, Some("moved")),
                entry("gone", Spot, Some("gone")),
            ],
            next: Some(Cursor::new("7")),
        };
        let compared = comparison.add(first, live(&keys));
        assert_eq!((differ(&compared), compared.is_last), (vec!["gone", "moved"], false));
        assert_eq!(comparison.cursor(), Some(Cursor::new("7")));
        let second = EntryPage {
            entries: vec![
                entry("other-uid", Spot, Some("before")),
                entry("unconfirmed", Spot, None),
                entry("waiting", Spot, None),
                entry("same", Spot, Some("same")),
            ],
            next: None,
        };
        let compared = comparison.add(second, live(&keys));
        assert_eq!(differ(&compared), ["missing", "other-uid", "unconfirmed", "waiting"]);
        assert!(compared.is_last);
        // One entry was listed twice.
        assert_eq!(comparison.found(), Counts { spot: 6, on_demand: 1 });
    }

    #[test]
    fn an_executor_that_ends_meanwhile_is_not_missing() {
        let mut comparison = start(&["ended"]);
        assert!(comparison.add(EntryPage::default(), live(&[])).differ.is_empty());
    }
}
