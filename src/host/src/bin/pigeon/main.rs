//! `pigeon`: micro-VMs of container images from the command line.

mod exec;
mod rootfs;
mod run;
mod terminal;
mod vms;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use pigeon::{Arch, Client, Error};
use serde_json::{Value, json};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

/// Exit code of this command's own failures, as docker has it.
const FAILED: u8 = 125;
/// Exit code when a command could not be started in the VM: not executable, not found.
const CANNOT_START: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Runs container images in micro-VMs and steers them.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Boot a root image; the console is shown, Ctrl-C stops it, the exit code is the workload's
    Run(Box<run::Run>),
    /// Run a command in a VM
    Exec(exec::Exec),
    /// Send a signal to a VM's workload
    Signal(Signal),
    /// Wait for the end of a VM's workload and print its exit code
    Wait(Wait),
    /// Tell whether a VM is up
    Status(Status),
    /// Lead a Unix socket to a VM's API, for curl and other HTTP clients, until Ctrl-C
    Proxy(Proxy),
    /// List the VMs that run
    List(List),
    /// Make a root image (ext4) of a container image
    Rootfs(rootfs::Rootfs),
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

/// Which VM.
#[derive(Args)]
struct Target {
    /// The Unix socket of the VM's vsock
    #[arg(long, value_name = "SOCKET", env = "PIGEON_UDS")]
    uds: Option<PathBuf>,
    /// A VM of `pigeon run`; not needed while there is one only
    #[arg(long, value_name = "NAME", conflicts_with = "uds")]
    vm: Option<String>,
    /// How long to wait for a VM that still boots
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    patience: f64,
}

impl Target {
    fn client(&self) -> Result<Client> {
        let patience = Duration::try_from_secs_f64(self.patience).context("bad --patience")?;
        let name = match (&self.uds, &self.vm) {
            (Some(uds), _) => {
                // A socket that nobody has open will not get better: the VM is gone.
                let client = Client::connect(uds).or_else(|error| match error {
                    Error::NotListening { .. } => Client::connect_within(uds, patience),
                    error => Err(error),
                });
                return Ok(client?);
            }
            (None, Some(name)) => name.clone(),
            (None, None) => vms::only()?,
        };
        let deadline = Instant::now() + patience;
        loop {
            let uds = vms::find(&name)?;
            match Client::connect_within(&uds, Duration::from_millis(500)) {
                Err(error) if error.is_not_yet() && Instant::now() < deadline => {}
                client => return Ok(client?),
            }
        }
    }
}

#[derive(Args)]
struct Signal {
    #[command(flatten)]
    target: Target,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// A name or number: TERM, SIGTERM, 15
    #[arg(value_parser = parse_signal)]
    signal: u8,
}

#[derive(Args)]
struct Wait {
    #[command(flatten)]
    target: Target,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Status {
    #[command(flatten)]
    target: Target,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Proxy {
    #[command(flatten)]
    target: Target,
    /// The Unix socket to be made
    socket: PathBuf,
}

#[derive(Args)]
struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn parse_signal(text: &str) -> Result<u8, String> {
    pigeon::signal::number(text).ok_or_else(|| "names are as in kill -l, numbers 1 to 64".into())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match act(cli.action) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("pigeon: {error:#}");
            if let Some(hint) = hint(&error) {
                eprintln!("  {hint}");
            }
            ExitCode::from(FAILED)
        }
    }
}

fn act(action: Action) -> Result<u8> {
    match action {
        Action::Run(run) => run.run(),
        Action::Exec(exec) => exec.run(),
        Action::Rootfs(rootfs) => rootfs.run().map(|()| 0),
        Action::Signal(Signal {
            target,
            json,
            signal,
        }) => {
            target.client()?.signal(signal)?;
            say(json, json!({"ok": true}), "");
            Ok(0)
        }
        Action::Wait(Wait { target, json }) => {
            let exit = target.client()?.exit_code()?;
            if exit.oom_killed && !json {
                eprintln!("pigeon: the kernel killed it, out of memory");
            }
            if let Some(error) = exit.error.as_ref().filter(|_| !json) {
                eprintln!("pigeon: it could not be run: {error}");
            }
            say(json, json!(exit), &exit.code.to_string());
            Ok(0)
        }
        Action::Status(Status { target, json }) => {
            let client = target.client()?;
            let uds = client.uds().display().to_string();
            say(json, json!({"ok": true, "uds": uds}), &format!("up: {uds}"));
            Ok(0)
        }
        Action::Proxy(Proxy { target, socket }) => {
            let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
            let client = target.client()?;
            let _proxy = pigeon::proxy::Proxy::start(&socket, client.uds())?;
            signals.forever().next();
            Ok(0)
        }
        Action::List(List { json }) => {
            let vms = vms::all()?;
            if json {
                let vms = vms
                    .iter()
                    .map(|(name, uds)| json!({"vm": name, "uds": uds}));
                println!("{}", Value::Array(vms.collect()));
            } else {
                for (name, uds) in &vms {
                    println!("{name}\t{}", uds.display());
                }
            }
            Ok(0)
        }
    }
}

/// Prints a result.
fn say(json: bool, value: Value, text: &str) {
    if json {
        println!("{value}");
    } else if !text.is_empty() {
        println!("{text}");
    }
}

/// What to do about an error.
fn hint(error: &anyhow::Error) -> Option<&'static str> {
    let error = error.downcast_ref::<Error>()?;
    Some(match error {
        Error::NoVm { .. } => {
            "There is no VM at that socket (any more). `pigeon list` shows those of `pigeon run`; \
             for another, give the vsock's uds_path as --uds, not that of a port."
        }
        Error::NotListening { .. } => {
            "The VM's socket is there, but its init does not answer: look at its console. It may \
             still boot (--patience waits longer), have failed, or have no vsock driver."
        }
        Error::Refused { status: 409, .. } => "Its workload has ended.",
        Error::Refused { status: 503, .. } => "It has as many connections as it can: try again.",
        Error::Refused { status: 404, .. } => {
            "Is that socket pigeon-init's? It knows no such call."
        }
        Error::Broken(_) => "The VM may have ended meanwhile: look at its console.",
        _ => return None,
    })
}
