//! The rights that the chart gives: all that the programs need, and nothing more.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::{ControlPlane, Options};
use balancer_tests::deployed::{
    JOBS, RECONCILER, WEBHOOK, as_deployed, cluster, deployment, environment, in_sandbox, review_paths,
};
use balancer_tests::endpoint;
use balancer_tests::helm::RELEASE;
use balancer_tests::reconciler::Reconciler;
use balancer_tests::redis::RedisServer;
use balancer_tests::release::Release;
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::webhook::Webhook;
use balancer_tests::{need, nodes, pods, reviews};
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};

/// One verb of one rule of an installed role.
#[derive(Debug, Clone)]
struct Allowed {
    /// ClusterRole or Role.
    kind: &'static str,
    role: String,
    rule: usize,
    verb: String,
    resource: String,
}

fn role_path(kind: &str, name: &str) -> String {
    let group = "/apis/rbac.authorization.k8s.io/v1";
    match kind {
        "Role" => format!("{group}/namespaces/{RELEASE}/roles/{name}"),
        _ => format!("{group}/clusterroles/{name}"),
    }
}

/// All that the installed roles allow.
async fn all_that_is_allowed(client: &Client) -> Result<Vec<Allowed>> {
    let mut all = Vec::new();
    for kind in ["ClusterRole", "Role"] {
        let list = endpoint::get(client, role_path(kind, "").trim_end_matches('/')).await?.json()?;
        for role in list["items"].as_array().context("no items")? {
            let name = role["metadata"]["name"].as_str().unwrap_or_default();
            if !name.starts_with(RELEASE) {
                continue;
            }
            for (number, rule) in role["rules"].as_array().into_iter().flatten().enumerate() {
                for verb in rule["verbs"].as_array().into_iter().flatten() {
                    all.push(Allowed {
                        kind,
                        role: name.to_owned(),
                        rule: number,
                        verb: verb.as_str().unwrap_or_default().to_owned(),
                        resource: rule["resources"][0].as_str().unwrap_or_default().to_owned(),
                    });
                }
            }
        }
    }
    Ok(all)
}

/// Writes a role's rules; the apiserver follows them soon.
async fn write_rules(client: &Client, allowed: &Allowed, rules: &Value) -> Result<()> {
    let body = serde_json::to_vec(&json!({"rules": rules}))?;
    let request = http::Request::patch(role_path(allowed.kind, &allowed.role))
        .header("content-type", "application/merge-patch+json")
        .body(body)?;
    client.request::<Value>(request).await?;
    Ok(())
}

/// Waits until this account is allowed, or is not, what a rule allows.
async fn until_followed(client: &Client, account: &str, allowed: &Allowed, rule: &Value, is: bool) -> Result<()> {
    let namespace = match (allowed.kind, allowed.resource.as_str()) {
        ("Role", _) => Some(RELEASE),
        (_, "nodes") => None,
        _ => Some(JOBS),
    };
    let review: SubjectAccessReview = serde_json::from_value(json!({"spec": {
        "user": format!("system:serviceaccount:{RELEASE}:{account}"),
        "resourceAttributes": {
            "group": rule["apiGroups"][0], "resource": allowed.resource, "verb": allowed.verb,
            "namespace": namespace, "name": rule["resourceNames"][0],
        },
    }}))?;
    let reviews = Api::<SubjectAccessReview>::all(client.clone());
    until_true(SOON, &format!("{allowed:?} to be {is}"), async || {
        let answer = reviews.create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed == is))
    })
    .await
}

/// Runs a program as deployed, does what makes it use its rights, and waits until its log has `wanted`, or
/// until it has used all of them.
async fn use_all_rights(plane: &ControlPlane, account: &str, redis: &RedisServer, wanted: Option<&str>) -> Result<()> {
    let client = plane.client()?;
    let pods = Api::<Pod>::namespaced(client.clone(), JOBS);
    let says = |log: String| wanted.is_some_and(|wanted| log.replace('\\', "").contains(wanted));
    let ensure_silent = |log: String| {
        ensure!(wanted.is_none(), "{account} does without: {wanted:?}\n{log}");
        ensure!(!log.contains("forbidden"), "{log}");
        Ok(())
    };
    redis.flush().await?;
    let reconciles =
        environment(&deployment(&client, account).await?).get("RECONCILE_ENABLED").is_none_or(|is| is == "true");
    if !reconciles {
        let webhook = Webhook::start(as_deployed(plane, WEBHOOK, "/balancer-webhook", redis).await?).await?;
        let [path, _] = review_paths(&client).await?;
        // The driver of one is listed. The other one has no driver, so the pod that owns it is read.
        for job in ["etl", "orphan"] {
            let review = reviews::creation(job, 1)?;
            ensure!(review["request"]["object"]["metadata"]["ownerReferences"][0]["kind"] == "Pod", "{review}");
            reviews::patch(&review, &endpoint::post(&webhook.client()?, &path, &review).await?)?;
        }
        let log = until(SOON, "the lines of the placements", async || {
            let both = |log: &String| log.contains("etl-exec-1") && log.contains("orphan-exec-1");
            Ok(Some(webhook.process().log()?).filter(both))
        })
        .await?;
        return if says(log.clone()) { Ok(()) } else { ensure_silent(log) };
    }
    let leases = Api::<Lease>::namespaced(client.clone(), RELEASE);
    if leases.get_opt(RECONCILER).await?.is_some() {
        leases.delete(RECONCILER, &DeleteParams::default()).await?;
    }
    let events = Api::<Event>::namespaced(client.clone(), JOBS);
    events.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    // A pod that cannot be looked up is logged at DEBUG.
    let as_deployed = async |name: &str, command: &str| {
        Ok::<_, anyhow::Error>(as_deployed(plane, name, command, redis).await?.env("LOG_LEVEL", "DEBUG"))
    };
    let webhook = Webhook::begin(as_deployed(WEBHOOK, "/balancer-webhook").await?)?;
    let reconciler = match account {
        RECONCILER => Some(Reconciler::begin(as_deployed(RECONCILER, "/balancer-reconcile").await?)?),
        _ => None,
    };
    let running: &Release = reconciler.as_deref().unwrap_or(&webhook);
    let (direct, [path, _]) = (webhook.client()?, review_paths(&client).await?);
    let mut ids = 1..;
    // A driver's ratio that becomes wrong is told by an Event.
    let mut edits = ["0.5", "much"].iter().cycle();
    until_true(SOON, &format!("{account} to use its rights ({wanted:?})"), async || {
        let edit = edits.next().copied();
        pods::annotate(&pods, "etl-driver", "workload/spot-ratio", edit).await?;
        // A placement whose pod never appears is looked up. The webhook may not serve yet.
        let placement = reviews::creation("etl", ids.next().unwrap_or_default())?;
        let _ = endpoint::post(&direct, &path, &placement).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        if says(running.process().log()?) {
            return Ok(true);
        }
        let told = !events.list(&ListParams::default()).await?.items.is_empty();
        Ok(wanted.is_none() && told && running.is_ready().await?)
    })
    .await
    .with_context(|| running.process().log().unwrap_or_default())?;
    if wanted.is_none() { ensure_silent(running.process().log()?) } else { Ok(()) }
}

#[tokio::test]
async fn each_verb_of_each_rule_is_needed_and_sufficient() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook, Reconciler);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    let redis = RedisServer::start().await?;
    nodes::ensure(&client, "spot", 1).await?;
    pods::driver("etl").annotation("workload/spot-ratio", "0.5").post(&client, JOBS).await?.pod()?;

    helm.install(&in_sandbox()).await?;
    each_is_needed(&plane, &redis, &[WEBHOOK, RECONCILER], 11).await?;
    for (what, key, value, count) in [
        ("the webhook reconciles", "reconciler", json!({"mode": "webhook"}), 9),
        ("with the memory store", "store", json!("memory"), 6),
    ] {
        let mut values = in_sandbox();
        values[key] = value;
        helm.upgrade(&values).await?;
        each_is_needed(&plane, &redis, &[WEBHOOK], count).await.context(what)?;
    }
    Ok(())
}

/// Takes each verb of each rule of these accounts away in turn; there are `count` of them.
async fn each_is_needed(plane: &ControlPlane, redis: &RedisServer, accounts: &[&str], count: usize) -> Result<()> {
    let client = plane.client()?;
    let all = all_that_is_allowed(&client).await?;
    assert_eq!(all.len(), count, "{all:?}");
    for account in accounts {
        use_all_rights(plane, account, redis, None).await.with_context(|| (*account).to_owned())?;
    }
    for allowed in all {
        let account = if allowed.role.starts_with(WEBHOOK) { WEBHOOK } else { RECONCILER };
        let role = endpoint::get(&client, &role_path(allowed.kind, &allowed.role)).await?.json()?;
        let rule = role["rules"][allowed.rule].clone();
        let mut less = role["rules"].clone();
        let kept = rule["verbs"].as_array().into_iter().flatten().filter(|verb| **verb != allowed.verb);
        less[allowed.rule]["verbs"] = kept.cloned().collect::<Vec<_>>().into();
        if less[allowed.rule]["verbs"] == json!([]) {
            less.as_array_mut().context("no rules")?.remove(allowed.rule);
        }
        write_rules(&client, &allowed, &less).await?;
        until_followed(&client, account, &allowed, &rule, false).await?;
        let wanted = format!("cannot {} resource \"{}\"", allowed.verb, allowed.resource);
        use_all_rights(plane, account, redis, Some(&wanted)).await.with_context(|| format!("{allowed:?}"))?;
        write_rules(&client, &allowed, &role["rules"]).await?;
        until_followed(&client, account, &allowed, &rule, true).await?;
    }
    Ok(())
}
