//! Clients that take as much of the release binary as they can get, while an apiserver needs it: admissions go on, and
//! memory is bounded. Slow heads and resets were no danger before either: their tests keep it so.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use balancer_tests::balance::Balance;
use balancer_tests::endpoint;
use balancer_tests::frames::{
    CONTINUATION, DATA, END_HEADERS, HEADERS, PING, RST_STREAM, SETTINGS, frame, opening, review_fields, review_head,
};
use balancer_tests::need;
use balancer_tests::raw::{Connection, Protocol, Unanswered, client_hello, pieces, tcp, tls, whole};
use balancer_tests::redis::RedisServer;
use balancer_tests::reviews::{creation, patch};
use balancer_tests::scenario::strict;
use balancer_tests::steady::Steady;
use balancer_tests::wait::{SOON, until_true};
use balancer_tests::webhook::Webhook;
use futures::StreamExt;
use futures::future::{join_all, try_join_all};
use http::{Method, Request};
use hyper::body::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

/// Each of these tests loads the machine and measures time.
static MACHINE: Mutex<()> = Mutex::const_new(());
/// What an admission and a probe may take, whatever others do.
const QUICK: Duration = Duration::from_secs(1);
/// What the process may need then.
const MEMORY_MB: f64 = 128.0;
/// What it may need at its maximum of connections. The chart's limit is 256 MiB.
const MOST_MEMORY_MB: f64 = 240.0;
/// The maximum of connections.
const MOST_CONNECTIONS: usize = 384;
/// From where those come that are not an apiserver.
const STRANGER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2)), 0);
/// How long each misbehaviour lasts.
const ATTACK: Duration = Duration::from_secs(6);
/// How soon a client that was cut off is back.
const AGAIN: Duration = Duration::from_millis(500);
const BOTH: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];
const HEAD: &str = "POST /mutate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";

/// The threads of the clients, until it is dropped.
struct Attack(Option<Runtime>);

impl Drop for Attack {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Runs clients for a while, each of which connects again when it has been cut off. Admissions and probes must be quick
/// meanwhile, and memory bounded.
async fn withstands<F: Future<Output = Result<()>> + Send + 'static>(
    clients: usize,
    client: impl Fn(u16, usize) -> F + Clone + Send + 'static,
) -> Result<Webhook> {
    withstands_within(MEMORY_MB, QUICK, clients, client).await
}

async fn withstands_within<F: Future<Output = Result<()>> + Send + 'static>(
    memory: f64,
    quick: Duration,
    clients: usize,
    client: impl Fn(u16, usize) -> F + Clone + Send + 'static,
) -> Result<Webhook> {
    let webhook = Webhook::start(strict().without_cluster()?).await?;
    let port = webhook.port;
    // On threads of their own: the clients are many, and what they take here is not what admissions wait for.
    let attack = Attack(Some(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?));
    for number in 0..clients {
        let client = client.clone();
        attack.0.as_ref().context("the attack is over")?.spawn(async move {
            loop {
                // It does not matter how the server ends it.
                let _ = client(port, number).await;
                sleep(AGAIN).await;
            }
        });
    }
    // Some are cut off and come back all the time.
    until_true(SOON, "most clients to be there", async || {
        let open = webhook.metrics().await?.sum("spot_balancer_connections", &[]).context("no gauge")?;
        Ok(open >= (clients.min(MOST_CONNECTIONS) as f64) / 2.0)
    })
    .await?;
    sleep(ATTACK / 3).await;
    let beside = [Protocol::Http1, Protocol::Http2].map(|protocol| Steady::start(port, protocol, QUICK / 20));
    let (started, mut slowest_probe) = (Instant::now(), Duration::ZERO);
    while started.elapsed() < ATTACK {
        let admin = webhook.admin()?;
        let asked = Instant::now();
        let answer = endpoint::get(&admin, "/livez").await?;
        ensure!(answer.status == 200, "{answer:?}");
        slowest_probe = slowest_probe.max(asked.elapsed());
        sleep(QUICK / 10).await;
    }
    for beside in beside {
        let beside = beside.stop().await?;
        ensure!(beside.count > 2 && beside.slowest < quick, "{beside:?}");
    }
    ensure!(slowest_probe < quick, "a probe took {slowest_probe:?}");
    let peak = webhook.process().peak_mb()?;
    ensure!(peak < memory, "{peak} MiB");
    drop(attack);
    let log = webhook.process().log()?;
    ensure!(!log.contains("a bug") && !log.contains("panicked"), "{log}");
    Ok(webhook)
}

/// A TCP connection from another address than an apiserver's.
async fn stranger(port: u16) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    // Thousands of closed connections would use up the ports.
    socket.set_zero_linger()?;
    socket.bind(STRANGER)?;
    Ok(socket.connect((Ipv4Addr::LOCALHOST, port).into()).await?)
}

/// Writes the same bytes until the server ends the connection, and reads nothing.
async fn flood(port: u16, start: Vec<u8>, repeated: Vec<u8>) -> Result<()> {
    let mut stream = tls(port, Protocol::Http2).await?;
    stream.write_all(&start).await?;
    loop {
        stream.write_all(&repeated).await?;
    }
}

/// The same, but it reads what comes.
async fn flood_and_read(port: u16, start: Vec<u8>, next: impl FnMut(u32) -> Vec<u8>) -> Result<()> {
    let (mut reader, mut writer) = split(tls(port, Protocol::Http2).await?);
    let read = async {
        let mut unused = vec![0; 16 << 10];
        while reader.read(&mut unused).await? > 0 {}
        Ok(())
    };
    let write = async {
        writer.write_all(&start).await?;
        for bytes in (0..1 << 24).map(next) {
            writer.write_all(&bytes).await?;
        }
        Ok(())
    };
    tokio::select! { ended = read => ended, ended = write => ended }
}

fn in_head(length: &str) -> Vec<u8> {
    format!("{HEAD}{length}\r\n\r\n").into_bytes()
}

#[tokio::test]
async fn large_bodies_that_arrive_slowly_delay_no_review() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    withstands(48, async |port, number| {
        let length = if number % 2 == 0 { "Content-Length: 4194000" } else { "Transfer-Encoding: chunked" };
        let mut stream = tls(port, Protocol::Http1).await?;
        stream.write_all(&in_head(length)).await?;
        loop {
            stream.write_all(if number % 2 == 0 { b" " } else { b"1\r\n \r\n" }).await?;
            sleep(Duration::from_millis(300)).await;
        }
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn large_bodies_that_arrive_fast_enough_delay_no_review() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    // They fill the memory for large bodies, and go on as slowly as is allowed.
    withstands(48, async |port, number| {
        let dripping = futures::stream::unfold(false, async |is_started| {
            let size = if is_started {
                sleep(Duration::from_millis(500)).await;
                10 << 10
            } else {
                1 << 20
            };
            Some((vec![b' '; size].into(), true))
        });
        let request = Request::builder().method(Method::POST).uri("/mutate").header("content-type", "application/json");
        Connection::open(port, BOTH[number % 2]).await?.send(request.body(pieces(dripping))?).await?;
        Ok(())
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn a_thousand_connections_without_reviews_delay_no_new_connection() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    let webhook = withstands(1024, async |port, number| {
        let mut connection = Connection::open(port, BOTH[number % 2]).await?;
        loop {
            let request = Request::builder().uri("/health").body(whole(""))?;
            connection.send(request).await?;
            sleep(Duration::from_secs(1)).await;
        }
    })
    .await?;
    let evicted = webhook.metrics().await?.sum("spot_balancer_connections_evicted_total", &[]);
    ensure!(evicted > Some(0.0), "{evicted:?}: there were not enough of them");
    Ok(())
}

#[tokio::test]
async fn handshakes_that_never_end_delay_no_new_connection() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    let webhook = withstands(1400, async |port, number| {
        let mut stream = stranger(port).await?;
        if number % 2 == 0 {
            // A record of 512 bytes, so it says, with a ClientHello.
            stream.write_all(&[22, 3, 1, 2, 0, 1]).await?;
        }
        stream.read_u8().await?;
        Ok(())
    })
    .await?;
    let evicted = webhook.metrics().await?.sum("spot_balancer_connections_evicted_total", &[("reason", "no_request")]);
    ensure!(evicted > Some(0.0), "{evicted:?}: there were not enough of them");
    Ok(())
}

#[tokio::test]
async fn handshakes_one_after_another_delay_no_review() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    // Without a pause, and nobody reads what the webhook has computed.
    // A connection that finds the kernel's queue full is tried again by its client's kernel after a second.
    let webhook = withstands_within(MEMORY_MB, 2 * QUICK, 2, async |port, number| {
        let hello = client_hello(BOTH[number % 2])?;
        let mut kept = VecDeque::new();
        loop {
            // A connection that fails is followed by the next.
            if let Ok(mut stream) = stranger(port).await {
                let _ = stream.write_all(&hello).await;
                kept.push_back(stream);
                if kept.len() == 2 * MOST_CONNECTIONS {
                    kept.pop_front();
                }
            }
            tokio::task::yield_now().await;
        }
    })
    .await?;
    let evicted = webhook.metrics().await?.sum("spot_balancer_connections_evicted_total", &[("reason", "no_request")]);
    ensure!(evicted > Some(1000.0), "{evicted:?}: there were not enough of them");
    Ok(())
}

#[tokio::test]
async fn bodies_that_stop_after_a_review_delay_no_new_connection() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    withstands(500, async |port, number| {
        let mut connection = Connection::open(port, BOTH[number % 2]).await?;
        connection.post("/mutate", &creation("known", number as u64)?).await?;
        let dripping = futures::stream::unfold((), async |()| {
            sleep(Duration::from_secs(1)).await;
            Some((b" "[..].into(), ()))
        });
        let request = Request::builder().method(Method::POST).uri("/mutate").header("content-type", "application/json");
        connection.send(request.body(pieces(dripping))?).await?;
        Ok(())
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_reviews_on_the_same_connection_delay_no_small_one() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    let webhook = Webhook::start(strict().without_cluster()?).await?;
    let mut connection = Connection::open(webhook.port, Protocol::Http2).await?;
    let mut review = creation("large", 1)?;
    review["request"]["object"]["metadata"]["annotations"]["filler"] = "x".repeat(3 << 20).into();
    let review = Bytes::from(review.to_string());
    let mut large = Vec::new();
    for _ in 0..16 {
        let request = Request::builder().method(Method::POST).uri("/mutate").header("content-type", "application/json");
        let (mut stream, request) =
            (connection.another_stream().context("not HTTP/2")?, request.body(whole(review.clone()))?);
        large.push(tokio::spawn(async move { stream.send(request).await }));
    }
    let mut small = 0;
    while small < 20 || large.iter().any(|large| !large.is_finished()) {
        let (review, asked) = (creation("small", small)?, Instant::now());
        let answer = connection.post("/mutate", &review).await?;
        ensure!(!patch(&review, &answer)?.is_empty(), "not placed: {answer:?}");
        ensure!(asked.elapsed() < QUICK, "review {small} took {:?}", asked.elapsed());
        small += 1;
        sleep(Duration::from_millis(20)).await;
    }
    let mut answered = 0;
    for answer in join_all(large).await {
        match answer?? {
            answer if answer.status == 200 => answered += 1,
            refused => ensure!(refused.status == 503, "{refused:?}"),
        }
    }
    ensure!(answered > 0, "no large review was answered");
    Ok(())
}

#[tokio::test]
async fn the_most_connections_with_the_most_bodies_stay_within_the_memory_of_a_pod() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    // What this promises is memory: so many clients take most of the machine themselves.
    withstands_within(MOST_MEMORY_MB, SOON, MOST_CONNECTIONS + 40, async |port, _| {
        let connection = Connection::open(port, Protocol::Http2).await?;
        let bodies = (0..16).map(async |_| {
            let body = futures::stream::iter((0..4).map(|_| vec![b' '; 16 << 10].into()));
            let request =
                Request::builder().method(Method::POST).uri("/mutate").header("content-type", "application/json");
            let request = request.body(pieces(body.chain(futures::stream::pending())))?;
            connection.another_stream().context("not HTTP/2")?.send(request).await?;
            anyhow::Ok(())
        });
        try_join_all(bodies).await?;
        Ok(())
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn four_hundred_unfinished_bodies_need_little_memory() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    for protocol in BOTH {
        let webhook = withstands(400, move |port, _| async move {
            let body = futures::stream::iter((0..64).map(|_| vec![b' '; 16 << 10].into()));
            let body = pieces(body.chain(futures::stream::pending()));
            let request =
                Request::builder().method(Method::POST).uri("/mutate").header("content-type", "application/json");
            Connection::open(port, protocol).await?.send(request.body(body)?).await?;
            Ok(())
        })
        .await
        .with_context(|| format!("{protocol:?}"))?;

        // The memory is free again for what is large and complete.
        let mut review = creation("large", 1)?;
        review["request"]["object"]["metadata"]["annotations"]["filler"] = "x".repeat(3 << 20).into();
        let mut answer = Err(Unanswered::Lost("not sent".to_owned()));
        until_true(SOON, "a review of 3 MiB to be answered", async || {
            answer = Connection::open(webhook.port, protocol).await?.post("/mutate", &review).await;
            Ok(answer.as_ref().is_ok_and(|answer| answer.status == 200))
        })
        .await?;
        ensure!(!patch(&review, &answer?)?.is_empty(), "not placed");
    }
    Ok(())
}

#[tokio::test]
async fn unfinished_bodies_on_many_streams_delay_no_review() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    withstands(40, async |port, _| {
        let piece = [b' '; 1 << 10];
        flood_and_read(port, opening(), move |number| {
            // The first hundred open their streams; then each gets a little more.
            let stream = 2 * (number % 100) + 1;
            let head = if number < 100 { review_head(stream) } else { Vec::new() };
            [head, frame(DATA, 0, stream, &piece)].concat()
        })
        .await
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn floods_of_http2_frames_delay_no_review() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    let pings = frame(PING, 0, 0, &[0; 8]).repeat(100);
    let settings = frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]).repeat(100);
    let empty = frame(DATA, 0, 1, &[]).repeat(100);
    let started = [opening(), review_head(1)].concat();
    for (name, start, repeated) in [
        ("PING", opening(), pings),
        ("SETTINGS", opening(), settings),
        ("DATA without data", started, empty),
        ("CONTINUATION", [opening(), frame(HEADERS, 0, 1, &review_fields())].concat(), frame(CONTINUATION, 0, 1, &[])),
    ] {
        withstands(2, move |port, number| {
            let (start, repeated) = (start.clone(), repeated.clone());
            async move {
                // Some read what is answered, others do not.
                match number % 2 {
                    0 => flood_and_read(port, start, move |_| repeated.clone()).await,
                    _ => flood(port, start, repeated).await,
                }
            }
        })
        .await
        .context(name)?;
    }
    Ok(())
}

#[tokio::test]
async fn requests_that_are_reset_at_once_delay_no_review() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    withstands(2, async |port, _| {
        flood_and_read(port, opening(), |number| {
            let stream = 2 * number + 1;
            [review_head(stream), frame(RST_STREAM, 0, stream, &8u32.to_be_bytes())].concat()
        })
        .await
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn heads_that_arrive_slowly_delay_no_review() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    withstands(300, async |port, number| {
        let mut stream = tls(port, BOTH[number % 2]).await?;
        if number % 2 == 1 {
            stream.write_all(&[opening(), frame(HEADERS, 0, 1, &review_fields())].concat()).await?;
        }
        loop {
            let more = if number % 2 == 0 { b"x".to_vec() } else { frame(CONTINUATION, 0, 1, &[0x40, 1, b'a', 0]) };
            stream.write_all(&more).await?;
            sleep(Duration::from_millis(200)).await;
        }
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn clients_that_never_read_their_answers_delay_no_review() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    withstands(8, async |port, number| {
        let review = creation("unread", number as u64)?.to_string();
        if number % 2 == 0 {
            let mut stream = tls(port, Protocol::Http1).await?;
            let request = [in_head(&format!("Content-Length: {}", review.len())), review.into_bytes()].concat();
            loop {
                stream.write_all(&request).await?;
            }
        }
        // Its streams have no window for answers.
        let no_window = frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
        let start = [balancer_tests::frames::PREFACE, &no_window].concat();
        flood_and_read(port, start, |number| {
            let stream = 2 * number + 1;
            [frame(HEADERS, END_HEADERS, stream, &review_fields()), frame(DATA, 1, stream, b"{}")].concat()
        })
        .await
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn silent_connections_to_the_admin_port_delay_no_probe() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    let webhook = Webhook::start(strict().without_cluster()?).await?;
    let mut silent = try_join_all((0..400).map(|_| tcp(webhook.admin_port))).await?;
    for (number, stream) in silent.iter_mut().enumerate() {
        match number % 4 {
            0 => stream.write_all(b"GET /livez HT").await?,
            // Its answers are never read.
            1 => stream.write_all(&b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(20)).await?,
            _ => {}
        }
    }
    for path in ["/livez", "/readyz"] {
        let admin = webhook.admin()?;
        let asked = Instant::now();
        let answer = endpoint::get(&admin, path).await?;
        ensure!(answer.status == 200 && asked.elapsed() < QUICK, "{path}: {answer:?} after {:?}", asked.elapsed());
    }
    Ok(())
}

#[tokio::test]
async fn clients_that_keep_connections_to_the_admin_port_and_new_ones_delay_no_probe() -> Result<()> {
    need!(Webhook);
    let _alone = MACHINE.lock().await;
    let webhook = Webhook::start(strict().without_cluster()?).await?;
    let port = webhook.admin_port;
    let attack = Attack(Some(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?));
    for number in 0..160 {
        attack.0.as_ref().context("the attack is over")?.spawn(async move {
            loop {
                let _ = async {
                    let mut stream = stranger(port).await?;
                    // A few only connect, again and again.
                    if number < 8 {
                        stream.read_u8().await?;
                        return anyhow::Ok(());
                    }
                    loop {
                        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
                        ensure!(stream.read(&mut [0; 1024]).await? > 0, "closed");
                        sleep(Duration::from_secs(1)).await;
                    }
                }
                .await;
                sleep(Duration::from_millis(5)).await;
            }
        });
    }
    sleep(ATTACK / 3).await;
    for number in 0..60 {
        let asked = Instant::now();
        let mut probe = tcp(port).await?;
        // A probe of a busy kubelet.
        sleep(Duration::from_millis(5)).await;
        probe.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        probe.read_to_string(&mut answer).await.with_context(|| format!("probe {number}"))?;
        ensure!(answer.starts_with("HTTP/1.1 200 ") && asked.elapsed() < QUICK, "{number}: {answer:?}");
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A current apiserver keeps one HTTP/2 connection for as long as it lives. The test lasts as long as one connection, up
/// to two minutes.
#[tokio::test]
async fn one_client_reaches_both_replicas_and_loses_no_review() -> Result<()> {
    need!(Redis, Webhook);
    let redis = RedisServer::start().await?;
    let options = || anyhow::Ok(strict().redis(&redis)?.without_cluster()?);
    let webhooks = [Webhook::start(options()?).await?, Webhook::start(options()?).await?];
    let clients = BOTH.map(async |protocol| {
        let balance = Balance::start(&webhooks.each_ref().map(|webhook| webhook.port)).await?;
        let port = balance.port;
        let job = format!("share-{protocol:?}").to_lowercase();
        let (mut connection, mut posted) = (Connection::open(port, protocol).await?, [0, 0]);
        let mut replica = 0;
        while posted[1] < 50 {
            let review = creation(&job, posted[0] + posted[1])?;
            match connection.post("/mutate?timeout=3s", &review).await {
                Ok(answer) => ensure!(!patch(&review, &answer)?.is_empty(), "not placed: {answer:?}"),
                // The server stated that it did not process it, so it is posted again.
                Err(Unanswered::Refused(_)) if replica == 0 => {
                    (connection, replica) = (Connection::open(port, protocol).await?, 1);
                    continue;
                }
                Err(lost) => return Err(lost).context(job),
            }
            posted[replica] += 1;
            sleep(Duration::from_millis(20)).await;
        }
        Ok(posted)
    });
    // A connection ends at an age of at most 120 s.
    let posted = timeout(2 * SOON, try_join_all(clients)).await.context("the connections do not end")??;
    let mut placed = Vec::new();
    for webhook in &webhooks {
        placed.push(webhook.metrics().await?.sum("spot_balancer_placements_total", &[]));
    }
    let each = |replica: usize| posted.iter().map(|posted| posted[replica] as f64).sum::<f64>();
    assert_eq!(placed, [Some(each(0)), Some(each(1))]);
    Ok(())
}
