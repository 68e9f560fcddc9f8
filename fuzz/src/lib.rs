//! What must hold for any request body. Each check panics if it does not.

mod reference;

use balancer_core::{Action, Capacity, Conventions, Patch, Reply, Review, SpotPreference};
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
/// to the pod and keeps what the pod has. If the apiserver asks again with the patched pod, nothing more changes.
pub fn check_reply(body: &[u8]) {
    for spot_preference in [SpotPreference::Strict, SpotPreference::BestEffort] {
        let conventions = Conventions { spot_preference, ..Conventions::default() };
        for capacity in [Capacity::Spot, Capacity::OnDemand] {
            let Some(patch) = reply_to(body, capacity, &conventions) else { continue };
            let Some(body) = Body::parse(body) else { continue };
            let mut review = body.into_value();
            let pod = &mut review["request"]["object"];
            let before = pod.clone();
            json_patch::patch(pod, &patch).expect("the patch does not apply to the pod");
            check_kept(&before, pod);
            let after = pod.clone();
            if let Some(patch) = reply_to(review.to_string().as_bytes(), capacity, &conventions) {
                let pod = &mut review["request"]["object"];
                json_patch::patch(pod, &patch).expect("the second patch does not apply to the pod");
                assert_eq!(after, *pod, "the second reply changes the pod again");
            }
        }
    }
}

/// Checks the reply to a body, if the body decodes, and returns its patch, if it has one.
fn reply_to(body: &[u8], capacity: Capacity, conventions: &Conventions) -> Option<json_patch::Patch> {
    let review = Review::decode(body).ok()?;
    let mut reply = Reply::allow(review.uid());
    if let Action::Place(executor) = Action::of(&review, conventions) {
        let capacity = executor.required.unwrap_or(capacity);
        reply.patch = conventions.profile().apply(executor.pod, capacity, executor.placeholder);
        reply.warnings = executor.invalid.iter().map(ToString::to_string).collect();
    }
    let is_patched = reply.patch != Patch::default();
    let encoded: Value = serde_json::from_slice(&reply.encode()).expect("the reply is not JSON");
    assert_eq!((&encoded["apiVersion"], &encoded["kind"]), (&"admission.k8s.io/v1".into(), &"AdmissionReview".into()));
    let response = &encoded["response"];
    assert_eq!((&response["uid"], &response["allowed"]), (&review.uid().into(), &true.into()));
    assert_eq!(response["warnings"].as_array().map_or(0, Vec::len), reply.warnings.len());
    assert_eq!(response.get("patch").is_some(), is_patched);
    let patch = STANDARD.decode(response.get("patch")?.as_str()?).expect("the patch is not base64");
    assert_eq!(response["patchType"], "JSONPatch");
    Some(serde_json::from_slice(&patch).expect("the patch is not a JSON Patch"))
}

/// Whatever the pod had is still there, except for the two maps whose entries the patch may set.
fn check_kept(before: &Value, after: &Value) {
    let maps = [("metadata", "annotations"), ("spec", "nodeSelector")];
    let without_maps = |pod: &Value| {
        let mut pod = pod.clone();
        for (parent, map) in maps {
            if let Some(parent) = pod[parent].as_object_mut() {
                parent.shift_remove(map);
            }
        }
        // The patch adds a spec if there is none.
        if pod["spec"].as_object().is_none_or(|spec| spec.is_empty()) {
            pod["spec"] = Value::Null;
        }
        pod
    };
    assert_eq!(without_maps(before), without_maps(after));
    for (parent, map) in maps {
        let had = before[parent][map].as_object();
        for key in had.into_iter().flat_map(|map| map.keys()) {
            assert!(after[parent][map].get(key).is_some(), "{parent}.{map} lost {key:?}");
        }
    }
}
