//! A stand-in for the part of Spark that requests executors: it keeps a job at a number of executors.
//!
//! It does what Spark 3.5 does by its defaults: once a second it requests up to five of those that are missing; an
//! executor that waits for a node counts; one that is deleted or has ended does not; each new one has a new id. A
//! creation that is refused is repeated a second later.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, ListParams};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use crate::pods::{JOB_ID_LABEL, PodBuilder, executor};

/// `spark.kubernetes.allocation.batch.delay`.
const DELAY: Duration = Duration::from_secs(1);
/// `spark.kubernetes.allocation.batch.size`.
const BATCH: u32 = 5;

/// The stand-in at work for one job. Dropping it ends it.
#[derive(Debug)]
pub struct Allocator {
    wanted: Arc<AtomicU32>,
    requested: Arc<AtomicU32>,
    task: JoinHandle<()>,
}

impl Allocator {
    /// Starts it for a job without executors. `shape` changes each executor before it is created.
    pub fn start(
        (client, namespace): (&Client, &str),
        job: &str,
        wanted: u32,
        shape: impl Fn(PodBuilder) -> PodBuilder + Send + Sync + 'static,
    ) -> Self {
        let (wanted, requested) = (Arc::new(AtomicU32::new(wanted)), Arc::new(AtomicU32::new(0)));
        let task = tokio::spawn({
            let (client, namespace, job) = (client.clone(), namespace.to_owned(), job.to_owned());
            let (wanted, requested) = (Arc::clone(&wanted), Arc::clone(&requested));
            async move {
                let pods = Api::<Pod>::namespaced(client.clone(), &namespace);
                let of_job = ListParams::default().labels(&format!("spark-role=executor,{JOB_ID_LABEL}={job}"));
                let mut turns = interval(DELAY);
                turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    turns.tick().await;
                    let Ok(known) = pods.list(&of_job).await else { continue };
                    let live = u32::try_from(known.iter().filter(|pod| is_live(pod)).count()).unwrap_or(u32::MAX);
                    for _ in 0..wanted.load(Ordering::Relaxed).saturating_sub(live).min(BATCH) {
                        let id = requested.fetch_add(1, Ordering::Relaxed) + 1;
                        // A failure shows as a missing executor.
                        drop(shape(executor(&job, id)).post(&client, &namespace).await);
                    }
                }
            }
        });
        Self { wanted, requested, task }
    }

    /// Keeps the job at this many executors from now on. It deletes none.
    pub fn want(&self, executors: u32) {
        self.wanted.store(executors, Ordering::Relaxed);
    }

    /// How many executors it has requested so far.
    pub fn requested(&self) -> u32 {
        self.requested.load(Ordering::Relaxed)
    }
}

impl Drop for Allocator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn is_live(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
}
