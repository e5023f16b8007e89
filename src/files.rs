//! Whole files: read with a limit, replaced so that a crash leaves the old or the new one.

use crate::task::Outcome;
use crate::why;
use core::ffi::CStr;
use pigeon_init::text;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

/// Reads a regular file whole into `buffer`; a file that is not there is empty.
///
/// Anything else under that name (a pipe would block) and a file over the buffer's size are errors.
pub fn read<'b>(path: &CStr, buffer: &'b mut [u8]) -> Outcome<&'b mut [u8]> {
    match read_found(path, buffer)? {
        Some(length) => Ok(buffer.get_mut(..length).unwrap_or(&mut [])),
        None => Ok(&mut []),
    }
}

/// The same, but the answer is the length, `None` for a file that is not there.
pub fn read_found(path: &CStr, buffer: &mut [u8]) -> Outcome<Option<usize>> {
    let what = why!("read ", path);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        other => other.map_err(what)?,
    };
    let status = rustix::fs::fstat(&file).map_err(what)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Err(text!("read ", path, ": not a regular file"));
    }
    let mut length = 0;
    loop {
        let Some(room @ [_, ..]) = buffer.get_mut(length..) else {
            // Full: that is all of it only when nothing more can be read.
            let more = rustix::io::read(&file, &mut [0u8; 1][..]).map_err(what)?;
            return match more {
                0 => Ok(Some(length)),
                _ => Err(text!("read ", path, ": over ", length, " bytes")),
            };
        };
        match rustix::io::read(&file, room) {
            Ok(0) => return Ok(Some(length)),
            Ok(count) => length += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(what(errno)),
        }
    }
}

/// Bytes of a file collected into larger writes.
pub struct Writer {
    file: OwnedFd,
    queue: pigeon_init::buffer::Buffer<1024>,
}

impl Writer {
    /// Adds bytes.
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            let count = bytes.len().min(self.queue.free());
            let (now, later) = bytes.split_at_checked(count).unwrap_or((bytes, &[]));
            self.queue.push(now);
            bytes = later;
            if self.queue.free() == 0 {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Errno> {
        while !self.queue.is_empty() {
            match rustix::io::write(&self.file, self.queue.filled()) {
                Ok(count) => self.queue.consume(count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

/// Replaces the file or link `path` by what `fill` writes, by way of `temporary` beside it.
pub fn replace(
    path: &CStr,
    temporary: &CStr,
    fill: impl FnOnce(&mut Writer) -> Result<(), Errno>,
) -> Result<(), Errno> {
    // What a crash left, or somebody put there; never followed.
    match rustix::fs::unlink(temporary) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::open(temporary, flags, Mode::from_raw_mode(0o644))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
    let mut writer = Writer {
        file,
        queue: pigeon_init::buffer::Buffer::new(),
    };
    let written = fill(&mut writer)
        .and_then(|()| writer.flush())
        .and_then(|()| rustix::fs::fsync(&writer.file))
        .and_then(|()| rustix::fs::rename(temporary, path));
    if written.is_err() {
        let _left = rustix::fs::unlink(temporary);
    }
    written
}
