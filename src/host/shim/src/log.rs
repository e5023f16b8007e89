//! The shim's log: lines for containerd's own, by the FIFO `log` of the bundle.

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

/// Opens the FIFO. It is kept open both ways: containerd may come back to it, and until then nobody
/// waits.
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

/// Writes a line in logrus's text format, as containerd's own are.
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

/// Something went wrong and the container goes on, or its end needs a reason.
pub fn error(error: &anyhow::Error) {
    write("error", &format!("{error:#}"));
}

/// Something that is not as it would be with another runtime.
pub fn warn(message: &str) {
    write("warning", message);
}
