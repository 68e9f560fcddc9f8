//! Tokens of AWS instead of a password, on a redis-server behind a server that verifies each token as AWS does. The
//! ledger runs in a process of its own, because the settings of AWS are environment variables.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use balancer_core::{JobRef, PlaceRequest, PolicyOverrides};
use balancer_store::{AwsIam, AwsService, Ledger, RedisLedger, RedisOptions, RedisPassword};
use rcgen::date_time_ymd;
use ring::{digest, hmac};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

const USER: &str = "balancer";
/// As a person may write it: tokens have it in lower case.
const CACHE: &str = "Jobs-1";
const REGION: &str = "eu-west-1";
const SERVICES: [(&str, AwsService); 3] = [
    ("elasticache", AwsService::ElastiCache),
    ("elasticache-serverless", AwsService::ElastiCacheServerless),
    ("memorydb", AwsService::MemoryDb),
];
/// In every secret, so that no line of the client's may contain it.
const SECRET: &str = "s3cret";
const WAIT: Duration = Duration::from_secs(60);

// The tests.

#[tokio::test(flavor = "multi_thread")]
async fn a_token_logs_in_at_each_service_with_credentials_from_each_source() -> Result<()> {
    let sources: [(&str, &[&str]); 3] = [
        // EKS Pod Identity.
        ("elasticache", &["/v1/credentials"]),
        // A service account's token (IRSA).
        ("elasticache-serverless", &["/sts/"]),
        // The instance: it also knows the region.
        ("memorydb", &["/latest/api/token", "/latest/meta-data/placement/region", "/latest/meta-data/iam/"]),
    ];
    for (service, asked) in sources {
        let test = Test::start(service, Duration::from_secs(3600)).await?;
        let client = test.client()?;
        client.until("placed").await?;
        let logins = test.with(|state| state.logins.clone());
        ensure!(logins.iter().all(|(_, login)| login.is_ok()), "{service}: {logins:?}");
        let paths = test.with(|state| state.paths.clone());
        for path in asked {
            ensure!(
                paths.iter().any(|asked| asked.starts_with(path)),
                "{service}: {path} was not asked, but {paths:?}"
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_renewed_on_the_live_connection_before_its_credentials_expire() -> Result<()> {
    let test = Test::start("elasticache", Duration::from_secs(6)).await?;
    let client = test.client()?;
    client.until("placed").await?;
    // The first connection finds out how the servers work together.
    let on_last = |state: &State| {
        let last = state.connections.saturating_sub(1);
        let logins = state.logins.iter().filter(|(connection, _)| *connection == last);
        logins.map(|(_, login)| login.clone()).collect::<Vec<_>>()
    };
    test.until("three logins on one connection", |state| on_last(state).len() >= 3).await?;
    let logins = test.with(|state| on_last(state));
    let mut keys = logins.clone();
    keys.dedup();
    assert!(keys == logins && logins.iter().all(Result::is_ok), "each is of other credentials: {logins:?}");
    let lines = client.lines();
    let since_first: Vec<&String> = lines.iter().skip_while(|line| *line != "placed").collect();
    assert!(since_first.iter().all(|line| *line == "placed"), "no call failed: {since_first:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_token_is_replaced_by_one_of_new_credentials() -> Result<()> {
    let test = Test::start("memorydb", Duration::from_secs(3600)).await?;
    let client = test.client()?;
    client.until("placed").await?;
    test.with(|state| state.first_valid_key = state.keys);
    test.close.notify_waiters();
    test.until("a refusal, then a login", |state| {
        let refused = state.logins.iter().position(|(_, login)| login.is_err());
        refused.is_some_and(|at| state.logins.iter().skip(at).any(|(_, login)| login.is_ok()))
    })
    .await?;
    client.until_again("placed").await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_aws_credentials_the_error_says_so_and_they_are_asked_for_again() -> Result<()> {
    let test = Test::start("elasticache", Duration::from_secs(3600)).await?;
    test.with(|state| state.is_down = true);
    let client = test.client()?;
    client.until("no token for REDIS_AWS_IAM: no AWS credentials were found").await?;
    test.with(|state| state.is_down = false);
    client.until("placed").await?;
    ensure!(!client.lines().iter().any(|line| line.contains(SECRET)), "{:?}", client.lines());
    Ok(())
}

/// The program that the tests start: it places executors, and prints how that went.
#[tokio::test]
#[ignore = "the other tests start it"]
async fn client() -> Result<()> {
    let (url, name) = (std::env::var("TEST_URL")?, std::env::var("TEST_SERVICE")?);
    let service = service(&name)?;
    let password = RedisPassword::AwsIam(AwsIam { service, cache_name: CACHE.to_owned() });
    let options = RedisOptions { password, ..RedisOptions::new(Duration::from_secs(5), Duration::from_secs(600)) };
    let ledger = RedisLedger::connect(&url, options).await?;
    let job = JobRef { namespace: "etl", app_id: "job" };
    loop {
        let overrides = PolicyOverrides::default();
        let request =
            PlaceRequest { key: "e1", required: None, overrides, policy: None, may_create: true, driver: None };
        match ledger.place(job, &request).await {
            Ok(_) => println!("placed"),
            Err(error) => println!("{error} {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn service(name: &str) -> Result<AwsService> {
    let found = SERVICES.iter().find(|(known, _)| *known == name);
    Ok(found.with_context(|| format!("{name} is no service"))?.1)
}

// The servers of a test, and its client.

struct Test {
    state: Mutex<State>,
    service: &'static str,
    redis_port: u16,
    redis: Mutex<Child>,
    /// The port of the server that verifies tokens, with TLS.
    port: u16,
    /// The port of the services that issue AWS credentials.
    aws_port: u16,
    /// Closes the open connections to the server that verifies tokens.
    close: tokio::sync::Notify,
    folder: PathBuf,
}

#[derive(Default)]
struct State {
    /// How many access keys were issued.
    keys: usize,
    /// Those before it are revoked.
    first_valid_key: usize,
    lifetime: Duration,
    /// Whether no keys are issued.
    is_down: bool,
    connections: usize,
    /// Each AUTH: its connection, and the access key or why it was refused.
    logins: Vec<(usize, Result<String, String>)>,
    /// What was asked of the services that issue AWS credentials.
    paths: Vec<String>,
}

impl Test {
    /// Starts the servers. Access keys are valid for `lifetime`.
    async fn start(service: &'static str, lifetime: Duration) -> Result<Arc<Self>> {
        let verifier = TcpListener::bind("127.0.0.1:0").await?;
        let aws = TcpListener::bind("127.0.0.1:0").await?;
        let (port, aws_port) = (verifier.local_addr()?.port(), aws.local_addr()?.port());
        let folder = std::env::temp_dir().join(format!("aws-iam-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        std::fs::write(folder.join("ca.crt"), certified.cert.pem())?;
        std::fs::write(folder.join("token"), format!("{SECRET}-token"))?;
        let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).map_err(|error| anyhow!(error))?;
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key)?;
        let tls = TlsAcceptor::from(Arc::new(config));

        // Its one user has a password that only the verifying server knows.
        let redis_port = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
        let redis = Command::new("redis-server")
            .args(["--port", &redis_port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .args(["--user", USER, "on", ">inner", "~*", "&*", "+@all", "--user", "default", "off"])
            .stdout(Stdio::null())
            .spawn()
            .context("redis-server is not on the PATH; run tests/install")?;

        let state = Mutex::new(State { lifetime, ..State::default() });
        let (redis, close) = (Mutex::new(redis), tokio::sync::Notify::new());
        let test = Arc::new(Self { state, service, redis_port, redis, port, aws_port, close, folder });
        let deadline = Instant::now() + WAIT;
        while TcpStream::connect(("127.0.0.1", redis_port)).await.is_err() {
            ensure!(Instant::now() < deadline, "redis-server does not listen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::spawn(accept(verifier, tls.clone(), Arc::clone(&test), Self::verify_logins));
        tokio::spawn(accept(aws, tls, Arc::clone(&test), Self::issue_credentials));
        Ok(test)
    }

    fn with<T>(&self, read: impl FnOnce(&mut State) -> T) -> T {
        read(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn until(&self, what: &str, holds: impl Fn(&State) -> bool) -> Result<()> {
        let deadline = Instant::now() + WAIT;
        while !self.with(|state| holds(state)) {
            ensure!(Instant::now() < deadline, "{what}: {:?}", self.with(|state| state.logins.clone()));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Starts the client, with what it takes to get AWS credentials.
    fn client(&self) -> Result<Client> {
        let (aws_port, file) = (self.aws_port, |name: &str| self.folder.join(name));
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--exact", "client", "--ignored", "--nocapture"]).env_clear();
        command.env("TEST_URL", format!("rediss://{USER}@localhost:{}", self.port)).env("TEST_SERVICE", self.service);
        command.env("SSL_CERT_FILE", file("ca.crt"));
        match self.service {
            "elasticache" => command
                .env("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("http://127.0.0.1:{aws_port}/v1/credentials"))
                .env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", file("token"))
                .env("AWS_REGION", REGION),
            "elasticache-serverless" => command
                .env("AWS_ENDPOINT_URL_STS", format!("https://localhost:{aws_port}/sts/"))
                .env("AWS_WEB_IDENTITY_TOKEN_FILE", file("token"))
                .env("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/balancer")
                .env("AWS_REGION", REGION),
            _ => command.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", format!("http://127.0.0.1:{aws_port}")),
        };
        let mut process = command.stdout(Stdio::piped()).spawn()?;
        let output = BufReader::new(process.stdout.take().context("its output")?);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                written.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        Ok(Client { process, lines })
    }

    /// A proxy to redis-server, which replaces the token of each AUTH by the right password or by a wrong one.
    async fn verify_logins(self: Arc<Self>, mut client: impl Stream) -> Result<()> {
        let connection = self.with(|state| {
            state.connections += 1;
            state.connections - 1
        });
        let mut redis = TcpStream::connect(("127.0.0.1", self.redis_port)).await?;
        let (mut commands, mut replies) = (Vec::new(), Vec::new());
        loop {
            while let Some((arguments, length)) = first_command(&commands) {
                let command: Vec<u8> = commands.drain(..length).collect();
                match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
                    ["AUTH", login @ ..] => {
                        let login = match login {
                            [user, token] => self.verify(user, token),
                            _ => Err("it has no user and token".to_owned()),
                        };
                        let password = if login.is_ok() { "inner" } else { "wrong" };
                        self.with(|state| state.logins.push((connection, login)));
                        let auth = format!("*3\r\n$4\r\nAUTH\r\n$8\r\n{USER}\r\n$5\r\n{password}\r\n");
                        redis.write_all(auth.as_bytes()).await?;
                    }
                    _ => redis.write_all(&command).await?,
                }
            }
            tokio::select! {
                read = client.read_buf(&mut commands) => ensure!(read? > 0, "closed"),
                read = redis.read_buf(&mut replies) => {
                    ensure!(read? > 0, "closed");
                    client.write_all(&replies).await?;
                    client.flush().await?;
                    replies.clear();
                }
                () = self.close.notified() => return Ok(()),
            }
        }
    }

    /// Checks a token as the server of the service does. Returns the id of the access key that signed it.
    fn verify(&self, user: &str, token: &str) -> Result<String, String> {
        let (service, resource) = match self.service {
            "elasticache-serverless" => ("elasticache", Some(&"ServerlessCache")),
            service => (service, None),
        };
        let (host, query) = token.split_once("/?").ok_or("it is no URL without a scheme")?;
        let parameters: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        let parameter = |name: &str| parameters.get(name).copied().ok_or(format!("it has no {name}"));
        if (user, host) != (USER, "jobs-1") || (parameter("Action")?, parameter("User")?) != ("connect", USER) {
            return Err("it is for another host, user or action".to_owned());
        }
        if parameters.get("ResourceType") != resource {
            return Err("it is for another type of resource".to_owned());
        }
        if (parameter("X-Amz-Expires")?, parameter("X-Amz-SignedHeaders")?) != ("900", "host") {
            return Err("it has another expiry, or signs other headers".to_owned());
        }
        let date = parameter("X-Amz-Date")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if unix_time(date).ok_or("its date is invalid")?.abs_diff(now) >= 900 {
            return Err(format!("it has expired: {date}"));
        }
        let day = date.get(..8).unwrap_or_default();
        let (id, scope) = parameter("X-Amz-Credential")?.split_once("%2F").ok_or("it has no scope")?;
        if scope.replace("%2F", "/") != format!("{day}/{REGION}/{service}/aws4_request") {
            return Err(format!("its scope is {scope}"));
        }
        let number = id.strip_prefix("AKIA").and_then(|number| number.parse().ok()).ok_or("its key is unknown")?;
        if !self.with(|state| (state.first_valid_key..state.keys).contains(&number)) {
            return Err(format!("its key {id} is revoked or unknown"));
        }
        if parameter("X-Amz-Security-Token")? != session(number).replace('/', "%2F").replace('=', "%3D") {
            return Err("it has another session".to_owned());
        }
        // The signature is of everything but itself, in alphabetical order.
        let signed = parameters.iter().filter(|(name, _)| **name != "X-Amz-Signature");
        let signed = signed.map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&");
        let request = format!("GET\n/\n{signed}\nhost:{host}\n\nhost\n{}", sha256(""));
        let text = format!("AWS4-HMAC-SHA256\n{date}\n{day}/{REGION}/{service}/aws4_request\n{}", sha256(&request));
        let mut key = format!("AWS4{}", secret(number)).into_bytes();
        for part in [day, REGION, service, "aws4_request", &text] {
            key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), part.as_bytes()).as_ref().to_vec();
        }
        if hex(&key) != parameter("X-Amz-Signature")? {
            return Err("its signature is wrong".to_owned());
        }
        Ok(id.to_owned())
    }

    /// The services that issue AWS credentials: EKS Pod Identity, STS and the metadata of the instance.
    async fn issue_credentials(self: Arc<Self>, mut client: impl Stream) -> Result<()> {
        let mut received = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&received).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head
                    .to_lowercase()
                    .split("content-length: ")
                    .nth(1)
                    .map_or("0", |rest| rest.split("\r\n").next().unwrap_or_default())
                    .parse()?;
                if body.len() >= length {
                    let (status, answer) = self.answer(head, body).unwrap_or_else(|| ("500 Error", String::new()));
                    let ttl = "x-aws-ec2-metadata-token-ttl-seconds: 21600";
                    let length = answer.len();
                    let head =
                        format!("HTTP/1.1 {status}\r\n{ttl}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
                    client.write_all(format!("{head}{answer}").as_bytes()).await?;
                    client.shutdown().await?;
                    return Ok(());
                }
            }
            ensure!(client.read_buf(&mut received).await? > 0, "closed");
        }
    }

    /// The status and the body of an answer; none while no keys are issued.
    fn answer(&self, head: &str, body: &str) -> Option<(&'static str, String)> {
        let path = head.split(' ').nth(1)?.to_owned();
        self.with(|state| state.paths.push(path.clone()));
        let token = format!("{SECRET}-token");
        let authorized = match path.as_str() {
            "/sts/" => body.contains("Action=AssumeRoleWithWebIdentity") && body.contains(&token),
            "/latest/api/token" => true,
            _ => head.contains(&token),
        };
        if !authorized {
            return Some(("401 Unauthorized", String::new()));
        }
        if path == "/latest/api/token" {
            return Some(("200 OK", token));
        } else if path == "/latest/meta-data/placement/region" {
            return Some(("200 OK", REGION.to_owned()));
        } else if path.ends_with("/security-credentials/") || path.ends_with("/security-credentials-extended/") {
            return Some(("200 OK", "balancer".to_owned()));
        }
        let (number, lifetime) = self.with(|state| {
            let number = state.keys;
            state.keys += usize::from(!state.is_down);
            (!state.is_down).then_some((number, state.lifetime))
        })?;
        let (secret, session, expiry) = (secret(number), session(number), iso_8601(SystemTime::now() + lifetime));
        Some((
            "200 OK",
            if path == "/sts/" {
                format!(
                    "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
                 <AccessKeyId>AKIA{number}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>\
                 <SessionToken>{session}</SessionToken><Expiration>{expiry}</Expiration></Credentials>\
                 </AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
                )
            } else {
                format!(
                    r#"{{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":"AKIA{number}","SecretAccessKey":"{secret}","Token":"{session}","Expiration":"{expiry}"}}"#
                )
            },
        ))
    }
}

impl Drop for Test {
    fn drop(&mut self) {
        let redis = self.redis.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = redis.kill().and_then(|()| redis.wait());
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// The process with the ledger.
struct Client {
    process: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Client {
    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a line that contains `part`.
    async fn until(&self, part: &str) -> Result<()> {
        self.until_after(part, 0).await
    }

    /// Waits for such a line from now on.
    async fn until_again(&self, part: &str) -> Result<()> {
        self.until_after(part, self.lines().len()).await
    }

    async fn until_after(&self, part: &str, skipped: usize) -> Result<()> {
        let deadline = Instant::now() + WAIT;
        while !self.lines().iter().skip(skipped).any(|line| line.contains(part)) {
            ensure!(Instant::now() < deadline, "no {part:?} in {:?}", self.lines().last_chunk::<3>());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.process.kill().and_then(|()| self.process.wait());
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Serves each connection in a task of its own, with TLS if that is what the client begins with.
async fn accept<F>(
    listener: TcpListener,
    tls: TlsAcceptor,
    test: Arc<Test>,
    serve: impl Fn(Arc<Test>, Box<dyn Stream>) -> F + Clone + Send + 'static,
) where
    F: Future<Output = Result<()>> + Send,
{
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, test, serve) = (tls.clone(), Arc::clone(&test), serve.clone());
        tokio::spawn(async move {
            let mut first = [0];
            if stream.peek(&mut first).await.is_ok() && first == [22] {
                if let Ok(stream) = tls.accept(stream).await {
                    let _ = serve(test, Box::new(stream)).await;
                }
            } else {
                let _ = serve(test, Box::new(stream)).await;
            }
        });
    }
}

/// The arguments of the first command in the buffer, and its length in bytes, if it is complete.
fn first_command(buffer: &[u8]) -> Option<(Vec<String>, usize)> {
    let line = |at: usize| {
        let rest = buffer.get(at..)?;
        let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
        let number = std::str::from_utf8(rest.get(1..end)?).ok()?.parse::<usize>().ok()?;
        Some((number, at + end + 2))
    };
    let (count, mut at) = line(0)?;
    let mut arguments = Vec::new();
    for _ in 0..count {
        let (length, start) = line(at)?;
        arguments.push(String::from_utf8_lossy(buffer.get(start..start + length)?).into_owned());
        at = start + length + 2;
    }
    (at <= buffer.len()).then_some((arguments, at))
}

fn secret(number: usize) -> String {
    format!("{SECRET}/{number}")
}

/// With characters that a URL escapes.
fn session(number: usize) -> String {
    format!("{SECRET}/session/{number}==")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(text: &str) -> String {
    hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
}

/// Of a date such as 20240802T121150Z.
fn unix_time(date: &str) -> Option<u64> {
    let number = |from: usize, to: usize| date.get(from..to)?.parse::<u64>().ok();
    let day =
        date_time_ymd(number(0, 4)?.try_into().ok()?, number(4, 6)?.try_into().ok()?, number(6, 8)?.try_into().ok()?);
    let midnight = u64::try_from(day.unix_timestamp()).ok()?;
    Some(midnight + 3600 * number(9, 11)? + 60 * number(11, 13)? + number(13, 15)?)
}

fn iso_8601(time: SystemTime) -> String {
    let time = date_time_ymd(1970, 1, 1) + time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second) = time.to_hms();
    format!("{year}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", u8::from(month))
}
