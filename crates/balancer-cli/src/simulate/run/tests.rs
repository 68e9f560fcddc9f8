use proptest::prelude::*;

use super::super::fixtures::plan;
use super::*;

fn simulate(options: &str, runs: u32, seed: u64) -> Vec<Forecast> {
    let plan = plan(options);
    forecasts(&plan.scenario, &plan.policies, Sampling { runs, seed }, || {})
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_larger_discount_never_costs_more(discounts: (u8, u8), ratio in 1u32..=10, rate in 0u32..900, seed: u64) {
        let cost = |discount: u8| {
            let (discount, rate) = (f64::from(discount) / 255.0, f64::from(rate) / 1000.0);
            let options = format!("--ratios {}% --discounts {discount} --rates {rate} --max-pool-share 0.4", ratio * 10);
            simulate(&options, 100, seed)[0].cost.value
        };
        let (small, large) = (discounts.0.min(discounts.1), discounts.0.max(discounts.1));
        prop_assert!(cost(large) <= cost(small) + 1e-12);
    }

    #[test]
    fn probabilities_are_within_0_and_1_and_values_within_their_bounds(
        rate in 0u32..=999, pool_wide in 0u32..=10, hours in 1u32..720, seed: u64,
    ) {
        let (rate, pool_wide) = (f64::from(rate) / 1000.0, f64::from(pool_wide) / 10.0);
        let options = format!("--rates {rate} --pool-wide {pool_wide} --hours {hours} --max-pool-share 0.5");
        let options = options.replace("--hours", "--stages 3 --hours");
        let plan = super::super::fixtures::parse(&format!("--executors 20 {options}")).unwrap().plan().unwrap();
        for forecast in forecasts(&plan.scenario, &plan.policies, Sampling { runs: 100, seed }, || {}) {
            let risk = forecast.risk;
            prop_assert!((0.0..=1.0).contains(&risk.low) && (0.0..=1.0).contains(&risk.high), "{forecast:?}");
            prop_assert!((0.0..=1.0).contains(&forecast.any_loss) && risk.value <= forecast.any_loss, "{forecast:?}");
            for Estimate { value, low, high } in [risk, forecast.cost, forecast.hours.mean, forecast.largest_loss.mean] {
                prop_assert!(low <= value + 1e-12 && value <= high + 1e-12, "{low} <= {value} <= {high}");
            }
            let Spread { p50, p95, p99, p999, max, .. } = forecast.hours;
            prop_assert!(p50 <= p95 && p95 <= p99 && p99 <= p999 && p999 <= max.max(p999), "{forecast:?}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_result_on_any_number_of_threads() {
    let on = |threads: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| simulate("--rates 0.3 --max-pool-share 0.4", 300, seed))
    };
    let one = on(1, 7);
    assert_eq!(one, on(3, 7));
    assert_eq!(one, on(8, 7));
    assert_ne!(one, on(1, 8));
}

#[test]
fn ratio_0_has_no_risk_and_a_base_of_all_executors_is_the_same() {
    let forecasts = simulate("--ratios 0,1 --bases 0,100 --rates 0.9", 200, 1);
    let [zero, one, zero_with_base, one_with_base] = &forecasts[..] else { panic!("{forecasts:?}") };
    assert_eq!((zero.risk.high, zero.any_loss, zero.cost.value, zero.hours.max), (0.0, 0.0, 1.0, 2.0));
    assert_eq!(*zero_with_base, Forecast { base: 100, ..zero.clone() });
    assert_eq!(*one_with_base, Forecast { base: 100, ratio: "1".to_owned(), ..zero.clone() });
    assert!(one.risk.low > 0.0);
}

#[test]
fn without_interruptions_the_cost_is_exactly_that_of_the_discount() {
    for forecast in simulate("--rates 0 --discounts 0.35", 100, 1) {
        let share = f64::from(u32::try_from(forecast.spot).unwrap()) / 100.0;
        assert_eq!((forecast.cost.low, forecast.cost.value), (1.0 - share * 0.35, 1.0 - share * 0.35));
        assert_eq!(forecast.hours.max, 2.0);
    }
}

/// Of the executors 45 % are in one pool and 30 % in another. Only the loss of the first is one of more than a third,
/// whichever pool is lost before.
#[test]
fn the_exact_risk_is_within_the_error_bars_as_often_as_they_say() {
    let options = "--ratios 0.75 --rates 0.5,0.5 --max-pool-share 0.6 --pool-wide 1 --shuffle 0 --replacement-seconds 0 \
                   --node-start-seconds 0 --shortage-minutes 0";
    let exact = 1.0 - (0.5f64.ln() / 730.0 * 2.0).exp();
    let hits = (0..100).filter(|seed| {
        let forecast = &simulate(options, 400, *seed)[0];
        let pool = forecast.largest_pool.as_ref().unwrap();
        assert!((0.43..0.47).contains(&pool.share), "{pool:?}");
        (forecast.risk.low..=forecast.risk.high).contains(&exact)
    });
    let hits = hits.count();
    assert!((88..100).contains(&hits), "{hits} of 100");
}

#[test]
fn what_would_take_too_long_gets_fewer_runs_or_is_refused() {
    let plan = plan("--ratios 0,0.5,1 --rates 0.9");
    let affordable = |most| affordable(&plan.scenario, &plan.policies, Sampling { runs: 10_000, seed: 1 }, most);
    assert_eq!(affordable(u64::MAX / 8).unwrap(), 10_000);
    let fewer = affordable(1_000_000).unwrap();
    assert!((FEWEST_RUNS..10_000).contains(&fewer), "{fewer}");
    // As many as fit.
    let steps = |policy| {
        let model = Model::new(&plan.scenario, policy);
        let runs = (0..fewer).filter(|_| model.disturbance() > 0.0);
        runs.map(|run| model.disturbed(&mut random(Sampling { runs: fewer, seed: 1 }, run), u64::MAX).steps)
            .sum::<u64>()
    };
    let steps: u64 = plan.policies.iter().map(|policy| steps(*policy)).sum();
    assert!((300_000..3_000_000).contains(&steps), "{steps}");
    let error = affordable(1000).unwrap_err().to_string();
    assert!(error.starts_with("--executors 100 and --hours 2: even --runs 100 would take more"), "{error}");
}

#[test]
fn a_job_of_a_month_that_never_ends_is_refused_soon() {
    let line = "--executors 100000 --hours 720 --rates 0.9";
    let plan = super::super::fixtures::parse(line).unwrap().plan().unwrap();
    affordable(&plan.scenario, &plan.policies, Sampling { runs: 10_000, seed: 1 }, 20_000_000).unwrap_err();
}

#[test]
fn more_runs_give_smaller_error_bars() {
    let width = |runs| {
        let forecast = &simulate("--ratios 0.7 --max-pool-share 0.4", runs, 1)[0];
        forecast.cost.high - forecast.cost.low
    };
    assert!(width(10_000) < width(100) / 5.0, "{} and {}", width(10_000), width(100));
}

#[test]
fn quantiles_are_those_of_all_jobs() {
    let disturbed: Vec<Outcome> =
        (1..=100u32).map(|hours| Outcome { hours: 10.0 + f64::from(hours), ..Outcome::default() }).collect();
    let undisturbed = Outcome { hours: 10.0, ..Outcome::default() };
    let spread = Mixture { disturbed: &disturbed, undisturbed, any_loss: 0.1 }.spread(|outcome| outcome.hours);
    assert_eq!((spread.p50, spread.max), (10.0, 110.0));
    // One in ten loses something; of these half takes 61 hours or more.
    assert!((spread.p95 - 61.0).abs() <= 1.0 && (spread.p99 - 101.0).abs() <= 1.0, "{spread:?}");
    assert!((spread.mean.value - (10.0 + 0.1 * 50.5)).abs() < 1e-9, "{spread:?}");
}
