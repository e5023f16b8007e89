//! Lock files (flock(2)): the kernel releases them when their holder terminates for any reason.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

/// Attempts to take a lock: another process may hold it briefly to clean up.
const ATTEMPTS: u32 = 5;
const RETRY: Duration = Duration::from_millis(5);

/// A lock file, removed when it is unlocked; a killed holder leaves it behind.
pub struct LockFile {
    file: File,
    path: PathBuf,
    is_kept: bool,
}

impl LockFile {
    /// Creates and locks it; None if another process holds it.
    pub fn try_new(path: &Path) -> Result<Option<LockFile>> {
        let cannot = || format!("unable to lock {}", path.display());
        for _ in 0..ATTEMPTS {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600);
            let file = options.open(path).with_context(cannot)?;
            match file.try_lock() {
                // Its holder may have removed it between open and lock.
                Ok(()) if !is_at(&file, path) => continue,
                Err(TryLockError::WouldBlock) => thread::sleep(RETRY),
                // A file system that does not support locks.
                Ok(()) | Err(TryLockError::Error(_)) => {
                    return Ok(Some(LockFile {
                        file,
                        path: path.into(),
                        is_kept: false,
                    }));
                }
            }
        }
        Ok(None)
    }
}

impl LockFile {
    /// Unlocks it without removing it.
    pub fn keep(mut self) {
        self.is_kept = true;
    }

    /// The locked file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // While it is locked: another process that opens it from now on creates a new one.
        if !self.is_kept && is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether an open file is still the one at this path.
pub fn is_at(file: &File, path: &Path) -> bool {
    let identity = |found: io::Result<fs::Metadata>| found.map(|found| (found.dev(), found.ino()));
    let own = identity(file.metadata()).ok();
    own.is_some() && own == identity(fs::metadata(path)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_file_has_one_holder_and_exists_while_it_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let held = LockFile::try_new(&path).unwrap().unwrap();
        assert!(LockFile::try_new(&path).unwrap().is_none());
        drop(held);
        assert!(!path.exists());
        // A killed holder leaves this behind.
        fs::write(&path, "").unwrap();
        let held = LockFile::try_new(&path).unwrap().unwrap();
        held.keep();
        assert!(path.exists());
        // A process that another test starts may have it open until execve.
        let mut attempts = (0..400).map(|_| LockFile::try_new(&path).unwrap());
        let held = attempts.find_map(|held| held).unwrap();
        // A file of another holder is not removed.
        fs::remove_file(&path).unwrap();
        let other = LockFile::try_new(&path).unwrap().unwrap();
        drop(held);
        assert!(path.exists());
        drop(other);
        assert!(LockFile::try_new(&dir.path().join("none/x.lock")).is_err());
    }
}
