//! Bounded messages: errors, log lines, small JSON responses.

use core::ffi::CStr;
use core::fmt::{self, Display, Write};

/// Maximum length of a message in bytes: a sentence and two names of [`MAX_NAME`] bytes.
pub const MAX_MESSAGE: usize = 1024;

/// Maximum number of bytes shown of a name or value, so that the reason after it still fits.
pub const MAX_NAME: usize = 255;

/// Marks truncation: U+2026 in UTF-8.
const ELLIPSIS: &str = "…";

/// A line of text by value, at most [`MAX_MESSAGE`] bytes. Longer text is truncated and ends with `…`.
#[derive(Clone, Default)]
pub struct Message {
    text: heapless::String<MAX_MESSAGE>,
}

impl Message {
    /// An empty message.
    pub const fn new() -> Self {
        Self {
            text: heapless::String::new(),
        }
    }

    /// Formats a message; [`message!`](crate::message!) calls it.
    pub fn format(arguments: fmt::Arguments<'_>) -> Self {
        let mut message = Self::new();
        // Writing never fails: it truncates.
        let _cut = message.write_fmt(arguments);
        message
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The text's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.text.as_bytes()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }
}

impl Write for Message {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const LIMIT: usize = MAX_MESSAGE - ELLIPSIS.len();
        let room = LIMIT.saturating_sub(self.text.len());
        if room < char::MAX_LEN_UTF8 && self.text.ends_with(ELLIPSIS) {
            return Ok(());
        }
        let fits = floor_char_boundary(text, room);
        // Both fit: `room` leaves space for the ellipsis.
        let _fits = self.text.push_str(fits);
        if fits.len() < text.len() {
            let _fits = self.text.push_str(ELLIPSIS);
        }
        Ok(())
    }
}

/// The longest prefix of `text` that is at most `limit` bytes and ends between characters.
fn floor_char_boundary(text: &str, limit: usize) -> &str {
    text.get(..text.floor_char_boundary(limit)).unwrap_or(text)
}

impl Display for Message {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

/// Formats a [`Message`]: `message!("mount {device} on {target}: {errno}")`.
#[macro_export]
macro_rules! message {
    ($($arguments:tt)*) => {
        $crate::message::Message::format(::core::format_args!($($arguments)*))
    };
}

/// Displays bytes as lossy UTF-8, truncated to [`MAX_NAME`] bytes.
pub struct Lossy<'a>(&'a [u8]);

/// For paths, names and other untrusted bytes in messages.
pub trait ToLossy {
    /// Displays it as lossy UTF-8.
    fn lossy(&self) -> Lossy<'_>;
}

impl ToLossy for [u8] {
    fn lossy(&self) -> Lossy<'_> {
        Lossy(self)
    }
}

impl ToLossy for CStr {
    fn lossy(&self) -> Lossy<'_> {
        Lossy(self.to_bytes())
    }
}

impl Display for Lossy<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut room = MAX_NAME;
        for chunk in self.0.utf8_chunks() {
            let fits = floor_char_boundary(chunk.valid(), room);
            formatter.write_str(fits)?;
            room -= fits.len();
            if fits.len() < chunk.valid().len() || room < ELLIPSIS.len() {
                return formatter.write_str(ELLIPSIS);
            }
            if !chunk.invalid().is_empty() {
                formatter.write_char(char::REPLACEMENT_CHARACTER)?;
                room -= char::REPLACEMENT_CHARACTER.len_utf8();
            }
        }
        Ok(())
    }
}

/// Displays an errno by its name, or as `errno 123` if it is not known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrnoName(pub i32);

/// Defines the numbers and their names as in errno(3).
macro_rules! errno_names {
    ($($name:ident)*) => {
        const NUMBERS: &[i16] = &[$(linux_raw_sys::errno::$name as i16),*];
        const NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}

// include/uapi/asm-generic/errno-base.h and errno.h: those an init can encounter.
errno_names! {
    EPERM ENOENT EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT ENOTBLK
    EBUSY EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC EROFS
    EPIPE ENAMETOOLONG ENOSYS ENOTEMPTY ELOOP EOVERFLOW EPROTO EADDRINUSE EADDRNOTAVAIL EAFNOSUPPORT
    ENETDOWN ENETUNREACH ECONNABORTED ECONNRESET ENOBUFS ETIMEDOUT ECONNREFUSED EHOSTUNREACH
    EOPNOTSUPP EPROTONOSUPPORT ESTALE EUCLEAN EKEYREJECTED ENOKEY EBADMSG EDQUOT EILSEQ
}

impl Display for ErrnoName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut known = NUMBERS.iter().zip(NAMES);
        match known.find(|(number, _)| i32::from(**number) == self.0) {
            Some((_, name)) => formatter.write_str(name),
            None => write!(formatter, "errno {}", self.0),
        }
    }
}

/// A log level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What an operator wants to see of a normal boot.
    Info,
    /// A problem that the boot can continue with.
    Warn,
    /// The VM shuts down because of this. Always logged.
    Error,
}

impl Level {
    /// The level's name in a log line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_truncated_but_not_the_text_after_it() {
        let long = "/\u{e9}".repeat(1000);
        let message = message!("execute {}: {}", long.as_bytes().lossy(), ErrnoName(2));
        let shown = message.as_str();
        assert!(shown.len() < 300 && shown.ends_with("…: ENOENT"), "{shown}");
    }

    #[test]
    fn a_long_message_is_truncated_between_characters_and_marked() {
        for text in ["x", "\u{e9}", "\u{1f426}"] {
            let mut message = message!("ab{}", text.repeat(MAX_MESSAGE));
            assert!(message.as_str().ends_with('…') && message.as_bytes().len() <= MAX_MESSAGE);
            let before = message.as_str().to_owned();
            let _cut = message.write_str("more");
            assert_eq!(message.as_str(), before);
        }
        let exact = "x".repeat(MAX_MESSAGE - ELLIPSIS.len());
        assert_eq!(message!("{exact}").as_str(), exact);
    }

    #[test]
    fn bytes_that_are_not_utf8_are_replaced() {
        let shown = |bytes: &[u8]| message!("{}", bytes.lossy()).as_str().to_owned();
        assert_eq!(shown(b"a\xffb"), "a\u{fffd}b");
        assert_eq!(shown(b"\xed\xa0\x80"), "\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(shown("\u{1f426}".as_bytes()), "\u{1f426}");
        assert_eq!(shown(&[0xff; 1000]).matches('\u{fffd}').count(), 85);
    }

    #[test]
    fn an_errno_has_its_name_or_its_number() {
        assert_eq!(message!("{}", ErrnoName(13)).as_str(), "EACCES");
        // EFSBADCRC, a bad checksum in a file system (fs/ext4/ext4.h, fs/xfs/xfs_linux.h)
        assert_eq!(message!("{}", ErrnoName(74)).as_str(), "EBADMSG");
        assert_eq!(message!("{}", ErrnoName(-1)).as_str(), "errno -1");
        assert_eq!(message!("{}", ErrnoName(4095)).as_str(), "errno 4095");
    }
}
