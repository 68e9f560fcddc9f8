use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::super::fixtures::{parse, plan};
use super::super::input::Plan;
use super::*;

/// The outcome if this is all that is lost.
fn outcome(plan: &Plan, at_hours: f64, loss: Loss) -> Outcome {
    model(plan).run(&mut Once, at_hours * 3600.0, loss, u64::MAX)
}

fn model(plan: &Plan) -> Model<'_> {
    Model::new(&plan.scenario, *plan.policies.first().expect("a policy"))
}

#[track_caller]
fn assert_near(have: f64, want: f64) {
    assert!((have - want).abs() < 1e-6 * want.abs().max(1.0), "{have} instead of {want}");
}

proptest! {
    #[test]
    fn without_losses_a_job_costs_one_less_the_discount_of_its_share_of_spot(
        executors in 1u32..2000, ratio in 0u32..=100, base in 0u32..50, discount in 0u32..=100,
    ) {
        let options = format!(
            "--executors {executors} --hours 1.5 --ratios {ratio}% --bases {base} --discounts {}",
            f64::from(discount) / 100.0
        );
        let plan = parse(&options).unwrap().plan().unwrap();
        let model = model(&plan);
        let share = f64::from(u32::try_from(model.counts().spot).unwrap()) / f64::from(executors);
        let undisturbed = model.undisturbed();
        prop_assert_eq!(undisturbed.cost, 1.0 - share * (f64::from(discount) / 100.0));
        prop_assert_eq!(undisturbed.hours, 1.5);
        let wanted = f64::from(ratio) / 100.0 * f64::from(executors.saturating_sub(base));
        prop_assert!((share * f64::from(executors) - wanted).abs() <= 1.0, "the ratio is kept");
        // The simulation agrees if its only loss is after the end.
        let simulated = model.run(&mut Once, 1e9, Loss::Pool(0), u64::MAX);
        prop_assert!((simulated.cost - undisturbed.cost).abs() < 1e-9 && (simulated.hours - 1.5).abs() < 1e-9);
    }

    /// As `Shares::avoided` promises it, if none of a batch was counted.
    #[test]
    fn if_nodes_are_there_no_pool_gets_more_than_its_share_and_most_of_a_batch(
        executors in 1u32..500, percent in 25u32..=100,
    ) {
        let options = format!(
            "--executors {executors} --hours 1 --ratios 0.8 --max-pool-share {percent}% --node-start-seconds 0 \
             --executors-per-node 1"
        );
        let plan = parse(&options).unwrap().plan().unwrap();
        let model = model(&plan);
        let (share, spot) = (f64::from(percent) / 100.0, f64::from(u32::try_from(model.counts().spot).unwrap()));
        let most = spot * share + (1.0 - share) * f64::from(SPARK_BATCH) + 1.0;
        let (_, largest) = model.largest_pool().unwrap();
        prop_assert!(f64::from(largest) <= most, "{largest} of at most {most}");
    }

    #[test]
    fn any_job_ends_with_values_that_are_possible(
        executors in 1u32..200, ratio in 1u32..=10, rate in 1u32..999, hours in 1u32..200, share in 3u32..=10, seed: u64,
        is_strict: bool, fallback in prop_oneof![Just(0), Just(120)],
        nodes in prop_oneof![Just(""), Just("--ready-nodes 1"), Just("--ready-nodes 8,2,1")],
    ) {
        let options = format!(
            "--executors {executors} --hours {hours} --ratios {}% --rates {} --max-pool-share {}% --pool-wide 0.5 \
             --spot-preference {} --spot-fallback-seconds {fallback} {nodes}",
            ratio * 10, f64::from(rate) / 1000.0, share * 10, if is_strict { "strict" } else { "best-effort" },
        );
        let plan = parse(&options).unwrap().plan().unwrap();
        let outcome = model(&plan).disturbed(&mut ChaCha8Rng::seed_from_u64(seed), u64::MAX);
        prop_assert!(outcome.lost > 0, "{outcome:?}");
        prop_assert!((0.0..=1.0).contains(&outcome.largest_loss) && outcome.largest_loss > 0.0, "{outcome:?}");
        prop_assert!(outcome.hours >= f64::from(hours) * (1.0 - 1e-9), "{outcome:?}");
        prop_assert!(outcome.cost.is_finite() && outcome.cost > 0.0 && outcome.recomputed >= 0.0, "{outcome:?}");
    }
}

/// The reconciler knows no pool before the first node is there, and 40 executors are requested within eight seconds.
#[test]
fn while_no_node_is_there_a_job_goes_to_one_pool_whatever_its_share() {
    let largest = |executors: u32, options: &str| {
        let options = format!("--executors {executors} --hours 1 --ratios 1 --max-pool-share 0.4 {options}");
        let plan = parse(&options).unwrap().plan().unwrap();
        model(&plan).largest_pool().unwrap().1
    };
    assert_eq!(largest(40, ""), 40);
    assert!(largest(40, "--node-start-seconds 0") <= 20);
    assert_eq!(largest(40, "--node-start-seconds 4"), 20, "of the first four seconds");
    // 225 are requested before the first node is there. Three more fill the last node, and the others go elsewhere.
    assert_eq!(largest(400, ""), 228);
    assert_eq!(largest(225, ""), 225);
}

/// As tests/tests/simulate_reality.rs sees it on the real scheduler.
#[test]
fn replacements_fill_nodes_with_room_before_an_autoscaler_adds_others() {
    let plan = parse("--executors 30 --hours 1 --ratios 0.7 --executors-per-node 4").unwrap().plan().unwrap();
    let (scenario, policy) = (&plan.scenario, plan.policies[0]);
    let mut cluster = model(&plan).start;
    let pools = |cluster: &Cluster| cluster.pools.iter().map(|pool| pool.nodes.all()).collect::<Vec<_>>();
    assert_eq!(pools(&cluster), [21, 0, 0, 0]);
    for after in [[20, 1, 0, 0], [16, 5, 0, 0], [12, 9, 0, 0]] {
        assert_eq!(cluster.lose_node(0, 4, |_| false, 0.0), 4);
        cluster.request(scenario, policy, 0.0);
        cluster.next_batch_at = 0.0;
        assert_eq!(pools(&cluster), after);
    }
}

#[test]
fn executors_are_spread_over_the_nodes_that_are_there_and_avoid_a_pool_with_its_share() {
    let pools = |options: &str| {
        let plan = parse(&format!("--executors 30 --hours 1 --ratios 0.7 {options}")).unwrap().plan().unwrap();
        model(&plan).start.pools.iter().map(|pool| pool.nodes.running).collect::<Vec<_>>()
    };
    assert_eq!(pools("--ready-nodes 8,2,1,1"), [14, 3, 2, 2]);
    assert_eq!(pools("--ready-nodes 3 --pools 4"), [6, 5, 5, 5]);
    assert_eq!(pools("--ready-nodes 100,1,1,1"), [21, 0, 0, 0]);
    let limited = pools("--ready-nodes 8,2,1,1 --max-pool-share 0.3");
    assert!(limited[0] <= 8 && limited.iter().sum::<u32>() == 21, "{limited:?}");
}

#[test]
fn a_node_that_is_there_has_as_many_as_the_others_or_one_more_and_its_pool_stays_open() {
    let plan = plan("--ratios 1 --ready-nodes 6,3");
    let cluster = model(&plan).start;
    assert_eq!(cluster.pools.iter().map(|pool| pool.nodes.running).collect::<Vec<_>>(), [67, 33]);
    // One of six has twelve.
    assert_eq!(cluster.clone().lose_node(0, 4, |nodes| nodes == 6.0, 0.0), 12);
    let mut cluster = cluster;
    assert_eq!(cluster.lose_node(0, 4, |_| false, 0.0), 11);
    assert_eq!((cluster.pools[0].out_until, cluster.pools[0].node_out_until), (0.0, 180.0));
    // 56 are on five nodes, and 33 on three. Then the sixth is back.
    let choose = |now| cluster.choose_pool(&plan.scenario, &[], now);
    assert_eq!([choose(0.0), choose(200.0)], [Some((1, 1)), Some((0, 1))]);
}

#[test]
fn replacements_avoid_the_pools_that_have_nodes() {
    let plan = plan("--ratios 1 --max-pool-share 0.4");
    let (scenario, policy) = (&plan.scenario, plan.policies[0]);
    let mut cluster = model(&plan).start;
    assert_eq!(cluster.pools[0].nodes.running, 100);
    cluster.lose_node(0, 40, |_| false, 0.0);
    // The pool may be used again at once.
    cluster.pools[0].out_until = 0.0;
    let mut now = 0.0;
    cluster.request(scenario, policy, now);
    while cluster.next_change(policy, now) < f64::INFINITY {
        now = cluster.next_change(policy, now);
        cluster.change(scenario, policy, now);
    }
    // All are requested within eight seconds, before the second pool is known.
    let running: Vec<u32> = cluster.pools.iter().map(|pool| pool.nodes.running).collect();
    assert_eq!(running, [60, 40, 0, 0]);
}

#[test]
fn without_spot_nothing_can_be_lost() {
    for options in ["--ratios 0 --rates 0.9", "--ratios 1 --bases 100 --rates 0.9", "--ratios 1 --rates 0"] {
        assert_eq!(model(&plan(options)).disturbance(), 0.0, "{options}");
    }
    assert_eq!(model(&plan("--ratios 0")).largest_pool_lost(), None);
}

#[test]
fn the_probability_of_a_loss_is_that_of_the_rates() {
    // A tenth of the nodes in a month, all with their pool: one pool has all executors.
    let rate = -(0.9f64.ln()) / 730.0;
    let pool = plan("--ratios 1 --rates 0.1 --pool-wide 1");
    assert_near(model(&pool).disturbance(), 1.0 - (-rate * 2.0).exp());
    // Each alone: 25 nodes.
    let nodes = plan("--ratios 1 --rates 0.1 --pool-wide 0");
    assert_near(model(&nodes).disturbance(), 1.0 - (-rate * 2.0 * 25.0).exp());
    // Three pools, and each of their twelve nodes.
    let ready = plan("--ratios 1 --rates 0.1 --pool-wide 0.5 --ready-nodes 8,3,1");
    assert_near(model(&ready).disturbance(), 1.0 - (-rate * 2.0 * (1.5 + 6.0)).exp());
}

#[test]
fn the_work_of_lost_executors_is_done_again_unless_their_blocks_are_kept() {
    let end = 2.0 * (1.0 - 1e-9);
    // Five in a second, so the last of a hundred are requested after 19 s.
    let replaced = (125.0 + 9.5) / 3600.0;
    let hours = |options: &str| outcome(&plan(&format!("--ratios 1 {options}")), end, Loss::Pool(0)).hours;
    assert_near(hours(""), 2.0 + replaced + 2.0);
    assert_near(hours("--shuffle 0"), 2.0 + 125.0 / 3600.0);
    assert_near(hours("--stages 4"), 2.0 + replaced + 0.5);
    assert_near(hours("--pvc-reuse"), 2.0 + replaced + 2.0 * (1.0 - KEPT_ON_VOLUMES));
    // Nobody is left to receive blocks.
    assert_near(hours("--decommission"), 2.0 + replaced + 2.0);
    // Half of the executors have half of the blocks, and do the rest of the work until the others are replaced.
    let half = |options: &str| outcome(&plan(&format!("--ratios 0.5 {options}")), end, Loss::Pool(0));
    assert_near(half("").hours, 2.0 + 1.0 + (125.0 + 4.5) / 3600.0 / 2.0);
    assert_near(half("").recomputed, 0.5);
    assert_near(half("--decommission --shuffle 10").recomputed, 0.0);
    // 100 s at 0.1 GB/s are 10 GB of 20.
    assert_near(half("--decommission --shuffle 20").recomputed, 0.25);
}

#[test]
fn a_job_that_loses_everything_takes_about_as_long_as_aws_has_measured_with_interruptions() {
    // 30 executors and 440 s. AWS: 1024 s, and 627 s with volumes.
    let run = |options: &str| {
        let plan = parse(&format!("--executors 30 --hours 0.12222222 --ratios 1 {options}")).unwrap().plan().unwrap();
        model(&plan).largest_pool_lost().unwrap().hours * 3600.0
    };
    assert!((run("") / 1024.0 - 1.0).abs() < 0.05, "{}", run(""));
    assert!((run("--pvc-reuse") / 627.0 - 1.0).abs() < 0.05, "{}", run("--pvc-reuse"));
}

#[test]
fn a_job_that_lost_a_pool_continues_in_the_next_one() {
    let lost = outcome(&plan("--ratios 0.7 --shuffle 0"), 1.0, Loss::Pool(0));
    assert_near(lost.largest_loss, 0.7);
    assert_eq!(lost.lost, 70);
    // Five are requested in a second, so 70 are for 6.5 s on average. Until then they cost nothing.
    let requested = 6.5 / 3600.0;
    assert_near(lost.hours, 2.0 + 0.7 * (125.0 / 3600.0 + requested));
    // Both pools cost the same, and nodes that start cost as much as those that run.
    assert_near(lost.cost, (1.0 - 0.7 * 0.6) * lost.hours / 2.0 - 0.7 * 0.4 * requested / 2.0);
}

#[test]
fn without_spot_best_effort_pays_and_strict_waits_and_the_fallback_is_between() {
    let lost = |options: &str| {
        let options = format!("--ratios 1 --pools 1 --shuffle 0 --shortage-minutes 30 {options}");
        outcome(&plan(&options), 1.0, Loss::Pool(0))
    };
    let replaced = 125.0 / 3600.0;
    let best_effort = lost("");
    // Five are requested in a second, so 100 are for 9.5 s on average.
    let requested = 9.5 / 3600.0;
    assert_near(best_effort.hours, 2.0 + replaced + requested);
    assert_near(best_effort.cost, 0.4 * 0.5 + 0.5 + replaced / 2.0);
    assert_near(best_effort.waited, 0.0);
    let strict = lost("--spot-preference strict");
    assert_near(strict.hours, 2.0 + 0.5 + replaced);
    assert_near(strict.cost, 0.4 * (1.0 + replaced / 2.0));
    assert_near(strict.waited, 100.0 * (0.5 - requested));
    // Ten of a hundred every five seconds, after two minutes.
    let fallback = lost("--spot-preference strict --spot-fallback-seconds 120");
    assert!(fallback.hours > best_effort.hours + 119.0 / 3600.0, "{fallback:?}");
    assert!(fallback.hours < best_effort.hours + 180.0 / 3600.0, "{fallback:?}");
    assert!(fallback.cost > strict.cost * 1.5 && fallback.waited < 10.0, "{fallback:?}");
}

#[test]
fn a_probe_that_finds_spot_opens_it_for_the_executors_after_it() {
    let plan = plan("--ratios 1 --pools 1 --spot-preference strict --spot-fallback-seconds 60 --shortage-minutes 0.5");
    let (scenario, policy) = (&plan.scenario, plan.policies[0]);
    let mut cluster = model(&plan).start;
    let run_until = |cluster: &mut Cluster, until: f64| {
        let mut now = 0.0;
        while cluster.next_change(policy, now) <= until {
            now = cluster.next_change(policy, now);
            cluster.change(scenario, policy, now);
        }
    };
    cluster.pools[0].out_until = 1000.0;
    cluster.missing = 10;
    cluster.request(scenario, policy, 0.0);
    run_until(&mut cluster, 400.0);
    assert!(matches!(cluster.spot, SpotState::Starved { .. }), "{:?}", cluster.spot);
    assert_eq!(cluster.on_demand.running, 10);
    cluster.missing = 2;
    cluster.request(scenario, policy, 500.0);
    assert!(matches!(cluster.spot, SpotState::Probing { .. }) && cluster.waiting() == 1, "one probes, one does not");
    // It finds no spot either.
    run_until(&mut cluster, 600.0);
    assert!(matches!(cluster.spot, SpotState::Starved { .. }) && cluster.waiting() == 0, "{:?}", cluster.spot);
    cluster.missing = 1;
    cluster.request(scenario, policy, 990.0);
    run_until(&mut cluster, 2000.0);
    assert_eq!(cluster.spot, SpotState::Open);
    assert_eq!(u64::from(cluster.running()), cluster.counts.total());
}

#[test]
fn losses_within_three_minutes_are_one() {
    let mut recent = Recent::default();
    assert_eq!([recent.add(0.0, 3), recent.add(100.0, 4), recent.add(179.0, 5), recent.add(280.0, 6)], [3, 7, 12, 11]);
}

#[test]
fn the_last_node_of_a_pool_may_be_lost_too() {
    let plan = plan("--executors-per-node 4 --ratios 0.9");
    let mut cluster = model(&plan).start;
    cluster.pools[0].nodes.running = 10;
    assert_eq!(cluster.clone().lose_node(0, 4, |nodes| nodes == 3.0, 0.0), 2);
    assert_eq!(cluster.lose_node(0, 4, |_| false, 0.0), 4);
    assert_eq!(cluster.pools[0].nodes.running, 6);
    assert_eq!(cluster.pools[0].out_until, AVOIDED_AFTER_INTERRUPTION_SECONDS);
}
