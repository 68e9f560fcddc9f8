//! What alerts and dashboard ask for, against what the programs show.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::helm::{Helm, object, repository};
use balancer_tests::scenario::Scenario;
use balancer_tests::wait::until_true;
use balancer_tests::{endpoint, need, pods};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

/// The texts under this key, wherever they are.
fn texts(value: &Value, key: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name == key => found.push(text.clone()),
                    _ => texts(value, key, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| texts(item, key, found)),
        _ => {}
    }
}

/// A metric of ours and a label that it is chosen by; the label is empty for the metric alone.
type Asked = (String, String);

/// What an expression asks of our metrics.
fn asked(expression: &str) -> Result<BTreeSet<Asked>> {
    let mut asked = BTreeSet::new();
    let mut rest = expression;
    while let Some(begin) = rest.find("spot_balancer_") {
        rest = &rest[begin..];
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
        let name = rest[..end].to_owned();
        rest = &rest[end..];
        asked.insert((name.clone(), String::new()));
        let Some(selector) = rest.strip_prefix('{') else { continue };
        let (selector, after) = selector.split_once('}').context("a selector without an end")?;
        for matcher in selector.split(',') {
            let label = matcher.split(['=', '!']).next().unwrap_or_default();
            // Whoever scrapes writes these.
            if !matches!(label, "namespace" | "job") {
                asked.insert((name.clone(), label.to_owned()));
            }
        }
        rest = after;
    }
    Ok(asked)
}

/// Whether a page of metrics has such a series.
fn shows(page: &str, (name, label): &Asked) -> bool {
    page.lines().any(|line| match line.strip_prefix(name.as_str()) {
        Some(rest) if label.is_empty() => rest.starts_with(['{', ' ']),
        Some(rest) => rest.starts_with('{') && rest.replace('{', ",").contains(&format!(",{label}=\"")),
        None => false,
    })
}

#[test]
fn expressions_are_taken_apart() -> Result<()> {
    let found = asked(r#"sum(rate(spot_balancer_a_total{outcome!="x",job="y"}[5m])) / spot_balancer_b"#)?;
    let wanted = [("spot_balancer_a_total", ""), ("spot_balancer_a_total", "outcome"), ("spot_balancer_b", "")];
    assert_eq!(found, wanted.map(|(name, label)| (name.to_owned(), label.to_owned())).into());
    assert!(shows("spot_balancer_a_total{kind=\"z\",outcome=\"x\"} 3", &wanted.map(|(a, b)| (a.into(), b.into()))[1]));
    assert!(!shows("spot_balancer_a_total{kind=\"z\"} 3", &("spot_balancer_a_total".into(), "outcome".into())));
    assert!(!shows("spot_balancer_bb 1", &("spot_balancer_b".into(), String::new())));
    Ok(())
}

#[tokio::test]
async fn every_metric_of_alerts_and_dashboard_is_shown_by_a_running_program() -> Result<()> {
    need!(Helm, Redis, ControlPlane, Scheduler, Webhook, Reconciler);
    let rendered = Helm::start().await?.render(&json!({"monitoring": {"prometheusRule": {"enabled": true}}})).await?;
    let mut expressions = Vec::new();
    texts(object(&rendered, "PrometheusRule", "spot-balancer")?, "expr", &mut expressions);
    let alerts = expressions.len();
    ensure!(alerts >= 9, "{alerts} alerts");
    let dashboard = std::fs::read(repository("deploy/chart/spot-balancer/dashboards/spot-balancer.json"))?;
    let dashboard: Value = serde_json::from_slice(&dashboard)?;
    texts(&dashboard, "expr", &mut expressions);
    texts(&dashboard, "definition", &mut expressions);
    ensure!(expressions.len() > alerts + 20, "{} expressions", expressions.len());
    let mut wanted = BTreeSet::new();
    for expression in &expressions {
        wanted.extend(asked(expression)?);
    }

    // A labelled series is there from its first event, so everything has to happen once.
    let mut scenario = Scenario::reconciled("shown", 1, 1).await?;
    scenario.grow("etl", "0.5", 4).await?;
    pods::remove(&scenario.pods(), "etl-exec-1").await?;
    scenario.post(&pods::executor("orphan", 1)).await?.pod()?;
    scenario.driver("wrong", "much").await?.pod()?;
    pods::annotate(&scenario.pods(), "etl-driver", "workload/spot-ratio", Some("much")).await?;
    endpoint::post(&scenario.webhooks[0].client()?, "/mutate", &json!({"no": "review"})).await?;
    let mut missing = wanted;
    let seen = until_true(SOON, "all metrics but those of errors", async || {
        Ok(still_missing(&scenario, &mut missing).await?.all(|(name, _)| name.contains("store_errors")))
    });
    seen.await.with_context(|| format!("no program shows {missing:?}"))?;

    scenario.redis.stop();
    let seen = until_true(SOON, "the metrics of errors", async || {
        scenario.post(&pods::executor("etl", 100).named("etl-late")).await?;
        Ok(still_missing(&scenario, &mut missing).await?.next().is_none())
    });
    seen.await.with_context(|| format!("no program shows {missing:?}"))
}

/// Strikes what the programs show by now, and answers what is left.
async fn still_missing<'a>(
    scenario: &Scenario,
    missing: &'a mut BTreeSet<Asked>,
) -> Result<impl Iterator<Item = &'a Asked>> {
    let page = scenario.webhooks[0].metrics().await?.0 + &scenario.reconcilers[0].metrics().await?.0;
    missing.retain(|asked| !shows(&page, asked));
    Ok(missing.iter())
}
