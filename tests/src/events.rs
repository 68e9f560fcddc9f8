//! Events about a pod, as `kubectl describe` shows them under it.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::events::v1::Event;
use kube::ResourceExt;
use kube::api::{Api, ListParams};

use crate::scenario::Scenario;
use crate::wait::until;

/// The warnings about a pod that is there: reason and note.
pub async fn warnings(scenario: &Scenario, pod: &str) -> Result<Vec<(String, String)>> {
    about(scenario, pod, "Warning").await
}

/// The Events of this type about a pod that is there: reason and note.
pub async fn about(scenario: &Scenario, pod: &str, kind: &str) -> Result<Vec<(String, String)>> {
    let pod = scenario.pods().get(pod).await?;
    let events = Api::<Event>::namespaced(scenario.client.clone(), &scenario.namespace);
    let tells = |event: &Event| {
        let about = event.regarding.clone().unwrap_or_default();
        (about.kind.as_deref(), about.name, about.uid) == (Some("Pod"), pod.metadata.name.clone(), pod.uid())
            && event.type_.as_deref() == Some(kind)
    };
    let text = |text: Option<String>| text.unwrap_or_default();
    let events = events.list(&ListParams::default()).await?.items.into_iter();
    Ok(events.filter(tells).map(|event| (text(event.reason), text(event.note))).collect())
}

/// The note of the warning of this reason, once there is one that has these texts.
pub async fn until_warned(
    scenario: &Scenario,
    pod: &str,
    (reason, texts): (&str, &[&str]),
    within: Duration,
) -> Result<String> {
    let mut seen = Vec::new();
    let what = format!("the Event {reason}");
    let warned = until(within, &what, async || {
        seen = warnings(scenario, pod).await?;
        let meant = |(of, note): &&(String, String)| of == reason && texts.iter().all(|text| note.contains(text));
        Ok(seen.iter().find(meant).map(|(_, note)| note.clone()))
    });
    warned.await.with_context(|| format!("{texts:?} are not all in one of {seen:?}"))
}
