//! The options of `simulate`, what they accept, and where each value is from: the command line, a default of Spot Balancer,
//! or an assumption.

use std::path::PathBuf;
use std::str::FromStr;

use balancer_core::{InvalidField, Policy, PolicyField, PolicyOverrides, Ratio, RatioError, SpotPreference};
use balancer_runtime::text::number_of;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::model::{AT_ONCE_SECONDS, Cloud, Job, Scenario, SpotPool};
use super::run::FEWEST_RUNS;
use crate::output::{Format, address};

const MAX_EXECUTORS: u32 = 100_000;
/// A month, because rates are those of a month.
const MAX_HOURS: f64 = 720.0;
const MAX_POOLS: usize = 100;
const MAX_RUNS: u32 = 1_000_000;

/// Cost, run time and risk of a job, by its spot ratio and its on-demand base
#[derive(Debug, Args)]
#[command(
    after_help = concat!(
        "Values that you do not state are assumptions; the output lists them. Their sources: ",
        address!("docs/simulation.md")
    )
)]
pub(crate) struct Arguments {
    /// The executors of the job
    #[arg(long, value_name = "NUMBER", value_parser = executors)]
    pub(crate) executors: u32,

    /// The hours that the job takes with all executors and without losses
    #[arg(long, value_name = "HOURS", value_parser = hours)]
    pub(crate) hours: f64,

    /// The shuffle data on each executor, in GB [assumed: 10]
    #[arg(long, value_name = "GB", value_parser = shuffle)]
    pub(crate) shuffle: Option<f64>,

    /// Parts of the job that end with their result in durable storage, and so need not be repeated [assumed: 1]
    #[arg(long, value_name = "NUMBER", value_parser = stages)]
    pub(crate) stages: Option<u32>,

    /// Executors hand over their blocks before they are lost
    #[arg(long)]
    pub(crate) decommission: bool,

    /// Executors use the volumes of lost ones
    #[arg(long)]
    pub(crate) pvc_reuse: bool,

    /// The spot ratios to compare, with commas between them
    #[arg(long, value_name = "RATIOS", value_delimiter = ',', default_value = "0,0.3,0.5,0.7,0.9,1", value_parser = ratio)]
    pub(crate) ratios: Vec<Ratio>,

    /// The on-demand bases to compare
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', default_value = "0", value_parser = base)]
    pub(crate) bases: Vec<u32>,

    /// The pools of spot nodes (an instance type in a zone) that the job may use [assumed: 4]
    #[arg(long, value_name = "NUMBER", value_parser = pools)]
    pub(crate) pools: Option<usize>,

    /// The probability that a node is interrupted within a month, for all pools or for each [assumed: 0.05]
    #[arg(long, value_name = "RATES", value_delimiter = ',', value_parser = rate)]
    pub(crate) rates: Vec<f64>,

    /// The share of the on-demand price that spot saves, for all pools or for each [assumed: 0.6]
    #[arg(long, value_name = "SHARES", value_delimiter = ',', value_parser = discount, conflicts_with = "spot_prices")]
    pub(crate) discounts: Vec<f64>,

    /// The price of an executor for an hour on on-demand, in any currency
    #[arg(long, value_name = "PRICE", value_parser = price)]
    pub(crate) on_demand_price: Option<f64>,

    /// The price of an executor for an hour on spot, for all pools or for each
    #[arg(long, value_name = "PRICES", value_delimiter = ',', value_parser = price, requires = "on_demand_price")]
    pub(crate) spot_prices: Vec<f64>,

    /// The share of a node's interruptions that take its whole pool [assumed: 0.92]
    #[arg(long, value_name = "SHARE", value_parser = pool_wide)]
    pub(crate) pool_wide: Option<f64>,

    /// The spot nodes that each pool has before the job starts, for all pools or for each [assumed: an autoscaler adds them]
    #[arg(
        long,
        value_name = "NUMBERS",
        value_delimiter = ',',
        value_parser = ready_nodes,
        conflicts_with_all = ["executors_per_node", "max_executors_per_node", "node_start_seconds"],
    )]
    pub(crate) ready_nodes: Vec<u32>,

    /// The executors of the job that fit on one node [assumed: 4]
    #[arg(long, value_name = "NUMBER", value_parser = per_node)]
    pub(crate) executors_per_node: Option<u32>,

    /// The minutes for which a pool has no capacity after it was reclaimed, on average [assumed: 30]
    #[arg(long, value_name = "MINUTES", value_parser = minutes)]
    pub(crate) shortage_minutes: Option<f64>,

    /// The seconds from the request of a replacement until it works [assumed: 125]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) replacement_seconds: Option<f64>,

    /// The seconds from the request of an executor until it has a node that an autoscaler adds [assumed: 45]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) node_start_seconds: Option<f64>,

    /// How fast an executor hands over its blocks with --decommission, in MB/s [assumed: 100]
    #[arg(long, value_name = "MB/S", value_parser = speed)]
    pub(crate) hand_over: Option<f64>,

    /// As the annotation workload/max-pool-share [default: 1]
    #[arg(long, value_name = "SHARE", value_parser = max_pool_share)]
    pub(crate) max_pool_share: Option<PolicyOverrides>,

    /// As the annotation workload/max-executors-per-node; 0 for any number [default: 0]
    #[arg(long, value_name = "NUMBER", value_parser = max_executors_per_node)]
    pub(crate) max_executors_per_node: Option<PolicyOverrides>,

    /// As the setting SPOT_PREFERENCE [default: best-effort]
    #[arg(long, value_enum, ignore_case = true)]
    pub(crate) spot_preference: Option<Preference>,

    /// As the setting SPOT_FALLBACK_SECONDS; 0 to wait for spot for any time [default: 0]
    #[arg(long, value_name = "SECONDS", value_parser = spot_fallback_seconds)]
    pub(crate) spot_fallback_seconds: Option<PolicyOverrides>,

    /// As the setting SPOT_RETRY_SECONDS [default: 300]
    #[arg(long, value_name = "SECONDS", value_parser = spot_retry_seconds)]
    pub(crate) spot_retry_seconds: Option<PolicyOverrides>,

    /// Simulated jobs for each ratio and base, each of which loses something
    #[arg(long, value_name = "NUMBER", default_value = "10000", value_parser = runs)]
    pub(crate) runs: u32,

    /// The same seed gives the same output
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub(crate) seed: u64,

    /// Write a report with plots to this file too
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,

    /// The form of the output
    #[arg(long, short, value_enum, default_value = "table")]
    pub(crate) output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Preference {
    /// Spot executors run on on-demand while there is no spot
    #[value(alias = "best_effort")]
    BestEffort,
    /// Spot executors wait for spot
    Strict,
}

/// Why options do not fit together.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    #[error("{option} has {} for {}; accepted: one value, or one for each pool", number_of(*have, "value"), number_of(*pools, "pool"))]
    PerPool { option: &'static str, have: usize, pools: usize },
    #[error("--spot-prices {spot} is above --on-demand-price {on_demand}; accepted: up to the on-demand price")]
    SpotPrice { spot: f64, on_demand: f64 },
    #[error("{choices} ratios with bases; accepted: up to {MAX_CHOICES} combinations of --ratios and --bases")]
    Choices { choices: usize },
}

const MAX_CHOICES: usize = 1000;

/// Where a value is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Source {
    /// The command line.
    Stated,
    /// A default of Spot Balancer.
    Default,
    /// Nobody has stated it.
    Assumed,
}

impl Source {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Stated => "stated",
            Self::Default => "default",
            Self::Assumed => "assumed",
        }
    }
}

/// One value that the simulation uses.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Input {
    /// The option that states it; `None` if none does.
    pub(crate) option: Option<&'static str>,
    pub(crate) name: &'static str,
    pub(crate) value: String,
    pub(crate) source: Source,
    /// On what an assumption is based.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(crate) reason: &'static str,
}

/// What is simulated.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) scenario: Scenario,
    pub(crate) policies: Vec<Policy>,
    pub(crate) on_demand_price: Option<f64>,
    pub(crate) inputs: Vec<Input>,
}

/// Collects inputs while their values are taken.
#[derive(Default)]
struct Inputs(Vec<Input>);

impl Inputs {
    fn assume<T: Copy>(
        &mut self,
        (option, name): (&'static str, &'static str),
        stated: Option<T>,
        (assumed, reason): (T, &'static str),
        text: impl Fn(T) -> String,
    ) -> T {
        let value = stated.unwrap_or(assumed);
        let (source, reason) = if stated.is_some() { (Source::Stated, "") } else { (Source::Assumed, reason) };
        self.0.push(Input { option: Some(option), name, value: text(value), source, reason });
        value
    }

    fn policy(&mut self, (option, name): (&'static str, &'static str), is_stated: bool, value: String) {
        let source = if is_stated { Source::Stated } else { Source::Default };
        self.0.push(Input { option: Some(option), name, value, source, reason: "" });
    }

    fn stated(&mut self, (option, name): (&'static str, &'static str), value: String) {
        self.0.push(Input { option: Some(option), name, value, source: Source::Stated, reason: "" });
    }

    /// One value for each pool.
    fn per_pool<T: Copy + ToString>(
        &mut self,
        (option, name): (&'static str, &'static str),
        stated: &[T],
        (assumed, reason): (T, &'static str),
        pools: usize,
    ) -> Result<Vec<T>, InputError> {
        let values = match stated {
            [] => vec![assumed; pools],
            [one] => vec![*one; pools],
            each if each.len() == pools => each.to_vec(),
            each => return Err(InputError::PerPool { option, have: each.len(), pools }),
        };
        let (source, reason) = if stated.is_empty() { (Source::Assumed, reason) } else { (Source::Stated, "") };
        let shown = if stated.is_empty() { &[assumed] } else { stated };
        let value = shown.iter().map(T::to_string).collect::<Vec<_>>().join(", ");
        self.0.push(Input { option: Some(option), name, value, source, reason });
        Ok(values)
    }
}

impl Arguments {
    /// What is simulated.
    ///
    /// # Errors
    /// If options do not fit together.
    pub(crate) fn plan(&self) -> Result<Plan, InputError> {
        let mut inputs = Inputs::default();
        inputs.stated(("--executors", "executors"), self.executors.to_string());
        inputs.stated(("--hours", "run time without losses"), format!("{} h", self.hours));
        let gb = |value: f64| format!("{value} GB");
        let reason = "no source; with 0 nothing is computed again";
        let shuffle = inputs.assume(("--shuffle", "shuffle per executor"), self.shuffle, (10.0, reason), gb);
        let reason = "the worst case: a loss can cost all work so far";
        let stages =
            inputs.assume(("--stages", "stages with durable results"), self.stages, (1, reason), |n| n.to_string());
        let is_on = |is_on| if is_on { "on" } else { "off" }.to_owned();
        inputs.policy(("--decommission", "decommissioning"), self.decommission, is_on(self.decommission));
        inputs.policy(("--pvc-reuse", "reuse of volumes"), self.pvc_reuse, is_on(self.pvc_reuse));
        let cloud = self.cloud(&mut inputs)?;
        let preference = match self.spot_preference {
            Some(Preference::Strict) => SpotPreference::Strict,
            Some(Preference::BestEffort) | None => SpotPreference::BestEffort,
        };
        let value = if preference == SpotPreference::Strict { "strict" } else { "best-effort" };
        inputs.policy(("--spot-preference", "spot preference"), self.spot_preference.is_some(), value.to_owned());
        let policy = self.policy(&mut inputs);
        let job = Job {
            executors: self.executors,
            hours: self.hours,
            shuffle,
            stages,
            decommission: self.decommission,
            pvc_reuse: self.pvc_reuse,
        };
        let cloud = Cloud {
            // The cap is a part of the policy that decides how much is lost with a node.
            executors_per_node: match policy.max_executors_per_node {
                0 => cloud.executors_per_node,
                cap => cloud.executors_per_node.min(cap),
            },
            ..cloud
        };
        let choices = self.ratios.len() * self.bases.len();
        if choices > MAX_CHOICES {
            return Err(InputError::Choices { choices });
        }
        let choices = self.bases.iter().flat_map(|base| self.ratios.iter().map(move |ratio| (*ratio, *base)));
        let policies = choices.map(|(ratio, on_demand_base)| {
            let policy = Policy { on_demand_base, ..policy };
            Policy { spot_ratio: ratio.into(), ..policy }
        });
        let policies = policies.collect();
        let scenario = Scenario { job, cloud, preference };
        Ok(Plan { scenario, policies, on_demand_price: self.on_demand_price, inputs: inputs.0 })
    }

    fn cloud(&self, inputs: &mut Inputs) -> Result<Cloud, InputError> {
        let lists = [self.rates.len(), self.discounts.len(), self.spot_prices.len(), self.ready_nodes.len()];
        let of_lists = lists.into_iter().max().filter(|values| *values > 1);
        let reason = "no source; one zone and four instance types";
        let pools =
            inputs.assume(("--pools", "pools of spot nodes"), self.pools.or(of_lists), (4, reason), |n| n.to_string());
        let reason = "AWS: less than 5 % on average";
        let rates = inputs.per_pool(("--rates", "interruptions per month"), &self.rates, (0.05, reason), pools)?;
        let discounts = match self.on_demand_price.filter(|_| !self.spot_prices.is_empty()) {
            Some(on_demand) => {
                if let Some(spot) = self.spot_prices.iter().copied().find(|spot| *spot > on_demand) {
                    return Err(InputError::SpotPrice { spot, on_demand });
                }
                let name = ("--spot-prices", "spot price per executor-hour");
                let prices = inputs.per_pool(name, &self.spot_prices, (on_demand, ""), pools)?;
                prices.into_iter().map(|spot| 1.0 - spot / on_demand).collect()
            }
            None => {
                let reason = "55 % to 72 % for m6i, c6i and r6i in us-east-1 in 2026";
                inputs.per_pool(("--discounts", "spot discount"), &self.discounts, (0.6, reason), pools)?
            }
        };
        if let Some(price) = self.on_demand_price {
            inputs.stated(("--on-demand-price", "on-demand price per executor-hour"), price.to_string());
        }
        let name = ("--ready-nodes", "nodes that are there in each pool");
        let reason = "none; Karpenter adds them when pods wait";
        let ready_nodes = inputs.per_pool(name, &self.ready_nodes, (0, reason), pools)?;
        let has_ready_nodes = !self.ready_nodes.is_empty();
        let pools = (1..).zip(rates).zip(discounts).zip(ready_nodes);
        let pool = |(((position, rate), discount), nodes): (((usize, f64), f64), u32)| SpotPool {
            name: format!("pool-{position}"),
            rate,
            discount,
            ready_nodes: has_ready_nodes.then_some(nodes),
        };
        let mut pools: Vec<SpotPool> = pools.map(pool).collect();
        // Karpenter takes the cheapest pool that has capacity. The sort is stable.
        pools.sort_by(|one, other| other.discount.total_cmp(&one.discount));
        let share = |value: f64| format!("{value}");
        let reason = "a study of 2,635 interruptions: 92 % were not alone in their pool";
        let pool_wide =
            inputs.assume(("--pool-wide", "interruptions that take the pool"), self.pool_wide, (0.92, reason), share);
        let reason = "no source";
        let per_node = ("--executors-per-node", "executors per node");
        // Neither matters if nodes are there: the scheduler spreads executors over them at once.
        let executors_per_node = match has_ready_nodes {
            true => 1,
            false => inputs.assume(per_node, self.executors_per_node, (4, reason), |n| n.to_string()),
        };
        let (option, reason) = (("--shortage-minutes", "shortage after a pool is lost"), "no source");
        let minutes = inputs.assume(option, self.shortage_minutes, (30.0, reason), |value| format!("{value} min"));
        let reason = "EMR on EKS, all executors lost, with volumes: 565 s instead of 440 s";
        let option = ("--replacement-seconds", "time to replace an executor");
        let replacement =
            inputs.assume(option, self.replacement_seconds, (125.0, reason), |value| format!("{value} s"));
        let (option, reason) = (("--node-start-seconds", "time until an executor has a node"), "no source");
        let node_start = match has_ready_nodes {
            true => 0.0,
            false => inputs.assume(option, self.node_start_seconds, (45.0, reason), |value| format!("{value} s")),
        };
        let speed = |value: f64| format!("{value} MB/s");
        let hand_over =
            inputs.assume(("--hand-over", "speed of handing over"), self.hand_over, (100.0, "no source"), speed);
        inputs.0.push(Input {
            option: None,
            name: "at once",
            value: format!("within {AT_ONCE_SECONDS} s"),
            source: Source::Assumed,
            reason: "the study's time between losses of one pool",
        });
        Ok(Cloud {
            pools,
            pool_wide,
            executors_per_node,
            shortage_seconds: minutes * 60.0,
            replacement_seconds: replacement,
            node_start_seconds: node_start,
            hand_over: hand_over / 1000.0,
        })
    }

    /// The policy except its ratio and its base.
    fn policy(&self, inputs: &mut Inputs) -> Policy {
        let fields = [
            ("--max-pool-share", "largest share of a pool", PolicyField::MaxPoolShare, self.max_pool_share),
            (
                "--max-executors-per-node",
                "cap of executors per node",
                PolicyField::MaxExecutorsPerNode,
                self.max_executors_per_node,
            ),
            ("--spot-fallback-seconds", "fallback after", PolicyField::SpotFallbackSeconds, self.spot_fallback_seconds),
            ("--spot-retry-seconds", "spot tried again after", PolicyField::SpotRetrySeconds, self.spot_retry_seconds),
        ];
        let stated = fields.iter().filter_map(|(.., stated)| *stated);
        let overrides = stated.fold(PolicyOverrides::default(), PolicyOverrides::or_overrides);
        let policy = overrides.or_default(Policy::DEFAULT);
        for (option, name, field, stated) in fields {
            let value = PolicyOverrides::from(policy).value(field).unwrap_or_default();
            let unit = match field {
                PolicyField::SpotFallbackSeconds | PolicyField::SpotRetrySeconds => " s",
                _ => "",
            };
            inputs.policy((option, name), stated.is_some(), format!("{value}{unit}"));
        }
        policy
    }
}

fn number<T: FromStr>(text: &str, accepts: impl Fn(&T) -> bool, accepted: &str) -> Result<T, String> {
    text.trim().parse().ok().filter(accepts).ok_or_else(|| format!("accepted: {accepted}"))
}

fn executors(text: &str) -> Result<u32, String> {
    number(text, |n| (1..=MAX_EXECUTORS).contains(n), "a whole number from 1 to 100000")
}

fn hours(text: &str) -> Result<f64, String> {
    number(text, |hours| *hours > 0.0 && *hours <= MAX_HOURS, "hours above 0 and up to 720, such as 1.5")
}

fn shuffle(text: &str) -> Result<f64, String> {
    number(text, |gb| (0.0..=100_000.0).contains(gb), "GB from 0 to 100000")
}

fn stages(text: &str) -> Result<u32, String> {
    number(text, |n| (1..=10_000).contains(n), "a whole number from 1 to 10000")
}

fn ratio(text: &str) -> Result<Ratio, RatioError> {
    text.parse()
}

fn base(text: &str) -> Result<u32, InvalidField> {
    let overrides = PolicyOverrides::parse_one(PolicyField::OnDemandBase, text)?;
    Ok(overrides.or_default(Policy::DEFAULT).on_demand_base)
}

fn pools(text: &str) -> Result<usize, String> {
    number(text, |n| (1..=MAX_POOLS).contains(n), "a whole number from 1 to 100")
}

fn rate(text: &str) -> Result<f64, String> {
    number(
        text,
        |rate| (0.0..=0.999).contains(rate),
        "a probability from 0 to 0.999, such as 0.05 for 5 % of the nodes in a month",
    )
}

fn discount(text: &str) -> Result<f64, String> {
    number(text, |share| (0.0..=1.0).contains(share), "a share from 0 to 1, such as 0.6")
}

fn pool_wide(text: &str) -> Result<f64, String> {
    number(text, |share| (0.0..=1.0).contains(share), "a share from 0 to 1, such as 0.92")
}

fn price(text: &str) -> Result<f64, String> {
    number(text, |price| *price > 0.0 && *price <= 1e6, "a price above 0 and up to 1000000, such as 0.192")
}

fn ready_nodes(text: &str) -> Result<u32, String> {
    number(text, |n| (1..=MAX_EXECUTORS).contains(n), "a whole number from 1 to 100000")
}

fn per_node(text: &str) -> Result<u32, String> {
    number(text, |n| (1..=1000).contains(n), "a whole number from 1 to 1000")
}

fn minutes(text: &str) -> Result<f64, String> {
    number(text, |minutes| (0.0..=100_000.0).contains(minutes), "minutes from 0 to 100000")
}

fn seconds(text: &str) -> Result<f64, String> {
    number(text, |seconds| (0.0..=86_400.0).contains(seconds), "seconds from 0 to 86400")
}

fn speed(text: &str) -> Result<f64, String> {
    number(text, |speed| (0.0..=100_000.0).contains(speed), "MB/s from 0 to 100000")
}

fn runs(text: &str) -> Result<u32, String> {
    number(text, |n| (FEWEST_RUNS..=MAX_RUNS).contains(n), "a whole number from 100 to 1000000")
}

fn max_pool_share(text: &str) -> Result<PolicyOverrides, InvalidField> {
    PolicyOverrides::parse_one(PolicyField::MaxPoolShare, text)
}

fn max_executors_per_node(text: &str) -> Result<PolicyOverrides, InvalidField> {
    PolicyOverrides::parse_one(PolicyField::MaxExecutorsPerNode, text)
}

fn spot_fallback_seconds(text: &str) -> Result<PolicyOverrides, InvalidField> {
    PolicyOverrides::parse_one(PolicyField::SpotFallbackSeconds, text)
}

fn spot_retry_seconds(text: &str) -> Result<PolicyOverrides, InvalidField> {
    PolicyOverrides::parse_one(PolicyField::SpotRetrySeconds, text)
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{job, parse};
    use super::*;

    #[test]
    fn an_invalid_value_names_the_option_the_value_and_what_is_accepted() {
        for (options, says) in [
            ("--executors 0 --hours 1", ["'0'", "--executors", "accepted: a whole number from 1 to 100000"]),
            ("--executors 100001 --hours 1", ["'100001'", "--executors", "accepted: a whole number from 1 to 100000"]),
            ("--executors 5 --hours 0", ["'0'", "--hours", "accepted: hours above 0 and up to 720"]),
            ("--executors 5 --hours nan", ["'nan'", "--hours", "accepted: hours above 0 and up to 720"]),
            ("--executors 5 --hours 1 --ratios 0.5,1.1", ["'1.1'", "--ratios", "accepted: a decimal from 0 to 1"]),
            ("--executors 5 --hours 1 --rates 0.1,1", ["'1'", "--rates", "accepted: a probability from 0 to 0.999"]),
            ("--executors 5 --hours 1 --discounts 2", ["'2'", "--discounts", "accepted: a share from 0 to 1"]),
            ("--executors 5 --hours 1 --pools 0", ["'0'", "--pools", "accepted: a whole number from 1 to 100"]),
            (
                "--executors 5 --hours 1 --max-pool-share 0",
                ["'0'", "--max-pool-share", "accepted: above 0 and up to 1"],
            ),
            (
                "--executors 5 --hours 1 --ready-nodes 8,0",
                ["'0'", "--ready-nodes", "accepted: a whole number from 1 to 100000"],
            ),
            ("--executors 5 --hours 1 --runs 1", ["'1'", "--runs", "accepted: a whole number from 100 to 1000000"]),
            ("--executors 5 --hours 1 --spot-prices 1", ["not provided", "--on-demand-price", "Usage"]),
            ("--executors 5", ["not provided", "--hours", "Usage"]),
        ] {
            let error = parse(options).unwrap_err().to_string();
            assert!(says.iter().all(|part| error.contains(part)), "{options}: {error}");
        }
    }

    #[test]
    fn options_that_do_not_fit_together_are_refused() {
        let error = |options: &str| job(options).plan().unwrap_err().to_string();
        assert_eq!(
            error("--pools 3 --rates 0.1,0.2"),
            "--rates has 2 values for 3 pools; accepted: one value, or one for each pool"
        );
        assert_eq!(
            error("--rates 0.1,0.2,0.3 --ready-nodes 8,2"),
            "--ready-nodes has 2 values for 3 pools; accepted: one value, or one for each pool"
        );
        assert_eq!(
            error("--on-demand-price 1 --spot-prices 0.5,1.5"),
            "--spot-prices 1.5 is above --on-demand-price 1; accepted: up to the on-demand price"
        );
        let many = (0..1001).map(|base| base.to_string()).collect::<Vec<_>>().join(",");
        assert!(error(&format!("--ratios 1 --bases {many}")).starts_with("1001 ratios with bases"));
    }

    #[test]
    fn lists_and_prices_describe_the_pools_and_the_cheapest_is_the_first() {
        let pools = |options: &str| {
            let pools = job(options).plan().unwrap().scenario.cloud.pools;
            pools.into_iter().map(|pool| (pool.name, pool.rate, pool.discount)).collect::<Vec<_>>()
        };
        let pool = |number: usize, rate, discount| (format!("pool-{number}"), rate, discount);
        assert_eq!(pools(""), [1, 2, 3, 4].map(|number| pool(number, 0.05, 0.6)));
        assert_eq!(pools("--pools 2 --rates 0.2"), [1, 2].map(|number| pool(number, 0.2, 0.6)));
        let cheapest_last = "--rates 0.1,0.2 --discounts 0.5,0.7";
        assert_eq!(pools(cheapest_last), [pool(2, 0.2, 0.7), pool(1, 0.1, 0.5)]);
        let prices = "--on-demand-price 2 --spot-prices 0.5,1";
        assert_eq!(pools(prices), [pool(1, 0.05, 0.75), pool(2, 0.05, 0.5)]);
    }

    #[test]
    fn what_is_not_stated_is_an_assumption_with_a_reason_or_a_default() {
        let sources = |options: &str| {
            let inputs = job(options).plan().unwrap().inputs;
            let of = |name| inputs.iter().find(|input| input.option == Some(name)).unwrap().source;
            assert!(inputs.iter().all(|input| (input.source == Source::Assumed) != input.reason.is_empty()));
            [of("--rates"), of("--shuffle"), of("--max-pool-share"), of("--spot-preference")]
        };
        assert_eq!(sources(""), [Source::Assumed, Source::Assumed, Source::Default, Source::Default]);
        let stated = "--rates 0.05 --shuffle 10 --max-pool-share 1 --spot-preference best-effort";
        assert_eq!(sources(stated), [Source::Stated; 4]);
    }

    #[test]
    fn nodes_that_are_there_describe_the_pools_and_stay_with_theirs_when_those_are_sorted() {
        let pools = |options: &str| {
            let pools = job(options).plan().unwrap().scenario.cloud.pools;
            pools.into_iter().map(|pool| (pool.name, pool.ready_nodes)).collect::<Vec<_>>()
        };
        let pool = |number: usize, nodes| (format!("pool-{number}"), nodes);
        assert_eq!(pools(""), [1, 2, 3, 4].map(|number| pool(number, None)));
        assert_eq!(pools("--ready-nodes 3"), [1, 2, 3, 4].map(|number| pool(number, Some(3))));
        assert_eq!(pools("--ready-nodes 3 --pools 2"), [1, 2].map(|number| pool(number, Some(3))));
        assert_eq!(pools("--ready-nodes 8,2 --discounts 0.5,0.7"), [pool(2, Some(2)), pool(1, Some(8))]);
        // An executor has its node at once.
        let cloud = job("--ready-nodes 3").plan().unwrap().scenario.cloud;
        assert_eq!(cloud.node_start_seconds, 0.0);
    }

    #[test]
    fn nodes_that_are_there_exclude_the_options_about_nodes_that_an_autoscaler_adds() {
        for other in ["--executors-per-node", "--max-executors-per-node", "--node-start-seconds"] {
            let error = parse(&format!("--executors 5 --hours 1 --ready-nodes 3 {other} 2")).unwrap_err().to_string();
            assert!(error.contains("cannot be used with") && error.contains(other), "{error}");
        }
        let shown = job("--ready-nodes 3").plan().unwrap().inputs;
        assert!(!shown.iter().any(|input| {
            input.option.is_some_and(|option| ["--executors-per-node", "--node-start-seconds"].contains(&option))
        }));
    }

    #[test]
    fn a_cap_per_node_limits_what_is_lost_with_a_node() {
        let per_node = |options: &str| job(options).plan().unwrap().scenario.cloud.executors_per_node;
        assert_eq!(per_node("--executors-per-node 8"), 8);
        assert_eq!(per_node("--executors-per-node 8 --max-executors-per-node 2"), 2);
        assert_eq!(per_node("--executors-per-node 2 --max-executors-per-node 8"), 2);
    }
}
