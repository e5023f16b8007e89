//! IP addresses from text, as inet_pton(3) reads them.
//!
//! core's parser says the same, at three times the code and with panics in it.

use crate::bytes::{decimal, find, hexadecimal, split};
use core::net::IpAddr;

/// Reads an IPv4 address in dotted quads, or an IPv6 address (RFC 4291 section 2.2).
pub fn parse(text: &[u8]) -> Option<IpAddr> {
    if find(text, b':').is_some() {
        ipv6(text).map(IpAddr::from)
    } else {
        ipv4(text).map(|octets| IpAddr::from(octets.to_be_bytes()))
    }
}

fn ipv4(text: &[u8]) -> Option<u32> {
    let mut octets = split(text, b'.');
    let mut address = 0;
    for _ in 0..4 {
        let digits = octets.next()?;
        // A leading zero would be octal to some.
        if digits.len() > 1 && digits.starts_with(b"0") {
            return None;
        }
        let octet = decimal(digits).filter(|octet| *octet < 256)?;
        address = address << 8 | octet;
    }
    octets.next().is_none().then_some(address)
}

fn ipv6(text: &[u8]) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    let mut length = 0;
    // Where `::` stands for zeros.
    let mut gap = None;
    let mut rest = text;
    if let [b':', b':', others @ ..] = rest {
        gap = Some(0);
        rest = others;
    }
    while !rest.is_empty() {
        let end = find(rest, b':').unwrap_or(rest.len());
        let (piece, others) = rest.split_at_checked(end)?;
        if others.is_empty() && find(piece, b'.').is_some() {
            // The last two groups may be an IPv4 address.
            *bytes.get_mut(length..)?.first_chunk_mut()? = ipv4(piece)?.to_be_bytes();
            length += 4;
            break;
        }
        *bytes.get_mut(length..)?.first_chunk_mut()? = group(piece)?.to_be_bytes();
        length += 2;
        rest = match others {
            [b':', b':', others @ ..] if gap.is_none() => {
                gap = Some(length);
                others
            }
            [b':', others @ ..] if !others.is_empty() => others,
            [] => &[],
            _ => return None,
        };
    }
    match gap {
        // One group of zeros at least.
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
fn group(digits: &[u8]) -> Option<u16> {
    if !(1..=4).contains(&digits.len()) {
        return None;
    }
    digits.iter().try_fold(0, |sum, digit| {
        Some(sum << 4 | u16::from(hexadecimal(*digit)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_what_core_reads_and_nothing_else() {
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
            assert_eq!(parse(text.as_bytes()), text.parse().ok(), "{text:?}");
        }
    }
}
