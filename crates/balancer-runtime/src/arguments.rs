//! The settings that both binaries share. Each is an environment variable and a flag; an
//! invalid value stops the program at its start.

use std::ops::RangeInclusive;
use std::str::FromStr;

use anyhow::{Context, bail};
use balancer_core::{Conventions, Policy, PolicyField, Ratio, SpotPreference};
use clap::Args;

use crate::k8s_names::{is_label_key, is_label_value};

/// What applies to a job that states nothing.
#[derive(Args, Clone, Copy, Debug)]
pub struct DefaultArguments {
    /// Share of spot for a job that states none: 0 to 1 such as 0.7, a percentage such as 70%, or
    /// RELIABILITY_ONLY, RELIABILITY_OVER_COST, BALANCED, COST_OVER_RELIABILITY, COST_ONLY
    #[arg(long, env, default_value_t = Policy::DEFAULT.spot_ratio)]
    default_spot_ratio: Ratio,
}

impl DefaultArguments {
    /// The policy of a job that states nothing.
    pub fn policy(self) -> Policy {
        let Self { default_spot_ratio } = self;
        Policy { spot_ratio: default_spot_ratio, ..Policy::DEFAULT }
    }
}

/// How the cluster names roles, jobs and capacity.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Conventions of the cluster")]
pub struct ConventionArguments {
    /// STRICT pins spot executors to spot, where they wait for it; BEST_EFFORT gives them no
    /// selector. On-demand executors are pinned either way
    #[arg(long, env, default_value = "BEST_EFFORT")]
    spot_preference: SpotPreference,

    /// Node label and nodeSelector key of the capacity type
    #[arg(long, env, default_value = "karpenter.sh/capacity-type", value_parser = label_key)]
    capacity_type_label: String,

    /// Pod label that tells the role [default: spark-role]
    #[arg(long, env, value_parser = label_key)]
    workload_role_label: Option<String>,

    /// The older name of WORKLOAD_ROLE_LABEL
    #[arg(long, env, value_parser = label_key)]
    spark_role_label: Option<String>,

    /// Value of the role label on drivers
    #[arg(long, env, default_value = "driver", value_parser = label_value)]
    driver_role_value: String,

    /// Value of the role label on executors
    #[arg(long, env, default_value = "executor", value_parser = label_value)]
    executor_role_value: String,

    /// Pod labels that may tell the job id, comma-separated; the first one present counts
    #[arg(
        long,
        env,
        default_value = "emr-containers.amazonaws.com/job.id,spark-app-selector",
        value_delimiter = ',',
        value_parser = label_key
    )]
    job_id_label: Vec<String>,

    /// Annotation of the wanted share of spot, on the driver or on the executor itself
    #[arg(long, env, default_value = PolicyField::SpotRatio.default_annotation(), value_parser = label_key)]
    spot_ratio_annotation: String,

    /// Annotation of the number of executors that must be on-demand before the ratio applies
    #[arg(long, env, default_value = PolicyField::OnDemandBase.default_annotation(), value_parser = label_key)]
    on_demand_base_annotation: String,

    /// Annotation that is written on each placed executor; empty writes none
    #[arg(long, env, default_value = "workload/capacity-type", value_parser = label_key_or_empty)]
    decision_annotation: String,

    /// Whether pinned executors also get the role label as a nodeSelector
    #[arg(long, env, default_value = "true", value_parser = yes_or_no, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    node_role_selector: bool,
}

impl ConventionArguments {
    /// The conventions, checked against each other.
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
            workload_role_label: workload_role_label.or(spark_role_label).unwrap_or_else(|| "spark-role".into()),
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

/// A switch, as YAML and shells write them; a parser for a flag.
pub fn yes_or_no(text: &str) -> anyhow::Result<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => bail!("{text:?} is not a switch; accepted: true or false"),
    }
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

/// How much is logged, and as what.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Logs, probes and metrics")]
pub struct TelemetryArguments {
    /// TRACE, DEBUG, INFO, WARNING, ERROR or CRITICAL; any case
    #[arg(long, env, default_value = "INFO")]
    pub log_level: LogLevel,

    /// text for people, json for clusters
    #[arg(long, env, default_value = "text")]
    pub log_format: LogFormat,

    /// Port of plain HTTP for /livez, /readyz and /metrics; 0 takes a free one
    #[arg(long, env, default_value_t = 8080, value_parser = number::<u16>(0..=65_535))]
    pub admin_port: u16,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLevel(pub tracing::Level);

impl FromStr for LogLevel {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> anyhow::Result<Self> {
        use tracing::Level;
        Ok(Self(match text.trim().to_ascii_uppercase().as_str() {
            "TRACE" => Level::TRACE,
            "DEBUG" => Level::DEBUG,
            "INFO" => Level::INFO,
            "WARNING" | "WARN" => Level::WARN,
            "ERROR" | "CRITICAL" | "FATAL" => Level::ERROR,
            _ => bail!("{text:?} is not a log level; accepted: TRACE, DEBUG, INFO, WARNING, ERROR or CRITICAL"),
        }))
    }
}

/// As what is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> anyhow::Result<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => bail!("{text:?} is not a log format; accepted: text or json"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_level_names_are_known_in_any_case() {
        for (name, level) in
            [("warning", tracing::Level::WARN), ("CRITICAL", tracing::Level::ERROR), ("Info", tracing::Level::INFO)]
        {
            assert_eq!(name.parse::<LogLevel>().ok(), Some(LogLevel(level)), "{name}");
        }
        assert!("verbose".parse::<LogLevel>().is_err());
    }
}
