//! Ends what the test process started when the test process ends, even by SIGKILL.
//!
//! Statics are not dropped and a killed process runs no destructors. So one small shell waits
//! next to the test process, and a pipe reports to it each process group that starts and ends. When the
//! pipe closes, which the operating system sees to, it kills the groups that are left and removes the
//! scratch folder.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, ensure};

const SCRIPT: &str = r#"
    folder=$(mktemp -d "${TMPDIR:-/tmp}/spot-balancer-tests.XXXXXX") || exit 1
    echo "$folder"
    groups=' '
    while read -r change group; do
        case $change in
            +) groups="$groups$group " ;;
            -) groups="${groups%% "$group" *} ${groups#* "$group" }" ;;
        esac
    done
    for group in $groups; do kill -s KILL -- "-$group"; done
    rm -rf "$folder" || { sleep 1; rm -rf "$folder"; }
"#;

struct Watchdog {
    /// Open as long as this process lives.
    pipe: Mutex<ChildStdin>,
    folder: PathBuf,
}

/// A folder of this test process, removed when the process ends.
pub(crate) fn scratch() -> Result<&'static Path> {
    Ok(&watchdog()?.folder)
}

/// From now on the process group ends with this process.
pub(crate) fn guard(group: u32) -> Result<()> {
    tell('+', group)
}

/// The group has ended, and its number may come to name another.
pub(crate) fn release(group: u32) -> Result<()> {
    tell('-', group)
}

fn tell(change: char, group: u32) -> Result<()> {
    let mut pipe = watchdog()?.pipe.lock().unwrap_or_else(PoisonError::into_inner);
    writeln!(pipe, "{change} {group}").context("telling the watchdog")
}

fn watchdog() -> Result<&'static Watchdog> {
    static WATCHDOG: OnceLock<std::result::Result<Watchdog, String>> = OnceLock::new();
    WATCHDOG
        .get_or_init(|| start().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow::anyhow!("no watchdog for what the tests start: {error}"))
}

fn start() -> Result<Watchdog> {
    let mut child = Command::new("sh")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Out of reach of the terminal's Ctrl-C: it has to outlive this process by a moment.
        .process_group(0)
        .spawn()
        .context("starting sh")?;
    let mut folder = String::new();
    let answers = child.stdout.take().context("sh has no output")?;
    BufReader::new(answers).read_line(&mut folder)?;
    let folder = folder.trim_end();
    ensure!(!folder.is_empty(), "sh could not make a scratch folder");
    Ok(Watchdog { pipe: Mutex::new(child.stdin.take().context("sh has no input")?), folder: folder.into() })
}
