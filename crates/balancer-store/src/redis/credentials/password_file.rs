//! A password in a file, such as a mounted Kubernetes Secret.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::fs::File;
use tokio::io::AsyncReadExt;

use super::{CredentialSource, Login};
use crate::StoreError;

/// How often the file is read. A mounted Secret follows its object within about a minute.
const INTERVAL: Duration = Duration::from_secs(10);
/// The longest password, in bytes.
const MAX_LENGTH: u64 = 4096;

/// The password in a file, and the user that it is for.
pub(in crate::redis) struct PasswordFile {
    pub(in crate::redis) path: PathBuf,
    /// The default user without one.
    pub(in crate::redis) user: Option<String>,
}

impl PasswordFile {
    /// Opened anew each time, because a Secret is renewed by a link to another file.
    async fn read(&self) -> io::Result<String> {
        // Opening a pipe would wait for its writer.
        if !tokio::fs::metadata(&self.path).await?.is_file() {
            return Err(io::Error::other("it is not a file"));
        }
        let mut text = Vec::new();
        File::open(&self.path).await?.take(MAX_LENGTH + 1).read_to_end(&mut text).await?;
        if text.len() as u64 > MAX_LENGTH {
            return Err(io::Error::other(format!("it is longer than {MAX_LENGTH} bytes")));
        }
        let text = String::from_utf8(text).map_err(|_| io::Error::other("it is not UTF-8"))?;
        let password = text.trim_end_matches(['\r', '\n']);
        if password.is_empty() {
            return Err(io::Error::other("it is empty"));
        }
        Ok(password.to_owned())
    }
}

impl CredentialSource for PasswordFile {
    async fn login(&self) -> Result<(Login, Duration), StoreError> {
        match self.read().await {
            Ok(password) => Ok((Login { user: self.user.clone(), password }, INTERVAL)),
            Err(error) => Err(StoreError::NoConnection(format!("password file {}: {error}", self.path.display()))),
        }
    }
}
