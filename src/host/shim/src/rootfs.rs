//! Root images: what containerd's snapshotter would have mounted, as an erofs image.
//!
//! The image of an overlay's lower layers is made once and shared. Its name is a digest of the layers'
//! paths, devices, inodes and times of birth: committed snapshots do not change, and a directory that
//! takes another's place has another time of birth. What has no such identity (a snapshotter that
//! copies; a file system without times of birth) is packed for each container.

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::Mount;
use pigeon::image::{self, disk::Format};
use rustix::{
    fs::{AtFlags, CWD, StatxFlags},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};
use serde::{Deserialize, Serialize};

use crate::state;

/// The shared images' directory in the state's.
const IMAGES: &str = "images";
/// Beside an image: what it was made of.
const SOURCES: &str = "json";

/// A container's root.
#[derive(Debug, PartialEq)]
enum Root {
    /// Directories of an overlay, the highest first, and nothing written on top of them.
    Layers(Vec<PathBuf>),
    /// Mounts as containerd has them.
    Mounts(Vec<Mount>),
    /// A directory that is there.
    Directory(PathBuf),
}

/// What tells a directory from any that was or will be at its path.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Identity {
    path: PathBuf,
    device: (u32, u32),
    inode: u64,
    /// Seconds and nanoseconds.
    born: (i64, u32),
}

/// The image of a container's root: a shared one, or one in `dir`, the container's directory.
/// `directory` is the root where containerd mounts nothing.
pub fn image(mounts: &[Mount], directory: &Path, dir: &Path) -> Result<PathBuf> {
    let root = Root::of(mounts, directory)?;
    if let Root::Layers(layers) = &root
        && let Some(identities) = layers.iter().map(|layer| Identity::of(layer)).collect()
    {
        return shared(&root, identities);
    }
    let image = dir.join("root.erofs");
    root.pack(&image)?;
    Ok(image)
}

/// The shared image of these layers, which is made if it is not there.
fn shared(root: &Root, identities: Vec<Identity>) -> Result<PathBuf> {
    let text = serde_json::to_string(&identities)?;
    let images = state::root().join(IMAGES);
    let image = images.join(format!("{}.erofs", state::digest(&[&text])));
    if image.exists() {
        return Ok(image);
    }
    state::create(&images)?;
    // One makes it, and others that want it wait.
    let lock = File::create(image.with_extension("lock"))?;
    lock.lock()?;
    if !image.exists() {
        remove_unused(&images);
        fs::write(image.with_extension(SOURCES), &text)?;
        root.pack(&image)?;
    }
    Ok(image)
}

/// Removes images whose layers are gone: containerd has removed the container image. VMs that run
/// have theirs open.
fn remove_unused(images: &Path) {
    let Ok(entries) = fs::read_dir(images) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path
            .extension()
            .is_none_or(|extension| extension != SOURCES)
        {
            continue;
        }
        let text = fs::read(&path).unwrap_or_default();
        let identities: Vec<Identity> = serde_json::from_slice(&text).unwrap_or_default();
        let is_there = |identity: &Identity| {
            Identity::of(&identity.path).is_some_and(|found| found == *identity)
        };
        if identities.is_empty() || !identities.iter().all(is_there) {
            for extension in ["erofs", "lock", SOURCES] {
                let _ = fs::remove_file(path.with_extension(extension));
            }
        }
    }
}

impl Identity {
    /// None where the file system has no times of birth.
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

impl Root {
    fn of(mounts: &[Mount], directory: &Path) -> Result<Root> {
        let [mount] = mounts else {
            return Ok(match mounts.is_empty() {
                true => Root::Directory(directory.into()),
                false => Root::Mounts(mounts.into()),
            });
        };
        let option = |name: &str| {
            let mut options = mount.options.iter();
            options.find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
        };
        match mount.type_.as_str() {
            "bind" | "rbind" => Ok(Root::Directory(PathBuf::from(&mount.source))),
            "overlay" => {
                let lower = option("lowerdir").context("an overlay without lowerdir")?;
                let layers = lower.split(':').map(PathBuf::from).collect();
                // What an engine has written before the start belongs to this container.
                let is_written = match option("upperdir") {
                    Some(upper) => fs::read_dir(upper)
                        .with_context(|| format!("unable to read {upper}"))?
                        .next()
                        .is_some(),
                    None => false,
                };
                Ok(match is_written {
                    true => Root::Mounts(mounts.into()),
                    false => Root::Layers(layers),
                })
            }
            _ => Ok(Root::Mounts(mounts.into())),
        }
    }

    /// Packs it into an image, in a mount namespace of a thread of its own: whatever happens, no
    /// mount is left.
    fn pack(&self, image: &Path) -> Result<()> {
        thread::scope(|scope| {
            let packed = scope.spawn(|| {
                let place = Place::new()?;
                let source = self.mount(&place)?;
                image::pack(&source, image, Format::Erofs).map(drop)
            });
            match packed.join() {
                Ok(result) => result.context("unable to make the root's image"),
                Err(_) => bail!("the thread that makes the root's image panicked"),
            }
        })
    }

    /// Where it is to be read, in the thread's own namespace.
    fn mount(&self, place: &Place) -> Result<PathBuf> {
        let mounts = match self {
            Root::Directory(directory) => return Ok(directory.clone()),
            Root::Layers(layers) => return overlay(layers, place),
            Root::Mounts(mounts) => mounts,
        };
        private_namespace()?;
        let target = place.root();
        for entry in mounts {
            let flags = match entry.type_.as_str() {
                "bind" | "rbind" => MountFlags::BIND | MountFlags::REC,
                _ => MountFlags::RDONLY,
            };
            // All others are options of the file system's own.
            let words = ["ro", "rw", "bind", "rbind"];
            let options = entry.options.iter().map(String::as_str);
            let data: Vec<_> = options.filter(|option| !words.contains(option)).collect();
            let data = CString::new(data.join(","))?;
            let mounted = mount(
                &*entry.source,
                target,
                &*entry.type_,
                flags,
                data.as_c_str(),
            );
            mounted
                .with_context(|| format!("unable to mount {} ({})", entry.source, entry.type_))?;
        }
        Ok(target.into())
    }
}

/// Empty directories to mount on.
struct Place {
    dirs: [PathBuf; 3],
}

impl Place {
    fn new() -> Result<Place> {
        // What is mounted is never to be removed with what is in it.
        let dir = tempfile::tempdir()?.keep();
        let [root, empty] = ["root", "empty"].map(|name| dir.join(name));
        fs::create_dir(&root)?;
        fs::create_dir(&empty)?;
        Ok(Place {
            dirs: [root, empty, dir],
        })
    }

    fn root(&self) -> &Path {
        &self.dirs[0]
    }

    fn empty(&self) -> &Path {
        &self.dirs[1]
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // There may be several, or none.
        while unmount(self.root(), UnmountFlags::DETACH).is_ok() {}
        for dir in &self.dirs {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Mounts of this thread alone.
fn private_namespace() -> Result<()> {
    // SAFETY: the thread does not share its descriptors' table or its signal handlers anew, and its
    // own working directory is nobody else's to rely on.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("unable to get a mount namespace")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", private)?)
}

/// Mounts layers, the highest first, read-only.
fn overlay(layers: &[PathBuf], place: &Place) -> Result<PathBuf> {
    private_namespace()?;
    // Options of a mount have a page at most: names are relative to what the layers have in common.
    let common = common_parent(layers);
    std::env::set_current_dir(&common)?;
    let mut names = BTreeSet::new();
    let mut lower = String::new();
    for layer in layers {
        let name = layer.strip_prefix(&common)?.to_str().context("not UTF-8")?;
        ensure!(names.insert(name), "a layer is there twice: {name}");
        ensure!(
            !name.contains([',', '\\']),
            "{name}: a layer's name has ',' or '\\'"
        );
        lower += &format!("{name}:");
    }
    // One layer alone is no overlay.
    lower += place.empty().to_str().context("not UTF-8")?;
    let options = CString::new(format!("lowerdir={lower}"))?;
    mount(
        "overlay",
        place.root(),
        "overlay",
        MountFlags::RDONLY,
        options.as_c_str(),
    )
    .context("unable to mount the layers")?;
    Ok(place.root().into())
}

/// The deepest directory in which all layers lie.
fn common_parent(layers: &[PathBuf]) -> PathBuf {
    let mut common = match layers.first().and_then(|layer| layer.parent()) {
        Some(parent) => parent.to_path_buf(),
        None => return PathBuf::from("/"),
    };
    while !layers
        .iter()
        .all(|layer| layer != &common && layer.starts_with(&common))
    {
        if !common.pop() {
            return PathBuf::from("/");
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn overlay_of(lower: &str, upper: &Path) -> Mount {
        let upper = format!("upperdir={}", upper.display());
        Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec!["index=off".into(), upper, format!("lowerdir={lower}")],
            ..Mount::default()
        }
    }

    #[test]
    fn layers_below_nothing_written_are_shared() {
        let dir = tempfile::tempdir().unwrap();
        let root = |mounts: &[Mount]| Root::of(mounts, Path::new("/bundle/rootfs")).unwrap();
        let mounts = [overlay_of("/s/3/fs:/s/1/fs", dir.path())];
        let expected = Root::Layers(vec!["/s/3/fs".into(), "/s/1/fs".into()]);
        assert_eq!(root(&mounts), expected);
        fs::write(dir.path().join("written"), "").unwrap();
        assert_eq!(root(&mounts), Root::Mounts(mounts.to_vec()));
        assert_eq!(root(&[]), Root::Directory("/bundle/rootfs".into()));
    }

    #[test]
    fn a_directory_at_the_place_of_another_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs");
        fs::create_dir(&path).unwrap();
        let Some(first) = Identity::of(&path) else {
            return; // a file system without times of birth
        };
        assert_eq!(Identity::of(&path), Some(first));
        let first = Identity::of(&path);
        fs::remove_dir(&path).unwrap();
        // Times of files are those of the kernel's last tick: no two snapshots come so close.
        thread::sleep(Duration::from_millis(20));
        fs::create_dir(&path).unwrap();
        assert_ne!(Identity::of(&path), first);
        assert_eq!(Identity::of(&dir.path().join("none")), None);
    }

    #[test]
    fn names_of_layers_are_relative_to_what_they_have_in_common() {
        let of = |layers: &[&str]| {
            let layers: Vec<_> = layers.iter().map(PathBuf::from).collect();
            common_parent(&layers)
        };
        assert_eq!(of(&["/s/1/fs", "/s/22/fs"]), Path::new("/s"));
        assert_eq!(of(&["/s/1/fs"]), Path::new("/s/1"));
        assert_eq!(of(&["/a/fs", "/b/fs"]), Path::new("/"));
    }
}
