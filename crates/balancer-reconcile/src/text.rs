//! Words for people.

/// A number of things, such as `1 executor` or `2 executors`.
pub(crate) fn number_of(number: usize, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thing_is_not_several() {
        assert_eq!([0, 1, 2].map(|number| number_of(number, "executor")), ["0 executors", "1 executor", "2 executors"]);
    }
}
