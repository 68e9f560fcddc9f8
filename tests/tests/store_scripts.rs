//! The usual placement, which takes a shorter way, does exactly what the whole script does.

use std::collections::BTreeMap;

use anyhow::Result;
use balancer_tests::need;
use balancer_tests::redis::RedisServer;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, Value, cmd};

macro_rules! script {
    ($($file:literal),*) => {
        concat!($(include_str!(concat!("../../crates/balancer-store/src/redis/", $file))),*)
    };
}

const WHOLE: &str = script!("shared.lua", "decide.lua", "place.lua");
const WITH_SHORTCUT: &str = script!("fast_place.lua", "shared.lua", "decide.lua", "place.lua");
const SHORTCUT: &str = script!("fast_place.lua");
const TTL: i64 = 1_000_000;
const POLICY: &str = "spot-ratio=0.7 on-demand-base=1";

/// A field that is there and has no text; "" is a field that is not there.
const EMPTY: &str = "<empty>";

/// Values that are chosen one after the other; equal in each run.
struct Choices(u64);

impl Choices {
    /// One of these; the first, which is the usual one, in two of three cases.
    fn of(&mut self, values: &[&str]) -> String {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let number = (self.0 >> 33) as usize;
        let index = if number.is_multiple_of(3) { number / 3 % values.len() } else { 0 };
        values.get(index).copied().unwrap_or_default().to_owned()
    }
}

/// A ledger of one job, and the arguments of a placement in it.
struct Case {
    record: Vec<(&'static str, String)>,
    entry: String,
    arguments: Vec<String>,
}

impl Case {
    fn chosen(choices: &mut Choices, now: i64) -> Self {
        let kept = [TTL * 5 / 4, TTL / 2, TTL * 2].map(|left| (now + left).to_string());
        let [enough, short, long] = kept.each_ref().map(String::as_str);
        let record = vec![
            ("spot", choices.of(&["3", "0", "", EMPTY, "-1", "x", "1e3", "99"])),
            ("on-demand", choices.of(&["2", "0", "", EMPTY, "1.5", "7"])),
            (
                "policy",
                choices.of(&[
                    POLICY,
                    "",
                    "spot-ratio=0 on-demand-base=0",
                    "spot-ratio=1 on-demand-base=0",
                    "spot-ratio=0.3333333333 on-demand-base=3",
                    "spot-ratio=1.5 on-demand-base=0",
                    "spot-ratio=0.5 on-demand-base=10000000",
                    "spot-ratio=off on-demand-base=0",
                    "spot-ratio=1.2.3 on-demand-base=0",
                    "on-demand-base=0 spot-ratio=0.5",
                    "spot-ratio=0.5 on-demand-base=0 max-executors-per-node=2",
                ]),
            ),
            ("v", choices.of(&["1", "", EMPTY, "2"])),
            ("driver", choices.of(&["d", "", "other"])),
            ("spot-state", choices.of(&["", "starved 1 99999999999999", "probing 1 e1"])),
            ("avoid", choices.of(&["", "m5.large"])),
            ("kept-until", choices.of(&[enough, "", EMPTY, short, long, "soon"])),
            ("counting", choices.of(&["", "1", "0"])),
        ];
        let entry = choices.of(&["", "spot 1 -", "on-demand 1 u1", "anything"]);
        let mut arguments = vec![TTL.to_string(), "e1".to_owned()];
        arguments.push(choices.of(&["d", "", "another"]));
        arguments.push(choices.of(&["", "spot", "on-demand"]));
        arguments.push(choices.of(&[
            "",
            "spot-ratio=0.5",
            "spot-ratio=0.5 on-demand-base=4",
            "on-demand-base=4",
            "spot-ratio=off",
            "spot-ratio=7",
            "max-executors-per-node=3",
        ]));
        arguments.push(choices.of(&["", "spot-ratio=0.2 on-demand-base=0"]));
        arguments.push(choices.of(&["", "existing"]));
        // As callers leave empty ones out at the end.
        while arguments.last().is_some_and(String::is_empty) {
            arguments.pop();
        }
        Self { record, entry, arguments }
    }

    /// Calls the script in this ledger; returns its answer and the ledger afterwards, without times.
    async fn run(&self, redis: &mut MultiplexedConnection, script: &str) -> Result<(String, Vec<String>)> {
        let (count, pods) = ("exec-count:{a:b}", "exec-pods:{a:b}");
        let mut fill = redis::pipe();
        fill.del(count).del(pods).ignore();
        for (field, value) in self.record.iter().filter(|(_, value)| !value.is_empty()) {
            fill.hset(count, field, if value == EMPTY { "" } else { value }).ignore();
        }
        if !self.entry.is_empty() {
            fill.hset(pods, "e1", &self.entry).ignore();
        }
        for number in 0..4 {
            fill.hset(pods, format!("other{number}"), "spot 1 u").ignore();
        }
        fill.query_async::<()>(redis).await?;
        let mut call = cmd("EVAL");
        call.arg(script).arg(2).arg(count).arg(pods).arg(&self.arguments);
        let answer = call.query_async::<Value>(redis).await.map(|answer| format!("{answer:?}"));
        let mut ledger = Vec::new();
        for key in [count, pods] {
            let fields: BTreeMap<String, String> = cmd("HGETALL").arg(key).query_async(redis).await?;
            ledger.extend(fields.into_iter().map(|(field, value)| format!("{field}: {}", without_times(&value))));
            let lives: i64 = cmd("PTTL").arg(key).query_async(redis).await?;
            ledger.push(format!("kept for {}", (lives + 5_000) / 10_000));
        }
        Ok((answer.unwrap_or_else(|error| format!("error: {:?}", error.kind())), ledger))
    }
}

/// The text with a T in place of each number that is a time of today.
fn without_times(text: &str) -> String {
    let is_time = |word: &&str| word.len() == 13 && word.bytes().all(|byte| byte.is_ascii_digit());
    text.split(' ').map(|word| if is_time(&word) { "T" } else { word }).collect::<Vec<_>>().join(" ")
}

async fn now(redis: &mut MultiplexedConnection) -> Result<i64> {
    let (seconds, _): (i64, i64) = Cmd::new().arg("TIME").query_async(redis).await?;
    Ok(seconds * 1_000)
}

#[tokio::test]
async fn the_shortcut_of_a_placement_does_what_the_whole_script_does() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start().await?;
    let mut redis = server.connection().await?;
    let (mut choices, mut short) = (Choices(1), 0);
    for _ in 0..1_500 {
        let case = Case::chosen(&mut choices, now(&mut redis).await?);
        let expected = case.run(&mut redis, WHOLE).await?;
        let found = case.run(&mut redis, WITH_SHORTCUT).await?;
        assert_eq!(found, expected, "{:?} {:?} {:?}", case.record, case.entry, case.arguments);
        short += usize::from(case.run(&mut redis, SHORTCUT).await?.0 != "nil");
    }
    assert!(short > 25, "the shortcut was taken {short} times");
    Ok(())
}

#[tokio::test]
async fn the_usual_placements_take_the_shortcut() -> Result<()> {
    need!(Redis);
    let server = RedisServer::start().await?;
    let mut redis = server.connection().await?;
    let now = now(&mut redis).await?;
    let kept = (now + TTL * 5 / 4).to_string();
    let usual: [&[&str]; 4] = [&[], &["d"], &["d", "", "spot-ratio=0.5"], &["", "", "", "", "existing"]];
    for arguments in usual {
        // After a comparison the job's record has the field `counting`.
        for (entry, counting) in [("", ""), ("spot 1 -", ""), ("", "0")] {
            let record = [("spot", "3"), ("on-demand", "2"), ("policy", POLICY), ("v", "1"), ("driver", "d")];
            let record = record.map(|(field, value)| (field, value.to_owned()));
            let record =
                record.into_iter().chain([("kept-until", kept.clone()), ("counting", counting.to_owned())]).collect();
            let first = [TTL.to_string(), "e1".to_owned()];
            let arguments = first.into_iter().chain(arguments.iter().map(|text| (*text).to_owned())).collect();
            let case = Case { record, entry: entry.to_owned(), arguments };
            assert_ne!(case.run(&mut redis, SHORTCUT).await?.0, "nil", "{:?} {:?}", case.entry, case.arguments);
        }
    }
    Ok(())
}
