//! `pigeon snapshot`: writes a snapshot of a VM to a directory.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use pigeon::{
    Client, Error,
    image::disk,
    lock::LockFile,
    machine::{self, Nic, Spec},
    signal,
    snapshot::Prepare,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM},
    iterator::Signals,
};

use crate::{
    output::{note, say},
    vms,
};

/// Length of the longest configuration that can be restored, in bytes: the init accepts a request of 128 KiB,
/// which also has the clone's name, token and entropy.
const MAX_CONFIG: usize = 127 << 10;
/// Time after which a guest thaws itself if the snapshot was not completed.
const HOLD: Duration = Duration::from_secs(120);
/// How long a VM may take to respond after the snapshot.
const UP: Duration = Duration::from_secs(30);

/// The record of a VM of `pigeon run --restorable` that its snapshots need.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Restorable {
    /// The directory of its hypervisor's sockets.
    pub dir: PathBuf,
    pub kernel: PathBuf,
    pub disks: Vec<RecordedDisk>,
    pub nic: RecordedNic,
}

impl Restorable {
    /// The record for a VM with this specification.
    pub fn of(spec: &Spec) -> Result<Restorable> {
        let disks = spec.disks.iter().map(|disk| RecordedDisk {
            path: disk.path().into(),
            read_only: !disk.is_writable(),
        });
        Ok(Restorable {
            dir: spec.dir.clone(),
            kernel: fs::canonicalize(&spec.kernel)?,
            disks: disks.collect(),
            nic: match &spec.nic {
                Nic::None => RecordedNic::None,
                Nic::User(_) => RecordedNic::User,
                Nic::Tap(name) => RecordedNic::Tap(name.clone()),
                Nic::Stream(_) | Nic::LoneTap => bail!("no such network card is given by options"),
            },
        })
    }
}

/// A disk of such a VM.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct RecordedDisk {
    pub path: PathBuf,
    pub read_only: bool,
}

/// The network card of such a VM.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RecordedNic {
    None,
    User,
    Tap(String),
}

/// A file in the VM's directory that is locked while a snapshot is taken; it holds the token of the
/// preparation.
const SNAPSHOT_LOCK: &str = "snapshot";

/// Resumes a VM of this process after its `pigeon snapshot` was killed. Returns whether that was the case.
pub fn resume_orphaned(dir: &Path, uds: &Path) -> Result<bool> {
    let path = dir.join(SNAPSHOT_LOCK);
    if !path.exists() {
        return Ok(false);
    }
    // The snapshot is still being taken.
    let Some(lock) = LockFile::try_new(&path)? else {
        return Ok(false);
    };
    let mut token = String::new();
    lock.file().read_to_string(&mut token)?;
    if token.is_empty() {
        return Ok(false); // it has just completed
    }
    let resumed = machine::resume_orphaned(dir).and_then(|()| {
        match Client::connect_within(uds, UP).and_then(|client| client.cancel_snapshot(&token)) {
            // The guest is not or no longer frozen.
            Err(Error::Refused { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    });
    if resumed.is_err() {
        // The next attempt needs the token.
        lock.keep();
    }
    resumed.map(|()| true)
}

/// The description of a snapshot, next to its files.
#[derive(Debug, Deserialize, Serialize)]
pub struct Manifest {
    /// The VM's name.
    pub name: String,
    pub image: PathBuf,
    /// The token of the preparation.
    pub token: String,
    pub arch: String,
    pub hypervisor: String,
    pub memory_mib: u32,
    pub cpus: u32,
    pub kernel: PathBuf,
    /// Writable disks are copies in the snapshot's directory.
    pub disks: Vec<RecordedDisk>,
    pub nic: RecordedNic,
    pub config: Value,
}

const MANIFEST: &str = "snapshot.json";

impl Manifest {
    /// Reads the manifest in `dir`.
    pub fn read(dir: &Path) -> Result<Manifest> {
        let path = dir.join(MANIFEST);
        let text = fs::read(&path)
            .with_context(|| format!("{} holds no snapshot of `pigeon snapshot`", dir.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
    }
}

/// The hypervisor's files of the snapshot in `dir`.
pub fn files(dir: &Path) -> machine::Snapshot {
    machine::Snapshot {
        state: dir.join("state"),
        memory: dir.join("memory"),
    }
}

/// Limitations, which are part of the help.
const LIMITS: &str = "\
The workload is frozen for the snapshot, and thawed afterwards. Open connections over vsock end.
The snapshot is the machine's memory, state, and copies of the disks that it can write.

On QEMU: x86_64 guests with Debian's kernel 6.12 only, restored by the same version of QEMU; vsock is
unplugged for the snapshot and plugged again. Snapshots of Firecracker: as it documents them.";

#[derive(Args)]
#[command(after_help = LIMITS)]
pub struct TakeSnapshot {
    /// A VM of `pigeon run --restorable`
    vm: String,
    /// The directory to be made
    dir: PathBuf,
    /// How long the workload may take to be frozen
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10.0,
        value_parser = crate::parse_timeout
    )]
    freeze_timeout: f64,
}

impl TakeSnapshot {
    pub fn run(&self) -> Result<u8> {
        let vm = vms::find_running(&self.vm)?;
        let restorable = vm.record.restorable.as_ref().with_context(|| {
            format!(
                "snapshots of {} cannot be restored: start it with `pigeon run --restorable`",
                self.vm
            )
        })?;
        ensure!(
            vm.record.config.to_string().len() <= MAX_CONFIG,
            "snapshots of {} cannot be restored: its configuration is over {} KiB",
            self.vm,
            MAX_CONFIG >> 10
        );
        let timeout =
            Duration::try_from_secs_f64(self.freeze_timeout).context("bad --freeze-timeout")?;
        let mut signals = DeferredSignals::new()?;
        // It contains all of the guest's memory.
        let made = fs::DirBuilder::new().mode(0o700).create(&self.dir);
        made.with_context(|| format!("unable to create {}", self.dir.display()))?;
        // The hypervisor's working directory may be another one.
        let dir = fs::canonicalize(&self.dir)?;
        let taken = take(&vm.record, restorable, &dir, timeout, &mut signals);
        let received = signals.received();
        let error = match (taken, received) {
            (Ok(result), None) => {
                say!("{result}")?;
                return Ok(0);
            }
            (Ok(_), Some(signal)) => ended_by(signal),
            (Err(error), _) => error,
        };
        let _ = fs::remove_dir_all(&dir);
        match received {
            Some(signal) => {
                note!("{error:#}");
                Ok(128 + signal)
            }
            None => Err(error),
        }
    }
}

/// Signals that are deferred until the VM is resumed.
struct DeferredSignals {
    signals: Signals,
    received: Option<u8>,
}

impl DeferredSignals {
    fn new() -> Result<DeferredSignals> {
        Ok(DeferredSignals {
            signals: crate::catch(&[SIGHUP, SIGINT, SIGQUIT, SIGTERM])?,
            received: None,
        })
    }

    /// The first signal received.
    fn received(&mut self) -> Option<u8> {
        let signal = self.received.or_else(|| {
            let signal = self.signals.pending().next()?;
            signal.try_into().ok()
        });
        self.received = signal;
        signal
    }

    /// An error if a signal was received.
    fn check(&mut self) -> Result<()> {
        self.received()
            .map_or(Ok(()), |signal| Err(ended_by(signal)))
    }
}

fn ended_by(signal: u8) -> anyhow::Error {
    anyhow!("no snapshot: ended by {}", signal::name(signal.into()))
}

/// Writes the snapshot to the directory, and resumes the VM. Returns the result to print.
fn take(
    record: &vms::Record,
    restorable: &Restorable,
    dir: &Path,
    timeout: Duration,
    signals: &mut DeferredSignals,
) -> Result<Value> {
    let client = Client::connect(&record.uds)?;
    let token = format!("pigeon-{}-{}", process::id(), vms::now());
    // From here on, the VM's owner resumes the VM if this process is killed.
    let lock = LockFile::try_new(&restorable.dir.join(SNAPSHOT_LOCK))?;
    let lock = lock.context("another snapshot of it is being taken")?;
    lock.file().set_len(0)?;
    lock.file().write_all(token.as_bytes())?;
    let prepared = client.prepare_snapshot(&Prepare {
        token: token.clone(),
        timeout_ms: Some(timeout.as_millis().try_into().unwrap_or(u64::MAX)),
        sync: Some(true),
        hold_ms: Some(HOLD.as_millis() as u64),
    });
    if let Err(error @ Error::Refused { .. }) = prepared {
        return Err(error.into()); // nothing is frozen
    }
    let mut disks = restorable.disks.clone();
    let begin = Instant::now();
    let taken = prepared.map_err(anyhow::Error::from).and_then(|prepared| {
        signals.check()?;
        machine::snapshot(&restorable.dir, &files(dir), || {
            for (number, disk) in disks.iter_mut().enumerate() {
                signals.check()?;
                if !disk.read_only {
                    let copy = dir.join(format!("disk{number}"));
                    disk::copy(&disk.path, &copy)
                        .with_context(|| format!("unable to copy {}", disk.path.display()))?;
                    disk.path = copy;
                }
            }
            Ok(())
        })?;
        Ok(prepared)
    });
    let paused = begin.elapsed();
    // The VM is resumed even if the snapshot has failed.
    let thawed =
        Client::connect_within(&record.uds, UP).and_then(|client| client.cancel_snapshot(&token));
    if matches!(&thawed, Err(error) if !matches!(error, Error::Refused { .. })) {
        // The VM's owner continues: a guest may release its vsock only now.
        lock.keep();
    }
    let prepared = taken?;
    let manifest = Manifest {
        name: record.name.clone(),
        image: record.image.clone(),
        token,
        arch: record.arch.clone(),
        hypervisor: record.hypervisor.clone(),
        memory_mib: record.memory_mib,
        cpus: record.cpus,
        kernel: restorable.kernel.clone(),
        disks,
        nic: restorable.nic.clone(),
        config: record.config.clone(),
    };
    fs::write(dir.join(MANIFEST), serde_json::to_vec_pretty(&manifest)?)?;
    thawed?;
    Ok(json!({
        "snapshot": dir,
        "frozen": prepared.frozen,
        "freeze_ms": prepared.freeze_ms,
        "sync_ms": prepared.sync_ms,
        "paused_ms": paused.as_millis() as u64,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_snapshot_is_distinguished_from_a_missing_one() {
        let dir = tempfile::tempdir().unwrap();
        let error = Manifest::read(dir.path()).unwrap_err().to_string();
        assert!(
            error.ends_with("holds no snapshot of `pigeon snapshot`"),
            "{error}"
        );
        fs::write(dir.path().join(MANIFEST), "{}").unwrap();
        let error = Manifest::read(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with("snapshot.json is damaged"), "{error}");
        ensure_readable(dir.path());
    }

    /// Checks that a written manifest can be read.
    fn ensure_readable(dir: &Path) {
        let manifest = Manifest {
            name: "app".into(),
            image: "/app.ext4".into(),
            token: "a1".into(),
            arch: "x86_64".into(),
            hypervisor: "QEMU".into(),
            memory_mib: 256,
            cpus: 1,
            kernel: "/vmlinux".into(),
            disks: vec![],
            nic: RecordedNic::Tap("tap0".into()),
            config: json!({"Hostname": "app"}),
        };
        fs::write(dir.join(MANIFEST), json!(manifest).to_string()).unwrap();
        let read = Manifest::read(dir).unwrap();
        assert_eq!((read.nic, read.config), (manifest.nic, manifest.config));
    }
}
