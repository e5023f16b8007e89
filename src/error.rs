//! Errors: what failed, on what, and the errno's name.

use core::fmt;
use proto::message;
use proto::message::{ErrnoName, Message};
use rustix::io::Errno;

/// The result of what can fail; the error is a whole sentence for the log and the API.
pub type Result<T = (), E = Message> = core::result::Result<T, E>;

/// For `map_err`: an errno becomes an error that says what failed, on what, and why.
///
/// `context!("open {}", path.lossy())` gives `open /dev/null: ENOENT`.
#[macro_export]
macro_rules! context {
    ($($arguments:tt)*) => {
        |errno| $crate::error::describe(::core::format_args!($($arguments)*), errno)
    };
}

/// What failed, and the errno's name behind it.
pub fn describe(what: fmt::Arguments<'_>, errno: Errno) -> Message {
    message!("{what}: {}", name(errno))
}

/// The errno's name, for display.
pub fn name(errno: Errno) -> ErrnoName {
    ErrnoName(errno.raw_os_error())
}
