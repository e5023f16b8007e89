//! Request targets (RFC 9112 section 3.2), their queries and percent-encoding.

use super::error::RequestError;
use crate::bytes::{find, is_name_byte, split_text_once};
use crate::{address, decimal};
use core::ffi::CStr;
use core::net::IpAddr;

/// A request target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// A resource of this server: origin-form, or absolute-form without its scheme and authority.
    Resource {
        /// Starts with `/`, or is `*`; still percent-encoded.
        path: &'a str,
        /// The part after `?`, still percent-encoded; empty if there is none.
        query: &'a str,
    },
    /// CONNECT's authority-form.
    Authority {
        /// A name or an address; an IPv6 address without its brackets.
        host: &'a str,
        /// Not 0.
        port: u16,
    },
}

impl<'a> Target<'a> {
    /// Parses the target of a request other than CONNECT.
    pub(super) fn parse(target: &'a str) -> Result<Self, RequestError> {
        const SCHEME: &str = "http://";
        // A fragment is never sent (RFC 9110 section 7.1).
        if find(target.as_bytes(), b'#').is_some() {
            return Err(RequestError::RequestTarget);
        }
        let mut path = target;
        if let Some((scheme, rest)) = target.split_at_checked(SCHEME.len())
            && scheme.eq_ignore_ascii_case(SCHEME)
        {
            let end = rest.bytes().position(|byte| matches!(byte, b'/' | b'?'));
            path = rest.get(end.unwrap_or(rest.len())..).unwrap_or("");
            if end == Some(0) || rest.is_empty() {
                // There is no authority.
                return Err(RequestError::RequestTarget);
            }
            if !path.starts_with('/') {
                // An empty path is the root (RFC 9110 section 4.2.3).
                return Ok(Self::Resource {
                    path: "/",
                    query: path.strip_prefix('?').unwrap_or(""),
                });
            }
        }
        if !path.starts_with('/') && path != "*" {
            return Err(RequestError::RequestTarget);
        }
        let (path, query) = split_text_once(path, b'?').unwrap_or((path, ""));
        Ok(Self::Resource { path, query })
    }

    /// Parses `host:port`, where an IPv6 address has brackets (RFC 9112 section 3.2.3).
    pub(super) fn parse_authority(target: &'a str) -> Result<Self, RequestError> {
        let authority = || {
            // After the last colon: an IPv6 address has more.
            let colon = target.bytes().rposition(|byte| byte == b':')?;
            let (host, digits) = (target.get(..colon)?, target.get(colon + 1..)?);
            let port = decimal::parse(digits.as_bytes()).filter(|port| *port != 0)?;
            if let Some(address) = host.strip_prefix('[') {
                let host = address.strip_suffix(']')?;
                address::parse(host).filter(IpAddr::is_ipv6)?;
                return Some(Self::Authority { host, port });
            }
            (!host.is_empty() && host.bytes().all(is_name_byte))
                .then_some(Self::Authority { host, port })
        };
        authority().ok_or(RequestError::RequestTarget)
    }

    /// The value of the first query parameter of that name, still encoded (see [`decode_query`]); empty if it
    /// has no `=`.
    pub fn parameter(&self, name: &str) -> Option<&'a str> {
        let Self::Resource { query, .. } = self else {
            return None;
        };
        let mut rest = *query;
        loop {
            let (pair, others) = split_text_once(rest, b'&').unwrap_or((rest, ""));
            let (key, value) = split_text_once(pair, b'=').unwrap_or((pair, ""));
            if key == name {
                return Some(value);
            }
            if others.is_empty() {
                return None;
            }
            rest = others;
        }
    }

    /// The parameter `path`, which must be absolute, decoded into `room`.
    pub fn path<'r>(&self, room: &'r mut [u8]) -> Result<&'r CStr, DecodeError> {
        let text = self.parameter("path").unwrap_or("");
        let length = decode_query(text, room)?.len();
        *room.get_mut(length).ok_or(DecodeError::TooLong)? = 0;
        match CStr::from_bytes_until_nul(room) {
            Ok(path) if path.to_bytes().starts_with(b"/") => Ok(path),
            _ => Err(DecodeError::Relative),
        }
    }
}

/// Why a parameter is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// A `%` without two hexadecimal digits after it.
    Escape,
    /// An encoded NUL, which paths and names must not contain.
    Nul,
    /// Too long for the buffer.
    TooLong,
    /// A path that does not begin with `/`.
    Relative,
}

impl DecodeError {
    /// What is wrong, for the response's body.
    pub fn message(self) -> &'static str {
        match self {
            Self::Escape => "a percent-encoding is malformed",
            Self::Nul => "a parameter has a NUL",
            Self::TooLong => "a parameter is too long",
            Self::Relative => "not an absolute path",
        }
    }
}

/// Decodes a parameter's value into `room` (RFC 3986 section 2.1). `+` is a space, as in
/// application/x-www-form-urlencoded, and `%2B` a plus sign.
pub fn decode_query<'r>(text: &str, room: &'r mut [u8]) -> Result<&'r [u8], DecodeError> {
    let mut bytes = text.bytes();
    let mut length = 0;
    while let Some(byte) = bytes.next() {
        let decoded = match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let (Some(high), Some(low)) = (digit(), digit()) else {
                    return Err(DecodeError::Escape);
                };
                (high << 4 | low) as u8
            }
            b'+' => b' ',
            other => other,
        };
        if decoded == 0 {
            return Err(DecodeError::Nul);
        }
        *room.get_mut(length).ok_or(DecodeError::TooLong)? = decoded;
        length += 1;
    }
    Ok(room.get(..length).unwrap_or(&[]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(target: &str) -> Option<(&str, &str)> {
        match Target::parse(target).ok()? {
            Target::Resource { path, query } => Some((path, query)),
            Target::Authority { .. } => None,
        }
    }

    #[test]
    fn a_path_is_found_in_origin_form_and_in_absolute_form() {
        for (target, expected) in [
            ("/v1/status", ("/v1/status", "")),
            ("/v1/status?x=/y?z", ("/v1/status", "x=/y?z")),
            ("//double", ("//double", "")),
            ("*", ("*", "")),
            ("http://vm:1/v1/status", ("/v1/status", "")),
            ("HTTP://vm/a?b", ("/a", "b")),
            ("http://vm", ("/", "")),
            ("http://vm?a=b", ("/", "a=b")),
            ("/\u{e9}", ("/\u{e9}", "")),
        ] {
            assert_eq!(resource(target), Some(expected), "{target}");
        }
        for bad in [
            "",
            "v1",
            "https://vm/",
            "http:///v1",
            "http://?x",
            "/a#b",
            "vm:1",
            "**",
            "*?a",
        ] {
            assert_eq!(resource(bad), None, "{bad}");
        }
    }

    #[test]
    fn connect_takes_a_host_and_a_port() {
        for (target, host, port) in [
            ("127.0.0.1:5432", "127.0.0.1", 5432),
            ("localhost:1", "localhost", 1),
            ("[::1]:65535", "::1", 65_535),
        ] {
            assert_eq!(
                Target::parse_authority(target),
                Ok(Target::Authority { host, port })
            );
        }
        for bad in [
            "", "a", "a:", ":1", "a:0", "a:65536", "a:+1", "a:1/", "/:1", "::1:1", "[::1]",
            "[::1]1", "[a]:1", "[::1:1", "u@a:1", "a b:1",
        ] {
            assert!(Target::parse_authority(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_parameter_of_a_name_is_found() {
        let target = Target::parse("/v1/files?path=/a%20b&mode=0644&path=/c&flag&=x").unwrap();
        assert_eq!(target.parameter("path"), Some("/a%20b"));
        assert_eq!(target.parameter("mode"), Some("0644"));
        assert_eq!(target.parameter("flag"), Some(""));
        assert_eq!(target.parameter("mod"), None);
        assert_eq!(Target::parse("/").unwrap().parameter("path"), None);
    }

    #[test]
    fn percent_encoding_is_decoded_and_a_plus_is_a_space() {
        let mut room = [0; 16];
        assert_eq!(
            decode_query("/a%2fb+%c3%A9", &mut room),
            Ok("/a/b é".as_bytes())
        );
        assert_eq!(decode_query("/a%2Bb+c", &mut room), Ok(&b"/a+b c"[..]));
        assert_eq!(decode_query("", &mut room), Ok(&b""[..]));
        assert_eq!(decode_query("%ff", &mut room), Ok(&[0xff][..]));
        assert_eq!(decode_query("%25%32%35", &mut room), Ok(&b"%25"[..]));
        for bad in ["%", "%1", "a%g1", "%1g", "%+1", "%\u{e9}"] {
            assert_eq!(
                decode_query(bad, &mut room),
                Err(DecodeError::Escape),
                "{bad}"
            );
        }
        assert_eq!(decode_query("a%00b", &mut room), Err(DecodeError::Nul));
        assert_eq!(decode_query("a\0", &mut room), Err(DecodeError::Nul));
        assert!(decode_query("1234567890123456", &mut room).is_ok());
        assert_eq!(
            decode_query("12345678901234567", &mut room),
            Err(DecodeError::TooLong)
        );
    }

    #[test]
    fn a_decoded_path_is_absolute_and_nul_terminated() {
        for (query, expected) in [
            ("path=/a%20b", Ok(c"/a b")),
            ("path=/123456789012345", Err(DecodeError::TooLong)),
            ("path=/12345678901234", Ok(c"/12345678901234")),
            ("path=a", Err(DecodeError::Relative)),
            ("path=", Err(DecodeError::Relative)),
            ("", Err(DecodeError::Relative)),
            ("path=/%00", Err(DecodeError::Nul)),
        ] {
            // What was there before is not a part of it.
            let mut room = [b'x'; 16];
            let target = Target::Resource { path: "/", query };
            assert_eq!(target.path(&mut room), expected, "{query}");
        }
    }
}
