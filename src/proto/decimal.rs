//! Decimal numbers of digits only.

/// Parses 1*DIGIT; `None` for a number outside the type's range.
pub fn parse<T: TryFrom<u64>>(digits: &[u8]) -> Option<T> {
    T::try_from(parse_u64(digits)?).ok()
}

/// Unlike [`str::parse`], accepts no sign.
fn parse_u64(digits: &[u8]) -> Option<u64> {
    let (_first, _) = digits.split_first()?;
    digits.iter().try_fold(0u64, |number, digit| {
        let digit = char::from(*digit).to_digit(10)?;
        number.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digits_are_a_number() {
        assert_eq!(parse(b"0"), Some(0u32));
        assert_eq!(parse(b"007"), Some(7u8));
        assert_eq!(parse(b"4294967295"), Some(u32::MAX));
        assert_eq!(parse(b"18446744073709551615"), Some(u64::MAX));
        for other in [
            "",
            "+1",
            "-1",
            " 1",
            "1 ",
            "1_0",
            "0x1",
            "4294967296",
            "\u{663}",
        ] {
            assert_eq!(parse::<u32>(other.as_bytes()), None, "{other:?}");
        }
    }
}
