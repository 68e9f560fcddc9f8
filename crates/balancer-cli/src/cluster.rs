//! Access to the cluster with the caller's own kubeconfig and rights. Every request has a deadline, and every list comes in
//! pages.

use std::error::Error;
use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use balancer_core::{CapacityLabels, CapacityProfile};
use balancer_runtime::cluster::chain;
use clap::Args;
use kube::api::{Api, ListParams, ObjectList};
use kube::client::AuthError;
use kube::client::retry::RetryPolicy;
use kube::config::{AuthProviderConfig, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tower::retry::Retry;
use tower::{BoxError, service_fn};

use crate::output::{Format, printable, quoted};
use crate::proxy::proxy;
use crate::settings::Settings;

/// How long connecting may take, and how long one request.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const REQUEST_LIMIT: Duration = Duration::from_secs(15);
/// The objects of one page, as kubectl has it.
const PAGE: u32 = 500;

/// The objects of a list that are kept: as many as a cluster may have pods by the limits of Kubernetes.
const MAX_OBJECTS: usize = 150_000;

/// A connection that receives nothing for so long is closed: longer than any request may take.
const READ_LIMIT: Duration = Duration::from_secs(60);

/// A request that the API refuses because it is overloaded is sent again so often, after pauses that grow from the first to
/// the last. They end within the time of a request, so that the reason of the refusal is told.
const RETRIES: u32 = 3;
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];

/// The resourceVersion that apiservers answer from their caches.
const OF_CACHE: &str = "0";

/// How recent the objects of a list must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// As they are now, which the apiserver asks etcd for.
    Now,
    /// As the apiserver has them in its cache, which costs little.
    Cached,
}

impl Freshness {
    /// A list of all objects that are so recent.
    pub(crate) fn parameters(self) -> ListParams {
        match self {
            Self::Now => ListParams::default(),
            Self::Cached => ListParams::default().at(OF_CACHE),
        }
    }
}

/// Which cluster, and which namespace, by the names of kubectl's flags.
#[derive(Args, Debug)]
pub(crate) struct ClusterArguments {
    /// The namespace [default: that of the context]
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,

    /// The context of the kubeconfig [default: its current one]
    #[arg(long)]
    context: Option<String>,

    /// The path of the kubeconfig [default: KUBECONFIG, or ~/.kube/config]
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
}

impl ClusterArguments {
    /// Whether any of the flags is stated.
    pub(crate) fn is_stated(&self) -> bool {
        self.namespace.is_some() || self.context.is_some() || self.kubeconfig.is_some()
    }

    /// What the flags after the command state, or else those before it.
    pub(crate) fn or(self, before: Self) -> Self {
        Self {
            namespace: self.namespace.or(before.namespace),
            context: self.context.or(before.context),
            kubeconfig: self.kubeconfig.or(before.kubeconfig),
        }
    }
}

/// How the jobs of a cluster are read, and printed.
#[derive(Args, Debug)]
pub(crate) struct ViewArguments {
    /// Platform of the nodes [default: that of the webhook's Deployment, or karpenter if it cannot be read]
    #[arg(long)]
    capacity_profile: Option<CapacityProfile>,

    /// The form of the output
    #[arg(short, long, value_enum, default_value = "table")]
    pub(crate) output: Format,
}

impl ViewArguments {
    /// The settings, with the labels of the platform that was stated, if one was.
    pub(crate) fn apply(&self, mut settings: Settings) -> Settings {
        if let Some(profile) = self.capacity_profile {
            settings.conventions.capacity_labels = CapacityLabels::of(profile);
        }
        settings
    }
}

/// A cluster, and the namespace that commands are about.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    /// The same for what need not be available, such as a pod: it sends no request a second time.
    pub(crate) once: Client,
    pub(crate) namespace: String,
    /// The address of its API.
    pub(crate) server: String,
}

/// Why the Kubernetes API has not answered a request as wanted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// The API does not know who asks: a token has expired, or the command that gets one fails.
    #[error("the cluster does not accept the credentials of the kubeconfig, so log in again: {0}")]
    Unauthenticated(String),
    /// There are no credentials, because the command of the kubeconfig that gets them does not work.
    #[error("{0}")]
    NoCredentials(String),
    /// Something else than the cluster of the kubeconfig answers, or the kubeconfig has another CA.
    #[error(
        "the certificate of the server is not valid for the kubeconfig (certificate-authority, tls-server-name): {0}"
    )]
    Untrusted(String),
    /// The caller lacks a right.
    #[error("{0}")]
    Forbidden(String),
    /// There is no such object.
    #[error("{0}")]
    NotFound(String),
    /// The API did not answer.
    #[error("the Kubernetes API did not answer within {} s", REQUEST_LIMIT.as_secs())]
    TimedOut,
    /// The API could not be reached, or has a fault.
    #[error("the Kubernetes API is not available: {0}")]
    Unavailable(String),
    /// A list is longer than a command can keep.
    #[error("there are more than {0} of them")]
    TooMany(usize),
    /// The API does not accept the request.
    #[error("the Kubernetes API refuses the request: {0}")]
    Refused(String),
}

impl Cluster {
    /// Reads the kubeconfig. The cluster itself is not asked yet.
    ///
    /// # Errors
    /// There is no valid kubeconfig, or no such context in it.
    pub(crate) async fn connect(arguments: &ClusterArguments) -> anyhow::Result<Self> {
        let ClusterArguments { namespace, context, kubeconfig } = arguments;
        let options = KubeConfigOptions { context: context.clone(), ..KubeConfigOptions::default() };
        let (mut config, kubeconfig) = match (kubeconfig, context) {
            (Some(path), _) => {
                let what = || format!("cannot use the kubeconfig {}", path.display());
                let read = Kubeconfig::read_from(path).map_err(|error| anyhow!(chain(&error))).with_context(what)?;
                let config = Config::from_custom_kubeconfig(read.clone(), &options).await;
                (config.map_err(|error| anyhow!(chain(&error))).with_context(what)?, Some(read))
            }
            (None, Some(context)) => {
                let config = Config::from_kubeconfig(&options)
                    .await
                    .map_err(|error| anyhow!(chain(&error)))
                    .with_context(|| format!("cannot use the context {context:?} of the kubeconfig"))?;
                (config, Kubeconfig::read().ok())
            }
            (None, None) => {
                let config = Config::infer().await.map_err(|error| {
                    anyhow!(
                        "no access to a cluster; accepted: --kubeconfig, KUBECONFIG, ~/.kube/config or a pod's service \
                         account: {}",
                        chain(&error)
                    )
                })?;
                (config, Kubeconfig::read().ok())
            }
        };
        // In a pod there is no kubeconfig, and no proxy on the way to the cluster.
        config.proxy_url = match &kubeconfig {
            Some(kubeconfig) => {
                let stated = stated_proxy(kubeconfig, context.as_deref());
                proxy(stated, &config.cluster_url, |name| std::env::var(name).ok())?
            }
            None => None,
        };
        if let Some(provider) = config.auth_info.auth_provider.as_ref().filter(|provider| !is_supported(provider)) {
            bail!(
                "the user of the kubeconfig has the auth-provider {:?}; accepted: oidc with an id-token, gcp with a cmd-path, or an exec plugin, \
                 such as kubelogin for Azure",
                provider.name
            );
        }
        config.connect_timeout = Some(CONNECT_LIMIT);
        config.read_timeout = Some(READ_LIMIT);
        let namespace = namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let command = config.auth_info.exec.as_ref().and_then(|exec| exec.command.clone());
        Self::of(config, namespace).map_err(|error| match auth_error(&error) {
            Some(error) => RequestError::NoCredentials(without_credentials(error, command.as_deref())).into(),
            None => anyhow!(chain(&error)).context("cannot create a Kubernetes client"),
        })
    }

    /// A cluster by its address and credentials.
    pub(crate) fn of(mut config: Config, namespace: String) -> kube::Result<Self> {
        let server = config.cluster_url.to_string();
        config.default_retry = false;
        let once = Client::try_from(config)?;
        let sender = once.clone();
        // One sender, because credentials may come from a program that asks the user.
        let send = service_fn(move |request| {
            let sender = sender.clone();
            async move { sender.send(request).await.map_err(BoxError::from) }
        });
        let [first, last] = RETRY_PAUSES;
        let retries = RetryPolicy::new(first, last, RETRIES, true)
            .map_err(|error| kube::Error::Service(BoxError::from(error.to_string())))?;
        let client = Client::new(Retry::new(retries, send), namespace.clone());
        Ok(Self { client, once, namespace, server })
    }

    /// The error, with the address of the cluster if the error is the cluster's and not about one of its objects.
    pub(crate) fn located(&self, error: anyhow::Error) -> anyhow::Error {
        let is_refused =
            matches!(error.downcast_ref(), Some(RequestError::Unauthenticated(_) | RequestError::Untrusted(_)));
        if is_refused || is_temporary(&error) { error.context(self.server.clone()) } else { error }
    }

    /// The objects of a namespace, or of all.
    pub(crate) fn api<K>(&self, namespace: Option<&str>) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        match namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }
}

/// The `proxy-url` of the context's cluster.
fn stated_proxy<'k>(kubeconfig: &'k Kubeconfig, context: Option<&str>) -> Option<&'k str> {
    let context = context.or(kubeconfig.current_context.as_deref())?;
    let context = kubeconfig.contexts.iter().find(|known| known.name == context)?.context.as_ref()?;
    let cluster = kubeconfig.clusters.iter().find(|known| known.name == context.cluster)?.cluster.as_ref()?;
    cluster.proxy_url.as_deref()
}

/// Whether the client gets a token by an auth-provider, which kubectl itself no longer has except `oidc`.
fn is_supported(provider: &AuthProviderConfig) -> bool {
    match provider.name.as_str() {
        "oidc" => provider.config.contains_key("id-token"),
        "gcp" => provider.config.contains_key("cmd-path"),
        _ => false,
    }
}

/// Waits for the answer to one request.
pub(crate) async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, RequestError> {
    let Ok(answer) = timeout(REQUEST_LIMIT, request).await else { return Err(RequestError::TimedOut) };
    answer.map_err(RequestError::from)
}

impl From<kube::Error> for RequestError {
    fn from(error: kube::Error) -> Self {
        let text = chain(&error);
        if let Some(error) = auth_error(&error) {
            return Self::NoCredentials(without_credentials(error, None));
        }
        match error {
            kube::Error::Api(status) => match status.code {
                401 => Self::Unauthenticated(text),
                403 => Self::Forbidden(text),
                404 => Self::NotFound(text),
                429 | 500.. => Self::Unavailable(text),
                _ => Self::Refused(text),
            },
            error if is_of_certificate(&error) => Self::Untrusted(text),
            _ => Self::Unavailable(text),
        }
    }
}

/// What keeps the client from credentials.
fn auth_error<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e AuthError> {
    error.downcast_ref().or_else(|| auth_error(error.source()?))
}

/// The client's own text has a dump of all that the command has written.
fn without_credentials(error: &AuthError, command: Option<&str>) -> String {
    let command = command.map(|command| format!(" {command:?}")).unwrap_or_default();
    match error {
        AuthError::AuthExecStart(error) => {
            format!("cannot run the command{command} by which the kubeconfig gets credentials: {error}")
        }
        AuthError::AuthExecRun { out, .. } => {
            let written = printable(&quoted(&String::from_utf8_lossy(&out.stderr)));
            format!(
                "the command{command} by which the kubeconfig gets credentials has failed, so log in again ({}): {written}",
                out.status
            )
        }
        // The cause quotes what the command has written, which may be the token.
        AuthError::AuthExecParse(_) => {
            format!("the command{command} by which the kubeconfig gets credentials has written no ExecCredential")
        }
        AuthError::ReadTokenFile(error, path) => {
            format!("cannot read the file of the kubeconfig's token, {}: {error}", path.display())
        }
        error => format!("the kubeconfig has no credentials that can be used: {}", chain(error)),
    }
}

/// Whether the client does not trust the server.
fn is_of_certificate(error: &(dyn Error + 'static)) -> bool {
    // What an I/O error wraps is not among its causes.
    let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    matches!(error.downcast_ref(), Some(rustls::Error::InvalidCertificate(_)))
        || wrapped.is_some_and(|error| is_of_certificate(error))
        || error.source().is_some_and(is_of_certificate)
}

/// The first objects of a list.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FirstOf<T> {
    pub(crate) objects: Vec<T>,
    /// Whether the list has more objects.
    pub(crate) has_more: bool,
}

impl<T> FirstOf<T> {
    /// All objects of the list; an error if it has more than these.
    pub(crate) fn all(self) -> Result<Vec<T>, RequestError> {
        if self.has_more { Err(RequestError::TooMany(self.objects.len())) } else { Ok(self.objects) }
    }
}

/// All objects of a list, page by page. `keep` takes what is needed of each object, so that a large cluster fits into
/// memory. A part of a list would give wrong counts, so a list that is too long is an error.
pub(crate) async fn list<K, T>(
    api: &Api<K>,
    parameters: ListParams,
    keep: impl FnMut(K) -> Option<T>,
) -> Result<Vec<T>, RequestError>
where
    K: Clone + DeserializeOwned + Debug,
{
    list_first(api, parameters, MAX_OBJECTS, keep).await?.all()
}

/// The first objects of a list, at most so many.
pub(crate) async fn list_first<K, T>(
    api: &Api<K>,
    parameters: ListParams,
    most: usize,
    mut keep: impl FnMut(K) -> Option<T>,
) -> Result<FirstOf<T>, RequestError>
where
    K: Clone + DeserializeOwned + Debug,
{
    pages(async |page| api.list(page).await, parameters, most, &mut keep).await
}

/// The same as [`list`] for the metadata alone.
pub(crate) async fn list_metadata<K, T>(
    api: &Api<K>,
    parameters: ListParams,
    mut keep: impl FnMut(kube::core::PartialObjectMeta<K>) -> Option<T>,
) -> Result<Vec<T>, RequestError>
where
    K: Clone + DeserializeOwned + Debug + kube::Resource<DynamicType = ()>,
{
    pages(async |page| api.list_metadata(page).await, parameters, MAX_OBJECTS, &mut keep).await?.all()
}

async fn pages<K: Clone, T>(
    read: impl AsyncFn(&ListParams) -> kube::Result<ObjectList<K>>,
    parameters: ListParams,
    most: usize,
    keep: &mut impl FnMut(K) -> Option<T>,
) -> Result<FirstOf<T>, RequestError> {
    // With a limit, an apiserver does not answer from its cache.
    let is_of_cache = parameters.resource_version.as_deref() == Some(OF_CACHE);
    let mut page = if is_of_cache { parameters } else { parameters.limit(PAGE) };
    let mut objects = Vec::new();
    loop {
        let list = within(read(&page)).await?;
        // One more than are kept shows that there are more.
        let room = (most + 1).saturating_sub(objects.len());
        objects.extend(list.items.into_iter().filter_map(&mut *keep).take(room));
        if objects.len() > most {
            objects.truncate(most);
            return Ok(FirstOf { objects, has_more: true });
        }
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(FirstOf { objects, has_more: false }),
        }
    }
}

/// `None` if the caller may not read it.
pub(crate) fn if_allowed<T>(answer: Result<T, RequestError>) -> Result<Option<T>, RequestError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(RequestError::Forbidden(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the same request may succeed later.
pub(crate) fn is_temporary(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(RequestError::TimedOut | RequestError::Unavailable(_)))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use k8s_openapi::api::core::v1::Pod;
    use kube::core::{ListMeta, Status, TypeMeta};
    use serde_json::{Value, json};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// A cluster of this kubeconfig's cluster and user.
    async fn connect(name: &str, cluster: Value, user: Value) -> anyhow::Result<Cluster> {
        let path = std::env::temp_dir().join(format!("spot-balancer-{name}-{}", std::process::id()));
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
        });
        std::fs::write(&path, kubeconfig.to_string()).expect("a kubeconfig");
        let arguments = ClusterArguments { namespace: None, context: None, kubeconfig: Some(path.clone()) };
        let cluster = Cluster::connect(&arguments).await;
        std::fs::remove_file(&path).expect("removed");
        cluster
    }

    /// The lines of a request up to the empty one.
    async fn head(stream: &mut TcpStream) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("a byte"));
        }
        String::from_utf8(head).expect("text")
    }

    /// Answers a request with an empty list. Returns the head of the request.
    async fn answer(stream: &mut TcpStream) -> String {
        let head = head(stream).await;
        let body = json!({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": []}).to_string();
        let text = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(text.as_bytes()).await.expect("written");
        head
    }

    async fn pods(cluster: &Cluster) -> Result<Vec<Pod>, RequestError> {
        list(&cluster.api::<Pod>(Some("etl")), ListParams::default(), Some).await
    }

    #[tokio::test]
    async fn a_cluster_is_reached_through_the_proxy_of_the_kubeconfig() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let proxy = format!("http://me:secret@{}", listener.local_addr().expect("an address"));
        // Nobody but the proxy knows the name.
        let cluster = json!({"server": "http://cluster.invalid:6443", "proxy-url": proxy});
        let cluster = connect("proxy", cluster, json!({})).await.expect("a cluster");
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let connect = head(&mut stream).await;
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.expect("written");
            (connect, answer(&mut stream).await)
        };
        let (pods, (connect, request)) = tokio::join!(pods(&cluster), serve);
        assert!(pods.expect("a list").is_empty());
        assert!(connect.starts_with("CONNECT cluster.invalid:6443 HTTP/1.1\r\n"), "{connect}");
        assert!(connect.to_lowercase().contains("\r\nproxy-authorization: basic "), "{connect}");
        assert!(request.starts_with("GET /api/v1/namespaces/etl/pods?"), "{request}");
    }

    #[tokio::test]
    async fn a_cluster_is_reached_through_a_socks_proxy() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let proxy = format!("socks5://{}", listener.local_addr().expect("an address"));
        let cluster = json!({"server": "http://cluster.invalid:6443", "proxy-url": proxy});
        let cluster = connect("socks", cluster, json!({})).await.expect("a cluster");
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut greeting = [0; 2];
            stream.read_exact(&mut greeting).await.expect("a greeting");
            let mut methods = vec![0; greeting[1].into()];
            stream.read_exact(&mut methods).await.expect("methods");
            stream.write_all(&[5, 0]).await.expect("written");
            // Version, command, reserved, a name; its length; the name and the port.
            let mut request = [0; 5];
            stream.read_exact(&mut request).await.expect("a request");
            let mut address = vec![0; usize::from(request[4]) + 2];
            stream.read_exact(&mut address).await.expect("an address");
            stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).await.expect("written");
            (address, answer(&mut stream).await)
        };
        let (pods, (address, _)) = tokio::join!(pods(&cluster), serve);
        assert!(pods.expect("a list").is_empty());
        assert!(address.starts_with(b"cluster.invalid"), "{address:?}");
    }

    #[tokio::test]
    async fn an_exec_plugin_of_the_kubeconfig_is_asked_for_a_token() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let server = format!("http://{}", listener.local_addr().expect("an address"));
        let user = |script: &str| {
            let exec = json!({
                "apiVersion": "client.authentication.k8s.io/v1", "command": "sh", "args": ["-c", script],
                "env": [{"name": "TOKEN", "value": "t1"}], "interactiveMode": "Never",
            });
            json!({"exec": exec})
        };
        let script = r#"echo "{\"kind\":\"ExecCredential\",\"apiVersion\":\"client.authentication.k8s.io/v1\",\"status\":{\"token\":\"$TOKEN\"}}""#;
        let cluster = connect("exec", json!({"server": server}), user(script)).await.expect("a cluster");
        let serve = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            answer(&mut stream).await
        };
        let (pods, request) = tokio::join!(pods(&cluster), serve);
        assert!(pods.expect("a list").is_empty());
        assert!(request.to_lowercase().contains("\r\nauthorization: bearer t1\r\n"), "{request}");
        let failed = connect("exec-fails", json!({"server": server}), user("echo who are you >&2; exit 3")).await;
        let error = format!("{:#}", failed.err().expect("no token"));
        let expected = "the command \"sh\" by which the kubeconfig gets credentials has failed, so log in again \
                        (exit status: 3): who are you";
        assert_eq!(error, expected);
        let warns = connect(
            "exec-warns",
            json!({"server": server}),
            user("echo warning: old; echo '{\"token\": \"t1-secret\"'"),
        )
        .await;
        let error = format!("{:#}", warns.err().expect("no credential"));
        assert_eq!(error, "the command \"sh\" by which the kubeconfig gets credentials has written no ExecCredential");
        let exec = json!({"apiVersion": "client.authentication.k8s.io/v1", "command": "no-such-plugin", "interactiveMode": "Never"});
        let missing = connect("exec-missing", json!({"server": server}), json!({"exec": exec})).await;
        let error = format!("{:#}", missing.err().expect("no token"));
        assert!(error.starts_with("cannot run the command \"no-such-plugin\" by which"), "{error}");
    }

    #[tokio::test]
    async fn a_server_with_a_certificate_of_another_ca_is_told_from_one_that_does_not_answer() {
        let certificate = |name: &str| rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
        let (own, other) = (certificate("127.0.0.1"), certificate("other"));
        let key = rustls::pki_types::PrivateKeyDer::Pkcs8(own.signing_key.serialize_der().into());
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .expect("a configuration");
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let server = format!("https://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = acceptor.accept(stream).await;
            }
        });
        let authority = serde_json::to_value(k8s_openapi::ByteString(other.cert.pem().into_bytes())).expect("JSON");
        let cluster = json!({"server": server, "certificate-authority-data": authority});
        let cluster = connect("untrusted", cluster, json!({})).await.expect("a client");
        let error = pods(&cluster).await.expect_err("not trusted");
        assert!(matches!(error, RequestError::Untrusted(_)), "{error:?}");
        let error = format!("{:#}", cluster.located(error.into()));
        assert!(error.starts_with(&server) && error.contains("certificate-authority"), "{error}");
    }

    #[tokio::test]
    async fn an_auth_provider_that_is_not_supported_is_named() {
        let cluster = || json!({"server": "http://cluster.invalid"});
        for (name, config) in [("azure", json!({})), ("gcp", json!({})), ("openstack", json!({}))] {
            let user = json!({"auth-provider": {"name": name, "config": config}});
            let error = connect(&format!("provider-{name}"), cluster(), user).await.err().expect("not supported");
            let expected = format!("the user of the kubeconfig has the auth-provider {name:?}; accepted: oidc with");
            assert!(error.to_string().starts_with(&expected), "{error}");
        }
        let user = json!({"auth-provider": {"name": "oidc", "config": {"id-token": "t1"}}});
        connect("provider-oidc", cluster(), user).await.expect("supported");
    }

    /// The odd numbers of a list of three pages, at most so many; and the pages that were asked for.
    async fn odd(most: usize) -> (FirstOf<i32>, Vec<(Option<u32>, Option<String>)>) {
        let asked = RefCell::new(Vec::new());
        let read = async |parameters: &ListParams| {
            let token = parameters.continue_token.clone();
            let (items, next) = match token.as_deref() {
                None => (vec![1, 2], Some("second")),
                Some("second") => (vec![3, 4], Some("third")),
                // Some apiservers return an empty token on the last page.
                Some(_) => (vec![5], Some("")),
            };
            asked.borrow_mut().push((parameters.limit, token));
            let metadata = ListMeta { continue_: next.map(str::to_owned), ..ListMeta::default() };
            Ok(ObjectList { types: TypeMeta::default(), metadata, items })
        };
        let odd = pages(read, ListParams::default(), most, &mut |item: i32| (item % 2 == 1).then_some(item)).await;
        (odd.expect("a list"), asked.into_inner())
    }

    #[tokio::test]
    async fn a_list_is_read_to_its_last_page() {
        let (odd, asked) = odd(3).await;
        assert_eq!(odd, FirstOf { objects: vec![1, 3, 5], has_more: false });
        let token = |token: &str| Some(token.to_owned());
        assert_eq!(asked, [(Some(PAGE), None), (Some(PAGE), token("second")), (Some(PAGE), token("third"))]);
    }

    #[tokio::test]
    async fn a_list_is_not_read_further_than_what_is_kept_of_it() {
        let (first, asked) = odd(1).await;
        assert_eq!((&first, asked.len()), (&FirstOf { objects: vec![1], has_more: true }, 2));
        let error = first.all().expect_err("too many");
        assert_eq!(error.to_string(), "there are more than 1 of them");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_without_an_answer_ends() {
        let answer = within(std::future::pending::<kube::Result<()>>()).await;
        assert!(matches!(answer, Err(RequestError::TimedOut)), "{answer:?}");
    }

    #[tokio::test]
    async fn only_what_may_pass_is_tried_again_by_a_watch() {
        for (code, is_tried_again) in [(403, false), (404, false), (401, false), (410, false), (429, true), (503, true)]
        {
            let status = Status::failure("a message", "Reason").with_code(code).boxed();
            let error = within(async { Err::<(), _>(kube::Error::Api(status)) }).await.expect_err("an error");
            assert!(error.to_string().contains("a message"), "{error}");
            let error = anyhow::Error::from(error).context("cannot list");
            assert_eq!(is_temporary(&error), is_tried_again, "{code}");
        }
        let status = Status::failure("a message", "Unauthorized").with_code(401).boxed();
        let error = within(async { Err::<(), _>(kube::Error::Api(status)) }).await.expect_err("an error");
        assert!(error.to_string().contains("log in again"), "{error}");
        assert!(is_temporary(&RequestError::TimedOut.into()));
        assert!(!is_temporary(&anyhow!("something else")));
    }
}
