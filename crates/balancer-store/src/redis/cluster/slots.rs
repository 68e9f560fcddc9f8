//! Hash slots: which slot a key is in, and which nodes have which slots. Follows the Redis cluster specification.

use std::ops::RangeInclusive;
use std::sync::LazyLock;

use redis::Value;

use super::super::address::Address;
use crate::StoreError;

/// The number of hash slots in every cluster.
pub(super) const SLOTS: u16 = 16_384;
/// A cluster has a thousand nodes at most. A longer reply is not a cluster's.
const MAX_RANGES: usize = SLOTS as usize;

/// The slot of a key.
pub(super) fn slot_of(key: &[u8]) -> u16 {
    crc16(hash_tag(key)) % SLOTS
}

/// The part of the key that decides on its slot: what is between the first `{` and the next `}`, if that is anything.
fn hash_tag(key: &[u8]) -> &[u8] {
    let tag = || {
        let after = key.splitn(2, |byte| *byte == b'{').nth(1)?;
        let end = after.iter().position(|byte| *byte == b'}')?;
        after.get(..end).filter(|tag| !tag.is_empty())
    };
    tag().unwrap_or(key)
}

/// CRC-16/XMODEM.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 })
    })
}

/// For each slot the smallest number whose text is in it, as a hash tag: so each node can have a key of its own.
pub(super) static TAGS: LazyLock<Box<[u32]>> = LazyLock::new(|| {
    let mut tags = vec![u32::MAX; usize::from(SLOTS)];
    let mut missing = tags.len();
    for number in 0..u32::MAX {
        if missing == 0 {
            break;
        }
        let slot = usize::from(slot_of(number.to_string().as_bytes()));
        if let Some(tag) = tags.get_mut(slot).filter(|tag| **tag == u32::MAX) {
            *tag = number;
            missing -= 1;
        }
    }
    tags.into()
});

/// What a node says about the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SlotMap {
    /// The slots of the primaries.
    pub(super) ranges: Vec<(RangeInclusive<u16>, Address)>,
    /// The replicas. One of them may be a primary soon.
    pub(super) replicas: Vec<Address>,
}

impl SlotMap {
    /// How many slots have a primary.
    pub(super) fn covered(&self) -> usize {
        self.ranges.iter().map(|(range, _)| range.len()).sum()
    }

    /// Reads the reply to `CLUSTER SLOTS`. A node may leave out its own host, or that of others, if it does not know
    /// under which name it was reached: then it is that of `answering`, the node that has answered.
    pub(super) fn parse(reply: &Value, answering: &Address) -> Result<Self, StoreError> {
        let invalid = || StoreError::InvalidReply(format!("CLUSTER SLOTS: {reply:?}").chars().take(200).collect());
        let Value::Array(parts) = reply else { return Err(invalid()) };
        if parts.len() > MAX_RANGES {
            return Err(invalid());
        }
        let mut map = Self::default();
        for part in parts {
            let Value::Array(part) = part else { return Err(invalid()) };
            let [Value::Int(first), Value::Int(last), primary, replicas @ ..] = part.as_slice() else {
                return Err(invalid());
            };
            let slot = |number: i64| u16::try_from(number).ok().filter(|slot| *slot < SLOTS);
            let (Some(first), Some(last)) = (slot(*first), slot(*last)) else { return Err(invalid()) };
            map.ranges.push((first..=last, node(primary, answering).ok_or_else(invalid)?));
            map.replicas.extend(replicas.iter().filter_map(|replica| node(replica, answering)));
        }
        map.ranges.sort_unstable_by_key(|(range, _)| *range.start());
        map.replicas.sort_unstable();
        map.replicas.dedup();
        Ok(map)
    }
}

/// A node in the reply: its host, its port, and more.
fn node(node: &Value, answering: &Address) -> Option<Address> {
    let Value::Array(parts) = node else { return None };
    let [host, Value::Int(port), ..] = parts.as_slice() else { return None };
    let host = match host {
        Value::BulkString(host) => std::str::from_utf8(host).ok()?,
        Value::SimpleString(host) => host,
        Value::Nil => "",
        _ => return None,
    };
    let host = if host.is_empty() || host == "?" { &answering.host } else { host };
    Some(Address { host: host.to_owned(), port: u16::try_from(*port).ok().filter(|port| *port > 0)? })
}

/// The node in a redirection, such as `3999 10.0.0.7:6379`; without a host it is on that of `answering`.
pub(super) fn redirected(detail: &str, answering: &Address) -> Option<Address> {
    // An IPv6 address has colons too.
    let (host, port) = detail.split_ascii_whitespace().nth(1)?.rsplit_once(':')?;
    let host = if host.is_empty() || host == "?" { &answering.host } else { host };
    Some(Address { host: host.to_owned(), port: port.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: &str, port: u16) -> Address {
        Address { host: host.to_owned(), port }
    }

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    fn node(host: Value, port: i64) -> Value {
        Value::Array(vec![host, Value::Int(port), bulk("id"), Value::Array(Vec::new())])
    }

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(crc16(b"123456789"), 0x31C3);
        assert_eq!(slot_of(b"foo"), 12_182);
        assert_eq!(slot_of(b"{user1000}.following"), slot_of(b"{user1000}.followers"));
        assert_eq!(slot_of(b"foo{}{bar}"), crc16(b"foo{}{bar}") % SLOTS);
        assert_eq!(slot_of(b"foo{{bar}}zap"), slot_of(b"{bar"));
        assert_eq!(slot_of(b"foo{bar}{zap}"), slot_of(b"bar"));
        assert_eq!(slot_of(b"foo{bar"), crc16(b"foo{bar") % SLOTS);
    }

    #[test]
    fn each_slot_has_a_tag() {
        for (slot, tag) in TAGS.iter().enumerate() {
            assert_eq!(usize::from(slot_of(format!("exec-heartbeat:{{{tag}}}").as_bytes())), slot);
        }
    }

    #[test]
    fn a_map_names_primaries_and_replicas_and_fills_in_hosts_that_are_left_out() {
        let range = |first, last, nodes: Vec<Value>| {
            Value::Array([Value::Int(first), Value::Int(last)].into_iter().chain(nodes).collect())
        };
        let reply = Value::Array(vec![
            range(5_461, 16_383, vec![node(bulk("?"), 2), node(Value::Nil, 4)]),
            range(0, 5_460, vec![node(bulk("fd00::1"), 1), node(bulk("b.example"), 3)]),
        ]);
        let seed = address("seed", 9);
        let map = SlotMap::parse(&reply, &seed).expect("a map");
        assert_eq!(map.ranges, [(0..=5_460, address("fd00::1", 1)), (5_461..=16_383, address("seed", 2))]);
        assert_eq!(map.replicas, [address("b.example", 3), address("seed", 4)]);
        assert_eq!(map.covered(), usize::from(SLOTS));
    }

    #[test]
    fn what_is_no_map_is_an_error() {
        let seed = address("seed", 9);
        let range = |parts: Vec<Value>| Value::Array(vec![Value::Array(parts)]);
        for reply in [
            Value::Nil,
            Value::Array(vec![Value::Int(1)]),
            range(vec![Value::Int(0), Value::Int(16_384), node(bulk("a"), 1)]),
            range(vec![Value::Int(-1), Value::Int(1), node(bulk("a"), 1)]),
            range(vec![Value::Int(0), Value::Int(1)]),
            range(vec![Value::Int(0), Value::Int(1), node(bulk("a"), 70_000)]),
        ] {
            assert!(SlotMap::parse(&reply, &seed).is_err(), "{reply:?}");
        }
    }

    #[test]
    fn a_redirection_names_a_node() {
        let answering = address("here", 1);
        assert_eq!(redirected("3999 10.0.0.7:6381", &answering), Some(address("10.0.0.7", 6381)));
        assert_eq!(redirected("3999 fd00::7:6381", &answering), Some(address("fd00::7", 6381)));
        assert_eq!(redirected("3999 :6381", &answering), Some(address("here", 6381)));
        for text in ["", "3999", "3999 host", "3999 host:port"] {
            assert_eq!(redirected(text, &answering), None, "{text}");
        }
    }
}
