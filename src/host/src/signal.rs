//! Signals by name, as the guest numbers them: alike on x86-64 and aarch64 (signal(7)).

/// Names without `SIG`; the first has number 1.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// The number of `TERM`, `SIGTERM`, `sigterm` or `15`.
pub fn number(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let index = NAMES.iter().position(|known| *known == name)?;
    u8::try_from(index + 1).ok()
}

/// `SIGTERM` of 15; a number where there is no name.
pub fn name(number: i32) -> String {
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
            (name(9).as_str(), name(34).as_str()),
            ("SIGKILL", "signal 34")
        );
    }
}
