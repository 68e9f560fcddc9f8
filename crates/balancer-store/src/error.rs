//! Why a call to a store failed.

use std::time::Duration;

/// Why a call to a store failed. No cause is about the job that the call was for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// There is no connection now. The command was not sent, or the connection was lost before the reply.
    #[error("no connection to the store now: {0}")]
    NoConnection(String),
    /// No reply came within the call's time limit. The change may still happen.
    #[error("the store did not answer within {0:?}")]
    TimedOut(Duration),
    /// The server is up, and has no memory left for what the call would write. Calls that only remove still succeed.
    #[error("the store has no memory left: {0}")]
    Full(String),
    /// The server returned an error: a wrong password, a read-only replica.
    #[error("the store refused: {code} {detail}")]
    Refused {
        /// The server's error code, such as `READONLY` or `WRONGPASS`.
        code: String,
        /// The server's error message.
        detail: String,
    },
    /// The server returned a reply that none of the scripts returns.
    #[error("the store returned an invalid reply: {0}")]
    InvalidReply(String),
}

/// Implements both [`StoreError::KINDS`] and [`StoreError::kind`] from one table.
macro_rules! kinds {
    ($($error:pat => $kind:literal,)+) => {
        impl StoreError {
            /// Every [`kind`](Self::kind) that there is.
            pub const KINDS: [&str; [$($kind),+].len()] = [$($kind),+];

            /// A short name for the cause, for metrics. It stays the same from version to version.
            pub const fn kind(&self) -> &'static str {
                match self {
                    $($error => $kind,)+
                }
            }
        }
    };
}

kinds! {
    Self::NoConnection(_) => "no_connection",
    Self::TimedOut(_) => "timed_out",
    Self::Full(_) => "full",
    Self::Refused { .. } => "refused",
    Self::InvalidReply(_) => "invalid_reply",
}
