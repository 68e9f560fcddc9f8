//! What goes into the image, without anything that builds images.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use balancer_tests::helm::repository;
use balancer_tests::need;
use balancer_tests::parts::program;
use balancer_tests::process::scratch_path;

fn files(folder: &Path, root: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, root, found)?;
        } else {
            found.insert(path.strip_prefix(root)?.display().to_string());
        }
    }
    Ok(())
}

#[test]
fn the_image_has_the_programs_what_they_are_linked_to_and_the_cas() -> Result<()> {
    need!(Webhook, Reconciler);
    let (platform, loader) = match std::env::consts::ARCH {
        "aarch64" => ("arm64", "lib/ld-linux-aarch64.so.1"),
        _ => ("amd64", "lib64/ld-linux-x86-64.so.2"),
    };
    let root = scratch_path("image")?;
    let webhook = program("balancer-webhook")?;
    let binaries = webhook.parent().context("the webhook is in no folder")?;
    let made = Command::new(repository("deploy/image")).args(["root", platform]).arg(&root).arg(binaries).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));

    let mut found = BTreeSet::new();
    files(&root, &root, &mut found)?;
    let wanted = [
        "balancer-reconcile",
        "balancer-webhook",
        "etc/ssl/certs/ca-certificates.crt",
        "lib/libc.so.6",
        "lib/libgcc_s.so.1",
        "lib/libm.so.6",
        loader,
    ];
    assert_eq!(found, wanted.map(str::to_owned).into());

    for name in ["balancer-webhook", "balancer-reconcile"] {
        // A user namespace, so that it takes no root.
        let mut inside = Command::new("unshare");
        inside.args(["--map-root-user", "--root"]).arg(&root).arg(format!("/{name}")).arg("--version").env_clear();
        let ran = inside.env("PATH", "/usr/bin:/bin").output()?;
        let said = String::from_utf8_lossy(&ran.stdout);
        assert_eq!(said, format!("{name} {}\n", env!("CARGO_PKG_VERSION")), "{}", String::from_utf8_lossy(&ran.stderr));
    }
    Ok(())
}
