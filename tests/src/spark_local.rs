//! Real Spark on this machine without a cluster: an application in Python that runs to its end and writes an event log.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::parts::program;
use crate::process::{Process, scratch_path};
use crate::wait::while_progressing;

/// What begins the line that an application prints as its result.
pub const RESULT: &str = "RESULT ";

/// What an application left behind.
#[derive(Debug)]
pub struct Finished {
    /// What it printed after [`RESULT`].
    pub result: String,
    /// The file of its event log, or the folder if the log is a rolled one.
    pub event_log: PathBuf,
}

/// Runs an application with this master, such as `local[2]`, and these settings.
pub async fn run(master: &str, settings: &[&str], application: &str) -> Result<Finished> {
    let submit = program("spark-submit")?;
    let home = submit.ancestors().nth(2).context("spark-submit is in no folder")?.to_owned();
    let source = scratch_path("application.py")?;
    std::fs::write(&source, application)?;
    let (logs, work) = (scratch_path("logs")?, scratch_path("work")?);
    std::fs::create_dir(&logs)?;
    std::fs::create_dir(&work)?;
    let log_folder = format!("spark.eventLog.dir=file://{}", logs.display());
    let ours = ["spark.eventLog.enabled=true", &log_folder, "spark.ui.enabled=false", "spark.driver.memory=512m"];
    let mut process = Process::start(&submit, |command| {
        command.arg("--master").arg(master);
        for setting in ours.iter().chain(settings) {
            command.arg("--conf").arg(setting);
        }
        command.arg(&source).current_dir(&work);
        command.env("SPARK_HOME", &home).env("PYSPARK_PYTHON", "/usr/bin/python3");
        command.env("SPARK_LOCAL_IP", "127.0.0.1").env("SPARK_LOCAL_DIRS", &work);
    })?;
    let ended =
        while_progressing("the end of Spark", async || Ok((process.log_length()?, process.exit_status()?))).await;
    let status = ended.with_context(|| process.log_tail())?;
    let log = process.log()?;
    ensure!(status.success(), "Spark ended with {status}:\n{}", process.log_tail());
    let result = log.lines().find_map(|line| line.strip_prefix(RESULT)).with_context(|| process.log_tail())?;
    Ok(Finished { result: result.to_owned(), event_log: only_entry(&logs)? })
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let mut entries = std::fs::read_dir(folder)?;
    let entry = entries.next().with_context(|| format!("no event log in {}", folder.display()))??;
    ensure!(entries.next().is_none(), "more than one event log in {}", folder.display());
    Ok(entry.path())
}
