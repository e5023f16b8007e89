//! Signals by name. The guest's numbers are the same on x86-64 and aarch64 (signal(7)).

/// Names without `SIG`; the first has number 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// The first and the last real-time signal available to programs: the C library reserves two.
const RTMIN: u8 = 34;
const RTMAX: u8 = 64;

/// The number of `TERM`, `SIGTERM`, `sigterm`, `SIGRTMIN+3`, `RTMAX-1` or `15`.
pub fn number(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let number = match offset {
            "" => RTMIN,
            _ => RTMIN.checked_add(offset.strip_prefix('+')?.parse().ok()?)?,
        };
        return (number <= RTMAX).then_some(number);
    }
    if let Some(offset) = name.strip_prefix("RTMAX") {
        let number = match offset {
            "" => RTMAX,
            _ => RTMAX.checked_sub(offset.strip_prefix('-')?.parse().ok()?)?,
        };
        return (number >= RTMIN).then_some(number);
    }
    let index = NAMES.iter().position(|known| *known == name)?;
    u8::try_from(index + 1).ok()
}

/// `SIGTERM` for 15, `SIGRTMIN+3` for 37; the number if it has no name.
pub fn name(number: i32) -> String {
    if (i32::from(RTMIN)..=i32::from(RTMAX)).contains(&number) {
        return match number - i32::from(RTMIN) {
            0 => "SIGRTMIN".into(),
            offset => format!("SIGRTMIN+{offset}"),
        };
    }
    let index = usize::try_from(number)
        .ok()
        .and_then(|number| number.checked_sub(1));
    match index.and_then(|index| NAMES.get(index)) {
        Some(name) => format!("SIG{name}"),
        None => format!("signal {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_a_name_or_a_number() {
        for text in ["15", "TERM", "SIGTERM", "sigterm", "Term"] {
            assert_eq!(number(text), Some(15), "{text}");
        }
        assert_eq!(
            (number("SYS"), number("64"), number("USR1")),
            (Some(31), Some(64), Some(10))
        );
        for text in ["0", "65", "-1", "", "SIG", "TERMINATE", "SIGSIGTERM"] {
            assert_eq!(number(text), None, "{text}");
        }
        assert_eq!(
            (name(9).as_str(), name(32).as_str()),
            ("SIGKILL", "signal 32")
        );
    }

    #[test]
    fn real_time_signals_count_from_either_end() {
        for (text, expected) in [
            ("SIGRTMIN", 34),
            ("RTMIN+3", 37),
            ("sigrtmin+30", 64),
            ("SIGRTMAX", 64),
            ("RTMAX-30", 34),
        ] {
            assert_eq!(number(text), Some(expected), "{text}");
        }
        for text in [
            "RTMIN+31",
            "RTMIN-1",
            "RTMAX-31",
            "RTMAX+1",
            "RTMIN+",
            "RTMIN+999",
        ] {
            assert_eq!(number(text), None, "{text}");
        }
        assert_eq!(
            (name(34), name(37)),
            ("SIGRTMIN".into(), "SIGRTMIN+3".into())
        );
    }
}
