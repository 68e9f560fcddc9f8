//! HTTP: paths, methods, content types, bodies and statuses.

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
use crate::metrics::{Metrics, RejectReason};

/// The largest body. The apiserver accepts objects of up to 3 MiB, and a review adds little to one.
pub const MAX_BODY: usize = 4 << 20;
/// Memory for all bodies together, in KiB. The review of an executor has 8.5 KB.
const MAX_ALL_BODIES_KIB: usize = 64 << 10;
/// From the end of a request's head to the end of its body.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// Memory that is reserved for a body.
type Reservation<'a> = Option<SemaphorePermit<'a>>;

/// Answers HTTP requests.
#[derive(Debug)]
pub struct Router<L> {
    admission: Arc<Admission<L>>,
    metrics: Arc<Metrics>,
    body_memory: Arc<Semaphore>,
}

impl<L> Clone for Router<L> {
    fn clone(&self) -> Self {
        Self {
            admission: Arc::clone(&self.admission),
            metrics: Arc::clone(&self.metrics),
            body_memory: Arc::clone(&self.body_memory),
        }
    }
}

impl<L: Ledger> Router<L> {
    /// A router that passes reviews to `admission`.
    pub fn new(admission: Arc<Admission<L>>, metrics: Arc<Metrics>) -> Self {
        Self { admission, metrics, body_memory: Arc::new(Semaphore::new(MAX_ALL_BODIES_KIB)) }
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Answers one request. Every request gets an answer.
    pub async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let is_head = request.method() == Method::HEAD;
        let mut answer = self.respond(request).await;
        if is_head {
            // Over HTTP/2, hyper would send the body, and the client would then reject the answer.
            *answer.body_mut() = Full::default();
        }
        answer
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (accepted, hook) = match request.uri().path() {
            "/mutate" => (Method::POST, Some(Hook::Mutate)),
            "/validate" => (Method::POST, Some(Hook::Validate)),
            "/health" => (Method::GET, None),
            _ => {
                let text = "no such path; accepted: /mutate, /validate and /health\n";
                return self.reject(RejectReason::Path, StatusCode::NOT_FOUND, text);
            }
        };
        if *request.method() != accepted {
            let text = format!("{} is not allowed here; accepted: {accepted}\n", request.method());
            let mut answer = self.reject(RejectReason::Method, StatusCode::METHOD_NOT_ALLOWED, text);
            answer
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static(if accepted == Method::GET { "GET" } else { "POST" }));
            return answer;
        }
        let Some(hook) = hook else { return json(Bytes::from_static(br#"{"status":"healthy"}"#)) };
        let (body, _reservation) = match self.body(request).await {
            Ok(body) => body,
            Err(rejection) => return rejection,
        };
        self.admission
            .answer(hook, &body)
            .await
            .map_or_else(|error| self.reject_review(&error), |reply| json(Bytes::from(reply)))
    }

    /// The whole body, with the reservation of its memory.
    async fn body(&self, request: Request<Incoming>) -> Result<(Bytes, Reservation<'_>), Response<Full<Bytes>>> {
        let kind = request.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
        let essence = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
        if !essence.eq_ignore_ascii_case(b"application/json") {
            return Err(self.reject(
                RejectReason::ContentType,
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "the content type is not supported; accepted: Content-Type: application/json\n",
            ));
        }
        let body = request.into_body();
        let too_large = || {
            let mut answer = self.reject(
                RejectReason::TooLarge,
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body is too large; accepted: at most {MAX_BODY} bytes\n"),
            );
            // The rest of the body is not read.
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            answer
        };
        if body.size_hint().lower() > MAX_BODY as u64 {
            return Err(too_large());
        }
        let size = usize::try_from(body.size_hint().upper().unwrap_or(u64::MAX)).unwrap_or(MAX_BODY).min(MAX_BODY);
        let read = async {
            let reservation = self.body_memory.acquire_many((size / 1024 + 1) as u32).await.ok();
            let body = Limited::new(body, MAX_BODY).collect().await?.to_bytes();
            Ok::<_, Box<dyn Error + Send + Sync>>((body, reservation))
        };
        match tokio::time::timeout(BODY_LIMIT, read).await {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(_)) => Err(self.reject(RejectReason::Body, StatusCode::BAD_REQUEST, "the body is incomplete\n")),
            Err(_) => Err(self.reject(
                RejectReason::Body,
                StatusCode::REQUEST_TIMEOUT,
                format!("the body was not complete within {} s\n", BODY_LIMIT.as_secs()),
            )),
        }
    }

    fn reject_review(&self, error: &ReviewError) -> Response<Full<Bytes>> {
        tracing::warn!(%error, "rejected a request that is not a valid AdmissionReview");
        self.reject(RejectReason::Review, StatusCode::BAD_REQUEST, format!("{error}\n"))
    }

    fn reject(&self, reason: RejectReason, status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
        self.metrics.rejected(reason);
        let mut answer = Response::new(Full::new(text.into()));
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
