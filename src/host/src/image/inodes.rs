//! A tree in the form used by file systems: a list of inodes, and directories that refer to them.

use std::{
    collections::HashMap,
    io::{self, Read},
};

use anyhow::{Context, Result, ensure};

use super::{
    layer::Layer,
    tree::{Contents, Item, Kind, LeafKind, Meta, Place, Tree},
};
use crate::progress::Progress;

/// All files of a tree; the first one is the root directory.
pub struct Inodes<'a> {
    /// The files.
    pub list: Vec<Inode<'a>>,
    places: HashMap<Place, usize>,
}

/// A file.
pub struct Inode<'a> {
    /// Its first path, without a slash at the start.
    pub path: Vec<u8>,
    /// Owner, mode, time and attributes.
    pub meta: &'a Meta,
    /// Its link count.
    pub links: u32,
    /// Its type and contents.
    pub kind: InodeKind<'a>,
}

/// The type and contents of a file.
pub enum InodeKind<'a> {
    /// A directory.
    Directory {
        /// The index of its parent directory; the root's own for the root.
        parent: usize,
        /// Names and indexes, sorted by name, without `.` and `..`.
        entries: Vec<(Vec<u8>, usize)>,
    },
    /// Anything else.
    Leaf(&'a LeafKind),
}

impl Inode<'_> {
    /// The file type bits of its mode (inode(7)).
    pub fn type_bits(&self) -> u32 {
        match &self.kind {
            InodeKind::Directory { .. } => 0o040_000,
            InodeKind::Leaf(LeafKind::File(_)) => 0o100_000,
            InodeKind::Leaf(LeafKind::Symlink(_)) => 0o120_000,
            InodeKind::Leaf(LeafKind::Device(device)) if device.character => 0o020_000,
            InodeKind::Leaf(LeafKind::Device(_)) => 0o060_000,
            InodeKind::Leaf(LeafKind::Fifo) => 0o010_000,
        }
    }

    /// Its type in a directory entry, as in ext4 and EROFS (linux/fs_types.h, FT_*).
    pub fn entry_type(&self) -> u8 {
        match self.type_bits() {
            0o100_000 => 1,
            0o040_000 => 2,
            0o020_000 => 3,
            0o060_000 => 4,
            0o010_000 => 5,
            _ => 7,
        }
    }
}

impl<'a> Inodes<'a> {
    /// The inodes of a tree.
    pub fn of(tree: &'a Tree) -> Result<Inodes<'a>> {
        let directory = |path: &[u8], parent, meta| Inode {
            path: path.into(),
            meta,
            links: 2,
            kind: InodeKind::Directory {
                parent,
                entries: vec![],
            },
        };
        let mut list = vec![directory(b"", 0, tree.root())];
        let mut by_path = HashMap::from([(vec![], 0)]);
        let mut places = HashMap::new();
        tree.walk(|path, item| {
            let slash = path.iter().rposition(|&byte| byte == b'/');
            let (parent, name) = match slash {
                None => (&b""[..], path),
                Some(at) => (&path[..at], &path[at + 1..]),
            };
            let parent = by_path[parent];
            let new = list.len();
            let number = match item {
                Item::Directory(meta) => {
                    list.push(directory(path, parent, meta));
                    by_path.insert(path.into(), new);
                    list[parent].links += 1;
                    new
                }
                Item::Leaf(leaf) => {
                    if let LeafKind::File(Contents { place, .. }) = leaf.kind {
                        places.insert(place, new);
                    }
                    list.push(Inode {
                        path: path.into(),
                        meta: &leaf.meta,
                        links: 1,
                        kind: InodeKind::Leaf(&leaf.kind),
                    });
                    by_path.insert(path.into(), new);
                    new
                }
                Item::HardLink(first) => {
                    let first = by_path[&*first];
                    list[first].links += 1;
                    first
                }
            };
            if let InodeKind::Directory { entries, .. } = &mut list[parent].kind {
                entries.push((name.into(), number));
            }
            Ok(())
        })?;
        for inode in &mut list {
            if let InodeKind::Directory { entries, .. } = &mut inode.kind {
                entries.sort();
            }
        }
        Ok(Inodes { list, places })
    }

    /// Only a root directory.
    pub fn lone(root: Inode<'a>) -> Inodes<'a> {
        Inodes {
            list: vec![root],
            places: HashMap::new(),
        }
    }

    /// Reads the layers again and calls `take` for every regular file of the tree, with its index, its pieces
    /// and their bytes.
    pub fn contents(
        &self,
        layers: &[Layer],
        progress: &mut Progress,
        mut take: impl FnMut(usize, &[(u64, u64)], &mut dyn Read) -> Result<()>,
    ) -> Result<()> {
        for (layer, read) in layers.iter().enumerate() {
            read.read(&mut |_| {}, |entry, described, body| {
                let Some(&number) = self.places.get(&Place { layer, entry }) else {
                    return Ok(());
                };
                let inode = &self.list[number];
                let path = || inode.path.escape_ascii().to_string();
                let InodeKind::Leaf(LeafKind::File(contents)) = inode.kind else {
                    return Ok(());
                };
                ensure!(
                    matches!(described.kind, Kind::File { size, data }
                        if (size, data) == (contents.size, contents.data)),
                    "{} has changed since it was listed",
                    path()
                );
                let mut bytes = Whole {
                    inner: body.bytes,
                    left: contents.data,
                    progress,
                };
                take(number, &body.pieces, &mut bytes)
                    .with_context(|| format!("unable to write {}", path()))
            })?;
        }
        Ok(())
    }
}

/// Reads exactly the expected number of bytes: it is an error if the file has shrunk; growth is ignored.
struct Whole<'a> {
    inner: &'a mut dyn Read,
    left: u64,
    progress: &'a mut Progress,
}

impl Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let size = self.inner.read(&mut buffer[..most])?;
        if size == 0 && most > 0 {
            return Err(io::Error::other("the file has become shorter"));
        }
        self.left -= size as u64;
        self.progress.add(size as u64);
        Ok(size)
    }
}
