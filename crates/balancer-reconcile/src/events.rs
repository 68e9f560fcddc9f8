//! Creates Kubernetes Events on drivers, which `kubectl describe` shows.

use std::sync::Arc;
use std::time::Duration;

use balancer_runtime::cluster;
use balancer_runtime::tasks::{Task, Tasks};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::{Mutex, mpsc};
use tokio::time::{sleep, timeout};

use crate::index::DriverRef;
use crate::leader::host;

/// Warnings that wait for their Event. Further ones wait where they come from: see [`EventRecorder::room`].
const MAX_WAITING: usize = 64;
/// The most that the creation of one Event may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the creation of an Event is attempted, and how long the first pause in between is. Each is twice as long as
/// the one before.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// How much of a driver's name the name of its Event contains: 17 bytes follow it, and the API accepts 253.
const MAX_NAME: usize = 236;
/// The longest note that the API accepts, in bytes.
const MAX_NOTE: usize = 1024;

/// What is wrong with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarningReason {
    /// An annotation has an invalid value. The reason is the field's own.
    InvalidAnnotation(&'static str),
    /// The executors require a capacity by themselves.
    SpotRatioWithoutEffect,
    /// Executors find no node, and Spot Balancer has added a requirement.
    ExecutorsUnschedulable,
    /// Too many executors are on one node.
    LargeNodeShare,
    /// Too many executors are in one pool of spot nodes.
    LargePoolShare,
    /// Executors find no spot node, and new ones go to on-demand.
    SpotClosed,
    /// There is spot again. It is good news.
    SpotReopened,
    /// Executors that find no spot node cannot be replaced.
    ExecutorReplacementForbidden,
}

impl WarningReason {
    /// The reason of the Event.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidAnnotation(reason) => reason,
            Self::SpotRatioWithoutEffect => "SpotRatioWithoutEffect",
            Self::ExecutorsUnschedulable => "ExecutorsUnschedulable",
            Self::LargeNodeShare => "LargeNodeShare",
            Self::LargePoolShare => "LargePoolShare",
            Self::SpotClosed => "SpotClosed",
            Self::SpotReopened => "SpotReopened",
            Self::ExecutorReplacementForbidden => "ExecutorReplacementForbidden",
        }
    }

    /// What was done when it was noticed.
    fn action(self) -> &'static str {
        match self {
            Self::InvalidAnnotation(_) => "ReadPolicy",
            Self::SpotRatioWithoutEffect => "ApplyPolicy",
            Self::ExecutorsUnschedulable => "WaitForNode",
            Self::LargeNodeShare | Self::LargePoolShare => "CountExecutors",
            Self::SpotClosed => "CloseSpot",
            Self::SpotReopened => "OpenSpot",
            Self::ExecutorReplacementForbidden => "ReplaceExecutors",
        }
    }

    /// The type of the Event.
    fn event_type(self) -> &'static str {
        match self {
            Self::SpotReopened => "Normal",
            _ => "Warning",
        }
    }
}

/// A warning for the people whose driver it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Warning {
    pub(crate) driver: DriverRef,
    pub(crate) reason: WarningReason,
    /// What tells it from other warnings about the driver with the same reason, such as the job.
    pub(crate) about: String,
    pub(crate) note: String,
}

/// Creates one Event after the other, in a task of its own.
#[derive(Debug)]
pub(crate) struct EventRecorder {
    waiting: mpsc::Sender<Warning>,
}

impl EventRecorder {
    /// Starts the task. It ends when the recorder is dropped. If it panics, one warning gets no Event.
    pub(crate) fn start(client: Client, tasks: &Tasks) -> Self {
        let (waiting, warnings) = mpsc::channel(MAX_WAITING);
        // Only one task receives: the lock passes the receiver on to the task that is started after a panic.
        let warnings = Arc::new(Mutex::new(warnings));
        // Whatever is wrong with a driver must not end the process.
        tasks.for_optional_part().spawn(Task::Events, move || create_events(client.clone(), Arc::clone(&warnings)));
        Self { waiting }
    }

    /// For how many more warnings there is room. A warning that is recorded now would get no Event beyond that.
    pub(crate) fn room(&self) -> usize {
        self.waiting.capacity()
    }

    /// Creates an Event soon.
    pub(crate) fn record(&self, warning: Warning) {
        if self.waiting.try_send(warning).is_err() {
            tracing::warn!("too many warnings at once; this one gets no Event");
        }
    }
}

/// Creates the Events of all warnings, until the recorder is dropped.
async fn create_events(client: Client, warnings: Arc<Mutex<mpsc::Receiver<Warning>>>) {
    let mut warnings = warnings.lock().await;
    while let Some(warning) = warnings.recv().await {
        create_event(&client, &warning).await;
    }
}

/// Creates the Event. If the API is not available for a while, it is attempted again.
async fn create_event(client: &Client, warning: &Warning) {
    let DriverRef { namespace, name: driver, .. } = &warning.driver;
    let events = Api::<Event>::namespaced(client.clone(), namespace);
    for attempt in 1..=ATTEMPTS {
        let (error, may_pass) =
            match timeout(CALL_TIMEOUT, events.create(&PostParams::default(), &event(warning))).await {
                Ok(Ok(_)) => return,
                // An earlier leader, or an earlier attempt, has created it.
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => return,
                Ok(Err(error)) => (cluster::chain(&error), may_pass(&error)),
                Err(_) => (format!("the Kubernetes API did not answer within {CALL_TIMEOUT:?}"), true),
            };
        if !may_pass || attempt == ATTEMPTS {
            tracing::warn!(namespace, driver, error, attempt, "failed to create the Event on the driver");
            return;
        }
        sleep(FIRST_PAUSE * (1 << (attempt - 1))).await;
    }
}

/// Whether the same call may succeed later.
fn may_pass(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        _ => true,
    }
}

fn event(warning: &Warning) -> Event {
    let Warning { driver: DriverRef { namespace, name, uid }, reason, note, .. } = warning;
    Event {
        metadata: ObjectMeta {
            name: Some(event_name(warning)),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(Timestamp::now())),
        type_: Some(reason.event_type().into()),
        reason: Some(reason.as_str().into()),
        note: Some(start_of(note, MAX_NOTE).to_owned()),
        action: Some(reason.action().into()),
        reporting_controller: Some("spot-balancer".into()),
        reporting_instance: Some(host()),
        // The pod need not be one that is watched: these fields are all that the API wants to know of it.
        regarding: Some(ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            namespace: Some(namespace.clone()),
            name: Some(name.clone()),
            uid: Some(uid.clone()),
            ..ObjectReference::default()
        }),
        ..Event::default()
    }
}

/// The same name for the same warning, whichever process creates it: another one does not repeat it.
fn event_name(warning: &Warning) -> String {
    let Warning { driver: DriverRef { name, uid, .. }, reason, about, .. } = warning;
    // FNV-1a, which stays the same between versions of the program and of its libraries.
    let texts = [uid.as_str(), reason.as_str(), about];
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0xff]));
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    // A part of a name may end with a character that must not be followed by a dot.
    let name = start_of(name, MAX_NAME).trim_end_matches(['.', '-']);
    format!("{name}.{hash:016x}")
}

/// The start of a text, at most so many bytes.
fn start_of(text: &str, bytes: usize) -> &str {
    text.get(..text.floor_char_boundary(bytes)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use balancer_runtime::k8s_names::is_dns_subdomain;

    use super::*;

    fn warning(name: &str, uid: &str, reason: WarningReason, about: &str) -> Warning {
        let driver = DriverRef { namespace: "etl".into(), name: name.into(), uid: uid.into() };
        Warning { driver, reason, about: about.into(), note: "é".repeat(1_000) }
    }

    #[test]
    fn an_event_has_the_same_name_in_every_process_and_another_for_another_warning() {
        use WarningReason::{ExecutorsUnschedulable, SpotRatioWithoutEffect};
        let name = event_name(&warning("d", "u", SpotRatioWithoutEffect, "j"));
        assert_eq!(name, "d.dc966e254cca550d");
        for other in [
            warning("d", "v", SpotRatioWithoutEffect, "j"),
            warning("d", "u", ExecutorsUnschedulable, "j"),
            warning("d", "u", SpotRatioWithoutEffect, "k"),
        ] {
            assert_ne!(event_name(&other), name);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_is_attempted_again_while_the_api_is_not_available() {
        for (answers, calls) in [
            (vec![500, 429, 201], 3),
            (vec![503, 409], 2),
            (vec![403], 1),
            (vec![500; ATTEMPTS as usize], ATTEMPTS as usize),
        ] {
            let (service, mut handle) =
                tower_test::mock::pair::<http::Request<kube::client::Body>, http::Response<kube::client::Body>>();
            let client = Client::new(service, "etl");
            let server = tokio::spawn(async move {
                let mut calls = 0;
                for code in answers {
                    let Some((_, send)) = handle.next_request().await else { break };
                    calls += 1;
                    let body = match code {
                        201 => {
                            serde_json::to_vec(&event(&warning("d", "u", WarningReason::ExecutorsUnschedulable, "")))
                        }
                        _ => serde_json::to_vec(&serde_json::json!({"status": "Failure", "message": "", "code": code})),
                    };
                    let body = kube::client::Body::from(body.unwrap_or_default());
                    send.send_response(http::Response::builder().status(code).body(body).expect("an answer"));
                }
                calls
            });
            create_event(&client, &warning("d", "u", WarningReason::ExecutorsUnschedulable, "")).await;
            assert_eq!(server.await.expect("the calls"), calls);
        }
    }

    #[test]
    fn the_api_accepts_the_name_and_the_note_of_every_event() {
        for driver in ["d".to_owned(), "a".repeat(253), format!("{}.{}", "a".repeat(235), "b".repeat(17))] {
            let event = event(&warning(&driver, "u", WarningReason::ExecutorsUnschedulable, ""));
            let (name, note) = (event.metadata.name.unwrap_or_default(), event.note.unwrap_or_default());
            assert!(is_dns_subdomain(&name), "{name}");
            assert!(note.len() <= 1024 && note.chars().all(|char| char == 'é'));
        }
    }
}
