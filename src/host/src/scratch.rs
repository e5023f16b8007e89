//! Directories for what is being made, which are removed at the end, also when that is a signal's.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use tempfile::TempDir;

/// Those that there are.
static ALL: Mutex<Vec<PathBuf>> = Mutex::new(vec![]);

fn all() -> MutexGuard<'static, Vec<PathBuf>> {
    ALL.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A directory beside what is made in it, so that that can be renamed. It is removed when dropped.
pub struct Scratch {
    dir: Option<TempDir>,
    path: PathBuf,
}

impl Scratch {
    /// In this directory.
    pub fn new_in(directory: &Path) -> io::Result<Scratch> {
        // A signal does not come between the making of one and its being known.
        let mut all = all();
        let dir = tempfile::Builder::new()
            .prefix(".pigeon-")
            .tempdir_in(std::path::absolute(directory)?)?;
        let path = dir.path().to_path_buf();
        all.push(path.clone());
        Ok(Scratch {
            dir: Some(dir),
            path,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut all = all();
        self.dir = None;
        all.retain(|path| *path != self.path);
    }
}

/// Removes all of them. No other is made until the end, which is to be the process's: until then it keeps
/// what is returned.
pub fn remove_all() -> impl Drop {
    let all = all();
    for path in all.iter() {
        let _ = std::fs::remove_dir_all(path);
    }
    all
}
