//! Scans a JSON text for the few values that are wanted, and skips the rest.
//!
//! An executor's review has 8.5 KB, of which a few hundred bytes are wanted. `serde_json` also validates every
//! byte of the others, which costs more than everything else in the pure part of an admission. The scanner
//! only checks that a skipped value is complete. It validates every value that it returns.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;

use super::brackets::end_of_value;
use super::pairs::Pairs;
use crate::text::Text;

/// A JSON text has another shape than expected, or ends too early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonError {
    /// The offset of the error, in bytes.
    pub at: usize,
    /// What is accepted there.
    pub expected: &'static str,
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected {} at byte {}", self.expected, self.at)
    }
}

impl std::error::Error for JsonError {}

/// A type that is read from the scanner's position.
pub(crate) trait Scan<'a>: Sized {
    /// Reads the next value. `null` means absent.
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError>;
}

/// A position in a JSON text.
#[derive(Debug)]
pub(crate) struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Reads the next value, which must be an object or `null`. `member` is called with each key, and
    /// whether the key has escapes, and must read or skip its value. Keys are not unescaped. Returns `false` for `null`.
    pub(crate) fn members(
        &mut self,
        mut member: impl FnMut(&mut Self, &'a [u8], bool) -> Result<(), JsonError>,
    ) -> Result<bool, JsonError> {
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
            let (key, has_escapes) = self.rest_of_string()?;
            self.expect(b':', "a colon")?;
            member(self, key, has_escapes)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                _ => break,
            }
        }
        self.expect(b'}', "a comma or the end of the object")?;
        Ok(true)
    }

    /// Reads the next value, which must be an array or `null`. `element` is called before each value and must read
    /// or skip it. Returns `false` for `null`.
    pub(crate) fn elements(
        &mut self,
        mut element: impl FnMut(&mut Self) -> Result<(), JsonError>,
    ) -> Result<bool, JsonError> {
        if self.peek() == Some(b'n') {
            self.literal("null")?;
            return Ok(false);
        }
        self.expect(b'[', "an array")?;
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(true);
        }
        loop {
            element(self)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                _ => break,
            }
        }
        self.expect(b']', "a comma or the end of the array")?;
        Ok(true)
    }

    /// Reads the next value with `serde_json`.
    pub(crate) fn deserialize<T: Deserialize<'a>>(&mut self, expected: &'static str) -> Result<T, JsonError> {
        self.peek();
        let at = self.at;
        serde_json::from_slice(self.text()?).map_err(|_| JsonError { at, expected })
    }

    /// The text of the next value, which is only checked to be complete; `None` for `null`.
    pub(crate) fn raw(&mut self) -> Result<Option<&'a [u8]>, JsonError> {
        self.text().map(|text| Some(text).filter(|text| *text != b"null"))
    }

    fn text(&mut self) -> Result<&'a [u8], JsonError> {
        self.peek();
        let start = self.at;
        self.skip()?;
        Ok(self.bytes.get(start..self.at).unwrap_or_default())
    }

    /// Skips the next value.
    pub(crate) fn skip(&mut self) -> Result<(), JsonError> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                self.rest_of_string().map(drop)
            }
            Some(b'{' | b'[') => self.skip_brackets(),
            Some(b'-' | b'0'..=b'9' | b'a'..=b'z') => {
                let rest = self.bytes.get(self.at..).unwrap_or_default();
                let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t');
                self.at += rest.iter().position(ends).unwrap_or(rest.len());
                Ok(())
            }
            _ => Err(self.error("a value")),
        }
    }

    /// Fails unless only white space is left.
    pub(crate) fn finish(&mut self) -> Result<(), JsonError> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.error("the end")),
        }
    }

    fn skip_brackets(&mut self) -> Result<(), JsonError> {
        match end_of_value(self.bytes, self.at) {
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

    /// The string whose opening quote was already read, not unescaped, and whether it has escapes. Reads its closing quote
    /// too.
    fn rest_of_string(&mut self) -> Result<(&'a [u8], bool), JsonError> {
        let start = self.at;
        match end_of_string(self.bytes, start) {
            Some((end, has_escapes)) => {
                self.at = end + 1;
                Ok((self.bytes.get(start..end).unwrap_or_default(), has_escapes))
            }
            None => {
                self.at = self.bytes.len();
                Err(self.error("the end of a string"))
            }
        }
    }

    /// The next byte that is not white space. It is not consumed.
    fn peek(&mut self) -> Option<u8> {
        loop {
            match self.bytes.get(self.at)? {
                b' ' | b'\n' | b'\r' | b'\t' => self.at += 1,
                byte => return Some(*byte),
            }
        }
    }

    fn expect(&mut self, byte: u8, expected: &'static str) -> Result<(), JsonError> {
        if self.peek() != Some(byte) {
            return Err(self.error(expected));
        }
        self.at += 1;
        Ok(())
    }

    fn literal(&mut self, literal: &'static str) -> Result<(), JsonError> {
        self.peek();
        if !self.bytes.get(self.at..).unwrap_or_default().starts_with(literal.as_bytes()) {
            return Err(self.error(literal));
        }
        self.at += literal.len();
        Ok(())
    }

    fn error(&self, expected: &'static str) -> JsonError {
        JsonError { at: self.at, expected }
    }
}

impl<'a> Scan<'a> for Option<Text<'a>> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        if scanner.peek() == Some(b'n') {
            return scanner.literal("null").map(|()| None);
        }
        scanner.expect(b'"', "a string")?;
        let start = scanner.at;
        let (raw, has_escapes) = scanner.rest_of_string()?;
        unescape(raw, has_escapes, start).map(Some)
    }
}

impl<'a> Scan<'a> for Text<'a> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        Ok(Option::<Self>::scan(scanner)?.unwrap_or_default())
    }
}

impl<'a> Scan<'a> for Option<Pairs<'a>> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        let mut pairs = Vec::new();
        let present = scanner.members(|scanner, key, has_escapes| {
            let key = unescape(key, has_escapes, scanner.at)?;
            pairs.push((key, Text::scan(scanner)?));
            Ok(())
        })?;
        Ok(present.then_some(Pairs(pairs)))
    }
}

/// `null` in a list is a value without any fields, as Kubernetes decodes it.
impl<'a, T: Default> Scan<'a> for Option<Vec<T>>
where
    Option<T>: Scan<'a>,
{
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        let mut list = Vec::new();
        let present = scanner.elements(|scanner| {
            list.push(Option::<T>::scan(scanner)?.unwrap_or_default());
            Ok(())
        })?;
        Ok(present.then_some(list))
    }
}

/// `null` means `false`.
impl<'a> Scan<'a> for bool {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        match scanner.peek() {
            Some(b't') => scanner.literal("true").map(|()| true),
            Some(b'f') => scanner.literal("false").map(|()| false),
            _ => scanner.literal("null").map(|()| false),
        }
    }
}

/// The offset of the quote that closes the string which continues at `at`, and whether there is an escape before it; `None`
/// if the string does not end.
///
/// Looks at eight bytes at a time: for a byte `x`, `(x - 1) & !x & 0x80` is not 0 if `x` is 0. A borrow can set
/// further bits, but only above the first byte that is 0.
#[inline]
fn end_of_string(bytes: &[u8], mut at: usize) -> Option<(usize, bool)> {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGHS: u64 = u64::from_ne_bytes([0x80; 8]);
    const QUOTES: u64 = u64::from_ne_bytes([b'"'; 8]);
    const BACKSLASHES: u64 = u64::from_ne_bytes([b'\\'; 8]);
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
    let mut has_escapes = false;
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
            b'"' => return Some((at, has_escapes)),
            // The first byte after a backslash never ends the string.
            b'\\' => (at, has_escapes) = (at + 2, true),
            _ => at += 1,
        }
    }
}

/// The string that the bytes between two quotes stand for.
fn unescape(raw: &[u8], has_escapes: bool, at: usize) -> Result<Text<'_>, JsonError> {
    let error = JsonError { at, expected: "a string in UTF-8" };
    if !has_escapes {
        return std::str::from_utf8(raw).map(Text::from).map_err(|_| error);
    }
    let quoted = [b"\"", raw, b"\""].concat();
    serde_json::from_slice(&quoted).map(|text: String| Text(Cow::Owned(text))).map_err(|_| error)
}
