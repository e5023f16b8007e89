//! Reads layers: tar streams, compressed or not, and directories of the host.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use bzip2::bufread::MultiBzDecoder;
use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;
use rustix::{
    fs::{lgetxattr, llistxattr},
    io::Errno,
};
use ruzstd::decoding::{
    BlockDecodingStrategy, FrameDecoder,
    errors::{FrameDecoderError, ReadFrameHeaderError},
};
use sha2::{Digest, Sha256};

use super::{
    archive::Archive,
    tree::{Device, Entry, Kind, Meta, Time},
};

/// The compression of a stream.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Compression {
    Bzip2,
    Gzip,
    Xz,
    Zstd,
}

impl Compression {
    /// Bytes needed to detect it.
    const START: usize = 6;

    /// Detects it from the first bytes (RFC 1952, RFC 8878, xz-file-format.txt 2.1.1.1).
    fn of(start: &[u8]) -> Option<Compression> {
        match start {
            [0x1f, 0x8b, ..] => Some(Compression::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Some(Compression::Zstd)
            }
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Compression::Xz),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Some(Compression::Bzip2),
            _ => None,
        }
    }
}

/// Whether an extended attribute is kept. SELinux labels belong to the host, overlayfs's attributes to the
/// mount that the files came from, and other namespaces to one file system.
fn is_kept(attribute: &str) -> bool {
    let namespaces = ["security.", "trusted.", "user."];
    match attribute {
        "security.selinux" => false,
        "system.posix_acl_access" | "system.posix_acl_default" => true,
        _ if attribute.starts_with("trusted.overlay.") => false,
        _ => namespaces.iter().any(|space| attribute.starts_with(space)),
    }
}

/// Removes attributes that are not kept, and returns their names.
pub(super) fn drop_attributes(meta: &mut Meta, is_kept: fn(&str) -> bool) -> Vec<String> {
    let mut lost = vec![];
    meta.xattrs.retain(|name, _| {
        let keep = is_kept(name);
        if !keep {
            lost.push(name.clone());
        }
        keep
    });
    lost
}

/// A regular file's contents.
pub struct Body<'a> {
    /// Offset and length of each piece of data, in order; between them are zeros.
    pub pieces: Vec<(u64, u64)>,
    /// The data of all pieces.
    pub bytes: &'a mut dyn Read,
}

/// A section of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Blob {
    /// The file.
    pub path: PathBuf,
    /// The offset of the section.
    pub offset: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Its expected SHA-256, in hexadecimal.
    pub sha256: Option<String>,
}

impl Blob {
    /// A whole file.
    pub fn file(path: &Path) -> Result<Blob> {
        let metadata = fs::metadata(path).with_context(|| format!("unable to read {path:?}"))?;
        ensure!(metadata.is_file(), "{path:?} is not a file");
        Ok(Blob {
            path: path.into(),
            offset: 0,
            size: metadata.len(),
            sha256: None,
        })
    }

    /// Its bytes as stored.
    pub fn open(&self) -> Result<impl Read + use<>> {
        let mut file =
            File::open(&self.path).with_context(|| format!("unable to open {:?}", self.path))?;
        file.seek(SeekFrom::Start(self.offset))?;
        Ok(file.take(self.size))
    }

    /// Reads a small one completely, such as a manifest.
    pub fn read(&self) -> Result<Vec<u8>> {
        const LIMIT: u64 = 16 << 20;
        ensure!(self.size <= LIMIT, "too large for what it should be");
        let mut bytes = vec![];
        self.open()?.read_to_end(&mut bytes)?;
        if let Some(expected) = &self.sha256 {
            ensure!(
                hex(&Sha256::digest(&bytes)) == *expected,
                "damaged: its SHA-256 is not {expected}"
            );
        }
        Ok(bytes)
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A source of files.
#[derive(Debug)]
pub enum Layer {
    /// A tar stream.
    Tar(Blob),
    /// A directory of the host: its paths, relative to the first one, sorted.
    Directory(PathBuf, Vec<PathBuf>),
}

/// Counts the bytes that are read, and computes their digest.
struct Meter<'a, R> {
    inner: R,
    digest: Option<Sha256>,
    count: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Meter<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = self.inner.read(buffer)?;
        if let Some(digest) = &mut self.digest {
            digest.update(&buffer[..size]);
        }
        (self.count)(size as u64);
        Ok(size)
    }
}

impl Layer {
    /// A directory of the host with all its contents, also on several file systems.
    pub fn directory(root: &Path) -> Result<Layer> {
        fn add(root: &Path, below: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
            let dir = root.join(below);
            let entries = fs::read_dir(&dir).with_context(|| format!("unable to read {dir:?}"))?;
            let mut names = entries
                .map(|entry| Ok(entry?.file_name()))
                .collect::<io::Result<Vec<_>>>()?;
            names.sort();
            for name in names {
                let path = below.join(name);
                let is_dir = root.join(&path).symlink_metadata()?.is_dir();
                paths.push(path.clone());
                if is_dir {
                    add(root, &path, paths)?;
                }
            }
            Ok(())
        }
        let mut paths = vec![PathBuf::new()];
        add(root, Path::new(""), &mut paths)?;
        Ok(Layer::Directory(root.into(), paths))
    }

    /// Bytes to read, as far as known in advance; 0 if unknown.
    pub fn size(&self) -> u64 {
        match self {
            Layer::Tar(blob) => blob.size,
            Layer::Directory(..) => 0,
        }
    }

    /// Calls `visit` with the number of each entry, the entry and its contents. `count` is called with the
    /// number of bytes that were read.
    pub fn read(
        &self,
        count: &mut dyn FnMut(u64),
        mut visit: impl FnMut(usize, Entry, Body) -> Result<()>,
    ) -> Result<()> {
        match self {
            Layer::Tar(blob) => read_tar(blob, count, &mut visit),
            Layer::Directory(root, paths) => read_directory(root, paths, &mut visit),
        }
    }
}

type Visit<'a> = &'a mut dyn FnMut(usize, Entry, Body) -> Result<()>;

fn read_tar(blob: &Blob, count: &mut dyn FnMut(u64), visit: Visit) -> Result<()> {
    let mut source = BufReader::with_capacity(
        1 << 16,
        Meter {
            inner: blob.open()?,
            digest: blob.sha256.as_ref().map(|_| Sha256::new()),
            count,
        },
    );
    {
        let mut plain = decompressed(&mut source)?;
        let mut archive = Archive::new(&mut plain);
        let mut number = 0;
        while let Some(mut member) = archive.next_member().context("not a whole tar archive")? {
            let mut lost = drop_attributes(&mut member.meta, is_kept);
            lost.extend(member.lost);
            if let Some(kind) = member.kind {
                let entry = Entry {
                    path: member.path,
                    meta: member.meta,
                    kind,
                    lost,
                };
                let body = Body {
                    pieces: member.pieces,
                    bytes: &mut archive,
                };
                visit(number, entry, body)?;
            }
            number += 1;
        }
        drop(archive);
        // Data after the end marker is part of the digest.
        io::copy(&mut plain, &mut io::sink())?;
    }
    io::copy(&mut source, &mut io::sink())?;
    if let (Some(digest), Some(expected)) = (source.into_inner().digest, &blob.sha256) {
        let found = hex(&digest.finalize());
        ensure!(
            found == *expected,
            "damaged: its SHA-256 is {found}, not {expected}"
        );
    }
    Ok(())
}

/// The decompressed bytes.
pub fn decompressed<'a>(mut source: impl io::BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    Ok(match Compression::of(source.fill_buf()?) {
        Some(Compression::Bzip2) => Box::new(MultiBzDecoder::new(source)),
        Some(Compression::Gzip) => Box::new(MultiGzDecoder::new(source)),
        Some(Compression::Xz) => Box::new(XzReader::new(source, true)),
        Some(Compression::Zstd) => Box::new(ZstdFrames {
            source,
            decoder: FrameDecoder::new(),
        }),
        None => Box::new(source),
    })
}

/// Whether a file starts like a compressed one.
pub fn is_compressed(path: &Path) -> Result<bool> {
    let mut start = vec![];
    let file = File::open(path)?;
    file.take(Compression::START as u64)
        .read_to_end(&mut start)?;
    Ok(Compression::of(&start).is_some())
}

/// A sequence of Zstandard frames (RFC 8878 section 3). Skippable frames, such as zstd:chunked's table of
/// contents, contain no data.
struct ZstdFrames<R> {
    source: R,
    decoder: FrameDecoder,
}

impl<R: io::BufRead> ZstdFrames<R> {
    /// Starts the next frame with data; false at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let mut skipped = self.source.by_ref().take(length.into());
                    if io::copy(&mut skipped, &mut io::sink())? < length.into() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }
}

impl<R: io::BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !buffer.is_empty() {
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let enough = BlockDecodingStrategy::UptoBytes(buffer.len());
                let decoded = self.decoder.decode_blocks(&mut self.source, enough);
                decoded.map_err(io::Error::other)?;
            }
            let size = self.decoder.read(buffer)?;
            if size > 0 {
                return Ok(size);
            }
            if !self.next_frame()? {
                break;
            }
        }
        Ok(0)
    }
}

fn read_directory(root: &Path, paths: &[PathBuf], visit: Visit) -> Result<()> {
    // Only root keeps the host's owners: files prepared by another user become root's.
    let as_is = rustix::process::geteuid().is_root();
    let mut inodes = HashMap::new();
    for (number, path) in paths.iter().enumerate() {
        let place = root.join(path);
        let unreadable = || format!("unable to read {place:?}");
        let found = place.symlink_metadata().with_context(unreadable)?;
        let kind = found.file_type();
        let own = |id: u32| if as_is { id } else { 0 };
        let mut meta = Meta {
            mode: found.mode() & 0o7777,
            uid: own(found.uid()),
            gid: own(found.gid()),
            mtime: Time {
                seconds: found.mtime(),
                nanoseconds: u32::try_from(found.mtime_nsec()).unwrap_or(0),
            },
            xattrs: attributes(&place).with_context(unreadable)?,
        };
        let lost = drop_attributes(&mut meta, is_kept);
        let (mut file, mut pieces) = (None, vec![]);
        let kind = if kind.is_dir() {
            Kind::Directory
        } else if kind.is_symlink() {
            let target = fs::read_link(&place).with_context(unreadable)?;
            Kind::Symlink(target.into_os_string().into_vec())
        } else if kind.is_fifo() {
            Kind::Fifo
        } else if kind.is_char_device() || kind.is_block_device() {
            Kind::Device(Device {
                character: kind.is_char_device(),
                major: rustix::fs::major(found.rdev()),
                minor: rustix::fs::minor(found.rdev()),
            })
        } else if kind.is_socket() {
            continue; // it is useless without the listening process
        } else if !kind.is_file() {
            bail!("{place:?} is a file of an unknown kind");
        } else if let Some(first) = inodes.get(&(found.dev(), found.ino())) {
            Kind::HardLink(Vec::clone(first))
        } else {
            let name = path.as_os_str().as_bytes().to_vec();
            inodes.insert((found.dev(), found.ino()), name);
            let size = found.len();
            let mut contents = Lazy(place.clone(), None);
            // A file with holes has fewer blocks than its size requires.
            pieces = match found.blocks().saturating_mul(512) < size {
                true => contents.pieces(size).with_context(unreadable)?,
                false => vec![(0, size)],
            };
            file = Some(contents);
            let data = pieces.iter().map(|(_, length)| length).sum();
            Kind::File { size, data }
        };
        let entry = Entry {
            path: path.as_os_str().as_bytes().to_vec(),
            meta,
            kind,
            lost,
        };
        let mut bytes: Box<dyn Read> = match file {
            None => Box::new(io::empty()),
            Some(file) => Box::new(Pieces {
                file,
                pieces: pieces.clone().into(),
            }),
        };
        let body = Body {
            pieces,
            bytes: &mut bytes,
        };
        visit(number, entry, body)?;
    }
    Ok(())
}

/// The extended attributes of a file, or of a symbolic link itself.
fn attributes(path: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    /// XATTR_LIST_MAX and XATTR_SIZE_MAX (linux/limits.h).
    const LIMIT: usize = 64 << 10;
    let mut names = vec![0; LIMIT];
    let size = match llistxattr(path, &mut names) {
        Err(Errno::NOTSUP) => 0, // not supported by the file system
        size => size?,
    };
    let mut attributes = BTreeMap::new();
    for name in names[..size].split(|&byte| byte == 0) {
        if name.is_empty() {
            continue;
        }
        let mut value = vec![0; LIMIT];
        let size = lgetxattr(path, OsStr::from_bytes(name), &mut value)?;
        value.truncate(size);
        attributes.insert(String::from_utf8_lossy(name).into_owned(), value);
    }
    Ok(attributes)
}

/// A file that is opened on its first read: most passes do not read it.
struct Lazy(PathBuf, Option<File>);

impl Lazy {
    fn open(&mut self) -> io::Result<&mut File> {
        if self.1.is_none() {
            let explain = |error| io::Error::other(format!("unable to read {:?}: {error}", self.0));
            self.1 = Some(File::open(&self.0).map_err(explain)?);
        }
        self.1
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The pieces of data between its holes (lseek(2), SEEK_DATA).
    fn pieces(&mut self, size: u64) -> io::Result<Vec<(u64, u64)>> {
        use rustix::fs::{SeekFrom, seek};
        let file = self.open()?;
        let mut pieces = vec![];
        let mut at = 0;
        while at < size {
            let start = match seek(&*file, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => break,
                start => start?,
            };
            let end = seek(&*file, SeekFrom::Hole(start))?.min(size);
            if start >= size {
                break;
            }
            pieces.push((start, end - start));
            at = end;
        }
        Ok(pieces)
    }
}

/// The data of a file, without its holes.
struct Pieces {
    file: Lazy,
    pieces: VecDeque<(u64, u64)>,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let Some((offset, length)) = self.pieces.front_mut() else {
            return Ok(0);
        };
        let most = usize::try_from(*length).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let size = self.file.open()?.read_at(&mut buffer[..most], *offset)?;
        if size == 0 && most > 0 {
            return Ok(0);
        }
        (*offset, *length) = (*offset + size as u64, *length - size as u64);
        if *length == 0 {
            self.pieces.pop_front();
        }
        Ok(size)
    }
}

/// Copies `source` to `path`, decompressed.
pub fn copy_plain(source: impl Read, path: &Path, count: &mut dyn FnMut(u64)) -> Result<()> {
    let meter = Meter {
        inner: source,
        digest: None,
        count,
    };
    let mut plain = decompressed(BufReader::with_capacity(1 << 16, meter))?;
    let mut file = File::create(path)?;
    io::copy(&mut plain, &mut file).context("unable to decompress")?;
    Ok(file.flush()?)
}
