//! `explain`: why a pod runs, or waits, where it does.

mod decision;
mod now;
#[cfg(test)]
mod tests;
mod words;

use std::io::Write;

use anyhow::{Context, bail};
use clap::Args;
use k8s_openapi::api::core::v1;

use crate::cluster::{Cluster, ClusterArguments, Freshness, RequestError, ViewArguments, within};
use crate::output::{Format, write_json};
use crate::snapshot::{
    self,
    read::{self, Wanted},
};

use crate::status::job::Profile;

use words::Explanation;

/// The arguments of `explain`.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// The name of the pod
    pod: String,

    #[command(flatten)]
    cluster: ClusterArguments,

    #[command(flatten)]
    view: ViewArguments,
}

impl Arguments {
    /// The same with the flags that stand before the command.
    pub(crate) fn after(self, before: ClusterArguments) -> Self {
        Self { cluster: self.cluster.or(before), ..self }
    }
}

/// Explains the pod.
pub(crate) async fn run(arguments: Arguments, out: &mut impl Write) -> anyhow::Result<()> {
    let cluster = Cluster::connect(&arguments.cluster).await?;
    let explanation = explain(&cluster, &arguments).await.map_err(|error| cluster.located(error))?;
    let Profile { origin, doubt, .. } = &explanation.settings;
    if let Some(note) = snapshot::note(&explanation.missing, origin, doubt.as_deref()) {
        eprintln!("{note}");
    }
    match arguments.view.output {
        Format::Json => write_json(out, &explanation)?,
        Format::Table => explanation.write(out, false)?,
        Format::Wide => explanation.write(out, true)?,
    }
    Ok(())
}

async fn explain(cluster: &Cluster, arguments: &Arguments) -> anyhow::Result<Explanation> {
    let namespace = cluster.namespace.as_str();
    let name = arguments.pod.as_str();
    let name = ["pod/", "pods/"].iter().find_map(|kind| name.strip_prefix(kind)).unwrap_or(name);
    let pod = match within(cluster.api::<v1::Pod>(Some(namespace)).get(name)).await {
        Ok(pod) => pod,
        Err(RequestError::NotFound(_)) => {
            bail!("no pod {name:?} in namespace {namespace:?}; it may be gone, or in another namespace (--namespace)")
        }
        Err(error) => return Err(error).with_context(|| format!("cannot get the pod {name:?}")),
    };
    let settings = arguments.view.apply(read::settings(cluster).await?);
    let wanted = Wanted::EventsOf(&pod);
    let snapshot = read::snapshot(cluster, Some(namespace), settings, wanted, Freshness::Now).await?;
    Explanation::of(&snapshot, &pod).context("the pod cannot be read")
}
