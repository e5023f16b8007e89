//! Docker's multiplexed stream (`application/vnd.docker.multiplexed-stream`; Docker Engine API,
//! "Attach to a container", stream format): frames of a header and bytes of one stream.

/// The media type.
pub const MEDIA_TYPE: &str = "application/vnd.docker.multiplexed-stream";

/// Length of a frame's header.
pub const HEADER: usize = 8;

/// Which of a process's streams the bytes are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Stream {
    Stdout = 1,
    Stderr = 2,
}

/// The header of a frame: the stream, three zeros, the number of bytes that follow (big-endian).
pub fn header(stream: Stream, length: u32) -> [u8; HEADER] {
    let [a, b, c, d] = length.to_be_bytes();
    [stream as u8, 0, 0, 0, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_names_the_stream_and_the_length() {
        assert_eq!(header(Stream::Stdout, 5), [1, 0, 0, 0, 0, 0, 0, 5]);
        assert_eq!(
            header(Stream::Stderr, 0x0102_0304),
            [2, 0, 0, 0, 1, 2, 3, 4]
        );
    }
}
