//! Serves `/jobs` and the page of jobs on the loopback address, for `kubectl port-forward`.

use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use balancer_runtime::http_port::{Answer, HttpPort, refuse_method, text};
use balancer_runtime::tasks::{Task, Tasks};
use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HOST, HeaderName, IF_NONE_MATCH,
    REFERRER_POLICY, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::listing::{Query, QueryError};
use super::view::{Jobs, NoFacts, Reader};

/// The port if none is chosen.
pub const PORT: u16 = 8081;

const HTML: &str = include_str!("page/index.html");
const CSS: &str = include_str!("page/page.css");
const JS: &str = include_str!("page/page.js");

/// Sent with each answer. The page loads nothing from elsewhere, runs no script that a job's name could contain, and appears
/// in no other page. Connections end after an answer, so that none is cut off at its limit.
const HEADERS: [(HeaderName, &str); 8] = [
    (CACHE_CONTROL, "no-store"),
    (CONNECTION, "close"),
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (REFERRER_POLICY, "no-referrer"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
];

/// The names under which a browser reaches the loopback address. A website whose own name resolves to it is refused: it
/// could read the answers otherwise.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// The bound port of the page.
#[derive(Debug)]
pub struct JobsPage {
    port: Arc<HttpPort>,
    source: Source,
}

impl JobsPage {
    /// Binds the port on the loopback address.
    ///
    /// # Errors
    /// The port is in use, or not permitted.
    pub async fn bind(port: u16, reader: Reader) -> io::Result<Self> {
        let port = Arc::new(HttpPort::bind_loopback(port).await?);
        Ok(Self { port, source: Source { reader, listing: Arc::default() } })
    }

    /// The address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// Serves until dropped, also after a panic.
    pub async fn keep_serving(self, tasks: Tasks) -> Infallible {
        tasks.keep(Task::JobsPage, || Arc::clone(&self.port).serve(self.source.clone())).await
    }
}

#[derive(Clone, Debug)]
struct Source {
    reader: Reader,
    /// Held while jobs are sorted and encoded, so that many requests at once use one thread.
    listing: Arc<Mutex<()>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Refusal<'a> {
    error: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    leader: Option<&'a str>,
}

impl Answer for Source {
    async fn answer(self, request: Request<()>) -> Response<Full<Bytes>> {
        let mut answer = self.route(&request).await;
        for (name, value) in HEADERS {
            answer.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        answer
    }
}

impl Source {
    async fn route(self, request: &Request<()>) -> Response<Full<Bytes>> {
        if !is_local(request) {
            let accepted = "this host name is not accepted; accepted: localhost, 127.0.0.1 and [::1]\n";
            return text(StatusCode::MISDIRECTED_REQUEST, accepted);
        }
        if let Some(refusal) = refuse_method(request.method()) {
            return refusal;
        }
        match request.uri().path() {
            "/" => file("text/html; charset=utf-8", HTML),
            "/page.css" => file("text/css; charset=utf-8", CSS),
            "/page.js" => file("text/javascript; charset=utf-8", JS),
            "/jobs" => self.jobs(request).await,
            _ => text(StatusCode::NOT_FOUND, "no such path; accepted: / and /jobs\n"),
        }
    }

    async fn jobs(mut self, request: &Request<()>) -> Response<Full<Bytes>> {
        let query = match Query::parse(request.uri().query().unwrap_or_default()) {
            Ok(query) => query,
            Err(error) => return refused(&error),
        };
        let jobs = match self.reader.read().await {
            Ok(jobs) => jobs,
            Err(reason) => return unavailable(&reason),
        };
        let known = request.headers().get(IF_NONE_MATCH).cloned();
        let turn = self.listing.lock_owned().await;
        let listed = spawn_blocking(move || {
            let _turn = turn;
            list(&query, &jobs, known.as_ref())
        });
        listed.await.unwrap_or_else(|_| text(StatusCode::INTERNAL_SERVER_ERROR, "the jobs cannot be listed\n"))
    }
}

fn list(query: &Query, jobs: &Jobs, known: Option<&HeaderValue>) -> Response<Full<Bytes>> {
    let body = json(StatusCode::OK, &query.page(jobs));
    let (mut head, bytes) = body;
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let Ok(tag) = HeaderValue::try_from(format!("\"{:016x}\"", hasher.finish())) else { return head };
    let is_known = known == Some(&tag);
    head.headers_mut().insert(ETAG, tag);
    if is_known {
        *head.status_mut() = StatusCode::NOT_MODIFIED;
    } else {
        *head.body_mut() = Full::new(bytes);
    }
    head
}

/// An answer without its body, and the body.
fn json(status: StatusCode, value: &impl Serialize) -> (Response<Full<Bytes>>, Bytes) {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // Maps with keys that are no text, and numbers that are none, do not occur.
    (answer, serde_json::to_vec(value).unwrap_or_default().into())
}

fn refused(error: &QueryError) -> Response<Full<Bytes>> {
    let error = error.to_string();
    let (answer, body) = json(StatusCode::BAD_REQUEST, &Refusal { error: &error, leader: None });
    answer.map(|_| Full::new(body))
}

fn unavailable(reason: &NoFacts) -> Response<Full<Bytes>> {
    let leader = match reason {
        NoFacts::Follows(leader) => Some(&**leader),
        NoFacts::StandsBy | NoFacts::Nothing => None,
    };
    let error = reason.to_string();
    let (mut answer, body) = json(StatusCode::SERVICE_UNAVAILABLE, &Refusal { error: &error, leader });
    answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("2"));
    answer.map(|_| Full::new(body))
}

fn file(kind: &'static str, content: &'static str) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from_static(content.as_bytes())));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

fn is_local(request: &Request<()>) -> bool {
    let Some(host) = request.headers().get(HOST).and_then(|host| host.to_str().ok()) else { return false };
    // The brackets of an IPv6 address contain colons.
    let name = host.rsplit_once(':').filter(|(_, port)| !port.contains(']')).map_or(host, |(name, _)| name);
    LOCAL_NAMES.iter().any(|local| local.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::super::view::channel;
    use super::*;
    use crate::jobs::JobFacts;

    use http_body_util::BodyExt;
    use serde_json::Value;

    async fn get(reader: &Reader, path: &str, headers: &[(HeaderName, &str)]) -> Response<Full<Bytes>> {
        let mut request = Request::builder().uri(path);
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        if headers.iter().all(|(name, _)| name != HOST) {
            request = request.header(HOST, "localhost:8081");
        }
        let source = Source { reader: reader.clone(), listing: Arc::default() };
        source.answer(request.body(()).expect("a request")).await
    }

    async fn body(answer: Response<Full<Bytes>>) -> Value {
        let bytes = answer.into_body().collect().await.expect("a body").to_bytes();
        serde_json::from_slice(&bytes).unwrap_or(Value::Null)
    }

    #[tokio::test]
    async fn jobs_are_answered_once_until_they_change() {
        let (publisher, reader) = channel();
        let publish = |spot| publisher.publish(Arc::new([Arc::new(JobFacts { spot, ..JobFacts::default() })]));
        publish(1);
        let first = get(&reader, "/jobs", &[]).await;
        let tag = first.headers().get(ETAG).cloned().expect("a tag");
        assert_eq!(body(first).await["jobs"][0]["spot"], 1);
        publish(1);
        let known = tag.to_str().expect("text").to_owned();
        let same = get(&reader, "/jobs", &[(IF_NONE_MATCH, &known)]).await;
        assert_eq!((same.status(), same.headers().get(ETAG)), (StatusCode::NOT_MODIFIED, Some(&tag)));
        assert_eq!(body(same).await, Value::Null);
        publish(2);
        let changed = get(&reader, "/jobs", &[(IF_NONE_MATCH, &known)]).await;
        assert_eq!(changed.status(), StatusCode::OK);
        assert_eq!(body(changed).await["jobs"][0]["spot"], 2);
    }

    #[tokio::test]
    async fn a_follower_answers_503_with_the_leader() {
        let (publisher, reader) = channel();
        publisher.stand_by(Some("balancer-reconciler-1_00".into()));
        let answer = get(&reader, "/jobs", &[]).await;
        assert_eq!(
            (answer.status(), &answer.headers()[RETRY_AFTER]),
            (StatusCode::SERVICE_UNAVAILABLE, &HeaderValue::from_static("2"))
        );
        assert_eq!(body(answer).await["leader"], "balancer-reconciler-1_00");
    }

    #[tokio::test]
    async fn another_host_name_is_refused_on_every_path() {
        let (publisher, reader) = channel();
        publisher.publish(Arc::new([]));
        for (host, status) in [
            ("localhost:9000", 200),
            ("LOCALHOST", 200),
            ("127.0.0.1:8081", 200),
            ("[::1]:8081", 200),
            ("[::1]", 200),
            ("attacker.example:8081", 421),
            ("localhost.attacker.example", 421),
            ("127.0.0.1.attacker.example", 421),
            ("", 421),
        ] {
            for path in ["/", "/jobs", "/page.js", "/page.css"] {
                assert_eq!(get(&reader, path, &[(HOST, host)]).await.status(), status, "{host} {path}");
            }
        }
    }

    #[tokio::test]
    async fn every_answer_forbids_scripts_from_elsewhere_and_what_is_not_served_is_refused() {
        let (_publisher, reader) = channel();
        for (path, status) in
            [("/", 200), ("/page.css", 200), ("/page.js", 200), ("/metrics", 404), ("/jobs?limit=0", 400)]
        {
            let answer = get(&reader, path, &[]).await;
            assert_eq!(answer.status(), status, "{path}");
            let policy = answer.headers()[CONTENT_SECURITY_POLICY].to_str().expect("text");
            assert!(
                policy.starts_with("default-src 'none'; script-src 'self';") && !policy.contains("unsafe"),
                "{policy}"
            );
        }
        for text in [HTML, CSS, JS] {
            for elsewhere in ["http:", "https:", "innerHTML", "style=", "onclick", "eval("] {
                assert!(!text.contains(elsewhere), "{elsewhere}");
            }
        }
    }
}
