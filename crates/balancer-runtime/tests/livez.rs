//! What the kubelet's liveness probe gets while essential tasks die.

#![allow(clippy::expect_used, clippy::panic, reason = "a test")]

use std::sync::Arc;
use std::time::Duration;

use balancer_runtime::admin::{Admin, Readiness, registry};
use balancer_runtime::tasks::{Task, Tasks};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{pause, resume, sleep};

/// The status and the body of an answer.
async fn get(port: u16, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    (head.split(' ').nth(1).unwrap_or_default().to_owned(), body.to_owned())
}

/// Lets so much time pass without waiting for it.
async fn pass(time: Duration) {
    pause();
    sleep(time).await;
    resume();
}

async fn panicking() {
    panic!("a panic of the test's own")
}

#[tokio::test]
async fn livez_names_the_task_that_keeps_dying_and_metrics_count_its_deaths() {
    let mut registry = registry("test");
    let tasks = Tasks::register(&mut registry);
    let admin = Admin::bind(0).await.expect("a port");
    let port = admin.address().port();
    tokio::spawn(admin.keep_serving(Arc::new(registry), Readiness::default(), tasks.clone()));
    assert_eq!(get(port, "/livez").await, ("200".into(), "ok\n".into()));

    tasks.for_optional_part().spawn(Task::Events, panicking);
    pass(Duration::from_secs(60)).await;
    assert_eq!(get(port, "/livez").await.0, "200", "the part is optional");

    tasks.spawn(Task::Certificate, panicking);
    pass(Duration::from_secs(10)).await;
    assert_eq!(get(port, "/livez").await.0, "200", "it is restarted");
    pass(Duration::from_secs(10)).await;
    assert_eq!(get(port, "/livez").await, ("503".into(), "the task certificate keeps dying\n".into()));
    let (_, metrics) = get(port, "/metrics").await;
    assert!(metrics.contains("spot_balancer_tasks_died_total{task=\"certificate\"} 5\n"), "{metrics}");
    assert!(metrics.contains("spot_balancer_tasks_died_total{task=\"log\"} 0\n"), "{metrics}");
}
