//! Temporary directories for files under construction, removed on drop and by [`remove_all`] on a signal.

use std::{
    fs::Permissions,
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use tempfile::TempDir;

/// The existing ones.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(vec![]);

fn live() -> MutexGuard<'static, Vec<PathBuf>> {
    LIVE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A temporary directory on the file system of the target, so that a file in it can be renamed to the target.
/// No other user can access it. It is removed when dropped.
pub struct Scratch {
    dir: Option<TempDir>,
    path: PathBuf,
}

impl Scratch {
    /// Creates one in this directory.
    pub fn new_in(directory: &Path) -> io::Result<Scratch> {
        // Locked while one is created, so that `remove_all` cannot miss it.
        let mut live = live();
        let dir = tempfile::Builder::new()
            .prefix(".pigeon-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(std::path::absolute(directory)?)?;
        let path = dir.path().to_path_buf();
        live.push(path.clone());
        Ok(Scratch {
            dir: Some(dir),
            path,
        })
    }

    /// The directory's absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut live = live();
        self.dir = None;
        live.retain(|path| *path != self.path);
    }
}

/// Removes all scratch directories. None can be created while the returned guard lives; the caller keeps it
/// until the process ends.
pub fn remove_all() -> impl Drop {
    let live = live();
    for path in live.iter() {
        let _ = std::fs::remove_dir_all(path);
    }
    live
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_scratch_directory_is_this_users_only() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new_in(dir.path()).unwrap();
        let mode = fs::metadata(scratch.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
