//! One container as a process of this machine: in process, mount and host name namespaces of its own, with a file
//! system that is this machine's, whatever is written to it gone with the container. There are no cgroups, and
//! the network is this machine's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::OnceCell;

use crate::process::{Process, scratch_path};
use crate::variables::Variables;
use crate::{parts, wait};

/// As its first process: makes the file system, then becomes the container. Arguments: an empty folder, the host
/// name, the image's folder and where it is to be, pairs of source and target to mount, `--`, where to start, and
/// the command.
///
/// A target is resolved before it is put under the new root: a link such as `/var/run` would lead out of it.
const SETUP: &str = r#"
    set -e
    root=$1/merged
    mount -t tmpfs pod "$1"
    mkdir "$1/upper" "$1/work" "$1/image" "$1/image-work" "$root"
    mount -t overlay pod -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$root"
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    hostname "$2"
    mkdir -p "$root$4"
    mount -t overlay image -o "lowerdir=$3,upperdir=$1/image,workdir=$1/image-work" "$root$4"
    shift 4
    while [ "$1" != -- ]; do
        target=$root$(realpath -m "$2")
        if [ -d "$1" ]; then mkdir -p "$target"; else mkdir -p "${target%/*}" && : >>"$target"; fi
        mount --bind "$1" "$target"
        shift 2
    done
    shift
    exec chroot "$root" sh -c 'cd "$0" && exec "$@"' "$@"
"#;
/// As long as a host name may be.
const HOST_NAME: usize = 63;

/// What a container is made of.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) host_name: String,
    /// What the image has of its own, and where; what is written there goes with the container too.
    pub(crate) image: (PathBuf, &'static str),
    /// What is mounted where, the outer ones first.
    pub(crate) mounts: Vec<(PathBuf, String)>,
    pub(crate) variables: Variables,
    pub(crate) work_dir: &'static str,
    pub(crate) command: Vec<String>,
}

impl Sandbox {
    /// Starts it. All its processes end with the one that is answered.
    pub(crate) fn start(&self) -> Result<Process> {
        let folder = scratch_path("container")?;
        std::fs::create_dir(&folder)?;
        Process::start(Path::new("/usr/bin/unshare"), |command| {
            command
                .args(["--mount", "--uts", "--pid", "--fork", "--kill-child", "sh", "-c", SETUP, "sh"])
                .arg(folder)
                .arg(self.host_name.get(..HOST_NAME).unwrap_or(&self.host_name))
                .arg(&self.image.0)
                .arg(self.image.1);
            for (source, target) in &self.mounts {
                command.arg(source).arg(target);
            }
            command.arg("--").arg(self.work_dir).args(&self.command).env_clear().envs(&self.variables);
        })
    }
}

/// Asks a container to end, as a container runtime does: SIGTERM, to its first process alone.
pub(crate) fn terminate(container: &Process) -> Result<()> {
    let id = container.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
    let first = children.split_whitespace().next().context("the container has no process")?;
    let first = Pid::from_raw(first.parse()?).context("not a process")?;
    Ok(kill_process(first, Signal::TERM)?)
}

/// Whether containers may be made here. Where they may not, the test says that it is left out, even where nothing
/// may be missing: no installing gives a right.
pub async fn allowed() -> Result<bool> {
    static TRIED: OnceCell<std::result::Result<(), String>> = OnceCell::const_new();
    match TRIED.get_or_init(async || attempt().await.map_err(|error| format!("{error:#}"))).await {
        Ok(()) => Ok(true),
        Err(error) => parts::left_out(&anyhow::anyhow!("no containers can be made here: {error}")),
    }
}

async fn attempt() -> Result<()> {
    let variables = Variables::from([("PATH".to_owned(), "/usr/sbin:/usr/bin:/sbin:/bin".to_owned())]);
    let nothing = Sandbox {
        host_name: "attempt".to_owned(),
        image: (PathBuf::from("/usr"), "/opt/attempt"),
        mounts: Vec::new(),
        variables,
        work_dir: "/",
        command: vec!["true".to_owned()],
    };
    let mut process = nothing.start()?;
    let status = wait::until(wait::SOON, "a container to end", async || process.exit_status()).await?;
    ensure!(status.success(), "{}", process.log()?.trim());
    Ok(())
}
