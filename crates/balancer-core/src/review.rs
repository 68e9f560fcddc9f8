//! Reads an AdmissionReview (`admission.k8s.io/v1`) as far as placing needs it, borrowing from the
//! bytes; four fifths of an executor's review are never looked at.

use crate::pod::{Metadata, Pod, PodSpec};
use crate::skim::{SkimError, Skimmer};
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
    /// Names this call; another one in every call.
    pub uid: Text<'a>,
    /// Group of what is admitted; empty for Kubernetes' own core.
    pub group: Text<'a>,
    /// Plural of what is admitted, such as `pods`.
    pub resource: Text<'a>,
    /// Such as `eviction`; empty for the pod itself.
    pub sub_resource: Text<'a>,
    /// Absent for a `deletecollection` and for names that the apiserver makes.
    pub name: Option<Text<'a>>,
    /// The namespace.
    pub namespace: Option<Text<'a>>,
    /// What is done.
    pub operation: Operation,
    /// The new object; null on DELETE.
    pub object: Option<Pod<'a>>,
    /// The existing object; null on CREATE.
    pub old_object: Option<Pod<'a>>,
    /// Whether nothing may be written.
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

/// Why bytes are not an AdmissionReview that we can answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// Not JSON, or cut off, or JSON of another shape.
    #[error("the body is not an AdmissionReview in JSON: {0}")]
    Unreadable(#[from] SkimError),
    /// Another kind or version.
    #[error(
        "the body's kind is {kind:?} and its apiVersion {api_version:?}; accepted: AdmissionReview and admission.k8s.io/v1"
    )]
    WrongKind {
        /// Its `kind`.
        kind: String,
        /// Its `apiVersion`.
        api_version: String,
    },
    /// A review that carries no request, such as a response.
    #[error("the AdmissionReview has no request")]
    NoRequest,
    /// A request that cannot be answered, since a reply echoes the uid.
    #[error("the AdmissionReview's request has an empty uid")]
    NoUid,
}

impl<'a> Review<'a> {
    /// Decodes the body of an admission call.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, ReviewError> {
        let mut skimmer = Skimmer::new(bytes);
        let (mut kind, mut api_version, mut request) = (Text::default(), Text::default(), None);
        let present = skimmer.members(|at, key| {
            match key {
                b"kind" => kind = at.text()?.unwrap_or_default(),
                b"apiVersion" => api_version = at.text()?.unwrap_or_default(),
                b"request" => request = Request::skim(at)?,
                _ => at.pass()?,
            }
            Ok(())
        })?;
        skimmer.finish()?;
        if !present || kind.as_str() != "AdmissionReview" || api_version.as_str() != "admission.k8s.io/v1" {
            return Err(ReviewError::WrongKind { kind: shorten(&kind), api_version: shorten(&api_version) });
        }
        let request = request.ok_or(ReviewError::NoRequest)?;
        if request.uid.is_empty() {
            return Err(ReviewError::NoUid);
        }
        Ok(Self { request })
    }

    /// The uid that the reply must echo.
    pub fn uid(&self) -> &str {
        &self.request.uid
    }

    /// Whether nothing may be written.
    pub fn is_dry_run(&self) -> bool {
        self.request.dry_run
    }
}

impl<'a> Request<'a> {
    /// Whether a pod itself is admitted, and not another kind or a part of a pod.
    pub fn is_for_a_pod(&self) -> bool {
        self.group.is_empty() && self.resource.as_str() == "pods" && self.sub_resource.is_empty()
    }

    fn skim(at: &mut Skimmer<'a>) -> Result<Option<Self>, SkimError> {
        let mut request = Self::default();
        let present = at.members(|at, key| {
            match key {
                b"uid" => request.uid = at.text()?.unwrap_or_default(),
                b"resource" => {
                    at.members(|at, key| {
                        match key {
                            b"group" => request.group = at.text()?.unwrap_or_default(),
                            b"resource" => request.resource = at.text()?.unwrap_or_default(),
                            _ => at.pass()?,
                        }
                        Ok(())
                    })?;
                }
                b"subResource" => request.sub_resource = at.text()?.unwrap_or_default(),
                b"name" => request.name = at.text()?,
                b"namespace" => request.namespace = at.text()?,
                b"operation" => {
                    request.operation = match at.text()?.as_deref() {
                        Some("CREATE") => Operation::Create,
                        Some("DELETE") => Operation::Delete,
                        _ => Operation::Other,
                    }
                }
                b"object" => request.object = Pod::skim(at)?,
                b"oldObject" => request.old_object = Pod::skim(at)?,
                b"dryRun" => request.dry_run = at.boolean()?.unwrap_or_default(),
                _ => at.pass()?,
            }
            Ok(())
        })?;
        Ok(present.then_some(request))
    }
}

/// The parts of a pod that its admission needs: its status is no part of that.
impl<'a> Pod<'a> {
    fn skim(at: &mut Skimmer<'a>) -> Result<Option<Self>, SkimError> {
        let mut pod = Self::default();
        let present = at.members(|at, key| {
            match key {
                b"metadata" => pod.metadata = Metadata::skim(at)?,
                b"spec" => pod.spec = PodSpec::skim(at)?,
                _ => at.pass()?,
            }
            Ok(())
        })?;
        Ok(present.then_some(pod))
    }
}

impl<'a> Metadata<'a> {
    fn skim(at: &mut Skimmer<'a>) -> Result<Self, SkimError> {
        let mut metadata = Self::default();
        at.members(|at, key| {
            match key {
                b"name" => metadata.name = at.text()?,
                b"generateName" => metadata.generate_name = at.text()?,
                b"namespace" => metadata.namespace = at.text()?,
                b"uid" => metadata.uid = at.text()?,
                b"resourceVersion" => metadata.resource_version = at.text()?,
                b"creationTimestamp" => metadata.creation_timestamp = at.text()?,
                b"deletionTimestamp" => metadata.deletion_timestamp = at.text()?,
                b"labels" => metadata.labels = at.pairs()?,
                b"annotations" => metadata.annotations = at.pairs()?,
                _ => at.pass()?,
            }
            Ok(())
        })?;
        Ok(metadata)
    }
}

impl<'a> PodSpec<'a> {
    fn skim(at: &mut Skimmer<'a>) -> Result<Option<Self>, SkimError> {
        let mut spec = Self::default();
        let present = at.members(|at, key| {
            match key {
                b"nodeName" => spec.node_name = at.text()?,
                b"nodeSelector" => spec.node_selector = at.pairs()?,
                b"affinity" => spec.affinity = at.typed("an affinity")?,
                _ => at.pass()?,
            }
            Ok(())
        })?;
        Ok(present.then_some(spec))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    const REVIEW: &[u8] = include_bytes!("../../../tests/fixtures/k8s-1.36-spark-3.5-create-executor.json");

    /// What `serde_json`, which checks every byte, reads of the same pod.
    fn by_serde(review: &Value) -> Option<Pod<'_>> {
        let mut pod = Option::<Pod<'_>>::deserialize(&review["request"]["object"]).unwrap();
        if let Some(pod) = &mut pod {
            pod.status = None;
        }
        pod
    }

    use serde::Deserialize;

    /// Any JSON, to be put where a pod has things that are passed over.
    fn json() -> impl Strategy<Value = Value> {
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

    proptest! {
        #[test]
        fn a_review_is_skimmed_as_serde_reads_it_whatever_else_is_in_it(
            noise in json(), label in "[\\\"a-z/é]{0,12}", value in "[\\\"{}a-z\u{0}-\u{1f}é]{0,12}", pretty: bool,
        ) {
            let mut review: Value = serde_json::from_slice(REVIEW).unwrap();
            let object = &mut review["request"]["object"];
            object["metadata"]["managedFields"] = noise.clone();
            object["metadata"]["labels"][&label] = value.clone().into();
            object["metadata"]["annotations"][&value] = label.clone().into();
            object["spec"]["containers"] = noise.clone();
            object["spec"]["nodeSelector"][label] = value.into();
            object["status"] = Value::Null;
            review["request"]["options"] = noise;
            let bytes = if pretty { serde_json::to_vec_pretty(&review) } else { serde_json::to_vec(&review) }.unwrap();
            let skimmed = Review::decode(&bytes).unwrap();
            prop_assert_eq!(skimmed.request.object, by_serde(&review));
        }
    }

    #[test]
    fn a_required_affinity_is_read_and_a_wrong_one_told() {
        let with = |affinity: &str| {
            let review: Value = serde_json::from_slice(REVIEW).unwrap();
            let mut review = review;
            review["request"]["object"]["spec"]["affinity"] = serde_json::from_str(affinity).unwrap();
            serde_json::to_vec(&review).unwrap()
        };
        let right =
            with(r#"{"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[]}}}"#);
        let pod = Review::decode(&right).unwrap().request.object.unwrap();
        assert!(pod.spec.unwrap().affinity.unwrap().required().is_some());
        let error = Review::decode(&with(r#"{"nodeAffinity":7}"#)).unwrap_err();
        assert!(error.to_string().contains("expected an affinity at byte"), "{error}");
    }
}
