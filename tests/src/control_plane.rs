//! A Kubernetes control plane of a test's own: etcd, kube-apiserver and, on request, the scheduler
//! and the controller manager. There are no machines; [`nodes`](crate::nodes) and
//! [`kubelet`](crate::kubelet) stand in for them.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Namespace, ServiceAccount};
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::certificate::{Authority, ServerCertificate, authority};
use crate::endpoint::{self, http, https};
use crate::metrics::Metrics;
use crate::parts::program;
use crate::port;
use crate::process::{Process, scratch_path};
use crate::wait::SOON;

const ADMIN_TOKEN: &str = "admin-token";

/// Which programs run next to etcd and the apiserver.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// kube-scheduler: binds pods to nodes.
    pub scheduler: bool,
    /// kube-controller-manager without its node lifecycle controller, which would evict from nodes
    /// that no kubelet reports on: collects pods whose owner is gone, ends namespaces, counts quotas.
    pub controller_manager: bool,
    /// The admission plugin PodSecurityPolicy, if the apiserver has it: 1.25 removed it, and has pod security
    /// admission by labels of namespaces instead.
    pub pod_security_policy: bool,
    /// Whether the apiserver shows webhooks a certificate, that of [`ControlPlane::webhook_client`].
    pub webhook_client: bool,
    /// Whether the apiserver calls the endpoints of a webhook's Service instead of the Service, whose address leads nowhere
    /// without a kube-proxy.
    pub calls_endpoints: bool,
}

/// A running control plane. Dropping it kills it.
///
/// RBAC authorizes; [`client`](Self::client) and [`kubeconfig`](Self::kubeconfig) are the
/// administrator's. Pods need no ServiceAccount and new nodes get no taint: those two admission
/// plugins are off.
#[derive(Debug)]
pub struct ControlPlane {
    // Dropped, and so ended, in this order.
    controllers: Vec<Process>,
    apiserver: Option<Process>,
    _etcd: Process,
    port: u16,
    etcd_port: u16,
    certificate: ServerCertificate,
    pod_security_policy: bool,
    calls_endpoints: bool,
    webhook_client: Option<WebhookClient>,
    /// Holds the token file and the keys of the service accounts.
    folder: PathBuf,
    kubeconfig: PathBuf,
}

/// By what an apiserver identifies itself to webhooks.
#[derive(Debug)]
pub struct WebhookClient {
    /// The authority that signed its certificate.
    pub authority: Authority,
    /// Its certificate.
    pub certificate: ServerCertificate,
    /// The apiserver's `--admission-control-config-file`.
    config: PathBuf,
}

impl WebhookClient {
    fn new() -> Result<Self> {
        let authority = Authority::new()?;
        let certificate = authority.issue()?;
        let identity = json!({"client-certificate": certificate.path, "client-key": certificate.key_path});
        let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "users": [{"name": "*", "user": identity}]});
        let kubeconfig = write_json(&kubeconfig)?;
        let plugin = |name: &str| {
            let api = "apiserver.config.k8s.io/v1";
            let kind = "WebhookAdmissionConfiguration";
            json!({"name": name, "configuration": {"apiVersion": api, "kind": kind, "kubeConfigFile": kubeconfig}})
        };
        let config = write_json(&json!({
            "apiVersion": "apiserver.config.k8s.io/v1",
            "kind": "AdmissionConfiguration",
            "plugins": [plugin("MutatingAdmissionWebhook"), plugin("ValidatingAdmissionWebhook")],
        }))?;
        Ok(Self { authority, certificate, config })
    }
}

impl ControlPlane {
    /// The control plane that all tests of this test process share, with a scheduler if one is
    /// installed. It ends with the process. Tests keep apart by [`namespace`](Self::namespace).
    pub async fn shared() -> Result<&'static Self> {
        static SHARED: OnceCell<ControlPlane> = OnceCell::const_new();
        let options = Options { scheduler: program("kube-scheduler").is_ok(), ..Options::default() };
        SHARED.get_or_try_init(|| Self::start(options)).await
    }

    /// Starts a control plane and waits until it is ready.
    pub async fn start(options: Options) -> Result<Self> {
        let folder = scratch_path("control-plane")?;
        std::fs::create_dir(&folder)?;
        let tokens = format!("{ADMIN_TOKEN},admin,admin,system:masters\n");
        std::fs::write(folder.join("tokens"), tokens)?;
        let key = rcgen::KeyPair::generate()?;
        std::fs::write(folder.join("accounts.key"), key.serialize_pem())?;
        std::fs::write(folder.join("accounts.pub"), key.public_key_pem())?;

        let (port, etcd_port) = (port::free()?, port::free()?);
        let mut plane = Self {
            controllers: Vec::new(),
            apiserver: None,
            _etcd: start_etcd(etcd_port).await?,
            port,
            etcd_port,
            certificate: authority()?.issue()?,
            pod_security_policy: options.pod_security_policy && program_minor_version()? < 25,
            calls_endpoints: options.calls_endpoints,
            webhook_client: if options.webhook_client { Some(WebhookClient::new()?) } else { None },
            folder,
            kubeconfig: write_kubeconfig(port, ADMIN_TOKEN, None)?,
        };
        plane.start_apiserver().await?;
        if options.scheduler {
            // Its default of 50 requests in a second is for a cluster's machines, and would be what a test waits for.
            let settings = ["--kube-api-qps=1000", "--kube-api-burst=1000"].map(str::to_owned);
            plane.start_controller("kube-scheduler", &settings).await?;
        }
        if options.controller_manager {
            let settings = [
                "--controllers=*,-nodelifecycle".to_owned(),
                format!("--service-account-private-key-file={}", plane.file("accounts.key")),
                format!("--root-ca-file={}", authority()?.path.display()),
            ];
            plane.start_controller("kube-controller-manager", &settings).await?;
        }
        Ok(plane)
    }

    /// Starts the apiserver, always on the same port and with the objects in etcd.
    pub async fn start_apiserver(&mut self) -> Result<()> {
        let mut apiserver = Process::start(&program("kube-apiserver")?, |command| {
            command.args([
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                "--endpoint-reconciler-type=none",
                "--service-cluster-ip-range=10.0.0.0/24",
                "--authorization-mode=RBAC",
                "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
                "--service-account-issuer=https://kubernetes.default.svc",
            ]);
            command.args(self.pod_security_policy.then_some("--enable-admission-plugins=PodSecurityPolicy"));
            command.args(self.calls_endpoints.then_some("--enable-aggregator-routing"));
            let config = self.webhook_client.as_ref().map(|client| client.config.display());
            command.args(config.map(|config| format!("--admission-control-config-file={config}")));
            command.args(tls_arguments(&self.certificate)).args([
                format!("--secure-port={}", self.port),
                format!("--etcd-servers={}", http(self.etcd_port)),
                format!("--cert-dir={}", self.folder.display()),
                format!("--token-auth-file={}", self.file("tokens")),
                format!("--service-account-key-file={}", self.file("accounts.pub")),
                format!("--service-account-signing-key-file={}", self.file("accounts.key")),
            ]);
        })?;
        apiserver.until_ok(SOON, &self.client()?, "/readyz").await?;
        self.apiserver = Some(apiserver);
        Ok(())
    }

    /// Kills the apiserver: an outage of the API. What it wrote stays in etcd.
    pub fn stop_apiserver(&mut self) {
        self.apiserver = None;
    }

    /// The shortest outage of the API.
    pub async fn restart_apiserver(&mut self) -> Result<()> {
        self.stop_apiserver();
        self.start_apiserver().await
    }

    /// Removes the cluster's history: a watch from an older resourceVersion gets `410 Gone`.
    /// That takes an outage, because the apiserver caches the latest changes.
    pub async fn compact(&mut self) -> Result<()> {
        let etcd = endpoint::client(&http(self.etcd_port))?;
        self.stop_apiserver();
        // Any key: the header of the reply has the revision.
        let now = endpoint::post(&etcd, "/v3/kv/range", &json!({"key": "AA=="})).await?;
        let request = json!({"revision": now.json()?["header"]["revision"], "physical": true});
        let done = endpoint::post(&etcd, "/v3/kv/compaction", &request).await?;
        ensure!(done.status == 200, "etcd does not compact: {}", done.text);
        self.start_apiserver().await
    }

    /// A new client with the administrator's rights.
    pub fn client(&self) -> Result<Client> {
        endpoint::client_with_token(&https(self.port), Some(ADMIN_TOKEN))
    }

    /// The administrator's kubeconfig, for child processes.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Where the apiserver serves HTTPS.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// By what the apiserver identifies itself to webhooks; an error if it does not.
    pub fn webhook_client(&self) -> Result<&WebhookClient> {
        self.webhook_client.as_ref().context("the apiserver has no certificate for webhooks")
    }

    /// The apiserver's minor version: 20 of 1.20.2.
    pub async fn minor_version(&self) -> Result<u32> {
        Ok(self.client()?.apiserver_version().await?.minor.trim_end_matches('+').parse()?)
    }

    /// The apiserver's own metrics.
    pub async fn metrics(&self) -> Result<Metrics> {
        Metrics::of(&self.client()?).await
    }

    /// Makes a namespace that no other test has, labelled `kubernetes.io/metadata.name` as newer
    /// apiservers do by themselves.
    pub async fn namespace(&self, purpose: &str) -> Result<String> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let name = format!("{purpose}-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let namespace: Namespace = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
        }))?;
        let namespaces = Api::all(self.client()?);
        namespaces.create(&PostParams::default(), &namespace).await?;
        Ok(name)
    }

    /// Makes a ServiceAccount, and the kubeconfig of a program that runs as it in its namespace. It may do
    /// nothing until a role is bound to it: see [`Account`](crate::account::Account).
    pub async fn service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let accounts = Api::<ServiceAccount>::namespaced(self.client()?, namespace);
        let account = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        accounts.create(&PostParams::default(), &account).await?;
        self.kubeconfig_of(namespace, name).await
    }

    /// The kubeconfig of a program that runs as this ServiceAccount in its namespace.
    pub async fn kubeconfig_of(&self, namespace: &str, account: &str) -> Result<PathBuf> {
        write_kubeconfig(self.port, &token(&self.client()?, namespace, account).await?, Some(namespace))
    }

    async fn start_controller(&mut self, name: &str, settings: &[String]) -> Result<()> {
        // Before 1.23 they serve plain HTTP too, on a fixed port, unless that is disabled.
        let old = self.minor_version().await? < 23;
        let port = port::free()?;
        let mut controller = Process::start(&program(name)?, |command| {
            command
                .args(["--leader-elect=false", "--bind-address=127.0.0.1"])
                .arg(format!("--secure-port={port}"))
                .arg(format!("--kubeconfig={}", self.kubeconfig.display()))
                .args(tls_arguments(&self.certificate))
                .args(old.then_some("--port=0"))
                .args(settings);
        })?;
        let client = endpoint::client(&https(port))?;
        controller.until_ok(SOON, &client, "/healthz").await?;
        self.controllers.push(controller);
        Ok(())
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }
}

/// The control plane that a test runs on.
#[derive(Debug)]
pub enum Plane {
    /// The one that the tests of this process share.
    Shared(&'static ControlPlane),
    /// The test's own, which it may break.
    Own(Box<ControlPlane>),
}

impl Plane {
    /// The shared one.
    pub async fn shared() -> Result<Self> {
        Ok(Self::Shared(ControlPlane::shared().await?))
    }

    /// A new one.
    pub async fn own(options: Options) -> Result<Self> {
        Ok(Self::Own(Box::new(ControlPlane::start(options).await?)))
    }

    /// For a test that breaks it; an error if other tests share it.
    pub fn own_mut(&mut self) -> Result<&mut ControlPlane> {
        match self {
            Self::Own(plane) => Ok(plane),
            Self::Shared(_) => bail!("the shared control plane is not to be broken"),
        }
    }
}

impl Deref for Plane {
    type Target = ControlPlane;

    fn deref(&self) -> &ControlPlane {
        match self {
            Self::Shared(plane) => plane,
            Self::Own(plane) => plane,
        }
    }
}

async fn start_etcd(port: u16) -> Result<Process> {
    let data = scratch_path("etcd")?;
    let (url, peer_url) = (http(port), http(port::free()?));
    let mut etcd = Process::start(&program("etcd")?, |command| {
        command.arg("--data-dir").arg(data).args([
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            format!("--listen-peer-urls={peer_url}"),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster=default={peer_url}"),
        ]);
    })?;
    etcd.until_ok(SOON, &endpoint::client(&url)?, "/health").await?;
    Ok(etcd)
}

/// The minor version of the kube-apiserver program, for flags that have to be right before it can be asked.
fn program_minor_version() -> Result<u32> {
    let output = Command::new(program("kube-apiserver")?).arg("--version").output()?;
    let text = String::from_utf8(output.stdout)?;
    parse_minor_version(&text).with_context(|| format!("kube-apiserver --version prints {text:?}"))
}

/// The minor version in a line such as `Kubernetes v1.20.2`.
fn parse_minor_version(text: &str) -> Option<u32> {
    text.trim().strip_prefix("Kubernetes v1.")?.split('.').next()?.parse().ok()
}

fn tls_arguments(certificate: &ServerCertificate) -> [String; 2] {
    [
        format!("--tls-cert-file={}", certificate.path.display()),
        format!("--tls-private-key-file={}", certificate.key_path.display()),
    ]
}

/// A token of this ServiceAccount.
pub(crate) async fn token(client: &Client, namespace: &str, account: &str) -> Result<String> {
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    let request = TokenRequest::default();
    let answer = accounts.create_token_request(account, &PostParams::default(), &request).await?;
    Ok(answer.status.context("the TokenRequest has no status")?.token)
}

/// A kubeconfig for an apiserver on this machine, of a program that runs in this namespace.
pub(crate) fn write_kubeconfig(port: u16, token: &str, namespace: Option<&str>) -> Result<PathBuf> {
    let cluster = json!({"server": https(port), "certificate-authority": authority()?.path});
    // JSON is YAML too.
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "user", "namespace": namespace}}],
        "current-context": "tests",
    });
    write_json(&kubeconfig)
}

/// The same kubeconfig with the apiserver behind another port of this machine, such as a
/// [`Balance`](crate::balance::Balance)'s.
pub fn kubeconfig_through(port: u16, kubeconfig: &Path) -> Result<PathBuf> {
    let mut kubeconfig: Value = serde_json::from_slice(&std::fs::read(kubeconfig)?)?;
    kubeconfig["clusters"][0]["cluster"]["server"] = https(port).into();
    write_json(&kubeconfig)
}

fn write_json(kubeconfig: &Value) -> Result<PathBuf> {
    let path = scratch_path("kubeconfig")?;
    std::fs::write(&path, kubeconfig.to_string())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::parse_minor_version;

    #[test]
    fn the_minor_version_is_read_from_what_the_apiserver_prints() {
        for (text, minor) in [("Kubernetes v1.20.2\n", Some(20)), ("Kubernetes v1.36.0-rc.1\n", Some(36)), ("v2", None)]
        {
            assert_eq!(parse_minor_version(text), minor, "{text}");
        }
    }
}
