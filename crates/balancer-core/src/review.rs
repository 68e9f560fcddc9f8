//! Decodes an AdmissionReview (`admission.k8s.io/v1`), as far as a placement needs it, borrowing from its bytes.

use crate::json::{JsonError, Scan, Scanner};
use crate::pod::Pod;
use crate::text::{Text, shorten};

/// A decoded AdmissionReview.
#[derive(Clone, Debug, PartialEq)]
pub struct Review<'a> {
    /// What the apiserver asks.
    pub request: Request<'a>,
}

/// `request` of an AdmissionReview. Absent, `null` and empty mean the same.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request<'a> {
    /// Identifies this call; every call has another one.
    pub uid: Text<'a>,
    /// API group of the object; empty for the core group.
    pub group: Text<'a>,
    /// Plural name of the object's resource, such as `pods`.
    pub resource: Text<'a>,
    /// Such as `eviction`; empty for the pod itself.
    pub sub_resource: Text<'a>,
    /// Absent for a `deletecollection`, and if the apiserver generates the name.
    pub name: Option<Text<'a>>,
    /// The namespace.
    pub namespace: Option<Text<'a>>,
    /// What is done to the object.
    pub operation: Operation,
    /// The new object; null on DELETE.
    pub object: Option<Pod<'a>>,
    /// The existing object; null on CREATE.
    pub old_object: Option<Pod<'a>>,
    /// Whether the request must not have side effects.
    pub dry_run: bool,
}

/// `request.operation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Operation {
    /// A pod is created.
    Create,
    /// A pod is deleted.
    Delete,
    /// A pod is updated, or connected to.
    #[default]
    Other,
}

/// Why bytes are not an AdmissionReview that can be answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// The body is not JSON, is incomplete, or is JSON of another shape.
    #[error("the body is not an AdmissionReview in JSON: {0}")]
    InvalidJson(#[from] JsonError),
    /// The body is an object of another kind or version.
    #[error(
        "the body's kind is {kind:?} and its apiVersion {api_version:?}; accepted: AdmissionReview and admission.k8s.io/v1"
    )]
    WrongKind {
        /// Its `kind`.
        kind: String,
        /// Its `apiVersion`.
        api_version: String,
    },
    /// The review has no request; it may be a response.
    #[error("the AdmissionReview has no request")]
    NoRequest,
    /// The request has no uid. A reply must contain it.
    #[error("the AdmissionReview's request has an empty uid")]
    NoUid,
}

impl<'a> Review<'a> {
    /// Decodes the body of an admission call.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ReviewError> {
        let mut scanner = Scanner::new(bytes);
        let (mut kind, mut api_version, mut request) = (Text::default(), Text::default(), None::<Request<'_>>);
        let present = scanner.members(|scanner, key, _| {
            match key {
                b"kind" => kind = Scan::scan(scanner)?,
                b"apiVersion" => api_version = Scan::scan(scanner)?,
                b"request" => request = Scan::scan(scanner)?,
                _ => scanner.skip()?,
            }
            Ok(())
        })?;
        scanner.finish()?;
        if !present || kind.as_str() != "AdmissionReview" || api_version.as_str() != "admission.k8s.io/v1" {
            return Err(ReviewError::WrongKind { kind: shorten(&kind), api_version: shorten(&api_version) });
        }
        let request = request.ok_or(ReviewError::NoRequest)?;
        if request.uid.is_empty() {
            return Err(ReviewError::NoUid);
        }
        Ok(Self { request })
    }

    /// The uid that the reply must contain.
    pub fn uid(&self) -> &str {
        &self.request.uid
    }

    /// Whether the request must not have side effects.
    pub fn is_dry_run(&self) -> bool {
        self.request.dry_run
    }
}

impl<'a> Request<'a> {
    /// Whether the object is a pod, and not another resource or a subresource of a pod.
    pub fn is_for_a_pod(&self) -> bool {
        self.group.is_empty() && self.resource.as_str() == "pods" && self.sub_resource.is_empty()
    }
}

impl<'a> Scan<'a> for Option<Request<'a>> {
    fn scan(scanner: &mut Scanner<'a>) -> Result<Self, JsonError> {
        let mut request = Request::default();
        let present = scanner.members(|scanner, key, _| {
            match key {
                b"uid" => request.uid = Scan::scan(scanner)?,
                b"resource" => {
                    scanner.members(|scanner, key, _| {
                        match key {
                            b"group" => request.group = Scan::scan(scanner)?,
                            b"resource" => request.resource = Scan::scan(scanner)?,
                            _ => scanner.skip()?,
                        }
                        Ok(())
                    })?;
                }
                b"subResource" => request.sub_resource = Scan::scan(scanner)?,
                b"name" => request.name = Scan::scan(scanner)?,
                b"namespace" => request.namespace = Scan::scan(scanner)?,
                b"operation" => {
                    request.operation = match Text::scan(scanner)?.as_str() {
                        "CREATE" => Operation::Create,
                        "DELETE" => Operation::Delete,
                        _ => Operation::Other,
                    }
                }
                b"object" => request.object = Scan::scan(scanner)?,
                b"oldObject" => request.old_object = Scan::scan(scanner)?,
                b"dryRun" => request.dry_run = Scan::scan(scanner)?,
                _ => scanner.skip()?,
            }
            Ok(())
        })?;
        Ok(present.then_some(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;
    use serde_json::{Value, json};

    const REVIEW: &[u8] = include_bytes!("../../../tests/fixtures/k8s-1.36-spark-3.5-create-executor.json");

    /// The same pod as `serde_json` decodes it.
    fn by_serde(review: &Value) -> Option<Pod<'_>> {
        Deserialize::deserialize(&review["request"]["object"]).unwrap()
    }

    /// Any JSON, to be put at places that the scanner skips.
    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[\\\"{}\\[\\],:a-z\u{0}-\u{1f}é🍕]{0,24}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 48, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map("[\\\"{}a-z:]{0,12}", inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// A list of small objects, such as owners and tolerations: with some of these keys and others, and with nulls.
    fn list(keys: &'static [&'static str]) -> impl Strategy<Value = Value> {
        let text = "[\\\"{}\\[\\],a-zé\u{0}-\u{1f}]{0,12}";
        let value = prop_oneof![4 => text.prop_map(Value::from), 1 => Just(Value::Null)];
        let fields = prop::collection::btree_map(prop::sample::select(keys), value, 0..5);
        let controller = prop_oneof![any::<bool>().prop_map(Value::from), Just(Value::Null)];
        let object = (fields, prop::option::of(controller), prop::option::of(any_json())).prop_map(
            |(fields, controller, other)| {
                let mut object = json!(fields);
                controller.into_iter().for_each(|controller| object["controller"] = controller);
                other.into_iter().for_each(|other| object["other"] = other);
                object
            },
        );
        let element = prop_oneof![5 => object, 1 => Just(Value::Null)];
        prop_oneof![5 => prop::collection::vec(element, 0..4).prop_map(Value::from), 1 => Just(Value::Null)]
    }

    proptest! {
        #[test]
        fn scanning_a_review_returns_what_serde_returns(
            noise in any_json(), label in "[\\\"a-z/é]{0,12}", value in "[\\\"{}a-z\u{0}-\u{1f}é]{0,12}", pretty: bool,
            owners in list(&["apiVersion", "kind", "name", "uid"]),
            tolerations in list(&["key", "operator", "value", "effect", "tolerationSeconds"]),
            conditions in list(&["type", "status", "reason", "message"]),
        ) {
            let mut review: Value = serde_json::from_slice(REVIEW).unwrap();
            let object = &mut review["request"]["object"];
            object["metadata"]["managedFields"] = noise.clone();
            object["metadata"]["labels"][&label] = value.clone().into();
            object["metadata"]["annotations"][&value] = label.clone().into();
            object["spec"]["containers"] = noise.clone();
            object["spec"]["nodeSelector"][&label] = value.into();
            object["metadata"]["ownerReferences"] = owners;
            object["spec"]["tolerations"] = tolerations;
            object["status"] = if pretty {
                Value::Null
            } else {
                json!({"phase": label, "hostIPs": noise, "conditions": conditions})
            };
            review["request"]["options"] = noise;
            let bytes = if pretty { serde_json::to_vec_pretty(&review) } else { serde_json::to_vec(&review) }.unwrap();
            let scanned = Review::decode(&bytes).unwrap();
            prop_assert_eq!(scanned.request.object, by_serde(&review));
        }
    }

    #[test]
    fn a_required_affinity_is_read_and_an_invalid_one_reported() {
        let with = |affinity: &str| {
            let review: Value = serde_json::from_slice(REVIEW).unwrap();
            let mut review = review;
            review["request"]["object"]["spec"]["affinity"] = serde_json::from_str(affinity).unwrap();
            serde_json::to_vec(&review).unwrap()
        };
        let right =
            with(r#"{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[]}}}"#);
        let pod = Review::decode(&right).unwrap().request.object.unwrap();
        assert!(pod.spec.unwrap().required_terms().is_some());
        let error = Review::decode(&with(r#"{"nodeAffinity":7}"#)).unwrap_err();
        assert!(error.to_string().contains("expected an affinity at byte"), "{error}");
    }
}
