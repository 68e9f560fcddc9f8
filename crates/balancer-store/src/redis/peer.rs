//! A scripted server for unit tests: it runs in this process, on in-memory streams, so that paused time is exact.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use redis::RedisConnectionInfo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::connection::{Connection, IoTask};
use super::dial::{Dial, log_in};
use crate::StoreError;

/// How the server answers a command.
#[derive(Clone, Copy)]
pub(super) enum Answer {
    Reply(&'static str),
    Late(Duration, &'static str),
    Silence,
}

type Script = Box<dyn FnMut(&str) -> Answer + Send>;

/// A server that plays a script. Clones are the same server.
#[derive(Clone)]
pub(super) struct Peer(Arc<State>);

struct State {
    script: Mutex<Script>,
    is_up: AtomicBool,
    panics_next: AtomicBool,
    dialled: Mutex<Vec<Instant>>,
    received: Mutex<Vec<String>>,
    close: Notify,
}

impl Peer {
    /// A server that is up, and answers each command by its name.
    pub(super) fn new(script: impl FnMut(&str) -> Answer + Send + 'static) -> Self {
        Self(Arc::new(State {
            script: Mutex::new(Box::new(script)),
            is_up: AtomicBool::new(true),
            panics_next: AtomicBool::new(false),
            dialled: Mutex::default(),
            received: Mutex::default(),
            close: Notify::new(),
        }))
    }

    /// A server without faults.
    pub(super) fn healthy() -> Self {
        Self::new(well)
    }

    /// Plays another script from now on.
    pub(super) fn play(&self, script: impl FnMut(&str) -> Answer + Send + 'static) {
        *self.0.script.lock().unwrap() = Box::new(script);
    }

    /// Refuses connections, or accepts them again. Those that are open are closed.
    pub(super) fn set_up(&self, is_up: bool) {
        self.0.is_up.store(is_up, Ordering::Relaxed);
        self.0.close.notify_waiters();
    }

    /// Makes the next attempt to connect panic in the task that connects.
    pub(super) fn panic_next(&self) {
        self.0.panics_next.store(true, Ordering::Relaxed);
    }

    /// Closes the open connections.
    pub(super) fn close(&self) {
        self.0.close.notify_waiters();
    }

    /// When a connection was asked for.
    pub(super) fn dialled(&self) -> Vec<Instant> {
        self.0.dialled.lock().unwrap().clone()
    }

    /// The names of the commands received.
    pub(super) fn received(&self) -> Vec<String> {
        self.0.received.lock().unwrap().clone()
    }

    async fn serve(self, mut stream: DuplexStream) {
        let mut buffer = Vec::new();
        loop {
            while let Some((name, length)) = first_command(&buffer) {
                buffer.drain(..length);
                self.0.received.lock().unwrap().push(name.clone());
                let answer = (*self.0.script.lock().unwrap())(&name);
                let reply = match answer {
                    Answer::Reply(reply) => reply,
                    Answer::Late(time, reply) => {
                        sleep(time).await;
                        reply
                    }
                    Answer::Silence => continue,
                };
                if stream.write_all(reply.as_bytes()).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                () = self.0.close.notified() => return,
                read = stream.read_buf(&mut buffer) => if !matches!(read, Ok(1..)) { return },
            }
        }
    }
}

/// What a server without faults answers.
pub(super) fn well(command: &str) -> Answer {
    Answer::Reply(match command {
        "PING" => "+PONG\r\n",
        "EVALSHA" => ":1\r\n",
        _ => "+OK\r\n",
    })
}

/// The name of the first command in the buffer, and its length in bytes, if it is complete.
fn first_command(buffer: &[u8]) -> Option<(String, usize)> {
    let (arguments, mut at) = number(buffer, 0)?;
    let mut name = None;
    for _ in 0..arguments {
        let (length, start) = number(buffer, at)?;
        let argument = buffer.get(start..start + length)?;
        name.get_or_insert_with(|| String::from_utf8_lossy(argument).into_owned());
        at = start + length + 2;
    }
    Some((name?, at)).filter(|_| at <= buffer.len())
}

/// The number in the line at `at`, after its first character, and where the next line begins.
fn number(buffer: &[u8], at: usize) -> Option<(usize, usize)> {
    let line = buffer.get(at..)?;
    let end = line.windows(2).position(|pair| pair == b"\r\n")?;
    Some((std::str::from_utf8(line.get(1..end)?).ok()?.parse().ok()?, at + end + 2))
}

impl Dial for Peer {
    async fn dial(&self) -> Result<(Connection, IoTask), StoreError> {
        self.0.dialled.lock().unwrap().push(Instant::now());
        assert!(!self.0.panics_next.swap(false, Ordering::Relaxed), "a panic of the test's own");
        if !self.0.is_up.load(Ordering::Relaxed) {
            return Err(StoreError::NoConnection(format!("{self}: refused")));
        }
        let (client, server) = tokio::io::duplex(1 << 16);
        tokio::spawn(self.clone().serve(server));
        log_in(client, &RedisConnectionInfo::default().set_password("s3cret")).await
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("peer")
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("peer")
    }
}
