//! The rows: which figures are shown, in which order, and their targets.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::{Value, json};

use crate::boots::{Figures, Kind, Mode, Subject, median};

/// All samples of one subject, by mode and figure.
#[derive(Default)]
pub struct Samples(BTreeMap<(&'static str, String), Vec<f64>>);

impl Samples {
    pub fn add(&mut self, mode: Mode, figures: Figures) {
        for (name, value) in figures {
            self.0.entry((mode.name(), name)).or_default().push(value);
        }
    }

    fn get(&self, mode: Mode, name: &str) -> Option<&[f64]> {
        self.0.get(&(mode.name(), name.into())).map(Vec::as_slice)
    }

    /// The maximum, for what must never happen.
    fn most(&self, mode: Mode, name: &str) -> Option<f64> {
        self.get(mode, name)?.iter().copied().reduce(f64::max)
    }

    fn median(&self, mode: Mode, name: &str) -> Option<f64> {
        Some(median(&mut self.get(mode, name)?.to_vec()))
    }

    /// The median of the runs' ratios of two figures.
    fn ratio(&self, mode: Mode, name: &str, to: &str) -> Option<f64> {
        let pairs = self.get(mode, name)?.iter().zip(self.get(mode, to)?);
        Some(median(&mut pairs.map(|(a, b)| a / b).collect::<Vec<_>>()))
    }

    fn json(&self) -> Value {
        let mut modes = json!({});
        for ((mode, name), values) in &self.0 {
            modes[*mode][name] = json!(values);
        }
        modes
    }
}

/// A subject with all its results.
pub struct Entry {
    pub subject: Subject,
    pub binary_size: f64,
    pub initrd_size: f64,
    pub samples: Samples,
    /// Reasons for missing figures.
    pub failures: Vec<String>,
    /// The parts of a boot's or an end's time.
    pub breakdowns: BTreeMap<&'static str, Value>,
}

/// A row: how it is computed for a subject, and the product's maximum.
struct Row {
    name: &'static str,
    unit: &'static str,
    decimals: usize,
    bar: Option<f64>,
    get: fn(&Entry, &Entry) -> Option<f64>,
}

const fn row(
    name: &'static str,
    unit: &'static str,
    decimals: usize,
    get: fn(&Entry, &Entry) -> Option<f64>,
) -> Row {
    Row {
        name,
        unit,
        decimals,
        bar: None,
        get,
    }
}

impl Row {
    const fn bar(self, bar: f64) -> Row {
        Row {
            bar: Some(bar),
            ..self
        }
    }
}

fn ms(entry: &Entry, mode: Mode) -> Option<f64> {
    Some(entry.samples.median(mode, "boot_ns")? / 1e6)
}

fn boot_ms(entry: &Entry) -> Option<f64> {
    ms(entry, Mode::File)
}

fn mmds_ms(entry: &Entry) -> Option<f64> {
    less_peer_ms(entry, Mode::Mmds)
}

/// Without the peer's own processor time.
fn less_peer_ms(entry: &Entry, mode: Mode) -> Option<f64> {
    let boots = entry.samples.get(mode, "boot_ns")?.iter();
    let peers = entry.samples.get(mode, "mmds_ns")?;
    let own = boots.zip(peers).map(|(boot, peer)| boot - peer);
    Some(median(&mut own.collect::<Vec<_>>()) / 1e6)
}

fn memory(entry: &Entry) -> Option<f64> {
    let kib = |name| entry.samples.most(Mode::File, name);
    Some(kib("pss_kib")? + kib("page_tables_kib")?)
}

/// Each row's function gets the subject and the floor.
const ROWS: [Row; 47] = [
    row("binary", "B", 0, |e, _| Some(e.binary_size)).bar(131_072.0),
    row(
        "initrd without configuration and modules",
        "B",
        0,
        |e, _| Some(e.initrd_size),
    ),
    row("to unpack that initrd", "ms", 3, |e, _| {
        Some(e.samples.median(Mode::Unpack, "unpack_us")? / 1e3)
    }),
    row("exec of /init to workload, file", "ms", 3, |e, _| {
        boot_ms(e)
    }),
    row("  against the floor", "x", 3, |e, floor| {
        Some(boot_ms(e)? / boot_ms(floor)?)
    })
    .bar(0.25),
    row("  PID 1's instructions", "k", 0, |e, _| {
        Some(e.samples.median(Mode::File, "cpu_ns")? / 1e3)
    }),
    row("    of these in user space", "k", 0, |e, _| {
        e.samples.median(Mode::Trace, "user_us")
    }),
    row("  PID 1's system calls", "", 0, |e, _| {
        e.samples.median(Mode::Trace, "calls")
    }),
    row("  its children's", "", 0, |e, _| {
        e.samples.median(Mode::Trace, "child_calls")
    }),
    row("  PID 1's page faults", "", 0, |e, _| {
        e.samples.median(Mode::Trace, "faults")
    }),
    row("  nobody runs (traced boot)", "ms", 3, |e, _| {
        Some(e.samples.median(Mode::Trace, "idle_us")? / 1e3)
    }),
    row("exec of /init to workload, MMDS", "ms", 3, |e, _| {
        mmds_ms(e)
    }),
    row("  more than from the file", "ms", 3, |e, _| {
        Some(mmds_ms(e)? - boot_ms(e)?)
    })
    .bar(1.5),
    row(
        "exec of /init to workload, whole document",
        "ms",
        3,
        |e, _| ms(e, Mode::Whole),
    ),
    row("  against the floor", "x", 3, |e, floor| {
        Some(ms(e, Mode::Whole)? / boot_ms(floor)?)
    })
    .bar(0.25),
    row(
        "  against the floor that does the same",
        "x",
        3,
        |e, floor| Some(ms(e, Mode::Whole)? / ms(floor, Mode::Whole)?),
    ),
    row("  by MMDS", "ms", 3, |e, _| {
        less_peer_ms(e, Mode::WholeMmds)
    }),
    row("  more than from the file", "ms", 3, |e, _| {
        Some(less_peer_ms(e, Mode::WholeMmds)? - ms(e, Mode::Whole)?)
    })
    .bar(1.5),
    row("  disk writes", "", 0, |e, _| {
        e.samples.most(Mode::Requests, "writes")
    }),
    row("  disk flushes", "", 0, |e, _| {
        e.samples.most(Mode::Requests, "flushes")
    }),
    row("  disk writes of the second boot", "", 0, |e, _| {
        e.samples.most(Mode::Requests, "writes_again")
    }),
    row("  disk flushes of the second boot", "", 0, |e, _| {
        e.samples.most(Mode::Requests, "flushes_again")
    }),
    row(
        "exec of /init to workload, cgroup v2 alone",
        "ms",
        3,
        |e, _| ms(e, Mode::Unified),
    ),
    row("  against the floor", "x", 3, |e, floor| {
        Some(ms(e, Mode::Unified)? / boot_ms(floor)?)
    })
    .bar(0.15),
    row(
        "exec of /init to workload, squashfs and overlay",
        "ms",
        3,
        |e, _| ms(e, Mode::Overlay),
    ),
    row(
        "exec of /init to workload, two processors, real time",
        "ms",
        3,
        |e, _| ms(e, Mode::TwoProcessors),
    ),
    row("API to the event that says so", "ms", 3, |e, _| {
        Some(e.samples.median(Mode::Ready, "ready_us")? / 1e3)
    })
    .bar(0.3),
    row("workload's exit to reboot, no reader", "ms", 3, |e, _| {
        Some(e.samples.median(Mode::File, "end_us")? / 1e3)
    })
    .bar(3.0),
    row(
        "workload's exit to reboot, a reader waits",
        "ms",
        3,
        |e, _| Some(e.samples.median(Mode::Reader, "end_us")? / 1e3),
    )
    .bar(3.0),
    row(
        "workload's exit to reboot, with a volume",
        "ms",
        3,
        |e, _| Some(e.samples.median(Mode::Whole, "end_us")? / 1e3),
    )
    .bar(3.0),
    row("PID 1, Pss", "KiB", 0, |e, _| {
        e.samples.most(Mode::File, "pss_kib")
    }),
    row("PID 1, page tables", "KiB", 0, |e, _| {
        e.samples.most(Mode::File, "page_tables_kib")
    }),
    row("  together", "KiB", 0, |e, _| memory(e)).bar(200.0),
    row("MemAvailable", "KiB", 0, |e, _| {
        e.samples.median(Mode::File, "available_kib")
    }),
    row("  more than beside the floor", "KiB", 0, |e, floor| {
        let available = |e: &Entry| e.samples.median(Mode::File, "available_kib");
        Some(available(e)? - available(floor)?)
    }),
    row("times PID 1 runs in an idle minute", "", 0, |e, _| {
        e.samples.most(Mode::File, "idle_turns")
    })
    .bar(0.0),
    row("/v1/status, kept alive, against echo", "x", 2, |e, _| {
        e.samples.ratio(Mode::Serve, "status_us", "echo_us")
    })
    .bar(1.2),
    row(
        "/v1/status, new connection, against echo",
        "x",
        2,
        |e, _| {
            e.samples
                .ratio(Mode::Serve, "status_connect_us", "echo_connect_us")
        },
    )
    .bar(1.2),
    row("/v1/exec of /bin/true", "1/s", 0, |e, _| {
        Some(1e6 / e.samples.median(Mode::Serve, "exec_us")?)
    }),
    row("bare vfork, exec, wait of it", "1/s", 0, |e, _| {
        Some(1e6 / e.samples.median(Mode::Serve, "spawn_us")?)
    }),
    row("  time of the one against the other", "x", 2, |e, _| {
        e.samples.ratio(Mode::Serve, "exec_us", "spawn_us")
    }),
    row("the least server that executes it", "1/s", 0, |e, _| {
        Some(1e6 / e.samples.median(Mode::Serve, "least_us")?)
    }),
    row("  time of /v1/exec against it", "x", 2, |e, _| {
        e.samples.ratio(Mode::Serve, "exec_us", "least_us")
    })
    .bar(1.25),
    row(
        "/v1/exec of /bin/true, the guest's time",
        "us",
        0,
        |e, _| e.samples.median(Mode::Commands, "exec_busy_us"),
    ),
    row("bare vfork, exec, wait of it", "us", 0, |e, _| {
        e.samples.median(Mode::Commands, "spawn_busy_us")
    }),
    row("  the one against the other", "x", 2, |e, _| {
        e.samples
            .ratio(Mode::Commands, "exec_busy_us", "spawn_busy_us")
    }),
    row("  against the least server", "x", 2, |e, _| {
        e.samples
            .ratio(Mode::Commands, "exec_busy_us", "least_busy_us")
    })
    .bar(1.25),
];

/// Shown for a missing value.
const NOTHING: &str = "-";

fn show(value: Option<f64>, decimals: usize) -> String {
    value.map_or(NOTHING.into(), |value| format!("{value:.decimals$}"))
}

/// Whether the product's value meets the target.
fn verdict(value: Option<f64>, bar: Option<f64>) -> &'static str {
    match (value, bar) {
        (Some(value), Some(bar)) if value <= bar => "yes",
        (Some(_), Some(_)) => "NO",
        (None, Some(_)) => "?",
        (_, None) => "",
    }
}

fn find(entries: &[Entry], kind: Kind) -> &Entry {
    let mut of_kind = entries.iter().filter(|entry| entry.subject.kind == kind);
    of_kind.next().expect("the product and the floor are there")
}

/// The table in Markdown.
pub fn show_all(entries: &[Entry]) -> String {
    let (product, floor) = (find(entries, Kind::Product), find(entries, Kind::Floor));
    let mut lines = vec![vec![String::new(), String::new()]];
    lines[0].extend(entries.iter().map(|entry| entry.subject.name.clone()));
    lines[0].extend(["bar", "kept"].map(String::from));
    for row in &ROWS {
        let values = entries
            .iter()
            .map(|entry| show((row.get)(entry, floor), row.decimals));
        let mut line = vec![row.name.replace("  ", "\u{a0}\u{a0}"), row.unit.to_string()];
        line.extend(values);
        let bar = row.bar.map_or(String::new(), |bar| format!("{bar}"));
        line.extend([bar, verdict((row.get)(product, floor), row.bar).into()]);
        lines.push(line);
    }
    let columns = lines[0].len();
    let width = |column: usize| {
        let lengths = lines.iter().map(|line| line[column].chars().count());
        lengths.max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let rule: Vec<_> = widths.iter().map(|width| "-".repeat(*width)).collect();
    lines.insert(1, rule);
    let mut out = String::new();
    for line in lines {
        out += "|";
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // Text left, numbers right.
            let cell = if column < 2 || column == columns - 1 {
                format!(" {cell:<width$} |")
            } else {
                format!(" {cell:>width$} |")
            };
            out += &cell;
        }
        out += "\n";
    }
    for entry in entries {
        for failure in &entry.failures {
            writeln!(out, "\n{}: {failure}", entry.subject.name).expect("a String takes it all");
        }
    }
    out
}

/// The same with every sample, in JSON.
pub fn json(entries: &[Entry], runs: usize) -> Value {
    let (product, floor) = (find(entries, Kind::Product), find(entries, Kind::Floor));
    let rows = ROWS.iter().map(|row| {
        let values: BTreeMap<_, _> = entries
            .iter()
            .map(|entry| (&entry.subject.name, (row.get)(entry, floor)))
            .collect();
        let kept = match verdict((row.get)(product, floor), row.bar) {
            "" | "?" => None,
            kept => Some(kept == "yes"),
        };
        json!({"name": row.name.trim(), "unit": row.unit, "bar": row.bar, "kept": kept,
               "values": values})
    });
    let subjects = entries.iter().map(|entry| {
        json!({"name": entry.subject.name, "samples": entry.samples.json(),
               "breakdowns": entry.breakdowns, "failures": entry.failures})
    });
    json!({
        "runs": runs,
        "rows": rows.collect::<Vec<_>>(),
        "subjects": subjects.collect::<Vec<_>>(),
    })
}
