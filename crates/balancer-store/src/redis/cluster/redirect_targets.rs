//! Nodes that slots were redirected to and that the map does not have, because a slot moves to a new node. Pure: the
//! clock is the caller's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::super::address::Address;

/// The most that are kept. Few slots move at the same time.
const MAX_TARGETS: usize = 16;
/// How long one is kept that is not used. A slot of many keys takes a while, and its calls may be few.
const KEPT_FOR: Duration = Duration::from_secs(60);

/// Nodes `T` by their addresses, and when each was used last.
#[derive(Debug)]
pub(super) struct RedirectTargets<T>(BTreeMap<Address, (Arc<T>, Instant)>);

impl<T> RedirectTargets<T> {
    /// The node at this address, which `connect` makes if it is new. The node that was not used for the longest time goes
    /// if there are too many.
    pub(super) fn get(&mut self, address: &Address, now: Instant, connect: impl FnOnce() -> Arc<T>) -> Arc<T> {
        if let Some((node, used)) = self.0.get_mut(address) {
            *used = now;
            return Arc::clone(node);
        }
        if self.0.len() >= MAX_TARGETS
            && let Some(oldest) = self.0.iter().min_by_key(|(_, (_, used))| *used).map(|(address, _)| address.clone())
        {
            self.0.remove(&oldest);
        }
        let node = connect();
        self.0.insert(address.clone(), (Arc::clone(&node), now));
        node
    }

    /// The map has this node from now on.
    pub(super) fn take(&mut self, address: &Address) -> Option<Arc<T>> {
        self.0.remove(address).map(|(node, _)| node)
    }

    /// Forgets those that are no longer used.
    pub(super) fn expire(&mut self, now: Instant) {
        self.0.retain(|_, (_, used)| now - *used < KEPT_FOR);
    }
}

impl<T> Default for RedirectTargets<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Address {
        Address { host: "h".to_owned(), port }
    }

    #[test]
    fn a_node_is_made_once_and_taken_over_by_the_map() {
        let now = Instant::now();
        let mut targets = RedirectTargets::default();
        assert_eq!(*targets.get(&address(1), now, || Arc::new(1)), 1);
        assert_eq!(*targets.get(&address(1), now, || Arc::new(2)), 1);
        assert_eq!((targets.take(&address(1)).as_deref(), targets.take(&address(1))), (Some(&1), None));
    }

    #[test]
    fn the_nodes_used_last_are_kept_and_they_for_a_while() {
        let start = Instant::now();
        let mut targets = RedirectTargets::default();
        let at = |port: u16| start + Duration::from_millis(port.into());
        for port in 1..=100 {
            targets.get(&address(port), at(port), || Arc::new(port));
            targets.get(&address(1), at(port), || Arc::new(0));
        }
        let kept: Vec<_> = targets.0.keys().map(|address| address.port).collect();
        assert_eq!(kept, std::iter::once(1).chain(86..=100).collect::<Vec<_>>());
        targets.expire(at(90) + KEPT_FOR);
        assert_eq!(targets.0.len(), 11, "{targets:?}");
        targets.expire(at(100) + KEPT_FOR);
        assert!(targets.0.is_empty());
    }
}
