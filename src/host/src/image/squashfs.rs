//! Makes squashfs images with squashfs-tools, from a tar stream: the smallest read-only format, and the
//! slowest to read.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    inodes::{Inode, InodeKind, Inodes},
    layer::Layer,
    tree::{Extent, LeafKind, Meta},
};
use crate::{assets, progress::Progress};

/// Whether squashfs can store an attribute: it has no access lists.
pub fn has_attribute(name: &str) -> bool {
    !name.starts_with("system.")
}

/// Makes the image `out`, which must not exist.
pub fn write(
    inodes: &Inodes,
    extent: &Extent,
    layers: &[Layer],
    out: &Path,
    progress: &mut Progress,
) -> Result<()> {
    let root = inodes.list[0].meta;
    ensure!(
        root.xattrs.is_empty(),
        "squashfs-tools cannot give the root directory its extended attributes"
    );
    // A file, as a pipe could fill up before it is read.
    let mut stderr = tempfile::tempfile()?;
    let mut child = Command::new(assets::tool("sqfstar")?)
        .args(["-quiet", "-no-progress", "-exports", "-xattrs"])
        // Uncompressed inodes: the root's is modified below.
        .arg("-noI")
        .args(["-mkfs-time", "0", "-root-mode"])
        .arg(format!("{:o}", root.mode))
        .args(["-root-uid", &root.uid.to_string()])
        .args(["-root-gid", &root.gid.to_string()])
        .arg(out)
        .env("LC_ALL", "C")
        .env_remove("SOURCE_DATE_EPOCH")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(stderr.try_clone()?)
        .spawn()
        .context("unable to start sqfstar")?;
    let pipe = child.stdin.take().context("standard input is piped")?;
    let sent = send(inodes, extent, layers, pipe, progress);
    progress.phase("compressing", 0);
    let status = child.wait()?;
    // sqfstar's own message is more useful than the broken pipe.
    let broken = sent.as_ref().is_err_and(|error| {
        let cause = error.root_cause().downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
    });
    if !broken {
        sent?;
    }
    let mut text = vec![];
    stderr.rewind()?;
    stderr.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    if !status.success() {
        bail!("unable to make a squashfs file system: {}", text.trim_end());
    }
    if !text.is_empty() {
        progress.end();
    }
    for line in text.lines() {
        let _ = writeln!(io::stderr(), "sqfstar: {line}");
    }
    set_root_time(out, seconds(root))
}

/// Times are unsigned 32-bit numbers.
fn seconds(meta: &Meta) -> u32 {
    let seconds = meta.mtime.seconds.clamp(0, u32::MAX.into());
    u32::try_from(seconds).unwrap_or(0)
}

/// Sets the root's mtime: sqfstar 4.5 ignores -root-time and uses the current time.
/// (squashfs_fs.h: squashfs_super_block, squashfs_base_inode)
fn set_root_time(image: &Path, seconds: u32) -> Result<()> {
    /// Offsets in the superblock: the root's inode, and the inode table.
    const ROOT_INODE: u64 = 32;
    const INODE_TABLE: u64 = 64;
    /// Bytes of inodes in a block of the table; each block has a header of 2 bytes.
    const METADATA: u64 = 8192;
    /// Offset in an inode.
    const MTIME: u64 = 8;
    let file = File::options().read(true).write(true).open(image)?;
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at)?;
        anyhow::Ok(u64::from_le_bytes(bytes))
    };
    let (root, table) = (number(ROOT_INODE)?, number(INODE_TABLE)?);
    let (block, offset) = (root >> 16, root & 0xffff);
    for (at, byte) in (offset + MTIME..).zip(seconds.to_le_bytes()) {
        let position = table + block + at / METADATA * (2 + METADATA) + 2 + at % METADATA;
        file.write_all_at(&[byte], position)?;
    }
    Ok(())
}

/// Sends all files as a tar stream: directories before their contents, hard links last.
fn send(
    inodes: &Inodes,
    extent: &Extent,
    layers: &[Layer],
    pipe: impl Write,
    progress: &mut Progress,
) -> Result<()> {
    progress.phase("writing files", extent.bytes);
    let mut stream = io::BufWriter::with_capacity(1 << 18, pipe);
    for inode in &inodes.list {
        let (kind, target, device) = match &inode.kind {
            InodeKind::Directory { .. } => (b'5', &[][..], (0, 0)),
            InodeKind::Leaf(LeafKind::File(_)) => continue,
            InodeKind::Leaf(LeafKind::Symlink(target)) => (b'2', target.as_slice(), (0, 0)),
            InodeKind::Leaf(LeafKind::Device(device)) => {
                let kind = if device.character { b'3' } else { b'4' };
                (kind, &[][..], (device.major, device.minor))
            }
            InodeKind::Leaf(LeafKind::Fifo) => (b'6', &[][..], (0, 0)),
        };
        // The root is described by options.
        if !inode.path.is_empty() {
            header(&mut stream, inode, &inode.path, kind, target, device, 0)?;
        }
    }
    inodes.contents(layers, progress, |index, pieces, bytes| {
        let inode = &inodes.list[index];
        let InodeKind::Leaf(LeafKind::File(contents)) = inode.kind else {
            return Ok(());
        };
        header(
            &mut stream,
            inode,
            &inode.path,
            b'0',
            &[],
            (0, 0),
            contents.size,
        )?;
        let mut written = 0;
        for &(offset, length) in pieces {
            io::copy(&mut io::repeat(0).take(offset - written), &mut stream)?;
            io::copy(&mut (&mut *bytes).take(length), &mut stream)?;
            written = offset + length;
        }
        let padded = contents.size.next_multiple_of(512);
        io::copy(&mut io::repeat(0).take(padded - written), &mut stream)?;
        Ok(())
    })?;
    for inode in &inodes.list {
        let InodeKind::Directory { entries, .. } = &inode.kind else {
            continue;
        };
        for (name, index) in entries {
            let first = &inodes.list[*index];
            let path = match inode.path.as_slice() {
                b"" => name.clone(),
                directory => [directory, b"/", name].concat(),
            };
            let is_leaf = matches!(first.kind, InodeKind::Leaf(_));
            if is_leaf && path != first.path {
                header(&mut stream, first, &path, b'1', &first.path, (0, 0), 0)?;
            }
        }
    }
    stream.write_all(&[0; 1024])?;
    Ok(stream.flush()?)
}

/// A pax header, followed by the ustar header.
fn header(
    stream: &mut impl Write,
    inode: &Inode,
    path: &[u8],
    kind: u8,
    target: &[u8],
    device: (u32, u32),
    size: u64,
) -> Result<()> {
    let meta = inode.meta;
    let mut records = vec![];
    let mut record = |key: &str, value: &[u8]| {
        let rest = key.len() + value.len() + 3;
        let digits = |length: usize| length.to_string().len();
        let length = (rest..).find(|&length| length == rest + digits(length));
        records.extend(format!("{} {key}=", length.unwrap_or(0)).bytes());
        records.extend_from_slice(value);
        records.push(b'\n');
    };
    record("path", path);
    if !target.is_empty() {
        record("linkpath", target);
    }
    record("size", size.to_string().as_bytes());
    record("uid", meta.uid.to_string().as_bytes());
    record("gid", meta.gid.to_string().as_bytes());
    // sqfstar 4.5 requires a fraction.
    record("mtime", format!("{}.0", seconds(meta)).as_bytes());
    if kind != b'1' {
        for (name, value) in &meta.xattrs {
            record(&format!("SCHILY.xattr.{name}"), value);
        }
    }
    let extended = plain(b'x', b"pax", &[], 0o644, (0, 0), records.len() as u64);
    stream.write_all(&extended)?;
    stream.write_all(&records)?;
    let padding = records.len().next_multiple_of(512) - records.len();
    stream.write_all(&vec![0; padding])?;
    stream.write_all(&plain(kind, path, target, meta.mode, device, size))?;
    Ok(())
}

/// A "ustar" header (POSIX.1-2017, pax(1)); values that do not fit are in the pax header before it.
fn plain(
    kind: u8,
    path: &[u8],
    target: &[u8],
    mode: u32,
    (major, minor): (u32, u32),
    size: u64,
) -> [u8; 512] {
    let mut header = [0; 512];
    let mut put = |at: usize, most: usize, value: &[u8]| {
        let value = &value[..value.len().min(most)];
        header[at..at + value.len()].copy_from_slice(value);
    };
    put(0, 100, path);
    put(100, 7, format!("{mode:07o}").as_bytes());
    put(108, 7, b"0000000");
    put(116, 7, b"0000000");
    // Over 8 GiB, the pax record applies.
    put(
        124,
        11,
        format!("{:011o}", size & 0o77_777_777_777).as_bytes(),
    );
    put(136, 11, b"00000000000");
    put(148, 8, b"        ");
    put(156, 1, &[kind]);
    put(157, 100, target);
    put(257, 8, b"ustar\x0000");
    put(329, 7, format!("{:07o}", major & 0o7_777_777).as_bytes());
    put(337, 7, format!("{:07o}", minor & 0o7_777_777).as_bytes());
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
