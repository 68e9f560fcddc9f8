//! A scripted server for unit tests: it runs in this process, on in-memory streams, so that paused time is exact.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::address::Address;
use super::connection::{Connection, IoTask};
use super::credentials::{CredentialSource, Credentials, Login};
use super::dial::{Dial, Network, log_in};
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
    credentials: Credentials,
}

/// Servers by their ports. The name `all` stands for all of them, and any other one for itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Peers(pub(super) Arc<Mutex<HashMap<u16, Peer>>>);

impl Network for Peers {
    async fn resolve(&self, server: &Address) -> io::Result<Vec<Address>> {
        let all = || self.0.lock().unwrap().keys().map(|port| Address { host: "h".to_owned(), port: *port }).collect();
        Ok(if server.host == "all" { all() } else { vec![server.clone()] })
    }

    async fn open(&self, address: &Address, _: &str) -> Result<(Connection, IoTask), StoreError> {
        let peer = self.0.lock().unwrap().get(&address.port).cloned();
        let refused = || StoreError::NoConnection(format!("{address}: refused"));
        peer.ok_or_else(refused)?.open().await.map_err(|_| refused())
    }
}

/// A source of credentials that plays what the test sets, and counts how often it is asked.
#[derive(Clone)]
pub(super) struct Played(Arc<(Mutex<Result<&'static str, &'static str>>, AtomicUsize)>);

impl Played {
    /// Returns this password, which is to be renewed after a minute, or an error with this cause.
    pub(super) fn new(answer: Result<&'static str, &'static str>) -> Self {
        Self(Arc::new((Mutex::new(answer), AtomicUsize::new(0))))
    }

    pub(super) fn set(&self, answer: Result<&'static str, &'static str>) {
        *self.0.0.lock().unwrap() = answer;
    }

    pub(super) fn asked(&self) -> usize {
        self.0.1.load(Ordering::Relaxed)
    }
}

impl CredentialSource for Played {
    async fn login(&self) -> Result<(Login, Duration), StoreError> {
        self.0.1.fetch_add(1, Ordering::Relaxed);
        let answer = *self.0.0.lock().unwrap();
        match answer {
            Ok("panic") => panic!("a panic of the test's own"),
            Ok(password) => Ok((Login { user: None, password: password.to_owned() }, Duration::from_secs(60))),
            Err(cause) => Err(StoreError::NoConnection(cause.to_owned())),
        }
    }
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
            credentials: Credentials::fixed(Some(Login { user: None, password: "s3cret".to_owned() })),
        }))
    }

    /// The server with these credentials.
    pub(super) fn with_credentials(self, credentials: Credentials) -> Self {
        let Ok(state) = Arc::try_unwrap(self.0) else { panic!("the server is in use") };
        Self(Arc::new(State { credentials, ..state }))
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

    /// The names of the commands received; those of `CLUSTER` with their second word.
    pub(super) fn received(&self) -> Vec<String> {
        self.0.received.lock().unwrap().clone()
    }

    /// A connection on which nothing was sent yet.
    pub(super) async fn open(&self) -> Result<(Connection, IoTask), StoreError> {
        self.0.dialled.lock().unwrap().push(Instant::now());
        if !self.0.is_up.load(Ordering::Relaxed) {
            return Err(StoreError::NoConnection(format!("{self}: refused")));
        }
        let (client, server) = tokio::io::duplex(1 << 16);
        tokio::spawn(self.clone().serve(server));
        Connection::on(client).await
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
    let mut name = String::new();
    for index in 0..arguments {
        let (length, start) = number(buffer, at)?;
        let argument = String::from_utf8_lossy(buffer.get(start..start + length)?);
        match index {
            0 => name.push_str(&argument),
            1 if name == "CLUSTER" => name.extend([" ", &argument]),
            _ => {}
        }
        at = start + length + 2;
    }
    Some((name, at)).filter(|(name, at)| !name.is_empty() && *at <= buffer.len())
}

/// The number in the line at `at`, after its first character, and where the next line begins.
fn number(buffer: &[u8], at: usize) -> Option<(usize, usize)> {
    let line = buffer.get(at..)?;
    let end = line.windows(2).position(|pair| pair == b"\r\n")?;
    Some((std::str::from_utf8(line.get(1..end)?).ok()?.parse().ok()?, at + end + 2))
}

impl Dial for Peer {
    async fn dial(&self) -> Result<(Connection, IoTask), StoreError> {
        assert!(!self.0.panics_next.swap(false, Ordering::Relaxed), "a panic of the test's own");
        let (connection, io) = self.open().await?;
        log_in(&connection, self.credentials(), 0).await?;
        Ok((connection, io))
    }

    fn credentials(&self) -> &Credentials {
        &self.0.credentials
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
