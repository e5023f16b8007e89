//! The shim's log: lines for containerd's log, through the FIFO `log` of the bundle.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::OnceLock,
    time::SystemTime,
};

use rustix::fs::OFlags;

static LOG: OnceLock<File> = OnceLock::new();

/// Opens the FIFO for reading and writing, so that writes neither fail nor block while containerd restarts.
pub fn open(bundle: &Path) {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32);
    if let Ok(file) = options.open(bundle.join("log")) {
        let _ = LOG.set(file);
    }
}

/// Writes a line in logrus's text format, like containerd's own.
pub fn write(level: &str, message: &str) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs());
    if let Some(mut file) = LOG.get() {
        let line = format!(
            "time={seconds} level={level} msg={message:?} runtime={}\n",
            crate::RUNTIME
        );
        let _ = file.write_all(line.as_bytes());
    }
}

/// Logs an error that does not end the container, or the reason for its end.
pub fn error(error: &anyhow::Error) {
    write("error", &format!("{error:#}"));
}

/// Logs a difference from other runtimes.
pub fn warn(message: &str) {
    write("warning", message);
}
