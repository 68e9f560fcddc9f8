//! A simulated kubelet, for all nodes at once: nothing runs, but pods change as if it did.
//!
//! Of a real kubelet's work it does what the control plane and the webhook can see: a pod bound to a
//! node becomes Running, and a pod marked for deletion gets the kubelet's final DELETE, with grace 0
//! and the uid as a precondition. It has no grace period to wait out, no images, and no probes.

use std::time::Duration;

use futures::{StreamExt, TryFutureExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Preconditions};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Error, ResourceExt};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::pods;

/// Pods handled side by side.
const WORKERS: usize = 8;
/// Together with the pause: how long an outage of the API may last without a pod being given up.
const TRIES: usize = 300;
const PAUSE: Duration = Duration::from_millis(100);

/// The stand-in at work on the pods of one namespace. Dropping it ends it.
#[derive(Debug)]
pub struct Kubelet(JoinHandle<()>);

impl Kubelet {
    /// Starts it on the current runtime.
    pub fn start(client: Client, namespace: &str) -> Self {
        let api = Api::<Pod>::namespaced(client, namespace);
        let bound = watcher::Config::default().fields("spec.nodeName!=");
        // The watcher takes a lost watch up again by itself, so its errors are of no interest here.
        let pods = watcher(api.clone(), bound).default_backoff().applied_objects().filter_map(async |pod| pod.ok());
        Self(tokio::spawn(async move {
            pods.for_each_concurrent(WORKERS, |pod| follow(&api, pod)).await;
        }))
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Does what the pod's present state requires.
async fn follow(api: &Api<Pod>, pod: Pod) {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if pod.metadata.deletion_timestamp.is_some() {
        finish(api, &pod).await;
    } else if phase == Some("Pending") {
        let name = pod.name_any();
        insist(&name, || pods::set_phase(api, &name, "Running")).await;
    }
}

/// The kubelet's final DELETE of a pod.
pub(crate) async fn finish(api: &Api<Pod>, pod: &Pod) {
    let now = DeleteParams {
        preconditions: Some(Preconditions { uid: pod.uid(), resource_version: None }),
        ..DeleteParams::default().grace_period(0)
    };
    let name = pod.name_any();
    insist(&name, || api.delete(&name, &now).map_ok(drop)).await;
}

/// Makes an API call about a pod, and repeats it until it succeeds.
pub(crate) async fn insist<F>(name: &str, tell: impl Fn() -> F)
where
    F: Future<Output = Result<(), Error>>,
{
    for _ in 0..TRIES {
        match tell().await {
            // Gone, or replaced by another of the same name: nothing is left to do.
            Err(Error::Api(status)) if matches!(status.code, 404 | 409) => return,
            Err(_) => sleep(PAUSE).await,
            Ok(()) => return,
        }
    }
    eprintln!("the simulated kubelet gave up on pod {name}");
}
