//! Copies the image's /run into the tmpfs that hides it, as container engines do.
//!
//! Servers expect the directories that their packages created: /run/sshd, /run/postgresql.

use crate::context;
use crate::process::helper::HelperLog;
use crate::sys::{c_str, files};
use core::ffi::CStr;
use core::mem::MaybeUninit;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, Stat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

/// Maximum number of entries that are copied.
const MAX_ENTRIES: usize = 1024;
/// Maximum size of a file that is copied, in bytes.
const MAX_FILE: usize = 64 << 10;
/// Maximum size of all files together, in bytes.
const MAX_BYTES: usize = 1 << 20;
/// Maximum depth of nested directories.
const MAX_DEPTH: usize = 32;
/// Maximum length of an entry's name, its NUL included (NAME_MAX, limits.h).
const MAX_NAME: usize = 256;

/// A directory that is being copied.
struct OpenDirectory {
    from: OwnedFd,
    to: OwnedFd,
    /// Offset of the next entry to read.
    offset: u64,
}

/// Why a copy is incomplete.
enum CopyError {
    /// The limit that was exceeded.
    Limit(&'static str),
    Failed(Errno),
}

impl From<Errno> for CopyError {
    fn from(errno: Errno) -> Self {
        Self::Failed(errno)
    }
}

/// Copies directories, links and small files with their owners and modes. Links are not followed.
pub fn copy(from: &CStr, to: OwnedFd, buffer: &mut [u8], log: &HelperLog) {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
    // Without such a directory there is nothing to copy.
    let Ok(from) = files::open(from, flags) else {
        return;
    };
    match copy_tree(from, to, buffer) {
        Ok(()) => {}
        Err(CopyError::Limit(limit)) => {
            log.warn(&format_args!("/run of the image: {limit}: left out"))
        }
        Err(CopyError::Failed(errno)) => log.warn(&context!("copy /run of the image")(errno)),
    }
}

fn copy_tree(from: OwnedFd, to: OwnedFd, buffer: &mut [u8]) -> Result<(), CopyError> {
    let mut directories = heapless::Vec::<OpenDirectory, MAX_DEPTH>::new();
    let top = OpenDirectory {
        from,
        to,
        offset: 0,
    };
    let _fits = directories.push(top);
    let (mut entries, mut bytes) = (0, 0);
    let mut limit = None;
    while let Some(directory) = directories.last_mut() {
        let mut name = heapless::Vec::new();
        if !next_entry(directory, &mut name)? {
            directories.pop();
            continue;
        }
        entries += 1;
        if entries > MAX_ENTRIES {
            return Err(CopyError::Limit("more than 1,024 entries"));
        }
        let name = c_str(&name);
        let status = rustix::fs::statat(&directory.from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let copied = match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => copy_directory(directory, name, &status).map(|below| {
                if directories.push(below).is_err() {
                    limit = Some("more than 32 directories in each other");
                }
            }),
            FileType::Symlink => copy_link(directory, name, &status, buffer),
            FileType::RegularFile => {
                let size = usize::try_from(status.st_size).unwrap_or(usize::MAX);
                if size > MAX_FILE {
                    limit = Some("a file over 64 KiB");
                    continue;
                }
                bytes += size;
                if bytes > MAX_BYTES {
                    return Err(CopyError::Limit("more than 1 MiB"));
                }
                copy_file(directory, name, &status, buffer)
            }
            // Sockets and devices of the machine that built the image are meaningless here.
            _ => Ok(()),
        };
        // What is there already, /run/lock, stays.
        if copied != Err(Errno::EXIST) {
            copied?;
        }
    }
    limit.map_or(Ok(()), |limit| Err(CopyError::Limit(limit)))
}

/// Reads the next entry's name with its NUL. Returns false if there is none.
fn next_entry(
    directory: &mut OpenDirectory,
    name: &mut heapless::Vec<u8, MAX_NAME>,
) -> Result<bool, Errno> {
    rustix::fs::seek(&directory.from, SeekFrom::Start(directory.offset))?;
    let mut buffer = [MaybeUninit::uninit(); 1024];
    let mut listing = RawDir::new(&directory.from, &mut buffer);
    while let Some(entry) = listing.next() {
        let entry = entry?;
        directory.offset = entry.next_entry_cookie();
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        let bytes = entry.file_name().to_bytes_with_nul();
        return match name.extend_from_slice(bytes) {
            Ok(()) => Ok(true),
            Err(_) => Err(Errno::NAMETOOLONG),
        };
    }
    Ok(false)
}

/// A directory that exists already, /run/lock, keeps its owner and mode.
fn copy_directory(
    directory: &OpenDirectory,
    name: &CStr,
    status: &Stat,
) -> Result<OpenDirectory, Errno> {
    let made = rustix::fs::mkdirat(&directory.to, name, Mode::RWXU);
    let open = |parent| files::open_at(parent, name, OFlags::DIRECTORY | OFlags::NOFOLLOW);
    let next = OpenDirectory {
        from: open(&directory.from)?,
        to: open(&directory.to)?,
        offset: 0,
    };
    match made {
        Ok(()) => copy_owner_and_mode(&next.to, status)?,
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    Ok(next)
}

fn copy_link(
    directory: &OpenDirectory,
    name: &CStr,
    status: &Stat,
    buffer: &mut [u8],
) -> Result<(), Errno> {
    let length = rustix::fs::readlinkat_raw(&directory.from, name, &mut *buffer)?;
    *buffer.get_mut(length).ok_or(Errno::NAMETOOLONG)? = 0;
    rustix::fs::symlinkat(c_str(buffer), &directory.to, name)?;
    let (uid, gid) = owner(status);
    rustix::fs::chownat(&directory.to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
}

fn copy_file(
    directory: &OpenDirectory,
    name: &CStr,
    status: &Stat,
    buffer: &mut [u8],
) -> Result<(), Errno> {
    let from = files::open_at(&directory.from, name, OFlags::NOFOLLOW)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
    let to = files::open_at(&directory.to, name, flags)?;
    loop {
        let count = files::read(&from, buffer)?;
        if count == 0 {
            return copy_owner_and_mode(&to, status);
        }
        files::write_whole(&to, buffer.get(..count).unwrap_or_default())?;
    }
}

/// In this order: a change of owner clears set-user-id (chown(2)).
fn copy_owner_and_mode(to: &OwnedFd, status: &Stat) -> Result<(), Errno> {
    let (uid, gid) = owner(status);
    rustix::fs::fchown(to, uid, gid)?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(status.st_mode))
}

fn owner(status: &Stat) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(status.st_uid)),
        Some(Gid::from_raw(status.st_gid)),
    )
}
