//! Applies the events of the watches to the index, and to the executors that wait for a node.

use balancer_core::{Conventions, ExecutorPod, JobPod, NodeRequirements, Pod, Pool};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use tokio::time::Instant;

use crate::index::{ClusterIndex, DriverRef};
use crate::stuck::{StuckExecutor, StuckExecutors};
use crate::unschedulable::{Reason, Unschedulable};
use crate::watch::{ClusterEvent, Event, Source, SyncStatus, WatchedNode};

/// The executors that wait for a node.
#[derive(Debug, Default)]
pub(crate) struct WaitingExecutors {
    /// Those that Spot Balancer has added a requirement to.
    pub(crate) unschedulable: Unschedulable,
    /// Those that may run on spot alone, because of Spot Balancer.
    pub(crate) stuck: StuckExecutors,
}

/// Applies one event.
pub(crate) fn apply(
    event: ClusterEvent,
    index: &mut ClusterIndex,
    sync: &mut SyncStatus,
    waiting: &mut WaitingExecutors,
    conventions: &Conventions,
) {
    let now = Instant::now();
    match event {
        ClusterEvent::Pods(namespace, event) => {
            let source = Source::Pods(namespace.clone());
            sync.observe(&source, &event, now);
            let scope = namespace.as_ref();
            match event {
                Event::Init | Event::Relist => index.init_pods(scope),
                Event::InitApply(pod) | Event::RelistApply(pod) => {
                    if index.list_pod(&pod.pod, scope) {
                        waiting.apply(&pod.pod, index, conventions, now);
                    }
                }
                Event::Apply(pod) => {
                    index.apply_pod(&pod.pod, scope);
                    waiting.apply(&pod.pod, index, conventions, now);
                }
                Event::Delete(pod) => {
                    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
                    let uid = pod.pod.metadata.uid.as_deref().unwrap_or_default();
                    if index.delete_watched_pod(&namespace, &name, uid) {
                        waiting.unschedulable.delete(&namespace, &name);
                        waiting.stuck.delete(&namespace, &name);
                    }
                }
                Event::InitDone | Event::RelistDone => {
                    index.init_pods_done(scope);
                    waiting.unschedulable.retain(|namespace, name| index.is_executor(namespace, name));
                    waiting.stuck.retain(|namespace, name| index.is_executor(namespace, name));
                }
                Event::RelistFailed(_) => index.init_pods_failed(scope),
                Event::Disconnected(_) | Event::Resumed => {}
            }
        }
        ClusterEvent::Nodes(event) => {
            sync.observe(&Source::Nodes, &event, now);
            match event {
                Event::Init | Event::Relist => index.init_nodes(),
                Event::InitApply(node) | Event::RelistApply(node) => {
                    if !index.is_known_better(&node.name_any()) {
                        apply_node(&node, index, conventions);
                    }
                }
                Event::Apply(node) => apply_node(&node, index, conventions),
                Event::Delete(node) => index.delete_node(&node.name_any()),
                Event::InitDone | Event::RelistDone => {
                    index.init_nodes_done();
                    if let Some(likely) = index.likely_platform() {
                        tracing::warn!(
                            capacity_profile = conventions.capacity_labels.profile.as_str(),
                            likely = likely.as_str(),
                            "no spot node has the labels of CAPACITY_PROFILE; spot nodes have those of another profile"
                        );
                    }
                }
                Event::RelistFailed(_) => index.init_nodes_failed(),
                Event::Disconnected(_) | Event::Resumed => {}
            }
        }
    }
}

fn apply_node(node: &WatchedNode, index: &mut ClusterIndex, conventions: &Conventions) {
    let labels = node.labels();
    let label = |key: &str| labels.get(key).map(String::as_str);
    let (profile, name) = (conventions.profile(), node.name_any());
    index.apply_node(&name, profile.of_node(label));
    index.set_pool(&name, Pool::of_node(label));
    index.set_other_platform(&name, profile.other_platform_of_spot_node(label));
}

impl WaitingExecutors {
    /// A pod was reported.
    fn apply(&mut self, pod: &Pod<'_>, index: &ClusterIndex, conventions: &Conventions, now: Instant) {
        let (mut reason, mut stuck) = (None, None);
        // Of most pods nothing else is read.
        if let Some(message) = pod.unschedulable()
            && let Some(JobPod::Executor(executor)) = JobPod::of(pod, conventions)
        {
            reason = reason_of(pod, &executor, message, index, conventions);
            stuck = StuckExecutor::of(pod, &executor, conventions, now, Timestamp::now());
        }
        let (namespace, name) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref());
        let (Some(namespace), Some(name)) = (namespace, name) else { return };
        self.unschedulable.apply(namespace, name, reason, now);
        self.stuck.apply(namespace, name, stuck);
    }
}

/// Why the executor waits for a node, if Spot Balancer has added a requirement.
fn reason_of(
    pod: &Pod<'_>,
    executor: &ExecutorPod<'_>,
    message: &str,
    index: &ClusterIndex,
    conventions: &Conventions,
) -> Option<Reason> {
    let NodeRequirements { ours, own, .. } = conventions.profile().requirements(pod);
    if ours.is_empty() {
        return None;
    }
    let owner = executor.driver.zip(executor.driver_uid).map(|(name, uid)| DriverRef {
        namespace: executor.job.namespace.to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
    });
    Some(Reason::new(executor.uid, owner.or_else(|| index.driver(&executor.job.to_job_id())), (&ours, &own), message))
}
