//! What must hold for any request body. Each check panics if it does not.

mod reference;

use balancer_core::{Action, Capacity, Conventions, Reply, Review, SpotPreference, Spread};
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
    let steered =
        Spread { max_executors_per_node: Some(2), avoid: vec!["m5.large".to_owned(), "r5.xlarge".to_owned()] };
    for (spot_preference, spread) in [
        (SpotPreference::Strict, &Spread::default()),
        (SpotPreference::Strict, &steered),
        (SpotPreference::BestEffort, &Spread::default()),
        (SpotPreference::BestEffort, &steered),
    ] {
        let conventions = Conventions { spot_preference, ..Conventions::default() };
        for capacity in [Capacity::Spot, Capacity::OnDemand] {
            let Some(patch) = reply_to(body, capacity, &conventions, spread) else { continue };
            let Some(body) = Body::parse(body) else { continue };
            let mut review = body.into_value();
            let pod = &mut review["request"]["object"];
            let before = pod.clone();
            json_patch::patch(pod, &patch).expect("the patch does not apply to the pod");
            check_kept(&before, pod);
            let after = pod.clone();
            if let Some(patch) = reply_to(review.to_string().as_bytes(), capacity, &conventions, spread) {
                let pod = &mut review["request"]["object"];
                json_patch::patch(pod, &patch).expect("the second patch does not apply to the pod");
                assert_eq!(after, *pod, "the second reply changes the pod again");
            }
        }
    }
}

/// Checks the reply to a body, if the body decodes, and returns its patch, if it has one.
fn reply_to(body: &[u8], capacity: Capacity, conventions: &Conventions, spread: &Spread) -> Option<json_patch::Patch> {
    let review = Review::decode(body).ok()?;
    let mut reply = Reply::allow(review.uid());
    if let Action::Place(executor) = Action::of(&review, conventions) {
        let capacity = executor.required.unwrap_or(capacity);
        reply.patch = conventions.profile().apply(executor.pod, capacity, executor.placeholder, spread);
        reply.warnings = executor.invalid.iter().map(ToString::to_string).collect();
    }
    let is_patched = !reply.patch.is_empty();
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

/// Whatever the pod had is still there, and the patch adds only what chooses a node and annotations. A pod that has a
/// decision already may lose what Spot Balancer added for it.
fn check_kept(before: &Value, after: &Value) {
    let chosen = [
        &["metadata", "annotations"][..],
        &["spec", "nodeSelector"],
        &["spec", "tolerations"],
        &["spec", "affinity", "nodeAffinity"],
        &["spec", "topologySpreadConstraints"],
    ];
    let without_chosen = |pod: &Value| {
        let mut pod = pod.clone();
        chosen.iter().for_each(|path| remove(&mut pod, path));
        pod
    };
    assert_eq!(without_chosen(before), without_chosen(after));
    if before["metadata"]["annotations"].get("workload/capacity-type").is_none() {
        assert!(is_kept(before, after), "the patch takes something from {before}: {after}");
    }
}

/// Removes what is at the path, and the objects of the path that are empty without it.
fn remove(value: &mut Value, path: &[&str]) {
    let [key, rest @ ..] = path else { return };
    let Some(object) = value.as_object_mut() else { return };
    if let Some(child) = object.get_mut(*key) {
        remove(child, rest);
        if rest.is_empty() || child.is_null() || child.as_object().is_some_and(|child| child.is_empty()) {
            object.shift_remove(*key);
        }
    }
}

/// Whether `after` has all of `before`. A list may have more elements at its end. An annotation or a selector may have
/// another value.
fn is_kept(before: &Value, after: &Value) -> bool {
    match (before, after) {
        (Value::Object(before), Value::Object(after)) => {
            before.iter().all(|(key, value)| after.get(key).is_some_and(|after| is_kept(value, after)))
        }
        (Value::Array(before), Value::Array(after)) => {
            before.len() <= after.len() && before.iter().zip(after).all(|(before, after)| is_kept(before, after))
        }
        (Value::Null, _) | (Value::String(_), Value::String(_)) => true,
        _ => before == after,
    }
}
