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
    WebSocketExec,
    /// `GET /v1/sessions`
    #[cfg(feature = "sessions")]
    ListSessions,
    /// `DELETE /v1/sessions/ID`
    #[cfg(feature = "sessions")]
    EndSession,
    /// `GET /v1/logs`
    #[cfg(feature = "logs")]
    Logs,
    /// `GET /v1/sysinfo`
    #[cfg(feature = "sysinfo")]
    Sysinfo,
    /// `GET`, `HEAD` and `PUT /v1/files`
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

/// A call that the restore module handles.
#[cfg(feature = "snapshot")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotCall {
    /// Freezes the workload.
    Prepare,
    /// Thaws it after, or instead of, a snapshot.
    Cancel,
    /// Gives a restored VM its own identity.
    Restore,
}

/// The calls of a path, by method.
type Calls = &'static [(Method, Call)];

/// All calls. A path that ends with `/` matches all paths that begin with it.
const ROUTES: &[(&str, Calls)] = &[
    (
        "/v1/status",
        &[(Method::Get, Call::Status), (Method::Head, Call::Status)],
    ),
    (
        "/v1/exit_code",
        &[
            (Method::Get, Call::ExitCode),
            (Method::Head, Call::ExitCode),
        ],
    ),
    ("/v1/signals", &[(Method::Post, Call::Signals)]),
    ("/v1/stop", &[(Method::Post, Call::Stop)]),
    ("/v1/exec", &[(Method::Post, Call::Exec)]),
    ("/v1/ws/exec", &[(Method::Get, Call::WebSocketExec)]),
    #[cfg(feature = "sessions")]
    (
        "/v1/sessions",
        &[
            (Method::Get, Call::ListSessions),
            (Method::Head, Call::ListSessions),
        ],
    ),
    #[cfg(feature = "sessions")]
    ("/v1/sessions/", &[(Method::Delete, Call::EndSession)]),
    #[cfg(feature = "logs")]
    (
        "/v1/logs",
        &[(Method::Get, Call::Logs), (Method::Head, Call::Logs)],
    ),
    #[cfg(feature = "sysinfo")]
    (
        "/v1/sysinfo",
        &[(Method::Get, Call::Sysinfo), (Method::Head, Call::Sysinfo)],
    ),
    #[cfg(feature = "files")]
    (
        "/v1/files",
        &[
            (Method::Get, Call::Files),
            (Method::Head, Call::Files),
            (Method::Put, Call::Files),
        ],
    ),
    #[cfg(feature = "mounts")]
    (
        "/v1/mounts",
        &[(Method::Post, Call::Mount), (Method::Delete, Call::Unmount)],
    ),
    #[cfg(feature = "snapshot")]
    (
        "/v1/snapshot/prepare",
        &[(Method::Post, Call::Snapshot(SnapshotCall::Prepare))],
    ),
    #[cfg(feature = "snapshot")]
    (
        "/v1/snapshot/cancel",
        &[(Method::Post, Call::Snapshot(SnapshotCall::Cancel))],
    ),
    #[cfg(feature = "snapshot")]
    (
        "/v1/restore",
        &[(Method::Post, Call::Snapshot(SnapshotCall::Restore))],
    ),
];

/// Why no call matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteError {
    /// No call has this path.
    NotFound,
    /// The path exists, with other methods.
    MethodNotAllowed(Allow),
}

/// Finds the call of a request.
pub fn route(method: Method, path: &str) -> Result<Call, RouteError> {
    let (_, calls) = ROUTES
        .iter()
        .find(|(known, _)| match known.ends_with('/') {
            true => path.len() > known.len() && path.starts_with(known),
            false => path == *known,
        })
        .ok_or(RouteError::NotFound)?;
    match calls.iter().find(|(allowed, _)| *allowed == method) {
        Some((_, call)) => Ok(*call),
        None => Err(RouteError::MethodNotAllowed(Allow(calls))),
    }
}

/// The methods of a path, for display as the value of `Allow` (RFC 9110 section 10.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allow(Calls);

impl Display for Allow {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (method, _) in self.0 {
            write!(formatter, "{separator}{}", method.name())?;
            separator = ", ";
        }
        Ok(())
    }
}
