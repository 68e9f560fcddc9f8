//! The settings of the installation: those of the webhook's Deployment, as far as the caller may read it.

use std::fmt;

use balancer_core::{Conventions, Policy};
use balancer_runtime::arguments::{ConventionArguments, DefaultArguments};
use clap::{Arg, Args, Command, FromArgMatches};
use k8s_openapi::api::core::v1::Container;
use serde::Serialize;

/// Where the settings come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "from")]
pub(crate) enum Origin {
    /// The environment of this Deployment.
    Deployment { namespace: String, name: String },
    /// The defaults of Spot Balancer, because no Deployment was read, or none that can be used.
    Defaults {
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deployment { namespace, name } => write!(f, "{namespace}/{name}"),
            Self::Defaults { .. } => f.write_str("defaults"),
        }
    }
}

/// How Spot Balancer reads and places pods in this cluster.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) conventions: Conventions,
    /// The policy of a job that states none. Only a guess if the origin is [`Origin::Defaults`].
    pub(crate) defaults: Policy,
    pub(crate) origin: Origin,
    /// Why the settings may be others than those of the jobs' webhook.
    pub(crate) doubt: Option<String>,
}

/// Why the settings of a Deployment cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    /// A setting is invalid, so that the webhook cannot run with it either.
    #[error("a setting is invalid: {}", first_line(.0))]
    Invalid(clap::Error),
    /// The settings contradict each other.
    #[error("the settings contradict each other: {0:#}")]
    Contradictory(anyhow::Error),
}

/// What the webhook reads from its environment.
#[derive(Args)]
struct WebhookArguments {
    #[command(flatten)]
    conventions: ConventionArguments,
    #[command(flatten)]
    defaults: DefaultArguments,
}

impl Settings {
    /// The settings of a webhook with this environment, by the webhook's own parser.
    ///
    /// # Errors
    /// If the webhook would not start with it.
    pub(crate) fn of_environment<'a>(
        variables: impl IntoIterator<Item = (&'a str, &'a str)>,
        origin: Origin,
    ) -> Result<Self, SettingsError> {
        let command = command();
        let flags = flags(&command);
        let arguments = variables.into_iter().filter_map(|(name, value)| {
            let (_, flag) = flags.iter().find(|(variable, _)| variable == name)?;
            Some(format!("--{flag}={value}"))
        });
        let arguments: Vec<String> = ["balancer-webhook".to_owned()].into_iter().chain(arguments).collect();
        // The environment of the caller is not the webhook's.
        let matches = command.mut_args(|argument| argument.env(None)).try_get_matches_from(arguments);
        let parsed = matches.and_then(|matches| WebhookArguments::from_arg_matches(&matches));
        let WebhookArguments { conventions, defaults } = parsed.map_err(SettingsError::Invalid)?;
        let conventions = conventions.conventions().map_err(SettingsError::Contradictory)?;
        Ok(Self { conventions, defaults: defaults.policy(), origin, doubt: None })
    }

    /// The policy of a job that states none, if it is known.
    pub(crate) fn known_defaults(&self) -> Option<Policy> {
        matches!(self.origin, Origin::Deployment { .. }).then_some(self.defaults)
    }
}

/// The error without the usage that follows it.
fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    text.lines().next().map(|line| line.trim_start_matches("error: ").to_owned()).unwrap_or_default()
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            conventions: Conventions::default(),
            defaults: Policy::DEFAULT,
            origin: Origin::Defaults { error: None },
            doubt: None,
        }
    }
}

fn command() -> Command {
    WebhookArguments::augment_args(Command::new("balancer-webhook"))
}

/// The environment variables of the settings, and their flags.
fn flags(command: &Command) -> Vec<(String, String)> {
    let flag = |argument: &Arg| Some((argument.get_env()?.to_str()?.to_owned(), argument.get_long()?.to_owned()));
    command.get_arguments().filter_map(flag).collect()
}

/// Whether an environment variable is one of the settings that are read here.
pub(crate) fn is_setting(variable: &str) -> bool {
    flags(&command()).iter().any(|(known, _)| known == variable)
}

/// The settings that a container takes from elsewhere, so that its Deployment does not show them.
pub(crate) fn not_literal(container: &Container) -> Vec<String> {
    let flags = flags(&command());
    let variables = container.env.iter().flatten().filter(|variable| variable.value_from.is_some());
    let names =
        variables.map(|variable| variable.name.clone()).filter(|name| flags.iter().any(|(known, _)| known == name));
    let sources = container.env_from.as_ref().filter(|sources| !sources.is_empty()).map(|_| "envFrom".to_owned());
    names.chain(sources).collect()
}

#[cfg(test)]
mod tests {
    use balancer_core::{CapacityLabels, CapacityProfile};

    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::of_environment(variables.iter().copied(), Origin::Defaults { error: None })
    }

    #[test]
    fn the_environment_of_the_webhook_is_read_as_the_webhook_reads_it() {
        let settings = of(&[
            ("CAPACITY_PROFILE", "gke"),
            ("DEFAULT_SPOT_RATIO", "none"),
            ("SPOT_FALLBACK_SECONDS", "60"),
            ("DECISION_ANNOTATION", ""),
            ("REDIS_URL", "redis://elsewhere"),
        ])
        .expect("settings");
        assert_eq!(settings.conventions.capacity_labels, CapacityLabels::of(CapacityProfile::Gke));
        assert_eq!(settings.conventions.decision_annotation, None);
        assert_eq!(
            settings.defaults.encode(),
            "spot-ratio=off on-demand-base=0 max-executors-per-node=0 \
             max-pool-share=1 spot-fallback-seconds=60 spot-retry-seconds=300"
        );
    }

    #[test]
    fn an_empty_environment_means_the_defaults_of_the_webhook() {
        let settings = of(&[]).expect("settings");
        assert_eq!((settings.conventions, settings.defaults), (Conventions::default(), Policy::DEFAULT));
    }

    #[test]
    fn settings_with_which_no_webhook_starts_are_errors() {
        let invalid = of(&[("CAPACITY_PROFILE", "mars")]).expect_err("no such profile").to_string();
        assert!(invalid.starts_with("a setting is invalid: invalid value 'mars'"), "{invalid}");
        assert_eq!(invalid.lines().count(), 1, "{invalid}");
        let same = [("SPOT_RATIO_ANNOTATION", "a/b"), ("DECISION_ANNOTATION", "a/b")];
        assert!(matches!(of(&same), Err(SettingsError::Contradictory(_))));
    }
}
