//! `simulate`: what a job costs, how long it takes and what it risks, by its spot ratio and its on-demand base.

mod input;
mod model;
mod report;
mod run;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use balancer_core::{Policy, Ratio, SpotPreference};
use balancer_runtime::text::number_of;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::UsageError;
use crate::output::{Format, address, write_json, write_table};
pub(crate) use input::Arguments;
use input::{Input, Plan};
use model::{Model, Scenario};
use run::{Estimate, Forecast, Sampling, affordable_runs, forecasts};

/// From one change of the progress bar to the next.
const TICK: Duration = Duration::from_millis(100);

/// Everything that the output is made of.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Simulation {
    inputs: Vec<Input>,
    runs: u32,
    /// More than `runs` if they would take too long.
    #[serde(skip)]
    wanted_runs: u32,
    seed: u64,
    /// Of the whole job on on-demand, without losses; `None` without a price.
    #[serde(skip_serializing_if = "Option::is_none")]
    on_demand_cost: Option<f64>,
    forecasts: Vec<Forecast>,
    /// What was stated for nothing.
    #[serde(skip)]
    without_effect: Vec<String>,
}

/// Simulates the job, and writes what to expect of it.
///
/// # Errors
/// If options do not fit together, the simulation would take too long, or the output cannot be written.
pub(crate) fn run(arguments: &Arguments, out: &mut impl Write) -> anyhow::Result<()> {
    let Plan { scenario, policies, on_demand_price, inputs } =
        arguments.plan().map_err(|error| UsageError(error.to_string()))?;
    let sampling = Sampling { runs: arguments.runs, seed: arguments.seed };
    let runs = affordable_runs(&scenario, &policies, sampling).map_err(|error| UsageError(error.to_string()))?;
    let sampling = Sampling { runs, ..sampling };
    if let Some(path) = &arguments.html {
        // Not only after minutes. What an earlier run has written stays until then, and nothing empty is left.
        let is_new = path.symlink_metadata().is_err();
        let tried = OpenOptions::new().append(true).create(true).open(path);
        drop(tried.with_context(|| cannot_write(path))?);
        if is_new {
            std::fs::remove_file(path).with_context(|| cannot_write(path))?;
        }
    }
    let jobs = u64::try_from(policies.len())?.saturating_mul(u64::from(sampling.runs));
    // It shows itself only in a terminal.
    let progress = ProgressBar::new(jobs);
    progress.enable_steady_tick(TICK);
    let without_effect = without_effect(&scenario, &policies);
    let forecasts = forecasts(&scenario, &policies, sampling, || progress.inc(1));
    progress.finish_and_clear();
    let hours = f64::from(scenario.job.executors) * scenario.job.hours;
    let on_demand_cost = on_demand_price.map(|price| price * hours);
    let wanted_runs = arguments.runs;
    let seed = sampling.seed;
    let simulation = Simulation { inputs, runs, wanted_runs, seed, on_demand_cost, forecasts, without_effect };
    match arguments.output {
        Format::Json => write_json(out, &simulation)?,
        Format::Table | Format::Wide => write_text(out, &simulation, arguments.output == Format::Wide)?,
    }
    if let Some(path) = &arguments.html {
        let report = report::render(&simulation)?;
        std::fs::write(path, report).with_context(|| cannot_write(path))?;
    }
    Ok(())
}

fn cannot_write(path: &Path) -> String {
    format!("--html {}: cannot write the report", path.display())
}

/// One column of the table: its name, and what it shows of a forecast.
struct Column {
    name: &'static str,
    is_wide: bool,
    of: fn(&Forecast) -> String,
}

/// The columns, in their order.
const COLUMNS: &[Column] = &[
    Column { name: "RATIO", is_wide: false, of: |forecast| forecast.ratio.clone() },
    Column { name: "BASE", is_wide: false, of: |forecast| forecast.base.to_string() },
    Column { name: "SPOT", is_wide: false, of: |forecast| forecast.spot.to_string() },
    Column { name: "ON-DEMAND", is_wide: false, of: |forecast| forecast.on_demand.to_string() },
    Column { name: "COST", is_wide: false, of: |forecast| percent(forecast.cost.value) },
    Column { name: "COST ±", is_wide: true, of: |forecast| percent(forecast.cost.error()) },
    Column { name: "TIME", is_wide: false, of: |forecast| hours(forecast.hours.mean.value) },
    Column { name: "TIME ±", is_wide: true, of: |forecast| seconds(forecast.hours.mean.error()) },
    Column { name: "1 IN 100 TAKES", is_wide: true, of: |forecast| hours(forecast.hours.p99) },
    Column { name: "ANY LOSS", is_wide: true, of: |forecast| percent(forecast.any_loss) },
    Column { name: "THIRD LOST", is_wide: false, of: |forecast| probability(forecast.risk) },
    Column { name: "THIRD LOST ±", is_wide: true, of: |forecast| percent(forecast.risk.error()) },
    Column { name: "DONE AGAIN", is_wide: true, of: |forecast| percent(forecast.recomputed.value) },
    Column {
        name: "WORST POOL",
        is_wide: false,
        of: |forecast| of_pool(forecast, |pool| format!("{}: {}", pool.name, percent(pool.share))),
    },
    Column { name: "TIME IF LOST", is_wide: false, of: |forecast| of_pool(forecast, |pool| hours(pool.hours)) },
    Column { name: "COST IF LOST", is_wide: true, of: |forecast| of_pool(forecast, |pool| percent(pool.cost)) },
];

fn write_text(out: &mut impl Write, simulation: &Simulation, is_wide: bool) -> anyhow::Result<()> {
    let columns: Vec<&Column> = COLUMNS.iter().filter(|column| is_wide || !column.is_wide).collect();
    let mut header: Vec<&str> = columns.iter().map(|column| column.name).collect();
    header.extend(simulation.on_demand_cost.map(|_| "PRICE"));
    let row = |forecast: &Forecast| {
        let price = simulation.on_demand_cost.map(|cost| format!("{:.2}", cost * forecast.cost.value));
        columns.iter().map(|column| (column.of)(forecast)).chain(price).collect()
    };
    write_table(out, &header, simulation.forecasts.iter().map(row))?;
    writeln!(out)?;
    let choose = format!(
        "Choose the highest ratio whose TIME IF LOST you can bear. --stages and --shuffle change it most: {}",
        address!("docs/spark.md#which-ratio")
    );
    for note in notes(simulation).into_iter().chain([choose]) {
        writeln!(out, "{note}")?;
    }
    writeln!(out)?;
    let rows = simulation.inputs.iter().map(|input| {
        let reason = match input.reason {
            "" => input.source.as_str().to_owned(),
            reason => format!("{}: {reason}", input.source.as_str()),
        };
        vec![input.name.to_owned(), input.value.clone(), input.option.unwrap_or_default().to_owned(), reason]
    });
    write_table(out, &["INPUT", "VALUE", "OPTION", "FROM"], rows)?;
    Ok(())
}

/// What the columns mean, and what is wrong with the result.
fn notes(simulation: &Simulation) -> Vec<String> {
    let mut notes = vec![
        "COST and TIME are means; 100 % is the job on on-demand without losses. Their 95 % error bars (±, -o wide) are those of \
         the simulation, not of its assumptions."
            .to_owned(),
        "THIRD LOST is the probability that the job loses more than a third of its executors at once.".to_owned(),
        "WORST POOL is the share of the executors in the largest pool, and TIME IF LOST the run time if it is lost just before \
         a stage ends."
            .to_owned(),
    ];
    if simulation.runs < simulation.wanted_runs {
        notes.push(format!(
            "Only {} for each ratio and base instead of {}, which would take more than about 10 minutes. The error bars are \
             wider.",
            number_of(simulation.runs, "run"),
            simulation.wanted_runs
        ));
    }
    let unfinished = simulation.forecasts.iter().map(|forecast| forecast.unfinished).fold(0.0, f64::max);
    if unfinished > 0.0 {
        notes.push(format!(
            "Up to {} of the jobs were given up, so their cost and time are higher than shown.",
            percent(unfinished)
        ));
    }
    notes.extend(simulation.without_effect.iter().cloned());
    notes
}

/// The options that change nothing, and why.
fn without_effect(scenario: &Scenario, policies: &[Policy]) -> Vec<String> {
    let mut notes = Vec::new();
    let Scenario { job, preference, .. } = scenario;
    let too_large = policies.iter().map(|policy| policy.on_demand_base).find(|base| *base > job.executors);
    notes.extend(too_large.map(|base| {
        format!(
            "--bases {base} is more than the job's {}, so all are on on-demand.",
            number_of(job.executors, "executor")
        )
    }));
    let waits = policies.iter().any(|policy| policy.spot_fallback_seconds > 0);
    if waits && *preference == SpotPreference::BestEffort {
        notes.push(
            "--spot-fallback-seconds has no effect with --spot-preference best-effort, because no executor waits for spot."
                .to_owned(),
        );
    }
    let is_capped = policies.iter().any(|policy| policy.max_pool_share < Ratio::ONE);
    let is_same = |policy: &Policy| {
        let free = Policy { max_pool_share: Ratio::ONE, ..*policy };
        Model::new(scenario, *policy).largest_pool() == Model::new(scenario, free).largest_pool()
    };
    if is_capped && policies.iter().all(is_same) {
        notes.push(
            "--max-pool-share does not change where executors start, for any of the ratios and bases.".to_owned(),
        );
    }
    notes
}

fn of_pool(forecast: &Forecast, text: impl Fn(&run::LargestPool) -> String) -> String {
    forecast.largest_pool.as_ref().map_or_else(|| "-".to_owned(), text)
}

/// A share for people: at least two digits that are not zero.
fn percent(share: f64) -> String {
    let percent = share * 100.0;
    match percent.abs() {
        0.0 => "0 %".to_owned(),
        tiny if tiny < 0.001 => "<0.001 %".to_owned(),
        small if small < 0.1 => format!("{percent:.3} %"),
        medium if medium < 10.0 => format!("{percent:.2} %"),
        _ => format!("{percent:.1} %"),
    }
}

fn hours(hours: f64) -> String {
    let decimals = match hours {
        short if short < 1.0 => 3,
        medium if medium < 100.0 => 2,
        _ => 1,
    };
    format!("{hours:.decimals$} h")
}

/// If no simulated job had it, the bound below which it is, because 0 would say too much.
fn probability(estimate: Estimate) -> String {
    if estimate.value > 0.0 || estimate.high <= 0.0 {
        return percent(estimate.value);
    }
    let bound = percent(estimate.high);
    if bound.starts_with('<') { bound } else { format!("<{bound}") }
}

/// A small number of hours.
fn seconds(hours: f64) -> String {
    format!("{:.2} s", hours * 3600.0)
}

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;
