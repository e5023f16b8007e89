//! The state directory: `PIGEON_STATE`, by default /var/lib/pigeon. It has a directory for each container,
//! and one for root images, which containers share.

use std::{
    env, fs,
    fs::{DirBuilder, File},
    io::{ErrorKind, Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};

use crate::flags::Flags;

/// The default of `PIGEON_STATE`.
const STATE: &str = "/var/lib/pigeon";
/// Length of a directory's name: paths of Unix sockets are limited.
const NAME: usize = 16;
/// Maximum length of such a path (unix(7)), and the length of the longest socket name in the directory.
const MAX_SOCKET: usize = 107;
const SOCKET: usize = "vm.vsock_10001".len();

/// The directory of the containers' directories.
const CONTAINERS: &str = "containers";

/// The state directory.
pub fn root() -> PathBuf {
    let given = env::var_os("PIGEON_STATE").filter(|path| !path.is_empty());
    given.map_or(STATE.into(), PathBuf::from)
}

/// Creates a directory and its parents, accessible by root only. Returns false if it existed.
pub fn create(dir: &Path) -> Result<bool> {
    let make = |dir: &Path, recursive| {
        let mut builder = DirBuilder::new();
        builder.recursive(recursive).mode(0o700).create(dir)
    };
    let made_in = dir.parent().map_or(Ok(()), |parent| make(parent, true));
    match made_in.and_then(|()| make(dir, false)) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        made => made
            .map(|()| true)
            .with_context(|| format!("unable to create {}", dir.display())),
    }
}

/// The directory of a container, with the VM's sockets, disks and logs.
pub fn container_dir(flags: &Flags) -> PathBuf {
    let digest = digest(&[&flags.address, &flags.namespace, &flags.id]);
    root().join(CONTAINERS).join(&digest[..NAME])
}

/// Fails if socket paths in it would be too long.
pub fn check(dir: &Path) -> Result<()> {
    let length = dir.as_os_str().len() + 1 + SOCKET;
    ensure!(
        length <= MAX_SOCKET,
        "PIGEON_STATE: {} is too long by {} bytes for the paths of sockets in it",
        root().display(),
        length - MAX_SOCKET
    );
    Ok(())
}

/// The hexadecimal SHA-256 of strings, each with its length.
pub fn digest(texts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Locked while a container's shim is alive, to detect leftovers of dead ones.
const LOCK: &str = "lock";

/// The lock of a container's directory.
pub struct Lock(#[expect(dead_code, reason = "it is held")] File);

/// Locks a container's directory, and writes this process's pid to the lock file.
pub fn lock(dir: &Path) -> Result<Lock> {
    // Not truncated before it is locked, as it contains the holder's pid.
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.join(LOCK))?;
    file.try_lock().context("another shim has this container")?;
    file.set_len(0)?;
    write!(file, "{}", std::process::id())?;
    Ok(Lock(file))
}

/// Kills the shim of a container's directory, and with it its VM, if it is alive.
pub fn kill(dir: &Path) -> Result<()> {
    let Ok(mut lock) = File::open(dir.join(LOCK)) else {
        return Ok(());
    };
    if lock.try_lock().is_ok() {
        return Ok(());
    }
    // The pid can be reused only after its lock is released.
    let mut text = String::new();
    lock.read_to_string(&mut text)?;
    let pid = text.parse().ok().and_then(Pid::from_raw);
    let pid = pid.context("a shim lives whose number is not in its lock")?;
    kill_process(pid, Signal::KILL).context("unable to kill the shim")?;
    Ok(lock.lock()?)
}

/// Removes the directories of shims that were killed and never cleaned up, for instance by a power failure.
pub fn sweep() {
    sweep_in(&root().join(CONTAINERS));
}

fn sweep_in(containers: &Path) {
    let Ok(entries) = fs::read_dir(containers) else {
        return;
    };
    for entry in entries.flatten() {
        // The pid is written after locking, so a lock file without it belongs to a shim that is starting.
        let lock = entry.path().join(LOCK);
        if fs::metadata(&lock).is_ok_and(|found| found.len() > 0)
            && File::open(&lock).is_ok_and(|lock| lock.try_lock().is_ok())
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soon;

    #[test]
    fn only_the_remains_of_dead_shims_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let dir = root.path().join(name);
            fs::create_dir(&dir).unwrap();
            dir
        };
        let [lives, dead, made, new] = ["lives", "dead", "made", "new"].map(place);
        let _held = lock(&lives).unwrap();
        drop(lock(&dead).unwrap());
        // Its shim has created the lock file, but not locked it yet.
        let made_lock = File::create(made.join(LOCK)).unwrap();
        assert!(soon(|| {
            sweep_in(root.path());
            !dead.exists()
        }));
        let left = [&lives, &dead, &made, &new].map(|dir| dir.exists());
        assert_eq!(left, [true, false, true, true]);
        // A failed attempt to lock does not change the file.
        assert!(lock(&lives).is_err());
        let number = fs::read_to_string(lives.join(LOCK)).unwrap();
        assert_eq!(number, std::process::id().to_string());
        // A living shim that cannot be killed is not considered dead.
        made_lock.lock().unwrap();
        assert!(kill(&made).is_err());
        drop(made_lock);
        assert!(soon(|| kill(&made).is_ok() && lock(&made).is_ok()));
    }

    #[test]
    fn create_reports_whether_the_directory_is_new() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        assert!(create(&dir).unwrap() && !create(&dir).unwrap());
        assert!(create(&root.path().join("a/c")).unwrap());
    }
}
