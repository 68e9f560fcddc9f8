//! AdmissionReviews as real apiservers sent them, others made of them, and what every answer has to be.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use k8s_openapi::ByteString;
use serde_json::Value;

use crate::endpoint::Answer;
use crate::pods::JOB_ID_LABEL;

/// A review of `tests/fixtures`, by its file's name without `.json`.
pub fn fixture(name: &str) -> Result<Value> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(format!("{name}.json"));
    let text = std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    Ok(serde_json::from_str(&text)?)
}

/// The creation of executor `id` of a job in namespace `sandbox`, which carries all that a real one
/// carries.
pub fn creation(job: &str, id: u64) -> Result<Value> {
    static REAL: OnceLock<Value> = OnceLock::new();
    let real = match REAL.get() {
        Some(real) => real,
        None => {
            let read = fixture("k8s-1.36-spark-3.5-create-executor")?;
            REAL.get_or_init(|| read)
        }
    };
    let mut review = real.clone();
    let request = &mut review["request"];
    request["uid"] = format!("{job}-{id}").into();
    request["name"] = format!("{job}-exec-{id}").into();
    request["object"]["metadata"]["name"] = format!("{job}-exec-{id}").into();
    request["object"]["metadata"]["labels"][JOB_ID_LABEL] = job.into();
    request["object"]["metadata"]["labels"]["spark-exec-id"] = id.to_string().into();
    Ok(review)
}

/// Fails unless the answer is the one that a review has to have: its uid, `allowed`, and a patch, if
/// any, that only adds. Answers the steps of the patch.
pub fn patch(review: &Value, answer: &Answer) -> Result<Vec<Value>> {
    ensure!(answer.status == 200, "status {}: {}", answer.status, answer.text);
    let kind = answer.headers.get("content-type").context("no Content-Type")?;
    ensure!(kind == "application/json", "Content-Type: {kind:?}");
    let envelope = answer.json()?;
    ensure!(envelope["apiVersion"] == "admission.k8s.io/v1" && envelope["kind"] == "AdmissionReview", "{envelope}");
    let response = &envelope["response"];
    ensure!(response["uid"] == review["request"]["uid"], "another uid: {response}");
    ensure!(response["allowed"] == true, "not allowed: {response}");
    if response["patch"].is_null() {
        return Ok(Vec::new());
    }
    ensure!(response["patchType"] == "JSONPatch", "{response}");
    let ByteString(patch) = serde_json::from_value(response["patch"].clone()).context("the patch is not base64")?;
    let patch: Vec<Value> = serde_json::from_slice(&patch).context("the patch is not a JSON Patch")?;
    ensure!(patch.iter().all(|step| step["op"] == "add"), "it does more than add: {patch:?}");
    Ok(patch)
}

/// The review's object with the patch applied to it, as the apiserver does.
pub fn patched(review: &Value, patch: &[Value]) -> Result<Value> {
    let mut object = review["request"]["object"].clone();
    json_patch::patch(&mut object, &serde_json::from_value::<json_patch::Patch>(patch.into())?)?;
    Ok(object)
}
