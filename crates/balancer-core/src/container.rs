//! Finds where an object or array ends, 64 bytes at a step: most of a review is in containers that
//! nothing is wanted of, and looking at one byte after the other, the processor guesses wrong at each
//! end of a string.

use std::iter::once;

use wide::u8x16;

/// Where the object or array that begins at `start` is over; `None` where it does not end. Brackets in
/// strings do not count; of the others it is not looked at which kind they are.
pub(crate) fn end_of_container(bytes: &[u8], start: usize) -> Option<usize> {
    let rest = bytes.get(start + 1..)?;
    let (blocks, tail) = rest.as_chunks::<64>();
    let mut last = [0; 64];
    last.get_mut(..tail.len())?.copy_from_slice(tail);
    let (mut depth, mut in_string, mut escaped) = (1u64, 0, 0);
    for (i, block) in blocks.iter().chain(once(&last)).enumerate() {
        let [quotes, backslashes, opening, closing] = find(block);
        let strings = parity(quotes & !escapes(backslashes, &mut escaped)) ^ in_string;
        in_string = if strings >> 63 == 1 { u64::MAX } else { 0 };
        let (opening, mut closing) = (opening & !strings, closing & !strings);
        let (opened, closed) = (count(opening), count(closing));
        if closed >= depth {
            let mut closed = 0;
            while closing != 0 {
                let bit = closing & closing.wrapping_neg();
                closed += 1;
                if depth + count(opening & (bit - 1)) == closed {
                    return Some(start + 1 + 64 * i + bit.trailing_zeros() as usize + 1);
                }
                closing ^= bit;
            }
        }
        depth = depth + opened - closed;
    }
    None
}

/// How many bits are set.
fn count(bits: u64) -> u64 {
    bits.count_ones().into()
}

/// A bit for each byte that is a quote, a backslash, an opening or a closing bracket, in this order.
fn find(block: &[u8; 64]) -> [u64; 4] {
    let mut found = [0; 4];
    for (i, part) in block.as_chunks::<16>().0.iter().enumerate() {
        let part = u8x16::new(*part);
        // This bit is the difference between [ and {, and between ] and }.
        let folded = part | u8x16::splat(0x20);
        let here = [(part, b'"'), (part, b'\\'), (folded, b'{'), (folded, b'}')];
        for (all, (part, byte)) in found.iter_mut().zip(here) {
            *all |= u64::from(part.simd_eq(u8x16::splat(byte)).to_bitmask()) << (16 * i);
        }
    }
    found
}

/// A bit for each byte that stands behind a backslash which is not itself escaped. `carry` is the first
/// such bit, from the block before and for the next one.
fn escapes(mut backslashes: u64, carry: &mut u64) -> u64 {
    let mut escaped = std::mem::take(carry);
    backslashes &= !escaped;
    while backslashes != 0 {
        let bit = backslashes & backslashes.wrapping_neg();
        escaped |= bit << 1;
        *carry = bit >> 63;
        backslashes &= !(bit | bit << 1);
    }
    escaped
}

/// A bit for each byte that has an odd number of quotes up to it: of strings, and their opening quotes.
fn parity(quotes: u64) -> u64 {
    [1, 2, 4, 8, 16, 32].iter().fold(quotes, |bits, shift| bits ^ bits << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::de::IgnoredAny;
    use serde_json::{Deserializer, Value};

    fn json() -> impl Strategy<Value = Value> {
        let text = "[\\\\\"{}\\[\\]a]{0,80}";
        text.prop_map(Value::from).prop_recursive(6, 96, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map(text, inner, 0..6).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_container_ends_where_serde_json_ends_it(value in json(), pretty: bool, before in 0..70usize, behind in "[\\]}{\"\\\\a]{0,80}") {
            let value = Value::from(vec![value]);
            let text = if pretty { format!("{value:#}{behind}") } else { format!("{value}{behind}") };
            let mut values = Deserializer::from_str(&text).into_iter::<IgnoredAny>();
            prop_assert!(values.next().is_some_and(|value| value.is_ok()));
            let end = before + values.byte_offset();
            let bytes = [vec![b'"'; before], text.into_bytes()].concat();
            prop_assert_eq!(end_of_container(&bytes, before), Some(end));
            prop_assert_eq!(end_of_container(&bytes[..end - 1], before), None);
        }
    }
}
