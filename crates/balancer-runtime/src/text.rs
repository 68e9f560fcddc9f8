//! Words for people.

use std::fmt::Display;

/// A number of things, such as `1 executor` or `2 executors`.
pub fn number_of<N: Display + PartialEq + From<u8>>(number: N, thing: &str) -> String {
    let plural = if number == N::from(1) { "" } else { "s" };
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
