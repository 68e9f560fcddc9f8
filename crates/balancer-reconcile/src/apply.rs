//! Applies the events of the watches to the index.

use balancer_core::Profile;
use kube::ResourceExt;
use tokio::time::Instant;

use crate::index::ClusterIndex;
use crate::watch::{ClusterEvent, Event, Source, SyncStatus};

/// Applies one event.
pub(crate) fn apply(event: ClusterEvent, index: &mut ClusterIndex, sync: &mut SyncStatus, profile: Profile<'_>) {
    let now = Instant::now();
    match event {
        ClusterEvent::Pods(namespace, event) => {
            let source = Source::Pods(namespace.clone());
            sync.observe(&source, &event, now);
            let scope = namespace.as_ref();
            match event {
                Event::Init => index.init_pods(scope),
                Event::InitApply(pod) | Event::Apply(pod) => index.apply_pod(&pod.pod, scope),
                Event::Delete(pod) => index.delete_pod(&pod.namespace().unwrap_or_default(), &pod.name_any()),
                Event::InitDone => index.init_pods_done(scope),
                Event::Disconnected(_) | Event::Resumed => {}
            }
        }
        ClusterEvent::Nodes(event) => {
            sync.observe(&Source::Nodes, &event, now);
            match event {
                Event::Init => index.init_nodes(),
                Event::InitApply(node) | Event::Apply(node) => {
                    let labels = node.labels();
                    index.apply_node(&node.name_any(), profile.of_node(|key| labels.get(key).map(String::as_str)));
                }
                Event::Delete(node) => index.delete_node(&node.name_any()),
                Event::InitDone => index.init_nodes_done(),
                Event::Disconnected(_) | Event::Resumed => {}
            }
        }
    }
}
