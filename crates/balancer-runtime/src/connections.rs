//! The open connections of a server: which one to close when there are too many. The table is a pure value.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

/// The maximum of a server that would like `wanted` connections: fewer if the process may open few files. Two servers at
/// their maximum leave a third of the files to the connections to the store and the cluster.
pub fn max_connections(wanted: usize) -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    open_files(&limits).map_or(wanted, |files| wanted.min(files / 3))
}

/// The soft limit of open files in the kernel's table of limits.
fn open_files(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A table of open connections, the oldest first. At the maximum, room is made before another one is added.
#[derive(Debug)]
struct ConnectionTable<T> {
    max: usize,
    next_id: u64,
    open: BTreeMap<u64, (IpAddr, T)>,
    /// How many are open from each address.
    sources: HashMap<IpAddr, usize>,
    /// Changes with each eviction.
    random: u64,
}

/// Which of several connections of the same rank goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AmongEquals {
    /// The one that was opened first.
    Oldest,
    /// One from the address with the most open connections, at random. A client that opens connections faster than they are
    /// served closes mostly connections of its own.
    LargestSource,
}

impl<T> ConnectionTable<T> {
    /// An empty table.
    fn new(max: usize) -> Self {
        Self {
            max,
            next_id: 0,
            open: BTreeMap::new(),
            sources: HashMap::new(),
            random: RandomState::new().hash_one(max),
        }
    }

    /// Whether one connection must go before another one is added.
    fn is_full(&self) -> bool {
        self.open.len() >= self.max
    }

    /// Adds a connection; returns its id.
    fn add(&mut self, source: IpAddr, connection: T) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.open.insert(id, (source, connection));
        *self.sources.entry(source).or_default() += 1;
        id
    }

    /// Removes a connection that has ended or is to be closed.
    fn remove(&mut self, id: u64) -> Option<T> {
        let (source, connection) = self.open.remove(&id)?;
        if let Some(open) = self.sources.get_mut(&source) {
            *open -= 1;
            if *open == 0 {
                self.sources.remove(&source);
            }
        }
        Some(connection)
    }

    /// Removes the connection with the lowest rank, and returns both. A connection without a rank stays.
    fn evict<R: Ord>(&mut self, rank: impl Fn(&T) -> Option<(R, AmongEquals)>) -> Option<(R, T)> {
        self.random = mix(self.random);
        let ranked = self.open.iter().filter_map(|(&id, (source, connection))| {
            let (rank, among_equals) = rank(connection)?;
            let (size, turn) = match among_equals {
                AmongEquals::Oldest => (0, id),
                AmongEquals::LargestSource => {
                    (self.sources.get(source).copied().unwrap_or_default(), mix(self.random ^ id))
                }
            };
            Some((rank, Reverse(size), turn, id))
        });
        let (rank, _, _, id) = ranked.min()?;
        Some((rank, self.remove(id)?))
    }
}

/// Numbers that differ in one bit lead to unrelated ones (SplitMix64).
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}

/// A table that the tasks of its connections share. Clones share it.
#[derive(Debug)]
pub struct Connections<T>(Arc<Mutex<ConnectionTable<Open<T>>>>);

#[derive(Debug)]
struct Open<T> {
    connection: T,
    /// None until the task runs.
    task: Option<AbortHandle>,
}

impl<T> Clone for Connections<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Send + 'static> Connections<T> {
    /// An empty table.
    pub fn new(max: usize) -> Self {
        Self(Arc::new(Mutex::new(ConnectionTable::new(max))))
    }

    fn lock(&self) -> MutexGuard<'_, ConnectionTable<Open<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one connection must go before another one is added.
    pub fn is_full(&self) -> bool {
        self.lock().is_full()
    }

    /// Removes the connection with the lowest rank from the table. Its task runs on until it is aborted.
    pub fn evict<R: Ord>(&self, rank: impl Fn(&T) -> Option<(R, AmongEquals)>) -> Option<Evicted<R, T>> {
        let (rank, Open { connection, task }) = self.lock().evict(|open| rank(&open.connection))?;
        Some(Evicted { rank, connection, task })
    }

    /// Serves a connection in a task of its own. The connection leaves the table when the task ends.
    pub fn spawn<F>(&self, source: IpAddr, connection: T, serving: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let id = self.lock().add(source, Open { connection, task: None });
        let leaving = Leaving { connections: self.clone(), id };
        let task = tokio::spawn(async move {
            let _leaving = leaving;
            serving.await;
        });
        if let Some((_, open)) = self.lock().open.get_mut(&id) {
            open.task = Some(task.abort_handle());
        }
    }
}

/// A connection that has left the table before its end.
#[derive(Debug)]
pub struct Evicted<R, T> {
    /// Why it was this one.
    pub rank: R,
    /// The connection.
    pub connection: T,
    task: Option<AbortHandle>,
}

impl<R, T> Evicted<R, T> {
    /// Ends the task at once.
    pub fn abort(self) {
        if let Some(task) = self.task {
            task.abort();
        }
    }
}

/// Removes a connection from the table when its task ends.
struct Leaving<T: Send + 'static> {
    connections: Connections<T>,
    id: u64,
}

impl<T: Send + 'static> Drop for Leaving<T> {
    fn drop(&mut self) {
        drop(self.connections.lock().remove(self.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::net::Ipv4Addr;

    use tokio::sync::oneshot;

    const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn the_limit_of_open_files_is_found() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max processes             31637                31637                processes\n\
                      Max open files            1024                 524288               files\n";
        assert_eq!(open_files(limits), Some(1024));
        assert_eq!(open_files("Max open files            unlimited            unlimited            files"), None);
        assert!(max_connections(1) == 1);
    }

    #[test]
    fn the_lowest_rank_goes_first_and_of_equals_the_oldest() {
        let mut table = ConnectionTable::new(4);
        for connection in [(2, 'a'), (1, 'b'), (1, 'c'), (0, 'd')] {
            assert!(!table.is_full());
            table.add(SOURCE, connection);
        }
        assert!(table.is_full());
        let evicted: Vec<_> = std::iter::from_fn(|| table.evict(|&(rank, _)| Some((rank, AmongEquals::Oldest))))
            .map(|(_, (_, name))| name)
            .collect();
        assert_eq!(evicted, ['d', 'b', 'c', 'a']);
        assert!(!table.is_full());
    }

    #[test]
    fn a_connection_without_a_rank_stays() {
        let mut table = ConnectionTable::new(2);
        let busy = table.add(SOURCE, None);
        table.add(SOURCE, Some(7));
        let rank = |rank: &Option<u8>| rank.map(|rank| (rank, AmongEquals::Oldest));
        assert_eq!(table.evict(rank), Some((7, Some(7))));
        assert_eq!(table.evict(rank), None);
        assert_eq!(table.remove(busy), Some(None));
    }

    #[test]
    fn a_flood_from_one_address_closes_its_own_connections() {
        let other = IpAddr::from([10, 0, 0, 1]);
        let mut table = ConnectionTable::new(100);
        for _ in 0..3 {
            table.add(other, other);
        }
        for _ in 0..10_000 {
            if table.is_full() {
                let (_, evicted) = table.evict(|_| Some(((), AmongEquals::LargestSource))).unwrap();
                assert_eq!(evicted, SOURCE);
            }
            table.add(SOURCE, SOURCE);
        }
        assert_eq!((table.sources[&SOURCE], table.sources[&other]), (97, 3));
        while table.evict(|_| Some(((), AmongEquals::LargestSource))).is_some() {}
        assert!(table.sources.is_empty());
    }

    #[test]
    fn in_a_flood_most_connections_stay_for_a_while() {
        let mut table = ConnectionTable::new(100);
        // Of which age the closed connections were, in connections that came after them.
        let mut ages = Vec::new();
        for number in 0..10_000_u32 {
            if table.is_full() {
                ages.push(number - table.evict(|_| Some(((), AmongEquals::LargestSource))).unwrap().1);
            }
            table.add(SOURCE, number);
        }
        let young = ages.iter().filter(|age| **age <= 10).count();
        let old = ages.iter().filter(|age| **age >= 150).count();
        assert!(young < ages.len() / 5 && old > ages.len() / 10, "{young} and {old} of {}", ages.len());
    }

    #[tokio::test]
    async fn an_aborted_connection_and_one_that_ends_leave_the_table() {
        let connections = Connections::new(2);
        let (dropped, mut is_dropped) = oneshot::channel::<()>();
        connections.spawn(SOURCE, 1, async move {
            let _dropped = dropped;
            std::future::pending().await
        });
        let (end, ended) = oneshot::channel::<()>();
        connections.spawn(SOURCE, 2, async move {
            let _ = ended.await;
        });
        assert!(connections.is_full());
        let evicted = connections.evict(|&rank| Some((rank, AmongEquals::Oldest))).unwrap();
        assert_eq!(evicted.rank, 1);
        assert!(!connections.is_full());
        assert!(is_dropped.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty));
        evicted.abort();
        is_dropped.await.unwrap_err();
        drop(end);
        while !connections.lock().open.is_empty() {
            tokio::task::yield_now().await;
        }
    }
}
