//! A VM's output and console logs: append-only, split into segments, of which the oldest are removed. A
//! segment's file name ends with the offset of its first byte, except for offset 0.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

/// Minimum size of a segment in bytes before the next one is started; two are kept. Docker's `local` log
/// driver also keeps 100 MB.
const MIN_SEGMENT_SIZE: u64 = 50 << 20;
/// How often a growing log is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The file of the segment that starts at this offset.
fn segment_path(dir: &Path, name: &str, start: u64) -> PathBuf {
    match start {
        0 => dir.join(name),
        start => dir.join(format!("{name}-{start}")),
    }
}

/// The start offsets of the existing segments, sorted. There are none once `--rm` has removed the directory.
fn start_offsets(dir: &Path, name: &str) -> io::Result<Vec<u64>> {
    let mut offsets = vec![];
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(offsets),
        entries => entries?,
    };
    for entry in entries {
        let file = entry?.file_name();
        let rest = file.to_str().and_then(|file| file.strip_prefix(name));
        let start = match rest {
            Some("") => Some(0),
            Some(rest) => rest.strip_prefix('-').and_then(|start| start.parse().ok()),
            None => None,
        };
        offsets.extend(start);
    }
    offsets.sort_unstable();
    Ok(offsets)
}

/// Appends to a log.
pub struct Writer {
    dir: PathBuf,
    name: &'static str,
    file: File,
    /// Offsets of the segment's first byte and of the next byte to write.
    start: u64,
    end: u64,
    /// Size of the segment's file in bytes, and the size from which the next one is started.
    written: u64,
    size: u64,
}

impl Writer {
    /// Removes an existing log, and starts a new one.
    pub fn new(dir: &Path, name: &'static str) -> Result<Writer> {
        for start in start_offsets(dir, name)? {
            fs::remove_file(segment_path(dir, name, start))?;
        }
        Writer::append(dir, name, |_| Ok(0))
    }

    /// Continues an existing log. `count` returns the length of the last segment, in the unit of offsets.
    pub fn append(
        dir: &Path,
        name: &'static str,
        count: impl FnOnce(&File) -> Result<u64>,
    ) -> Result<Writer> {
        let start = start_offsets(dir, name)?.pop().unwrap_or(0);
        let file = open(&segment_path(dir, name, start))?;
        let end = start + count(&file)?;
        let written = file.metadata()?.len();
        Ok(Writer {
            dir: dir.into(),
            name,
            file,
            start,
            end,
            written,
            size: MIN_SEGMENT_SIZE,
        })
    }

    /// Writes a record, which advances the offset by `count`. A segment boundary never splits it; if it cannot
    /// be written in full, nothing of it remains.
    pub fn write(&mut self, piece: &[u8], count: usize) -> Result<()> {
        if self.written >= self.size {
            self.rotate()?;
        }
        if let Err(error) = self.file.write_all(piece) {
            self.file.set_len(self.written)?;
            return Err(error.into());
        }
        self.written += piece.len() as u64;
        self.end += count as u64;
        Ok(())
    }

    fn rotate(&mut self) -> Result<()> {
        let file = open(&segment_path(&self.dir, self.name, self.end))?;
        let last = self.start;
        (self.file, self.start, self.written) = (file, self.end, 0);
        let offsets = start_offsets(&self.dir, self.name)?;
        for start in offsets.into_iter().filter(|start| *start < last) {
            fs::remove_file(segment_path(&self.dir, self.name, start))?;
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let file = options.create(true).read(true).append(true).open(path);
    file.with_context(|| format!("unable to write {}", path.display()))
}

/// Reads the segments of a log in sequence.
pub struct Reader<F> {
    dir: PathBuf,
    name: &'static str,
    file: File,
    start: u64,
    grows: F,
}

impl<F: Fn() -> bool> Reader<F> {
    /// Opens a log at its oldest segment; None if there is no log. While the log `grows`, waits for it to
    /// appear, and at its end for more.
    pub fn open(dir: &Path, name: &'static str, grows: F) -> Result<Option<Reader<F>>> {
        loop {
            let is_growing = grows();
            let first = start_offsets(dir, name)?.first().copied();
            match first.map(|start| (start, File::open(segment_path(dir, name, start)))) {
                Some((start, Ok(file))) => {
                    return Ok(Some(Reader {
                        dir: dir.into(),
                        name,
                        file,
                        start,
                        grows,
                    }));
                }
                Some((_, Err(error))) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("unable to open {name}"));
                }
                // It has just been removed.
                Some(_) => {}
                None if !is_growing => return Ok(None),
                None => thread::sleep(POLL_INTERVAL),
            }
        }
    }

    /// The start offset of the current segment.
    pub fn segment_start(&self) -> u64 {
        self.start
    }

    /// Switches to the next segment. Returns whether there is one.
    fn advance(&mut self) -> io::Result<bool> {
        let offsets = start_offsets(&self.dir, self.name)?;
        let Some(next) = offsets.into_iter().find(|start| *start > self.start) else {
            return Ok(false);
        };
        match File::open(segment_path(&self.dir, self.name, next)) {
            Ok(file) => (self.file, self.start) = (file, next),
            // It has just been removed, so there is a later one.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    fn has_next(&self) -> io::Result<bool> {
        let last = start_offsets(&self.dir, self.name)?.pop();
        Ok(last > Some(self.start))
    }
}

impl<F: Fn() -> bool> Read for Reader<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut size = self.file.read(buffer)?;
            if size > 0 {
                return Ok(size);
            }
            // Checked before the last read, so that nothing written until then is missed.
            let (has_next, grows) = (self.has_next()?, (self.grows)());
            size = self.file.read(buffer)?;
            match size {
                0 if has_next => _ = self.advance()?,
                0 if grows => thread::sleep(POLL_INTERVAL),
                size => return Ok(size),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(dir: &Path) -> Writer {
        let count = |file: &File| Ok(file.metadata()?.len());
        let writer = Writer::append(dir, "out", count).unwrap();
        Writer { size: 10, ..writer }
    }

    fn write(writer: &mut Writer, text: &str) {
        writer.write(text.as_bytes(), text.len()).unwrap();
    }

    fn read(dir: &Path) -> (u64, String) {
        let mut reader = Reader::open(dir, "out", || false).unwrap().unwrap();
        let (start, mut text) = (reader.segment_start(), String::new());
        reader.read_to_string(&mut text).unwrap();
        (start, text)
    }

    #[test]
    fn the_oldest_segments_are_removed_and_the_rest_keep_their_offsets() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert!(Reader::open(dir, "out", || false).unwrap().is_none());
        fs::write(dir.join("output"), "another's").unwrap();
        let mut first = writer(dir);
        write(&mut first, "0123456");
        write(&mut first, "789abc");
        assert_eq!(read(dir), (0, "0123456789abc".into()));
        write(&mut first, "d");
        drop(first);
        // Reopened, as after a restart.
        let mut second = writer(dir);
        assert_eq!((second.start, second.end), (13, 14));
        write(&mut second, "efghijklmnop");
        assert_eq!(read(dir), (0, "0123456789abcdefghijklmnop".into()));
        write(&mut second, "q");
        assert_eq!(read(dir), (13, "defghijklmnopq".into()));
        assert_eq!(start_offsets(dir, "out").unwrap(), [13, 26]);
        drop(Writer::new(dir, "out").unwrap());
        assert_eq!(read(dir), (0, String::new()));
        assert_eq!(fs::read_to_string(dir.join("output")).unwrap(), "another's");
    }

    #[test]
    fn a_follower_reads_everything_across_segments() {
        const LINES: u64 = 2000;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_path_buf();
        let mut writer = Writer {
            size: 1000,
            ..writer(dir.path())
        };
        let (sender, over) = std::sync::mpsc::channel::<()>();
        let grows = move || over.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty);
        let mut reader = Reader::open(&path, "out", grows).unwrap().unwrap();
        let (mut seen, mut buffer) = (vec![], [0; 4096]);
        thread::scope(|scope| {
            let (written, wait) = std::sync::mpsc::sync_channel(1);
            scope.spawn(move || {
                for number in 0..LINES {
                    write(&mut writer, &format!("{number:04}\n"));
                    // A follower that lags too far behind would miss removed segments.
                    if number % 100 == 0 {
                        written.send(()).unwrap();
                    }
                }
                drop(sender);
            });
            loop {
                let _ = wait.try_recv();
                match reader.read(&mut buffer).unwrap() {
                    0 => break,
                    size => seen.extend_from_slice(&buffer[..size]),
                }
            }
        });
        let expected: String = (0..LINES).map(|number| format!("{number:04}\n")).collect();
        assert_eq!(String::from_utf8(seen).unwrap(), expected);
    }

    #[test]
    fn a_slow_follower_continues_with_the_segments_that_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(dir.path());
        write(&mut writer, "0123456789");
        let mut reader = Reader::open(dir.path(), "out", || false).unwrap().unwrap();
        for piece in ["a".repeat(10), "b".repeat(10), "c".repeat(10)] {
            write(&mut writer, &piece);
        }
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "0123456789bbbbbbbbbbcccccccccc");
        assert_eq!(reader.segment_start(), 30);
    }
}
