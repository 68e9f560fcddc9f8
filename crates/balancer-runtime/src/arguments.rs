//! The settings that both binaries share. Each is an environment variable and a flag. An invalid value stops the program
//! at its start.

use std::ops::RangeInclusive;
use std::sync::LazyLock;

use anyhow::{Context, bail};
use balancer_core::{Conventions, Policy, Ratio, SpotPreference};
use clap::Args;
use tracing::Level;

use crate::k8s_names::{is_label_key, is_label_value};

/// The policy of a job that states none.
#[derive(Args, Clone, Copy, Debug)]
pub struct DefaultArguments {
    /// Share of spot for a job that states none, or an invalid one. Accepted: 0 to 1 such as 0.7, a percentage such as
    /// 70%, or RELIABILITY_ONLY (0), RELIABILITY_OVER_COST (0.3), BALANCED (0.5), COST_OVER_RELIABILITY (0.8), COST_ONLY
    /// (1) in any case
    #[arg(long, env, default_value_t = Policy::DEFAULT.spot_ratio)]
    default_spot_ratio: Ratio,
}

impl DefaultArguments {
    /// The policy of a job that states none.
    pub fn policy(self) -> Policy {
        let Self { default_spot_ratio } = self;
        Policy { spot_ratio: default_spot_ratio, ..Policy::DEFAULT }
    }
}

/// As one text, because `--help` would otherwise show it with a space for the comma.
static DEFAULT_JOB_ID_LABEL: LazyLock<String> = LazyLock::new(|| Conventions::default().job_id_label.join(","));

/// The labels and annotations of the cluster.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Labels and annotations")]
pub struct ConventionArguments {
    /// Whether spot executors must run on spot. STRICT: they get a nodeSelector, and wait until spot is available.
    /// BEST_EFFORT: they get none. On-demand executors always get one. Accepted: STRICT or BEST_EFFORT, in any case
    #[arg(long, env, default_value = "BEST_EFFORT")]
    spot_preference: SpotPreference,

    /// Node label with the values spot and on-demand, and key of the nodeSelector. Accepted: a label key
    #[arg(long, env, default_value_t = Conventions::default().capacity_type_label, value_parser = label_key)]
    capacity_type_label: String,

    /// Pod label whose value is the role. Accepted: a label key [default: spark-role]
    #[arg(long, env, value_parser = label_key)]
    workload_role_label: Option<String>,

    /// Older name of WORKLOAD_ROLE_LABEL, used only if that is not set
    #[arg(long, env, value_parser = label_key)]
    spark_role_label: Option<String>,

    /// Value of the role label on drivers. Accepted: a label value
    #[arg(long, env, default_value_t = Conventions::default().driver_role_value, value_parser = label_value)]
    driver_role_value: String,

    /// Value of the role label on executors. Accepted: a label value other than that of drivers
    #[arg(long, env, default_value_t = Conventions::default().executor_role_value, value_parser = label_value)]
    executor_role_value: String,

    /// Pod labels whose value is the job id; the first one that the pod has is used. Accepted: label keys, separated by
    /// commas
    #[arg(
        long,
        env,
        default_value = DEFAULT_JOB_ID_LABEL.as_str(),
        value_delimiter = ',',
        value_parser = label_key
    )]
    job_id_label: Vec<String>,

    /// Annotation for the share of spot, on a driver or on a single executor. Accepted: an annotation key
    #[arg(long, env, default_value_t = Conventions::default().spot_ratio_annotation, value_parser = label_key)]
    spot_ratio_annotation: String,

    /// Annotation for the number of executors that must be on-demand before the ratio applies, on a driver or on a single
    /// executor. Accepted: an annotation key
    #[arg(long, env, default_value_t = Conventions::default().on_demand_base_annotation, value_parser = label_key)]
    on_demand_base_annotation: String,

    /// Annotation that the webhook adds to each executor, with the chosen capacity. Accepted: an annotation key, or empty
    /// for none. Without it, an executor whose name the apiserver generates (generateName) is counted twice until
    /// RECONCILE_GRACE_SECONDS have passed, and only the reconciler notices its deletion
    #[arg(
        long,
        env,
        default_value_t = Conventions::default().decision_annotation.unwrap_or_default(),
        value_parser = label_key_or_empty
    )]
    decision_annotation: String,

    /// Whether the nodeSelector of an executor also has the role label, for node pools of executors only. Accepted: true or
    /// false
    #[arg(
        long,
        env,
        default_value_t = Conventions::default().node_role_selector,
        value_parser = switch,
        action = clap::ArgAction::Set,
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    node_role_selector: bool,
}

impl ConventionArguments {
    /// The conventions.
    ///
    /// # Errors
    /// Drivers and executors have the same role value.
    pub fn conventions(self) -> anyhow::Result<Conventions> {
        let Self {
            spot_preference,
            capacity_type_label,
            workload_role_label,
            spark_role_label,
            driver_role_value,
            executor_role_value,
            job_id_label,
            spot_ratio_annotation,
            on_demand_base_annotation,
            decision_annotation,
            node_role_selector,
        } = self;
        if driver_role_value == executor_role_value {
            bail!(
                "DRIVER_ROLE_VALUE and EXECUTOR_ROLE_VALUE are both {driver_role_value:?}; accepted: two different values"
            );
        }
        Ok(Conventions {
            spot_preference,
            capacity_type_label,
            workload_role_label: workload_role_label
                .or(spark_role_label)
                .unwrap_or_else(|| Conventions::default().workload_role_label),
            driver_role_value,
            executor_role_value,
            job_id_label,
            spot_ratio_annotation,
            on_demand_base_annotation,
            decision_annotation: Some(decision_annotation).filter(|key| !key.is_empty()),
            node_role_selector,
        })
    }
}

/// A whole number within `range`; a parser for a flag.
pub fn number<T: TryFrom<u64>>(range: RangeInclusive<u64>) -> impl Fn(&str) -> anyhow::Result<T> + Clone {
    move |text| {
        let number = text.trim().parse().ok().filter(|number| range.contains(number));
        number.and_then(|number| T::try_from(number).ok()).with_context(|| {
            format!("{text:?} is not accepted; accepted: a whole number from {} to {}", range.start(), range.end())
        })
    }
}

/// One of these names, in any case; a parser for a flag.
pub fn choice<T: Copy>(
    choices: &'static [(&'static str, T)],
    accepted: &'static str,
) -> impl Fn(&str) -> anyhow::Result<T> + Clone {
    move |text| {
        let choice = choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(text.trim()));
        choice.map(|&(_, value)| value).with_context(|| format!("{text:?} is not accepted; accepted: {accepted}"))
    }
}

/// A switch, in the spellings of YAML and shells; a parser for a flag.
pub fn switch(text: &str) -> anyhow::Result<bool> {
    const SPELLINGS: &[(&str, bool)] = &[
        ("true", true),
        ("yes", true),
        ("on", true),
        ("1", true),
        ("false", false),
        ("no", false),
        ("off", false),
        ("0", false),
    ];
    choice(SPELLINGS, "true or false")(text)
}

/// The key of a label or an annotation; a parser for a flag.
fn label_key(text: &str) -> anyhow::Result<String> {
    if !is_label_key(text) {
        bail!("{text:?} is not a label key; accepted: a label key such as spark-role or example.com/role");
    }
    Ok(text.to_owned())
}

fn label_key_or_empty(text: &str) -> anyhow::Result<String> {
    if text.is_empty() { Ok(String::new()) } else { label_key(text).context("or empty, to write none") }
}

/// The value of a label; a parser for a flag.
fn label_value(text: &str) -> anyhow::Result<String> {
    if !is_label_value(text) {
        bail!("{text:?} is not a label value; accepted: 1 to 63 letters, digits, '-', '_' and '.'");
    }
    Ok(text.to_owned())
}

/// Logs, and the port for probes and metrics.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Logs, probes and metrics")]
pub struct TelemetryArguments {
    /// Lowest level that is logged. Accepted: TRACE, DEBUG, INFO, WARNING, ERROR or CRITICAL, in any case
    #[arg(long, env, default_value = "INFO", value_parser = choice(LEVELS, LEVELS_ACCEPTED))]
    pub log_level: Level,

    /// Format of the log on standard output. Accepted: text (lines for people) or json (one JSON object a line)
    #[arg(long, env, default_value = "text", value_parser = choice(FORMATS, "text or json"))]
    pub log_format: LogFormat,

    /// Port of plain HTTP for /livez, /readyz and /metrics. Accepted: 0 to 65535; 0 selects a free port
    #[arg(long, env, default_value_t = 8080, value_parser = number::<u16>(0..=65_535))]
    pub admin_port: u16,
}

/// The names of levels, those of Python included.
const LEVELS: &[(&str, Level)] = &[
    ("TRACE", Level::TRACE),
    ("DEBUG", Level::DEBUG),
    ("INFO", Level::INFO),
    ("WARNING", Level::WARN),
    ("WARN", Level::WARN),
    ("ERROR", Level::ERROR),
    ("CRITICAL", Level::ERROR),
    ("FATAL", Level::ERROR),
];
const LEVELS_ACCEPTED: &str = "TRACE, DEBUG, INFO, WARNING, ERROR or CRITICAL";

/// The format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

const FORMATS: &[(&str, LogFormat)] = &[("text", LogFormat::Text), ("json", LogFormat::Json)];

#[cfg(test)]
mod tests {
    use super::*;

    use clap::Parser;

    #[derive(Parser)]
    struct Shared {
        #[command(flatten)]
        conventions: ConventionArguments,
        #[command(flatten)]
        defaults: DefaultArguments,
    }

    #[test]
    fn without_settings_the_defaults_of_the_core_apply() {
        let Shared { conventions, defaults } = Shared::try_parse_from(["test"]).expect("no setting is required");
        assert_eq!(conventions.conventions().expect("the defaults are valid"), Conventions::default());
        assert_eq!(defaults.policy(), Policy::DEFAULT);
    }

    #[test]
    fn names_are_accepted_in_any_case() {
        let level = choice(LEVELS, LEVELS_ACCEPTED);
        for (name, expected) in [("warning", Level::WARN), ("CRITICAL", Level::ERROR), (" Info ", Level::INFO)] {
            assert_eq!(level(name).ok(), Some(expected), "{name}");
        }
        let error = level("verbose").expect_err("no such level").to_string();
        assert!(error.contains("verbose") && error.contains(LEVELS_ACCEPTED), "{error}");
    }

    #[test]
    fn switches_are_accepted_in_the_spellings_of_yaml_and_shells() {
        for (text, expected) in [("TRUE", true), ("on", true), ("1", true), ("No", false), ("off", false), ("0", false)]
        {
            assert_eq!(switch(text).ok(), Some(expected), "{text}");
        }
        assert!(switch("perhaps").is_err());
    }
}
