//! How the jobs are printed.

use std::io::{self, Write};

use k8s_openapi::jiff::Timestamp;

use crate::output::{Format, age, percent, write_json, write_table};
use crate::snapshot::RatioSource;

use super::job::{JobStatus, Report, SpotWord};

const UNKNOWN: &str = "unknown";
const NONE: &str = "-";

impl Report {
    /// Writes the jobs in this form.
    pub(crate) fn write(&self, out: &mut impl Write, format: Format) -> io::Result<()> {
        if format == Format::Json {
            return write_json(out, self);
        }
        if self.jobs.is_empty() {
            let place = self.namespace.as_ref().map(|namespace| format!(" in namespace {namespace}"));
            let what = self.job.as_ref().map_or("jobs".to_owned(), |job| format!("job {job:?}"));
            return writeln!(out, "No live {what} found{}.", place.unwrap_or_default());
        }
        let is_wide = format == Format::Wide;
        let has_unknown = self.jobs.iter().any(|job| job.unknown > 0);
        let columns = columns(self.namespace.is_none(), is_wide, has_unknown);
        let header: Vec<&str> = columns.iter().map(|(header, _)| *header).collect();
        let row = |job: &JobStatus| columns.iter().map(|(_, cell)| cell(job, self.now)).collect();
        write_table(out, &header, self.jobs.iter().map(row))?;
        if is_wide {
            writeln!(out, "\n{}", self.settings.words())?;
        }
        Ok(())
    }
}

type Column = (&'static str, fn(&JobStatus, Timestamp) -> String);

/// Executors must not vanish from a table, so `UNKNOWN` is shown if some job has any.
fn columns(all_namespaces: bool, is_wide: bool, has_unknown: bool) -> Vec<Column> {
    let mut columns: Vec<Column> = Vec::new();
    if all_namespaces {
        columns.push(("NAMESPACE", |job, _| job.namespace.clone()));
    }
    columns.push(("JOB", |job, _| job.job.clone()));
    if is_wide {
        columns.push(("DRIVER", |job, _| job.driver.clone().unwrap_or_else(|| NONE.into())));
    }
    columns.extend::<[Column; 4]>([
        ("RATIO", |job, _| job.ratio_words()),
        ("SOURCE", |job, _| job.source_words().into()),
        ("SPOT", |job, _| job.spot.to_string()),
        ("ON-DEMAND", |job, _| job.on_demand.to_string()),
    ]);
    if is_wide || has_unknown {
        columns.push(("UNKNOWN", |job, _| job.unknown.to_string()));
    }
    columns.extend::<[Column; 2]>([
        ("PENDING", |job, _| job.pending.to_string()),
        ("DISTANCE", |job, _| job.distance_words()),
    ]);
    if is_wide {
        columns.extend::<[Column; 4]>([
            ("WANTED SPOT", |job, _| {
                job.wanted_spot.map_or_else(|| job.without_ratio(), |wanted| format!("{wanted:.1}"))
            }),
            ("PENDING SPOT", |job, _| job.pending_spot.to_string()),
            ("PENDING ON-DEMAND", |job, _| job.pending_on_demand.to_string()),
            ("FIXED", |job, _| job.fixed.to_string()),
        ]);
    }
    columns.push(("LARGEST NODE", |job, _| job.largest_node.as_ref().map_or(NONE.into(), |node| percent(node.share))));
    if is_wide {
        columns.push(("NODE", |job, _| {
            job.largest_node.as_ref().map_or(NONE.into(), |node| format!("{} ({})", node.name, node.executors))
        }));
    }
    columns.push(("LARGEST POOL", |job, _| job.pool_words()));
    if is_wide {
        columns.push(("POOL", |job, _| {
            let words =
                |pool: &super::job::LargestPool| format!("{} {} ({})", pool.instance_type, pool.zone, pool.executors);
            job.largest_pool.as_ref().map_or(NONE.into(), words)
        }));
    }
    columns.push(("SPOT STATE", |job, now| job.spot_words(now)));
    columns.push(("AGE", |job, now| {
        job.created.as_deref().and_then(|at| at.parse().ok()).map_or(UNKNOWN.into(), |at| age(at, now))
    }));
    columns
}

impl JobStatus {
    /// The wanted share, and the base if there is one, such as `70% + base 2`.
    pub(crate) fn ratio_words(&self) -> String {
        let base = self.on_demand_base.filter(|base| *base > 0).map(|base| format!(", base {base}"));
        match self.spot_ratio {
            _ if self.opted_out => "off".into(),
            Some(ratio) => format!("{}{}", percent(ratio), base.unwrap_or_default()),
            None => format!("{UNKNOWN}{}", base.unwrap_or_default()),
        }
    }

    fn source_words(&self) -> &'static str {
        match self.ratio_source {
            RatioSource::Driver => "driver",
            RatioSource::Owner => "owner",
            RatioSource::Default => "default",
            RatioSource::Invalid => "invalid",
            RatioSource::NotRead => "not read",
            RatioSource::Unknown if self.driver.is_some() => "driver gone",
            RatioSource::Unknown => "no driver",
        }
    }

    pub(crate) fn distance_words(&self) -> String {
        let Some(distance) = self.distance else { return self.without_ratio() };
        if distance == 0 { "0".into() } else { format!("{distance:+}") }
    }

    fn without_ratio(&self) -> String {
        if self.opted_out { NONE.into() } else { UNKNOWN.into() }
    }

    fn pool_words(&self) -> String {
        match &self.largest_pool {
            Some(pool) => percent(pool.share),
            // Without spot executors there is no pool; with some, the nodes are not known or have no pool's labels.
            None if self.spot == 0 && self.unknown == 0 => NONE.into(),
            None => UNKNOWN.into(),
        }
    }

    fn spot_words(&self, now: Timestamp) -> String {
        match self.spot_state {
            SpotWord::Open => "open".into(),
            SpotWord::Unknown => UNKNOWN.into(),
            SpotWord::Closed => {
                let since = self.spot_closed_since.as_deref().and_then(|since| since.parse().ok());
                since.map_or("closed".into(), |since| format!("closed for {}", age(since, now)))
            }
        }
    }
}
