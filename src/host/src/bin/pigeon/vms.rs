//! The VMs of `pigeon run`, by name: a socket and a lock each in the user's runtime directory.

use std::{
    env,
    fs::{self, File, Permissions},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::PathBuf,
};

use anyhow::{Context, Result, bail, ensure};

/// Most bytes of a VM's name: a Unix socket's path has 107.
const MAX_NAME: usize = 40;

/// A name that is this VM's until dropped, which the kernel sees to whatever happens.
pub struct Claim {
    pub name: String,
    pub uds: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Both may be gone already.
        let _ = fs::remove_file(&self.uds);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// The directory, which nobody else can write to.
fn directory() -> Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let dir = match runtime.filter(|dir| dir.is_dir()) {
        Some(dir) => dir.join("pigeon"),
        None => env::temp_dir().join(format!("pigeon-{user}")),
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("unable to create {}", dir.display()))?;
    let found = dir.symlink_metadata()?;
    ensure!(
        found.is_dir() && found.uid() == user,
        "{} is another user's",
        dir.display()
    );
    fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
    Ok(dir)
}

/// A name for a new VM: the wanted one, or one made of `stem`.
pub fn claim(wanted: Option<&str>, stem: &str) -> Result<Claim> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if let Some(name) = wanted {
        let good = name.len() <= MAX_NAME && name.chars().all(plain) && !name.starts_with('.');
        ensure!(
            good && !name.is_empty(),
            "a VM's name has letters, digits, '-', '_' and '.', {MAX_NAME} at most"
        );
        let claim = try_claim(name)?;
        return claim.with_context(|| format!("there is a VM called {name} already"));
    }
    let stem: String = stem
        .chars()
        .map(|c| if plain(c) { c } else { '-' })
        .take(MAX_NAME - 4)
        .collect();
    let stem = stem.trim_start_matches('.');
    let stem = if stem.is_empty() { "vm" } else { stem };
    for number in 1..1000 {
        let name = match number {
            1 => stem.to_string(),
            _ => format!("{stem}-{number}"),
        };
        if let Some(claim) = try_claim(&name)? {
            return Ok(claim);
        }
    }
    bail!("there are too many VMs called {stem}");
}

fn try_claim(name: &str) -> Result<Option<Claim>> {
    let dir = directory()?;
    let lock_path = dir.join(format!("{name}.lock"));
    let lock = File::create(&lock_path)?;
    if lock.try_lock().is_err() {
        return Ok(None);
    }
    // Its owner may have removed it between our opening and our locking it.
    if fs::metadata(&lock_path).ok().map(|found| found.ino()) != Some(lock.metadata()?.ino()) {
        return Ok(None);
    }
    Ok(Some(Claim {
        name: name.into(),
        uds: dir.join(format!("{name}.vsock")),
        lock_path,
        _lock: lock,
    }))
}

/// Names and sockets of all that run.
pub fn all() -> Result<Vec<(String, PathBuf)>> {
    let dir = directory()?;
    let mut vms = vec![];
    for entry in fs::read_dir(&dir)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        let Ok(lock) = File::open(&path) else {
            continue;
        };
        let uds = path.with_extension("vsock");
        if lock.try_lock_shared().is_ok() {
            // Of one that was killed.
            let _ = fs::remove_file(&uds);
            let _ = fs::remove_file(&path);
            continue;
        }
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        vms.push((name.into_owned(), uds));
    }
    vms.sort();
    Ok(vms)
}

/// The socket of the VM called `name`.
pub fn find(name: &str) -> Result<PathBuf> {
    let vms = all()?;
    let names: Vec<_> = vms.iter().map(|(name, _)| name.as_str()).collect();
    let found = vms.iter().find(|(known, _)| known == name);
    let (_, uds) = found.with_context(|| match names[..] {
        [] => format!("there is no VM called {name}, and no other; `pigeon run IMAGE` starts one"),
        _ => format!("there is no VM called {name}, but {}", names.join(", ")),
    })?;
    Ok(uds.clone())
}

/// The name of the only VM.
pub fn only() -> Result<String> {
    let vms = all()?;
    match &vms[..] {
        [(name, _)] => Ok(name.clone()),
        [] => bail!(
            "no VM of `pigeon run` is there: start one, or give the Unix socket of a VM's vsock \
             as --uds"
        ),
        _ => {
            let names: Vec<_> = vms.iter().map(|(name, _)| format!("--vm {name}")).collect();
            bail!("there are several VMs: choose by {}", names.join(" or "))
        }
    }
}
