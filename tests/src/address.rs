//! Hands out loopback addresses, for what needs one of its own.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, ensure};

/// How many bits of an address tell those of one test process apart.
const BITS: u32 = 12;

/// An address that nobody else in this process is given, nor most probably in another test process.
pub fn free() -> Result<Ipv4Addr> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    ensure!(number < 1 << BITS, "no loopback address is left");
    // The upper half of 127.0.0.0/8: the lower one begins with 127.0.0.1.
    let network = 0x7f80_0000 | (std::process::id() & 0x7ff) << BITS;
    Ok(Ipv4Addr::from_bits(network | number))
}
