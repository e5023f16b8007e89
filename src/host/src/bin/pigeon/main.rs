//! `pigeon`: micro-VMs of container images from the command line.

mod cp;
mod exec;
mod lifecycle;
mod logs;
mod output;
mod ports;
mod rootfs;
mod run;
mod shell;
mod target;
mod terminal;
mod vms;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use pigeon::{Arch, Error};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use output::note;
use target::Target;

/// Exit code of this command's own failures, as docker has it.
const FAILED: u8 = 125;
/// Exit code when a command could not be started in the VM: not executable, not found.
const CANNOT_START: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Runs container images in micro-VMs and steers them.
#[derive(Parser)]
#[command(name = "pigeon", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Boot a root image; the console is shown, Ctrl-C stops it, the exit code is the workload's
    Run(Box<run::Run>),
    /// List the VMs that run
    #[command(visible_alias = "list")]
    Ps(lifecycle::Ps),
    /// Show what a VM's workload has written
    Logs(logs::Logs),
    /// Run a command in a VM
    Exec(exec::Exec),
    /// Go on with a command that has a name, or list those
    Attach(exec::Attach),
    /// Copy files from or to a VM
    Cp(cp::Cp),
    /// Lead TCP ports of the host to ports of a VM, until Ctrl-C
    Forward(ports::ForwardPorts),
    /// Send a signal to a VM's workload
    #[command(visible_alias = "kill")]
    Signal(lifecycle::SendSignal),
    /// Stop VMs
    Stop(lifecycle::Stop),
    /// Wait for the end of a VM's workload and print its exit code
    Wait(lifecycle::Wait),
    /// Remove what is kept of VMs that have ended
    Rm(lifecycle::Rm),
    /// Show all that is known of VMs, as JSON
    Inspect(lifecycle::Inspect),
    /// Show what a VM uses
    Stats(lifecycle::Stats),
    /// Show what has happened to a VM: a line of JSON for each event
    Events(logs::Events),
    /// Tell whether a VM is up
    Status(lifecycle::Status),
    /// Lead a Unix socket to a VM's API, for curl and other HTTP clients, until Ctrl-C
    Proxy(Proxy),
    /// Make a root image of a container image
    Rootfs(rootfs::Rootfs),
    /// Print a script that completes this command's words in a shell
    Completions(shell::Completions),
    /// Print the manual page
    Man(shell::Man),
}

/// What is to run in a VM, or runs in it.
#[derive(Args)]
struct Guest {
    /// The guest's architecture, also of an image that has several
    #[arg(
        long,
        env = "PIGEON_ARCH",
        default_value_t,
        value_enum,
        hide_env = true
    )]
    arch: Arch,
}

#[derive(Args)]
struct Proxy {
    #[command(flatten)]
    target: Target,
    /// The Unix socket to be made
    socket: PathBuf,
}

fn parse_signal(text: &str) -> Result<u8, String> {
    pigeon::signal::number(text)
        .ok_or_else(|| "names are as in kill -l, also SIGRTMIN+N; numbers are 1 to 64".into())
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // Help that was asked for is no failure.
            return ExitCode::from(if error.use_stderr() { FAILED } else { 0 });
        }
    };
    match act(cli.action) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            note!("{error:#}");
            if let Some(hint) = hint(&error) {
                use std::io::Write;
                let _ = writeln!(std::io::stderr(), "  {hint}");
            }
            ExitCode::from(FAILED)
        }
    }
}

fn act(action: Action) -> Result<u8> {
    match action {
        Action::Run(run) => return run.run(),
        Action::Exec(exec) => return exec.run(),
        Action::Attach(attach) => return attach.run(),
        Action::Ps(ps) => ps.run(),
        Action::Logs(logs) => logs.run(),
        Action::Cp(cp) => cp.run(),
        Action::Forward(forward) => forward.run(),
        Action::Signal(signal) => signal.run(),
        Action::Stop(stop) => stop.run(),
        Action::Wait(wait) => wait.run(),
        Action::Rm(rm) => rm.run(),
        Action::Inspect(inspect) => inspect.run(),
        Action::Stats(stats) => stats.run(),
        Action::Events(events) => events.run(),
        Action::Status(status) => status.run(),
        Action::Rootfs(rootfs) => rootfs.run(),
        Action::Completions(completions) => completions.run(),
        Action::Man(man) => man.run(),
        Action::Proxy(Proxy { target, socket }) => {
            let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
            let client = target.client(None)?;
            let _proxy = pigeon::proxy::Proxy::start(&socket, client.uds())?;
            signals.forever().next();
            Ok(())
        }
    }?;
    Ok(0)
}

/// What to do about an error.
fn hint(error: &anyhow::Error) -> Option<&'static str> {
    let error = error.downcast_ref::<Error>()?;
    Some(match error {
        Error::NoVm { .. } => {
            "There is no VM at that socket (any more). `pigeon ps` shows those of `pigeon run`; \
             for another, give the vsock's uds_path as --uds, not that of a port."
        }
        Error::NotListening { .. } => {
            "The VM's socket is there, but its init does not answer: look at its console. It may \
             still boot (--boot-timeout waits longer), have failed, or have no vsock driver."
        }
        Error::Refused { status: 409, .. } => "Its workload has ended, or is held for a snapshot.",
        Error::Refused { status: 503, .. } => "It has as many connections as it can: try again.",
        // The init's words for a call that it has not.
        Error::Refused {
            status: 404 | 405,
            message,
        } if message == "no such path" || message == "method not allowed" => {
            "Is that socket pigeon-init's, and was its init built with this feature? It knows no \
             such call."
        }
        Error::Broken(_) => "The VM may have ended meanwhile: look at its console.",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_commands_are_sound() {
        Cli::command().debug_assert();
    }
}
