//! The two architectures that Firecracker supports, and the differences between their guests.

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
    /// The host's.
    pub const HOST: Arch = if cfg!(target_arch = "aarch64") {
        Arch::Aarch64
    } else {
        Arch::X86_64
    };

    /// The architecture in `PIGEON_ARCH`, as set by `./build.sh … --arch`; the host's if unset.
    pub fn chosen() -> Result<Arch> {
        match env::var("PIGEON_ARCH") {
            Err(_) => Ok(Arch::HOST),
            Ok(name) => match Arch::from_str(&name, false) {
                Ok(arch) => Ok(arch),
                Err(_) => bail!("PIGEON_ARCH={name}: must be x86_64 or aarch64"),
            },
        }
    }

    /// Its name in the kernel, QEMU and Rust.
    pub fn name(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86_64",
            Arch::Aarch64 => "aarch64",
        }
    }

    /// Its name in Debian, Go and container images.
    pub fn debian_name(self) -> &'static str {
        match self {
            Arch::X86_64 => "amd64",
            Arch::Aarch64 => "arm64",
        }
    }

    /// The platform in an image's configuration, such as `linux/arm64`.
    pub fn platform(self) -> String {
        format!("linux/{}", self.debian_name())
    }

    /// Whether its machines have a keyboard controller (i8042), which Ctrl-Alt-Del needs.
    pub fn has_keyboard(self) -> bool {
        self == Arch::X86_64
    }

    /// The C compiler for guest programs.
    pub fn c_compiler(self) -> Result<Command> {
        let cross = format!("{}-linux-gnu-gcc", self.name());
        let name = if self == Arch::HOST { "cc" } else { &cross };
        Ok(Command::new(assets::tool(name)?))
    }

    /// Runs a guest program on the host, with QEMU's user emulation if necessary.
    pub fn run_here(self, program: &Path) -> Result<Command> {
        if self == Arch::HOST {
            return Ok(Command::new(program));
        }
        let mut emulator = Command::new(assets::tool(&format!("qemu-{}", self.name()))?);
        emulator.arg(program);
        Ok(emulator)
    }

    /// QEMU's machine and processor closest to Firecracker's.
    pub(crate) fn machine(self) -> [&'static str; 2] {
        match self {
            // The stock kernel finds virtio-mmio devices only by ACPI. (QEMU docs/system/i386/microvm.rst.)
            Arch::X86_64 => ["microvm,acpi=on,rtc=on", "qemu64"],
            // The device tree lists the devices. With the architected cipher, a guest would spend most of its
            // time on emulated pointer authentication. (docs/system/arm/virt.rst, cpu-features.rst.)
            Arch::Aarch64 => ["virt,gic-version=3", "max,pauth-impdef=on"],
        }
    }

    /// The machine option that adds PCI Express, if the machine does not have it by default.
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
            // Firecracker's processors have RDRAND. Without it, the kernel's random number generator is
            // seeded late, and reports no new generation until then. (drivers/char/random.c,
            // add_vmfork_randomness)
            Arch::X86_64 => Ok(["q35", "qemu64,+rdrand"]),
            Arch::Aarch64 => bail!("snapshots on QEMU are for x86_64 guests"),
        }
    }

    /// Whether its kernel names that machine's disks in reverse order: the last one is /dev/vda. (QEMU
    /// hw/arm/virt.c, create_virtio_devices.)
    pub(crate) fn names_disks_backwards(self) -> bool {
        self == Arch::Aarch64
    }

    /// The console of that machine, or Firecracker's 16550, and QEMU's option for it.
    pub(crate) fn console_on_qemu(self, firecrackers: bool) -> (&'static str, [&'static str; 2]) {
        match self {
            Arch::Aarch64 if !firecrackers => ("ttyAMA0", ["-serial", "chardev:console"]),
            Arch::Aarch64 => ("ttyS0", ["-device", "pci-serial,chardev=console"]),
            Arch::X86_64 => ("ttyS0", ["-serial", "chardev:console"]),
        }
    }

    /// Kernel parameters on QEMU. With `deterministic`, an instruction takes a nanosecond, and the kernel's defaults
    /// apply.
    pub(crate) fn parameters_on_qemu(self, deterministic: bool) -> Result<String> {
        let mut parameters = match deterministic {
            true => "nokaslr norandmaps".to_owned(),
            false => NO_SELF_TESTS.to_owned(),
        };
        match self {
            // There is neither PIT nor HPET to calibrate the TSC against.
            Arch::X86_64 => {
                let khz = match deterministic {
                    true => 1_000_000,
                    false => {
                        tsc::khz().context("an x86_64 guest needs the TSC of an x86_64 host")?
                    }
                };
                parameters += &format!(" tsc_early_khz={khz} tsc=reliable no_timer_check");
            }
            // Without a tick, the clock of an idle guest gains seconds while it waits for a disk.
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
