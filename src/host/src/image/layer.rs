//! Reading layers: tar streams, compressed or not, and directories of the host.

use std::{
    fs::{self, File},
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use sha2::{Digest, Sha256};

use super::tree::{Device, Entry, Kind, Meta};

/// Bytes that tell a compression (RFC 1952, RFC 8878).
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Extended attributes that a guest has a use for; others (SELinux labels, the host's own) are not
/// the image's.
const XATTRS: [&str; 2] = ["security.capability", "user."];

/// A part of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Blob {
    /// The file.
    pub path: PathBuf,
    /// Where the part starts.
    pub offset: u64,
    /// Its bytes.
    pub size: u64,
    /// What its SHA-256 has to be, in hexadecimal.
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

    /// Its bytes as they are stored.
    pub fn open(&self) -> Result<impl Read + use<>> {
        let mut file =
            File::open(&self.path).with_context(|| format!("unable to open {:?}", self.path))?;
        file.seek(SeekFrom::Start(self.offset))?;
        Ok(file.take(self.size))
    }

    /// All of a small one, such as a manifest.
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Something that files come from.
#[derive(Debug)]
pub enum Layer {
    /// A tar stream.
    Tar(Blob),
    /// A directory of the host: its paths, relative to the first one, sorted.
    Directory(PathBuf, Vec<PathBuf>),
}

/// Counts and digests what passes.
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
    /// A directory of the host with all that is in it, on one file system or several.
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

    /// Bytes to read, as far as known before.
    pub fn size(&self) -> u64 {
        match self {
            Layer::Tar(blob) => blob.size,
            Layer::Directory(..) => 0,
        }
    }

    /// Calls `visit` with the number of each entry, the entry and its contents. `count` is told how
    /// many bytes have been read.
    pub fn read(
        &self,
        count: &mut dyn FnMut(u64),
        mut visit: impl FnMut(usize, Entry, &mut dyn Read) -> Result<()>,
    ) -> Result<()> {
        match self {
            Layer::Tar(blob) => read_tar(blob, count, &mut visit),
            Layer::Directory(root, paths) => read_directory(root, paths, &mut visit),
        }
    }
}

type Visit<'a> = &'a mut dyn FnMut(usize, Entry, &mut dyn Read) -> Result<()>;

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
        let mut archive = tar::Archive::new(&mut plain);
        for (number, entry) in archive.entries()?.enumerate() {
            let mut entry = entry.context("not a whole tar archive")?;
            if let Some(described) = describe(&mut entry)? {
                visit(number, described, &mut entry)?;
            }
        }
        // What follows the end mark counts for the digest.
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

/// The bytes behind whatever compression there is.
pub fn decompressed<'a>(mut source: impl io::BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    let start = source.fill_buf()?;
    let (gzip, zstd) = (start.starts_with(&GZIP), start.starts_with(&ZSTD));
    Ok(if gzip {
        Box::new(MultiGzDecoder::new(source))
    } else if zstd {
        Box::new(ZstdFrames {
            source: Some(source),
            frame: None,
        })
    } else {
        Box::new(source)
    })
}

/// Whether a file starts as a compressed one does.
pub fn is_compressed(path: &Path) -> Result<bool> {
    let mut start = vec![];
    File::open(path)?.take(4).read_to_end(&mut start)?;
    Ok(start.starts_with(&GZIP) || start.starts_with(&ZSTD))
}

/// Zstandard frames, one after the other (RFC 8878 section 3).
struct ZstdFrames<R: io::BufRead> {
    source: Option<R>,
    frame: Option<StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>,
}

impl<R: io::BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(mut source) = self.source.take() {
                if source.fill_buf()?.is_empty() {
                    self.source = Some(source);
                    return Ok(0);
                }
                self.frame = Some(StreamingDecoder::new(source).map_err(io::Error::other)?);
            }
            let Some(frame) = &mut self.frame else {
                return Ok(0);
            };
            match frame.read(buffer)? {
                0 if !buffer.is_empty() => {
                    self.source = self.frame.take().map(StreamingDecoder::into_inner);
                }
                size => return Ok(size),
            }
        }
    }
}

/// What a tar entry says; None for one that is not a file.
fn describe<R: Read>(entry: &mut tar::Entry<R>) -> Result<Option<Entry>> {
    use tar::EntryType;
    let path = entry.path_bytes().into_owned();
    let header = entry.header();
    let target = || {
        let target = entry.link_name_bytes();
        anyhow::Ok(target.context("a link to nothing")?.into_owned())
    };
    let device = |character| {
        anyhow::Ok(Kind::Device(Device {
            character,
            major: header.device_major()?.context("a device without number")?,
            minor: header.device_minor()?.context("a device without number")?,
        }))
    };
    let kind = match header.entry_type() {
        // An old archive's directory is a file whose name ends in a slash.
        EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            Kind::File(entry.size())
        }
        EntryType::Directory => Kind::Directory,
        EntryType::Link => Kind::HardLink(target()?),
        EntryType::Symlink => Kind::Symlink(target()?),
        EntryType::Char => device(true)?,
        EntryType::Block => device(false)?,
        EntryType::Fifo => Kind::Fifo,
        _ => return Ok(None),
    };
    let meta = Meta {
        mode: header.mode()? & 0o7777,
        uid: header.uid()?,
        gid: header.gid()?,
        mtime: header.mtime().unwrap_or(0),
        xattrs: vec![],
    };
    let mut described = Entry { path, meta, kind };
    let Some(extensions) = entry.pax_extensions()? else {
        return Ok(Some(described));
    };
    for extension in extensions {
        let name = described.path.escape_ascii();
        let Ok(extension) = extension else {
            eprintln!("pigeon: {name}: an extended attribute that holds a line feed is left out");
            continue;
        };
        let attribute = extension.key().ok();
        let attribute = attribute.and_then(|key| key.strip_prefix("SCHILY.xattr."));
        if let Some(attribute) = attribute.filter(|name| XATTRS.iter().any(|x| name.starts_with(x)))
        {
            let value = extension.value_bytes().to_vec();
            described.meta.xattrs.push((attribute.into(), value));
        }
    }
    Ok(Some(described))
}

fn read_directory(root: &Path, paths: &[PathBuf], visit: Visit) -> Result<()> {
    // Ownership is the host's only for root: what another user staged is meant to be root's.
    let as_is = rustix::process::geteuid().is_root();
    let mut inodes = std::collections::HashMap::new();
    for (number, path) in paths.iter().enumerate() {
        let place = root.join(path);
        let unreadable = || format!("unable to read {place:?}");
        let found = place.symlink_metadata().with_context(unreadable)?;
        let kind = found.file_type();
        let own = |id: u32| if as_is { u64::from(id) } else { 0 };
        let meta = Meta {
            mode: found.mode() & 0o7777,
            uid: own(found.uid()),
            gid: own(found.gid()),
            mtime: found.mtime().try_into().unwrap_or(0),
            xattrs: vec![],
        };
        let mut contents: Box<dyn Read> = Box::new(io::empty());
        let kind = if kind.is_dir() {
            Kind::Directory
        } else if kind.is_symlink() {
            Kind::Symlink(
                fs::read_link(&place)
                    .with_context(unreadable)?
                    .into_os_string()
                    .into_vec(),
            )
        } else if kind.is_fifo() {
            Kind::Fifo
        } else if kind.is_char_device() || kind.is_block_device() {
            Kind::Device(Device {
                character: kind.is_char_device(),
                major: rustix::fs::major(found.rdev()),
                minor: rustix::fs::minor(found.rdev()),
            })
        } else if kind.is_socket() {
            continue; // it means nothing without the process that listens
        } else if !kind.is_file() {
            bail!("{place:?} is no file of a kind known here");
        } else if let Some(first) = inodes.get(&(found.dev(), found.ino())) {
            Kind::HardLink(Vec::clone(first))
        } else {
            let name = path.as_os_str().as_bytes().to_vec();
            inodes.insert((found.dev(), found.ino()), name);
            contents = Box::new(Lazy(place.clone(), None));
            Kind::File(found.len())
        };
        let path = path.as_os_str().as_bytes().to_vec();
        visit(number, Entry { path, meta, kind }, &mut contents)?;
    }
    Ok(())
}

/// A file opened when it is read: most passes do not.
struct Lazy(PathBuf, Option<File>);

impl Read for Lazy {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.1.is_none() {
            let explain = |error| io::Error::other(format!("unable to read {:?}: {error}", self.0));
            self.1 = Some(File::open(&self.0).map_err(explain)?);
        }
        self.1.as_mut().map_or(Ok(0), |file| file.read(buffer))
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
