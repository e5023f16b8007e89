//! The parts of a boot's or an end's time, from the kernel's own trace.
//! (Documentation/trace/ftrace.rst, kprobetrace.rst.)

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write,
};

use anyhow::{Context, Result};
use pigeon_lab::Arch;
use serde_json::{Value, json};

use crate::boots::Figures;

/// What the loader writes to tracefs before it executes /init: a file and its new line each.
pub fn orders(arch: Arch) -> String {
    // If the architecture has no event for page faults, their handler is traced.
    let faults = match arch {
        Arch::X86_64 => "events/exceptions/page_fault_user/enable 1\n",
        Arch::Aarch64 => "kprobe_events p:bench/page_fault_user handle_mm_fault\n",
    };
    [faults, ORDERS].concat()
}

const ORDERS: &str = "\
trace_clock mono
buffer_size_kb 8192
options/irq-info 0
kprobe_events p:bench/mounting path_mount source=+0($arg1):string kind=+0($arg3):string data=+0($arg5):string
kprobe_events p:bench/path getname path=+0($arg1):ustring
kprobe_events p:bench/path_at getname_flags path=+0($arg1):ustring
events/bench/enable 1
events/raw_syscalls/enable 1
events/sched/sched_switch/enable 1
events/sched/sched_process_fork/enable 1
events/sched/sched_process_exec/enable 1
";

/// The same for the end: the kernel prints the whole trace on the console when it restarts.
pub const ORDERS_AT_END: &str = "set_ftrace_filter kernel_restart:dump\n";

/// Shorter calls and gaps are not steps, in microseconds.
const STEP: f64 = 50.0;

/// Names of the system calls, by number.
pub type Names = HashMap<u32, String>;

/// A traced period.
pub struct Breakdown {
    /// Microseconds from its first to its last event.
    pub total: f64,
    /// Microseconds in which no process ran.
    pub idle: f64,
    pub processes: BTreeMap<u32, Process>,
    pub steps: Vec<Step>,
}

#[derive(Default)]
pub struct Process {
    pub name: String,
    /// Processor time in microseconds.
    pub cpu: f64,
    /// User space's part of it, unless a page fault follows.
    pub user: f64,
    pub calls: u32,
    pub faults: u32,
}

/// A long system call, or an event.
pub struct Step {
    /// Microseconds since the start.
    pub at: f64,
    pub process: u32,
    pub duration: f64,
    pub what: String,
}

struct Event<'a> {
    process: u32,
    comm: &'a str,
    /// Microseconds of the trace's clock.
    at: f64,
    kind: &'a str,
    text: &'a str,
}

/// The kinds of events that ORDERS enables.
const KINDS: [&str; 9] = [
    "sys_enter",
    "sys_exit",
    "sched_switch",
    "sched_process_fork",
    "sched_process_exec",
    "page_fault_user",
    "mounting",
    "path",
    "path_at",
];

/// A line of /sys/kernel/tracing/trace (`comm-pid [cpu] seconds: kind: text`), or of a dump on
/// the console (`[time] comm-pid cpu..... microseconds : kind: text`).
fn parse(line: &str) -> Option<Event<'_>> {
    let line = line.trim_start();
    let line = match line.strip_prefix('[') {
        Some(stamped) => stamped.split_once("] ")?.1,
        None => line,
    };
    let (kind, (head, text)) = KINDS.iter().find_map(|kind| {
        let middle = line.find(&format!(": {kind}: "))?;
        Some((*kind, (&line[..middle], &line[middle + kind.len() + 4..])))
    })?;
    let (head, time) = head.trim_end().rsplit_once(' ')?;
    let at = match time.strip_suffix("us") {
        Some(microseconds) => microseconds.parse().ok()?,
        None => time.parse::<f64>().ok()? * 1e6,
    };
    let (process, _cpu) = head.trim_end().rsplit_once(' ')?;
    let (comm, pid) = process.trim().rsplit_once('-')?;
    Some(Event {
        process: pid.parse().ok()?,
        comm,
        at,
        kind,
        text: text.trim_end(),
    })
}

/// The boot: from the exec of /init to the workload's first instruction.
pub fn boot(console: &str, from: f64, to: f64, names: &Names) -> Breakdown {
    let events = console.lines().filter_map(parse);
    // The exec starts a little after the loader has recorded the time.
    take_apart(
        events.filter(|event| (from..=to).contains(&event.at)),
        names,
    )
}

/// Length of the event `ready`.
const READY: usize = "{\"event\":\"ready\"}\n".len();

/// Microseconds from the return of PID 1's listen to that of the write of the event `ready`.
pub fn ready(console: &str, names: &Names) -> Result<f64> {
    let number = |name: &str| {
        let found = names.iter().find(|(_, n)| *n == name);
        let (number, _) = found.with_context(|| format!("no call {name}"))?;
        anyhow::Ok(format!("NR {number} = "))
    };
    let events = console.lines().filter_map(parse);
    let mut returns = events.filter(|event| event.process == 1 && event.kind == "sys_exit");
    let mut at = |text: &str| {
        let found = returns.find(|event| event.text == text);
        anyhow::Ok(found.with_context(|| format!("no {text:?} of PID 1"))?.at)
    };
    let listening = at(&(number("listen")? + "0"))?;
    Ok(at(&format!("{}{READY}", number("write")?))? - listening)
}

/// The end: from the workload's exit_group to PID 1's reboot.
pub fn end(console: &str, names: &Names) -> Result<Breakdown> {
    let number = |name| {
        names
            .iter()
            .find(|(_, n)| *n == name)
            .map(|(number, _)| number)
    };
    let entry = |name| anyhow::Ok(format!("NR {} (", number(name).context("no such call")?));
    let (exit, reboot) = (entry("exit_group")?, entry("reboot")?);
    let events: Vec<_> = console.lines().filter_map(parse).collect();
    let exit = |event: &Event| event.comm == "workload" && event.text.starts_with(&exit);
    let from = events.iter().rfind(|event| exit(event));
    let from = from.context("the workload's exit is not in the trace")?.at;
    let rebooted = |event: &&Event| event.process == 1 && event.text.starts_with(&reboot);
    let to = events
        .iter()
        .rfind(rebooted)
        .context("no reboot in the trace")?
        .at;
    Ok(take_apart(
        events
            .into_iter()
            .filter(|event| (from..=to).contains(&event.at)),
        names,
    ))
}

/// A system call that has been entered.
struct Call {
    at: f64,
    name: String,
    detail: String,
}

fn take_apart<'a>(events: impl Iterator<Item = Event<'a>>, names: &Names) -> Breakdown {
    let mut result = Breakdown {
        total: 0.0,
        idle: 0.0,
        processes: BTreeMap::new(),
        steps: vec![],
    };
    let mut calls = HashMap::<u32, Call>::new();
    let mut in_user_space = HashMap::<u32, bool>::new();
    let mut start = None;
    let mut last = None; // the running process, and since when
    for event in events {
        let start = *start.get_or_insert(event.at);
        let at = event.at - start;
        let pid = event.process;
        result.total = at;
        if let Some((running, since)) = last.replace((pid, at)) {
            let process = result.processes.entry(running).or_default();
            process.cpu += at - since;
            if in_user_space.get(&running) == Some(&true) {
                process.user += at - since;
            }
        }
        let process = result.processes.entry(pid).or_default();
        process.name = event.comm.into();
        let mut step = |duration, what| {
            let process = pid;
            result.steps.push(Step {
                at: at - duration,
                process,
                duration,
                what,
            });
        };
        in_user_space.insert(pid, event.kind == "sys_exit");
        match event.kind {
            "sys_enter" => {
                process.calls += 1;
                let (number, arguments) = event.text[3..].split_once(' ').unwrap_or_default();
                let name = number.parse().ok().and_then(|number| names.get(&number));
                let name = name.map_or(number, String::as_str).into();
                let detail = arguments.into();
                calls.insert(pid, Call { at, name, detail });
            }
            "sys_exit" => {
                if let Some(Call {
                    at: since,
                    name,
                    detail,
                }) = calls.remove(&pid)
                    && at - since >= STEP
                {
                    step(at - since, format!("{name} {detail}"));
                }
            }
            "mounting" | "path" | "path_at" => {
                if let Some(call) = calls.get_mut(&pid) {
                    let text = event
                        .text
                        .split_once(") ")
                        .map_or(event.text, |(_, text)| text);
                    if event.kind == "mounting" {
                        call.detail = text.replace("(fault)", "-");
                    } else if !call.detail.starts_with("path=") {
                        call.detail = text.into();
                    }
                }
            }
            "page_fault_user" => process.faults += 1,
            "sched_process_exec" => step(0.0, format!("runs {}", event.text)),
            "sched_process_fork" => {
                let child = event.text.rsplit_once('=').map_or("?", |(_, pid)| pid);
                step(0.0, format!("starts {child}"));
            }
            _ => {
                let next = event
                    .text
                    .rsplit_once("next_pid=")
                    .map_or("", |(_, next)| next);
                let next = next.split(' ').next().and_then(|next| next.parse().ok());
                last = next.map(|next| (next, at));
            }
        }
    }
    result.idle = result.processes.remove(&0).map_or(0.0, |idle| idle.cpu);
    result.steps.sort_by(|a, b| a.at.total_cmp(&b.at));
    result
}

impl Breakdown {
    /// As text: the processes' times, and what took long.
    pub fn show(&self, title: &str) -> String {
        let mut out = format!(
            "{title}: {:.3} ms traced, {:.3} of it idle\n",
            self.total / 1e3,
            self.idle / 1e3
        );
        let mut by_time: Vec<_> = self.processes.iter().collect();
        by_time.sort_by(|a, b| b.1.cpu.total_cmp(&a.1.cpu));
        out += "  on CPU   user  calls faults  process\n";
        for (pid, process) in by_time.iter().filter(|(_, process)| process.cpu >= STEP) {
            let Process {
                name,
                cpu,
                user,
                calls,
                faults,
            } = process;
            let (cpu, user) = (cpu / 1e3, user / 1e3);
            writeln!(
                out,
                "  {cpu:6.3} {user:6.3} {calls:6} {faults:6}  {name}-{pid}"
            )
            .expect("a String takes it all");
        }
        out += "      at   took  process: what\n";
        for Step {
            at,
            process,
            duration,
            what,
        } in &self.steps
        {
            let (at, duration) = (at / 1e3, duration / 1e3);
            writeln!(out, "  {at:6.3} {duration:6.3}  {process}: {what}")
                .expect("a String takes it all");
        }
        out
    }

    /// Adds the figures that the table shows.
    pub fn summarise(&self, figures: &mut Figures) {
        let mut add = |name: &str, value: f64| *figures.entry(name.into()).or_default() += value;
        add("idle_us", self.idle);
        for (pid, process) in &self.processes {
            match pid {
                1 => {
                    add("calls", process.calls.into());
                    add("faults", process.faults.into());
                    add("user_us", process.user);
                }
                _ if process.name == "init" => add("child_calls", process.calls.into()),
                _ => {}
            }
        }
    }

    /// As JSON, with times in microseconds.
    pub fn json(&self) -> Value {
        let processes = self.processes.iter().map(|(pid, p)| {
            json!({"pid": pid, "name": p.name, "cpu_us": p.cpu, "user_us": p.user,
                   "calls": p.calls, "faults": p.faults})
        });
        let steps = self.steps.iter().map(
            |s| json!({"at_us": s.at, "took_us": s.duration, "pid": s.process, "what": s.what}),
        );
        json!({
            "total_us": self.total,
            "idle_us": self.idle,
            "processes": processes.collect::<Vec<_>>(),
            "steps": steps.collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
            init-1       [000]      1.000000: sys_enter: NR 165 (400e12, 0, 0, 0, 0, 0)
            init-1       [000]      1.000001: mounting: (path_mount+0x0/0xae0) source=\"proc\" kind=\"proc\" data=(fault)
            init-1       [000]      1.000100: sys_exit: NR 165 = 0
            init-1       [000]      1.000110: sys_enter: NR 61 (1, 0, 0, 0, 0, 0)
            init-1       [000]      1.000120: sched_switch: prev_comm=init prev_pid=1 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
          <idle>-0       [000]      1.001120: sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=init next_pid=1 next_prio=120
            init-1       [000]      1.001130: sys_exit: NR 61 = 0
";

    fn names() -> Names {
        [(165, "mount".to_string()), (61, "wait4".into())].into()
    }

    #[test]
    fn time_is_attributed_to_the_running_process() {
        let breakdown = boot(TRACE, 1e6, 2e6, &names());
        assert_eq!(breakdown.total.round(), 1130.0);
        assert_eq!(breakdown.idle.round(), 1000.0);
        let init = &breakdown.processes[&1];
        assert_eq!((init.cpu.round(), init.user.round()), (130.0, 10.0));
        assert_eq!((init.calls, init.faults), (2, 0));
        let steps: Vec<_> = breakdown
            .steps
            .iter()
            .map(|step| step.what.as_str())
            .collect();
        assert_eq!(
            steps,
            [
                "mount source=\"proc\" kind=\"proc\" data=-",
                "wait4 (1, 0, 0, 0, 0, 0)"
            ]
        );
    }

    #[test]
    fn the_host_hears_of_the_listener_by_a_write_of_that_length() {
        let trace = "\
            init-1       [000]      1.000000: sys_exit: NR 50 = 0
            init-1       [000]      1.000050: sys_exit: NR 1 = 64
           other-9       [000]      1.000060: sys_exit: NR 1 = 18
            init-1       [000]      1.000070: sys_exit: NR 1 = 18
";
        let names = [(50, "listen".to_string()), (1, "write".into())].into();
        assert_eq!(ready(trace, &names).unwrap().round(), 70.0);
    }

    #[test]
    fn a_line_of_a_dump_is_an_event_too() {
        let line = "[    2.047210] kworker/-46  0d..2. 12046us : sys_exit: NR 3 = 0";
        let event = parse(line).unwrap();
        assert_eq!(
            (event.process, event.comm, event.at),
            (46, "kworker/", 12046.0)
        );
        assert_eq!((event.kind, event.text), ("sys_exit", "NR 3 = 0"));
    }
}
