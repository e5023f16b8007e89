//! Records of /dev/kmsg that the kernel itself has logged (Documentation/ABI/testing/dev-kmsg).

use crate::bytes::{before, split, split_once};
use crate::decimal;

/// Whether the kernel says in `record` that the OOM killer has killed process `pid`.
///
/// It logs two lines (mm/oom_kill.c), and either one counts: the first comes before the kill but is rate
/// limited, the second may come after the process was reaped.
pub fn killed_by_oom(record: &[u8], pid: u32) -> bool {
    kernel_text(record).and_then(|text| oom_victim(text).or_else(|| killed(text))) == Some(pid)
}

/// Whether the kernel says in `record` that this VM was restored from a snapshot: it has reseeded its random
/// numbers for a new VMGenID (drivers/char/random.c).
pub fn is_virtual_machine_fork(record: &[u8]) -> bool {
    kernel_text(record) == Some(b"random: crng reseeded due to virtual machine fork")
}

/// A record's text without its continuation lines, if it is the kernel's own.
///
/// A record is `prefix;text`, and its prefix starts with `facility * 8 + level`. Facility 0 is the
/// kernel's: records from user space get another one (kernel/printk/printk.c, devkmsg_write).
fn kernel_text(record: &[u8]) -> Option<&[u8]> {
    let (prefix, text) = split_once(record, b';')?;
    let priority: u32 = decimal::parse(before(prefix, b','))?;
    (priority >> 3 == 0).then_some(before(text, b'\n'))
}

/// `oom-kill:constraint=…,task=NAME,pid=N,uid=N`. Parsed from the end, as the process can choose NAME.
fn oom_victim(text: &[u8]) -> Option<u32> {
    let mut fields = split(text.strip_prefix(b"oom-kill:")?, b',').rev();
    let _uid: u32 = decimal::parse(fields.next()?.strip_prefix(b"uid=")?)?;
    decimal::parse(fields.next()?.strip_prefix(b"pid=")?)
}

/// `Out of memory: Killed process N (NAME) …` and its forms for cgroups and allocating tasks.
fn killed(text: &[u8]) -> Option<u32> {
    const STARTS: [&[u8]; 3] = [
        b"Out of memory: Killed process ",
        b"Memory cgroup out of memory: Killed process ",
        b"Out of memory (oom_kill_allocating_task): Killed process ",
    ];
    let rest = STARTS.iter().find_map(|start| text.strip_prefix(*start))?;
    let (digits, _name) = split_once(rest, b' ')?;
    decimal::parse(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_records_of_the_kernel_count() {
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
    fn forged_oom_records_do_not_count() {
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

    #[test]
    fn only_the_kernels_record_reports_a_restore() {
        let text = "random: crng reseeded due to virtual machine fork";
        for (record, expected) in [
            (format!("5,301,77,-;{text}\n"), true),
            (format!("5,301,77,-,caller=T1;{text}"), true),
            (format!("5,301,77,-;{text}\n SUBSYSTEM=x\n"), true),
            (format!("13,301,77,-;{text}\n"), false),
            (format!("5,301,77,-;x {text}\n"), false),
            (format!("5,301,77,-;{text}ed\n"), false),
            (format!("5,301,77,-;x\n{text}\n"), false),
            (text.into(), false),
            ("5,301,77,-;random: crng init done\n".into(), false),
        ] {
            assert_eq!(
                is_virtual_machine_fork(record.as_bytes()),
                expected,
                "{record}"
            );
        }
    }
}
