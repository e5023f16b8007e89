//! The guest's programs of the benchmark's own, compiled from `tests/bench`.

use std::{path::PathBuf, process::Command};

use anyhow::Result;
use pigeon_lab::{assets, process::run};
use tempfile::TempDir;

/// Static, without libc and without what only a linker or debugger reads: small, so that the disk
/// they are read from is not what is measured.
const FLAGS: [&str; 15] = [
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
    "-fcf-protection=none",
    "-fno-pie",
    "-no-pie",
    "-Wl,--build-id=none,-z,noseparate-code",
    "-s",
];

/// The compiled programs, in a directory that goes with this.
pub struct Programs {
    dir: TempDir,
}

impl Programs {
    /// Compiles them all.
    pub fn compile() -> Result<Programs> {
        let dir = tempfile::tempdir()?;
        for name in ["load", "floor", "workload"] {
            let source = assets::repository().join(format!("tests/bench/{name}.c"));
            run(Command::new(assets::tool("cc")?)
                .args(FLAGS)
                .arg("-o")
                .arg(dir.path().join(name))
                .arg(source))?;
        }
        Ok(Programs { dir })
    }

    /// The path of one.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}
