//! Pipes whose ends are non-blocking in PID 1, and closed by execve.

use crate::context;
use crate::error::Result;
use rustix::fd::OwnedFd;
use rustix::pipe::PipeFlags;

/// A pipe with non-blocking ends, the read end first.
pub fn new() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
        .map_err(context!("create a pipe"))
}

/// A pipe for the output of a child: our end, and the child's, which blocks.
pub fn output() -> Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = new()?;
    set_blocking(&theirs)?;
    Ok((ours, theirs))
}

/// A pipe for the input of a child: our end, and the child's, which blocks.
pub fn input() -> Result<(OwnedFd, OwnedFd)> {
    let (theirs, ours) = new()?;
    set_blocking(&theirs)?;
    Ok((ours, theirs))
}

/// Makes an end blocking, as programs expect.
fn set_blocking(end: &OwnedFd) -> Result {
    rustix::io::ioctl_fionbio(end, false).map_err(context!("create a pipe"))
}
