//! Root images that containers share, in the state directory.
//!
//! The image of an overlay's lower layers is named by a digest of the layers' paths, devices, inodes and birth
//! times: committed snapshots do not change, and a directory that replaces another one has another birth time.
//! Any other root, such as the copy of a snapshotter without layers, is read completely, and its image is named
//! by a digest of its contents.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use pigeon::image::{self, disk::Format, fingerprint};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use serde::{Deserialize, Serialize};

use crate::state;

/// The images' directory in the state's.
const IMAGES: &str = "images";
/// The file next to an image with its layers' identities.
const LAYERS: &str = "json";
/// How long an unused image without layers is kept.
const UNUSED: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The directory of shared images.
pub struct Images(PathBuf);

/// Identifies a directory during its lifetime; a path can be reused.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Identity {
    path: PathBuf,
    device: (u32, u32),
    inode: u64,
    /// Seconds and nanoseconds.
    born: (i64, u32),
}

/// Immutable directories that identify an image.
pub struct Layers(Vec<Identity>);

impl Layers {
    /// None if the file system has no birth times.
    pub fn of(paths: &[PathBuf]) -> Option<Layers> {
        let identities = paths.iter().map(|path| Identity::of(path));
        Some(Layers(identities.collect::<Option<_>>()?))
    }
}

impl Images {
    /// Opens the directory of shared images.
    pub fn open() -> Result<Images> {
        let dir = state::root().join(IMAGES);
        state::create(&dir)?;
        Ok(Images(dir))
    }

    /// The image of these layers. If there is none, `pack` makes it at `made`.
    pub fn of_layers(
        &self,
        layers: &Layers,
        made: &Path,
        pack: impl FnOnce() -> Result<()>,
    ) -> Result<PathBuf> {
        let text = serde_json::to_string(&layers.0)?;
        let image = self.path(&state::digest(&[&text]));
        if image.exists() {
            return Ok(image);
        }
        let _lock = lock(&image)?;
        if !image.exists() {
            self.remove_unused();
            pack()?;
            fs::write(image.with_extension(LAYERS), &text)?;
            fs::rename(made, &image)?;
        }
        Ok(image)
    }

    /// The image of a directory's contents, made at `made` if there is none. It stays there, unshared, if the
    /// directory has changed meanwhile.
    pub fn of_contents(&self, directory: &Path, made: &Path) -> Result<PathBuf> {
        let digest = fingerprint::of(directory)?;
        let image = self.path(&digest);
        let _lock = lock(&image)?;
        if image.exists() {
            File::open(&image)?.set_modified(SystemTime::now())?;
            return Ok(image);
        }
        self.remove_unused();
        pack(directory, made)?;
        if fingerprint::of(directory)? != digest {
            return Ok(made.into());
        }
        fs::rename(made, &image)?;
        Ok(image)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.erofs"))
    }

    /// Removes images whose layers no longer exist, because containerd has removed the container image, and
    /// images without layers that were not used for long. Running VMs keep theirs open.
    fn remove_unused(&self) {
        let Ok(entries) = fs::read_dir(&self.0) else {
            return;
        };
        for entry in entries.flatten() {
            let image = entry.path();
            if image
                .extension()
                .is_none_or(|extension| extension != "erofs")
            {
                continue;
            }
            let is_used = match fs::read(image.with_extension(LAYERS)) {
                Ok(text) => are_there(&text),
                Err(_) => entry.metadata().is_ok_and(|found| is_recent(&found)),
            };
            if !is_used {
                for extension in ["erofs", "lock", LAYERS] {
                    let _ = fs::remove_file(image.with_extension(extension));
                }
            }
        }
    }
}

/// Packs a directory as an image.
pub fn pack(directory: &Path, image: &Path) -> Result<()> {
    image::pack(directory, image, Format::Erofs).map(drop)
}

/// Lets one process at a time make an image; others wait for it.
fn lock(image: &Path) -> Result<File> {
    let lock = File::create(image.with_extension("lock"))?;
    lock.lock().context("unable to lock the root's image")?;
    Ok(lock)
}

/// Whether all listed layers are unchanged.
fn are_there(text: &[u8]) -> bool {
    let layers: Vec<Identity> = serde_json::from_slice(text).unwrap_or_default();
    let is_there = |layer: &Identity| Identity::of(&layer.path).as_ref() == Some(layer);
    !layers.is_empty() && layers.iter().all(is_there)
}

/// Whether a file was used lately, or the clock was set back.
fn is_recent(file: &fs::Metadata) -> bool {
    let used = file.modified().ok();
    let age = used.and_then(|used| SystemTime::now().duration_since(used).ok());
    age.is_none_or(|age| age < UNUSED)
}

impl Identity {
    fn of(path: &Path) -> Option<Identity> {
        let wanted = StatxFlags::INO | StatxFlags::BTIME;
        let found = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, wanted).ok()?;
        let has = StatxFlags::from_bits_retain(found.stx_mask);
        has.contains(wanted).then(|| Identity {
            path: path.into(),
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            born: (found.stx_btime.tv_sec, found.stx_btime.tv_nsec),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn a_replaced_directory_gets_a_new_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs");
        fs::create_dir(&path).unwrap();
        let Some(first) = Identity::of(&path) else {
            return; // a file system without birth times
        };
        assert_eq!(Identity::of(&path).as_ref(), Some(&first));
        fs::remove_dir(&path).unwrap();
        // File times have the resolution of the kernel's tick: real snapshots are never that close.
        thread::sleep(Duration::from_millis(20));
        fs::create_dir(&path).unwrap();
        assert_ne!(Identity::of(&path), Some(first));
        assert_eq!(Identity::of(&dir.path().join("none")), None);
    }

    /// A directory to pack, and the path for its image.
    fn place(parent: &Path, name: &str, text: &str) -> (PathBuf, PathBuf) {
        let dir = parent.join(name);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("file"), text).unwrap();
        let file = File::open(dir.join("file")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        (dir, parent.join(format!("{name}.made")))
    }

    #[test]
    fn equal_copies_share_an_image() {
        let parent = tempfile::tempdir().unwrap();
        let images = Images(parent.path().join("images"));
        fs::create_dir(&images.0).unwrap();
        let image_of = |name: &str, text: &str| {
            let (dir, made) = place(parent.path(), name, text);
            let image = images.of_contents(&dir, &made).unwrap();
            assert!(!made.exists());
            image
        };
        let first = image_of("a", "text");
        let bytes = fs::read(&first).unwrap();
        fs::write(&first, "made once").unwrap();
        assert_eq!(image_of("b", "text"), first);
        assert_eq!(fs::read(&first).unwrap(), b"made once");
        // Same length and time.
        let other = image_of("c", "tezt");
        assert_ne!(other, first);
        assert_ne!(fs::read(&other).unwrap(), bytes);
    }

    #[test]
    fn an_unused_image_without_layers_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let images = Images(parent.path().join("images"));
        fs::create_dir(&images.0).unwrap();
        let make = |name: &str, text: &str| {
            let (dir, made) = place(parent.path(), name, text);
            images.of_contents(&dir, &made).unwrap()
        };
        let age = |image: &Path| {
            let time = SystemTime::now() - 2 * UNUSED;
            File::open(image).unwrap().set_modified(time).unwrap();
        };
        let [old, used] = ["1", "2"].map(|text| make(text, text));
        age(&old);
        age(&used);
        make("2", "2");
        make("3", "3");
        assert!(!old.exists() && used.exists());
        assert_eq!(fs::read_dir(&images.0).unwrap().count(), 4);
    }

    #[test]
    fn a_failed_packing_leaves_no_image() {
        let parent = tempfile::tempdir().unwrap();
        let images = Images(parent.path().into());
        let (dir, _) = place(parent.path(), "a", "text");
        let made = parent.path().join("none/made");
        assert!(images.of_contents(&dir, &made).is_err());
        let layers = Layers::of(std::slice::from_ref(&dir)).unwrap();
        let failed = images.of_layers(&layers, &made, || anyhow::bail!("a full disk"));
        assert!(failed.is_err());
        let mut names = fs::read_dir(&images.0).unwrap();
        assert!(names.all(|entry| {
            let name = entry.unwrap().file_name();
            name == "a" || name.to_str().unwrap().ends_with(".lock")
        }));
    }
}
