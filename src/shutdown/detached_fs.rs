//! Detached instances of the kernel's file systems (fsopen(2), fsmount(2)): no process in the VM can have
//! mounted over the files that are read and written there.

use crate::sys::{self, Region, files};
use core::ffi::CStr;
use proto::bytes::{Split, split};
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

/// Maximum number of bytes read from a file: several thousand mounts.
const TABLE: usize = 1 << 20;

/// A new instance of a file system without a device; `options` are separated by commas.
pub fn mount(fs_type: &CStr, options: &[u8]) -> Result<OwnedFd, Errno> {
    sys::mount::instance(fs_type, options, MountAttrFlags::empty())
}

/// A new instance of procfs.
pub fn proc() -> Result<OwnedFd, Errno> {
    mount(c"proc", b"")
}

/// The contents of one of the kernel's files.
pub struct KernelFile {
    memory: Region,
    length: usize,
}

impl KernelFile {
    /// Reads it, up to [`TABLE`] bytes.
    pub fn read(directory: &OwnedFd, path: &CStr) -> Result<Self, Errno> {
        let file = files::open_at(directory, path, OFlags::RDONLY)?;
        let mut memory = Region::new(TABLE)?;
        let mut length = 0;
        while let count @ 1.. = files::read(&file, memory.get_mut(length..).unwrap_or(&mut []))? {
            length += count;
        }
        Ok(Self { memory, length })
    }

    /// Its lines.
    pub fn lines(&self) -> Split<'_> {
        let text = self.memory.get(..self.length).unwrap_or(&[]);
        split(text, b'\n')
    }
}
