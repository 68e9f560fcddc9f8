//! Waits for a condition instead of sleeping: every wait has a deadline and says what it waited for.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep, timeout_at};

/// Between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(20);

/// Polls `probe` until it answers with a value, for at most `within`.
///
/// An error of the probe counts as "not yet"; the last one is told when the time is up. A probe that
/// hangs is cut off at the deadline.
///
/// ```
/// # use std::time::Duration;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> anyhow::Result<()> {
/// let mut looks = 0;
/// let third = balancer_tests::wait::until(Duration::from_secs(5), "the third look", async || {
///     looks += 1;
///     Ok((looks == 3).then_some("seen"))
/// })
/// .await?;
/// assert_eq!(third, "seen");
/// # Ok(()) }
/// ```
pub async fn until<T>(within: Duration, what: &str, mut probe: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + within;
    let mut last_error = None;
    loop {
        match timeout_at(deadline, probe()).await {
            Ok(Ok(Some(value))) => return Ok(value),
            Ok(Ok(None)) => last_error = None,
            Ok(Err(error)) => last_error = Some(format!("; last: {error:#}")),
            Err(_) => {
                let last = last_error.unwrap_or_else(|| "; the last look hung".to_owned());
                bail!("waited {within:?} in vain for {what}{last}")
            }
        }
        if Instant::now() + PAUSE >= deadline {
            bail!("waited {within:?} in vain for {what}{}", last_error.unwrap_or_default());
        }
        sleep(PAUSE).await;
    }
}

/// Polls `condition` until it holds, for at most `within`.
pub async fn until_true(within: Duration, what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    until(within, what, async || Ok(condition().await?.then_some(()))).await
}
