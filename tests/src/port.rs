//! Hands out ports for servers that cannot pick their own.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

/// Below Linux's range for outgoing connections, so that no client takes the port of a server that is
/// down for a moment and starts again on it.
const RANGE: std::ops::Range<u32> = 20_000..32_000;

/// A port on which nothing listens, given to nobody else in this process.
///
/// Test processes that run side by side begin their search in different places.
pub fn free() -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let size = RANGE.end - RANGE.start;
    let begin = std::process::id().wrapping_mul(97);
    (0..size)
        .map(|_| begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)))
        .filter_map(|position| u16::try_from(RANGE.start + position % size).ok())
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .with_context(|| format!("no free port in {RANGE:?}"))
}
