//! A JSON object whose values are strings, such as the labels of a pod.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::text::{IntoOwned, Text};

/// The pairs in the order of the JSON text. A pod has few labels, so a linear search is faster than building
/// a map.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Pairs<'a>(pub(crate) Vec<(Text<'a>, Text<'a>)>);

impl Pairs<'_> {
    /// The value of a key; the last value if the key occurs twice.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(name, _)| name.as_str() == key).map(|(_, value)| value.as_str())
    }
}

impl IntoOwned for Pairs<'_> {
    type Owned = Pairs<'static>;

    fn into_owned(self) -> Pairs<'static> {
        Pairs(self.0.into_iter().map(|(key, value)| (key.into_owned(), value.into_owned())).collect())
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Pairs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::with_capacity(8);
                while let Some(pair) = map.next_entry::<Text<'de>, Option<Text<'de>>>()? {
                    // Kubernetes decodes null as the empty string.
                    pairs.push((pair.0, pair.1.unwrap_or_default()));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}
