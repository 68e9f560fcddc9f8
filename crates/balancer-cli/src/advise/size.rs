//! From what a job does to executors, cores, memory, a ratio and settings. Each rule says its reason, and whether it rests
//! on the earlier run or on an assumption.
//!
//! Every rule is pure, and the same job always gets the same advice.

use balancer_core::{Capacity, Counts, Policy, PolicyField, Ratio, decide};
use balancer_runtime::text::number_of;
use bytesize::ByteSize;
use clap::ValueEnum;
use serde::Serialize;

use crate::output::address;

use super::event_log::Run;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What a partition holds: spark.sql.files.maxPartitionBytes, for reading as for shuffling.
const PARTITION: u64 = 128 * MIB;
/// What a core gets done, from reading the input to writing the result. Ours, and on the careful side: plain scans are
/// several times as fast, and jobs with much Python slower.
const CORE_BYTES_PER_SECOND: u64 = 10 * MIB;
/// How long a job is to take of which nothing is known. With twice the executors it takes half.
const RUN_TIME_SECONDS: u64 = 30 * 60;
/// How much of the cores' time tasks use in a run that goes well. The rest is lost at the end of each stage, in which the
/// last tasks run alone.
const UTILISATION_PERCENT: u64 = 75;
/// A divisor of common sizes of nodes (4, 8, 16 ... vCPU), and below the five at which the clients of HDFS and S3 of one
/// JVM begin to wait for each other.
const MOST_CORES: u64 = 4;
/// What an executor requests of Kubernetes for a core. Nodes keep some CPU back (of 4, 8 and 16 vCPU pods get about 3.9, 7.9
/// and 15.9), so an executor that requests 4 does not fit a node of 4, and leaves half of one of 8 unused.
const REQUESTED_MILLICORES: u64 = 875;
/// So that one lost executor is a quarter of the job at most.
const FEWEST_EXECUTORS: u64 = 4;
/// What leaves over a volume with 125 MiB/s, the baseline of gp3, within the 100 s that AWS's notice leaves for it, and
/// within the 15 s that pods get where the notice is shortest.
const MIGRATABLE: u64 = 100 * 125 * MIB;
const MIGRATABLE_IN_HASTE: u64 = 15 * 125 * MIB;
/// More than any job has.
const MOST_EXECUTORS: u64 = 100_000;
/// How much smaller partitions are made at most for one task that wants too much; a skewed key needs another remedy.
const MOST_SPLITS: u64 = 8;
/// From here on a run is long, in the sense of the table in docs/spark.md.
const LONG_SECONDS: u64 = 2 * 3600;
/// A run that lost more of its executors than that is in a bad market.
const MANY_LOST_PERCENT: u64 = 10;
/// What Spark leaves alone of a heap, and the share of the rest that joins, sorts, aggregations and caches have
/// (spark.memory.fraction).
const RESERVED: u64 = 300 * MIB;
const MEMORY_PERCENT: u64 = 60;
/// spark.sql.shuffle.partitions of Spark.
const DEFAULT_PARTITIONS: u64 = 200;
/// When an executor is gone after the notice of AWS.
const KILL_INTERVAL_SECONDS: u64 = 110;

/// What matters more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Preset {
    /// As cheap as possible; the job may take longer, and can be run again
    Cost,
    /// Cheap, and on time nearly always
    Balanced,
    /// On time, and still cheaper than without spot
    Reliable,
}

/// What is known about a job.
#[derive(Debug, Clone)]
pub(crate) enum Job {
    /// The size of its input.
    Input(ByteSize),
    /// What an earlier run of it did.
    Run(Box<Run>),
}

/// What a value rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Basis {
    /// The earlier run.
    Measured,
    /// A number that may be wrong for this job.
    Assumed,
    /// What the preset stands for.
    Preset,
    /// What Spark or Kubernetes do, by their documentation.
    Documented,
}

impl Basis {
    /// The word in tables and comments.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Assumed => "assumed",
            Self::Preset => "preset",
            Self::Documented => "documented",
        }
    }
}

/// One setting, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Setting {
    /// The property of Spark.
    pub(crate) name: String,
    /// Its value.
    pub(crate) value: String,
    /// What the value rests on.
    pub(crate) basis: Basis,
    /// Why, in one line.
    pub(crate) why: String,
    /// Where to read more: a page of our documentation or of Spark's.
    pub(crate) source: &'static str,
}

/// What no setting solves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Note {
    /// In one line.
    pub(crate) text: String,
    /// Whether it is about the shuffle files of one job, which the chart has no values for.
    #[serde(skip)]
    pub(crate) is_about_shuffle_files: bool,
}

impl From<String> for Note {
    fn from(text: String) -> Self {
        Self { text, is_about_shuffle_files: false }
    }
}

impl Note {
    fn about_shuffle_files(text: &str) -> Self {
        Self { text: text.into(), is_about_shuffle_files: true }
    }
}

/// What to set for a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Advice {
    /// What mattered.
    pub(crate) preset: Preset,
    /// How many executors, or with dynamic allocation the most of them.
    pub(crate) executors: u64,
    /// Cores of each.
    pub(crate) cores: u64,
    /// The heap of each, in MiB.
    pub(crate) memory_mebibytes: u64,
    /// What each has besides its heap, in MiB.
    pub(crate) memory_overhead_mebibytes: u64,
    /// The share of spot.
    pub(crate) spot_ratio: String,
    /// The on-demand base.
    pub(crate) on_demand_base: u64,
    /// Every setting, the numbers above among them.
    pub(crate) settings: Vec<Setting>,
    /// What no setting solves.
    pub(crate) notes: Vec<Note>,
}

const SPARK: &str = "https://spark.apache.org/docs/latest/configuration.html";
const SPARK_SQL: &str = "https://spark.apache.org/docs/latest/sql-performance-tuning.html";
const SPARK_MEMORY: &str = "https://spark.apache.org/docs/latest/tuning.html#memory-management-overview";
const OURS: &str = address!("docs/spark.md");
const OURS_RATIO: &str = address!("docs/spark.md#which-ratio");
const OURS_VOLUMES: &str = address!("docs/spark.md#keep-shuffle-files-past-the-pod");
const OURS_DYNAMIC: &str = address!("docs/spark.md#dynamic-allocation");
const OURS_SHORTAGE: &str = address!("docs/when-spot-runs-out.md");
const OURS_RULES: &str = address!("docs/cli.md#how-advise-decides");

/// What the seconds of the fallback are for.
pub(super) const FALLBACK: &str =
    "with STRICT, an executor that finds no spot for so long goes to on-demand; 900 with the cluster autoscaler";

/// Where Spark on Kubernetes takes a driver's annotations from.
pub(super) const DRIVER_ANNOTATION: &str = "spark.kubernetes.driver.annotation.";
pub(super) const INSTANCES: &str = "spark.executor.instances";
pub(super) const CORES: &str = "spark.executor.cores";
pub(super) const REQUESTED_CORES: &str = "spark.kubernetes.executor.request.cores";
pub(super) const MEMORY: &str = "spark.executor.memory";
pub(super) const MEMORY_OVERHEAD: &str = "spark.executor.memoryOverhead";
pub(super) const GRACE_PERIOD: &str = "spark.kubernetes.executor.terminationGracePeriodSeconds";
/// The volume for shuffle files. Spark finds it by the beginning of its name.
const VOLUME: &str = "spark.kubernetes.executor.volumes.persistentVolumeClaim.spark-local-dir-1.";
const FORCE_KILL: &str = "spark.executor.decommission.forceKillTimeout";
const KILL_INTERVAL: &str = "spark.executor.decommission.killInterval";
const MOST_FAILURES: &str = "spark.executor.maxNumFailures";
pub(super) const POD_TEMPLATE: &str = "spark.kubernetes.executor.podTemplateFile";
/// What the file is to contain at least.
pub(super) const POD_TEMPLATE_CONTENT: &str = "{apiVersion: v1, kind: Pod, spec: {terminationGracePeriodSeconds: 120}}";

/// The ratios and bases of the table in docs/spark.md, from cheap to safe.
const RATIOS: [(u32, Base); 4] = [
    (1_000_000_000, Base::Executors(0)),
    (800_000_000, Base::Executors(2)),
    (500_000_000, Base::Quarter),
    (300_000_000, Base::Quarter),
];

#[derive(Clone, Copy)]
enum Base {
    Executors(u64),
    Quarter,
}

/// The numbers from which settings are made.
struct Size {
    executors: (u64, Basis, String),
    cores: (u64, Basis, String),
    memory: Memory,
    partitions: (u64, Basis, String),
    /// What is written to shuffle files for each executor.
    shuffle: (u64, Basis),
    is_dynamic: bool,
}

struct Memory {
    heap: u64,
    overhead: u64,
    basis: Basis,
    overhead_basis: Basis,
    why: String,
}

/// The memory of one core, in MiB: what a kind of nodes has for a vCPU, without an eighth for the node itself and for the
/// pods of the cluster. The overhead is 0.4 of the heap, which Spark gives to jobs in Python.
struct Kind {
    heap: u64,
    overhead: u64,
    name: &'static str,
}

const KINDS: [Kind; 3] = [
    Kind { heap: 1280, overhead: 512, name: "compute-optimized nodes (2 GiB for each vCPU, such as c7i)" },
    Kind { heap: 2560, overhead: 1024, name: "general-purpose nodes (4 GiB for each vCPU, such as m7i)" },
    Kind { heap: 5120, overhead: 2048, name: "memory-optimized nodes (8 GiB for each vCPU, such as r7i)" },
];

/// The advice for a job.
pub(crate) fn advise(job: &Job, preset: Preset) -> Advice {
    let mut notes = Vec::new();
    let size = match job {
        Job::Input(input) => of_input(input.as_u64()),
        Job::Run(run) => of_run(run, &mut notes),
    };
    let mut settings = Vec::new();
    size_settings(&size, &mut settings);
    let is_large = size.shuffle.0 > MIGRATABLE;
    let is_large_in_haste = size.shuffle.0 > MIGRATABLE_IN_HASTE;
    let needs_volumes = !size.is_dynamic && (is_large || is_large_in_haste && preset == Preset::Reliable);
    // Volumes cost money and time, and need rights and a StorageClass: too much for a guess.
    let keeps_volumes = needs_volumes && size.shuffle.1 == Basis::Measured;
    let (ratio, base) = policy(job, preset, &size, keeps_volumes, &mut settings);
    loss_settings(&size, base, &mut settings);
    if keeps_volumes {
        volume_settings(&size, &mut settings);
        notes.push(Note::about_shuffle_files(
            &format!("a volume of EBS belongs to one zone: keep the executors in one zone, and read what volumes need ({OURS_VOLUMES})"),
        ));
    } else if needs_volumes {
        notes.push(Note::about_shuffle_files(
            &format!(
                "if the job shuffles all of its input, a lost executor takes more shuffle files with it than it can migrate: \
                 take the event log of a run to know, and keep them on volumes if so ({OURS_VOLUMES})"
            ),
        ));
    } else if is_large && size.is_dynamic {
        notes.push(Note::about_shuffle_files(&format!(
            "a lost executor takes more shuffle files with it than it can migrate, and dynamic allocation does not go \
                 well with volumes: use fallback storage ({})",
            address!("docs/spark.md#if-the-other-executors-have-no-room-fallback-storage")
        )));
    }
    let drivers = address!("docs/spark.md#drivers");
    notes.push(format!("keep the driver on on-demand: the job ends when it loses its driver ({drivers})").into());
    Advice {
        preset,
        executors: size.executors.0,
        cores: size.cores.0,
        memory_mebibytes: size.memory.heap,
        memory_overhead_mebibytes: size.memory.overhead,
        spot_ratio: ratio.to_string(),
        on_demand_base: base,
        settings,
        notes,
    }
}

/// Executors and cores for so many cores in all, of which each task takes so many.
fn split(cores: u64, task_cpus: u64) -> (u64, u64) {
    let each = (cores / FEWEST_EXECUTORS).clamp(1, MOST_CORES);
    // Spark uses no core that is left over, and refuses executors that are too small for a task.
    let each = (each / task_cpus).max(1) * task_cpus;
    (cores.div_ceil(each).clamp(2, MOST_EXECUTORS), each)
}

fn of_input(input: u64) -> Size {
    let tasks = input.div_ceil(PARTITION).max(1);
    let seconds = input.div_ceil(CORE_BYTES_PER_SECOND);
    let wanted = (seconds * 100).div_ceil(RUN_TIME_SECONDS * UTILISATION_PERCENT);
    let (executors, cores) = split(wanted.min(tasks), 1);
    let why = format!(
        "{} take about {} min if a core does {}/s and is in use for {UTILISATION_PERCENT} % of the time; twice as many take half",
        shown(input),
        (seconds * 100).div_ceil(executors * cores * UTILISATION_PERCENT * 60),
        shown(CORE_BYTES_PER_SECOND),
    );
    let [_, general, _] = KINDS;
    Size {
        executors: (executors, Basis::Assumed, why),
        cores: (cores, Basis::Assumed, why_cores(1)),
        memory: memory(&general, cores, Basis::Assumed, "what they need is not known before a run".into()),
        // At most: a join or a sort shuffles all of its input.
        partitions: partitions(input, executors * cores, Basis::Assumed, "if all of the input is shuffled"),
        shuffle: (input.div_ceil(executors), Basis::Assumed),
        is_dynamic: false,
    }
}

fn of_run(run: &Run, notes: &mut Vec<Note>) -> Size {
    let (wanted, why) = run_cores(run);
    let task_cpus = run.cpus_of_a_task();
    let (executors, cores) = split(wanted.clamp(1, MOST_EXECUTORS * MOST_CORES), task_cpus);
    let need = run_memory(run);
    let fits = KINDS.iter().position(|kind| kind.heap * MIB >= need(cores)).unwrap_or(KINDS.len() - 1);
    let short = run.executors_out_of_memory > 0;
    let [compute, general, optimized] = KINDS;
    let kind = match (fits + usize::from(short)).min(2) {
        0 => compute,
        1 => general,
        _ => optimized,
    };
    let mut because =
        format!("a task of the earlier run wanted {} for joins, sorts and aggregations", shown(run.wanted_task_bytes),);
    if short {
        because +=
            &format!(", and {} may have had too little memory", number_of(run.executors_out_of_memory, "executor"));
    }
    let mut memory = memory(&kind, cores, Basis::Measured, because);
    compare_memory(run, cores, &mut memory, notes);
    let (mut shuffle, mut cause) = (run.largest_shuffle_bytes, "by the largest shuffle of the earlier run");
    // Smaller partitions are what remains if no node has the memory that a task wants.
    let too_much = need(cores).div_ceil(memory.heap / cores * MIB).min(MOST_SPLITS);
    if too_much > 1 {
        shuffle = shuffle.saturating_mul(too_much);
        cause = "by the largest shuffle of the earlier run, and more because a task wanted more memory than nodes have";
        notes.push(format!(
            "a task of the earlier run wanted {} of memory: look for skewed keys (spark.sql.adaptive.skewJoin.enabled)",
            shown(run.wanted_task_bytes)
        ).into());
    }
    run_notes(run, notes);
    Size {
        executors: (executors, Basis::Measured, why),
        cores: (cores, Basis::Assumed, why_cores(task_cpus)),
        memory,
        partitions: partitions(shuffle, executors * (cores / task_cpus), Basis::Measured, cause),
        shuffle: (run.shuffle_written_bytes.div_ceil(executors), Basis::Measured),
        is_dynamic: run.dynamic_allocation,
    }
}

/// The cores in all for a run like this, and why.
fn run_cores(run: &Run) -> (u64, String) {
    let task_cpus = run.cpus_of_a_task();
    let (used, had) = (run.concurrent_tasks.max(1).saturating_mul(task_cpus), run.cores_at_once);
    if run.dynamic_allocation && had > 0 {
        let executors = number_of(run.executors_at_once, "executor");
        return (
            had,
            format!("the earlier run had up to {}, in {executors}, and Spark chose how many", number_of(had, "core")),
        );
    }
    let measured =
        format!("the earlier run used {used} of up to {} while it did most of its work", number_of(had, "core"));
    let wanted = used.saturating_mul(100).div_ceil(UTILISATION_PERCENT);
    // Stages may have run at the same time, so no limit is below what was in use.
    let most = run.largest_stage_tasks.saturating_mul(task_cpus).max(used);
    // A run that used its cores well is large enough: more would be advised after each run, without end.
    if had > 0 && had <= wanted.min(most) {
        return (had, format!("{measured}: at {UTILISATION_PERCENT} % or more it keeps its size"));
    }
    if wanted > most {
        return (most, format!("{measured}, and no stage had tasks for more than {most}"));
    }
    (wanted, format!("{measured}: {wanted}, if {UTILISATION_PERCENT} % of them are in use (assumed)"))
}

/// The heap for each of so many cores of an executor, by what the tasks of a run wanted, and a quarter more.
fn run_memory(run: &Run) -> impl Fn(u64) -> u64 {
    // A task that takes several cores has their memory.
    let task = run.wanted_task_bytes.saturating_mul(100) / MEMORY_PERCENT / run.cpus_of_a_task();
    move |cores| (RESERVED / cores).saturating_add(task).saturating_mul(5) / 4
}

/// What the log cannot show may be why the run had so much more memory than its tasks wanted.
fn compare_memory(run: &Run, cores: u64, memory: &mut Memory, notes: &mut Vec<Note>) {
    // A local run had the memory of its driver.
    if run.local || run.executor_cores == 0 {
        return;
    }
    // By core, because the executors may have had another size.
    let is_below_half = |mebibytes: u64, had: u64| {
        u128::from(mebibytes * MIB) * u128::from(run.executor_cores) * 2 < u128::from(had) * u128::from(cores)
    };
    let mut add = |what: &str, advised: u64, had: Option<u64>, hidden: &str, basis: &mut Basis| {
        let Some(had) = had.filter(|&had| is_below_half(advised, had)) else { return };
        *basis = Basis::Assumed;
        notes.push(format!(
            "the earlier run had {} of {what} for {}, and less than half of that is advised for each core: {hidden} not show in \
             the log, so keep what it had if the job needs it for them",
            shown(had),
            number_of(run.executor_cores, "core"),
        ).into());
    };
    add("heap", memory.heap, run.executor_memory_bytes, "cached and broadcast data do", &mut memory.basis);
    add(
        "memory overhead",
        memory.overhead,
        run.executor_memory_overhead_bytes,
        "Python and other memory outside of the heap do",
        &mut memory.overhead_basis,
    );
}

fn run_notes(run: &Run, notes: &mut Vec<Note>) {
    if run.longest_task_milliseconds > KILL_INTERVAL_SECONDS * 1000 {
        notes.push(format!(
            "the longest task took {}: a task that is longer than the notice before a reclaim is lost, so use more partitions",
            time(run.longest_task_milliseconds)
        ).into());
    }
    if run.local {
        notes.push(
            "the earlier run was local, so executors on a cluster will need time for the network besides"
                .to_owned()
                .into(),
        );
    }
    if !run.complete || run.ended_early.is_some() {
        notes.push(
            "the log does not reach the end of the application, so the job may need more than it says"
                .to_owned()
                .into(),
        );
    }
    if run.compacted {
        notes.push(
            "Spark has compacted the log and left out jobs that had ended, so the job needs more than it says"
                .to_owned()
                .into(),
        );
    }
    if run.fetch_failures > 0 {
        notes.push(
            format!(
                "{} of the earlier run did not find shuffle files of lost executors",
                number_of(run.fetch_failures, "task")
            )
            .into(),
        );
    }
}

fn why_cores(task_cpus: u64) -> String {
    let multiple = if task_cpus > 1 { format!("a multiple of spark.task.cpus={task_cpus}; ") } else { String::new() };
    format!(
        "{multiple}{MOST_CORES} suit the common sizes of nodes; fewer in a small job, so that one lost executor of {FEWEST_EXECUTORS} \
         costs a quarter"
    )
}

fn memory(kind: &Kind, cores: u64, basis: Basis, because: String) -> Memory {
    Memory {
        heap: kind.heap * cores,
        overhead: kind.overhead * cores,
        basis,
        overhead_basis: Basis::Documented,
        why: format!("with its overhead it fills {}; {because}", kind.name),
    }
}

fn partitions(shuffle: u64, tasks: u64, basis: Basis, cause: &str) -> (u64, Basis, String) {
    let count = shuffle.div_ceil(PARTITION);
    // Full rounds of tasks, so that no core waits for the last ones.
    let count = count.max(DEFAULT_PARTITIONS).div_ceil(tasks) * tasks;
    let why = format!(
        "{cause}: parts of {}, {DEFAULT_PARTITIONS} of them at least, in full rounds of {}; Spark merges small ones",
        shown(PARTITION),
        number_of(tasks, "task"),
    );
    (count, basis, why)
}

fn size_settings(size: &Size, settings: &mut Vec<Setting>) {
    let (executors, basis, why) = &size.executors;
    let memory = &size.memory;
    let mut add = |name: &str, value: String, basis, why: &str, source| {
        settings.push(Setting { name: name.into(), value, basis, why: why.into(), source });
    };
    // With dynamic allocation maxExecutors says it. A number of instances would be what the job starts with.
    if !size.is_dynamic {
        add(INSTANCES, executors.to_string(), *basis, why, OURS_RULES);
    }
    add(CORES, size.cores.0.to_string(), size.cores.1, &size.cores.2, OURS_RULES);
    let requested = format!("{}m", size.cores.0 * REQUESTED_MILLICORES);
    let why =
        "7/8 of the cores, because nodes keep some CPU back and executors that request whole cores do not fill them";
    add(REQUESTED_CORES, requested, Basis::Assumed, why, OURS_RULES);
    add(MEMORY, format!("{}m", memory.heap), memory.basis, &memory.why, SPARK_MEMORY);
    add(
        MEMORY_OVERHEAD,
        format!("{}m", memory.overhead),
        memory.overhead_basis,
        "0.4 of the heap, which Spark gives to Python; a job without Python may move half of it to the heap",
        SPARK,
    );
    let (partitions, basis, why) = &size.partitions;
    add("spark.sql.shuffle.partitions", partitions.to_string(), *basis, why, SPARK_SQL);
}

/// The annotations of the driver; returns the ratio and the base.
fn policy(job: &Job, preset: Preset, size: &Size, keeps_volumes: bool, settings: &mut Vec<Setting>) -> (Ratio, u64) {
    let executors = size.executors.0;
    let mut step = match preset {
        Preset::Cost => 0,
        Preset::Balanced => 1,
        Preset::Reliable => 2,
    };
    let (mut basis, mut reasons) = (Basis::Preset, vec![format!("the preset {}", word(preset))]);
    if let Job::Run(run) = job {
        if run.duration_milliseconds > LONG_SECONDS * 1000 && size.shuffle.0 > MIGRATABLE {
            step += 1;
            reasons.push(format!("a step safer for {} with large shuffles", time(run.duration_milliseconds)));
            basis = Basis::Measured;
        }
        if run.executors_lost.saturating_mul(100) > run.executors.saturating_mul(MANY_LOST_PERCENT) {
            step += 1;
            reasons.push(format!(
                "a step safer for {} of {} lost",
                run.executors_lost,
                number_of(run.executors, "executor")
            ));
            basis = Basis::Measured;
        }
    }
    let (billionths, base) = RATIOS.get(step).or(RATIOS.last()).copied().unwrap_or((0, Base::Quarter));
    let ratio = Ratio::from_billionths(billionths).unwrap_or(Ratio::ZERO);
    let mut base = match base {
        Base::Executors(base) => base.min(executors / 2),
        Base::Quarter => executors.div_ceil(4),
    };
    let mut why_base = "executors that no reclaim of spot takes, so that the job goes on".to_owned();
    if base == 0 && keeps_volumes {
        base = 1;
        why_base = "with volumes the job depends on the spot market of one zone, so one executor stays".into();
    } else if base == 0 {
        why_base = "the job may be interrupted and run again".into();
    }
    let annotation = |field: PolicyField, value: String, basis, why: String, source| Setting {
        name: format!("{DRIVER_ANNOTATION}{}", field.default_annotation()),
        value,
        basis,
        why,
        source,
    };
    settings.push(annotation(PolicyField::SpotRatio, ratio.to_string(), basis, reasons.join("; "), OURS_RATIO));
    settings.push(annotation(PolicyField::OnDemandBase, base.to_string(), basis, why_base, OURS_RATIO));
    if let Some(setting) = pool_share(preset, ratio, (base, executors), annotation) {
        settings.push(setting);
    }
    let seconds = match preset {
        // Only with STRICT, and then the share holds, however long it takes.
        Preset::Cost => None,
        Preset::Balanced => Some(180),
        Preset::Reliable => Some(60),
    };
    if let Some(seconds) = seconds {
        let why = format!("{FALLBACK}; without settings.spotFallbackSeconds it needs reconciler.allowSpotFallback");
        let field = PolicyField::SpotFallbackSeconds;
        settings.push(annotation(field, seconds.to_string(), Basis::Preset, why, OURS_SHORTAGE));
    }
    (ratio, base)
}

/// The share of spot executors in one pool above which new ones go elsewhere, so that a lost pool takes no more of the job
/// than the preset accepts.
fn pool_share(
    preset: Preset,
    ratio: Ratio,
    (base, executors): (u64, u64),
    annotation: impl Fn(PolicyField, String, Basis, String, &'static str) -> Setting,
) -> Option<Setting> {
    let (accepted, words) = match preset {
        Preset::Cost => (2, "half"),
        Preset::Balanced => (3, "a third"),
        Preset::Reliable => (4, "a quarter"),
    };
    let spot = spot_executors(executors, base, ratio);
    // In whole percent, and rounded down, so that it is not more.
    let percent = (executors * 100).checked_div(accepted * spot)?.clamp(1, 100);
    (percent < 100).then(|| {
        let why =
            format!("to keep a pool (an instance type in a zone) below {words} of the executors; it spreads those that are placed \
                     once the first nodes are bound");
        annotation(PolicyField::MaxPoolShare, format!("{percent}%"), Basis::Preset, why, OURS_SHORTAGE)
    })
}

/// How many executors of so many are on spot, by the rule that places them.
fn spot_executors(executors: u64, base: u64, ratio: Ratio) -> u64 {
    let on_demand_base = u32::try_from(base).unwrap_or(u32::MAX);
    let policy = Policy { spot_ratio: ratio.into(), on_demand_base, ..Policy::DEFAULT };
    let mut counts = Counts::default();
    for _ in 0..executors {
        match decide(counts, policy) {
            Some(Capacity::Spot) => counts.spot += 1,
            _ => counts.on_demand += 1,
        }
    }
    counts.spot
}

/// What makes the loss of an executor cheap.
fn loss_settings(size: &Size, base: u64, settings: &mut Vec<Setting>) {
    let mut add = |name: &str, value: &str, why: &str, source| {
        // The notice, and how often a market reclaims, are not the same everywhere.
        let is_assumed = [FORCE_KILL, KILL_INTERVAL, MOST_FAILURES].contains(&name);
        let basis = if is_assumed { Basis::Assumed } else { Basis::Documented };
        settings.push(Setting { name: name.into(), value: value.into(), basis, why: why.into(), source });
    };
    let executors = size.executors.0;
    add("spark.decommission.enabled", "true", "an executor whose pod is deleted takes no new tasks", OURS);
    add("spark.storage.decommission.enabled", "true", "it moves its blocks to others before it ends", OURS);
    add("spark.storage.decommission.rddBlocks.enabled", "true", "cached data need not be computed again", OURS);
    let shuffle = format!(
        "shuffle files need not be written again; {} ({}) for each executor, of which about {} leave in time (assumed: 125 MiB/s)",
        shown(size.shuffle.0),
        size.shuffle.1.word(),
        shown(MIGRATABLE),
    );
    add("spark.storage.decommission.shuffleBlocks.enabled", "true", &shuffle, OURS);
    add(
        FORCE_KILL,
        "100s",
        "migration must end before the node goes: two minutes after the notice on AWS, less elsewhere",
        OURS,
    );
    add(
        KILL_INTERVAL,
        &format!("{KILL_INTERVAL_SECONDS}s"),
        "with speculation, tasks that will not end before the node goes are started elsewhere",
        OURS,
    );
    add(
        "spark.speculation",
        "true",
        "starts those tasks; leave out both if tasks write to other systems and must not do so twice",
        OURS,
    );
    add(POD_TEMPLATE, "executor-template.yaml", "Spark 3.5 and 4.0 take the grace period, 120 s, from this file", OURS);
    add(GRACE_PERIOD, "120s", "time for the migration; Spark 4.1 takes it from here, older versions ignore it", OURS);
    add("spark.task.maxFailures", "8", "four failures of a task end a job by default, and one bad hour has more", OURS);
    add("spark.stage.maxConsecutiveAttempts", "10", "each loss of shuffle files repeats a stage", OURS);
    add(
        "spark.stage.ignoreDecommissionFetchFailure",
        "true",
        "files that went with a decommissioned executor are no failure of the stage",
        OURS,
    );
    add(
        "spark.scheduler.maxRetainedRemovedDecommissionExecutors",
        "100",
        "the previous setting works only for executors that Spark remembers",
        OURS,
    );
    add("spark.executor.failuresValidityInterval", "1h", "only executors that failed in the last hour count", OURS);
    add(
        MOST_FAILURES,
        &(executors * 4).max(20).to_string(),
        "every executor may be reclaimed four times an hour; twice is the default",
        SPARK,
    );
    add(
        "spark.excludeOnFailure.enabled",
        "false",
        "failures on a node that is reclaimed say nothing about the executors that remain",
        SPARK,
    );
    if size.is_dynamic {
        let fewest = base.max(2).min(executors);
        add("spark.dynamicAllocation.enabled", "true", "as in the earlier run", OURS_DYNAMIC);
        add(
            "spark.dynamicAllocation.executorIdleTimeout",
            "120s",
            "executors that wait between stages are kept",
            OURS_DYNAMIC,
        );
        add(
            "spark.dynamicAllocation.shuffleTracking.enabled",
            "true",
            "executors whose shuffle files are needed are kept",
            OURS_DYNAMIC,
        );
        add(
            "spark.dynamicAllocation.minExecutors",
            &fewest.to_string(),
            "the on-demand base at least; Spark releases executors of any capacity, so those that stay may be on spot",
            OURS_DYNAMIC,
        );
        let (_, basis, why) = &size.executors;
        settings.push(Setting {
            name: "spark.dynamicAllocation.maxExecutors".into(),
            value: executors.to_string(),
            basis: *basis,
            why: why.clone(),
            source: OURS_RULES,
        });
    }
}

/// Volumes that a new executor takes over from a lost one.
fn volume_settings(size: &Size, settings: &mut Vec<Setting>) {
    let mut add = |name: String, value: &str, basis, why: &str| {
        settings.push(Setting { name, value: value.into(), basis, why: why.into(), source: OURS_VOLUMES });
    };
    let driver = |name: &str| format!("spark.kubernetes.driver.{name}PersistentVolumeClaim");
    let volume = |name: &str| format!("{VOLUME}{name}");
    add(driver("own"), "true", Basis::Documented, "volumes outlive their executors");
    add(driver("reuse"), "true", Basis::Documented, "a new executor takes over the shuffle files of a lost one");
    add(driver("waitToReuse"), "true", Basis::Documented, "no new volume while one is free");
    add(volume("options.claimName"), "OnDemand", Basis::Documented, "one volume for each executor");
    add(
        volume("options.storageClass"),
        "gp3",
        Basis::Assumed,
        "a StorageClass of your cluster that binds at the first consumer; this is one of EBS",
    );
    // Twice, because Spark keeps the files of earlier stages, and spills there too.
    let gibibytes = (size.shuffle.0.saturating_mul(2)).div_ceil(GIB).max(20);
    let why = format!("twice the {} that an executor writes to shuffle files, 20 GiB at least", shown(size.shuffle.0));
    add(volume("options.sizeLimit"), &format!("{gibibytes}Gi"), size.shuffle.1, &why);
    add(
        volume("mount.path"),
        "/data/spark-x/executor-x",
        Basis::Documented,
        "two levels of which the first begins with spark-, where Spark searches for old files",
    );
    add(volume("mount.readOnly"), "false", Basis::Documented, "Spark writes to it");
    add(
        "spark.shuffle.sort.io.plugin.class".into(),
        "org.apache.spark.shuffle.KubernetesLocalDiskShuffleDataIO",
        Basis::Documented,
        "reads the shuffle files that it finds on a volume",
    );
}

/// The word of a preset on the command line.
pub(super) const fn word(preset: Preset) -> &'static str {
    match preset {
        Preset::Cost => "cost",
        Preset::Balanced => "balanced",
        Preset::Reliable => "reliable",
    }
}

/// The name of a setting for a table that fits a screen: an annotation as it is on the driver, and a volume without the
/// folders of its name.
pub(super) fn short(name: &str) -> String {
    match (name.strip_prefix(DRIVER_ANNOTATION), name.strip_prefix(VOLUME)) {
        (Some(annotation), _) => annotation.to_owned(),
        (_, Some(field)) => format!("….spark-local-dir-1.{field}"),
        (None, None) => name.to_owned(),
    }
}

/// A number of bytes for people.
pub(super) fn shown(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// A time for people.
pub(super) fn time(milliseconds: u64) -> String {
    let seconds = milliseconds.div_ceil(1000);
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (hours, minutes, _) => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use balancer_core::PolicyOverrides;
    use proptest::prelude::*;

    use super::*;

    const PRESETS: [Preset; 3] = [Preset::Cost, Preset::Balanced, Preset::Reliable];

    fn input(gibibytes: u64) -> Job {
        Job::Input(ByteSize::gib(gibibytes))
    }

    /// An hour of 40 busy cores in ten executors, with little shuffle.
    fn earlier() -> Run {
        Run {
            complete: true,
            duration_milliseconds: 3_600_000,
            stages_milliseconds: 3_600_000,
            executors: 10,
            executors_at_once: 10,
            executor_cores: 4,
            cores_at_once: 40,
            core_milliseconds: 40 * 3_600_000,
            stages: 2,
            tasks: 4000,
            largest_stage_tasks: 2000,
            concurrent_tasks: 30,
            task_milliseconds: 30 * 3_600_000,
            shuffle_written_bytes: 10 * GIB,
            largest_shuffle_bytes: 5 * GIB,
            peak_task_bytes: 256 * MIB,
            wanted_task_bytes: 256 * MIB,
            ..Run::default()
        }
    }

    fn of(run: Run, preset: Preset) -> Advice {
        advise(&Job::Run(Box::new(run)), preset)
    }

    fn value<'a>(advice: &'a Advice, name: &str) -> Option<&'a str> {
        advice.settings.iter().find(|setting| setting.name == name).map(|setting| setting.value.as_str())
    }

    fn annotation(advice: &Advice, field: PolicyField) -> Option<&str> {
        value(advice, &format!("{DRIVER_ANNOTATION}{}", field.default_annotation()))
    }

    #[test]
    fn executors_grow_with_the_input_and_a_small_job_has_small_executors() {
        let size = |gibibytes| {
            let advice = advise(&input(gibibytes), Preset::Balanced);
            (advice.executors, advice.cores)
        };
        assert_eq!(size(1), (2, 1));
        assert_eq!(size(100), (4, 2));
        assert_eq!(size(500), (10, 4));
        assert_eq!(size(5000), (95, 4));
    }

    #[test]
    fn a_run_that_used_its_cores_keeps_them_and_one_that_did_not_gets_fewer() {
        let size = |concurrent_tasks, largest_stage_tasks| {
            let advice = of(Run { concurrent_tasks, largest_stage_tasks, ..earlier() }, Preset::Balanced);
            (advice.executors, advice.cores)
        };
        assert_eq!(size(40, 2000), (10, 4));
        assert_eq!(size(30, 2000), (10, 4));
        assert_eq!(size(15, 2000), (5, 4));
        assert_eq!(size(14, 16), (4, 4));
        // Two stages at the same time.
        assert_eq!(size(20, 16), (5, 4));
    }

    #[test]
    fn a_serial_tail_does_not_shrink_a_wide_job() {
        let tail = Run {
            executors: 100,
            executors_at_once: 100,
            cores_at_once: 400,
            concurrent_tasks: 397,
            stages_milliseconds: 2 * 3_600_000,
            task_milliseconds: (400 * 30 + 90) * 60_000,
            ..earlier()
        };
        assert_eq!(of(tail, Preset::Balanced).executors, 100);
    }

    #[test]
    fn dynamic_allocation_may_have_as_many_executors_as_the_run_had_at_once() {
        let run = Run { dynamic_allocation: true, executors: 70, concurrent_tasks: 9, ..earlier() };
        let advice = of(run, Preset::Balanced);
        assert_eq!(value(&advice, "spark.dynamicAllocation.maxExecutors"), Some("10"));
        assert_eq!(advice.executors, 10);
        assert_eq!(value(&advice, INSTANCES), None);
        assert_eq!(value(&of(earlier(), Preset::Balanced), INSTANCES), Some("10"));
    }

    #[test]
    fn executors_fill_nodes_that_keep_some_cpu_back() {
        // What pods get of nodes of 4, 8 and 16 vCPU, in thousandths.
        for (vcpus, allocatable) in [(4, 3_900), (8, 7_900), (16, 15_900)] {
            let advice = of(earlier(), Preset::Balanced);
            let requested = value(&advice, REQUESTED_CORES).and_then(|text| text.strip_suffix('m'));
            let requested: u64 = requested.expect("a request in thousandths").parse().expect("a number");
            assert_eq!(allocatable / requested * advice.cores, vcpus);
        }
    }

    #[test]
    fn memory_follows_what_a_task_wanted_and_executors_that_had_too_little() {
        let memory = |wanted, lost| {
            let run = Run { wanted_task_bytes: wanted, executors_out_of_memory: lost, ..earlier() };
            let advice = of(run, Preset::Balanced);
            (advice.memory_mebibytes / advice.cores, advice.memory_overhead_mebibytes / advice.cores)
        };
        assert_eq!(memory(256 * MIB, 0), (1280, 512));
        assert_eq!(memory(256 * MIB, 1), (2560, 1024));
        assert_eq!(memory(GIB, 0), (2560, 1024));
        assert_eq!(memory(2 * GIB, 0), (5120, 2048));
        assert_eq!(memory(u64::MAX, 9), (5120, 2048));
    }

    #[test]
    fn memory_far_below_that_of_the_run_is_assumed_because_cached_data_is_not_in_the_log() {
        let bases = |run: Run| {
            let advice = of(run, Preset::Balanced);
            let basis = |name| advice.settings.iter().find(|setting| setting.name == name).map(|setting| setting.basis);
            let hidden = advice.notes.iter().filter(|note| note.text.contains("not show in the log")).count();
            (basis(MEMORY), basis(MEMORY_OVERHEAD), hidden)
        };
        // 4 cores get 5 GiB of heap and 2 GiB of overhead.
        let had = |heap, overhead| Run {
            executor_memory_bytes: Some(heap * GIB),
            executor_memory_overhead_bytes: Some(overhead * GIB),
            ..earlier()
        };
        let (measured, assumed, documented) = (Some(Basis::Measured), Some(Basis::Assumed), Some(Basis::Documented));
        assert_eq!(bases(earlier()), (measured, documented, 0));
        assert_eq!(bases(had(10, 4)), (measured, documented, 0));
        assert_eq!(bases(had(11, 4)), (assumed, documented, 1));
        assert_eq!(bases(had(11, 5)), (assumed, assumed, 2));
        assert_eq!(bases(Run { executor_cores: 8, ..had(11, 5) }), (measured, documented, 0));
        assert_eq!(bases(Run { local: true, ..had(11, 5) }), (measured, documented, 0));
    }

    #[test]
    fn tasks_of_several_cpus_get_cores_and_memory_for_them() {
        let size = |task_cpus, concurrent_tasks| {
            let run = Run { task_cpus: Some(task_cpus), concurrent_tasks, wanted_task_bytes: GIB, ..earlier() };
            let advice = of(run, Preset::Balanced);
            let partitions = value(&advice, "spark.sql.shuffle.partitions").expect("partitions").to_owned();
            (advice.executors, advice.cores, advice.memory_mebibytes, partitions)
        };
        assert_eq!(size(1, 40), (10, 4, 4 * 2560, "200".into()));
        assert_eq!(size(2, 20), (10, 4, 4 * 1280, "200".into()));
        assert_eq!(size(3, 13), (14, 3, 3 * 1280, "210".into()));
        assert_eq!(size(8, 5), (5, 8, 8 * 1280, "200".into()));
    }

    #[test]
    fn partitions_are_more_if_no_node_has_the_memory_that_a_task_wants() {
        let partitions = |wanted| {
            let run = Run { wanted_task_bytes: wanted, largest_shuffle_bytes: 100 * GIB, ..earlier() };
            value(&of(run, Preset::Balanced), "spark.sql.shuffle.partitions").map(str::to_owned)
        };
        assert_eq!(partitions(GIB).as_deref(), Some("800"));
        assert_eq!(partitions(4 * GIB).as_deref(), Some("1600"));
    }

    #[test]
    fn the_ratio_follows_the_preset_and_is_a_step_safer_for_each_reason() {
        let calm = earlier();
        let lost = Run { executors_lost: 2, ..earlier() };
        let long = Run { duration_milliseconds: 8_000_000, shuffle_written_bytes: 500 * GIB, ..earlier() };
        let both = Run { executors_lost: 2, ..long.clone() };
        let policy = |run: &Run, preset| {
            let advice = of(run.clone(), preset);
            (advice.spot_ratio, advice.on_demand_base)
        };
        let rows = [
            (&calm, [("1", 0), ("0.8", 2), ("0.5", 3)]),
            (&lost, [("0.8", 2), ("0.5", 3), ("0.3", 3)]),
            (&long, [("0.8", 2), ("0.5", 3), ("0.3", 3)]),
            (&both, [("0.5", 3), ("0.3", 3), ("0.3", 3)]),
        ];
        for (run, expected) in rows {
            for (preset, (ratio, base)) in PRESETS.into_iter().zip(expected) {
                assert_eq!(policy(run, preset), (ratio.to_owned(), base), "{preset:?}");
            }
        }
    }

    #[test]
    fn shuffle_files_that_cannot_be_migrated_in_time_are_kept_on_volumes_except_with_dynamic_allocation() {
        const REUSE: &str = "spark.kubernetes.driver.reusePersistentVolumeClaim";
        let limit = format!("{VOLUME}options.sizeLimit");
        let run = |gibibytes| Run { shuffle_written_bytes: gibibytes * GIB, ..earlier() };
        let reuse = |gibibytes, preset| value(&of(run(gibibytes), preset), REUSE).is_some();
        // Ten executors: 1, 3 and 20 GiB for each.
        assert_eq!(PRESETS.map(|preset| reuse(10, preset)), [false, false, false]);
        assert_eq!(PRESETS.map(|preset| reuse(30, preset)), [false, false, true]);
        assert_eq!(PRESETS.map(|preset| reuse(200, preset)), [true, true, true]);
        let advice = of(run(200), Preset::Cost);
        assert_eq!((value(&advice, &limit), advice.on_demand_base), (Some("40Gi"), 1));

        let dynamic = of(Run { dynamic_allocation: true, ..run(200) }, Preset::Balanced);
        assert_eq!(value(&dynamic, REUSE), None);
        assert_eq!(value(&dynamic, "spark.dynamicAllocation.shuffleTracking.enabled"), Some("true"));
        assert!(dynamic.notes.iter().any(|note| note.text.contains("fallback storage")), "{:?}", dynamic.notes);
    }

    #[test]
    fn volumes_for_a_shuffle_that_is_assumed_are_a_note_and_no_settings() {
        for (gibibytes, preset, has_note) in
            [(500, Preset::Reliable, true), (500, Preset::Cost, true), (1, Preset::Cost, false)]
        {
            let advice = advise(&input(gibibytes), preset);
            assert!(!advice.settings.iter().any(|setting| setting.name.contains("ersistentVolumeClaim")), "{preset:?}");
            let notes: Vec<_> = advice.notes.iter().filter(|note| note.is_about_shuffle_files).collect();
            assert_eq!(notes.len(), usize::from(has_note), "{preset:?}, {gibibytes} GiB: {notes:?}");
        }
        assert_eq!(advise(&input(500), Preset::Cost).on_demand_base, 0);
    }

    #[test]
    fn a_lost_pool_takes_no_more_than_the_preset_accepts() {
        for (preset, accepted) in PRESETS.into_iter().zip([2, 3, 4]) {
            for gibibytes in [1, 20, 100, 500, 5000, 50_000] {
                let advice = advise(&input(gibibytes), preset);
                let ratio: Ratio = advice.spot_ratio.parse().expect("a ratio");
                let spot = spot_executors(advice.executors, advice.on_demand_base, ratio);
                let share = annotation(&advice, PolicyField::MaxPoolShare).unwrap_or("100%");
                let percent: u64 = share.trim_end_matches('%').parse().expect("percent");
                assert!(percent * spot * accepted <= advice.executors * 100, "{preset:?}, {gibibytes} GiB: {share}");
            }
        }
    }

    #[test]
    fn what_the_documentation_sets_for_every_job_is_advised_with_the_same_values() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/spark.md"))
            .expect("docs/spark.md");
        let (_, section) = page.split_once("## For every job").expect("the section");
        let (_, block) = section.split_once("```properties\n").expect("its settings");
        let (block, _) = block.split_once("```").expect("their end");
        let documented: Vec<_> = block.lines().filter_map(|line| line.split_once('=')).collect();
        assert!(documented.len() > 10, "{documented:?}");
        for preset in PRESETS {
            let advice = advise(&input(100), preset);
            for (name, expected) in &documented {
                assert_eq!(value(&advice, name), Some(*expected), "{name}");
            }
        }
    }

    #[test]
    fn what_a_log_that_ends_early_or_leaves_out_jobs_hides_is_a_note() {
        let notes = |run| {
            let texts: Vec<_> = of(run, Preset::Balanced).notes.into_iter().map(|note| note.text).collect();
            texts.join("\n")
        };
        assert!(!notes(earlier()).contains("the log"), "{}", notes(earlier()));
        assert!(notes(Run { complete: false, ..earlier() }).contains("does not reach the end"));
        assert!(notes(Run { compacted: true, ..earlier() }).contains("has compacted the log"));
        assert!(
            notes(Run { longest_task_milliseconds: 111_000, ..earlier() }).contains("longest task took 1 min 51 s")
        );
    }

    prop_compose! {
        fn any_run()(numbers in proptest::array::uniform18(any::<u64>()), flags in any::<[bool; 3]>(), task_cpus in proptest::option::of(1_u64..=16)) -> Run {
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r] = numbers;
            Run {
                complete: flags[0],
                compacted: flags[1],
                dynamic_allocation: flags[2],
                duration_milliseconds: a,
                stages_milliseconds: b,
                executors: c,
                executors_at_once: d,
                executor_cores: e,
                core_milliseconds: f,
                executors_lost: g,
                executors_out_of_memory: h,
                tasks: i,
                largest_stage_tasks: j,
                task_milliseconds: k,
                longest_task_milliseconds: l,
                shuffle_written_bytes: m,
                largest_shuffle_bytes: n,
                wanted_task_bytes: o,
                fetch_failures: p,
                cores_at_once: q,
                concurrent_tasks: r,
                task_cpus,
                executor_memory_bytes: Some(a),
                executor_memory_overhead_bytes: Some(b),
                ..Run::default()
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_run_gets_valid_settings_with_one_line_of_reason(run in any_run(), preset in 0_usize..3) {
            let task_cpus = run.cpus_of_a_task();
            let advice = of(run, PRESETS[preset]);
            prop_assert!((1..=MOST_CORES.max(task_cpus)).contains(&advice.cores));
            prop_assert!(advice.cores.is_multiple_of(task_cpus));
            prop_assert!((2..=MOST_EXECUTORS).contains(&advice.executors));
            prop_assert!(advice.on_demand_base <= advice.executors);
            for setting in &advice.settings {
                prop_assert!(!setting.value.is_empty() && !setting.why.is_empty());
                prop_assert!(!setting.why.contains(char::is_control) && !setting.value.contains(char::is_control));
            }
            for &field in PolicyField::ALL {
                if let Some(text) = annotation(&advice, field) {
                    prop_assert!(PolicyOverrides::parse_one(field, text).is_ok(), "{field:?}: {text}");
                }
            }
            let mut names: Vec<_> = advice.settings.iter().map(|setting| &setting.name).collect();
            let count = names.len();
            names.sort();
            names.dedup();
            prop_assert_eq!(names.len(), count);
        }
    }
}
