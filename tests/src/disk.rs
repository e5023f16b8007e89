//! Guest disks: builds images from trees of files, and inspects them after a boot.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, Permissions},
    io::Write as _,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
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

/// `/etc/group` of [`Tree::busybox`]: app is in two supplementary groups.
const GROUP: &str = "\
root:x:0:
daemon:x:1:
tty:x:5:
video:x:44:app,daemon
staff:x:50:app
app:x:1000:
nogroup:x:65534:
";

/// The files of a disk image, staged in a directory on the host.
pub struct Tree {
    stage: TempDir,
    /// `chown` commands to run under fakeroot, where everything else belongs to root.
    owners: String,
}

impl Tree {
    /// Only the root directory.
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

    /// Adds or replaces a file, and creates its parent directories.
    pub fn file(self, path: &str, mode: u32, contents: impl AsRef<[u8]>) -> Result<Tree> {
        let path = self.place(path)?;
        fs::write(&path, contents)?;
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(self)
    }

    /// Adds a directory and its parents.
    pub fn dir(self, path: &str, mode: u32) -> Result<Tree> {
        let path = self.place(path)?;
        fs::create_dir_all(&path)?;
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(self)
    }

    /// Adds or replaces a symbolic link, and creates its parent directories.
    pub fn symlink(self, path: &str, target: &str) -> Result<Tree> {
        symlink(target, self.place(path)?)?;
        Ok(self)
    }

    /// Adds the contents of Debian packages; their dependencies must be named, too. `/lib` is in `/usr`, as
    /// on Debian.
    pub fn packages(self, names: &[&str]) -> Result<Tree> {
        let files = assets::packages(names)?;
        let stage = self.stage.path();
        for (from, to) in [("usr", "usr"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
            if files.join(from).is_dir() {
                let to = stage.join(to);
                fs::create_dir_all(&to)?;
                run(Command::new("cp")
                    .arg("-a")
                    .args([files.join(from).join("."), to]))?;
            }
        }
        self.symlink("lib", "usr/lib")?
            .symlink("lib64", "usr/lib64")
    }

    /// Removes a file or symbolic link.
    pub fn without(self, path: &str) -> Result<Tree> {
        fs::remove_file(self.stage.path().join(path.trim_start_matches('/')))?;
        Ok(self)
    }

    /// Makes another user the owner of `path`, instead of root.
    pub fn owned(mut self, path: &str, uid: u32, gid: u32) -> Tree {
        let path = path.trim_start_matches('/');
        writeln!(self.owners, "chown -h {uid}:{gid} '{path}'").expect("a String takes it all");
        self
    }

    /// The staged path of a guest path. Creates its parent directories, and removes a symbolic link there.
    fn place(&self, path: &str) -> Result<PathBuf> {
        let place = self.stage.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(place.parent().context("the root is there already")?)?;
        if place.is_symlink() {
            fs::remove_file(&place)?;
        }
        Ok(place)
    }
}

/// A read-only file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Compressed by gzip.
    Squashfs,
    /// Not compressed.
    Erofs,
}

/// A writable file system, which can be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ext,
    Xfs,
    Btrfs,
}

/// How a disk is divided into partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// A GUID partition table (UEFI specification, section 5.3).
    Gpt,
    /// A master boot record.
    Mbr,
}

/// Start of the only partition, and free space after it, in MiB.
const MARGIN_MIB: u64 = 1;

/// An image of a file system in a file, removed when dropped unless [kept](Image::keep).
pub struct Image {
    path: TempPath,
    kind: Kind,
    is_partitioned: bool,
}

impl Image {
    /// Makes an image of `mib` MiB that holds `tree`.
    pub fn ext4(tree: &Tree, mib: u32) -> Result<Image> {
        let path = NamedTempFile::with_suffix(".ext4")?.into_temp_path();
        // The staged files belong to the user who runs this; under fakeroot, to root.
        let script = format!(
            "cd \"$1\"\n{}\"$2\" -q -F -E {MKFS} -d . \"$3\" {mib}M",
            tree.owners
        );
        run(Command::new(assets::tool("fakeroot")?)
            .args(["--", "sh", "-euc", &script, "sh"])
            .arg(tree.stage.path())
            .arg(assets::tool("mkfs.ext4")?)
            .arg(&path))?;
        Ok(Image::new(path))
    }

    fn new(path: TempPath) -> Image {
        Image {
            path,
            kind: Kind::Ext,
            is_partitioned: false,
        }
    }

    /// Makes an xfs image that holds `tree`, of the minimum size that mkfs.xfs accepts: 300 MiB, mostly
    /// sparse. Sticky bits are lost.
    pub fn xfs(tree: &Tree) -> Result<Image> {
        let image = Image::blank(300)?;
        // A prototype (mkfs.xfs(8)), made from a list of the files.
        let list = run(Command::new(assets::tool("fakeroot")?)
            .args(["--", "sh", "-euc"])
            .arg(format!(
                "cd \"$1\"\n{}find . -printf '%d %y %m %U %G %f %l\\n'",
                tree.owners
            ))
            .arg("sh")
            .arg(tree.stage.path()))?;
        let mut prototype = NamedTempFile::new()?;
        prototype.write_all(xfs_prototype(&list, tree.stage.path())?.as_bytes())?;
        run(Command::new(assets::tool("mkfs.xfs")?)
            .args(["-q", "-K", "-p"])
            .args([prototype.path(), image.path()]))?;
        Ok(Image {
            kind: Kind::Xfs,
            ..image
        })
    }

    /// Makes a btrfs image of 128 MiB that holds `tree`.
    pub fn btrfs(tree: &Tree) -> Result<Image> {
        let image = Image::blank(128)?;
        let script = format!(
            "cd \"$1\"\n{}\"$2\" --quiet --nodiscard --rootdir . \"$3\"",
            tree.owners
        );
        run(Command::new(assets::tool("fakeroot")?)
            .args(["--", "sh", "-euc", &script, "sh"])
            .arg(tree.stage.path())
            .arg(assets::tool("mkfs.btrfs")?)
            .arg(image.path()))?;
        Ok(Image {
            kind: Kind::Btrfs,
            ..image
        })
    }

    /// A disk with a partition table, and this file system in its first partition.
    pub fn partitioned(self, table: Table) -> Result<Image> {
        let size_mib = fs::metadata(&self.path)?.len() >> 20;
        let disk = Image::blank(u32::try_from(size_mib + 2 * MARGIN_MIB)?)?;
        let label = match table {
            Table::Gpt => "gpt",
            Table::Mbr => "dos",
        };
        let mut sfdisk = Command::new(assets::tool("sfdisk")?)
            .arg("--quiet")
            .arg(disk.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let partition =
            format!("label: {label}\nstart={MARGIN_MIB}MiB, size={size_mib}MiB, type=L\n");
        sfdisk
            .stdin
            .take()
            .context("stdin is piped")?
            .write_all(partition.as_bytes())?;
        ensure!(sfdisk.wait()?.success(), "sfdisk failed");
        copy(&self.path, disk.path(), 0, MARGIN_MIB, size_mib)?;
        Ok(Image {
            path: disk.path,
            kind: self.kind,
            is_partitioned: true,
        })
    }

    /// The file system in the first partition of this disk.
    fn partition(&self) -> Result<Image> {
        let size_mib = (fs::metadata(&self.path)?.len() >> 20) - 2 * MARGIN_MIB;
        let partition = Image::blank(u32::try_from(size_mib)?)?;
        copy(&self.path, partition.path(), MARGIN_MIB, 0, size_mib)?;
        Ok(Image {
            kind: self.kind,
            ..partition
        })
    }

    /// Makes a read-only image that holds `tree`.
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
        Ok(Image::new(path))
    }

    /// An image without a file system.
    pub fn blank(mib: u32) -> Result<Image> {
        let file = NamedTempFile::with_suffix(".img")?;
        file.as_file().set_len(u64::from(mib) << 20)?;
        Ok(Image::new(file.into_temp_path()))
    }

    /// A copy of the image at `path`.
    pub fn copy_of(path: &Path) -> Result<Image> {
        let copy = NamedTempFile::with_suffix(".img")?.into_temp_path();
        fs::copy(path, &copy).with_context(|| format!("unable to copy {path:?}"))?;
        Ok(Image::new(copy))
    }

    /// Moves the image to a path where it is kept.
    pub fn keep(self, path: &Path) -> Result<()> {
        fs::copy(&self.path, path).with_context(|| format!("unable to write {path:?}"))?;
        Ok(())
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails unless the file system is clean, as after an orderly shutdown: its checker finds no fault, and
    /// the journal need not be replayed.
    pub fn check(&self) -> Result<()> {
        match (self.is_partitioned, self.kind) {
            (true, _) => self.partition()?.check(),
            (_, Kind::Ext) => self.check_ext(),
            (_, Kind::Xfs) => self.check_xfs(),
            (_, Kind::Btrfs) => self.check_btrfs(),
        }
    }

    fn check_xfs(&self) -> Result<()> {
        let log = run(Command::new(assets::tool("xfs_logprint")?)
            .arg("-t")
            .arg(&self.path))?;
        ensure!(log.contains("state: <CLEAN>"), "not clean:\n{log}");
        run(Command::new(assets::tool("xfs_repair")?)
            .arg("-n")
            .arg(&self.path))
        .map(drop)
    }

    fn check_btrfs(&self) -> Result<()> {
        let superblock = run(Command::new(assets::tool("btrfs")?)
            .args(["inspect-internal", "dump-super"])
            .arg(&self.path))?;
        let log = superblock
            .lines()
            .find_map(|line| line.strip_prefix("log_root"))
            .context("no log_root")?;
        ensure!(log.trim() == "0", "a log to replay:\n{superblock}");
        run(Command::new(assets::tool("btrfs")?)
            .args(["check", "--readonly"])
            .arg(&self.path))
        .map(drop)
    }

    fn check_ext(&self) -> Result<()> {
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
        self.stat(path)?; // debugfs itself does not fail for a missing file
        self.debugfs(&format!("cat \"{path}\""))
    }

    /// The output of debugfs for an inode: type, mode, owner, size, times.
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

/// Copies `size_mib` MiB of a file into an existing one; holes are kept.
fn copy(from: &Path, to: &Path, skip_mib: u64, seek_mib: u64, size_mib: u64) -> Result<()> {
    run(Command::new(assets::tool("dd")?)
        .arg(format!("if={}", from.display()))
        .arg(format!("of={}", to.display()))
        .arg(format!("skip={skip_mib}"))
        .arg(format!("seek={seek_mib}"))
        .arg(format!("count={size_mib}"))
        .args(["bs=1M", "conv=notrunc,sparse", "status=none"]))
    .map(drop)
}

/// The prototype (mkfs.xfs(8)) of files listed by find with depth, type, mode, user, group, name and link
/// target, each directory before its files; they are in `stage`.
fn xfs_prototype(list: &str, stage: &Path) -> Result<String> {
    // A boot program and two sizes, which are obsolete.
    let mut prototype = String::from("-\n0 0\n");
    let mut above = vec![];
    for line in list.lines() {
        let mut fields = line.splitn(7, ' ');
        let mut field = || fields.next().context("a field is missing");
        let depth: usize = field()?.parse()?;
        let (file_type, mode, uid, gid) = (field()?, field()?, field()?, field()?);
        let (name, target) = (field()?, field()?);
        while above.len() > depth.max(1) {
            above.pop();
            prototype += "$\n";
        }
        if depth > 0 {
            write!(prototype, "{name} ")?;
        }
        let mode = u32::from_str_radix(mode, 8)? & 0o777;
        match file_type {
            "d" => {
                writeln!(prototype, "d--{mode:03o} {uid} {gid}")?;
                above.push(if depth > 0 { name } else { "." });
            }
            "l" => writeln!(prototype, "l--{mode:03o} {uid} {gid} {target}")?,
            "f" => {
                let path: PathBuf = [stage.as_os_str()]
                    .into_iter()
                    .chain(above[1..].iter().map(OsStr::new))
                    .chain([OsStr::new(name)])
                    .collect();
                writeln!(prototype, "---{mode:03o} {uid} {gid} {}", path.display())?;
            }
            other => bail!("{name} is of type {other}"),
        }
    }
    prototype += &"$\n".repeat(above.len());
    Ok(prototype)
}

/// Options that initialise everything now: otherwise a guest kernel would do it later, in the middle of a test.
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
    fn an_image_contains_its_tree() {
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
    fn other_file_systems_contain_their_tree_and_can_be_in_a_partition() {
        let tree = Tree::busybox()
            .and_then(|tree| tree.file("/srv/deep/note", 0o640, "hello\n"))
            .and_then(|tree| tree.dir("/srv/empty", 0o700))
            .unwrap()
            .owned("/srv/deep/note", 1000, 50);
        let xfs = Image::xfs(&tree).unwrap();
        xfs.check().unwrap();
        let db = |command: &str| {
            run(Command::new(assets::tool("xfs_db").unwrap())
                .args(["-r", "-c", command, "-c", "print"])
                .arg(xfs.path()))
            .unwrap()
        };
        let note = db("path /srv/deep/note");
        for field in ["core.mode = 0100640", "core.uid = 1000", "core.gid = 50"] {
            assert!(note.contains(field), "{note}");
        }
        assert!(db("path /srv/empty").contains("core.mode = 040700"));
        xfs.partitioned(Table::Gpt).unwrap().check().unwrap();

        let btrfs = Image::btrfs(&tree).unwrap();
        btrfs.check().unwrap();
        btrfs.partitioned(Table::Mbr).unwrap().check().unwrap();
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
