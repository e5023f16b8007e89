//! Kernel modules that the initrd brings along.

use crate::context;
use crate::error::{Log, Result};
use crate::sys::files;
use core::ffi::CStr;
use proto::bytes::{split, trim};
use proto::message::ToLossy;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// One path a line, in the order in which they are loaded.
const LIST: &CStr = c"/pigeon/modules";

/// Loads the modules on the list. One that cannot be loaded is a warning: what needs it says more.
pub fn load(scratch: &mut [u8], log: &mut dyn Log) -> Result {
    let list = files::read_whole(LIST, scratch)?.unwrap_or_default();
    for line in split(list, b'\n').map(trim) {
        if line.is_empty() {
            continue;
        }
        if let Err(errno) = load_one(line) {
            log.warn(&context!("load module {}", line.lossy())(errno));
        }
    }
    Ok(())
}

/// One that is loaded already is fine.
fn load_one(path: &[u8]) -> Result<(), Errno> {
    let mut buffer = files::Path::new();
    let path = files::join(&[path], &mut buffer).ok_or(Errno::NAMETOOLONG)?;
    let file = files::open(path, OFlags::RDONLY)?;
    match rustix::system::finit_module(&file, c"", 0) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}
