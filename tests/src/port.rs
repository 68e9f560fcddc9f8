//! Hands out ports for servers that cannot pick their own.

use std::net::TcpListener;
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

/// Below Linux's range for outgoing connections, so that no client takes the port of a server that is
/// down for a moment and starts again on it.
const RANGE: Range<u32> = 22_000..30_000;
/// Of the nodes of a Redis cluster, which also listen on the port [`BUS`] higher, outside of [`RANGE`].
const NODES: Range<u32> = 20_000..22_000;
const BUS: u16 = 10_000;

/// A port on which nothing listens, given to nobody else while this process lives, in no other test process either.
pub fn free() -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    search(&NEXT, RANGE, is_free)
}

/// The same for a node of a Redis cluster.
pub fn free_for_node() -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    search(&NEXT, NODES, |port| is_free(port) && is_free(port + BUS))
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// Claims the port among all test processes of this machine, until this process ends. A server that is down for a
/// moment leaves its port free, and another process must not take it.
fn claim(port: u16) -> bool {
    // Names of the abstract namespace leave no file, and the kernel frees them with the process.
    static CLAIMS: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());
    let name = SocketAddr::from_abstract_name(format!("spot-balancer-tests-port-{port}"));
    let Ok(claim) = name.and_then(|name| UnixListener::bind_addr(&name)) else { return false };
    CLAIMS.lock().unwrap_or_else(PoisonError::into_inner).push(claim);
    true
}

/// Test processes that run side by side begin their search in different places.
fn search(next: &AtomicU32, range: Range<u32>, mut suits: impl FnMut(u16) -> bool) -> Result<u16> {
    let size = range.end - range.start;
    let begin = std::process::id().wrapping_mul(97);
    (0..size)
        .map(|_| begin.wrapping_add(next.fetch_add(1, Ordering::Relaxed)))
        .filter_map(|position| u16::try_from(range.start + position % size).ok())
        .find(|port| claim(*port) && suits(*port))
        .with_context(|| format!("no free port in {range:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_that_begin_their_search_at_the_same_port_are_given_different_ones() {
        let (one, other) = (AtomicU32::new(0), AtomicU32::new(0));
        let port = search(&one, RANGE, |_| true).expect("a port");
        assert_ne!(search(&other, RANGE, |_| true).expect("a port"), port);
    }
}
