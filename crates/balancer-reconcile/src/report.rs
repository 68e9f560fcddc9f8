//! Tells the people of a job what we cannot read: a Kubernetes Event on the driver, which
//! `kubectl describe` shows.

use std::sync::Arc;
use std::time::Duration;

use balancer_core::{Conventions, InvalidField};
use balancer_runtime::cluster;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::leader::host;
use crate::view::{Complaint, in_words};

/// Complaints that wait to be told; past it they are only logged.
const MOST_WAITING: usize = 64;
/// The most that telling one may take.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Of a driver's name, in the name of its Event: the API adds five characters, and takes 253.
const MOST_NAME: usize = 240;

/// Tells complaints one after the other, beside the repairs.
#[derive(Debug)]
pub(crate) struct Reports {
    waiting: mpsc::Sender<Complaint>,
    conventions: Arc<Conventions>,
}

impl Reports {
    /// Starts the task that tells them; it ends with this.
    pub(crate) fn start(client: Client, conventions: Arc<Conventions>) -> Self {
        let (waiting, mut complaints) = mpsc::channel::<Complaint>(MOST_WAITING);
        let names = Arc::clone(&conventions);
        tokio::spawn(async move {
            while let Some(complaint) = complaints.recv().await {
                for invalid in &complaint.invalid {
                    tell(&client, &names, &complaint, invalid).await;
                }
            }
        });
        Self { waiting, conventions }
    }

    /// Logs the complaint, and has it told on the driver.
    pub(crate) fn tell(&self, complaint: Complaint) {
        let Complaint { job, driver, invalid, holds, .. } = &complaint;
        for invalid in invalid {
            let annotation = self.conventions.annotation(invalid.field);
            let holds = in_words(*holds, invalid);
            tracing::warn!(namespace = job.namespace, job = job.app_id, %driver, annotation, %invalid, holds, "cannot be read");
        }
        if self.waiting.try_send(complaint).is_err() {
            tracing::warn!("too many invalid annotations at once: this one is told in the log only");
        }
    }
}

async fn tell(client: &Client, conventions: &Conventions, complaint: &Complaint, invalid: &InvalidField) {
    let Complaint { job, driver, uid, invalid: _, holds } = complaint;
    let note = format!("{}: {invalid}; {}", conventions.annotation(invalid.field), in_words(*holds, invalid));
    let event = Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", driver.get(..MOST_NAME).unwrap_or(driver))),
            namespace: Some(job.namespace.clone()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(Timestamp::now())),
        type_: Some("Warning".into()),
        reason: Some(invalid.field.event_reason().into()),
        note: Some(note),
        action: Some("ReadPolicy".into()),
        reporting_controller: Some("spot-balancer".into()),
        reporting_instance: Some(host()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some(job.namespace.clone()),
            name: Some(driver.to_string()),
            uid: Some(uid.to_string()),
            ..ObjectReference::default()
        }),
        ..Event::default()
    };
    let events = Api::<Event>::namespaced(client.clone(), &job.namespace);
    let error = match timeout(CALL_LIMIT, events.create(&PostParams::default(), &event)).await {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => cluster::chain(&error),
        Err(_) => format!("the Kubernetes API did not answer within {CALL_LIMIT:?}"),
    };
    tracing::warn!(namespace = job.namespace, %driver, error, "the driver got no Event");
}
