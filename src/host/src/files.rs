//! Files of a running VM (`/v1/files`).

use std::{io::Read, time::Duration};

use serde::Deserialize;

use crate::{Client, Connection, Error, client::refusal, connection::Limit, http};

/// How long a transfer may stall: the init gives up on a client after 30 s, and on a disk after 45 s.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Metadata of a regular file.
#[derive(Clone, Debug, PartialEq)]
pub struct FileInfo {
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: Option<u32>,
    /// User and group, as `uid:gid`.
    pub owner: Option<String>,
    /// Time of the last modification, from the init.
    pub mtime: Option<String>,
}

/// How a file is written.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    /// Permission bits; 0644 by default.
    pub mode: Option<u32>,
    /// The owner, `user[:group]` by name or number; root by default.
    pub user: Option<String>,
}

/// The result of writing a file.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub struct Written {
    /// Its size in bytes.
    pub bytes: u64,
}

/// Escapes a path or value for a query: everything except unreserved characters and slashes (RFC 3986).
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                escaped.push(byte.into());
            }
            _ => escaped += &format!("%{byte:02X}"),
        }
    }
    escaped
}

fn info(response: &http::Response) -> FileInfo {
    let text = |name| response.header(name).map(String::from);
    let number = |name| response.header(name).and_then(|text| text.parse().ok());
    FileInfo {
        size: number("content-length").unwrap_or(0),
        mode: response
            .header("file-mode")
            .and_then(|mode| u32::from_str_radix(mode, 8).ok()),
        owner: text("file-owner"),
        mtime: text("file-mtime"),
    }
}

impl Client {
    /// `HEAD /v1/files`: metadata of a regular file.
    pub fn file_info(&self, path: &str) -> Result<FileInfo, Error> {
        let target = format!("/v1/files?path={}", escape(path));
        let mut http = self.http(Limit::Total(STALL_TIMEOUT))?;
        let reply = http.request("HEAD", &target, &[], b"");
        let reply = reply.map_err(Error::request_failed)?;
        match reply.status {
            200 => Ok(info(&reply)),
            status => Err(Error::Refused {
                status,
                message: format!("{path}: {}", reply.reason),
            }),
        }
    }

    /// `GET /v1/files`: metadata and contents of a regular file.
    pub fn read_file(&self, path: &str) -> Result<(FileInfo, http::Body<Connection>), Error> {
        let target = format!("/v1/files?path={}", escape(path));
        let (head, http) =
            self.start_get(&target, STALL_TIMEOUT, Limit::Progress(STALL_TIMEOUT))?;
        let info = info(&head);
        let body = http.into_body(&head).map_err(Error::broken)?;
        Ok((info, body))
    }

    /// The beginning of a text file, at most `limit` bytes, as a guest's files are not trusted. Invalid UTF-8 is
    /// replaced.
    pub fn read_text(&self, path: &str, limit: u64) -> Result<String, Error> {
        let (_, body) = self.read_file(path)?;
        let mut bytes = vec![];
        let read = body.take(limit).read_to_end(&mut bytes);
        read.map_err(Error::request_failed)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// `PUT /v1/files`: writes a regular file atomically, and creates its parent directories.
    /// Without a length the body is sent in chunks.
    pub fn write_file(
        &self,
        path: &str,
        contents: &mut dyn Read,
        length: Option<u64>,
        options: &WriteOptions,
    ) -> Result<Written, Error> {
        let mut target = format!("/v1/files?path={}", escape(path));
        if let Some(mode) = options.mode {
            target += &format!("&mode={mode:04o}");
        }
        if let Some(user) = &options.user {
            target += &format!("&user={}", escape(user));
        }
        let mut http = self.http(Limit::Progress(STALL_TIMEOUT))?;
        let reply = http.send_body("PUT", &target, contents, length);
        let reply = reply.map_err(Error::request_failed)?;
        match reply.status {
            200 | 201 => serde_json::from_slice(&reply.body).map_err(Error::broken),
            status => Err(refusal(status, &reply.body)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_escaped_except_for_unreserved_characters() {
        assert_eq!(escape("/a-b_c.d~/E9"), "/a-b_c.d~/E9");
        assert_eq!(escape("/ü &?#%+"), "/%C3%BC%20%26%3F%23%25%2B");
    }
}
