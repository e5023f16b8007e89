//! Signals by name and number (signal(7)).

use crate::decimal;
use crate::json::Parse;
use core::num::NonZeroU8;

/// Names without their SIG, from signal 1 on (include/uapi/asm-generic/signal.h; x86_64 and aarch64
/// have the same).
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// Second names of signals.
const ALIASES: [(&str, u64); 3] = [("IOT", 6), ("CLD", 17), ("POLL", 29)];

/// SIGRTMIN as programs know it: the two real-time signals before it are the C library's own.
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

/// Reads `SIGQUIT`, `QUIT`, `SIGRTMIN+3`, `RTMAX-1` or `3`.
pub fn parse(text: &str) -> Option<Signal> {
    if let Some(number) = decimal::parse(text.as_bytes()) {
        return Signal::new(number);
    }
    let name = text.strip_prefix("SIG").unwrap_or(text);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        return Signal::new(u64::from(RTMIN) + real_time('+', offset)?);
    }
    if let Some(offset) = name.strip_prefix("RTMAX") {
        return Signal::new(u64::from(RTMAX) - real_time('-', offset)?);
    }
    let mut numbered = NAMES.iter().zip(1..);
    if let Some((_, number)) = numbered.find(|(known, _)| **known == name) {
        return Signal::new(number);
    }
    let (_, number) = ALIASES.iter().find(|(known, _)| *known == name)?;
    Signal::new(*number)
}

/// How far from the first or last real-time signal: a sign and a number, or nothing.
fn real_time(sign: char, offset: &str) -> Option<u64> {
    if offset.is_empty() {
        return Some(0);
    }
    let offset: u64 = decimal::parse(offset.strip_prefix(sign)?.as_bytes())?;
    (offset <= u64::from(RTMAX - RTMIN)).then_some(offset)
}

impl Parse for Option<Signal> {
    fn parse(&mut self, text: &str) -> Result<(), &'static str> {
        // Images have an empty text where they have none.
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
        ] {
            assert_eq!(parse(text).map(Signal::number), Some(number), "{text}");
        }
    }

    #[test]
    fn what_is_no_signal_is_refused() {
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
            "sigterm",
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
