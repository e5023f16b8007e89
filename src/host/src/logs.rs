//! The workload's output from `GET /v1/logs`, in Docker's frames for multiplexed streams
//!  (Docker Engine API, "Attach to a container", Stream format).

use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
};

use crate::{Connection, Error, http};

/// Bytes of a frame before its contents: the stream, three zeros, the length (big-endian).
const HEADER: usize = 8;
/// Bytes of a frame at most; the init's ring is smaller.
const MAX_FRAME: usize = 16 << 20;

/// The source of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, and standard error if they are not separate.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// The stream with this number in a frame.
    pub fn of(number: u8) -> Option<Stream> {
        match number {
            1 => Some(Stream::Stdout),
            2 => Some(Stream::Stderr),
            _ => None,
        }
    }

    /// Its number in a frame.
    pub fn number(self) -> u8 {
        match self {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        }
    }
}

/// A piece of output.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Which stream it was written to.
    pub stream: Stream,
    /// The output.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// Its encoding.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        let header = [self.stream.number(), 0, 0, 0];
        let bytes = self.bytes.iter().take(length as usize).copied();
        header
            .into_iter()
            .chain(length.to_be_bytes())
            .chain(bytes)
            .collect()
    }
}

/// Reads the next frame; None at the end of the stream. An incomplete last frame is ignored.
pub fn read_frame(source: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut header = [0; HEADER];
    if !fill(source, &mut header)? {
        return Ok(None);
    }
    let [number, zeros @ .., a, b, c, d] = header;
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    let stream = Stream::of(number).filter(|_| zeros == [0; 3] && length <= MAX_FRAME);
    let stream = stream.ok_or_else(|| io::Error::other(format!("not a frame: {header:?}")))?;
    let mut bytes = vec![0; length];
    let whole = fill(source, &mut bytes)?;
    Ok(whole.then_some(Frame { stream, bytes }))
}

/// Whether the buffer was filled. A source that detects a premature end returns an error.
fn fill(source: &mut impl Read, mut buffer: &mut [u8]) -> io::Result<bool> {
    while !buffer.is_empty() {
        match source.read(buffer) {
            Ok(0) => return Ok(false),
            Ok(size) => buffer = &mut buffer[size..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Output received from a VM.
pub struct Logs {
    body: http::Body<Connection>,
    offset: u64,
    is_cut: bool,
}

impl Logs {
    pub(crate) fn new(body: http::Body<Connection>, offset: u64) -> Logs {
        Logs {
            body,
            offset,
            is_cut: false,
        }
    }

    /// The number of the next byte, counted from the workload's start. If it is greater than the requested
    /// offset, the bytes in between are lost.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the connection ended before the output did, for instance because the VM ended.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// Waits for the next frame. None at the end: when all was read; with `follow`, when the workload has
    /// exited; or when the VM has ended ([`is_cut`](Self::is_cut)).
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Error> {
        let frame = match read_frame(&mut self.body) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.is_cut = true;
                None
            }
            frame => frame.map_err(Error::request_failed)?,
        };
        if let Some(frame) = &frame {
            self.offset += frame.bytes.len() as u64;
        }
        Ok(frame)
    }

    /// The connection.
    pub fn stream(&self) -> &UnixStream {
        self.body.get_ref().stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_premature_end_is_an_error() {
        struct Cut;
        impl Read for Cut {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
        }
        let begun = &b"\x01\0\0\0\0\0\0\x06hel"[..];
        assert_eq!(read_frame(&mut { begun }).unwrap(), None);
        let cut = read_frame(&mut begun.chain(Cut)).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn frames_are_dockers() {
        // The example in the Engine API's documentation, with its arithmetic evaluated.
        let bytes = b"\x01\0\0\0\0\0\0\x06hello\n\x02\0\0\0\0\0\0\x04oops\x01\0\0\0\0\0\0\0";
        let mut source = &bytes[..];
        let frame = |stream, text: &str| Frame {
            stream,
            bytes: text.into(),
        };
        let expected = [
            frame(Stream::Stdout, "hello\n"),
            frame(Stream::Stderr, "oops"),
            frame(Stream::Stdout, ""),
        ];
        let mut encoded = vec![];
        for frame in expected {
            encoded.extend(frame.encode());
            assert_eq!(read_frame(&mut source).unwrap(), Some(frame));
        }
        assert_eq!(read_frame(&mut source).unwrap(), None);
        assert_eq!(encoded, bytes);
    }

    #[test]
    fn a_truncated_frame_is_the_end_and_an_invalid_one_an_error() {
        for cut in [&b"\x01\0\0"[..], b"\x01\0\0\0\0\0\0\x05four"] {
            assert_eq!(read_frame(&mut &cut[..]).unwrap(), None);
        }
        for bad in [
            b"\x03\0\0\0\0\0\0\x01x",
            b"\x01\x01\0\0\0\0\0\x01x",
            b"\x01\0\0\0\xff\0\0\x01x",
        ] {
            assert!(read_frame(&mut &bad[..]).is_err());
        }
    }
}
