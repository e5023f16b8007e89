//! Lines of text without `core::fmt`: log lines, error messages, small JSON answers.

use crate::bytes::{character, find, split};
use core::net::IpAddr;

/// Longest line: a message, a path of 255 bytes twice, and room for the rest.
pub const LINE: usize = 1024;

/// Buffers for lines: enough for a message about a message about a message.
const BUFFERS: usize = if cfg!(test) { 256 } else { 16 };

/// One line of text being put together, in one of a fixed number of buffers.
///
/// What does not fit is cut, and the cut is marked with `…`; a line that finds no buffer is only
/// that mark. Errors are lines, and pass through many hands on their way to the log: a line is one
/// pointer.
#[derive(Debug)]
pub struct Line(buffers::Buffer);

/// Room behind a string that is cut: ` uid=4294967295 gid=4294967295`, or closing braces.
const END: usize = 64;

/// Longest name that is shown whole (NAME_MAX, limits.h).
const NAME: usize = 255;

/// The mark of a cut line: U+2026 in UTF-8.
const CUT: &[u8] = "…".as_bytes();

/// A line's bytes.
struct Content {
    length: usize,
    /// What follows the next part of a [`text!`](crate::text!).
    rest: Option<&'static [u8]>,
    bytes: [u8; LINE],
}

#[allow(unsafe_code)]
mod buffers {
    use super::{BUFFERS, Content, LINE};
    use core::cell::UnsafeCell;
    use core::sync::atomic::{AtomicBool, Ordering};

    /// The flag first: every place that drops a line has its address in its code.
    #[repr(C)]
    pub struct Slot {
        taken: AtomicBool,
        content: UnsafeCell<Content>,
    }

    // SAFETY: only the one `Buffer` that set `taken` reaches the content.
    unsafe impl Sync for Slot {}

    impl Slot {
        const fn new() -> Self {
            Self {
                taken: AtomicBool::new(false),
                content: UnsafeCell::new(Content {
                    length: 0,
                    rest: None,
                    bytes: [0; LINE],
                }),
            }
        }
    }

    static SLOTS: [Slot; BUFFERS] = [const { Slot::new() }; BUFFERS];
    /// Stands for no buffer; its content is never reached.
    static NONE: Slot = Slot::new();

    /// Exclusive use of a slot, or [`NONE`].
    pub struct Buffer(&'static Slot);

    impl Buffer {
        /// The first slot that is free, empty.
        pub fn take() -> Self {
            let free = |slot: &&Slot| !slot.taken.swap(true, Ordering::Acquire);
            let mut buffer = Self(SLOTS.iter().find(free).unwrap_or(&NONE));
            if let Some(content) = buffer.content_mut() {
                content.length = 0;
                content.rest = None;
            }
            buffer
        }

        pub fn content(&self) -> Option<&Content> {
            if core::ptr::eq(self.0, &NONE) {
                return None;
            }
            // SAFETY: this is the slot's one owner, and lends it as it is lent itself.
            Some(unsafe { &*self.0.content.get() })
        }

        pub fn content_mut(&mut self) -> Option<&mut Content> {
            if core::ptr::eq(self.0, &NONE) {
                return None;
            }
            // SAFETY: as above, exclusively.
            Some(unsafe { &mut *self.0.content.get() })
        }
    }

    impl Drop for Buffer {
        fn drop(&mut self) {
            self.0.taken.store(false, Ordering::Release);
        }
    }

    impl core::fmt::Debug for Buffer {
        fn fmt(&self, _: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            Ok(())
        }
    }
}

impl Default for Line {
    fn default() -> Self {
        Self::new()
    }
}

impl Line {
    /// An empty line.
    #[inline(never)]
    pub fn new() -> Self {
        Self(buffers::Buffer::take())
    }

    /// What was written so far.
    pub fn as_bytes(&self) -> &[u8] {
        match self.0.content() {
            Some(content) => content.bytes.get(..content.length).unwrap_or(&[]),
            None => CUT,
        }
    }

    /// Appends anything that can be shown.
    pub fn add(&mut self, part: impl Show) -> &mut Self {
        part.show(self);
        self
    }

    /// The line with one more part.
    #[inline(always)]
    pub fn with<T: Show + ?Sized>(self, part: &T) -> Self {
        part.append(self)
    }

    /// A line that starts with these words, up to the `%` that stands for the first part; each part
    /// is followed by the words up to the next one.
    #[inline(never)]
    pub fn start(words: &'static str) -> Self {
        let mut line = Self::new();
        if let Some(content) = line.0.content_mut() {
            content.rest = Some(words.as_bytes());
        }
        line.go_on()
    }

    #[inline(never)]
    fn go_on(mut self) -> Self {
        if let Some(content) = self.0.content_mut()
            && let Some(words) = content.rest
        {
            let end = find(words, b'%').unwrap_or(words.len());
            content.rest = words.get(end + 1..);
            self.push(words.get(..end).unwrap_or(&[]));
        }
        self
    }

    /// The line behind some words: what failed, before why.
    #[inline(never)]
    pub fn after(self, words: &'static str) -> Self {
        Self::start(words).with(&self)
    }

    /// Appends raw bytes.
    #[inline(never)]
    pub fn push(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.put(*byte));
    }

    /// Appends one byte.
    #[inline(never)]
    pub fn put(&mut self, byte: u8) {
        let Some(content) = self.0.content_mut() else {
            return;
        };
        let (text, end) = content.bytes.split_at_mut(LINE - CUT.len());
        match text.get_mut(content.length) {
            Some(slot) => {
                *slot = byte;
                content.length += 1;
            }
            None => {
                end.copy_from_slice(CUT);
                content.length = LINE;
            }
        }
    }

    /// The line with `"…"`: a JSON string, which is cut so that there is room for what ends a line.
    #[inline(never)]
    pub fn quoted(mut self, bytes: &[u8]) -> Self {
        self.put(b'"');
        crate::json::escape(bytes, true, &mut |piece| {
            let fits = self.as_bytes().len() < LINE - END;
            self.push(if fits { piece } else { CUT });
            fits
        });
        self.put(b'"');
        self
    }
}

/// Something that can be written into a [`Line`].
pub trait Show {
    /// Writes itself at the end of `line`.
    fn show(&self, line: &mut Line);

    /// The line with it at the end.
    #[inline(never)]
    fn append(&self, mut line: Line) -> Line {
        self.show(&mut line);
        line.go_on()
    }
}

impl<T: Show + ?Sized> Show for &T {
    #[inline(always)]
    fn append(&self, line: Line) -> Line {
        (**self).append(line)
    }

    fn show(&self, line: &mut Line) {
        (**self).show(line);
    }
}

impl Show for str {
    fn show(&self, line: &mut Line) {
        line.push(self.as_bytes());
    }
}

/// Bytes are shown as they are; invalid UTF-8 becomes U+FFFD. Of many the first [`NAME`] are: what
/// stands behind them is often why.
impl Show for [u8] {
    #[inline(never)]
    fn show(&self, line: &mut Line) {
        let mut rest = self;
        while !rest.is_empty() {
            if rest.len() + NAME <= self.len() {
                return line.push(CUT);
            }
            let (piece, used) = match character(rest) {
                Ok(length) => (rest.get(..length).unwrap_or(&[]), length),
                Err(0) => ("\u{fffd}".as_bytes(), rest.len()),
                Err(length) => ("\u{fffd}".as_bytes(), length),
            };
            line.push(piece);
            rest = rest.get(used..).unwrap_or(&[]);
        }
    }
}

impl Show for core::ffi::CStr {
    fn show(&self, line: &mut Line) {
        self.to_bytes().show(line);
    }
}

impl Show for Line {
    fn show(&self, line: &mut Line) {
        line.push(self.as_bytes());
    }
}

impl Show for bool {
    fn show(&self, line: &mut Line) {
        line.push(if *self { b"true" } else { b"false" });
    }
}

/// The digits of numbers.
pub(crate) const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Appends a number to the base 10 or 16.
#[inline(never)]
fn number(line: &mut Line, mut rest: u64, base: u64) {
    let mut digits = [0; 20];
    let mut start = digits.len();
    for slot in digits.iter_mut().rev() {
        *slot = DIGITS.get((rest % base) as usize).copied().unwrap_or(0);
        rest /= base;
        start -= 1;
        if rest == 0 {
            break;
        }
    }
    line.push(digits.get(start..).unwrap_or(&[]));
}

/// What is not there is shown as in JSON.
impl<T: Show> Show for Option<T> {
    fn show(&self, line: &mut Line) {
        match self {
            Some(value) => value.show(line),
            None => line.push(b"null"),
        }
    }
}

impl Show for u64 {
    fn show(&self, line: &mut Line) {
        number(line, *self, 10);
    }
}

impl Show for u32 {
    fn show(&self, line: &mut Line) {
        u64::from(*self).show(line);
    }
}

impl Show for usize {
    fn show(&self, line: &mut Line) {
        (*self as u64).show(line);
    }
}

impl Show for i32 {
    fn show(&self, line: &mut Line) {
        if *self < 0 {
            line.put(b'-');
        }
        self.unsigned_abs().show(line);
    }
}

/// IPv6 with every group, uncompressed: valid, and enough for a log line.
impl Show for IpAddr {
    fn show(&self, line: &mut Line) {
        let mut join = |at: usize, number: u16, sign, base| {
            if at > 0 {
                line.put(sign);
            }
            self::number(line, u64::from(number), base);
        };
        match self {
            IpAddr::V4(ip) => {
                for (at, octet) in ip.octets().iter().enumerate() {
                    join(at, u16::from(*octet), b'.', 10);
                }
            }
            IpAddr::V6(ip) => {
                for (at, group) in ip.segments().iter().enumerate() {
                    join(at, *group, b':', 16);
                }
            }
        }
    }
}

/// An errno by its kernel name, `errno 123` when it has none here.
#[derive(Clone, Copy)]
pub struct Errno(pub i32);

impl Show for Errno {
    fn show(&self, line: &mut Line) {
        let mut names = ERRNO.iter().zip(split(ERRNO_NAMES.as_bytes(), b' '));
        match names.find(|(number, _)| i32::from(**number) == self.0) {
            Some((_, name)) => line.push(name),
            None => {
                line.add("errno ").add(self.0);
            }
        }
    }
}

/// Defines [`ERRNO`] and [`ERRNO_NAMES`], in one order.
macro_rules! errno_names {
    ($first:ident $($name:ident)*) => {
        const ERRNO: &[u8] = &[linux_raw_sys::errno::$first as u8, $(linux_raw_sys::errno::$name as u8),*];
        const ERRNO_NAMES: &str = concat!(stringify!($first), $(" ", stringify!($name)),*);
    };
}

// include/uapi/asm-generic/errno-base.h and errno.h, those an init can meet.
errno_names! {
    EPERM ENOENT EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT ENOTBLK
    EBUSY EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC EROFS
    EPIPE ENAMETOOLONG ENOSYS ENOTEMPTY ELOOP EOVERFLOW EPROTO EADDRINUSE EADDRNOTAVAIL EAFNOSUPPORT
    ENETDOWN ENETUNREACH ECONNABORTED ECONNRESET ENOBUFS ETIMEDOUT ECONNREFUSED EHOSTUNREACH
    EOPNOTSUPP EPROTONOSUPPORT ESTALE EUCLEAN EKEYREJECTED ENOKEY
}

/// Puts a [`Line`] together: `text!("mount % on %: no such device", device, target)`. A part without
/// a `%` of its own comes at the end: `text!("mount ", device)`.
#[macro_export]
macro_rules! text {
    ($first:literal $(, $part:expr)* $(,)?) => {{
        const { $crate::text::check($first, &[$(stringify!($part)),*]) };
        $crate::text::Line::start($first)$(.with(&$part))*
    }};
    ($($part:expr),* $(,)?) => {
        $crate::text::Line::new()$(.with(&$part))*
    };
}

/// Whether a template has a place for each part, or none; else the program does not compile.
pub const fn check(words: &str, parts: &[&str]) {
    let (mut places, mut rest) = (0, words.as_bytes());
    while let [first, others @ ..] = rest {
        places += (*first == b'%') as usize;
        rest = others;
    }
    assert!(places == 0 || places == parts.len());
}

/// How much is logged; `INIT_LOG_LEVEL` on the kernel command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What an operator wants to see of a healthy boot.
    Info,
    /// Something is missing and the boot goes on.
    Warn,
    /// The VM goes down because of this. Always logged.
    Error,
}

impl Level {
    /// Reads `warn`; anything else is `info`, `debug` too: there is nothing more to say.
    pub fn parse(word: &[u8]) -> Self {
        match word {
            b"warn" => Self::Warn,
            _ => Self::Info,
        }
    }

    /// The level's name in a log line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// Starts a log line: `pigeon-init: level=info msg="…"`.
pub fn log_line(level: Level, message: &[u8]) -> Line {
    text!("pigeon-init: level=% msg=", level.name()).quoted(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_and_not_what_stands_behind_it() {
        let long = "/\u{e9}".repeat(1000);
        let line = text!("execute %: %", long.as_bytes(), Errno(2));
        let shown = String::from_utf8(line.as_bytes().to_vec()).unwrap();
        assert!(shown.len() < 300 && shown.ends_with("…: ENOENT"), "{shown}");
    }

    #[test]
    fn a_string_that_is_cut_still_ends() {
        for byte in ["x", "\u{1}", "\u{1f426}"] {
            let long = byte.repeat(LINE);
            let line = text!("{\"Error\":{\"message\":").quoted(long.as_bytes());
            let line = line.with("}}");
            assert!(line.as_bytes().ends_with("…\"}}".as_bytes()), "{byte:?}");
            assert!(std::str::from_utf8(line.as_bytes()).is_ok());
            let line = text!(
                "% uid=% gid=%",
                log_line(Level::Error, long.as_bytes()),
                u32::MAX,
                u32::MAX
            );
            assert!(
                line.as_bytes()
                    .ends_with("…\" uid=4294967295 gid=4294967295".as_bytes())
            );
        }
    }

    fn shown(part: impl Show) -> String {
        String::from_utf8(text!(part).as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn numbers_show_in_decimal() {
        assert_eq!(shown(0u64), "0");
        assert_eq!(shown(u64::MAX), u64::MAX.to_string());
        assert_eq!(shown(i32::MIN), i32::MIN.to_string());
    }

    #[test]
    fn addresses_show_in_a_form_that_parses_back() {
        for ip in ["10.0.0.2", "255.255.255.255", "::1", "fd00:0:0:1::a0b:1000"] {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(shown(ip).parse::<IpAddr>().unwrap(), ip);
        }
    }

    #[test]
    fn an_errno_shows_its_name_and_an_unknown_one_its_number() {
        assert_eq!(shown(Errno(2)), "ENOENT");
        assert_eq!(shown(Errno(19)), "ENODEV");
        assert_eq!(shown(Errno(117)), "EUCLEAN");
        assert_eq!(shown(Errno(4095)), "errno 4095");
    }

    #[test]
    fn a_log_line_quotes_its_message() {
        let line = log_line(Level::Info, b"cannot open \"/a b\n\"");
        assert_eq!(
            text!("% exit_code=%", line, 0u32).as_bytes(),
            br#"pigeon-init: level=info msg="cannot open \"/a b\n\"" exit_code=0"#
        );
    }

    #[test]
    fn parts_stand_where_the_template_has_them_or_at_the_end() {
        let (one, two) = (1u32, "2%");
        assert_eq!(text!("% of %.", one, two).as_bytes(), b"1 of 2%.");
        assert_eq!(text!("of ", two).with(&one).as_bytes(), b"of 2%1");
        assert_eq!(text!("a % b", text!("c % d", one)).as_bytes(), b"a c 1 d b");
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_with_a_mark() {
        let mut line = Line::new();
        line.push(&[b'x'; 3 * LINE]);
        assert!(line.as_bytes().len() <= LINE);
        assert!(line.as_bytes().ends_with("x…".as_bytes()));
    }

    #[test]
    fn bytes_that_are_not_utf8_show_as_replacement_characters() {
        assert_eq!(shown(&b"a\xffb"[..]), "a\u{fffd}b");
    }
}
