//! Errors of malformed requests.

use super::status::Status;

/// A malformed request. The response has [`status`](Self::status) and [`message`](Self::message); then the
/// connection is closed, as it is unknown where the next request starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// A line ends with LF alone, or contains a CR.
    LineEnd,
    /// A head over [`MAX_HEAD`](super::MAX_HEAD) bytes or [`MAX_HEADERS`] header lines.
    LongHead,
    /// The request line is not `method SP request-target SP HTTP-version`.
    RequestLine,
    /// A version other than HTTP/1.0 and HTTP/1.1.
    Version,
    /// The request target has none of the forms of RFC 9112 section 3.2.
    RequestTarget,
    /// A header line that is malformed or folded.
    Header,
    /// No Host header, more than one, or an impossible one (RFC 9112 section 3.2).
    Host,
    /// Content-Length is not a number, or has different values.
    ContentLength,
    /// Content-Length and Transfer-Encoding together.
    TwoFramings,
    /// Transfer-Encoding from an HTTP/1.0 client.
    Http10Encoding,
    /// A transfer encoding other than `chunked`.
    UnknownEncoding,
    /// More than one transfer encoding, or an empty list of them.
    EncodingList,
    /// CONNECT with a body, which has no meaning (RFC 9110 section 9.3.6).
    ConnectBody,
    /// A body over the limit.
    LargeBody,
    /// An expectation other than `100-continue`.
    Expectation,
    /// A chunk size that is malformed, or an extension after it.
    ChunkSize,
    /// Chunk data that is longer than its size.
    ChunkEnd,
    /// A chunk's size with its extensions over [`MAX_CHUNK_LINE`] bytes.
    LongChunkLine,
    /// A trailer line that is malformed.
    Trailer,
    /// Trailers over [`MAX_TRAILER`] bytes.
    LongTrailer,
}

impl RequestError {
    /// The status of the response.
    pub fn status(self) -> Status {
        match self {
            Self::LineEnd
            | Self::RequestLine
            | Self::RequestTarget
            | Self::Header
            | Self::Host
            | Self::ContentLength
            | Self::TwoFramings
            | Self::Http10Encoding
            | Self::EncodingList
            | Self::ConnectBody
            | Self::ChunkSize
            | Self::ChunkEnd
            | Self::Trailer => Status::BadRequest,
            Self::LargeBody => Status::ContentTooLarge,
            Self::Expectation => Status::ExpectationFailed,
            Self::LongHead | Self::LongChunkLine | Self::LongTrailer => {
                Status::RequestHeaderFieldsTooLarge
            }
            Self::UnknownEncoding => Status::NotImplemented,
            Self::Version => Status::HttpVersionNotSupported,
        }
    }

    /// What is wrong, for the response's body.
    pub fn message(self) -> &'static str {
        match self {
            Self::LineEnd => "a line does not end with CRLF",
            Self::LongHead => "the head is over 16 KiB or 64 header lines",
            Self::RequestLine => "the request line is malformed",
            Self::Version => "the version is not HTTP/1.0 or HTTP/1.1",
            Self::RequestTarget => "the request target is malformed",
            Self::Header => "a header line is malformed",
            Self::Host => "there must be one valid Host header",
            Self::ContentLength => "Content-Length is not one number",
            Self::TwoFramings => "both Content-Length and Transfer-Encoding",
            Self::Http10Encoding => "HTTP/1.0 has no Transfer-Encoding",
            Self::UnknownEncoding => "the only transfer encoding is chunked",
            Self::EncodingList => "there must be one transfer encoding",
            Self::ConnectBody => "CONNECT has no body",
            Self::LargeBody => "the body is too large",
            Self::Expectation => "the only expectation is 100-continue",
            Self::ChunkSize => "a chunk size is malformed",
            Self::ChunkEnd => "a chunk does not end with CRLF",
            Self::LongChunkLine => "a chunk size line is over 4 KiB",
            Self::Trailer => "a trailer line is malformed",
            Self::LongTrailer => "the trailers are over 16 KiB",
        }
    }
}

/// Whether a byte is allowed in a token (RFC 9110 section 5.6.2).
pub fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Whether a byte is allowed in a header value (RFC 9110 section 5.5): no control character except tab.
pub fn is_value_byte(byte: u8) -> bool {
    byte == b'\t' || !byte.is_ascii_control()
}
