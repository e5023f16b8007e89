//! A root file system composed of a container image's layers, in memory: names, owners and modes; contents
//! stay in the layers. A layer cannot refer to anything outside of the tree. (OCI image-spec layer.md;
//! containerd's archive/tar.go for details that it leaves open.)

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    rc::Rc,
};

use anyhow::{Context, Result, bail, ensure};

/// Maximum number of symbolic links in a path (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// Maximum size of a file name in bytes (NAME_MAX).
const MAX_NAME: usize = 255;
/// Maximum size of a path in bytes (PATH_MAX), also after symbolic links are followed.
const MAX_PATH: usize = 4096;

/// Prefix of a whiteout's name.
const WHITEOUT: &[u8] = b".wh.";
/// Prefix of aufs's own files, and of the opaque marker.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// The marker that hides lower layers' files in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970, rounded down.
    pub seconds: i64,
    /// Nanoseconds after that.
    pub nanoseconds: u32,
}

/// Metadata that all kinds of files have.
#[derive(Clone, Debug, PartialEq)]
pub struct Meta {
    /// Permission bits with set-user-ID, set-group-ID and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Time,
    /// Extended attributes (xattr(7)) by their full names.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

impl Meta {
    /// Owned by root, with this mode.
    pub fn root(mode: u32) -> Meta {
        Meta {
            mode,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: BTreeMap::new(),
        }
    }
}

/// The source of a file's contents: entry `entry` of layer `layer`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Number of the layer, the lowest is 0.
    pub layer: usize,
    /// Number of the entry in it.
    pub entry: usize,
}

/// A file other than a directory; it may have several names.
#[derive(Debug)]
pub struct Leaf {
    /// Owner and mode.
    pub meta: Meta,
    /// Its type and contents.
    pub kind: LeafKind,
}

/// The kinds of files that may have several names.
#[derive(Debug, PartialEq)]
pub enum LeafKind {
    /// A regular file.
    File(Contents),
    /// A symbolic link with this target.
    Symlink(Vec<u8>),
    /// A device.
    Device(Device),
    /// A named pipe.
    Fifo,
}

/// The contents of a regular file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contents {
    /// Size in bytes, including holes.
    pub size: u64,
    /// Size in bytes, without holes.
    pub data: u64,
    /// Their source.
    pub place: Place,
}

/// A device's number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Device {
    /// A character device, not a block device.
    pub character: bool,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// The type of a layer's entry.
#[derive(Debug)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Size in bytes, including holes.
        size: u64,
        /// Size in bytes, without holes.
        data: u64,
    },
    /// Another name for the file at this path.
    HardLink(Vec<u8>),
    /// A symbolic link with this target.
    Symlink(Vec<u8>),
    /// A device.
    Device(Device),
    /// A named pipe.
    Fifo,
}

/// An entry of a layer.
#[derive(Debug)]
pub struct Entry {
    /// Its path as in the layer.
    pub path: Vec<u8>,
    /// Owner and mode.
    pub meta: Meta,
    /// Its type.
    pub kind: Kind,
    /// Names of dropped attributes.
    pub lost: Vec<String>,
}

type Children = BTreeMap<Vec<u8>, Node>;

#[derive(Debug)]
struct Node {
    /// The last layer with this node.
    layer: usize,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Directory(Meta, Children),
    Leaf(Rc<Leaf>),
}

/// The merged file system.
#[derive(Debug)]
pub struct Tree {
    root: Meta,
    children: Children,
    /// Whether names that start with `.wh.` are whiteouts.
    whiteouts: bool,
}

/// A file of the tree, for a [walk](Tree::walk).
#[derive(Debug)]
pub enum Item<'a> {
    /// A directory.
    Directory(&'a Meta),
    /// Any other file, under its first name.
    Leaf(&'a Leaf),
    /// Another name of the file at this path.
    HardLink(Rc<[u8]>),
}

/// The size of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Extent {
    /// Number of files of all kinds.
    pub inodes: u64,
    /// Total size of regular files in bytes, including holes.
    pub bytes: u64,
    /// Blocks of 4 KiB for their contents and the directories.
    pub blocks: u64,
}

impl Tree {
    /// An empty one. Layers have whiteouts; in an ordinary archive `.wh.` is part of a name.
    pub fn new(whiteouts: bool) -> Tree {
        Tree {
            root: Meta::root(0o755),
            children: Children::new(),
            whiteouts,
        }
    }

    /// Owner and mode of the root directory.
    pub fn root(&self) -> &Meta {
        &self.root
    }

    /// Applies an entry. Layers must be applied in order, from the lowest.
    pub fn apply(&mut self, place: Place, entry: Entry) -> Result<()> {
        let shown = entry.path.escape_ascii().to_string();
        self.add(place, entry)
            .with_context(|| format!("unable to add {shown:?}"))
    }

    fn add(&mut self, place: Place, entry: Entry) -> Result<()> {
        let mut parents = components(&entry.path)?;
        let Some(name) = parents.pop() else {
            ensure!(
                matches!(entry.kind, Kind::Directory),
                "the root is a directory"
            );
            self.root = entry.meta;
            return Ok(());
        };
        if self.whiteouts && name.starts_with(WHITEOUT) {
            return self.hide(place.layer, &parents, &name);
        }
        let meta = entry.meta;
        let leaf = |kind| {
            Content::Leaf(Rc::new(Leaf {
                meta: meta.clone(),
                kind,
            }))
        };
        let content = match entry.kind {
            Kind::Directory => Content::Directory(meta, Children::new()),
            Kind::File { size, data } => leaf(LeafKind::File(Contents { size, data, place })),
            Kind::Symlink(target) => {
                // The kernel takes no other ones (symlink(2)).
                ensure!(!target.is_empty(), "a symbolic link without a target");
                ensure!(!target.contains(&0), "a zero byte in its target");
                ensure!(target.len() < MAX_PATH, "its target is too long");
                leaf(LeafKind::Symlink(target))
            }
            Kind::Device(device) => leaf(LeafKind::Device(device)),
            Kind::Fifo => leaf(LeafKind::Fifo),
            Kind::HardLink(target) => Content::Leaf(self.linked(&target)?),
        };
        let parents = self.resolve(&parents, Some(place.layer))?;
        let children = self
            .directory(&parents)
            .context("its parent is not a directory")?;
        let node = Node {
            layer: place.layer,
            content,
        };
        match (children.get_mut(&name), node) {
            // An existing directory keeps its contents.
            (
                Some(Node {
                    layer,
                    content: Content::Directory(meta, _),
                }),
                Node {
                    content: Content::Directory(new, _),
                    ..
                },
            ) => (*layer, *meta) = (place.layer, new),
            (_, node) => drop(children.insert(name, node)),
        }
        Ok(())
    }

    /// Removes aufs's own directories after the last layer. Until then, hard links may lead into them.
    pub fn remove_aufs_files(&mut self) {
        let whiteouts = self.whiteouts;
        self.children
            .retain(|name, _| !(whiteouts && name.starts_with(WHITEOUT_META)));
    }

    /// The file at `target`, which gets another name.
    fn linked(&mut self, target: &[u8]) -> Result<Rc<Leaf>> {
        let shown = target.escape_ascii().to_string();
        let found = (|| {
            let mut parents = components(target)?;
            let name = parents.pop().context("it is the root")?;
            let parents = self.resolve(&parents, None)?;
            let node = self
                .directory(&parents)
                .and_then(|children| children.get(&name));
            match &node.context("there is no such file")?.content {
                Content::Directory(..) => bail!("it is a directory"),
                Content::Leaf(leaf) => Ok(leaf.clone()),
            }
        })();
        found.with_context(|| format!("unable to link to {shown:?}"))
    }

    /// Applies the whiteout `name`, to lower layers only.
    fn hide(&mut self, layer: usize, parents: &[Vec<u8>], name: &[u8]) -> Result<()> {
        let opaque = name == OPAQUE;
        if name.starts_with(WHITEOUT_META) && !opaque {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        ensure!(
            !matches!(hidden, b"" | b"." | b".."),
            "a whiteout of nothing"
        );
        let Some(children) = self
            .resolve(parents, None)
            .ok()
            .and_then(|path| self.directory(&path))
        else {
            return Ok(()); // there is nothing to hide
        };
        if opaque {
            prune(children, layer);
        } else if let Some(node) = children.get_mut(hidden)
            && !survives(node, layer)
        {
            children.remove(hidden);
        }
        Ok(())
    }

    /// Resolves symbolic links in `path`, within the root. With a layer, missing directories are created as
    /// part of that layer.
    fn resolve(&mut self, path: &[Vec<u8>], make: Option<usize>) -> Result<Vec<Vec<u8>>> {
        let mut todo: VecDeque<Vec<u8>> = path.iter().cloned().collect();
        let mut done: Vec<Vec<u8>> = vec![];
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    done.pop();
                    continue;
                }
                _ => {}
            }
            let length: usize = done.iter().map(|name| name.len() + 1).sum();
            ensure!(length + name.len() < MAX_PATH, "its path is too long");
            ensure!(name.len() <= MAX_NAME, "a name in its path is too long");
            let children = self.directory(&done).context("a path through a file")?;
            match children.get(&name).map(|node| &node.content) {
                Some(Content::Directory(..)) => done.push(name),
                Some(Content::Leaf(leaf)) => {
                    let LeafKind::Symlink(target) = &leaf.kind else {
                        bail!("{:?} is not a directory", name.escape_ascii().to_string());
                    };
                    links += 1;
                    ensure!(links <= MAX_LINKS, "too many symbolic links in its path");
                    if target.starts_with(b"/") {
                        done.clear();
                    }
                    for name in target.rsplit(|&byte| byte == b'/') {
                        todo.push_front(name.to_vec());
                    }
                }
                None => {
                    let layer = make.context("there is no such directory")?;
                    let content = Content::Directory(Meta::root(0o755), Children::new());
                    children.insert(name.clone(), Node { layer, content });
                    done.push(name);
                }
            }
        }
        Ok(done)
    }

    /// The contents of the directory at a path without symbolic links.
    fn directory(&mut self, path: &[Vec<u8>]) -> Option<&mut Children> {
        path.iter().try_fold(&mut self.children, |children, name| {
            match &mut children.get_mut(name)?.content {
                Content::Directory(_, children) => Some(children),
                _ => None,
            }
        })
    }

    /// Calls `visit` for every file except the root: directories before their contents, hard links after the
    /// name that they link to. Paths have neither a slash at the start nor symbolic links.
    pub fn walk<'a>(&'a self, mut visit: impl FnMut(&[u8], Item<'a>) -> Result<()>) -> Result<()> {
        let mut names: BTreeMap<*const Leaf, Rc<[u8]>> = BTreeMap::new();
        let mut links: Vec<(Vec<u8>, Rc<[u8]>)> = vec![];
        // An explicit stack: a layer's directories may be deeper than a thread's stack allows.
        let mut stack = vec![(Vec::new(), self.children.iter())];
        while let Some((path, children)) = stack.last_mut() {
            let Some((name, node)) = children.next() else {
                stack.pop();
                continue;
            };
            let mut path = path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(name);
            match &node.content {
                Content::Directory(meta, children) => {
                    visit(&path, Item::Directory(meta))?;
                    stack.push((path, children.iter()));
                }
                Content::Leaf(leaf) => {
                    if let Some(first) = names.get(&Rc::as_ptr(leaf)) {
                        links.push((path, first.clone()));
                        continue;
                    }
                    if Rc::strong_count(leaf) > 1 {
                        names.insert(Rc::as_ptr(leaf), path.as_slice().into());
                    }
                    visit(&path, Item::Leaf(leaf))?;
                }
            }
        }
        links
            .into_iter()
            .try_for_each(|(path, first)| visit(&path, Item::HardLink(first)))
    }

    /// Its size. It is an error if the files together are larger than a 64-bit number.
    pub fn extent(&self) -> Result<Extent> {
        let mut extent = Extent::default();
        let mut seen: HashSet<*const Leaf> = HashSet::new();
        let mut todo = vec![(&self.root, &self.children)];
        while let Some((meta, children)) = todo.pop() {
            extent.inodes += 1;
            extent.blocks += u64::from(!meta.xattrs.is_empty());
            // A directory entry is 8 bytes and its name; blocks are not always full.
            let names: usize = children.keys().map(|name| name.len() + 12).sum();
            extent.blocks += (names as u64 * 2).div_ceil(4096).max(1);
            for node in children.values() {
                let leaf = match &node.content {
                    Content::Directory(meta, children) => {
                        todo.push((meta, children));
                        continue;
                    }
                    Content::Leaf(leaf) if seen.insert(Rc::as_ptr(leaf)) => leaf,
                    Content::Leaf(_) => continue,
                };
                extent.inodes += 1;
                extent.blocks += u64::from(!leaf.meta.xattrs.is_empty());
                match &leaf.kind {
                    LeafKind::File(contents) => {
                        let bytes = extent.bytes.checked_add(contents.size);
                        extent.bytes = bytes.context("the files are too large")?;
                        // One more block for the extent tree.
                        let blocks = contents.data.div_ceil(4096);
                        extent.blocks += blocks + blocks.div_ceil(8192);
                    }
                    LeafKind::Symlink(target) => {
                        extent.blocks += u64::from(target.len() >= 60);
                    }
                    LeafKind::Device(_) | LeafKind::Fifo => {}
                }
            }
        }
        Ok(extent)
    }
}

/// Whether a node survives when files below `layer` are hidden: it is in that layer, or it is a directory
/// with such a file.
fn survives(node: &mut Node, layer: usize) -> bool {
    let inhabited = match &mut node.content {
        Content::Directory(_, children) => {
            prune(children, layer);
            !children.is_empty()
        }
        _ => false,
    };
    inhabited || node.layer == layer
}

/// Removes files of layers below `layer`.
fn prune(children: &mut Children, layer: usize) {
    children.retain(|_, node| survives(node, layer));
}

/// The names in a path, which may be absolute but must not lead above the root.
fn components(path: &[u8]) -> Result<Vec<Vec<u8>>> {
    ensure!(!path.contains(&0), "a zero byte in its path");
    ensure!(path.len() < MAX_PATH, "its path is too long");
    let mut names: Vec<Vec<u8>> = vec![];
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop().context("it leads out of the image")?),
            _ => {
                ensure!(name.len() <= MAX_NAME, "a name in its path is too long");
                names.push(name.to_vec());
            }
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers in a short notation, one string per entry: `d PATH`, `f PATH`, `l PATH TARGET` (symbolic link),
    /// `h PATH TARGET` (hard link).
    fn try_layers(layers: &[&[&str]]) -> Result<Tree> {
        let mut tree = Tree::new(true);
        for (layer, entries) in layers.iter().enumerate() {
            for (number, entry) in entries.iter().enumerate() {
                let words: Vec<_> = entry.split(' ').collect();
                let target = || words[2].as_bytes().to_vec();
                let kind = match words[0] {
                    "d" => Kind::Directory,
                    "f" => Kind::File { size: 1, data: 1 },
                    "l" => Kind::Symlink(target()),
                    "h" => Kind::HardLink(target()),
                    other => panic!("{other}"),
                };
                // The mode is the layer's number.
                let meta = Meta::root(layer as u32);
                let path = words[1].into();
                let place = Place {
                    layer,
                    entry: number,
                };
                let entry = Entry {
                    path,
                    meta,
                    kind,
                    lost: vec![],
                };
                tree.apply(place, entry)?;
            }
        }
        tree.remove_aufs_files();
        Ok(tree)
    }

    /// The result of a walk: `PATH/` for a directory, `PATH` for a file, with its layer.
    fn listing(tree: &Tree) -> Vec<String> {
        let mut lines = vec![];
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        tree.walk(|path, item| {
            let path = text(path);
            lines.push(match item {
                Item::Directory(_) => format!("{path}/"),
                Item::HardLink(first) => format!("{path} = {}", text(&first)),
                Item::Leaf(leaf) => match &leaf.kind {
                    LeafKind::File(contents) => format!("{path} {}", contents.place.layer),
                    LeafKind::Symlink(target) => format!("{path} -> {}", text(target)),
                    LeafKind::Device(_) | LeafKind::Fifo => path,
                },
            });
            Ok(())
        })
        .unwrap();
        lines
    }

    fn layers(layers: &[&[&str]]) -> Vec<String> {
        listing(&try_layers(layers).unwrap())
    }

    fn error(entries: &[&str]) -> String {
        format!("{:#}", try_layers(&[entries]).unwrap_err())
    }

    #[test]
    fn a_later_layer_replaces_files_and_keeps_directories() {
        let tree = layers(&[
            &[
                "d etc",
                "f etc/a",
                "f etc/b",
                "d was-dir",
                "f was-dir/x",
                "f was-file",
            ],
            &["d etc", "f etc/b", "f was-dir", "d was-file"],
        ]);
        assert_eq!(
            tree,
            ["etc/", "etc/a 0", "etc/b 1", "was-dir 1", "was-file/"]
        );
    }

    #[test]
    fn a_directory_has_the_owner_that_the_last_layer_gave_it() {
        let tree = try_layers(&[&["d etc", "f etc/a"], &["d etc"]]).unwrap();
        tree.walk(|_, item| {
            if let Item::Directory(meta) = item {
                assert_eq!(meta.mode, 1);
            }
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_whiteout_removes_what_lower_layers_have() {
        let lower: &[&str] = &["f a", "d dir", "f dir/x", "f dir/y", "f keep"];
        assert_eq!(
            layers(&[lower, &["f .wh.a", "f dir/.wh.x"]]),
            ["dir/", "dir/y 0", "keep 0"]
        );
        assert_eq!(
            layers(&[lower, &["f .wh.dir", "f .wh.never-was"]]),
            ["a 0", "keep 0"]
        );
        assert_eq!(layers(&[lower, &["f nowhere/.wh.x"]]).len(), 5);
    }

    #[test]
    fn a_whiteout_leaves_its_own_layer_alone_in_either_order() {
        let lower: &[&str] = &["d dir", "f dir/old", "d dir/deep", "f dir/deep/old"];
        let expected = ["dir/", "dir/deep/", "dir/deep/new 1", "dir/new 1"];
        for upper in [
            [
                "f .wh.dir",
                "d dir",
                "f dir/new",
                "d dir/deep",
                "f dir/deep/new",
            ],
            [
                "d dir",
                "f dir/new",
                "d dir/deep",
                "f dir/deep/new",
                "f .wh.dir",
            ],
            [
                "f dir/.wh..wh..opq",
                "d dir",
                "f dir/new",
                "d dir/deep",
                "f dir/deep/new",
            ],
            [
                "d dir",
                "d dir/deep",
                "f dir/deep/new",
                "f dir/new",
                "f dir/.wh..wh..opq",
            ],
        ] {
            assert_eq!(layers(&[lower, &upper]), expected, "{upper:?}");
        }
    }

    #[test]
    fn an_opaque_directory_hides_all_that_was_in_it_but_not_itself() {
        let tree = layers(&[&["d a", "f a/x", "d a/b", "f a/b/y"], &["f a/.wh..wh..opq"]]);
        assert_eq!(tree, ["a/"]);
        let tree = layers(&[&["f x", "d d"], &["f .wh..wh..opq", "f y"]]);
        assert_eq!(tree, ["y 1"]);
    }

    #[test]
    fn a_third_layer_brings_back_what_the_second_hid() {
        assert_eq!(layers(&[&["f a"], &["f .wh.a"], &["f a"]]), ["a 2"]);
        assert_eq!(layers(&[&["f a"], &["f a"], &["f .wh.a"]]), [""; 0]);
    }

    #[test]
    fn whiteouts_count_only_in_layers_and_aufs_files_do_not() {
        assert_eq!(layers(&[&["d .wh..wh.plnk", "f .wh..wh.aufs"]]), [""; 0]);
        let plnk = [
            "d .wh..wh.plnk",
            "f .wh..wh.plnk/1.2",
            "h a .wh..wh.plnk/1.2",
        ];
        assert_eq!(
            layers(&[&plnk, &["h b .wh..wh.plnk/1.2"]]),
            ["a 0", "b = a"]
        );
        let mut tree = Tree::new(false);
        let entry = Entry {
            path: b".wh..wh.a".into(),
            meta: Meta::root(0),
            kind: Kind::File { size: 0, data: 0 },
            lost: vec![],
        };
        tree.apply(Place { layer: 0, entry: 0 }, entry).unwrap();
        tree.remove_aufs_files();
        assert_eq!(listing(&tree), [".wh..wh.a 0"]);
        for name in [".wh.", ".wh..", ".wh..."] {
            assert!(error(&[&format!("f d/{name}")]).contains("a whiteout of nothing"));
        }
    }

    #[test]
    fn hard_links_share_a_file_across_layers_and_outlive_its_first_name() {
        let tree = layers(&[&["f b", "h a b"], &["h c a", "f .wh.b"]]);
        assert_eq!(tree, ["a 0", "c = a"]);
        assert!(error(&["h a nowhere"]).contains(r#"unable to link to "nowhere""#));
        assert!(error(&["d d", "h a d"]).contains("it is a directory"));
    }

    #[test]
    fn a_symbolic_link_may_have_several_names() {
        assert_eq!(
            layers(&[&["l a target", "h b a"]]),
            ["a -> target", "b = a"]
        );
    }

    #[test]
    fn missing_parent_directories_belong_to_root() {
        assert_eq!(layers(&[&["f a/b/c"]]), ["a/", "a/b/", "a/b/c 0"]);
    }

    #[test]
    fn a_path_through_symbolic_links_stays_in_the_tree() {
        let linked = |target: &str, expected: &[&str]| {
            let link = format!("l link {target}");
            let tree = layers(&[&["d usr/bin", &link], &["f link/x"]]);
            let link = format!("link -> {target}");
            let mut expected: Vec<_> = expected.iter().map(|line| line.to_string()).collect();
            expected.extend([link, "usr/".into(), "usr/bin/".into()]);
            expected.sort();
            let mut tree = tree;
            tree.sort();
            assert_eq!(tree, expected);
        };
        linked("usr/bin", &["usr/bin/x 1"]);
        linked("/usr/bin", &["usr/bin/x 1"]);
        linked("usr/../usr/./bin", &["usr/bin/x 1"]);
        linked("../../..", &["x 1"]);
        linked("/../etc", &["etc/", "etc/x 1"]);
        linked("../../tmp/y", &["tmp/", "tmp/y/", "tmp/y/x 1"]);
    }

    #[test]
    fn hostile_names_are_refused() {
        for path in ["../x", "a/../../x", "/../x", "a/b/../../../etc/passwd"] {
            assert!(
                error(&[&format!("f {path}")]).contains("leads out of the image"),
                "{path}"
            );
            assert!(
                error(&[&format!("h a {path}")]).contains("leads out of the image"),
                "{path}"
            );
        }
        assert!(error(&["f a\0b"]).contains("a zero byte"));
        assert!(error(&[&format!("f {}", "n".repeat(256))]).contains("too long"));
        assert!(error(&[&format!("f {}", "d/".repeat(2048))]).contains("too long"));
        assert!(error(&["l a b", "l b a", "f a/x"]).contains("too many symbolic links"));
        assert!(error(&["f a", "f a/x"]).contains("not a directory"));
        assert!(error(&["f ."]).contains("the root is a directory"));
        // Unusual, but harmless.
        assert_eq!(
            layers(&[&["f /etc/./x", "f a/../b"]]),
            ["b 0", "etc/", "etc/x 0"]
        );
    }

    #[test]
    fn a_symbolic_link_has_a_target_that_the_kernel_takes() {
        assert!(error(&["l a "]).contains("without a target"));
        assert!(error(&["l a b\0c"]).contains("a zero byte in its target"));
        assert!(error(&[&format!("l a {}", "d/".repeat(2048))]).contains("too long"));
        let long = "d".repeat(MAX_PATH - 1);
        assert_eq!(
            layers(&[&[&format!("l a {long}")]]),
            [format!("a -> {long}")]
        );
    }

    #[test]
    fn links_that_grow_a_path_are_bounded() {
        let name = "n".repeat(200);
        let long = vec![name.as_str(); 15].join("/");
        let mut entries = vec![format!("l 0 {long}")];
        for n in 1..30 {
            entries.push(format!("l {n} {}/{long}", n - 1));
        }
        entries.push("f 29/x".into());
        let entries: Vec<_> = entries.iter().map(String::as_str).collect();
        assert!(error(&entries).contains("too long"));
    }

    #[test]
    fn the_extent_counts_each_file_once() {
        let tree = try_layers(&[&["d d", "f d/a", "h d/b d/a", "l c d"]]).unwrap();
        let expected = Extent {
            inodes: 4,
            bytes: 1,
            blocks: 4,
        };
        assert_eq!(tree.extent().unwrap(), expected);
    }
}
