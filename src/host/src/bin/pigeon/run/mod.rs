//! `pigeon run`: boots a root image.

mod detach;
mod document;
mod health;
mod owner;
mod restore;
mod start;

use std::{
    env,
    fs::{self, File, OpenOptions, Permissions},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{self, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, ValueEnum};
use pigeon::{
    Arch, assets,
    forward::Forward,
    hold::{self, Until},
    image::{
        disk::{Format, parse_size},
        kind::{Kind, describe},
    },
    initrd::Initrd,
    lock::is_at,
    machine::{self, Disk, HostPort, Machine, Nic, Spec},
    vsock,
};
use rustix::{fs::OFlags, process::geteuid};
use serde_json::json;

use crate::{
    Guest,
    output::{note, say},
    snapshot::Restorable,
    terminal,
    vms::{self, Claim, Launch},
};
pub use document::argv;
use document::{DiskFile, Plan, file_systems};
use owner::Owner;
pub use restore::Restore;
pub use start::{Restart, Start};

/// Minimum memory with which Debian's kernel starts the init, in MiB.
const LEAST_MEMORY: u32 = 72;
/// The vsock port for the init's events.
const EVENTS_PORT: u32 = 10_001;
/// Size of the init's log ring in KiB when the console is not shown.
const LOG_KIB: u32 = 256;
/// Prefix of the directories of running VMs.
const SCRATCH: &str = "pigeon-vm-";

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Hypervisor {
    /// Firecracker where it and KVM are there, else QEMU
    Auto,
    Firecracker,
    Qemu,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum CgroupMode {
    /// v1 controllers, and cgroup2 beside them
    Hybrid,
    /// cgroup2 only: for systemd, Docker and k3s
    Unified,
    /// Not mounted
    None,
}

#[derive(Args)]
pub struct Run {
    /// A root image, such as `pigeon rootfs` makes; then arguments in place of its Cmd (after
    /// its Entrypoint, if it has one)
    #[arg(required = true, trailing_var_arg = true, value_name = "IMAGE [CMD]")]
    words: Vec<String>,
    /// The configuration [default: IMAGE's NAME.run.json, if it is there]
    #[arg(short, long, value_name = "RUN.JSON")]
    config: Option<PathBuf>,
    /// A command in place of the image's Entrypoint
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Pass standard input to the workload
    #[arg(short, long)]
    interactive: bool,
    /// Allocate a terminal for the workload
    #[arg(short, long)]
    tty: bool,
    /// Run in the background and print the VM's name
    #[arg(short, long, conflicts_with_all = ["interactive", "tty", "json"])]
    detach: bool,
    /// With -d: return when the workload runs or, if it has a health check, is healthy
    #[arg(long, requires = "detach")]
    wait: bool,
    /// Show only the workload's output
    #[arg(short, long)]
    quiet: bool,
    /// Remove the VM's record when it ends
    #[arg(long)]
    rm: bool,
    /// Set a variable, or pass on one that is set here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Set the variables in a file, one a line
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Run as this user
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Run in this directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// The guest's hostname [default: the VM's name]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Mount an image file; ,size=1G creates it if it does not exist, ,ro mounts it read-only.
    /// Replaces the configuration's Mounts
    #[arg(short, long, visible_alias = "disk", value_name = "FILE:PATH")]
    volume: Vec<String>,
    /// Mount a tmpfs, with options such as size=64m
    #[arg(long, value_name = "PATH[:OPTIONS]")]
    tmpfs: Vec<String>,
    /// Mount the root read-only
    #[arg(long)]
    read_only: bool,
    /// Keep the image unchanged: writes go to memory, or to FILE, which is created if needed
    #[arg(long, value_name = "FILE[,size=SIZE]", num_args = 0..=1, require_equals = true,
        default_missing_value = "tmpfs", conflicts_with = "read_only")]
    overlay: Option<String>,
    /// Set a sysctl in the guest
    #[arg(long, value_name = "NAME=VALUE")]
    sysctl: Vec<String>,
    /// Set a resource limit of the workload, such as nofile=65536
    #[arg(long, value_name = "NAME=SOFT[:HARD]")]
    ulimit: Vec<String>,
    /// The signal that stops the workload [default: the image's, else SIGTERM]
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// How long the workload may take to exit before it is killed
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = vms::STOP_TIMEOUT,
        value_parser = crate::parse_timeout
    )]
    stop_timeout: f64,
    #[command(flatten)]
    health: health::HealthOptions,
    /// Give the guest the host's network by address translation (QEMU); replaces IPConfigs
    #[arg(long)]
    net: bool,
    /// Forward a TCP port of the host, by default a free one on 127.0.0.1, to the guest
    #[arg(short, long, value_name = "[[ADDRESS:]HOST:]GUEST")]
    publish: Vec<String>,
    /// Forward free ports of the host to all ports that the image exposes
    #[arg(short = 'P', long)]
    publish_all: bool,
    /// Use an existing tap device; its addresses come from --config
    #[arg(long, value_name = "DEVICE", conflicts_with = "net")]
    tap: Option<String>,
    /// Memory in MiB, or with a unit, such as 1.5G
    #[arg(short, long, value_name = "SIZE", default_value = "256", value_parser = parse_memory)]
    memory: u32,
    /// Virtual processors: 1 to 32
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    cpus: u32,
    /// Allow snapshots of the VM to be restored (`pigeon snapshot`). On QEMU (x86_64) the machine is
    /// another one then: a PC with kernel 6.12
    #[arg(long, conflicts_with_all = ["interactive", "tty"])]
    restorable: bool,
    /// How cgroups are mounted in the guest [default: hybrid]
    #[arg(long, value_enum, value_name = "MODE")]
    cgroup_mode: Option<CgroupMode>,
    /// The VM's name [default: derived from the image]
    #[arg(long)]
    name: Option<String>,
    /// Where to create the Unix socket of the VM's vsock
    #[arg(long, value_name = "SOCKET")]
    uds: Option<PathBuf>,
    /// An uncompressed kernel with all drivers in it [default: Debian's cloud kernel]
    #[arg(long, value_name = "VMLINUX")]
    kernel: Option<PathBuf>,
    /// The initramfs with pigeon-init [default: initrd.cpio beside this program, else
    /// build/initrd.cpio of the repository]
    #[arg(
        long,
        value_name = "CPIO",
        env = "PIGEON_INITRD",
        hide_env_values = true
    )]
    initrd: Option<PathBuf>,
    /// A kernel parameter, such as INIT_LOG_LEVEL=debug
    #[arg(long, value_name = "PARAMETER")]
    append: Vec<String>,
    #[command(flatten)]
    guest: Guest,
    /// What runs the VM
    #[arg(long, value_enum, default_value = "auto")]
    vmm: Hypervisor,
    /// Print the configuration without booting
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON on standard output; the console goes to standard error
    #[arg(long)]
    json: bool,
}

/// The arguments of `pigeon run` only.
#[derive(Parser)]
struct Options {
    #[command(flatten)]
    run: Run,
}

/// Parses MiB: `512`, `512M`, `1.5G`.
fn parse_memory(text: &str) -> Result<u32, String> {
    let mib = match text.parse::<u32>() {
        Ok(mib) => mib,
        Err(_) => match parse_size(text) {
            Ok(bytes) => u32::try_from(bytes >> 20).unwrap_or(u32::MAX),
            Err(error) => return Err(error.to_string()),
        },
    };
    match mib {
        1..0x10_0000 => Ok(mib),
        _ => Err(format!(
            "{mib} MiB is out of range; numbers without a unit are MiB"
        )),
    }
}

impl Run {
    fn image(&self) -> &Path {
        Path::new(&self.words[0])
    }

    fn command(&self) -> &[String] {
        &self.words[1..]
    }

    /// Whether the unfiltered console is shown.
    fn shows_console(&self) -> bool {
        !self.quiet && !self.detach && !self.interactive && !self.tty
    }

    pub fn run(&self) -> Result<u8> {
        let root = self.check_image()?;
        let stem = self.image().file_stem().unwrap_or_default();
        let stem = stem.to_string_lossy();
        let detached = self.detach && !self.dry_run;
        if detached && !detach::is_detached() {
            return match detach::start(env::args_os().skip(1))? {
                Ok(name) => {
                    if self.wait {
                        start::wait_until_up(&name)?;
                    }
                    say!("{name}")?;
                    Ok(0)
                }
                Err(code) => Ok(code),
            };
        }
        // Errors are reported before anything is created. Files are read only once, as they may be pipes.
        let document = self.document()?;
        let plan = self.plan(document.clone(), self.name.as_deref().unwrap_or(&stem))?;
        if self.dry_run {
            say!("{}", serde_json::to_string_pretty(&plan.document)?)?;
            return Ok(0);
        }
        terminal::check(self.interactive, self.tty)?;
        self.check_memory()?;
        // May take minutes, in which signals still end this process.
        self.kernel()?;
        let claim = vms::claim(self.name.as_deref(), &stem)?;
        // The final name is known only now.
        let plan = self.plan(document, &claim.record().name)?;
        claim.set(|record| record.launch = Launch::this());
        self.boot(claim, plan, root)
    }

    /// Boots a VM and waits until it has ended. Returns the exit code.
    fn boot(&self, claim: Claim, plan: Plan, root: Kind) -> Result<u8> {
        let name = claim.record().name;
        let mut held = Held::new(&plan.disks)?;
        let mut kinds = vec![root];
        for disk in &plan.disks[1..] {
            kinds.push(disk.kind()?);
        }
        let uds = match &self.uds {
            Some(uds) => path::absolute(uds)?,
            None => claim.record().uds,
        };
        let reservation = vsock::Reservation::new(&uds)?;
        sweep();
        let scratch = Scratch::new()?;
        let signals = owner::signals()?;
        let mut ports = vec![];
        for port in plan.ports.iter().filter(|port| !self.by_hypervisor(port)) {
            let forward = port.forward(&uds)?;
            ports.push(format!("{}->{}/tcp", forward.address(), port.guest));
            held.ports.push(forward);
        }
        ports.extend(
            plan.ports
                .iter()
                .filter(|port| self.by_hypervisor(port))
                .map(ToString::to_string),
        );
        let spec = self.spec(&plan, &kinds, scratch.path(), &uds)?;
        let restorable = match self.restorable {
            true => Some(Restorable::of(&spec)?),
            false => None,
        };
        let machine = self.start(&spec)?;
        held.keep();
        claim.update(|record| {
            record.restorable = restorable;
            record.image = fs::canonicalize(self.image()).unwrap_or_else(|_| self.image().into());
            record.uds = uds.clone();
            record.arch = self.guest.arch.name().into();
            record.hypervisor = machine.hypervisor().into();
            (record.memory_mib, record.cpus) = (self.memory, self.cpus);
            record.config = plan.document.clone();
            record.session = plan.session.is_some();
            record.stop_timeout = Some(self.stop_timeout);
            record.ports = ports.clone();
        })?;
        if self.shows_console() {
            let target = match &self.uds {
                None => format!("--vm {name}"),
                Some(uds) => format!("--uds {}", uds.display()),
            };
            note!(
                "{name} boots on {}; Ctrl-C stops it; from elsewhere: pigeon exec -it {target} sh",
                machine.hypervisor()
            );
            for port in &ports {
                note!("{port}");
            }
        }
        for path in &plan.unkept {
            if self.detach || self.shows_console() {
                note!(
                    "the image declares a volume at {path}: -v FILE:{path},size=1G keeps its data in \
                     a file of its own"
                );
            }
        }
        if self.detach {
            detach::report(&name, &claim.dir)?;
        }
        let owner = Owner {
            _reservation: reservation,
            run: self,
            claim: Arc::new(claim),
            plan,
            uds,
        };
        let events = owner.listen_for_events();
        owner.watch(machine, signals, events, held)
    }

    /// Checks the root image and returns its format.
    fn check_image(&self) -> Result<Kind> {
        let image = self.image();
        let shown = image.display();
        ensure!(
            image.exists(),
            "there is no image {shown}; `pigeon rootfs SOURCE {shown}` makes one from a container \
             image"
        );
        ensure!(
            !image.is_dir(),
            "{shown} is a directory; `pigeon rootfs` makes an image from it"
        );
        let kind = describe(image)?;
        match kind {
            Kind::Image(format) => {
                ensure!(
                    self.overlay.is_none() || !self.read_only,
                    "a read-only root has no overlay"
                );
                let _: Format = format;
                Ok(kind)
            }
            Kind::OtherImage(_) => Ok(kind),
            Kind::Archive | Kind::Compressed(_) => anyhow::bail!(
                "{shown} is {kind}, not a root image; `pigeon rootfs {shown} NAME.ext4` makes one \
                 from it"
            ),
            kind => anyhow::bail!(
                "{shown} is {kind}, not a root image; `pigeon rootfs` makes one from a container \
                 image"
            ),
        }
    }

    fn check_memory(&self) -> Result<()> {
        ensure!(
            self.kernel.is_some() || self.memory >= LEAST_MEMORY,
            "{} MiB of memory are not enough: Debian's kernel needs {LEAST_MEMORY} to start the \
             init",
            self.memory
        );
        Ok(())
    }

    /// The VM's kernel. Debian's is fetched on the first call.
    fn kernel(&self) -> Result<assets::Kernel> {
        match &self.kernel {
            Some(path) => Ok(assets::Kernel::Image(path.clone())),
            None if self.restorable && self.is_on_qemu() => {
                assets::Kernel::restorable(self.guest.arch)
            }
            None => assets::Kernel::chosen(self.guest.arch),
        }
    }

    /// Whether the hypervisor forwards a port, instead of the init's tunnel.
    fn by_hypervisor(&self, port: &crate::ports::Port) -> bool {
        self.net && port.address.is_ipv4() && port.host != 0
    }

    fn spec(&self, plan: &Plan, kinds: &[Kind], dir: &Path, uds: &Path) -> Result<Spec> {
        let beside = assets::initrd_beside().filter(|_| self.guest.arch == Arch::HOST);
        let product = match self.initrd.as_ref().or(beside.as_ref()) {
            Some(path) => {
                fs::read(path).with_context(|| format!("unable to read {}", path.display()))?
            }
            None => assets::initrd(self.guest.arch)?,
        };
        let mut files = Initrd::default();
        let kernel = self.kernel()?;
        if self.kernel.is_none() {
            files.modules_and(&kernel, &file_systems(kinds, self.overlay.is_some()))?;
        }
        let document = plan.guest_document()?.to_string();
        files.file("/pigeon/run.json", 0o600, document);
        let initrd = dir.join("initrd");
        fs::write(&initrd, files.on_top_of(product))?;

        let mut disks = vec![];
        for (disk, kind) in plan.disks.iter().zip(kinds) {
            let path = fs::canonicalize(&disk.path)
                .with_context(|| format!("unable to find {}", disk.path.display()))?;
            // Read-only formats are also protected from accidental writes.
            disks.push(match disk.read_only || kind.is_packed() {
                true => Disk::file(&path).read_only(),
                false => Disk::file(&path),
            });
        }
        if plan.session.is_some() {
            let volume = dir.join("hold.ext4");
            hold::write_volume(&volume, self.guest.arch, Until::Signal, Format::Ext4)?;
            disks.push(Disk::file(&volume).scratch());
        }
        let ports = plan.ports.iter().filter_map(|port| match port.address {
            std::net::IpAddr::V4(address) if self.by_hypervisor(port) => Some(HostPort {
                address,
                host: port.host,
                guest: port.guest,
            }),
            _ => None,
        });
        let nic = match &self.tap {
            Some(tap) => Nic::Tap(tap.clone()),
            None if self.net => Nic::User(ports.collect()),
            None => Nic::None,
        };
        Ok(Spec {
            args: self.kernel_parameters(),
            memory_mib: self.memory,
            cpus: self.cpus,
            disks,
            nic,
            vsock: Some(uds.into()),
            start: match self.restorable {
                true => machine::Start::BootRestorable,
                false => machine::Start::Boot,
            },
            ..Spec::new(dir, self.guest.arch, &kernel.image(), &initrd)
        })
    }

    fn firecracker(&self) -> Option<PathBuf> {
        assets::firecracker().filter(|_| self.guest.arch == Arch::HOST)
    }

    fn is_on_qemu(&self) -> bool {
        match self.vmm {
            Hypervisor::Auto => self.net || self.firecracker().is_none(),
            Hypervisor::Qemu => true,
            Hypervisor::Firecracker => false,
        }
    }

    fn start(&self, spec: &Spec) -> Result<Box<dyn Machine>> {
        if self.is_on_qemu() {
            return spec.start_qemu();
        }
        let program = self.firecracker().context(
            "Firecracker is not available: it needs /dev/kvm, and to be in PATH or named by \
             FIRECRACKER; --vmm qemu needs neither",
        )?;
        spec.start_firecracker(&program)
    }

    fn kernel_parameters(&self) -> Vec<String> {
        // There is no MMDS to wait for.
        let mut parameters = vec![
            "PIGEON_CONFIG=file".to_string(),
            format!("PIGEON_EVENTS_PORT={EVENTS_PORT}"),
        ];
        if !self.shows_console() {
            // The serial console is slow, and not shown.
            parameters.push("PIGEON_OUTPUT=log".into());
            parameters.push(format!("PIGEON_LOG_KIB={LOG_KIB}"));
        }
        if self.restorable {
            // `pigeon restore` sends a clone its configuration.
            parameters.push("PIGEON_RESTORE=host".into());
        }
        if let Some(mode) = self.cgroup_mode {
            let mode = match mode {
                CgroupMode::Hybrid => "hybrid",
                CgroupMode::Unified => "unified",
                CgroupMode::None => "none",
            };
            parameters.push(format!("PIGEON_CGROUPS={mode}"));
        }
        parameters.extend(self.append.iter().cloned());
        parameters
    }

    fn stop_timeout(&self) -> Result<Duration> {
        Duration::try_from_secs_f64(self.stop_timeout).context("bad --stop-timeout")
    }
}

/// Host resources that a VM uses exclusively, until it ends.
#[derive(Default)]
pub struct Held {
    disks: Vec<File>,
    /// Disks that were created for it, and are removed if it does not start.
    made: Vec<(DiskFile, File)>,
    ports: Vec<Forward>,
}

impl Held {
    /// Creates missing disks, and locks all: two VMs that write to the same disk would corrupt it.
    fn new(disks: &[DiskFile]) -> Result<Held> {
        let mut held = Held::default();
        for disk in disks {
            if let Some(file) = disk.make()? {
                held.made.push((disk.clone(), file));
                continue;
            }
            let shown = disk.path.display();
            let file = File::open(&disk.path).with_context(|| format!("unable to open {shown}"))?;
            let packed = describe(&disk.path).is_ok_and(Kind::is_packed);
            let locked = match disk.read_only || packed {
                true => file.try_lock_shared(),
                false => file.try_lock(),
            };
            match locked {
                // Its creator may have removed it before it was locked here.
                Ok(()) if !is_at(&file, &disk.path) => {
                    anyhow::bail!("{shown} was removed by another VM, which has not started")
                }
                Ok(()) => held.disks.push(file),
                Err(fs::TryLockError::WouldBlock) => anyhow::bail!(
                    "{shown} is in use by another running VM; --read-only, --overlay or ,ro allow \
                     sharing it"
                ),
                // A file system that does not support locks.
                Err(fs::TryLockError::Error(_)) => {}
            }
        }
        Ok(held)
    }

    /// Keeps created disks, as the VM has started.
    fn keep(&mut self) {
        for (disk, file) in self.made.drain(..) {
            if disk.read_only {
                let _ = file.try_lock_shared();
            }
            self.disks.push(file);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for (disk, file) in &self.made {
            // A disk that is not locked exclusively may be in use.
            if file.try_lock().is_ok() && is_at(file, &disk.path) {
                let _ = fs::remove_file(&disk.path);
            }
        }
    }
}

/// The directory of a running VM, with its configuration, memory and sockets, so for this user only. Its lock
/// distinguishes it from a killed VM's.
struct Scratch {
    dir: tempfile::TempDir,
    _lock: File,
}

/// The name of the lock file.
const LOCK: &str = "lock";

impl Scratch {
    fn new() -> Result<Scratch> {
        let dir = tempfile::Builder::new()
            .prefix(SCRATCH)
            .permissions(Permissions::from_mode(0o700))
            .tempdir()?;
        let lock = File::create(dir.path().join(LOCK))?;
        lock.lock()?;
        Ok(Scratch { dir, _lock: lock })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// Removes the directories of VMs whose owners were killed.
fn sweep() {
    sweep_in(&env::temp_dir());
}

fn sweep_in(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let user = geteuid().as_raw();
    for entry in entries.flatten() {
        // Any user can create files in this directory.
        let is_ours = entry.file_name().to_string_lossy().starts_with(SCRATCH)
            && entry
                .metadata()
                .is_ok_and(|found| found.is_dir() && found.uid() == user);
        // A directory without a lock is still being created.
        if is_ours && is_unlocked(&entry.path().join(LOCK)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether a lock file exists and is not locked. It is not waited for if it is a FIFO.
fn is_unlocked(path: &Path) -> bool {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let mut options = OpenOptions::new();
    let lock = options
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    lock.is_ok_and(|lock| lock.try_lock().is_ok())
}

/// The end of a VM, for `pigeon run --json`.
fn describe_end(exit: Option<&pigeon::Exit>, end: &str, code: u8) -> serde_json::Value {
    json!({"exit": exit, "end": end, "exit_code": code})
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::{
        os::unix::fs::{chown, symlink},
        sync::mpsc,
        thread,
    };

    #[test]
    fn memory_is_in_mib_or_has_a_unit() {
        for (text, mib) in [("256", 256), ("512M", 512), ("1.5G", 1536), ("1GiB", 1024)] {
            assert_eq!(parse_memory(text), Ok(mib), "{text}");
        }
        for text in ["0", "x", "1K", "9999999T", "-1"] {
            assert!(parse_memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_created_disk_belongs_to_its_creator_until_the_vm_ends() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str, size| DiskFile {
            path: dir.path().join(name),
            read_only: false,
            size,
        };
        let data = disk("data.img", Some(16 << 20));
        let disks = std::slice::from_ref(&data);
        let refused = || {
            let error = Held::new(disks).err().unwrap().to_string();
            assert!(error.contains("is in use by another running VM"), "{error}");
            assert!(data.path.exists());
        };
        let first = Held::new(disks).unwrap();
        refused();
        // The VM does not start.
        drop(first);
        assert!(!data.path.exists());

        let mut first = Held::new(disks).unwrap();
        first.keep();
        refused();
        drop(first);
        assert!(data.path.exists());
        drop(Held::new(disks).unwrap());
        assert!(data.path.exists());

        // A later disk fails.
        let made = disk("made.img", Some(16 << 20));
        assert!(Held::new(&[made.clone(), disk("none", None)]).is_err());
        assert!(!made.path.exists());

        // A file that replaced it meanwhile is not removed.
        let first = Held::new(std::slice::from_ref(&made)).unwrap();
        fs::remove_file(&made.path).unwrap();
        fs::write(&made.path, "precious").unwrap();
        drop(first);
        assert!(made.path.exists());
    }

    #[test]
    fn an_image_of_a_read_only_format_is_shared() {
        let dir = tempfile::tempdir().unwrap();
        for (name, at, magic) in [
            ("squashfs", 0, &b"hsqs"[..]),
            ("erofs", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
        ] {
            let path = dir.path().join(name);
            fs::write(&path, [&vec![1; at], magic].concat()).unwrap();
            let disks = [DiskFile {
                path,
                read_only: false,
                size: None,
            }];
            let _first = Held::new(&disks).unwrap();
            assert!(Held::new(&disks).is_ok(), "{name}");
        }
    }

    #[test]
    fn leftovers_of_killed_vms_are_removed_and_running_vms_are_not() {
        let running = Scratch::new().unwrap();
        let killed = Scratch::new().unwrap();
        let left = killed.path().to_path_buf();
        fs::write(left.join("initrd"), "x").unwrap();
        // As after SIGKILL: unlocked, but not removed.
        let Scratch { dir, _lock } = killed;
        let _ = dir.keep();
        drop(_lock);
        sweep();
        assert!(!left.exists());
        assert!(running.path().exists());
    }

    #[test]
    fn the_directory_of_a_running_vm_is_this_users_only() {
        let scratch = Scratch::new().unwrap();
        let mode = fs::metadata(scratch.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn what_another_user_puts_beside_the_vms_is_left_alone_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let [other, vm] = ["other", "pigeon-vm-a"].map(place);
        for path in [&other, &vm] {
            mknodat(CWD, path.join(LOCK), FileType::Fifo, Mode::RWXU, 0).unwrap();
        }
        // Links to a directory and to a lock of this user.
        let mine = place("mine");
        fs::write(mine.join(LOCK), "").unwrap();
        symlink(&mine, dir.path().join("pigeon-vm-b")).unwrap();
        let linked = place("pigeon-vm-c");
        symlink(mine.join(LOCK), linked.join(LOCK)).unwrap();
        let foreign = place("pigeon-vm-d");
        fs::write(foreign.join(LOCK), "").unwrap();
        // Only root can give a directory away.
        let is_foreign = chown(&foreign, Some(1), Some(1)).is_ok();

        let (done, swept) = mpsc::channel();
        let path = dir.path().to_path_buf();
        thread::spawn(move || {
            sweep_in(&path);
            done.send(())
        });
        swept.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(other.exists() && linked.exists() && mine.join(LOCK).exists());
        assert!(dir.path().join("pigeon-vm-b").exists());
        assert_eq!(foreign.exists(), is_foreign);
    }
}
