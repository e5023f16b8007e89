//! `GET /v1/sysinfo`: what /proc tells, in the shape of Fly.io's init.
//!
//! A child reads it, as whoever is root in the VM can make that wait; its output is the answer.

use crate::context;
use crate::error;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::sys::{self, files};
use core::fmt::{self, Write};
use proto::config::DOCUMENT;
use proto::message::ToLossy;
use proto::sysinfo::MEMBERS;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;

/// How long it may take, in milliseconds.
pub const TIMEOUT: u64 = 5_000;

/// In the child: writes the answer; the exit code.
pub fn run(output: &OwnedFd, proc: &OwnedFd, scratch: &mut [u8], log: &HelperLog) -> i32 {
    sys::close_others(&[output, proc, log.pipe()]);
    match write(output, proc, scratch) {
        Ok(()) => 0,
        Err(error) => {
            log.fail(&error);
            1
        }
    }
}

fn write(output: &OwnedFd, proc: &OwnedFd, scratch: &mut [u8]) -> Result {
    let (input, text) = scratch.split_at_mut_checked(DOCUMENT).unwrap_or_default();
    let mut text = Text {
        room: text,
        length: 0,
    };
    let mut before = "{";
    for (name, path, encode) in MEMBERS {
        let length = files::open_at(proc, path, OFlags::RDONLY)
            .and_then(|file| files::read_full(&file, input))
            .map_err(error::on("read", path))?;
        let input = input.get(..length).unwrap_or(&[]);
        write!(text, "{before}\"{name}\":")
            .and_then(|()| encode(input, &mut text))
            .map_err(|_| error!("read {}: too long", path.lossy()))?;
        before = ",";
    }
    let _fits = text.write_str("}");
    let text = text.room.get(..text.length).unwrap_or(&[]);
    files::write_whole(output, text).map_err(context!("answer"))
}

/// Text that is written into a buffer.
struct Text<'a> {
    room: &'a mut [u8],
    length: usize,
}

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        let room = self.room.get_mut(self.length..end).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}
