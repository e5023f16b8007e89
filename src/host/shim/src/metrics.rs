//! Converts a guest's resource usage, as reported by its init, to cgroup v2 metrics.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryStat, Metrics, PidsStat,
};
use serde_json::Value;

/// Size of a sector in /proc/diskstats in bytes.
const SECTOR: u64 = 512;
/// Major number of virtio block devices: the first dynamic one.
const VIRTIO_BLK: u64 = 254;
/// Minor numbers per device.
const MINORS: u64 = 16;

/// Converts the response to `GET /v1/sysinfo`.
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

/// The sum over all processors.
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_guests_figures_are_those_of_a_cgroup() {
        let metrics = of(&json!({
            "memory": {"mem_total": 1000, "mem_free": 300, "mem_available": 600, "cached": 200,
                "buffers": 50, "slab": 100, "swap_total": null},
            "cpus": {
                "0": {"user": 1.5, "nice": 0.25, "system": 0.5, "irq": 0.0, "softirq": null},
                "1": {"user": 1.0, "system": 0.25},
            },
            "disks": [
                {"name": "loop0", "reads_completed": 9},
                {"name": "vdb", "reads_completed": 3, "sectors_read": 8, "sectors_written": 2},
            ],
        }));
        let memory = &metrics.memory;
        assert_eq!((memory.usage, memory.usage_limit), (400, 1000));
        assert_eq!((memory.file, memory.anon, memory.swap_limit), (250, 350, 0));
        assert_eq!(
            (metrics.cpu.user_usec, metrics.cpu.system_usec),
            (2_750_000, 750_000)
        );
        assert_eq!(metrics.cpu.usage_usec, 3_500_000);
        let [disk] = &metrics.io.usage[..] else {
            panic!("{metrics}");
        };
        assert_eq!((disk.major, disk.minor, disk.rios), (254, 16, 3));
        assert_eq!((disk.rbytes, disk.wbytes), (4096, 1024));
    }
}
