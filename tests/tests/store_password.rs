//! The Redis ledger with a password that changes while it runs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_core::{JobRef, PlaceOutcome, PlaceRequest, Policy, SpotRatio};
use balancer_store::{ConnectError, Ledger, RedisLedger, RedisOptions, RedisPassword, StoreError};
use balancer_tests::need;
use balancer_tests::placement::request;
use balancer_tests::process::scratch_path;
use balancer_tests::redis::RedisServer;
use balancer_tests::wait;
use redis::cmd;

const JOB: JobRef<'_> = JobRef { namespace: "etl", app_id: "spark-1" };
/// Far above what it takes to read the file again.
const RECOVERY: Duration = Duration::from_secs(60);

fn options(file: &Path) -> RedisOptions {
    let password = RedisPassword::File(file.to_owned());
    RedisOptions { password, ..RedisOptions::new(Duration::from_secs(5), Duration::from_secs(86_400)) }
}

async fn place(ledger: &RedisLedger) -> Result<PlaceOutcome, StoreError> {
    let policy = Some(Policy { spot_ratio: SpotRatio::ONE, ..Policy::default() });
    let request = PlaceRequest { policy, ..request("e1") };
    ledger.place(JOB, &request).await
}

/// A user on a server, with a password file of a mounted Secret.
struct User {
    server: RedisServer,
    folder: PathBuf,
    versions: u32,
}

impl User {
    async fn new(password: &str) -> Result<Self> {
        let (server, folder) = (RedisServer::start().await?, scratch_path("secret")?);
        std::fs::create_dir(&folder)?;
        std::os::unix::fs::symlink("..data/password", folder.join("password"))?;
        let mut user = Self { server, folder, versions: 0 };
        user.publish(password)?;
        user.set(&["reset", "on", &format!(">{password}"), "~*", "+@all"]).await?;
        Ok(user)
    }

    fn url(&self) -> String {
        format!("valkey://balancer@127.0.0.1:{}", self.server.port())
    }

    fn file(&self) -> PathBuf {
        self.folder.join("password")
    }

    async fn connect(&self) -> Result<RedisLedger> {
        Ok(RedisLedger::connect(&self.url(), options(&self.file())).await?)
    }

    /// Changes the user on the server.
    async fn set(&self, rules: &[&str]) -> Result<()> {
        self.server.ask(cmd("ACL").arg("SETUSER").arg("balancer").arg(rules)).await
    }

    /// Renews the Secret, as the kubelet does it.
    fn publish(&mut self, password: &str) -> Result<()> {
        self.versions += 1;
        let version = format!("..{}", self.versions);
        std::fs::create_dir(self.folder.join(&version))?;
        std::fs::write(self.folder.join(&version).join("password"), format!("{password}\n"))?;
        std::os::unix::fs::symlink(&version, self.folder.join("..data_tmp"))?;
        Ok(std::fs::rename(self.folder.join("..data_tmp"), self.folder.join("..data"))?)
    }

    /// How often a client has logged in, and the connections of the user.
    async fn logins(&self) -> Result<(u64, Vec<u64>)> {
        let statistics: String = self.server.ask(cmd("INFO").arg("commandstats")).await?;
        let calls = statistics.split_once("cmdstat_auth:calls=").map_or("0", |(_, calls)| calls);
        let calls = calls.split(',').next().unwrap_or_default().parse()?;
        let clients: String = self.server.ask(cmd("CLIENT").arg("LIST")).await?;
        let clients = clients.lines().filter(|client| client.contains("user=balancer"));
        let ids = clients.filter_map(|client| client.strip_prefix("id=")?.split(' ').next()?.parse().ok());
        Ok((calls, ids.collect()))
    }

    async fn close_connections(&self) -> Result<()> {
        self.server.ask(cmd("CLIENT").arg("KILL").arg("USER").arg("balancer")).await
    }
}

async fn works(ledger: &RedisLedger) -> Result<()> {
    wait::until_true(RECOVERY, "the ledger to work", async || {
        place(ledger).await?;
        Ok(true)
    })
    .await
}

async fn fails_with(ledger: &RedisLedger, code: &str) -> Result<String> {
    wait::until(RECOVERY, code, async || {
        let error = place(ledger).await.err().context("it works")?.to_string();
        ensure!(error.contains(code), "{error}");
        Ok(Some(error))
    })
    .await
}

#[tokio::test]
async fn a_renewed_secret_is_used_on_the_live_connection() -> Result<()> {
    need!(Redis);
    let mut user = User::new("one").await?;
    let ledger = user.connect().await?;
    place(&ledger).await?;
    let (before, connections) = user.logins().await?;
    // Both are valid for a while, as with ElastiCache.
    user.set(&[">two"]).await?;
    user.publish("two")?;
    wait::until_true(RECOVERY, "another login", async || {
        place(&ledger).await?;
        Ok(user.logins().await?.0 > before)
    })
    .await?;
    assert_eq!(user.logins().await?.1, connections, "the connection is the same");
    user.set(&["<one"]).await?;
    user.close_connections().await?;
    works(&ledger).await
}

#[tokio::test]
async fn a_password_that_the_server_does_not_accept_yet_leaves_the_connection() -> Result<()> {
    need!(Redis);
    let mut user = User::new("one").await?;
    let ledger = user.connect().await?;
    place(&ledger).await?;
    let (before, connections) = user.logins().await?;
    user.publish("two")?;
    wait::until_true(RECOVERY, "a refused login", async || {
        place(&ledger).await?;
        Ok(user.logins().await?.0 > before)
    })
    .await?;
    place(&ledger).await?;
    assert_eq!(user.logins().await?.1, connections);
    // Later it is refused, and at last it is the right one.
    user.close_connections().await?;
    let error = fails_with(&ledger, "WRONGPASS").await?;
    assert!(!error.contains("two"), "{error}");
    user.set(&[">two"]).await?;
    works(&ledger).await
}

#[tokio::test]
async fn a_password_that_changed_on_the_server_first_is_read_again() -> Result<()> {
    need!(Redis);
    let mut user = User::new("one").await?;
    let ledger = user.connect().await?;
    place(&ledger).await?;
    user.set(&["resetpass", ">two"]).await?;
    place(&ledger).await?;
    user.close_connections().await?;
    fails_with(&ledger, "WRONGPASS").await?;
    user.publish("two")?;
    works(&ledger).await
}

#[tokio::test]
async fn a_password_file_that_cannot_be_used_leaves_the_password_and_is_reported() -> Result<()> {
    need!(Redis);
    let mut user = User::new("one").await?;
    let ledger = user.connect().await?;
    place(&ledger).await?;
    std::fs::remove_file(user.file())?;
    user.close_connections().await?;
    works(&ledger).await?;
    user.set(&["resetpass", ">changed-1"]).await?;
    user.close_connections().await?;
    let error = wait::until(RECOVERY, "an error that names the file", async || {
        let error = place(&ledger).await.err().context("it works")?.to_string();
        Ok(Some(error).filter(|error| error.contains("No such file")))
    })
    .await?;
    assert!(error.contains("WRONGPASS") && error.contains("/password"), "{error}");
    std::os::unix::fs::symlink("..data/password", user.file())?;
    user.publish("changed-1")?;
    works(&ledger).await?;
    let shown = format!("{ledger:?}");
    assert!(!shown.contains("changed-1"), "{shown}");
    Ok(())
}

#[tokio::test]
async fn without_a_password_the_ledger_does_not_start() -> Result<()> {
    need!(Redis);
    let mut user = User::new("one").await?;
    user.publish("")?;
    let error = user.connect().await.err().context("it started")?.to_string();
    assert!(error.contains("/password") && error.contains("empty"), "{error}");
    user.publish("one")?;
    let twice = format!("redis://balancer:s3cret@127.0.0.1:{}", user.server.port());
    let error = RedisLedger::connect(&twice, options(&user.file())).await.err().context("it started")?;
    assert!(matches!(&error, ConnectError::Mode(_)) && error.to_string().contains("REDIS_PASSWORD_FILE"), "{error}");
    let no_file = RedisOptions { password: RedisPassword::Url, ..options(&user.file()) };
    let error = RedisLedger::connect(&user.url(), no_file).await.err().context("it started")?;
    assert!(error.to_string().contains("password"), "{error}");
    Ok(())
}
