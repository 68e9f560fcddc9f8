//! One page of jobs: which ones a query selects, in which order, and from where on. Pure.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::{JobFacts, SpotFacts};

const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 500;
/// The longest filter: a name of Kubernetes.
const MAX_FILTER: usize = 253;
/// What an error shows of an invalid value.
const MAX_SHOWN: usize = 64;

/// Which jobs to list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Query {
    limit: usize,
    namespace: Option<String>,
    /// In lower case.
    filter: Option<String>,
    sort: Sort,
    after: Option<Position<'static>>,
}

/// What comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Sort {
    /// The largest distance, and among equals the largest risk.
    #[default]
    Distance,
    /// The largest risk, and among equals the largest distance.
    Risk,
    /// By namespace, job id and driver.
    Name,
}

/// Where a job is in an order. It does not move while other jobs come and go.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Position<'a> {
    sort: Sort,
    ranks: Reverse<(u64, u64)>,
    namespace: Cow<'a, str>,
    job_id: Cow<'a, str>,
    driver: Option<Cow<'a, str>>,
}

/// Why a query is invalid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueryError {
    #[error("{0:?} is no parameter; accepted: limit, continue, namespace, filter and sort, each once")]
    Parameter(String),
    #[error("limit: {0:?} is not a number of jobs; accepted: 1 to {MAX_LIMIT}")]
    Limit(String),
    #[error("sort: {0:?} is no order; accepted: distance, risk or name")]
    Sort(String),
    #[error("filter: the text is too long; accepted: up to {MAX_FILTER} characters")]
    Filter,
    #[error("continue: not a token of this order; accepted: the field continue of the page before, with the same sort")]
    Continue,
}

impl Query {
    /// Parses the query of a URL.
    pub(super) fn parse(query: &str) -> Result<Self, QueryError> {
        let mut parsed =
            Self { limit: DEFAULT_LIMIT, namespace: None, filter: None, sort: Sort::default(), after: None };
        let mut seen = Vec::new();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            if seen.contains(&key) {
                return Err(QueryError::Parameter(shorten(&key)));
            }
            match &*key {
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
                    parsed.limit = limit.ok_or_else(|| QueryError::Limit(shorten(&value)))?;
                }
                "namespace" => parsed.namespace = Some(value.into_owned()).filter(|value| !value.is_empty()),
                "filter" if value.chars().count() > MAX_FILTER => return Err(QueryError::Filter),
                "filter" => parsed.filter = Some(value.trim().to_lowercase()).filter(|value| !value.is_empty()),
                "sort" => {
                    parsed.sort = match &*value {
                        "distance" => Sort::Distance,
                        "risk" => Sort::Risk,
                        "name" => Sort::Name,
                        _ => return Err(QueryError::Sort(shorten(&value))),
                    }
                }
                "continue" if value.is_empty() => {}
                "continue" => parsed.after = Some(Position::decode(&value).ok_or(QueryError::Continue)?),
                _ => return Err(QueryError::Parameter(shorten(&key))),
            }
            seen.push(key);
        }
        if parsed.after.as_ref().is_some_and(|after| after.sort != parsed.sort) {
            return Err(QueryError::Continue);
        }
        Ok(parsed)
    }

    fn selects(&self, job: &JobFacts) -> bool {
        let has = |text: &str, filter: &str| text.to_lowercase().contains(filter);
        self.namespace.as_ref().is_none_or(|namespace| job.namespace == *namespace)
            && self.filter.as_ref().is_none_or(|filter| {
                let driver = job.driver.as_deref().unwrap_or_default();
                has(&job.namespace, filter) || has(&job.job_id, filter) || has(driver, filter)
            })
    }

    /// The page of these jobs that the query asks for.
    pub(super) fn page<'a>(&self, jobs: &'a [Arc<JobFacts>]) -> Page<'a> {
        let mut totals = Totals::default();
        let mut selected = Vec::new();
        for job in jobs.iter().filter(|job| self.selects(job)) {
            totals.add(job);
            let position = Position::of(job, self.sort);
            if self.after.as_ref().is_none_or(|after| position > *after) {
                selected.push((position, &**job));
            }
        }
        let has_more = selected.len() > self.limit;
        if has_more {
            selected.select_nth_unstable_by(self.limit - 1, |(one, _), (other, _)| one.cmp(other));
            selected.truncate(self.limit);
        }
        selected.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        let next = selected.last().filter(|_| has_more).and_then(|(position, _)| position.encode());
        Page { jobs: selected.into_iter().map(|(_, job)| job).collect(), next, totals }
    }
}

impl<'a> Position<'a> {
    fn of(job: &'a JobFacts, sort: Sort) -> Self {
        let distance = job.distance.unsigned_abs();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to a million")]
        let risk = (job.risk.clamp(0.0, 1.0) * 1e6) as u64;
        let ranks = match sort {
            Sort::Distance => (distance, risk),
            Sort::Risk => (risk, distance),
            Sort::Name => (0, 0),
        };
        Self {
            sort,
            ranks: Reverse(ranks),
            namespace: job.namespace.as_str().into(),
            job_id: job.job_id.as_str().into(),
            driver: job.driver.as_deref().map(Cow::Borrowed),
        }
    }

    fn encode(&self) -> Option<String> {
        Some(URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).ok()?))
    }

    fn decode(token: &str) -> Option<Position<'static>> {
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token).ok()?).ok()
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(MAX_SHOWN).collect()
}

/// What is answered.
#[derive(Debug, Serialize)]
pub(super) struct Page<'a> {
    jobs: Vec<&'a JobFacts>,
    #[serde(rename = "continue")]
    next: Option<String>,
    totals: Totals,
}

/// Of all jobs that the query selects, on this page or not.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Totals {
    jobs: u64,
    spot: u64,
    on_demand: u64,
    pending: u64,
    unknown: u64,
    /// Jobs that are a whole executor or more from their ratio.
    off_ratio: u64,
    /// Jobs to which spot is closed, or for which it is probed.
    spot_closed: u64,
    /// Jobs whose driver has invalid annotations.
    invalid_annotations: u64,
}

impl Totals {
    fn add(&mut self, job: &JobFacts) {
        self.jobs += 1;
        self.spot += job.spot;
        self.on_demand += job.on_demand;
        self.pending += job.pending;
        self.unknown += job.unknown;
        self.off_ratio += u64::from(job.distance != 0);
        self.spot_closed += u64::from(job.spot_state != SpotFacts::Open);
        self.invalid_annotations += u64::from(!job.invalid_annotations.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: usize, distance: i64, risk: f64) -> Arc<JobFacts> {
        Arc::new(JobFacts {
            namespace: format!("team-{}", id % 3),
            job_id: format!("job-{id:03}"),
            spot: 1,
            distance,
            risk,
            ..JobFacts::default()
        })
    }

    fn ids<'a>(page: &Page<'a>) -> Vec<&'a str> {
        page.jobs.iter().map(|job| job.job_id.as_str()).collect()
    }

    fn list<'a>(query: &str, jobs: &'a [Arc<JobFacts>]) -> Page<'a> {
        Query::parse(query).expect("a query").page(jobs)
    }

    #[test]
    fn jobs_are_sorted_by_distance_then_risk_then_name_or_as_asked() {
        let jobs = [job(1, 0, 0.9), job(2, -3, 0.1), job(3, 3, 0.2), job(4, 0, 0.9)];
        assert_eq!(ids(&list("", &jobs)), ["job-003", "job-002", "job-001", "job-004"]);
        assert_eq!(ids(&list("sort=risk", &jobs)), ["job-001", "job-004", "job-003", "job-002"]);
        assert_eq!(ids(&list("sort=name", &jobs)), ["job-003", "job-001", "job-004", "job-002"]);
    }

    #[test]
    fn the_pages_of_a_list_have_each_job_once_although_jobs_come_and_go() {
        let mut jobs: Vec<_> = (0..250).map(|id| job(id, i64::try_from(id % 7).unwrap_or_default(), 0.5)).collect();
        let (mut seen, mut token, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let page = list(&format!("limit=40&continue={token}"), &jobs);
            seen.extend(ids(&page).into_iter().map(str::to_owned));
            let next = page.next;
            pages += 1;
            // Of those that were listed one ends, and another job comes before all of them.
            let ended = jobs.iter().position(|job| Some(&job.job_id) == seen.last()).expect("a listed job");
            jobs.remove(ended);
            jobs.push(job(900 + pages, 1000, 1.0));
            let Some(next) = next else { break };
            token = next;
        }
        let distinct: std::collections::BTreeSet<_> = seen.iter().collect();
        assert_eq!((seen.len(), distinct.len(), pages), (250, 250, 7));
    }

    #[test]
    fn a_namespace_and_a_filter_select_jobs_and_totals_are_those_of_all_selected() {
        let jobs: Vec<_> = (0..30).map(|id| job(id, i64::from(id == 0), 0.0)).collect();
        let page = list("namespace=team-0&limit=2", &jobs);
        assert_eq!((page.jobs.len(), page.totals.jobs, page.totals.spot, page.totals.off_ratio), (2, 10, 10, 1));
        assert_eq!(ids(&list("filter=JOB-02", &jobs)).len(), 10);
        assert_eq!(list("filter=%20team-1%20&namespace=team-2", &jobs).totals.jobs, 0);
    }

    #[test]
    fn an_invalid_query_is_refused_with_what_is_accepted() {
        for (query, expected) in [
            ("limit=0", "limit: \"0\" is not a number of jobs; accepted: 1 to 500"),
            ("limit=501", "accepted: 1 to 500"),
            ("limit=", "accepted: 1 to 500"),
            ("sort=age", "accepted: distance, risk or name"),
            ("page=2", "\"page\" is no parameter; accepted: limit, continue, namespace, filter and sort"),
            ("limit=1&limit=2", "each once"),
            ("continue=x", "continue: not a token"),
            ("continue=e30", "continue: not a token"),
        ] {
            let error = Query::parse(query).expect_err(query).to_string();
            assert!(error.contains(expected), "{query}: {error}");
        }
        assert_eq!(Query::parse(&format!("filter={}", "x".repeat(254))), Err(QueryError::Filter));
        let jobs = [job(1, 0, 0.0), job(2, 0, 0.0)];
        let token = list("limit=1", &jobs).next.expect("a second page");
        assert_eq!(Query::parse(&format!("sort=risk&continue={token}")), Err(QueryError::Continue));
        assert_eq!(ids(&list(&format!("continue={token}"), &jobs)), ["job-002"]);
    }
}
