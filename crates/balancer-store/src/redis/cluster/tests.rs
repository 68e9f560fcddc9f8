//! Following slots and surviving nodes, by paused time and scripted servers.

use super::super::credentials::Login;
use super::super::peer::{Answer, Peer, Peers, well};
use super::super::scripts::Scripts;
use super::*;

const SECOND: Duration = Duration::from_secs(1);
/// The slot of `{a}` is 15,495, that of `{b}` 3,300.
const ON_1_AND_2: &str =
    "*2\r\n*3\r\n:0\r\n:8191\r\n*2\r\n$1\r\nh\r\n:1\r\n*3\r\n:8192\r\n:16383\r\n*2\r\n$1\r\nh\r\n:2\r\n";
const ON_1_AND_3: &str =
    "*2\r\n*3\r\n:0\r\n:8191\r\n*2\r\n$1\r\nh\r\n:1\r\n*3\r\n:8192\r\n:16383\r\n*2\r\n$1\r\nh\r\n:3\r\n";
const ONLY_1: &str = "*1\r\n*3\r\n:0\r\n:8191\r\n*2\r\n$1\r\nh\r\n:1\r\n";

/// A node that answers scripts and heartbeats like this.
fn node(map: &'static str, reply: &'static str) -> impl FnMut(&str) -> Answer + Send {
    move |name| match name {
        "CLUSTER" => Answer::Reply(map),
        "EVALSHA" => Answer::Reply(reply),
        "ASKING" => Answer::Reply("+OK\r\n"),
        _ => well(name),
    }
}

/// Three nodes on the ports 1 to 3, of which the first two have the slots.
struct Setup {
    nodes: [Peer; 3],
    network: Peers,
}

impl Setup {
    fn new() -> Self {
        let nodes = [":1\r\n", ":2\r\n", ":3\r\n"].map(|reply| Peer::new(node(ON_1_AND_2, reply)));
        let network = Peers::default();
        network.0.lock().unwrap().extend((1..).zip(nodes.iter().cloned()));
        Self { nodes, network }
    }

    async fn connect(&self) -> Cluster<Peers> {
        let seeds = vec![Address { host: "h".to_owned(), port: 1 }];
        let login = Credentials::fixed(Some(Login { user: None, password: "s3cret".to_owned() }));
        Cluster::connect(self.network.clone(), seeds, login, SECOND, Arc::new(|| {})).await
    }
}

/// Runs a script on this key. Returns the number of the node that answered.
async fn run(cluster: &Cluster<Peers>, key: &str) -> Result<i64, StoreError> {
    let scripts = Scripts::default();
    let mut command = redis::cmd("EVALSHA");
    command.arg(scripts.place.sha()).arg(1).arg(key);
    match cluster.run(&scripts.place, command).await? {
        Value::Int(node) => Ok(node),
        other => panic!("{other:?}"),
    }
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + 60 * SECOND;
    while !is_so().await {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_goes_to_the_primary_of_its_slot() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    assert_eq!((run(&cluster, "{a}").await, run(&cluster, "{b}").await), (Ok(2), Ok(1)));
    assert!(setup.nodes[2].dialled().is_empty(), "it has no slot");
}

#[tokio::test(start_paused = true)]
async fn a_call_follows_a_slot_to_a_node_that_is_known_and_asks_only_once() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    for (redirection, asks) in [("-MOVED 15495 h:1\r\n", false), ("-ASK 15495 h:1\r\n", true)] {
        setup.nodes[1].play(node(ON_1_AND_2, redirection));
        let before = setup.nodes[0].received().len();
        assert_eq!(run(&cluster, "{a}").await, Ok(1));
        let received = setup.nodes[0].received().split_off(before);
        assert_eq!(received.iter().filter(|name| *name == "ASKING").count(), usize::from(asks), "{received:?}");
    }
    // Nodes that disagree for ever.
    setup.nodes[0].play(node(ON_1_AND_2, "-MOVED 15495 h:2\r\n"));
    let error = run(&cluster, "{a}").await.expect_err("no node has the slot");
    assert_eq!(error.kind(), "refused");
}

#[tokio::test(start_paused = true)]
async fn a_slot_that_has_moved_to_a_new_node_is_found_there_soon_and_no_call_waits_for_it() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    for peer in &setup.nodes[..2] {
        peer.play(node(ON_1_AND_3, "-MOVED 15495 h:3\r\n"));
    }
    let began = Instant::now();
    let error = run(&cluster, "{a}").await.expect_err("nobody knows the node yet");
    assert!(error.kind() == "no_connection" && began.elapsed() < SECOND / 10, "{error}");
    until("the new node", async || run(&cluster, "{a}").await == Ok(3)).await;
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_for_the_rest_of_a_slot_that_moves_for_half_of_its_time() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    let mut refusals = 10;
    setup.nodes[1].play(move |name| match name {
        "EVALSHA" if refusals > 0 => {
            refusals -= 1;
            Answer::Reply("-TRYAGAIN Multiple keys request during rehashing of slot\r\n")
        }
        name => node(ON_1_AND_2, ":2\r\n")(name),
    });
    assert_eq!(run(&cluster, "{a}").await, Ok(2));
    setup.nodes[1].play(node(ON_1_AND_2, "-TRYAGAIN Multiple keys request during rehashing of slot\r\n"));
    let began = Instant::now();
    let error = run(&cluster, "{a}").await.expect_err("the slot never arrives");
    assert!(error.kind() == "refused" && began.elapsed() < SECOND * 6 / 10, "{error} after {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_down_or_frozen_affects_its_own_slots_only() {
    for is_frozen in [false, true] {
        let setup = Setup::new();
        let cluster = setup.connect().await;
        if is_frozen {
            setup.nodes[1].play(|_| Answer::Silence);
        } else {
            setup.nodes[1].set_up(false);
        }
        let began = Instant::now();
        assert!(run(&cluster, "{a}").await.is_err());
        assert!(began.elapsed() <= SECOND, "{:?}", began.elapsed());
        until("calls to fail at once", async || {
            let began = Instant::now();
            run(&cluster, "{a}").await.is_err() && began.elapsed().is_zero()
        })
        .await;
        for _ in 0..50 {
            let began = Instant::now();
            assert_eq!(run(&cluster, "{b}").await, Ok(1));
            assert!(began.elapsed().is_zero(), "{:?}", began.elapsed());
            sleep(Duration::from_millis(100)).await;
        }
        setup.nodes[1].play(node(ON_1_AND_2, ":2\r\n"));
        setup.nodes[1].set_up(true);
        until("the node", async || run(&cluster, "{a}").await == Ok(2)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn another_node_takes_over_after_the_only_one_that_was_asked_is_gone() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    setup.nodes[0].set_up(false);
    setup.nodes[1].play(node(ON_1_AND_3, ":2\r\n"));
    setup.nodes[2].play(node(ON_1_AND_3, ":3\r\n"));
    until("the third node", async || run(&cluster, "{a}").await == Ok(3)).await;
}

#[tokio::test(start_paused = true)]
async fn a_slot_without_a_primary_fails_its_calls_at_once() {
    let setup = Setup::new();
    for peer in &setup.nodes {
        peer.play(node(ONLY_1, ":1\r\n"));
    }
    let cluster = setup.connect().await;
    assert_eq!(run(&cluster, "{b}").await, Ok(1));
    let error = run(&cluster, "{a}").await.expect_err("no node has it");
    assert_eq!(error, StoreError::NoConnection("no node of the cluster has slot 15495".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_heartbeat_shows_what_any_primary_has_lost_and_that_one_is_away() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    let scripts = Scripts::default();
    let beat = async || cluster.heartbeat(&scripts.heartbeat, "1000", 8).await;
    let plays = |replies: [&'static str; 2]| {
        for (peer, reply) in setup.nodes.iter().zip(replies) {
            peer.play(node(ON_1_AND_2, reply));
        }
    };
    plays(["$1\r\n7\r\n", "$1\r\n7\r\n"]);
    assert_eq!(beat().await, Ok(Value::BulkString(b"7".to_vec())));
    for replies in [["$1\r\n7\r\n", "$1\r\n6\r\n"], ["$-1\r\n", "$1\r\n7\r\n"], ["$-1\r\n", "$-1\r\n"]] {
        plays(replies);
        assert_eq!(beat().await, Ok(Value::Nil), "{replies:?}");
    }
    plays(["$1\r\n7\r\n", "$1\r\n7\r\n"]);
    setup.nodes[1].set_up(false);
    assert_eq!(beat().await, Ok(Value::BulkString(b"7".to_vec())));
    setup.nodes[0].set_up(false);
    assert!(beat().await.is_err());
}

#[tokio::test(start_paused = true)]
async fn jobs_are_listed_over_all_primaries_and_anew_when_slots_have_moved() {
    let page = |key: &str| format!("*2\r\n$1\r\n0\r\n*1\r\n${}\r\n{key}\r\n", key.len());
    let pages: Vec<&'static str> = ["k1", "k2", "k3"].map(|key| &*page(key).leak()).to_vec();
    let setup = Setup::new();
    let plays = |map: &'static str| {
        for (peer, page) in setup.nodes.iter().zip(&pages) {
            let page = *page;
            peer.play(move |name| if name == "SCAN" { Answer::Reply(page) } else { node(map, ":0\r\n")(name) });
        }
    };
    plays(ON_1_AND_2);
    let cluster = setup.connect().await;
    let first = cluster.list_keys("*", None).await.expect("a page");
    let second = cluster.list_keys("*", first.next.clone()).await.expect("a page");
    assert_eq!((first.keys.len(), second.keys.len(), second.next), (1, 1, None));
    assert_ne!(first.keys, second.keys);
    plays(ON_1_AND_3);
    cluster.shared.refresh_now.notify_one();
    until("the other node", async || cluster.shared.topology().primaries[1].node.address.port == 3).await;
    until("its connection", async || cluster.shared.topology().is_healthy()).await;
    let again = cluster.list_keys("*", first.next).await.expect("a page");
    assert_eq!(again.keys, first.keys, "the first page again");
    let last = cluster.list_keys("*", again.next).await.expect("a page");
    assert_eq!(last.keys, [Value::BulkString(b"k3".to_vec())]);
    assert!(cluster.list_keys("*", Some(Cursor::new("7"))).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_cluster() {
    let setup = Setup::new();
    drop(setup.connect().await);
    sleep(30 * SECOND).await;
    let dialled = setup.nodes[0].dialled().len();
    let received = setup.nodes[0].received().len();
    sleep(600 * SECOND).await;
    assert_eq!((setup.nodes[0].dialled().len(), setup.nodes[0].received().len()), (dialled, received));
}
