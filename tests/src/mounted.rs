//! Files as the kubelet mounts a Secret: `name` → `..data/name`, and `..data` → a folder of its own for each version.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use crate::process::scratch_path;

/// A mounted Secret.
#[derive(Debug)]
pub struct Mounted {
    folder: PathBuf,
    versions: AtomicU32,
}

impl Mounted {
    /// With these files.
    pub fn new(files: &[(&str, &[u8])]) -> Result<Self> {
        let folder = scratch_path("secret")?;
        std::fs::create_dir(&folder)?;
        for (name, _) in files {
            std::os::unix::fs::symlink(Path::new("..data").join(name), folder.join(name))?;
        }
        let mounted = Self { folder, versions: AtomicU32::new(0) };
        mounted.swap(files)?;
        Ok(mounted)
    }

    /// The path of one of the files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Swaps the one link that all files go through, and removes what was there.
    pub fn swap(&self, files: &[(&str, &[u8])]) -> Result<()> {
        let data = self.folder.join("..data");
        let old = std::fs::read_link(&data).ok();
        let version = format!("..version-{}", self.versions.fetch_add(1, Ordering::Relaxed));
        let folder = self.folder.join(&version);
        std::fs::create_dir(&folder)?;
        for (name, bytes) in files {
            std::fs::write(folder.join(name), bytes)?;
        }
        let next = self.folder.join("..data_tmp");
        std::os::unix::fs::symlink(version, &next)?;
        std::fs::rename(next, &data)?;
        if let Some(old) = old {
            std::fs::remove_dir_all(self.folder.join(old))?;
        }
        Ok(())
    }
}
