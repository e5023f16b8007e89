//! `pigeon ps`, `stop`, `kill`, `rm`, `inspect`, `wait`, `status`, `signal`, `stats`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pigeon::{Exit, progress::Progress};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    output::{NoReader, bytes, note, say, table},
    run,
    target::Target,
    vms::{self, Vm},
    workload,
};

/// How long a VM may take to shut down, in addition to its workload's time.
const SHUTDOWN: Duration = Duration::from_secs(15);

#[derive(Args)]
pub struct Ps {
    /// Include VMs that have ended
    #[arg(short, long)]
    all: bool,
    /// Print only names
    #[arg(short, long)]
    quiet: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Ps {
    pub fn run(&self) -> Result<()> {
        let mut vms = vms::all()?;
        vms.retain(|vm| self.all || vm.running);
        if self.json {
            say!("{}", Value::Array(vms.iter().map(describe).collect()))?;
        } else if self.quiet {
            for vm in &vms {
                say!("{}", vm.record.name)?;
            }
        } else {
            let row = |vm: &Vm| {
                let image = vm.record.image.file_name().unwrap_or_default();
                vec![
                    vm.record.name.clone(),
                    vm.record.status(vm.running),
                    image.to_string_lossy().into_owned(),
                    command_line(&vm.record.config),
                    vm.record.ports.join(", "),
                ]
            };
            let rows: Vec<_> = vms.iter().map(row).collect();
            table(&["NAME", "STATUS", "IMAGE", "COMMAND", "PORTS"], &rows)?;
        }
        Ok(())
    }
}

/// The command of a configuration, truncated.
fn command_line(config: &Value) -> String {
    const WIDTH: usize = 32;
    let words = run::argv(config);
    let line = words.join(" ").replace(['\n', '\t'], " ");
    match line.char_indices().nth(WIDTH) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

/// The details of a VM, as JSON.
fn describe(vm: &Vm) -> Value {
    let mut value = json!(vm.record);
    value["vm"] = json!(vm.record.name);
    value["running"] = json!(vm.running);
    value["status"] = json!(vm.record.status(vm.running));
    value["directory"] = json!(vm.dir);
    value
}

#[derive(Args)]
pub struct Inspect {
    /// VMs; optional if there is only one
    names: Vec<String>,
}

impl Inspect {
    pub fn run(&self) -> Result<()> {
        let vms = match &self.names[..] {
            [] => vec![vms::only()?],
            names => names
                .iter()
                .map(|name| vms::find(name))
                .collect::<Result<_>>()?,
        };
        let described: Vec<_> = vms.iter().map(describe).collect();
        say!("{}", serde_json::to_string_pretty(&described)?)?;
        Ok(())
    }
}

#[derive(Args)]
pub struct Stop {
    /// VMs; optional if there is only one
    names: Vec<String>,
    #[command(flatten)]
    target: Target,
    /// How long the workload may take to exit before it is killed [default: run's --stop-timeout]
    #[arg(short, long, value_name = "SECONDS", value_parser = crate::parse_timeout)]
    timeout: Option<f64>,
    /// Use this signal instead of the image's stop signal
    #[arg(short, long, value_parser = crate::parse_signal)]
    signal: Option<u8>,
}

impl Stop {
    pub fn run(&self) -> Result<()> {
        let stop = |vm: &Vm| {
            stop(vm, self.signal, vm.record.stop_timeout(self.timeout)?)?;
            say!("{}", vm.record.name)
        };
        if self.names.is_empty() {
            return match self.target.vm(None)? {
                Some(vm) => stop(&vm),
                // Only its API is known, so the end of the VM is not awaited.
                None => {
                    let timeout = vms::Record::default().stop_timeout(self.timeout)?;
                    Ok(self.target.client(None)?.stop(self.signal, Some(timeout))?)
                }
            };
        }
        for_each(&self.names, |name| stop(&vms::find(name)?))
    }
}

/// Calls `act` for each VM, continuing after failures, as in docker. Errors are reported; the last one is
/// returned.
pub fn for_each(names: &[String], mut act: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let mut failed = Ok(());
    for name in names {
        match act(name) {
            Err(error) if error.is::<NoReader>() => return Err(error),
            Err(error) => {
                if let Err(earlier) = std::mem::replace(&mut failed, Err(error)) {
                    note!("{earlier:#}");
                }
            }
            Ok(()) => {}
        }
    }
    failed
}

/// Stops a VM; kills it if it does not stop.
pub fn stop(vm: &Vm, signal: Option<u8>, timeout: Duration) -> Result<()> {
    if !vm.running {
        return Ok(());
    }
    let _waiting = Progress::spinner("stopping");
    let deadline = Instant::now() + timeout + SHUTDOWN;
    let client = pigeon::Client::connect(&vm.record.uds).map_err(anyhow::Error::from);
    let wait = |timeout| vm.wait(timeout);
    let asked =
        client.and_then(|client| workload::stop(&vm.record, &client, signal, timeout, wait));
    // A VM that is booting, or whose init does not have the call, is stopped by its owner.
    if asked.is_err() {
        vm.signal_owner(Signal::TERM)?;
    }
    if !vm.wait(deadline.saturating_duration_since(Instant::now())) {
        note!("{} does not stop: killing it", vm.record.name);
        kill(vm)?;
    }
    Ok(())
}

/// Kills a VM. Its disks are no longer in use afterwards.
fn kill(vm: &Vm) -> Result<()> {
    // The second signal makes its owner kill the VM, and wait for the hypervisor to exit.
    vm.signal_owner(Signal::TERM)?;
    vm.signal_owner(Signal::INT)?;
    if !vm.wait(SHUTDOWN) {
        vm.signal_owner(Signal::KILL)?;
        ensure!(vm.wait(SHUTDOWN), "{} is still running", vm.record.name);
    }
    Ok(())
}

#[derive(Args)]
pub struct Kill {
    /// VMs
    #[arg(required = true)]
    names: Vec<String>,
    /// A name or number: HUP, SIGHUP, SIGRTMIN+3, 1
    #[arg(short, long, default_value = "KILL", value_parser = crate::parse_signal)]
    signal: u8,
}

impl Kill {
    pub fn run(&self) -> Result<()> {
        for_each(&self.names, |name| {
            let vm = vms::find_running(name)?;
            let client = pigeon::Client::connect(&vm.record.uds).map_err(anyhow::Error::from);
            let sent = client.and_then(|client| workload::signal(&vm.record, &client, self.signal));
            if i32::from(self.signal) != Signal::KILL.as_raw() {
                sent?;
            } else if sent.is_err() || !vm.wait(SHUTDOWN) {
                // No workload has started yet, or the VM does not end with it.
                kill(&vm)?;
            }
            say!("{name}")
        })
    }
}

#[derive(Args)]
pub struct Rm {
    /// VMs
    #[arg(required = true)]
    names: Vec<String>,
    /// Kill running VMs
    #[arg(short, long)]
    force: bool,
}

impl Rm {
    pub fn run(&self) -> Result<()> {
        for_each(&self.names, |name| {
            let vm = vms::find(name)?;
            if vm.running {
                ensure!(
                    self.force,
                    "{name} is running: `pigeon stop {name}` stops it, --force kills it"
                );
                kill(&vm)?;
            }
            vm.remove()?;
            say!("{name}")
        })
    }
}

#[derive(Args)]
pub struct Wait {
    /// A VM of `pigeon run`, running or ended; optional if there is only one
    name: Option<String>,
    #[command(flatten)]
    target: Target,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Wait {
    pub fn run(&self) -> Result<()> {
        let vm = self.target.vm(self.name.as_deref())?;
        let exit = match &vm {
            None => self.target.client(None)?.exit_code()?,
            Some(vm) if vm.running => {
                match self
                    .target
                    .client(Some(&vm.record.name))
                    .map(|c| c.exit_code())
                {
                    Ok(Ok(exit)) => {
                        // The VM shuts down now. If it was started again meanwhile, that is another run.
                        let is_same = |record: vms::Record| record.pid == vm.record.pid;
                        while !vm.wait(SHUTDOWN) && vm.reread().is_ok_and(is_same) {}
                        exit
                    }
                    // It ended before the call.
                    Ok(Err(_)) | Err(_) if vm.wait(SHUTDOWN) => recorded(vm)?,
                    Ok(Err(error)) => return Err(error.into()),
                    Err(error) => return Err(error),
                }
            }
            Some(vm) => recorded(vm)?,
        };
        let ended = vm.and_then(|vm| vm.reread().ok()?.end);
        if exit.oom_killed && !self.json {
            note!("the workload was killed: out of memory");
        }
        if let Some(error) = exit.error.as_ref().filter(|_| !self.json) {
            match ended.as_deref() {
                Some("killed") => note!("the VM was killed"),
                Some("panic") => note!("the guest's kernel panicked"),
                Some("hypervisor") => note!("the hypervisor failed"),
                _ => note!("the workload could not be started: {error}"),
            }
        }
        match self.json {
            true => say!("{}", json!(exit))?,
            false => say!("{}", exit.code)?,
        }
        Ok(())
    }
}

/// The recorded exit code of a VM that has ended.
fn recorded(vm: &Vm) -> Result<Exit> {
    let record = vm.reread()?;
    if let Some(exit) = record.exit {
        return Ok(exit);
    }
    let code = record.exit_code.map(i32::from);
    let code = code.with_context(|| {
        format!(
            "the exit code of {} is unknown: its end was not recorded",
            record.name
        )
    })?;
    Ok(Exit {
        code,
        oom_killed: false,
        error: record.end.filter(|end| end != "orderly"),
    })
}

#[derive(Args)]
pub struct Status {
    /// A VM of `pigeon run`; optional if only one is running
    name: Option<String>,
    #[command(flatten)]
    target: Target,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Status {
    pub fn run(&self) -> Result<()> {
        let client = self.target.client(self.name.as_deref())?;
        let uds = client.uds().display().to_string();
        match self.json {
            true => say!("{}", json!({"ok": true, "uds": uds}))?,
            false => say!("up: {uds}")?,
        }
        Ok(())
    }
}

#[derive(Args)]
pub struct SendSignal {
    /// A name or number: TERM, SIGTERM, SIGRTMIN+3, 15
    #[arg(value_parser = crate::parse_signal)]
    signal: u8,
    /// A VM of `pigeon run`; optional if only one is running
    name: Option<String>,
    #[command(flatten)]
    target: Target,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl SendSignal {
    pub fn run(&self) -> Result<()> {
        let name = self.name.as_deref();
        let client = self.target.client(name)?;
        match self.target.vm(name)? {
            Some(vm) => workload::signal(&vm.record, &client, self.signal)?,
            None => client.signal(self.signal)?,
        }
        if self.json {
            say!("{}", json!({"ok": true}))?;
        }
        Ok(())
    }
}

#[derive(Args)]
pub struct Stats {
    /// A VM of `pigeon run`; optional if only one is running
    name: Option<String>,
    #[command(flatten)]
    target: Target,
    /// Print the full answer as JSON
    #[arg(long)]
    json: bool,
}

impl Stats {
    pub fn run(&self) -> Result<()> {
        let info = self.target.client(self.name.as_deref())?.sysinfo()?;
        if self.json {
            say!("{info}")?;
            return Ok(());
        }
        let rows = summary(&info);
        if rows.is_empty() {
            bail!("unknown format: --json shows the answer");
        }
        table(&["RESOURCE", "USAGE"], &rows)?;
        Ok(())
    }
}

/// A summary for people.
fn summary(info: &Value) -> Vec<Vec<String>> {
    let number = |value: &Value| value.as_f64();
    let mut rows = vec![];
    let mut row = |what: &str, now: Option<String>| {
        if let Some(now) = now {
            rows.push(vec![what.to_string(), now]);
        }
    };
    let memory = &info["memory"];
    let size = |key: &str| number(&memory[key]).map(|size| bytes(size as u64));
    let of_total = |key: &str| {
        let total = size("mem_total");
        Some(format!("{} of {}", size(key)?, total?))
    };
    row("memory available", of_total("mem_available"));
    row("memory free", of_total("mem_free"));
    row("cached", size("cached"));
    let load = info["load_average"].as_array().map(|loads| {
        let loads = loads.iter().filter_map(number);
        loads
            .map(|load| format!("{load:.2}"))
            .collect::<Vec<_>>()
            .join(" ")
    });
    row("load average", load);
    let files = &info["filefd"];
    let open = number(&files["allocated"]).map(|open| format!("{open}"));
    row("open files", open);
    let cpus = info["cpus"]
        .as_object()
        .map(serde_json::Map::len)
        .or_else(|| info["cpus"].as_array().map(Vec::len));
    row("processors", cpus.map(|cpus| cpus.to_string()));
    let list = |key: &str| -> Vec<Value> { info[key].as_array().cloned().unwrap_or_default() };
    for disk in list("disks") {
        let name = disk["name"].as_str().unwrap_or("disk").to_string();
        let sectors = |key: &str| number(&disk[key]).map(|n| bytes(n as u64 * 512));
        let both = sectors("sectors_read").zip(sectors("sectors_written"));
        row(
            &name,
            both.map(|(read, written)| format!("{read} read, {written} written")),
        );
    }
    for net in list("net") {
        let name = net["name"].as_str().unwrap_or("net").to_string();
        let size = |key: &str| number(&net[key]).map(|n| bytes(n as u64));
        let both = size("recv_bytes").zip(size("sent_bytes"));
        row(
            &name,
            both.map(|(received, sent)| format!("{received} received, {sent} sent")),
        );
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_in_one_short_line() {
        let config = json!({"ImageConfig": {"Entrypoint": ["/app"], "Cmd": ["a\nb", "c"]}});
        assert_eq!(command_line(&config), "/app a b c");
        let config = json!({"ImageConfig": {"Entrypoint": ["/app"]}, "CmdOverride": "x y"});
        assert_eq!(command_line(&config), "/app x y");
        let config = json!({"ExecOverride": ["ü".repeat(40)]});
        assert_eq!(command_line(&config), format!("{}…", "ü".repeat(32)));
    }

    #[test]
    fn stats_show_the_guests_values() {
        let info = json!({
            "memory": {"mem_total": 256 << 20, "mem_available": 128 << 20},
            "load_average": [0.5, 0.25, 0.0],
            "net": [{"name": "eth0", "recv_bytes": 2048, "sent_bytes": 5}],
        });
        let rows = summary(&info);
        assert_eq!(rows[0], ["memory available", "128.0 MiB of 256.0 MiB"]);
        assert_eq!(rows[1], ["load average", "0.50 0.25 0.00"]);
        assert_eq!(rows[2], ["eth0", "2.0 KiB received, 5 B sent"]);
        assert!(summary(&json!({})).is_empty());
    }
}
