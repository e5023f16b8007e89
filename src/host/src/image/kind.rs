//! Detects a file's format, for error messages.

use std::{fmt, fs::File, io::Read, path::Path};

use anyhow::{Context, Result};

use super::disk::Format;

/// A file's format, detected from its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only zeros, or no bytes.
    Empty,
    /// An image with a file system that a VM can mount.
    Image(Format),
    /// An image with another file system.
    OtherImage(&'static str),
    /// A tar archive.
    Archive,
    /// A compressed file, such as an archive.
    Compressed(&'static str),
    /// A program.
    Program,
    /// A disk image in a format other than raw.
    Disk(&'static str),
    /// Another known format.
    Other(&'static str),
    /// An unknown format.
    Unknown,
}

/// Magic numbers by offset.
const MAGIC: [(usize, &[u8], Kind); 20] = [
    (0, b"hsqs", Kind::Image(Format::Squashfs)),
    (1024, &[0xe2, 0xe1, 0xf5, 0xe0], Kind::Image(Format::Erofs)),
    (0, b"XFSB", Kind::OtherImage("XFS")),
    (0x10040, b"_BHRfS_M", Kind::OtherImage("Btrfs")),
    (257, b"ustar", Kind::Archive),
    (0, &[0x1f, 0x8b], Kind::Compressed("gzip")),
    (0, &[0x28, 0xb5, 0x2f, 0xfd], Kind::Compressed("zstd")),
    (
        0,
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        Kind::Compressed("xz"),
    ),
    (0, b"BZh", Kind::Compressed("bzip2")),
    (0, &[0x04, 0x22, 0x4d, 0x18], Kind::Compressed("lz4")),
    (0, b"PK\x03\x04", Kind::Other("a zip archive")),
    (0, b"\x7fELF", Kind::Program),
    (0, b"#!", Kind::Other("a script")),
    (0, b"QFI\xfb", Kind::Disk("qcow2")),
    (0, b"KDMV", Kind::Disk("VMDK")),
    (
        0,
        b"070701",
        Kind::Other("a cpio archive, such as an initrd"),
    ),
    (0, b"{", Kind::Other("a JSON document")),
    (0, b"FROM ", Kind::Other("a Dockerfile")),
    // Two bytes in the middle of a file, which other formats may have there by chance.
    (1080, &[0x53, 0xef], Kind::Image(Format::Ext4)),
    (510, &[0x55, 0xaa], Kind::Disk("partitioned")),
];

/// Detects the format of a file.
pub fn describe(path: &Path) -> Result<Kind> {
    let shown = path.display();
    let mut start = vec![];
    let file = File::open(path).with_context(|| format!("unable to open {shown}"))?;
    let read = file.take(0x10048).read_to_end(&mut start);
    read.with_context(|| format!("unable to read {shown}"))?;
    if start.iter().all(|&byte| byte == 0) {
        return Ok(Kind::Empty);
    }
    let found = MAGIC.into_iter().find(|(at, magic, _)| {
        start
            .get(*at..at + magic.len())
            .is_some_and(|bytes| bytes == *magic)
    });
    Ok(found.map_or(Kind::Unknown, |(.., kind)| kind))
}

impl Kind {
    /// Whether it is an image whose file system cannot be written to.
    pub fn is_packed(self) -> bool {
        matches!(self, Kind::Image(Format::Squashfs | Format::Erofs))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Kind::Empty => f.write_str("empty"),
            Kind::Image(format) => write!(f, "an image with {}", format.name()),
            Kind::OtherImage(name) => write!(f, "an image with {name}"),
            Kind::Archive => f.write_str("a tar archive"),
            Kind::Compressed(name) => write!(f, "compressed with {name}"),
            Kind::Program => f.write_str("a program (ELF)"),
            Kind::Disk("partitioned") => f.write_str("a disk with partitions"),
            Kind::Disk(name) => write!(f, "a {name} disk image"),
            Kind::Other(what) => f.write_str(what),
            Kind::Unknown => f.write_str("of an unknown kind"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_file_is_identified_by_its_first_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for (at, magic, kind) in MAGIC {
            let mut bytes = vec![1; at];
            bytes.extend(magic);
            fs::write(&path, bytes).unwrap();
            assert_eq!(describe(&path).unwrap(), kind, "{kind}");
        }
        // Other formats may have ext4's magic number in their data, and ext4 has a boot sector.
        let mut bytes = vec![1; 2048];
        bytes[1080..1082].copy_from_slice(&[0x53, 0xef]);
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(describe(&path).unwrap(), Kind::Image(Format::Ext4));
        bytes[..4].copy_from_slice(b"hsqs");
        fs::write(&path, &bytes).unwrap();
        assert_eq!(describe(&path).unwrap(), Kind::Image(Format::Squashfs));
        fs::write(&path, [0; 100]).unwrap();
        assert_eq!(describe(&path).unwrap(), Kind::Empty);
        fs::write(&path, "hello").unwrap();
        assert_eq!(describe(&path).unwrap(), Kind::Unknown);
        assert!(describe(&dir.path().join("none")).is_err());
    }
}
