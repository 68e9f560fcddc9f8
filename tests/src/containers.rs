//! A simulated kubelet and container runtime that runs what the pods of a namespace say, as processes of this
//! machine: `sandbox.rs`. Every image is taken for `apache/spark`: `spark_image.rs`.
//!
//! A pod has an address of its own among the loopback addresses, and its one container's command, variables,
//! ConfigMaps, emptyDirs and the token of its account: `provision.rs`. Its phase follows the process, and its
//! deletion ends it: SIGTERM, some seconds, SIGKILL, and the kubelet's final DELETE. The cluster's DNS is a file:
//! `hosts.rs`. No probes, no init containers, no limits.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, TryFutureExt};
use k8s_openapi::api::core::v1::{Container, Pod, Service};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::address;
use crate::certificate::{APISERVER, authority};
use crate::control_plane::ControlPlane;
use crate::gateway::Gateway;
use crate::hosts::Hosts;
use crate::kubelet;
use crate::process::{Process, Signal};
use crate::provision::{HTTPS, Provision, only_container};
use crate::sandbox;

pub use crate::sandbox::allowed;

/// The longest grace period of a pod.
const GRACE: Duration = Duration::from_secs(5);
/// Between two checks whether a process has ended.
const LOOK: Duration = Duration::from_millis(50);

/// The stand-in at work on the pods of one namespace. Dropping it ends it and all containers.
pub struct Containers {
    runtime: Arc<Runtime>,
    task: JoinHandle<()>,
    _apiserver: Gateway,
}

impl Containers {
    /// Starts it on the current runtime.
    pub async fn start(plane: &ControlPlane, namespace: &str) -> Result<Self> {
        let apiserver = address::free()?;
        let client = plane.client()?;
        let runtime = Arc::new(Runtime {
            hosts: Mutex::new(Hosts::new(namespace, (APISERVER, apiserver))?),
            pods: Api::namespaced(client.clone(), namespace),
            services: Api::namespaced(client.clone(), namespace),
            provision: Provision::new(client, namespace),
            processes: Mutex::default(),
        });
        let certificate = authority()?.issue()?;
        let apiserver = Gateway::start(SocketAddrV4::new(apiserver, HTTPS), plane.port(), &certificate).await?;
        Ok(Self { task: tokio::spawn(follow(runtime.clone())), runtime, _apiserver: apiserver })
    }

    /// What a pod's container has written so far, or had when it ended.
    pub fn log(&self, pod: &str) -> Result<String> {
        self.runtime.process(pod, |process| process.log())
    }

    /// How many bytes all containers have written so far: a measure of their progress.
    pub fn log_length(&self) -> Result<u64> {
        lock(&self.runtime.processes).values().map(Process::log_length).sum()
    }

    /// The last log lines of every container, for an error.
    pub fn last_words(&self) -> String {
        let processes = lock(&self.runtime.processes);
        processes.iter().map(|(pod, process)| format!("--- {pod}\n{}\n", process.log_tail())).collect()
    }

    /// Kills a pod's container as the kernel does when memory runs out: no API call announces it.
    pub fn kill(&self, pod: &str) -> Result<()> {
        self.runtime.process(pod, kill)
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        self.task.abort();
        // The runtime of the test may drop the rest of the task later.
        lock(&self.runtime.processes).clear();
    }
}

struct Runtime {
    pods: Api<Pod>,
    services: Api<Service>,
    provision: Provision,
    hosts: Mutex<Hosts>,
    /// By the names of their pods; those that have ended too, for their logs.
    processes: Mutex<BTreeMap<String, Process>>,
}

/// Runs each pod that is bound to a node, and ends it when it is deleted.
async fn follow(runtime: Arc<Runtime>) {
    let bound = watcher::Config::default().fields("spec.nodeName!=");
    // A watcher takes a lost watch up again by itself, so its errors are of no interest here.
    let mut pods = pin!(watcher(runtime.pods.clone(), bound).default_backoff());
    let mut services =
        pin!(watcher(runtime.services.clone(), watcher::Config::default()).default_backoff().applied_objects());
    let mut lives = JoinSet::new();
    let mut deleted = HashMap::new();
    loop {
        tokio::select! {
            Some(event) = pods.next() => {
                let (pod, gone) = match event {
                    Ok(Event::Apply(pod) | Event::InitApply(pod)) => (pod, false),
                    Ok(Event::Delete(pod)) => (pod, true),
                    _ => continue,
                };
                let going = gone || pod.metadata.deletion_timestamp.is_some();
                let told = deleted.entry(pod.uid()).or_insert_with(|| {
                    let (tell, told) = watch::channel(going);
                    lives.spawn(runtime.clone().live(pod, told));
                    tell
                });
                if going {
                    told.send_replace(true);
                }
            },
            Some(service) = services.next() => if let Ok(service) = service {
                let selector = service.spec.as_ref().and_then(|spec| spec.selector.clone()).unwrap_or_default();
                if let Err(error) = lock(&runtime.hosts).service(&service.name_any(), selector) {
                    eprintln!("the stand-in for the cluster's DNS: {error:#}");
                }
            },
            else => return,
        }
        while lives.try_join_next().is_some() {}
    }
}

impl Runtime {
    /// Runs a pod from its binding to its removal.
    async fn live(self: Arc<Self>, pod: Pod, mut deleted: watch::Receiver<bool>) {
        if !*deleted.borrow()
            && let Err(error) = self.run(&pod, &mut deleted).await
        {
            let message = format!("{error:#}");
            eprintln!("the stand-in for the container runtime cannot run {}: {message}", pod.name_any());
            self.report(&pod, json!({"phase": "Failed", "reason": "NotSimulated", "message": message})).await;
        }
        told(&mut deleted).await;
        kubelet::finish(&self.pods, &pod).await;
    }

    /// Runs its container to the end, or to the pod's deletion.
    async fn run(&self, pod: &Pod, deleted: &mut watch::Receiver<bool>) -> Result<()> {
        let (name, address) = (pod.name_any(), address::free()?);
        let container = only_container(pod)?;
        let hosts = lock(&self.hosts).path().to_owned();
        let sandbox = self.provision.sandbox(pod, container, address, hosts).await?;
        lock(&self.hosts).pod(&name, pod.labels().clone(), address)?;
        let process = sandbox.start()?;
        lock(&self.processes).insert(name.clone(), process);

        let started = Timestamp::now();
        let running = json!({"running": {"startedAt": started}});
        let condition = |kind| json!({"type": kind, "status": "True", "lastTransitionTime": started});
        let conditions = ["Initialized", "Ready", "ContainersReady"].map(condition);
        self.report(
            pod,
            json!({
                "phase": "Running", "startTime": started, "conditions": conditions,
                "hostIP": Ipv4Addr::LOCALHOST, "podIP": address, "podIPs": [{"ip": address}],
                "containerStatuses": [container_status(container, true, &running)],
            }),
        )
        .await;

        let status = tokio::select! {
            status = self.ended(&name) => status?,
            () = told(deleted) => self.end(&name, grace(pod)).await?,
        };
        let code = exit_code(status);
        let (phase, reason) = if code == 0 { ("Succeeded", "Completed") } else { ("Failed", "Error") };
        let terminated = json!({"terminated": {
            "exitCode": code, "reason": reason, "startedAt": started, "finishedAt": Timestamp::now(),
        }});
        let conditions = ["Ready", "ContainersReady"].map(|kind| json!({"type": kind, "status": "False"}));
        self.report(
            pod,
            json!({
                "phase": phase, "conditions": conditions,
                "containerStatuses": [container_status(container, false, &terminated)],
            }),
        )
        .await;
        Ok(())
    }

    /// Terminates a container, and kills it if it does not end.
    async fn end(&self, name: &str, grace: Duration) -> Result<ExitStatus> {
        // It may just have ended by itself.
        let _ = self.process(name, |process| sandbox::terminate(process));
        if let Ok(status) = timeout(grace, self.ended(name)).await {
            return status;
        }
        self.process(name, kill)?;
        self.ended(name).await
    }

    async fn ended(&self, name: &str) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.process(name, Process::exit_status)? {
                return Ok(status);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn process<T>(&self, pod: &str, ask: impl FnOnce(&mut Process) -> Result<T>) -> Result<T> {
        let mut processes = lock(&self.processes);
        ask(processes.get_mut(pod).with_context(|| format!("{pod} runs nothing here"))?)
    }

    /// Writes a pod's status, again until the API takes it.
    async fn report(&self, pod: &Pod, status: Value) {
        let patch = Patch::Strategic(json!({"metadata": {"uid": pod.uid()}, "status": status}));
        let params = PatchParams::default();
        let name = pod.name_any();
        kubelet::insist(&name, || self.pods.patch_status(&name, &params, &patch).map_ok(drop)).await;
    }
}

fn container_status(container: &Container, ready: bool, state: &Value) -> Value {
    json!({
        "name": container.name, "image": container.image, "imageID": "", "restartCount": 0,
        "ready": ready, "started": ready, "state": state,
    })
}

/// Waits until a pod is deleted. Where nobody can tell any more, everything is about to end.
async fn told(deleted: &mut watch::Receiver<bool>) {
    if deleted.wait_for(|deleted| *deleted).await.is_err() {
        std::future::pending().await
    }
}

/// Kills what has not ended yet; who has ended may have left its number to another.
fn kill(process: &mut Process) -> Result<()> {
    if process.exit_status()?.is_none() { process.signal(Signal::KILL) } else { Ok(()) }
}

/// As a container runtime reports it.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn grace(pod: &Pod) -> Duration {
    let seconds = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    seconds.and_then(|seconds| u64::try_from(seconds).ok()).map_or(GRACE, Duration::from_secs).min(GRACE)
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}
