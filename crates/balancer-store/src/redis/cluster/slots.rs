//! Hash slots: which slot a key is in, and which nodes have which slots. Follows the Redis cluster specification.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::LazyLock;

use redis::Value;

use super::super::address::Address;
use super::super::reply::text;
use crate::StoreError;

/// The number of hash slots in every cluster.
pub(super) const SLOTS: u16 = 16_384;
/// A cluster has a thousand nodes at most. A longer reply is not a cluster's.
const MAX_PRIMARIES: usize = 1024;
/// Replicas that are kept at most. They are asked only if too few primaries can be.
const MAX_REPLICAS: usize = 4096;

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

    /// Reads the reply to `CLUSTER SLOTS` of the node `answering`. Slots whose primary has no known address are left out.
    pub(super) fn parse(reply: &Value, answering: &Address) -> Result<Self, StoreError> {
        Self::read(reply, answering)
            .map_err(|cause| StoreError::InvalidReply(format!("CLUSTER SLOTS of {answering}: {cause}")))
    }

    fn read(reply: &Value, answering: &Address) -> Result<Self, String> {
        let Value::Array(parts) = reply else { return Err("not an array".to_owned()) };
        if parts.len() > usize::from(SLOTS) {
            return Err(format!("{} ranges; accepted: {SLOTS}, one for each slot", parts.len()));
        }
        let (mut map, mut primaries, mut replicas) = (Self::default(), BTreeSet::new(), BTreeSet::new());
        for part in parts {
            let Value::Array(part) = part else { return Err("a range is not an array".to_owned()) };
            let [Value::Int(first), Value::Int(last), primary, others @ ..] = part.as_slice() else {
                return Err("a range has no first slot, last slot and primary".to_owned());
            };
            let slot = |number: i64| u16::try_from(number).ok().filter(|slot| *slot < SLOTS);
            let (Some(start), Some(end)) = (slot(*first), slot(*last)) else {
                return Err(format!("slots {first} to {last}; accepted: 0 to {}", SLOTS - 1));
            };
            if start > end {
                return Err(format!("slots {first} to {last}; accepted: the first is not after the last"));
            }
            let invalid = || format!("the primary of slots {first} to {last} has no host and port");
            if let Some(primary) = node(primary, answering).ok_or_else(invalid)? {
                primaries.insert(primary.clone());
                map.ranges.push((start..=end, primary));
            }
            replicas.extend(others.iter().filter_map(|replica| node(replica, answering)?));
        }
        if primaries.len() > MAX_PRIMARIES {
            return Err(format!("{} primaries; accepted: {MAX_PRIMARIES}", primaries.len()));
        }
        map.ranges.sort_unstable_by_key(|(range, _)| *range.start());
        for ((one, _), (next, _)) in map.ranges.iter().zip(map.ranges.iter().skip(1)) {
            if next.start() <= one.end() {
                return Err(format!("slot {} has two primaries", next.start()));
            }
        }
        map.replicas = replicas.into_iter().take(MAX_REPLICAS).collect();
        Ok(map)
    }
}

/// A node in the reply: its host, its port, its id, and the rest of what is known about its address. `None` if that is
/// invalid; `Some(None)` if the address is not known.
fn node(node: &Value, answering: &Address) -> Option<Option<Address>> {
    let Value::Array(parts) = node else { return None };
    let [host, Value::Int(port), rest @ ..] = parts.as_slice() else { return None };
    let port = u16::try_from(*port).ok().filter(|port| *port > 0)?;
    let ip = || rest.get(1).and_then(ip);
    let host = match host {
        // All nodes are behind the address that was asked, and differ by their ports.
        Value::Nil => Some(answering.host.as_str()),
        host => match text(host)? {
            // A node does not know its own address before it has met another one.
            "" => ip().or(Some(answering.host.as_str())),
            // A node that is to be reached by name has no name. Only the node that answers was reached all the same.
            UNKNOWN => ip().or_else(|| (port == answering.port).then_some(answering.host.as_str())),
            host => Some(host),
        },
    };
    Some(host.map(|host| Address { host: host.to_owned(), port }))
}

/// The host of a node whose name is not known.
const UNKNOWN: &str = "?";

/// The IP in what else is known about a node's address: names and values.
fn ip(rest: &Value) -> Option<&str> {
    let ip = match rest {
        Value::Array(fields) => fields.chunks_exact(2).find_map(|field| match field {
            [name, ip] if text(name) == Some("ip") => text(ip),
            _ => None,
        }),
        Value::Map(fields) => fields.iter().find_map(|(name, ip)| text(ip).filter(|_| text(name) == Some("ip"))),
        _ => None,
    };
    ip.filter(|ip| !ip.is_empty() && *ip != UNKNOWN)
}

/// The node in a redirection, such as `3999 10.0.0.7:6379`; without a host it is on that of `answering`. `None` if there
/// is none, or its host is not known.
pub(super) fn redirected(detail: &str, answering: &Address) -> Option<Address> {
    // An IPv6 address has colons too.
    let (host, port) = detail.split_ascii_whitespace().nth(1)?.rsplit_once(':')?;
    let host = match host {
        "" => &answering.host,
        UNKNOWN => return None,
        host => host,
    };
    Some(Address { host: host.to_owned(), port: port.parse().ok().filter(|port| *port > 0)? })
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

    fn range(first: i64, last: i64, nodes: Vec<Value>) -> Value {
        Value::Array([Value::Int(first), Value::Int(last)].into_iter().chain(nodes).collect())
    }

    #[test]
    fn a_map_names_primaries_and_replicas() {
        let reply = Value::Array(vec![
            range(5_461, 16_383, vec![node(bulk("a.example"), 2), node(bulk("c.example"), 4)]),
            range(0, 5_460, vec![node(bulk("fd00::1"), 1), node(bulk("b.example"), 3)]),
        ]);
        let map = SlotMap::parse(&reply, &address("seed", 9)).expect("a map");
        assert_eq!(map.ranges, [(0..=5_460, address("fd00::1", 1)), (5_461..=16_383, address("a.example", 2))]);
        assert_eq!(map.replicas, [address("b.example", 3), address("c.example", 4)]);
        assert_eq!(map.covered(), usize::from(SLOTS));
    }

    #[test]
    fn a_host_that_is_left_out_is_found_elsewhere_or_not_at_all() {
        let known = |host, port, rest: &[&str]| {
            let rest = Value::Array(rest.iter().copied().map(bulk).collect());
            let reply = range(0, 1, vec![Value::Array(vec![host, Value::Int(port), bulk("id"), rest])]);
            let map = SlotMap::parse(&Value::Array(vec![reply]), &address("seed", 9)).expect("a map");
            map.ranges.first().map(|(_, address)| address.to_string())
        };
        let expected = |address: &str| Some(address.to_owned());
        let ip = ["hostname", "", "ip", "10.0.0.7"];
        // Behind one address, whatever else is known.
        assert_eq!(known(Value::Nil, 2, &ip), expected("seed:2"));
        assert_eq!(known(bulk("?"), 2, &ip), expected("10.0.0.7:2"));
        assert_eq!(known(bulk(""), 2, &ip), expected("10.0.0.7:2"));
        for rest in [&[][..], &["ip", ""], &["ip", "?"], &["ip"], &["hostname", "ip"]] {
            assert_eq!(known(bulk(""), 2, rest), expected("seed:2"), "{rest:?}");
            assert_eq!(known(bulk("?"), 9, rest), expected("seed:9"), "{rest:?}");
            assert_eq!(known(bulk("?"), 2, rest), None, "{rest:?}");
        }
    }

    #[test]
    fn what_is_no_map_is_an_error_that_names_the_cause() {
        let many = (0..1_025).map(|slot| range(slot, slot, vec![node(bulk("a"), slot + 1)]));
        let a = || vec![node(bulk("a"), 1)];
        for (reply, cause) in [
            (Value::Nil, "not an array"),
            (Value::Array(vec![Value::Int(1)]), "a range is not an array"),
            (Value::Array(vec![range(0, 1, Vec::new())]), "no first slot, last slot and primary"),
            (Value::Array(vec![range(0, 16_384, a())]), "slots 0 to 16384; accepted: 0 to 16383"),
            (Value::Array(vec![range(-1, 1, a())]), "slots -1 to 1; accepted: 0 to 16383"),
            (Value::Array(vec![range(2, 1, a())]), "slots 2 to 1; accepted: the first is not after"),
            (Value::Array(vec![range(0, 2, a()), range(2, 3, a())]), "slot 2 has two primaries"),
            (Value::Array(vec![range(0, 1, vec![node(bulk("a"), 70_000)])]), "has no host and port"),
            (Value::Array(vec![range(0, 1, vec![Value::Int(1)])]), "has no host and port"),
            (Value::Array(many.collect()), "1025 primaries; accepted: 1024"),
            (Value::Array(vec![range(0, 0, a()); 16_385]), "16385 ranges; accepted: 16384"),
        ] {
            let error = SlotMap::parse(&reply, &address("seed", 9)).expect_err("no map").to_string();
            assert!(error.contains(cause) && error.contains("seed:9"), "{error}");
        }
    }

    /// Any reply; numbers and words are often those of a map.
    #[cfg(feature = "contract")]
    fn any_reply() -> impl proptest::strategy::Strategy<Value = Value> {
        use proptest::prelude::*;

        let leaf = prop_oneof![
            Just(Value::Nil),
            any::<i64>().prop_map(Value::Int),
            (-2_i64..20_000).prop_map(Value::Int),
            prop_oneof![Just("?"), Just(""), Just("ip"), Just("10.0.0.7")].prop_map(bulk),
            any::<Vec<u8>>().prop_map(Value::BulkString),
            any::<String>().prop_map(Value::SimpleString),
        ];
        leaf.prop_recursive(4, 128, 8, |inner| {
            let range = (-1_i64..16_385, -1_i64..16_385, prop::collection::vec(inner.clone(), 0..4));
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Value::Array),
                prop::collection::vec((inner.clone(), inner), 0..4).prop_map(Value::Map),
                range.prop_map(|(first, last, nodes)| super::tests::range(first, last, nodes)),
            ]
        })
    }

    #[cfg(feature = "contract")]
    #[test]
    fn any_reply_is_a_map_within_bounds_or_an_error() {
        let mut runner = proptest::test_runner::TestRunner::default();
        let check = |reply| {
            if let Ok(map) = SlotMap::parse(&reply, &address("seed", 9)) {
                assert!(map.covered() <= usize::from(SLOTS), "{map:?}");
                let mut nodes = map.ranges.iter().map(|(_, node)| node).chain(&map.replicas);
                assert!(nodes.all(|node| node.host != "?" && !node.host.is_empty() && node.port > 0), "{map:?}");
            }
            Ok(())
        };
        runner.run(&any_reply(), check).unwrap_or_else(|failure| panic!("{failure}"));
    }

    #[test]
    fn a_redirection_names_a_node() {
        let answering = address("here", 1);
        assert_eq!(redirected("3999 10.0.0.7:6381", &answering), Some(address("10.0.0.7", 6381)));
        assert_eq!(redirected("3999 fd00::7:6381", &answering), Some(address("fd00::7", 6381)));
        assert_eq!(redirected("3999 :6381", &answering), Some(address("here", 6381)));
        for text in ["", "3999", "3999 host", "3999 host:port", "3999 host:0", "3999 ?:6381"] {
            assert_eq!(redirected(text, &answering), None, "{text}");
        }
    }
}
