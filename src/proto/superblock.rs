//! Identifies file systems by their superblocks.

use core::ffi::CStr;

/// The magic number of a file system.
struct Magic {
    /// Offset on the device, in bytes.
    offset: usize,
    bytes: &'static [u8],
    fs_type: &'static CStr,
}

/// Kernel sources: fs/xfs/libxfs/xfs_format.h, include/uapi/linux/magic.h, fs/erofs/erofs_fs.h,
/// fs/ext4/ext4.h, include/uapi/linux/btrfs_tree.h. The shortest one last of those in the first page.
const MAGICS: [Magic; 5] = [
    Magic {
        offset: 0,
        bytes: b"XFSB",
        fs_type: c"xfs",
    },
    Magic {
        offset: 0,
        bytes: b"hsqs",
        fs_type: c"squashfs",
    },
    Magic {
        offset: 0x400,
        bytes: &0xe0f5_e1e2_u32.to_le_bytes(),
        fs_type: c"erofs",
    },
    // Also ext2 and ext3: the ext4 driver mounts all three.
    Magic {
        offset: 0x438,
        bytes: &0xef53_u16.to_le_bytes(),
        fs_type: c"ext4",
    },
    Magic {
        offset: 0x1_0040,
        bytes: b"_BHRfS_M",
        fs_type: c"btrfs",
    },
];

/// Everything but btrfs's is within the first bytes of a device, which are read once.
const START: usize = 0x440;

/// The type of the file system, or `None`. `read_at` fills a buffer from an offset of the device, with zeros
/// past the device's end.
pub fn identify<E>(
    mut read_at: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
) -> Result<Option<&'static CStr>, E> {
    let mut start = [0; START];
    read_at(0, &mut start)?;
    for magic in &MAGICS {
        let length = magic.bytes.len();
        let mut bytes = [0; 8];
        let found = match start.get(magic.offset..magic.offset + length) {
            Some(found) => found,
            None => {
                read_at(magic.offset, &mut bytes)?;
                bytes.get(..length).unwrap_or_default()
            }
        };
        if found == magic.bytes {
            return Ok(Some(magic.fs_type));
        }
    }
    Ok(None)
}

/// Offset of `log_root` in a btrfs superblock, which is 0 without a log (include/uapi/linux/btrfs_tree.h).
const BTRFS_LOG_ROOT: usize = 0x1_0060;

/// Whether a btrfs has a log to be replayed by a mount.
pub fn btrfs_has_log<E>(
    mut read_at: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
) -> Result<bool, E> {
    let mut log_root = [0; 8];
    read_at(BTRFS_LOG_ROOT, &mut log_root)?;
    Ok(log_root != [0; 8])
}

/// Whether file systems of this type are always read-only.
pub fn is_read_only(fs_type: &CStr) -> bool {
    fs_type == c"squashfs" || fs_type == c"erofs"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::copy;

    fn identify(device: &[u8]) -> Option<&'static CStr> {
        super::identify(|offset, buffer| {
            copy(device.get(offset..).unwrap_or_default(), buffer);
            Ok::<_, ()>(())
        })
        .unwrap()
    }

    #[test]
    fn each_file_system_is_identified_by_its_magic() {
        for (offset, magic, fs_type) in [
            (0, &b"XFSB"[..], c"xfs"),
            (0, b"hsqs", c"squashfs"),
            (1024, b"\xe2\xe1\xf5\xe0", c"erofs"),
            (1024 + 56, b"\x53\xef", c"ext4"),
            (65536 + 64, b"_BHRfS_M", c"btrfs"),
        ] {
            let mut device = vec![0; 128 << 10];
            assert_eq!(identify(&device), None);
            device[offset..offset + magic.len()].copy_from_slice(magic);
            assert_eq!(identify(&device), Some(fs_type));
            device[offset] ^= 1;
            assert_eq!(identify(&device), None);
        }
    }

    #[test]
    fn a_btrfs_log_is_detected() {
        let has_log = |log_root: [u8; 8]| {
            super::btrfs_has_log(|offset, buffer| {
                assert_eq!(offset, 65536 + 96);
                buffer.copy_from_slice(&log_root);
                Ok::<_, ()>(())
            })
        };
        assert_eq!(has_log([0; 8]), Ok(false));
        assert_eq!(has_log([0, 0, 0, 0x40, 1, 0, 0, 0]), Ok(true));
    }

    #[test]
    fn a_device_too_short_for_a_superblock_has_none() {
        assert_eq!(identify(b""), None);
        assert_eq!(identify(b"XFS"), None);
        assert_eq!(identify(b"hsqs"), Some(c"squashfs"));
    }
}
