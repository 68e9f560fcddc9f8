//! HTTP: paths, methods, content types, bodies and statuses.

use std::sync::Arc;

use balancer_core::ReviewError;
use balancer_store::Ledger;
use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Body, Incoming};

use crate::admit::{Admission, Hook};
use crate::body::{BodyError, BodyMemory, MAX_BODY, Reservation};
use crate::metrics::{Metrics, RejectReason};
use crate::tokens::Tokens;

const NO_SUCH_PATH: &str = "no such path; accepted: /mutate, /validate and /health\n";
const NO_SUCH_PATH_WITH_TOKENS: &str =
    "no such path; accepted: /mutate/ and /validate/, each with the admission token, and /health\n";

/// Where a path leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Review(Hook),
    Health,
    Nowhere(RejectReason),
}

impl Target {
    /// `path` is as it was sent: a token is not percent-decoded.
    fn of(path: &str, tokens: Option<&Tokens>) -> Self {
        if path == "/health" {
            return Self::Health;
        }
        let (hook, rest) = match (path.strip_prefix("/mutate"), path.strip_prefix("/validate")) {
            (Some(rest), _) => (Hook::Mutate, rest),
            (_, Some(rest)) => (Hook::Validate, rest),
            _ => return Self::Nowhere(RejectReason::Path),
        };
        match (tokens, rest.strip_prefix('/')) {
            (None, None) if rest.is_empty() => Self::Review(hook),
            (Some(tokens), Some(token)) if tokens.accept(token) => Self::Review(hook),
            (Some(_), Some(_)) => Self::Nowhere(RejectReason::Token),
            (Some(_), None) if rest.is_empty() => Self::Nowhere(RejectReason::Token),
            _ => Self::Nowhere(RejectReason::Path),
        }
    }
}

/// Answers HTTP requests.
#[derive(Debug)]
pub struct Router<L> {
    admission: Arc<Admission<L>>,
    tokens: Option<Arc<Tokens>>,
    metrics: Arc<Metrics>,
    body_memory: Arc<BodyMemory>,
}

impl<L> Clone for Router<L> {
    fn clone(&self) -> Self {
        Self {
            admission: Arc::clone(&self.admission),
            tokens: self.tokens.clone(),
            metrics: Arc::clone(&self.metrics),
            body_memory: Arc::clone(&self.body_memory),
        }
    }
}

impl<L: Ledger> Router<L> {
    /// A router that passes reviews to `admission`, only those that have one of the tokens if there are any.
    pub fn new(admission: Arc<Admission<L>>, tokens: Option<Arc<Tokens>>, metrics: Arc<Metrics>) -> Self {
        Self { admission, tokens, metrics, body_memory: Arc::default() }
    }

    pub(crate) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// The router for another connection, with memory of its own for small bodies.
    pub(crate) fn for_connection(&self) -> Self {
        Self { body_memory: Arc::new(self.body_memory.another_connection()), ..self.clone() }
    }

    /// The memory for the bodies of its connection.
    pub(crate) fn body_memory(&self) -> &Arc<BodyMemory> {
        &self.body_memory
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
        let tokens = self.tokens.as_deref();
        let (accepted, hook) = match Target::of(request.uri().path(), tokens) {
            Target::Review(hook) => (Method::POST, Some(hook)),
            Target::Health => (Method::GET, None),
            // A wrong token gets the same answer as any other path.
            Target::Nowhere(reason) => {
                let text = if tokens.is_some() { NO_SUCH_PATH_WITH_TOKENS } else { NO_SUCH_PATH };
                return self.reject(reason, StatusCode::NOT_FOUND, text);
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
        if body.size_hint().lower() > MAX_BODY as u64 {
            return Err(self.reject_body(&BodyError::TooLarge));
        }
        self.body_memory.read(body).await.map_err(|error| self.reject_body(&error))
    }

    fn reject_body(&self, error: &BodyError) -> Response<Full<Bytes>> {
        let (reason, status) = match error {
            BodyError::TooLarge => (RejectReason::TooLarge, StatusCode::PAYLOAD_TOO_LARGE),
            BodyError::Incomplete(_) => (RejectReason::Body, StatusCode::BAD_REQUEST),
            BodyError::TooSlow => (RejectReason::Body, StatusCode::REQUEST_TIMEOUT),
            BodyError::NoMemory => (RejectReason::Body, StatusCode::SERVICE_UNAVAILABLE),
        };
        let mut answer = self.reject(reason, status, format!("{error}\n"));
        // The rest of the body is not read.
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        answer
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

#[cfg(test)]
mod tests {
    use super::*;

    use http::Uri;
    use prometheus_client::metrics::counter::Counter;

    const CURRENT: &str = "0123456789abcdef";
    const NEXT: &str = "fedcba9876543210";

    fn target(uri: &str, tokens: Option<&Tokens>) -> Target {
        let uri: Uri = uri.parse().expect("a URI");
        Target::of(uri.path(), tokens)
    }

    fn tokens() -> Tokens {
        let file = std::env::temp_dir().join(format!("spot-balancer-routes-{}", std::process::id()));
        std::fs::write(&file, format!("{CURRENT}\n{NEXT}\n")).expect("the file can be written");
        Tokens::load(file, Counter::default()).expect("two tokens")
    }

    #[test]
    fn without_tokens_reviews_are_accepted_at_the_plain_paths_only() {
        for (uri, expected) in [
            ("/mutate", Target::Review(Hook::Mutate)),
            ("/mutate?timeout=3s", Target::Review(Hook::Mutate)),
            ("/validate", Target::Review(Hook::Validate)),
            ("/health", Target::Health),
            ("/mutate/", Target::Nowhere(RejectReason::Path)),
            ("/mutate/0123456789abcdef", Target::Nowhere(RejectReason::Path)),
            ("/mutates", Target::Nowhere(RejectReason::Path)),
            ("/", Target::Nowhere(RejectReason::Path)),
        ] {
            assert_eq!(target(uri, None), expected, "{uri}");
        }
    }

    #[test]
    fn with_tokens_reviews_need_one_of_them_and_health_needs_none() {
        let tokens = tokens();
        for (uri, expected) in [
            ("/mutate/0123456789abcdef", Target::Review(Hook::Mutate)),
            ("/mutate/fedcba9876543210?timeout=3s", Target::Review(Hook::Mutate)),
            ("/validate/0123456789abcdef?", Target::Review(Hook::Validate)),
            ("https://webhook.svc:443/validate/fedcba9876543210", Target::Review(Hook::Validate)),
            ("/health", Target::Health),
        ] {
            assert_eq!(target(uri, Some(&tokens)), expected, "{uri}");
        }
        for uri in [
            "/mutate",
            "/validate",
            "/mutate?token=0123456789abcdef",
            "/mutate/",
            "/mutate/0123456789abcde",
            "/mutate/0123456789abcdeg",
            "/mutate/0123456789abcdef0",
            "/mutate/0123456789abcdef/",
            "/mutate//0123456789abcdef",
            "/mutate/0123456789ABCDEF",
            "/mutate/%30123456789abcdef",
            "/mutate/0123456789abcde%66",
            "/mutate/../mutate/0123456789abcdef",
            "/mutate/0123456789abcdef%3Ftimeout=3s",
            "/mutate/0123456789abcdeffedcba9876543210",
        ] {
            assert_eq!(target(uri, Some(&tokens)), Target::Nowhere(RejectReason::Token), "{uri}");
        }
        for uri in ["/0123456789abcdef", "/Mutate/0123456789abcdef", "/mutates", "//mutate/0123456789abcdef"] {
            assert_eq!(target(uri, Some(&tokens)), Target::Nowhere(RejectReason::Path), "{uri}");
        }
    }
}
