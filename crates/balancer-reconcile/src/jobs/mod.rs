//! The facts of all jobs for people: as JSON at `/jobs`, and as one page at `/`.
//!
//! The reconciler's loop owns the index. It publishes immutable facts while somebody asks for them (`view`), and the server
//! sorts, filters and encodes them on other threads (`listing`, `server`).

mod facts;
mod listing;
mod server;
mod view;

pub use facts::{InvalidAnnotationFacts, JobFacts, NodeShare, PoolShare, RatioSource, SpotFacts, share};
pub use server::{JobsPage, PORT};
pub(crate) use view::JobsView;
pub use view::{Publisher, Reader, channel};
