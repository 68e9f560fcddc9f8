//! Reads the few values of a JSON text that are wanted, and skips the others at the speed of a memory scan.

mod brackets;
mod pairs;
mod scan;

pub(crate) use pairs::Pairs;
pub use scan::JsonError;
pub(crate) use scan::{Scan, Scanner};
