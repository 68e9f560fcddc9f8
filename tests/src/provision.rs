//! What the container of a pod is made of, by what its pod says: mounts, variables and a command.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Volume};
use kube::api::Api;
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::time::{sleep, timeout};

use crate::certificate::{APISERVER, authority};
use crate::control_plane::token;
use crate::process::scratch_path;
use crate::sandbox::Sandbox;
use crate::spark_image;
use crate::variables::{self, Variables};

/// Where pods call the apiserver.
pub(crate) const HTTPS: u16 = 443;
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// How late a ConfigMap may come.
const LATE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);

/// For the pods of one namespace.
pub(crate) struct Provision {
    client: Client,
    namespace: String,
}

impl Provision {
    pub(crate) fn new(client: Client, namespace: &str) -> Self {
        Self { client, namespace: namespace.to_owned() }
    }

    /// What the pod's container is made of.
    pub(crate) async fn sandbox(
        &self,
        pod: &Pod,
        container: &Container,
        address: Ipv4Addr,
        hosts: PathBuf,
    ) -> Result<Sandbox> {
        let spec = pod.spec.as_ref().context("a pod without a spec")?;
        let empty = scratch_path("resolv.conf")?;
        std::fs::write(&empty, "")?;
        let mut mounts = vec![
            (hosts, "/etc/hosts".to_owned()),
            // Whoever is not in there is not asked for elsewhere.
            (empty, "/etc/resolv.conf".to_owned()),
            (self.account(spec.service_account_name.as_deref().unwrap_or("default")).await?, ACCOUNT.to_owned()),
        ];
        for mount in container.volume_mounts.as_deref().unwrap_or_default() {
            let volume = spec.volumes.iter().flatten().find(|volume| volume.name == mount.name);
            let volume = volume.with_context(|| format!("no volume {}", mount.name))?;
            ensure!(mount.sub_path.is_none(), "the volume mount {} has a subPath; none is simulated", mount.name);
            mounts.push((self.volume(volume).await?, mount.mount_path.clone()));
        }

        let mut known = serde_json::to_value(pod)?;
        known["status"]["podIP"] = json!(address);
        known["status"]["hostIP"] = json!(Ipv4Addr::LOCALHOST);
        let mut variables = spark_image::environment()?;
        variables.insert("HOSTNAME".to_owned(), pod.name_any());
        // In a network of its own it would find out by itself.
        variables.insert("SPARK_LOCAL_IP".to_owned(), address.to_string());
        // The name, not the address: for that the apiserver has no certificate.
        variables.insert("KUBERNETES_SERVICE_HOST".to_owned(), APISERVER.to_owned());
        variables.insert("KUBERNETES_SERVICE_PORT".to_owned(), HTTPS.to_string());
        variables::add(&mut variables, container.env.as_deref().unwrap_or_default(), &known)?;
        Ok(Sandbox {
            host_name: pod.name_any(),
            image: (spark_image::spark()?, spark_image::SPARK_HOME),
            mounts,
            command: command(container, &variables)?,
            variables,
            work_dir: spark_image::WORK_DIR,
        })
    }

    async fn account(&self, account: &str) -> Result<PathBuf> {
        let folder = scratch_path("account")?;
        std::fs::create_dir(&folder)?;
        std::fs::write(folder.join("token"), token(&self.client, &self.namespace, account).await?)?;
        std::fs::write(folder.join("ca.crt"), &authority()?.pem)?;
        std::fs::write(folder.join("namespace"), &self.namespace)?;
        Ok(folder)
    }

    async fn volume(&self, volume: &Volume) -> Result<PathBuf> {
        let folder = scratch_path(&volume.name)?;
        std::fs::create_dir(&folder)?;
        if let Some(source) = &volume.config_map {
            let name = source.name.as_str();
            let map = self.config_map(name).await.with_context(|| format!("the ConfigMap {name}"))?;
            let data = map.data.unwrap_or_default();
            let files: Vec<(&str, &str)> = match &source.items {
                Some(items) => items.iter().map(|item| (item.key.as_str(), item.path.as_str())).collect(),
                None => data.keys().map(|key| (key.as_str(), key.as_str())).collect(),
            };
            for (key, path) in files {
                let text = data.get(key).with_context(|| format!("the ConfigMap {name} has no {key}"))?;
                std::fs::write(folder.join(path), text)?;
            }
        } else if volume.empty_dir.is_none() {
            bail!("the volume {} is neither a ConfigMap nor an emptyDir; nothing else is simulated", volume.name);
        }
        Ok(folder)
    }

    /// A ConfigMap, which may come later than the pod.
    async fn config_map(&self, name: &str) -> Result<ConfigMap> {
        let maps = Api::<ConfigMap>::namespaced(self.client.clone(), &self.namespace);
        let found = async {
            loop {
                match maps.get_opt(name).await? {
                    Some(map) => return Ok(map),
                    None => sleep(LOOK).await,
                }
            }
        };
        timeout(LATE, found).await?
    }
}

/// A pod's container, where it has no other and nothing that is not simulated.
pub(crate) fn only_container(pod: &Pod) -> Result<&Container> {
    let spec = pod.spec.as_ref().context("a pod without a spec")?;
    ensure!(spec.init_containers.is_none(), "it has init containers; none are simulated");
    ensure!(spec.restart_policy.as_deref() == Some("Never"), "its containers may restart; none does here");
    let [container] = spec.containers.as_slice() else {
        bail!("it has {} containers; one is simulated", spec.containers.len());
    };
    ensure!(container.env_from.is_none() && container.lifecycle.is_none(), "envFrom and hooks are not simulated");
    Ok(container)
}

/// What a container runs: its own command, or what its image makes of its arguments.
fn command(container: &Container, variables: &Variables) -> Result<Vec<String>> {
    let expanded = |texts: &Option<Vec<String>>| {
        texts.iter().flatten().map(|text| variables::expand(text, variables)).collect::<Vec<_>>()
    };
    let (command, arguments) = (expanded(&container.command), expanded(&container.args));
    if command.is_empty() { spark_image::entry_point(&arguments, variables) } else { Ok([command, arguments].concat()) }
}
