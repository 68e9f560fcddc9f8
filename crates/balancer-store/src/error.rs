//! Why a store gave no answer.

use std::time::Duration;

/// Why a store gave no answer. None of them is about the job that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// There is no connection now; nothing was sent, or it was lost underway.
    #[error("no connection to the store now: {0}")]
    NoConnection(String),
    /// No answer came in the time given. The change may yet happen.
    #[error("the store did not answer within {0:?}")]
    TimedOut(Duration),
    /// The server answered that it will not: a wrong password, a read-only replica, no memory left.
    #[error("the store refused: {code} {detail}")]
    Refused {
        /// The server's own word for the cause, such as `READONLY`, `OOM` or `WRONGPASS`.
        code: String,
        /// Its sentence.
        detail: String,
    },
    /// The server answered what none of the scripts answers.
    #[error("the store's answer cannot be read: {0}")]
    Unreadable(String),
}

impl StoreError {
    /// Every [`kind`](Self::kind) that there is.
    pub const KINDS: [&str; 4] = ["no_connection", "timed_out", "refused", "unreadable"];

    /// A short word for the cause, for metrics; it stays the same from version to version.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::NoConnection(_) => "no_connection",
            Self::TimedOut(_) => "timed_out",
            Self::Refused { .. } => "refused",
            Self::Unreadable(_) => "unreadable",
        }
    }
}
