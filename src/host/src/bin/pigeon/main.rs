//! `pigeon`: micro-VMs of container images from the command line.

mod cp;
mod exec;
mod lifecycle;
mod logs;
mod mounts;
mod output;
mod ports;
mod rootfs;
mod run;
mod segments;
mod shell;
mod snapshot;
mod suggest;
mod target;
mod terminal;
mod vms;
mod workload;

use std::{path::PathBuf, process::ExitCode, thread};

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use pigeon::{Arch, Error};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

use output::note;
use target::Target;

/// Exit code of this command's own failures, as in docker.
const FAILED: u8 = 125;
/// Exit codes when a command could not be started in the VM: not executable, not found.
const CANNOT_START: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Runs container images in micro-VMs, and controls them.
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
    /// Show the output of a VM's workload
    Logs(logs::Logs),
    /// Run a command in a VM
    Exec(exec::Exec),
    /// Attach to a named session, or list the sessions
    Attach(exec::Attach),
    /// Copy files from or to a VM
    Cp(cp::Cp),
    /// Mount a volume in a VM that runs
    Mount(mounts::MountVolume),
    /// Unmount a volume in a VM that runs
    #[command(visible_alias = "umount")]
    Unmount(mounts::UnmountVolume),
    /// Forward TCP ports of the host to a VM until Ctrl-C
    Forward(ports::ForwardPorts),
    /// Send a signal to a VM's workload
    Signal(lifecycle::SendSignal),
    /// Kill the workload of VMs, or send it another signal
    Kill(lifecycle::Kill),
    /// Stop VMs
    Stop(lifecycle::Stop),
    /// Start VMs that have ended, as they were run
    Start(run::Start),
    /// Stop VMs, and start them as they were run
    Restart(run::Restart),
    /// Wait for the end of a VM and print its workload's exit code
    Wait(lifecycle::Wait),
    /// Remove VMs that have ended: record, logs and console
    Rm(lifecycle::Rm),
    /// Show details of VMs as JSON
    Inspect(lifecycle::Inspect),
    /// Show a VM's resource usage
    Stats(lifecycle::Stats),
    /// Show the events of a VM, one JSON object a line
    Events(logs::Events),
    /// Check whether a VM is up
    Status(lifecycle::Status),
    /// Take a snapshot of a VM of `pigeon run --restorable`, which goes on
    Snapshot(snapshot::TakeSnapshot),
    /// Start VMs from a snapshot in the background and print their names
    Restore(run::Restore),
    /// Expose a VM's API on a Unix socket, for curl and other HTTP clients, until Ctrl-C
    Proxy(Proxy),
    /// Make a root image of a container image
    Rootfs(rootfs::Rootfs),
    /// Print a shell completion script
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

/// Parses seconds of a timeout that the init gets, which refuses more than a day.
fn parse_timeout(text: &str) -> Result<f64, String> {
    const DAY: f64 = 86_400.0;
    let seconds = text.parse().ok();
    let seconds = seconds.filter(|seconds| (0.0..=DAY).contains(seconds));
    seconds.ok_or_else(|| format!("seconds from 0 to {DAY}, which is a day, are expected"))
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let error = suggest::complete(error);
            let _ = error.print();
            // Requested help is not a failure.
            return ExitCode::from(if error.use_stderr() { FAILED } else { 0 });
        }
    };
    pigeon::process::raise_open_files();
    match act(cli.action) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            if !error.is::<output::NoReader>() {
                note!("{error:#}");
            }
            if let Some(hint) = hint(&error) {
                use std::io::Write;
                let _ = writeln!(std::io::stderr(), "  {hint}");
            }
            ExitCode::from(output::exit_code(&error))
        }
    }
}

fn act(action: Action) -> Result<u8> {
    match action {
        Action::Run(run) => return run.run(),
        Action::Exec(exec) => return exec.run(),
        Action::Attach(attach) => return attach.run(),
        Action::Restore(restore) => return restore.run(),
        Action::Start(start) => return start.run(),
        Action::Restart(restart) => return restart.run(),
        Action::Snapshot(snapshot) => return snapshot.run(),
        Action::Ps(ps) => ps.run(),
        Action::Logs(logs) => logs.run(),
        Action::Cp(cp) => {
            remove_scratch_on_signals()?;
            cp.run()
        }
        Action::Mount(mount) => mount.run(),
        Action::Unmount(unmount) => unmount.run(),
        Action::Forward(forward) => forward.run(),
        Action::Signal(signal) => signal.run(),
        Action::Stop(stop) => stop.run(),
        Action::Kill(kill) => kill.run(),
        Action::Wait(wait) => wait.run(),
        Action::Rm(rm) => rm.run(),
        Action::Inspect(inspect) => inspect.run(),
        Action::Stats(stats) => stats.run(),
        Action::Events(events) => events.run(),
        Action::Status(status) => status.run(),
        Action::Rootfs(rootfs) => {
            remove_scratch_on_signals()?;
            rootfs.run()
        }
        Action::Completions(completions) => completions.run(),
        Action::Man(man) => man.run(),
        Action::Proxy(Proxy { target, socket }) => {
            let mut signals = catch(&[SIGHUP, SIGINT, SIGTERM])?;
            let client = target.client(None)?;
            let _proxy = pigeon::proxy::Proxy::start(&socket, client.uds())?;
            signals.forever().next();
            Ok(())
        }
    }?;
    Ok(0)
}

/// Whether this process was started with a signal ignored (nohup(1)).
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.unwrap_or(0) >> (signal - 1) & 1 == 1
}

/// Handles signals that end this command. An ignored SIGHUP stays ignored, so that with nohup(1) the command
/// continues when its terminal is closed.
fn catch(signals: &[i32]) -> std::io::Result<Signals> {
    let signals = signals.iter().copied();
    Signals::new(signals.filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP)))
}

/// Removes scratch directories when a signal terminates this process.
fn remove_scratch_on_signals() -> Result<()> {
    // Ignored signals stay ignored (nohup(1)).
    let signals = [SIGHUP, SIGINT, SIGTERM];
    let mut signals = Signals::new(signals.into_iter().filter(|signal| !is_ignored(*signal)))?;
    thread::spawn(move || {
        for signal in signals.forever() {
            let _guard = pigeon::scratch::remove_all();
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// Advice for an error.
fn hint(error: &anyhow::Error) -> Option<&'static str> {
    let error = error.downcast_ref::<Error>()?;
    Some(match error {
        Error::NoVm { .. } => {
            "No VM is listening on that socket. `pigeon ps` lists those of `pigeon run`; for other \
             VMs pass the vsock's uds_path as --uds, without a port suffix."
        }
        Error::NotListening { .. } => {
            "The VM's socket exists, but its init does not answer: look at its console. It may still \
             be booting (--boot-timeout waits longer), have failed, or lack a vsock driver."
        }
        Error::Refused {
            status: 409,
            message,
        } if message.starts_with("the workload") => {
            "The workload has exited, or is frozen for a snapshot."
        }
        Error::Refused { status: 503, .. } => "The VM has reached its connection limit: try again.",
        // The init's messages for a call that it does not have.
        Error::Refused {
            status: 404 | 405,
            message,
        } if message == "no such path" || message == "method not allowed" => {
            "The init does not know this call: was it built without this feature?"
        }
        Error::TimedOut(_) => {
            "The VM is there, but its init is stuck or far too busy. `pigeon kill` ends it, whatever \
             it does."
        }
        Error::Broken(_) => "The VM may have stopped: look at its console.",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn a_timeout_is_at_most_a_day() {
        for text in ["0", "0.2", "86400", "1e3"] {
            assert_eq!(parse_timeout(text), Ok(text.parse().unwrap()), "{text}");
        }
        for text in ["-1", "86401", "1e19", "inf", "nan", "", "x"] {
            assert!(parse_timeout(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_command_line_definition_is_valid() {
        Cli::command().debug_assert();
    }
}
