//! The life of a connection, by paused time and a scripted server.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::time::{Instant, sleep};

use super::super::credentials::Credentials;
use super::super::peer::{Answer, Peer, Played, well};
use super::super::scripts::Scripts;
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = SECOND;

async fn connect(peer: &Peer) -> SingleServer<Peer> {
    SingleServer::connect(peer.clone(), TIMEOUT, || {}).await
}

/// Runs a script, and returns how long it took too.
async fn call(server: &SingleServer<Peer>) -> (Result<Value, StoreError>, Duration) {
    let begin = Instant::now();
    let reply = server.run(&Scripts::default().record, redis::cmd("EVALSHA")).await;
    (reply, begin.elapsed())
}

async fn error(server: &SingleServer<Peer>) -> String {
    match call(server).await {
        (Err(error), Duration::ZERO) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Answers `command` like this, and the others well.
fn except(command: &'static str, answer: Answer) -> impl FnMut(&str) -> Answer + Send {
    move |name| if name == command { answer } else { well(name) }
}

fn gaps(peer: &Peer) -> Vec<Duration> {
    let dialled = peer.dialled();
    dialled.iter().zip(dialled.iter().skip(1)).map(|(one, next)| *next - *one).collect()
}

#[tokio::test(start_paused = true)]
async fn calls_fail_at_once_while_there_is_no_connection() {
    let peer = Peer::healthy();
    peer.set_up(false);
    let server = connect(&peer).await;
    assert_eq!(error(&server).await, "no connection to the store now: peer: refused");
    peer.set_up(true);
    sleep(SECOND).await;
    assert_eq!(call(&server).await, (Ok(Value::Int(1)), Duration::ZERO));
    peer.set_up(false);
    sleep(Duration::from_millis(1)).await;
    let closed = error(&server).await;
    assert!(closed.contains("peer closed the connection"), "{closed}");
}

#[tokio::test(start_paused = true)]
async fn calls_shorten_the_pauses_between_attempts() {
    let peer = Peer::healthy();
    peer.set_up(false);
    let server = connect(&peer).await;
    sleep(60 * SECOND).await;
    let idle = gaps(&peer);
    assert!(idle.iter().all(|gap| *gap <= 2 * SECOND + SECOND / 100), "{idle:?}");
    assert!((30..70).contains(&idle.len()), "{idle:?}");
    for _ in 0..200 {
        error(&server).await;
        sleep(SECOND / 20).await;
    }
    let called = gaps(&peer).split_off(idle.len() + 1);
    // In steps of the clock, one millisecond.
    let expected = Duration::from_millis(250)..=Duration::from_millis(252);
    assert!(called.len() > 30 && called.iter().all(|gap| expected.contains(gap)), "{called:?}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_probed() {
    let peer = Peer::healthy();
    let _server = connect(&peer).await;
    assert_eq!(peer.received(), ["AUTH", "PING"]);
    sleep(31 * SECOND).await;
    assert_eq!(peer.received(), ["AUTH", "PING", "PING", "PING", "PING"]);
    assert_eq!(peer.dialled().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_frozen_server_times_calls_out_and_then_loses_its_connection() {
    let peer = Peer::healthy();
    let server = connect(&peer).await;
    peer.play(|_| Answer::Silence);
    assert_eq!(call(&server).await, (Err(StoreError::TimedOut(TIMEOUT)), TIMEOUT));
    // The probe takes as long again.
    assert_eq!(call(&server).await.1, TIMEOUT);
    sleep(Duration::from_millis(1)).await;
    let frozen = error(&server).await;
    assert!(frozen.contains("peer has stopped answering"), "{frozen}");
    sleep(6 * SECOND).await;
    let still = error(&server).await;
    assert!(still.contains("peer did not answer within 5s of connecting"), "{still}");
    peer.play(well);
    sleep(6 * SECOND).await;
    assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_answers_the_probe_keeps_its_connection() {
    let peer = Peer::healthy();
    let server = connect(&peer).await;
    peer.play(except("EVALSHA", Answer::Late(3 * TIMEOUT / 2, ":1\r\n")));
    for _ in 0..3 {
        assert_eq!(call(&server).await.0, Err(StoreError::TimedOut(TIMEOUT)));
        sleep(2 * TIMEOUT).await;
    }
    assert_eq!(peer.dialled().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_read_only_replica_is_left_and_its_calls_in_flight_are_answered() {
    let peer = Peer::healthy();
    let server = connect(&peer).await;
    let mut calls = 0;
    peer.play(move |name| match name {
        "EVALSHA" => {
            calls += 1;
            match calls {
                1 => Answer::Reply("-READONLY You can't write against a read only replica.\r\n"),
                2 => Answer::Late(SECOND / 2, ":2\r\n"),
                _ => well(name),
            }
        }
        _ => well(name),
    });
    let (refused, in_flight) = tokio::join!(call(&server), call(&server));
    assert!(matches!(refused.0, Err(StoreError::Refused { ref code, .. }) if code == "READONLY"), "{refused:?}");
    assert_eq!(in_flight, (Ok(Value::Int(2)), SECOND / 2));
    assert_eq!(peer.dialled().len(), 2);
    assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_not_ready_is_not_connected() {
    let loading = Answer::Reply("-LOADING Redis is loading the dataset in memory\r\n");
    let password = Answer::Reply("-WRONGPASS invalid username-password pair\r\n");
    for (command, answer, code) in [("PING", loading, "LOADING"), ("AUTH", password, "WRONGPASS")] {
        let peer = Peer::new(except(command, answer));
        let server = connect(&peer).await;
        assert!(error(&server).await.contains(code), "{code}");
        peer.play(well);
        sleep(SECOND).await;
        assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_user_without_the_right_to_ping_is_connected() {
    let peer = Peer::new(except("PING", Answer::Reply("-NOPERM this user has no permissions\r\n")));
    let server = connect(&peer).await;
    sleep(30 * SECOND).await;
    assert_eq!((call(&server).await.0, peer.dialled().len()), (Ok(Value::Int(1)), 1));
}

#[tokio::test(start_paused = true)]
async fn a_script_that_the_server_does_not_have_is_loaded() {
    let peer = Peer::healthy();
    let server = connect(&peer).await;
    let mut loaded = false;
    peer.play(move |name| match name {
        "EVALSHA" if !loaded => Answer::Reply("-NOSCRIPT No matching script\r\n"),
        "SCRIPT" => {
            loaded = true;
            well(name)
        }
        _ => well(name),
    });
    assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
    assert_eq!(peer.received(), ["AUTH", "PING", "EVALSHA", "SCRIPT", "EVALSHA"]);
}

#[tokio::test(start_paused = true)]
async fn a_closed_connection_is_replaced_before_the_next_call() {
    let peer = Peer::healthy();
    let server = connect(&peer).await;
    peer.close();
    sleep(SECOND / 10).await;
    assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
    assert_eq!(peer.dialled().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_task_that_connects_is_reported_and_survived() {
    let (peer, panics) = (Peer::healthy(), Arc::new(AtomicU32::new(0)));
    let counted = Arc::clone(&panics);
    let on_panic = move || {
        counted.fetch_add(1, Ordering::Relaxed);
    };
    let server = SingleServer::connect(peer.clone(), TIMEOUT, on_panic).await;
    assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
    for times in 1..=3 {
        peer.panic_next();
        peer.close();
        sleep(SECOND / 2).await;
        let starting = error(&server).await;
        assert!(starting.contains("peer is started again"), "{starting}");
        sleep(SECOND).await;
        assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
        assert_eq!(panics.load(Ordering::Relaxed), times);
    }
    drop(server);
    peer.close();
    let dialled = peer.dialled().len();
    sleep(60 * SECOND).await;
    assert_eq!((peer.dialled().len(), panics.load(Ordering::Relaxed)), (dialled, 3), "it ends with the last handle");
}

#[tokio::test(start_paused = true)]
async fn connecting_ends_with_the_last_handle() {
    let peer = Peer::healthy();
    drop(connect(&peer).await);
    peer.close();
    sleep(60 * SECOND).await;
    assert_eq!(peer.dialled().len(), 1);
}

/// A server without faults, with the password that a source plays.
async fn with_source(source: &Played) -> Peer {
    Peer::healthy().with_credentials(Credentials::from_source(source.clone(), SECOND, || {}).await)
}

#[tokio::test(start_paused = true)]
async fn a_changed_password_is_used_on_the_live_connection() {
    let source = Played::new(Ok("one"));
    let peer = with_source(&source).await;
    let server = connect(&peer).await;
    source.set(Ok("two"));
    sleep(59 * SECOND).await;
    peer.play(except("EVALSHA", Answer::Late(SECOND / 2, ":1\r\n")));
    for _ in 0..4 {
        assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
    }
    let received = peer.received();
    assert_eq!((received.iter().filter(|name| *name == "AUTH").count(), peer.dialled().len()), (2, 1), "{received:?}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_server_refuses_the_changed_password_stays_in_use() {
    let source = Played::new(Ok("one"));
    let peer = with_source(&source).await;
    let server = connect(&peer).await;
    peer.play(except("AUTH", Answer::Reply("-WRONGPASS invalid username-password pair\r\n")));
    source.set(Ok("two"));
    sleep(360 * SECOND).await;
    let asked = || peer.received().iter().filter(|name| *name == "AUTH").count();
    // With pauses up to a minute, and the source is asked for another one each time.
    assert!((9..=17).contains(&asked()) && source.asked() > asked(), "{} and {}", asked(), source.asked());
    assert_eq!((call(&server).await.0, peer.dialled().len()), (Ok(Value::Int(1)), 1));
    peer.play(well);
    source.set(Ok("three"));
    sleep(61 * SECOND).await;
    let done = asked();
    sleep(300 * SECOND).await;
    assert_eq!((asked(), peer.dialled().len()), (done, 1));
}

#[tokio::test(start_paused = true)]
async fn a_refused_password_is_read_again_and_the_changed_one_is_used_at_once() {
    let source = Played::new(Ok("one"));
    let peer = with_source(&source).await;
    peer.play(except("AUTH", Answer::Reply("-WRONGPASS invalid username-password pair\r\n")));
    let server = connect(&peer).await;
    sleep(30 * SECOND).await;
    assert!(error(&server).await.contains("WRONGPASS"));
    source.set(Ok("two"));
    peer.play(well);
    sleep(2 * SECOND).await;
    assert_eq!(call(&server).await.0, Ok(Value::Int(1)));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_asks_for_the_password_later_is_connected_again() {
    for refusal in ["-NOAUTH Authentication required.\r\n", "-WRONGPASS invalid username-password pair\r\n"] {
        let peer = Peer::healthy();
        let server = connect(&peer).await;
        peer.play(except("EVALSHA", Answer::Reply(refusal)));
        assert_eq!(call(&server).await.0.map_err(|error| error.kind()), Err("refused"));
        peer.play(well);
        sleep(SECOND / 10).await;
        assert_eq!((call(&server).await.0, peer.dialled().len()), (Ok(Value::Int(1)), 2));
    }
}
