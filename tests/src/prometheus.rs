//! A Prometheus of a test's own, which scrapes what the chart's monitor has scraped and follows the
//! chart's rules; and promtool, which checks rules and plays series to them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kube::Client;
use serde_json::{Value, json};

use crate::endpoint;
use crate::helm::{RELEASE, object};
use crate::parts::program;
use crate::port;
use crate::process::{Process, Signal, scratch_path};
use crate::wait::until_true;

const START: Duration = Duration::from_secs(30);
/// Between two scrapes, and between two evaluations of the rules.
const INTERVAL: &str = "500ms";

/// A process of ours, as a pod behind one of the chart's Services.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The Service that the monitor selects.
    pub service: &'a str,
    /// What the pod would be called.
    pub pod: &'a str,
    /// Its admin port.
    pub port: u16,
}

/// One series of an answer, and its value.
pub type Sample = (BTreeMap<String, String>, f64);

/// A running Prometheus. Dropping it kills it.
pub struct Prometheus {
    process: Process,
    client: Client,
}

impl Prometheus {
    /// Starts a Prometheus that scrapes the targets with the labels that the rendered ServiceMonitor
    /// makes of its Services. When it has scraped all, and not before, it follows these rules.
    pub async fn start(rendered: &[Value], targets: &[Target<'_>], rules: &Value) -> Result<Self> {
        let targets: Vec<Value> = targets.iter().map(|target| found(rendered, target)).collect::<Result<_>>()?;
        let monitor = object(rendered, "ServiceMonitor", RELEASE)?;
        let relabelings = monitor["spec"]["endpoints"][0]["relabelings"].as_array().context("no relabelings")?;
        let relabelings: Vec<_> = relabelings
            .iter()
            .map(|step| {
                let mut relabeling = json!({"target_label": step["targetLabel"]});
                for (name, field) in [("source_labels", "sourceLabels"), ("replacement", "replacement")] {
                    if !step[field].is_null() {
                        relabeling[name] = step[field].clone();
                    }
                }
                relabeling
            })
            .collect();
        let scraped = json!({"job_name": "chart", "static_configs": targets, "relabel_configs": relabelings});
        let folder = folder()?;
        let configuration = json!({
            "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL},
            "rule_files": [RULES],
            "scrape_configs": [scraped],
        });
        // JSON is YAML too.
        std::fs::write(folder.join("prometheus.yml"), configuration.to_string())?;
        let port = port::free()?;
        let mut process = Process::start(&program("prometheus")?, |command| {
            command
                .arg(format!("--config.file={}", folder.join("prometheus.yml").display()))
                .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
                .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        })?;
        let client = endpoint::client(&endpoint::http(port))?;
        process.until_ok(START, &client, "/-/ready").await?;
        let prometheus = Self { process, client };
        until_true(START, "all targets to be scraped", async || {
            Ok(prometheus.query("up == 1").await?.len() == targets.len())
        })
        .await?;
        write(rules, &folder)?;
        prometheus.process.signal(Signal::HUP)?;
        until_true(START, "the rules to be read", async || Ok(!prometheus.alerts().await?.is_empty())).await?;
        Ok(prometheus)
    }

    /// The answer to an expression, now.
    pub async fn query(&self, expression: &str) -> Result<Vec<Sample>> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let data = self.get(&format!("/api/v1/query?query={encoded}")).await?;
        let series = data["result"].as_array().with_context(|| format!("no vector: {data}"))?;
        let sample = |series: &Value| -> Result<Sample> {
            let value = series["value"][1].as_str().context("no value")?;
            Ok((serde_json::from_value(series["metric"].clone())?, value.parse()?))
        };
        series.iter().map(sample).collect()
    }

    /// The alerting rules by their names: how far each is, of those of one name the furthest
    /// (`inactive`, `pending`, `firing`).
    pub async fn alerts(&self) -> Result<BTreeMap<String, String>> {
        const STATES: [&str; 3] = ["inactive", "pending", "firing"];
        let data = self.get("/api/v1/rules?type=alert").await?;
        let mut states = BTreeMap::new();
        for rule in
            data["groups"].as_array().into_iter().flatten().flat_map(|group| group["rules"].as_array()).flatten()
        {
            ensure!(rule["health"] == "ok", "not evaluated: {rule}");
            let state = STATES.iter().position(|state| rule["state"] == *state).context("an unknown state")?;
            let furthest = states.entry(rule["name"].as_str().context("no name")?.to_owned()).or_insert(0);
            *furthest = state.max(*furthest);
        }
        Ok(states.into_iter().map(|(name, state)| (name, STATES[state].to_owned())).collect())
    }

    async fn get(&self, path: &str) -> Result<Value> {
        let mut answer = endpoint::get(&self.client, path).await?.json()?;
        ensure!(answer["status"] == "success", "Prometheus answers {answer}");
        Ok(answer["data"].take())
    }
}

/// A target as the Prometheus operator has it found: by the labels of its Service, and with those that
/// the operator adds by itself.
fn found(rendered: &[Value], target: &Target<'_>) -> Result<Value> {
    let service = object(rendered, "Service", target.service)?;
    let mut labels = json!({
        "namespace": RELEASE,
        "service": target.service,
        "pod": target.pod,
        "container": "balancer",
        "endpoint": "metrics",
    });
    let own = service["metadata"]["labels"].as_object().context("a Service without labels")?;
    for (label, value) in own {
        let label = label.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        labels[format!("__meta_kubernetes_service_label_{label}")] = value.clone();
    }
    Ok(json!({"targets": [format!("127.0.0.1:{}", target.port)], "labels": labels}))
}

const RULES: &str = "rules.yaml";

fn folder() -> Result<PathBuf> {
    let folder = scratch_path("prometheus")?;
    std::fs::create_dir(&folder)?;
    Ok(folder)
}

/// Writes the rules into the folder: the `spec` of a PrometheusRule is what Prometheus reads.
fn write(rules: &Value, folder: &Path) -> Result<()> {
    Ok(std::fs::write(folder.join(RULES), rules["spec"].to_string())?)
}

/// `promtool check rules`.
pub fn check(rules: &Value) -> Result<()> {
    let folder = folder()?;
    write(rules, &folder)?;
    promtool(&["check", "rules", "--lint=all", "--lint-fatal"], &folder.join(RULES))
}

/// `promtool test rules`, with a test file whose `rule_files` is `rules.yaml`.
pub fn play(rules: &Value, tests: &Path) -> Result<()> {
    let folder = folder()?;
    write(rules, &folder)?;
    let copy = folder.join("tests.yaml");
    std::fs::copy(tests, &copy).with_context(|| tests.display().to_string())?;
    promtool(&["test", "rules"], &copy).with_context(|| format!("{} fails", tests.display()))
}

fn promtool(arguments: &[&str], file: &Path) -> Result<()> {
    let output = std::process::Command::new(program("promtool")?).args(arguments).arg(file).output()?;
    if !output.status.success() {
        let told = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        bail!("promtool: {}", told.concat());
    }
    Ok(())
}
