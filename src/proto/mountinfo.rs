//! Lines of /proc/self/mountinfo (proc_pid_mountinfo(5)).

use crate::bytes::split;

/// Where something is mounted, with a NUL at the end.
pub type Target = heapless::Vec<u8, { crate::config::PATH }>;

/// Reads a line: `36 35 98:0 /root /target options optional… - type source options`. The answer is
/// whether a block device is behind it: its device's major number is not 0.
pub fn parse(line: &[u8], target: &mut Target) -> Option<bool> {
    let mut fields = split(line, b' ');
    let (_id, _parent) = (fields.next(), fields.next());
    let on_device = !fields.next()?.starts_with(b"0:");
    let _root = fields.next();
    let mut rest = fields.next()?;
    target.clear();
    while let [first, others @ ..] = rest {
        let byte;
        (byte, rest) = match rest {
            // Space, tab, line feed and backslash are in octal.
            [b'\\', a, b, c, others @ ..] => ((a & 3) << 6 | (b & 7) << 3 | (c & 7), others),
            _ => (*first, others),
        };
        target.push(byte).ok()?;
    }
    target.push(0).ok()?;
    Some(on_device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Option<(String, bool)> {
        let mut target = Target::new();
        let on_device = parse(line.as_bytes(), &mut target)?;
        let target = String::from_utf8(target.to_vec()).unwrap();
        Some((target.strip_suffix('\0').unwrap().to_owned(), on_device))
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
