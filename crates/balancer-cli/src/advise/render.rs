//! Advice as configuration: flags of spark-submit, a SparkApplication, a job of EMR on EKS, or values of the chart.

use std::io::{self, Write};

use clap::ValueEnum;

use super::size::{
    Advice, Basis, CORES, DRIVER_ANNOTATION, FALLBACK, GRACE_PERIOD, INSTANCES, MEMORY, MEMORY_OVERHEAD, POD_TEMPLATE,
    POD_TEMPLATE_CONTENT, Preset, REQUESTED_CORES, Setting, word,
};

/// A way of submitting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// Flags for spark-submit in cluster mode
    SparkSubmit,
    /// A SparkApplication of the Spark operator, to merge into yours
    SparkApplication,
    /// Input for aws emr-containers start-job-run --cli-input-yaml
    Emr,
    /// Values of the chart of Spot Balancer, for jobs that state nothing themselves
    Helm,
}

/// Writes the advice for a way of submitting.
pub(super) fn write(out: &mut impl Write, target: Target, advice: &Advice) -> io::Result<()> {
    for note in advice.notes.iter().filter(|note| target != Target::Helm || !note.is_about_shuffle_files) {
        writeln!(out, "# Note: {}.", note.text)?;
    }
    if matches!(target, Target::SparkSubmit | Target::Emr) {
        writeln!(out, "# The file of {POD_TEMPLATE}, unless you have a template: {POD_TEMPLATE_CONTENT}")?;
    }
    match target {
        Target::SparkSubmit => spark_submit(out, advice),
        Target::SparkApplication => spark_application(out, advice),
        Target::Emr => emr(out, advice),
        Target::Helm => helm(out, advice),
    }
}

fn spark_submit(out: &mut impl Write, advice: &Advice) -> io::Result<()> {
    // Between lines that a backslash joins there can be no comments.
    for setting in &advice.settings {
        writeln!(out, "# {}: {}", setting.name, reason(setting))?;
    }
    let flags: Vec<_> =
        advice.settings.iter().map(|setting| quoted(&format!("{}={}", setting.name, setting.value))).collect();
    for (n, flag) in flags.iter().enumerate() {
        writeln!(out, "--conf {flag}{}", if n + 1 < flags.len() { " \\" } else { "" })?;
    }
    Ok(())
}

/// One word of a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-/=:%,+@".contains(c);
    if word.chars().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn spark_application(out: &mut impl Write, advice: &Advice) -> io::Result<()> {
    writeln!(out, "apiVersion: sparkoperator.k8s.io/v1beta2\nkind: SparkApplication\nspec:\n  executor:")?;
    let of_executor = |name: &str| match name {
        INSTANCES => Some("instances"),
        CORES => Some("cores"),
        REQUESTED_CORES => Some("coreRequest"),
        MEMORY => Some("memory"),
        MEMORY_OVERHEAD => Some("memoryOverhead"),
        GRACE_PERIOD => Some("terminationGracePeriodSeconds"),
        _ => None,
    };
    for setting in &advice.settings {
        let Some(field) = of_executor(&setting.name) else { continue };
        writeln!(out, "    # {}", reason(setting))?;
        match field {
            "coreRequest" | "memory" | "memoryOverhead" => writeln!(out, "    {field}: {}", text(&setting.value))?,
            // Numbers, without a unit.
            _ => writeln!(out, "    {field}: {}", setting.value.trim_end_matches('s'))?,
        }
    }
    writeln!(out, "  driver:\n    annotations:")?;
    for setting in &advice.settings {
        if let Some(annotation) = setting.name.strip_prefix(DRIVER_ANNOTATION) {
            writeln!(out, "      # {}\n      {annotation}: {}", reason(setting), text(&setting.value))?;
        }
    }
    writeln!(out, "  sparkConf:")?;
    for setting in &advice.settings {
        let is_elsewhere = of_executor(&setting.name).is_some() || setting.name.starts_with(DRIVER_ANNOTATION);
        // The operator's webhook sets the grace period, so no file is needed for it.
        if !is_elsewhere && setting.name != POD_TEMPLATE {
            writeln!(out, "    # {}\n    {}: {}", reason(setting), setting.name, text(&setting.value))?;
        }
    }
    Ok(())
}

fn emr(out: &mut impl Write, advice: &Advice) -> io::Result<()> {
    let title =
        "configurationOverrides:\n  applicationConfiguration:\n    - classification: spark-defaults\n      properties:";
    writeln!(out, "{title}")?;
    for setting in &advice.settings {
        let (reason, value) = match setting.name.as_str() {
            POD_TEMPLATE => (
                format!("{}; EMR reads it from S3: name your bucket", reason(setting)),
                format!("s3://BUCKET/{}", setting.value),
            ),
            _ => (reason(setting), setting.value.clone()),
        };
        writeln!(out, "        # {reason}\n        {}: {}", setting.name, text(&value))?;
    }
    writeln!(
        out,
        "# A driver that fails or is deleted is started again (documented)\nretryPolicyConfiguration:\n  maxAttempts: 5"
    )
}

fn helm(out: &mut impl Write, advice: &Advice) -> io::Result<()> {
    writeln!(
        out,
        "# These values are for every job that states nothing itself, streams included: a stream needs a base that holds its \
         state.\nsettings:"
    )?;
    let mut write = |key: &str, value: &str, why: &str| writeln!(out, "  # {why}\n  {key}: {value}");
    let annotations = advice.settings.iter().filter_map(|setting| {
        let annotation = setting.name.strip_prefix(DRIVER_ANNOTATION)?.strip_prefix("workload/")?;
        Some((annotation, setting))
    });
    let (preference, why) = match advice.preset {
        Preset::Cost => ("STRICT", "jobs cost no more than their ratio says, and wait for spot as long as it takes"),
        Preset::Balanced => {
            ("STRICT", "the ratio holds, and executors that find no spot go to on-demand after a while")
        }
        Preset::Reliable => ("BEST_EFFORT", "executors never wait for spot"),
    };
    write("spotPreference", preference, &format!("{why} ({} {})", Basis::Preset.word(), word(advice.preset)))?;
    let mut base = None;
    for (annotation, setting) in annotations {
        match annotation {
            "spot-ratio" => write("defaultSpotRatio", &text(&setting.value), &reason(setting))?,
            "max-pool-share" => write("maxPoolShare", &text(&setting.value), &reason(setting))?,
            // It would have no effect otherwise, and the chart would give the reconciler a right for it.
            "spot-fallback-seconds" if preference == "STRICT" => {
                write("spotFallbackSeconds", &setting.value, &format!("{FALLBACK} ({})", setting.basis.word()))?;
            }
            "on-demand-base" => base = Some(setting.value.clone()),
            _ => {}
        }
    }
    write("driverCapacity", "on-demand", "a job ends when it loses its driver (documented)")?;
    write("protectDrivers", "true", "autoscalers leave the nodes of drivers alone (documented)")?;
    if let Some(base) = base.filter(|base| base != "0") {
        writeln!(
            out,
            "# The chart has no base for all jobs. State it on each driver: workload/on-demand-base: {}",
            text(&base)
        )?;
    }
    Ok(())
}

/// Why, and what it rests on.
fn reason(setting: &Setting) -> String {
    format!("{} ({})", setting.why, setting.basis.word())
}

/// A text in YAML. JSON is YAML, and so is its quoting.
fn text(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_a_shell_would_change_is_quoted() {
        assert_eq!(quoted("spark.executor.memory=10g"), "spark.executor.memory=10g");
        for word in ["a b", "$(id)", "`id`", "a;b", "a*", "~", "#", "a\nb", "a\"b", "!x"] {
            assert_eq!(quoted(word), format!("'{word}'"));
        }
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
