//! HTTP, and only HTTP: paths, methods, content types, bodies and statuses (DESIGN section 4).

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use balancer_core::ReviewError;
use balancer_store::Ledger;
use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::admit::{Admission, Hook};
use crate::metrics::{Metrics, Refusal};

/// The apiserver takes objects of 3 MiB at most; a review adds little to one.
pub const BODY_CAP: usize = 4 << 20;
/// What bodies may take of memory, all together; a real review is 8.5 KB.
const ALL_BODIES_KIB: usize = 64 << 10;
/// From a request's head to the end of its body.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// A part of the room for bodies.
type Room<'a> = Option<SemaphorePermit<'a>>;

/// Answers requests.
#[derive(Debug)]
pub struct Router<L> {
    admission: Arc<Admission<L>>,
    metrics: Arc<Metrics>,
    room_for_bodies: Arc<Semaphore>,
}

impl<L> Clone for Router<L> {
    fn clone(&self) -> Self {
        Self {
            admission: Arc::clone(&self.admission),
            metrics: Arc::clone(&self.metrics),
            room_for_bodies: Arc::clone(&self.room_for_bodies),
        }
    }
}

impl<L: Ledger> Router<L> {
    /// A router to `admission`.
    pub fn new(admission: Arc<Admission<L>>, metrics: Arc<Metrics>) -> Self {
        Self { admission, metrics, room_for_bodies: Arc::new(Semaphore::new(ALL_BODIES_KIB)) }
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Answers one request; every request gets an answer.
    pub async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let bare = request.method() == Method::HEAD;
        let mut answer = self.respond(request).await;
        if bare {
            // Over HTTP/2, hyper would send it, and the client drop the answer for it.
            *answer.body_mut() = Full::default();
        }
        answer
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (accepted, hook) = match request.uri().path() {
            "/mutate" => (Method::POST, Some(Hook::Mutate)),
            "/validate" => (Method::POST, Some(Hook::Validate)),
            "/health" => (Method::GET, None),
            _ => return self.refuse(Refusal::Path, StatusCode::NOT_FOUND, "here are /mutate, /validate and /health\n"),
        };
        if *request.method() != accepted {
            let sentence = format!("accepted: {accepted}\n");
            let mut answer = self.refuse(Refusal::Method, StatusCode::METHOD_NOT_ALLOWED, sentence);
            answer
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static(if accepted == Method::GET { "GET" } else { "POST" }));
            return answer;
        }
        let Some(hook) = hook else { return json(Bytes::from_static(br#"{"status":"healthy"}"#)) };
        let (body, _room) = match self.body(request).await {
            Ok(body) => body,
            Err(refusal) => return refusal,
        };
        self.admission
            .answer(hook, &body)
            .await
            .map_or_else(|error| self.refuse_review(&error), |reply| json(Bytes::from(reply)))
    }

    /// The whole body, and the room in memory that it takes for as long as it is looked at.
    async fn body(&self, request: Request<Incoming>) -> Result<(Bytes, Room<'_>), Response<Full<Bytes>>> {
        let kind = request.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        let essence = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        if !essence.eq_ignore_ascii_case(b"application/json") {
            return Err(self.refuse(
                Refusal::ContentType,
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "accepted: Content-Type: application/json\n",
            ));
        }
        let body = request.into_body();
        let too_large = || {
            let mut answer = self.refuse(
                Refusal::TooLarge,
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body is too large; accepted: at most {BODY_CAP} bytes\n"),
            );
            // What is left of the body is not worth reading.
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            answer
        };
        if body.size_hint().lower() > BODY_CAP as u64 {
            return Err(too_large());
        }
        let most = usize::try_from(body.size_hint().upper().unwrap_or(u64::MAX)).unwrap_or(BODY_CAP).min(BODY_CAP);
        let read = async {
            let room = self.room_for_bodies.acquire_many((most / 1024 + 1) as u32).await.ok();
            let body = Limited::new(body, BODY_CAP).collect().await?.to_bytes();
            Ok::<_, Box<dyn Error + Send + Sync>>((body, room))
        };
        match tokio::time::timeout(BODY_LIMIT, read).await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(_)) => Err(self.refuse(Refusal::Body, StatusCode::BAD_REQUEST, "the body broke off\n")),
            Err(_) => Err(self.refuse(
                Refusal::Body,
                StatusCode::REQUEST_TIMEOUT,
                format!("the body did not come within {} s\n", BODY_LIMIT.as_secs()),
            )),
        }
    }

    fn refuse_review(&self, error: &ReviewError) -> Response<Full<Bytes>> {
        tracing::warn!(%error, "not an admission");
        self.refuse(Refusal::Review, StatusCode::BAD_REQUEST, format!("{error}\n"))
    }

    fn refuse(&self, reason: Refusal, status: StatusCode, sentence: impl Into<Bytes>) -> Response<Full<Bytes>> {
        self.metrics.refused(reason);
        let mut answer = Response::new(Full::new(sentence.into()));
        *answer.status_mut() = status;
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        answer
    }
}

fn json(body: Bytes) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(body));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
