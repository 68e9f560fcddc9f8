//! The calls to the Kubernetes API that replace executors which find no spot node: whether a node is on its way for one,
//! and its deletion. Spark then requests another one.

use std::sync::Arc;
use std::time::Duration;

use balancer_core::JobId;
use balancer_runtime::cluster;
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Preconditions};
use kube::{Api, Client};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::fallback::{Checked, Deletion, Failure};
use crate::leader::Leadership;
use crate::stuck::PodVersion;
use crate::watch::WatchedPod;

/// Requests at once, for all jobs.
const MAX_REQUESTS: usize = 8;
/// Requests at once for one job.
const MAX_REQUESTS_OF_JOB: usize = 4;
/// The most that one request may take, once it has its turn.
const LIMIT: Duration = Duration::from_secs(5);
/// The most that the requests of one step may take.
const STEP_LIMIT: Duration = Duration::from_secs(60);
/// The most Events of a pod that are read. A pod has a few, because repeated ones are one object.
const MAX_EVENTS: u32 = 200;
/// The reasons of the Events that say that a node is on its way: Karpenter's, and the cluster autoscaler's.
const NODE_COMES: [&str; 2] = ["Nominated", "TriggeredScaleUp"];
/// The reason of the Event that says that no node is on its way. Karpenter nominates a node before the cloud has agreed to
/// it, and again every three minutes. If the cloud refuses, this Event follows.
const NO_NODE_COMES: &str = "FailedScheduling";

/// The calls under way: those of one step for each job.
pub(crate) struct PodCalls {
    client: Client,
    leadership: Leadership,
    permits: Arc<Semaphore>,
    tasks: JoinSet<Answer>,
}

/// What the API has answered about the pods of one job.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) job: Arc<JobId>,
    pub(crate) result: Result,
    /// Why a call has failed.
    pub(crate) error: Option<String>,
}

#[derive(Debug)]
pub(crate) enum Result {
    Checked(Checked),
    Deleted(Vec<(PodVersion, Deletion)>),
}

/// A call that has failed.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("the Kubernetes API returned an error: {0}")]
    Api(#[source] Box<kube::Error>),
    #[error("the Kubernetes API did not answer within {0:?}")]
    TimedOut(Duration),
    #[error("another process leads, or may lead")]
    LeadsNoMore,
}

impl PodCalls {
    pub(crate) fn new(client: Client, leadership: Leadership) -> Self {
        Self { client, leadership, permits: Arc::new(Semaphore::new(MAX_REQUESTS)), tasks: JoinSet::new() }
    }

    /// Asks whether nodes are on their way for these pods: whether Events say so that are not older than `within`.
    pub(crate) fn check(&mut self, job: &Arc<JobId>, pods: Vec<PodVersion>, within: Duration) {
        let (job, permits) = (Arc::clone(job), Arc::clone(&self.permits));
        let events = Api::<Event>::namespaced(self.client.clone(), &job.namespace);
        self.tasks.spawn(async move {
            let (mut checked, mut error) = (Checked::default(), None);
            let mut answers = stream::iter(pods)
                .map(|pod| async { (is_node_coming(&events, &pod, within, &permits).await, pod) })
                .buffer_unordered(MAX_REQUESTS_OF_JOB);
            let all = async {
                while let Some((is_coming, pod)) = answers.next().await {
                    match is_coming {
                        Ok(true) => checked.served.push(pod),
                        Ok(false) => checked.clear.push(pod),
                        Err(failed) => {
                            checked.failure = checked.failure.max(Some(failed.failure()));
                            error = Some(cluster::chain(&failed));
                        }
                    }
                }
            };
            // A pod that was not reached in time is asked about again.
            let _ = timeout(STEP_LIMIT, all).await;
            drop(answers);
            Answer { job, result: Result::Checked(checked), error }
        });
    }

    /// Deletes these pods, if they are still as they were, for as long as this process leads.
    pub(crate) fn delete(&mut self, job: &Arc<JobId>, pods: Vec<PodVersion>) {
        let (job, permits) = (Arc::clone(job), Arc::clone(&self.permits));
        let api = Api::<WatchedPod>::namespaced(self.client.clone(), &job.namespace);
        let (leadership, term) = (self.leadership.clone(), self.leadership.term());
        self.tasks.spawn(async move {
            let (mut deleted, mut error) = (Vec::with_capacity(pods.len()), None);
            let mut answers = stream::iter(pods)
                .map(|pod| async {
                    let _permit = permits.acquire().await;
                    // The API cannot refuse a deletion of a former leader, and the pod may have waited for its turn.
                    let leads = term.is_some() && leadership.term() == term;
                    (if leads { delete(&api, &pod).await } else { Err(CallError::LeadsNoMore) }, pod)
                })
                .buffer_unordered(MAX_REQUESTS_OF_JOB);
            let all = async {
                while let Some((answer, pod)) = answers.next().await {
                    let deletion = answer.unwrap_or_else(|failed| {
                        let failure = failed.failure();
                        error = Some(cluster::chain(&failed));
                        Deletion::Failed(failure)
                    });
                    deleted.push((pod, deletion));
                }
            };
            let _ = timeout(STEP_LIMIT, all).await;
            drop(answers);
            Answer { job, result: Result::Deleted(deleted), error }
        });
    }

    /// The next answer; never if no call is under way.
    pub(crate) async fn next(&mut self) -> Answer {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(answer)) => return answer,
                // A panic is a defect. The job goes on once it takes its calls for lost.
                Some(Err(error)) => tracing::error!(%error, "a call about a pod panicked"),
                None => std::future::pending().await,
            }
        }
    }
}

async fn is_node_coming(
    events: &Api<Event>,
    pod: &PodVersion,
    within: Duration,
    permits: &Semaphore,
) -> std::result::Result<bool, CallError> {
    let params = ListParams::default().fields(&format!("involvedObject.uid={}", pod.uid)).limit(MAX_EVENTS);
    // The semaphore is never closed.
    let _permit = permits.acquire().await;
    let list = request(events.list(&params)).await?;
    // The rest may say anything.
    let has_more = list.metadata.continue_.is_some_and(|token| !token.is_empty());
    let now = Timestamp::now();
    Ok(has_more || say_that_a_node_comes(&list.items, within, now))
}

fn say_that_a_node_comes(events: &[Event], within: Duration, now: Timestamp) -> bool {
    let is_withdrawn = |event: &Event| events.iter().any(|other| withdraws(other, event));
    events.iter().any(|event| says_that_a_node_comes(event, within, now) && !is_withdrawn(event))
}

/// Whether what has announced a node says later that it has none. The scheduler's own Events do not count: it finds no node
/// until the new one is ready.
fn withdraws(event: &Event, announcement: &Event) -> bool {
    let is_same = reporter(event).is_some_and(|reporter_of_event| reporter(announcement) == Some(reporter_of_event));
    let is_later = last_time(announcement).is_some_and(|announced| last_time(event).is_some_and(|at| at > announced));
    event.reason.as_deref() == Some(NO_NODE_COMES) && is_same && is_later
}

/// What has created the Event.
fn reporter(event: &Event) -> Option<&str> {
    let source = event.source.as_ref().and_then(|source| source.component.as_deref());
    event.reporting_component.as_deref().filter(|name| !name.is_empty()).or(source)
}

fn says_that_a_node_comes(event: &Event, within: Duration, now: Timestamp) -> bool {
    if !event.reason.as_deref().is_some_and(|reason| NODE_COMES.contains(&reason)) {
        return false;
    }
    // One without a time may be new, and so may one of a clock that is ahead.
    let age = last_time(event).map(|last| Duration::try_from(now.duration_since(last)).unwrap_or_default());
    age.is_none_or(|age| age <= within)
}

fn last_time(event: &Event) -> Option<Timestamp> {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time.as_ref()).map(|time| time.0);
    let times =
        [series, event.last_timestamp.as_ref().map(|time| time.0), event.event_time.as_ref().map(|time| time.0)];
    times.into_iter().flatten().max()
}

async fn delete(pods: &Api<WatchedPod>, pod: &PodVersion) -> std::result::Result<Deletion, CallError> {
    let preconditions =
        Preconditions { uid: Some(pod.uid.clone()), resource_version: Some(pod.resource_version.clone()) };
    let params = DeleteParams::default().preconditions(preconditions);
    match request(pods.delete(&pod.name, &params)).await {
        Ok(_) => Ok(Deletion::Deleted),
        Err(CallError::Api(error)) => match *error {
            kube::Error::Api(status) if status.code == 404 => Ok(Deletion::Gone),
            kube::Error::Api(status) if status.code == 409 => Ok(Deletion::Changed),
            error => Err(CallError::Api(Box::new(error))),
        },
        Err(error) => Err(error),
    }
}

async fn request<T>(request: impl Future<Output = kube::Result<T>>) -> std::result::Result<T, CallError> {
    match timeout(LIMIT, request).await {
        Ok(answer) => answer.map_err(|error| CallError::Api(Box::new(error))),
        Err(_) => Err(CallError::TimedOut(LIMIT)),
    }
}

impl CallError {
    fn failure(&self) -> Failure {
        match self {
            Self::Api(error) => match &**error {
                kube::Error::Api(status) if status.code == 403 => Failure::Forbidden,
                _ => Failure::Unavailable,
            },
            Self::TimedOut(_) | Self::LeadsNoMore => Failure::Unavailable,
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};
    use tokio::time::{Instant, sleep};
    use tower_test::mock;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_process_that_no_longer_leads_deletes_nothing_more() {
        let (service, mut api) = mock::pair::<Request<Body>, Response<Body>>();
        let leadership = Leadership::until(Instant::now() + LIMIT / 2);
        let mut calls = PodCalls::new(Client::new(service, "etl"), leadership);
        let job = Arc::new(JobId { namespace: "etl".into(), app_id: "j".into() });
        let pod = |id| PodVersion { name: format!("e{id}"), uid: format!("u{id}"), resource_version: "7".into() };
        calls.delete(&job, (0..MAX_REQUESTS_OF_JOB + 2).map(pod).collect());
        let server = tokio::spawn(async move {
            let mut waiting = Vec::new();
            while waiting.len() < MAX_REQUESTS_OF_JOB {
                waiting.extend(api.next_request().await.map(|(_, send)| send));
            }
            sleep(LIMIT * 3 / 4).await;
            for send in waiting {
                send.send_response(Response::new(Body::from(br#"{"kind": "Status", "status": "Success"}"#.to_vec())));
            }
            api.next_request().await.is_some()
        });
        let Result::Deleted(deleted) = calls.next().await.result else { panic!("no deletions") };
        drop(calls);
        let of = |meant| deleted.iter().filter(|(_, deletion)| *deletion == meant).count();
        assert_eq!(of(Deletion::Deleted), MAX_REQUESTS_OF_JOB);
        assert_eq!(of(Deletion::Failed(Failure::Unavailable)), 2);
        assert!(!server.await.expect("the requests"), "a deletion of a former leader");
    }

    #[test]
    fn an_event_about_a_node_counts_by_the_last_time_that_it_has() {
        let now: Timestamp = "2026-01-01T00:10:00Z".parse().expect("a time");
        let says = |reason: &str, times: Value| {
            let mut event = json!({"metadata": {}, "involvedObject": {}, "reason": reason});
            for (key, value) in times.as_object().expect("times") {
                event[key] = value.clone();
            }
            let event = serde_json::from_value(event).expect("an Event");
            says_that_a_node_comes(&event, Duration::from_secs(120), now)
        };
        let (old, new) = ("2026-01-01T00:01:00Z", "2026-01-01T00:08:30Z");
        let (old_micro, new_micro) = ("2026-01-01T00:01:00.000000Z", "2026-01-01T00:08:30.000000Z");
        assert!(says("Nominated", json!({"lastTimestamp": new})));
        assert!(says("TriggeredScaleUp", json!({"eventTime": new_micro})));
        assert!(says("Nominated", json!({"eventTime": old_micro, "series": {"lastObservedTime": new_micro}})));
        assert!(says("Nominated", json!({"lastTimestamp": "2026-01-01T00:11:00Z"})), "a clock that is ahead");
        assert!(says("Nominated", json!({})));
        assert!(!says("Nominated", json!({"firstTimestamp": old, "lastTimestamp": old, "eventTime": old_micro})));
        assert!(!says("FailedScheduling", json!({"lastTimestamp": new})));
    }

    #[test]
    fn a_node_whose_announcer_says_later_that_it_has_none_does_not_come() {
        let now: Timestamp = "2026-01-01T00:10:00Z".parse().expect("a time");
        let event = |(reason, from, seconds): (&str, &str, u32)| -> Event {
            let at = format!("2026-01-01T00:09:{seconds:02}Z");
            let event = json!({
                "metadata": {}, "involvedObject": {}, "reason": reason, "lastTimestamp": at, "source": {"component": from},
            });
            serde_json::from_value(event).expect("an Event")
        };
        let say = |events: &[(&str, &str, u32)]| {
            let events: Vec<Event> = events.iter().copied().map(event).collect();
            say_that_a_node_comes(&events, Duration::from_secs(600), now)
        };
        let nominated = ("Nominated", "karpenter", 20);
        assert!(say(&[("FailedScheduling", "karpenter", 10), nominated]));
        assert!(!say(&[("FailedScheduling", "karpenter", 21), nominated]));
        assert!(say(&[("FailedScheduling", "default-scheduler", 30), nominated]), "it waits for the node");
        assert!(say(&[("FailedScheduling", "karpenter", 20), nominated]), "which one is later is not known");
        assert!(say(&[("FailedScheduling", "karpenter", 30), ("TriggeredScaleUp", "cluster-autoscaler", 20)]));
    }
}
