//! Micro-VMs on Firecracker, or on QEMU where Firecracker cannot run.

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

/// How a VM has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest asked for a restart, which is how a micro-VM ends in good order.
    Reboot,
    /// The guest switched itself off.
    PowerOff,
    /// The kernel panicked.
    Panic,
    /// The hypervisor failed, or was killed.
    Failed(Option<i32>),
}

/// What the guest's network card is plugged into.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Nic {
    /// There is no eth0.
    #[default]
    None,
    /// A listening Unix socket that takes frames, each after its length in 4 bytes. QEMU only.
    Stream(PathBuf),
    /// The host's network by address translation, without privileges, in [`USER_NETWORK`]; TCP
    /// ports of the host are forwarded to the guest. QEMU only.
    User(Vec<HostPort>),
    /// A tap device that is there.
    Tap(String),
    /// A tap device in a network namespace of the VM's own: nobody answers behind it.
    LoneTap,
}

/// A TCP port of the host that is forwarded to the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HostPort {
    /// The address on which the host listens.
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
    /// The way out, which is the host too.
    pub gateway: &'static str,
    /// A name server that asks the host's.
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
    /// A disk that is the file at `path`.
    pub fn file(path: &Path) -> Disk {
        Disk {
            path: path.into(),
            read_only: false,
            scratch: false,
            blkdebug: None,
        }
    }

    /// The guest cannot write it.
    pub fn read_only(self) -> Disk {
        Disk {
            read_only: true,
            ..self
        }
    }

    /// A flush of the guest's does not reach the host's disk: for images that nobody needs after
    /// a power failure of the host.
    pub fn scratch(self) -> Disk {
        Disk {
            scratch: true,
            ..self
        }
    }

    /// Fails as the blkdebug configuration says (QEMU docs/devel/blkdebug.txt).
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

    /// Whether the guest can write it.
    pub fn is_writable(&self) -> bool {
        !self.read_only
    }

    /// The same with its contents in another file.
    pub fn at(self, path: &Path) -> Disk {
        Disk {
            path: path.into(),
            ..self
        }
    }

    /// Whether it is to fail.
    pub fn is_faulty(&self) -> bool {
        self.blkdebug.is_some()
    }
}

/// Firecracker's own metadata service.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// V1, which takes requests without a token, in place of V2.
    pub v1: bool,
    /// The document, unless it is [put](put_metadata) there later.
    pub document: Option<Value>,
}

/// A snapshot of a VM, in files; its disks are no part of it.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The processors and devices.
    pub state: PathBuf,
    /// The guest's memory.
    pub memory: PathBuf,
}

/// How a VM comes to life, and whether a snapshot of it can.
#[derive(Clone, Debug, Default)]
pub enum Start {
    /// By booting.
    #[default]
    Boot,
    /// By booting, on a machine whose snapshots can be restored. (Firecracker's always can.)
    BootRestorable,
    /// From the snapshot of such a VM, which had the same kernel, processors, memory, disks, network card
    /// and VMGenID device. What it had on its disks is for the caller to have copied.
    Restore(Snapshot),
}

/// A VM to be started.
#[derive(Clone, Debug)]
pub struct Spec {
    /// A directory for the sockets and logs of this VM alone.
    pub dir: PathBuf,
    /// What the kernel and all programs are for.
    pub arch: Arch,
    /// An uncompressed kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// Kernel parameters, after those a micro-VM needs.
    pub args: Vec<String>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// `/dev/vda` is the first.
    pub disks: Vec<Disk>,
    /// The network card.
    pub nic: Nic,
    /// A metadata service on it. Firecracker only.
    pub metadata: Option<Metadata>,
    /// Where the host's socket of the guest's vsock is to be; None is no vsock.
    pub vsock: Option<PathBuf>,
    /// A keyboard controller, which Ctrl-Alt-Del needs, if the architecture has one.
    pub i8042: bool,
    /// Firecracker's console also on QEMU. One that nobody reads is waited for by the guest's
    /// kernel; the PL011 of QEMU's aarch64 stops the whole machine then. (QEMU hw/char/pl011.c)
    pub firecrackers_console: bool,
    /// The guest's clock counts its instructions. QEMU only.
    pub deterministic: bool,
    /// A PCI Express port named `pci_port`, into which a device can be plugged while the VM runs. QEMU
    /// only.
    pub pci_port: bool,
    /// Boot or restore.
    pub start: Start,
    /// A device that tells the kernel when it has been restored (VMGenID), where snapshots can be
    /// restored. Firecracker always has one.
    pub generation_id: bool,
    /// More of QEMU's options.
    pub qemu_options: Vec<String>,
}

/// What the guest's vsock socket is called in [`Spec::dir`] if nobody cares.
pub const VSOCK: &str = "vm.vsock";

impl Spec {
    /// A VM as a common Firecracker set-up has it: 256 MiB, one processor, vsock, no disk and no
    /// network.
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

    /// The kernel command line: parameters for both hypervisors, for this one, and those requested.
    fn command_line(&self, console: &str, specific: &str) -> String {
        // A panic restarts at once, which ends the VM; the console has its text.
        let common = format!("console={console} reboot=k panic=-1 quiet");
        let mut parameters = vec![common.as_str(), specific];
        parameters.extend(self.args.iter().map(String::as_str));
        parameters.retain(|parameter| !parameter.is_empty());
        parameters.join(" ")
    }
}

/// A started VM. It ends when it is dropped.
pub trait Machine: Send {
    /// The hypervisor, whose standard streams are the guest's console.
    fn process(&mut self) -> &mut Process;
    /// Its name.
    fn hypervisor(&self) -> &'static str;
    /// The keys Ctrl, Alt and Del: an error where there is [no keyboard](Arch::has_keyboard).
    fn ctrl_alt_delete(&mut self) -> Result<()>;
    /// Stops the virtual processors.
    fn pause(&mut self) -> Result<()>;
    /// Lets them go on.
    fn resume(&mut self) -> Result<()>;
    /// Stops the virtual processors and takes a snapshot. [`resume`](Machine::resume) lets the VM
    /// itself go on.
    fn snapshot(&mut self, snapshot: &Snapshot) -> Result<()>;
    /// What the end with this status meant, but for a panic.
    fn end(&mut self, status: ExitStatus) -> End;
    /// A QMP command, where the VM runs on QEMU.
    fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let _ = arguments;
        bail!("{command}: only QEMU has QMP")
    }
}

/// Takes a snapshot of a VM that another process has started in the directory `dir`, on a machine
/// whose snapshots can be restored. It goes on afterwards; `meanwhile` it is stopped, and its disks
/// can be copied.
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

/// What a snapshot has come to, once its VM was told to go on. That it does not is the worst of it.
fn and_resumed(taken: Result<()>, resumed: Result<()>) -> Result<()> {
    resumed.context("the VM does not go on after the snapshot")?;
    taken
}

/// `command` in a network namespace that holds nothing but a tap device.
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
