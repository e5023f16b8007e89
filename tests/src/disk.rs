//! Guest disks: ext4 images made from trees of files, and what is in them after a boot.

use std::{
    fmt::Write as _,
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
pub use pigeon::machine::Disk;
use tempfile::{NamedTempFile, TempDir, TempPath};

use crate::{assets, process::run};

/// `/etc/passwd` of [`Tree::busybox`].
const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
app:x:1000:1000:app:/home/app:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
";

/// `/etc/group` of [`Tree::busybox`]: app is in two groups besides its own.
const GROUP: &str = "\
root:x:0:
daemon:x:1:
tty:x:5:
video:x:44:app,daemon
staff:x:50:app
app:x:1000:
nogroup:x:65534:
";

/// Files to make a disk of, staged in a directory of the host.
pub struct Tree {
    stage: TempDir,
    /// `chown` commands to run under fakeroot, where all else belongs to root.
    owners: String,
}

impl Tree {
    /// Nothing but the root directory.
    pub fn empty() -> Result<Tree> {
        let tree = Tree {
            stage: tempfile::tempdir()?,
            owners: String::new(),
        };
        fs::set_permissions(tree.stage.path(), Permissions::from_mode(0o755))?;
        Ok(tree)
    }

    /// A root file system: busybox with all its applets in `/bin`, the usual directories, the
    /// users root, daemon, app and nobody.
    pub fn busybox() -> Result<Tree> {
        let mut tree = Tree::empty()?;
        for dir in [
            "dev", "etc", "mnt", "proc", "root", "run", "sys", "usr/bin", "var",
        ] {
            tree = tree.dir(dir, 0o755)?;
        }
        let busybox = assets::busybox()?;
        tree = tree
            .dir("tmp", 0o1777)?
            .file("bin/busybox", 0o755, fs::read(&busybox)?)?
            .file("etc/passwd", 0o644, PASSWD)?
            .file("etc/group", 0o644, GROUP)?
            .dir("home/app", 0o755)?
            .owned("home/app", 1000, 1000);
        for applet in run(assets::run_here(&busybox)?.arg("--list"))?.lines() {
            if applet != "busybox" {
                tree = tree.symlink(&format!("bin/{applet}"), "busybox")?;
            }
        }
        Ok(tree)
    }

    /// Adds or replaces a file, with the directories above it.
    pub fn file(self, path: &str, mode: u32, contents: impl AsRef<[u8]>) -> Result<Tree> {
        let path = self.place(path)?;
        fs::write(&path, contents)?;
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(self)
    }

    /// Adds a directory, with those above it.
    pub fn dir(self, path: &str, mode: u32) -> Result<Tree> {
        let path = self.place(path)?;
        fs::create_dir_all(&path)?;
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(self)
    }

    /// Adds or replaces a symbolic link, with the directories above it.
    pub fn symlink(self, path: &str, target: &str) -> Result<Tree> {
        symlink(target, self.place(path)?)?;
        Ok(self)
    }

    /// Removes a file or symbolic link.
    pub fn without(self, path: &str) -> Result<Tree> {
        fs::remove_file(self.stage.path().join(path.trim_start_matches('/')))?;
        Ok(self)
    }

    /// Gives what is at `path` to another user than root.
    pub fn owned(mut self, path: &str, uid: u32, gid: u32) -> Tree {
        let path = path.trim_start_matches('/');
        writeln!(self.owners, "chown -h {uid}:{gid} '{path}'").expect("a String takes it all");
        self
    }

    /// The staged place of a guest path, free to be written.
    fn place(&self, path: &str) -> Result<PathBuf> {
        let place = self.stage.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(place.parent().context("the root is there already")?)?;
        if place.is_symlink() {
            fs::remove_file(&place)?;
        }
        Ok(place)
    }
}

/// A file system that is made once, and only read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Compressed by gzip.
    Squashfs,
    /// Not compressed.
    Erofs,
}

/// An image of a file system in a file, removed when dropped unless [kept](Image::keep).
pub struct Image {
    path: TempPath,
}

impl Image {
    /// Makes an image of `mib` MiB that holds `tree`.
    pub fn ext4(tree: &Tree, mib: u32) -> Result<Image> {
        let path = NamedTempFile::with_suffix(".ext4")?.into_temp_path();
        // The staged files belong to whoever runs this; under fakeroot, to root.
        let script = format!(
            "cd \"$1\"\n{}\"$2\" -q -F -E {MKFS} -d . \"$3\" {mib}M",
            tree.owners
        );
        run(Command::new(assets::tool("fakeroot")?)
            .args(["--", "sh", "-euc", &script, "sh"])
            .arg(tree.stage.path())
            .arg(assets::tool("mkfs.ext4")?)
            .arg(&path))?;
        Ok(Image { path })
    }

    /// Makes an image that holds `tree`, and is only read.
    pub fn packed(tree: &Tree, format: Format) -> Result<Image> {
        let path = NamedTempFile::with_suffix(".img")?.into_temp_path();
        let (tool, make) = match format {
            Format::Squashfs => (
                "mksquashfs",
                "\"$2\" . \"$3\" -noappend -quiet -no-progress",
            ),
            Format::Erofs => ("mkfs.erofs", "\"$2\" --quiet \"$3\" ."),
        };
        let script = format!("cd \"$1\"\n{}{make}", tree.owners);
        run(Command::new(assets::tool("fakeroot")?)
            .args(["--", "sh", "-euc", &script, "sh"])
            .arg(tree.stage.path())
            .arg(assets::tool(tool)?)
            .arg(&path))?;
        Ok(Image { path })
    }

    /// An image without a file system.
    pub fn blank(mib: u32) -> Result<Image> {
        let file = NamedTempFile::with_suffix(".img")?;
        file.as_file().set_len(u64::from(mib) << 20)?;
        Ok(Image {
            path: file.into_temp_path(),
        })
    }

    /// A copy of the image at `path`, as it is now.
    pub fn copy_of(path: &Path) -> Result<Image> {
        let copy = NamedTempFile::with_suffix(".img")?.into_temp_path();
        fs::copy(path, &copy).with_context(|| format!("unable to copy {path:?}"))?;
        Ok(Image { path: copy })
    }

    /// Moves the image to a place where it stays.
    pub fn keep(self, path: &Path) -> Result<()> {
        fs::copy(&self.path, path).with_context(|| format!("unable to write {path:?}"))?;
        Ok(())
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ok when the file system is as an orderly end leaves it: `e2fsck -fn` finds no fault, and
    /// no journal waits to be recovered.
    pub fn check(&self) -> Result<()> {
        run(Command::new(assets::tool("e2fsck")?)
            .arg("-fn")
            .arg(&self.path))?;
        let superblock = run(Command::new(assets::tool("dumpe2fs")?)
            .arg("-h")
            .arg(&self.path))?;
        ensure!(
            !superblock.contains("needs_recovery"),
            "needs recovery:\n{superblock}"
        );
        let state = superblock
            .lines()
            .find(|line| line.starts_with("Filesystem state:"));
        ensure!(
            state.is_some_and(|s| s.ends_with(" clean")),
            "not clean:\n{superblock}"
        );
        Ok(())
    }

    /// Contents of a file in the image.
    pub fn read(&self, path: &str) -> Result<String> {
        self.stat(path)?; // debugfs itself does not fail for a file that is not there
        self.debugfs(&format!("cat \"{path}\""))
    }

    /// What debugfs tells of an inode: type, mode, owner, size, times.
    pub fn stat(&self, path: &str) -> Result<String> {
        let stat = self.debugfs(&format!("stat \"{path}\""))?;
        ensure!(stat.starts_with("Inode:"), "no {path} in the image");
        Ok(stat)
    }

    fn debugfs(&self, request: &str) -> Result<String> {
        run(Command::new(assets::tool("debugfs")?)
            .args(["-R", request])
            .arg(&self.path))
    }
}

/// Everything is initialised now: a guest kernel would do the rest later, in the middle of a test.
const MKFS: &str = "nodiscard,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0";

impl From<&Image> for Disk {
    fn from(image: &Image) -> Disk {
        Disk::file(image.path())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_holds_its_tree() {
        let tree = Tree::busybox()
            .and_then(|tree| tree.file("/srv/note", 0o640, "hello\n"))
            .unwrap()
            .owned("/srv/note", 1000, 50);
        let image = Image::ext4(&tree, 16).unwrap();
        image.check().unwrap();
        assert_eq!(image.read("/srv/note").unwrap(), "hello\n");
        let stat = image.stat("/srv/note").unwrap();
        assert!(
            stat.contains("Mode:  0640") && stat.contains("User:  1000   Group:    50"),
            "{stat}"
        );
        let root = image.stat("/bin/busybox").unwrap();
        assert!(
            root.contains("Mode:  0755") && root.contains("User:     0   Group:     0"),
            "{root}"
        );
        assert!(image.read("/srv/none").is_err());
    }

    #[test]
    fn a_damaged_image_does_not_pass() {
        let image = Image::ext4(&Tree::empty().unwrap(), 8).unwrap();
        image.debugfs("stat /").unwrap();
        let debugfs = assets::tool("debugfs").unwrap();
        run(Command::new(debugfs)
            .args(["-w", "-R", "clri <11>"])
            .arg(image.path()))
        .unwrap();
        assert!(image.check().is_err());
    }
}
