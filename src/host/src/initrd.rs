//! Writing initramfs archives (cpio, "newc": kernel Documentation/driver-api/early-userspace/
//! buffer-format.rst).

use std::{collections::BTreeMap, io};

use anyhow::Result;
use cpio::newc::{self, Builder, ModeFileType};

use crate::assets::Kernel;

/// An archive under construction. Its bytes depend only on the entries: they are sorted, owned by root, and
/// without times.
#[derive(Clone, Default)]
pub struct Initrd {
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone)]
enum Entry {
    Directory,
    File { mode: u32, contents: Vec<u8> },
}

impl Initrd {
    /// Adds a file and its parent directories. `path` may start with `/`.
    pub fn file(&mut self, path: &str, mode: u32, contents: impl Into<Vec<u8>>) -> &mut Self {
        let path = path.trim_start_matches('/');
        for (slash, _) in path.match_indices('/') {
            self.entries.insert(path[..slash].into(), Entry::Directory);
        }
        self.entries.insert(
            path.into(),
            Entry::File {
                mode,
                contents: contents.into(),
            },
        );
        self
    }

    /// Adds a kernel's modules and the list from which pigeon-init loads them.
    pub fn modules(&mut self, kernel: &Kernel) -> Result<&mut Self> {
        self.modules_and(kernel, &[])
    }

    /// The same with these modules and their dependencies at the end of the list.
    pub fn modules_and(&mut self, kernel: &Kernel, more: &[String]) -> Result<&mut Self> {
        let mut list = String::new();
        for (name, contents) in kernel.modules_and(more)? {
            let path = format!("/pigeon/lib/{name}");
            list += &format!("{path}\n");
            self.file(&path, 0o644, contents);
        }
        Ok(self.file("/pigeon/modules", 0o644, list))
    }

    /// Appends these files to another archive.
    pub fn on_top_of(&self, mut archive: Vec<u8>) -> Vec<u8> {
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(self.archive());
        archive
    }

    /// The archive. A concatenation of archives is one initramfs; a later file replaces an earlier one with
    /// the same name.
    pub fn archive(&self) -> Vec<u8> {
        // A directory sorts before its contents, as the kernel requires.
        let inputs = self.entries.iter().map(|(path, entry)| match entry {
            Entry::Directory => (
                Builder::new(path)
                    .mode(0o755)
                    .set_mode_file_type(ModeFileType::Directory)
                    .nlink(2),
                &[][..],
            ),
            Entry::File { mode, contents } => (
                Builder::new(path)
                    .mode(*mode)
                    .set_mode_file_type(ModeFileType::Regular)
                    .nlink(1),
                contents.as_slice(),
            ),
        });
        let mut archive = Vec::new();
        for (header, contents) in inputs {
            let size = contents
                .len()
                .try_into()
                .expect("newc files are at most 4 GiB");
            let mut writer = header.write(&mut archive, size);
            io::Write::write_all(&mut writer, contents)
                .and_then(|()| writer.finish())
                .expect("a Vec takes all that is written");
        }
        newc::trailer(&mut archive).expect("a Vec takes all that is written");
        archive
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_their_entries() {
        let mut initrd = Initrd::default();
        initrd
            .file("/pigeon/lib/a.ko", 0o644, "A")
            .file("init", 0o755, "I");
        let archive = initrd.archive();
        assert_eq!(archive.len() % 4, 0);

        let (mut rest, mut seen) = (archive.as_slice(), vec![]);
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                break;
            }
            let (name, mode) = (entry.name().to_string(), entry.mode());
            let mut contents = String::new();
            io::Read::read_to_string(&mut reader, &mut contents).unwrap();
            seen.push((name, mode, contents));
            rest = reader.finish().unwrap();
        }
        let expected = [
            ("init", 0o100755, "I"),
            ("pigeon", 0o040755, ""),
            ("pigeon/lib", 0o040755, ""),
            ("pigeon/lib/a.ko", 0o100644, "A"),
        ];
        assert_eq!(
            seen,
            expected.map(|(n, m, c)| (n.to_string(), m, c.to_string()))
        );
    }
}
