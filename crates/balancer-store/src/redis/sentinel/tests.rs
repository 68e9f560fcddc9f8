//! Finding and following the primary, by paused time and scripted servers.

use tokio::time::Instant;

use super::super::credentials::Login;
use super::super::peer::{Answer, Peer, Peers, well};
use super::super::scripts::Scripts;
use super::super::single_server::SingleServer;
use super::super::transport::Transport;
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const AT_11: &str = "*2\r\n$1\r\nh\r\n$2\r\n11\r\n";
const AT_12: &str = "*2\r\n$1\r\nh\r\n$2\r\n12\r\n";
const MASTER: &str = "*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n";
const REPLICA: &str = "*5\r\n$5\r\nslave\r\n$1\r\nh\r\n:12\r\n$9\r\nconnected\r\n:0\r\n";
const NO_PERMISSION: &str = "-NOPERM this user has no permissions\r\n";
const READ_ONLY: &str = "-READONLY You can't write against a read only replica.\r\n";

fn sentinel(names: &'static str) -> impl FnMut(&str) -> Answer + Send {
    move |name| if name == "SENTINEL" { Answer::Reply(names) } else { well(name) }
}

/// A server that answers scripts with its number.
fn server(role: &'static str, number: &'static str) -> impl FnMut(&str) -> Answer + Send {
    move |name| match name {
        "ROLE" => Answer::Reply(role),
        "EVALSHA" => Answer::Reply(number),
        _ => well(name),
    }
}

/// Three sentinels on the ports 1 to 3, and two servers on the ports 11 and 12.
struct Setup {
    sentinels: [Peer; 3],
    first: Peer,
    second: Peer,
    network: Peers,
}

impl Setup {
    /// The primary is the first server.
    fn new() -> Self {
        let sentinels = [(); 3].map(|()| Peer::new(sentinel(AT_11)));
        let (first, second) = (Peer::new(server(MASTER, ":11\r\n")), Peer::new(server(REPLICA, READ_ONLY)));
        let network = Peers::default();
        let servers = (1..).zip(&sentinels).chain([(11, &first), (12, &second)]);
        network.0.lock().unwrap().extend(servers.map(|(port, peer)| (port, peer.clone())));
        Self { sentinels, first, second, network }
    }

    fn primary(&self) -> Primary<Peers> {
        let sentinels = (1..=3).map(|port| Address { host: "h".to_owned(), port }).collect();
        let login = |password: &str| Credentials::fixed(Some(Login { user: None, password: password.to_owned() }));
        let sentinels = (sentinels, login("of-sentinels"));
        Primary::new(self.network.clone(), sentinels, "mymaster".to_owned(), 0, login("of-servers"))
    }

    async fn connect(&self) -> SingleServer<Primary<Peers>> {
        SingleServer::connect(self.primary(), SECOND, || {}).await
    }

    /// The second server becomes the primary.
    fn fail_over(&self) {
        self.first.play(server(REPLICA, READ_ONLY));
        self.second.play(server(MASTER, ":12\r\n"));
    }

    fn sentinels_say(&self, names: [&'static str; 3]) {
        for (peer, names) in self.sentinels.iter().zip(names) {
            peer.play(sentinel(names));
        }
    }

    async fn error(&self) -> String {
        self.primary().dial().await.err().map(|error| error.to_string()).unwrap_or_default()
    }
}

/// Runs a script. Returns the number of the server that answered.
async fn call(server: &SingleServer<Primary<Peers>>) -> Result<i64, StoreError> {
    match server.run(&Scripts::default().record, redis::cmd("EVALSHA")).await? {
        Value::Int(number) => Ok(number),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn the_primary_that_the_sentinels_name_is_used() {
    let setup = Setup::new();
    let server = setup.connect().await;
    assert_eq!(call(&server).await, Ok(11));
    assert_eq!(setup.first.received(), ["AUTH", "PING", "ROLE", "EVALSHA"]);
    assert!(setup.second.received().is_empty());
}

#[tokio::test(start_paused = true)]
async fn sentinels_that_are_frozen_or_down_delay_nothing() {
    let setup = Setup::new();
    setup.sentinels[0].play(|_| Answer::Silence);
    setup.sentinels[1].set_up(false);
    let begin = Instant::now();
    let server = setup.connect().await;
    assert_eq!((call(&server).await, begin.elapsed()), (Ok(11), Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_former_primary_that_an_old_sentinel_names_is_not_used() {
    let setup = Setup::new();
    setup.fail_over();
    for old in 0..3 {
        setup.sentinels_say([AT_12; 3]);
        setup.sentinels[old].play(sentinel(AT_11));
        assert_eq!(call(&setup.connect().await).await, Ok(12), "{old}");
    }
    setup.sentinels_say([AT_11; 3]);
    let error = setup.error().await;
    assert!(error.contains("h:11, which a sentinel names as the master mymaster, is none"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn without_the_right_to_ask_its_role_the_server_that_most_sentinels_name_is_used() {
    let setup = Setup::new();
    setup.first.play(server(NO_PERMISSION, ":11\r\n"));
    setup.second.play(server(NO_PERMISSION, ":12\r\n"));
    for (names, expected) in [([AT_11, AT_12, AT_12], 12), ([AT_11, AT_12, AT_11], 11), ([AT_12, AT_12, AT_11], 12)] {
        setup.sentinels_say(names);
        assert_eq!(call(&setup.connect().await).await, Ok(expected), "{names:?}");
    }
    // Of those that answer.
    setup.sentinels_say([AT_12, AT_11, AT_12]);
    setup.sentinels[0].set_up(false);
    setup.sentinels[1].play(|_| Answer::Silence);
    let begin = Instant::now();
    assert_eq!(setup.primary().dial().await.err(), None);
    assert_eq!(begin.elapsed().as_secs(), SENTINEL_TIMEOUT.as_secs());
    assert_eq!(setup.second.received().last().map(String::as_str), Some("ROLE"));
}

#[tokio::test(start_paused = true)]
async fn the_connection_moves_with_the_primary() {
    let setup = Setup::new();
    let server = setup.connect().await;
    sleep(60 * SECOND).await;
    assert_eq!(setup.first.dialled().len(), 1);
    // It still answers, and is no replica yet.
    setup.second.play(self::server(MASTER, ":12\r\n"));
    setup.sentinels_say([AT_12; 3]);
    setup.first.play(|name| match name {
        "EVALSHA" => Answer::Late(SECOND / 2, ":11\r\n"),
        _ => well(name),
    });
    let begin = Instant::now();
    while call(&server).await == Ok(11) {
        assert!(begin.elapsed() < INTERVAL + SECOND);
    }
    assert_eq!(call(&server).await, Ok(12));
    assert_eq!((setup.first.dialled().len(), setup.second.dialled().len()), (1, 1));
    sleep(60 * SECOND).await;
    assert_eq!((call(&server).await, setup.second.dialled().len()), (Ok(12), 1));
}

#[tokio::test(start_paused = true)]
async fn one_sentinel_of_three_does_not_move_the_connection() {
    let setup = Setup::new();
    let server = setup.connect().await;
    setup.second.play(self::server(MASTER, ":12\r\n"));
    setup.sentinels_say([AT_12, AT_11, AT_11]);
    sleep(60 * SECOND).await;
    setup.sentinels[2].set_up(false);
    sleep(60 * SECOND).await;
    assert_eq!((call(&server).await, setup.second.dialled().len()), (Ok(11), 0));
}

#[tokio::test(start_paused = true)]
async fn a_primary_that_has_become_a_replica_is_left_at_once() {
    let setup = Setup::new();
    let server = setup.connect().await;
    setup.fail_over();
    setup.sentinels_say([AT_12; 3]);
    assert_eq!(call(&server).await.map_err(|error| error.kind()), Err("refused"));
    sleep(SECOND / 10).await;
    assert_eq!(call(&server).await, Ok(12));
}

#[tokio::test(start_paused = true)]
async fn calls_fail_at_once_until_there_is_another_primary() {
    let setup = Setup::new();
    let server = setup.connect().await;
    setup.first.set_up(false);
    for _ in 0..100 {
        sleep(SECOND / 10).await;
        let begin = Instant::now();
        let error = call(&server).await.unwrap_err().to_string();
        assert!(error.contains("h:11") && begin.elapsed() == Duration::ZERO, "{error}");
    }
    setup.fail_over();
    setup.sentinels_say([AT_11, AT_12, AT_12]);
    call(&server).await.unwrap_err();
    sleep(SECOND / 3).await;
    assert_eq!(call(&server).await, Ok(12));
}

#[tokio::test(start_paused = true)]
async fn a_frozen_primary_does_not_delay_the_next_attempt() {
    let setup = Setup::new();
    setup.first.play(|_| Answer::Silence);
    let begin = Instant::now();
    let error = setup.error().await;
    assert!(error.contains("h:11 did not answer within 2s"), "{error}");
    assert_eq!(begin.elapsed().as_secs(), PRIMARY_TIMEOUT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_name_is_an_error_with_the_names_that_the_sentinels_know() {
    let setup = Setup::new();
    for peer in &setup.sentinels {
        let mut calls = 0;
        peer.play(move |name| match name {
            "SENTINEL" => {
                calls += 1;
                let cache = "*1\r\n*4\r\n$4\r\nname\r\n$5\r\ncache\r\n$2\r\nip\r\n$1\r\nh\r\n";
                Answer::Reply(if calls % 2 == 1 { "*-1\r\n" } else { cache })
            }
            _ => well(name),
        });
    }
    let error = setup.error().await;
    assert!(error.ends_with("the sentinels watch no master named mymaster; they watch cache"), "{error}");
    setup.sentinels_say(["*-1\r\n"; 3]);
    let error = setup.error().await;
    assert!(error.ends_with("the sentinels watch no master named mymaster; they watch none"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn errors_of_sentinels_name_them() {
    let setup = Setup::new();
    for peer in &setup.sentinels {
        peer.set_up(false);
    }
    let error = setup.error().await;
    assert!(error.contains("no sentinel answers: h:") && error.contains("h:3: refused"), "{error}");
    setup.sentinels[1].set_up(true);
    setup.sentinels[1].play(|name| match name {
        "AUTH" => Answer::Reply("-WRONGPASS what is of-sentinels?\r\n"),
        _ => well(name),
    });
    let error = setup.error().await;
    assert!(error.contains("WRONGPASS what is <password>? (from the sentinel h:2)"), "{error}");
    setup.sentinels[1].play(|name| match name {
        "SENTINEL" => Answer::Reply("-ERR unknown command\r\n"),
        _ => well(name),
    });
    let error = setup.error().await;
    assert!(error.contains("unknown command (from the sentinel h:2)"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_name_may_stand_for_several_sentinels_and_each_is_asked_once() {
    let setup = Setup::new();
    let sentinels = ["all", "h", "all"].map(|host| Address { host: host.to_owned(), port: 1 });
    let nobody = || Credentials::fixed(None);
    let name = "mymaster".to_owned();
    let primary = Primary::new(setup.network.clone(), (sentinels.to_vec(), nobody()), name, 0, nobody());
    let votes = primary.shared.votes().await;
    assert_eq!(votes, HashMap::from([(Address { host: "h".to_owned(), port: 11 }, 3)]));
    assert!(setup.sentinels.iter().all(|peer| peer.dialled().len() == 1));
}
