//! A VM's use of memory, processors and disks, as metrics of a cgroup (v2), made of what its init says
//! of the whole guest.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryStat, Metrics, PidsStat,
};
use serde_json::Value;

/// Bytes of a sector of /proc/diskstats.
const SECTOR: u64 = 512;
/// Major number of virtio's block devices, which is dynamic: the first that is free.
const VIRTIO_BLK: u64 = 254;
/// Minor numbers of one of them.
const MINORS: u64 = 16;

/// Of `GET /v1/sysinfo`.
pub fn of(sysinfo: &Value) -> Metrics {
    let memory = &sysinfo["memory"];
    let bytes = |name: &str| memory[name].as_u64().unwrap_or(0);
    let total = bytes("mem_total");
    let memory = MemoryStat {
        usage: total.saturating_sub(bytes("mem_available")),
        usage_limit: total,
        file: bytes("cached") + bytes("buffers"),
        file_dirty: bytes("dirty"),
        file_writeback: bytes("writeback"),
        shmem: bytes("shmem"),
        slab: bytes("slab"),
        anon: total
            .saturating_sub(bytes("mem_free"))
            .saturating_sub(bytes("cached") + bytes("buffers") + bytes("slab")),
        swap_usage: bytes("swap_total").saturating_sub(bytes("swap_free")),
        swap_limit: bytes("swap_total"),
        ..MemoryStat::default()
    };
    Metrics {
        memory: Some(memory).into(),
        cpu: Some(processors(&sysinfo["cpus"])).into(),
        io: Some(disks(&sysinfo["disks"])).into(),
        pids: Some(PidsStat::default()).into(),
        ..Metrics::default()
    }
}

/// Seconds of each processor, added up.
fn processors(cpus: &Value) -> CPUStat {
    let sum = |names: &[&str]| {
        let cpus = cpus
            .as_object()
            .map(|cpus| cpus.values().collect::<Vec<_>>());
        let cpus = cpus.unwrap_or_default();
        let seconds = cpus
            .iter()
            .flat_map(|cpu| names.iter().map(|name| cpu[*name].as_f64()));
        let seconds: f64 = seconds.flatten().sum();
        (seconds * 1e6) as u64
    };
    let user_usec = sum(&["user", "nice"]);
    let system_usec = sum(&["system", "irq", "softirq"]);
    CPUStat {
        user_usec,
        system_usec,
        usage_usec: user_usec + system_usec,
        ..CPUStat::default()
    }
}

fn disks(disks: &Value) -> IOStat {
    let disks = disks.as_array().map(Vec::as_slice).unwrap_or_default();
    let usage = disks.iter().filter_map(|disk| {
        let letter = disk["name"].as_str()?.strip_prefix("vd")?;
        let letter = *letter.as_bytes().first().filter(|_| letter.len() == 1)?;
        let count = |name: &str| disk[name].as_u64().unwrap_or(0);
        Some(IOEntry {
            major: VIRTIO_BLK,
            minor: u64::from(letter.checked_sub(b'a')?) * MINORS,
            rbytes: count("sectors_read") * SECTOR,
            wbytes: count("sectors_written") * SECTOR,
            rios: count("reads_completed"),
            wios: count("writes_completed"),
            ..IOEntry::default()
        })
    });
    IOStat {
        usage: usage.collect(),
        ..IOStat::default()
    }
}
