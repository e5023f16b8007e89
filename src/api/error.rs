//! Errors of calls, and how children of this program report them.

use crate::context::Context;
use crate::error;
use crate::error::Error;
#[cfg(any(feature = "mounts", feature = "snapshot", feature = "sysinfo"))]
use crate::process::helper::HelperLog;
use core::fmt::Display;
use proto::http::Status;
use proto::json::Quoted;
use proto::message;
use proto::message::Message;

/// An error response.
pub struct CallError {
    /// The response's status.
    pub status: Status,
    /// The message in its body.
    pub error: Error,
}

impl CallError {
    /// An invalid request.
    pub fn bad_request(error: impl Into<Error>) -> Self {
        Self::new(Status::BadRequest, error.into())
    }

    /// An error with any status.
    pub fn new(status: Status, error: Error) -> Self {
        Self { status, error }
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        Self::new(Status::InternalServerError, error)
    }
}

/// `{"error":"…"}`
pub fn error_body(error: &dyn Display) -> Message {
    message!("{{\"error\":{}}}", Quoted(error))
}

/// Refuses a call while the workload is held for a snapshot.
pub fn refuse_while_held(context: &Context) -> Result<(), CallError> {
    match context.is_held() {
        false => Ok(()),
        true => {
            let error = error!("the workload is held for a snapshot");
            Err(CallError::new(Status::Conflict, error))
        }
    }
}

/// The error of calls that need a running workload.
pub fn not_running() -> CallError {
    CallError::new(Status::Conflict, error!("the workload is not running"))
}

/// Exit codes of children, for statuses other than 500.
#[cfg(any(feature = "mounts", feature = "snapshot", feature = "sysinfo"))]
const EXIT_CODES: &[(i32, Status)] = &[
    (2, Status::BadRequest),
    (3, Status::NotFound),
    (4, Status::Conflict),
    (5, Status::GatewayTimeout),
];

/// In a child: reports its error. Returns the exit code.
#[cfg(any(feature = "mounts", feature = "snapshot", feature = "sysinfo"))]
pub fn report_error(done: Result<(), CallError>, log: &HelperLog) -> i32 {
    let Err(CallError { status, error }) = done else {
        return 0;
    };
    log.fail(&error);
    let known = EXIT_CODES.iter().find(|(_, known)| *known == status);
    known.map_or(1, |(code, _)| *code)
}

/// The status of a child's error, by its exit code if it has one.
#[cfg(any(feature = "mounts", feature = "snapshot", feature = "sysinfo"))]
pub fn status_of_exit(code: Option<i32>) -> Status {
    let known = EXIT_CODES.iter().find(|(known, _)| Some(*known) == code);
    known.map_or(Status::InternalServerError, |(_, status)| *status)
}
