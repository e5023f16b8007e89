//! IP addresses in text, as inet_pton(3) reads them.
//!
//! Smaller than core's parser and formatter, which take 7 KiB.

use crate::bytes::{find, split};
use crate::decimal;
use core::fmt::{self, Display};
use core::net::IpAddr;

/// Reads an IPv4 address in dotted quads, or an IPv6 address (RFC 4291 section 2.2).
pub fn parse(text: &str) -> Option<IpAddr> {
    let text = text.as_bytes();
    match find(text, b':') {
        Some(_) => parse_ipv6(text).map(IpAddr::from),
        None => parse_ipv4(text).map(IpAddr::from),
    }
}

fn parse_ipv4(text: &[u8]) -> Option<[u8; 4]> {
    let mut parts = split(text, b'.');
    let mut octets = [0; 4];
    for octet in &mut octets {
        let digits = parts.next()?;
        // Some parsers take a leading zero for octal.
        if digits.len() > 1 && digits.starts_with(b"0") {
            return None;
        }
        *octet = decimal::parse(digits)?;
    }
    parts.next().is_none().then_some(octets)
}

fn parse_ipv6(text: &[u8]) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    let mut length = 0;
    // Position of `::`.
    let mut gap = None;
    let mut rest = text;
    if let Some(others) = text.strip_prefix(b"::") {
        gap = Some(0);
        rest = others;
    }
    while !rest.is_empty() {
        let end = find(rest, b':').unwrap_or(rest.len());
        let (piece, others) = rest.split_at_checked(end)?;
        if others.is_empty() && find(piece, b'.').is_some() {
            // The last two groups may be an IPv4 address.
            *bytes.get_mut(length..)?.first_chunk_mut()? = parse_ipv4(piece)?;
            length += 4;
            break;
        }
        *bytes.get_mut(length..)?.first_chunk_mut()? = parse_group(piece)?.to_be_bytes();
        length += 2;
        rest = if let Some(others) = others.strip_prefix(b"::")
            && gap.is_none()
        {
            gap = Some(length);
            others
        } else {
            match others.strip_prefix(b":") {
                None if others.is_empty() => b"",
                Some(others) if !others.is_empty() => others,
                _ => return None,
            }
        };
    }
    match gap {
        // `::` stands for at least one group.
        Some(_) if length > 14 => return None,
        Some(gap) => {
            bytes.copy_within(gap..length, 16 - (length - gap));
            bytes.get_mut(gap..16 - (length - gap))?.fill(0);
        }
        None if length < 16 => return None,
        None => {}
    }
    Some(bytes)
}

/// One to four hexadecimal digits.
fn parse_group(digits: &[u8]) -> Option<u16> {
    if !(1..=4).contains(&digits.len()) {
        return None;
    }
    digits.iter().try_fold(0, |sum, digit| {
        Some(sum << 4 | char::from(*digit).to_digit(16)? as u16)
    })
}

/// Displays an address; IPv6 without `::`, which is valid and good enough for a log line.
pub struct Text<'a>(pub &'a IpAddr);

impl Display for Text<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        match self.0 {
            IpAddr::V4(ip) => {
                for octet in ip.octets() {
                    write!(formatter, "{separator}{}", u32::from(octet))?;
                    separator = ".";
                }
            }
            IpAddr::V6(ip) => {
                for group in ip.octets().as_chunks().0 {
                    write!(
                        formatter,
                        "{separator}{:x}",
                        usize::from(u16::from_be_bytes(*group))
                    )?;
                    separator = ":";
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_agrees_with_core() {
        let parts = [
            "", "0", "1", "00", "01", "255", "256", "ffff", "fffff", "g", ":", "::", ".",
            "1.2.3.4", "a", " ",
        ];
        let joins = ["", ":", "::", "."];
        let mut texts: Vec<String> = parts.map(str::to_owned).to_vec();
        let mut random = 1u32;
        for _ in 0..200_000 {
            let mut text = String::new();
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            for _ in 0..random >> 28 {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                text.push_str(parts[(random >> 24) as usize % parts.len()]);
                text.push_str(joins[(random >> 16) as usize % joins.len()]);
            }
            texts.push(text);
        }
        for text in [
            "10.0.0.2",
            "fd00::1",
            "1:2:3:4:5:6:7:8",
            "::ffff:1.2.3.4",
            "1:2:3:4:5:6:1.2.3.4",
            "1::2:3:4:5:6:7",
            "1.2.3.4:1",
        ] {
            texts.push(text.to_owned());
        }
        for text in texts {
            assert_eq!(parse(&text), text.parse().ok(), "{text:?}");
        }
    }

    #[test]
    fn displayed_addresses_can_be_parsed() {
        for ip in ["10.0.0.2", "255.255.255.255", "::1", "fd00:0:0:1::a0b:1000"] {
            let ip: IpAddr = ip.parse().unwrap();
            assert_eq!(Text(&ip).to_string().parse::<IpAddr>().unwrap(), ip);
        }
    }
}
