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
const ON_1_AND_2_WITH_A_REPLICA: &str = "*2\r\n*3\r\n:0\r\n:8191\r\n*2\r\n$1\r\nh\r\n:1\r\n*4\r\n:8192\r\n:16383\r\n*2\r\n$1\r\nh\r\n:2\r\n*2\r\n$1\r\nh\r\n:3\r\n";
const ONLY_1: &str = "*1\r\n*3\r\n:0\r\n:8191\r\n*2\r\n$1\r\nh\r\n:1\r\n";

/// A node that answers scripts and heartbeats like this.
fn node(map: &'static str, reply: &'static str) -> impl FnMut(&str) -> Answer + Send {
    move |name| match name {
        "CLUSTER SLOTS" => Answer::Reply(map),
        "EVALSHA" => Answer::Reply(reply),
        "ASKING" => Answer::Reply("+OK\r\n"),
        _ => well(name),
    }
}

/// The same, if it also says which election it knows of.
fn node_in(epoch: u64, map: &'static str, reply: &'static str) -> impl FnMut(&str) -> Answer + Send {
    let info = format!("cluster_state:ok\r\ncluster_current_epoch:{epoch}\r\n");
    let info: &'static str = format!("${}\r\n{info}\r\n", info.len()).leak();
    move |name| match name {
        "CLUSTER INFO" => Answer::Reply(info),
        name => node(map, reply)(name),
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
async fn a_slot_that_is_moving_to_a_node_without_slots_is_found_there_and_its_connection_is_kept() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    setup.nodes[1].play(node(ON_1_AND_2, "-ASK 15495 h:3\r\n"));
    let began = Instant::now();
    let error = run(&cluster, "{a}").await.expect_err("there is no connection to it yet");
    assert!(error.kind() == "no_connection" && began.elapsed() < SECOND / 10, "{error}");
    until("the new node", async || run(&cluster, "{a}").await == Ok(3)).await;
    for _ in 0..60 {
        sleep(SECOND).await;
        assert_eq!(run(&cluster, "{a}").await, Ok(3));
    }
    // It becomes a primary of the map.
    for peer in &setup.nodes {
        peer.play(node(ON_1_AND_3, ":3\r\n"));
    }
    cluster.shared.refresh_now.notify_one();
    until("the map", async || cluster.shared.topology().primaries[1].node.address.port == 3).await;
    assert_eq!(run(&cluster, "{a}").await, Ok(3));
    assert_eq!(setup.nodes[2].dialled().len(), 1, "the connection is kept");
}

#[tokio::test(start_paused = true)]
async fn nodes_that_stay_unreachable_are_dialled_less_and_less_often() {
    for down in [1..2, 0..2] {
        let setup = Setup::new();
        let cluster = setup.connect().await;
        for peer in &setup.nodes[down.clone()] {
            peer.set_up(false);
        }
        sleep(10 * SECOND).await;
        let before: Vec<_> = setup.nodes.iter().map(|peer| peer.dialled().len()).collect();
        sleep(60 * SECOND).await;
        for (peer, before) in setup.nodes[down].iter().zip(before) {
            // Between one and two seconds lie between two attempts, of the connection or of those who ask for the map.
            let attempts = peer.dialled().len() - before;
            assert!((20..=130).contains(&attempts), "{attempts}");
        }
        drop(cluster);
    }
}

/// Keeps the warnings that are logged.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = String::new();
        event.record(&mut |field: &tracing::field::Field, value: &dyn fmt::Debug| {
            text.push_str(&format!("{field}={value:?} "));
        });
        self.0.lock().unwrap().push(text);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test(start_paused = true)]
async fn a_primary_that_stays_unreachable_is_logged_once_and_once_when_it_is_back() {
    let warnings = Warnings::default();
    let _guard = tracing::subscriber::set_default(warnings.clone());
    let setup = Setup::new();
    let cluster = setup.connect().await;
    setup.nodes[1].set_up(false);
    sleep(60 * SECOND).await;
    let logged = warnings.0.lock().unwrap().clone();
    let [lost] = &*logged else { panic!("{logged:?}") };
    assert!(lost.contains("primary=h:2 ") && lost.contains("refused") && lost.contains("not reachable"), "{lost}");
    setup.nodes[1].set_up(true);
    until("the node", async || run(&cluster, "{a}").await == Ok(2)).await;
    sleep(60 * SECOND).await;
    let logged = warnings.0.lock().unwrap().split_off(1);
    let [back] = &*logged else { panic!("{logged:?}") };
    assert!(back.contains("primary=h:2 ") && back.contains("reachable again"), "{back}");
}

#[tokio::test(start_paused = true)]
async fn a_map_is_not_replaced_by_one_of_an_earlier_election() {
    let setup = Setup::new();
    for peer in &setup.nodes {
        peer.play(node_in(7, ON_1_AND_3, ":3\r\n"));
    }
    let cluster = setup.connect().await;
    let owner = || cluster.shared.topology().primaries[1].node.address.port;
    until("the map", async || cluster.shared.topology().is_healthy()).await;
    assert_eq!(owner(), 3);
    // The only node that answers was cut off before the election.
    setup.nodes[2].set_up(false);
    setup.nodes[0].play(node_in(6, ON_1_AND_2, ":1\r\n"));
    for _ in 0..200 {
        sleep(SECOND / 10).await;
        assert_eq!(owner(), 3);
    }
    setup.nodes[0].play(node_in(8, ON_1_AND_2, ":1\r\n"));
    until("a later election", async || owner() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_was_made_anew_is_used_after_a_while() {
    let setup = Setup::new();
    for peer in &setup.nodes {
        peer.play(node_in(700, ON_1_AND_3, ":3\r\n"));
    }
    let cluster = setup.connect().await;
    until("the map", async || cluster.shared.topology().is_healthy()).await;
    for peer in &setup.nodes {
        peer.play(node_in(3, ON_1_AND_2, ":2\r\n"));
        peer.close();
    }
    until("the new map", async || cluster.shared.topology().primaries[1].node.address.port == 2).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_waited_for_when_all_nodes_have_answered() {
    let began = Instant::now();
    let cluster = Setup::new().connect().await;
    assert_eq!(run(&cluster, "{a}").await, Ok(2));
    assert!(began.elapsed() < SECOND / 50, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_frozen_node_does_not_delay_a_new_map() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    setup.nodes[1].play(|_| Answer::Silence);
    setup.nodes[0].play(node(ON_1_AND_3, ":1\r\n"));
    let began = Instant::now();
    cluster.shared.refresh_now.notify_one();
    while cluster.shared.topology().primaries[1].node.address.port != 3 {
        sleep(Duration::from_millis(1)).await;
    }
    assert!(began.elapsed() < SECOND / 8, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_node_that_answers_late_is_heard_all_the_same() {
    let late = Duration::from_millis(300);
    let setup = Setup::new();
    for peer in &setup.nodes {
        peer.play(node_in(1, ON_1_AND_2, ":1\r\n"));
    }
    let cluster = setup.connect().await;
    let mut new = node_in(2, ON_1_AND_3, ":2\r\n");
    setup.nodes[1].play(move |name| match new(name) {
        Answer::Reply(reply) if name == "CLUSTER SLOTS" => Answer::Late(late, reply),
        answer => answer,
    });
    cluster.shared.refresh_now.notify_one();
    let began = Instant::now();
    while cluster.shared.topology().primaries[1].node.address.port != 3 {
        sleep(Duration::from_millis(1)).await;
    }
    assert!(began.elapsed() < SECOND / 2, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn of_several_maps_the_one_that_most_nodes_know_is_used() {
    let setup = Setup::new();
    let maps = [ON_1_AND_2, ON_1_AND_3, ON_1_AND_3];
    for (peer, map) in setup.nodes.iter().zip(maps) {
        peer.play(node(map, ":1\r\n"));
    }
    let seeds = (1..=3).map(|port| Address { host: "h".to_owned(), port }).collect();
    let login = Credentials::fixed(None);
    let cluster = Cluster::connect(setup.network.clone(), seeds, login, SECOND, Arc::new(|| {})).await;
    until("the map", async || cluster.shared.topology().primaries.get(1).is_some_and(|it| it.node.address.port == 3))
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_is_down_is_like_no_connection() {
    let setup = Setup::new();
    let cluster = setup.connect().await;
    setup.nodes[1].play(node(ON_1_AND_2, "-CLUSTERDOWN The cluster is down\r\n"));
    let began = Instant::now();
    let error = run(&cluster, "{a}").await.expect_err("the cluster is down");
    assert!(error.to_string().contains("CLUSTERDOWN The cluster is down"), "{error}");
    assert_eq!((error.kind(), began.elapsed()), ("no_connection", Duration::ZERO));
    let scripts = Scripts::default();
    let jobs = vec!["ns:a".to_owned(), "ns:b".to_owned()];
    setup.nodes[0].play(node(ON_1_AND_2, "-CLUSTERDOWN The cluster is down\r\n"));
    let error = cluster.note_placed(&scripts.note_placed, "1000", 1, jobs).await.expect_err("the cluster is down");
    assert_eq!(error.kind(), "no_connection", "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_error_says_why_no_slots_are_known() {
    let setup = Setup::new();
    for peer in &setup.nodes {
        peer.play(node("-NOPERM this user has no permissions to run the 'cluster|slots' command\r\n", ":1\r\n"));
    }
    let cluster = setup.connect().await;
    let error = run(&cluster, "{a}").await.expect_err("no slots are known").to_string();
    assert!(error.contains("h:1") && error.contains("cluster|slots"), "{error}");
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
    // Another replica moves no slot.
    plays(ON_1_AND_2_WITH_A_REPLICA);
    cluster.shared.refresh_now.notify_one();
    until("the replica", async || cluster.shared.topology().map.replicas.len() == 1).await;
    assert_eq!(cluster.list_keys("*", first.next.clone()).await.expect("a page").keys, second.keys);
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
