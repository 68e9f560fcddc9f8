//! `advise`: from the size of a job's input, or from the event log of an earlier run, to executors, memory, a ratio, and
//! settings that make losing executors cheap.

mod concurrency;
mod event_log;
mod log_file;
mod render;
mod size;

use std::io::Write;
use std::path::PathBuf;

use balancer_runtime::text::number_of;
use bytesize::ByteSize;
use clap::{ArgGroup, Args};
use serde::Serialize;

use crate::output::{Format, address, write_json, write_table};
use event_log::Run;
use render::Target;
use size::{Advice, Job, Preset, Setting};

/// The sizes of input that are accepted. Beyond that the rules say nothing useful.
const SIZES: std::ops::RangeInclusive<u64> = (1 << 20)..=(1 << 50);

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("job").required(true))]
pub(crate) struct Arguments {
    /// How much data the job reads, such as 500GiB or 2TB
    #[arg(long, group = "job", value_name = "SIZE", value_parser = parse_size)]
    input: Option<ByteSize>,
    /// The event log of an earlier run: a file, or the folder eventlog_v2_* of a rolled log; plain, .zstd or .gz
    #[arg(long, group = "job", value_name = "PATH")]
    event_log: Option<PathBuf>,
    /// What matters more
    #[arg(long, value_enum, default_value = "balanced")]
    preset: Preset,
    /// Print the settings for a way of submitting, with the reason of each as a comment
    #[arg(long, value_enum, conflicts_with = "output")]
    format: Option<Target>,
    /// How the advice is printed
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

fn parse_size(text: &str) -> Result<ByteSize, String> {
    let size: Option<ByteSize> = text.parse().ok();
    size.filter(|size| SIZES.contains(&size.as_u64()))
        .ok_or_else(|| "accepted: 1MiB to 1PiB, such as 500GiB, 2TB or 1.5TiB".into())
}

/// What is printed as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    input_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<&'a Run>,
    #[serde(flatten)]
    advice: &'a Advice,
}

/// Reads, sizes and prints.
pub(crate) fn run(arguments: &Arguments, out: &mut impl Write) -> anyhow::Result<()> {
    let job = match (&arguments.event_log, arguments.input) {
        (Some(path), _) => Job::Run(Box::new(event_log::read(path)?)),
        (None, input) => Job::Input(input.unwrap_or_default()),
    };
    let advice = size::advise(&job, arguments.preset);
    if let Some(target) = arguments.format {
        return Ok(render::write(out, target, &advice)?);
    }
    match arguments.output {
        Format::Json => {
            let (input_bytes, run) = match &job {
                Job::Input(input) => (Some(input.as_u64()), None),
                Job::Run(run) => (None, Some(&**run)),
            };
            write_json(out, &Document { input_bytes, run, advice: &advice })?;
        }
        format => write_tables(out, &job, &advice, format == Format::Wide)?,
    }
    Ok(())
}

fn write_tables(out: &mut impl Write, job: &Job, advice: &Advice, wide: bool) -> anyhow::Result<()> {
    if let Job::Run(run) = job {
        write_table(out, &["EARLIER RUN", ""], facts(run))?;
        writeln!(out)?;
    }
    let row = |setting: &Setting| {
        let Setting { name, value, basis, why, source } = setting;
        let name = if wide { name.clone() } else { size::short(name) };
        let mut row = vec![name, value.clone(), basis.word().to_owned()];
        row.extend(wide.then(|| (*source).to_owned()));
        row.push(why.clone());
        row
    };
    let header: &[_] =
        if wide { &["SETTING", "VALUE", "BASIS", "SOURCE", "WHY"] } else { &["SETTING", "VALUE", "BASIS", "WHY"] };
    write_table(out, header, advice.settings.iter().map(row))?;
    writeln!(out)?;
    for note in &advice.notes {
        writeln!(out, "note: {}", note.text)?;
    }
    writeln!(
        out,
        "To set it: --format spark-submit, spark-application, emr or helm. The reasons: {}",
        address!("docs/cli.md#how-advise-decides")
    )?;
    Ok(())
}

/// The rows about an earlier run.
fn facts(run: &Run) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut add = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
    add("application", format!("{} ({}), Spark {}", run.application_name, run.application_id, run.spark_version));
    let stages = size::time(run.stages_milliseconds);
    add("run time", format!("{}, with stages for {stages}", size::time(run.duration_milliseconds)));
    add(
        "executors",
        format!(
            "{}, {} at once, {} lost, up to {}",
            run.executors,
            run.executors_at_once,
            run.executors_lost,
            number_of(run.executor_cores, "core")
        ),
    );
    if let Some(used) = run.utilisation() {
        add("cores in use", format!("{:.0} %", used * 100.0));
    }
    let (tasks, cores) = (run.concurrent_tasks, number_of(run.cores_at_once, "core"));
    add("tasks at once", format!("{tasks} while it did most of its work, on up to {cores}"));
    add("stages", format!("{}, the largest with {}", run.stages, number_of(run.largest_stage_tasks, "task")));
    add(
        "tasks",
        format!(
            "{}, {} failed, the longest {}",
            run.tasks,
            run.failed_tasks,
            size::time(run.longest_task_milliseconds)
        ),
    );
    add("input", size::shown(run.input_bytes));
    let (written, read) = (size::shown(run.shuffle_written_bytes), size::shown(run.shuffle_read_bytes));
    add("shuffle", format!("{written} written, {read} read"));
    add("spilled to disk", size::shown(run.spilled_bytes));
    add("memory of a task", format!("{} at most", size::shown(run.peak_task_bytes)));
    if run.long_lines + run.invalid_lines > 0 {
        add("lines passed over", format!("{} too long, {} invalid", run.long_lines, run.invalid_lines));
    }
    if let Some(cause) = &run.ended_early {
        add("log ends early", cause.clone());
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_each_is_not_several() {
        let run = Run {
            duration_milliseconds: 1000,
            executors: 1,
            executors_at_once: 1,
            executors_lost: 1,
            executors_out_of_memory: 1,
            executor_cores: 1,
            cores_at_once: 1,
            stages: 1,
            tasks: 1,
            failed_tasks: 1,
            fetch_failures: 1,
            largest_stage_tasks: 1,
            concurrent_tasks: 1,
            executor_memory_bytes: Some(1 << 40),
            executor_memory_overhead_bytes: Some(1 << 40),
            ..Run::default()
        };
        for dynamic_allocation in [false, true] {
            let job = Job::Run(Box::new(Run { dynamic_allocation, ..run.clone() }));
            let advice = size::advise(&job, Preset::Balanced);
            let mut out = Vec::new();
            write_tables(&mut out, &job, &advice, true).expect("tables");
            let text = String::from_utf8(out).expect("text");
            let words: Vec<&str> = text.split_whitespace().collect();
            let plurals = words.windows(2).filter(|pair| pair[0] == "1" && pair[1].len() > 2);
            let plurals: Vec<_> =
                plurals.filter(|pair| pair[1].trim_end_matches([',', ';', ':']).ends_with('s')).collect();
            assert!(plurals.is_empty(), "{plurals:?} in {text}");
            assert!(text.contains("1 core") && text.contains("1 task"), "{text}");
        }
    }
}
