//! Resource limits of the workload and of commands (setrlimit(2)).

use crate::context;
use crate::error::Result;
use proto::rlimit::{Resource, Rlimits};
use rustix::process::{Resource as Raw, Rlimit, setrlimit};

/// Sets them for this process, which is root still: limits may have to be raised.
pub fn apply(rlimits: &Rlimits) -> Result {
    for (resource, limit) in rlimits.iter() {
        let limit = Rlimit {
            current: limit.soft,
            maximum: limit.hard,
        };
        let (resource, name) = raw(resource);
        setrlimit(resource, limit).map_err(context!("set the limit {name}"))?;
    }
    Ok(())
}

/// The kernel's resource, and its name for errors.
fn raw(resource: Resource) -> (Raw, &'static str) {
    match resource {
        Resource::Cpu => (Raw::Cpu, "CPU"),
        Resource::Fsize => (Raw::Fsize, "FSIZE"),
        Resource::Data => (Raw::Data, "DATA"),
        Resource::Stack => (Raw::Stack, "STACK"),
        Resource::Core => (Raw::Core, "CORE"),
        Resource::Rss => (Raw::Rss, "RSS"),
        Resource::Nproc => (Raw::Nproc, "NPROC"),
        Resource::Nofile => (Raw::Nofile, "NOFILE"),
        Resource::Memlock => (Raw::Memlock, "MEMLOCK"),
        Resource::As => (Raw::As, "AS"),
        Resource::Locks => (Raw::Locks, "LOCKS"),
        Resource::Sigpending => (Raw::Sigpending, "SIGPENDING"),
        Resource::Msgqueue => (Raw::Msgqueue, "MSGQUEUE"),
        Resource::Nice => (Raw::Nice, "NICE"),
        Resource::Rtprio => (Raw::Rtprio, "RTPRIO"),
        Resource::Rttime => (Raw::Rttime, "RTTIME"),
    }
}
