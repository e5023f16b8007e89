//! Files: opened, read and written; whole ones read with a limit, and replaced so that a crash
//! leaves the old or the new one.
//!
//! Nothing here looks for EINTR: without handlers the kernel starts these calls again itself
//! (signal(7)).

use crate::task::{Outcome, name};
use core::ffi::CStr;
use pigeon_init::text;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

/// Opens a file for this process only (open(2), O_CLOEXEC); one that is created has mode 0644.
#[inline(never)]
pub fn open(path: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))
}

/// read(2)
#[inline(never)]
pub fn read(file: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    rustix::io::read(file, buffer)
}

/// write(2)
#[inline(never)]
pub fn write(file: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    rustix::io::write(file, bytes)
}

/// Reads a regular file whole into `buffer`; a file that is not there is empty.
///
/// Anything else under that name (a pipe would block) and a file over the buffer's size are errors.
#[inline(never)]
pub fn read_whole<'b>(path: &CStr, buffer: &'b mut [u8]) -> Outcome<&'b mut [u8]> {
    let length = read_found(path, buffer)?.unwrap_or(0);
    Ok(buffer.get_mut(..length).unwrap_or(&mut []))
}

/// The same, but the answer is the length, `None` for a file that is not there.
#[inline(never)]
pub fn read_found(path: &CStr, buffer: &mut [u8]) -> Outcome<Option<usize>> {
    let file = match open(path, OFlags::NONBLOCK | OFlags::NOCTTY) {
        Err(Errno::NOENT) => return Ok(None),
        other => other,
    };
    file.map_err(|errno| text!(name(errno)))
        .and_then(|file| read_regular(&file, buffer))
        .map(Some)
        .map_err(|why| text!("read ", path, ": ", why))
}

/// Reads to the end; the error is the reason alone.
fn read_regular(file: &OwnedFd, buffer: &mut [u8]) -> Outcome<usize> {
    let kind = rustix::fs::fstat(file).map(|status| FileType::from_raw_mode(status.st_mode));
    if kind != Ok(FileType::RegularFile) {
        return Err(text!("not a regular file"));
    }
    let limit = buffer.len();
    let mut length = 0;
    while length <= limit {
        // Full: that is all of it only when nothing more can be read.
        let mut more = [0];
        let room = match buffer.get_mut(length..) {
            Some(room @ [_, ..]) => room,
            _ => &mut more,
        };
        match read(file, room) {
            Ok(0) => return Ok(length),
            Ok(count) => length += count,
            Err(errno) => return Err(text!(name(errno))),
        }
    }
    Err(text!("over ", limit, " bytes"))
}

/// Bytes of a file collected into larger writes.
pub struct Writer {
    file: OwnedFd,
    queue: heapless::Vec<u8, 1024>,
}

impl Writer {
    /// Adds bytes.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        for &byte in bytes {
            if self.queue.is_full() {
                self.flush()?;
            }
            let _fits = self.queue.push(byte);
        }
        Ok(())
    }

    #[inline(never)]
    fn flush(&mut self) -> Result<(), Errno> {
        let mut rest = &self.queue[..];
        while !rest.is_empty() {
            let count = write(&self.file, rest)?;
            rest = rest.get(count..).unwrap_or(&[]);
        }
        self.queue.clear();
        Ok(())
    }
}

/// Replaces the file or link `path` by what `fill` writes, by way of `temporary` beside it.
#[inline(never)]
pub fn replace(
    path: &CStr,
    temporary: &CStr,
    fill: &mut dyn FnMut(&mut Writer) -> Result<(), Errno>,
) -> Result<(), Errno> {
    // What a crash left, or somebody put there; never followed.
    match remove(temporary) {
        Ok(()) | Err(Errno::NOENT) => {}
        other => return other,
    }
    let mut writer = Writer {
        file: open(temporary, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?,
        queue: heapless::Vec::new(),
    };
    let written = fill(&mut writer)
        .and_then(|()| writer.flush())
        .and_then(|()| rustix::fs::fsync(&writer.file))
        .and_then(|()| rustix::fs::rename(temporary, path));
    if written.is_err() {
        let _left = remove(temporary);
    }
    written
}

#[inline(never)]
fn remove(path: &CStr) -> Result<(), Errno> {
    rustix::fs::unlink(path)
}
