//! Reading tar streams (POSIX.1-2017 pax(1), "pax Interchange Format" and "ustar Interchange
//! Format"; GNU tar manual, "Basic Tar Format" and "Storing Sparse Files").
//!
//! This is not the `tar` crate because pax records have to be read to the byte: attribute values
//! with line feeds, fractional and negative times, and all formats of sparse files.

use std::{collections::BTreeMap, io::Read};

use anyhow::{Context, Result, bail, ensure};

use super::tree::{Device, Kind, Meta, Time};

/// Size of a header in bytes; contents are padded to a multiple of it.
const BLOCK: usize = 512;
/// Maximum size of an extended header or a long name: far more than real ones have.
const MAX_EXTENSION: u64 = 16 << 20;
/// Maximum size of a file: an off_t, also when padded.
const MAX_SIZE: u64 = i64::MAX as u64 - (BLOCK as u64 - 1);
/// Maximum number of pieces of a sparse file.
const MAX_PIECES: usize = 1 << 20;

/// Fields of a header: offset and length.
const NAME: (usize, usize) = (0, 100);
const MODE: (usize, usize) = (100, 8);
const UID: (usize, usize) = (108, 8);
const GID: (usize, usize) = (116, 8);
const SIZE: (usize, usize) = (124, 12);
const MTIME: (usize, usize) = (136, 12);
const CHECKSUM: (usize, usize) = (148, 8);
const TYPE: usize = 156;
const LINK: (usize, usize) = (157, 100);
const MAGIC: (usize, usize) = (257, 6);
const MAJOR: (usize, usize) = (329, 8);
const MINOR: (usize, usize) = (337, 8);
const PREFIX: (usize, usize) = (345, 155);
/// GNU's old sparse format: pairs of offset and length, whether a block with more pairs follows, and the size
/// of the whole file.
const GNU_PIECES: (usize, usize) = (386, 4);
const GNU_MORE: usize = 482;
const GNU_REAL_SIZE: (usize, usize) = (483, 12);
const GNU_MORE_PIECES: (usize, usize) = (0, 21);
const GNU_MORE_MORE: usize = 504;

/// An entry of an archive.
#[derive(Debug)]
pub struct Member {
    /// Its path as in the archive.
    pub path: Vec<u8>,
    /// Owner, mode, time and attributes.
    pub meta: Meta,
    /// Its type; None for types that are not files.
    pub kind: Option<Kind>,
    /// Its data: offset and length of each piece. The gaps are zeros.
    pub pieces: Vec<(u64, u64)>,
    /// Attributes in the archive that [`Meta`] cannot represent.
    pub lost: Vec<String>,
}

/// Iterates over the members of an archive. Reading from it returns the stored data of the current member.
pub struct Archive<R> {
    source: R,
    /// Unread bytes of the current member.
    left: u64,
    /// Padding after them, up to the end of a block.
    padding: u64,
    /// Records of global headers.
    global: Records,
}

/// Records of a pax header.
type Records = Vec<(Vec<u8>, Vec<u8>)>;

impl<R: Read> Archive<R> {
    /// Reads an uncompressed stream.
    pub fn new(source: R) -> Archive<R> {
        Archive {
            source,
            left: 0,
            padding: 0,
            global: vec![],
        }
    }

    /// The next member; None at the end.
    pub fn next_member(&mut self) -> Result<Option<Member>> {
        let (mut name, mut link, mut records) = (None, None, vec![]);
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let size = number(field(&header, SIZE)).context("a bad size")?;
            let size = u64::try_from(size).context("a size below zero")?;
            match header[TYPE] {
                b'L' => name = Some(until_zero(&self.extension(size)?).to_vec()),
                b'K' => link = Some(until_zero(&self.extension(size)?).to_vec()),
                b'x' | b'X' => records = parse_records(&self.extension(size)?)?,
                b'g' => {
                    let more = parse_records(&self.extension(size)?)?;
                    self.global.extend(more);
                    let records = self.global.iter();
                    let size: usize = records.map(|(key, value)| key.len() + value.len()).sum();
                    ensure!(
                        size as u64 <= MAX_EXTENSION,
                        "global headers of {size} bytes: at most {MAX_EXTENSION} are taken"
                    );
                }
                _ => return self.member(&header, size, name, link, records).map(Some),
            }
        }
    }

    /// The member described by a header and the records before it.
    fn member(
        &mut self,
        header: &[u8; BLOCK],
        size: u64,
        name: Option<Vec<u8>>,
        link: Option<Vec<u8>>,
        records: Records,
    ) -> Result<Member> {
        let mut member = Description::of(header, size, name, link)?;
        let global = self.global.clone();
        // The last record of a keyword counts; an empty value deletes an earlier one.
        let mut last: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut sparse = Sparse::default();
        for (key, value) in global.into_iter().chain(records) {
            if !sparse.record(&key, &value)? {
                last.insert(key, value);
            }
        }
        for (key, value) in last {
            let key = String::from_utf8_lossy(&key).into_owned();
            member.record(&key, &value).with_context(|| {
                let path = member.path.escape_ascii();
                format!("{path}: a bad record {key:?}")
            })?;
        }
        let stored = match header[TYPE] {
            // The size field of these types is meaningless.
            b'1'..=b'6' => 0,
            _ => member.size,
        };
        (self.left, self.padding) = (stored, stored.wrapping_neg() % BLOCK as u64);
        if header[TYPE] == b'S' {
            sparse.old_format(header, &mut self.source)?;
        }
        if sparse.is_version_1() {
            sparse.pieces = self.read_map()?;
        }
        let path = sparse.name.take().unwrap_or(member.path);
        let (real, pieces) = match sparse.real_size {
            Some(real) => (real, sparse.pieces),
            None => (stored, vec![(0, stored)]),
        };
        ensure!(
            real <= MAX_SIZE,
            "{}: a size of {real} bytes is too large",
            path.escape_ascii()
        );
        check_pieces(&pieces, real, self.left)
            .with_context(|| format!("{}: a bad sparse file", path.escape_ascii()))?;
        let device = |character| {
            let (major, minor) = (
                number(field(header, MAJOR)).unwrap_or(0),
                number(field(header, MINOR)).unwrap_or(0),
            );
            anyhow::Ok(Kind::Device(Device {
                character,
                major: major.try_into().context("a bad device number")?,
                minor: minor.try_into().context("a bad device number")?,
            }))
        };
        let data = pieces.iter().map(|(_, length)| length).sum();
        let file = Kind::File { size: real, data };
        let kind = match header[TYPE] {
            // Old archives mark a directory by a slash at the end of a file's name.
            b'0' | 0 if path.ends_with(b"/") => Some(Kind::Directory),
            b'0' | 0 | b'7' | b'S' => Some(file),
            b'1' => Some(Kind::HardLink(member.link)),
            b'2' => Some(Kind::Symlink(member.link)),
            b'3' => Some(device(true)?),
            b'4' => Some(device(false)?),
            b'5' => Some(Kind::Directory),
            b'6' => Some(Kind::Fifo),
            _ => None,
        };
        Ok(Member {
            path,
            meta: member.meta,
            kind,
            pieces,
            lost: member.lost,
        })
    }

    /// Reads the next header; None at the end marker or the end of the stream.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut header = [0; BLOCK];
        let mut read = 0;
        while read < BLOCK {
            match self.source.read(&mut header[read..])? {
                0 if read == 0 => return Ok(None),
                0 => bail!("the archive ends in the middle of a header"),
                size => read += size,
            }
        }
        if header.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let sum = header.iter().enumerate().map(|(at, &byte)| {
            let in_field = (CHECKSUM.0..CHECKSUM.0 + CHECKSUM.1).contains(&at);
            i64::from(if in_field { b' ' } else { byte })
        });
        ensure!(
            number(field(&header, CHECKSUM)).ok() == Some(sum.sum()),
            "a header with a wrong checksum"
        );
        Ok(Some(header))
    }

    /// Reads a whole extended header.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        ensure!(
            size <= MAX_EXTENSION,
            "an extended header of {size} bytes: at most {MAX_EXTENSION} are taken"
        );
        (self.left, self.padding) = (size, size.wrapping_neg() % BLOCK as u64);
        let mut bytes = vec![];
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads the map before the contents of a sparse file, version 1.0: decimal numbers, one per line, in
    /// separate blocks.
    fn read_map(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut block: Vec<u8> = vec![];
        let mut next = || {
            let mut digits = vec![];
            loop {
                if block.is_empty() {
                    let mut bytes = [0; BLOCK];
                    self.read_exact(&mut bytes)?;
                    block = bytes.iter().rev().copied().collect();
                }
                match block.pop() {
                    Some(b'\n') => break decimal(&digits),
                    Some(digit) if digits.len() < 20 => digits.push(digit),
                    _ => bail!("bad map of a sparse file"),
                }
            }
        };
        let count = next()?;
        ensure!(count <= MAX_PIECES as u64, "its map has {count} pieces");
        (0..count).map(|_| Ok((next()?, next()?))).collect()
    }

    /// Skips the rest of the current member.
    fn skip(&mut self) -> Result<()> {
        let left = self.left + self.padding;
        let mut rest = (&mut self.source).take(left);
        let skipped = std::io::copy(&mut rest, &mut std::io::sink())?;
        ensure!(skipped == left, "the archive ends in the middle of a file");
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// The source, positioned after the end marker.
    pub fn into_inner(self) -> R {
        self.source
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let size = self.source.read(&mut buffer[..most])?;
        if size == 0 && most > 0 {
            return Err(std::io::Error::other(
                "the archive ends in the middle of a file",
            ));
        }
        self.left -= size as u64;
        Ok(size)
    }
}

/// Fields that header and pax records share.
struct Description {
    path: Vec<u8>,
    link: Vec<u8>,
    size: u64,
    meta: Meta,
    lost: Vec<String>,
}

impl Description {
    fn of(
        header: &[u8; BLOCK],
        size: u64,
        name: Option<Vec<u8>>,
        link: Option<Vec<u8>>,
    ) -> Result<Description> {
        let own_name = || {
            let name = until_zero(field(header, NAME));
            let prefix = until_zero(field(header, PREFIX));
            // GNU's magic is "ustar ", and its prefix field has another meaning.
            match field(header, MAGIC) == b"ustar\0" && !prefix.is_empty() {
                true => [prefix, b"/", name].concat(),
                false => name.to_vec(),
            }
        };
        let id = |at, what| {
            let id = number(field(header, at)).with_context(|| format!("a bad {what}"))?;
            u32::try_from(id).with_context(|| format!("a {what} of {id}"))
        };
        let mode = number(field(header, MODE)).context("a bad mode")?;
        Ok(Description {
            path: name.unwrap_or_else(own_name),
            link: link.unwrap_or_else(|| until_zero(field(header, LINK)).to_vec()),
            size,
            meta: Meta {
                mode: (mode & 0o7777) as u32,
                uid: id(UID, "user id")?,
                gid: id(GID, "group id")?,
                mtime: Time {
                    seconds: number(field(header, MTIME)).unwrap_or(0),
                    nanoseconds: 0,
                },
                xattrs: BTreeMap::new(),
            },
            lost: vec![],
        })
    }

    /// Applies a pax record other than those of sparse files.
    fn record(&mut self, key: &str, value: &[u8]) -> Result<()> {
        /// Extended attributes, as written by star and others.
        const XATTR: &str = "SCHILY.xattr.";
        if let Some(name) = key.strip_prefix(XATTR) {
            self.meta.xattrs.insert(name.into(), value.to_vec());
            return Ok(());
        }
        if value.is_empty() {
            return Ok(());
        }
        match key {
            "path" => self.path = value.to_vec(),
            "linkpath" => self.link = value.to_vec(),
            "size" => self.size = decimal(value)?,
            "uid" => self.meta.uid = decimal(value)?.try_into()?,
            "gid" => self.meta.gid = decimal(value)?.try_into()?,
            "mtime" => self.meta.mtime = time(value).context("no time")?,
            _ => {
                if key.starts_with("SCHILY.acl.") {
                    self.lost.push(key.into());
                }
            }
        }
        Ok(())
    }
}

/// The description of a sparse file.
#[derive(Default)]
struct Sparse {
    version: [Option<u64>; 2],
    name: Option<Vec<u8>>,
    real_size: Option<u64>,
    pieces: Vec<(u64, u64)>,
    /// Version 0.0: an offset without its length yet.
    offset: Option<u64>,
}

impl Sparse {
    /// Applies a `GNU.sparse.` record; false if it is another record.
    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<bool> {
        let Some(key) = key.strip_prefix(b"GNU.sparse.") else {
            return Ok(false);
        };
        let value_number = || decimal(value).context("a bad record of a sparse file");
        match key {
            b"major" => self.version[0] = Some(value_number()?),
            b"minor" => self.version[1] = Some(value_number()?),
            b"name" => self.name = Some(value.to_vec()),
            b"realsize" | b"size" => self.real_size = Some(value_number()?),
            b"offset" => self.offset = Some(value_number()?),
            b"numbytes" => {
                let offset = self.offset.take().context("a sparse file's length alone")?;
                self.pieces.push((offset, value_number()?));
            }
            b"map" => {
                let numbers: Vec<u64> = value
                    .split(|&byte| byte == b',')
                    .map(decimal)
                    .collect::<Result<_>>()?;
                self.pieces = numbers
                    .chunks(2)
                    .map(|pair| Ok((pair[0], *pair.get(1).context("half a piece")?)))
                    .collect::<Result<_>>()?;
            }
            _ => {}
        }
        ensure!(
            self.pieces.len() <= MAX_PIECES,
            "a sparse file in too many pieces"
        );
        Ok(true)
    }

    fn is_version_1(&self) -> bool {
        self.version == [Some(1), Some(0)]
    }

    /// The old GNU format, in the header itself.
    fn old_format(&mut self, header: &[u8; BLOCK], source: &mut impl Read) -> Result<()> {
        let real = number(field(header, GNU_REAL_SIZE)).context("a bad size")?;
        self.real_size = Some(real.try_into().context("a size below zero")?);
        let mut pieces = vec![];
        let mut take = |block: &[u8; BLOCK], (at, count): (usize, usize)| -> Result<()> {
            for pair in block[at..].chunks_exact(24).take(count) {
                if pair[0] == 0 {
                    break;
                }
                let [offset, length] =
                    [&pair[..12], &pair[12..]].map(|text| number(text).map(u64::try_from));
                pieces.push((offset??, length??));
            }
            ensure!(
                pieces.len() <= MAX_PIECES,
                "a sparse file in too many pieces"
            );
            Ok(())
        };
        take(header, GNU_PIECES)?;
        let mut more = header[GNU_MORE] == 1;
        while more {
            let mut block = [0; BLOCK];
            source.read_exact(&mut block)?;
            take(&block, GNU_MORE_PIECES)?;
            more = block[GNU_MORE_MORE] == 1;
        }
        self.pieces = pieces;
        Ok(())
    }
}

/// Pieces must be in order, within the file, and stored completely.
fn check_pieces(pieces: &[(u64, u64)], size: u64, stored: u64) -> Result<()> {
    let mut end = 0;
    let mut total = 0u64;
    for &(offset, length) in pieces {
        ensure!(offset >= end, "its pieces are out of order");
        end = offset.checked_add(length).context("it is too large")?;
        total += length;
    }
    ensure!(end <= size, "it is larger than its size");
    ensure!(total == stored, "{total} bytes of it should be {stored}");
    Ok(())
}

fn field(header: &[u8; BLOCK], (at, length): (usize, usize)) -> &[u8] {
    &header[at..at + length]
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Octal digits, or GNU's base 256 if the first bit is set.
fn number(text: &[u8]) -> Result<i64> {
    if let Some((&first, rest)) = text.split_first()
        && first & 0x80 != 0
    {
        // Two's complement without the top bit, which marks this form.
        let mut value = i128::from(first & 0x7f);
        if first & 0x40 != 0 {
            value -= 0x80;
        }
        for &byte in rest {
            value = (value << 8) | i128::from(byte);
        }
        return value.try_into().context("a number that is too large");
    }
    let digits = until_zero(text).trim_ascii();
    digits.iter().try_fold(0i64, |value, &digit| {
        ensure!((b'0'..=b'7').contains(&digit), "a digit that is not octal");
        let value = value.checked_mul(8).context("a number that is too large")?;
        Ok(value + i64::from(digit - b'0'))
    })
}

fn decimal(text: &[u8]) -> Result<u64> {
    let text = std::str::from_utf8(text)?;
    text.parse()
        .with_context(|| format!("{text:?} is no number"))
}

/// Decimal seconds since 1970, with optional fraction and sign.
fn time(text: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = match text.strip_prefix('-') {
        Some(text) => (true, text),
        None => (false, text),
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok().filter(|&seconds| seconds >= 0)?;
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    Some(match (negative, nanoseconds) {
        (false, _) => Time {
            seconds,
            nanoseconds,
        },
        (true, 0) => Time {
            seconds: -seconds,
            nanoseconds,
        },
        (true, _) => Time {
            seconds: -seconds - 1,
            nanoseconds: 1_000_000_000 - nanoseconds,
        },
    })
}

/// `LENGTH KEY=VALUE\n`, where LENGTH is that of the whole record, and VALUE may contain any byte.
fn parse_records(mut bytes: &[u8]) -> Result<Records> {
    let mut records = vec![];
    while !bytes.is_empty() {
        let record = (|| {
            let space = bytes.iter().position(|&byte| byte == b' ')?;
            let length = decimal(&bytes[..space]).ok()?.try_into().ok()?;
            let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|&byte| byte == b'=')?;
            records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
            Some(length)
        })();
        let length: usize = record.context("a bad record in an extended header")?;
        bytes = &bytes[length..];
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with a checksum.
    fn header(kind: u8, name: &str, size: usize, change: impl FnOnce(&mut [u8; BLOCK])) -> Vec<u8> {
        let mut header = [0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[MODE.0..MODE.0 + 7].copy_from_slice(b"0000644");
        header[SIZE.0..SIZE.0 + 11].copy_from_slice(format!("{size:011o}").as_bytes());
        header[TYPE] = kind;
        header[MAGIC.0..MAGIC.0 + 8].copy_from_slice(b"ustar\x0000");
        change(&mut header);
        header[CHECKSUM.0..CHECKSUM.0 + 8].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[CHECKSUM.0..CHECKSUM.0 + 8].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.to_vec()
    }

    fn padded(bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }

    fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![];
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
            bytes.extend(format!("{length} {key}=").bytes());
            bytes.extend_from_slice(value);
            bytes.push(b'\n');
        }
        [header(b'x', "pax", bytes.len(), |_| {}), padded(&bytes)].concat()
    }

    /// All members and their contents, with zeros between the pieces.
    fn read(bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>> {
        let mut archive = Archive::new(bytes);
        let mut members = vec![];
        while let Some(member) = archive.next_member()? {
            let mut contents = vec![];
            for &(offset, length) in &member.pieces {
                contents.resize(offset as usize, 0);
                let mut piece = vec![0; length as usize];
                archive.read_exact(&mut piece)?;
                contents.extend(piece);
            }
            if let Some(Kind::File { size, .. }) = member.kind {
                contents.resize(size as usize, 0);
            }
            members.push((member, contents));
        }
        Ok(members)
    }

    #[test]
    fn a_record_may_hold_line_feeds_and_equals_signs() {
        let records: [(&str, &[u8]); 4] = [
            ("SCHILY.xattr.user.a", b"one\ntwo=\n\n"),
            ("SCHILY.xattr.user.b", b""),
            ("path", "new/name".as_bytes()),
            ("mtime", b"12.5"),
        ];
        let bytes = [pax(&records), header(b'0', "old", 0, |_| {})].concat();
        let (member, _) = read(&bytes).unwrap().remove(0);
        assert_eq!(member.path, b"new/name");
        assert_eq!(member.meta.xattrs["user.a"], b"one\ntwo=\n\n");
        assert_eq!(member.meta.xattrs["user.b"], b"");
        let expected = Time {
            seconds: 12,
            nanoseconds: 500_000_000,
        };
        assert_eq!(member.meta.mtime, expected);
        assert!(read(&[pax(&[("size", b"x")]), header(b'0', "a", 0, |_| {})].concat()).is_err());
    }

    #[test]
    fn a_time_has_a_sign_and_a_fraction() {
        let time = |text: &str| time(text.as_bytes()).map(|time| (time.seconds, time.nanoseconds));
        assert_eq!(time("1"), Some((1, 0)));
        assert_eq!(time("-1"), Some((-1, 0)));
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("-0.1"), Some((-1, 900_000_000)));
        assert_eq!(time("4294967296.0000000019"), Some((1 << 32, 1)));
        assert_eq!(time("x"), None);
        assert_eq!(time("--1"), None);
    }

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number(b"0000755\0").unwrap(), 0o755);
        assert_eq!(number(b"   644 \0").unwrap(), 0o644);
        assert_eq!(number(b"\0\0").unwrap(), 0);
        assert_eq!(number(b"\x80\0\0\0\x01\0\0\0").unwrap(), 1 << 24);
        assert_eq!(number(&[0xff; 12]).unwrap(), -1);
        assert!(number(b"89").is_err());
        assert!(number(&[0x81; 12]).is_err());
    }

    #[test]
    fn a_sparse_file_of_every_format_has_its_name_and_its_holes() {
        let data = b"abcdefgh";
        let expected = [&[0; 4][..], b"abcde", &[0; 11], b"fgh", &[0; 7]].concat();
        let map = padded(b"2\n4\n5\n20\n3\n");
        let version_1: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"db"),
            ("GNU.sparse.realsize", b"30"),
        ];
        let version_0_1: [(&str, &[u8]); 3] = [
            ("GNU.sparse.size", b"30"),
            ("GNU.sparse.name", b"db"),
            ("GNU.sparse.map", b"4,5,20,3"),
        ];
        let version_0_0: [(&str, &[u8]); 5] = [
            ("GNU.sparse.size", b"30"),
            ("GNU.sparse.offset", b"4"),
            ("GNU.sparse.numbytes", b"5"),
            ("GNU.sparse.offset", b"20"),
            ("GNU.sparse.numbytes", b"3"),
        ];
        let old = header(b'S', "db", 8, |header| {
            header[MAGIC.0..MAGIC.0 + 8].copy_from_slice(b"ustar  \0");
            for (at, number) in [4, 5, 20, 3].iter().enumerate() {
                let at = GNU_PIECES.0 + at * 12;
                header[at..at + 11].copy_from_slice(format!("{number:011o}").as_bytes());
            }
            header[GNU_REAL_SIZE.0..GNU_REAL_SIZE.0 + 11].copy_from_slice(b"00000000036");
        });
        let after = header(b'0', "after", 0, |_| {});
        let sparse = |records: &[(&str, &[u8])], name: &str| {
            [pax(records), header(b'0', name, 8, |_| {}), padded(data)].concat()
        };
        let archives = [
            [
                pax(&version_1),
                header(b'0', "GNUSparseFile.0/db", 512 + 8, |_| {}),
                map,
                padded(data),
            ]
            .concat(),
            sparse(&version_0_1, "GNUSparseFile.0/db"),
            sparse(&version_0_0, "db"),
            [old, padded(data)].concat(),
        ];
        for (number, archive) in archives.iter().enumerate() {
            let members = read(&[archive.as_slice(), &after].concat()).unwrap();
            assert_eq!(members[0].0.path, b"db", "{number}");
            assert_eq!(members[0].1, expected, "{number}");
            assert_eq!(members[1].0.path, b"after", "{number}");
        }
        let mut bad = version_0_1;
        for map in ["4,5,8,3", "4,5,28,3", "4,5", "4,5,20,99", "4,x,5,3"] {
            bad[2].1 = map.as_bytes();
            assert!(read(&sparse(&bad, "x")).is_err(), "{map}");
        }
    }

    #[test]
    fn a_size_that_no_file_can_have_is_refused() {
        let most = u64::MAX.to_string();
        let whole = [
            pax(&[("size", most.as_bytes())]),
            header(b'0', "a", 0, |_| {}),
        ];
        let above = (MAX_SIZE + 1).to_string();
        let sparse = pax(&[("GNU.sparse.size", above.as_bytes())]);
        let sparse = [sparse, header(b'0', "a", 0, |_| {})];
        for archive in [whole.concat(), sparse.concat()] {
            let error = Archive::new(&archive[..]).next_member().unwrap_err();
            let error = error.to_string();
            assert!(
                error.starts_with("a: a size of ") && error.ends_with("is too large"),
                "{error}"
            );
        }
    }

    #[test]
    fn long_names_and_prefixes_are_joined() {
        let long = "n".repeat(300);
        let bytes = [
            header(b'L', "././@LongLink", long.len() + 1, |_| {}),
            padded(format!("{long}\0").as_bytes()),
            header(b'0', "short", 0, |_| {}),
            header(b'0', "name", 0, |header| {
                header[PREFIX.0..PREFIX.0 + 3].copy_from_slice(b"dir");
            }),
        ];
        let members = read(&bytes.concat()).unwrap();
        assert_eq!(members[0].0.path, long.as_bytes());
        assert_eq!(members[1].0.path, b"dir/name");
    }

    #[test]
    fn a_stream_that_is_cut_short_or_damaged_is_an_error() {
        let whole = [header(b'0', "a", 5, |_| {}), padded(b"hello")].concat();
        assert_eq!(read(&whole).unwrap()[0].1, b"hello");
        for end in [100, 512, 514, 600] {
            assert!(read(&whole[..end]).is_err(), "{end}");
        }
        let mut damaged = whole.clone();
        damaged[0] ^= 1;
        let error = read(&damaged).unwrap_err().to_string();
        assert!(error.contains("checksum"), "{error}");
        let huge = header(b'x', "pax", MAX_EXTENSION as usize + 1, |_| {});
        assert!(read(&huge).is_err());
        // The total size of several headers is limited as well.
        let mut global = pax(&[("comment", &vec![b'c'; MAX_EXTENSION as usize / 2])]);
        global[TYPE] = b'g';
        global[CHECKSUM.0..CHECKSUM.0 + 8].fill(b' ');
        let sum: u32 = global[..BLOCK].iter().map(|&byte| u32::from(byte)).sum();
        global[CHECKSUM.0..CHECKSUM.0 + 8].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert_eq!(read(&global).unwrap().len(), 0);
        let error = read(&global.repeat(2)).unwrap_err().to_string();
        assert!(error.contains("global headers"), "{error}");
    }
}
