//! Writing a tree into an ext4 image, without privileges: one tar stream without any trap, into
//! tar and mkfs.ext4 under fakeroot, which remembers the owners.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fmt::Write as _,
    fs,
    io::{self, Read, Write},
    os::unix::ffi::OsStrExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    Progress,
    layer::Layer,
    tree::{Extent, Item, Meta, Place, Tree},
};
use crate::assets;

/// Free room in an image whose size is computed, besides a quarter of what it holds.
const ROOM: u64 = 64 << 20;
/// Free inodes in an image, besides a quarter of what it holds.
const SPARE_INODES: u64 = 4096;
/// Bytes of an inode in its table (mke2fs.conf).
const INODE: u64 = 256;
/// Bytes of a block.
const BLOCK: u64 = 4096;
/// What an ext4 file system of any size has besides: superblocks, descriptors, a small journal.
const OVERHEAD: u64 = 8 << 20;

/// Everything is initialised now: a guest's kernel would do the rest later, at the workload's cost.
const MKFS_OPTIONS: &str = "nodiscard,lazy_itable_init=0,lazy_journal_init=0";

/// Inodes that an image of a tree gets.
fn inodes(extent: &Extent) -> u64 {
    extent.inodes * 5 / 4 + SPARE_INODES
}

/// Bytes an image has to have at least.
pub fn least_size(extent: &Extent) -> u64 {
    extent.blocks * BLOCK + inodes(extent) * INODE + OVERHEAD
}

/// Bytes an image gets if nobody says how many.
pub fn good_size(extent: &Extent) -> u64 {
    // mke2fs takes a 64th for the journal of a larger one.
    let used = least_size(extent);
    (used + used / 4 + used / 64 + ROOM).next_multiple_of(1 << 20)
}

/// Reads `64M`, `2G`, `65536K` or bytes.
pub fn parse_size(text: &str) -> Result<u64> {
    let (digits, unit) = match text.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    let number: Option<u64> = digits.parse().ok();
    let bytes = number.and_then(|number| number.checked_mul(unit));
    bytes.with_context(|| format!("{text:?} is no size: 64M and 1G are"))
}

/// Makes the image at `out`, in one step: what was there before is there until then.
pub fn write(
    tree: &Tree,
    layers: &[Layer],
    out: &Path,
    size: u64,
    progress: &mut Progress,
) -> Result<()> {
    let extent = tree.extent();
    let least = least_size(&extent);
    ensure!(
        size >= least,
        "{} MiB are too few: it takes {} MiB at least",
        size >> 20,
        least.div_ceil(1 << 20)
    );
    let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    let stage = tempfile::Builder::new()
        .prefix(".pigeon-")
        .tempdir_in(dir)
        .with_context(|| format!("unable to write in {}", dir.display()))?;
    let image = stage.path().join("image");
    let files = stage.path().join("files");
    fs::create_dir(&files)?;

    let mut child = start(stage.path(), &extent, size, tree.root())?;
    let pipe = child.stdin.take().expect("stdin is piped");
    let sent = send(tree, layers, &extent, pipe, progress);
    progress.phase("making the file system", 0);
    let mut said = String::new();
    let mut stderr = child.stderr.take().expect("stderr is piped");
    stderr.read_to_string(&mut said)?;
    let status = child.wait()?;
    // tar's own words say more than the pipe it broke.
    let broken = sent.as_ref().is_err_and(|error| {
        let cause = error.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
    });
    if !broken {
        sent?;
    }
    if !status.success() {
        bail!("unable to make the file system: {}", said.trim_end());
    }
    set_attributes(tree, stage.path(), &image)?;
    fs::rename(&image, out).with_context(|| format!("unable to write {}", out.display()))
}

/// Starts what takes a tar stream and makes `image` of it, in the directory `stage`.
fn start(stage: &Path, extent: &Extent, size: u64, root: &Meta) -> Result<Child> {
    // fakeroot closes every descriptor there could be, which may be a thousand million.
    const SCRIPT: &str = "\
        ulimit -n 1024
        exec \"$FAKEROOT\" -- sh -euc '
            tar --extract --file=- --directory=files --same-permissions --same-owner \\
                --numeric-owner --delay-directory-restore 1>&2
            \"$MKFS\" -q -F -b 4096 -N \"$INODES\" -E \"$OPTIONS\" -d files image \"$SIZE\" 1>&2
        '";
    let options = format!("{MKFS_OPTIONS},root_owner={}:{}", root.uid, root.gid);
    Command::new("sh")
        .args(["-euc", SCRIPT])
        .current_dir(stage)
        .env("LC_ALL", "C")
        .env("FAKEROOT", assets::tool("fakeroot")?)
        .env("MKFS", assets::tool("mkfs.ext4")?)
        .env("INODES", inodes(extent).to_string())
        .env("OPTIONS", options)
        .env("SIZE", format!("{}K", size >> 10))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("unable to start sh")
}

/// Sends the tree as a tar stream in which every directory comes before what is in it, and no path
/// leads through a symbolic link.
fn send(
    tree: &Tree,
    layers: &[Layer],
    extent: &Extent,
    pipe: impl Write,
    progress: &mut Progress,
) -> Result<()> {
    progress.phase("writing files", extent.bytes);
    let mut archive = tar::Builder::new(io::BufWriter::with_capacity(1 << 18, pipe));
    let path = |bytes: &[u8]| Path::new(OsStr::from_bytes(bytes)).to_path_buf();
    let mut wanted: HashMap<Place, Vec<u8>> = HashMap::new();
    tree.walk(|name, item| {
        let mut put = |meta, kind, device: Option<(u32, u32)>| -> Result<()> {
            let mut header = header(meta, kind, 0);
            if let Some((major, minor)) = device {
                header.set_device_major(major)?;
                header.set_device_minor(minor)?;
            }
            Ok(archive.append_data(&mut header, path(name), io::empty())?)
        };
        match item {
            Item::Directory(meta) => put(meta, tar::EntryType::Directory, None),
            Item::Fifo(meta) => put(meta, tar::EntryType::Fifo, None),
            Item::Device(meta, device) => {
                let kind = if device.character {
                    tar::EntryType::Char
                } else {
                    tar::EntryType::Block
                };
                put(meta, kind, Some((device.major, device.minor)))
            }
            Item::File(file) => {
                wanted.insert(file.place, name.to_vec());
                Ok(())
            }
            Item::Symlink(..) | Item::HardLink(_) => Ok(()),
        }
    })?;
    for (number, layer) in layers.iter().enumerate() {
        layer.read(&mut |_| {}, |entry, described, contents| {
            let Some(name) = wanted.get(&Place {
                layer: number,
                entry,
            }) else {
                return Ok(());
            };
            let size = match described.kind {
                super::tree::Kind::File(size) => size,
                _ => bail!("{:?} has changed meanwhile", path(name)),
            };
            let mut header = header(&described.meta, tar::EntryType::Regular, size);
            let mut contents = Exactly {
                inner: contents,
                left: size,
                progress,
            };
            let added = archive.append_data(&mut header, path(name), &mut contents);
            added.with_context(|| format!("unable to write {:?}", path(name)))
        })?;
    }
    // Last, so that nothing is ever written through a link.
    tree.walk(|name, item| {
        let (meta, kind, target) = match item {
            Item::Symlink(meta, target) => (meta, tar::EntryType::Symlink, target),
            Item::HardLink(first) => (&Meta::root(0), tar::EntryType::Link, first),
            _ => return Ok(()),
        };
        let mut header = header(meta, kind, 0);
        let added = archive.append_link(&mut header, path(name), path(target));
        added.with_context(|| format!("unable to write {:?}", path(name)))
    })?;
    archive.into_inner()?.flush()?;
    Ok(())
}

/// The header of an entry.
fn header(meta: &Meta, kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(meta.mode);
    header.set_uid(meta.uid);
    header.set_gid(meta.gid);
    header.set_mtime(meta.mtime);
    header.set_size(size);
    header
}

/// Sets extended attributes in the image: fakeroot 1.31 takes a file that gets one for a file of
/// no kind at all.
fn set_attributes(tree: &Tree, stage: &Path, image: &Path) -> Result<()> {
    let mut requests = String::new();
    tree.walk(|path, item| {
        let meta = match item {
            Item::File(file) => &file.meta,
            Item::Directory(meta) => meta,
            _ => return Ok(()),
        };
        for (name, value) in &meta.xattrs {
            let quotable = |text: &str| !text.contains(['"', '\n', '\r', '\0']);
            let Some(path) = std::str::from_utf8(path)
                .ok()
                .filter(|path| quotable(path) && quotable(name))
            else {
                eprintln!("pigeon: {}: left out {name}", path.escape_ascii());
                continue;
            };
            let number = requests.lines().count();
            fs::write(stage.join(format!("value{number}")), value)?;
            writeln!(requests, "ea_set -f value{number} \"/{path}\" \"{name}\"")?;
        }
        Ok(())
    })?;
    if requests.is_empty() {
        return Ok(());
    }
    fs::write(stage.join("requests"), requests)?;
    let done = Command::new(assets::tool("debugfs")?)
        .args(["-w", "-f", "requests"])
        .arg(image.file_name().context("an image has a name")?)
        .current_dir(stage)
        .stdin(Stdio::null())
        .output()
        .context("unable to start debugfs")?;
    // Its exit status does not tell.
    let said = String::from_utf8_lossy(&done.stderr);
    let complaint = said.lines().find(|line| !line.starts_with("debugfs "));
    match complaint {
        Some(complaint) => bail!("unable to set an extended attribute: {complaint}"),
        None => Ok(()),
    }
}

/// So many bytes: a file that has shrunk is an error, and one that has grown is cut.
struct Exactly<'a> {
    inner: &'a mut dyn Read,
    left: u64,
    progress: &'a mut Progress,
}

impl Read for Exactly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let size = self.inner.read(&mut buffer[..most])?;
        if size == 0 && most > 0 {
            return Err(io::Error::other("it has become shorter meanwhile"));
        }
        self.left -= size as u64;
        self.progress.add(size as u64);
        Ok(size)
    }
}
