//! Reads samples of counters and gauges out of a page of metrics.

/// A page of metrics of one replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Metrics(pub(crate) String);

impl Metrics {
    /// The samples of a metric: the labels, as they are written, and the value.
    pub(crate) fn samples<'m>(&'m self, name: &'m str) -> impl Iterator<Item = (&'m str, f64)> {
        self.0.lines().filter_map(move |line| {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = match rest.strip_prefix('{') {
                Some(rest) => rest.rsplit_once('}')?,
                None => ("", rest.strip_prefix(' ')?),
            };
            Some((labels, value.split_whitespace().next()?.parse().ok()?))
        })
    }

    /// The sum of all samples; `None` without any.
    pub(crate) fn sum(&self, name: &str) -> Option<f64> {
        self.samples(name).map(|(_, value)| value).reduce(|sum, value| sum + value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_those_of_the_metric_alone() {
        let page = Metrics("# TYPE a counter\na_total{kind=\"x\"} 2\na_total{kind=\"y\"} 1\na_totals 9\nb 1\n".into());
        assert_eq!(page.sum("a_total"), Some(3.0));
        assert_eq!(page.samples("a_total").next(), Some(("kind=\"x\"", 2.0)));
        assert_eq!(page.sum("b"), Some(1.0));
        assert_eq!(page.sum("c"), None);
    }
}
