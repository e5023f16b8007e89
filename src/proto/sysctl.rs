//! Kernel parameters by the names of sysctl(8).

use crate::bytes::split;
use core::ffi::CStr;

const ROOT: &[u8] = b"/proc/sys/";

/// Longest path of a parameter, its NUL included.
const PATH: usize = 256;

/// The file of a parameter, below `/proc/sys` (proc_sys(5)).
#[derive(Clone, Debug)]
pub struct Path(heapless::Vec<u8, PATH>);

impl Path {
    /// The file of the parameter of that name; `None`: a part of it is empty, `.` or `..`, or it is
    /// too long.
    ///
    /// What separates the parts is the first `.` or `/` in it. Among dots a slash stands for a dot:
    /// `net.ipv4.conf.eth0/1.forwarding` is `net/ipv4/conf/eth0.1/forwarding`.
    pub fn new(name: &str) -> Option<Self> {
        let separator = name.bytes().find(|byte| b"./".contains(byte));
        let is_dotted = separator == Some(b'.');
        let mut path = heapless::Vec::from_slice(ROOT).ok()?;
        for byte in name.bytes() {
            let byte = match byte {
                0 => return None,
                b'.' if is_dotted => b'/',
                b'/' if is_dotted => b'.',
                other => other,
            };
            path.push(byte).ok()?;
        }
        let mut parts = split(path.get(ROOT.len()..)?, b'/');
        if parts.any(|part| matches!(part, b"" | b"." | b"..")) {
            return None;
        }
        path.push(0).ok()?;
        Some(Self(path))
    }

    /// The whole path.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(name: &str) -> Option<String> {
        Path::new(name).map(|path| path.as_c_str().to_str().unwrap().to_owned())
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
