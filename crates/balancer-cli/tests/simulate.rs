//! The command line of `simulate`: its text, its JSON, its report and its errors.

#![allow(clippy::expect_used, clippy::indexing_slicing, reason = "a test")]

use std::process::{Command, Output};

use serde_json::Value;

fn simulate(options: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-spot_balancer"));
    command.args(["simulate", "--executors", "40", "--hours", "2", "--runs", "500"]);
    command.args(options.split_whitespace()).output().expect("the plugin runs")
}

fn text(options: &str) -> String {
    let output = simulate(options);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "outside a terminal there is no progress bar: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn the_table_has_a_row_for_each_ratio_and_base_and_lists_what_is_assumed() {
    let text = text("--ratios 0,0.7,1 --bases 0,10");
    let rows: Vec<Vec<&str>> = text.lines().take(7).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0][..4], ["RATIO", "BASE", "SPOT", "ON-DEMAND"]);
    let choices: Vec<_> = rows[1..].iter().map(|row| (row[0], row[1], row[2], row[3])).collect();
    assert_eq!(
        choices,
        [
            ("0", "0", "0", "40"),
            ("0.7", "0", "28", "12"),
            ("1", "0", "40", "0"),
            ("0", "10", "0", "40"),
            ("0.7", "10", "21", "19"),
            ("1", "10", "30", "10"),
        ]
    );
    let assumed = text.lines().find(|line| line.starts_with("interruptions per month")).expect("the input");
    assert!(assumed.contains("0.05") && assumed.contains("--rates") && assumed.contains("assumed: AWS"), "{assumed}");
    assert!(text.lines().any(|line| line.starts_with("executors ") && line.ends_with("stated")), "{text}");
    assert!(!text.contains('\x1b'), "no colours");
}

#[test]
fn the_wide_table_adds_the_error_bars() {
    let header = |options| text(options).lines().next().map(str::to_owned).expect("a header");
    assert!(!header("-o table").contains('±'));
    let wide = header("-o wide");
    assert!(["COST ±", "TIME ±", "THIRD LOST ±"].iter().all(|name| wide.contains(name)), "{wide}");
}

#[test]
fn json_has_stable_names_and_the_same_bytes_for_the_same_seed() {
    let json = text("--ratios 0,0.7 -o json --seed 5");
    assert_eq!(json, text("--ratios 0,0.7 -o json --seed 5"));
    assert_ne!(json, text("--ratios 0,0.7 -o json --seed 6"));
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!((&json["seed"], &json["runs"]), (&5.into(), &500.into()));
    let forecast = &json["forecasts"][1];
    for name in ["/ratio", "/base", "/spot", "/onDemand", "/costWithoutLosses", "/anyLoss", "/unfinished"]
        .into_iter()
        .chain([
            "/cost/value",
            "/cost/low",
            "/cost/high",
            "/risk/value",
            "/hours/mean/value",
            "/hours/p99",
            "/hours/max",
        ])
        .chain(["/largestLoss/p999", "/recomputed/value", "/waited/value", "/largestPool/name", "/largestPool/share"])
    {
        assert!(forecast.pointer(name).is_some_and(|value| !value.is_null()), "{name}: {forecast:#}");
    }
    assert_eq!(json["forecasts"][0]["largestPool"], Value::Null);
    let sources: Vec<_> = json["inputs"].as_array().expect("inputs").iter().map(|input| &input["source"]).collect();
    assert!(
        ["stated", "default", "assumed"].iter().all(|source| sources.contains(&&Value::from(*source))),
        "{sources:?}"
    );
}

#[test]
fn the_report_is_well_formed_and_loads_nothing() {
    let path = std::env::temp_dir().join(format!("simulate-{}.html", std::process::id()));
    text(&format!("--ratios 0,0.5,1 --bases 0,5 --html {}", path.display()));
    let html = std::fs::read_to_string(&path).expect("the report");
    std::fs::remove_file(&path).expect("the report is removed");
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(&html, options).expect("well-formed");
    let count = |name: &str| document.descendants().filter(|node| node.has_tag_name(name)).count();
    assert_eq!((count("svg"), count("table"), count("figcaption")), (2, 2, 2));
    assert_eq!(
        document.descendants().filter(|node| node.has_tag_name("circle")).count(),
        12,
        "one for each row and plot"
    );
    for loads in ["script", "link", "img", "iframe", "object", "use", "image"] {
        assert_eq!(count(loads), 0, "{loads}");
    }
    let attributes = document.descendants().flat_map(|node| node.attributes().collect::<Vec<_>>());
    let addresses: Vec<_> = attributes.filter(|attribute| ["src", "href"].contains(&attribute.name())).collect();
    assert!(addresses.is_empty(), "{addresses:?}");
    for loads in ["http:", "https:", "url(", "@import"] {
        assert!(!html.contains(loads), "{loads}");
    }
    assert!(html.contains("prefers-color-scheme: dark") && html.contains("width=device-width"));
    assert!(html.contains("<span class=\"assumed\">assumed</span>"));
}

#[test]
fn options_without_an_effect_are_named() {
    for (options, without) in [
        ("--bases 41", "--bases 41 is more than the job's 40 executors"),
        ("--spot-fallback-seconds 60", "--spot-fallback-seconds has no effect with --spot-preference best-effort"),
        (
            "--ready-nodes 5,5 --ratios 0.5 --max-pool-share 0.9",
            "--max-pool-share does not change where executors start",
        ),
    ] {
        assert!(text(options).contains(without), "{options}");
    }
    for options in [
        "--bases 40",
        "--spot-fallback-seconds 60 --spot-preference strict",
        "--ready-nodes 8,2,1,1 --ratios 1 --max-pool-share 0.3",
    ] {
        let text = text(options);
        assert!(
            !text.contains("has no effect") && !text.contains("does not change") && !text.contains("is more than"),
            "{text}"
        );
    }
}

#[test]
fn wrong_usage_exits_with_2_and_what_does_not_work_with_1() {
    let wrong = simulate("--ratios 2");
    let error = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(error.contains("--ratios") && error.contains("\"2\"") && error.contains("accepted: a decimal"), "{error}");
    let late = simulate("--pools 3 --rates 0.1,0.2");
    assert_eq!(late.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&late.stderr).starts_with("error: --rates has 2 values for 3 pools"), "{late:?}");
    let failed = simulate("--html /nowhere/report.html");
    assert_eq!(failed.status.code(), Some(1));
    let error = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(error.starts_with("error: --html /nowhere/report.html: cannot write the report: "), "{error}");
    assert!(failed.stdout.is_empty());
}
