//! The benchmark's own guest programs, compiled from `tests/bench`.

use std::{io::Write, path::PathBuf};

use anyhow::Result;
use pigeon_lab::{Arch, assets, process::run};
use tempfile::TempDir;

use crate::trace::Names;

/// Static, without libc and without what only a linker or debugger reads: small, so that reading
/// them from the disk does not dominate.
const FLAGS: [&str; 14] = [
    "-std=gnu11",
    "-Os",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-static",
    "-nostdlib",
    "-ffreestanding",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-pie",
    "-no-pie",
    "-Wl,--build-id=none,-z,noseparate-code",
    "-s",
];

/// The compiled programs, in a temporary directory.
pub struct Programs {
    dir: TempDir,
}

impl Programs {
    /// Compiles them all.
    pub fn compile() -> Result<Programs> {
        let dir = tempfile::tempdir()?;
        const PARALLEL: &str = "-DPARALLEL";
        for (name, source, defines) in [
            ("load", "load", &[] as &[&str]),
            ("floor", "floor", &[]),
            ("parallel", "floor", &[PARALLEL]),
            ("floor-whole", "floor", &["-DWHOLE"]),
            ("parallel-whole", "floor", &[PARALLEL, "-DWHOLE"]),
            ("workload", "workload", &[]),
            ("servers", "servers", &[]),
        ] {
            let source = assets::repository().join(format!("tests/bench/{source}.c"));
            run(assets::c_compiler()?
                .args(FLAGS)
                .args(defines)
                .args((assets::arch() == Arch::X86_64).then_some("-fcf-protection=none"))
                .arg("-o")
                .arg(dir.path().join(name))
                .arg(source))?;
        }
        Ok(Programs { dir })
    }

    /// The names of the system calls, from the C headers.
    pub fn system_calls(&self) -> Result<Names> {
        let source = self.dir.path().join("names.c");
        std::fs::File::create(&source)?.write_all(b"#include <sys/syscall.h>\n")?;
        let macros = run(assets::c_compiler()?.args(["-E", "-dM"]).arg(source))?;
        let named = |line: &str| {
            let (name, number) = line.strip_prefix("#define __NR_")?.split_once(' ')?;
            Some((number.parse().ok()?, name.to_string()))
        };
        Ok(macros.lines().filter_map(named).collect())
    }

    /// The path of a program.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}
