//! Detection by paused time, and what scripted servers answer.

use tokio::time::Instant;

use super::super::credentials::Login;
use super::super::peer::{Answer, Peer, Peers, well};
use super::*;

const STANDALONE: &str = "*4\r\n$6\r\nserver\r\n$5\r\nredis\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n";
const CLUSTER: &str = "*4\r\n$6\r\nserver\r\n$6\r\nvalkey\r\n$4\r\nmode\r\n$7\r\ncluster\r\n";
const SENTINEL: &str = "*4\r\n$5\r\nproto\r\n:2\r\n$4\r\nmode\r\n$8\r\nsentinel\r\n";
const NO_AUTH: &str = "-NOAUTH HELLO must be called with the client already authenticated\r\n";
const NO_PERMISSION: &str = "-NOPERM this user has no permissions\r\n";

fn address(port: u16) -> Address {
    Address { host: "h".to_owned(), port }
}

fn login(password: &str) -> Credentials {
    Credentials::fixed(Some(Login { user: None, password: password.to_owned() }))
}

/// Detection among these servers, which listen on the ports 1, 2 and so on.
fn among<const N: usize>(peers: [&Peer; N]) -> Detection<Peers> {
    let network = Peers::default();
    let mut servers = Vec::new();
    for (port, peer) in (1..).zip(peers) {
        network.0.lock().unwrap().insert(port, peer.clone());
        servers.push(address(port));
    }
    Detection {
        network,
        servers,
        credentials: login("s3cret"),
        sentinel_credentials: Credentials::fixed(None),
        mode: RedisMode::Auto,
        has_sentinel_master: false,
        database: 0,
    }
}

/// A server that answers `HELLO` so.
fn says(hello: &'static str) -> Peer {
    Peer::new(move |name| if name == "HELLO" { Answer::Reply(hello) } else { well(name) })
}

/// A server that answers some commands so, and refuses all others.
fn answers(replies: &'static [(&'static str, &'static str)]) -> Peer {
    Peer::new(move |name| {
        let reply = replies.iter().find(|(command, _)| *command == name);
        Answer::Reply(reply.map_or(NO_PERMISSION, |(_, reply)| reply))
    })
}

fn mistake(detected: Result<Kind, Undetected>) -> String {
    match detected {
        Err(Undetected::Mistake(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_without_password_says_what_it_is_before_the_login() {
    for (hello, kind) in [(STANDALONE, Kind::Standalone), (CLUSTER, Kind::ClusterNode)] {
        let peer = says(hello);
        assert_eq!(among([&peer]).detect().await, Ok(kind));
        assert_eq!(peer.received(), ["HELLO"]);
    }
    let sentinels = Detection { has_sentinel_master: true, ..among([&says(SENTINEL)]) };
    assert_eq!(sentinels.detect().await, Ok(Kind::Sentinel));
}

#[tokio::test(start_paused = true)]
async fn a_server_with_a_password_says_what_it_is_after_the_login() {
    let mut is_in = false;
    let peer = Peer::new(move |name| match name {
        "HELLO" => Answer::Reply(if is_in { CLUSTER } else { NO_AUTH }),
        _ => {
            is_in |= name == "AUTH";
            well(name)
        }
    });
    assert_eq!(among([&peer]).detect().await, Ok(Kind::ClusterNode));
    assert_eq!(peer.received(), ["HELLO", "AUTH", "HELLO"]);
}

#[tokio::test(start_paused = true)]
async fn sentinels_get_their_own_password() {
    let peer = Peer::healthy();
    let sentinel_credentials = login("of-sentinels");
    let hello = |name: &str| if name == "HELLO" { Answer::Reply(NO_AUTH) } else { well(name) };
    for (has_sentinel_master, logins) in [(true, 1), (false, 2)] {
        let mut refused = has_sentinel_master;
        peer.play(move |name| match name {
            "AUTH" if !refused => {
                refused = true;
                Answer::Reply("-WRONGPASS invalid\r\n")
            }
            _ => hello(name),
        });
        let before = peer.received().len();
        let sentinel_credentials = sentinel_credentials.clone();
        drop(Detection { has_sentinel_master, sentinel_credentials, ..among([&peer]) }.detect().await);
        let received = peer.received().split_off(before);
        assert_eq!(received.iter().filter(|name| *name == "AUTH").count(), logins, "{received:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn servers_without_hello_are_known_by_other_commands() {
    for (info, kind) in [
        ("$36\r\nredis_version:6.0.0\r\nredis_mode:cl\r\n\r\n", Kind::Standalone),
        ("$30\r\n# Server\r\nredis_mode:cluster\r\n\r\n", Kind::ClusterNode),
        ("$21\r\nserver_mode:cluster\r\n\r\n", Kind::ClusterNode),
        ("$24\r\nserver_mode:standalone\r\n\r\n", Kind::Standalone),
    ] {
        let peer = Peer::new(move |name| match name {
            "AUTH" => well(name),
            "INFO" => Answer::Reply(info),
            _ => Answer::Reply(NO_PERMISSION),
        });
        assert_eq!(among([&peer]).detect().await, Ok(kind), "{info}");
    }
    let slots = answers(&[("AUTH", "+OK\r\n"), ("CLUSTER SLOTS", "*1\r\n*2\r\n:0\r\n:16383\r\n")]);
    assert_eq!(among([&slots]).detect().await, Ok(Kind::ClusterNode));
}

#[tokio::test(start_paused = true)]
async fn what_no_server_says_is_taken_from_the_settings() {
    let mute = answers(&[("AUTH", "+OK\r\n")]);
    assert_eq!(among([&mute]).detect().await, Ok(Kind::Standalone));
    assert_eq!(among([&mute, &mute]).detect().await, Ok(Kind::ClusterNode));
    let detection = Detection { has_sentinel_master: true, ..among([&mute, &mute]) };
    assert_eq!(detection.detect().await, Ok(Kind::Sentinel));
    let detection = Detection { mode: RedisMode::Cluster, ..among([&mute]) };
    assert_eq!(detection.detect().await, Ok(Kind::ClusterNode));
}

#[tokio::test(start_paused = true)]
async fn servers_that_do_not_answer_hinder_no_other() {
    let (frozen, down, up) = (Peer::new(|_| Answer::Silence), Peer::healthy(), says(CLUSTER));
    down.set_up(false);
    let begin = Instant::now();
    assert_eq!(among([&frozen, &down, &up]).detect().await, Ok(Kind::ClusterNode));
    assert_eq!(begin.elapsed(), Duration::ZERO);
    let detected = among([&frozen, &down]).detect().await;
    assert!(matches!(&detected, Err(Undetected::NoAnswer(StoreError::NoConnection(_)))), "{detected:?}");
    assert_eq!(begin.elapsed().as_secs(), TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_refused_password_is_an_error_without_it() {
    let peer = Peer::new(|name| match name {
        "HELLO" => Answer::Reply(NO_AUTH),
        _ => Answer::Reply("-WRONGPASS what is s3cret?\r\n"),
    });
    let detected = among([&peer, &Peer::new(|_| Answer::Silence)]).detect().await;
    let Err(Undetected::NoAnswer(error @ StoreError::Refused { .. })) = &detected else { panic!("{detected:?}") };
    let shown = format!("{error}");
    assert!(
        shown.contains("WRONGPASS") && shown.contains("h:1") && !format!("{detected:?}").contains("s3cret"),
        "{shown}"
    );
    let nobody = Detection { credentials: Credentials::fixed(None), ..among([&says(NO_AUTH)]) };
    let detected = nobody.detect().await;
    assert!(matches!(&detected, Err(Undetected::NoAnswer(StoreError::Refused { code, .. })) if code == "NOAUTH"));
}

#[tokio::test(start_paused = true)]
async fn a_wrong_mode_is_a_mistake_in_one_sentence() {
    let (single, cluster, sentinel) = (RedisMode::Single, RedisMode::Cluster, RedisMode::Sentinel);
    for (mode, hello, text) in [
        (single, CLUSTER, "REDIS_MODE=single, but h:1 is a node of a cluster; set REDIS_MODE=cluster or auto"),
        (single, SENTINEL, "REDIS_MODE=single, but h:1 is a sentinel; set REDIS_MODE=sentinel or auto"),
        (
            cluster,
            STANDALONE,
            "REDIS_MODE=cluster, but h:1 is neither a node of a cluster nor a sentinel; set REDIS_MODE=single or auto",
        ),
        (cluster, SENTINEL, "REDIS_MODE=cluster, but h:1 is a sentinel; set REDIS_MODE=sentinel or auto"),
        (sentinel, CLUSTER, "REDIS_MODE=sentinel, but h:1 is a node of a cluster; set REDIS_MODE=cluster or auto"),
    ] {
        let detection = Detection { mode, ..among([&says(hello)]) };
        assert_eq!(mistake(detection.detect().await), text);
    }
}

#[tokio::test(start_paused = true)]
async fn servers_that_the_other_settings_do_not_fit_are_a_mistake() {
    let no_name = mistake(among([&says(SENTINEL)]).detect().await);
    assert!(no_name.starts_with("h:1 is a sentinel; set REDIS_SENTINEL_MASTER"), "{no_name}");
    let several = mistake(among([&says(STANDALONE), &says(STANDALONE)]).detect().await);
    assert!(several.contains("REDIS_URL names several servers, but h:"), "{several}");
    for hello in [STANDALONE, CLUSTER] {
        let detection = Detection { has_sentinel_master: true, ..among([&says(hello)]) };
        let no_sentinel = mistake(detection.detect().await);
        assert!(no_sentinel.starts_with("REDIS_SENTINEL_MASTER is set, but h:1 is "), "{no_sentinel}");
    }
    let detection = Detection { database: 3, ..among([&says(CLUSTER)]) };
    let database = mistake(detection.detect().await);
    assert!(database.contains("database 3"), "{database}");
}
