//! Lists the contents of a directory or an image with other programs.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

use pigeon::{assets::tool, process::run};
use sha2::{Digest, Sha256};

/// A file, with everything that a guest can see.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// Type and permission bits.
    pub mode: u32,
    pub owner: (u32, u32),
    /// Link count; 0 for a directory, for which file systems differ.
    pub links: u64,
    pub mtime: (i64, i64),
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// A digest, a link's target, or a device number.
    pub contents: String,
}

pub type Listing = BTreeMap<PathBuf, Record>;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All files below a directory, by path; the directory itself is "".
pub fn of_directory(root: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let place = root.join(&path);
        let found = place.symlink_metadata().unwrap();
        let kind = found.file_type();
        let contents = if kind.is_file() {
            hex(&Sha256::digest(fs::read(&place).unwrap()))
        } else if kind.is_symlink() {
            format!("{}", fs::read_link(&place).unwrap().display())
        } else if kind.is_dir() {
            for entry in fs::read_dir(&place).unwrap() {
                todo.push(path.join(entry.unwrap().file_name()));
            }
            String::new()
        } else {
            let (major, minor) = (
                rustix::fs::major(found.rdev()),
                rustix::fs::minor(found.rdev()),
            );
            format!("{major}:{minor}")
        };
        let record = Record {
            mode: found.mode(),
            owner: (found.uid(), found.gid()),
            links: if kind.is_dir() { 0 } else { found.nlink() },
            mtime: (found.mtime(), found.mtime_nsec()),
            xattrs: xattrs(&place),
            contents,
        };
        listing.insert(path, record);
    }
    listing
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let size = rustix::fs::llistxattr(path, &mut names).unwrap();
    let names = names[..size].split(|&byte| byte == 0);
    let value = |name: &[u8]| {
        let mut value = vec![0; 1 << 16];
        let size = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
        value.truncate(size);
        (String::from_utf8(name.to_vec()).unwrap(), value)
    };
    names.filter(|name| !name.is_empty()).map(value).collect()
}

/// The files at these paths in an ext4 image, by e2fsprogs, and the number of all files.
pub fn of_ext4<'a>(image: &Path, paths: impl Iterator<Item = &'a PathBuf>) -> (Listing, u64) {
    let scratch = tempfile::tempdir().unwrap();
    let debugfs = |requests: &[String]| {
        let script = scratch.path().join("requests");
        fs::write(&script, requests.join("\n") + "\n").unwrap();
        let mut command = Command::new(tool("debugfs").unwrap());
        command.arg("-f").arg(script).arg(image);
        run(&mut command).unwrap()
    };
    let paths: Vec<_> = paths.collect();
    let stats: Vec<_> = paths
        .iter()
        .map(|path| format!("stat \"/{}\"", path.display()))
        .collect();
    let output = debugfs(&stats);
    let mut answers = output.split("debugfs: stat ").skip(1);
    let mut listing = Listing::new();
    let mut values = vec![];
    for path in &paths {
        let answer = answers.next().unwrap();
        let after = |key: &str| {
            let rest = answer.split_once(key).map(|(_, rest)| rest);
            let rest = rest.unwrap_or_else(|| panic!("no {key} of {path:?}: {answer}"));
            rest.split_whitespace().next().unwrap_or_default()
        };
        let kind = match after("Type:") {
            "regular" => 0o100_000,
            "directory" => 0o040_000,
            "symlink" => 0o120_000,
            "FIFO" => 0o010_000,
            "character" => 0o020_000,
            "block" => 0o060_000,
            other => panic!("{other}"),
        };
        let number = |key| after(key).parse::<u64>().unwrap();
        let (seconds, extra) = after(" mtime: 0x").split_once(':').unwrap();
        let [seconds, extra] = [seconds, extra].map(|hex| u32::from_str_radix(hex, 16).unwrap());
        let epoch = i64::from(extra & 3) << 32;
        let mut record = Record {
            mode: kind | u32::from_str_radix(after("Mode:"), 8).unwrap(),
            owner: (number("User:") as u32, number("Group:") as u32),
            links: number("Links:"),
            mtime: (i64::from(seconds as i32) + epoch, i64::from(extra >> 2)),
            ..Record::default()
        };
        match kind {
            0o040_000 => record.links = 0,
            0o100_000 => {
                let copy = scratch.path().join(format!("contents{}", values.len()));
                values.push((*path, None, copy));
            }
            0o120_000 => {
                record.contents = match answer.split_once("Fast link dest: \"") {
                    Some((_, rest)) => rest[..rest.rfind('"').unwrap()].into(),
                    None => {
                        let copy = scratch.path().join(format!("contents{}", values.len()));
                        values.push((*path, None, copy));
                        String::new()
                    }
                }
            }
            0o010_000 => record.contents = "0:0".into(),
            _ => {
                let device = after("Device major/minor number:");
                let (major, minor) = device.split_once(':').unwrap();
                let [major, minor] = [major, minor].map(|text| text.parse::<u32>().unwrap());
                record.contents = format!("{major}:{minor}");
            }
        }
        if let Some((_, rest)) = answer.split_once("Extended attributes:\n") {
            for line in rest.lines().take_while(|line| line.starts_with("  ")) {
                let name = line.trim_start().split(" (").next().unwrap();
                let copy = scratch.path().join(format!("contents{}", values.len()));
                values.push((*path, Some(name.to_string()), copy));
            }
        }
        listing.insert((*path).clone(), record);
    }
    let requests = values.iter().map(|(path, attribute, copy)| {
        let (path, copy) = (path.display(), copy.display());
        match attribute {
            None => format!("dump \"/{path}\" {copy}"),
            Some(name) => format!("ea_get -f {copy} \"/{path}\" {name}"),
        }
    });
    debugfs(&requests.collect::<Vec<_>>());
    for (path, attribute, copy) in &values {
        let bytes = fs::read(copy).unwrap_or_default();
        let record = listing.get_mut(*path).unwrap();
        match attribute {
            Some(name) => drop(record.xattrs.insert(name.clone(), bytes)),
            None if record.mode & 0o170_000 == 0o120_000 => {
                record.contents = String::from_utf8(bytes).unwrap();
            }
            None => record.contents = hex(&Sha256::digest(bytes)),
        }
    }
    let superblock = super::debugfs(image, "show_super_stats -h");
    let count = |key: &str| -> u64 {
        let line = superblock.lines().find(|line| line.starts_with(key));
        line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
    };
    // The first ten inodes are reserved, and one of them is the root.
    let files = count("Inode count:") - count("Free inodes:") - 9;
    (listing, files)
}

/// All files of a squashfs image, by squashfs-tools.
pub fn of_squashfs(image: &Path) -> Listing {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("files");
    run(Command::new(tool("unsquashfs").unwrap())
        .args(["-no-progress", "-d"])
        .arg(&dir)
        .arg(image))
    .unwrap();
    of_directory(&dir)
}

/// All files of an EROFS image, by erofs-utils, which extracts neither attributes nor links.
pub fn of_erofs(image: &Path) -> Listing {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("files");
    run(Command::new(tool("fsck.erofs").unwrap())
        .arg(format!("--extract={}", dir.display()))
        .arg("--preserve-perms")
        .arg(image))
    .unwrap();
    of_directory(&dir)
}
