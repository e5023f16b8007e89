//! The response of `GET /v1/sysinfo`, from the files of /proc (proc(5)).
//!
//! Names, shape and units are those of Fly.io's init (superfly/init-snapshot, src/api/sys.rs), so that its
//! clients can read it: memory in bytes, processor times in seconds, disk times in milliseconds, sectors of
//! 512 bytes. Values that a kernel does not have are `null`.

use crate::bytes::{Words, split, split_once, split_text_once, words};
use crate::decimal;
use crate::json::Quoted;
use crate::message::ToLossy;
use core::ffi::CStr;
use core::fmt::{self, Write};

/// Writes a member's value from a file's text.
type Encode = fn(&[u8], &mut dyn Write) -> fmt::Result;

/// The members: name, file in /proc, and encoder.
pub const MEMBERS: [(&str, &CStr, Encode); 6] = [
    ("memory", c"meminfo", memory),
    ("load_average", c"loadavg", load_average),
    ("filefd", c"sys/fs/file-nr", filefd),
    ("cpus", c"stat", cpus),
    ("disks", c"diskstats", disks),
    ("net", c"net/dev", net),
];

/// `MemTotal` and so on of /proc/meminfo.
const MEMORY: &str = "mem_total mem_free mem_available buffers cached swap_cached active inactive \
    swap_total swap_free dirty writeback slab shmem vmalloc_total vmalloc_used vmalloc_chunk";

/// The columns of /proc/stat.
const CPU: &str = "user nice system idle iowait irq softirq steal guest guest_nice";

/// The columns after the name in /proc/diskstats (Documentation/admin-guide/iostats.rst).
const DISK: &str = "reads_completed reads_merged sectors_read time_reading writes_completed \
    writes_merged sectors_written time_writing io_in_progress time_io time_io_weighted";

/// The columns after the name in /proc/net/dev.
const NET: &str = "recv_bytes recv_packets recv_errs recv_drop recv_fifo recv_frame recv_compressed \
    recv_multicast sent_bytes sent_packets sent_errs sent_drop sent_fifo sent_colls sent_carrier \
    sent_compressed";

/// Ticks per second in /proc/stat (USER_HZ).
const TICKS: u64 = 100;

/// The next word as a number.
fn next_number(words: &mut Words) -> Option<u64> {
    decimal::parse(words.next()?)
}

/// The unit of a number.
#[derive(Clone, Copy)]
enum Unit {
    One,
    /// Shown as seconds.
    Tick,
}

/// Writes `"name":value` for each of the space-separated names.
fn members(
    names: &str,
    unit: Unit,
    value: &mut dyn FnMut(&str) -> Option<u64>,
    out: &mut dyn Write,
) -> fmt::Result {
    let mut comma = "";
    let mut rest = names;
    while !rest.is_empty() {
        let name;
        (name, rest) = split_text_once(rest, b' ').unwrap_or((rest, ""));
        write!(out, "{comma}\"{name}\":")?;
        match (value(name), unit) {
            (None, _) => out.write_str("null")?,
            (Some(number), Unit::One) => write!(out, "{number}")?,
            (Some(ticks), Unit::Tick) => write!(out, "{}.{:02}", ticks / TICKS, ticks % TICKS)?,
        }
        comma = ",";
    }
    Ok(())
}

/// An element of a list: `{"name":"vda",…}`
fn device(
    comma: &mut &str,
    name: &[u8],
    names: &str,
    mut values: Words,
    out: &mut dyn Write,
) -> fmt::Result {
    write!(out, "{comma}{{\"name\":{},", Quoted(&name.lossy()))?;
    members(names, Unit::One, &mut |_| next_number(&mut values), out)?;
    *comma = ",";
    out.write_str("}")
}

/// `MemTotal:  1024 kB`
fn memory(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut bytes = |name: &str| {
        split(text, b'\n').find_map(|line| {
            let mut words = words(line);
            let is_it = is_spelled(words.next()?, name);
            is_it
                .then(|| next_number(&mut words))
                .flatten()?
                .checked_mul(1024)
        })
    };
    out.write_str("{")?;
    members(MEMORY, Unit::One, &mut bytes, out)?;
    out.write_str("}")
}

/// Whether a key of /proc/meminfo, `MemTotal:`, is the one of a name, `mem_total`.
fn is_spelled(word: &[u8], name: &str) -> bool {
    let letters = name.bytes().filter(|letter| *letter != b'_');
    let word = word.strip_suffix(b":").unwrap_or(&[]);
    word.iter().map(u8::to_ascii_lowercase).eq(letters)
}

/// `0.20 0.18 0.12 1/80 11206`
fn load_average(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut words = words(text);
    for before in ["[", ",", ","] {
        let number = words
            .next()
            .and_then(|word| core::str::from_utf8(word).ok())
            .filter(|word| {
                word.bytes()
                    .all(|byte| byte.is_ascii_digit() || byte == b'.')
            });
        write!(out, "{before}{}", number.unwrap_or("null"))?;
    }
    out.write_str("]")
}

/// Allocated, unused, and maximum number of open file descriptions.
fn filefd(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut words = words(text);
    let mut value = |_: &str| {
        let number = next_number(&mut words);
        let _unused = words.next();
        number
    };
    out.write_str("{")?;
    members("allocated maximum", Unit::One, &mut value, out)?;
    out.write_str("}")
}

/// The lines `cpu0 …`, `cpu1 …`: an object of objects, by number.
fn cpus(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut before = "{";
    for line in split(text, b'\n') {
        let mut words = words(line);
        let number = words.next().and_then(|word| word.strip_prefix(b"cpu"));
        if let Some(number) = number.and_then(decimal::parse::<u64>) {
            write!(out, "{before}\"{number}\":{{")?;
            members(CPU, Unit::Tick, &mut |_| next_number(&mut words), out)?;
            before = "},";
        }
    }
    out.write_str(if before == "{" { "{}" } else { "}}" })
}

/// The lines of virtio disks and their partitions, and of persistent memory: a list of objects.
fn disks(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut comma = "";
    out.write_str("[")?;
    for line in split(text, b'\n') {
        let mut words = words(line);
        if let Some(name) = words.nth(2)
            && (name.starts_with(b"vd") || name.starts_with(b"pmem"))
        {
            device(&mut comma, name, DISK, words, out)?;
        }
    }
    out.write_str("]")
}

/// The lines `eth0: …` of all devices but loopback: a list of objects.
fn net(text: &[u8], out: &mut dyn Write) -> fmt::Result {
    let mut comma = "";
    out.write_str("[")?;
    for line in split(text, b'\n') {
        if let Some((name, values)) = split_once(line, b':')
            && name.trim_ascii() != b"lo"
        {
            device(&mut comma, name.trim_ascii(), NET, words(values), out)?;
        }
    }
    out.write_str("]")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(member: &str, text: &str) -> String {
        let (_, _, encode) = MEMBERS.iter().find(|(name, ..)| *name == member).unwrap();
        let mut out = String::new();
        encode(text.as_bytes(), &mut out).unwrap();
        out
    }

    #[test]
    fn memory_is_in_bytes_and_missing_values_are_null() {
        let text = "MemTotal:         200000 kB\nMemFree:           1 kB\nMemAvailable:     0 kB\n\
            Active(anon):      5 kB\nActive:           18014398509481983 kB\n\
            Inactive:         18014398509481984 kB\nCached\nSlab: x kB\n";
        assert_eq!(
            encoded("memory", text),
            "{\"mem_total\":204800000,\"mem_free\":1024,\"mem_available\":0,\"buffers\":null,\
            \"cached\":null,\"swap_cached\":null,\"active\":18446744073709550592,\
            \"inactive\":null,\"swap_total\":null,\"swap_free\":null,\"dirty\":null,\
            \"writeback\":null,\"slab\":null,\"shmem\":null,\"vmalloc_total\":null,\
            \"vmalloc_used\":null,\"vmalloc_chunk\":null}"
        );
    }

    #[test]
    fn load_and_open_files_are_numbers() {
        let load = |text| encoded("load_average", text);
        assert_eq!(load("0.20 10.18 0.00 1/80 11206\n"), "[0.20,10.18,0.00]");
        assert_eq!(load("0.20 -1.0 x"), "[0.20,null,null]");
        let files = |text| encoded("filefd", text);
        assert_eq!(
            files("576\t0\t9223372036854775807\n"),
            r#"{"allocated":576,"maximum":9223372036854775807}"#
        );
        assert_eq!(files(""), r#"{"allocated":null,"maximum":null}"#);
    }

    #[test]
    fn processor_times_are_in_seconds_by_number() {
        let text =
            "cpu  9 9 9 9\ncpu0 100 1 22 333 4444 5 6 7 8 9\ncpu10 0 0 0 1234567 0 0 0\nintr 1 2\n";
        assert_eq!(
            encoded("cpus", text),
            r#"{"0":{"user":1.00,"nice":0.01,"system":0.22,"idle":3.33,"iowait":44.44,"irq":0.05,"softirq":0.06,"steal":0.07,"guest":0.08,"guest_nice":0.09},"10":{"user":0.00,"nice":0.00,"system":0.00,"idle":12345.67,"iowait":0.00,"irq":0.00,"softirq":0.00,"steal":null,"guest":null,"guest_nice":null}}"#
        );
        assert_eq!(encoded("cpus", ""), "{}");
    }

    #[test]
    fn disks_and_network_devices_are_lists() {
        let text = "   7       0 loop0 1 2 3 4 5 6 7 8 9 10 11\n \
             254       0 vda 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17\n 259 0 pmem0 1\n 254 1 vd\"\n";
        let disk = |name: &str, values: [&str; 11]| {
            let values = DISK.split(' ').zip(values);
            let members: Vec<_> = values
                .map(|(name, value)| format!("\"{name}\":{value}"))
                .collect();
            format!("{{\"name\":\"{name}\",{}}}", members.join(","))
        };
        let all = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"];
        let mut one = ["null"; 11];
        one[0] = "1";
        let expected = [
            disk("vda", all),
            disk("pmem0", one),
            disk("vd\\\"", ["null"; 11]),
        ];
        assert_eq!(encoded("disks", text), format!("[{}]", expected.join(",")));
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets\n \
               lo:     1       2    0    0    0     0          0         0        1       2    0    0    0     0       0          0\n  \
             eth0:18446744073709551615 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n";
        assert_eq!(
            encoded("net", text),
            r#"[{"name":"eth0","recv_bytes":18446744073709551615,"recv_packets":2,"recv_errs":3,"recv_drop":4,"recv_fifo":5,"recv_frame":6,"recv_compressed":7,"recv_multicast":8,"sent_bytes":9,"sent_packets":10,"sent_errs":11,"sent_drop":12,"sent_fifo":13,"sent_colls":14,"sent_carrier":15,"sent_compressed":16}]"#
        );
        assert_eq!(encoded("net", ""), "[]");
    }
}
