//! A snapshot of a VM, and the clones restored from it.

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

/// A snapshot: memory, vCPUs, devices, and copies of the writable disks.
pub struct Snapshot {
    /// The VM's specification, with these copies as its disks.
    spec: Spec,
    files: machine::Snapshot,
    name: String,
    clones: Arc<AtomicU32>,
    timeout: Duration,
    quiet: bool,
    /// Clones share it: otherwise two tests with several clones each could wait for each other's slots forever.
    /// Most of the time each clone is idle.
    slot: Arc<Slot>,
    _dir: TempDir,
}

impl Vm {
    /// Pauses it and takes a snapshot; [`resume`](Vm::resume) continues it.
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
    /// A clone to be started, with its own copies of the writable disks.
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
    /// Serves this MMDS to it; by default there is none.
    pub fn mmds(self, mmds: Mmds) -> Self {
        Restore {
            mmds: Some(mmds),
            ..self
        }
    }

    /// Leaves out vsock, which is plugged at a time that is not deterministic.
    pub fn without_vsock(self) -> Self {
        Restore {
            vsock: false,
            ..self
        }
    }

    /// Starts it. It runs, but data from the host may not have arrived yet.
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
