//! `GET /v1/sysinfo`: information from /proc, in the shape of Fly.io's init.
//!
//! A child reads it, as root in the VM can make reading /proc block; its output is the response.

use crate::context;
use crate::error;
use crate::error::Result;
use crate::process::helper::HelperLog;
use crate::sys::{self, files};
use core::fmt::Write;
use proto::bytes::SliceWriter;
use proto::config::MAX_DOCUMENT_SIZE;
use proto::message::ToLossy;
use proto::sysinfo::MEMBERS;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;

/// How long it may take, in milliseconds.
pub const TIMEOUT: u64 = 5_000;

/// In the child: writes the response.
pub fn run(output: &OwnedFd, proc: &OwnedFd, scratch: &mut [u8], log: &HelperLog) -> Result {
    sys::close_others(&[output, proc, log.pipe()]);
    let (input, text) = scratch
        .split_at_mut_checked(MAX_DOCUMENT_SIZE)
        .unwrap_or_default();
    let mut text = SliceWriter::new(text);
    let mut before = "{";
    for &(name, path, encode) in &MEMBERS {
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
    files::write_whole(output, text.as_bytes()).map_err(context!("answer"))
}
