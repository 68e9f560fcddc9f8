//! Reads files again while the program runs, so that a changed Secret needs no restart.

use std::convert::Infallible;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use prometheus_client::metrics::counter::Counter;

/// The kubelet replaces a whole folder by a symbolic link, which file watches miss. So the files are read and compared.
const POLL_INTERVAL: Duration = Duration::from_secs(5);
/// The files have a few KiB; a wrong path may lead to a file of any size.
const MAX_BYTES: u64 = 1 << 20;

/// Something that is read from files and stays in use until they change.
pub(crate) trait Reload: Send + Sync + 'static {
    /// Reads the files, and uses what they hold if it changed. Returns whether it did.
    ///
    /// # Errors
    /// The files cannot be used. What was used before stays in use.
    fn reload(&self) -> anyhow::Result<bool>;

    /// Counts failures.
    fn failures(&self) -> &Counter;

    /// Logs that changed files are in use.
    fn log_change(&self);

    /// Logs that changed files cannot be used.
    fn log_failure(&self, error: &str);
}

/// Polls the files. They are used as soon as they change. A failure is logged and counted.
pub(crate) async fn keep_fresh<T: Reload>(loaded: Arc<T>) -> Infallible {
    let mut logged = None;
    loop {
        tokio::time::sleep(POLL_INTERVAL).await;
        let reloading = Arc::clone(&loaded);
        let problem = match tokio::task::spawn_blocking(move || reloading.reload()).await {
            Ok(Ok(changed)) => {
                if changed {
                    loaded.log_change();
                }
                None
            }
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(error) => Some(error.to_string()),
        };
        // Counted at every poll, so that an alert lasts as long as the problem: a rotation may be half-written at one
        // poll. Logged once.
        loaded.failures().inc_by(problem.is_some().into());
        if problem != logged {
            if let Some(error) = &problem {
                loaded.log_failure(error);
            }
            logged = problem;
        }
    }
}

/// Reads the file of a setting.
pub(crate) fn read(path: &Path, setting: &str) -> anyhow::Result<Vec<u8>> {
    let file = File::open(path).with_context(|| format!("{setting}: cannot open {}", path.display()))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES)
        .read_to_end(&mut bytes)
        .with_context(|| format!("{setting}: cannot read {}", path.display()))?;
    Ok(bytes)
}
