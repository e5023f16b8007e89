//! Errors between a host driver and its VM.

use std::{fmt, io, path::PathBuf};

/// Why an API call failed.
#[derive(Debug)]
pub enum Error {
    /// Nothing listens on the vsock's Unix socket: there is no VM, or it has ended.
    NoVm {
        /// The socket.
        uds: PathBuf,
        /// The error of connecting to it.
        source: io::Error,
    },
    /// The VM runs but does not listen on the port: it is booting or shutting down.
    NotListening {
        /// The guest's port.
        port: u32,
        /// The error of the handshake.
        source: io::Error,
    },
    /// The init responded with an error.
    Refused {
        /// HTTP status.
        status: u16,
        /// The error message.
        message: String,
    },
    /// A command could not be started, with the init's reason.
    NotStarted(String),
    /// The init closed a session, with its reason.
    Closed(String),
    /// The connection was closed, or the data was invalid.
    Broken(String),
    /// The guest is up, but its init did not respond in time.
    TimedOut(String),
}

impl Error {
    /// Whether the same call may succeed later.
    pub fn is_not_yet(&self) -> bool {
        matches!(self, Error::NoVm { .. } | Error::NotListening { .. })
    }

    pub(crate) fn broken(error: impl fmt::Display) -> Error {
        Error::Broken(format!("{error:#}"))
    }

    /// The error of a request without a response: `TimedOut` or `Broken`.
    pub(crate) fn request_failed(error: impl Into<anyhow::Error>) -> Error {
        let error = error.into();
        let is_timeout = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
        let mut causes = error.chain();
        match causes.any(|cause| cause.downcast_ref().is_some_and(is_timeout)) {
            true => Error::TimedOut(format!("{error:#}")),
            false => Error::broken(format!("{error:#}")),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Error::NoVm { uds, source } => {
                write!(f, "unable to connect to {}: {source}", uds.display())
            }
            Error::NotListening { port, source } => {
                write!(f, "nothing listens on the guest's port {port}: {source}")
            }
            Error::Refused { status, message } => write!(f, "refused ({status}): {message}"),
            Error::NotStarted(message) => f.write_str(message),
            Error::Closed(reason) => f.write_str(reason),
            Error::Broken(what) => write!(f, "the connection broke: {what}"),
            Error::TimedOut(what) => write!(f, "the guest does not respond: {what}"),
        }
    }
}

impl std::error::Error for Error {}
