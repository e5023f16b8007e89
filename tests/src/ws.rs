//! A simple WebSocket client (RFC 6455) that can also send invalid frames.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::http;

// First bytes of frames: FIN and opcode (section 5.2).
pub const CONTINUATION: u8 = 0x00;
pub const LAST: u8 = 0x80;
pub const TEXT: u8 = 0x81;
pub const BINARY: u8 = 0x82;
pub const CLOSE: u8 = 0x88;
pub const PING: u8 = 0x89;
pub const PONG: u8 = 0x8a;

/// The handshake's key and its response (section 1.3).
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// An arbitrary mask.
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// The header lines of a handshake, except for `Host`.
pub fn handshake() -> [(&'static str, &'static str); 4] {
    [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", KEY),
    ]
}

/// A client's frame: masked, with the shortest encoding of its length.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![first];
    match payload.len() {
        short @ ..126 => bytes.push(0x80 | short as u8),
        medium @ ..0x1_0000 => {
            bytes.push(0xfe);
            bytes.extend((medium as u16).to_be_bytes());
        }
        long => {
            bytes.push(0xff);
            bytes.extend((long as u64).to_be_bytes());
        }
    }
    bytes.extend(MASK);
    let masked = payload.iter().zip(MASK.iter().cycle());
    bytes.extend(masked.map(|(byte, mask)| byte ^ mask));
    bytes
}

/// A server's frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// FIN, reserved bits and opcode.
    pub first: u8,
    pub payload: Vec<u8>,
}

/// A connection after its handshake.
pub struct Socket {
    stream: UnixStream,
    unread: Vec<u8>,
    /// Output that was read, but not used by the last call.
    put_back: Option<Frame>,
}

/// The rest of a session, up to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// All binary messages.
    pub output: Vec<u8>,
    /// The text after them, if any.
    pub message: Option<Value>,
    /// The code of the close frame, if any.
    pub close: Option<u16>,
}

impl Ended {
    /// The output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }
}

impl Socket {
    /// Opens a WebSocket on a connected stream.
    pub fn open(stream: UnixStream, path: &str) -> Result<Socket> {
        let mut client = http::Client::new(stream);
        let response = client.request("GET", path, &handshake(), b"")?;
        ensure!(response.status == 101, "no handshake: {response}");
        ensure!(response.header("sec-websocket-accept") == Some(ACCEPT));
        let (stream, unread) = client.into_stream();
        Ok(Socket {
            stream,
            unread,
            put_back: None,
        })
    }

    /// The connection itself.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// A second handle, for sending only.
    pub fn sender(&self) -> Result<Socket> {
        Ok(Socket {
            stream: self.stream.try_clone()?,
            unread: vec![],
            put_back: None,
        })
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("unable to send")
    }

    /// Sends one frame.
    pub fn send(&mut self, first: u8, payload: &[u8]) -> Result<()> {
        self.send_raw(&frame(first, payload))
    }

    /// Sends a text message.
    pub fn text(&mut self, message: &Value) -> Result<()> {
        self.send(TEXT, message.to_string().as_bytes())
    }

    /// Sends a binary message.
    pub fn binary(&mut self, payload: &[u8]) -> Result<()> {
        self.send(BINARY, payload)
    }

    /// Sends a close frame.
    pub fn close(&mut self, code: u16) -> Result<()> {
        self.send(CLOSE, &code.to_be_bytes())
    }

    /// The next frame, or None if the connection is closed. A server's frame must have no mask, no reserved
    /// bits, and the shortest encoding of its length.
    pub fn next_frame(&mut self) -> Result<Option<Frame>> {
        if let Some(frame) = self.put_back.take() {
            return Ok(Some(frame));
        }
        loop {
            if let Some((frame, size)) = parse(&self.unread)? {
                self.unread.drain(..size);
                return Ok(Some(frame));
            }
            let mut buffer = [0; 64 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(size) => self.unread.extend(&buffer[..size]),
                // A connection that is closed with unread data is reset.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("unable to receive"),
            }
        }
        let left = self.unread.len();
        ensure!(
            left == 0,
            "the connection ended after {left} bytes of a frame"
        );
        Ok(None)
    }

    /// Reads binary messages until all of them together satisfy `enough`.
    pub fn output_until(&mut self, enough: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let mut output = vec![];
        while !enough(&output) {
            match self.next_frame()? {
                Some(Frame {
                    first: BINARY,
                    payload,
                }) => output.extend(payload),
                other => bail!(
                    "{other:?} after the output {:?}",
                    String::from_utf8_lossy(&output)
                ),
            }
        }
        Ok(output)
    }

    /// Reads binary messages until `text` is in them; what follows it is read next.
    pub fn output_with(&mut self, text: &str) -> Result<String> {
        let position = |output: &[u8]| {
            let mut windows = output.windows(text.len());
            windows.position(|window| window == text.as_bytes())
        };
        let mut output = self.output_until(|output| position(output).is_some())?;
        let end = position(&output).map_or(output.len(), |start| start + text.len());
        let payload = output.split_off(end);
        self.put_back = (!payload.is_empty()).then_some(Frame {
            first: BINARY,
            payload,
        });
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// Reads up to the close frame: its code and its reason.
    pub fn wait_close(&mut self) -> Result<(u16, String)> {
        loop {
            let frame = self.next_frame()?.context("no close frame")?;
            if let (CLOSE, [high, low, reason @ ..]) = (frame.first, frame.payload.as_slice()) {
                let reason = String::from_utf8(reason.to_vec())?;
                return Ok((u16::from_be_bytes([*high, *low]), reason));
            }
        }
    }

    /// Reads to the end of the connection, answering the close frame. Output comes first, in
    /// messages of at most 64 KiB, then at most one text, then the close frame, then nothing.
    pub fn wait_end(&mut self) -> Result<Ended> {
        let mut ended = Ended {
            output: vec![],
            message: None,
            close: None,
        };
        let mut closed = false;
        while let Some(Frame { first, payload }) = self.next_frame()? {
            ensure!(!closed, "a frame {first:#x} after the close frame");
            match first {
                BINARY => {
                    ensure!(ended.message.is_none(), "output after {:?}", ended.message);
                    ensure!(payload.len() <= 64 << 10, "{} bytes at once", payload.len());
                    ended.output.extend(payload);
                }
                TEXT => {
                    ensure!(ended.message.is_none(), "two texts");
                    ended.message = Some(serde_json::from_slice(&payload)?);
                }
                CLOSE => {
                    closed = true;
                    ended.close = match payload.as_slice() {
                        [] => None,
                        [high, low, ..] => Some(u16::from_be_bytes([*high, *low])),
                        [_] => bail!("a close frame of one byte"),
                    };
                    // The server may have closed without waiting for it.
                    let _ = self.send(CLOSE, &payload);
                }
                PONG => {}
                first => bail!("an unexpected frame {first:#x}: {payload:?}"),
            }
        }
        Ok(ended)
    }
}

/// The frame at the start of `bytes` and its size, if it is complete.
fn parse(bytes: &[u8]) -> Result<Option<(Frame, usize)>> {
    let [first, second, rest @ ..] = bytes else {
        return Ok(None);
    };
    ensure!(first & 0x70 == 0, "reserved bits: {first:#x}");
    ensure!(second & 0x80 == 0, "a masked frame from the server");
    let (length, start) = match second {
        126 => match rest.first_chunk() {
            Some(length) => (u64::from(u16::from_be_bytes(*length)), 4),
            None => return Ok(None),
        },
        127 => match rest.first_chunk() {
            Some(length) => (u64::from_be_bytes(*length), 10),
            None => return Ok(None),
        },
        short => (u64::from(*short), 2),
    };
    let fewest = match length {
        0..126 => 2,
        126..0x1_0000 => 4,
        _ => 10,
    };
    ensure!(start == fewest, "a length of {length} in {start} bytes");
    let end = start + usize::try_from(length)?;
    Ok(bytes.get(start..end).map(|payload| {
        let (first, payload) = (*first, payload.to_vec());
        (Frame { first, payload }, end)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_frames_are_found_when_they_are_whole() {
        let bytes = [&[0x82, 126, 1, 0][..], &[7; 256]].concat();
        assert_eq!(parse(&bytes[..259]).unwrap(), None);
        let (frame, size) = parse(&bytes).unwrap().unwrap();
        assert_eq!(
            (frame.first, frame.payload.len(), size),
            (BINARY, 256, bytes.len())
        );
        assert!(parse(&[0x82, 126, 0, 5]).is_err());
        assert!(parse(&[0xc2, 0]).is_err());
        assert!(parse(&[0x82, 0x80]).is_err());
    }

    #[test]
    fn a_clients_frame_is_the_rfcs_example() {
        let hello = [
            0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58,
        ];
        assert_eq!(frame(TEXT, b"Hello"), hello);
    }
}
