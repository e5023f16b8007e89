//! Lines of /proc/self/mountinfo (proc_pid_mountinfo(5)).

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted, with a NUL at the end.
    pub target: heapless::Vec<u8, { crate::config::PATH }>,
    /// Whether a block device is behind it: its device's major number is not 0.
    pub on_device: bool,
}

/// Reads a line: `36 35 98:0 /root /target options optional… - type source options`.
pub fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = fields.nth(2)?;
    let escaped = fields.nth(1)?;
    let mut target = heapless::Vec::new();
    let mut rest = escaped;
    while let [first, others @ ..] = rest {
        rest = others;
        let byte = match (first, others) {
            // Space, tab, line feed and backslash are in octal.
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    others @ ..,
                ],
            ) => {
                rest = others;
                (a - b'0') << 6 | (b - b'0') << 3 | (c - b'0')
            }
            _ => *first,
        };
        target.push(byte).ok()?;
    }
    target.push(0).ok()?;
    Some(Mount {
        target,
        on_device: !device.starts_with(b"0:"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Option<(String, bool)> {
        let mount = parse(line.as_bytes())?;
        let target = String::from_utf8(mount.target.to_vec()).unwrap();
        Some((
            target.strip_suffix('\0').unwrap().to_owned(),
            mount.on_device,
        ))
    }

    #[test]
    fn the_target_and_the_kind_of_device_are_found() {
        let volume = "36 35 254:16 / /data rw,relatime shared:1 - ext4 /dev/vdb rw";
        assert_eq!(read(volume), Some(("/data".into(), true)));
        let memory = "24 1 0:22 / /run rw,nosuid,nodev - tmpfs tmpfs rw,mode=755";
        assert_eq!(read(memory), Some(("/run".into(), false)));
    }

    #[test]
    fn escaped_characters_are_decoded() {
        assert_eq!(
            read(r"1 2 8:1 / /a\040b\134c\012 rw - ext4 x rw"),
            Some(("/a b\\c\n".into(), true))
        );
        assert_eq!(
            read(r"1 2 8:1 / /a\04 rw - ext4 x rw"),
            Some((r"/a\04".into(), true))
        );
    }

    #[test]
    fn a_torn_line_is_no_mount() {
        for line in ["", "36", "36 35 8:1", "36 35 8:1 /"] {
            assert_eq!(read(line), None);
        }
    }
}
