//! Signals by name and number (signal(7)).

use crate::decimal;
use crate::json::Parse;
use core::num::NonZeroU8;

/// Names without SIG, from signal 1 on (include/uapi/asm-generic/signal.h; the same on x86_64 and aarch64).
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// Aliases of signals.
const ALIASES: [(&str, u64); 3] = [("IOT", 6), ("CLD", 17), ("POLL", 29)];

/// SIGRTMIN as programs see it: C libraries reserve the two real-time signals before it.
const RTMIN: u8 = 34;
/// The last signal (_NSIG).
const RTMAX: u8 = 64;

/// A signal: from 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Signal(NonZeroU8);

impl Signal {
    /// A signal by its number.
    pub fn new(number: u64) -> Option<Self> {
        let number = u8::try_from(number).ok()?;
        let number = NonZeroU8::new(number)?;
        (number.get() <= RTMAX).then_some(Self(number))
    }

    /// Its number.
    pub fn number(self) -> u32 {
        self.0.get().into()
    }
}

/// Parses `SIGQUIT`, `QUIT`, `SIGRTMIN+3`, `RTMAX-1` or `3`, case-insensitively, as images have `STOPSIGNAL` as
/// it was written.
pub fn parse(text: &str) -> Option<Signal> {
    if let Some(number) = decimal::parse(text.as_bytes()) {
        return Signal::new(number);
    }
    let name = strip_start(text, "SIG").unwrap_or(text);
    if let Some(offset) = strip_start(name, "RTMIN") {
        return Signal::new(u64::from(RTMIN) + real_time('+', offset)?);
    }
    if let Some(offset) = strip_start(name, "RTMAX") {
        return Signal::new(u64::from(RTMAX) - real_time('-', offset)?);
    }
    let is_it = |known: &str| known.eq_ignore_ascii_case(name);
    if let Some(at) = NAMES.iter().position(|known| is_it(known)) {
        return Signal::new(at as u64 + 1);
    }
    let (_, number) = ALIASES.iter().find(|(known, _)| is_it(known))?;
    Signal::new(*number)
}

fn strip_start<'t>(text: &'t str, start: &str) -> Option<&'t str> {
    let (found, rest) = text.split_at_checked(start.len())?;
    found.eq_ignore_ascii_case(start).then_some(rest)
}

/// Parses the offset from the first or last real-time signal: a sign and a number, or nothing.
fn real_time(sign: char, offset: &str) -> Option<u64> {
    if offset.is_empty() {
        return Some(0);
    }
    let offset: u64 = decimal::parse(offset.strip_prefix(sign)?.as_bytes())?;
    (offset <= u64::from(RTMAX - RTMIN)).then_some(offset)
}

impl Parse for Option<Signal> {
    fn parse(&mut self, text: &str) -> Result<(), &'static str> {
        // Images without a stop signal may have an empty string.
        *self = match text {
            "" => None,
            text => Some(parse(text).ok_or("not a signal")?),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_a_name_a_short_name_and_a_number() {
        for (text, number) in [
            ("SIGQUIT", 3),
            ("QUIT", 3),
            ("3", 3),
            ("03", 3),
            ("SIGHUP", 1),
            ("SIGSYS", 31),
            ("SIGWINCH", 28),
            ("SIGCHLD", 17),
            ("SIGCLD", 17),
            ("SIGIOT", 6),
            ("POLL", 29),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("RTMIN+30", 64),
            ("SIGRTMAX", 64),
            ("SIGRTMAX-30", 34),
            ("1", 1),
            ("64", 64),
            ("sigterm", 15),
            ("SigRtMin+3", 37),
            ("quit", 3),
        ] {
            assert_eq!(parse(text).map(Signal::number), Some(number), "{text}");
        }
    }

    #[test]
    fn invalid_signals_are_refused() {
        for text in [
            "",
            "0",
            "65",
            "256",
            "-1",
            "+3",
            "SIG",
            "SIG3",
            "SIGFOO",
            "sigsigterm",
            "SI",
            "sié",
            "SIGTERM ",
            "SIGRTMIN+31",
            "SIGRTMIN-1",
            "SIGRTMIN+",
            "SIGRTMIN++1",
            "SIGRTMIN+-1",
            "SIGRTMAX-31",
            "SIGRTMAX+1",
            "SIGRTMIN3",
            "3x",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
