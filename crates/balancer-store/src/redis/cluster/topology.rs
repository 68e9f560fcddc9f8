//! Which node has which slots. A value that does not change: a refresh replaces it by another one.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::address::Address;
use super::super::dial::Network;
use super::Node;
use super::slots::{SLOTS, SlotMap, TAGS};
use crate::StoreError;

/// The primaries of a cluster, and the slots of each.
#[derive(Debug)]
pub(super) struct Topology<N: Network> {
    /// Counts the topologies of this process whose slots differ.
    pub(super) number: u64,
    pub(super) primaries: Vec<Primary<N>>,
    /// The index of the primary of each slot; empty as long as nothing is known.
    owners: Vec<Option<u16>>,
    /// What it was made from.
    pub(super) map: SlotMap,
}

/// A primary, and a number that is in one of its slots as a hash tag.
#[derive(Debug)]
pub(super) struct Primary<N: Network> {
    pub(super) node: Arc<Node<N>>,
    pub(super) tag: u32,
}

impl<N: Network> Default for Topology<N> {
    /// Nothing is known.
    fn default() -> Self {
        Self { number: 0, primaries: Vec::new(), owners: Vec::new(), map: SlotMap::default() }
    }
}

impl<N: Network> Topology<N> {
    /// The topology that follows this one. `connect` makes a node for an address that is new.
    pub(super) fn next(&self, map: SlotMap, connect: impl Fn(Address) -> Arc<Node<N>>) -> Self {
        let mut indices: BTreeMap<&Address, u16> = BTreeMap::new();
        let mut owners = vec![None; usize::from(SLOTS)];
        let mut primaries: Vec<Primary<N>> = Vec::new();
        for (range, address) in &map.ranges {
            let index = *indices.entry(address).or_insert_with(|| {
                let node = self.node(address).unwrap_or_else(|| connect(address.clone()));
                primaries.push(Primary { node, tag: u32::MAX });
                // Maps have few.
                u16::try_from(primaries.len() - 1).unwrap_or_default()
            });
            for slot in range.clone().map(usize::from) {
                if let (Some(owner), Some(tag), Some(primary)) =
                    (owners.get_mut(slot), TAGS.get(slot), primaries.get_mut(usize::from(index)))
                {
                    *owner = Some(index);
                    primary.tag = primary.tag.min(*tag);
                }
            }
        }
        let number = self.number + u64::from(map.ranges != self.map.ranges);
        Self { number, primaries, owners, map }
    }

    /// The primary of a slot.
    pub(super) fn owner(&self, slot: u16) -> Result<&Primary<N>, StoreError> {
        let index = self.owners.get(usize::from(slot)).copied().flatten();
        index
            .and_then(|index| self.primaries.get(usize::from(index)))
            .ok_or_else(|| StoreError::NoConnection(format!("no node of the cluster has slot {slot}")))
    }

    /// The primary at this address.
    pub(super) fn node(&self, address: &Address) -> Option<Arc<Node<N>>> {
        self.primaries.iter().find(|primary| primary.node.address == *address).map(|primary| Arc::clone(&primary.node))
    }

    /// Whether each slot has a primary, and each primary is connected.
    pub(super) fn is_healthy(&self) -> bool {
        self.is_complete() && self.connected() == self.primaries.len()
    }

    /// Whether others than the connected primaries have to be asked for the slots. More than half of the primaries need
    /// not: a replica replaces a primary by the votes of more than half of them, so one of these knows of it.
    pub(super) fn needs_others(&self) -> bool {
        !self.is_complete() || self.connected() * 2 <= self.primaries.len()
    }

    fn is_complete(&self) -> bool {
        !self.owners.is_empty() && self.owners.iter().all(Option::is_some)
    }

    fn connected(&self) -> usize {
        self.primaries.iter().filter(|primary| primary.node.is_connected()).count()
    }
}
