//! Reports invalid annotations: in the log, and as a Kubernetes Event on the driver, which `kubectl describe` shows.

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

use crate::index::InvalidAnnotation;
use crate::leader::host;

/// Reports that wait for their Event. Further ones are only logged.
const MAX_WAITING: usize = 64;
/// The most that the creation of one Event may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of a driver's name the name of its Event contains: the API adds five characters, and accepts 253.
const MAX_NAME: usize = 240;

/// Creates one Event after the other, in a task of its own.
#[derive(Debug)]
pub(crate) struct EventRecorder {
    waiting: mpsc::Sender<InvalidAnnotation>,
    conventions: Arc<Conventions>,
}

impl EventRecorder {
    /// Starts the task. It ends when the recorder is dropped.
    pub(crate) fn start(client: Client, conventions: Arc<Conventions>) -> Self {
        let (waiting, mut annotations) = mpsc::channel::<InvalidAnnotation>(MAX_WAITING);
        let names = Arc::clone(&conventions);
        tokio::spawn(async move {
            while let Some(annotation) = annotations.recv().await {
                for invalid in &annotation.invalid {
                    create_event(&client, &names, &annotation, invalid).await;
                }
            }
        });
        Self { waiting, conventions }
    }

    /// Logs the invalid values, and creates Events for them.
    pub(crate) fn record(&self, annotation: InvalidAnnotation) {
        let InvalidAnnotation { job, driver, .. } = &annotation;
        for invalid in &annotation.invalid {
            let (key, fallback) = (self.conventions.annotation(invalid.field), annotation.fallback(invalid));
            let (namespace, job) = (&job.namespace, &job.app_id);
            tracing::warn!(namespace, job, %driver, annotation = key, %invalid, fallback, "invalid annotation");
        }
        if self.waiting.try_send(annotation).is_err() {
            tracing::warn!("too many invalid annotations at once; this one gets no Event");
        }
    }
}

async fn create_event(
    client: &Client,
    conventions: &Conventions,
    annotation: &InvalidAnnotation,
    invalid: &InvalidField,
) {
    let InvalidAnnotation { job, driver, uid, .. } = annotation;
    let note = format!("{}: {invalid}; {}", conventions.annotation(invalid.field), annotation.fallback(invalid));
    let event = Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", driver.get(..MAX_NAME).unwrap_or(driver))),
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
    let error = match timeout(CALL_TIMEOUT, events.create(&PostParams::default(), &event)).await {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => cluster::chain(&error),
        Err(_) => format!("the Kubernetes API did not answer within {CALL_TIMEOUT:?}"),
    };
    tracing::warn!(namespace = job.namespace, %driver, error, "failed to create the Event on the driver");
}
