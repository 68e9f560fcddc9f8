//! Random numbers that a failed run can be repeated with.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

/// A run prints its seed; this variable repeats the run.
const SEED: &str = "SPOT_BALANCER_TEST_SEED";

/// Numbers by SplitMix64.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Seeded by the environment, or else by the time; the seed is printed.
    pub fn seeded() -> Result<Self> {
        let seed = match std::env::var(SEED) {
            Ok(seed) => seed.parse().context(SEED)?,
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        };
        println!("{SEED}={seed}");
        Ok(Self(seed))
    }

    /// The same numbers each time.
    pub fn of(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> Result<usize> {
        Ok(usize::try_from(self.next() % u64::try_from(bound)?)?)
    }

    /// A number from 0 to 1, but not 1.
    #[expect(clippy::cast_precision_loss, reason = "it has 53 bits")]
    pub fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
