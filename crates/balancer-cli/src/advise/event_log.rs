//! Reads what matters for sizing out of the event log of a Spark run, in one pass and in bounded memory.
//!
//! The names are those of Spark's `JsonProtocol`: one JSON object per line, with the kind in `Event`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::BufRead;
use std::num::NonZeroUsize;
use std::path::Path;

use balancer_runtime::text::number_of;
use lru::LruCache;
use serde::{Deserialize, Serialize};

use crate::output::{printable, shorten};

use super::concurrency::Concurrency;
use super::log_file::{self, Line, LogFileError};

/// The longest line that is read. A longer one is nearly always the plan of an SQL query, which is not needed.
const LONGEST_LINE: usize = 4 << 20;
/// How many live executors are followed. Kubernetes has less room for pods than that.
const MOST_EXECUTORS: usize = 100_000;
/// The longest id of an executor and name of an application; the limit of Kubernetes for names.
const LONGEST_NAME: usize = 253;
/// How many stages are followed at once, and how many gaps between stages.
const MOST_STAGES: usize = 1024;

/// The most CPUs of a task that are believed. No machine has more.
const MOST_TASK_CPUS: u64 = 1024;
/// What Spark gives as the reason when it has asked for the removal itself: executors that had nothing to do. The first is
/// also that of a decommissioned executor that has not ended by itself in time, so reclaimed ones may be among them. No
/// other event of the log tells them apart.
const KILLED_BY_SPARK: &str = "Executor killed by driver.";
/// The same if dynamic allocation releases them by decommissioning. An executor on a reclaimed node has other words after
/// the colon.
const RELEASED_BY_SPARK: &str = "Executor decommission: spark scale down";

/// Why the log tells nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum EventLogError {
    /// A file cannot be opened, or not be read from its start.
    #[error(transparent)]
    File(#[from] LogFileError),
    /// No line is an event of an application.
    #[error(
        "{path} is no event log of Spark: of {lines} lines none is a SparkListenerApplicationStart; accepted: a file that \
         Spark wrote with spark.eventLog.enabled=true"
    )]
    NoApplication {
        /// The path.
        path: String,
        /// How many lines were read.
        lines: u64,
    },
    /// The application ended, or its log does, before a task had.
    #[error(
        "{path} has no task that ended, so there is nothing to size by; accepted: the log of a run that did some work"
    )]
    NoTasks {
        /// The path.
        path: String,
    },
    /// Tasks ended, and no stage: how wide and how large the stages are cannot be told from the tasks that ended first.
    #[error(
        "{path} has {} that ended, and no stage that did; accepted: a log with a stage that ended. Wait until one has, or \
         take the log of another run",
        number_of(*tasks, "task")
    )]
    NoStages {
        /// The path.
        path: String,
        /// How many tasks ended.
        tasks: u64,
    },
}

/// What an earlier run did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Run {
    /// The id of the application.
    pub(super) application_id: String,
    /// Its name.
    pub(super) application_name: String,
    /// The version of Spark.
    pub(super) spark_version: String,
    /// Whether the log has the end of the application.
    pub(super) complete: bool,
    /// Whether the tasks ran inside the driver (`local[N]`).
    pub(super) local: bool,
    /// From the start of the application to its end.
    pub(super) duration_milliseconds: u64,
    /// The part of that in which a stage was running.
    pub(super) stages_milliseconds: u64,
    /// Executors that registered.
    pub(super) executors: u64,
    /// The most executors at one time.
    pub(super) executors_at_once: u64,
    /// The most cores of an executor.
    pub(super) executor_cores: u64,
    /// The most cores of all executors at one time.
    pub(super) cores_at_once: u64,
    /// The cores that each task took, if the run set it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) task_cpus: Option<u64>,
    /// The heap of an executor, if the run set it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) executor_memory_bytes: Option<u64>,
    /// What an executor had besides its heap, if the run set it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) executor_memory_overhead_bytes: Option<u64>,
    /// What the executors' cores were there, whether they had a task or not.
    pub(super) core_milliseconds: u64,
    /// Executors that were lost, by a reclaimed node or otherwise.
    pub(super) executors_lost: u64,
    /// Lost executors that may have had too little memory, by their exit code.
    pub(super) executors_out_of_memory: u64,
    /// Stages that ended, each attempt by itself.
    pub(super) stages: u64,
    /// Tasks that ended, each attempt by itself.
    pub(super) tasks: u64,
    /// Those that did not succeed.
    pub(super) failed_tasks: u64,
    /// Those of them that did not find a shuffle file.
    pub(super) fetch_failures: u64,
    /// The most tasks of a stage.
    pub(super) largest_stage_tasks: u64,
    /// Tasks at one time while the run did most of its work: the mean, in which each moment counts by its tasks.
    pub(super) concurrent_tasks: u64,
    /// Time of all tasks on their executors.
    pub(super) task_milliseconds: u64,
    /// The longest task.
    pub(super) longest_task_milliseconds: u64,
    /// Read from files and tables.
    pub(super) input_bytes: u64,
    /// Written to shuffle files.
    pub(super) shuffle_written_bytes: u64,
    /// Read from shuffle files.
    pub(super) shuffle_read_bytes: u64,
    /// The most that a stage wrote to shuffle files.
    pub(super) largest_shuffle_bytes: u64,
    /// The most that one task needed for joins, sorts and aggregations, without what it spilled.
    pub(super) peak_task_bytes: u64,
    /// The most that one task would have needed to spill nothing.
    pub(super) wanted_task_bytes: u64,
    /// Written to disk because memory was short.
    pub(super) spilled_bytes: u64,
    /// Whether the run added and released executors by itself.
    pub(super) dynamic_allocation: bool,
    /// Whether Spark has left out jobs that had ended, by compacting the log. Then sums are too small.
    pub(super) compacted: bool,
    /// Lines that were passed over because they are longer than 4 MiB.
    pub(super) long_lines: u64,
    /// Lines that were passed over because they are no event as Spark writes it.
    pub(super) invalid_lines: u64,
    /// Why the log could not be read to its end, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ended_early: Option<String>,
}

impl Run {
    /// The share of the executors' cores that had a task, if the log has it.
    pub(super) fn utilisation(&self) -> Option<f64> {
        let used = self.task_milliseconds as f64 * self.cpus_of_a_task() as f64;
        (self.core_milliseconds > 0).then(|| used / self.core_milliseconds as f64)
    }

    /// The cores that each task took.
    pub(super) fn cpus_of_a_task(&self) -> u64 {
        self.task_cpus.unwrap_or(1).max(1)
    }
}

/// Reads the log of one application.
pub(super) fn read(path: &Path) -> Result<Run, EventLogError> {
    let shown = path.display().to_string();
    let (mut reader, mut lines, mut buffer) = (RunReader::default(), 0_u64, Vec::new());
    for file in log_file::files(path)? {
        reader.run.compacted |= log_file::is_compacted(&file);
        let mut events = log_file::open(&file)?;
        if let Err(cause) = reader.read_all(&mut *events, &mut buffer, &mut lines) {
            let cause = LogFileError::Read { path: file.display().to_string(), cause };
            if lines == 0 {
                return Err(cause.into());
            }
            // What was read until here is of use, for example if the application is running.
            reader.run.ended_early = Some(cause.to_string());
            break;
        }
    }
    if reader.started.is_none() {
        return Err(EventLogError::NoApplication { path: shown, lines });
    }
    let run = reader.finish();
    if run.tasks == 0 {
        return Err(EventLogError::NoTasks { path: shown });
    }
    if run.stages == 0 {
        return Err(EventLogError::NoStages { path: shown, tasks: run.tasks });
    }
    Ok(run)
}

/// Adds up events.
struct RunReader {
    run: Run,
    started: Option<u64>,
    /// The latest time in any event, in milliseconds.
    latest: u64,
    live: HashMap<String, Live>,
    live_cores: u64,
    concurrency: Concurrency,
    shuffles: LruCache<(u64, u64), u64>,
    stages: Union,
}

struct Live {
    since: u64,
    cores: u64,
}

impl Default for RunReader {
    fn default() -> Self {
        let most = NonZeroUsize::new(MOST_STAGES).unwrap_or(NonZeroUsize::MIN);
        Self {
            run: Run::default(),
            started: None,
            latest: 0,
            live: HashMap::new(),
            live_cores: 0,
            concurrency: Concurrency::default(),
            shuffles: LruCache::new(most),
            stages: Union::default(),
        }
    }
}

impl RunReader {
    fn read_all(&mut self, from: &mut dyn BufRead, buffer: &mut Vec<u8>, lines: &mut u64) -> std::io::Result<()> {
        loop {
            match log_file::read_line(from, buffer, LONGEST_LINE)? {
                Line::End => return Ok(()),
                Line::TooLong => self.run.long_lines += 1,
                Line::Whole if buffer.iter().all(u8::is_ascii_whitespace) => {}
                Line::Whole if self.add(buffer).is_none() => self.run.invalid_lines += 1,
                Line::Whole => {}
            }
            *lines += 1;
        }
    }

    /// Adds one event; `None` if the line is none.
    fn add(&mut self, line: &[u8]) -> Option<()> {
        let Kind { event } = serde_json::from_slice(line).ok()?;
        match &*event {
            "SparkListenerLogStart" => {
                let event: LogStart<'_> = serde_json::from_slice(line).ok()?;
                self.run.spark_version = name(&event.version);
            }
            "SparkListenerApplicationStart" => {
                let event: ApplicationStart<'_> = serde_json::from_slice(line).ok()?;
                self.started = Some(event.timestamp);
                self.concurrency.begin(event.timestamp);
                self.run.application_name = name(&event.name);
                self.run.application_id = event.id.as_deref().map(name).unwrap_or_default();
                self.update_latest(event.timestamp);
            }
            "SparkListenerApplicationEnd" => {
                let event: ApplicationEnd = serde_json::from_slice(line).ok()?;
                self.run.complete = true;
                self.update_latest(event.timestamp);
            }
            "SparkListenerEnvironmentUpdate" => {
                let event: EnvironmentUpdate<'_> = serde_json::from_slice(line).ok()?;
                let Properties { dynamic_allocation, task_cpus, memory, memory_overhead } = event.properties;
                self.run.dynamic_allocation = dynamic_allocation.as_deref() == Some("true");
                let cpus = task_cpus.and_then(|text| text.parse().ok());
                self.run.task_cpus = cpus.filter(|cpus| (1..=MOST_TASK_CPUS).contains(cpus));
                self.run.executor_memory_bytes = memory.as_deref().and_then(memory_size);
                self.run.executor_memory_overhead_bytes = memory_overhead.as_deref().and_then(memory_size);
            }
            "SparkListenerExecutorAdded" => self.executor_added(serde_json::from_slice(line).ok()?)?,
            "SparkListenerExecutorRemoved" => self.executor_removed(&serde_json::from_slice(line).ok()?),
            "SparkListenerStageCompleted" => self.stage_completed(&serde_json::from_slice(line).ok()?),
            "SparkListenerTaskEnd" => self.task_ended(&serde_json::from_slice(line).ok()?),
            _ => {}
        }
        Some(())
    }

    fn update_latest(&mut self, time: u64) {
        self.latest = self.latest.max(time);
    }

    fn executor_added(&mut self, event: ExecutorAdded<'_>) -> Option<()> {
        if event.id.len() > LONGEST_NAME || self.live.len() >= MOST_EXECUTORS {
            return None;
        }
        self.update_latest(event.timestamp);
        self.run.local |= event.id == "driver";
        self.run.executor_cores = self.run.executor_cores.max(event.info.cores);
        let live = Live { since: event.timestamp, cores: event.info.cores };
        self.live_cores = self.live_cores.saturating_add(live.cores);
        match self.live.insert(event.id.into_owned(), live) {
            Some(before) => self.live_cores = self.live_cores.saturating_sub(before.cores),
            None => self.run.executors += 1,
        }
        self.run.cores_at_once = self.run.cores_at_once.max(self.live_cores);
        self.run.executors_at_once = self.run.executors_at_once.max(self.live.len() as u64);
        Some(())
    }

    fn executor_removed(&mut self, event: &ExecutorRemoved<'_>) {
        self.update_latest(event.timestamp);
        if let Some(live) = self.live.remove(&*event.id) {
            self.live_cores = self.live_cores.saturating_sub(live.cores);
            self.add_cores(&live, event.timestamp);
        }
        if ![KILLED_BY_SPARK, RELEASED_BY_SPARK].iter().any(|words| event.reason.starts_with(words)) {
            self.run.executors_lost += 1;
            // The words of Spark on Kubernetes: exit codes 137 (a container's limit) and 52 (the JVM's).
            if event.reason.contains("OOM") || event.reason.contains("exit code 137") {
                self.run.executors_out_of_memory += 1;
            }
        }
    }

    fn add_cores(&mut self, live: &Live, until: u64) {
        let time = until.saturating_sub(live.since).saturating_mul(live.cores);
        self.run.core_milliseconds = self.run.core_milliseconds.saturating_add(time);
    }

    fn stage_completed(&mut self, event: &StageCompleted) {
        self.run.stages += 1;
        self.run.largest_stage_tasks = self.run.largest_stage_tasks.max(event.info.tasks);
        if let (Some(from), Some(until)) = (event.info.submitted, event.info.completed) {
            self.update_latest(until);
            self.stages.add(from, until);
        }
    }

    fn task_ended(&mut self, event: &TaskEnd<'_>) {
        self.update_latest(event.info.finished);
        let run = &mut self.run;
        run.tasks += 1;
        run.failed_tasks += u64::from(event.reason.reason != "Success");
        run.fetch_failures += u64::from(event.reason.reason == "FetchFailed");
        let duration = event.info.finished.saturating_sub(event.info.launched);
        run.longest_task_milliseconds = run.longest_task_milliseconds.max(duration);
        // The time on its executor, whether it succeeded or not: a failed task occupies a core, too.
        run.task_milliseconds = run.task_milliseconds.saturating_add(duration);
        self.concurrency.add(event.info.launched, event.info.finished);
        let Some(metrics) = &event.metrics else { return };
        let add = |sum: &mut u64, bytes: u64| *sum = sum.saturating_add(bytes);
        add(&mut run.input_bytes, metrics.input.bytes);
        add(&mut run.shuffle_written_bytes, metrics.shuffle_write.bytes);
        add(&mut run.shuffle_read_bytes, metrics.shuffle_read.remote.saturating_add(metrics.shuffle_read.local));
        add(&mut run.spilled_bytes, metrics.disk_spilled);
        run.peak_task_bytes = run.peak_task_bytes.max(metrics.peak);
        run.wanted_task_bytes = run.wanted_task_bytes.max(metrics.peak.saturating_add(metrics.memory_spilled));
        let of_stage = self.shuffles.get_or_insert_mut((event.stage, event.attempt), || 0);
        add(of_stage, metrics.shuffle_write.bytes);
        run.largest_shuffle_bytes = run.largest_shuffle_bytes.max(*of_stage);
    }

    fn finish(mut self) -> Run {
        for live in std::mem::take(&mut self.live).into_values() {
            self.add_cores(&live, self.latest);
        }
        self.run.duration_milliseconds = self.latest.saturating_sub(self.started.unwrap_or(self.latest));
        self.run.stages_milliseconds = self.stages.length();
        self.run.concurrent_tasks = self.concurrency.weighted();
        self.run
    }
}

/// The length of a union of intervals that come in the order of their ends, more or less.
#[derive(Default)]
struct Union {
    /// Disjoint, and in order.
    intervals: Vec<(u64, u64)>,
    /// The length of those that are no longer kept.
    folded: u64,
}

impl Union {
    fn add(&mut self, mut from: u64, mut until: u64) {
        while let Some(&(last_from, last_until)) = self.intervals.last() {
            if last_until < from {
                break;
            }
            (from, until) = (from.min(last_from), until.max(last_until));
            self.intervals.pop();
        }
        self.intervals.push((from, until.max(from)));
        if self.intervals.len() > MOST_STAGES {
            // What overlaps these later counts twice. For that a stage must have lasted longer than a thousand others.
            let old = self.intervals.drain(..MOST_STAGES / 2);
            self.folded = old.fold(self.folded, |sum, (from, until)| sum.saturating_add(until - from));
        }
    }

    fn length(&self) -> u64 {
        self.intervals.iter().fold(self.folded, |sum, (from, until)| sum.saturating_add(until - from))
    }
}

/// A size of memory as Spark reads it: in MiB if it has no unit, and all units are binary.
fn memory_size(text: &str) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit: u64 = match unit {
        "b" => 1,
        "k" | "kb" => 1 << 10,
        "" | "m" | "mb" => 1 << 20,
        "g" | "gb" => 1 << 30,
        "t" | "tb" => 1 << 40,
        "p" | "pb" => 1 << 50,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

/// A name for people, and not endless.
fn name(text: &str) -> String {
    shorten(&printable(text), LONGEST_NAME)
}

#[derive(Deserialize)]
struct Kind<'a> {
    #[serde(rename = "Event", borrow)]
    event: Cow<'a, str>,
}

#[derive(Deserialize)]
struct LogStart<'a> {
    #[serde(rename = "Spark Version", borrow)]
    version: Cow<'a, str>,
}

#[derive(Deserialize)]
struct ApplicationStart<'a> {
    #[serde(rename = "App Name", borrow)]
    name: Cow<'a, str>,
    #[serde(rename = "App ID", borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(rename = "Timestamp")]
    timestamp: u64,
}

#[derive(Deserialize)]
struct ApplicationEnd {
    #[serde(rename = "Timestamp")]
    timestamp: u64,
}

#[derive(Deserialize)]
struct EnvironmentUpdate<'a> {
    #[serde(rename = "Spark Properties", borrow)]
    properties: Properties<'a>,
}

#[derive(Deserialize)]
struct Properties<'a> {
    #[serde(rename = "spark.dynamicAllocation.enabled", borrow)]
    dynamic_allocation: Option<Cow<'a, str>>,
    #[serde(rename = "spark.task.cpus", borrow)]
    task_cpus: Option<Cow<'a, str>>,
    #[serde(rename = "spark.executor.memory", borrow)]
    memory: Option<Cow<'a, str>>,
    #[serde(rename = "spark.executor.memoryOverhead", borrow)]
    memory_overhead: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct ExecutorAdded<'a> {
    #[serde(rename = "Timestamp")]
    timestamp: u64,
    #[serde(rename = "Executor ID", borrow)]
    id: Cow<'a, str>,
    #[serde(rename = "Executor Info")]
    info: ExecutorInfo,
}

#[derive(Deserialize)]
struct ExecutorInfo {
    #[serde(rename = "Total Cores")]
    cores: u64,
}

#[derive(Deserialize)]
struct ExecutorRemoved<'a> {
    #[serde(rename = "Timestamp")]
    timestamp: u64,
    #[serde(rename = "Executor ID", borrow)]
    id: Cow<'a, str>,
    #[serde(rename = "Removed Reason", borrow)]
    reason: Cow<'a, str>,
}

#[derive(Deserialize)]
struct StageCompleted {
    #[serde(rename = "Stage Info")]
    info: StageInfo,
}

#[derive(Deserialize)]
struct StageInfo {
    #[serde(rename = "Number of Tasks")]
    tasks: u64,
    #[serde(rename = "Submission Time")]
    submitted: Option<u64>,
    #[serde(rename = "Completion Time")]
    completed: Option<u64>,
}

#[derive(Deserialize)]
struct TaskEnd<'a> {
    #[serde(rename = "Stage ID")]
    stage: u64,
    #[serde(rename = "Stage Attempt ID", default)]
    attempt: u64,
    #[serde(rename = "Task End Reason", borrow)]
    reason: TaskEndReason<'a>,
    #[serde(rename = "Task Info")]
    info: TaskInfo,
    /// A task that was lost with its executor has none.
    #[serde(rename = "Task Metrics")]
    metrics: Option<TaskMetrics>,
}

#[derive(Deserialize)]
struct TaskEndReason<'a> {
    #[serde(rename = "Reason", borrow)]
    reason: Cow<'a, str>,
}

#[derive(Deserialize)]
struct TaskInfo {
    #[serde(rename = "Launch Time")]
    launched: u64,
    #[serde(rename = "Finish Time")]
    finished: u64,
}

/// Versions of Spark differ in what they write, so nothing of it is required.
#[derive(Deserialize, Default)]
#[serde(default)]
struct TaskMetrics {
    #[serde(rename = "Peak Execution Memory")]
    peak: u64,
    #[serde(rename = "Memory Bytes Spilled")]
    memory_spilled: u64,
    #[serde(rename = "Disk Bytes Spilled")]
    disk_spilled: u64,
    #[serde(rename = "Shuffle Read Metrics")]
    shuffle_read: ShuffleRead,
    #[serde(rename = "Shuffle Write Metrics")]
    shuffle_write: ShuffleWrite,
    #[serde(rename = "Input Metrics")]
    input: InputMetrics,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ShuffleRead {
    #[serde(rename = "Remote Bytes Read")]
    remote: u64,
    #[serde(rename = "Local Bytes Read")]
    local: u64,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ShuffleWrite {
    #[serde(rename = "Shuffle Bytes Written")]
    bytes: u64,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct InputMetrics {
    #[serde(rename = "Bytes Read")]
    bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str =
        r#"{"Event":"SparkListenerApplicationStart","App Name":"etl","App ID":"spark-1","Timestamp":1000,"User":"u"}"#;

    fn added(id: &str, time: u64, cores: u64) -> String {
        format!(
            r#"{{"Event":"SparkListenerExecutorAdded","Timestamp":{time},"Executor ID":"{id}","Executor Info":{{"Host":"h","Total Cores":{cores}}}}}"#
        )
    }

    fn removed(id: &str, time: u64, reason: &str) -> String {
        format!(
            r#"{{"Event":"SparkListenerExecutorRemoved","Timestamp":{time},"Executor ID":"{id}","Removed Reason":"{reason}"}}"#
        )
    }

    fn stage(id: u64, tasks: u64, (from, until): (u64, u64)) -> String {
        format!(
            r#"{{"Event":"SparkListenerStageCompleted","Stage Info":{{"Stage ID":{id},"Number of Tasks":{tasks},"Submission Time":{from},"Completion Time":{until}}}}}"#
        )
    }

    fn task(stage: u64, (from, until): (u64, u64), reason: &str, metrics: &str) -> String {
        format!(
            r#"{{"Event":"SparkListenerTaskEnd","Stage ID":{stage},"Stage Attempt ID":0,"Task End Reason":{{"Reason":"{reason}"}},"Task Info":{{"Launch Time":{from},"Finish Time":{until}}}{metrics}}}"#
        )
    }

    fn metrics(input: u64, written: u64, peak: u64, spilled: u64) -> String {
        format!(
            r#","Task Metrics":{{"Peak Execution Memory":{peak},"Memory Bytes Spilled":{spilled},"Disk Bytes Spilled":{spilled},"Shuffle Read Metrics":{{"Remote Bytes Read":3,"Local Bytes Read":4}},"Shuffle Write Metrics":{{"Shuffle Bytes Written":{written}}},"Input Metrics":{{"Bytes Read":{input}}}}}"#
        )
    }

    fn run(lines: &[String]) -> Run {
        let mut reader = RunReader::default();
        let (mut buffer, mut count) = (Vec::new(), 0);
        reader.read_all(&mut lines.join("\n").as_bytes(), &mut buffer, &mut count).expect("memory");
        reader.finish()
    }

    #[test]
    fn tasks_are_added_up_and_the_largest_shuffle_is_that_of_one_stage() {
        let run = run(&[
            START.into(),
            task(0, (1000, 3000), "Success", &metrics(100, 10, 7, 0)),
            task(0, (1000, 2000), "Success", &metrics(100, 20, 5, 4)),
            task(1, (3000, 4000), "FetchFailed", &metrics(0, 25, 0, 0)),
            task(1, (3000, 4000), "ExecutorLostFailure", ""),
        ]);
        assert_eq!((run.tasks, run.failed_tasks, run.fetch_failures), (4, 2, 1));
        assert_eq!((run.task_milliseconds, run.longest_task_milliseconds), (5000, 2000));
        assert_eq!(run.concurrent_tasks, 2);
        assert_eq!((run.input_bytes, run.shuffle_written_bytes, run.largest_shuffle_bytes), (200, 55, 30));
        assert_eq!((run.shuffle_read_bytes, run.spilled_bytes), (21, 4));
        assert_eq!((run.peak_task_bytes, run.wanted_task_bytes), (7, 9));
    }

    #[test]
    fn executors_that_spark_releases_are_not_lost_and_their_cores_count_until_they_go() {
        let run = run(&[
            START.into(),
            added("1", 1000, 4),
            added("2", 1000, 4),
            removed("1", 3000, "Executor killed by driver."),
            added("3", 3000, 2),
            removed("2", 4000, "The executor with id 2 was deleted by a user or the framework."),
            removed("3", 5000, "The executor with id 3 exited with exit code 137(SIGKILL, possible container OOM)."),
            added("4", 5000, 1),
            added("5", 5000, 1),
            removed("5", 5000, "Executor decommission: spark scale down"),
            added("6", 5000, 1),
            removed("6", 5000, "Executor decommission: Executor 6 is decommissioned."),
            r#"{"Event":"SparkListenerApplicationEnd","Timestamp":6000}"#.into(),
        ]);
        assert_eq!((run.executors, run.executors_at_once, run.executor_cores), (6, 2, 4));
        assert_eq!((run.executors_lost, run.executors_out_of_memory), (3, 1));
        assert_eq!(run.cores_at_once, 8);
        assert_eq!(run.core_milliseconds, 4 * 2000 + 4 * 3000 + 2 * 2000 + 1000);
        assert_eq!((run.duration_milliseconds, run.complete, run.local), (5000, true, false));
    }

    #[test]
    fn memory_and_cpus_are_those_that_the_run_set_in_the_units_of_spark() {
        let environment = |properties: &str| {
            let event = format!(r#"{{"Event":"SparkListenerEnvironmentUpdate","Spark Properties":{{{properties}}}}}"#);
            let run = run(&[START.into(), event]);
            (run.executor_memory_bytes, run.executor_memory_overhead_bytes, run.task_cpus)
        };
        assert_eq!(environment(""), (None, None, None));
        let set =
            r#""spark.executor.memory":"10G","spark.executor.memoryOverhead":"512","spark.task.cpus":"2","other":"1""#;
        assert_eq!(environment(set), (Some(10 << 30), Some(512 << 20), Some(2)));
        let wrong = r#""spark.executor.memory":"*****(redacted)","spark.executor.memoryOverhead":"99999999999p","spark.task.cpus":"0""#;
        assert_eq!(environment(wrong), (None, None, None));
        for (text, bytes) in [("3b", 3), ("3k", 3 << 10), ("3mb", 3 << 20), ("3gb", 3 << 30), ("3t", 3 << 40)] {
            assert_eq!(memory_size(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn stages_that_overlap_count_once() {
        let run = run(&[
            START.into(),
            stage(0, 8, (1000, 3000)),
            stage(1, 5, (2000, 4000)),
            stage(3, 1, (6000, 7000)),
            stage(2, 2, (1500, 7500)),
        ]);
        assert_eq!((run.stages, run.largest_stage_tasks, run.stages_milliseconds), (4, 8, 6500));
    }

    #[test]
    fn many_gaps_between_stages_need_bounded_memory() {
        let mut union = Union::default();
        for n in 0..10_000 {
            union.add(n * 10, n * 10 + 5);
            assert!(union.intervals.len() <= MOST_STAGES);
        }
        assert_eq!(union.length(), 50_000);
    }

    #[test]
    fn invalid_and_long_lines_are_counted_and_unknown_events_are_not() {
        let run = run(&[
            START.into(),
            "{".into(),
            r#"{"Event":"SparkListenerTaskEnd","Stage ID":-1}"#.into(),
            r#"{"Event":"SparkListenerJobStart","Job ID":0}"#.into(),
            String::new(),
            format!(r#"{{"Event":"org.apache.spark.sql.execution.ui.X","plan":"{}"}}"#, "x".repeat(LONGEST_LINE)),
            task(0, (1000, 3000), "Success", ""),
        ]);
        assert_eq!((run.invalid_lines, run.long_lines, run.tasks), (2, 1, 1));
    }

    #[test]
    fn a_packed_log_that_is_cut_counts_until_there_and_says_so() {
        let folder = std::env::temp_dir().join(format!("advise-cut-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("folder");
        let path = folder.join("app-1.gz");
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
        let tasks: Vec<_> = (0..1000).map(|n| task(0, (1000, 1000 + n), "Success", "")).collect();
        let lines = [START.into(), stage(0, 1000, (1000, 2000)), tasks.join("\n")].join("\n");
        std::io::Write::write_all(&mut packed, lines.as_bytes()).expect("memory");
        let packed = packed.finish().expect("memory");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("file");
            super::read(&path)
        };
        let whole = read(&packed).expect("a log");
        let cut = read(&packed[..packed.len() / 2]).expect("half of a log");
        let nothing = read(&packed[..5]).map_err(|error| error.to_string());
        std::fs::remove_dir_all(folder).expect("removed");
        assert_eq!((whole.tasks, whole.ended_early), (1000, None));
        assert!((1..1000).contains(&cut.tasks), "{}", cut.tasks);
        assert!(cut.ended_early.expect("a cause").contains("app-1.gz"));
        assert!(nothing.expect_err("no header").contains("cannot read the event log"));
    }

    #[test]
    fn a_log_of_which_no_stage_has_ended_is_refused_because_its_first_tasks_are_no_measure() {
        let path = std::env::temp_dir().join(format!("advise-first-stage-{}", std::process::id()));
        let mut lines = vec![START.to_owned(), added("1", 1000, 4), task(0, (1000, 3000), "Success", "")];
        let mut read = |line: Option<String>| {
            lines.extend(line);
            std::fs::write(&path, lines.join("\n")).expect("file");
            super::read(&path)
        };
        let early = read(None).expect_err("no stage").to_string();
        let later = read(Some(stage(0, 1, (1000, 3000))));
        std::fs::remove_file(&path).expect("removed");
        assert!(early.contains("1 task that ended, and no stage") && early.contains("Wait until one has"), "{early}");
        assert_eq!(later.expect("a stage").stages, 1);
    }

    #[test]
    fn a_name_cannot_control_a_terminal() {
        let run = run(&[START.replace("etl", r"\u001b[31mred\n")]);
        assert_eq!(run.application_name, "?[31mred?");
    }

    #[test]
    fn more_executors_than_a_cluster_has_are_not_followed() {
        let mut reader = RunReader::default();
        for n in 0..=MOST_EXECUTORS as u64 {
            let _ = reader.add(added(&n.to_string(), 1, 1).as_bytes());
        }
        assert_eq!((reader.live.len(), reader.run.executors), (MOST_EXECUTORS, MOST_EXECUTORS as u64));
    }
}
