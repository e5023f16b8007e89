//! Objects of /dev/kmsg (Documentation/ABI/testing/dev-kmsg): did the OOM killer kill this process?

use crate::bytes::{before, decimal, split};

/// Whether `record` is the kernel's own word that its OOM killer chose process `pid`.
///
/// A record is `prefix;text`, its prefix starts with `facility * 8 + level`. Facility 0 is the
/// kernel's own: what user space writes gets another one (kernel/printk/printk.c, devkmsg_write).
/// The kernel says it twice (mm/oom_kill.c), and either line counts: the first comes before the
/// kill but is rate limited, the second may come after the process is reaped.
pub fn killed_by_oom(record: &[u8], pid: u32) -> bool {
    let prefix = before(record, b';');
    let text = record.get(prefix.len() + 1..).unwrap_or(&[]);
    let text = before(text, b'\n');
    decimal(before(prefix, b',')).is_some_and(|priority| priority >> 3 == 0)
        && chosen(text).or_else(|| killed(text)) == Some(pid)
}

/// `oom-kill:constraint=…,task=NAME,pid=N,uid=N`: NAME is the process's to choose, so from the end.
fn chosen(text: &[u8]) -> Option<u32> {
    let fields = text.strip_prefix(b"oom-kill:")?;
    let (mut pid, mut uid): (&[u8], &[u8]) = (&[], &[]);
    for field in split(fields, b',') {
        pid = uid;
        uid = field;
    }
    decimal(uid.strip_prefix(b"uid=")?)?;
    decimal(pid.strip_prefix(b"pid=")?)
}

/// `Out of memory: Killed process N (NAME) …` and its forms for cgroups and allocating tasks.
fn killed(text: &[u8]) -> Option<u32> {
    const STARTS: [&[u8]; 3] = [
        b"Out of memory: Killed process ",
        b"Memory cgroup out of memory: Killed process ",
        b"Out of memory (oom_kill_allocating_task): Killed process ",
    ];
    let rest = STARTS.iter().find_map(|start| text.strip_prefix(*start))?;
    let digits = before(rest, b' ');
    decimal(digits).filter(|_| digits.len() < rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_own_records_count() {
        for record in [
            "3,914,7,-;Out of memory: Killed process 71 (tail) total-vm:1kB, anon-rss:1kB, UID:0 pgtables:1kB oom_score_adj:0",
            "3,914,7,-;Memory cgroup out of memory: Killed process 71 (a b) total-vm:1kB\n SUBSYSTEM=x",
            "6,1,2,-,caller=T1;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),task=x,pid=71,uid=65534",
        ] {
            assert!(killed_by_oom(record.as_bytes(), 71), "{record}");
            assert!(!killed_by_oom(record.as_bytes(), 7), "{record}");
            assert!(!killed_by_oom(record.as_bytes(), 711), "{record}");
        }
    }

    #[test]
    fn look_alikes_do_not() {
        for record in [
            "11,914,7,-;Out of memory: Killed process 71 (tail) total-vm:1kB",
            "12,914,7,-;oom-kill:constraint=CONSTRAINT_NONE,task=x,pid=71,uid=0",
            "3,914,7,-;x: Out of memory: Killed process 71 (tail)",
            "3,914,7,-;oom-kill:constraint=CONSTRAINT_NONE,task=,pid=71,uid=0,pid=9,uid=0",
            "3,914,7,-;Out of memory: Killed process 9 (Killed process 71 (x) total-vm:1kB",
            "3,914,7,-;oom_reaper: reaped process 71 (tail), now anon-rss:0kB",
            "3,9;Out of memory: Killed process 71",
            "Out of memory: Killed process 71 (x)",
            ";Out of memory: Killed process 71 (x)",
            "",
        ] {
            assert!(!killed_by_oom(record.as_bytes(), 71), "{record}");
        }
    }
}
