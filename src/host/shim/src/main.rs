//! containerd's shim for containers that are pigeon VMs: `io.containerd.pigeon.v2`.
//!
//! containerd starts it as `containerd-shim-pigeon-v2 … start` for a container, talks to it over ttrpc until
//! the container is deleted, and cleans up after a dead one by `… delete`. (containerd
//! core/runtime/v2/README.md) Each container has one process and one VM.

mod bootstrap;
mod container;
mod events;
mod flags;
mod images;
mod launch;
mod log;
mod logger;
mod metrics;
mod process;
mod rootfs;
mod service;
mod spec;
mod state;
mod stdio;
mod user;
mod vm;

use std::process::ExitCode;

use anyhow::{Result, bail};

use flags::Flags;

/// The runtime's name in containerd.
const RUNTIME: &str = "io.containerd.pigeon.v2";

fn main() -> ExitCode {
    match Flags::parse(std::env::args().skip(1)).and_then(|flags| run(&flags)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-pigeon-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Waits until a condition holds. A file closed by a test stays open in a process that another test starts,
/// until its execve.
#[cfg(test)]
fn soon(mut is_so: impl FnMut() -> bool) -> bool {
    use std::{thread, time::Duration};
    (0..2000).any(|_| {
        let is = is_so();
        if !is {
            thread::sleep(Duration::from_millis(5));
        }
        is
    })
}

fn run(flags: &Flags) -> Result<()> {
    if flags.version {
        println!("containerd-shim-pigeon-v2 {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return bootstrap::info();
    }
    match flags.action.as_str() {
        "start" => bootstrap::start(flags),
        "delete" => bootstrap::delete(flags),
        "" => bootstrap::serve(flags),
        action => bail!("there is no action {action}, but start and delete"),
    }
}
