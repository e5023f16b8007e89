//! Errors: what failed, on what, and the errno's name.

use crate::page::PageBox;
use core::ffi::CStr;
use core::fmt::{self, Display, Write};
use proto::environment::TooLarge;
use proto::message::{ErrnoName, Message, ToLossy};
use rustix::io::Errno;

/// A result whose error is a message, by default.
pub type Result<T = (), E = Error> = core::result::Result<T, E>;

/// An error message for the log and the API.
///
/// One pointer wide, as errors are passed up through many calls: the message has its own page.
pub struct Error {
    /// `None`: out of memory.
    message: Option<PageBox<Message>>,
}

impl Error {
    /// Formats an error; [`error!`](crate::error!) calls it.
    pub fn format(arguments: fmt::Arguments<'_>) -> Self {
        let mut error = Self {
            message: PageBox::new(Message::new).ok(),
        };
        error.append(arguments);
        error
    }

    /// Appends to the message.
    pub fn append(&mut self, arguments: fmt::Arguments<'_>) {
        if let Some(message) = &mut self.message {
            // Writing to a message never fails.
            let _ = message.write_fmt(arguments);
        }
    }
}

impl From<Message> for Error {
    fn from(message: Message) -> Self {
        Self::format(format_args!("{message}"))
    }
}

impl From<TooLarge> for Error {
    fn from(error: TooLarge) -> Self {
        Self::format(format_args!("{error}"))
    }
}

impl Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => formatter.write_str(message.as_str()),
            None => formatter.write_str("out of memory"),
        }
    }
}

/// Where warnings go: the console, or the parent of a helper.
pub trait Log {
    /// Logs a problem that the boot or the shutdown can continue with.
    fn warn(&mut self, message: &dyn Display);
}

/// Drops all warnings.
pub struct Discard;

impl Log for Discard {
    fn warn(&mut self, _: &dyn Display) {}
}

/// Formats an [`Error`]: `error!("no network interface {name}")`.
#[macro_export]
macro_rules! error {
    ($($arguments:tt)*) => {
        $crate::error::Error::format(::core::format_args!($($arguments)*))
    };
}

/// For `map_err`: an errno becomes an error that says what failed, on what, and why.
///
/// `context!("open {}", path.lossy())` gives `open /dev/null: ENOENT`.
#[macro_export]
macro_rules! context {
    ($($arguments:tt)*) => {
        |errno| $crate::error::describe(::core::format_args!($($arguments)*), errno)
    };
}

/// What failed, and the errno's name after it.
pub fn describe(what: fmt::Arguments<'_>, errno: Errno) -> Error {
    Error::format(format_args!("{what}: {}", name(errno)))
}

/// For `map_err`, when an action on a path failed: `mount /data: EBUSY`.
pub fn on(action: &str, path: &CStr) -> impl Fn(Errno) -> Error {
    move |errno| describe_on(action, path, errno)
}

fn describe_on(action: &str, path: &CStr, errno: Errno) -> Error {
    describe(format_args!("{action} {}", path.lossy()), errno)
}

/// Displays the errno's name.
pub fn name(errno: Errno) -> ErrnoName {
    ErrnoName(errno.raw_os_error())
}
