//! Opening, reading, writing and replacing files.
//!
//! EINTR is not handled: without signal handlers the kernel restarts these calls (signal(7)).

use crate::error;
use crate::error::Result;
use core::ffi::CStr;
use core::fmt::Display;
use core::mem::MaybeUninit;
use proto::config::PATH_MAX;
use proto::message;
use proto::message::{Message, ToLossy};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;

/// The string up to the first NUL; empty if there is no NUL.
pub fn c_str(bytes: &[u8]) -> &CStr {
    CStr::from_bytes_until_nul(bytes).unwrap_or_default()
}

/// Opens a file with O_CLOEXEC (open(2)); a created file gets mode 0644.
pub fn open(path: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))
}

/// The same, relative to a directory, on the same mount (openat2(2)): opening what a process has mounted over
/// a file, such as a FIFO, could block.
pub fn open_at(directory: impl AsFd, path: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let mode = match flags.contains(OFlags::CREATE) {
        true => Mode::from_raw_mode(0o644),
        false => Mode::empty(),
    };
    let flags = flags | OFlags::CLOEXEC;
    rustix::fs::openat2(directory, path, flags, mode, ResolveFlags::NO_XDEV)
}

/// Reads some bytes (read(2)).
pub fn read(file: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    rustix::io::read(file, buffer)
}

/// Reads to the end of the file, or until the buffer is full. Returns the number of bytes.
#[cfg(any(feature = "files", feature = "sysinfo"))]
pub fn read_full(file: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    let mut length = 0;
    while let Some(room @ [_, ..]) = buffer.get_mut(length..) {
        match read(file, room)? {
            0 => break,
            count => length += count,
        }
    }
    Ok(length)
}

/// Writes some bytes (write(2)).
pub fn write(file: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    rustix::io::write(file, bytes)
}

/// Most bytes sent while memory is fragmented: the kernel can always allocate that many contiguous bytes
/// (up to PAGE_ALLOC_COSTLY_ORDER, linux/mmzone.h).
const SMALL_PIECE: usize = 8 << 10;

/// Sends some bytes over vsock (send(2)). Returns EPIPE, without a SIGPIPE, if the peer is gone.
///
/// The kernel copies up to 64 KiB to contiguous memory (net/vmw_vsock/virtio_transport_common.c). With a full
/// page cache there may be none (ENOMEM): then fewer bytes are sent.
pub fn send(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    let send = |bytes| rustix::net::send(socket, bytes, SendFlags::NOSIGNAL);
    match send(bytes) {
        Err(Errno::NOMEM) => send(bytes.get(..SMALL_PIECE).unwrap_or(bytes)),
        sent => sent,
    }
}

/// Identifies a file, whatever its name: device and inode number (inode(7)).
pub fn identify(directory: BorrowedFd, path: &CStr, flags: AtFlags) -> Result<(u64, u64), Errno> {
    let status = rustix::fs::statat(directory, path, flags)?;
    Ok((status.st_dev, status.st_ino))
}

/// Writes to one of the kernel's files, relative to a directory, in a single write.
pub fn write_at(directory: &OwnedFd, path: &CStr, value: &[u8]) -> Result<(), Errno> {
    let file = open_at(directory, path, OFlags::WRONLY)?;
    write(&file, value).map(drop)
}

/// Reads one of the kernel's files, relative to a directory, as much as fits in the buffer.
pub fn read_at<'b>(
    directory: &OwnedFd,
    path: &CStr,
    buffer: &'b mut [u8],
) -> Result<&'b [u8], Errno> {
    let file = open_at(directory, path, OFlags::RDONLY)?;
    let length = read(&file, buffer)?;
    Ok(buffer.get(..length).unwrap_or(&[]))
}

/// Calls `visit` with the name of each directory in `parent`.
pub fn each_directory(parent: &OwnedFd, visit: &mut dyn FnMut(&CStr)) {
    let Ok(parent) = open_at(parent, c".", OFlags::DIRECTORY) else {
        return;
    };
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(&parent, &mut buffer);
    while let Some(Ok(entry)) = entries.next() {
        let name = entry.file_name();
        if entry.file_type() == FileType::Directory && !matches!(name.to_bytes(), b"." | b"..") {
            visit(name);
        }
    }
}

/// Writes some bytes of several pieces (writev(2)).
#[cfg(feature = "logs")]
pub fn write_vectored(file: &OwnedFd, pieces: &[rustix::io::IoSlice]) -> Result<usize, Errno> {
    rustix::io::writev(file, pieces)
}

/// Concatenates the parts to a path; `None` if it does not fit.
pub fn join<'p>(parts: &[&[u8]], room: &'p mut [u8]) -> Option<&'p CStr> {
    let mut length = 0;
    for part in parts {
        let target = room.get_mut(length..)?.get_mut(..part.len())?;
        target.copy_from_slice(part);
        length += part.len();
    }
    *room.get_mut(length)? = 0;
    Some(c_str(room))
}

/// Reads a whole regular file into `buffer`; `None` if it does not exist.
///
/// Other types of file (a pipe would block) and files larger than the buffer are errors.
pub fn read_whole<'b>(path: &CStr, buffer: &'b mut [u8]) -> Result<Option<&'b mut [u8]>, Message> {
    let failed = |why: &dyn Display| message!("read {}: {why}", path.lossy());
    let failed_with = |errno| failed(&error::name(errno));
    let file = match open(path, OFlags::NONBLOCK | OFlags::NOCTTY) {
        Err(Errno::NOENT) => return Ok(None),
        file => file.map_err(failed_with)?,
    };
    let status = rustix::fs::fstat(&file).map_err(failed_with)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        return Err(failed(&"not a regular file"));
    }
    let limit = buffer.len();
    let mut length = 0;
    while length <= limit {
        // If the buffer is full, the file must end there.
        let mut more = [0];
        let room = match buffer.get_mut(length..) {
            Some(room @ [_, ..]) => room,
            _ => &mut more,
        };
        match read(&file, room).map_err(failed_with)? {
            0 => return Ok(buffer.get_mut(..length)),
            count => length += count,
        }
    }
    Err(failed(&format_args!("over {limit} bytes")))
}

/// Replaces the file or link `path` by renaming `temporary`, in the same directory, with the new contents:
/// after a crash there is the old or the new file. Without fsync, which would flush the disk.
pub fn replace(path: &CStr, temporary: &CStr, contents: &[u8]) -> Result<(), Errno> {
    let create = || open(temporary, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL);
    let file = match create() {
        // Left by a crash, or created by another process. Links are not followed.
        Err(Errno::EXIST) => {
            remove(temporary)?;
            create()?
        }
        created => created?,
    };
    let replaced = write_whole(&file, contents).and_then(|()| rustix::fs::rename(temporary, path));
    if replaced.is_err() {
        let _left = remove(temporary);
    }
    replaced
}

/// Writes all of it.
pub fn write_whole(file: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let count = write(file, bytes)?;
        bytes = bytes.get(count..).unwrap_or(&[]);
    }
    Ok(())
}

fn remove(path: &CStr) -> Result<(), Errno> {
    rustix::fs::unlink(path)
}

/// Creates a directory with exactly this mode; an existing one keeps its own.
pub fn make_directory(path: &CStr, mode: u32) -> Result<(), Errno> {
    /// PID 1's umask (INIT_FS, include/linux/init_task.h).
    const UMASK: u32 = 0o022;
    let bits = Mode::from_raw_mode(mode);
    match rustix::fs::mkdir(path, bits) {
        Ok(()) if mode & UMASK != 0 => rustix::fs::chmod(path, bits),
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// The same, with an error message.
pub fn require_directory(path: &CStr, mode: u32) -> Result {
    make_directory(path, mode).map_err(error::on("create", path))
}

/// Creates a directory and its missing parents, with mode 0755.
pub fn make_directories(path: &[u8]) -> Result<(), Errno> {
    let mut prefix = [0; PATH_MAX];
    for (at, byte) in path.iter().enumerate() {
        *prefix.get_mut(at).ok_or(Errno::NAMETOOLONG)? = *byte;
        if *byte != b'/' && at + 1 < path.len() {
            continue;
        }
        match make_directory(c_str(&prefix), 0o755) {
            // A file in the way fails at the next part, or when the directory is used.
            Ok(()) | Err(Errno::ISDIR) => {}
            other => return other,
        }
    }
    Ok(())
}
