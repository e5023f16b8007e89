//! Writes ext4 (kernel Documentation/filesystems/ext4/), without privileges and without mke2fs: owners,
//! modes, times, devices and attributes are written directly to the inodes.
//!
//! The layout is mke2fs 1.47's: 4 KiB blocks, a journal, metadata checksums, and 256-byte inodes (timestamps
//! up to 2446), but no reserved blocks and no `lost+found`. Each group has its own bitmaps and inode table,
//! and blocks are allocated in order: a block is in use if it is metadata or lies before the first free
//! block.

use std::{fs::File, io::Read, os::unix::fs::FileExt};

use anyhow::{Context, Result, bail, ensure};

use super::{
    inodes::{Inode, InodeKind, Inodes},
    layer::Layer,
    tree::{Extent, LeafKind, Meta, Time},
};
use crate::progress::Progress;

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// Blocks covered by one block of bitmap.
const GROUP: u64 = BLOCK * 8;
/// Bytes of an inode.
const INODE: usize = 256;
/// Bytes of an inode after the 128 that ext2 had, before its attributes.
const EXTRA: usize = 32;
/// Bytes of a group descriptor.
const DESCRIPTOR: usize = 64;
/// Inode numbers of the root and the journal.
const ROOT: u32 = 2;
const JOURNAL: u32 = 8;
/// Inode numbers up to this one are reserved for the file system.
const RESERVED: u32 = 10;
/// Minimum size of a file system with a journal in blocks.
const LEAST_BLOCKS: u64 = 2048;
/// Maximum number of blocks: their numbers have 32 bits.
const MOST_BLOCKS: u64 = u32::MAX as u64;
/// Minimum number of blocks of the last group, besides its metadata.
const LEAST_GROUP: u64 = 64;
/// Maximum size of a file in bytes: the numbers of its blocks have 32 bits.
const MAX_FILE: u64 = u32::MAX as u64 * BLOCK;
/// Maximum number of blocks of an extent (`EXT_INIT_MAX_LEN`).
const MAX_EXTENT: u64 = 32768;

/// COMPAT_HAS_JOURNAL, EXT_ATTR, DIR_INDEX
const COMPAT: u32 = 0x4 | 0x8 | 0x20;
/// INCOMPAT_FILETYPE, EXTENTS, 64BIT, FLEX_BG
const INCOMPAT: u32 = 0x2 | 0x40 | 0x80 | 0x200;
/// RO_COMPAT_SPARSE_SUPER, LARGE_FILE, HUGE_FILE, DIR_NLINK, EXTRA_ISIZE, METADATA_CSUM
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;

/// EXT4_EXTENTS_FL
const EXTENTS_FLAG: u32 = 0x80000;
/// EXT4_BG_INODE_ZEROED: the kernel has nothing to initialize in the background.
const INODE_ZEROED: u16 = 0x4;
/// Maximum link count of a directory; above it the count is 1 (DIR_NLINK).
const MAX_DIRECTORY_LINKS: u32 = 64_999;
/// Maximum link count of other files (EXT4_LINK_MAX).
const MAX_LINKS: u32 = 65_000;
/// Size from which a symbolic link no longer fits into its inode.
const FAST_SYMLINK: usize = 60;
/// Bytes at the end of a directory block: its checksum, as an entry without a name.
const DIRECTORY_TAIL: usize = 12;
/// Magic numbers of an extent tree node, of attributes, of the journal, of the file system.
const EXTENT_MAGIC: u16 = 0xf30a;
const XATTR_MAGIC: u32 = 0xea02_0000;
const JOURNAL_MAGIC: u32 = 0xc03b_3998;
const SUPER_MAGIC: u16 = 0xef53;

fn put16(buffer: &mut [u8], at: usize, value: u16) {
    buffer[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn put32(buffer: &mut [u8], at: usize, value: u32) {
    buffer[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn low(value: u64) -> u32 {
    value as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

/// CRC-32C as chained by the kernel: not inverted at either end.
fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// The layout of a file system of a given size.
#[derive(Clone, Debug, PartialEq)]
struct Layout {
    blocks: u64,
    groups: u64,
    inodes_per_group: u32,
    /// Blocks of all group descriptors.
    descriptors: u64,
    /// Blocks of a group's inodes.
    table: u64,
    /// Blocks of the journal.
    journal: u64,
}

impl Layout {
    /// Has room for this many inodes, including the file system's own.
    fn new(size: u64, inodes: u64) -> Result<Layout> {
        let mut blocks = size / BLOCK;
        ensure!(
            sizes().contains(&size),
            "an ext4 file system of {size} bytes cannot be made: it has {} MiB at least",
            (LEAST_BLOCKS * BLOCK) >> 20
        );
        loop {
            let groups = blocks.div_ceil(GROUP);
            let per_block = BLOCK / INODE as u64;
            let inodes_per_group = inodes.div_ceil(groups).next_multiple_of(per_block);
            ensure!(
                inodes_per_group <= GROUP,
                "{} MiB cannot hold {inodes} files",
                size >> 20
            );
            let layout = Layout {
                blocks,
                groups,
                inodes_per_group: inodes_per_group as u32,
                descriptors: (groups * DESCRIPTOR as u64).div_ceil(BLOCK),
                table: inodes_per_group / per_block,
                journal: journal_blocks(blocks),
            };
            // A remainder with little more than its metadata is left unused.
            let last = groups - 1;
            let room = blocks - last * GROUP;
            if last == 0 || room >= layout.metadata(last) + LEAST_GROUP {
                return Ok(layout);
            }
            blocks = last * GROUP;
        }
    }

    /// Whether a group begins with a copy of the superblock (SPARSE_SUPER).
    fn has_superblock(&self, group: u64) -> bool {
        let is_power = |base| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        group < 2 || [3, 5, 7].into_iter().any(is_power)
    }

    /// Blocks of metadata at the start of a group: bitmaps, inodes and superblock.
    fn metadata(&self, group: u64) -> u64 {
        let copy = if self.has_superblock(group) {
            1 + self.descriptors
        } else {
            0
        };
        copy + 2 + self.table
    }

    /// The blocks of a group, including metadata.
    fn group(&self, group: u64) -> std::ops::Range<u64> {
        group * GROUP..((group + 1) * GROUP).min(self.blocks)
    }

    fn block_bitmap(&self, group: u64) -> u64 {
        group * GROUP + self.metadata(group) - self.table - 2
    }

    /// Blocks that are neither metadata nor the journal.
    fn usable(&self) -> u64 {
        let metadata: u64 = (0..self.groups).map(|group| self.metadata(group)).sum();
        self.blocks.saturating_sub(metadata + self.journal)
    }
}

/// Blocks of a journal, as in mke2fs.
fn journal_blocks(blocks: u64) -> u64 {
    match blocks {
        ..0x8000 => 1024,
        0x8000..0x40000 => 4096,
        0x40000..0x80000 => 8192,
        0x80000..0x400000 => 16384,
        0x400000..0x800000 => 32768,
        0x800000..0x1000000 => 65536,
        0x1000000..0x2000000 => 131_072,
        _ => 262_144,
    }
}

/// Number of inodes of an image: 4096 and a quarter more than it has files.
fn inodes(extent: &Extent) -> u64 {
    extent.inodes * 5 / 4 + 4096
}

/// The minimum size of an image.
pub fn least_size(extent: &Extent) -> Result<u64> {
    fitting(extent, extent.blocks)
}

/// The default size of an image: a quarter of its contents and 64 MiB are free.
pub fn good_size(extent: &Extent) -> Result<u64> {
    let size = fitting(extent, extent.blocks * 5 / 4 + (64 << 20) / BLOCK)?;
    Ok(size.next_multiple_of(1 << 20).min(*sizes().end()))
}

/// Supported sizes of a file system in bytes.
pub fn sizes() -> std::ops::RangeInclusive<u64> {
    LEAST_BLOCKS * BLOCK..=MOST_BLOCKS * BLOCK
}

fn set_size(file: &File, size: u64) -> Result<()> {
    file.set_len(size)
        .with_context(|| format!("no file of {} MiB can be made here", size >> 20))
}

/// The size for this many usable blocks.
fn fitting(extent: &Extent, blocks: u64) -> Result<u64> {
    let mut size = blocks.saturating_mul(BLOCK).max(LEAST_BLOCKS * BLOCK);
    while sizes().contains(&size) {
        match Layout::new(size, inodes(extent)) {
            Ok(layout) if layout.usable() >= blocks => return Ok(size),
            Ok(layout) => size += (blocks - layout.usable()) * BLOCK,
            Err(_) => size *= 2, // many files in few blocks
        }
    }
    bail!("the files are too large for an ext4 file system: it has 16 TiB at most")
}

/// Makes a file system of `size` bytes in the empty `file`, of a tree whose contents are in the layers.
pub fn write(
    inodes: &Inodes,
    extent: &Extent,
    layers: &[Layer],
    file: &File,
    size: u64,
    uuid: [u8; 16],
    progress: &mut Progress,
) -> Result<()> {
    let layout = Layout::new(size, self::inodes(extent))?;
    set_size(file, size)?;
    let mut writer = Writer::new(file, layout, uuid);
    writer.journal()?;
    for (index, inode) in inodes.list.iter().enumerate() {
        let path = || inode.path.escape_ascii().to_string();
        let written = match &inode.kind {
            InodeKind::Directory { parent, entries } => {
                writer.directory(inodes, index, *parent, entries)
            }
            InodeKind::Leaf(LeafKind::File(contents)) => {
                ensure!(
                    contents.size <= MAX_FILE,
                    "{} has {} bytes, too many for ext4",
                    path(),
                    contents.size
                );
                continue; // its contents follow
            }
            InodeKind::Leaf(LeafKind::Symlink(target)) => writer.symlink(inode, index, target),
            InodeKind::Leaf(LeafKind::Device(device)) => {
                let (major, minor) = (device.major, device.minor);
                let mut block = [0; 60];
                // linux/kdev_t.h: old_encode_dev, new_encode_dev
                if major < 256 && minor < 256 {
                    put32(&mut block, 0, major << 8 | minor);
                } else {
                    put32(&mut block, 4, new_encode_dev(major, minor));
                }
                writer.inode(inode, index, Body::Own(block, 0))
            }
            InodeKind::Leaf(LeafKind::Fifo) => writer.inode(inode, index, Body::Own([0; 60], 0)),
        };
        written.with_context(|| format!("unable to write {}", path()))?;
    }
    progress.phase("writing files", extent.bytes);
    inodes.contents(layers, progress, |index, pieces, bytes| {
        writer.contents(&inodes.list[index], index, pieces, bytes)
    })?;
    let directories = inodes.list.iter().enumerate().filter_map(|(index, inode)| {
        matches!(inode.kind, InodeKind::Directory { .. }).then_some(number(index))
    });
    writer.finish(inodes.list.len(), directories)
}

/// Makes an empty file system, for a volume.
pub fn write_empty(file: &File, size: u64, uuid: [u8; 16]) -> Result<()> {
    /// Bytes per inode, as in mke2fs.
    const RATIO: u64 = 16384;
    let layout = Layout::new(size, (size / RATIO).max(64))?;
    set_size(file, size)?;
    let mut writer = Writer::new(file, layout, uuid);
    writer.journal()?;
    let root = Inode {
        path: vec![],
        meta: &Meta::root(0o755),
        links: 2,
        kind: InodeKind::Directory {
            parent: 0,
            entries: vec![],
        },
    };
    let list = Inodes::lone(root);
    writer.directory(&list, 0, 0, &[])?;
    writer.finish(1, [ROOT].into_iter())
}

/// A device number in 32 bits.
pub fn new_encode_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The inode number of the file with this index.
fn number(index: usize) -> u32 {
    match index {
        0 => ROOT,
        index => RESERVED + index as u32,
    }
}

/// The location of an inode's contents.
enum Body {
    /// In the inode itself: the bytes, and how many of them count as contents.
    Own([u8; 60], u64),
    /// In blocks: logical number, physical number and length of each extent, and the file's size.
    Blocks(Vec<(u64, u64, u64)>, u64),
}

struct Writer<'a> {
    file: &'a File,
    layout: Layout,
    uuid: [u8; 16],
    /// The seed of all checksums.
    seed: u32,
    /// The first free block.
    next: u64,
    /// The inodes written so far, from number 1.
    table: Vec<u8>,
    /// The journal's `i_block` and size, of which the superblock has a copy.
    journal_copy: [u8; 68],
}

impl<'a> Writer<'a> {
    fn new(file: &'a File, layout: Layout, uuid: [u8; 16]) -> Writer<'a> {
        Writer {
            file,
            layout,
            uuid,
            seed: crc(!0, &uuid),
            next: 0,
            table: vec![0; INODE * RESERVED as usize],
            journal_copy: [0; 68],
        }
    }

    /// Allocates a run of free blocks, at most `wanted`.
    fn allocate(&mut self, wanted: u64) -> Result<(u64, u64)> {
        loop {
            ensure!(
                self.next < self.layout.blocks,
                "{} MiB are too small for the files",
                (self.layout.blocks * BLOCK) >> 20
            );
            let group = self.next / GROUP;
            let blocks = self.layout.group(group);
            self.next = self.next.max(blocks.start + self.layout.metadata(group));
            let length = wanted
                .min(blocks.end.saturating_sub(self.next))
                .min(MAX_EXTENT);
            if length > 0 {
                let start = self.next;
                self.next += length;
                return Ok((start, length));
            }
            self.next = blocks.end;
        }
    }

    /// Allocates blocks for the logical ones from `logical` on, and appends their extents.
    fn extend(
        &mut self,
        extents: &mut Vec<(u64, u64, u64)>,
        mut logical: u64,
        mut wanted: u64,
    ) -> Result<()> {
        while wanted > 0 {
            let (start, length) = self.allocate(wanted)?;
            match extents.last_mut() {
                Some((first, physical, so_far))
                    if *first + *so_far == logical
                        && *physical + *so_far == start
                        && *so_far + length <= MAX_EXTENT =>
                {
                    *so_far += length;
                }
                _ => extents.push((logical, start, length)),
            }
            (logical, wanted) = (logical + length, wanted - length);
        }
        Ok(())
    }

    /// Writes bytes to a file's blocks in its last extents, from `logical` on.
    fn write(&self, extents: &[(u64, u64, u64)], mut logical: u64, bytes: &[u8]) -> Result<()> {
        let mut rest = bytes;
        let from = extents.partition_point(|&(first, _, length)| first + length <= logical);
        for &(first, physical, length) in &extents[from..] {
            if rest.is_empty() {
                break;
            }
            let room = (first + length - logical) * BLOCK;
            let (now, later) = rest.split_at(rest.len().min(room as usize));
            self.file
                .write_all_at(now, (physical + logical - first) * BLOCK)?;
            (rest, logical) = (later, first + length);
        }
        Ok(())
    }

    /// Writes the journal: clean, so that only its first block matters. (fs.h of jbd2, big-endian)
    fn journal(&mut self) -> Result<()> {
        let blocks = self.layout.journal;
        let mut extents = vec![];
        self.extend(&mut extents, 0, blocks)?;
        let mut superblock = vec![0; 1024];
        let mut put = |at: usize, value: u32| {
            superblock[at..at + 4].copy_from_slice(&value.to_be_bytes());
        };
        put(0x0, JOURNAL_MAGIC);
        put(0x4, 4); // a superblock, version 2
        put(0xc, BLOCK as u32);
        put(0x10, blocks as u32);
        put(0x14, 1); // the first block of the log
        put(0x18, 1); // the first transaction
        put(0x40, 1); // one file system uses it
        superblock[0x30..0x40].copy_from_slice(&self.uuid);
        self.write(&extents, 0, &superblock)?;
        let root = Meta::root(0o600);
        let inode = Inode {
            path: vec![],
            meta: &root,
            links: 1,
            kind: InodeKind::Leaf(&LeafKind::Fifo),
        };
        let body = Body::Blocks(extents, blocks * BLOCK);
        let bytes = self.inode_bytes(&inode, 0o100_000, JOURNAL, body)?;
        let size = blocks * BLOCK;
        self.journal_copy[..60].copy_from_slice(&bytes[0x28..0x64]);
        put32(&mut self.journal_copy, 60, high(size));
        put32(&mut self.journal_copy, 64, low(size));
        self.put_inode(JOURNAL, &bytes);
        Ok(())
    }

    fn directory(
        &mut self,
        inodes: &Inodes,
        index: usize,
        parent: usize,
        entries: &[(Vec<u8>, usize)],
    ) -> Result<()> {
        const ROOM: usize = BLOCK as usize - DIRECTORY_TAIL;
        let directory = 2;
        let dots = [
            (&b"."[..], index, directory),
            (&b".."[..], parent, directory),
        ];
        let named = entries
            .iter()
            .map(|(name, index)| (name.as_slice(), *index, inodes.list[*index].entry_type()));
        let mut blocks: Vec<Vec<u8>> = vec![];
        // The offset of the last entry in the last block: it extends to the block's end.
        let mut last = 0;
        for (name, target, kind) in dots.into_iter().chain(named) {
            let size = (8 + name.len()).next_multiple_of(4);
            if blocks.last().is_none_or(|block| block.len() + size > ROOM) {
                if let Some(block) = blocks.last_mut() {
                    put16(block, last + 4, (ROOM - last) as u16);
                }
                blocks.push(vec![]);
            }
            let block = blocks.last_mut().context("a block is there")?;
            last = block.len();
            block.extend(number(target).to_le_bytes());
            block.extend((size as u16).to_le_bytes());
            block.extend([name.len() as u8, kind]);
            block.extend(name);
            block.resize(last + size, 0);
        }
        if let Some(block) = blocks.last_mut() {
            put16(block, last + 4, (ROOM - last) as u16);
        }
        let seed = self.inode_seed(number(index));
        let mut extents = vec![];
        self.extend(&mut extents, 0, blocks.len() as u64)?;
        for (logical, mut block) in blocks.into_iter().enumerate() {
            block.resize(ROOM, 0);
            let checksum = crc(seed, &block);
            block.extend([0, 0, 0, 0, DIRECTORY_TAIL as u8, 0, 0, 0xde]);
            block.extend(checksum.to_le_bytes());
            self.write(&extents, logical as u64, &block)?;
        }
        let size = extents.iter().map(|(_, _, length)| length * BLOCK).sum();
        self.inode(&inodes.list[index], index, Body::Blocks(extents, size))
    }

    fn symlink(&mut self, inode: &Inode, index: usize, target: &[u8]) -> Result<()> {
        if target.len() < FAST_SYMLINK {
            let mut own = [0; 60];
            own[..target.len()].copy_from_slice(target);
            return self.inode(inode, index, Body::Own(own, target.len() as u64));
        }
        let mut extents = vec![];
        self.extend(&mut extents, 0, 1)?;
        self.write(&extents, 0, target)?;
        self.inode(inode, index, Body::Blocks(extents, target.len() as u64))
    }

    /// A regular file. Blocks of zeros are holes.
    fn contents(
        &mut self,
        inode: &Inode,
        index: usize,
        pieces: &[(u64, u64)],
        bytes: &mut dyn Read,
    ) -> Result<()> {
        /// Bytes written at once.
        const CHUNK: u64 = 1 << 20;
        let InodeKind::Leaf(LeafKind::File(contents)) = inode.kind else {
            return Ok(());
        };
        let mut extents = vec![];
        let mut buffer = vec![];
        // The block at the start of the buffer.
        let mut at = 0;
        for &(offset, length) in pieces {
            let (mut offset, end) = (offset, offset + length);
            while offset < end {
                let buffered = at * BLOCK + buffer.len() as u64;
                if buffered / BLOCK < offset / BLOCK || buffer.len() as u64 >= CHUNK {
                    // Full blocks are written; the last one may be incomplete.
                    let whole = if buffered / BLOCK < offset / BLOCK {
                        buffer.len()
                    } else {
                        buffer.len() - buffer.len() % BLOCK as usize
                    };
                    self.chunk(&mut extents, at, &buffer[..whole])?;
                    buffer.drain(..whole);
                    at = offset / BLOCK;
                }
                let begin = (offset - at * BLOCK) as usize;
                let now = (end - offset).min(CHUNK - CHUNK.min(begin as u64) + BLOCK) as usize;
                buffer.resize(begin + now, 0);
                bytes.read_exact(&mut buffer[begin..])?;
                offset += now as u64;
            }
        }
        self.chunk(&mut extents, at, &buffer)?;
        self.inode(inode, index, Body::Blocks(extents, contents.size))
    }

    /// Writes part of a file from the logical block `at` on, except blocks of zeros.
    fn chunk(&mut self, extents: &mut Vec<(u64, u64, u64)>, at: u64, bytes: &[u8]) -> Result<()> {
        let blocks: Vec<_> = bytes.chunks(BLOCK as usize).collect();
        let is_hole = |block: &[u8]| block.iter().all(|&byte| byte == 0);
        let mut first = 0;
        for run in blocks.chunk_by(|a, b| is_hole(a) == is_hole(b)) {
            let start = first;
            first += run.len();
            if is_hole(run[0]) {
                continue;
            }
            let logical = at + start as u64;
            self.extend(extents, logical, run.len() as u64)?;
            let from = start * BLOCK as usize;
            let end = bytes.len().min(first * BLOCK as usize);
            self.write(extents, logical, &bytes[from..end])?;
        }
        Ok(())
    }

    fn inode_seed(&self, number: u32) -> u32 {
        let generation = [0; 4];
        crc(crc(self.seed, &number.to_le_bytes()), &generation)
    }

    fn inode(&mut self, inode: &Inode, index: usize, body: Body) -> Result<()> {
        let number = number(index);
        let bytes = self.inode_bytes(inode, inode.type_bits(), number, body)?;
        self.put_inode(number, &bytes);
        Ok(())
    }

    fn put_inode(&mut self, number: u32, bytes: &[u8; INODE]) {
        let at = (number as usize - 1) * INODE;
        let end = at + INODE;
        if self.table.len() < end {
            self.table.resize(end, 0);
        }
        self.table[at..end].copy_from_slice(bytes);
    }

    fn inode_bytes(
        &mut self,
        inode: &Inode,
        type_bits: u32,
        number: u32,
        body: Body,
    ) -> Result<[u8; INODE]> {
        let meta = inode.meta;
        let mut bytes = [0; INODE];
        let mut blocks = 0;
        let size = match body {
            Body::Own(own, size) => {
                bytes[0x28..0x64].copy_from_slice(&own);
                size
            }
            Body::Blocks(extents, size) => {
                blocks = extents.iter().map(|(_, _, length)| length).sum();
                let (root, more) = self.extent_tree(&extents, number)?;
                bytes[0x28..0x64].copy_from_slice(&root);
                put32(&mut bytes, 0x20, EXTENTS_FLAG);
                blocks += more;
                size
            }
        };
        let block = self.attributes(meta, &mut bytes[128 + EXTRA..])?;
        if let Some(block) = block {
            blocks += 1;
            put32(&mut bytes, 0x68, low(block));
            put16(&mut bytes, 0x76, high(block) as u16);
        }
        let links = match inode.kind {
            InodeKind::Directory { .. } if inode.links > MAX_DIRECTORY_LINKS => 1,
            _ => inode.links,
        };
        ensure!(
            links <= MAX_LINKS,
            "it has {links} names: {MAX_LINKS} at most"
        );
        put16(&mut bytes, 0x0, (type_bits | meta.mode) as u16);
        put16(&mut bytes, 0x2, meta.uid as u16);
        put16(&mut bytes, 0x78, (meta.uid >> 16) as u16);
        put16(&mut bytes, 0x18, meta.gid as u16);
        put16(&mut bytes, 0x7a, (meta.gid >> 16) as u16);
        put32(&mut bytes, 0x4, low(size));
        put32(&mut bytes, 0x6c, high(size));
        put16(&mut bytes, 0x1a, links as u16);
        let sectors = blocks * (BLOCK / 512);
        put32(&mut bytes, 0x1c, low(sectors));
        put16(&mut bytes, 0x74, high(sectors) as u16);
        put16(&mut bytes, 0x80, EXTRA as u16);
        let (seconds, extra) = encode_time(meta.mtime);
        for (at, extra_at) in [(0x8, 0x8c), (0xc, 0x84), (0x10, 0x88), (0x90, 0x94)] {
            put32(&mut bytes, at, seconds);
            put32(&mut bytes, extra_at, extra);
        }
        let checksum = crc(self.inode_seed(number), &bytes);
        put16(&mut bytes, 0x7c, checksum as u16);
        put16(&mut bytes, 0x82, (checksum >> 16) as u16);
        Ok(bytes)
    }

    /// Writes a tree of extents. Returns its root, which is in the inode, and the number of the other blocks.
    fn extent_tree(&mut self, extents: &[(u64, u64, u64)], number: u32) -> Result<([u8; 60], u64)> {
        /// Maximum number of entries in the inode, and in a block, which ends with a checksum.
        const IN_ROOT: usize = 4;
        const IN_BLOCK: usize = (BLOCK as usize - 12) / 12;
        let header = |count: usize, most: usize, depth: u16| {
            let mut header = vec![];
            for word in [EXTENT_MAGIC, count as u16, most as u16, depth] {
                header.extend(word.to_le_bytes());
            }
            header.extend([0; 4]);
            header
        };
        let mut level: Vec<(u64, [u8; 12])> = extents
            .iter()
            .map(|&(logical, physical, length)| {
                let mut entry = [0; 12];
                put32(&mut entry, 0, low(logical));
                put16(&mut entry, 4, length as u16);
                put16(&mut entry, 6, high(physical) as u16);
                put32(&mut entry, 8, low(physical));
                (logical, entry)
            })
            .collect();
        let (mut depth, mut blocks) = (0, 0);
        while level.len() > IN_ROOT {
            let mut above = vec![];
            for entries in level.chunks(IN_BLOCK) {
                let (block, _) = self.allocate(1)?;
                let mut bytes = header(entries.len(), IN_BLOCK, depth);
                bytes.extend(entries.iter().flat_map(|(_, entry)| entry));
                bytes.resize(12 + IN_BLOCK * 12, 0);
                let checksum = crc(self.inode_seed(number), &bytes);
                bytes.extend(checksum.to_le_bytes());
                self.file.write_all_at(&bytes, block * BLOCK)?;
                let logical = entries[0].0;
                let mut entry = [0; 12];
                put32(&mut entry, 0, low(logical));
                put32(&mut entry, 4, low(block));
                put16(&mut entry, 8, high(block) as u16);
                above.push((logical, entry));
                blocks += 1;
            }
            (level, depth) = (above, depth + 1);
        }
        let mut root = header(level.len(), IN_ROOT, depth);
        root.extend(level.iter().flat_map(|(_, entry)| entry));
        root.resize(60, 0);
        let root = root.try_into().map_err(|_| anyhow::anyhow!("60 bytes"))?;
        Ok((root, blocks))
    }

    /// Writes attributes after an inode, and those that do not fit there into a block, whose number is
    /// returned.
    fn attributes(&mut self, meta: &Meta, room: &mut [u8]) -> Result<Option<u64>> {
        let mut attributes: Vec<(u8, &str, Vec<u8>)> = vec![];
        for (name, value) in &meta.xattrs {
            let (index, rest) = name_index(name)
                .with_context(|| format!("ext4 has no extended attribute {name}"))?;
            let value = match index {
                2 | 3 => posix_acl(value).with_context(|| format!("{name} is no access list"))?,
                _ => value.clone(),
            };
            attributes.push((index, rest, value));
        }
        if attributes.is_empty() {
            return Ok(None);
        }
        // The order in which the kernel searches a block.
        attributes.sort_by_key(|(index, name, _)| (*index, name.len(), name.to_string()));
        let [mut inside, mut outside] = [room.len() - 4, BLOCK as usize - 32].map(Entries::new);
        for (index, name, value) in &attributes {
            let fits = inside.add(*index, name, value) || outside.add(*index, name, value);
            ensure!(
                fits,
                "its extended attribute {name} of {} bytes is too large for ext4",
                value.len()
            );
        }
        if !inside.is_empty() {
            put32(room, 0, XATTR_MAGIC);
            inside.write(&mut room[4..], 0);
        }
        if outside.is_empty() {
            return Ok(None);
        }
        let (block, _) = self.allocate(1)?;
        let mut bytes = vec![0; BLOCK as usize];
        let hash = outside.write(&mut bytes[32..], 32);
        put32(&mut bytes, 0, XATTR_MAGIC);
        put32(&mut bytes, 4, 1); // used by one inode
        put32(&mut bytes, 8, 1); // one block
        put32(&mut bytes, 12, hash);
        let checksum = crc(crc(self.seed, &block.to_le_bytes()), &bytes);
        put32(&mut bytes, 16, checksum);
        self.file.write_all_at(&bytes, block * BLOCK)?;
        Ok(Some(block))
    }

    /// Writes inodes, bitmaps, group descriptors and superblocks.
    fn finish(mut self, files: usize, directories: impl Iterator<Item = u32>) -> Result<()> {
        let layout = self.layout.clone();
        let per_group = layout.inodes_per_group;
        let used = u64::from(RESERVED) + files as u64 - 1;
        ensure!(
            used <= u64::from(per_group) * layout.groups,
            "this size cannot hold {files} files"
        );
        let mut used_directories = vec![0u32; layout.groups as usize];
        for number in directories {
            used_directories[((number - 1) / per_group) as usize] += 1;
        }
        self.table.resize(used as usize * INODE, 0);
        let mut descriptors = vec![];
        let mut free_blocks = 0;
        for group in 0..layout.groups {
            let blocks = layout.group(group);
            let metadata = blocks.start + layout.metadata(group);
            let first_free = self.next.clamp(metadata, blocks.end);
            let free = blocks.end - first_free;
            free_blocks += free;
            let first_inode = group * u64::from(per_group);
            let used = used.saturating_sub(first_inode).min(per_group.into()) as u32;
            let block_bitmap = bitmap(first_free - blocks.start, blocks.end - blocks.start);
            let inode_bitmap = bitmap(used.into(), per_group.into());
            let at = layout.block_bitmap(group);
            self.file.write_all_at(&block_bitmap, at * BLOCK)?;
            self.file.write_all_at(&inode_bitmap, (at + 1) * BLOCK)?;
            let from = first_inode as usize * INODE;
            let table = self.table.get(from..from + used as usize * INODE);
            self.file
                .write_all_at(table.unwrap_or_default(), (at + 2) * BLOCK)?;

            let mut bytes = [0; DESCRIPTOR];
            let mut split = |low_at: usize, high_at: usize, value: u64| {
                put32(&mut bytes, low_at, low(value));
                put32(&mut bytes, high_at, high(value));
            };
            split(0x0, 0x20, at);
            split(0x4, 0x24, at + 1);
            split(0x8, 0x28, at + 2);
            let mut halves = |low_at: usize, high_at: usize, value: u32| {
                put16(&mut bytes, low_at, value as u16);
                put16(&mut bytes, high_at, (value >> 16) as u16);
            };
            halves(0xc, 0x2c, free as u32);
            halves(0xe, 0x2e, per_group - used);
            halves(0x10, 0x30, used_directories[group as usize]);
            halves(0x18, 0x38, crc(self.seed, &block_bitmap));
            let inode_bits = &inode_bitmap[..per_group as usize / 8];
            halves(0x1a, 0x3a, crc(self.seed, inode_bits));
            halves(0x1c, 0x32, per_group - used);
            put16(&mut bytes, 0x12, INODE_ZEROED);
            let checksum = crc(crc(self.seed, &(group as u32).to_le_bytes()), &bytes);
            put16(&mut bytes, 0x1e, checksum as u16);
            descriptors.extend(bytes);
        }
        let free_inodes = u64::from(per_group) * layout.groups - used;
        for group in (0..layout.groups).filter(|&group| layout.has_superblock(group)) {
            let superblock = self.superblock(group, free_blocks, free_inodes as u32);
            let start = layout.group(group).start * BLOCK;
            let within = if group == 0 { 1024 } else { 0 };
            self.file.write_all_at(&superblock, start + within)?;
            self.file.write_all_at(&descriptors, start + BLOCK)?;
        }
        Ok(())
    }

    fn superblock(&self, group: u64, free_blocks: u64, free_inodes: u32) -> [u8; 1024] {
        let layout = &self.layout;
        let mut bytes = [0; 1024];
        let mut put = |at, value| put32(&mut bytes, at, value);
        put(0x0, layout.inodes_per_group * layout.groups as u32);
        put(0x4, low(layout.blocks));
        put(0x150, high(layout.blocks));
        put(0xc, low(free_blocks));
        put(0x158, high(free_blocks));
        put(0x10, free_inodes);
        put(0x18, 2); // blocks of 1024 << 2 bytes
        put(0x1c, 2); // clusters of the same size
        put(0x20, GROUP as u32);
        put(0x24, GROUP as u32);
        put(0x28, layout.inodes_per_group);
        put(0x4c, 1); // a revision with inodes of any size
        put(0x54, RESERVED + 1);
        put(0x5c, COMPAT);
        put(0x60, INCOMPAT);
        put(0x64, RO_COMPAT);
        put(0xe0, JOURNAL);
        put(0x100, 0x4 | 0x8); // mounted with user_xattr and acl
        put(0x160, 0x1); // name hashes treat bytes as signed, as on x86
        put16(&mut bytes, 0x36, u16::MAX); // never checked because of the mount count
        put16(&mut bytes, 0x38, SUPER_MAGIC);
        put16(&mut bytes, 0x3a, 1); // clean
        put16(&mut bytes, 0x3c, 1); // continues after errors
        put16(&mut bytes, 0x58, INODE as u16);
        put16(&mut bytes, 0x5a, group as u16);
        put16(&mut bytes, 0xfe, DESCRIPTOR as u16);
        put16(&mut bytes, 0x15c, EXTRA as u16);
        put16(&mut bytes, 0x15e, EXTRA as u16);
        bytes[0x68..0x78].copy_from_slice(&self.uuid);
        // The seed of the name hashes must be random, as the UUID is.
        bytes[0xec..0xfc].copy_from_slice(&self.uuid);
        bytes[0xfc] = 1; // half MD4
        bytes[0xfd] = 1; // 0x10c holds a copy of the journal's inode
        bytes[0x10c..0x150].copy_from_slice(&self.journal_copy);
        bytes[0x174] = 4; // 16 groups in a flex group
        bytes[0x175] = 1; // CRC-32C
        let checksum = crc(!0, &bytes[..0x3fc]);
        put32(&mut bytes, 0x3fc, checksum);
        bytes
    }
}

/// A bitmap block: bits before `used` and from `count` on are set.
fn bitmap(used: u64, count: u64) -> Vec<u8> {
    let byte = |at: u64| {
        (0..8).fold(0, |byte, bit| {
            let bit_at = at * 8 + bit;
            byte | u8::from(bit_at < used || bit_at >= count) << bit
        })
    };
    (0..BLOCK).map(byte).collect()
}

/// Signed seconds, and the extra field: two more bits of seconds, and nanoseconds.
fn encode_time(time: Time) -> (u32, u32) {
    const LEAST: i64 = i32::MIN as i64;
    const MOST: i64 = LEAST + (4 << 32) - 1;
    let seconds = time.seconds.clamp(LEAST, MOST);
    let epoch = ((seconds - i64::from(seconds as i32)) >> 32) as u32 & 3;
    (seconds as u32, epoch | time.nanoseconds << 2)
}

/// The number of an attribute's namespace, and the rest of its name (ext4 xattr.h). EROFS uses the same
/// numbers.
pub fn name_index(name: &str) -> Option<(u8, &str)> {
    let prefixes = [(1, "user."), (4, "trusted."), (6, "security.")];
    match name {
        "system.posix_acl_access" => Some((2, "")),
        "system.posix_acl_default" => Some((3, "")),
        _ => prefixes
            .into_iter()
            .find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?))),
    }
}

/// Converts an access list from the format of system calls (linux/posix_acl_xattr.h) to ext4's, where only
/// entries for a named user or group have an id.
fn posix_acl(value: &[u8]) -> Option<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let entries = value.strip_prefix(&2u32.to_le_bytes())?;
    let mut stored = 1u32.to_le_bytes().to_vec();
    for entry in entries.chunks(8) {
        let tag = u16::from_le_bytes(entry.get(..2)?.try_into().ok()?);
        let length = if matches!(tag, USER | GROUP) { 8 } else { 4 };
        stored.extend(entry.get(..8)?.get(..length)?);
    }
    Some(stored)
}

/// Attributes in one location: entries from its start, values from its end.
struct Entries {
    room: usize,
    taken: usize,
    list: Vec<(u8, String, Vec<u8>)>,
}

impl Entries {
    /// Has this many bytes, with four zeros after the entries.
    fn new(room: usize) -> Entries {
        Entries {
            room,
            taken: 4,
            list: vec![],
        }
    }

    fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Adds an attribute, if there is room for it.
    fn add(&mut self, index: u8, name: &str, value: &[u8]) -> bool {
        let size = (16 + name.len()).next_multiple_of(4) + value.len().next_multiple_of(4);
        let fits = self.taken + size <= self.room && name.len() <= 255;
        if fits {
            self.taken += size;
            self.list.push((index, name.into(), value.into()));
        }
        fits
    }

    /// Writes them, with value offsets relative to `base` bytes before. Returns the hash of all of them.
    fn write(&self, buffer: &mut [u8], base: usize) -> u32 {
        let (mut at, mut end) = (0, self.room);
        let mut all: u32 = 0;
        for (index, name, value) in &self.list {
            let padded = value.len().next_multiple_of(4);
            end -= padded;
            buffer[end..end + value.len()].copy_from_slice(value);
            // fs/ext4/xattr.c, ext4_xattr_hash_entry
            let mut hash = name
                .bytes()
                .fold(0u32, |hash, byte| hash.rotate_left(5) ^ u32::from(byte));
            for word in buffer[end..end + padded].chunks_exact(4) {
                let word = word
                    .iter()
                    .rev()
                    .fold(0, |word, &b| word << 8 | u32::from(b));
                hash = hash.rotate_left(16) ^ word;
            }
            all = all.rotate_left(16) ^ hash;
            let offset = if value.is_empty() { 0 } else { end + base };
            buffer[at] = name.len() as u8;
            buffer[at + 1] = *index;
            put16(buffer, at + 2, offset as u16);
            put32(buffer, at + 8, value.len() as u32);
            put32(buffer, at + 12, hash);
            buffer[at + 16..at + 16 + name.len()].copy_from_slice(name.as_bytes());
            at += (16 + name.len()).next_multiple_of(4);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_34_bits_of_seconds_and_nanoseconds() {
        let encode = |seconds, nanoseconds| {
            encode_time(Time {
                seconds,
                nanoseconds,
            })
        };
        assert_eq!(encode(5, 7), (5, 7 << 2));
        assert_eq!(encode(-1, 0), (u32::MAX, 0));
        assert_eq!(encode(i32::MIN.into(), 0), (1 << 31, 0));
        // The table in Documentation/filesystems/ext4/inodes.rst, "Inode Timestamps".
        assert_eq!(encode(0x8000_0000, 0), (0x8000_0000, 1));
        assert_eq!(
            encode(0x1_0000_0000, 999_999_999),
            (0, 1 | 999_999_999 << 2)
        );
        assert_eq!(encode(0x1_8000_0000, 0), (0x8000_0000, 2));
        assert_eq!(encode(0x3_7fff_ffff, 0), (0x7fff_ffff, 3));
        assert_eq!(encode(i64::MAX, 0), (0x7fff_ffff, 3));
    }

    #[test]
    fn copies_of_the_superblock_are_where_mke2fs_has_them() {
        let layout = Layout::new(100 << 30, 1 << 20).unwrap();
        let copies: Vec<_> = (0..layout.groups)
            .filter(|&group| layout.has_superblock(group))
            .collect();
        assert_eq!(
            copies,
            [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125, 243, 343, 625, 729]
        );
    }

    #[test]
    fn a_remainder_that_is_too_small_for_a_group_is_left_out() {
        let whole = Layout::new(GROUP * BLOCK, 4096).unwrap();
        let more = Layout::new((GROUP + 10) * BLOCK, 4096).unwrap();
        assert_eq!((whole.groups, more.groups, more.blocks), (1, 1, GROUP));
        assert!(Layout::new(1 << 20, 100).is_err());
        assert!(Layout::new(8 << 20, 1 << 20).is_err());
    }

    #[test]
    fn files_that_no_file_system_holds_are_refused() {
        let fitting = |blocks, inodes| {
            let extent = Extent {
                inodes,
                blocks,
                ..Extent::default()
            };
            least_size(&extent).and_then(|_| good_size(&extent))
        };
        assert!(fitting(1 << 31, 1000).is_ok());
        for (blocks, inodes) in [(MOST_BLOCKS, 1), (u64::MAX / 4096, 1), (1, 1 << 40)] {
            let error = fitting(blocks, inodes).unwrap_err().to_string();
            assert!(error.contains("16 TiB at most"), "{error}");
        }
    }

    #[test]
    fn an_acl_is_stored_without_unused_ids() {
        let value = [
            &[2, 0, 0, 0][..],
            &[1, 0, 6, 0, 0xff, 0xff, 0xff, 0xff],
            &[2, 0, 4, 0, 0xe8, 3, 0, 0],
            &[0x20, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        ]
        .concat();
        let stored = [
            &[1, 0, 0, 0][..],
            &[1, 0, 6, 0],
            &[2, 0, 4, 0, 0xe8, 3, 0, 0],
            &[0x20, 0, 0, 0],
        ]
        .concat();
        assert_eq!(posix_acl(&value), Some(stored));
        assert_eq!(posix_acl(&value[..10]), None);
        assert_eq!(posix_acl(b"\x01\0\0\0"), None);
    }
}
