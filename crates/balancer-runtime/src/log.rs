//! Structured logs, one line per event. A thread writes them in batches, so that an admission neither waits for the reader
//! of the log nor needs a system call of its own.

use std::io::{self, Write};
use std::panic::catch_unwind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::MakeWriterExt;

use crate::arguments::{LogFormat, TelemetryArguments};
use crate::tasks::{Task, Tasks};

/// How long a line may wait for more lines.
const BATCH: Duration = Duration::from_millis(10);
/// How long a program waits at its end for the last lines to be written: the reader may have stopped.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// Before the thread goes on after a panic.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// Bytes that are kept for a slow reader; beyond them, lines are dropped and counted.
const MAX_PENDING: usize = 1 << 20;

/// Starts logging to standard output. Dropping the guard writes the remaining lines.
pub fn start(arguments: TelemetryArguments, tasks: Tasks) -> Guard {
    let TelemetryArguments { log_level, log_format, admin_port: _ } = arguments;
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(log_level)
        .with_ansi(false)
        .with_target(false)
        // The callers of the Kubernetes client log its errors with more context.
        .with_writer(
            lines.clone().with_filter(|line| *line.level() > Level::WARN || !line.target().starts_with("kube_client")),
        );
    // Fails only if a caller has set a subscriber already, which is then used.
    let _ = match log_format {
        LogFormat::Text => tracing::subscriber::set_global_default(subscriber.finish()),
        LogFormat::Json => tracing::subscriber::set_global_default(subscriber.json().flatten_event(true).finish()),
    };
    let writer = lines.clone();
    // If no thread can be started, nothing is logged, and everything else works.
    let _ = std::thread::Builder::new().name("log".into()).spawn(move || writer.keep_writing(&tasks));
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "panic: this is a bug, please report it")));
    Guard(lines)
}

/// Writes the remaining lines when it is dropped.
#[derive(Debug)]
#[must_use = "dropping the guard ends the log"]
pub struct Guard(Lines);

impl Drop for Guard {
    fn drop(&mut self) {
        let mut pending = self.0.pending();
        pending.ending = true;
        self.0.0.filled.notify_all();
        // There is no other place to report that the last lines are lost.
        drop(self.0.0.written.wait_timeout_while(pending, FLUSH_LIMIT, |pending| !pending.ended));
    }
}

#[derive(Clone, Debug, Default)]
struct Lines(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    filled: Condvar,
    written: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    dropped: u64,
    ending: bool,
    ended: bool,
}

impl Lines {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes batches until the program ends, and goes on after a panic.
    fn keep_writing(&self, tasks: &Tasks) {
        while catch_unwind(|| self.write_batches()).is_err() {
            tasks.died(Task::Log);
            std::thread::sleep(RESTART_PAUSE);
        }
    }

    fn write_batches(&self) {
        loop {
            let idle = |pending: &mut Pending| pending.bytes.is_empty() && !pending.ending;
            let pending = self.0.filled.wait_while(self.pending(), idle).unwrap_or_else(PoisonError::into_inner);
            let ending = pending.ending;
            drop(pending);
            if !ending {
                std::thread::sleep(BATCH);
            }
            self.write_out();
            if ending {
                self.pending().ended = true;
                return self.0.written.notify_all();
            }
        }
    }

    fn write_out(&self) {
        let mut pending = self.pending();
        let (bytes, dropped) = (std::mem::take(&mut pending.bytes), std::mem::take(&mut pending.dropped));
        drop(pending);
        let mut output = io::stdout().lock();
        // There is no other place to report that the log cannot be written.
        let _ = output.write_all(&bytes).and_then(|()| output.flush());
        if dropped > 0 {
            tracing::warn!(lines = dropped, "log lines dropped: the reader is too slow");
        }
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut pending = self.pending();
        if pending.bytes.len() + line.len() > MAX_PENDING {
            pending.dropped += 1;
        } else {
            let first = pending.bytes.is_empty();
            pending.bytes.extend_from_slice(line);
            drop(pending);
            if first {
                self.0.filled.notify_one();
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
