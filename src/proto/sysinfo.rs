//! What `GET /v1/sysinfo` says, made of the texts of /proc (proc(5)).
//!
//! Names, shape and units are those of Fly.io's init (superfly/init-snapshot, src/api/sys.rs), so that
//! what reads its answer reads this one: memory in bytes, processor times in seconds, times of disks in
//! milliseconds, sectors of 512 bytes. What a kernel does not tell is `null`.

use crate::bytes::{find, split};
use crate::json::Quoted;
use crate::decimal;
use core::ffi::CStr;
use core::fmt::{self, Write};

/// Writes a member's value out of a file's text.
type Encode = fn(&[u8], &mut dyn Write) -> fmt::Result;

/// The members: of each its name, its file, and what makes its value of that.
pub const MEMBERS: [(&str, &CStr, Encode); 6] = [
    ("memory", c"meminfo", memory),
    ("load_average", c"loadavg", load_average),
    ("filefd", c"sys/fs/file-nr", filefd),
    ("cpus", c"stat", cpus),
    ("disks", c"diskstats", disks),
    ("net", c"net/dev", net),
];

/// In the order of the answer, as /proc/meminfo has them.
const MEMORY: &str = "MemTotal MemFree MemAvailable Buffers Cached SwapCached Active Inactive SwapTotal \
    SwapFree Dirty Writeback Slab Shmem VmallocTotal VmallocUsed VmallocChunk";

/// In the order of /proc/stat.
const CPU: &str = "user nice system idle iowait irq softirq steal guest guest_nice";

/// Behind the name in /proc/diskstats (Documentation/admin-guide/iostats.rst).
const DISK: &str = "reads_completed reads_merged sectors_read time_reading writes_completed \
    writes_merged sectors_written time_writing io_in_progress time_io time_io_weighted";

/// Behind the name in /proc/net/dev.
const NET: &str = "recv_bytes recv_packets recv_errs recv_drop recv_fifo recv_frame recv_compressed \
    recv_multicast sent_bytes sent_packets sent_errs sent_drop sent_fifo sent_colls sent_carrier \
    sent_compressed";

/// In /proc/stat, a second (USER_HZ).
const TICKS: u64 = 100;

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    split(text, b'\n')
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
}

/// `"name":number` of each name, separated by commas.
fn numbers<'a>(
    names: &str,
    mut values: impl Iterator<Item = &'a [u8]>,
    out: &mut dyn Write,
) -> fmt::Result {
    for (at, name) in names.split(' ').enumerate() {
        let comma = if at == 0 { "" } else { "," };
        write!(out, "{comma}\"{name}\":")?;
        match values.next().and_then(decimal::parse::<u64>) {
            Some(number) => write!(out, "{number}")?,
            None => out.write_str("null")?,
        }
    }
    Ok(())
}

/// `MemTotal:  1024 kB`
fn memory(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    for (at, name) in MEMORY.split(' ').enumerate() {
        out.write_str(if at == 0 { "{\"" } else { ",\"" })?;
        snake_case(name, out)?;
        let value = lines(text).find_map(|line| {
            let line = line.strip_prefix(name.as_bytes())?.strip_prefix(b":")?;
            decimal::parse::<u64>(words(line).next()?)
        });
        match value {
            Some(kib) => write!(out, "\":{}", kib.saturating_mul(1024))?,
            None => out.write_str("\":null")?,
        }
    }
    out.write_str("}")
}

/// `MemTotal` as `mem_total`.
fn snake_case(name: &str, out: &mut dyn Write) -> fmt::Result {
    for (at, character) in name.char_indices() {
        if character.is_ascii_uppercase() && at > 0 {
            out.write_char('_')?;
        }
        out.write_char(character.to_ascii_lowercase())?;
    }
    Ok(())
}

/// `0.20 0.18 0.12 1/80 11206`
fn load_average(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut words = words(text);
    for before in ["[", ",", ","] {
        out.write_str(before)?;
        // Decimal fractions as JSON has them.
        let number = words.next().and_then(|word| {
            let point = find(word, b'.')?;
            let (whole, fraction) = word.split_at_checked(point)?;
            let fraction = fraction.strip_prefix(b".")?;
            decimal::parse::<u64>(whole)?;
            decimal::parse::<u64>(fraction)?;
            core::str::from_utf8(word).ok()
        });
        out.write_str(number.unwrap_or("null"))?;
    }
    out.write_str("]")
}

/// Allocated, unused and most descriptions of open files.
fn filefd(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut words = words(text);
    let allocated = words.next();
    let maximum = words.nth(1);
    out.write_str("{")?;
    numbers("allocated maximum", [allocated, maximum].into_iter().flatten(), out)?;
    out.write_str("}")
}

/// The lines `cpu0 …`, `cpu1 …`: an object of objects, by number.
fn cpus(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut before = "{";
    for line in lines(text) {
        let mut words = words(line);
        let number = words.next().and_then(|word| word.strip_prefix(b"cpu"));
        let Some(number) = number.and_then(decimal::parse::<u64>) else {
            continue;
        };
        write!(out, "{before}\"{number}\":{{")?;
        for (at, name) in CPU.split(' ').enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(out, "{comma}\"{name}\":")?;
            match words.next().and_then(decimal::parse::<u64>) {
                Some(ticks) => write!(out, "{}.{:02}", ticks / TICKS, ticks % TICKS)?,
                None => out.write_str("null")?,
            }
        }
        out.write_str("}")?;
        before = ",";
    }
    out.write_str(if before == "{" { "{}" } else { "}" })
}

/// The lines of virtio disks and their partitions, and of persistent memory: a list of objects.
fn disks(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut before = "[";
    for line in lines(text) {
        let mut words = words(line);
        let Some(name) = words.nth(2) else {
            continue;
        };
        if name.starts_with(b"vd") || name.starts_with(b"pmem") {
            write!(out, "{before}{{\"name\":{},", Quoted(name))?;
            numbers(DISK, words, out)?;
            out.write_str("}")?;
            before = ",";
        }
    }
    out.write_str(if before == "[" { "[]" } else { "]" })
}

/// The lines `eth0: …` of all devices but loopback: a list of objects.
fn net(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut before = "[";
    for line in lines(text) {
        let Some((name, values)) = find(line, b':').and_then(|at| line.split_at_checked(at)) else {
            continue;
        };
        let name = name.trim_ascii();
        if name != b"lo" {
            write!(out, "{before}{{\"name\":{},", Quoted(name))?;
            numbers(NET, words(values.strip_prefix(b":").unwrap_or(&[])), out)?;
            out.write_str("}")?;
            before = ",";
        }
    }
    out.write_str(if before == "[" { "[]" } else { "]" })
}
