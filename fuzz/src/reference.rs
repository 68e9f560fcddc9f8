//! An AdmissionReview as `serde_json` reads it, which checks every byte.

use std::collections::HashSet;
use std::fmt;

use balancer_core::{Operation, Pod, Request, Text};
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// Valid JSON in which no object has a key twice and no key is written with escapes. JSON does not define what a
/// repeated key means, and the product compares keys as they are written.
pub struct Body(Value);

/// The body is not an AdmissionReview of version 1 with a request that can be answered.
#[derive(Debug)]
pub struct Invalid;

impl Body {
    /// `None` if the body is anything else.
    pub fn parse(body: &[u8]) -> Option<Self> {
        serde_json::from_slice::<Unambiguous>(body).ok()?;
        serde_json::from_slice(body).ok().map(Self)
    }

    /// The body as JSON.
    pub fn into_value(self) -> Value {
        self.0
    }

    /// The request, as far as the product reads it.
    pub fn request(&self) -> Result<Request<'_>, Invalid> {
        let review = object(Some(&self.0))?;
        let request = object(get(review, "request"))?;
        let resource = object(get(request, "resource"))?;
        let valid = Request {
            uid: text(get(request, "uid"))?.unwrap_or_default(),
            group: text(get(resource, "group"))?.unwrap_or_default(),
            resource: text(get(resource, "resource"))?.unwrap_or_default(),
            sub_resource: text(get(request, "subResource"))?.unwrap_or_default(),
            name: text(get(request, "name"))?,
            namespace: text(get(request, "namespace"))?,
            operation: match text(get(request, "operation"))?.as_deref() {
                Some("CREATE") => Operation::Create,
                Some("DELETE") => Operation::Delete,
                _ => Operation::Other,
            },
            object: pod(get(request, "object"))?,
            old_object: pod(get(request, "oldObject"))?,
            dry_run: match get(request, "dryRun") {
                None | Some(Value::Null) => false,
                Some(value) => value.as_bool().ok_or(Invalid)?,
            },
        };
        let kind = text(get(review, "kind"))?.is_some_and(|kind| kind.as_str() == "AdmissionReview");
        let version = text(get(review, "apiVersion"))?.is_some_and(|version| version.as_str() == "admission.k8s.io/v1");
        if kind && version && !valid.uid.is_empty() { Ok(valid) } else { Err(Invalid) }
    }
}

type Object = serde_json::Map<String, Value>;

fn get<'a>(object: Option<&'a Object>, key: &str) -> Option<&'a Value> {
    object?.get(key)
}

/// `null` means absent everywhere, as in Go's JSON.
fn object(value: Option<&Value>) -> Result<Option<&Object>, Invalid> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_object().map(Some).ok_or(Invalid),
    }
}

fn text(value: Option<&Value>) -> Result<Option<Text<'_>>, Invalid> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value.as_str().map(|text| Some(Text::from(text))).ok_or(Invalid),
    }
}

fn pod(value: Option<&Value>) -> Result<Option<Pod<'_>>, Invalid> {
    let pod = object(value)?;
    // serde also reads a struct from an array; the product requires an object.
    for part in ["metadata", "spec", "status"] {
        object(get(pod, part))?;
    }
    value.map_or(Ok(None), Option::deserialize).map_err(|_| Invalid)
}

/// Reads any JSON, and fails at an object that has a key twice or with escapes.
struct Unambiguous;

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Unambiguous {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut keys = HashSet::new();
        // A key that is written with escapes cannot be borrowed, and fails.
        while let Some((key, Self)) = map.next_entry::<&str, Self>()? {
            if !keys.insert(key) {
                return Err(A::Error::custom("a repeated key"));
            }
        }
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while let Some(Self) = items.next_element()? {}
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }
}
