//! One snapshot of a VM, and the clones that are restored from it.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use pigeon::machine::{self, Spec, Start};
use tempfile::TempDir;

use super::{Nic, Vm, on_qemu};
use crate::{disk::Image, mmds::Mmds, process::Slot};

/// A VM as it was: memory, processors, devices, and copies of the disks that it can write.
pub struct Snapshot {
    /// The VM's, with those copies for disks.
    spec: Spec,
    files: machine::Snapshot,
    name: String,
    clones: Arc<AtomicU32>,
    timeout: Duration,
    quiet: bool,
    /// Clones share it: a test that has several at once would wait for ever for a slot that another
    /// such test has, which waits for the same. Most of the time, each of them is idle.
    slot: Arc<Slot>,
    _dir: TempDir,
}

impl Vm {
    /// Stops it and takes a snapshot. It can go on by [`resume`](Vm::resume).
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        let dir = TempDir::with_prefix("pigeon-snapshot-")?;
        let [state, memory] = ["state", "memory"].map(|name| dir.path().join(name));
        let files = machine::Snapshot { state, memory };
        self.machine.snapshot(&files)?;
        let mut spec = self.spec.clone();
        for (number, disk) in spec.disks.iter_mut().enumerate() {
            if disk.is_writable() {
                let copy = dir.path().join(format!("disk{number}"));
                fs::copy(disk.path(), &copy).context("unable to copy a disk")?;
                *disk = disk.clone().at(&copy);
            }
        }
        Ok(Snapshot {
            spec,
            files,
            name: self.name.clone(),
            clones: self.clones.clone(),
            timeout: self.timeout,
            quiet: self.quiet,
            slot: self.slot.clone().context("the VM has ended")?,
            _dir: dir,
        })
    }

    /// A disk of a clone.
    pub fn image(&self, number: usize) -> Result<&Image> {
        self.images.get(number).context("no such disk")
    }
}

impl Snapshot {
    /// A clone, to be started. It has copies of the disks that can be written.
    pub fn restore(&self) -> Restore<'_> {
        Restore {
            snapshot: self,
            mmds: None,
            vsock: true,
        }
    }
}

/// A clone to be started.
pub struct Restore<'a> {
    snapshot: &'a Snapshot,
    mmds: Option<Mmds>,
    vsock: bool,
}

impl Restore<'_> {
    /// Serves this to it, in place of nothing.
    pub fn mmds(self, mmds: Mmds) -> Self {
        Restore {
            mmds: Some(mmds),
            ..self
        }
    }

    /// Without vsock, which is plugged at a moment that deterministic time does not know.
    pub fn without_vsock(self) -> Self {
        Restore {
            vsock: false,
            ..self
        }
    }

    /// Starts it. It runs, but what the host has to say to it may not have come yet.
    pub fn start(self) -> Result<Vm> {
        let Snapshot {
            spec,
            files,
            name,
            clones,
            timeout,
            quiet,
            slot,
            ..
        } = self.snapshot;
        let dir = TempDir::with_prefix("pigeon-vm-")?;
        let mut spec = spec.clone();
        spec.dir = dir.path().into();
        spec.start = Start::Restore(files.clone());
        spec.vsock = self.vsock.then(|| dir.path().join(machine::VSOCK));
        let mut images = vec![];
        for disk in spec.disks.iter_mut().filter(|disk| disk.is_writable()) {
            let image = Image::copy_of(disk.path())?;
            *disk = disk.clone().at(image.path());
            images.push(image);
        }
        let nic = match spec.nic {
            machine::Nic::None => Nic::None,
            machine::Nic::Stream(_) => Nic::Cable(self.mmds),
            _ => bail!("a clone has no such network card"),
        };
        let (spec, machine, traffic) = on_qemu(spec, &nic)?;
        let number = clones.fetch_add(1, Ordering::Relaxed) + 1;
        let log = format!("{name}-clone{number}");
        let mut vm = Vm::of(machine, spec, &log, dir, false)?;
        vm.name = name.clone();
        vm.clones = clones.clone();
        vm.quiet = *quiet;
        vm.traffic = traffic;
        vm.timeout = *timeout;
        vm.images = images;
        vm.slot = Some(slot.clone());
        Ok(vm)
    }
}
