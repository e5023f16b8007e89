//! Lines of /proc/self/mountinfo (proc_pid_mountinfo(5)).

use crate::bytes::{split, split_once};
use crate::decimal;
use core::ffi::CStr;

/// Maximum length of a path for a system call, its NUL included (include/uapi/linux/limits.h). Mount points
/// can be deeper.
pub const PATH_MAX: usize = 4096;

/// A mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// Its id, unique while it is mounted.
    pub id: u32,
    /// Major number of its device; 0 without a block device.
    pub major: u32,
    /// Minor number of its device.
    pub minor: u32,
    /// Where it is mounted.
    pub mount_point: Escaped<'a>,
    /// The file system's type. Empty if the line ends before it.
    pub fs_type: Escaped<'a>,
    /// The source, in a format specific to the file system. Empty if the line ends before it.
    pub source: Escaped<'a>,
    /// The file system itself is writable, even if this mount is not.
    pub is_writable: bool,
    /// The line ends before its last field, for instance as it did not fit in a buffer: its last field may be
    /// truncated.
    pub is_truncated: bool,
}

/// A field in which spaces, tabs, line feeds, `\` and `#` are escaped as `\` and three octal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Escaped<'a>(&'a [u8]);

/// A decoded field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded<'r> {
    /// As much of it as fit.
    pub text: &'r CStr,
    /// It was truncated.
    pub is_truncated: bool,
}

impl Mount<'_> {
    /// Whether it is a btrfs, which has an anonymous device number, as it can have many devices; its source
    /// names one.
    pub fn is_btrfs(&self) -> bool {
        self.major == 0 && self.fs_type.0 == b"btrfs"
    }
}

/// Parses a line, with or without its line feed:
/// `id parent major:minor root mount-point options optional… - type source super-options`.
/// `None` if it ends before the mount point.
pub fn parse(line: &[u8]) -> Option<Mount<'_>> {
    let mut fields = split(line.trim_ascii_end(), b' ');
    let id = decimal::parse(fields.next()?)?;
    let _parent = fields.next()?;
    let (major, minor) = split_once(fields.next()?, b':')?;
    let _root = fields.next()?;
    let mount_point = fields.next().filter(|path| !path.is_empty())?;
    let _options = fields.find(|field| *field == b"-");
    let (fs_type, source, options) = (fields.next(), fields.next(), fields.next());
    Some(Mount {
        id,
        major: decimal::parse(major)?,
        minor: decimal::parse(minor)?,
        mount_point: Escaped(mount_point),
        fs_type: Escaped(fs_type.unwrap_or(&[])),
        source: Escaped(source.unwrap_or(&[])),
        is_writable: options.is_some_and(|options| options.starts_with(b"rw")),
        is_truncated: options.is_none(),
    })
}

impl<'a> Escaped<'a> {
    /// A field of another table with the same escapes: /proc/swaps.
    pub fn new(field: &'a [u8]) -> Self {
        Self(field)
    }

    /// The field as it is, with escapes.
    pub fn raw(self) -> &'a [u8] {
        self.0
    }

    /// Decodes it into `room`, as much as fits, NUL-terminated.
    pub fn decode(self, room: &mut [u8]) -> Decoded<'_> {
        let mut rest = self.0;
        let mut length = 0;
        let limit = room.len().saturating_sub(1);
        while let Some((byte, others)) = next_byte(rest)
            && let Some(slot) = room.get_mut(..limit).and_then(|room| room.get_mut(length))
        {
            *slot = byte;
            length += 1;
            rest = others;
        }
        if let Some(slot) = room.get_mut(length) {
            *slot = 0;
        }
        Decoded {
            text: CStr::from_bytes_until_nul(room).unwrap_or(c""),
            is_truncated: !rest.is_empty(),
        }
    }
}

/// Decodes the first byte of an escaped text. Returns it and the rest.
fn next_byte(text: &[u8]) -> Option<(u8, &[u8])> {
    if let [
        b'\\',
        a @ b'0'..=b'3',
        b @ b'0'..=b'7',
        c @ b'0'..=b'7',
        rest @ ..,
    ] = text
    {
        // Names contain no NUL.
        let byte = (a & 3) << 6 | (b & 7) << 3 | (c & 7);
        if byte != 0 {
            return Some((byte, rest));
        }
    }
    text.split_first().map(|(byte, rest)| (*byte, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(field: Escaped<'_>) -> String {
        let mut room = [0xff; PATH_MAX];
        let decoded = field.decode(&mut room);
        assert!(!decoded.is_truncated);
        decoded.text.to_str().unwrap().to_owned()
    }

    fn mount_point(line: &str) -> Option<String> {
        parse(line.as_bytes()).map(|mount| decoded(mount.mount_point))
    }

    #[test]
    fn the_fields_of_a_mount_are_found() {
        let mount =
            parse(b"36 35 254:16 / /data rw,relatime shared:1 - ext4 /dev/vdb rw\n").unwrap();
        assert_eq!((mount.id, mount.major, mount.minor), (36, 254, 16));
        assert_eq!(decoded(mount.mount_point), "/data");
        assert_eq!(mount.fs_type.raw(), b"ext4");
        assert_eq!(decoded(mount.source), "/dev/vdb");
        assert!(!mount.is_truncated);
        let memory = parse(b"24 1 0:22 / /run rw,nosuid,nodev - tmpfs my\\040tmpfs rw,mode=755");
        let memory = memory.unwrap();
        assert_eq!((memory.major, memory.minor), (0, 22));
        assert!(!mount.is_btrfs() && !memory.is_btrfs());
        let btrfs = parse(b"37 35 0:35 / /data rw,relatime - btrfs /dev/vdb rw,space_cache=v2\n");
        assert!(btrfs.unwrap().is_btrfs());
        assert_eq!(decoded(memory.source), "my tmpfs");
        assert!(mount.is_writable && memory.is_writable);
        let read_only = parse(b"24 1 8:1 / /a rw - ext4 /dev/sda ro,discard").unwrap();
        assert!(!read_only.is_writable);
        let optional =
            b"1 2 8:1 / /a rw shared:1 master:2 propagate_from:3 unbindable - xfs none rw";
        assert_eq!(parse(optional).unwrap().fs_type.raw(), b"xfs");
    }

    #[test]
    fn escaped_characters_are_decoded() {
        assert_eq!(
            mount_point(r"1 2 8:1 / /a\040b\134c\012\043 rw - ext4 x rw"),
            Some("/a b\\c\n#".into())
        );
        for odd in [r"/a\04", r"/a\", r"/a\08x", r"/a\000", r"/a\400", r"/a\x41"] {
            assert_eq!(
                mount_point(&format!("1 2 8:1 / {odd} rw - ext4 x rw")),
                Some(odd.into())
            );
        }
        assert_eq!(
            mount_point(r"1 2 8:1 / /\303\251 rw - ext4 x rw"),
            Some("/é".into())
        );
    }

    #[test]
    fn a_line_without_a_mount_point_is_ignored() {
        for line in [
            "",
            "36",
            "36 35 8:1",
            "36 35 8:1 /",
            "36 35 8:1 / ",
            "36 35 8 / /a",
            "x 35 8:1 / /a",
        ] {
            assert_eq!(mount_point(line), None, "{line}");
        }
    }

    #[test]
    fn a_truncated_line_is_marked_and_keeps_its_fields() {
        let line = "36 35 254:16 / /data rw,relatime shared:1 - ext4 /dev/vdb rw";
        let start = line.find(" rw,").unwrap();
        for end in start..line.len() - 3 {
            let mount = parse(&line.as_bytes()[..end]).unwrap();
            assert!(mount.is_truncated, "{end}");
            assert_eq!(decoded(mount.mount_point), "/data");
            assert_eq!((mount.id, mount.major), (36, 254));
        }
    }

    #[test]
    fn a_path_longer_than_the_buffer_is_truncated_and_marked() {
        let deep = "/d".repeat(PATH_MAX);
        let line = format!("1 2 8:1 / {deep} rw - ext4 /dev/vdb rw");
        let mount = parse(line.as_bytes()).unwrap();
        assert!(!mount.is_truncated);
        assert_eq!(mount.fs_type.raw(), b"ext4");
        let mut room = [0; PATH_MAX];
        let decoded = mount.mount_point.decode(&mut room);
        assert!(decoded.is_truncated);
        assert_eq!(decoded.text.to_bytes(), &deep.as_bytes()[..PATH_MAX - 1]);
        let mut exact = [0; 3];
        let decoded = Escaped(b"/d").decode(&mut exact);
        assert_eq!((decoded.text, decoded.is_truncated), (c"/d", false));
        let none = Escaped(b"/d").decode(&mut []);
        assert_eq!((none.text, none.is_truncated), (c"", true));
    }
}
