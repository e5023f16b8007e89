//! A digest of a directory's contents, by which an image of the same contents can be found again.

use std::{
    io::{self, Read},
    path::Path,
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::{
    layer::{self, Layer},
    tree::{Entry, Kind},
};

/// The hexadecimal SHA-256 of a directory's files: paths, owners, modes, attributes, links, devices,
/// contents, and times. Times of directories are excluded: they are those of the copy.
pub fn of(directory: &Path) -> Result<String> {
    let mut digest = Sha256::new();
    Layer::directory(directory)?.read(&mut |_| (), |_, entry, body| {
        let path = entry.path.escape_ascii().to_string();
        describe(&entry, &mut digest);
        for (offset, length) in body.pieces {
            digest.update(offset.to_le_bytes());
            digest.update(length.to_le_bytes());
        }
        let size = match entry.kind {
            Kind::File { data, .. } => data,
            _ => 0,
        };
        let read = digest_all(&mut body.bytes.take(size), &mut digest);
        let read = read.with_context(|| format!("unable to read {path}"))?;
        // Separates the contents of a file that shrinks meanwhile from the next file's.
        digest.update(read.to_le_bytes());
        Ok(())
    })?;
    Ok(layer::hex(&digest.finalize()))
}

/// Returns the number of bytes.
fn digest_all(bytes: &mut dyn Read, digest: &mut Sha256) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 16];
    let mut read = 0;
    loop {
        match bytes.read(&mut buffer)? {
            0 => return Ok(read),
            size => {
                digest.update(&buffer[..size]);
                read += size as u64;
            }
        }
    }
}

/// Everything but the contents, each with its length.
fn describe(entry: &Entry, digest: &mut Sha256) {
    let mut add = |bytes: &[u8]| {
        digest.update((bytes.len() as u64).to_le_bytes());
        digest.update(bytes);
    };
    let meta = &entry.meta;
    add(&entry.path);
    for number in [meta.mode, meta.uid, meta.gid] {
        add(&number.to_le_bytes());
    }
    for (name, value) in &meta.xattrs {
        add(name.as_bytes());
        add(value);
    }
    add(b"");
    if !matches!(entry.kind, Kind::Directory) {
        add(&meta.mtime.seconds.to_le_bytes());
        add(&meta.mtime.nanoseconds.to_le_bytes());
    }
    match &entry.kind {
        Kind::Directory => add(b"directory"),
        Kind::File { size, data } => {
            add(b"file");
            add(&size.to_le_bytes());
            add(&data.to_le_bytes());
        }
        Kind::HardLink(first) => {
            add(b"hard link");
            add(first);
        }
        Kind::Symlink(target) => {
            add(b"symlink");
            add(target);
        }
        Kind::Device(device) => {
            add(if device.character { b"c" } else { b"b" });
            add(&device.major.to_le_bytes());
            add(&device.minor.to_le_bytes());
        }
        Kind::Fifo => add(b"fifo"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
        path::PathBuf,
        time::{Duration, SystemTime},
    };

    /// A directory whose files have individual times.
    fn copy(parent: &Path, name: &str) -> PathBuf {
        let dir = parent.join(name);
        fs::create_dir_all(dir.join("etc")).unwrap();
        for (file, text) in [("etc/a", "text"), ("etc/b", "more")] {
            fs::write(dir.join(file), text).unwrap();
            let file = fs::File::options().write(true).open(dir.join(file));
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
            file.unwrap().set_modified(time).unwrap();
        }
        dir
    }

    #[test]
    fn equal_copies_have_equal_fingerprints_and_changed_ones_differ() {
        let parent = tempfile::tempdir().unwrap();
        let first = copy(parent.path(), "first");
        let of = |dir: &Path| super::of(dir).unwrap();
        let expected = of(&first);
        assert_eq!(expected.len(), 64);
        assert_eq!(of(&copy(parent.path(), "second")), expected);

        type Change = fn(&Path);
        let changes: [(&str, Change); 7] = [
            ("contents", |dir| {
                let file = fs::File::options().write(true).open(dir.join("etc/a"));
                let mut file = file.unwrap();
                let time = file.metadata().unwrap().modified().unwrap();
                io::Write::write_all(&mut file, b"tezt").unwrap();
                file.set_modified(time).unwrap();
            }),
            ("time", |dir| {
                let file = fs::File::options().write(true).open(dir.join("etc/a"));
                file.unwrap().set_modified(SystemTime::now()).unwrap();
            }),
            ("mode", |dir| {
                let mode = fs::Permissions::from_mode(0o4755);
                fs::set_permissions(dir.join("etc/a"), mode).unwrap();
            }),
            ("name", |dir| {
                fs::rename(dir.join("etc/a"), dir.join("a")).unwrap();
            }),
            ("symlink", |dir| symlink("etc/a", dir.join("link")).unwrap()),
            ("hard link", |dir| {
                fs::hard_link(dir.join("etc/a"), dir.join("link")).unwrap();
            }),
            ("directory", |dir| {
                fs::create_dir(dir.join("empty")).unwrap();
            }),
        ];
        let mut seen = vec![expected];
        for (what, change) in changes {
            let dir = copy(parent.path(), what);
            change(&dir);
            let found = of(&dir);
            assert!(!seen.contains(&found), "{what}");
            seen.push(found);
        }
    }
}
