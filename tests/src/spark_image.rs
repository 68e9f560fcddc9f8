//! The stand-in for the image `apache/spark`: the Spark that `tests/install` fetched, this machine's Java and
//! Python, and what the image's entry point makes of `driver` and `executor`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::parts::program;
use crate::variables::Variables;

/// Where the image has Spark.
pub(crate) const SPARK_HOME: &str = "/opt/spark";
/// Where its processes start.
pub(crate) const WORK_DIR: &str = "/opt/spark/work-dir";
/// Of the variables, those that are options of an executor's Java begin so, and go on with their number.
const JAVA_OPTION: &str = "SPARK_JAVA_OPT_";

/// The folder that is to be at [`SPARK_HOME`].
pub(crate) fn spark() -> Result<PathBuf> {
    let submit = program("spark-submit")?;
    Ok(submit.ancestors().nth(2).context("spark-submit is in no folder")?.to_owned())
}

/// The variables of the image.
pub(crate) fn environment() -> Result<Variables> {
    let java = program("java")?.canonicalize()?;
    let home = java.ancestors().nth(2).map(Path::display).context("java is in no folder")?;
    let pairs = [
        ("SPARK_HOME", SPARK_HOME.to_owned()),
        ("JAVA_HOME", home.to_string()),
        ("PATH", "/opt/spark/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        // Not the image's: on a small machine it is starting that costs.
        ("JAVA_TOOL_OPTIONS", "-XX:+UseSerialGC -XX:TieredStopAtLevel=1 -XX:-UsePerfData".to_owned()),
    ];
    Ok(pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

/// What the entry point runs for a container's arguments, with the variables that Spark gives it.
pub(crate) fn entry_point(arguments: &[String], variables: &Variables) -> Result<Vec<String>> {
    let value = |name: &str| variables.get(name).map(String::as_str).with_context(|| format!("no variable {name}"));
    let text = str::to_owned;
    let (role, rest) = arguments.split_first().context("a container of Spark without arguments")?;
    let mut command = Vec::new();
    match role.as_str() {
        "driver" => {
            command.push(format!("{SPARK_HOME}/bin/spark-submit"));
            command.push(text("--conf"));
            command.push(format!("spark.driver.bindAddress={}", value("SPARK_DRIVER_BIND_ADDRESS")?));
            command.extend(["--deploy-mode", "client"].map(text));
            command.extend_from_slice(rest);
        }
        "executor" => {
            let memory = value("SPARK_EXECUTOR_MEMORY")?;
            command.push(format!("{}/bin/java", value("JAVA_HOME")?));
            command.extend(java_options(variables));
            command.extend([format!("-Xms{memory}"), format!("-Xmx{memory}"), text("-cp"), class_path(variables)]);
            command.push(text("org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend"));
            for (option, variable) in [
                ("--driver-url", "SPARK_DRIVER_URL"),
                ("--executor-id", "SPARK_EXECUTOR_ID"),
                ("--cores", "SPARK_EXECUTOR_CORES"),
                ("--app-id", "SPARK_APPLICATION_ID"),
                ("--hostname", "SPARK_EXECUTOR_POD_IP"),
                ("--resourceProfileId", "SPARK_RESOURCE_PROFILE_ID"),
                ("--podName", "SPARK_EXECUTOR_POD_NAME"),
            ] {
                command.extend([text(option), text(value(variable)?)]);
            }
        }
        // Any other command runs as it is.
        _ => command.extend_from_slice(arguments),
    }
    Ok(command)
}

fn java_options(variables: &Variables) -> Vec<String> {
    let numbered = variables.iter().filter_map(|(name, value)| {
        let number: u32 = name.strip_prefix(JAVA_OPTION)?.parse().ok()?;
        Some((number, value.clone()))
    });
    let mut options: Vec<_> = numbered.collect();
    options.sort();
    options.into_iter().map(|(_, option)| option).collect()
}

fn class_path(variables: &Variables) -> String {
    let set = |name: &str| variables.get(name).cloned().filter(|value| !value.is_empty());
    let settings = set("SPARK_CONF_DIR").unwrap_or_else(|| format!("{SPARK_HOME}/conf"));
    let folders =
        [Some(settings), set("SPARK_CLASSPATH"), Some(format!("{SPARK_HOME}/jars/*")), set("SPARK_EXTRA_CLASSPATH")];
    folders.into_iter().flatten().collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_java_come_in_the_order_of_their_numbers() {
        let variables = (0..12).map(|number| (format!("{JAVA_OPTION}{number}"), format!("-D{number}"))).collect();
        assert_eq!(java_options(&variables), (0..12).map(|number| format!("-D{number}")).collect::<Vec<_>>());
    }
}
