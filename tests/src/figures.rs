//! Summarizes what the benchmarks measured.

/// The middle one of the values, which one outlier does not move; NaN without values.
///
/// ```
/// assert_eq!(balancer_tests::figures::median([9.0, 1.0, 2.0]), 2.0);
/// ```
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
