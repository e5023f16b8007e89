//! Writes uncompressed EROFS (kernel Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h), the read-only
//! file system that is fastest to mount and to read.
//!
//! The metadata comes first: inodes, each with its attributes and, if it fits into the same block, the last
//! part of its contents. Whole blocks of contents follow.

use std::{fs::File, io::Read, os::unix::fs::FileExt};

use anyhow::{Context, Result, ensure};

use super::{
    ext4::{name_index, new_encode_dev},
    inodes::{Inode, InodeKind, Inodes},
    layer::Layer,
    tree::{Extent, LeafKind, Meta},
};
use crate::progress::Progress;

const BLOCK: u64 = 4096;
/// Unit of inode numbers: an inode's number is its offset divided by this.
const SLOT: u64 = 32;
/// Size of an inode with 32-bit owners and its own time in bytes.
const INODE: u64 = 64;
/// Size of a directory entry in bytes, without its name.
const DIRENT: usize = 12;
/// Offset and size of the superblock.
const SUPERBLOCK: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// FEATURE_COMPAT_SB_CHKSUM, FEATURE_COMPAT_MTIME
const COMPAT: u32 = 1 | 2;
/// An extended inode, with EROFS_INODE_FLAT_PLAIN or EROFS_INODE_FLAT_INLINE contents.
const PLAIN: u16 = 1;
const INLINE: u16 = 1 | 2 << 1;
/// Bytes before an inode's attributes.
const XATTR_HEADER: usize = 12;

/// The location of an inode and its contents.
struct Place {
    /// Offset of the inode in the file system.
    inode: u64,
    /// Its attributes, encoded.
    xattrs: Vec<u8>,
    /// Size of its contents in bytes.
    size: u64,
    /// Bytes of the contents that are stored after the inode.
    tail: u64,
    /// The first block of the other contents.
    block: u64,
}

impl Place {
    /// The position of a byte of the contents.
    fn position(&self, offset: u64) -> u64 {
        let whole = self.size - self.tail;
        if offset < whole {
            self.block * BLOCK + offset
        } else {
            self.inode + INODE + self.xattrs.len() as u64 + offset - whole
        }
    }
}

/// Makes a file system in the empty `file`, of a tree whose contents are in the layers. Returns its size in
/// bytes.
pub fn write(
    inodes: &Inodes,
    extent: &Extent,
    layers: &[Layer],
    file: &File,
    uuid: [u8; 16],
    progress: &mut Progress,
) -> Result<u64> {
    let (places, blocks) = arrange(inodes)?;
    file.set_len(blocks * BLOCK)?;
    for (index, (inode, place)) in inodes.list.iter().zip(&places).enumerate() {
        let mut bytes = vec![];
        let contents = match &inode.kind {
            InodeKind::Directory { parent, entries } => {
                directory(inodes, &places, index, *parent, entries)
            }
            InodeKind::Leaf(LeafKind::Symlink(target)) => target.clone(),
            InodeKind::Leaf(_) => vec![],
        };
        encode_inode(&mut bytes, inode, place, index);
        bytes.extend(&place.xattrs);
        file.write_all_at(&bytes, place.inode)?;
        write_contents(file, place, 0, &contents)?;
    }
    progress.phase("writing files", extent.bytes);
    inodes.contents(layers, progress, |index, pieces, bytes| {
        copy(file, &places[index], pieces, bytes)
    })?;
    superblock(file, inodes.list.len(), blocks, &places[0], uuid)?;
    Ok(blocks * BLOCK)
}

/// Assigns a location to every inode and its contents. Also returns the number of blocks.
fn arrange(inodes: &Inodes) -> Result<(Vec<Place>, u64)> {
    let mut at = SUPERBLOCK + SUPERBLOCK_SIZE as u64;
    let mut places = vec![];
    for inode in &inodes.list {
        let path = || inode.path.escape_ascii().to_string();
        let xattrs =
            encode_xattrs(inode.meta).with_context(|| format!("unable to write {}", path()))?;
        let size = match &inode.kind {
            InodeKind::Directory { entries, .. } => directory_size(entries),
            InodeKind::Leaf(LeafKind::File(contents)) => contents.size,
            InodeKind::Leaf(LeafKind::Symlink(target)) => target.len() as u64,
            InodeKind::Leaf(LeafKind::Device(_) | LeafKind::Fifo) => 0,
        };
        let head = INODE + xattrs.len() as u64;
        // The data after an inode must not cross a block boundary.
        let tail = match size % BLOCK {
            tail if head + tail <= BLOCK => tail,
            _ => 0,
        };
        at = at.next_multiple_of(SLOT);
        if tail > 0 && at % BLOCK + head + tail > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        places.push(Place {
            inode: at,
            xattrs,
            size,
            tail,
            block: 0,
        });
        at += head + tail;
    }
    let mut block = at.div_ceil(BLOCK);
    for place in &mut places {
        place.block = block;
        block += (place.size - place.tail).div_ceil(BLOCK);
    }
    ensure!(block <= u32::MAX.into(), "the files have more than 16 TiB");
    Ok((places, block))
}

fn encode_inode(bytes: &mut Vec<u8>, inode: &Inode, place: &Place, index: usize) {
    let meta = inode.meta;
    let format = if place.tail > 0 { INLINE } else { PLAIN };
    let attributes = match place.xattrs.len() {
        0 => 0,
        length => ((length - XATTR_HEADER) / 4 + 1) as u16,
    };
    let union = match &inode.kind {
        InodeKind::Leaf(LeafKind::Device(device)) => new_encode_dev(device.major, device.minor),
        _ => place.block as u32,
    };
    bytes.extend(format.to_le_bytes());
    bytes.extend(attributes.to_le_bytes());
    bytes.extend(((inode.type_bits() | meta.mode) as u16).to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(place.size.to_le_bytes());
    bytes.extend(union.to_le_bytes());
    bytes.extend((index as u32 + 1).to_le_bytes());
    bytes.extend(meta.uid.to_le_bytes());
    bytes.extend(meta.gid.to_le_bytes());
    bytes.extend(meta.mtime.seconds.to_le_bytes());
    bytes.extend(meta.mtime.nanoseconds.to_le_bytes());
    bytes.extend(inode.links.to_le_bytes());
    bytes.resize(INODE as usize, 0);
}

fn encode_xattrs(meta: &Meta) -> Result<Vec<u8>> {
    if meta.xattrs.is_empty() {
        return Ok(vec![]);
    }
    let mut bytes = vec![0; XATTR_HEADER];
    for (name, value) in &meta.xattrs {
        let index = name_index(name);
        let (index, rest) =
            index.with_context(|| format!("EROFS has no extended attribute {name}"))?;
        let (length, size) = (u8::try_from(rest.len()), u16::try_from(value.len()));
        let too_large = || format!("its extended attribute {name} is too large for EROFS");
        bytes.push(length.ok().with_context(too_large)?);
        bytes.push(index);
        bytes.extend(size.ok().with_context(too_large)?.to_le_bytes());
        bytes.extend(rest.as_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    // i_xattr_icount has 16 bits.
    ensure!(
        bytes.len() < 4 * usize::from(u16::MAX),
        "its extended attributes are too large for EROFS"
    );
    Ok(bytes)
}

/// All names of a directory in sorted order, including `.` and `..`.
fn names(entries: &[(Vec<u8>, usize)], index: usize, parent: usize) -> Vec<(&[u8], usize)> {
    let own = [(&b"."[..], index), (&b".."[..], parent)];
    let others = entries
        .iter()
        .map(|(name, index)| (name.as_slice(), *index));
    let mut names: Vec<_> = own.into_iter().chain(others).collect();
    names.sort();
    names
}

/// The names by block: as many as fit with their entries.
fn in_blocks<'a>(names: &[(&'a [u8], usize)]) -> Vec<Vec<(&'a [u8], usize)>> {
    let mut blocks = vec![vec![]];
    let mut taken = 0;
    for &(name, index) in names {
        let size = DIRENT + name.len();
        if taken + size > BLOCK as usize {
            blocks.push(vec![]);
            taken = 0;
        }
        taken += size;
        if let Some(block) = blocks.last_mut() {
            block.push((name, index));
        }
    }
    blocks
}

fn directory_size(entries: &[(Vec<u8>, usize)]) -> u64 {
    let names = names(entries, 0, 0);
    let blocks = in_blocks(&names);
    let last = blocks.last().map_or(0, |block| {
        block.iter().map(|(name, _)| DIRENT + name.len()).sum()
    });
    (blocks.len() as u64 - 1) * BLOCK + last as u64
}

/// A directory's contents: in each block the entries, then their names.
fn directory(
    inodes: &Inodes,
    places: &[Place],
    index: usize,
    parent: usize,
    entries: &[(Vec<u8>, usize)],
) -> Vec<u8> {
    let names = names(entries, index, parent);
    let mut bytes = vec![];
    for block in in_blocks(&names) {
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        let mut offset = block.len() * DIRENT;
        for (name, target) in &block {
            bytes.extend((places[*target].inode / SLOT).to_le_bytes());
            bytes.extend((offset as u16).to_le_bytes());
            bytes.extend([inodes.list[*target].entry_type(), 0]);
            offset += name.len();
        }
        bytes.extend(block.iter().flat_map(|(name, _)| *name));
    }
    bytes
}

/// Writes part of a file's contents, from `offset` on.
fn write_contents(file: &File, place: &Place, offset: u64, bytes: &[u8]) -> Result<()> {
    let whole = (place.size - place.tail).saturating_sub(offset);
    let (blocks, tail) = bytes.split_at(bytes.len().min(whole as usize));
    if !blocks.is_empty() {
        file.write_all_at(blocks, place.position(offset))?;
    }
    if !tail.is_empty() {
        let offset = offset + blocks.len() as u64;
        file.write_all_at(tail, place.position(offset))?;
    }
    Ok(())
}

/// Writes a regular file. Zeros need not be written.
fn copy(file: &File, place: &Place, pieces: &[(u64, u64)], bytes: &mut dyn Read) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for &(offset, length) in pieces {
        let mut done = 0;
        while done < length {
            let size = (length - done).min(buffer.len() as u64) as usize;
            let part = &mut buffer[..size];
            bytes.read_exact(part)?;
            if part.iter().any(|&byte| byte != 0) {
                write_contents(file, place, offset + done, part)?;
            }
            done += size as u64;
        }
    }
    Ok(())
}

fn superblock(file: &File, inodes: usize, blocks: u64, root: &Place, uuid: [u8; 16]) -> Result<()> {
    let mut bytes = [0; SUPERBLOCK_SIZE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &MAGIC.to_le_bytes());
    put(8, &COMPAT.to_le_bytes());
    put(12, &[BLOCK.ilog2() as u8]);
    let root = u16::try_from(root.inode / SLOT).context("the root comes first")?;
    put(14, &root.to_le_bytes());
    put(16, &(inodes as u64).to_le_bytes());
    put(36, &(blocks as u32).to_le_bytes());
    put(48, &uuid);
    file.write_all_at(&bytes, SUPERBLOCK)?;
    // The checksum covers the rest of the block.
    let mut block = vec![0; (BLOCK - SUPERBLOCK) as usize];
    file.read_exact_at(&mut block, SUPERBLOCK)?;
    let checksum = !crc32c::crc32c(&block);
    file.write_all_at(&checksum.to_le_bytes(), SUPERBLOCK + 4)?;
    Ok(())
}
