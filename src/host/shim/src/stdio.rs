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

/// How long a client may take to open a FIFO that it is to read; runc's shim waits as long.
const OPEN: Duration = Duration::from_secs(30);
/// How often that is polled.
const RETRY: Duration = Duration::from_millis(1);

/// Where a process's streams are, as containerd names them.
#[derive(Clone, Debug, Default)]
pub struct Stdio {
    /// A FIFO, or nothing.
    pub stdin: String,
    /// A FIFO, `file://PATH`, nothing, or `binary://PATH`, which takes standard error too.
    pub stdout: String,
    /// A FIFO, `file://PATH`, or nothing.
    pub stderr: String,
    /// A terminal.
    pub terminal: bool,
}

/// Where output goes.
pub struct Outputs {
    /// Standard output and standard error.
    pub files: [Output; 2],
    /// The program that takes them.
    pub logger: Option<Logger>,
}

impl Stdio {
    /// Opens the output, for a process of this name, and waits for who reads it. (Input is opened at
    /// the start: a client whose input ends at once, before it knows the process, could not say so.)
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

/// Text of a URI without its escapes (RFC 3986, section 2.1).
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
    /// Our own writing end: the input does not end while clients come and go, until somebody says
    /// so.
    kept: Option<File>,
}

impl Input {
    /// None where there is no input.
    pub fn open(path: &str) -> Result<Option<Input>> {
        if path.is_empty() {
            return Ok(None);
        }
        let fifo = open(path, OpenOptions::new().read(true))?;
        let kept = Some(open(path, OpenOptions::new().write(true))?);
        Ok(Some(Input { fifo, kept }))
    }

    /// It ends when the last client has closed it.
    pub fn end(&mut self) {
        self.kept = None;
    }

    /// What there is; None when there is nothing now, and nothing at the end.
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

/// Opens a FIFO for writing as soon as somebody has it open for reading. containerd's client opens its
/// end in a thread of its own, maybe after the process has ended: what was written to a FIFO is gone
/// when nobody has it open any more, and an open(2) for reading waits for a writer then.
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
            "nobody has opened {path} for reading in {} s",
            OPEN.as_secs()
        );
        thread::sleep(RETRY);
    }
}

/// A process's output.
#[derive(Default)]
pub struct Output {
    file: Option<File>,
    /// Our own reading end of a FIFO, which so outlives its readers.
    kept: Option<File>,
    pending: VecDeque<u8>,
}

impl Output {
    /// Opens it; what is written to nowhere is dropped.
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

    /// What is written goes to a file that does not block.
    pub fn to(file: File) -> Output {
        Output {
            file: Some(file),
            ..Output::default()
        }
    }

    /// Bytes that nobody has taken yet.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Writes as much as is taken now, and keeps the rest.
    pub fn write(&mut self, bytes: &[u8]) {
        if self.file.is_some() {
            self.pending.extend(bytes);
            self.flush();
        }
    }

    /// Writes as much as is taken now of what waits.
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
                // A full disk, or a program that has died: the process goes on.
                Err(_) => self.pending.clear(),
            }
        }
    }

    /// Nothing more is written. Whether the readers of a FIFO have taken all, or there are none.
    pub fn is_taken(&mut self) -> bool {
        let Some(file) = self.file.as_ref().filter(|_| self.pending.is_empty()) else {
            return self.pending.is_empty();
        };
        // A pipe that nobody can read is in error (pipe_poll in fs/pipe.c).
        self.kept = None;
        let mut pipe = [PollFd::new(file, PollFlags::empty())];
        let polled = poll(&mut pipe, Some(&Timespec::default()));
        let has_reader = polled.is_ok() && !pipe[0].revents().contains(PollFlags::ERR);
        let found = file.metadata();
        let is_fifo = found.is_ok_and(|found| found.file_type().is_fifo());
        !is_fifo || !has_reader || ioctl_fionread(file).is_ok_and(|left| left == 0)
    }

    /// The file to wait for, while something waits.
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
            // A new reader each time.
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
        // Nobody has to take what is in a file.
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
