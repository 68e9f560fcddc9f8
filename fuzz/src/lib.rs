//! What must hold for any request body. Each check panics if it does not.

mod reference;

use balancer_core::{Action, Capacity, Conventions, Reply, Review, SpotPreference};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use reference::{Body, Invalid};

/// Decoding agrees with `serde_json`: the same fields if the body is a valid AdmissionReview, an error if it is valid
/// JSON of another shape. A body that is not valid JSON may be accepted, because fields that placing does not need are
/// skipped without checking them; it must not panic.
pub fn check_decoding(body: &[u8]) {
    let decoded = Review::decode(body);
    let Some(body) = Body::parse(body) else { return };
    match body.request() {
        Ok(request) => assert_eq!(decoded.expect("a valid AdmissionReview").request, request),
        Err(Invalid) => assert!(decoded.is_err(), "accepted an invalid AdmissionReview: {decoded:?}"),
    }
}

/// Every body that decodes gets a reply that is valid JSON, allows the request, echoes its uid, and whose patch applies
/// to the pod. Applying it twice changes nothing more, because an apiserver may invoke a webhook again.
pub fn check_reply(body: &[u8]) {
    let Ok(review) = Review::decode(body) else { return };
    for spot_preference in [SpotPreference::Strict, SpotPreference::BestEffort] {
        let conventions = Conventions { spot_preference, ..Conventions::default() };
        for capacity in [Capacity::Spot, Capacity::OnDemand] {
            let mut reply = Reply::allow(review.uid());
            if let Action::Place(executor) = Action::of(&review, &conventions) {
                reply.patch = conventions.patch(&executor, capacity);
                reply.warnings = executor.invalid.iter().map(ToString::to_string).collect();
            }
            let encoded: Value = serde_json::from_slice(&reply.encode()).expect("the reply is not JSON");
            assert_eq!(encoded["kind"], "AdmissionReview");
            assert_eq!(encoded["response"]["uid"], review.uid());
            assert_eq!(encoded["response"]["allowed"], true);
            let Some(patch) = encoded["response"].get("patch") else { continue };
            assert_eq!(encoded["response"]["patchType"], "JSONPatch");
            let patch =
                STANDARD.decode(patch.as_str().expect("the patch is not text")).expect("the patch is not base64");
            let patch: json_patch::Patch = serde_json::from_slice(&patch).expect("the patch is not a JSON Patch");
            let Some(body) = Body::parse(body) else { continue };
            let Some(pod) = body.into_value().pointer_mut("/request/object").map(Value::take) else { continue };
            let mut patched = pod.clone();
            json_patch::patch(&mut patched, &patch).expect("the patch does not apply to the pod");
            check_kept(&pod, &patched);
        }
    }
}

/// Whatever the pod had is still there, except for the two maps whose entries the patch may set.
fn check_kept(before: &Value, after: &Value) {
    let without = |pod: &Value| {
        let mut pod = pod.clone();
        for (parent, field) in [("metadata", "annotations"), ("spec", "nodeSelector")] {
            if let Some(parent) = pod.get_mut(parent).and_then(Value::as_object_mut) {
                parent.shift_remove(field);
            }
        }
        if pod["spec"].as_object().is_none_or(|spec| spec.is_empty()) {
            pod["spec"] = Value::Null;
        }
        pod
    };
    assert_eq!(without(before), without(after));
    for path in ["/metadata/annotations", "/spec/nodeSelector"] {
        let (before, after) = (before.pointer(path), after.pointer(path));
        for key in before.and_then(Value::as_object).into_iter().flat_map(|map| map.keys()) {
            assert!(after.is_some_and(|after| after.get(key).is_some()), "{path} lost {key:?}");
        }
    }
}
