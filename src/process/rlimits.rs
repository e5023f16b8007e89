//! Resource limits of the workload and of commands (setrlimit(2)).

use proto::rlimit::{Resource, Rlimits};
use rustix::io::Errno;
use rustix::process::{Resource as Raw, Rlimit, setrlimit};

/// Sets the limits of this process, which must still be root to raise them. The error names the limit that
/// cannot be set.
pub fn apply(rlimits: &Rlimits) -> Result<(), (Resource, Errno)> {
    for (resource, limit) in rlimits.iter() {
        let limit = Rlimit {
            current: limit.soft,
            maximum: limit.hard,
        };
        let known = RAW.iter().find(|raw| **raw as usize == resource.number());
        if let Some(raw) = known {
            setrlimit(*raw, limit).map_err(|errno| (resource, errno))?;
        }
    }
    Ok(())
}

/// All resources: rustix has no conversion from a number.
const RAW: [Raw; 16] = [
    Raw::Cpu,
    Raw::Fsize,
    Raw::Data,
    Raw::Stack,
    Raw::Core,
    Raw::Rss,
    Raw::Nproc,
    Raw::Nofile,
    Raw::Memlock,
    Raw::As,
    Raw::Locks,
    Raw::Sigpending,
    Raw::Msgqueue,
    Raw::Nice,
    Raw::Rtprio,
    Raw::Rttime,
];
