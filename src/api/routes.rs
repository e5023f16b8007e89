//! The API's calls by method and path.

use core::fmt::{self, Display};
use proto::http::Method;

/// A call of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `GET /v1/status`
    Status,
    /// `GET /v1/exit_code`
    ExitCode,
    /// `POST /v1/signals`
    Signals,
    /// `POST /v1/stop`
    Stop,
    /// `POST /v1/exec`
    Exec,
    /// `GET /v1/ws/exec`, a WebSocket.
    Session,
    /// `GET /v1/sessions`
    #[cfg(feature = "sessions")]
    Sessions,
    /// `DELETE /v1/sessions/ID`
    #[cfg(feature = "sessions")]
    EndSession,
    /// `GET /v1/logs`
    #[cfg(feature = "logs")]
    Logs,
    /// `GET /v1/sysinfo`
    #[cfg(feature = "sysinfo")]
    Sysinfo,
    /// `GET` and `PUT /v1/files`
    #[cfg(feature = "files")]
    Files,
    /// `POST /v1/mounts`
    #[cfg(feature = "mounts")]
    Mount,
    /// `DELETE /v1/mounts`
    #[cfg(feature = "mounts")]
    Unmount,
    /// `POST /v1/snapshot/prepare`, `POST /v1/snapshot/cancel` and `POST /v1/restore`
    #[cfg(feature = "snapshot")]
    Snapshot(SnapshotCall),
}

/// A call that the restore room answers.
#[cfg(feature = "snapshot")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotCall {
    /// The workload is to stand still.
    Prepare,
    /// It is to go on, there was no snapshot.
    Cancel,
    /// There was one, and this VM came out of it.
    Restore,
}

/// All calls. A GET can be a HEAD, too, but for a WebSocket's. A path that ends with `/` stands for all
/// that begin with it.
const ROUTES: &[(Method, &str, Call)] = &[
    (Method::Get, "/v1/status", Call::Status),
    (Method::Get, "/v1/exit_code", Call::ExitCode),
    (Method::Post, "/v1/signals", Call::Signals),
    (Method::Post, "/v1/stop", Call::Stop),
    (Method::Post, "/v1/exec", Call::Exec),
    (Method::Get, "/v1/ws/exec", Call::Session),
    #[cfg(feature = "sessions")]
    (Method::Get, "/v1/sessions", Call::Sessions),
    #[cfg(feature = "sessions")]
    (Method::Delete, "/v1/sessions/", Call::EndSession),
    #[cfg(feature = "logs")]
    (Method::Get, "/v1/logs", Call::Logs),
    #[cfg(feature = "sysinfo")]
    (Method::Get, "/v1/sysinfo", Call::Sysinfo),
    #[cfg(feature = "files")]
    (Method::Get, "/v1/files", Call::Files),
    #[cfg(feature = "files")]
    (Method::Put, "/v1/files", Call::Files),
    #[cfg(feature = "mounts")]
    (Method::Post, "/v1/mounts", Call::Mount),
    #[cfg(feature = "mounts")]
    (Method::Delete, "/v1/mounts", Call::Unmount),
    #[cfg(feature = "snapshot")]
    (
        Method::Post,
        "/v1/snapshot/prepare",
        Call::Snapshot(SnapshotCall::Prepare),
    ),
    #[cfg(feature = "snapshot")]
    (
        Method::Post,
        "/v1/snapshot/cancel",
        Call::Snapshot(SnapshotCall::Cancel),
    ),
    #[cfg(feature = "snapshot")]
    (
        Method::Post,
        "/v1/restore",
        Call::Snapshot(SnapshotCall::Restore),
    ),
];

/// Why there is no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteError {
    /// No call has this path.
    NotFound,
    /// Calls of this path have other methods.
    MethodNotAllowed(Allow),
}

/// Finds the call of a request.
pub fn route(method: Method, path: &str) -> Result<Call, RouteError> {
    let mut found = None;
    for (allowed, known, call) in ROUTES {
        let is_known = match known.ends_with('/') {
            true => path.len() > known.len() && path.starts_with(known),
            false => path == *known,
        };
        if !is_known {
            continue;
        }
        if *allowed == method || (method == Method::Head && allows_head(*allowed, *call)) {
            return Ok(*call);
        }
        found = Some(Allow { path: known });
    }
    Err(found.map_or(RouteError::NotFound, RouteError::MethodNotAllowed))
}

fn allows_head(allowed: Method, call: Call) -> bool {
    allowed == Method::Get && call != Call::Session
}

/// The methods of a path, for display as the value of `Allow` (RFC 9110 section 10.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allow {
    path: &'static str,
}

impl Display for Allow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (method, path, call) in ROUTES {
            if *path == self.path {
                write!(formatter, "{separator}{}", method.name())?;
                separator = ", ";
                if allows_head(*method, *call) {
                    write!(formatter, "{separator}{}", Method::Head.name())?;
                }
            }
        }
        Ok(())
    }
}
