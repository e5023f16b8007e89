//! IP addresses from text, as inet_pton(3) reads them.
//!
//! core's parser says the same, at three times the code and with panics in it.

use crate::bytes::decimal;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Reads an IPv4 address in dotted quads, or an IPv6 address (RFC 4291 section 2.2).
pub fn parse(text: &[u8]) -> Option<IpAddr> {
    if text.contains(&b':') {
        ipv6(text).map(IpAddr::V6)
    } else {
        ipv4(text).map(IpAddr::V4)
    }
}

fn ipv4(text: &[u8]) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split(|byte| *byte == b'.');
    for octet in &mut octets {
        // A leading zero would be octal to some.
        let digits = parts
            .next()
            .filter(|part| *part == b"0" || part.first() != Some(&b'0'))?;
        *octet = u8::try_from(decimal(digits)?).ok()?;
    }
    parts.next().is_none().then_some(Ipv4Addr::from(octets))
}

fn ipv6(text: &[u8]) -> Option<Ipv6Addr> {
    let gap = text.windows(2).position(|pair| pair == b"::");
    let (left, right) = match gap {
        Some(gap) => (text.get(..gap)?, text.get(gap + 2..)?),
        None => (text, &[][..]),
    };
    let (left, right) = (groups(left, gap.is_none())?, groups(right, true)?);
    let count = left.len() + right.len();
    // A gap stands for one group of zeros at least.
    if (gap.is_none() && count != 8) || (gap.is_some() && count > 7) {
        return None;
    }
    let mut all = [0u16; 8];
    all.iter_mut()
        .zip(&left)
        .for_each(|(slot, group)| *slot = *group);
    all.iter_mut()
        .rev()
        .zip(right.iter().rev())
        .for_each(|(slot, group)| *slot = *group);
    Some(Ipv6Addr::from(all))
}

/// The groups on one side of a gap; at the address's end the last two may be an IPv4 address.
fn groups(text: &[u8], at_end: bool) -> Option<heapless::Vec<u16, 8>> {
    let mut groups = heapless::Vec::new();
    if text.is_empty() {
        return Some(groups);
    }
    let mut parts = text.split(|byte| *byte == b':');
    while let Some(part) = parts.next() {
        if part.contains(&b'.') {
            let [a, b, c, d] = ipv4(part)?.octets();
            groups.push(u16::from_be_bytes([a, b])).ok()?;
            groups.push(u16::from_be_bytes([c, d])).ok()?;
            return (at_end && parts.next().is_none()).then_some(groups);
        }
        if part.is_empty() || part.len() > 4 {
            return None;
        }
        let value = part.iter().try_fold(0u16, |sum, digit| {
            Some(sum << 4 | char::from(*digit).to_digit(16)? as u16)
        })?;
        groups.push(value).ok()?;
    }
    Some(groups)
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
