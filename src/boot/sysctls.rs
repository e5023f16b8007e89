//! Sets sysctls (sysctl(8), proc_sys(5)).

use crate::context;
use crate::error::{self, Log, Result};
use crate::process::helper::HelperLog;
use crate::sys::files;
use core::ffi::CStr;
use proto::config::Config;
use proto::message::ToLossy;
use proto::sysctl;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// Docker's defaults: every user may bind port 80, and ping.
const DEFAULTS: [(&CStr, &[u8]); 2] = [
    (c"/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0"),
    (c"/proc/sys/net/ipv4/ping_group_range", b"0 2147483647"),
];

/// Sets the defaults, before the configured ones; a kernel without IPv4 has none of them.
pub fn set_defaults(log: &mut dyn Log) {
    for &(path, value) in &DEFAULTS {
        match set(path, value) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => log.warn(&error::on("set", path)(errno)),
        }
    }
}

/// Whether any are configured.
pub fn are_configured(config: &Config) -> bool {
    config.sysctls().next().is_some()
}

/// Sets the configured ones. Runs in a helper, as allocating huge pages may take long.
pub fn set_all(config: &Config, log: &HelperLog) -> Result {
    let mut room = sysctl::ROOM;
    for (name, value) in config.sysctls() {
        log.step(&format_args!("set {name}"));
        sysctl::path(name, &mut room)
            .ok_or(Errno::INVAL)
            .and_then(|path| set(path, value.as_bytes()))
            .map_err(context!("set {name} to {}", value.as_bytes().lossy()))?;
    }
    Ok(())
}

fn set(path: &CStr, value: &[u8]) -> Result<(), Errno> {
    let file = files::open(path, OFlags::WRONLY)?;
    // The kernel ignores an empty write: an empty value is an empty line.
    let value = if value.is_empty() { b"\n" } else { value };
    match files::write(&file, value)? {
        count if count == value.len() => Ok(()),
        // `1 2` for a single number: the kernel has set it to 1.
        _ => Err(Errno::INVAL),
    }
}
