//! `kubectl spot-balancer advise` on the event logs of real Spark, and what its formats are for: a shell, YAML, the chart.

#![allow(clippy::indexing_slicing, reason = "JSON is read by index; a panic here fails a test, as it should")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use balancer_tests::helm::{Helm, objects};
use balancer_tests::need;
use balancer_tests::parts::program;
use balancer_tests::process::scratch_path;
use balancer_tests::spark_local::{Finished, run};
use serde_json::{Value, json};

/// Reads a file, shuffles, and prints what Spark itself counted, by the store behind its web pages.
const APPLICATION: &str = r#"
import json
from pyspark.sql import SparkSession

with open("words.txt", "w") as file:
    file.writelines(f"{n % 97} {n}\n" for n in range(50000))
spark = SparkSession.builder.appName("words").getOrCreate()
words = spark.read.text("file://" + __import__("os").path.abspath("words.txt"))
counts = words.selectExpr("split(value, ' ')[0] as k").repartition(6).groupBy("k").count()
assert counts.count() == 97
context = spark.sparkContext._jsc.sc()
context.listenerBus().waitUntilEmpty()
summaries = context.statusStore().executorList(False)
executors = [summaries.apply(n) for n in range(summaries.size())]
workers = [e for e in executors if e.totalTasks() > 0 or e.id() != "driver"]
print("RESULT " + json.dumps({
    "applicationId": context.applicationId(),
    "executors": len(workers),
    "tasks": sum(e.totalTasks() for e in executors),
    "inputBytes": sum(e.totalInputBytes() for e in executors),
    "shuffleWrittenBytes": sum(e.totalShuffleWrite() for e in executors),
    "shuffleReadBytes": sum(e.totalShuffleRead() for e in executors),
    "executorCores": max(e.totalCores() for e in workers),
}))
spark.stop()
"#;

/// What makes a run the same each time.
const SETTINGS: [&str; 2] = ["spark.sql.adaptive.enabled=false", "spark.sql.shuffle.partitions=5"];

fn advise(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(program("kubectl-spot_balancer")?);
    Ok(command.env_clear().arg("advise").args(arguments).stdin(Stdio::null()).output()?)
}

fn printed(arguments: &[&str]) -> Result<String> {
    let output = advise(arguments)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The reason for which the command ends with an error.
fn refused(arguments: &[&str]) -> Result<String> {
    let output = advise(arguments)?;
    ensure!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    ensure!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(String::from_utf8(output.stderr)?)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// Checks the facts of the log against what Spark counted, and returns the advice.
fn agrees(finished: &Finished) -> Result<Value> {
    let advice: Value =
        serde_json::from_str(&printed(&["--event-log", text(&finished.event_log)?, "--output", "json"])?)?;
    let counted: Value = serde_json::from_str(&finished.result)?;
    for (fact, expected) in counted.as_object().context("no facts")? {
        assert_eq!(advice["run"][fact], *expected, "{fact}");
    }
    assert!(counted["shuffleWrittenBytes"].as_u64() > Some(0), "{counted}");
    let run = &advice["run"];
    assert_eq!((&run["applicationName"], &run["complete"]), (&json!("words"), &json!(true)));
    assert_eq!((&run["failedTasks"], &run["invalidLines"]), (&json!(0), &json!(0)));
    assert_eq!(run["largestStageTasks"], 6);
    Ok(advice)
}

#[tokio::test]
async fn a_local_run_with_what_is_advised_leaves_a_log_that_agrees_with_what_spark_counted() -> Result<()> {
    need!(Plugin, Spark);
    let arguments = arguments()?;
    let arguments = arguments.each_ref().map(String::as_str);
    // With all that is advised, so that Spark has accepted it once. What comes last applies.
    let advised: Vec<String> =
        settings(&arguments)?.into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    let used: Vec<&str> = advised.iter().map(String::as_str).chain(SETTINGS).collect();
    let finished = run("local[2]", &used, APPLICATION).await?;
    let advice = agrees(&finished)?;
    assert_eq!((&advice["run"]["local"], &advice["run"]["executors"]), (&json!(true), &json!(1)));
    let table = printed(&["--event-log", text(&finished.event_log)?])?;
    assert!(table.starts_with("EARLIER RUN"), "{table}");
    assert!(!table.contains('\u{1b}'), "no colours outside a terminal");

    // A log whose end is missing, as that of a running application.
    let log = std::fs::read(&finished.event_log)?;
    let cut = scratch_path("spark-1.inprogress")?;
    std::fs::write(&cut, &log[..log.len() - 100])?;
    let advice: Value = serde_json::from_str(&printed(&["--event-log", text(&cut)?, "--output", "json"])?)?;
    assert_eq!((&advice["run"]["complete"], &advice["run"]["invalidLines"]), (&json!(false), &json!(1)));
    Ok(())
}

#[tokio::test]
async fn a_rolled_and_compressed_log_of_two_executors_agrees_with_what_spark_counted() -> Result<()> {
    need!(Plugin, Spark);
    let logged = ["spark.eventLog.compress=true", "spark.eventLog.rolling.enabled=true", "spark.executor.memory=512m"];
    let finished = run("local-cluster[2,1,1024]", &[&SETTINGS[..], &logged[..]].concat(), APPLICATION).await?;
    let files: Vec<_> = std::fs::read_dir(&finished.event_log)?.collect::<Result<_, _>>()?;
    assert!(files.iter().any(|file| file.file_name().to_string_lossy().ends_with(".zstd")), "{files:?}");
    let advice = agrees(&finished)?;
    let run = &advice["run"];
    assert_eq!((&run["executors"], &run["executorsAtOnce"], &run["executorsLost"]), (&json!(2), &json!(2), &json!(0)));
    assert_eq!((&run["local"], &run["executorCores"]), (&json!(false), &json!(1)));
    Ok(())
}

/// All settings of some advice, by their names.
fn settings(arguments: &[&str]) -> Result<Vec<(String, String)>> {
    let advice: Value = serde_json::from_str(&printed(&[arguments, &["--output", "json"]].concat())?)?;
    let settings = advice["settings"].as_array().context("no settings")?.iter();
    settings.map(|setting| Ok((string(&setting["name"])?, string(&setting["value"])?))).collect()
}

fn string(value: &Value) -> Result<String> {
    value.as_str().map(str::to_owned).with_context(|| format!("{value} is no text"))
}

/// Four executors that wrote 400 GiB of shuffle files, so that the advice has volumes, and with them every kind of setting.
const LARGE_SHUFFLE: [&str; 4] = [
    r#"{"Event":"SparkListenerApplicationStart","App Name":"a","App ID":"b","Timestamp":1000,"User":"u"}"#,
    r#"{"Event":"SparkListenerExecutorAdded","Timestamp":1000,"Executor ID":"1","Executor Info":{"Host":"h","Total Cores":16}}"#,
    r#"{"Event":"SparkListenerTaskEnd","Stage ID":0,"Task End Reason":{"Reason":"Success"},"Task Info":{"Launch Time":1000,"Finish Time":9000},"Task Metrics":{"Shuffle Write Metrics":{"Shuffle Bytes Written":429496729600}}}"#,
    r#"{"Event":"SparkListenerStageCompleted","Stage Info":{"Stage ID":0,"Number of Tasks":16,"Submission Time":1000,"Completion Time":9000}}"#,
];

/// The arguments for advice by that run.
fn arguments() -> Result<[String; 4]> {
    let log = scratch_path("large-shuffle")?;
    std::fs::write(&log, LARGE_SHUFFLE.join("\n"))?;
    Ok(["--event-log".into(), text(&log)?.to_owned(), "--preset".into(), "reliable".into()])
}

#[test]
fn flags_of_spark_submit_reach_it_through_a_shell_as_they_are() -> Result<()> {
    need!(Plugin);
    let arguments = arguments()?;
    let arguments = arguments.each_ref().map(String::as_str);
    let script = printed(&[&arguments[..], &["--format", "spark-submit"]].concat())?;
    let (comments, flags): (Vec<&str>, Vec<&str>) = script.lines().partition(|line| line.starts_with('#'));
    let shell = format!("printf '%s\\n' \\\n{}", flags.join("\n"));
    let output = Command::new("/bin/sh").arg("-euc").arg(shell).output()?;
    let words = String::from_utf8(output.stdout)?;
    let expected: Vec<String> = settings(&arguments)?
        .into_iter()
        .flat_map(|(name, value)| ["--conf".into(), format!("{name}={value}")])
        .collect();
    assert_eq!(words.lines().collect::<Vec<_>>(), expected);
    for (name, _) in settings(&arguments)? {
        assert!(comments.iter().any(|comment| comment.starts_with(&format!("# {name}: "))), "{name} has no reason");
    }
    let template = comments.iter().find_map(|comment| comment.split_once("unless you have a template: "));
    let [template] = &objects(template.context("no template")?.1)?[..] else { anyhow::bail!("not one document") };
    assert_eq!(template["spec"]["terminationGracePeriodSeconds"], 120);
    Ok(())
}

#[test]
fn a_spark_application_has_every_setting_in_its_field() -> Result<()> {
    need!(Plugin);
    let arguments = arguments()?;
    let arguments = arguments.each_ref().map(String::as_str);
    let yaml = printed(&[&arguments[..], &["--format", "spark-application"]].concat())?;
    let [application] = &objects(&yaml)?[..] else { anyhow::bail!("not one document:\n{yaml}") };
    assert_eq!(
        (&application["apiVersion"], &application["kind"]),
        (&json!("sparkoperator.k8s.io/v1beta2"), &json!("SparkApplication"))
    );
    let (spec, executor) = (&application["spec"], &application["spec"]["executor"]);
    for (name, value) in settings(&arguments)? {
        let (field, expected) = match name.as_str() {
            "spark.executor.instances" => (&executor["instances"], json!(value.parse::<u32>()?)),
            "spark.executor.cores" => (&executor["cores"], json!(value.parse::<u32>()?)),
            "spark.kubernetes.executor.request.cores" => (&executor["coreRequest"], json!(value)),
            "spark.executor.memory" => (&executor["memory"], json!(value)),
            "spark.executor.memoryOverhead" => (&executor["memoryOverhead"], json!(value)),
            "spark.kubernetes.executor.terminationGracePeriodSeconds" => {
                (&executor["terminationGracePeriodSeconds"], json!(120))
            }
            // The operator sets the grace period, for which the template is.
            "spark.kubernetes.executor.podTemplateFile" => (&spec["sparkConf"][&name], Value::Null),
            _ => match name.strip_prefix("spark.kubernetes.driver.annotation.") {
                Some(annotation) => (&spec["driver"]["annotations"][annotation], json!(value)),
                None => (&spec["sparkConf"][&name], json!(value)),
            },
        };
        assert_eq!(*field, expected, "{name}");
    }
    Ok(())
}

#[test]
fn a_job_of_emr_has_every_setting_in_spark_defaults() -> Result<()> {
    need!(Plugin);
    let arguments = arguments()?;
    let arguments = arguments.each_ref().map(String::as_str);
    let yaml = printed(&[&arguments[..], &["--format", "emr"]].concat())?;
    let [job] = &objects(&yaml)?[..] else { anyhow::bail!("not one document:\n{yaml}") };
    let classification = &job["configurationOverrides"]["applicationConfiguration"][0];
    assert_eq!(classification["classification"], "spark-defaults");
    for (name, value) in settings(&arguments)? {
        let value = if name.ends_with("podTemplateFile") { format!("s3://BUCKET/{value}") } else { value };
        assert_eq!(classification["properties"][&name], json!(value), "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn the_chart_accepts_the_values_of_every_preset() -> Result<()> {
    need!(Plugin, Helm);
    let mut helm = Helm::start().await?;
    for (preset, ratio, preference, fallback) in
        [("cost", "1", "STRICT", "0"), ("balanced", "0.8", "STRICT", "180"), ("reliable", "0.5", "BEST_EFFORT", "0")]
    {
        let yaml = printed(&["--input", "500GiB", "--preset", preset, "--format", "helm"])?;
        let [values] = &objects(&yaml)?[..] else { anyhow::bail!("not one document:\n{yaml}") };
        assert!(!yaml.contains("shuffle") && !yaml.contains("volume"), "it is for all jobs:\n{yaml}");
        assert!(
            yaml.contains("# These values are for every job that states nothing itself, streams included"),
            "{yaml}"
        );
        let manifests = helm.template(values).await?;
        for (variable, expected) in [
            ("DEFAULT_SPOT_RATIO", ratio),
            ("SPOT_PREFERENCE", preference),
            ("SPOT_FALLBACK_SECONDS", fallback),
            ("DRIVER_CAPACITY", "on-demand"),
        ] {
            assert_eq!(environment(&manifests, variable)?.as_deref(), Some(expected), "{preset}: {variable}");
        }
    }
    Ok(())
}

/// The value of a variable in any Deployment of these manifests.
fn environment(manifests: &str, variable: &str) -> Result<Option<String>> {
    let objects = objects(manifests)?;
    let containers = objects.iter().filter_map(|object| object["spec"]["template"]["spec"]["containers"].as_array());
    let mut variables = containers.flatten().filter_map(|container| container["env"].as_array()).flatten();
    Ok(variables.find(|entry| entry["name"] == variable).and_then(|entry| entry["value"].as_str()).map(str::to_owned))
}

#[test]
fn what_cannot_be_sized_is_refused_with_what_is_accepted() -> Result<()> {
    need!(Plugin);
    let file = |name: &str, content: &str| -> Result<std::path::PathBuf> {
        let path = scratch_path(name)?;
        std::fs::write(&path, content)?;
        Ok(path)
    };
    let start = r#"{"Event":"SparkListenerApplicationStart","App Name":"a","App ID":"b","Timestamp":1,"User":"u"}"#;
    let task = r#"{"Event":"SparkListenerTaskEnd","Stage ID":0,"Task End Reason":{"Reason":"Success"},"Task Info":{"Launch Time":1,"Finish Time":9}}"#;
    let (lz4, other, idle) = (file("app-1.lz4", "")?, file("notes.txt", "hello\n")?, file("app-2", start)?);
    let early = file("app-3", &format!("{start}\n{task}\n"))?;
    let rows: [(&[&str], &[&str]); 9] = [
        (&[], &["--input", "--event-log"]),
        (&["--input", "500GiB", "--event-log", "x"], &["cannot be used with"]),
        (&["--input", "5"], &["'5'", "1MiB to 1PiB"]),
        (&["--input", "-5GiB"], &["unexpected argument"]),
        (&["--event-log", "/no/such/log"], &["/no/such/log", "No such file"]),
        (&["--event-log", text(&lz4)?], &["compressed with lz4", ".zstd"]),
        (&["--event-log", text(&other)?], &["no event log of Spark", "spark.eventLog.enabled=true"]),
        (&["--event-log", text(&idle)?], &["no task that ended"]),
        (&["--event-log", text(&early)?], &["no stage that did", "Wait until one has"]),
    ];
    for (arguments, expected) in rows {
        let error = refused(arguments)?;
        for part in expected {
            assert!(error.contains(part), "{arguments:?}: {error}");
        }
    }
    Ok(())
}
