//! `check`: finds what is wrong with an installation, and says how to fix it.

mod metrics;
mod problem;
mod read;
mod rules;
mod snapshot;

use std::io::{self, Write};

use balancer_runtime::text::number_of;
use clap::Args;
use serde::Serialize;

use crate::cluster::{Cluster, ClusterArguments};
use crate::output::{Format, write_json, write_table};

use problem::{Finding, Severity};
use read::Reading;
use snapshot::Unchecked;

/// Which installation, and how to print.
#[derive(Args, Debug)]
#[command(
    mut_arg("namespace", |argument| argument.help("The namespace of Spot Balancer [default: wherever it is]")),
    after_help = "The exit status is 0 if nothing is wrong, and 1 if something is. What you may not read is not checked, \
                  and is listed."
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    cluster: ClusterArguments,

    /// The form of the output
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

impl Arguments {
    /// The same with the flags that stand before the command.
    pub(crate) fn after(self, before: ClusterArguments) -> Self {
        Self { cluster: self.cluster.or(before), ..self }
    }
}

/// Something is wrong with the installation. It has been printed.
#[derive(Debug, thiserror::Error)]
#[error("the installation has problems")]
pub(crate) struct Unhealthy;

/// What `check` reports.
struct Report {
    findings: Vec<Finding>,
    unchecked: Vec<Unchecked>,
    /// Whether the API has answered each request, or has said that the caller may not know.
    is_complete: bool,
}

/// Checks every installation that the caller can see.
///
/// # Errors
/// [`Unhealthy`] if something is wrong; another error if it cannot be checked.
pub(crate) async fn run(arguments: Arguments, out: &mut impl Write) -> anyhow::Result<()> {
    let cluster = Cluster::connect(&arguments.cluster).await?;
    let read = read::snapshots(&cluster, arguments.cluster.namespace.as_deref()).await;
    let Reading { snapshots, unchecked, is_complete } = read.map_err(|error| cluster.located(error))?;
    let mut findings: Vec<Finding> = Vec::new();
    for finding in snapshots.iter().flat_map(rules::findings) {
        // Installations share the nodes and the jobs of a cluster.
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }
    findings.sort_by_key(|finding| finding.problem.severity());
    let report = Report { findings, unchecked, is_complete };
    report.print(arguments.output, out)?;
    if report.is_healthy() { Ok(()) } else { Err(Unhealthy.into()) }
}

impl Report {
    /// A cluster that fails while it is checked is not known to be healthy.
    fn is_healthy(&self) -> bool {
        self.findings.is_empty() && self.is_complete
    }

    fn print(&self, format: Format, out: &mut impl Write) -> io::Result<()> {
        if format != Format::Json {
            for Unchecked { what, why } in &self.unchecked {
                eprintln!("not checked: {what}: {why}");
            }
        }
        match format {
            Format::Json => write_json(out, &self.json()),
            Format::Table => {
                self.print_blocks(out)?;
                self.print_rest(out)
            }
            Format::Wide => {
                let header = ["SEVERITY", "CHECK", "OBJECT", "PROBLEM", "FIX", "DOCUMENTATION"];
                if !self.findings.is_empty() {
                    write_table(out, &header, self.findings.iter().map(row))?;
                }
                self.print_rest(out)
            }
        }
    }

    /// A block for each finding, so that each line fits into a terminal.
    fn print_blocks(&self, out: &mut impl Write) -> io::Result<()> {
        for Finding { problem, object, text, fix } in &self.findings {
            writeln!(out, "{} {}: {object}", problem.severity(), problem.id())?;
            writeln!(out, "  {text}")?;
            writeln!(out, "  Fix: {fix}")?;
            writeln!(out, "  {}\n", problem.documentation())?;
        }
        Ok(())
    }

    fn print_rest(&self, out: &mut impl Write) -> io::Result<()> {
        let count = |severity| self.findings.iter().filter(|finding| finding.problem.severity() == severity).count();
        let (errors, warnings) = (count(Severity::Error), count(Severity::Warning));
        match (errors + warnings, self.unchecked.len()) {
            (0, _) if !self.is_complete => {
                writeln!(out, "No problems found in what was checked, but the cluster did not answer everything.")
            }
            (0, 0) => writeln!(out, "No problems found."),
            (0, _) => writeln!(out, "No problems found in what was checked."),
            _ => writeln!(out, "{}, {}.", number_of(errors, "error"), number_of(warnings, "warning")),
        }
    }

    fn json(&self) -> Json<'_> {
        let findings = self.findings.iter().map(|Finding { problem, object, text, fix }| JsonFinding {
            check: problem.id(),
            severity: problem.severity(),
            object,
            problem: text,
            fix,
            documentation: problem.documentation(),
        });
        Json { healthy: self.is_healthy(), findings: findings.collect(), not_checked: &self.unchecked }
    }
}

fn row(Finding { problem, object, text, fix }: &Finding) -> Vec<String> {
    let (severity, id) = (problem.severity().to_string(), problem.id().to_owned());
    vec![severity, id, object.clone(), text.clone(), fix.clone(), problem.documentation().to_owned()]
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Json<'r> {
    healthy: bool,
    findings: Vec<JsonFinding<'r>>,
    not_checked: &'r [Unchecked],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonFinding<'r> {
    check: &'static str,
    severity: Severity,
    object: &'r str,
    problem: &'r str,
    fix: &'r str,
    documentation: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    use problem::Problem;

    fn report() -> Report {
        let finding = Finding::new(Problem::NoLeader, "Lease a/b", "Nobody holds it.", "Look at the log.");
        let warning = Finding::new(Problem::CertificateExpires, "Secret a/c", "It expires.", "Renew it.");
        let unchecked = Unchecked { what: "the nodes".into(), why: "you may not read it".into() };
        Report { findings: vec![finding, warning], unchecked: vec![unchecked], is_complete: true }
    }

    fn printed(report: &Report, format: Format) -> String {
        let mut out = Vec::new();
        report.print(format, &mut out).expect("printed");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_table_has_a_block_for_each_finding_and_their_number() {
        let text = printed(&report(), Format::Table);
        assert!(text.starts_with(
            "error no-leader: Lease a/b\n  Nobody holds it.\n  Fix: Look at the log.\n  \
             https://github.com/spot-balancer/spot-balancer/blob/main/docs/troubleshooting.md#spotbalancernoleader\n\n\
             warning certificate-expires: Secret a/c\n"
        ));
        assert!(text.ends_with("\n1 error, 1 warning.\n"), "{text}");
    }

    #[test]
    fn a_wide_table_has_a_line_for_each_finding() {
        let text = printed(&report(), Format::Wide);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("SEVERITY   CHECK"), "{text}");
        assert!(lines[1].contains("no-leader") && lines[1].contains("Look at the log."), "{text}");
        assert_eq!(lines.len(), 4, "{text}");
    }

    #[test]
    fn json_has_the_documented_fields() {
        let json: serde_json::Value = serde_json::from_str(&printed(&report(), Format::Json)).expect("JSON");
        let page = Problem::NoLeader.documentation();
        assert_eq!(json["healthy"], false);
        assert_eq!(
            json["findings"][0],
            serde_json::json!({
                "check": "no-leader", "severity": "error", "object": "Lease a/b", "problem": "Nobody holds it.",
                "fix": "Look at the log.", "documentation": page,
            })
        );
        assert_eq!(json["notChecked"], serde_json::json!([{"what": "the nodes", "why": "you may not read it"}]));
    }

    #[test]
    fn nothing_wrong_is_said_with_what_was_left_out() {
        let mut report = Report { findings: Vec::new(), unchecked: Vec::new(), is_complete: true };
        assert_eq!(printed(&report, Format::Table), "No problems found.\n");
        report.unchecked.push(Unchecked { what: "the nodes".into(), why: "you may not read it".into() });
        assert_eq!(printed(&report, Format::Wide), "No problems found in what was checked.\n");
        report.is_complete = false;
        assert!(printed(&report, Format::Table).ends_with("but the cluster did not answer everything.\n"));
        assert!(printed(&report, Format::Json).contains("\"healthy\": false"));
    }
}
