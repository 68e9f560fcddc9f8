//! The settings that both binaries share. Each is an environment variable and a flag. An invalid value stops the program
//! at its start.

use std::ops::RangeInclusive;
use std::sync::LazyLock;

use anyhow::{Context, anyhow, bail};
use balancer_core::{
    CapacityLabels, CapacityProfile, Conventions, DriverCapacity, InvalidField, LabelValues, Policy, PolicyField,
    PolicyOverrides, Ratio, SpotPreference, SpotRatio, Toleration,
};
use clap::Args;
use tracing::Level;

use crate::k8s_names::{is_label_key, is_label_value};

/// The policy of a job that states none.
#[derive(Args, Clone, Copy, Debug)]
pub struct DefaultArguments {
    /// Share of spot for a job that states none, or an invalid one. Accepted: 0 to 1 such as 0.7, a percentage such as
    /// 70%, or RELIABILITY_ONLY (0), RELIABILITY_OVER_COST (0.3), BALANCED (0.5), COST_OVER_RELIABILITY (0.8), COST_ONLY
    /// (1) in any case; or none, to leave such a job unchanged
    #[arg(long, env, default_value_t = SpotRatio::HALF, value_parser = default_spot_ratio)]
    default_spot_ratio: SpotRatio,

    /// How many seconds a spot executor may be unschedulable, with no node on its way, before it is replaced on on-demand
    /// capacity; 0 for any time. Accepted: 0 to 86400. The annotation workload/spot-fallback-seconds states it for a job
    #[arg(long, env, default_value_t = Policy::DEFAULT.spot_fallback_seconds, value_parser = spot_fallback_seconds)]
    spot_fallback_seconds: u32,

    /// How many seconds spot stays closed for a job before one executor probes it. Accepted: 0 to 86400. The annotation
    /// workload/spot-retry-seconds states it for a job
    #[arg(long, env, default_value_t = Policy::DEFAULT.spot_retry_seconds, value_parser = spot_retry_seconds)]
    spot_retry_seconds: u32,

    /// Maximum spot executors of one job per node; 0 for any number. Accepted: 0 to 1000000. The annotation
    /// workload/max-executors-per-node states it for a job
    #[arg(long, env, default_value_t = Policy::DEFAULT.max_executors_per_node, value_parser = max_executors_per_node)]
    max_executors_per_node: u32,

    /// Largest share of a job's spot executors in one pool, an instance type in a zone, before new ones are steered to
    /// other pools; 1 for no limit. Accepted: above 0 and up to 1 such as 0.4, or a percentage such as 40%. The annotation
    /// workload/max-pool-share states it for a job
    #[arg(long, env, default_value_t = Policy::DEFAULT.max_pool_share, value_parser = max_pool_share)]
    max_pool_share: Ratio,
}

impl DefaultArguments {
    /// The policy of a job that states none.
    pub fn policy(self) -> Policy {
        let Self {
            default_spot_ratio,
            spot_fallback_seconds,
            spot_retry_seconds,
            max_executors_per_node,
            max_pool_share,
        } = self;
        Policy {
            spot_ratio: default_spot_ratio,
            spot_fallback_seconds,
            spot_retry_seconds,
            max_executors_per_node,
            max_pool_share,
            ..Policy::DEFAULT
        }
    }
}

/// As one text, because `--help` would otherwise show it with a space for the comma.
static DEFAULT_JOB_ID_LABEL: LazyLock<String> = LazyLock::new(|| Conventions::default().job_id_label.join(","));

/// As one text, for the same reason.
static DEFAULT_DRIVER_ROLE_VALUE: LazyLock<String> =
    LazyLock::new(|| Conventions::default().driver_role_values.join(","));

/// The labels and annotations of the cluster.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Labels and annotations")]
pub struct ConventionArguments {
    /// Pod label whose value is the role. Accepted: a label key [default: spark-role]
    #[arg(long, env, value_parser = label_key)]
    workload_role_label: Option<String>,

    /// Older name of WORKLOAD_ROLE_LABEL, used only if that is not set
    #[arg(long, env, value_parser = label_key)]
    spark_role_label: Option<String>,

    /// Values of the role label on the pods that drive jobs. Accepted: label values, separated by commas
    #[arg(
        long,
        env,
        default_value = DEFAULT_DRIVER_ROLE_VALUE.as_str(),
        value_delimiter = ',',
        value_parser = label_value
    )]
    driver_role_value: Vec<String>,

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

    #[command(flatten)]
    capacity: CapacityArguments,
}

/// How nodes show their capacity, and what pods get for it.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Spot and on-demand")]
struct CapacityArguments {
    /// Whether spot executors must run on spot. STRICT: they require it, and wait until spot is available. BEST_EFFORT: they
    /// prefer it. On-demand executors always require on-demand. Accepted: STRICT or BEST_EFFORT, in any case
    #[arg(long, env, default_value = "BEST_EFFORT")]
    spot_preference: SpotPreference,

    /// Platform of the nodes, which provides the defaults of the next four settings. karpenter is also for EKS Auto Mode,
    /// Azure Node Auto Provisioning and OCI; eks is for managed node groups. Accepted: karpenter, eks, gke, aks, openshift,
    /// oke, ack, ocean or cast-ai, in any case
    #[arg(long, env, default_value_t = CapacityProfile::Karpenter)]
    capacity_profile: CapacityProfile,

    /// Node label that shows the capacity. With another label than that of the profile, set SPOT_VALUES and ON_DEMAND_VALUES
    /// both, or neither if it has the profile's values. Accepted: a label key [default: by CAPACITY_PROFILE]
    #[arg(long, env, value_parser = label_key)]
    capacity_type_label: Option<String>,

    /// Values of that label on spot nodes. Accepted: label values, separated by commas, or * for any value [default: by
    /// CAPACITY_PROFILE]
    #[arg(long, env, value_parser = spot_values)]
    spot_values: Option<LabelValues>,

    /// Values of that label on the nodes for on-demand executors. Accepted: label values, separated by commas, or empty for
    /// every node that is not spot, with the label or without [default: by CAPACITY_PROFILE]
    #[arg(long, env, value_parser = on_demand_values)]
    on_demand_values: Option<OnDemandValues>,

    /// Tolerations that spot executors get. Accepted: key=value:effect or key:effect, separated by commas, with the effect
    /// NoSchedule, PreferNoSchedule or NoExecute; or empty for none [default: by CAPACITY_PROFILE, and none with another
    /// CAPACITY_TYPE_LABEL]
    #[arg(long, env, value_parser = tolerations)]
    spot_tolerations: Option<Tolerations>,

    /// Where drivers run that do not choose a capacity themselves. Accepted: any, or on-demand
    #[arg(long, env, default_value = "any", value_parser = choice(DRIVER_CAPACITIES, "any or on-demand"))]
    driver_capacity: DriverCapacity,

    /// Whether drivers get annotations that keep Karpenter and the cluster autoscaler from moving them. Accepted: true or
    /// false
    #[arg(
        long,
        env,
        default_value_t = Conventions::default().protect_drivers,
        value_parser = switch,
        action = clap::ArgAction::Set,
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    protect_drivers: bool,
}

const DRIVER_CAPACITIES: &[(&str, DriverCapacity)] =
    &[("any", DriverCapacity::Any), ("on-demand", DriverCapacity::OnDemand)];

/// The values of ON_DEMAND_VALUES. A type of its own, because clap takes a list for several arguments.
#[derive(Clone, Debug)]
struct OnDemandValues(Vec<String>);

/// The tolerations of SPOT_TOLERATIONS.
#[derive(Clone, Debug)]
struct Tolerations(Vec<Toleration>);

impl CapacityArguments {
    /// The labels of the profile, as far as no setting replaces them.
    fn labels(&self) -> anyhow::Result<CapacityLabels> {
        let mut labels = CapacityLabels::of(self.capacity_profile);
        if let Some(label) = self.capacity_type_label.as_ref().filter(|label| **label != labels.label) {
            if self.spot_values.is_some() != self.on_demand_values.is_some() {
                let (stated, missing) = match self.spot_values {
                    Some(_) => ("SPOT_VALUES", "ON_DEMAND_VALUES"),
                    None => ("ON_DEMAND_VALUES", "SPOT_VALUES"),
                };
                bail!(
                    "CAPACITY_TYPE_LABEL is {label:?}, and {stated} is set without {missing}; accepted with a label other than \
                     that of CAPACITY_PROFILE={}: both (an empty ON_DEMAND_VALUES means every node that is not spot), or \
                     neither, if the label has the values of the profile",
                    self.capacity_profile
                );
            }
            labels.label.clone_from(label);
            labels.spot_tolerations.clear();
        }
        if let Some(values) = &self.spot_values {
            labels.spot_values.clone_from(values);
        }
        if let Some(OnDemandValues(values)) = &self.on_demand_values {
            labels.on_demand_values.clone_from(values);
        }
        if let Some(Tolerations(tolerations)) = &self.spot_tolerations {
            labels.spot_tolerations.clone_from(tolerations);
        }
        let on_demand = &labels.on_demand_values;
        match &labels.spot_values {
            LabelValues::Any if !on_demand.is_empty() => bail!(
                "SPOT_VALUES is \"*\", and ON_DEMAND_VALUES {:?} would be spot too; accepted with \"*\": an empty \
                 ON_DEMAND_VALUES, for the nodes without the label",
                on_demand.join(",")
            ),
            LabelValues::OneOf(spot) if let Some(both) = on_demand.iter().find(|value| spot.contains(value)) => bail!(
                "SPOT_VALUES and ON_DEMAND_VALUES both contain {both:?} (unset, they are those of CAPACITY_PROFILE={}); \
                 accepted: different values",
                self.capacity_profile
            ),
            _ => Ok(labels),
        }
    }
}

impl ConventionArguments {
    /// The conventions.
    ///
    /// # Errors
    /// Drivers and executors have the same role value, two annotations the same key, or spot and on-demand nodes the same
    /// label value.
    pub fn conventions(self) -> anyhow::Result<Conventions> {
        let Self {
            workload_role_label,
            spark_role_label,
            driver_role_value,
            executor_role_value,
            job_id_label,
            spot_ratio_annotation,
            on_demand_base_annotation,
            decision_annotation,
            node_role_selector,
            capacity,
        } = self;
        if driver_role_value.contains(&executor_role_value) {
            bail!(
                "DRIVER_ROLE_VALUE and EXECUTOR_ROLE_VALUE both contain {executor_role_value:?}; accepted: different values"
            );
        }
        let annotations = [
            ("SPOT_RATIO_ANNOTATION", &spot_ratio_annotation),
            ("ON_DEMAND_BASE_ANNOTATION", &on_demand_base_annotation),
            ("DECISION_ANNOTATION", &decision_annotation),
        ];
        for (position, (name, key)) in annotations.iter().enumerate() {
            if let Some((other, _)) = annotations.iter().take(position).find(|(_, other)| other == key) {
                bail!("{other} and {name} are both {key:?}; accepted: different keys");
            }
        }
        Ok(Conventions {
            spot_preference: capacity.spot_preference,
            capacity_labels: capacity.labels()?,
            workload_role_label: workload_role_label
                .or(spark_role_label)
                .unwrap_or_else(|| Conventions::default().workload_role_label),
            driver_role_values: driver_role_value,
            executor_role_value,
            job_id_label,
            spot_ratio_annotation,
            on_demand_base_annotation,
            decision_annotation: Some(decision_annotation).filter(|key| !key.is_empty()),
            node_role_selector,
            driver_capacity: capacity.driver_capacity,
            protect_drivers: capacity.protect_drivers,
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

/// Adds to an error what is accepted as well. clap shows only the outermost text of an error.
fn or<T>(parsed: anyhow::Result<T>, also_accepted: &str) -> anyhow::Result<T> {
    parsed.map_err(|error| anyhow!("{error}; {also_accepted}"))
}

fn label_key_or_empty(text: &str) -> anyhow::Result<String> {
    if text.is_empty() { Ok(String::new()) } else { or(label_key(text), "or empty, to write none") }
}

/// The value of a label; a parser for a flag.
fn label_value(text: &str) -> anyhow::Result<String> {
    if !is_label_value(text) {
        bail!("{text:?} is not a label value; accepted: 1 to 63 letters, digits, '-', '_' and '.'");
    }
    Ok(text.to_owned())
}

fn spot_fallback_seconds(text: &str) -> Result<u32, InvalidField> {
    let overrides = PolicyOverrides::parse_one(PolicyField::SpotFallbackSeconds, text)?;
    Ok(overrides.spot_fallback_seconds.unwrap_or_default())
}

fn spot_retry_seconds(text: &str) -> Result<u32, InvalidField> {
    let overrides = PolicyOverrides::parse_one(PolicyField::SpotRetrySeconds, text)?;
    Ok(overrides.spot_retry_seconds.unwrap_or_default())
}

fn max_executors_per_node(text: &str) -> Result<u32, InvalidField> {
    let overrides = PolicyOverrides::parse_one(PolicyField::MaxExecutorsPerNode, text)?;
    Ok(overrides.max_executors_per_node.unwrap_or_default())
}

fn max_pool_share(text: &str) -> Result<Ratio, InvalidField> {
    let overrides = PolicyOverrides::parse_one(PolicyField::MaxPoolShare, text)?;
    Ok(overrides.max_pool_share.unwrap_or(Ratio::ONE))
}

/// A ratio, or `none`; a parser for a flag.
fn default_spot_ratio(text: &str) -> anyhow::Result<SpotRatio> {
    if text.trim().eq_ignore_ascii_case("none") {
        return Ok(SpotRatio::Off);
    }
    let ratio: Result<Ratio, _> = text.parse();
    ratio.map(SpotRatio::Share).map_err(|error| anyhow!("{error}; or none, to leave jobs without a ratio unchanged"))
}

/// `*`, or label values; a parser for a flag.
fn spot_values(text: &str) -> anyhow::Result<LabelValues> {
    match text {
        "*" => Ok(LabelValues::Any),
        _ => or(text.split(',').map(label_value).collect::<Result<_, _>>().map(LabelValues::OneOf), "or * alone"),
    }
}

/// Label values, or none; a parser for a flag.
fn on_demand_values(text: &str) -> anyhow::Result<OnDemandValues> {
    let values = text.split(',').filter(|_| !text.is_empty()).map(label_value).collect::<Result<_, _>>();
    or(values.map(OnDemandValues), "or empty, for every node that is not spot")
}

/// Tolerations, or none; a parser for a flag.
fn tolerations(text: &str) -> anyhow::Result<Tolerations> {
    text.split(',').filter(|_| !text.is_empty()).map(toleration).collect::<Result<_, _>>().map(Tolerations)
}

fn toleration(text: &str) -> anyhow::Result<Toleration> {
    const EFFECTS: [&str; 3] = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
    let parse = || {
        let (taint, effect) = text.rsplit_once(':')?;
        let (key, value) = taint.split_once('=').map_or((taint, None), |(key, value)| (key, Some(value)));
        // The value of a taint can be empty.
        let is_valid = is_label_key(key) && value.is_none_or(|value| value.is_empty() || is_label_value(value));
        let effect = EFFECTS.into_iter().find(|known| known.eq_ignore_ascii_case(effect)).filter(|_| is_valid)?;
        Some(Toleration { key: key.to_owned(), value: value.map(str::to_owned), effect: effect.to_owned() })
    };
    parse().with_context(|| {
        format!(
            "{text:?} is not a toleration; accepted: key=value:effect or key:effect such as example.com/spot=true:NoSchedule, \
             with the effect {}",
            EFFECTS.join(" or ")
        )
    })
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

    fn conventions(arguments: &[&str]) -> Result<Conventions, String> {
        let shared = Shared::try_parse_from([&["test"], arguments].concat()).map_err(|error| error.to_string())?;
        shared.conventions.conventions().map_err(|error| error.to_string())
    }

    fn labels(arguments: &[&str]) -> CapacityLabels {
        conventions(arguments).expect("accepted").capacity_labels
    }

    #[test]
    fn a_profile_provides_the_labels_that_no_setting_replaces() {
        for profile in CapacityProfile::ALL {
            let name = profile.to_string().to_uppercase();
            assert_eq!(labels(&["--capacity-profile", &name]), CapacityLabels::of(profile));
        }
        let own = labels(&[
            "--capacity-profile=gke",
            "--capacity-type-label=lifecycle",
            "--spot-values=Ec2Spot,spot",
            "--on-demand-values=OnDemand",
            "--spot-tolerations=example.com/spot=yes:NoSchedule,empty=:noexecute,lifecycle:PreferNoSchedule",
        ]);
        let toleration = |key: &str, value: Option<&str>, effect: &str| Toleration {
            key: key.into(),
            value: value.map(str::to_owned),
            effect: effect.into(),
        };
        let expected = CapacityLabels {
            profile: CapacityProfile::Gke,
            label: "lifecycle".into(),
            spot_values: LabelValues::OneOf(vec!["Ec2Spot".into(), "spot".into()]),
            on_demand_values: vec!["OnDemand".into()],
            spot_tolerations: vec![
                toleration("example.com/spot", Some("yes"), "NoSchedule"),
                toleration("empty", Some(""), "NoExecute"),
                toleration("lifecycle", None, "PreferNoSchedule"),
            ],
        };
        assert_eq!(own, expected);
    }

    #[test]
    fn an_empty_text_is_a_value_of_its_own() {
        let empty = labels(&["--capacity-profile=aks", "--on-demand-values=", "--spot-tolerations="]);
        assert_eq!(empty, CapacityLabels { spot_tolerations: Vec::new(), ..CapacityLabels::of(CapacityProfile::Aks) });
        assert!(labels(&["--on-demand-values="]).on_demand_values.is_empty());
        assert_eq!(labels(&["--spot-values=*", "--on-demand-values="]).spot_values, LabelValues::Any);
    }

    #[test]
    fn labels_that_contradict_each_other_are_refused() {
        for (arguments, part) in [
            (["--spot-values=a,b", "--on-demand-values=b"], "both contain \"b\""),
            (["--spot-values=on-demand", "--capacity-profile=karpenter"], "CAPACITY_PROFILE=karpenter"),
            (["--spot-values=*", "--on-demand-values=b"], "an empty ON_DEMAND_VALUES"),
            (["--spot-values=*", "--capacity-profile=eks"], "\"ON_DEMAND\""),
        ] {
            let error = conventions(&arguments).expect_err("refused");
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_label_of_ones_own_has_values_of_its_own_or_those_of_the_profile() {
        for (arguments, part) in [
            ("--spot-values=Ec2Spot", "SPOT_VALUES is set without ON_DEMAND_VALUES"),
            ("--on-demand-values=OnDemand", "ON_DEMAND_VALUES is set without SPOT_VALUES"),
            ("--on-demand-values=", "CAPACITY_PROFILE=aks: both (an empty ON_DEMAND_VALUES means"),
        ] {
            let error = conventions(&["--capacity-profile=aks", "--capacity-type-label=lifecycle", arguments]);
            let error = error.expect_err("refused");
            assert!(error.contains("\"lifecycle\"") && error.contains(part), "{error}");
        }
        // With the label of the profile each can be replaced alone.
        let of_profile = CapacityLabels::of(CapacityProfile::Aks);
        let label = format!("--capacity-type-label={}", of_profile.label);
        let replaced = labels(&["--capacity-profile=aks", &label, "--on-demand-values=regular"]);
        assert_eq!(replaced, CapacityLabels { on_demand_values: vec!["regular".into()], ..of_profile.clone() });
        // The profile's taint is not that of another label.
        let own = CapacityLabels { label: "lifecycle".into(), spot_tolerations: Vec::new(), ..of_profile };
        assert_eq!(labels(&["--capacity-profile=aks", "--capacity-type-label=lifecycle"]), own);
        let both = ["--capacity-type-label=lifecycle", "--spot-values=Ec2Spot", "--on-demand-values="];
        assert_eq!(labels(&both).on_demand_values, Vec::<String>::new());
    }

    #[test]
    fn one_key_for_two_annotations_is_refused() {
        for (arguments, part) in [
            (
                ["--spot-ratio-annotation=a", "--on-demand-base-annotation=a"],
                "ON_DEMAND_BASE_ANNOTATION are both \"a\"",
            ),
            (["--decision-annotation=a", "--spot-ratio-annotation=a"], "SPOT_RATIO_ANNOTATION and DECISION_ANNOTATION"),
            (["--decision-annotation=a", "--on-demand-base-annotation=a"], "accepted: different keys"),
        ] {
            let error = conventions(&arguments).expect_err("refused");
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(conventions(&["--decision-annotation="]).expect("accepted").decision_annotation, None);
    }

    #[test]
    fn invalid_labels_are_refused_with_what_is_accepted() {
        for (argument, part) in [
            ("--capacity-profile=ec2", "accepted: karpenter, eks, gke"),
            ("--capacity-type-label=", "accepted: a label key"),
            ("--spot-values=", "or * alone"),
            (
                "--spot-values=a,*",
                "\"*\" is not a label value; accepted: 1 to 63 letters, digits, '-', '_' and '.'; or * alone",
            ),
            ("--on-demand-values=a,,b", "or empty"),
            ("--spot-tolerations=key", "key=value:effect"),
            ("--spot-tolerations=key:Never", "NoSchedule or PreferNoSchedule or NoExecute"),
            ("--spot-tolerations=a b:NoSchedule", "key:effect"),
            ("--driver-capacity=spot", "any or on-demand"),
            ("--protect-drivers=perhaps", "true or false"),
        ] {
            let error = conventions(&[argument]).expect_err(argument);
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn drivers_are_pinned_and_protected_on_request() {
        let conventions = conventions(&["--driver-capacity=On-Demand", "--protect-drivers"]).expect("accepted");
        assert_eq!((conventions.driver_capacity, conventions.protect_drivers), (DriverCapacity::OnDemand, true));
    }

    #[test]
    fn jobs_without_a_ratio_can_be_left_unchanged() {
        let policy = |ratio: &str| {
            let shared = Shared::try_parse_from(["test", "--default-spot-ratio", ratio]);
            shared.map(|shared| shared.defaults.policy()).map_err(|error| error.to_string())
        };
        assert_eq!(policy("None"), Ok(Policy { spot_ratio: SpotRatio::Off, ..Policy::DEFAULT }));
        assert_eq!(policy("100%"), Ok(Policy { spot_ratio: SpotRatio::ONE, ..Policy::DEFAULT }));
        let error = policy("off").expect_err("for annotations only");
        assert!(error.contains("or none"), "{error}");
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
