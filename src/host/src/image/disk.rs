//! Writes a tree to an image file: format and size; and gives a finished file its name.

use std::{
    fs,
    io::{self, Read},
    path::Path,
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use rustix::{
    fs::{CWD, RenameFlags, SeekFrom, ioctl_ficlone, renameat_with, seek},
    io::Errno,
};
use sha2::{Digest, Sha256};

use super::{
    erofs, ext4,
    inodes::{InodeKind, Inodes},
    layer::Layer,
    squashfs,
    tree::{Contents, LeafKind, Tree},
};
use crate::{progress::Progress, scratch::Scratch};

/// A file system for a root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Can be written to
    #[default]
    Ext4,
    /// Read-only and small: compressed
    Squashfs,
    /// Read-only and fast: not compressed
    Erofs,
}

impl Format {
    /// Its name for mount(8).
    pub fn name(self) -> &'static str {
        match self {
            Format::Ext4 => "ext4",
            Format::Squashfs => "squashfs",
            Format::Erofs => "erofs",
        }
    }
}

/// Parses `64M`, `1.5G`, `1GiB`, `65536K`, `512MB` or bytes. Units are powers of 1024; only those of `kB`,
/// `MB`, `GB` and `TB` are powers of 1000.
pub fn parse_size(text: &str) -> Result<u64> {
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let (base, exponent) = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => (1024, 0),
        "k" | "ki" | "kib" => (1024, 1),
        "m" | "mi" | "mib" => (1024, 2),
        "g" | "gi" | "gib" => (1024, 3),
        "t" | "ti" | "tib" => (1024, 4),
        "kb" => (1000, 1),
        "mb" => (1000, 2),
        "gb" => (1000, 3),
        "tb" => (1000, 4),
        _ => (0, 0),
    };
    let bytes = (|| {
        let unit = u128::from(u64::pow(base, exponent));
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = fraction
            .len()
            .try_into()
            .ok()
            .filter(|&digits| digits <= 9)?;
        let scale = u128::pow(10, digits);
        let whole: u64 = whole.parse().ok()?;
        let fraction: u64 = match fraction {
            "" => 0,
            digits => digits.parse().ok()?,
        };
        let bytes = (u128::from(whole) * scale + u128::from(fraction)) * unit / scale;
        u64::try_from(bytes).ok().filter(|_| base > 0)
    })();
    bytes.with_context(|| format!("{text:?} is not a size, such as 64M, 1.5G or 1GiB"))
}

/// Parses the size of an ext4 image, like [`parse_size`].
pub fn parse_disk_size(text: &str) -> Result<u64> {
    let size = parse_size(text)?;
    ensure!(
        ext4::sizes().contains(&size),
        "{size} bytes is out of range (8 MiB to 16 TiB); numbers without a unit are bytes"
    );
    Ok(size)
}

/// Writes the image to `image`, which must not exist, and returns its size.
pub fn write(
    tree: &Tree,
    layers: &[Layer],
    image: &Path,
    format: Format,
    size: Option<u64>,
    progress: &mut Progress,
) -> Result<u64> {
    let extent = tree.extent()?;
    let inodes = Inodes::of(tree)?;
    let uuid = identity(&inodes, format);
    let size = match format {
        Format::Ext4 => {
            let least = ext4::least_size(&extent)?;
            let size = size.map_or_else(|| ext4::good_size(&extent), Ok)?;
            ensure!(
                size >= least,
                "a size of {} MiB is too small: the files need {} MiB",
                size >> 20,
                least.div_ceil(1 << 20)
            );
            let file = create(image)?;
            ext4::write(&inodes, &extent, layers, &file, size, uuid, progress)?;
            size
        }
        Format::Erofs => {
            no_size(size, format)?;
            let file = create(image)?;
            erofs::write(&inodes, &extent, layers, &file, uuid, progress)?
        }
        Format::Squashfs => {
            no_size(size, format)?;
            squashfs::write(&inodes, &extent, layers, image, progress)?;
            fs::metadata(image)?.len()
        }
    };
    Ok(size)
}

/// Renames a file, and fails if the name was taken meanwhile.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some network file systems have only this (renameat2(2)).
        Err(Errno::INVAL | Errno::NOSYS) => fs::hard_link(from, to),
        renamed => Ok(renamed?),
    }
}

/// Makes an empty ext4 image for a volume. It is an error if `out` exists. The file is returned locked
/// (flock(2)) if the file system supports locks, and is already locked when it appears at `out`.
pub fn write_volume(out: &Path, size: u64) -> Result<fs::File> {
    let cannot = || format!("unable to create {}", out.display());
    let stage = Scratch::new_in(directory_of(out)).with_context(cannot)?;
    let path = stage.path().join("image");
    let mut uuid = [0; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut uuid)?;
    let image = create(&path)?;
    ext4::write_empty(&image, size, as_uuid(uuid)).with_context(cannot)?;
    let _ = image.try_lock();
    rename_new(&path, out).with_context(cannot)?;
    Ok(image)
}

/// Copies a disk as a reflink if the file system supports that (ioctl_ficlone(2)), otherwise as a sparse file.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let source = fs::File::open(from)?;
    let mut target = fs::File::create(to)?;
    let found = source.metadata()?;
    target.set_permissions(found.permissions())?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    target.set_len(found.len())?;
    let mut position = 0;
    while position < found.len() {
        let data = match seek(&source, SeekFrom::Data(position)) {
            // Only a hole follows (lseek(2)).
            Err(Errno::NXIO) => break,
            data => data?,
        };
        position = seek(&source, SeekFrom::Hole(data))?;
        seek(&source, SeekFrom::Start(data))?;
        seek(&target, SeekFrom::Start(data))?;
        let copied = io::copy(&mut (&source).take(position - data), &mut target)?;
        if copied < position - data {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// The directory that contains a file.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn create(path: &Path) -> io::Result<fs::File> {
    fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
}

fn no_size(size: Option<u64>, format: Format) -> Result<()> {
    if size.is_some() {
        bail!(
            "{} images are as large as their files: no size can be given",
            format.name()
        );
    }
    Ok(())
}

/// A UUID derived from the files, so that the same source gives the same image.
fn identity(inodes: &Inodes, format: Format) -> [u8; 16] {
    let mut digest = Sha256::new();
    digest.update(format.name());
    for inode in &inodes.list {
        let meta = inode.meta;
        digest.update((inode.path.len() as u64).to_le_bytes());
        digest.update(&inode.path);
        for number in [
            inode.type_bits() | meta.mode,
            meta.uid,
            meta.gid,
            inode.links,
        ] {
            digest.update(number.to_le_bytes());
        }
        digest.update(meta.mtime.seconds.to_le_bytes());
        digest.update(meta.mtime.nanoseconds.to_le_bytes());
        if let InodeKind::Leaf(LeafKind::File(Contents { size, .. })) = inode.kind {
            digest.update(size.to_le_bytes());
        }
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.finalize()[..16]);
    as_uuid(uuid)
}

/// Sets the version and variant bits (RFC 9562, version 4).
fn as_uuid(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_size_has_a_unit_and_a_fraction() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64M", 64 << 20),
            ("64m", 64 << 20),
            ("1GiB", 1 << 30),
            ("1.5G", 3 << 29),
            ("0.5Ki", 512),
            ("2TB", 2_000_000_000_000),
            ("10kB", 10_000),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in [
            "",
            "M",
            "x",
            "-1",
            ".5G",
            "1.2.3G",
            "1P",
            "1 G",
            "99999999999G",
            "1GG",
        ] {
            let error = parse_size(text).unwrap_err().to_string();
            assert!(error.contains("1.5G"), "{text}: {error}");
        }
        assert_eq!(parse_size("1.G").unwrap(), 1 << 30);
    }

    #[test]
    fn a_copied_disk_keeps_its_data_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        let disk = fs::File::create(&from).unwrap();
        disk.set_len(64 << 20).unwrap();
        for at in [0, 30 << 20, (64 << 20) - 5] {
            disk.write_all_at(b"data!", at).unwrap();
        }
        fs::write(&to, vec![1; 100]).unwrap();
        copy(&from, &to).unwrap();
        let same = fs::read(&from).unwrap() == fs::read(&to).unwrap();
        let used = |path| fs::metadata(path).unwrap().blocks() * 512;
        assert!(same && used(&to) <= used(&from), "{}", used(&to));
        // An empty file, and a file that is a single hole.
        for size in [0, 1 << 20] {
            fs::File::create(&from).unwrap().set_len(size).unwrap();
            copy(&from, &to).unwrap();
            assert_eq!(fs::read(&to).unwrap(), vec![0; size as usize]);
        }
    }

    #[test]
    fn an_image_has_a_valid_file_system_size() {
        assert_eq!(parse_disk_size("8M").unwrap(), 8 << 20);
        for text in ["0", "5", "8191K", "16T", "999999T"] {
            let error = parse_disk_size(text).unwrap_err().to_string();
            assert!(
                error.ends_with(
                    "is out of range (8 MiB to 16 TiB); numbers without a unit are bytes"
                ),
                "{text}: {error}"
            );
        }
    }
}
