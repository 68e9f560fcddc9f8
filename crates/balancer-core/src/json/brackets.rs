//! Finds the end of a JSON object or array, 64 bytes per step.
//!
//! Most bytes of a review belong to objects and arrays that are skipped. Looking at one byte after the other is
//! slow because the processor mispredicts the branch at the end of each string.

use std::iter::once;

use wide::u8x16;

/// The offset after the object or array that starts at `start`; `None` if it does not end. Brackets in strings
/// do not count. The function does not check that an opening and its closing bracket are of the same kind.
pub(super) fn end_of_value(bytes: &[u8], start: usize) -> Option<usize> {
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

/// The number of bits that are set.
fn count(bits: u64) -> u64 {
    bits.count_ones().into()
}

/// The bits of the bytes that are quotes, backslashes, opening brackets and closing brackets.
fn find(block: &[u8; 64]) -> [u64; 4] {
    let mut found = [0; 4];
    for (i, part) in block.as_chunks::<16>().0.iter().enumerate() {
        let part = u8x16::new(*part);
        // This bit is the only difference between [ and {, and between ] and }.
        let folded = part | u8x16::splat(0x20);
        let here = [(part, b'"'), (part, b'\\'), (folded, b'{'), (folded, b'}')];
        for (all, (part, byte)) in found.iter_mut().zip(here) {
            *all |= u64::from(part.simd_eq(u8x16::splat(byte)).to_bitmask()) << (16 * i);
        }
    }
    found
}

/// The bits of the bytes that a backslash escapes. `carry` is the bit that the last byte of a block sets in the
/// next block.
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

/// The bits of the bytes inside strings, opening quotes included: an odd number of quotes ends at each.
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
        fn objects_and_arrays_end_where_serde_json_says(value in json(), pretty: bool, before in 0..70usize, behind in "[\\]}{\"\\\\a]{0,80}") {
            let value = Value::from(vec![value]);
            let text = if pretty { format!("{value:#}{behind}") } else { format!("{value}{behind}") };
            let mut values = Deserializer::from_str(&text).into_iter::<IgnoredAny>();
            prop_assert!(values.next().is_some_and(|value| value.is_ok()));
            let end = before + values.byte_offset();
            let bytes = [vec![b'"'; before], text.into_bytes()].concat();
            prop_assert_eq!(end_of_value(&bytes, before), Some(end));
            prop_assert_eq!(end_of_value(&bytes[..end - 1], before), None);
        }
    }
}
