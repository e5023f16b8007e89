//! What can go wrong between a host driver and its VM.

use std::{fmt, io, path::PathBuf};

/// Why a call of the API has failed.
#[derive(Debug)]
pub enum Error {
    /// Nobody has the vsock's Unix socket open: there is no VM, or not any more.
    NoVm {
        /// The socket.
        uds: PathBuf,
        /// What connecting to it came to.
        source: io::Error,
    },
    /// The VM is there and nothing in it listens on the port: it boots, or goes down.
    NotListening {
        /// The guest's port.
        port: u32,
        /// What the handshake came to.
        source: io::Error,
    },
    /// The init answered, and said no.
    Refused {
        /// HTTP status.
        status: u16,
        /// Its reason.
        message: String,
    },
    /// A command could not be started; the reason is the init's.
    NotStarted(String),
    /// The init has closed a session; the reason is its own.
    Closed(String),
    /// The connection ended, or what came over it made no sense.
    Broken(String),
}

impl Error {
    /// Whether the same call may work a little later.
    pub fn is_not_yet(&self) -> bool {
        matches!(self, Error::NoVm { .. } | Error::NotListening { .. })
    }

    pub(crate) fn broken(error: impl fmt::Display) -> Error {
        Error::Broken(format!("{error:#}"))
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
        }
    }
}

impl std::error::Error for Error {}
