//! A process's streams: containerd's FIFOs, or a file or a program for its output.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::{Errno, ioctl_fionread},
};

use crate::logger::Logger;

/// How long a client may take to open a FIFO for reading; the same as in runc's shim.
const OPEN: Duration = Duration::from_secs(30);
/// Interval of polling for that.
const RETRY: Duration = Duration::from_millis(1);

/// The paths or URIs of a process's streams, as given by containerd.
#[derive(Clone, Debug, Default)]
pub struct Stdio {
    /// A FIFO, or empty.
    pub stdin: String,
    /// A FIFO, `file://PATH`, empty, or `binary://PATH`, which also receives standard error.
    pub stdout: String,
    /// A FIFO, `file://PATH`, or empty.
    pub stderr: String,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

/// The destinations of output.
pub struct Outputs {
    /// Standard output and standard error.
    pub files: [Output; 2],
    /// The program that receives them.
    pub logger: Option<Logger>,
}

impl Stdio {
    /// Opens the output of the process `id`, and waits for a reader. (Input is opened at the start: a client
    /// whose input ends immediately could not close it before it knows the process.)
    pub fn open(&self, id: &str, namespace: &str) -> Result<Outputs> {
        if let Some(place) = self.stdout.strip_prefix("binary://") {
            let (logger, files) = Logger::start(place, id, namespace)?;
            return Ok(Outputs {
                files,
                logger: Some(logger),
            });
        }
        let error = match self.terminal {
            true => Output::default(),
            false => Output::open(&self.stderr)?,
        };
        Ok(Outputs {
            files: [Output::open(&self.stdout)?, error],
            logger: None,
        })
    }
}

/// Decodes the escapes of a URI (RFC 3986, section 2.1).
pub fn decode(text: &str) -> String {
    let mut bytes = vec![];
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escaped = match (first, after) {
            (b'%', [high, low, ..]) => std::str::from_utf8(&[*high, *low])
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 16).ok()),
            _ => None,
        };
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() {
            &after[2..]
        } else {
            after
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn open(path: &str, options: &mut OpenOptions) -> Result<File> {
    let options = options.custom_flags(OFlags::NONBLOCK.bits() as i32);
    let file = options.open(path);
    file.with_context(|| format!("unable to open {path}"))
}

/// A process's input.
pub struct Input {
    fifo: File,
    /// A writing end, which keeps the input open between clients until [`Input::end`].
    kept: Option<File>,
}

impl Input {
    /// None if there is no input.
    pub fn open(path: &str) -> Result<Option<Input>> {
        if path.is_empty() {
            return Ok(None);
        }
        let fifo = open(path, OpenOptions::new().read(true))?;
        let kept = Some(open(path, OpenOptions::new().write(true))?);
        Ok(Some(Input { fifo, kept }))
    }

    /// Ends the input once the last client has closed it.
    pub fn end(&mut self) {
        self.kept = None;
    }

    /// Reads available bytes; None if there are none now, 0 at the end.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match self.fifo.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            result => result.map(Some),
        }
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fifo.as_fd()
    }
}

/// Opens a FIFO for writing once it is open for reading. containerd's client opens its end in a separate
/// thread, possibly after the process has exited: data in a FIFO is discarded when all ends are closed, and
/// an open(2) for reading then blocks until there is a writer.
fn open_for_reader(path: &str) -> Result<File> {
    let deadline = Instant::now() + OPEN;
    loop {
        let opened = OpenOptions::new()
            .append(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open(path);
        match opened {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NXIO) => {}
            opened => return opened.with_context(|| format!("unable to open {path}")),
        }
        ensure!(
            Instant::now() < deadline,
            "{path} was not opened for reading within {} s",
            OPEN.as_secs()
        );
        thread::sleep(RETRY);
    }
}

/// A process's output.
#[derive(Default)]
pub struct Output {
    file: Option<File>,
    /// A reading end of a FIFO, which keeps it open between readers.
    kept: Option<File>,
    pending: VecDeque<u8>,
}

impl Output {
    /// Opens it. Without a destination, output is discarded.
    pub fn open(place: &str) -> Result<Output> {
        let file = match place.split_once("://") {
            None if place.is_empty() => None,
            None => {
                return Ok(Output {
                    file: Some(open_for_reader(place)?),
                    kept: Some(open(place, OpenOptions::new().read(true))?),
                    ..Output::default()
                });
            }
            Some(("file", path)) => {
                let path = decode(path);
                if let Some(dir) = Path::new(&path).parent() {
                    fs::create_dir_all(dir)
                        .with_context(|| format!("unable to create {}", dir.display()))?;
                }
                Some(open(&path, OpenOptions::new().append(true).create(true))?)
            }
            Some((scheme, _)) => bail!("{place}: output to {scheme}:// is not supported"),
        };
        Ok(Output {
            file,
            ..Output::default()
        })
    }

    /// Output to a non-blocking file.
    pub fn to(file: File) -> Output {
        Output {
            file: Some(file),
            ..Output::default()
        }
    }

    /// Bytes not written yet.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Writes as much as possible without blocking, and keeps the rest.
    pub fn write(&mut self, bytes: &[u8]) {
        if self.file.is_some() {
            self.pending.extend(bytes);
            self.flush();
        }
    }

    /// Writes as much pending data as possible without blocking.
    pub fn flush(&mut self) {
        let Some(file) = &mut self.file else {
            return;
        };
        while !self.pending.is_empty() {
            let (first, _) = self.pending.as_slices();
            match file.write(first) {
                Ok(size) => drop(self.pending.drain(..size)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A full disk, or a program that has exited: the process continues.
                Err(_) => self.pending.clear(),
            }
        }
    }

    /// After the last write: whether a FIFO's readers have read everything, or there are none.
    pub fn is_taken(&mut self) -> bool {
        let Some(file) = self.file.as_ref().filter(|_| self.pending.is_empty()) else {
            return self.pending.is_empty();
        };
        // A pipe without readers is in the error state (pipe_poll in fs/pipe.c).
        self.kept = None;
        let mut pipe = [PollFd::new(file, PollFlags::empty())];
        let polled = poll(&mut pipe, Some(&Timespec::default()));
        let has_reader = polled.is_ok() && !pipe[0].revents().contains(PollFlags::ERR);
        let found = file.metadata();
        let is_fifo = found.is_ok_and(|found| found.file_type().is_fifo());
        !is_fifo || !has_reader || ioctl_fionread(file).is_ok_and(|left| left == 0)
    }

    /// The file to poll while data is pending.
    pub fn waiting(&self) -> Option<BorrowedFd<'_>> {
        let file = self.file.as_ref().filter(|_| !self.pending.is_empty());
        file.map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soon;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::path::PathBuf;

    fn fifo(dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
        path
    }

    #[test]
    fn input_ends_once_it_is_closed_by_both_sides() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let mut input = Input::open(path.to_str().unwrap()).unwrap().unwrap();
        let mut buffer = [0; 16];
        assert_eq!(input.read(&mut buffer).unwrap(), None);
        let mut client = OpenOptions::new().write(true).open(&path).unwrap();
        client.write_all(b"abc").unwrap();
        assert_eq!(input.read(&mut buffer).unwrap(), Some(3));
        drop(client);
        assert_eq!(input.read(&mut buffer).unwrap(), None);
        let client = OpenOptions::new().write(true).open(&path).unwrap();
        input.end();
        assert_eq!(input.read(&mut buffer).unwrap(), None);
        drop(client);
        assert!(soon(|| input.read(&mut buffer).unwrap() == Some(0)));
    }

    #[test]
    fn output_waits_for_a_reader_that_is_late_or_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let late = path.clone();
        let start = Instant::now();
        let reader = thread::spawn(move || {
            thread::sleep(Duration::from_millis(200));
            File::open(late).unwrap()
        });
        let mut output = Output::open(path.to_str().unwrap()).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(200));
        drop(reader.join().unwrap());
        let bytes: Vec<u8> = (0..200_000u32).map(|number| number as u8).collect();
        output.write(&bytes);
        assert!(output.pending() > 0 && output.waiting().is_some());
        assert!(!output.is_taken());
        let mut read: Vec<u8> = vec![];
        let mut buffer = [0; 4096];
        while read.len() < bytes.len() {
            // Reopened each time.
            let mut reader = File::open(&path).unwrap();
            let size = reader.read(&mut buffer).unwrap();
            read.extend(&buffer[..size]);
            output.flush();
        }
        assert_eq!(read, bytes);
        assert_eq!(output.pending(), 0);
    }

    #[test]
    fn output_is_drained_when_its_readers_are_done_or_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let path = path.to_str().unwrap();
        let mut reader = open(path, OpenOptions::new().read(true)).unwrap();
        let mut output = Output::open(path).unwrap();
        assert!(output.is_taken());
        let mut buffer = [0; 16];
        output.write(b"text");
        assert!(!output.is_taken());
        assert_eq!(reader.read(&mut buffer).unwrap(), 4);
        assert!(output.is_taken());
        output.write(b"text");
        assert!(!output.is_taken());
        drop(reader);
        assert!(soon(|| output.is_taken()));
        // A file has no readers to wait for.
        let file = format!("file://{}", dir.path().join("log").display());
        let mut output = Output::open(&file).unwrap();
        output.write(b"text");
        assert!(output.is_taken());
    }

    #[test]
    fn output_to_a_file_is_appended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for text in ["one ", "two"] {
            let mut output = Output::open(&format!("file://{}", path.display())).unwrap();
            output.write(text.as_bytes());
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one two");
        Output::open("").unwrap().write(b"nowhere");
        let place = format!("file://{}/a%20dir/%zz%", dir.path().display());
        Output::open(&place).unwrap().write(b"x");
        assert!(dir.path().join("a dir/%zz%").is_file());
        let error = Output::open("tcp://host").map(drop).unwrap_err();
        assert!(error.to_string().contains("output to tcp://"), "{error}");
    }
}
