//! Files that are locked by whoever has a thing (flock(2)): the kernel unlocks them whatever becomes of
//! him.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

/// How often a lock is tried that somebody else may hold only to look after what was left.
const TRIES: u32 = 5;
const RETRY: Duration = Duration::from_millis(5);

/// A lock file that is there as long as it is locked, and for a while after a holder that was killed.
pub struct LockFile {
    file: File,
    path: PathBuf,
    is_kept: bool,
}

impl LockFile {
    /// Makes and locks it; None if another has it.
    pub fn try_new(path: &Path) -> Result<Option<LockFile>> {
        let cannot = || format!("unable to lock {}", path.display());
        for _ in 0..TRIES {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600);
            let file = options.open(path).with_context(cannot)?;
            match file.try_lock() {
                // Its holder may have removed it between our opening and our locking it.
                Ok(()) if !is_at(&file, path) => continue,
                Err(TryLockError::WouldBlock) => thread::sleep(RETRY),
                // A file system that knows no locks.
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
    /// Unlocks it and leaves it there.
    pub fn keep(mut self) {
        self.is_kept = true;
    }

    /// The file, which its holder may write to.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // While it is locked: who opens it from now on makes another.
        if !self.is_kept && is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether a file, such as one that was locked since it was opened, is the one at this path.
pub fn is_at(file: &File, path: &Path) -> bool {
    let identity = |found: io::Result<fs::Metadata>| found.map(|found| (found.dev(), found.ino()));
    let own = identity(file.metadata()).ok();
    own.is_some() && own == identity(fs::metadata(path)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_file_is_one_holders_and_is_there_as_long_as_he_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let held = LockFile::try_new(&path).unwrap().unwrap();
        assert!(LockFile::try_new(&path).unwrap().is_none());
        drop(held);
        assert!(!path.exists());
        // As a holder that was killed leaves it.
        fs::write(&path, "").unwrap();
        let held = LockFile::try_new(&path).unwrap().unwrap();
        held.keep();
        assert!(path.exists());
        let held = LockFile::try_new(&path).unwrap().unwrap();
        // Another's is not removed.
        fs::remove_file(&path).unwrap();
        let other = LockFile::try_new(&path).unwrap().unwrap();
        drop(held);
        assert!(path.exists());
        drop(other);
        assert!(LockFile::try_new(&dir.path().join("none/x.lock")).is_err());
    }
}
