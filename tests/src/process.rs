//! One program run as a process of its own: its log, its signals and its end.

use std::ffi::OsStr;
use std::fs::{File, create_dir};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kube::Client;
use rustix::process::{Pid, kill_process_group};

pub use rustix::process::Signal;

use crate::{endpoint, wait, watchdog};

/// How much of a log is read back.
const LOG_BYTES: u64 = 4 << 20;
/// How many log lines an error contains.
const LOG_LINES: usize = 30;

/// A running program. Dropping it kills it; so does the end of the test process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with an environment that holds `PATH` and a scratch `HOME` only, as far as
    /// `configure` adds nothing to it. Standard output and error go to the log.
    pub fn start(program: &Path, configure: impl FnOnce(&mut Command)) -> Result<Self> {
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let log = scratch_path(format!("{name}.log"))?;
        let output = File::create(&log)?;
        let mut command = Command::new(program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", watchdog::scratch()?);
        configure(&mut command);
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let process = Self { name, child, log };
        watchdog::guard(process.id())?;
        Ok(process)
    }

    /// The process id, which is also its group's.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the process group.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process_group(Pid::from_child(&self.child), signal)
            .with_context(|| format!("sending {signal:?} to {}", self.name))
    }

    /// Freezes it (SIGSTOP): its connections stay open and it does nothing.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Resumes it (SIGCONT).
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Its user and system time so far.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        // The name, in brackets, may hold anything.
        let (_, fields) = stat.rsplit_once(')').context("no process name")?;
        let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        Ok(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
    }

    /// Its resident memory, in MiB.
    pub fn resident_mb(&self) -> Result<f64> {
        self.memory_mb("VmRSS:")
    }

    /// The most that its resident memory ever was, in MiB.
    pub fn peak_mb(&self) -> Result<f64> {
        self.memory_mb("VmHWM:")
    }

    fn memory_mb(&self, field: &str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let kib = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
        Ok(kib.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }

    /// Waits until `probe` returns a value; fails at once when the process ends before that.
    pub async fn until_ready<T>(
        &mut self,
        within: Duration,
        mut probe: impl AsyncFnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let what = format!("{} to be ready", self.name);
        let child = &mut self.child;
        let answer = wait::until(within, &what, async || {
            Ok(match child.try_wait()? {
                Some(status) => Some(Err(status)),
                None => probe().await?.map(Ok),
            })
        })
        .await;
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(status)) => bail!("{} ended ({status}):\n{}", self.name, self.log_tail()),
            Err(error) => bail!("{error:#}:\n{}", self.log_tail()),
        }
    }

    /// Waits until `GET path` is answered with 200; fails at once when the process ends before that.
    pub async fn until_ok(&mut self, within: Duration, client: &Client, path: &str) -> Result<()> {
        self.until_ready(within, async || {
            let answer = endpoint::get(client, path).await?;
            ensure!(answer.status == 200, "{path} answers {}", answer.status);
            Ok(Some(()))
        })
        .await
    }

    /// Asks the process to end (SIGTERM) and waits for it.
    pub async fn terminate(&mut self, within: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.ended(within).await
    }

    /// Waits for the process to end, by itself or after a signal.
    pub async fn ended(&mut self, within: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        let child = &mut self.child;
        let status = wait::until(within, &what, async || Ok(child.try_wait()?)).await;
        status.with_context(|| format!("its log ends with:\n{}", self.log_tail()))
    }

    /// Its exit status, if it has ended.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// What the process has written so far (the last 4 MiB of it).
    pub fn log(&self) -> Result<String> {
        let mut file = File::open(&self.log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// How many bytes the process has written so far.
    pub fn log_length(&self) -> Result<u64> {
        Ok(self.log.metadata()?.len())
    }

    /// The last lines of the log.
    pub fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_else(|error| format!("no log: {error:#}"));
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Process {
    /// Kills the process, frozen or not, and waits for its end, so that its port is free again.
    fn drop(&mut self) {
        // Nothing can be done about an error here: the process is gone already, or was never ours.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.signal(Signal::KILL);
        }
        let _ = watchdog::release(self.id());
        let _ = self.child.wait();
    }
}

/// A path of its own in the scratch folder of this test process.
pub fn scratch_path(name: impl AsRef<OsStr>) -> Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let folder = watchdog::scratch()?.join(COUNT.fetch_add(1, Ordering::Relaxed).to_string());
    create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder.join(name.as_ref()))
}
