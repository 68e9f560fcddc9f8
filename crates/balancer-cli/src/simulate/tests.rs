use super::fixtures::job;
use super::*;

fn output(options: &str) -> String {
    let mut out = Vec::new();
    run(&job(&format!("--runs 200 {options}")), &mut out).expect("a result");
    String::from_utf8(out).expect("text")
}

#[test]
fn shares_keep_two_digits_that_tell_something() {
    let shown = [0.0, 0.000_001, 0.000_25, 0.004_2, 0.58, 1.0].map(percent);
    assert_eq!(shown, ["0 %", "<0.001 %", "0.025 %", "0.42 %", "58.0 %", "100.0 %"]);
    assert_eq!([0.05, 2.0, 250.0].map(hours), ["0.050 h", "2.00 h", "250.0 h"]);
}

#[test]
fn a_risk_that_no_simulated_job_met_is_shown_as_its_bound() {
    let shown = |value, high| probability(Estimate { value, low: 0.0, high });
    assert_eq!(
        [shown(0.0, 0.0), shown(0.0, 0.004), shown(0.0, 1e-7), shown(0.003, 0.004)],
        ["0 %", "<0.40 %", "<0.001 %", "0.30 %"]
    );
}

#[test]
fn the_price_is_shown_if_it_is_stated() {
    assert!(!output("--ratios 0").contains("PRICE"));
    let text = output("--ratios 0 --on-demand-price 0.2 -o wide");
    assert!(text.lines().next().is_some_and(|header| header.ends_with("COST IF LOST   PRICE")), "{text}");
    assert!(text.lines().nth(1).is_some_and(|row| row.ends_with("40.00")), "{text}");
}

#[test]
fn jobs_that_were_given_up_are_mentioned() {
    assert!(!output("--ratios 1").contains("given up"));
    let hopeless = "--ratios 1 --rates 0.9 --pools 1 --spot-preference strict --shortage-minutes 100000";
    let text = output(hopeless);
    assert!(text.contains("of the jobs were given up, so their cost and time are higher than shown."), "{text}");
}
