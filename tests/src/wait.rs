//! Waits for a condition instead of sleeping: every wait ends, and its error names what it waited for.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep, timeout_at};

/// For what takes a second or two on an idle machine and has no promise to keep: long enough for a machine that is
/// slow and busy.
pub const SOON: Duration = Duration::from_secs(120);

/// Between two checks of a condition.
const PAUSE: Duration = Duration::from_millis(20);
/// How long [`while_progressing`] waits for the next progress.
const STALLED: Duration = SOON;
/// How long a look of [`while_progressing`] may take.
const LOOK: Duration = Duration::from_secs(30);

/// Polls `probe` until it returns a value, for at most `within`.
///
/// An error of the probe counts as "not yet"; the error at the deadline contains the last one. A probe that
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

/// Polls `probe` until it returns a value, for as long as the measure of progress that it returns next to it keeps
/// changing: work takes as long as the machine needs, and a hang still ends the wait. An error of the probe is no
/// progress.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> anyhow::Result<()> {
/// let mut finished = 0;
/// let all = balancer_tests::wait::while_progressing("all tasks", async || {
///     finished += 1;
///     Ok((finished, (finished == 3).then_some("finished")))
/// })
/// .await?;
/// assert_eq!(all, "finished");
/// # Ok(()) }
/// ```
pub async fn while_progressing<P: PartialEq, T>(
    what: &str,
    mut probe: impl AsyncFnMut() -> Result<(P, Option<T>)>,
) -> Result<T> {
    let (mut progress, mut changed) = (None, Instant::now());
    loop {
        let last_error = match timeout_at(Instant::now() + LOOK, probe()).await {
            Ok(Ok((_, Some(value)))) => return Ok(value),
            Ok(Ok((now, None))) => {
                if progress.as_ref() != Some(&now) {
                    (progress, changed) = (Some(now), Instant::now());
                }
                String::new()
            }
            Ok(Err(error)) => format!("; last: {error:#}"),
            Err(_) => "; the last look hung".to_owned(),
        };
        if changed.elapsed() >= STALLED {
            bail!("no progress for {STALLED:?} on the way to {what}{last_error}");
        }
        sleep(PAUSE).await;
    }
}

/// Polls `condition` until it holds, for at most `within`.
pub async fn until_true(within: Duration, what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    until(within, what, async || Ok(condition().await?.then_some(()))).await
}
