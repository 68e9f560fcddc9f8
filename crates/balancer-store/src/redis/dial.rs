//! Makes connections: TCP or TLS, then `AUTH`, `SELECT` and `PING`.

use std::fmt;
use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::address::Address;
use super::connection::{Connection, IoTask};
use super::credentials::Credentials;
use super::tls;
use crate::StoreError;

/// A server that can be connected to. Its `Display` is its name in errors.
pub(super) trait Dial: fmt::Display + Send + Sync + 'static {
    /// Connects, and returns a connection that is ready for commands.
    fn dial(&self) -> impl Future<Output = Result<(Connection, IoTask), StoreError>> + Send;

    /// Waits until another server has to be used, and returns a connection to that one. Called anew for each connection.
    fn replacement(&self) -> impl Future<Output = (Connection, IoTask)> + Send {
        std::future::pending()
    }

    /// What to log in with. The supervisor logs in again on the live connection when it changes.
    fn credentials(&self) -> &Credentials;
}

/// Makes connections on which nothing was sent yet.
pub(super) trait Network: Clone + fmt::Debug + Send + Sync + 'static {
    /// The addresses that a name stands for, which change when servers are replaced.
    fn resolve(&self, server: &Address) -> impl Future<Output = io::Result<Vec<Address>>> + Send;

    /// Connects. The server's certificate has to be for `name`. An error names the address.
    fn open(
        &self,
        address: &Address,
        name: &str,
    ) -> impl Future<Output = Result<(Connection, IoTask), StoreError>> + Send;
}

/// The network that this process is in.
#[derive(Clone, Debug)]
pub(super) struct Tcp {
    pub(super) tls: bool,
}

impl Network for Tcp {
    async fn resolve(&self, Address { host, port }: &Address) -> io::Result<Vec<Address>> {
        let found = tokio::net::lookup_host((host.as_str(), *port)).await?;
        Ok(found.map(|found| Address { host: found.ip().to_string(), port: found.port() }).collect())
    }

    async fn open(&self, address: &Address, name: &str) -> Result<(Connection, IoTask), StoreError> {
        let failed = |error: io::Error| StoreError::NoConnection(format!("{address}: {error}"));
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        if self.tls {
            Connection::on(tls::secure(stream, name).await.map_err(failed)?).await
        } else {
            Connection::on(stream).await
        }
    }
}

/// A server, and what it takes to use it.
#[derive(Clone, Debug)]
pub(super) struct Server<N = Tcp> {
    pub(super) address: Address,
    pub(super) network: N,
    pub(super) database: i64,
    pub(super) credentials: Credentials,
}

impl<N> fmt::Display for Server<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

impl<N: Network> Dial for Server<N> {
    async fn dial(&self) -> Result<(Connection, IoTask), StoreError> {
        let Self { address, network, database, credentials } = self;
        let (connection, io) = network.open(address, &address.host).await?;
        log_in(&connection, credentials, *database).await.map_err(|error| name_server(error, address))?;
        Ok((connection, io))
    }

    fn credentials(&self) -> &Credentials {
        &self.credentials
    }
}

/// An error of a connection to the server, with the server's name if it has none yet.
pub(super) fn name_server(error: StoreError, server: impl fmt::Display) -> StoreError {
    match error {
        StoreError::NoConnection(cause) => StoreError::NoConnection(format!("{server}: {cause}")),
        other => other,
    }
}

/// An error of a server that refuses a command, with the server's name.
pub(super) fn name_refusing(error: StoreError, server: impl fmt::Display) -> StoreError {
    match error {
        StoreError::Refused { code, detail } => {
            StoreError::Refused { code, detail: format!("{detail} (from {server})") }
        }
        other => other,
    }
}

/// Limits the time of connecting to a server and asking it.
pub(super) async fn within<T>(
    limit: Duration,
    server: impl fmt::Display,
    connect: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    timeout(limit, connect).await.unwrap_or_else(|_| {
        Err(StoreError::NoConnection(format!("{server} did not answer within {limit:?} of connecting")))
    })
}

/// Logs in, and checks that the server is ready.
pub(super) async fn log_in(
    connection: &Connection,
    credentials: &Credentials,
    database: i64,
) -> Result<(), StoreError> {
    if let Some(login) = credentials.clone().current()? {
        connection.authenticate(&login).await.map_err(|error| credentials.refused(error))?;
    }
    if database != 0 {
        connection.send(redis::cmd("SELECT").arg(database)).await?;
    }
    // A frozen server accepts connections too, and a server that is still loading its data is not ready.
    match connection.send(&redis::cmd("PING")).await {
        // The user may not send PING, but the server answers.
        Err(StoreError::Refused { code, .. }) if code == "NOPERM" => Ok(()),
        reply => reply.map(drop),
    }
}
