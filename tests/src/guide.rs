//! The commands that the guides tell people to type, run as they are written.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::control_plane::ControlPlane;
use crate::helm::repository;
use crate::parts::program;
use crate::process::scratch_path;

/// The blocks of a language in a guide, without the indentation that a block in a list has.
pub fn blocks(guide: &str, language: &str) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(repository(guide))?;
    let opening = format!("```{language}\n");
    let mut blocks = Vec::new();
    for (start, _) in text.match_indices(&opening) {
        let (before, block) = text.split_at(start);
        let indentation = before.rsplit('\n').next().unwrap_or_default();
        let block = block.strip_prefix(&opening).and_then(|rest| rest.split("```").next()).unwrap_or_default();
        let lines = block.lines().map(|line| line.strip_prefix(indentation).unwrap_or(line));
        blocks.push(lines.fold(String::new(), |text, line| text + line + "\n"));
    }
    Ok(blocks)
}

/// The one block of commands in a guide that has `part` in it.
pub fn block(guide: &str, part: &str) -> Result<String> {
    let mut found = blocks(guide, "sh")?.into_iter().filter(|block| block.contains(part));
    let block = found.next().with_context(|| format!("{guide} has no command with {part:?}"))?;
    ensure!(found.next().is_none(), "{guide} has more than one block with {part:?}");
    Ok(block)
}

/// A command that has kubectl and is the administrator of a cluster; its arguments are yet to come. After so
/// many seconds it ends, whatever hangs.
pub(crate) fn administrator(plane: &ControlPlane, seconds: u32) -> Result<Command> {
    let kubectl = program("kubectl")?;
    let folder = kubectl.parent().context("kubectl is in no folder")?;
    let path = std::env::join_paths([folder, "/usr/bin".as_ref(), "/bin".as_ref()])?;
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", &seconds.to_string()]);
    command.env_clear().env("PATH", path).env("HOME", scratch_path("guide")?).env("KUBECONFIG", plane.kubeconfig());
    Ok(command)
}

/// Runs commands as the administrator of a cluster, and answers what they print.
pub fn run(plane: &ControlPlane, commands: &str) -> Result<String> {
    let output = administrator(plane, 60)?.args(["bash", "-euo", "pipefail", "-c", commands]).output()?;
    ensure!(output.status.success(), "{commands}{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
