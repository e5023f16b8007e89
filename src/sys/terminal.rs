//! Terminals (ioctl_tty(2)).

use super::files;
use linux_raw_sys::ioctl::TIOCOUTQ;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::{Errno, Result};
use rustix::ioctl::{Getter, ioctl};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// Opens a new pseudoterminal in a devpts, with O_CLOEXEC: its non-blocking master (pts(4)), and its slave.
pub fn open(pts: Option<&OwnedFd>, size: Option<Size>) -> Result<(OwnedFd, OwnedFd)> {
    let pts = pts.ok_or(Errno::NOENT)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let master = files::open_at(pts, c"ptmx", flags)?;
    if let Some(size) = size {
        // While the slave is locked, no other process can hold the lock of the size.
        let _ignored = resize(&master, size);
    }
    rustix::pty::unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    Ok((master, slave))
}

/// A terminal's size in characters.
#[derive(Clone, Copy)]
pub struct Size(u32);

impl Size {
    /// A size in columns and rows; `None` if one of them is 0 (unknown).
    pub fn new(cols: u16, rows: u16) -> Option<Self> {
        let size = Self(u32::from(cols) << 16 | u32::from(rows));
        (cols > 0 && rows > 0).then_some(size)
    }

    /// Columns in the upper 16 bits, rows in the lower 16.
    pub fn to_bits(self) -> usize {
        self.0 as usize
    }

    /// The inverse of [`to_bits`](Self::to_bits).
    pub fn from_bits(bits: usize) -> Self {
        Self(bits as u32)
    }
}

/// Sets its size.
pub fn resize(terminal: impl AsFd, size: Size) -> Result<()> {
    let size = Winsize {
        ws_row: size.0 as u16,
        ws_col: (size.0 >> 16) as u16,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size)
}

/// Bytes written to it that its driver has not sent yet.
pub fn unsent(terminal: &OwnedFd) -> Result<usize> {
    // SAFETY: TIOCOUTQ writes an int.
    let count = unsafe { ioctl(terminal, Getter::<TIOCOUTQ, i32>::new()) }?;
    Ok(usize::try_from(count).unwrap_or(0))
}
