//! Files of a VM that grow as long as it runs, output and console: of what was written first, what is too
//! much is dropped. Such a file is one of a few, each called after the number of its first byte.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

/// Bytes of a file at least, before another is begun; two are kept. Docker's `local` log driver keeps 100
/// MB, too.
const SIZE: u64 = 50 << 20;
/// How often a file that grows is looked at.
const REFRESH: Duration = Duration::from_millis(50);

/// The file that begins with this byte.
fn path(dir: &Path, name: &str, begin: u64) -> PathBuf {
    match begin {
        0 => dir.join(name),
        begin => dir.join(format!("{name}-{begin}")),
    }
}

/// The first bytes of the files that are there, in order.
fn begins(dir: &Path, name: &str) -> io::Result<Vec<u64>> {
    let mut begins = vec![];
    for entry in fs::read_dir(dir)? {
        let file = entry?.file_name();
        let rest = file.to_str().and_then(|file| file.strip_prefix(name));
        let begin = match rest {
            Some("") => Some(0),
            Some(rest) => rest.strip_prefix('-').and_then(|begin| begin.parse().ok()),
            None => None,
        };
        begins.extend(begin);
    }
    begins.sort_unstable();
    Ok(begins)
}

/// Writes them.
pub struct Writer {
    dir: PathBuf,
    name: &'static str,
    file: File,
    /// The number of the file's first byte, and of the next one.
    begin: u64,
    end: u64,
    /// Bytes in the file, and when another is begun.
    written: u64,
    size: u64,
}

impl Writer {
    /// Begins anew.
    pub fn new(dir: &Path, name: &'static str) -> Result<Writer> {
        for begin in begins(dir, name)? {
            fs::remove_file(path(dir, name, begin))?;
        }
        Writer::append(dir, name, |_| Ok(0))
    }

    /// Writes on. `count` says how many bytes, as they are numbered, the last file has.
    pub fn append(
        dir: &Path,
        name: &'static str,
        count: impl FnOnce(&File) -> Result<u64>,
    ) -> Result<Writer> {
        let begin = begins(dir, name)?.pop().unwrap_or(0);
        let file = open(&path(dir, name, begin))?;
        let end = begin + count(&file)?;
        let written = file.metadata()?.len();
        Ok(Writer {
            dir: dir.into(),
            name,
            file,
            begin,
            end,
            written,
            size: SIZE,
        })
    }

    /// Writes a piece that is not divided, and counts as so many bytes. Where that fails, nothing of it is
    /// there.
    pub fn write(&mut self, piece: &[u8], count: usize) -> Result<()> {
        if self.written >= self.size {
            self.begin_file()?;
        }
        if let Err(error) = self.file.write_all(piece) {
            self.file.set_len(self.written)?;
            return Err(error.into());
        }
        self.written += piece.len() as u64;
        self.end += count as u64;
        Ok(())
    }

    fn begin_file(&mut self) -> Result<()> {
        let file = open(&path(&self.dir, self.name, self.end))?;
        let last = self.begin;
        (self.file, self.begin, self.written) = (file, self.end, 0);
        let begins = begins(&self.dir, self.name)?;
        for begin in begins.into_iter().filter(|begin| *begin < last) {
            fs::remove_file(path(&self.dir, self.name, begin))?;
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let file = options.create(true).read(true).append(true).open(path);
    file.with_context(|| format!("unable to write {}", path.display()))
}

/// Reads them as one, as long as they grow.
pub struct Reader<F> {
    dir: PathBuf,
    name: &'static str,
    file: File,
    begin: u64,
    grows: F,
}

impl<F: Fn() -> bool> Reader<F> {
    /// From what is kept; None where there is nothing and nothing will be. While it `grows`, its end is
    /// waited for.
    pub fn open(dir: &Path, name: &'static str, grows: F) -> Result<Option<Reader<F>>> {
        loop {
            let is_growing = grows();
            let first = begins(dir, name)?.first().copied();
            match first.map(|begin| (begin, File::open(path(dir, name, begin)))) {
                Some((begin, Ok(file))) => {
                    return Ok(Some(Reader {
                        dir: dir.into(),
                        name,
                        file,
                        begin,
                        grows,
                    }));
                }
                Some((_, Err(error))) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("unable to open {name}"));
                }
                // It was dropped at this moment.
                Some(_) => {}
                None if !is_growing => return Ok(None),
                None => thread::sleep(REFRESH),
            }
        }
    }

    /// The number of the first byte of the file that was read last.
    pub fn begin(&self) -> u64 {
        self.begin
    }

    /// Goes to the next file, if there is one.
    fn advance(&mut self) -> io::Result<bool> {
        let begins = begins(&self.dir, self.name)?;
        let Some(next) = begins.into_iter().find(|begin| *begin > self.begin) else {
            return Ok(false);
        };
        match File::open(path(&self.dir, self.name, next)) {
            Ok(file) => (self.file, self.begin) = (file, next),
            // It was dropped at this moment, and another is there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    fn has_next(&self) -> io::Result<bool> {
        let last = begins(&self.dir, self.name)?.pop();
        Ok(last > Some(self.begin))
    }
}

impl<F: Fn() -> bool> Read for Reader<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut size = self.file.read(buffer)?;
            if size > 0 {
                return Ok(size);
            }
            // Looked at before: what is written until then is read.
            let (has_next, grows) = (self.has_next()?, (self.grows)());
            size = self.file.read(buffer)?;
            match size {
                0 if has_next => _ = self.advance()?,
                0 if grows => thread::sleep(REFRESH),
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
        let (begin, mut text) = (reader.begin(), String::new());
        reader.read_to_string(&mut text).unwrap();
        (begin, text)
    }

    #[test]
    fn what_was_written_first_is_dropped_and_the_rest_keeps_its_numbers() {
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
        // As after a restart.
        let mut second = writer(dir);
        assert_eq!((second.begin, second.end), (13, 14));
        write(&mut second, "efghijklmnop");
        assert_eq!(read(dir), (0, "0123456789abcdefghijklmnop".into()));
        write(&mut second, "q");
        assert_eq!(read(dir), (13, "defghijklmnopq".into()));
        assert_eq!(begins(dir, "out").unwrap(), [13, 26]);
        drop(Writer::new(dir, "out").unwrap());
        assert_eq!(read(dir), (0, String::new()));
        assert_eq!(fs::read_to_string(dir.join("output")).unwrap(), "another's");
    }

    #[test]
    fn a_follower_reads_all_of_it_across_files() {
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
                    // A follower that is far behind would lose what is dropped.
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
    fn a_follower_that_is_too_slow_goes_on_with_what_is_kept() {
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
        assert_eq!(reader.begin(), 30);
    }
}
