//! Block devices as the kernel lists them, and whether an ext file system was left clean.

use crate::bytes::words;
use crate::decimal;

/// A device number, in its two parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceNumber {
    /// The driver; 0: no block device.
    pub major: u32,
    /// The device of that driver.
    pub minor: u32,
}

impl DeviceNumber {
    /// Parses two decimal numbers.
    pub fn parse(major: &[u8], minor: &[u8]) -> Option<Self> {
        Some(Self {
            major: decimal::parse(major)?,
            minor: decimal::parse(minor)?,
        })
    }
}

/// Parses a line of /proc/partitions, `254 16 8192 vdb`: number and name (proc_partitions(5)). `None` for
/// the header and the empty line after it.
pub fn partition(line: &[u8]) -> Option<(DeviceNumber, &[u8])> {
    let mut fields = words(line);
    let number = DeviceNumber::parse(fields.next()?, fields.next()?)?;
    let _blocks = fields.next()?;
    Some((number, fields.next()?))
}

/// Offset of an ext superblock on its device, and how much of it is read, in bytes.
pub const EXT_SUPERBLOCK: (u64, usize) = (1024, 256);

/// Why an ext2, ext3 or ext4 file system is not clean, by its superblock
/// (Documentation/filesystems/ext4/super.rst); `None` when it is, or it is not one of these.
pub fn ext_fault(superblock: &[u8]) -> Option<&'static str> {
    let u16_at = |at: usize| {
        let bytes = superblock.get(at..)?.first_chunk()?;
        Some(u16::from_le_bytes(*bytes))
    };
    let u32_at = |at: usize| {
        let bytes = superblock.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    // s_magic
    if u16_at(0x38)? != 0xef53 {
        return None;
    }
    // s_feature_incompat: EXT4_FEATURE_INCOMPAT_RECOVER
    if u32_at(0x60)? & 0x4 != 0 {
        return Some("its journal must be recovered");
    }
    // s_state: EXT4_VALID_FS, EXT4_ERROR_FS
    match u16_at(0x3a)? & 3 {
        1 => {}
        0 => return Some("it was not unmounted"),
        _ => return Some("it has errors"),
    }
    // s_last_orphan, and s_feature_ro_compat: EXT4_FEATURE_RO_COMPAT_ORPHAN_PRESENT
    match u32_at(0xe8)? != 0 || u32_at(0x64)? & 0x1_0000 != 0 {
        true => Some("deleted files are still open"),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::split;

    #[test]
    fn a_line_of_partitions_has_a_number_and_a_name() {
        let table = b"major minor  #blocks  name\n\n 254        0      32768 vda\n 259       11 8 nvme0n1p1\n   7        1\n";
        let devices: Vec<_> = split(table, b'\n').filter_map(partition).collect();
        let number = |major, minor| DeviceNumber { major, minor };
        assert_eq!(
            devices,
            [
                (number(254, 0), &b"vda"[..]),
                (number(259, 11), &b"nvme0n1p1"[..])
            ]
        );
    }

    #[test]
    fn a_superblock_shows_whether_the_file_system_is_clean() {
        let mut clean = [0; EXT_SUPERBLOCK.1];
        clean[0x38..0x3c].copy_from_slice(&[0x53, 0xef, 1, 0]);
        let with = |at: usize, value: u8| {
            let mut superblock = clean;
            superblock[at] = value;
            ext_fault(&superblock)
        };
        assert_eq!(ext_fault(&clean), None);
        assert_eq!(with(0x60, 0xc6), Some("its journal must be recovered"));
        assert_eq!(with(0x3a, 0), Some("it was not unmounted"));
        assert_eq!(with(0x3a, 3), Some("it has errors"));
        assert_eq!(with(0xe9, 1), Some("deleted files are still open"));
        assert_eq!(with(0x66, 1), Some("deleted files are still open"));
        // Not ext, or not all of it there.
        assert_eq!(with(0x38, 0), None);
        assert_eq!(ext_fault(&clean[..0x60]), None);
        assert_eq!(ext_fault(&[]), None);
    }
}
