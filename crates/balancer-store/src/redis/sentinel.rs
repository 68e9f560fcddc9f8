//! Finds the primary that Redis Sentinel has chosen, and follows it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::Value;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::address::Address;
use super::connection::{Connection, IoTask};
use super::credentials::Credentials;
use super::dial::{Dial, Network, log_in, name_refusing, name_server, within};
use super::reply::text;
use crate::StoreError;

/// The most that a sentinel may take to answer, or a name to be resolved. All are asked at once.
const SENTINEL_TIMEOUT: Duration = Duration::from_secs(1);
/// The most that connecting to the primary may take. With the time of the sentinels it is less than a supervisor allows.
const PRIMARY_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the sentinels are asked whether the primary is still the same.
const INTERVAL: Duration = Duration::from_secs(5);
/// Sentinels that are asked at most.
const MAX_SENTINELS: usize = 32;
/// Names and reasons that an error contains at most.
const MAX_NAMED: usize = 8;

/// The primary that some sentinels watch under a name.
pub(super) struct Primary<N> {
    shared: Arc<Shared<N>>,
}

struct Shared<N> {
    network: N,
    /// The sentinels. A name may stand for several.
    sentinels: Vec<Address>,
    /// For the sentinels.
    sentinel_credentials: Credentials,
    /// The name under which they watch the primary.
    name: String,
    database: i64,
    credentials: Credentials,
    /// The primary that was connected to last.
    current: Mutex<Option<Address>>,
}

/// What a sentinel says about the primary.
enum Answer {
    Primary(Address),
    /// It watches only primaries of other names, some of which are these.
    OtherNames(Vec<String>),
}

/// What the server says that the sentinels name.
enum Role {
    Primary,
    /// A replica, or a sentinel.
    Other,
    /// The user may not send `ROLE`.
    NotTold,
}

/// What is found out meanwhile.
enum Finding {
    Sentinels(Result<Vec<(Address, String)>, StoreError>),
    Answer(Result<Answer, StoreError>),
    Server(Address, Result<(Role, (Connection, IoTask)), StoreError>),
}

/// Everything that was found out so far.
#[derive(Default)]
struct Findings {
    /// How many sentinels name each server.
    votes: HashMap<Address, usize>,
    /// Servers of which only the sentinels say that they are the primary.
    unconfirmed: Vec<(Address, (Connection, IoTask))>,
    /// The names that sentinels know instead, from each that does not know the primary's.
    other_names: Vec<String>,
    do_not_know_it: usize,
    /// The sentinels that were found.
    sentinels: Vec<Address>,
    sentinel_errors: Vec<StoreError>,
    server_errors: Vec<StoreError>,
}

impl<N: Network> Primary<N> {
    /// The primary that the sentinels watch under `name`. With the database and the credentials for the primary, and
    /// those for the sentinels.
    pub(super) fn new(
        network: N,
        (sentinels, sentinel_credentials): (Vec<Address>, Credentials),
        name: String,
        database: i64,
        credentials: Credentials,
    ) -> Self {
        let current = Mutex::default();
        let shared = Shared { network, sentinels, sentinel_credentials, name, database, credentials, current };
        Self { shared: Arc::new(shared) }
    }
}

impl<N: Network> Dial for Primary<N> {
    async fn dial(&self) -> Result<(Connection, IoTask), StoreError> {
        let (mut tasks, mut findings) = (self.shared.ask_sentinels(), Findings::default());
        while let Some(found) = tasks.join_next().await {
            // A task that has panicked found nothing.
            let Ok(found) = found else { continue };
            match found {
                Finding::Sentinels(sentinels) => self.shared.ask(sentinels, &mut tasks, &mut findings),
                Finding::Answer(answer) => {
                    if let Some(server) = findings.add_answer(answer) {
                        self.shared.check(server, &mut tasks);
                    }
                }
                Finding::Server(address, Ok((Role::Primary, connection))) => {
                    return Ok(self.shared.use_primary(address, connection));
                }
                Finding::Server(address, Ok((Role::NotTold, connection))) => {
                    findings.unconfirmed.push((address, connection));
                }
                Finding::Server(address, Ok((Role::Other, _))) => {
                    findings.server_errors.push(StoreError::NoConnection(format!(
                        "{address}, which a sentinel names as the master {}, is none",
                        self.shared.name
                    )));
                }
                Finding::Server(_, Err(error)) => findings.server_errors.push(error),
            }
            if let Some((address, connection)) = findings.take_unconfirmed(tasks.is_empty()) {
                return Ok(self.shared.use_primary(address, connection));
            }
        }
        Err(findings.into_error(&self.shared.name))
    }

    async fn replacement(&self) -> (Connection, IoTask) {
        loop {
            sleep(INTERVAL).await;
            let votes = self.shared.votes().await;
            let current = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let for_current = current.as_ref().and_then(|current| votes.get(current)).copied().unwrap_or_default();
            // Not at the word of a sentinel that was cut off, with its primary, from the others.
            let best = votes.into_iter().filter(|(_, votes)| *votes > for_current).max_by_key(|(_, votes)| *votes);
            let Some((address, _)) = best else { continue };
            if let Ok((Role::Primary | Role::NotTold, connection)) = self.shared.connect(&address).await {
                return self.shared.use_primary(address, connection);
            }
        }
    }

    fn credentials(&self) -> &Credentials {
        &self.shared.credentials
    }
}

impl<N: Network> Shared<N> {
    /// Looks for all sentinels at once.
    fn ask_sentinels(self: &Arc<Self>) -> JoinSet<Finding> {
        let mut tasks = JoinSet::new();
        for seed in self.sentinels.clone() {
            let shared = Arc::clone(self);
            tasks.spawn(async move {
                let failed = |cause: String| StoreError::NoConnection(format!("{seed}: {cause}"));
                let found = match timeout(SENTINEL_TIMEOUT, shared.network.resolve(&seed)).await {
                    Ok(Ok(found)) => Ok(found.into_iter().map(|address| (address, seed.host.clone())).collect()),
                    Ok(Err(error)) => Err(failed(error.to_string())),
                    Err(_) => Err(failed(format!("the name was not resolved within {SENTINEL_TIMEOUT:?}"))),
                };
                Finding::Sentinels(found)
            });
        }
        tasks
    }

    /// Asks the sentinels that were found.
    fn ask(
        self: &Arc<Self>,
        sentinels: Result<Vec<(Address, String)>, StoreError>,
        tasks: &mut JoinSet<Finding>,
        findings: &mut Findings,
    ) {
        let sentinels = sentinels.unwrap_or_else(|error| {
            findings.sentinel_errors.push(error);
            Vec::new()
        });
        for (address, name) in sentinels {
            // Names may stand for the same sentinels.
            if findings.sentinels.len() == MAX_SENTINELS || findings.sentinels.contains(&address) {
                continue;
            }
            findings.sentinels.push(address.clone());
            let shared = Arc::clone(self);
            tasks.spawn(async move {
                let answer = within(SENTINEL_TIMEOUT, &address, shared.ask_one(&address, &name)).await;
                Finding::Answer(answer)
            });
        }
    }

    async fn ask_one(&self, address: &Address, name: &str) -> Result<Answer, StoreError> {
        let (connection, _io) = self.network.open(address, name).await?;
        let answer = async {
            log_in(&connection, &self.sentinel_credentials, 0).await?;
            let primary =
                connection.send(redis::cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name)).await?;
            match &primary {
                Value::Nil => {
                    let others = connection.send(redis::cmd("SENTINEL").arg("MASTERS")).await;
                    Ok(Answer::OtherNames(others.map(|others| names(&others)).unwrap_or_default()))
                }
                primary => server(primary)
                    .map(Answer::Primary)
                    .ok_or_else(|| StoreError::NoConnection("it does not answer as a sentinel does".to_owned())),
            }
        };
        answer.await.map_err(|error| name_refusing(name_server(error, address), format_args!("the sentinel {address}")))
    }

    /// Connects to the server that sentinels name.
    fn check(self: &Arc<Self>, address: Address, tasks: &mut JoinSet<Finding>) {
        let shared = Arc::clone(self);
        tasks.spawn(async move {
            let connected = shared.connect(&address).await;
            Finding::Server(address, connected)
        });
    }

    async fn connect(&self, address: &Address) -> Result<(Role, (Connection, IoTask)), StoreError> {
        let connect = async {
            let (connection, io) = self.network.open(address, &address.host).await?;
            log_in(&connection, &self.credentials, self.database).await.map_err(|error| name_server(error, address))?;
            let role = match connection.send(&redis::cmd("ROLE")).await {
                Ok(Value::Array(role)) if role.first().and_then(text) == Some("master") => Role::Primary,
                Ok(_) => Role::Other,
                Err(StoreError::Refused { .. }) => Role::NotTold,
                Err(error) => return Err(name_server(error, address)),
            };
            Ok((role, (connection, io)))
        };
        within(PRIMARY_TIMEOUT, address, connect).await
    }

    /// How many sentinels name each server.
    async fn votes(self: &Arc<Self>) -> HashMap<Address, usize> {
        let (mut tasks, mut findings) = (self.ask_sentinels(), Findings::default());
        while let Some(found) = tasks.join_next().await {
            match found {
                Ok(Finding::Sentinels(sentinels)) => self.ask(sentinels, &mut tasks, &mut findings),
                Ok(Finding::Answer(answer)) => drop(findings.add_answer(answer)),
                Ok(Finding::Server(..)) | Err(_) => {}
            }
        }
        findings.votes
    }

    fn use_primary(&self, address: Address, connection: (Connection, IoTask)) -> (Connection, IoTask) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
        connection
    }
}

impl Findings {
    /// Returns the server that a sentinel names if it is the first to name it.
    fn add_answer(&mut self, answer: Result<Answer, StoreError>) -> Option<Address> {
        match answer {
            Ok(Answer::Primary(address)) => {
                let votes = self.votes.entry(address.clone()).or_default();
                *votes += 1;
                return (*votes == 1).then_some(address);
            }
            Ok(Answer::OtherNames(names)) => {
                self.do_not_know_it += 1;
                for name in names {
                    if self.other_names.len() < MAX_NAMED && !self.other_names.contains(&name) {
                        self.other_names.push(name);
                    }
                }
            }
            Err(error) => self.sentinel_errors.push(error),
        }
        None
    }

    /// Takes the connection to a server that more than half of the sentinels name, or, after all were asked, to the one
    /// that most of them name.
    fn take_unconfirmed(&mut self, is_last: bool) -> Option<(Address, (Connection, IoTask))> {
        let votes = |address: &Address| self.votes.get(address).copied().unwrap_or_default();
        let best = (0..self.unconfirmed.len())
            .max_by_key(|at| self.unconfirmed.get(*at).map(|(address, _)| votes(address)))?;
        let (address, _) = self.unconfirmed.get(best)?;
        (is_last || votes(address) * 2 > self.sentinels.len()).then(|| self.unconfirmed.swap_remove(best))
    }

    /// Why there is no primary.
    fn into_error(self, name: &str) -> StoreError {
        let Self { mut server_errors, mut sentinel_errors, other_names, do_not_know_it, .. } = self;
        if !server_errors.is_empty() {
            return server_errors.swap_remove(0);
        }
        if do_not_know_it > 0 {
            let known = if other_names.is_empty() { "none".to_owned() } else { other_names.join(", ") };
            return StoreError::NoConnection(format!("the sentinels watch no master named {name}; they watch {known}"));
        }
        if let Some(refused) = sentinel_errors.iter().position(|error| matches!(error, StoreError::Refused { .. })) {
            return sentinel_errors.swap_remove(refused);
        }
        let causes = sentinel_errors.iter().take(MAX_NAMED).map(|error| match error {
            StoreError::NoConnection(cause) => cause.clone(),
            other => other.to_string(),
        });
        StoreError::NoConnection(format!("no sentinel answers: {}", causes.collect::<Vec<_>>().join("; ")))
    }
}

/// The reply to `SENTINEL GET-MASTER-ADDR-BY-NAME`.
fn server(reply: &Value) -> Option<Address> {
    let Value::Array(parts) = reply else { return None };
    let [host, port] = parts.as_slice() else { return None };
    let host = text(host).filter(|host| !host.is_empty())?;
    Some(Address { host: host.to_owned(), port: text(port)?.parse().ok()? })
}

/// The names in the reply to `SENTINEL MASTERS`.
fn names(reply: &Value) -> Vec<String> {
    let Value::Array(primaries) = reply else { return Vec::new() };
    let name = |primary: &Value| {
        let Value::Array(fields) = primary else { return None };
        fields.chunks_exact(2).find_map(|field| match field {
            [key, value] if text(key) == Some("name") => text(value).map(str::to_owned),
            _ => None,
        })
    };
    primaries.iter().filter_map(name).take(MAX_NAMED).collect()
}

impl<N> fmt::Display for Primary<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the master {}", self.shared.name)?;
        match &*self.shared.current.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(address) => write!(f, " at {address}"),
            None => Ok(()),
        }
    }
}

impl<N: fmt::Debug> fmt::Debug for Primary<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Primary")
            .field("network", &self.shared.network)
            .field("sentinels", &self.shared.sentinels)
            .field("name", &self.shared.name)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
