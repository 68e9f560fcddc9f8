//! Makes connections: TCP or TLS, then `AUTH`, `SELECT` and `PING`.

use std::fmt;
use std::future::Future;
use std::io;

use redis::RedisConnectionInfo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::address::Address;
use super::connection::{Connection, IoTask};
use super::tls;
use crate::StoreError;

/// A server that can be connected to. Its `Display` is its name in errors.
pub(super) trait Dial: fmt::Display + Send + Sync + 'static {
    /// Connects, and returns a connection that is ready for commands.
    fn dial(&self) -> impl Future<Output = Result<(Connection, IoTask), StoreError>> + Send;
}

impl Dial for Address {
    async fn dial(&self) -> Result<(Connection, IoTask), StoreError> {
        let connect = async {
            let failed = |error: io::Error| StoreError::NoConnection(error.to_string());
            let stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            if self.tls {
                log_in(tls::secure(stream, &self.host).await.map_err(failed)?, &self.credentials).await
            } else {
                log_in(stream, &self.credentials).await
            }
        };
        connect.await.map_err(|error| match error {
            StoreError::Refused { code, detail } => {
                StoreError::Refused { code, detail: self.without_password(&detail) }
            }
            StoreError::NoConnection(cause) => StoreError::NoConnection(format!("{self}: {cause}")),
            other => other,
        })
    }
}

/// Logs in on a stream to a server, and checks that the server is ready.
pub(super) async fn log_in<S>(stream: S, credentials: &RedisConnectionInfo) -> Result<(Connection, IoTask), StoreError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (connection, io) = Connection::on(stream).await?;
    // Not left to the redis crate, which reports every error as a wrong password.
    if let Some(password) = credentials.password() {
        let mut auth = redis::cmd("AUTH");
        auth.arg(credentials.username()).arg(password);
        connection.send(&auth).await?;
    }
    if credentials.db() != 0 {
        connection.send(redis::cmd("SELECT").arg(credentials.db())).await?;
    }
    // A frozen server accepts connections too, and a server that is still loading its data is not ready.
    match connection.send(&redis::cmd("PING")).await {
        // The user may not send PING, but the server answers.
        Err(StoreError::Refused { code, .. }) if code == "NOPERM" => {}
        reply => drop(reply?),
    }
    Ok((connection, io))
}
