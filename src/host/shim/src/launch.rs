//! Sets up what a session of the init cannot express for a container's process: a program of system calls that
//! is written into the guest, run as root in the session, and then executes the process.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use pigeon::{
    Arch,
    calls::{Argument::Number as Value, Calls, Number},
};

use crate::spec::Process;

/// Where the program is written: a tmpfs mounted by the init. The program removes itself.
pub const PATH: &str = "/run/pigeon/launch";
/// Where the program writes what has failed.
pub const FAILURE: &str = "/run/pigeon/launch-failure";
/// Capabilities by number (linux/capability.h).
pub const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];
/// Resources by number (asm-generic/resource.h).
pub const RESOURCES: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];
/// The search path if PATH is not set, as in runc.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

// System calls (asm/unistd.h), and their constants (linux/fcntl.h, linux/prctl.h,
// linux/capability.h).
const OPENAT: Number = Number(257, 56);
const MKDIRAT: Number = Number(258, 34);
const CHDIR: Number = Number(80, 49);
const UNLINKAT: Number = Number(263, 35);
const FCHOWN: Number = Number(93, 55);
const UMASK: Number = Number(95, 166);
const PRLIMIT64: Number = Number(302, 261);
const PRCTL: Number = Number(157, 167);
const SETGROUPS: Number = Number(116, 159);
const SETRESGID: Number = Number(119, 149);
const SETRESUID: Number = Number(117, 147);
const CAPSET: Number = Number(126, 91);
const MOUNT: Number = Number(165, 40);
/// linux/mount.h
const MS_REMOUNT_BIND_RDONLY: u64 = 0x20 | 0x1000 | 0x1;
const AT_FDCWD: u64 = -100i64 as u64;
const O_WRONLY_CREAT_TRUNC_CLOEXEC: u64 = 0o1 | 0o100 | 0o1000 | 0o2_000_000;
const PR_SET_KEEPCAPS: u64 = 8;
const PR_CAPBSET_DROP: u64 = 24;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// Maximum number of capabilities.
const MAX_CAPABILITIES: u64 = 64;

/// The program that executes a process. `home` is for a process without HOME. `makes_directory`: creates a
/// missing working directory, which runc does only for a container's own process. `read_only`: remounts the
/// root read-only, as runc does once all mount points exist.
pub fn program(
    process: &Process,
    home: &str,
    arch: Arch,
    makes_directory: bool,
    read_only: bool,
) -> Result<Vec<u8>> {
    let texts = process.args.iter().chain(&process.env);
    for text in texts.chain([&process.cwd]) {
        ensure!(!text.contains('\0'), "{text:?} has a NUL in it");
    }
    let mut calls = Calls::new(arch);
    let failure = calls.text(FAILURE);
    let open = [AT_FDCWD, failure, O_WRONLY_CREAT_TRUNC_CLOEXEC, 0o600];
    calls.call(OPENAT, &open.map(Value));
    calls.keep();
    let path = calls.text(PATH);
    calls.call(UNLINKAT, &[AT_FDCWD, path, 0].map(Value));
    if !process.cwd.is_empty() {
        if makes_directory {
            make_directory(&mut calls, &process.cwd);
        }
        let path = calls.text(&process.cwd);
        calls.call(CHDIR, &[Value(path)]);
        calls.check(&format!("unable to enter {}", process.cwd));
    }
    if read_only {
        let root = calls.text("/");
        calls.call(MOUNT, &[0, root, 0, MS_REMOUNT_BIND_RDONLY, 0].map(Value));
        calls.check("unable to make the root read-only");
    }
    set_limits(&mut calls, process);
    set_user(&mut calls, process);
    if process.no_new_privileges {
        calls.call(PRCTL, &[PR_SET_NO_NEW_PRIVS, 1, 0, 0].map(Value));
        calls.check("unable to set no_new_privs");
    }
    execute(&mut calls, process, home);
    Ok(calls.program())
}

fn make_directory(calls: &mut Calls, directory: &str) {
    let slashes = directory.match_indices('/').map(|(at, _)| at);
    let ends = slashes.filter(|at| *at > 0).chain([directory.len()]);
    for end in ends {
        // Errors are ignored: if the directory is missing, chdir fails.
        let path = calls.text(&directory[..end]);
        calls.call(MKDIRAT, &[AT_FDCWD, path, 0o755].map(Value));
    }
}

fn set_limits(calls: &mut Calls, process: &Process) {
    for limit in &process.rlimits {
        let Some(resource) = RESOURCES.iter().position(|name| *name == limit.kind) else {
            continue; // refused when the process was read
        };
        let values = [limit.soft, limit.hard].map(u64::to_le_bytes);
        let values = calls.data(&values.concat());
        calls.call(PRLIMIT64, &[0, resource as u64, values, 0].map(Value));
        calls.check(&format!("unable to set {}", limit.kind));
    }
}

/// Sets the user, groups and capabilities. As in runc, the streams are owned by the user.
fn set_user(calls: &mut Calls, process: &Process) {
    let user = &process.user;
    let (uid, gid) = (u64::from(user.uid), u64::from(user.gid));
    for stream in 0..3 {
        calls.call(FCHOWN, &[stream, uid, u32::MAX.into()].map(Value));
    }
    if let Some(umask) = user.umask {
        calls.call(UMASK, &[Value(umask.into())]);
    }
    let groups: Vec<_> = user
        .additional_gids
        .iter()
        .map(|gid| gid.to_le_bytes())
        .collect();
    let list = calls.data(&groups.concat());
    calls.call(SETGROUPS, &[groups.len() as u64, list].map(Value));
    calls.check("unable to set the groups");
    let sets = &process.capabilities;
    let bounding = mask(&sets.bounding);
    for number in (0..MAX_CAPABILITIES).filter(|number| bounding >> number & 1 == 0) {
        // Fails for a capability unknown to the kernel.
        calls.call(PRCTL, &[PR_CAPBSET_DROP, number, 0, 0].map(Value));
    }
    calls.call(PRCTL, &[PR_SET_KEEPCAPS, 1, 0, 0].map(Value));
    calls.check("unable to keep capabilities");
    calls.call(SETRESGID, &[gid; 3].map(Value));
    calls.check("unable to set the group");
    calls.call(SETRESUID, &[uid; 3].map(Value));
    calls.check("unable to set the user");
    let [effective, permitted, inheritable] =
        [&sets.effective, &sets.permitted, &sets.inheritable].map(mask);
    let header = [CAPABILITY_VERSION_3.to_le_bytes(), [0; 4]].concat();
    let header = calls.data(&header);
    let words = [0, 32].map(|shift| {
        [effective, permitted, inheritable].map(|set| ((set >> shift) as u32).to_le_bytes())
    });
    let words = calls.data(&words.concat().concat());
    calls.call(CAPSET, &[header, words].map(Value));
    calls.check("unable to set the capabilities");
    let ambient = mask(&sets.ambient);
    for number in (0..MAX_CAPABILITIES).filter(|number| ambient >> number & 1 == 1) {
        let raise = [PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0];
        calls.call(PRCTL, &raise.map(Value));
        calls.check("unable to raise an ambient capability");
    }
}

/// Capabilities as a bit mask. Unknown ones were reported by a warning.
fn mask(names: &BTreeSet<String>) -> u64 {
    let numbers = CAPABILITIES.iter().enumerate();
    let given = numbers.filter(|(_, name)| names.contains(**name));
    given.fold(0, |mask, (number, _)| mask | 1 << number)
}

fn execute(calls: &mut Calls, process: &Process, home: &str) {
    let mut env = process.env.clone();
    let has = |name: &str| process.env.iter().any(|entry| entry.starts_with(name));
    if !has("HOME=") {
        env.push(format!("HOME={home}"));
    }
    let program = process.args.first().map(String::as_str).unwrap_or_default();
    let path = process
        .env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="));
    let candidates = match program.contains('/') {
        true => vec![program.to_string()],
        false => path
            .unwrap_or(DEFAULT_PATH)
            .split(':')
            .map(|dir| match dir {
                "" => format!("./{program}"),
                dir => format!("{dir}/{program}"),
            })
            .collect(),
    };
    let [candidates, args, env] = [&candidates, &process.args, &env].map(|texts| {
        texts
            .iter()
            .map(|text| calls.text(text))
            .collect::<Vec<_>>()
    });
    let [args, env] = [args, env].map(|addresses| calls.list(&addresses));
    calls.execute(&candidates, args, env, &format!("unable to run {program}"));
}
