//! Loads kernel modules from the initrd.

use crate::error::{Log, Result, name};
use crate::process::helper::{Helper, HelperLog};
use crate::sys::files;
use core::ffi::CStr;
use proto::bytes::split;
use proto::config::PATH_MAX;
use proto::message::ToLossy;
use rustix::fs::OFlags;
use rustix::io::Errno;

/// The list of modules: one path per line, in loading order.
const LIST: &CStr = c"/pigeon/modules";

/// File name extensions of modules that the kernel decompresses.
const COMPRESSED: [&[u8]; 3] = [b".xz", b".zst", b".gz"];
/// linux/module.h
const MODULE_INIT_COMPRESSED_FILE: i32 = 4;

/// Loads the listed modules, in a helper, as drivers wait for their devices.
pub fn load(scratch: &mut [u8], log: &mut dyn Log) -> Result {
    match files::read_whole(LIST, scratch)? {
        Some(list) => Helper::start(&mut |log| {
            load_all(list, log);
            Ok(())
        })?
        .wait(log),
        None => Ok(()),
    }
}

/// Logs a warning for a module that cannot be loaded: what needs it will fail with its own error.
fn load_all(list: &[u8], log: &HelperLog) {
    for line in split(list, b'\n').map(<[u8]>::trim_ascii) {
        if line.is_empty() {
            continue;
        }
        let is_compressed = COMPRESSED.iter().any(|ending| line.ends_with(ending));
        log.step(&format_args!("load module {}", line.lossy()));
        match load_one(line, is_compressed) {
            Ok(()) => {}
            Err(errno) => {
                let hint = match errno {
                    Errno::OPNOTSUPP | Errno::INVAL if is_compressed => {
                        " (this kernel cannot decompress it)"
                    }
                    _ => "",
                };
                let (module, why) = (line.lossy(), name(errno));
                log.warn(&format_args!("load module {module}: {why}{hint}"));
            }
        }
    }
}

/// Loads a module, unless it is loaded already.
fn load_one(path: &[u8], is_compressed: bool) -> Result<(), Errno> {
    let mut buffer = [0; PATH_MAX];
    let path = files::join(&[path], &mut buffer).ok_or(Errno::NAMETOOLONG)?;
    let file = files::open(path, OFlags::RDONLY)?;
    let flags = match is_compressed {
        true => MODULE_INIT_COMPRESSED_FILE,
        false => 0,
    };
    match rustix::system::finit_module(&file, c"", flags) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}
