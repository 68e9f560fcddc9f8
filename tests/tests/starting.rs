//! The release binary as the person who starts it meets it: settings that are wrong, settings that
//! are secret, `--dev` and `--test-admission`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::control_plane::ControlPlane;
use balancer_tests::need;
use balancer_tests::parts::program;
use balancer_tests::process::{Process, Signal, scratch_path};
use balancer_tests::raw::{Connection, Protocol};
use balancer_tests::redis::RedisServer;
use balancer_tests::reviews::{creation, fixture, patch, patched};
use balancer_tests::scenario::Scenario;
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::webhook::{Webhook, WebhookOptions};
use balancer_tests::{endpoint, port, release};
use http::HeaderMap;
use kube::api::ListParams;
use redis::AsyncCommands;

fn file(name: &str, text: &str) -> Result<PathBuf> {
    let path = scratch_path(name)?;
    std::fs::write(&path, text)?;
    Ok(path)
}

/// Variables and their values.
type Settings<'a> = Vec<(&'a str, OsString)>;

/// Starts the binary with settings that are right but for these, and answers what it says when it
/// ends. Fails where it does not end, or not with an error.
async fn refusal(wrong: &[(&str, OsString)], arguments: &[&str]) -> Result<String> {
    let certificate = authority()?.issue()?;
    // Its kubeconfig is readable, and that is all that is asked of it at the start.
    let right = WebhookOptions::default()
        .without_cluster()?
        .env("STORE", "memory")
        .env("PORT", "0")
        .env("ADMIN_PORT", "0")
        .env("TLS_CERT_PATH", &certificate.path)
        .env("TLS_KEY_PATH", &certificate.key_path);
    let options = wrong.iter().fold(right, |options, (name, value)| options.env(name, value));
    let options = arguments.iter().fold(options, |options, argument| options.arg(argument));
    release::refusal("balancer-webhook", &options).await
}

#[tokio::test]
async fn an_invalid_setting_is_reported_with_its_name_value_and_what_is_accepted() -> Result<()> {
    need!(Webhook);
    let text = |value: &str| OsString::from(value);
    let redis = || ("STORE", text("redis"));
    let (garbage, other) = (file("garbage", "no certificate\n")?, authority()?.issue()?);
    let cases: Vec<(Settings<'_>, &[&str])> = vec![
        (vec![("DEFAULT_SPOT_RATIO", text("1.5"))], &["DEFAULT_SPOT_RATIO", "1.5", "70%"]),
        (vec![("DEFAULT_SPOT_RATIO", text("NaN"))], &["DEFAULT_SPOT_RATIO", "NaN", "70%"]),
        (vec![("SPOT_PREFERENCE", text("maybe"))], &["SPOT_PREFERENCE", "maybe", "STRICT or BEST_EFFORT"]),
        (vec![("PORT", text("70000"))], &["PORT", "70000", "accepted", "65535"]),
        (vec![("ADMIN_PORT", text("http"))], &["ADMIN_PORT", "http", "accepted", "65535"]),
        (vec![("LOG_LEVEL", text("loud"))], &["LOG_LEVEL", "loud", "WARNING"]),
        (vec![("LOG_FORMAT", text("xml"))], &["LOG_FORMAT", "xml", "text or json"]),
        (vec![("NODE_ROLE_SELECTOR", text("perhaps"))], &["NODE_ROLE_SELECTOR", "perhaps", "true or false"]),
        (vec![("JOB_ID_LABEL", text("job id"))], &["JOB_ID_LABEL", "job id", "label key"]),
        (
            vec![("DRIVER_ROLE_VALUE", text("executor"))],
            &["DRIVER_ROLE_VALUE", "EXECUTOR_ROLE_VALUE", "executor", "accepted"],
        ),
        (vec![("WEBHOOK_TIMEOUT_SECONDS", text("0"))], &["WEBHOOK_TIMEOUT_SECONDS", "0", "accepted", "30"]),
        (vec![("MAX_NEW_JOBS_PER_MINUTE", text("0"))], &["MAX_NEW_JOBS_PER_MINUTE", "0", "accepted", "1000000"]),
        (
            vec![("STORE_TIMEOUT_MILLISECONDS", text("20000"))],
            &["STORE_TIMEOUT_MILLISECONDS", "20000", "accepted", "15000"],
        ),
        (vec![("REDIS_DEFAULT_TTL_SECONDS", text("-1"))], &["REDIS_DEFAULT_TTL_SECONDS", "-1", "accepted"]),
        (vec![("RECONCILE_ENABLED", text("perhaps"))], &["RECONCILE_ENABLED", "perhaps", "true or false"]),
        (vec![("RECONCILE_GRACE_SECONDS", text("0"))], &["RECONCILE_GRACE_SECONDS", "0", "accepted"]),
        (vec![("RECONCILE_INTERVAL_SECONDS", text("often"))], &["RECONCILE_INTERVAL_SECONDS", "often", "accepted"]),
        (vec![("WATCH_NAMESPACES", text("etl,No_Such"))], &["WATCH_NAMESPACES", "No_Such", "accepted"]),
        (vec![("STORE", text("etcd"))], &["STORE", "etcd", "redis or memory"]),
        (vec![redis()], &["REDIS_URL", "not set", "rediss://", "STORE=memory"]),
        (vec![redis(), ("REDIS_URL", text(""))], &["REDIS_URL", "not set", "rediss://"]),
        // Its value is not told: it may hold a password.
        (vec![redis(), ("REDIS_URL", text("http://x"))], &["REDIS_URL", "accepted: redis://"]),
        (vec![redis(), ("REDIS_URL", text("localhost"))], &["REDIS_URL", "accepted: redis://"]),
        (vec![("TLS_CERT_PATH", text("/nowhere/tls.crt"))], &["TLS_CERT_PATH", "/nowhere/tls.crt", "No such file"]),
        (vec![("TLS_KEY_PATH", text("/nowhere/tls.key"))], &["TLS_KEY_PATH", "/nowhere/tls.key", "No such file"]),
        (
            vec![("TLS_CERT_PATH", garbage.clone().into())],
            &["TLS_CERT_PATH", "garbage", "accepted: a PEM certificate chain"],
        ),
        (vec![("CLIENT_CA_PATH", text("/nowhere/ca.crt"))], &["CLIENT_CA_PATH", "/nowhere/ca.crt", "No such file"]),
        (
            vec![("CLIENT_CA_PATH", garbage.clone().into())],
            &["CLIENT_CA_PATH", "garbage", "no certificate", "accepted: CA certificates in PEM"],
        ),
        (
            vec![("ADMISSION_TOKEN_PATH", text("/nowhere/tokens"))],
            &["ADMISSION_TOKEN_PATH", "/nowhere/tokens", "No such file"],
        ),
        // The line is not told: it may be a token.
        (
            vec![("ADMISSION_TOKEN_PATH", garbage.clone().into())],
            &["ADMISSION_TOKEN_PATH", "garbage", "line 1 is not a token", "accepted: 16 to 128"],
        ),
        (vec![("TLS_KEY_PATH", garbage.into())], &["TLS_KEY_PATH", "garbage", "no private key", "accepted"]),
        (vec![("TLS_KEY_PATH", other.key_path.into())], &["TLS_CERT_PATH", "TLS_KEY_PATH", "do not belong together"]),
        (vec![("KUBECONFIG", text("/nowhere/config"))], &["KUBECONFIG", "/nowhere/config", "--dev"]),
    ];
    for (wrong, told) in cases {
        let said = refusal(&wrong, &[]).await?;
        for part in told {
            ensure!(said.contains(part), "with {wrong:?} it does not say {part:?}:\n{said}");
        }
    }
    let said = refusal(&[], &["--spot-preference=maybe"]).await?;
    ensure!(said.contains("--spot-preference") && said.contains("STRICT or BEST_EFFORT"), "{said}");
    let said = refusal(&[], &["--no-such-setting"]).await?;
    ensure!(said.contains("--no-such-setting") && said.contains("--help"), "{said}");
    Ok(())
}

#[tokio::test]
async fn a_port_in_use_is_reported_with_its_setting() -> Result<()> {
    need!(Webhook);
    let taken = tokio::net::TcpListener::bind("[::]:0").await?;
    let number = taken.local_addr()?.port().to_string();
    for name in ["PORT", "ADMIN_PORT"] {
        let said = refusal(&[(name, number.clone().into())], &[]).await?;
        ensure!(said.contains(&format!("{name}: cannot listen on {number}")), "{said}");
    }
    Ok(())
}

#[tokio::test]
async fn a_flag_overrides_its_variable() -> Result<()> {
    need!(Webhook);
    let options = WebhookOptions::default()
        .without_cluster()?
        .env("SPOT_PREFERENCE", "BEST_EFFORT")
        .arg("--spot-preference=strict")
        .env("DEFAULT_SPOT_RATIO", "COST_ONLY")
        .arg("--default-spot-ratio=0%");
    let webhook = Webhook::start(options).await?;
    let mut connection = Connection::open(webhook.port, Protocol::Http1).await?;
    for id in 1..=4 {
        let review = creation("flags", id)?;
        let patch = patch(&review, &connection.post("/mutate", &review).await?)?;
        assert_eq!(patched(&review, &patch)?["spec"]["nodeSelector"]["karpenter.sh/capacity-type"], "on-demand");
    }
    Ok(())
}

#[tokio::test]
async fn the_password_of_the_store_is_never_told() -> Result<()> {
    need!(Redis, Webhook);
    // By a start that fails, for whatever reason.
    for url in [
        "http://me:pa55word@127.0.0.1",
        "redis://me:pa55word@127.0.0.1:70000",
        "redis://me:pa55word@127.0.0.1/first",
        "redis://me:pa55word@",
        "me:pa55word@127.0.0.1",
    ] {
        for port in ["0", "70000"] {
            let wrong = [("STORE", "redis".into()), ("PORT", port.into()), ("REDIS_URL", url.into())];
            let said = refusal(&wrong, &[]).await?;
            ensure!(!said.contains("pa55word"), "{url}: {said}");
            let said = refusal(&[("STORE", "redis".into()), ("PORT", port.into())], &["--redis-url", url]).await?;
            ensure!(!said.contains("pa55word"), "--redis-url {url}: {said}");
        }
    }
    let help =
        Command::new(program("balancer-webhook")?).arg("--help").env("REDIS_URL", "redis://:pa55word@x").output()?;
    let help = String::from_utf8(help.stdout)?;
    ensure!(help.contains("REDIS_URL") && !help.contains("pa55word"), "{help}");

    // By one that serves, with a store that takes the password, one that does not, and none.
    let mut redis = RedisServer::start_tls().await?;
    let wrong = redis.url().replace("correct-horse", "pa55word");
    for (store, secret) in [(redis.url(), "correct-horse"), (wrong, "pa55word")] {
        let options = WebhookOptions::default().without_cluster()?.redis(&redis)?.env("LOG_LEVEL", "TRACE");
        let webhook = Webhook::start(options.env("REDIS_URL", store)).await?;
        let mut connection = Connection::open(webhook.port, Protocol::Http1).await?;
        let mut post = async |id| {
            let review = creation("secret", id)?;
            patch(&review, &connection.post("/mutate", &review).await?)
        };
        post(1).await?;
        redis.stop();
        // A lost connection, and failed attempts at another.
        let mut id = 1;
        until_true(SOON, "the store to be missed", async || {
            id += 1;
            post(id).await?;
            Ok(webhook.process().log()?.contains("Connection refused"))
        })
        .await?;
        let log = webhook.process().log()?;
        ensure!(!log.contains(secret), "{}", log.lines().find(|line| line.contains(secret)).unwrap_or_default());
        redis.start_again_empty().await?;
    }
    Ok(())
}

/// Status and body of a path on the admin port.
async fn admin(port: u16, path: &str) -> Result<(u16, String, HeaderMap)> {
    let answer = endpoint::get(&endpoint::client(&endpoint::http(port))?, path).await?;
    Ok((answer.status, answer.text, answer.headers))
}

#[tokio::test]
async fn dev_mode_needs_no_setup_and_its_curl_line_returns_a_patch() -> Result<()> {
    need!(Webhook);
    let (port, admin_port) = (port::free()?, port::free()?);
    let mut process = Process::start(&program("balancer-webhook")?, |command| {
        command.args(["--dev", &format!("--port={port}"), &format!("--admin-port={admin_port}")]);
    })?;
    let line = until(SOON, "the line to paste", async || {
        Ok(process.log()?.lines().find(|line| line.starts_with("curl ")).map(str::to_owned))
    })
    .await?;
    ensure!(line.contains(&format!("https://localhost:{port}/mutate")), "{line}");
    until_true(SOON, "it to be ready", async || Ok(admin(admin_port, "/readyz").await?.0 == 200)).await?;

    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no repository")?;
    let shell =
        |script: &str| Command::new("sh").args(["-c", script]).current_dir(repository).stdin(Stdio::null()).output();
    if shell("command -v curl")?.status.success() {
        let done = shell(&line)?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        ensure!(done.status.success(), "{line}: {} {said} {}", done.status, String::from_utf8_lossy(&done.stderr));
        let review = fixture("k8s-1.36-spark-3.5-create-executor")?;
        let mut headers = HeaderMap::new();
        headers.insert("content-type", "application/json".parse()?);
        let patch = patch(&review, &endpoint::Answer { status: 200, headers, text: said })?;
        // The first of a job goes to spot, and BEST_EFFORT gives it no selector.
        let decided = &patched(&review, &patch)?["metadata"]["annotations"]["workload/capacity-type"];
        assert_eq!(decided, "spot");
    } else {
        eprintln!("there is no curl to paste its line to");
    }
    ensure!(process.terminate(SOON).await?.success(), "{}", process.log()?);
    Ok(())
}

/// Runs `--test-admission` with its cluster alone, and returns whether it passed, and its output.
async fn test_admission(plane: &ControlPlane, namespace: &str, settings: &[(&str, &str)]) -> Result<(bool, String)> {
    let mut process = Process::start(&program("balancer-webhook")?, |command| {
        command.args(["--test-admission", namespace]).env("KUBECONFIG", plane.kubeconfig());
        command.envs(settings.iter().copied());
    })?;
    let status = process.ended(Duration::from_secs(60)).await?;
    let output = process.log()?;
    ensure!(status.code().is_some() && output.lines().count() == 1, "{status}: {output}");
    Ok((status.success(), output))
}

#[tokio::test]
async fn a_test_of_the_admission_passes_where_the_webhook_places_executors_and_leaves_nothing() -> Result<()> {
    need!(Redis, ControlPlane, Webhook);
    let scenario = Scenario::start("tested", 1, WebhookOptions::default()).await?;
    let (plane, namespace) = (&scenario.plane, scenario.namespace.as_str());
    let (passed, said) = test_admission(plane, namespace, &[]).await?;
    ensure!(passed && said.contains(namespace) && said.contains("workload/capacity-type=on-demand"), "{said}");
    // As if the webhook wrote no annotation: what it requires of the node remains.
    let (passed, said) = test_admission(plane, namespace, &[("DECISION_ANNOTATION", "")]).await?;
    ensure!(passed && said.contains("karpenter.sh/capacity-type"), "{said}");
    let pods = scenario.pods().list(&ListParams::default()).await?;
    ensure!(pods.items.is_empty(), "{pods:?}");
    let jobs: Vec<String> = scenario.redis.connection().await?.keys("exec-*:*").await?;
    ensure!(jobs.is_empty(), "{jobs:?}");

    // No configuration selects this namespace.
    let other = plane.namespace("untested").await?;
    let (passed, said) = test_admission(plane, &other, &[]).await?;
    ensure!(!passed && said.contains(&other) && said.contains("namespaceSelector"), "{said}");
    let (passed, said) = test_admission(plane, "no-such-namespace", &[]).await?;
    ensure!(!passed && said.contains("namespaces \"no-such-namespace\" not found"), "{said}");
    // Its webhook is gone, and its configuration does not ignore that.
    scenario.balance.send_to(&[]);
    let (passed, said) = test_admission(plane, namespace, &[]).await?;
    ensure!(!passed && said.contains("failed calling webhook"), "{said}");
    Ok(())
}

#[tokio::test]
async fn the_admin_port_serves_probes_and_metrics_and_reports_shutdown() -> Result<()> {
    need!(Webhook);
    let mut webhook = Webhook::start(WebhookOptions::default().without_cluster()?).await?;
    let port = webhook.admin_port;
    assert_eq!(admin(port, "/livez").await?.0, 200);
    assert_eq!(admin(port, "/readyz").await?.0, 200);
    let (status, page, headers) = admin(port, "/metrics").await?;
    assert_eq!(status, 200);
    let kind = headers["content-type"].to_str()?;
    ensure!(kind.starts_with("application/openmetrics-text") || kind.starts_with("text/plain"), "{kind}");
    ensure!(page.contains("# TYPE spot_balancer_certificate_reload_failures counter\n"), "{page}");
    let (status, text, _) = admin(port, "/nothing").await?;
    ensure!(status == 404 && text.contains("/livez, /readyz and /metrics"), "{status} {text}");
    let posted = endpoint::post(&webhook.admin()?, "/metrics", &serde_json::json!({})).await?;
    assert_eq!((posted.status, posted.headers["allow"].to_str()?), (405, "GET, HEAD"));

    let mut connection = Connection::open(webhook.port, Protocol::Http2).await?;
    let health = http::Request::get("/health").body(balancer_tests::raw::whole(""))?;
    let health = connection.send(health).await?;
    assert_eq!((health.status, health.text.as_str()), (200, r#"{"status":"healthy"}"#));
    assert_eq!(health.headers["content-type"], "application/json");

    // Alive to its end; ready no more, so that nobody sends it anything new.
    webhook.process().signal(Signal::TERM)?;
    until_true(SOON, "it to say that it leaves", async || Ok(admin(port, "/readyz").await?.0 == 503)).await?;
    assert_eq!(admin(port, "/livez").await?.0, 200);
    let review = creation("late", 1)?;
    let late = Connection::open(webhook.port, Protocol::Http1).await?.post("/mutate", &review).await?;
    patch(&review, &late)?;
    ensure!(webhook.ended(SOON).await?.success());
    Ok(())
}
