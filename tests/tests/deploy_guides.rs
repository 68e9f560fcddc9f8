//! What the guides and the files that come with them say about Spark and Karpenter, as far as it can be checked here.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use balancer_core::{CapacityLabels, CapacityProfile, LabelValues, Toleration};
use balancer_tests::guide::blocks;
use balancer_tests::helm::{object, objects, repository};
use balancer_tests::need;
use balancer_tests::parts::program;
use serde_json::{Value, json};

/// The guides for people who submit jobs.
const GUIDES: [&str; 5] =
    ["docs/spark.md", "docs/platforms.md", "docs/submitting.md", "docs/install.md", "docs/when-spot-runs-out.md"];

fn read(file: &str) -> Result<Vec<Value>> {
    objects(&std::fs::read_to_string(repository(file))?)
}

fn node_pools() -> Result<Vec<Value>> {
    read("deploy/node-pools.yaml")
}

/// A duration as Karpenter writes it, such as `1h30m`.
fn duration(text: &str) -> Result<Duration> {
    let mut total = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit()).with_context(|| format!("no unit in {text}"))?;
        let (number, unit) = rest.split_at(end);
        let seconds = [('h', 3600), ('m', 60), ('s', 1)];
        let (_, seconds) = seconds.iter().find(|(name, _)| unit.starts_with(*name)).context(text.to_owned())?;
        total += number.parse::<u64>().with_context(|| text.to_owned())? * seconds;
        rest = unit.get(1..).unwrap_or_default();
    }
    Ok(Duration::from_secs(total))
}

// EKS Auto Mode answers "the sum of expireAfter and terminationGracePeriod (defaulted to 24h) may not exceed 21 days".
#[test]
fn node_pools_keep_to_the_21_days_of_eks_auto_mode() -> Result<()> {
    let pools = node_pools()?;
    ensure!(pools.len() == 3, "{} pools", pools.len());
    for pool in pools {
        let (name, spec) = (&pool["metadata"]["name"], &pool["spec"]["template"]["spec"]);
        // Karpenter's default for the one is a month, which exceeds the limit.
        let expires = duration(spec["expireAfter"].as_str().with_context(|| format!("{name} has no expireAfter"))?)?;
        let drains = duration(spec["terminationGracePeriod"].as_str().unwrap_or("24h"))?;
        assert!(expires + drains <= duration("504h")?, "{name}: {expires:?} and {drains:?}");
    }
    Ok(())
}

fn capacities(pools: &[Value], name: &str) -> Result<Value> {
    let pool = object(pools, "NodePool", name)?;
    let requirements = pool.pointer("/spec/template/spec/requirements").and_then(Value::as_array);
    let capacity = requirements
        .context("no requirements")?
        .iter()
        .find(|requirement| requirement["key"] == "karpenter.sh/capacity-type");
    Ok(capacity.context("any capacity")?["values"].clone())
}

#[test]
fn only_executors_can_get_spot_nodes() -> Result<()> {
    let pools = node_pools()?;
    assert_eq!(capacities(&pools, "spark-executors")?, json!(["spot", "on-demand"]));
    assert_eq!(capacities(&pools, "spark-drivers")?, json!(["on-demand"]));
    assert_eq!(capacities(&pools, "tooling")?, json!(["on-demand"]));
    Ok(())
}

#[test]
fn the_pod_templates_lead_to_their_node_pools() -> Result<()> {
    let pools = node_pools()?;
    for (template, pool) in [("executor-template", "spark-executors"), ("driver-template", "spark-drivers")] {
        let templates = read(&format!("deploy/{template}.yaml"))?;
        let (spec, pool) = (&templates[0]["spec"], &object(&pools, "NodePool", pool)?["spec"]["template"]);
        assert_eq!(spec["nodeSelector"], pool["metadata"]["labels"], "{template}");
        let taints = pool["spec"]["taints"].as_array().context("no taints")?;
        let tolerated: Vec<Value> = taints
            .iter()
            .map(|taint| {
                let (key, value, effect) = (&taint["key"], &taint["value"], &taint["effect"]);
                json!({"key": key, "operator": "Equal", "value": value, "effect": effect})
            })
            .collect();
        assert_eq!(spec["tolerations"], json!(tolerated), "{template}");
    }
    Ok(())
}

/// The annotations in an object, at any depth.
fn annotations<'a>(value: &'a Value, found: &mut Vec<(&'a String, &'a Value)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match (name.as_str(), value) {
                    ("annotations" | "extraAnnotations", Value::Object(pairs)) => found.extend(pairs),
                    _ => annotations(value, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| annotations(item, found)),
        _ => {}
    }
}

// A ratio or an `off` without quotes is a number or a boolean, which Kubernetes refuses as an annotation.
#[test]
fn the_yaml_of_the_guides_can_be_read_and_its_annotations_are_texts() -> Result<()> {
    let mut count = 0;
    for guide in GUIDES {
        for block in blocks(guide, "yaml")? {
            let documents = objects(&block).with_context(|| format!("{guide}:\n{block}"))?;
            let mut found = Vec::new();
            documents.iter().for_each(|document| annotations(document, &mut found));
            for (name, value) in &found {
                assert!(value.is_string(), "{guide}: {name}: {value}");
            }
            count += found.len();
        }
    }
    assert!(count >= 5, "only {count} annotations found");
    Ok(())
}

/// The names in an object that another does not have, with their paths.
fn missing(named: &Value, there: &Value, path: &str, found: &mut Vec<String>) {
    for (name, value) in named.as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        match there.get(name) {
            None => found.push(path),
            // What is empty is for names of the user's.
            Some(there) if there.as_object().is_some_and(|there| !there.is_empty()) => {
                missing(value, there, &path, found);
            }
            Some(_) => {}
        }
    }
}

#[test]
fn the_chart_has_every_value_that_the_guides_set() -> Result<()> {
    let values = read("deploy/chart/spot-balancer/values.yaml")?;
    let mut count = 0;
    for guide in GUIDES {
        for block in blocks(guide, "yaml")? {
            for document in objects(&block)?.iter().filter(|document| document.get("settings").is_some()) {
                let mut found = Vec::new();
                missing(document, &values[0], "", &mut found);
                assert_eq!(found, [""; 0], "{guide}");
                count += 1;
            }
        }
    }
    assert!(count >= 6, "only {count} blocks with settings");
    Ok(())
}

/// The cells of the two rows that platforms.md has for a profile: its nodes, and what is written on executors.
fn rows(text: &str, profile: CapacityProfile) -> Result<[Vec<&str>; 2]> {
    let start = format!("| `{}`", profile.as_str());
    let rows = text.lines().filter(|line| line.starts_with(&start));
    let rows: Vec<Vec<&str>> = rows.map(|row| row.split('|').map(str::trim).collect()).collect();
    <[Vec<&str>; 2]>::try_from(rows).map_err(|rows| anyhow!("{} rows for {}", rows.len(), profile.as_str()))
}

#[test]
fn the_platforms_page_states_every_profile_as_it_is() -> Result<()> {
    let text = std::fs::read_to_string(repository("docs/platforms.md"))?;
    for profile in CapacityProfile::ALL {
        let name = profile.as_str();
        let [nodes, written] = rows(&text, profile)?;
        let labels = CapacityLabels::of(profile);
        let (spot, other) = match &labels.spot_values {
            LabelValues::Any => ("affinity `Exists`".to_owned(), "affinity `DoesNotExist`".to_owned()),
            LabelValues::OneOf(values) => {
                let list = values.join(", ");
                let spot = if values.len() == 1 {
                    format!("nodeSelector `{list}`")
                } else {
                    format!("affinity `In [{list}]`")
                };
                assert!(values.iter().all(|value| nodes[3].contains(&format!("={value}`"))), "{name}: {}", nodes[3]);
                (spot, format!("affinity `NotIn [{list}]`"))
            }
        };
        assert!(nodes[3].contains(&labels.label), "{name}: {}", nodes[3]);
        let (at, on_demand) = match labels.on_demand_values.as_slice() {
            [] => ("every other node".to_owned(), other),
            [value] => (format!("`{}={value}`", labels.label), format!("nodeSelector `{value}`")),
            values => (String::new(), format!("affinity `In [{}]`", values.join(", "))),
        };
        assert_eq!(nodes[4], at, "{name}");
        let toleration = match labels.spot_tolerations.as_slice() {
            [] => "–".to_owned(),
            [Toleration { key, value: Some(value), effect }] => format!("`{key}={value}:{effect}`"),
            [Toleration { key, value: None, effect }] => format!("key `{key}`, any value, `{effect}`"),
            several => format!("{several:?}"),
        };
        assert_eq!(written[2..5], [spot, on_demand, toleration], "{name}");
    }
    Ok(())
}

/// The properties that a text names.
fn properties(text: &str) -> BTreeSet<String> {
    let part_of_one = |letter: char| letter.is_ascii_alphanumeric() || ".-_/".contains(letter);
    let words = text.split(|letter| !part_of_one(letter)).filter(|word| word.starts_with("spark."));
    let words = words.map(|word| word.trim_end_matches(['.', '-']));
    words.filter(|word| *word != "spark" && !word.ends_with(".md")).map(str::to_owned).collect()
}

/// Reads properties, a line each, and prints those that no class of Spark contains. A text in a class has its length in
/// front of it, so that the beginning of a longer one is not found.
const UNKNOWN: &str = r#"
import glob, sys, zipfile
parts = ("core", "kubernetes", "streaming", "catalyst", "sql")
# Of the large ones, only the classes of the configuration.
names = {"catalyst": "/internal/", "sql": "RocksDBConf"}
classes = b""
for part in parts:
    with zipfile.ZipFile(glob.glob(f"{sys.argv[1]}/spark-{part}_*.jar")[0]) as jar:
        classes += b"".join(jar.read(name) for name in jar.namelist() if names.get(part, ".class") in name)
def known(text):
    return b"\x01" + len(text).to_bytes(2, "big") + text.encode() in classes
for name in sys.stdin.read().split():
    ends = [at for at, letter in enumerate(name) if letter == "."]
    starts = [name[: at + 1] for at in ends]
    # After these come names of the user's.
    starts = [start for start in starts if start.endswith((".annotation.", ".label.", ".node.selector.", ".volumes."))]
    if known(name) or any(known(start) for start in starts):
        continue
    # Some are made of two texts.
    if not any(known(name[:at]) and (known(name[at:]) or known(name[at + 1 :])) for at in ends):
        print(name)
"#;

fn unknown(properties: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let jars = program("spark-submit")?.parent().context("spark-submit is in no folder")?.join("../jars");
    let mut command = Command::new(program("python3")?);
    command.arg("-c").arg(UNKNOWN).arg(jars).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let lines = properties.iter().fold(String::new(), |lines, name| lines + name + "\n");
    child.stdin.take().context("no standard input")?.write_all(lines.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "python3 failed");
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

#[test]
fn spark_has_every_property_that_the_guides_name() -> Result<()> {
    need!(Spark);
    // A property of Spark 4.1 and newer, and a value of the operator's chart.
    let others = ["spark.kubernetes.executor.terminationGracePeriodSeconds", "spark.jobNamespaces"];
    let others = BTreeSet::from(others.map(str::to_owned));
    let mut named = BTreeSet::new();
    for guide in GUIDES {
        named.extend(properties(&std::fs::read_to_string(repository(guide))?));
    }
    assert!(named.len() > 40, "only {named:?}");
    assert_eq!(unknown(&named)?, others);
    // What is written wrongly is found.
    let wrong =
        BTreeSet::from(["spark.decommission.enable".to_owned(), "spark.kubernetes.driver.pod.names".to_owned()]);
    assert_eq!(unknown(&wrong)?, wrong);
    Ok(())
}
