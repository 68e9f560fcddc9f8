//! Replies that a healthy server does not send, from a server of the test's own.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use balancer_core::{JobRef, JobState, PlaceRequest, PolicyOverrides, Term};
use balancer_store::{Ledger, RedisLedger, RedisOptions, StoreError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const TIMEOUT: Duration = Duration::from_secs(5);
const GRACE: Duration = Duration::from_secs(5);
const JOB: JobRef<'_> = JobRef { namespace: "etl", app_id: "job" };

/// A server with one reply to AUTH, one to PING and one to every other command.
async fn server(auth: &'static str, ping: &'static str, other: &'static str) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut received = [0; 16_384];
                while let Ok(length @ 1..) = client.read(&mut received).await {
                    let command = String::from_utf8_lossy(received.get(..length).unwrap_or_default()).into_owned();
                    let answer = match command.split("\r\n").nth(2) {
                        Some("AUTH") => auth,
                        Some("PING") => ping,
                        _ => other,
                    };
                    if client.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(port)
}

async fn connect(port: u16) -> Result<RedisLedger> {
    let options = RedisOptions::new(TIMEOUT, Duration::from_secs(60));
    Ok(RedisLedger::connect(&format!("redis://balancer:s3cret@127.0.0.1:{port}"), options).await?)
}

async fn answering(answer: &'static str) -> Result<RedisLedger> {
    connect(server("+OK\r\n", "+PONG\r\n", answer).await?).await
}

async fn failure(ledger: &RedisLedger) -> Result<StoreError> {
    let request = PlaceRequest {
        key: "e1",
        required: None,
        overrides: PolicyOverrides::default(),
        policy: None,
        may_create: true,
        driver: None,
    };
    let begin = Instant::now();
    let answer = ledger.place(JOB, &request).await;
    assert!(begin.elapsed() < TIMEOUT, "it took {:?}", begin.elapsed());
    answer.err().context("it worked")
}

#[tokio::test]
async fn an_error_never_repeats_the_password() -> Result<()> {
    let auth = "-ERR unknown command `AUTH`, with args beginning with: `balancer`, `s3cret`,\r\n";
    let ledger = connect(server(auth, "+PONG\r\n", ":1\r\n").await?).await?;
    let error = failure(&ledger).await?;
    let told = format!("{error} {error:?} {ledger:?}");
    assert!(error.kind() == "refused" && told.contains("unknown command"), "{told}");
    assert!(!told.contains("s3cret"), "{told}");
    Ok(())
}

#[tokio::test]
async fn a_loading_server_is_not_connected_yet() -> Result<()> {
    let loading = "-LOADING Redis is loading the dataset in memory\r\n";
    let ledger = connect(server("+OK\r\n", loading, ":1\r\n").await?).await?;
    let error = failure(&ledger).await?;
    assert!(matches!(&error, StoreError::Refused { code, .. } if code == "LOADING"), "{error}");
    Ok(())
}

#[tokio::test]
async fn a_read_only_replica_of_redis_6_is_recognised() -> Result<()> {
    let quoted = "-ERR Error running script (call to f_0): @user_script:57: @user_script: 57: -READONLY You can't \
                  write against a read only replica. \r\n";
    let ledger = answering(quoted).await?;
    let error = failure(&ledger).await?;
    assert!(matches!(&error, StoreError::Refused { code, .. } if code == "ERR"), "{error}");
    // The connection is given up for it.
    let deadline = Instant::now() + TIMEOUT;
    while !matches!(failure(&ledger).await?, StoreError::Refused { code, .. } if code == "READONLY") {
        assert!(Instant::now() < deadline, "the replica is still asked");
        tokio::task::yield_now().await;
    }
    Ok(())
}

#[tokio::test]
async fn unexpected_replies_to_place_are_invalid() -> Result<()> {
    for answer in
        [":-1\r\n", "+OK\r\n", "$2\r\nhi\r\n", "$8\r\nspot 1 1\r\n", "$10\r\nspot 2 1 1\r\n", "*2\r\n:1\r\n:0\r\n"]
    {
        let ledger = answering(answer).await?;
        let error = failure(&ledger).await?;
        assert_eq!(error.kind(), "invalid_reply", "{answer:?}: {error}");
    }
    Ok(())
}

#[tokio::test]
async fn unexpected_replies_to_the_reconciler_are_invalid() -> Result<()> {
    let told = |error: Option<StoreError>, answer: &str| {
        assert_eq!(error.as_ref().map(StoreError::kind), Some("invalid_reply"), "{answer:?}: {error:?}");
    };
    let negative = "*5\r\n:0\r\n:0\r\n:0\r\n:0\r\n:-1\r\n";
    for answer in ["$-1\r\n", ":1\r\n", "+OK\r\n", "$2\r\nhi\r\n", "*1\r\n:1\r\n", negative] {
        let reconciled = answering(answer).await?.reconcile(JOB, &JobState::default(), GRACE, Term(1)).await;
        told(reconciled.err(), answer);
    }
    for answer in [":1\r\n", "+OK\r\n", "*1\r\n:1\r\n", "*2\r\n:-1\r\n:1\r\n"] {
        told(answering(answer).await?.record(JOB).await.err(), answer);
    }
    for answer in ["$-1\r\n", ":0\r\n", "*1\r\n*0\r\n", "*2\r\n$2\r\n-1\r\n*0\r\n", "*2\r\n$1\r\n0\r\n:0\r\n"] {
        told(answering(answer).await?.list_jobs(None).await.err(), answer);
    }
    for answer in [":1\r\n", "+OK\r\n", "*0\r\n"] {
        told(answering(answer).await?.heartbeat(1).await.err(), answer);
    }
    Ok(())
}

#[tokio::test]
async fn a_server_of_another_protocol_fails_at_once() -> Result<()> {
    let http = "HTTP/1.1 400 Bad Request\r\n\r\n";
    for (auth, ping, other) in [(http, "", ""), ("+OK\r\n", http, ""), ("+OK\r\n", "+PONG\r\n", http)] {
        let ledger = connect(server(auth, ping, other).await?).await?;
        let error = failure(&ledger).await?;
        assert!(matches!(error.kind(), "invalid_reply" | "no_connection"), "{error}");
    }
    Ok(())
}

#[tokio::test]
async fn the_error_about_a_long_reply_is_short() -> Result<()> {
    let long: &'static str = Box::leak(format!("+{}\r\n", "x".repeat(100_000)).into_boxed_str());
    let ledger = answering(long).await?;
    let told = failure(&ledger).await?.to_string();
    assert!(told.len() < 400, "{} characters", told.len());
    Ok(())
}
