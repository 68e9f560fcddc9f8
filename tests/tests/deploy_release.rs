//! deploy/release: what it refuses, the files of its dry run, and the order of its commands.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use balancer_tests::control_plane::Options;
use balancer_tests::deployed::{cluster, deployment};
use balancer_tests::helm::{objects, repository};
use balancer_tests::need;
use balancer_tests::parts::program;
use balancer_tests::process::scratch_path;
use serde_json::{Value, json};

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn tag() -> String {
    format!("v{VERSION}")
}

/// The standard output of a command that has to succeed.
fn output(command: &mut Command) -> Result<String> {
    let done = command.output()?;
    ensure!(done.status.success(), "{command:?}: {} {}", done.status, String::from_utf8_lossy(&done.stderr));
    Ok(String::from_utf8(done.stdout)?)
}

fn git(clone: &Path, arguments: &[&str]) -> Result<String> {
    let author = ["-c", "user.name=tests", "-c", "user.email=tests@example.com", "-c", "commit.gpgsign=false"];
    output(Command::new("git").current_dir(clone).args(author).args(arguments))
}

/// A repository of its own, with one commit of the source as it is here, changes included, and the tag of its version.
fn tagged() -> Result<PathBuf> {
    let clone = scratch_path("clone")?;
    std::fs::create_dir(&clone)?;
    let copy = "git ls-files -z --cached --others --exclude-standard | \
                xargs --null sh -c 'for file; do [ ! -e \"$file\" ] || printf \"%s\\0\" \"$file\"; done' sh | \
                tar --create --null --files-from=- | tar --extract --directory \"$0\"";
    output(Command::new("sh").args(["-c", copy]).arg(&clone).current_dir(repository(".")))?;
    let (path, date) = (clone.join("CHANGELOG.md"), format!("## [{VERSION}] - 2026-01-31"));
    let changelog = std::fs::read_to_string(&path)?;
    std::fs::write(&path, changelog.replace(&format!("## [{VERSION}] - Unreleased"), &date))?;
    git(&clone, &["init", "--quiet"])?;
    git(&clone, &["add", "--all"])?;
    git(&clone, &["commit", "--quiet", "--message=release"])?;
    git(&clone, &["tag", &tag()])?;
    Ok(clone)
}

fn release(clone: &Path, arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(clone.join("deploy/release")).args(arguments).current_dir(clone).output()?)
}

/// What a dry run prints. Its files are in `folder`.
fn dry_run(clone: &Path, folder: &Path) -> Result<String> {
    let webhook = program("balancer-webhook")?;
    let binaries = webhook.parent().context("the webhook is in no folder")?;
    let mut command = Command::new(clone.join("deploy/release"));
    command.args([&tag(), "--dry-run", "--registry", "registry.example.com/data", "--binaries"]);
    command.arg(binaries).arg("--output").arg(folder);
    output(&mut command)
}

/// The files of a package of the chart, by their paths.
fn unpacked(package: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let folder = scratch_path("package")?;
    std::fs::create_dir(&folder)?;
    output(Command::new("tar").arg("--extract").arg("--file").arg(package).arg("--directory").arg(&folder))?;
    let list = output(Command::new("find").args([".", "-type", "f"]).current_dir(&folder))?;
    list.lines().map(|path| Ok((path.to_owned(), std::fs::read(folder.join(path))?))).collect()
}

/// The crates that are linked into the programs, by cargo: name and version.
fn linked() -> Result<BTreeSet<(String, String)>> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["tree", "--locked", "--edges=normal,no-proc-macro", "--prefix=none", "--format={p}"]);
    command.args(["--package=balancer-webhook", "--package=balancer-reconcile"]).current_dir(repository("."));
    let name_and_version = |line: &str| {
        let mut words = line.split(' ');
        Some((words.next()?.to_owned(), words.next()?.trim_start_matches('v').to_owned()))
    };
    Ok(output(&mut command)?.lines().filter(|line| !line.is_empty()).filter_map(name_and_version).collect())
}

#[test]
fn what_does_not_belong_to_the_tag_is_refused_with_the_reason() -> Result<()> {
    let clone = tagged()?;
    let refused = |arguments: &[&str], reasons: &[&str]| -> Result<()> {
        let done = release(&clone, arguments)?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(!done.status.success(), "{arguments:?} is accepted");
        for reason in reasons {
            ensure!(said.contains(reason), "{arguments:?} is refused without {reason:?}: {said}");
        }
        Ok(())
    };
    let tag = tag();
    refused(&[], &["usage"])?;
    refused(&["latest", "--dry-run"], &["latest is not a tag of a release"])?;
    refused(&[&tag], &["--registry is missing"])?;
    refused(&[&tag, "--registry"], &["--registry needs a value"])?;
    refused(&[&tag, "--push"], &["unknown option --push"])?;
    refused(&[&tag, "--registry", "x", "--binaries", "y"], &["--binaries is for --dry-run only"])?;
    refused(
        &["v99.0.0", "--dry-run"],
        &["no tag v99.0.0", "version in Cargo.toml is", "appVersion in", "CHANGELOG.md has no section for 99.0.0"],
    )?;
    git(
        &clone,
        &["tag", "--force", "--message=v\n\n-----BEGIN PGP SIGNATURE-----\n\n-----END PGP SIGNATURE-----", &tag],
    )?;
    refused(&[&tag, "--dry-run"], &["the signature of the tag"])?;
    git(&clone, &["tag", "--force", &tag])?;
    std::fs::write(clone.join("untracked"), "")?;
    refused(&[&tag, "--dry-run"], &["the tree has changes"])?;
    let changelog = std::fs::read_to_string(clone.join("CHANGELOG.md"))?;
    std::fs::write(clone.join("CHANGELOG.md"), changelog.replace("- 2026-01-31", "- Unreleased"))?;
    git(&clone, &["add", "--all"])?;
    git(&clone, &["commit", "--quiet", "--message=later"])?;
    refused(&[&tag, "--dry-run"], &["but HEAD is", "CHANGELOG.md has no section"])
}

#[tokio::test]
async fn a_dry_run_makes_the_files_of_the_release_and_prints_the_rest() -> Result<()> {
    need!(Webhook, Reconciler, Helm, ControlPlane);
    let (clone, folder) = (tagged()?, scratch_path("released")?);
    let printed = dry_run(&clone, &folder)?;
    for command in [
        "docker buildx build --platform=linux/amd64,linux/arm64",
        "name=registry.example.com/data/spot-balancer,push=true,push-by-digest=true",
        &format!(
            "imagetools create --tag registry.example.com/data/spot-balancer:{VERSION} registry.example.com/data/"
        ),
        "helm push",
        "oci://registry.example.com/data/charts",
        "cosign sign --yes --recursive registry.example.com/data/spot-balancer@sha256:",
        "cosign sign-blob",
    ] {
        ensure!(printed.contains(command), "{command} is not in {printed}");
    }

    // The checksums are of all files, and the same from a second run.
    output(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(&folder))?;
    let sums = std::fs::read_to_string(folder.join("SHA256SUMS"))?;
    let again = scratch_path("again")?;
    dry_run(&clone, &again)?;
    assert_eq!(std::fs::read_to_string(again.join("SHA256SUMS"))?, sums);

    let platform = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
    let root = folder.join(format!("image/linux_{platform}"));
    let version = output(Command::new(root.join("balancer-webhook")).arg("--version"))?;
    assert_eq!(version, format!("balancer-webhook {VERSION}\n"));

    let name = format!("spot-balancer-{VERSION}-linux-{platform}.cdx.json");
    ensure!(sums.contains(&name), "{sums}");
    let bom = std::fs::read_to_string(folder.join(&name))?;
    ensure!(
        !bom.contains(&*clone.to_string_lossy()) && !bom.contains("file:"),
        "the SBOM contains a path of this machine"
    );
    let bom: Value = serde_json::from_str(&bom)?;
    assert_eq!((&bom["bomFormat"], &bom["metadata"]["component"]["version"]), (&"CycloneDX".into(), &VERSION.into()));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let components = bom["components"].as_array().context("no components")?;
    let named: BTreeSet<_> = components.iter().map(|part| (text(&part["name"]), text(&part["version"]))).collect();
    let crates = linked()?;
    ensure!(crates.len() > 100, "{crates:?}");
    let missing: Vec<_> = crates.difference(&named).collect();
    ensure!(missing.is_empty(), "the SBOM lacks {missing:?}");
    let others: BTreeSet<_> = named.difference(&crates).map(|(name, _)| name.as_str()).collect();
    assert_eq!(others, ["ca-certificates", "libc6", "libgcc-s1", "rust-std"].into());

    // The package has what `helm package` puts into its own, and can be installed.
    let (plane, mut helm) = cluster(Options::default(), &[]).await?;
    let package = folder.join(format!("spot-balancer-{VERSION}.tgz"));
    helm.chart = clone.join("deploy/chart/spot-balancer");
    let by_helm = scratch_path("by-helm")?;
    std::fs::create_dir(&by_helm)?;
    helm.package(&by_helm).await?;
    let (mut ours, mut theirs) =
        (unpacked(&package)?, unpacked(&by_helm.join(package.file_name().context("no name")?))?);
    // Helm writes this file anew, in another order.
    let chart = "./spot-balancer/Chart.yaml";
    let metadata =
        |files: &mut BTreeMap<String, Vec<u8>>| objects(&String::from_utf8(files.remove(chart).context(chart)?)?);
    let described = metadata(&mut ours)?;
    assert_eq!(described, metadata(&mut theirs)?);
    assert_eq!((&described[0]["version"], &described[0]["appVersion"]), (&VERSION.into(), &VERSION.into()));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    ensure!(ours == theirs, "the files of the packages differ");
    helm.chart = package;
    helm.install(&json!({"certificates": {"source": "helm"}})).await?;
    let webhook = deployment(&plane.client()?, "spot-balancer-webhook").await?;
    let image = &webhook["spec"]["template"]["spec"]["containers"][0]["image"];
    assert_eq!(*image, format!("registry.example.com/spot-balancer:{VERSION}"));
    Ok(())
}

/// Stands in for docker, helm and cosign. It logs each call. `STUB_FAIL` is a part of the call that fails with the message
/// `STUB_ERROR`. The registry is empty, and an image that is pulled has the files that were built.
const STUB: &str = r#"#!/bin/sh
call="${0##*/} $*"
echo "$call" >>"$STUB_LOG"
case $call in *"${STUB_FAIL:-nothing fails}"*) echo "$STUB_ERROR" >&2; exit "${STUB_STATUS:-1}" ;; esac
case $call in
    "docker buildx imagetools inspect "*) echo "ERROR: $4: not found" >&2; exit 1 ;;
    "helm show chart "*) echo "Error: ${3#oci://}:$5: not found" >&2; exit 1 ;;
    "helm push "*) echo "Digest: sha256:$(printf %064d 2)" >&2; exit 0 ;;
    *" --metadata-file "*)
        while [ "$1" != --metadata-file ]; do shift; done
        printf '{"containerimage.digest": "sha256:%064d"}' 1 >"$2" ;;
    *type=local,dest=*)
        for word in "$@"; do
            case $word in type=local,dest=*) dest=${word#*dest=} ;; esac
        done
        for platform in amd64 arm64; do
            mkdir -p "$dest/linux_$platform"
            case $dest in *-pushed) echo "program${STUB_OTHER_BUILD:-}" ;; *) echo program ;; esac \
                >"$dest/linux_$platform/balancer-webhook"
        done ;;
    "cosign sign-blob "*)
        while [ "$1" != --bundle ]; do shift; done
        echo signature >"$2" ;;
esac
"#;

/// A release with the stand-ins, in `clone` with a key next to it: whether it succeeds, what it prints, and the calls.
fn with_stubs(clone: &Path, output: &Path, variables: &[(&str, &str)]) -> Result<(bool, String, Vec<String>)> {
    use std::os::unix::fs::PermissionsExt;
    let folder = scratch_path("stubs")?;
    std::fs::create_dir(&folder)?;
    for name in ["docker", "helm", "cosign"] {
        std::fs::write(folder.join(name), STUB)?;
        std::fs::set_permissions(folder.join(name), PermissionsExt::from_mode(0o755))?;
    }
    let (key, log) = (folder.join("release.key"), folder.join("log"));
    std::fs::write(key, "")?;
    let path = format!("{}:{}", folder.display(), std::env::var("PATH")?);
    let mut command = Command::new(clone.join("deploy/release"));
    command.args([&tag(), "--registry", "registry.example.com", "--key", "release.key", "--output"]).arg(output);
    command.current_dir(&folder).env("PATH", path).env("STUB_LOG", &log).envs(variables.iter().copied());
    let done = command.output()?;
    let calls = std::fs::read_to_string(log)?;
    let printed = String::from_utf8_lossy(&done.stderr).replace(&*folder.to_string_lossy(), "FOLDER");
    let calls = calls.lines().map(|call| call.replace(&*folder.to_string_lossy(), "FOLDER")).collect();
    Ok((done.status.success(), printed, calls))
}

/// A tagged repository whose SBOM takes no time.
fn tagged_without_sbom() -> Result<PathBuf> {
    let clone = tagged()?;
    std::fs::write(clone.join("deploy/sbom"), "#!/bin/sh\necho {}\n")?;
    git(&clone, &["commit", "--quiet", "--all", "--amend", "--no-edit"])?;
    git(&clone, &["tag", "--force", &tag()])?;
    Ok(clone)
}

/// The calls that push, sign or name something.
fn steps(calls: &[String]) -> Vec<&str> {
    let marks = [
        ("push-by-digest=true", "push the image"),
        ("image-pushed", "pull it"),
        ("SHA256SUMS.sigstore.json", "sign the files"),
        (
            "sign --yes --key FOLDER/release.key --recursive registry.example.com/spot-balancer@sha256:",
            "sign the image",
        ),
        ("helm push", "push the chart"),
        ("sign --yes --key FOLDER/release.key registry.example.com/charts/spot-balancer@sha256:", "sign the chart"),
        ("DIGESTS.sigstore.json", "sign the digests"),
        ("imagetools create", "tag the image"),
    ];
    let step = |call: &String| marks.iter().find(|(mark, _)| call.contains(mark)).map(|&(_, step)| step);
    calls.iter().filter_map(step).collect()
}

#[test]
fn a_release_signs_before_it_pushes_and_tags_the_image_last() -> Result<()> {
    let (clone, folder) = (tagged_without_sbom()?, scratch_path("released")?);
    let (done, printed, calls) = with_stubs(&clone, &folder, &[])?;
    ensure!(done, "{printed}");
    let order = [
        "sign the files",
        "push the image",
        "pull it",
        "sign the image",
        "push the chart",
        "sign the chart",
        "sign the digests",
        "tag the image",
    ];
    assert_eq!(steps(&calls), order, "{calls:?}");
    let digests = std::fs::read_to_string(folder.join("DIGESTS"))?;
    ensure!(digests.lines().count() == 2, "{digests}");
    ensure!(digests.contains(&format!("registry.example.com/spot-balancer:{VERSION}@sha256:{:064}", 1)), "{digests}");
    output(Command::new("sha256sum").args(["--check", "--strict", "SHA256SUMS"]).current_dir(&folder))?;
    let files = std::fs::read_dir(&folder)?.map(|file| Ok(file?.file_name().to_string_lossy().into_owned()));
    let files = files.collect::<Result<BTreeSet<_>>>()?;
    ensure!(files.len() == 7 && files.contains("SHA256SUMS.sigstore.json"), "{files:?}");
    Ok(())
}

#[test]
fn a_release_that_fails_stops_there_and_can_be_run_again() -> Result<()> {
    let clone = tagged_without_sbom()?;
    let image = format!("registry.example.com/spot-balancer:{VERSION}");
    let none: [&str; 0] = [];
    let image_signed = ["sign the files", "push the image", "pull it", "sign the image"];
    for (call, message, status, reason, done) in [
        ("imagetools inspect", "ERROR: 401 Unauthorized", "1", "cannot determine whether registry", &none[..]),
        ("imagetools inspect", "docker-credential-x: executable file not found", "1", "cannot determine", &none),
        ("imagetools inspect", "", "0", &format!("{image} exists; a release is never replaced"), &none),
        ("helm show chart", "Error: i/o timeout", "1", "charts/spot-balancer", &none),
        ("helm show chart", "", "0", "exists; a release is never replaced", &none),
        ("cosign sign-blob", "no identity", "1", "no identity", &["sign the files"]),
        ("push-by-digest", "denied", "1", "docs/releasing.md says how", &["sign the files", "push the image"]),
        ("--recursive", "denied", "1", "docs/releasing.md says how", &image_signed),
        ("helm push", "denied", "1", "docs/releasing.md says how", &[&image_signed[..], &["push the chart"]].concat()),
    ] {
        let variables = [("STUB_FAIL", call), ("STUB_ERROR", message), ("STUB_STATUS", status)];
        let (succeeded, printed, calls) = with_stubs(&clone, &scratch_path("released")?, &variables)?;
        ensure!(!succeeded && printed.contains(reason), "{call} {message}: {printed}");
        assert_eq!(steps(&calls), done, "{call} {message}");
    }
    // An image whose files are not those that the SBOM is for is not signed.
    let folder = scratch_path("released")?;
    let (succeeded, printed, calls) = with_stubs(&clone, &folder, &[("STUB_OTHER_BUILD", "2")])?;
    ensure!(!succeeded && printed.contains("other files than those that the SBOM is for"), "{printed}");
    assert_eq!(steps(&calls), &image_signed[..3]);

    let (succeeded, printed, _) = with_stubs(&clone, &folder, &[])?;
    ensure!(!succeeded && printed.contains("exists"), "{printed}");
    std::fs::remove_dir_all(&folder)?;
    let (succeeded, printed, _) = with_stubs(&clone, &folder, &[])?;
    ensure!(succeeded, "{printed}");
    Ok(())
}
