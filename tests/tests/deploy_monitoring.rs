//! Alerts and dashboard, by the real Prometheus: played series, and running programs that fail.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::BTreeSet;
use std::fmt::Debug;

use anyhow::{Context, Result, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::helm::{Helm, RELEASE, object, objects, repository};
use balancer_tests::process::scratch_path;
use balancer_tests::prometheus::{self, Prometheus, Target};
use balancer_tests::raw::tcp;
use balancer_tests::scenario::{Scenario, strict};
use balancer_tests::wait::{SOON, until, until_true};
use balancer_tests::webhook::Webhook;
use balancer_tests::{endpoint, need, pods, reviews};
use futures::future::try_join_all;
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::api::{Api, DeleteParams, ListParams};
use redis::AsyncCommands;
use serde_json::{Value, json};

type Names = BTreeSet<String>;

/// The token of the webhook that no apiserver calls.
const TOKEN: &str = "the-token-of-the-third";

/// The rules that the chart renders with these values.
async fn rules(mut values: Value) -> Result<Value> {
    values["monitoring"]["prometheusRule"]["enabled"] = true.into();
    Ok(object(&Helm::start().await?.render(&values).await?, "PrometheusRule", RELEASE)?.clone())
}

/// The alerts of a PrometheusRule.
fn alerts(rules: &Value) -> Result<Names> {
    let rules = rules["spec"]["groups"][0]["rules"].as_array().context("no rules")?;
    Ok(rules.iter().filter_map(|rule| rule["alert"].as_str()).map(str::to_owned).collect())
}

/// The alerts that a file of promtool's expects to fire.
fn tested(file: &str) -> Result<Names> {
    let tests = &objects(&std::fs::read_to_string(repository(file))?)?[0]["tests"];
    let looks = tests.as_array().context("no tests")?.iter().filter_map(|test| test["alert_rule_test"].as_array());
    let fires = |look: &&Value| look["exp_alerts"].as_array().is_some_and(|alerts| !alerts.is_empty());
    Ok(looks.flatten().filter(fires).filter_map(|look| look["alertname"].as_str()).map(str::to_owned).collect())
}

#[tokio::test]
async fn every_alert_fires_when_it_should_and_only_then() -> Result<()> {
    const ALL: &str = "tests/fixtures/alerts.yaml";
    need!(Helm, Prometheus);
    let by_default = rules(json!({})).await?;
    prometheus::check(&by_default)?;
    prometheus::play(&by_default, &repository(ALL))?;
    assert_eq!(tested(ALL)?, alerts(&by_default)?, "alerts that are tested, and those that there are");
    let alone = rules(json!({
        "store": "memory",
        "settings": {"webhookTimeoutSeconds": 29},
        "admission": {"timeoutSeconds": 30},
    }))
    .await?;
    prometheus::play(&alone, &repository("tests/fixtures/alerts-alone.yaml"))
}

#[tokio::test]
async fn alerts_for_parts_that_are_not_installed_are_left_out() -> Result<()> {
    need!(Helm);
    let all = alerts(&rules(json!({})).await?)?;
    let without = async |values: Value| -> Result<Names> {
        let fewer = alerts(&rules(values).await?)?;
        ensure!(fewer.is_subset(&all), "{fewer:?}");
        Ok(all.difference(&fewer).map(|name| name.replace("SpotBalancer", "")).collect())
    };
    // The reconciler follows all namespaces then, those too that the webhook is not to see.
    let chosen = json!({"namespaces": {"selector": {"matchLabels": {"spark": "true"}}}});
    assert_eq!(without(chosen).await?, ["Drift"].map(str::to_owned).into());
    let reconciling = [
        "Drift",
        "ExecutorsUnschedulable",
        "LedgerRepaired",
        "NoLeader",
        "NotReconciled",
        "NotWatching",
        "SpotClosedLong",
    ];
    assert_eq!(without(json!({"reconciler": {"mode": "none"}})).await?, reconciling.map(str::to_owned).into());
    let tokens = ["ReviewsWithoutToken", "TokensUnusable"].map(str::to_owned).into();
    assert_eq!(without(json!({"admissionToken": {"enabled": false}})).await?, tokens);
    let mut values = json!({"monitoring": {"prometheusRule": {"enabled": true, "apiServer": false}}});
    let rendered = Helm::start().await?.render(&values.take()).await?;
    let fewer = alerts(object(&rendered, "PrometheusRule", RELEASE)?)?;
    assert_eq!(all.difference(&fewer).collect::<Vec<_>>(), ["SpotBalancerNotReached"]);
    Ok(())
}

#[tokio::test]
async fn the_documentation_names_every_alert_and_no_other() -> Result<()> {
    need!(Helm);
    let rules = alerts(&rules(json!({})).await?)?;
    let table = std::fs::read_to_string(repository("docs/install.md"))?;
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `SpotBalancer")?.split_once('`'));
    assert_eq!(rows.map(|(name, _)| format!("SpotBalancer{name}")).collect::<Names>(), rules);
    for file in
        ["README.md", "SECURITY.md", "docs/troubleshooting.md", "docs/failure-modes.md", "docs/how-it-decides.md"]
    {
        let text = std::fs::read_to_string(repository(file))?;
        for named in text.split('`').filter(|word| word.starts_with("SpotBalancer")) {
            ensure!(rules.contains(named), "{file} names {named}, which is no alert");
        }
    }
    Ok(())
}

#[tokio::test]
async fn the_runbook_of_every_alert_leads_to_its_section() -> Result<()> {
    need!(Helm);
    let guide = std::fs::read_to_string(repository("docs/troubleshooting.md"))?;
    let sections: Vec<&str> = guide.lines().filter_map(|line| line.strip_prefix("### SpotBalancer")).collect();
    let wiki = "https://wiki.example.com/spot";
    for (values, page) in [
        (json!({}), "https://github.com/spot-balancer/spot-balancer/blob/main/docs/troubleshooting.md"),
        (json!({"monitoring": {"prometheusRule": {"runbookUrl": wiki}}}), wiki),
    ] {
        let rules = rules(values).await?;
        let mut led_to = BTreeSet::new();
        for rule in list(&rules["spec"]["groups"][0]["rules"])? {
            let alert = rule["alert"].as_str().context("no alert")?;
            // As GitHub makes an anchor of a heading.
            assert_eq!(rule["annotations"]["runbook_url"], format!("{page}#{}", alert.to_lowercase()), "{alert}");
            led_to.insert(alert.trim_start_matches("SpotBalancer"));
        }
        assert_eq!(led_to, sections.iter().copied().collect());
    }
    Ok(())
}

fn dashboard() -> Result<Value> {
    let file = repository("deploy/chart/spot-balancer/dashboards/spot-balancer.json");
    Ok(serde_json::from_slice(&std::fs::read(file)?)?)
}

fn list(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().with_context(|| format!("no list: {value}"))
}

#[test]
fn dashboard_panels_are_complete_and_do_not_overlap() -> Result<()> {
    let dashboard = dashboard()?;
    let (mut ids, mut taken) = (BTreeSet::new(), BTreeSet::new());
    for panel in list(&dashboard["panels"])? {
        let title = panel["title"].as_str().context("a panel without a title")?;
        ensure!(ids.insert(panel["id"].as_u64().context(title.to_owned())?), "{title} has the id of another");
        let place = |edge: &str| panel["gridPos"][edge].as_u64().with_context(|| format!("{title} has no {edge}"));
        let (x, y, w, h) = (place("x")?, place("y")?, place("w")?, place("h")?);
        ensure!(x + w <= 24, "{title} is wider than the page");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            ensure!(taken.insert(cell), "{title} lies on another panel");
        }
        if panel["type"] == "row" {
            continue;
        }
        let told = |text: &Value| text.as_str().is_some_and(|text| !text.is_empty());
        ensure!(told(&panel["description"]), "{title} has no description");
        ensure!(told(&panel["fieldConfig"]["defaults"]["unit"]), "{title} has no unit");
        let targets = list(&panel["targets"])?;
        let letters: BTreeSet<_> = targets.iter().map(|target| target["refId"].as_str()).collect();
        ensure!(letters.len() == targets.len() && !targets.is_empty(), "{title} has no targets, or two of one refId");
        for target in targets {
            for of in [panel, target] {
                ensure!(of["datasource"]["uid"] == "${datasource}", "{title} has a data source of its own");
            }
            let expression = target["expr"].as_str().unwrap_or_default();
            let selectors = expression.matches('{').count();
            let chosen = expression.matches(r#"{namespace=~"$namespace",job=~"$job""#).count();
            ensure!(selectors > 0 && chosen == selectors, "{title} does not follow the variables: {expression}");
            // A range that is shorter than two scrapes tells nothing.
            let ranges = expression.matches('[').count();
            let fit = expression.matches("[$__rate_interval]").count() + expression.matches("[1h]").count();
            ensure!(ranges == fit, "{title} has a range that does not follow the interval: {expression}");
            let legend = target["legendFormat"].as_str().unwrap_or_default();
            ensure!(panel["type"] == "stat" || !legend.is_empty(), "{title} has lines without a name");
        }
    }
    Ok(())
}

/// The dashboard's expressions by the titles of their panels, for the release that is tested.
fn panels() -> Result<Vec<(String, String)>> {
    let dashboard = dashboard()?;
    let mut found = Vec::new();
    for panel in list(&dashboard["panels"])? {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let title = panel["title"].as_str().context("a panel without a title")?;
            found.push((title.to_owned(), chosen(target["expr"].as_str().context("no expression")?)));
        }
    }
    for variable in list(&dashboard["templating"]["list"])? {
        let Some(query) = variable["definition"].as_str() else { continue };
        ensure!(variable["query"]["query"] == query, "{variable}");
        let series = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')'));
        let (series, label) = series.and_then(|rest| rest.rsplit_once(", ")).context(query.to_owned())?;
        let values = format!(r#"count by ({label}) ({}) and on ({label}) {}"#, chosen(series), mine("build_info"));
        found.push((format!("the variable {}", variable["name"]), values));
    }
    Ok(found)
}

/// An expression as Grafana sends it when this release is chosen.
fn chosen(expression: &str) -> String {
    let expression = expression.replace("$namespace", RELEASE).replace("$job", RELEASE);
    expression.replace("$__rate_interval", "5m")
}

fn mine(metric: &str) -> String {
    format!(r#"spot_balancer_{metric}{{namespace="{RELEASE}",job="{RELEASE}"}}"#)
}

/// The rules of someone in a hurry: ranges in seconds where they are in minutes, and `for` four seconds, in which a
/// busy machine may miss some scrapes.
fn hurried(rules: &Value) -> Result<Value> {
    let mut rules = rules.clone();
    for rule in rules["spec"]["groups"][0]["rules"].as_array_mut().context("no rules")? {
        rule["expr"] = rule["expr"].as_str().context("no expression")?.replace("m]", "s]").into();
        rule["for"] = "4s".into();
    }
    Ok(rules)
}

/// The series of ours that there are, less what the scrape adds. Those of namespaces come and go with their jobs.
async fn series(prometheus: &Prometheus) -> Result<BTreeSet<Vec<(String, String)>>> {
    const SCRAPED: [&str; 8] = ["component", "container", "endpoint", "instance", "job", "namespace", "pod", "service"];
    let found = prometheus.query(r#"{__name__=~"spot_balancer_.+",job_namespace=""}"#).await?.into_iter();
    let ours = |(label, _): &(String, String)| !SCRAPED.contains(&label.as_str());
    Ok(found.map(|(labels, _)| labels.into_iter().filter(ours).collect()).collect())
}

/// The alerts that have fired so far.
async fn fired(prometheus: &Prometheus) -> Result<Names> {
    let fired = prometheus.query(r#"count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[10m]))"#).await?;
    Ok(fired.into_iter().filter_map(|(mut labels, _)| labels.remove("alertname")).collect())
}

/// Does something again and again until all these have fired.
async fn until_fired(
    prometheus: &Prometheus,
    names: &[impl AsRef<str> + Debug],
    mut act: impl AsyncFnMut() -> Result<()>,
) -> Result<()> {
    until(SOON, &format!("{names:?} to fire"), async || {
        act().await?;
        let fired = fired(prometheus).await?;
        ensure!(names.iter().all(|name| fired.contains(name.as_ref())), "fired have {fired:?}");
        Ok(Some(()))
    })
    .await
}

#[tokio::test]
async fn dashboard_and_alerts_show_what_happens_to_running_programs() -> Result<()> {
    need!(Helm, Redis, ControlPlane, Scheduler, Webhook, Reconciler, Prometheus);
    let monitoring = json!({"serviceMonitor": {"enabled": true}, "prometheusRule": {"enabled": true}});
    let rendered = Helm::start().await?.render(&json!({"monitoring": monitoring})).await?;
    let rules = object(&rendered, "PrometheusRule", RELEASE)?;
    let mut scenario = Scenario::reconciled("shown", 2, 2).await?;
    // One that no apiserver calls, to be broken.
    let tokens = scratch_path("tokens")?;
    std::fs::write(&tokens, TOKEN)?;
    let options = strict().without_cluster()?.redis(&scenario.redis)?;
    let options = options.env("ADMISSION_TOKEN_PATH", &tokens).env("MAX_NEW_JOBS_PER_MINUTE", "1");
    let third = Webhook::start(options).await?;
    let mutate = format!("/mutate/{TOKEN}");
    let webhook = |pod, port| Target { service: "spot-balancer-webhook", pod, port };
    let reconciler = |pod, port| Target { service: "spot-balancer-reconciler-metrics", pod, port };
    let targets = [
        webhook("webhook-a", scenario.webhooks[0].admin_port),
        webhook("webhook-b", scenario.webhooks[1].admin_port),
        webhook("webhook-c", third.admin_port),
        reconciler("reconciler-a", scenario.reconcilers[0].admin_port),
        reconciler("reconciler-b", scenario.reconcilers[1].admin_port),
    ];
    let prometheus = Prometheus::start(&rendered, &targets, &hurried(rules)?).await?;

    // In health.
    let begun_with = series(&prometheus).await?;
    scenario.grow("etl", "0.5", 16).await?;
    until_true(SOON, "all alerts to be evaluated and inactive", async || {
        let states = prometheus.alerts().await?;
        ensure!(states.values().all(|state| state == "inactive"), "{states:?}");
        Ok(states.into_keys().collect::<Names>() == alerts(rules)?)
    })
    .await?;
    assert_eq!(fired(&prometheus).await?, Names::new(), "fired in health");

    // Everything happens once.
    pods::remove(&scenario.pods(), "etl-exec-1").await?;
    scenario.post(&pods::executor("orphan", 1)).await?.pod()?;
    pods::executor("orphan", 2).dry_run(&scenario.client, &scenario.namespace).await?.pod()?;
    scenario.driver("wrong", "much").await?.pod()?;
    pods::annotate(&scenario.pods(), "etl-driver", "workload/spot-ratio", Some("much")).await?;
    let direct = third.client()?;
    // Its driver cannot be looked up.
    endpoint::post(&direct, &mutate, &reviews::creation("nowhere", 1)?).await?;
    scenario.redis.flush().await?;
    authority()?.renew_until(&third.certificate, 2020)?;
    let errors = ["SpotBalancerAdmissionErrors", "SpotBalancerDrift", "SpotBalancerCertificateExpires"];
    until_fired(&prometheus, &errors, async || {
        endpoint::post(&direct, &mutate, &json!({"no": "review"})).await.map(drop)
    })
    .await?;
    let mut silent = panels()?;
    ensure!(silent.len() > 30, "{} expressions", silent.len());
    let told = until_true(SOON, "every panel to tell something", async || {
        let mut still = Vec::new();
        for (title, expression) in std::mem::take(&mut silent) {
            let answer = prometheus.query(&expression).await.with_context(|| format!("{title}: {expression}"))?;
            if !answer.iter().any(|(_, value)| value.is_finite()) {
                still.push((title, expression));
            }
        }
        silent = still;
        Ok(silent.is_empty())
    });
    told.await.with_context(|| format!("silent are {silent:#?}"))?;
    assert_eq!(series(&prometheus).await?, begun_with, "a rate does not see the event that a series begins with");
    let (_, live) = panels()?.into_iter().find(|(title, _)| title == "Live executors").context("no such panel")?;
    until_true(SOON, "executors to be counted once, however many replicas see them", async || {
        let live = prometheus.query(&live).await?;
        let [(_, shown)] = live[..] else { return Ok(false) };
        let running = scenario.live("etl").await?.len() + scenario.live("orphan").await?.len();
        ensure!(format!("{shown}") == running.to_string(), "{running} run, and {shown} are shown");
        Ok(true)
    })
    .await?;
    let of = |component: &str| format!(r#"count(spot_balancer_build_info{{component="{component}"}})"#);
    assert_eq!(prometheus.query(&of("webhook")).await?[0].1, 3.0);
    assert_eq!(prometheus.query(&of("reconciler")).await?[0].1, 2.0);

    // Clients without a token, too many jobs, too many connections.
    let crowded = ["ReviewsWithoutToken", "NewJobLimit", "LookupsBusy", "ConnectionsEvicted"];
    let mut ids = scenario.fresh_ids();
    until_fired(&prometheus, &crowded.map(|name| format!("SpotBalancer{name}")), async || {
        let id = ids.next().context("no more ids")?;
        let new = reviews::creation(&format!("new-{id}"), 1)?;
        for path in ["/mutate", &mutate] {
            endpoint::post(&direct, path, &new).await?;
        }
        let dry_runs = (0..100).map(|number| {
            let pod = pods::executor(&format!("new-{id}-{number}"), 1);
            let (client, namespace) = (&scenario.client, &scenario.namespace);
            async move { pod.dry_run(client, namespace).await?.pod().map(drop) }
        });
        try_join_all(dry_runs).await?;
        try_join_all((0..1100).map(|_| tcp(third.port))).await.map(drop)
    })
    .await?;
    drop(ids);

    // Something else writes to Redis, and then it is full.
    let mut redis = scenario.redis.connection().await?;
    let () = redis.hset(scenario.keys("etl").0, "term", "3000000000").await?;
    pods::remove(&scenario.pods(), "etl-exec-2").await?;
    until_fired(&prometheus, &["SpotBalancerLedgerRepaired"], async || Ok(())).await?;
    let mut limit = redis::cmd("CONFIG");
    let () = limit.arg(&["SET", "maxmemory", "1", "maxmemory-policy", "noeviction"]).query_async(&mut redis).await?;
    until_fired(&prometheus, &["SpotBalancerStoreFull"], async || Ok(())).await?;
    let still = fired(&prometheus).await?;
    ensure!(!still.contains("SpotBalancerNotReconciled") && !still.contains("SpotBalancerNoLeader"), "{still:?}");

    // Redis is down, a certificate is no certificate, a token no token.
    std::fs::write(&third.certificate.path, "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")?;
    std::fs::write(&tokens, "no token")?;
    scenario.redis.stop();
    let mut ids = scenario.fresh_ids();
    let down = ["Degraded", "NotReconciled", "NoLeader", "CertificateUnusable", "TokensUnusable"];
    until_fired(&prometheus, &down.map(|name| format!("SpotBalancer{name}")), async || {
        let id = ids.next().context("no more ids")?;
        scenario.executor("etl", id).await.map(drop)
    })
    .await?;
    drop(ids);

    // The reconcilers lose their rights, and then all are gone.
    let bindings = Api::<RoleBinding>::namespaced(scenario.client.clone(), &scenario.namespace);
    bindings.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    until_fired(&prometheus, &["SpotBalancerNotWatching"], async || Ok(())).await?;
    ensure!(!fired(&prometheus).await?.contains("SpotBalancerDown"), "webhooks are there");
    scenario.reconcilers.clear();
    scenario.webhooks.clear();
    drop(third);
    until_fired(&prometheus, &["SpotBalancerDown"], async || Ok(())).await?;

    // The apiserver that there is counts no NotReached, nothing here is slow, unschedulable or without spot for so long, and
    // no defect is known.
    let mut all = fired(&prometheus).await?;
    let others = ["NotReached", "ExecutorsUnschedulable", "SpotClosedLong", "Slow", "Panicked", "TaskDied"];
    all.extend(others.map(|name| format!("SpotBalancer{name}")));
    assert_eq!(all, alerts(rules)?);
    Ok(())
}
