//! Kernels, programs and archives for the VMs: [`pigeon::assets`] for the architecture under test.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use crate::process::run;
use anyhow::Result;
pub use pigeon::assets::{Kernel, cache_dir, is_minimal, python, repository, tool};
use pigeon::{Arch, assets};

/// The architecture of the guests: `PIGEON_ARCH`, as `./build.sh test --arch` sets it.
pub fn arch() -> Arch {
    static ARCH: LazyLock<Arch> = LazyLock::new(|| Arch::chosen().expect("a known architecture"));
    *ARCH
}

/// The `firecracker` binary, if it can run guests of this architecture.
pub fn firecracker() -> Option<PathBuf> {
    assets::firecracker().filter(|_| arch() == Arch::HOST)
}

/// The build's output directory.
pub fn build_dir() -> PathBuf {
    assets::build_dir(arch())
}

/// `build/initrd.cpio`, the archive under test.
pub fn initrd() -> Result<Vec<u8>> {
    assets::initrd(arch())
}

/// The kernel of the VMs: `PIGEON_KERNEL`, as `./build.sh test --kernel` sets it, or Debian's cloud
/// kernel.
pub fn kernel() -> Result<Kernel> {
    Kernel::chosen(arch())
}

/// The kernel of VMs whose snapshots are restored.
pub fn restorable_kernel() -> Result<Kernel> {
    Kernel::restorable(arch())
}

/// The cgroup v1 controllers that [`kernel`] lacks.
pub fn missing_v1_controllers() -> Result<Vec<&'static str>> {
    let kernel = kernel()?;
    let mut missing = vec![];
    for (controller, option) in [("memory", "MEMCG_V1"), ("cpuset", "CPUSETS_V1")] {
        if kernel.is_without(option)? {
            missing.push(controller);
        }
    }
    Ok(missing)
}

/// A module of [`kernel`] that VMs do not load by default.
pub fn module(name: &str) -> Result<Vec<u8>> {
    kernel()?.module(name)
}

/// A statically linked busybox.
pub fn busybox() -> Result<PathBuf> {
    assets::busybox(arch())
}

/// The contents of Debian packages, unpacked into one directory.
pub fn packages(names: &[&str]) -> Result<PathBuf> {
    assets::packages(arch(), names)
}

/// A tar archive of a Debian installation with these packages and the user `app`.
pub fn debian(packages: &[&str]) -> Result<PathBuf> {
    assets::debian(arch(), packages)
}

/// The C compiler for guest programs.
pub fn c_compiler() -> Result<Command> {
    arch().c_compiler()
}

/// A static guest program, compiled from `tests/vm/NAME.c`.
pub fn guest_program(name: &str) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join(name);
    let source = repository().join("tests/vm").join(name).with_extension("c");
    run(c_compiler()?
        .args(["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-o"])
        .args([&program, &source]))?;
    Ok(fs::read(program)?)
}

/// A command that runs a guest program on the host.
pub fn run_here(program: &Path) -> Result<Command> {
    arch().run_here(program)
}
