//! The two architectures that Firecracker runs on, and what differs between their guests.

use std::{env, path::Path, process::Command};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{assets, tsc};

/// A guest's architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    /// Intel's and AMD's
    #[value(name = "x86_64", alias = "amd64")]
    X86_64,
    /// Arm's, such as Graviton
    #[value(alias = "arm64")]
    Aarch64,
}

impl Default for Arch {
    fn default() -> Arch {
        Arch::HOST
    }
}

impl Arch {
    /// This machine's.
    pub const HOST: Arch = if cfg!(target_arch = "aarch64") {
        Arch::Aarch64
    } else {
        Arch::X86_64
    };

    /// The architecture that `PIGEON_ARCH` names, as `./build.sh … --arch` sets it; the host's if unset.
    pub fn chosen() -> Result<Arch> {
        match env::var("PIGEON_ARCH") {
            Err(_) => Ok(Arch::HOST),
            Ok(name) => match Arch::from_str(&name, false) {
                Ok(arch) => Ok(arch),
                Err(_) => bail!("PIGEON_ARCH={name}: must be x86_64 or aarch64"),
            },
        }
    }

    /// The name that the kernel, QEMU and Rust use.
    pub fn name(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86_64",
            Arch::Aarch64 => "aarch64",
        }
    }

    /// The name that Debian, Go and container images use.
    pub fn debian_name(self) -> &'static str {
        match self {
            Arch::X86_64 => "amd64",
            Arch::Aarch64 => "arm64",
        }
    }

    /// The platform in an image's configuration: `linux/arm64`.
    pub fn platform(self) -> String {
        format!("linux/{}", self.debian_name())
    }

    /// Whether its machines have a keyboard controller (i8042), and with it Ctrl-Alt-Del.
    pub fn has_keyboard(self) -> bool {
        self == Arch::X86_64
    }

    /// The C compiler for programs of the guest.
    pub fn c_compiler(self) -> Result<Command> {
        let cross = format!("{}-linux-gnu-gcc", self.name());
        let name = if self == Arch::HOST { "cc" } else { &cross };
        Ok(Command::new(assets::tool(name)?))
    }

    /// A program of the guest, to be run here: under QEMU's user emulation if need be.
    pub fn run_here(self, program: &Path) -> Result<Command> {
        if self == Arch::HOST {
            return Ok(Command::new(program));
        }
        let mut emulator = Command::new(assets::tool(&format!("qemu-{}", self.name()))?);
        emulator.arg(program);
        Ok(emulator)
    }

    /// QEMU's machine and processor that are closest to Firecracker's.
    pub(crate) fn machine(self) -> [&'static str; 2] {
        match self {
            // The stock kernel finds virtio-mmio devices by ACPI alone. (QEMU
            // docs/system/i386/microvm.rst.)
            Arch::X86_64 => ["microvm,acpi=on,rtc=on", "qemu64"],
            // Here the device tree lists the devices. A guest spends most of its time on pointer authentication
            // if that is emulated with the architecture's own cipher. (docs/system/arm/virt.rst,
            // cpu-features.rst.)
            Arch::Aarch64 => ["virt,gic-version=3", "max,pauth-impdef=on"],
        }
    }

    /// What gives that machine PCI Express, where it has none by itself.
    pub(crate) fn pcie_on_qemu(self) -> &'static str {
        match self {
            Arch::X86_64 => ",pcie=on",
            Arch::Aarch64 => "",
        }
    }

    /// The machine on which QEMU's snapshots can be restored: vsock, which QEMU does not migrate, can
    /// be unplugged, and VMGenID has an ACPI node. (QEMU docs/specs/vmgenid.txt.)
    pub(crate) fn restorable_machine(self) -> Result<[&'static str; 2]> {
        match self {
            // Firecracker's processors have RDRAND. Without it, the kernel's generator takes a while to
            // be seeded, and until then says nothing of a new generation. (drivers/char/random.c,
            // add_vmfork_randomness)
            Arch::X86_64 => Ok(["q35", "qemu64,+rdrand"]),
            Arch::Aarch64 => bail!("snapshots on QEMU are for x86_64 guests"),
        }
    }

    /// Whether its kernel gives the first name, /dev/vda, to the last of that machine's disks.
    /// (QEMU hw/arm/virt.c, create_virtio_devices.)
    pub(crate) fn names_disks_backwards(self) -> bool {
        self == Arch::Aarch64
    }

    /// The console of that machine, or the 16550 that Firecracker has, and QEMU's option for it.
    pub(crate) fn console_on_qemu(self, firecrackers: bool) -> (&'static str, [&'static str; 2]) {
        match self {
            Arch::Aarch64 if !firecrackers => ("ttyAMA0", ["-serial", "chardev:console"]),
            Arch::Aarch64 => ("ttyS0", ["-device", "pci-serial,chardev=console"]),
            Arch::X86_64 => ("ttyS0", ["-serial", "chardev:console"]),
        }
    }

    /// Kernel parameters on QEMU. In deterministic time an instruction is a nanosecond, and a boot is as by
    /// default.
    pub(crate) fn parameters_on_qemu(self, deterministic: bool) -> Result<String> {
        let mut parameters = match deterministic {
            true => "nokaslr norandmaps".to_owned(),
            false => NO_SELF_TESTS.to_owned(),
        };
        match self {
            // With neither PIT nor HPET there is nothing to calibrate the TSC against.
            Arch::X86_64 => {
                let khz = match deterministic {
                    true => 1_000_000,
                    false => {
                        tsc::khz().context("an x86_64 guest needs the TSC of an x86_64 host")?
                    }
                };
                parameters += &format!(" tsc_early_khz={khz} tsc=reliable no_timer_check");
            }
            // Without a tick the clock of an idle guest goes ahead by seconds while it waits for a disk.
            Arch::Aarch64 if deterministic => parameters += " nohz=off",
            Arch::Aarch64 => {}
        }
        Ok(parameters)
    }

    /// Kernel parameters on Firecracker.
    pub(crate) fn parameters_on_firecracker(self) -> String {
        let devices = match self {
            Arch::X86_64 => "i8042.noaux i8042.nomux i8042.nopnp pci=off",
            Arch::Aarch64 => "keep_bootcon",
        };
        format!("{devices} {NO_SELF_TESTS}")
    }
}

/// A distribution's kernel tests its ciphers at each boot: three quarters of the instructions of Debian's.
const NO_SELF_TESTS: &str = "cryptomgr.notests";
