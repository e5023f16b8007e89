//! The guest's serial console, recorded while it runs.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// The output of a guest's console. Clones share one recording.
#[derive(Clone)]
pub struct Serial {
    shared: Arc<Shared>,
    log: PathBuf,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
    held: bool,
    /// Bytes read at once, and the time between two reads.
    pace: Option<(usize, Duration)>,
}

impl Serial {
    /// Records `source` to its end, in memory and in the file `log`; `echo` also copies it to standard
    /// output.
    pub fn record(mut source: impl Read + Send + 'static, log: &Path, echo: bool) -> Result<Self> {
        if let Some(dir) = log.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut file = File::create(log).with_context(|| format!("unable to create {log:?}"))?;
        let serial = Serial {
            shared: Arc::default(),
            log: log.into(),
        };
        let shared = serial.shared.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            loop {
                let pace = shared.wait_while(|state| state.held).pace;
                let most = pace.map_or(buffer.len(), |(most, _)| most.min(buffer.len()));
                let size = match source.read(&mut buffer[..most]) {
                    Ok(size) => size,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => 0,
                };
                let chunk = &buffer[..size];
                // A full disk must not lose the recording in memory, which the test asserts on.
                let _ = file.write_all(chunk);
                if echo {
                    let mut stdout = io::stdout();
                    let _ = stdout.write_all(chunk).and_then(|()| stdout.flush());
                }
                let mut state = shared.state();
                state.bytes.extend(chunk);
                state.ended = size == 0;
                drop(state);
                shared.changed.notify_all();
                if size == 0 {
                    return;
                }
                if let Some((_, time)) = pace {
                    thread::sleep(time);
                }
            }
        });
        Ok(serial)
    }

    /// The file of the recording.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// All output so far, with LF instead of the console's CR LF.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.state().bytes).replace("\r\n", "\n")
    }

    /// The last `count` lines so far.
    pub fn tail(&self, count: usize) -> String {
        let text = self.text();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Waits until a whole line, from the first one on, contains `text`; returns that line.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<String> {
        self.wait_for_line(timeout, |line| line.contains(text))
            .with_context(|| format!("no line with {text:?}"))
    }

    /// Waits until a whole line, from the first one on, satisfies `wanted`; returns that line.
    pub fn wait_for_line(
        &self,
        timeout: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state();
        let mut seen = 0;
        loop {
            while let Some(length) = state.bytes[seen..].iter().position(|&byte| byte == b'\n') {
                let line = String::from_utf8_lossy(&state.bytes[seen..seen + length]);
                let line = line.trim_end_matches('\r');
                if wanted(line) {
                    return Ok(line.into());
                }
                seen += length + 1;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended {
                bail!("the console has ended");
            }
            if left.is_zero() {
                bail!("not within {timeout:?}");
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .expect("no poison")
                .0;
        }
    }

    /// Waits for the end of the console; the recording is then complete.
    pub fn wait_end(&self) {
        drop(self.shared.wait_while(|state| !state.ended));
    }

    /// Stops reading: the console blocks.
    pub fn hold(&self) {
        self.shared.state().held = true;
    }

    /// Continues reading, slowly: at most that many bytes at once, with that much time between two reads.
    pub fn trickle(&self, bytes: usize, time: Duration) {
        let mut state = self.shared.state();
        (state.held, state.pace) = (false, Some((bytes, time)));
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Continues reading as fast as possible.
    pub fn release(&self) {
        let mut state = self.shared.state();
        (state.held, state.pace) = (false, None);
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the lock panics")
    }

    fn wait_while(&self, condition: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        self.changed
            .wait_while(self.state(), |state| condition(state))
            .expect("no poison")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixStream, sync::mpsc};

    fn recording() -> (UnixStream, Serial, tempfile::TempDir) {
        let (console, source) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let serial = Serial::record(source, &dir.path().join("logs/a.log"), false).unwrap();
        (console, serial, dir)
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn a_line_is_found_when_it_is_whole() {
        let (mut console, serial, _dir) = recording();
        console.write_all(b"first\r\nthe sec").unwrap();
        let found = thread::spawn({
            let serial = serial.clone();
            move || serial.wait_for("sec", SOON).unwrap()
        });
        console.write_all(b"ond\r\n").unwrap();
        assert_eq!(found.join().unwrap(), "the second");
        assert_eq!(serial.text(), "first\nthe second\n");
        assert_eq!(fs::read(serial.log()).unwrap(), b"first\r\nthe second\r\n");
    }

    #[test]
    fn waiting_stops_at_the_end_of_the_console() {
        let (console, serial, _dir) = recording();
        drop(console);
        let error = format!("{:#}", serial.wait_for("x", SOON).unwrap_err());
        assert_eq!(error, "no line with \"x\": the console has ended");
    }

    /// A console that returns a line per read.
    struct Lines(mpsc::Receiver<&'static [u8]>);

    impl Read for Lines {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.recv().map_or(Ok(0), |mut line| line.read(buffer))
        }
    }

    #[test]
    fn a_held_console_is_read_on_after_its_release() {
        let (console, lines) = mpsc::channel();
        let dir = tempfile::tempdir().unwrap();
        let serial = Serial::record(Lines(lines), &dir.path().join("a.log"), false).unwrap();
        serial.hold();
        // A read may have been in progress when the console was held: it returns the first line.
        for line in [&b"1\n"[..], b"2\n"] {
            console.send(line).unwrap();
        }
        serial.wait_for("2", Duration::from_millis(50)).unwrap_err();
        serial.release();
        serial.wait_for("2", SOON).unwrap();
    }
}
