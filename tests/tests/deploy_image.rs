//! The files of the image, put together by deploy/image without Docker.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balancer_tests::certificate::authority;
use balancer_tests::helm::repository;
use balancer_tests::metrics::Metrics;
use balancer_tests::parts::program;
use balancer_tests::process::{Process, scratch_path};
use balancer_tests::redis::RedisServer;
use balancer_tests::{address, endpoint, need, port, reviews};

const START: Duration = Duration::from_secs(30);

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

fn platform() -> (&'static str, &'static str) {
    match std::env::consts::ARCH {
        "aarch64" => ("arm64", "lib/ld-linux-aarch64.so.1"),
        _ => ("amd64", "lib64/ld-linux-x86-64.so.2"),
    }
}

/// The image's files in a folder.
fn image() -> Result<PathBuf> {
    let root = scratch_path("image")?;
    let webhook = program("balancer-webhook")?;
    let binaries = webhook.parent().context("the webhook is in no folder")?;
    let made =
        Command::new(repository("deploy/image")).args(["root", platform().0]).arg(&root).arg(binaries).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(root)
}

/// Runs a program with the image's files as its only files: in a user namespace, so that this needs no root.
fn inside(command: &mut Command, root: &Path, name: &str) {
    command.args(["--map-root-user", "--root"]).arg(root).arg(format!("/{name}"));
}

#[test]
fn the_image_has_the_programs_their_libraries_and_ca_roots() -> Result<()> {
    need!(Webhook, Reconciler);
    let root = image()?;
    let mut found = BTreeSet::new();
    files(&root, &root, &mut found)?;
    let wanted = [
        "balancer-reconcile",
        "balancer-webhook",
        "etc/ssl/certs/ca-certificates.crt",
        "lib/libc.so.6",
        "lib/libgcc_s.so.1",
        "lib/libm.so.6",
        platform().1,
    ];
    found.retain(|file| !file.starts_with("licenses/"));
    assert_eq!(found, wanted.map(str::to_owned).into());

    for name in ["balancer-webhook", "balancer-reconcile"] {
        let mut command = Command::new("unshare");
        inside(&mut command, &root, name);
        let ran = command.arg("--version").env_clear().env("PATH", "/usr/bin:/bin").output()?;
        let said = String::from_utf8_lossy(&ran.stdout);
        assert_eq!(said, format!("{name} {}\n", env!("CARGO_PKG_VERSION")), "{}", String::from_utf8_lossy(&ran.stderr));
    }
    Ok(())
}

#[test]
fn the_image_has_the_licence_texts_of_its_contents() -> Result<()> {
    need!(Webhook, Reconciler);
    let licenses = image()?.join("licenses");
    let read = |name: &str| std::fs::read_to_string(licenses.join(name)).with_context(|| name.to_owned());
    for (name, text) in [
        ("LICENSE-APACHE", "Apache License"),
        ("LICENSE-MIT", "Permission is hereby granted, free of charge"),
        ("RUST.html", "Rust Standard Library"),
        ("debian/libc6", "GNU Lesser General Public"),
        ("debian/libgcc-s1", "GCC Runtime Library Exception"),
        ("debian/ca-certificates", "Mozilla Public License"),
        ("debian/LGPL-2.1", "GNU LESSER GENERAL PUBLIC LICENSE"),
        ("debian/GPL-3", "GNU GENERAL PUBLIC LICENSE"),
        ("debian/MPL-2.0", "Mozilla Public License Version 2.0"),
        ("debian/SOURCES", "https://snapshot.debian.org/package/glibc/"),
    ] {
        ensure!(read(name)?.contains(text), "{name} does not contain {text:?}");
    }
    // Each crate is listed, and has a text; ring's are several.
    let third_party = read("THIRD-PARTY")?;
    let (list, texts) = third_party.split_once("\n====").context("THIRD-PARTY has no texts")?;
    let crates: Vec<_> = list.lines().skip(2).filter_map(|line| Some(line.split_once(": ")?.0)).collect();
    ensure!(crates.len() > 100, "{list}");
    for name in &crates {
        ensure!(texts.lines().any(|line| line.starts_with(name)), "{name} has no text");
    }
    for name in ["kube ", "redis ", "ring ", "rustls ", "tokio "] {
        ensure!(crates.iter().any(|listed| listed.starts_with(name)), "{name}is not listed");
    }
    Ok(())
}

#[tokio::test]
async fn the_webhook_of_the_image_finds_redis_by_cluster_dns_and_by_hosts() -> Result<()> {
    need!(Webhook, Reconciler, Redis, Dns);
    let dns = address::free()?;
    let _dns = Process::start(&program("dnsmasq")?, |command| {
        command.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
        ]);
        command.arg(format!("--listen-address={dns}")).arg("--user=root").arg("--pid-file");
        // Other names of the cluster do not exist, and there is no upstream server.
        command.args([
            "--local=/cluster.local/",
            "--address=/spot-balancer-redis.spot-balancer.svc.cluster.local/127.0.0.1",
        ]);
    })?;
    let redis = RedisServer::start().await?;
    let root = image()?;
    // The files that the kubelet mounts into a pod.
    let resolve = format!(
        "search spot-balancer.svc.cluster.local svc.cluster.local cluster.local\nnameserver {dns}\noptions ndots:5\n"
    );
    std::fs::write(root.join("etc/resolv.conf"), resolve)?;
    std::fs::write(root.join("etc/hosts"), "127.0.0.1 localhost redis.example\n")?;
    let certificate = authority()?.issue()?;
    let (tls, account) = (root.join("tls"), root.join("var/run/secrets/kubernetes.io/serviceaccount"));
    std::fs::create_dir(&tls)?;
    std::fs::copy(&certificate.path, tls.join("tls.crt"))?;
    std::fs::copy(&certificate.key_path, tls.join("tls.key"))?;
    std::fs::create_dir_all(&account)?;
    std::fs::copy(&authority()?.path, account.join("ca.crt"))?;
    for (name, text) in [("token", "none"), ("namespace", "spot-balancer")] {
        std::fs::write(account.join(name), text)?;
    }

    for host in ["spot-balancer-redis.spot-balancer.svc", "redis.example"] {
        let (https, admin) = (port::free()?, port::free()?);
        let mut webhook = Process::start(Path::new("/usr/bin/unshare"), |command| {
            inside(command, &root, "balancer-webhook");
            command.env("REDIS_URL", format!("redis://{host}:{}", redis.port()));
            command.env("PORT", https.to_string()).env("ADMIN_PORT", admin.to_string());
            // There is no cluster, so the default ratio applies.
            command.env("KUBERNETES_SERVICE_HOST", "127.0.0.1").env("KUBERNETES_SERVICE_PORT", "1");
        })?;
        let admin = endpoint::client(&endpoint::http(admin))?;
        webhook.until_ok(START, &admin, "/readyz").await?;
        let client = endpoint::client(&endpoint::https(https))?;
        webhook
            .until_ready(START, async || {
                let review = reviews::creation("etl", 1)?;
                reviews::patch(&review, &endpoint::post(&client, "/mutate", &review).await?)?;
                let metrics = Metrics::of(&admin).await?;
                let errors = metrics.sum("spot_balancer_store_errors_total", &[]);
                let placed = |source| metrics.sum("spot_balancer_placements_total", &[("source", source)]);
                ensure!(placed("ledger").or(placed("existing")).is_some(), "{host}: {errors:?} errors of the store");
                Ok(Some(()))
            })
            .await?;
    }
    Ok(())
}
