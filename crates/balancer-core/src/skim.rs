//! Skims JSON: finds the few values that are wanted and passes over the rest as fast as its bytes can
//! be looked at.
//!
//! Why not `serde_json` alone: an executor's review is 8.5 KB, of which some hundred bytes are wanted,
//! and it checks every byte of the others too, which is most of what the pure part of an admission
//! costs. What is passed over is only seen to be complete. What is wanted is checked; where it is
//! more than plain strings, by `serde_json`.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;

use crate::container::end_of_container;
use crate::pod::Pairs;
use crate::text::Text;

/// Why bytes are not the JSON that was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkimError {
    /// The byte at which it was noticed.
    pub at: usize,
    /// What would have been accepted there.
    pub expected: &'static str,
}

impl fmt::Display for SkimError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected {} at byte {}", self.expected, self.at)
    }
}

impl std::error::Error for SkimError {}

/// A place in a JSON text.
#[derive(Debug)]
pub(crate) struct Skimmer<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Skimmer<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Calls `member` with each key of the object here, to take the key's value; answers whether
    /// there is one: `null` is none, as Go has it. Keys are as written, with their escapes.
    pub(crate) fn members(
        &mut self,
        mut member: impl FnMut(&mut Self, &'a [u8]) -> Result<(), SkimError>,
    ) -> Result<bool, SkimError> {
        if self.peek() == Some(b'n') {
            self.literal("null")?;
            return Ok(false);
        }
        self.expect(b'{', "an object")?;
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(true);
        }
        loop {
            self.expect(b'"', "a key")?;
            let key = self.rest_of_string()?;
            self.expect(b':', "a colon")?;
            member(self, key)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                _ => break,
            }
        }
        self.expect(b'}', "a comma or the end of the object")?;
        Ok(true)
    }

    /// The string here; `null` is none.
    pub(crate) fn text(&mut self) -> Result<Option<Text<'a>>, SkimError> {
        if self.peek() == Some(b'n') {
            return self.literal("null").map(|()| None);
        }
        self.expect(b'"', "a string")?;
        let start = self.at;
        let raw = self.rest_of_string()?;
        unescape(raw, start).map(Some)
    }

    /// The object of strings here; `null` is none, and as a value the empty string.
    pub(crate) fn pairs(&mut self) -> Result<Option<Pairs<'a>>, SkimError> {
        let mut pairs = Vec::new();
        let present = self.members(|this, key| {
            let key = unescape(key, this.at)?;
            pairs.push((key, this.text()?.unwrap_or_default()));
            Ok(())
        })?;
        Ok(present.then(|| Pairs::new(pairs)))
    }

    /// The boolean here; `null` is none.
    pub(crate) fn boolean(&mut self) -> Result<Option<bool>, SkimError> {
        match self.peek() {
            Some(b't') => self.literal("true").map(|()| Some(true)),
            Some(b'f') => self.literal("false").map(|()| Some(false)),
            _ => self.literal("null").map(|()| None),
        }
    }

    /// The value here, read by `serde_json`.
    pub(crate) fn typed<T: Deserialize<'a>>(&mut self, expected: &'static str) -> Result<T, SkimError> {
        self.peek();
        let start = self.at;
        self.pass()?;
        let value = self.bytes.get(start..self.at).unwrap_or_default();
        serde_json::from_slice(value).map_err(|_| SkimError { at: start, expected })
    }

    /// Passes over the value here.
    pub(crate) fn pass(&mut self) -> Result<(), SkimError> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                self.rest_of_string().map(drop)
            }
            Some(b'{' | b'[') => self.pass_container(),
            Some(b'-' | b'0'..=b'9' | b'a'..=b'z') => {
                let rest = self.bytes.get(self.at..).unwrap_or_default();
                let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t');
                self.at += rest.iter().position(ends).unwrap_or(rest.len());
                Ok(())
            }
            _ => Err(self.error("a value")),
        }
    }

    /// Fails unless nothing but white space is left.
    pub(crate) fn finish(&mut self) -> Result<(), SkimError> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.error("the end")),
        }
    }

    fn pass_container(&mut self) -> Result<(), SkimError> {
        match end_of_container(self.bytes, self.at) {
            Some(end) => {
                self.at = end;
                Ok(())
            }
            None => {
                self.at = self.bytes.len();
                Err(self.error("the end of an object or array"))
            }
        }
    }

    /// The string whose opening quote was passed, as written; its closing quote is passed too.
    fn rest_of_string(&mut self) -> Result<&'a [u8], SkimError> {
        let start = self.at;
        match end_of_string(self.bytes, start) {
            Some(end) => {
                self.at = end + 1;
                Ok(self.bytes.get(start..end).unwrap_or_default())
            }
            None => {
                self.at = self.bytes.len();
                Err(self.error("the end of a string"))
            }
        }
    }

    /// The next byte that is not white space.
    fn peek(&mut self) -> Option<u8> {
        loop {
            match self.bytes.get(self.at)? {
                b' ' | b'\n' | b'\r' | b'\t' => self.at += 1,
                byte => return Some(*byte),
            }
        }
    }

    fn expect(&mut self, byte: u8, expected: &'static str) -> Result<(), SkimError> {
        if self.peek() != Some(byte) {
            return Err(self.error(expected));
        }
        self.at += 1;
        Ok(())
    }

    fn literal(&mut self, literal: &'static str) -> Result<(), SkimError> {
        self.peek();
        if !self.bytes.get(self.at..).unwrap_or_default().starts_with(literal.as_bytes()) {
            return Err(self.error(literal));
        }
        self.at += literal.len();
        Ok(())
    }

    fn error(&self, expected: &'static str) -> SkimError {
        SkimError { at: self.at, expected }
    }
}

/// Where the closing quote is of a string that goes on at `at`; `None` where there is none.
///
/// Eight bytes at a time: of a byte `x`, `(x - 1) & !x & 0x80` is set where it is 0, and first there.
#[inline]
fn end_of_string(bytes: &[u8], mut at: usize) -> Option<usize> {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGHS: u64 = u64::from_ne_bytes([0x80; 8]);
    const QUOTES: u64 = u64::from_ne_bytes([b'"'; 8]);
    const BACKSLASHES: u64 = u64::from_ne_bytes([b'\\'; 8]);
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    loop {
        if let Some(word) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
            let word = u64::from_le_bytes(*word);
            let found = zeros(word ^ QUOTES) | zeros(word ^ BACKSLASHES);
            if found == 0 {
                at += 8;
                continue;
            }
            at += found.trailing_zeros() as usize / 8;
        }
        match bytes.get(at)? {
            b'"' => return Some(at),
            // Whatever is escaped, its first byte does not end the string.
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// What a string as written stands for.
fn unescape(raw: &[u8], at: usize) -> Result<Text<'_>, SkimError> {
    let error = SkimError { at, expected: "a string in UTF-8" };
    if !raw.contains(&b'\\') {
        return std::str::from_utf8(raw).map(Text::from).map_err(|_| error);
    }
    let quoted = [b"\"", raw, b"\""].concat();
    serde_json::from_slice(&quoted).map(|text: String| Text(Cow::Owned(text))).map_err(|_| error)
}
