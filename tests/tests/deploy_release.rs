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
const DOWNLOAD: &str = concat!("https://example.com/download/v", env!("CARGO_PKG_VERSION"));
const PLUGIN: &str = "kubectl-spot_balancer";
/// What completes its commands.
const COMPLETION: &str = "kubectl_complete-spot_balancer";

/// This machine's, as release files name it.
fn platform() -> &'static str {
    if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" }
}

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

/// What a dry run prints. Its files are in `folder`. Its programs are those of the tests, and two that only begin like
/// the plugin for macOS.
fn dry_run(clone: &Path, folder: &Path) -> Result<String> {
    let webhook = program("balancer-webhook")?;
    let binaries = webhook.parent().context("the webhook is in no folder")?;
    let plugins = scratch_path("plugins")?;
    for (platform, machine) in [("darwin-amd64", 7), ("darwin-arm64", 12)] {
        std::fs::create_dir_all(plugins.join(platform))?;
        let head = [0xcf, 0xfa, 0xed, 0xfe, machine, 0, 0, 1];
        std::fs::write(plugins.join(platform).join(PLUGIN), head)?;
    }
    // Whatever the umask is, the files are the same.
    let mut command = Command::new("sh");
    command.args(["-c", "umask 077; exec \"$0\" \"$@\""]).arg(clone.join("deploy/release"));
    command.args([&tag(), "--dry-run", "--registry", "registry.example.com/data", "--download", DOWNLOAD]);
    command.arg("--binaries").arg(binaries).arg("--plugins").arg(plugins).arg("--output").arg(folder);
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
    refused(&[&tag, "--registry", "x"], &["--download is missing; accepted: the https URL"])?;
    for download in [&format!("http://example.com/{tag}"), "example.com", "https://example.com/a b"] {
        refused(&[&tag, "--dry-run", "--download", download], &[&format!("--download is {download}; accepted")])?;
    }
    refused(&[&tag, "--dry-run", "--download", "https://example.com/latest"], &["does not name the version"])?;
    let plugins = ["plugins/darwin-amd64/kubectl-spot_balancer is missing", "plugins/darwin-arm64/kubectl-spot_bal"];
    refused(&[&tag, "--dry-run", "--plugins", "plugins"], &plugins)?;
    refused(&[&tag, "--push"], &["unknown option --push"])?;
    refused(
        &[&tag, "--registry", "x", "--download", DOWNLOAD, "--binaries", "y"],
        &["--binaries is for --dry-run only"],
    )?;
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
    need!(Webhook, Reconciler, Plugin, Helm, ControlPlane);
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

    let platform = platform();
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

/// What is not as krew, or its index, requires.
#[expect(clippy::indexing_slicing, reason = "what a manifest lacks is null")]
fn against_krew(name: &str, manifest: &Value, archives: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let mut rule = |holds: bool, rule: String| {
        if !holds {
            problems.push(rule);
        }
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let spec = &manifest["spec"];

    // krew: internal/index/validation/validate.go.
    rule(manifest["apiVersion"] == "krew.googlecontainertools.github.com/v1alpha2", "apiVersion".to_owned());
    rule(manifest["kind"] == "Plugin", "kind".to_owned());
    rule(manifest["metadata"]["name"] == name, "the file is named like the plugin".to_owned());
    let short = text(&spec["shortDescription"]);
    rule(!short.is_empty() && !short.contains(['\r', '\n']), "shortDescription is one line".to_owned());
    let version = text(&spec["version"]);
    let numbers = version.strip_prefix('v').map(|version| version.split('-').next().unwrap_or_default().to_owned());
    let numbers = numbers.unwrap_or_default();
    let is_number = |part: &str| part.parse::<u64>().is_ok();
    rule(numbers.split('.').count() == 3 && numbers.split('.').all(is_number), "version is v and SemVer".to_owned());

    // krew-index: the answer to each new plugin, such as that to pull request 3568.
    rule(short.len() <= 50, "shortDescription has at most 50 characters".to_owned());
    let description = text(&spec["description"]);
    rule(!description.is_empty(), "description is required".to_owned());
    rule(description.lines().all(|line| line.len() <= 80), "description has lines of at most 80".to_owned());
    // krew: "Writing Krew plugin manifests". Redundant words are to be avoided; it is listed among plugins of kubectl.
    let redundant = ["kubectl", "plugin"].iter().any(|word| short.to_lowercase().contains(word));
    rule(!redundant, "shortDescription has no redundant words".to_owned());
    rule(text(&spec["homepage"]).starts_with("https://"), "homepage".to_owned());

    // krew: "Plugin Naming Guide".
    let kebab = |character: char| character.is_ascii_lowercase() || character == '-';
    rule(name.chars().all(kebab) && !name.starts_with("kube"), "the name has lower-case words and hyphens".to_owned());

    let platforms = spec["platforms"].as_array().cloned().unwrap_or_default();
    rule(!platforms.is_empty(), "there is a platform".to_owned());
    let mut selected = BTreeSet::new();
    for entry in &platforms {
        // krew: cmd/validate-krew-manifest/main.go. Each selector matches a known platform, and no two the same.
        let labels = &entry["selector"]["matchLabels"];
        let platform = format!("{}-{}", text(&labels["os"]), text(&labels["arch"]));
        let known = ["linux-amd64", "linux-arm64", "darwin-amd64", "darwin-arm64"].contains(&platform.as_str());
        rule(known && labels.as_object().is_some_and(|labels| labels.len() == 2), format!("{platform} is known"));
        rule(selected.insert(platform.clone()), format!("{platform} is selected once"));

        // krew: internal/index/validation/validate.go, and "Writing Krew plugin manifests" on the kinds of archives.
        let uri = text(&entry["uri"]);
        let file = uri.strip_prefix(&format!("{DOWNLOAD}/")).unwrap_or_default().to_owned();
        rule(file.ends_with(".tar.gz") && !file.contains('/'), format!("{platform} has the uri of its archive"));
        let sum = output(Command::new("sha256sum").arg(archives.join(&file)))?;
        rule(sum.starts_with(&format!("{} ", text(&entry["sha256"]))), format!("{platform} has the archive's sha256"));
        rule(entry.get("files").is_none(), format!("{platform} installs all files of the archive"));

        // krew: extractTARGZ in internal/download/downloader.go.
        let entries = listed(&archives.join(&file))?;
        rule(entries.iter().all(|entry| entry.mode.starts_with('-')), format!("{platform} has only files"));
        let relative = |path: &str| !path.starts_with('/') && !path.contains("..");
        rule(entries.iter().all(|entry| relative(&entry.path)), format!("{platform} has only paths below it"));
        let bin = entries.iter().find(|found| entry["bin"] == found.path.as_str());
        rule(bin.is_some_and(|bin| bin.mode == "-rwxr-xr-x"), format!("{platform} has the program bin"));
        // krew: validateLicenseFileExists in cmd/validate-krew-manifest/main.go.
        let licences = ["license", "license.txt", "license.md", "licenses", "licenses.txt", "licenses.md", "copying"];
        let licence = entries.iter().any(|entry| licences.contains(&entry.path.to_lowercase().as_str()));
        rule(licence, format!("{platform} has a file LICENSE"));
    }
    Ok(problems)
}

/// A file in an archive, as tar lists it.
struct Entry {
    mode: String,
    owner: String,
    path: String,
}

fn listed(archive: &Path) -> Result<Vec<Entry>> {
    let list = output(Command::new("tar").args(["--list", "--verbose", "--numeric-owner", "--file"]).arg(archive))?;
    let entry = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        Some(Entry { mode: words.next()?, owner: words.next()?, path: words.nth(3)? })
    };
    list.lines().map(|line| entry(line).with_context(|| line.to_owned())).collect()
}

#[test]
fn the_archives_of_the_plugin_are_what_krew_accepts_and_run_as_a_plugin() -> Result<()> {
    need!(Webhook, Reconciler, Plugin, Kubectl);
    let (clone, folder) = (tagged_without(&["deploy/sbom"])?, scratch_path("released")?);
    dry_run(&clone, &folder)?;
    let manifest = objects(&std::fs::read_to_string(folder.join("spot-balancer.yaml"))?)?;
    let [manifest] = &manifest[..] else { anyhow::bail!("{manifest:?}") };
    let none: [&str; 0] = [];
    assert_eq!(against_krew("spot-balancer", manifest, &folder)?, none);
    assert_eq!(manifest["spec"]["version"], tag());
    let platforms = manifest["spec"]["platforms"].as_array().context("no platforms")?;
    let files = platforms.iter().map(|entry| entry["uri"].as_str().unwrap_or_default());
    let linux = format!("linux-{}", platform());
    let archive = |platform: &str| format!("{PLUGIN}-{VERSION}-{platform}.tar.gz");
    let wanted = [&*linux, "darwin-amd64", "darwin-arm64"].map(|platform| format!("{DOWNLOAD}/{}", archive(platform)));
    assert_eq!(files.collect::<Vec<_>>(), wanted);

    for (platform, libc) in [(&*linux, &["MUSL"][..]), ("darwin-amd64", &[]), ("darwin-arm64", &[])] {
        let entries = listed(&folder.join(archive(platform)))?;
        let mut names = vec!["LICENSE", "LICENSE-APACHE", "LICENSE-MIT"];
        names.extend(libc);
        names.extend(["RUST.html", "THIRD-PARTY", PLUGIN, COMPLETION]);
        assert_eq!(entries.iter().map(|entry| &*entry.path).collect::<Vec<_>>(), names, "{platform}");
        for entry in &entries {
            let mode = if [PLUGIN, COMPLETION].contains(&&*entry.path) { "-rwxr-xr-x" } else { "-rw-r--r--" };
            assert_eq!((&*entry.mode, &*entry.owner), (mode, "0/0"), "{platform}: {}", entry.path);
        }
    }
    // Each has the licences of the crates that its own platform links.
    let mac = unpacked(&folder.join(archive("darwin-arm64")))?;
    let third_party = |files: &BTreeMap<String, Vec<u8>>| {
        Ok::<_, anyhow::Error>(String::from_utf8(files.get("./THIRD-PARTY").context("no THIRD-PARTY")?.clone())?)
    };
    ensure!(third_party(&mac)?.contains("\nsecurity-framework "), "the archive for macOS lacks its own crates");
    let here = scratch_path("plugin")?;
    std::fs::create_dir(&here)?;
    output(Command::new("tar").arg("--extract").arg("--file").arg(folder.join(archive(&linux))).arg("-C").arg(&here))?;
    let ours = std::fs::read_to_string(here.join("THIRD-PARTY"))?;
    for name in ["kube ", "ring ", "ruzstd "] {
        ensure!(ours.contains(&format!("\n{name}")), "{name}is not in THIRD-PARTY");
    }
    ensure!(!ours.contains("\nsecurity-framework "), "the archive for Linux has crates of macOS");

    let version = output(Command::new(here.join(PLUGIN)).arg("--version"))?;
    assert_eq!(version, format!("kubectl spot-balancer {VERSION}\n"));
    let completions = output(Command::new(here.join(PLUGIN)).args(["completions", "bash"]))?;
    ensure!(completions.contains("complete -F"), "{completions}");
    let path = format!("{}:{}", here.display(), std::env::var("PATH")?);
    let by_kubectl = output(Command::new(program("kubectl")?).args(["spot-balancer", "--version"]).env("PATH", &path))?;
    assert_eq!(by_kubectl, version);
    // As kubectl 1.26 and later runs it.
    let completed = output(Command::new(here.join(COMPLETION)).arg("ex").env("PATH", &path))?;
    ensure!(completed.starts_with("explain\t") && completed.contains("\n:4"), "{completed}");

    // A program of another platform is not packed.
    let wrong = scratch_path("wrong")?;
    for platform in ["darwin-amd64", "darwin-arm64"] {
        std::fs::create_dir_all(wrong.join(platform))?;
        std::fs::copy(here.join(PLUGIN), wrong.join(platform).join(PLUGIN))?;
        let mut command = Command::new(clone.join("deploy/plugin"));
        let done = command.args(["root", platform]).arg(scratch_path("root")?).arg(&wrong).output()?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(!done.status.success() && said.contains(&format!("is not a program for {platform}")), "{said}");
    }
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
        done
        case $call in *" --target plugin "*)
            mkdir "$dest/linux_amd64/linux-amd64" "$dest/linux_arm64/linux-arm64"
            printf '\177ELF%014d\076\000' 0 >"$dest/linux_amd64/linux-amd64/kubectl-spot_balancer"
            printf '\177ELF%014d\267\000' 0 >"$dest/linux_arm64/linux-arm64/kubectl-spot_balancer" ;;
        esac ;;
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
    command
        .args([
            &tag(),
            "--registry",
            "registry.example.com",
            "--download",
            DOWNLOAD,
            "--key",
            "release.key",
            "--output",
        ])
        .arg(output);
    command.current_dir(&folder).env("PATH", path).env("STUB_LOG", &log).envs(variables.iter().copied());
    let done = command.output()?;
    let calls = std::fs::read_to_string(log)?;
    let printed = String::from_utf8_lossy(&done.stderr).replace(&*folder.to_string_lossy(), "FOLDER");
    let calls = calls.lines().map(|call| call.replace(&*folder.to_string_lossy(), "FOLDER")).collect();
    Ok((done.status.success(), printed, calls))
}

/// A tagged repository in which these scripts do nothing and take no time.
fn tagged_without(scripts: &[&str]) -> Result<PathBuf> {
    let clone = tagged()?;
    for script in scripts {
        std::fs::write(clone.join(script), "#!/bin/sh\nmkdir -p \"$2\"\n")?;
    }
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
    let (clone, folder) = (tagged_without(&["deploy/sbom", "deploy/licenses"])?, scratch_path("released")?);
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
    ensure!(files.len() == 10 && files.contains("SHA256SUMS.sigstore.json"), "{files:?}");
    Ok(())
}

#[test]
fn a_release_that_fails_stops_there_and_can_be_run_again() -> Result<()> {
    let clone = tagged_without(&["deploy/sbom", "deploy/licenses"])?;
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
