//! Micro-VMs on Firecracker, or on QEMU if Firecracker cannot run.

mod firecracker;
mod qemu;
mod vhost_user;
mod vsock_device;

use std::{
    env,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{Arch, assets, process::Process};

pub use firecracker::put_metadata;

/// The guest's context id on vsock.
const GUEST_CID: u32 = 3;
/// The guest's MAC address.
const GUEST_MAC: &str = "06:00:ac:10:00:02";
/// The tap device of [`Nic::LoneTap`].
const LONE_TAP: &str = "tap0";

/// The end of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest requested a restart, which is how a micro-VM shuts down.
    Reboot,
    /// The guest powered off.
    PowerOff,
    /// The kernel panicked.
    Panic,
    /// The hypervisor failed, or was killed.
    Failed(Option<i32>),
}

/// The connection of the guest's network card.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Nic {
    /// No network card.
    #[default]
    None,
    /// A listening Unix socket that accepts frames, each preceded by its length in 4 bytes. QEMU only.
    Stream(PathBuf),
    /// The host's network by address translation, without privileges, in [`USER_NETWORK`]; TCP ports of the
    /// host are forwarded to the guest. QEMU only.
    User(Vec<HostPort>),
    /// An existing tap device.
    Tap(String),
    /// A tap device in a separate network namespace, where nothing responds.
    LoneTap,
}

/// A TCP port of the host that is forwarded to the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostPort {
    /// The host's listening address.
    pub address: Ipv4Addr,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

/// Addresses in the network of [`Nic::User`].
pub struct UserNetwork {
    /// The guest's address.
    pub guest: &'static str,
    /// Its prefix length.
    pub mask: u8,
    /// The gateway, which is also the host.
    pub gateway: &'static str,
    /// A name server that forwards to the host's.
    pub nameserver: &'static str,
}

/// QEMU's defaults.
pub const USER_NETWORK: UserNetwork = UserNetwork {
    guest: "10.0.2.15",
    mask: 24,
    gateway: "10.0.2.2",
    nameserver: "10.0.2.3",
};

/// A block device of a guest.
#[derive(Clone, Debug)]
pub struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) scratch: bool,
    pub(crate) blkdebug: Option<String>,
}

impl Disk {
    /// A disk whose contents are the file at `path`.
    pub fn file(path: &Path) -> Disk {
        Disk {
            path: path.into(),
            read_only: false,
            scratch: false,
            blkdebug: None,
        }
    }

    /// Makes it read-only for the guest.
    pub fn read_only(self) -> Disk {
        Disk {
            read_only: true,
            ..self
        }
    }

    /// Ignores the guest's flushes: for images that are not needed after a power failure of the host.
    pub fn scratch(self) -> Disk {
        Disk {
            scratch: true,
            ..self
        }
    }

    /// Simulates failures as specified by a blkdebug configuration (QEMU docs/devel/blkdebug.txt).
    pub fn blkdebug(self, config: &str) -> Disk {
        Disk {
            blkdebug: Some(config.into()),
            ..self
        }
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest can write to it.
    pub fn is_writable(&self) -> bool {
        !self.read_only
    }

    /// The same disk with its contents in another file.
    pub fn at(self, path: &Path) -> Disk {
        Disk {
            path: path.into(),
            ..self
        }
    }

    /// Whether it simulates failures.
    pub fn is_faulty(&self) -> bool {
        self.blkdebug.is_some()
    }
}

/// Firecracker's metadata service.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// Whether it is V1, which accepts requests without a token, instead of V2.
    pub v1: bool,
    /// The document, unless it is [put](put_metadata) later.
    pub document: Option<Value>,
}

/// Files of a VM's snapshot, without its disks.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The processors and devices.
    pub state: PathBuf,
    /// The guest's memory.
    pub memory: PathBuf,
}

/// How a VM starts, and whether its snapshots can be restored.
#[derive(Clone, Debug, Default)]
pub enum Start {
    /// By booting.
    #[default]
    Boot,
    /// By booting, on a machine whose snapshots can be restored. (Firecracker's always can be.)
    BootRestorable,
    /// From the snapshot of such a VM, which had the same kernel, processors, memory, disks, network card and
    /// VMGenID device. The caller must have copied the contents of its disks.
    Restore(Snapshot),
}

/// The specification of a VM.
#[derive(Clone, Debug)]
pub struct Spec {
    /// A directory for the sockets, logs and memory of this VM only. Any user who can access it controls the VM.
    pub dir: PathBuf,
    /// The architecture of the kernel and all programs.
    pub arch: Arch,
    /// An uncompressed kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// Kernel parameters, in addition to those that a micro-VM needs.
    pub args: Vec<String>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Disks; the first one is `/dev/vda`.
    pub disks: Vec<Disk>,
    /// The network card.
    pub nic: Nic,
    /// A metadata service on the network card. Firecracker only.
    pub metadata: Option<Metadata>,
    /// The path of the host's socket for the guest's vsock; None for no vsock.
    pub vsock: Option<PathBuf>,
    /// Adds a keyboard controller, which Ctrl-Alt-Del needs, if the architecture has one.
    pub i8042: bool,
    /// Uses Firecracker's console also on QEMU. If nothing reads it, the guest's kernel waits; the PL011 of
    /// QEMU's aarch64 would stop the whole machine. (QEMU hw/char/pl011.c)
    pub firecrackers_console: bool,
    /// Derives the guest's clock from its instruction count. QEMU only.
    pub deterministic: bool,
    /// Adds a PCI Express port `pci_port`, into which a device can be plugged while the VM runs. QEMU only.
    pub pci_port: bool,
    /// Boot or restore.
    pub start: Start,
    /// Adds a device that tells the kernel that it was restored (VMGenID), if snapshots can be restored.
    /// Firecracker always has one.
    pub generation_id: bool,
    /// Additional options of QEMU.
    pub qemu_options: Vec<String>,
}

/// Default name of the guest's vsock socket in [`Spec::dir`].
pub const VSOCK: &str = "vm.vsock";

impl Spec {
    /// A typical Firecracker VM: 256 MiB, one processor, vsock, no disk and no network.
    pub fn new(dir: &Path, arch: Arch, kernel: &Path, initrd: &Path) -> Spec {
        Spec {
            dir: dir.into(),
            arch,
            kernel: kernel.into(),
            initrd: initrd.into(),
            args: vec![],
            memory_mib: 256,
            cpus: 1,
            disks: vec![],
            nic: Nic::None,
            metadata: None,
            vsock: Some(dir.join(VSOCK)),
            i8042: true,
            firecrackers_console: false,
            deterministic: false,
            pci_port: false,
            start: Start::Boot,
            generation_id: true,
            qemu_options: vec![],
        }
    }

    /// Starts it on Firecracker.
    pub fn start_firecracker(&self, program: &Path) -> Result<Box<dyn Machine>> {
        firecracker::start(self, program)
    }

    /// Starts it on QEMU.
    pub fn start_qemu(&self) -> Result<Box<dyn Machine>> {
        qemu::start(self)
    }

    /// The kernel command line: parameters for both hypervisors, for this one, and the requested ones.
    fn command_line(&self, console: &str, specific: &str) -> String {
        // A panic restarts at once, which ends the VM; its message is on the console.
        let common = format!("console={console} reboot=k panic=-1 quiet");
        let mut parameters = vec![common.as_str(), specific];
        parameters.extend(self.args.iter().map(String::as_str));
        parameters.retain(|parameter| !parameter.is_empty());
        parameters.join(" ")
    }
}

/// A running VM. It is killed on drop.
pub trait Machine: Send {
    /// The hypervisor, whose standard streams are the guest's console.
    fn process(&mut self) -> &mut Process;
    /// Its name.
    fn hypervisor(&self) -> &'static str;
    /// Sends Ctrl-Alt-Del: an error if there is [no keyboard](Arch::has_keyboard).
    fn ctrl_alt_delete(&mut self) -> Result<()>;
    /// Stops the virtual processors.
    fn pause(&mut self) -> Result<()>;
    /// Resumes them.
    fn resume(&mut self) -> Result<()>;
    /// Stops the virtual processors and takes a snapshot. Continue with [`resume`](Machine::resume).
    fn snapshot(&mut self, snapshot: &Snapshot) -> Result<()>;
    /// The meaning of this exit status, except for a panic.
    fn end(&mut self, status: ExitStatus) -> End;
    /// Runs a QMP command, if the VM runs on QEMU.
    fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let _ = arguments;
        bail!("{command}: only QEMU has QMP")
    }
}

/// Takes a snapshot of another process's VM in the directory `dir`, on a machine whose snapshots can be
/// restored. The VM is resumed afterwards; `meanwhile` runs while it is paused, to copy its disks.
pub fn snapshot(
    dir: &Path,
    files: &Snapshot,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<()> {
    match firecracker::is_in(dir) {
        true => firecracker::snapshot(dir, files, meanwhile),
        false => qemu::snapshot(dir, files, meanwhile),
    }
}

/// Resumes the VM in the directory `dir`, and restores its vsock, after the process that took a [snapshot] of
/// it was killed.
pub fn resume_orphaned(dir: &Path) -> Result<()> {
    match firecracker::is_in(dir) {
        true => firecracker::resume_orphaned(dir),
        false => qemu::resume_orphaned(dir),
    }
}

/// The result of a snapshot, after its VM was resumed. A failure to resume takes precedence.
fn and_resumed(taken: Result<()>, resumed: Result<()>) -> Result<()> {
    resumed.context("the VM does not go on after the snapshot")?;
    taken
}

/// `command` in a network namespace with only a tap device.
fn beside_tap(command: &Command) -> Result<Command> {
    // Entering a user namespace loses the parent's death signal.
    const SCRIPT: &str = "ip tuntap add dev $0 mode tap vnet_hdr && ip link set $0 up && \
                          exec setpriv --pdeathsig KILL \"$@\"";
    let mut wrapped = Command::new(assets::tool("unshare")?);
    wrapped.arg("--net");
    if !rustix::process::geteuid().is_root() {
        wrapped.arg("--map-root-user");
    }
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    wrapped
        .env("PATH", path)
        .args(["sh", "-c", SCRIPT, LONE_TAP]);
    wrapped.arg(command.get_program()).args(command.get_args());
    Ok(wrapped)
}
