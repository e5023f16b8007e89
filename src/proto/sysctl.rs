//! Sysctls: their names (sysctl(8)), and their paths (proc_sys(5)).

use crate::bytes::split;
use core::ffi::CStr;

const ROOT: &[u8] = b"/proc/sys/";

/// Maximum length of a path, its NUL included.
const PATH: usize = 256;

/// Buffer for a path.
pub type Room = [u8; PATH];

/// An empty buffer.
pub const ROOM: Room = [0; PATH];

/// The path of a sysctl below `/proc/sys`; `None` if a part of the name is empty, `.` or
/// `..`, or the name is too long.
///
/// The first `.` or `/` is the separator. If that is `.`, a slash stands for a dot:
/// `net.ipv4.conf.eth0/1.forwarding` is `net/ipv4/conf/eth0.1/forwarding`.
pub fn path<'r>(name: &str, room: &'r mut Room) -> Option<&'r CStr> {
    let separator = name.bytes().find(|byte| b"./".contains(byte));
    let is_dotted = separator == Some(b'.');
    let below = ROOT.len()..ROOT.len() + name.len();
    room.get_mut(..ROOT.len())?.copy_from_slice(ROOT);
    for (place, byte) in room.get_mut(below.clone())?.iter_mut().zip(name.bytes()) {
        *place = match byte {
            0 => return None,
            b'.' if is_dotted => b'/',
            b'/' if is_dotted => b'.',
            other => other,
        };
    }
    *room.get_mut(below.end)? = 0;
    let mut parts = split(room.get(below)?, b'/');
    if parts.any(|part| matches!(part, b"" | b"." | b"..")) {
        return None;
    }
    CStr::from_bytes_until_nul(room).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(name: &str) -> Option<String> {
        path(name, &mut ROOM.clone()).map(|path| path.to_str().unwrap().to_owned())
    }

    #[test]
    fn dots_and_slashes_separate_the_parts_of_a_name() {
        for (name, wanted) in [
            ("net.core.somaxconn", "net/core/somaxconn"),
            ("net/core/somaxconn", "net/core/somaxconn"),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                "net/ipv4/conf/eth0.1/forwarding",
            ),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                "net/ipv4/conf/eth0.1/forwarding",
            ),
            ("kernel", "kernel"),
        ] {
            assert_eq!(shown(name), Some(format!("/proc/sys/{wanted}")), "{name}");
        }
    }

    #[test]
    fn a_name_stays_below_proc_sys() {
        for name in [
            "",
            ".",
            "..",
            "/",
            "/etc/passwd",
            ".a",
            "a.",
            "a..b",
            "a//b",
            "a/",
            "a/../b",
            "../a",
            "a/./b",
            "a.//.b",
            "a./.b",
            "a\0b",
        ] {
            assert_eq!(shown(name), None, "{name:?}");
        }
        assert!(shown(&"a".repeat(PATH - 11)).is_some());
        assert!(shown(&"a".repeat(PATH - 10)).is_none());
    }
}
