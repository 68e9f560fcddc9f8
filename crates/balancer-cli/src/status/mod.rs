//! `status`: what every job wants, what it has, and how far it is from it.

pub(crate) mod job;
mod print;
#[cfg(test)]
mod tests;

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use tokio::time::{Instant, sleep};

use crate::UsageError;
use crate::cluster::{Cluster, ClusterArguments, Freshness, ViewArguments, is_temporary};
use crate::output::Format;
use crate::settings::{Origin, Settings};
use crate::snapshot::read::{self, Wanted};

use job::Report;

/// How long a watch waits at least until it reads the cluster again.
const INTERVAL: Duration = Duration::from_secs(2);
/// A watch reads for at most one in so many seconds, because everybody's watches are a load for the apiserver.
const WAIT_PER_READ: u32 = 10;
/// The longest wait: a read that takes long once says little about the next.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Moves the cursor home and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// The arguments of `status`.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// The job: its id, or the name of its driver's pod [default: all jobs]
    job: Option<String>,

    /// Show the jobs of all namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,

    #[command(flatten)]
    cluster: ClusterArguments,

    #[command(flatten)]
    view: ViewArguments,

    /// Print again whenever something has changed, until interrupted
    #[arg(short, long)]
    watch: bool,
}

impl Arguments {
    /// The same with the flags that stand before the command.
    ///
    /// # Errors
    /// If these name a namespace, and all are to be shown.
    pub(crate) fn after(self, before: ClusterArguments) -> Result<Self, UsageError> {
        let cluster = self.cluster.or(before);
        if self.all_namespaces && cluster.namespace.is_some() {
            return Err(UsageError("--all-namespaces cannot be used with --namespace".to_owned()));
        }
        Ok(Self { cluster, ..self })
    }
}

/// Prints the jobs.
pub(crate) async fn run(arguments: Arguments, out: &mut impl Write) -> anyhow::Result<()> {
    let cluster = Cluster::connect(&arguments.cluster).await?;
    let namespace = (!arguments.all_namespaces).then(|| cluster.namespace.clone());
    let redraws = arguments.watch && arguments.view.output != Format::Json && std::io::stdout().is_terminal();
    let mut reader =
        Reader { cluster: &cluster, namespace: namespace.as_deref(), arguments: &arguments, settings: None };
    let (mut last, mut last_failure) = (None, None);
    loop {
        let started = Instant::now();
        match reader.report().await.map_err(|error| cluster.located(error)) {
            Ok(report) => {
                last_failure = None;
                // On a terminal the ages go on; elsewhere only what has changed is printed.
                if redraws || last.as_ref().is_none_or(|last: &Report| !last.is_same(&report)) {
                    if redraws {
                        write!(out, "{CLEAR}")?;
                        out.flush()?;
                    }
                    if (redraws || last.is_none())
                        && let Some(note) = report.note()
                    {
                        eprintln!("{note}");
                    }
                    report.write(out, arguments.view.output)?;
                    out.flush()?;
                    last = Some(report);
                }
            }
            Err(error) if arguments.watch && is_temporary(&error) => {
                let text = format!("{error:#}");
                if last_failure.as_ref() != Some(&text) {
                    eprintln!("error: {text}; trying again");
                }
                last_failure = Some(text);
            }
            Err(error) => return Err(error),
        }
        if !arguments.watch {
            return Ok(());
        }
        sleep(wait_after(started.elapsed())).await;
    }
}

/// How long to wait after a read that took so long.
fn wait_after(read: Duration) -> Duration {
    read.saturating_mul(WAIT_PER_READ).clamp(INTERVAL, LONGEST_WAIT)
}

/// Reads the cluster, once or again and again.
struct Reader<'r> {
    cluster: &'r Cluster,
    namespace: Option<&'r str>,
    arguments: &'r Arguments,
    /// Those that were read first. They rarely change.
    settings: Option<Settings>,
}

impl Reader<'_> {
    async fn report(&mut self) -> anyhow::Result<Report> {
        let Self { cluster, namespace, arguments, .. } = *self;
        let (settings, freshness) = match &self.settings {
            Some(settings) => (settings.clone(), Freshness::Cached),
            None => (arguments.view.apply(read::settings(cluster).await?), Freshness::Now),
        };
        let has_failed = matches!(settings.origin, Origin::Defaults { error: Some(_) });
        let snapshot = read::snapshot(cluster, namespace, settings.clone(), Wanted::SpotEvents, freshness).await?;
        self.settings = (!has_failed).then_some(settings);
        let mut report = Report::of(&snapshot, namespace);
        if let Some(name) = &arguments.job {
            report.jobs.retain(|job| job.is_called(name));
            report.job = Some(name.clone());
            if report.jobs.is_empty() && !arguments.watch {
                let place =
                    namespace.map_or("any namespace".to_owned(), |namespace| format!("namespace {namespace:?}"));
                bail!(
                    "no live job {name:?} in {place}; accepted: a job's id or the name of its driver's pod, as \
                     `kubectl spot-balancer status` lists them"
                );
            }
        }
        Ok(report)
    }
}
