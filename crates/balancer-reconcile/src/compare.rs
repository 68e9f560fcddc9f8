//! A comparison of all of a job's entries with the cluster, a page at a time. Pure: the pages are the caller's.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use balancer_core::{Counts, Entry, LiveExecutor};
use balancer_store::{Cursor, EntryPage};

/// Executors without an entry that are named with the last page. There are more only if the ledger has lost them; these
/// are named in parts.
const WITH_LAST_PAGE: usize = 512;

/// How far the comparison of a job has come.
#[derive(Debug)]
pub(crate) struct Comparison {
    /// Where the next page begins; `None` for the first.
    cursor: Option<Cursor>,
    /// Whether the last page was compared.
    has_all_pages: bool,
    /// The live executors that no page has shown yet.
    unseen: HashSet<Arc<str>>,
    /// The counts of the entries on the pages.
    found: Counts,
}

/// What a page, or another part of the comparison, has shown.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Compared {
    /// The executors whose entries differ, or are missing.
    pub(crate) differ: BTreeSet<Arc<str>>,
    /// Whether this was the last part.
    pub(crate) is_last: bool,
}

impl Comparison {
    /// A comparison with these live executors, by their keys.
    pub(crate) fn new(live: impl Iterator<Item = Arc<str>>) -> Self {
        Self { cursor: None, has_all_pages: false, unseen: live.collect(), found: Counts::default() }
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
        self.has_all_pages = page.next.is_none();
        self.cursor = page.next;
        let is_last = self.has_all_pages && self.unseen.len() <= WITH_LAST_PAGE;
        if is_last {
            differ.extend(self.add_missing(WITH_LAST_PAGE, live).differ);
        }
        Compared { differ, is_last }
    }

    /// Whether all pages were compared, and the rest are executors without an entry.
    pub(crate) fn has_all_pages(&self) -> bool {
        self.has_all_pages
    }

    /// Returns at most `max` of the executors that no page has shown.
    pub(crate) fn add_missing<'a>(&mut self, max: usize, live: impl Fn(&str) -> Option<LiveExecutor<'a>>) -> Compared {
        let part: Vec<_> = self.unseen.iter().take(max).cloned().collect();
        for key in &part {
            self.unseen.remove(key);
        }
        // Those that have ended meanwhile are named by their own change.
        let differ = part.into_iter().filter(|key| live(key).is_some()).collect();
        Compared { differ, is_last: self.unseen.is_empty() }
    }

    /// These executors were named for another reason, so it does not matter whether a page shows them.
    pub(crate) fn exclude(&mut self, named: &BTreeSet<Arc<str>>) {
        for key in named {
            self.unseen.remove(key);
        }
    }

    /// Whether no page has been compared yet.
    pub(crate) fn is_new(&self) -> bool {
        self.cursor.is_none() && !self.has_all_pages
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

    #[test]
    fn the_executors_of_a_lost_ledger_are_named_in_parts() {
        let keys: Vec<Arc<str>> = (0..WITH_LAST_PAGE + 2).map(|number| number.to_string().into()).collect();
        let mut comparison = Comparison::new(keys.iter().cloned());
        let live = |key: &str| {
            let key = keys.iter().find(|live| ***live == *key)?;
            Some(LiveExecutor { key, uid: key, capacity: Some(Spot), states_ratio: false })
        };
        let compared = comparison.add(EntryPage::default(), live);
        assert_eq!((compared.differ.len(), compared.is_last, comparison.has_all_pages()), (0, false, true));
        // One that was named meanwhile is not named again.
        comparison.exclude(&BTreeSet::from([Arc::clone(&keys[0])]));
        let mut parts = Vec::new();
        for max in [300, 0, 300] {
            let part = comparison.add_missing(max, live);
            parts.push((part.differ.len(), part.is_last));
        }
        assert_eq!(parts, [(300, false), (0, false), (WITH_LAST_PAGE + 1 - 300, true)]);
    }
}
