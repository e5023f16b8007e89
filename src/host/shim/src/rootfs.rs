//! A container's root: what containerd's snapshotter would mount, as an EROFS image.

use std::{
    collections::BTreeSet,
    ffi::CString,
    fs,
    path::{Path, PathBuf},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::Mount;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::images::{Images, Layers, pack};

/// The image in a container's directory, before it is shared.
const IMAGE: &str = "root.erofs";

/// A container's root.
#[derive(Debug, PartialEq)]
enum Root {
    /// Directories of an overlay, the highest first, with an empty upper directory.
    Layers(Vec<PathBuf>),
    /// Mounts from containerd.
    Mounts(Vec<Mount>),
    /// An existing directory.
    Directory(PathBuf),
}

/// The image of a container's root. It is shared, or in `dir`, the container's directory. `directory` is the
/// root if containerd mounts nothing.
pub fn image(mounts: &[Mount], directory: &Path, dir: &Path) -> Result<PathBuf> {
    let root = Root::of(mounts, directory)?;
    let images = Images::open()?;
    let made = dir.join(IMAGE);
    let image = match root.layers() {
        Some(layers) => images.of_layers(&layers, &made, || {
            root.read(dir, |source| pack(source, &made))
        }),
        None => root.read(dir, |source| images.of_contents(source, &made)),
    };
    image.context("unable to make the root's image")
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
                // Files that an engine has written before the start belong only to this container.
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

    /// The layers that identify it without reading its contents, if there are any.
    fn layers(&self) -> Option<Layers> {
        match self {
            Root::Layers(layers) => Layers::of(layers),
            _ => None,
        }
    }

    /// Calls `read` with its path, in a thread with a separate mount namespace, so that no mount can be left
    /// behind.
    fn read<T: Send>(&self, dir: &Path, read: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let place = Place::new(dir)?;
                read(&self.mount(&place)?)
            });
            match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("the thread that reads the root panicked"),
            }
        })
    }

    /// Mounts it in the thread's namespace, and returns its path.
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
            // All others are file system options.
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

/// Empty directories for mounts.
struct Place {
    dirs: [PathBuf; 3],
}

impl Place {
    /// Creates them in a container's directory.
    fn new(dir: &Path) -> Result<Place> {
        let dir = dir.join("mounts");
        let [root, empty] = ["root", "empty"].map(|name| dir.join(name));
        fs::create_dir_all(&root)?;
        fs::create_dir_all(&empty)?;
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
        // There may be any number of mounts.
        while unmount(self.root(), UnmountFlags::DETACH).is_ok() {}
        for dir in &self.dirs {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Gives this thread a private mount namespace.
fn private_namespace() -> Result<()> {
    // SAFETY: the thread still shares descriptors and signal handlers, and nothing relies on its working
    // directory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("unable to get a mount namespace")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", private)?)
}

/// Mounts layers, the highest first, read-only.
fn overlay(layers: &[PathBuf], place: &Place) -> Result<PathBuf> {
    private_namespace()?;
    // Mount options are limited to a page, so paths are relative to the layers' common parent.
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
    // An overlay needs at least two layers.
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

/// The deepest common parent of all layers.
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
    fn layers_without_writes_are_shared() {
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
    fn layer_paths_are_relative_to_their_common_parent() {
        let of = |layers: &[&str]| {
            let layers: Vec<_> = layers.iter().map(PathBuf::from).collect();
            common_parent(&layers)
        };
        assert_eq!(of(&["/s/1/fs", "/s/22/fs"]), Path::new("/s"));
        assert_eq!(of(&["/s/1/fs"]), Path::new("/s/1"));
        assert_eq!(of(&["/a/fs", "/b/fs"]), Path::new("/"));
    }
}
