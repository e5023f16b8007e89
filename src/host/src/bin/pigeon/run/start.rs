//! `pigeon start` and `pigeon restart`: VMs that have ended, run again as they were.

use std::{env, ffi::OsString, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser};
use pigeon::progress::Progress;

use super::{Options, Run, detach};
use crate::{
    lifecycle::{for_each, stop},
    output::say,
    terminal,
    vms::{self, Launch, Vm},
};

/// How often a record is polled.
const REFRESH: Duration = Duration::from_millis(50);

#[derive(Args)]
pub struct Start {
    /// VMs that have ended; optional if there is only one
    names: Vec<String>,
    /// Run it in the foreground, as `pigeon run` does without -d
    #[arg(short, long, visible_short_alias = 'i', overrides_with = "attach")]
    attach: bool,
    /// Return when the workload runs or, if it has a health check, is healthy
    #[arg(long, conflicts_with = "attach")]
    wait: bool,
}

impl Start {
    pub fn run(&self) -> Result<u8> {
        let names = names_or_only(&self.names)?;
        ensure!(
            !self.attach || names.len() == 1,
            "one VM at a time can be attached to"
        );
        if self.attach || detach::is_detached() {
            return again(&vms::find(&names[0])?, !self.attach);
        }
        let mut failed = 0;
        for_each(&names, |name| {
            let vm = vms::find(name)?;
            if !vm.running {
                command_of(&vm, true)?;
                if let Err(code) = start_detached(name, self.wait)? {
                    failed = code;
                    return Ok(());
                }
            }
            say!("{name}")
        })?;
        Ok(failed)
    }
}

#[derive(Args)]
pub struct Restart {
    /// VMs, running or ended; optional if there is only one
    names: Vec<String>,
    /// How long the workload may take to exit before it is killed [default: run's --stop-timeout]
    #[arg(short, long, value_name = "SECONDS", value_parser = crate::parse_timeout)]
    timeout: Option<f64>,
    /// Use this signal instead of the image's stop signal
    #[arg(short, long, value_parser = crate::parse_signal)]
    signal: Option<u8>,
    /// Return when the workload runs or, if it has a health check, is healthy
    #[arg(long)]
    wait: bool,
}

impl Restart {
    pub fn run(&self) -> Result<u8> {
        let mut failed = 0;
        for_each(&names_or_only(&self.names)?, |name| {
            let vm = vms::find(name)?;
            command_of(&vm, true)?;
            let mut announced = None;
            if vm.running {
                announced = Some(vm.announce_restart()?);
                stop(&vm, self.signal, vm.record.stop_timeout(self.timeout)?)?;
            }
            if let Err(code) = start_detached(name, self.wait)? {
                failed = code;
                return Ok(());
            }
            drop(announced);
            say!("{name}")
        })?;
        Ok(failed)
    }
}

/// The given names, or the name of the only VM.
fn names_or_only(names: &[String]) -> Result<Vec<String>> {
    match names {
        [] => Ok(vec![vms::only()?.record.name]),
        names => Ok(names.to_vec()),
    }
}

/// Starts a VM in its own process. Returns the exit code on failure.
fn start_detached(name: &str, wait: bool) -> Result<Result<(), u8>> {
    let arguments = ["start", "--", name].map(OsString::from);
    Ok(match detach::start(arguments)? {
        Ok(name) => {
            if wait {
                wait_until_up(&name)?;
            }
            Ok(())
        }
        Err(code) => Err(code),
    })
}

/// Runs a VM again with its options, and waits until it has ended. Returns the exit code.
fn again(vm: &Vm, detached: bool) -> Result<u8> {
    let (launch, mut run) = command_of(vm, detached)?;
    enter(launch)?;
    (run.detach, run.json) = (detached, false);
    terminal::check(run.interactive, run.tty)?;
    let root = run.check_image()?;
    run.check_memory()?;
    run.kernel()?; // as in `Run::run`
    let mut plan = run.plan_of(vm.record.config.clone())?;
    plan.unkept.clear(); // reported by the first run
    run.boot(vms::claim_again(vm)?, plan, root)
}

/// The options that a VM was run with.
fn command_of(vm: &Vm, detached: bool) -> Result<(&Launch, Run)> {
    let name = &vm.record.name;
    let launch = vm.record.launch.as_ref();
    let launch = launch.with_context(|| {
        format!("{name} was not started by `pigeon run`: its options are not known")
    })?;
    let words = ["pigeon"].into_iter().map(String::from);
    let words = words.chain(launch.arguments.iter().cloned());
    let run = Options::try_parse_from(words)?.run;
    ensure!(
        !detached || !(run.interactive || run.tty),
        "{name} was run with -i or -t: `pigeon start --attach {name}` starts it on this terminal"
    );
    Ok((launch, run))
}

/// Restores the working directory and environment of a recorded command line.
fn enter(launch: &Launch) -> Result<()> {
    let directory = &launch.directory;
    env::set_current_dir(directory)
        .with_context(|| format!("unable to enter {}", directory.display()))?;
    for name in Launch::VARIABLES {
        // SAFETY: this process has one thread until a VM is booted.
        unsafe {
            match launch.environment.get(name) {
                Some(value) => env::set_var(name, value),
                None => env::remove_var(name),
            }
        }
    }
    Ok(())
}

/// Waits until the workload of a VM runs or, if it has a health check, is healthy.
pub fn wait_until_up(name: &str) -> Result<()> {
    let _waiting = Progress::spinner("waiting for the workload");
    loop {
        let record = vms::find_running(name)?.record;
        match record.health.as_deref() {
            Some("healthy") => return Ok(()),
            Some("unhealthy") => {
                bail!("{name} is unhealthy; `pigeon logs {name}` shows its output")
            }
            None if record.up.is_some() => return Ok(()),
            _ => thread::sleep(REFRESH),
        }
    }
}
