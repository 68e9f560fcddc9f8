//! The user and the password of connections, which may change while a connection is in use.

mod password_file;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

pub(super) use self::password_file::PasswordFile;
use super::supervisor::restart_after_panics;
use crate::StoreError;

/// The most that a source may take.
const SOURCE_TIMEOUT: Duration = Duration::from_secs(30);
/// Before a source is asked again after it has failed.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// A source is not asked more often than this, however often servers refuse its credentials.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
/// Some servers cut what they repeat of a command.
const LONGEST_REPEATED: usize = 32;

/// A user and a password, as `AUTH` takes them.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Login {
    /// The default user without one.
    pub(super) user: Option<String>,
    pub(super) password: String,
}

impl Login {
    /// A server's error without the password: some servers repeat in their errors what they received.
    pub(super) fn redact(&self, text: &str) -> String {
        let text = text.split(", with args beginning with").next().unwrap_or_default();
        let end = self.password.char_indices().nth(LONGEST_REPEATED).map_or(self.password.len(), |(end, _)| end);
        match self.password.get(..end) {
            Some(beginning) if !beginning.is_empty() => {
                text.replace(&self.password, "<password>").replace(beginning, "<password>")
            }
            _ => text.to_owned(),
        }
    }
}

impl fmt::Debug for Login {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

/// Where credentials come from that change: a file, or a service that issues tokens.
pub(super) trait CredentialSource: Send + Sync + 'static {
    /// What to log in with now, and when to ask again. It is also asked again soon after a server has refused the
    /// credentials. An error names the source and never contains a password; the credentials before stay in use.
    fn login(&self) -> impl Future<Output = Result<(Login, Duration), StoreError>> + Send;
}

/// The credentials for some servers. Clones share them.
#[derive(Clone)]
pub(super) struct Credentials {
    current: watch::Receiver<Current>,
    /// A server has refused them.
    refused: Arc<Notify>,
}

struct Current {
    /// `None` if nobody has to log in; an error while there are none.
    login: Result<Option<Login>, StoreError>,
    /// Why they may be out of date: the source has failed when it was asked last.
    problem: Option<StoreError>,
}

impl Credentials {
    /// Credentials that never change; `None` if nobody has to log in.
    pub(super) fn fixed(login: Option<Login>) -> Self {
        let (_, current) = watch::channel(Current { login: Ok(login), problem: None });
        Self { current, refused: Arc::default() }
    }

    /// Credentials from a source, which a task asks again and again. Waits for the first answer, at most for `limit`.
    /// `on_panic` is called each time the task has panicked; the task is then started again.
    pub(super) async fn from_source(
        source: impl CredentialSource,
        limit: Duration,
        on_panic: impl Fn() + Send + 'static,
    ) -> Self {
        let unknown = StoreError::NoConnection("the credentials are not known yet".to_owned());
        let (sender, mut current) = watch::channel(Current { login: Err(unknown), problem: None });
        let (source, refused) = (Arc::new(source), Arc::new(Notify::new()));
        let asked = Arc::clone(&refused);
        let ask = move || keep_asking(Arc::clone(&source), Arc::clone(&asked), sender.clone());
        tokio::spawn(restart_after_panics(ask, on_panic));
        // They may come later.
        let _ = timeout(limit, current.changed()).await;
        Self { current, refused }
    }

    /// What to log in with now. From here on [`changed`](Self::changed) waits for others.
    pub(super) fn current(&mut self) -> Result<Option<Login>, StoreError> {
        self.current.borrow_and_update().login.clone()
    }

    /// Waits until there are others than [`current`](Self::current) has returned last.
    pub(super) async fn changed(&mut self) {
        if self.current.changed().await.is_err() {
            // They never change.
            std::future::pending().await
        }
    }

    /// A server has refused them: the source is asked again soon. Returns the server's error with the reason why they may
    /// be out of date, if there is one.
    pub(super) fn refused(&self, error: StoreError) -> StoreError {
        self.refused.notify_one();
        match (error, &self.current.borrow().problem) {
            (StoreError::Refused { code, detail }, Some(problem)) => {
                StoreError::Refused { code, detail: format!("{detail} ({problem})") }
            }
            (error, _) => error,
        }
    }
}

/// Asks the source whenever its credentials have to be renewed, and publishes them. Ends after the last receiver.
async fn keep_asking(source: Arc<impl CredentialSource>, refused: Arc<Notify>, sender: watch::Sender<Current>) {
    loop {
        let answer = timeout(SOURCE_TIMEOUT, source.login()).await.unwrap_or_else(|_| {
            Err(StoreError::NoConnection(format!("the source of the credentials did not answer in {SOURCE_TIMEOUT:?}")))
        });
        let pause = answer.as_ref().map_or(PAUSE_AFTER_FAILURE, |(_, renew_after)| *renew_after);
        sender.send_if_modified(|current| current.update(answer.map(|(login, _)| login)));
        let wait = async {
            sleep(SHORTEST_PAUSE).await;
            tokio::select! {
                () = sleep(pause.saturating_sub(SHORTEST_PAUSE)) => {}
                () = refused.notified() => {}
            }
        };
        tokio::select! {
            () = wait => {}
            () = sender.closed() => return,
        }
    }
}

impl Current {
    /// Takes a source's answer. Returns whether there is another login, or another reason why there is none.
    fn update(&mut self, answer: Result<Login, StoreError>) -> bool {
        self.problem = answer.as_ref().err().cloned();
        if answer.is_err() && self.login.is_ok() {
            return false;
        }
        let login = answer.map(Some);
        std::mem::replace(&mut self.login, login) != self.login
    }
}

impl fmt::Debug for Credentials {
    /// Without the credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
