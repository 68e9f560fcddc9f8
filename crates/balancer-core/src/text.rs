//! Strings that borrow from the bytes of a review if they can.

use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, Visitor};

/// A string that borrows from the input unless the input contains escapes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Text<'a>(pub Cow<'a, str>);

impl Text<'_> {
    /// The string.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for Text<'_> {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

/// Conversion into a value that borrows nothing.
pub(crate) trait IntoOwned {
    /// The same type with the lifetime `'static`.
    type Owned;
    /// Clones what is borrowed.
    fn into_owned(self) -> Self::Owned;
}

impl IntoOwned for Text<'_> {
    type Owned = Text<'static>;

    fn into_owned(self) -> Text<'static> {
        Text(Cow::Owned(self.0.into_owned()))
    }
}

/// For types that borrow nothing.
macro_rules! owns_itself {
    ($($type:ty),*) => {$(
        impl IntoOwned for $type {
            type Owned = Self;

            fn into_owned(self) -> Self {
                self
            }
        }
    )*};
}

owns_itself!(bool, i32, IgnoredAny);

impl<T: IntoOwned> IntoOwned for Option<T> {
    type Owned = Option<T::Owned>;

    fn into_owned(self) -> Self::Owned {
        self.map(T::into_owned)
    }
}

impl<T: IntoOwned> IntoOwned for Vec<T> {
    type Owned = Vec<T::Owned>;

    fn into_owned(self) -> Self::Owned {
        self.into_iter().map(T::into_owned).collect()
    }
}

impl<'a> From<&'a str> for Text<'a> {
    fn from(text: &'a str) -> Self {
        Self(Cow::Borrowed(text))
    }
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrow;
        impl<'de> Visitor<'de> for Borrow {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Borrow)
    }
}

/// Appends a value in JSON.
pub(crate) fn push_json(bytes: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) {
    // Serializing what serde derives into memory cannot fail.
    let written = serde_json::to_writer(bytes, value);
    debug_assert!(written.is_ok());
}

/// Appends a string in JSON.
pub(crate) fn push_json_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.push(b'"');
    push_json_chars(bytes, text);
    bytes.push(b'"');
}

/// Appends what is between the quotes of a string in JSON. Most strings need no escapes, and are copied.
pub(crate) fn push_json_chars(bytes: &mut Vec<u8>, text: &str) {
    // Without an early end, so that many bytes are checked at once.
    if !text.bytes().fold(false, |any, byte| any | (byte < b' ') | (byte == b'"') | (byte == b'\\')) {
        return bytes.extend_from_slice(text.as_bytes());
    }
    let quoted = serde_json::to_string(text).unwrap_or_default();
    let chars = quoted.strip_prefix('"').and_then(|quoted| quoted.strip_suffix('"'));
    bytes.extend_from_slice(chars.unwrap_or_default().as_bytes());
}

/// The beginning of a value, for error messages: an annotation can have 256 KiB.
pub(crate) fn shorten(text: &str) -> String {
    shorten_to(text, 64)
}

/// The first characters of a text.
pub(crate) fn shorten_to(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}
