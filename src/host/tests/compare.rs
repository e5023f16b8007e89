//! Compares images with what umoci unpacks from the same archives.

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use common::{
    Layout, Place, Tar, check,
    listing::{Listing, of_directory, of_erofs, of_ext4, of_squashfs},
};
use flate2::{Compression, write::GzEncoder};
use pigeon::{
    assets::tool,
    image::{Options, build, disk::Format},
    process::run,
};
use serde_json::json;
use tar::EntryType;

/// `cap_dac_override,cap_fowner=ep` in binary form (linux/capability.h, vfs_cap_data); one byte is a line
/// feed.
const CAPABILITY: &[u8] = b"\x01\0\0\x02\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// A directory to be packed by the host's tar programs.
fn stage(place: &Place, name: &str) -> PathBuf {
    let dir = place.path(name);
    fs::create_dir_all(dir.join("data")).unwrap();
    dir
}

fn pack(program: &str, options: &[&str], dir: &Path) -> Vec<u8> {
    let output = Command::new(tool(program).unwrap())
        .args(options)
        .args(["-cf", "-", "-C"])
        .arg(dir)
        .arg(".")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// Files with holes before, between and after their data.
fn sparse_files(place: &Place) -> PathBuf {
    let dir = stage(place, "sparse");
    let file = |name: &str| fs::File::create(dir.join("data").join(name)).unwrap();
    use std::os::unix::fs::FileExt;
    let db = file("db");
    db.write_all_at(b"begin", 0).unwrap();
    db.write_all_at(b"middle", 3 << 20).unwrap();
    db.write_all_at(&[7; 10_000], (5 << 20) + 100).unwrap();
    db.set_len(9 << 20).unwrap();
    file("empty").set_len(1 << 20).unwrap();
    let late = file("late");
    late.write_all_at(b"end", (2 << 20) - 3).unwrap();
    let many = file("many");
    for number in 0..60 {
        many.write_all_at(b"x", number * 16384).unwrap();
    }
    dir
}

/// Files with unusual names, links and modes.
fn ordinary_files(place: &Place) -> PathBuf {
    let dir = stage(place, "ordinary");
    let data = dir.join("data");
    let write = |name: &str, mode: u32, contents: &[u8]| {
        let path = data.join(name);
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    write("plain", 0o644, b"contents\n");
    write("set-uid", 0o4755, b"");
    write("spaces in its name", 0o600, b"s");
    write("ünïcödé", 0o640, b"u");
    write(&"long-name-".repeat(25), 0o644, b"l");
    write(
        "large",
        0o644,
        &(0..3_000_000u32).map(|n| n as u8).collect::<Vec<_>>(),
    );
    fs::create_dir(data.join("sticky")).unwrap();
    fs::set_permissions(data.join("sticky"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::hard_link(data.join("plain"), data.join("sticky/linked")).unwrap();
    symlink("plain", data.join("link")).unwrap();
    symlink("d/".repeat(100), data.join("long-link")).unwrap();
    dir
}

/// The layers of ten images.
fn images(place: &Place) -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let dir = |tar: Tar, name: &str| tar.dir(name, 0o755, (0, 0));
    let sparse = sparse_files(place);
    let ordinary = ordinary_files(place);
    let base = Tar::new()
        .dir("./", 0o755, (0, 0))
        .dir("etc/", 0o755, (0, 0))
        .file("etc/kept", "kept")
        .file("etc/changed", "lower")
        .file("etc/gone", "gone")
        .dir("usr/", 0o755, (0, 0))
        .dir("usr/bin/", 0o755, (0, 0))
        .file("usr/bin/tool", "tool")
        .symlink("bin", "usr/bin")
        .dir("opaque/", 0o700, (5, 6))
        .file("opaque/hidden", "x")
        .file("was-file", "x")
        .dir("was-dir/", 0o755, (0, 0))
        .file("was-dir/x", "x")
        .bytes();
    let upper = Tar::new()
        .dir("etc/", 0o750, (0, 3))
        .file("etc/changed", "upper")
        .file("etc/.wh.gone", "")
        .file("bin/new", "through a link")
        .dir("opaque/", 0o711, (5, 6))
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "n")
        .dir("was-file/", 0o755, (0, 0))
        .file("was-file/y", "y")
        .file("was-dir", "a file now")
        .bytes();
    let owners = Tar::new()
        .dir("./", 0o755, (0, 0))
        .dir("home/", 0o755, (0, 0))
        .dir("home/app/", 0o2750, (1000, 50))
        .entry(
            EntryType::Regular,
            b"home/app/secret",
            b"",
            (1000, 1000),
            0,
            b"s",
        )
        .entry(
            EntryType::Regular,
            b"home/app/write",
            b"",
            (70_000, 3_000_000),
            0o200,
            b"w",
        )
        .hard_link("home/app/again", "home/app/secret")
        .bytes();
    let devices = dir(dir(Tar::new(), "./"), "dev/")
        .entry(EntryType::Char, b"dev/null", b"", (0, 0), 0o666, b"")
        .entry(EntryType::Block, b"dev/disk", b"", (0, 6), 0o660, b"")
        .entry(EntryType::Fifo, b"dev/fifo", b"", (1, 1), 0o600, b"")
        .bytes();
    let attributes = dir(dir(Tar::new(), "./"), "bin/")
        .xattr("security.capability", CAPABILITY)
        .program("bin/ping", "ping")
        .xattr("user.note", b"line one\nline two\n")
        .dir("noted/", 0o755, (0, 0))
        .xattr("trusted.mark", b"\0\x01")
        .symlink("marked", "noted")
        .xattr("user.large", &[b'v'; 3000])
        .file("large", "l")
        .bytes();
    let times = dir(Tar::new(), "./")
        .record("mtime", b"1700000000.123456789")
        .file("fraction", "")
        .record("mtime", b"-1234567.5")
        .file("before-1970", "")
        .record("mtime", b"4200000000.25")
        .file("after-2038", "")
        .record("mtime", b"5000000000")
        .dir("after-2106/", 0o755, (0, 0))
        .bytes();
    let mut many = dir(dir(Tar::new(), "./"), "many/");
    for number in 0..1500 {
        let name = format!("many/{:x}", number * 40_503 % 65_536);
        many = many.file(&format!("{name}-{}", "n".repeat(number % 90)), name);
    }
    vec![
        (
            "ordinary files by GNU tar",
            vec![pack("tar", &["--format=posix"], &ordinary)],
        ),
        (
            "ordinary files by bsdtar",
            vec![pack("bsdtar", &["--format=pax"], &ordinary)],
        ),
        ("sparse files by bsdtar", vec![pack("bsdtar", &[], &sparse)]),
        (
            "sparse files by GNU tar",
            vec![pack("tar", &["--sparse", "--format=posix"], &sparse)],
        ),
        ("two layers", vec![base, upper]),
        ("owners and modes", vec![owners]),
        ("devices", vec![devices]),
        ("attributes", vec![attributes]),
        ("times", vec![times]),
        ("many files", vec![many.bytes()]),
    ]
}

/// An OCI layout with a tag, for umoci.
fn layout(place: &Place, number: usize, layers: &[Vec<u8>]) -> PathBuf {
    let mut layout = Layout::default();
    let gzip = |layer: &Vec<u8>| {
        let mut encoder = GzEncoder::new(vec![], Compression::fast());
        std::io::Write::write_all(&mut encoder, layer).unwrap();
        encoder.finish().unwrap()
    };
    let diff_ids: Vec<_> = layers
        .iter()
        .map(|layer| format!("sha256:{}", common::digest(layer)))
        .collect();
    let config = layout.json(
        "application/vnd.oci.image.config.v1+json",
        &json!({
            "architecture": pigeon::Arch::HOST.debian_name(),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }),
    );
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| layout.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip(layer)))
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": layers,
    });
    let mut manifest = layout.json("application/vnd.oci.image.manifest.v1+json", &manifest);
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "it"});
    let dir = place.path(&format!("layout{number}"));
    layout.index(&[manifest]).folder(&dir);
    dir
}

/// The differences, one line per file.
fn differences(ours: &Listing, theirs: &Listing) -> Vec<String> {
    let mut lines = vec![];
    for (path, record) in theirs {
        match ours.get(path) {
            Some(own) if own == record => {}
            own => lines.push(format!("{path:?}: {own:?}, not {record:?}")),
        }
    }
    lines.extend(
        ours.keys()
            .filter(|path| !theirs.contains_key(*path))
            .map(|path| format!("{path:?}: not in theirs")),
    );
    lines
}

#[test]
fn ten_archives_unpack_as_with_umoci() {
    let place = Place::new();
    // Without root, umoci makes no devices, keeps no owners, and cannot read everything that it has unpacked.
    let root = rustix::process::geteuid().is_root();
    for (number, (name, layers)) in images(&place).iter().enumerate() {
        if !root && ["devices", "attributes", "owners and modes"].contains(name) {
            continue;
        }
        let source = layout(&place, number, layers);
        let bundle = place.path(&format!("bundle{number}"));
        let mut umoci = Command::new(tool("umoci").unwrap());
        umoci.args(["unpack", "--image"]);
        umoci.arg(format!("{}:it", source.display())).arg(&bundle);
        if !root {
            umoci.arg("--rootless");
        }
        run(&mut umoci).unwrap();
        let mut theirs = of_directory(&bundle.join("rootfs"));
        if !root {
            for record in theirs.values_mut() {
                record.owner = (0, 0);
                // umoci stores the owner in it.
                record.xattrs.remove("user.rootlesscontainers");
            }
        }
        let without_owners = |mut listing: Listing| {
            if !root {
                listing
                    .values_mut()
                    .for_each(|record| record.owner = (0, 0));
            }
            listing
        };

        let image = |format: Format| {
            let out = place.path(&format!("image{number}.{}", format.name()));
            let options = Options {
                format,
                force: true,
                ..Options::default()
            };
            let built = build(&source, &out, &options).unwrap();
            assert_eq!(built.warnings, [""; 0], "{name}");
            out
        };
        let ext4 = image(Format::Ext4);
        check(&ext4);
        let (ours, files) = of_ext4(&ext4, theirs.keys());
        let ours = without_owners(ours);
        let lines = differences(&ours, &theirs);
        assert!(lines.is_empty(), "{name}, ext4:\n{}", lines.join("\n"));
        let mut inodes: Vec<_> = walk_inodes(&bundle.join("rootfs"));
        inodes.sort_unstable();
        inodes.dedup();
        assert_eq!(files, inodes.len() as u64, "{name}: files");

        // squashfs stores whole seconds from 1970 to 2106.
        let mut squashfs = without_owners(of_squashfs(&image(Format::Squashfs)));
        let mut expected = theirs.clone();
        for record in expected.values_mut() {
            record.mtime = (record.mtime.0.clamp(0, u32::MAX.into()), 0);
        }
        if !root {
            // unsquashfs sets these bits for root only.
            for listing in [&mut squashfs, &mut expected] {
                let files = listing
                    .values_mut()
                    .filter(|record| record.mode & 0o170_000 == 0o100_000);
                files.for_each(|record| record.mode &= !0o6000);
            }
        }
        let lines = differences(&squashfs, &expected);
        assert!(lines.is_empty(), "{name}, squashfs:\n{}", lines.join("\n"));

        let mut erofs = without_owners(of_erofs(&image(Format::Erofs)));
        let mut expected = theirs.clone();
        for listing in [&mut erofs, &mut expected] {
            for record in listing.values_mut() {
                (record.links, record.xattrs) = (0, Default::default());
                // erofs-utils 1.5 changes the owner after the mode, which clears these bits.
                if record.mode & 0o170_000 == 0o100_000 {
                    record.mode &= !0o6000;
                }
            }
        }
        let lines = differences(&erofs, &expected);
        assert!(lines.is_empty(), "{name}, erofs:\n{}", lines.join("\n"));
    }
}

#[test]
fn old_gnu_sparse_files_are_complete_and_stay_sparse() {
    let place = Place::new();
    let sparse = sparse_files(&place);
    let archive = pack("tar", &["--sparse", "--format=gnu"], &sparse);
    let out = place.path("old.ext4");
    let made = build(&place.write("old.tar", archive), &out, &Options::default());
    assert_eq!(made.unwrap().warnings, [""; 0]);
    check(&out);
    let mut expected = of_directory(&sparse);
    for record in expected.values_mut() {
        record.mtime.1 = 0; // the format has whole seconds
    }
    let (mut ours, _) = of_ext4(&out, expected.keys());
    if !rustix::process::geteuid().is_root() {
        for listing in [&mut ours, &mut expected] {
            listing
                .values_mut()
                .for_each(|record| record.owner = (0, 0));
        }
    }
    let lines = differences(&ours, &expected);
    assert!(lines.is_empty(), "{}", lines.join("\n"));
    let stat = common::debugfs(&out, "stat /data/db");
    // 3 blocks for the 10,000 bytes and one for each of the other two pieces, in units of 512 bytes.
    assert!(stat.contains("Blockcount: 40"), "{stat}");
    assert!(common::debugfs(&out, "stat /data/empty").contains("Blockcount: 0"));
}

fn walk_inodes(root: &Path) -> Vec<u64> {
    let mut found = vec![root.metadata().unwrap().ino()];
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        if metadata.is_dir() {
            found.extend(walk_inodes(&path));
        } else {
            found.push(metadata.ino());
        }
    }
    found
}
