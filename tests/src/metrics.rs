//! Reads single values out of a page of Prometheus text.

use anyhow::{Result, ensure};
use kube::Client;

use crate::endpoint;

/// A page of metrics of one server at one moment.
#[derive(Debug)]
pub struct Metrics(pub String);

impl Metrics {
    /// The server's `/metrics` now.
    pub async fn of(server: &Client) -> Result<Self> {
        let answer = endpoint::get(server, "/metrics").await?;
        ensure!(answer.status == 200, "/metrics answers {}", answer.status);
        Ok(Self(answer.text))
    }

    /// The sum of all samples of this name that carry these labels among theirs; `None` without any.
    ///
    /// ```
    /// let page = balancer_tests::metrics::Metrics("hits_total{path=\"/a\",code=\"200\"} 3\n".into());
    /// assert_eq!(page.sum("hits_total", &[("path", "/a")]), Some(3.0));
    /// assert_eq!(page.sum("hits_total", &[("path", "/b")]), None);
    /// ```
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.0.lines().filter_map(|line| sample(line, name, labels)).reduce(|sum, value| sum + value)
    }
}

/// The line's value, where the line is such a sample.
fn sample(line: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let rest = line.strip_prefix(name)?;
    let (found, value) = match rest.strip_prefix('{') {
        Some(rest) => rest.rsplit_once('}')?,
        None => ("", rest.strip_prefix(' ')?),
    };
    let found = format!(",{found}");
    let carries = |(key, value): &(&str, &str)| found.contains(&format!(",{key}=\"{value}\""));
    if !labels.iter().all(carries) {
        return None;
    }
    value.split_whitespace().next()?.parse().ok()
}
