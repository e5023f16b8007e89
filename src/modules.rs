//! Kernel modules that the initrd brings along.

use crate::console::Console;
use crate::task::{Outcome, name};
use core::ffi::CStr;
use pigeon_init::text;
use pigeon_init::text::{Level, Line};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// One path a line, in the order in which they are loaded.
const LIST: &CStr = c"/pigeon/modules";

/// Loads the modules on the list. One that cannot be loaded is a warning: what needs it says more.
pub fn load(console: &mut Console, scratch: &mut [u8]) -> Outcome {
    let list = crate::files::read_whole(LIST, scratch)?;
    for line in list.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii) {
        if line.is_empty() {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let loaded = rustix::fs::open(line, flags, Mode::empty())
            .and_then(|file| rustix::system::finit_module(&file, c"", 0));
        match loaded {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => {
                let mut fields = Line::new();
                fields.field("path", &line);
                let fields = text!(fields, " error=", name(errno));
                console.log(Level::Warn, text!("cannot load a module"), fields);
            }
        }
    }
    Ok(())
}
