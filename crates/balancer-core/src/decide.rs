//! The capacity of the next executor, in exact integer arithmetic, and the fallback formula for when the store
//! does not answer.

use crate::capacity::{Capacity, Counts};
use crate::policy::Policy;
use crate::ratio::Ratio;

/// The capacity of the next executor of a job with these live executors and this policy; `None` if the job is opted
/// out.
///
/// The executors of the on-demand base come first. After them the next executor goes to spot unless spot's share
/// of the executors beyond the base is above the ratio. So a job stays within one executor of its ratio.
///
/// The Redis scripts of `balancer-store` (`decide.lua`) apply the same rule; its contract tests compare the two.
pub fn decide(counts: Counts, policy: Policy) -> Option<Capacity> {
    let ratio = policy.spot_ratio.share()?;
    let base = u64::from(policy.on_demand_base);
    if counts.on_demand < base || ratio == Ratio::ZERO {
        return Some(Capacity::OnDemand);
    }
    if ratio == Ratio::ONE {
        return Some(Capacity::Spot);
    }
    let beyond_base = counts.spot + (counts.on_demand - base);
    let spot = u128::from(counts.spot) * u128::from(Ratio::ONE_IN_BILLIONTHS);
    // Without an executor beyond the base this is 0 <= 0, so the first one goes to spot.
    let is_spot_due = spot <= u128::from(ratio.billionths()) * u128::from(beyond_base);
    Some(if is_spot_due { Capacity::Spot } else { Capacity::OnDemand })
}

/// What the fallback formula knows of an executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordinal<'a> {
    /// The label `spark-exec-id`, with which Spark numbers the executors of a job from 1.
    Number(u64),
    /// The name or placeholder, if the number is not known.
    Name(&'a str),
}

/// The fallback formula: the capacity of an executor if the store does not answer; `None` if the job is opted out.
///
/// For a number, this is what [`decide`] returns if every earlier executor still lives. For a name, it depends on
/// a hash of the name, so that the ratio is met on average and the answer is always the same.
pub fn decide_without_ledger(ordinal: Ordinal<'_>, policy: Policy) -> Option<Capacity> {
    let share = policy.spot_ratio.share()?;
    let ratio = u128::from(share.billionths());
    let one = u128::from(Ratio::ONE_IN_BILLIONTHS);
    let spot = match ordinal {
        _ if share == Ratio::ZERO => false,
        Ordinal::Number(number) => match number.saturating_sub(u64::from(policy.on_demand_base)) {
            0 => false,
            1 => true,
            // floor((i-1)·r) > floor((i-2)·r): at this executor one more spot executor is due.
            i => u128::from(i - 1) * ratio / one > u128::from(i - 2) * ratio / one,
        },
        Ordinal::Name(name) => u128::from(hash(name)) * one < ratio << 64,
    };
    Some(if spot { Capacity::Spot } else { Capacity::OnDemand })
}

/// FNV-1a with the finalizer of MurmurHash3, so that names that differ only in their last letter spread evenly.
fn hash(name: &str) -> u64 {
    let mut hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ratio::SpotRatio;
    use proptest::prelude::*;

    fn policy(billionths: u32, base: u32) -> Policy {
        let ratio_only = Policy { spot_ratio: Ratio::from_billionths(billionths).unwrap().into(), ..Policy::DEFAULT };
        Policy { on_demand_base: base, ..ratio_only }
    }

    #[test]
    fn two_on_demand_and_five_spot_at_seven_tenths_get_on_demand() {
        assert_eq!(decide(Counts { spot: 5, on_demand: 2 }, policy(700_000_000, 0)), Some(Capacity::OnDemand));
    }

    #[test]
    fn a_job_that_is_opted_out_has_no_capacity() {
        let off = Policy { spot_ratio: SpotRatio::Off, ..policy(0, 5) };
        assert_eq!(decide(Counts::default(), off), None);
        for ordinal in [Ordinal::Number(1), Ordinal::Name("e")] {
            assert_eq!(decide_without_ledger(ordinal, off), None);
        }
    }

    #[test]
    fn the_base_comes_before_a_ratio_of_one() {
        let policy = policy(Ratio::ONE_IN_BILLIONTHS, 2);
        assert_eq!(decide(Counts { spot: 3, on_demand: 1 }, policy), Some(Capacity::OnDemand));
        assert_eq!(decide(Counts { spot: 3, on_demand: 2 }, policy), Some(Capacity::Spot));
    }

    fn ratios() -> impl Strategy<Value = u32> {
        prop_oneof![
            Just(0),
            Just(1),
            Just(500_000_000),
            Just(700_000_000),
            Just(999_999_999),
            Just(Ratio::ONE_IN_BILLIONTHS),
            0..=Ratio::ONE_IN_BILLIONTHS,
        ]
    }

    proptest! {
        #[test]
        fn from_an_empty_job_rule_and_fallback_formula_agree_and_stay_within_one(
            ratio in ratios(), base in 0u32..20, executors in 1u64..400,
        ) {
            let policy = policy(ratio, base);
            let mut counts = Counts::default();
            for number in 1..=executors {
                let capacity = decide(counts, policy).unwrap();
                prop_assert_eq!(decide_without_ledger(Ordinal::Number(number), policy), Some(capacity), "executor {}", number);
                counts.add(capacity);
                let beyond_base = counts.total().saturating_sub(u64::from(base));
                let wanted = u128::from(beyond_base) * u128::from(ratio);
                let have = u128::from(counts.spot) * u128::from(Ratio::ONE_IN_BILLIONTHS);
                prop_assert!(have.abs_diff(wanted) <= u128::from(Ratio::ONE_IN_BILLIONTHS), "{:?} of {}", counts, number);
            }
        }

        #[test]
        fn from_any_counts_new_executors_restore_the_ratio(
            ratio in ratios(), spot in 0u64..60, on_demand in 0u64..60,
        ) {
            let policy = policy(ratio, 0);
            let mut counts = Counts { spot, on_demand };
            // Ten thousand reach every ratio that this many strays can be diluted to.
            for _ in 0..10_000 {
                counts.add(decide(counts, policy).unwrap());
            }
            let distance = |c: Counts| (u128::from(c.spot) * u128::from(Ratio::ONE_IN_BILLIONTHS))
                .abs_diff(u128::from(c.total()) * u128::from(ratio));
            // Strays against a ratio near an end stay until they die: nothing is placed against it.
            let strays = if ratio < 10_000_000 { spot } else if ratio > 990_000_000 { on_demand } else { 0 };
            prop_assert!(distance(counts) <= u128::from(strays + 1) * u128::from(Ratio::ONE_IN_BILLIONTHS), "{:?}", counts);
        }

        #[test]
        fn nothing_overflows(spot: u32, on_demand: u32, ratio in ratios(), base: u32, number: u64) {
            let policy = policy(ratio, base);
            decide(Counts { spot: spot.into(), on_demand: on_demand.into() }, policy);
            decide_without_ledger(Ordinal::Number(number), policy);
        }
    }

    #[test]
    fn names_spread_by_the_ratio() {
        for ratio in [0, 300_000_000, 700_000_000, Ratio::ONE_IN_BILLIONTHS] {
            let spot = (0..10_000)
                .filter(|i| {
                    let name = format!("etl-7abe5c-exec-{i}");
                    decide_without_ledger(Ordinal::Name(&name), policy(ratio, 0)) == Some(Capacity::Spot)
                })
                .count() as i64;
            let wanted = i64::from(ratio / 100_000);
            assert!((spot - wanted).abs() <= 200, "{spot} of 10000 at {ratio}");
        }
    }
}
