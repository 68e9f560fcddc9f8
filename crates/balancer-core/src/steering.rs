//! What the reconciler changes about the placements of a job: whether spot is open to it, and which instance types its
//! executors should avoid. It is a part of the job's ledger, so every webhook follows it.

use crate::k8s_names::is_label_value;
use crate::term::{Millis, Term};

/// What is stored of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steering {
    /// Whether spot is open to the job.
    pub spot: SpotState,
    /// The instance types that new spot executors should avoid, because a pool of theirs has too large a share of the job.
    pub avoid: Vec<String>,
}

impl Steering {
    /// How many instance types are avoided at most. More than this are not stored.
    pub const MAX_AVOIDED: usize = 8;

    /// From one replacement of a job's executors that find no spot to the next, in milliseconds, at least. Spark requests
    /// replacements once a second, in batches.
    pub const REPLACEMENT_PAUSE: Millis = 5_000;

    /// How many of a job's executors that find no spot are replaced at once: one in ten of the live ones, at least one and
    /// at most 100.
    pub fn replaced_at_once(live: usize) -> usize {
        (live / 10).clamp(1, 100)
    }

    /// The first of these instance types that can be stored, at most [`Steering::MAX_AVOIDED`]: those that are values of a
    /// label.
    pub fn avoidable(types: &[String]) -> impl Iterator<Item = &str> {
        types.iter().map(String::as_str).filter(|name| is_label_value(name)).take(Self::MAX_AVOIDED)
    }
}

/// Whether a job's executors are sent to spot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SpotState {
    /// The ratio alone decides.
    #[default]
    Open,
    /// There was no spot capacity. Executors go to on-demand, until the first one after the retry time probes spot.
    Starved {
        /// When spot was closed.
        since: Millis,
        /// When the next executor may probe spot.
        retry_at: Millis,
    },
    /// One executor was sent to spot. The others go to on-demand until it is known whether it found a node. If it leaves
    /// the ledger before that, the next executor takes its place.
    Probing {
        /// When spot was closed.
        since: Millis,
        /// The executor's key in the ledger.
        executor: String,
    },
}

/// What a job's [`SpotState`] has changed about a placement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpotAnswer {
    /// Nothing.
    #[default]
    Unchanged,
    /// The ratio would have sent the executor to spot, but spot is closed.
    Closed,
    /// The executor probes spot. It is still the one that does if the request is repeated.
    Probe,
}

impl SpotState {
    /// What the state changes for an executor that the ratio alone sends to spot. `is_probe_on_spot` is whether the executor
    /// with this key is in the ledger, on spot.
    pub fn answer(&self, now: Millis, is_probe_on_spot: impl FnOnce(&str) -> bool) -> SpotAnswer {
        match self {
            Self::Open => SpotAnswer::Unchanged,
            // If the clock was set back behind the time at which spot was closed, the retry time says nothing.
            Self::Starved { since, retry_at } if (*since..*retry_at).contains(&now) => SpotAnswer::Closed,
            // A probe that has left the ledger, or spot, will not find out about spot.
            Self::Probing { executor, .. } if is_probe_on_spot(executor) => SpotAnswer::Closed,
            Self::Starved { .. } | Self::Probing { .. } => SpotAnswer::Probe,
        }
    }

    /// The state after spot was closed. If it is closed already, the retry time starts again.
    #[must_use]
    pub fn closed(&self, retry_after: Millis, now: Millis) -> Self {
        let since = match self {
            Self::Open => now,
            Self::Starved { since, .. } | Self::Probing { since, .. } => now.min(*since),
        };
        Self::Starved { since, retry_at: now.saturating_add(retry_after) }
    }
}

/// A change of a job's [`Steering`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steer<'a> {
    /// Closes spot. If it is closed already, the retry time starts again.
    CloseSpot {
        /// How long no executor probes spot, in milliseconds.
        retry_after: Millis,
    },
    /// Opens spot.
    OpenSpot,
    /// Replaces the instance types to avoid, at most [`Steering::MAX_AVOIDED`].
    Avoid(&'a [String]),
}

/// The answer to a [`Steer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SteerOutcome {
    /// It is stored.
    Done,
    /// The job has no ledger. Nothing was stored.
    NoLedger,
    /// Nothing was changed, because the ledger was already reconciled in this later term.
    Superseded(Term),
}

/// Where on spot an executor should run. [`Profile::apply`](crate::Profile::apply) writes it into the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// How many executors of the job may run on one node; 0 for any number, `None` if the ledger has no policy of the job.
    pub max_executors_per_node: Option<u32>,
    /// The instance types to avoid.
    pub avoid: Vec<String>,
}

impl Spread {
    /// Whether the executor may run anywhere on spot.
    pub fn is_none(&self) -> bool {
        self.max_executors_per_node.is_none_or(|limit| limit == 0) && self.avoid.is_empty()
    }
}
