//! The ways in which a namespace is served, for behaviour that has to be the same in all of them.

use anyhow::Result;

use crate::scenario::{Counts, Executors, REPAIRED, Scenario};
use crate::webhook::WebhookOptions;

/// Where the ledger is, and how many webhooks there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setup {
    /// In Redis, next to a reconciler.
    Redis {
        /// The number of webhooks.
        webhooks: usize,
    },
    /// In the memory of one webhook.
    Memory,
}

impl Setup {
    /// Serves the scenario's namespace with these settings.
    pub async fn serve(self, scenario: &mut Scenario, settings: &WebhookOptions) -> Result<()> {
        match self {
            Self::Redis { webhooks } => scenario.serve(webhooks, settings).await,
            Self::Memory => scenario.serve_in_memory(settings).await,
        }
    }

    /// What the ledger counts, once it matches the live executors of a job; `None` if it is in memory, where only what
    /// the webhook does tells of it.
    pub async fn settled(self, scenario: &Scenario, job: &str) -> Result<Option<Counts>> {
        match self {
            Self::Redis { .. } => Ok(Some(scenario.until_ledger_matches_pods(job, REPAIRED).await?)),
            Self::Memory => Ok(None),
        }
    }

    /// The entries of a job; `None` if the ledger is in memory.
    pub async fn entries(self, scenario: &Scenario, job: &str) -> Result<Option<Executors>> {
        match self {
            Self::Redis { .. } => Ok(Some(scenario.entries(job).await?)),
            Self::Memory => Ok(None),
        }
    }
}

/// A test of a case, in all setups at once: most of its time it waits.
#[macro_export]
macro_rules! in_each_setup {
    ($($case:ident)+) => {
        mod in_each_setup {
            use super::*;

            $(#[tokio::test]
            async fn $case() -> anyhow::Result<()> {
                use anyhow::Context as _;
                use $crate::setup::Setup;
                $crate::need!(Redis, ControlPlane, Scheduler, ControllerManager, Webhook, Reconciler);
                tokio::try_join!(
                    async { super::$case(Setup::Redis { webhooks: 1 }).await.context("with Redis and one webhook") },
                    async { super::$case(Setup::Redis { webhooks: 2 }).await.context("with Redis and two webhooks") },
                    async { super::$case(Setup::Memory).await.context("with the ledger in memory") },
                )?;
                Ok(())
            })+
        }
    };
}
