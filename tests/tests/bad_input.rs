//! Requests straight to the release binary, with no apiserver between: the real reviews, over both
//! protocols, and whatever else may come in at an open port.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use balancer_tests::need;
use balancer_tests::raw::{Body, Connection, Protocol, pieces, tcp, tls, until_closed, whole};
use balancer_tests::redis::RedisServer;
use balancer_tests::reviews::{creation, fixture, patch, patched};
use balancer_tests::scenario::Counts;
use balancer_tests::steady::Steady;
use balancer_tests::wait::until_true;
use balancer_tests::webhook::{Webhook, WebhookOptions};
use futures::future::try_join_all;
use http::{Method, Request};
use redis::AsyncCommands;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, split};
use tokio::sync::RwLock;
use tokio::time::sleep;

/// Held by one while it loads the machine, and shared by those that measure time.
static MACHINE: RwLock<()> = RwLock::const_new(());
/// The largest body that is read.
const CAP: usize = 4 << 20;
/// What an admission may take beside any misbehaviour.
const QUICK: Duration = Duration::from_secs(1);
/// A client that holds up its own request is gone by then.
const PATIENCE: Duration = Duration::from_secs(15);
const BOTH: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];

fn strict() -> Result<WebhookOptions> {
    WebhookOptions::default().env("SPOT_PREFERENCE", "STRICT").without_cluster()
}

async fn ledger(redis: &RedisServer, job: &str) -> Result<Counts> {
    let key = format!("exec-count:{{sandbox:{job}}}");
    let (spot, on_demand): (Option<usize>, Option<usize>) =
        redis.connection().await?.hmget(key, &["spot", "on-demand"]).await?;
    Ok(Counts { spot: spot.unwrap_or(0), on_demand: on_demand.unwrap_or(0) })
}

#[tokio::test]
async fn real_reviews_are_answered_and_counted_over_both_protocols() -> Result<()> {
    need!(Redis, Webhook);
    for protocol in BOTH {
        let redis = RedisServer::start().await?;
        let webhook = Webhook::start(strict()?.redis(&redis)?).await?;
        let mut connection = Connection::open(webhook.port, protocol).await?;
        let mut post = async |path: &str, review: &Value| patch(review, &connection.post(path, review).await?);

        let driver = fixture("k8s-1.36-spark-3.5-create-driver")?;
        assert_eq!(post("/mutate?timeout=10s", &driver).await?, Vec::<Value>::new());
        let policy: String = redis.connection().await?.hget("exec-count:{sandbox:00000003abc}", "policy").await?;
        assert!(policy.starts_with("spot-ratio=0.7 "), "{policy}");

        // The old apiserver's object has no namespace: the ledger's keys get it from the request.
        let (old, new) = ("spark-pi-7abe5c", "spark-pi-dd77a5");
        for name in ["k8s-1.20-spark-3.5-create-executor", "k8s-1.36-spark-3.5-create-executor"] {
            let review = fixture(name)?;
            let patch = post("/mutate?timeout=10s", &review).await?;
            let mut wanted = review["request"]["object"].clone();
            wanted["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "spot", "spark-role": "executor"});
            wanted["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
            assert_eq!(patched(&review, &patch)?, wanted, "{name}");
        }
        let mut fourth = fixture("k8s-1.20-spark-3.5-create-executor")?;
        fourth["request"]["name"] = json!(format!("{old}-exec-4"));
        fourth["request"]["object"]["metadata"]["name"] = json!(format!("{old}-exec-4"));
        post("/mutate?timeout=10s", &fourth).await?;
        assert_eq!(ledger(&redis, old).await?, Counts { spot: 1, on_demand: 1 });
        assert_eq!(ledger(&redis, new).await?, Counts { spot: 1, on_demand: 0 });

        let mut released = Vec::new();
        for (name, job) in [
            ("k8s-1.36-spark-3.5-delete-executor-collection", new),
            ("k8s-1.20-spark-3.5-delete-executor-collection", old),
            ("k8s-1.20-spark-3.5-delete-executor-named", old),
            ("k8s-1.20-spark-3.5-delete-executor-named", old),
            ("k8s-1.20-spark-3.5-delete-executor-named-again", old),
        ] {
            assert_eq!(post("/validate?timeout=10s", &fixture(name)?).await?, Vec::<Value>::new(), "{name}");
            released.push(ledger(&redis, job).await?);
        }
        let (none, one) = (Counts::default(), Counts { spot: 1, on_demand: 0 });
        assert_eq!(released, [none, one, none, none, none]);
        let entries: Vec<String> = redis.connection().await?.hkeys(format!("exec-pods:{{sandbox:{old}}}")).await?;
        assert!(entries.is_empty(), "{entries:?}");
        let counted = [("operation", "delete"), ("outcome", "released")];
        assert_eq!(webhook.metrics().await?.sum("spot_balancer_admissions_total", &counted), Some(3.0));
    }
    Ok(())
}

fn request(method: Method, path: &str, kind: Option<&str>, body: Body) -> Result<Request<Body>> {
    let builder = Request::builder().method(method).uri(path);
    let builder = kind.into_iter().fold(builder, |builder, kind| builder.header("content-type", kind));
    Ok(builder.body(body)?)
}

/// `text` with white space behind it, up to this length.
fn padded(text: &str, length: usize) -> String {
    format!("{text}{}", " ".repeat(length.saturating_sub(text.len())))
}

/// The same bytes, a part at a time.
fn in_pieces(text: &str) -> Body {
    let parts: Vec<_> = text.as_bytes().chunks(64 << 10).map(<[u8]>::to_vec).collect();
    pieces(futures::stream::iter(parts.into_iter().map(Into::into)))
}

#[tokio::test]
async fn each_invalid_request_gets_its_status_and_explanation_and_delays_no_admission() -> Result<()> {
    need!(Webhook);
    let _measuring = MACHINE.read().await;
    let webhook = Webhook::start(strict()?).await?;
    let beside = Steady::start(webhook.port, Protocol::Http1, Duration::from_millis(10));

    let good = creation("good", 1)?;
    let text = good.to_string();
    let review = |change: &dyn Fn(&mut Value)| {
        let mut review = good.clone();
        change(&mut review);
        review.to_string()
    };
    let json = Some("application/json");
    let bodies = [
        ("this is no JSON".to_owned(), "JSON"),
        (String::new(), "JSON"),
        ("\u{0}".to_owned(), "JSON"),
        (text[..text.len() / 2].to_owned(), "JSON"),
        (format!("{text}{text}"), "JSON"),
        (format!("{{\"deep\":{}", "[".repeat(1_000_000)), "JSON"),
        ("[]".to_owned(), "AdmissionReview"),
        ("17".to_owned(), "AdmissionReview"),
        ("null".to_owned(), "AdmissionReview"),
        ("{}".to_owned(), "accepted: AdmissionReview and admission.k8s.io/v1"),
        (
            review(&|review| review["apiVersion"] = json!("admission.k8s.io/v1beta1")),
            "\"admission.k8s.io/v1beta1\"; accepted: ",
        ),
        (review(&|review| review["kind"] = json!("Pod")), "kind is \"Pod\""),
        (review(&|review| review["request"] = json!("request")), "AdmissionReview"),
        (review(&|review| review["request"] = Value::Null), "the AdmissionReview has no request"),
        (review(&|review| review["request"]["uid"] = json!("")), "the AdmissionReview's request has an empty uid"),
        (review(&|review| review["request"]["object"] = json!([])), "AdmissionReview"),
    ];
    let too_large = "accepted: at most 4194304 bytes";
    for protocol in BOTH {
        let ask = async |request: Request<Body>| {
            Ok::<_, anyhow::Error>(Connection::open(webhook.port, protocol).await?.send(request).await?)
        };
        let refused = async |request: Request<Body>, status: u16, sentence: &str| {
            let what = format!("{protocol:?} {} {} {:?}", request.method(), request.uri(), sentence);
            let answer = ask(request).await.with_context(|| what.clone())?;
            ensure!(answer.status == status, "{what}: {answer:?}");
            ensure!(answer.text.contains(sentence), "{what}: {}", answer.text);
            ensure!(
                answer.text.ends_with('\n') && answer.text.lines().count() == 1,
                "{what}: no plain sentence: {answer:?}"
            );
            ensure!(answer.headers["content-type"] == "text/plain; charset=utf-8", "{what}: {answer:?}");
            Ok(answer)
        };
        for (body, sentence) in &bodies {
            for path in ["/mutate", "/validate"] {
                refused(request(Method::POST, path, json, whole(body.clone()))?, 400, sentence).await?;
            }
        }
        for kind in [None, Some(""), Some("text/plain"), Some("application/jsonp"), Some("application/yaml")] {
            let sentence = "accepted: Content-Type: application/json";
            refused(request(Method::POST, "/mutate", kind, whole(text.clone()))?, 415, sentence).await?;
        }
        for path in ["/", "/mutate/", "/Mutate", "/mutates", "//mutate", "/metrics"] {
            refused(request(Method::POST, path, json, whole(text.clone()))?, 404, "/mutate, /validate and /health")
                .await?;
        }
        for method in [Method::GET, Method::HEAD, Method::PUT, Method::DELETE, Method::OPTIONS] {
            let request = request(method.clone(), "/mutate", json, whole(""))?;
            let answer = if method == Method::HEAD {
                ask(request).await?
            } else {
                refused(request, 405, "accepted: POST").await?
            };
            assert_eq!((answer.status, answer.headers["allow"].to_str()?), (405, "POST"));
        }
        let answer = refused(request(Method::POST, "/health", json, whole("{}"))?, 405, "accepted: GET").await?;
        assert_eq!(answer.headers["allow"], "GET");

        let (largest, larger) = (padded(&text, CAP), padded(&text, CAP + 1));
        let much_larger = padded(&text, 4 * CAP);
        for text in [&larger, &much_larger] {
            refused(request(Method::POST, "/mutate", json, whole(text.clone()))?, 413, too_large).await?;
            refused(request(Method::POST, "/mutate", json, in_pieces(text))?, 413, too_large).await?;
        }
        for (path, kind, body) in [
            ("/mutate", "application/json", whole(largest.clone())),
            ("/mutate", "application/json", in_pieces(&largest)),
            ("/mutate?timeout=10s", "application/json; charset=utf-8", whole(text.clone())),
            ("/mutate?", "Application/JSON ;charset=UTF-8", in_pieces(&text)),
            ("/validate?timeout=10s", "application/json", whole(text.clone())),
        ] {
            let answer = ask(request(Method::POST, path, Some(kind), body)?).await?;
            patch(&good, &answer).with_context(|| format!("{protocol:?} {path} {kind}"))?;
        }
        let answer = ask(request(Method::GET, "/health", None, whole(""))?).await?;
        assert_eq!((answer.status, answer.text.as_str()), (200, r#"{"status":"healthy"}"#));
    }

    let metrics = webhook.metrics().await?;
    let reviews = u32::try_from(bodies.len())?;
    // Of each protocol.
    for (reason, count) in [("review", 2 * reviews), ("content_type", 5), ("path", 6), ("method", 6), ("too_large", 4)]
    {
        let counted = metrics.sum("spot_balancer_rejected_requests_total", &[("reason", reason)]);
        assert_eq!(counted, Some(f64::from(2 * count)), "{reason}");
    }
    let beside = beside.stop().await?;
    ensure!(beside.count > 10 && beside.slowest < QUICK, "{beside:?}");
    Ok(())
}

/// Some clients write all before they read, and our refusal comes before: met by a reset they would
/// never see it.
#[tokio::test]
async fn a_client_that_reads_only_after_its_whole_body_gets_its_answer() -> Result<()> {
    need!(Webhook);
    let webhook = Webhook::start(strict()?).await?;
    for (path, length, status) in [("/nowhere", CAP / 2, "404"), ("/mutate", 2 * CAP, "413")] {
        let mut stream = tls(webhook.port, Protocol::Http1).await?;
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        for piece in vec![b' '; length].chunks(64 << 10) {
            stream.write_all(piece).await.with_context(|| format!("sending {length} bytes to {path}"))?;
        }
        let answer = until_closed(&mut stream, PATIENCE).await?;
        let wanted = format!("HTTP/1.1 {status} ");
        ensure!(answer.starts_with(wanted.as_bytes()), "{path}: {}", String::from_utf8_lossy(&answer));
    }
    Ok(())
}

/// Writes a byte at a time, and answers what came until the server ended it.
async fn drip(stream: impl AsyncRead + AsyncWrite + Unpin, bytes: impl IntoIterator<Item = u8>) -> Result<Vec<u8>> {
    let (mut reader, mut writer) = split(stream);
    let dripping = async {
        for byte in bytes {
            // Refused once the server has gone; the reader hears of that too.
            if writer.write_all(&[byte]).await.is_err() || writer.flush().await.is_err() {
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
        std::future::pending().await
    };
    tokio::select! {
        came = until_closed(&mut reader, PATIENCE) => came,
        never = dripping => never,
    }
}

#[tokio::test]
async fn slow_and_silent_clients_are_disconnected_and_delay_no_admission() -> Result<()> {
    need!(Webhook);
    let _measuring = MACHINE.read().await;
    let webhook = Webhook::start(strict()?).await?;
    let port = webhook.port;
    let beside = Steady::start(port, Protocol::Http1, Duration::from_millis(100));

    let head =
        "POST /mutate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n";
    let says_nothing = async {
        let came = until_closed(&mut tcp(port).await?, PATIENCE).await.context("a client without TLS")?;
        ensure!(came.is_empty(), "an answer to nothing");
        Ok(())
    };
    let drips_its_handshake = async {
        // A record of 512 bytes, so it says, with a ClientHello.
        let hello = [22, 3, 1, 2, 0, 1].into_iter().chain(std::iter::repeat(0));
        drip(tcp(port).await?, hello).await.context("a client that drips its handshake").map(drop)
    };
    let drips_its_head = async {
        let endless = head.trim_end().bytes().chain("\r\nX: ".bytes()).chain(std::iter::repeat(b'x'));
        drip(tls(port, Protocol::Http1).await?, endless).await.context("a client that drips its head").map(drop)
    };
    let drips_its_next_head = async {
        let mut stream = tls(port, Protocol::Http1).await?;
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
        let came = drip(stream, std::iter::repeat(b'P')).await.context("a client that drips its second head")?;
        ensure!(came.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&came));
        Ok(())
    };
    let drips_its_body = async {
        let mut stream = tls(port, Protocol::Http1).await?;
        stream.write_all(head.as_bytes()).await?;
        let came = drip(stream, std::iter::repeat(b' ')).await.context("a client that drips its body")?;
        ensure!(came.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&came));
        Ok(())
    };
    let drips_a_stream = async {
        let dripping = futures::stream::unfold((), async |()| {
            sleep(Duration::from_millis(100)).await;
            Some((" ".into(), ()))
        });
        let request = request(Method::POST, "/mutate", Some("application/json"), pieces(dripping))?;
        let answer = Connection::open(port, Protocol::Http2).await?.send(request).await?;
        ensure!(answer.status == 408, "{answer:?}");
        Ok(())
    };
    let say_nothing_after_their_handshakes = async {
        try_join_all((0..300).map(async |number| {
            let mut stream = tls(port, BOTH[number % 2]).await?;
            until_closed(&mut stream, PATIENCE).await.context("a client that says nothing").map(drop)
        }))
        .await
        .map(drop)
    };
    let begun = Instant::now();
    tokio::try_join!(
        says_nothing,
        drips_its_handshake,
        drips_its_head,
        drips_its_next_head,
        drips_its_body,
        drips_a_stream,
        say_nothing_after_their_handshakes
    )?;
    let took = begun.elapsed();
    ensure!(took > Duration::from_secs(8), "they went after {took:?}, by themselves it seems");
    let beside = beside.stop().await?;
    ensure!(beside.count > 50 && beside.slowest < QUICK, "{beside:?}");
    until_true(PATIENCE, "the connections to be gone", async || {
        Ok(webhook.metrics().await?.sum("spot_balancer_connections", &[]) == Some(0.0))
    })
    .await
}

/// A small generator of numbers, the same in every run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }

    /// One to four changes of a review's bytes.
    fn mutate(&mut self, review: &[u8]) -> Vec<u8> {
        let mut bytes = review.to_vec();
        for _ in 0..=self.below(4) {
            let (at, other) = (self.below(bytes.len().max(1)), self.below(bytes.len().max(1)));
            let (from, to) = (at.min(other), at.max(other).min(at.min(other) + 400));
            match self.below(7) {
                // A byte, and a bit of one.
                0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = self.below(256) as u8),
                1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << self.below(8)),
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(from..to)),
                4 => {
                    let again = bytes.get(from..to).unwrap_or_default().to_vec();
                    bytes.splice(other.min(bytes.len())..other.min(bytes.len()), again);
                }
                5 => {
                    let pieces: [&[u8]; 8] = [b"{", b"}", b"[", b"\"", b"\\u", b"null", b"-1e999", b"\xf0\x9f"];
                    let piece = pieces.get(self.below(pieces.len())).copied().unwrap_or_default();
                    bytes.splice(at..at, piece.iter().copied());
                }
                _ => {
                    let moved: Vec<u8> = bytes.drain(from..to).collect();
                    let to = self.below(bytes.len().max(1));
                    bytes.splice(to..to, moved);
                }
            }
        }
        bytes
    }
}

#[tokio::test]
async fn ten_thousand_mutated_reviews_are_all_answered() -> Result<()> {
    need!(Webhook);
    let _loading = MACHINE.write().await;
    let webhook = Webhook::start(strict()?).await?;
    let beside = Steady::start(webhook.port, Protocol::Http1, Duration::from_millis(100));
    let reviews: Vec<Vec<u8>> = [creation("mutated", 1)?, fixture("k8s-1.36-spark-3.5-delete-executor-collection")?]
        .iter()
        .map(|review| review.to_string().into_bytes())
        .collect();
    let answered = try_join_all((1..=4).map(async |seed| {
        let mut chance = Chance(0x9E37_79B9_7F4A_7C15 ^ seed);
        let mut connection = Connection::open(webhook.port, BOTH[seed as usize % 2]).await?;
        let (mut taken, mut refused) = (0, 0);
        for round in 0..2500 {
            let mutated = chance.mutate(&reviews[round % 2]);
            let path = ["/mutate", "/validate"][round % 2];
            let request = request(Method::POST, path, Some("application/json"), whole(mutated.clone()))?;
            let what = || format!("mutation {round} of seed {seed}: {}", String::from_utf8_lossy(&mutated));
            let answer = connection.send(request).await.with_context(what)?;
            match answer.status {
                200 => {
                    ensure!(answer.json()?["response"]["allowed"] == true, "{}: {}", what(), answer.text);
                    taken += 1;
                }
                400 => refused += 1,
                _ => bail!("{}: {answer:?}", what()),
            }
        }
        Ok::<_, anyhow::Error>((taken, refused))
    }))
    .await?;
    let (taken, refused) = answered.iter().fold((0, 0), |sum, each| (sum.0 + each.0, sum.1 + each.1));
    // Else these are no longer mutations of a review.
    ensure!(taken > 500 && refused > 500, "{taken} taken, {refused} refused");
    let beside = beside.stop().await?;
    ensure!(beside.slowest < QUICK, "{beside:?}");
    let log = webhook.process().log()?;
    ensure!(!log.contains("a bug"), "{log}");
    let review = creation("after", 1)?;
    let after = Connection::open(webhook.port, Protocol::Http1).await?.post("/mutate", &review).await?;
    assert!(!patch(&review, &after)?.is_empty());
    Ok(())
}
