//! Only the apiserver writes: tokens, their rotation and client certificates; and what a webhook that hangs costs.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use balancer_tests::balance::Balance;
use balancer_tests::certificate::authority;
use balancer_tests::control_plane::{ControlPlane, Options, Plane};
use balancer_tests::deployed::{
    JOBS, TOKENS, WEBHOOK, as_deployed, cluster, deployment, in_sandbox, ledger, point, review_paths, tokens,
};
use balancer_tests::helm::{Helm, RELEASE};
use balancer_tests::mounted::Mounted;
use balancer_tests::process::scratch_path;
use balancer_tests::raw::{Connection, Protocol};
use balancer_tests::redis::RedisServer;
use balancer_tests::registration::Registration;
use balancer_tests::reviews::{creation, fixture, patch};
use balancer_tests::scenario::{Scenario, placed, strict};
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::{Webhook, WebhookOptions};
use balancer_tests::{need, nodes, pods};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{MutatingWebhookConfiguration, ValidatingWebhookConfiguration};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// A metric of a webhook.
async fn metric(webhook: &Webhook, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
    webhook.metrics().await?.sum(&format!("spot_balancer_{name}"), labels).with_context(|| format!("no {name}"))
}

/// The review of a new driver of this job that asks for spot only.
fn forged_driver(job: &str) -> Result<Value> {
    let mut review = fixture("k8s-1.36-spark-3.5-create-driver")?;
    let request = &mut review["request"];
    request["namespace"] = JOBS.into();
    request["object"]["metadata"]["labels"][pods::JOB_ID_LABEL] = job.into();
    request["object"]["metadata"]["annotations"]["workload/spot-ratio"] = "1".into();
    Ok(review)
}

#[tokio::test]
async fn a_forged_review_is_refused_like_any_other_path_and_changes_no_ledger() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    helm.install(&in_sandbox()).await?;
    let redis = RedisServer::start().await?;
    let options = as_deployed(&plane, WEBHOOK, "/balancer-webhook", &redis).await?.env("LOG_LEVEL", "TRACE");
    let webhook = Webhook::start(options).await?;
    let [mutate, validate] = review_paths(&client).await?;
    point(&plane, webhook.port, "forged").await?;
    pods::driver("etl").annotation("workload/spot-ratio", "0.2").post(&client, JOBS).await?.pod()?;
    for id in 1..=5 {
        pods::executor("etl", id).post(&client, JOBS).await?.pod()?;
    }
    let before = ledger(&redis, "etl").await?;
    assert_eq!(before, (Some("0.2".into()), 1, 4));

    let token = mutate.strip_prefix("/mutate/").context("no token")?.to_owned();
    let (short, first) = (&token[..token.len() - 1], token.as_bytes()[0]);
    let wrong = [
        String::new(),
        "/".to_owned(),
        format!("/{}", "0".repeat(token.len())),
        format!("/{short}"),
        format!("/{token}0"),
        format!("/{token}/"),
        format!("//{token}"),
        format!("/{}", token.to_uppercase()),
        format!("/%{first:02x}{}", &token[1..]),
        format!("?token={token}"),
    ];
    let admissions = metric(&webhook, "admissions_total", &[]).await?;
    let mut refused = 0.0;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for suffix in &wrong {
            for (hook, review) in [
                ("/mutate", forged_driver("etl")?),
                ("/mutate", creation("etl", 6)?),
                ("/validate", fixture("k8s-1.36-spark-3.5-delete-executor-collection")?),
            ] {
                // The body of a request that is refused is not read, which may end the connection.
                let answer =
                    Connection::open(webhook.port, protocol).await?.post(&format!("{hook}{suffix}"), &review).await?;
                let unknown = Connection::open(webhook.port, protocol).await?.post("/nowhere", &review).await?;
                assert_eq!((answer.status, &answer.text), (404, &unknown.text), "{hook}{suffix}");
                let (names, unknown): (Vec<_>, Vec<_>) =
                    (answer.headers.keys().collect(), unknown.headers.keys().collect());
                assert_eq!(names, unknown, "{hook}{suffix}");
                refused += 1.0;
            }
        }
    }
    assert_eq!(metric(&webhook, "rejected_requests_total", &[("reason", "token")]).await?, refused);
    assert_eq!(metric(&webhook, "rejected_requests_total", &[("reason", "path")]).await?, refused);
    assert_eq!(metric(&webhook, "admissions_total", &[]).await?, admissions);
    assert_eq!(ledger(&redis, "etl").await?, before);

    // With the token, current or next, over both protocols, with the apiserver's query.
    let tokens = tokens(&client).await?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut connection = Connection::open(webhook.port, protocol).await?;
        for token in tokens.lines() {
            let review = creation("other", 1)?;
            patch(&review, &connection.post(&format!("/mutate/{token}?timeout=3s"), &review).await?)?;
        }
        let deletion = fixture("k8s-1.36-spark-3.5-delete-executor-collection")?;
        patch(&deletion, &connection.post(&format!("{validate}?timeout=2s"), &deletion).await?)?;
        let health = http::Request::get("/health").body(balancer_tests::raw::whole(""))?;
        assert_eq!(connection.send(health).await?.status, 200);
    }
    let log = webhook.process().log()?;
    for token in tokens.lines() {
        ensure!(!log.contains(token), "logged: {}", log.lines().find(|line| line.contains(token)).unwrap_or_default());
    }
    Ok(())
}

/// The lines of a Secret's file.
fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

/// Values of a release with this rotation.
fn rotation(number: u32) -> Value {
    let mut values = in_sandbox();
    values["admissionToken"] = json!({"rotation": number});
    values
}

/// Makes the last rotation older than the chart waits for.
async fn backdate(client: &Client) -> Result<()> {
    let rotated = json!({"data": {"rotated-at": ByteString(b"1".to_vec())}});
    let secrets = Api::<Secret>::namespaced(client.clone(), RELEASE);
    secrets.patch(TOKENS, &PatchParams::default(), &Patch::Merge(&rotated)).await?;
    Ok(())
}

/// Fails unless both configurations have this token.
async fn ensure_current(client: &Client, token: &str) -> Result<()> {
    assert_eq!(review_paths(client).await?, [format!("/mutate/{token}"), format!("/validate/{token}")]);
    Ok(())
}

/// Writes this token to the path of the configuration that is called at `/mutate` or at `/validate`.
async fn set_path(client: &Client, hook: &str, token: &str) -> Result<()> {
    let path = json!([{
        "op": "replace", "path": "/webhooks/0/clientConfig/service/path", "value": format!("/{hook}/{token}"),
    }]);
    let (patch, params) = (Patch::Json::<()>(serde_json::from_value(path)?), PatchParams::default());
    if hook == "mutate" {
        Api::<MutatingWebhookConfiguration>::all(client.clone()).patch(RELEASE, &params, &patch).await?;
    } else {
        Api::<ValidatingWebhookConfiguration>::all(client.clone()).patch(RELEASE, &params, &patch).await?;
    }
    Ok(())
}

#[tokio::test]
async fn upgrades_keep_the_tokens_and_a_rotation_makes_the_next_one_current() -> Result<()> {
    need!(Helm, ControlPlane);
    let (plane, mut helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    helm.install(&in_sandbox()).await?;
    let installed = tokens(&client).await?;
    let [current, next] = lines(&installed)[..] else { bail!("{} tokens", lines(&installed).len()) };
    ensure_current(&client, current).await?;
    let template = async || Ok::<_, anyhow::Error>(deployment(&client, WEBHOOK).await?["spec"]["template"].clone());
    let pods = template().await?;

    let mut other = in_sandbox();
    other["webhook"] = json!({"replicas": 3});
    helm.upgrade(&other).await?;
    assert_eq!(tokens(&client).await?, installed, "an upgrade keeps the tokens");

    helm.upgrade(&rotation(2)).await?;
    let once = tokens(&client).await?;
    let [second, third, previous] = lines(&once)[..] else { bail!("{} tokens", lines(&once).len()) };
    assert_eq!((second, previous), (next, current));
    ensure!(![current, next].contains(&third), "the new token is an old one");
    ensure_current(&client, next).await?;
    assert_eq!(template().await?, pods, "no pod restarts");

    // The same number again, a lower one, and a higher one too soon.
    for number in [2, 1] {
        helm.upgrade(&rotation(number)).await?;
        assert_eq!(tokens(&client).await?, once, "rotation {number}");
    }
    let refusal = helm.upgrade(&rotation(3)).await.err().context("rotated twice at once")?;
    ensure!(format!("{refusal:#}").contains("admissions could be lost. Upgrade again in"), "{refusal:#}");

    // An upgrade has failed before it wrote the configurations.
    backdate(&client).await?;
    for hook in ["mutate", "validate"] {
        set_path(&client, hook, current).await?;
        let refusal = helm.upgrade(&rotation(3)).await.err().with_context(|| format!("rotated, {hook} is behind"))?;
        ensure!(format!("{refusal:#}").contains("do not have the current token yet"), "{hook}: {refusal:#}");
        set_path(&client, hook, next).await?;
    }
    helm.upgrade(&rotation(3)).await?;
    let twice = tokens(&client).await?;
    assert_eq!((lines(&twice)[0], lines(&twice)[2]), (third, next));
    ensure!(!twice.contains(current), "the first token is still valid after two rotations");
    ensure_current(&client, third).await?;

    // A rollback goes back to tokens that the pods know.
    helm.rollback(3).await?;
    assert_eq!(tokens(&client).await?, once);
    ensure_current(&client, next).await?;

    // Without the Secret there are new tokens; with one of one's own those.
    let secrets = Api::<Secret>::namespaced(client.clone(), RELEASE);
    secrets.delete(TOKENS, &DeleteParams::default()).await?;
    helm.upgrade(&in_sandbox()).await?;
    let fresh = tokens(&client).await?;
    ensure!(lines(&fresh).iter().all(|token| !once.contains(token)), "an old token after the Secret was deleted");
    ensure_current(&client, lines(&fresh)[0]).await?;
    let own: Secret = serde_json::from_value(json!({
        "metadata": {"name": "own"}, "stringData": {"list": "my-own-first-token-1\nmy-own-second-token-2\n"},
    }))?;
    secrets.create(&PostParams::default(), &own).await?;
    let mut values = in_sandbox();
    values["admissionToken"] = json!({"existingSecret": {"name": "own", "key": "list"}});
    helm.upgrade(&values).await?;
    ensure_current(&client, "my-own-first-token-1").await?;
    ensure!(secrets.get_opt(TOKENS).await?.is_none(), "the chart's Secret is still there");
    helm.uninstall().await
}

/// Executors that are created through the apiserver, four at once, until they are stopped.
struct Creations {
    stop: watch::Sender<bool>,
    tasks: JoinSet<Result<u32>>,
}

impl Creations {
    fn start(client: &Client, namespace: &str, job: &'static str) -> Self {
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for first in 1..=4 {
            let (client, namespace, stopped) = (client.clone(), namespace.to_owned(), stopped.clone());
            tasks.spawn(async move {
                let mut count = 0;
                while !*stopped.borrow() {
                    let pod = pods::executor(job, first + 4 * count).post(&client, &namespace).await?.pod()?;
                    placed(&pod)?;
                    count += 1;
                    sleep(Duration::from_millis(50)).await;
                }
                Ok(count)
            });
        }
        Self { stop, tasks }
    }

    /// How many there were. Fails if one of them was not placed.
    async fn stop(self) -> Result<u32> {
        self.stop.send_replace(true);
        let counts = self.tasks.join_all().await;
        counts.into_iter().sum()
    }
}

/// The tokens before a rotation by the chart and after it.
async fn rotated_by_the_chart() -> Result<[String; 2]> {
    let (plane, mut helm): (ControlPlane, Helm) = cluster(Options::default(), &[JOBS]).await?;
    let client = plane.client()?;
    helm.install(&in_sandbox()).await?;
    let before = tokens(&client).await?;
    helm.upgrade(&rotation(2)).await?;
    Ok([before, tokens(&client).await?])
}

#[tokio::test]
async fn a_rotation_under_steady_creations_loses_no_placement_however_late_a_kubelet_is() -> Result<()> {
    need!(Helm, ControlPlane, Redis, Webhook);
    let [before, after] = rotated_by_the_chart().await?;
    let mut scenario = Scenario::bare(Plane::shared().await?, "rotation").await?;
    // One replica reads the changed Secret before the configurations change, the other one long after.
    let secrets = [(); 2].map(|()| Mounted::new(&[("tokens", before.as_bytes())]));
    let secrets = secrets.into_iter().collect::<Result<Vec<_>>>()?;
    for secret in &secrets {
        let options = strict().cluster(&scenario.plane).redis(&scenario.redis)?;
        let options = options.env("RECONCILE_ENABLED", "false").env("ADMISSION_TOKEN_PATH", secret.path("tokens"));
        scenario.webhooks.push(Webhook::start(options).await?);
    }
    let ports: Vec<u16> = scenario.webhooks.iter().map(|webhook| webhook.port).collect();
    scenario.balance.send_to(&ports);
    let token = Some(lines(&before)[0].to_owned());
    let mut registration = Registration { token, ..Registration::new(&scenario.namespace, scenario.balance.port) };
    registration.apply(&scenario.plane).await?;

    scenario.driver("etl", "0.5").await?.pod()?;
    let creations = Creations::start(&scenario.client, &scenario.namespace, "etl");
    let read_again = async |replica: usize| {
        until_true(SOON, "the changed tokens to be read", async || {
            Ok(scenario.webhooks[replica].process().log()?.contains("admission tokens reloaded"))
        })
        .await
    };
    secrets[0].swap(&[("tokens", after.as_bytes())])?;
    read_again(0).await?;
    registration.switch(&scenario.plane, lines(&after)[0]).await?;
    // The apiserver follows the configurations with a delay.
    sleep(Duration::from_secs(3)).await;
    secrets[1].swap(&[("tokens", after.as_bytes())])?;
    read_again(1).await?;
    sleep(Duration::from_secs(1)).await;
    let count = creations.stop().await?;
    ensure!(count > 30, "{count} creations");
    for (webhook, port) in scenario.webhooks.iter().zip(ports) {
        assert_eq!(metric(webhook, "rejected_requests_total", &[("reason", "token")]).await?, 0.0);
        ensure!(metric(webhook, "admissions_total", &[("outcome", "placed")]).await? > 0.0, "idle: {port}");
    }
    scenario.ensure_counts_match_pods("etl").await?.ensure_near(0.5, 1.0)
}

#[tokio::test]
async fn bad_tokens_in_a_changed_file_are_reported_and_the_previous_ones_stay_in_use() -> Result<()> {
    need!(Webhook);
    let (good, better) = ("the-first-token-0", "the-second-token-1");
    let file = scratch_path("tokens")?;
    std::fs::write(&file, good)?;
    let options = WebhookOptions::default().without_cluster()?.env("ADMISSION_TOKEN_PATH", &file);
    let webhook = Webhook::start(options).await?;
    let status = async |token: &str| {
        let review = creation("etl", 1)?;
        let mut connection = Connection::open(webhook.port, Protocol::Http1).await?;
        Ok::<_, anyhow::Error>(connection.post(&format!("/mutate/{token}"), &review).await?.status)
    };
    assert_eq!((status(good).await?, status(better).await?), (200, 404));
    let failures = "admission_token_reload_failures_total";
    assert_eq!(metric(&webhook, failures, &[]).await?, 0.0);
    std::fs::write(&file, format!("{better}\nnot a token\n"))?;
    until_true(SOON, "the failure to be counted", async || Ok(metric(&webhook, failures, &[]).await? > 0.0)).await?;
    assert_eq!((status(good).await?, status(better).await?), (200, 404));
    until_true(SOON, "the failure to be logged", async || {
        let log = webhook.process().log()?;
        ensure!(!log.contains("not a token\n") && !log.contains(better), "{log}");
        Ok(log.contains("cannot load the changed admission tokens") && log.contains("line 2 is not a token"))
    })
    .await?;
    std::fs::write(&file, better)?;
    until_true(SOON, "the other token to be accepted", async || Ok(status(better).await? == 200)).await?;
    assert_eq!(status(good).await?, 404);
    Ok(())
}

#[tokio::test]
async fn only_clients_with_a_certificate_of_the_configured_authority_reach_the_webhook() -> Result<()> {
    need!(ControlPlane, Redis, Webhook);
    let plane = Plane::own(Options { webhook_client: true, ..Options::default() }).await?;
    let scenario = Scenario::bare(plane, "clients").await?;
    let (apiserver, other) = (scenario.plane.webhook_client()?, authority()?);
    let file = scratch_path("client-ca.crt")?;
    std::fs::write(&file, &apiserver.authority.pem)?;
    let options = strict().cluster(&scenario.plane).redis(&scenario.redis)?.env("RECONCILE_ENABLED", "false");
    let webhook = Webhook::start(options.env("CLIENT_CA_PATH", &file)).await?;
    Registration::new(&scenario.namespace, webhook.port).apply(&scenario.plane).await?;
    scenario.driver("etl", "0.5").await?.pod()?;
    scenario.executor("etl", 1).await?;

    let stranger = other.issue()?;
    let answered = async |certificate: Option<&balancer_tests::certificate::ServerCertificate>| {
        let review = creation("forged", 1)?;
        let post = async || -> Result<u16> {
            let mut connection = match certificate {
                Some(certificate) => Connection::open_as(webhook.port, Protocol::Http2, certificate).await?,
                None => Connection::open(webhook.port, Protocol::Http2).await?,
            };
            Ok(connection.post("/mutate", &review).await?.status)
        };
        Ok::<_, anyhow::Error>(post().await.is_ok_and(|status| status == 200))
    };
    ensure!(answered(Some(&apiserver.certificate)).await?, "the apiserver's certificate is refused");
    ensure!(!answered(None).await?, "a client without a certificate is answered");
    ensure!(!answered(Some(&stranger)).await?, "a certificate of another authority is accepted");

    // Both authorities, and then the other one only.
    std::fs::write(&file, format!("{}{}", apiserver.authority.pem, other.pem))?;
    until_true(SOON, "the second authority to be accepted", async || answered(Some(&stranger)).await).await?;
    ensure!(answered(Some(&apiserver.certificate)).await?, "the first authority is gone");
    scenario.executor("etl", 2).await?;
    std::fs::write(&file, &other.pem)?;
    until_true(SOON, "the first authority to be refused", async || Ok(!answered(Some(&apiserver.certificate)).await?))
        .await?;
    std::fs::write(&file, "no certificate")?;
    until_true(SOON, "the broken file to be counted", async || {
        Ok(metric(&webhook, "certificate_reload_failures_total", &[]).await? > 0.0)
    })
    .await?;
    ensure!(answered(Some(&stranger)).await?, "the previous authority is gone");
    ensure!(!answered(None).await?, "a client without a certificate is answered");
    Ok(())
}

#[tokio::test]
async fn frozen_webhooks_cost_three_seconds_a_creation_and_two_a_deletion() -> Result<()> {
    need!(Helm, ControlPlane, Scheduler, Redis, Webhook);
    let (plane, mut helm) = cluster(Options { scheduler: true, ..Options::default() }, &[JOBS]).await?;
    let client = plane.client()?;
    helm.install(&in_sandbox()).await?;
    let redis = RedisServer::start().await?;
    let mut webhooks = Vec::new();
    for _ in 0..2 {
        webhooks.push(Webhook::start(as_deployed(&plane, WEBHOOK, "/balancer-webhook", &redis).await?).await?);
    }
    let balance = Balance::start(&webhooks.iter().map(|webhook| webhook.port).collect::<Vec<_>>()).await?;
    point(&plane, balance.port, "frozen").await?;
    // Executors that run: their deletions are reviewed once, and a second time when the kubelet has ended them.
    for capacity in ["spot", "on-demand"] {
        nodes::ensure(&client, capacity, 1).await?;
    }
    for id in 1..=11 {
        placed(&pods::executor("etl", id).post(&client, JOBS).await?.pod()?)?;
    }
    let executors = Api::<Pod>::namespaced(client.clone(), JOBS);
    let all = ListParams::default().labels(&format!("{}=etl", pods::JOB_ID_LABEL));
    until_true(SOON, "the executors to be bound", async || {
        let bound = |pod: &Pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        Ok(executors.list(&all).await?.items.iter().all(bound))
    })
    .await?;
    for webhook in &webhooks {
        webhook.process().freeze()?;
    }
    let begun = Instant::now();
    // No node has this label, so it stays Pending.
    let created = pods::executor("unplaced", 1).node_selector("none", "none").post(&client, JOBS).await?.pod()?;
    let creation = begun.elapsed();
    ensure!(placed(&created).is_err(), "a frozen webhook has placed an executor");
    let begun = Instant::now();
    executors.delete("etl-exec-11", &DeleteParams::default()).await?;
    let deletion = begun.elapsed();
    let begun = Instant::now();
    pods::remove(&executors, "unplaced-exec-1").await?;
    let pending = begun.elapsed();
    let ten = ListParams::default().labels(&format!("{}=etl,spark-exec-id!=11", pods::JOB_ID_LABEL));
    assert_eq!(executors.list(&ten).await?.items.len(), 10);
    let begun = Instant::now();
    executors.delete_collection(&DeleteParams::default(), &ten).await?;
    let collection = begun.elapsed();
    ensure!(executors.list(&ten).await?.items.iter().all(|pod| pod.metadata.deletion_timestamp.is_some()), "left");
    for (what, took, [least, most]) in [
        ("a creation", creation, [2.9, 4.5]),
        ("a deletion", deletion, [1.9, 3.5]),
        // The apiserver asks twice about a pod that it deletes at once.
        ("the deletion of a pending executor", pending, [3.9, 6.0]),
        ("deletecollection of ten", collection, [19.0, 25.0]),
    ] {
        eprintln!("with frozen webhooks {what} takes {took:?}");
        ensure!((least..most).contains(&took.as_secs_f64()), "{what} took {took:?}, not {least} to {most} s");
    }

    for webhook in &webhooks {
        webhook.process().thaw()?;
    }
    until_true(SOON, "executors to be placed again", async || {
        Ok(placed(&pods::executor("etl", 12).dry_run(&client, JOBS).await?.pod()?).is_ok())
    })
    .await
}
