//! Makes root images and checks their contents.

mod common;

use std::{fs, io::Write, os::unix::fs::symlink, path::Path};

use anyhow::Result;
use common::{Layout, Place, Tar, check, debugfs, docker_save, owner};
use flate2::{Compression, write::GzEncoder};
use pigeon::{
    Arch,
    image::{
        Built, Options, build,
        disk::{Format, parse_size, write_volume},
    },
};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use serde_json::{Value, json};
use tar::EntryType;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(vec![], Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Options that overwrite an existing image.
fn anew() -> Options {
    Options {
        force: true,
        ..Options::default()
    }
}

fn make(source: &Path, out: &Path) -> Result<Built> {
    build(source, out, &anew())
}

/// The error for `source`.
fn refused(source: &Path, out: &Path) -> String {
    let error = format!("{:#}", make(source, out).unwrap_err());
    assert!(!out.exists(), "an image despite: {error}");
    error
}

fn config() -> Value {
    json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": ["/app"],
            "Cmd": ["--port", "80"],
            "Env": ["PATH=/bin", "A=b"],
            "WorkingDir": "/srv",
            "User": "app",
            "StopSignal": "SIGQUIT",
            "Labels": {"x": "y"},
            "ExposedPorts": {"80/tcp": {}},
            "Volumes": null,
        },
    })
}

#[test]
fn a_docker_save_archive_becomes_an_image_with_owners_and_configuration() {
    let place = Place::new();
    let lower = Tar::new()
        .dir("./", 0o755, (0, 0))
        .dir("srv/", 0o2750, (1000, 50))
        .entry(
            EntryType::Regular,
            b"srv/set-uid",
            b"",
            (0, 5),
            0o4755,
            b"x",
        )
        .file("gone", "lower")
        .file("changed", "lower")
        .dir("opaque", 0o755, (0, 0))
        .file("opaque/gone", "x")
        .entry(EntryType::Char, b"null", b"", (0, 0), 0o666, b"")
        .entry(EntryType::Fifo, b"fifo", b"", (0, 0), 0o600, b"")
        .entry(
            EntryType::Regular,
            b"unreadable",
            b"",
            (0, 0),
            0o000,
            b"secret\n",
        )
        .xattr(
            "security.capability",
            b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        )
        .file("ping", "p")
        .long(&"directory/".repeat(12), b"")
        .bytes();
    let long = "name-".repeat(30);
    let upper = Tar::new()
        .file("changed", "upper\n")
        .file(".wh.gone", "")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "n")
        .hard_link("srv/linked", "changed")
        .symlink("absolute", "/etc/passwd")
        .long(&long, b"long\n")
        .bytes();
    let source = place.write("app.tar", docker_save(&[lower, upper], &config(), "app:1"));
    let out = place.path("app.ext4");
    let built = make(&source, &out).unwrap();

    check(&out);
    assert_eq!((built.form, built.layers), ("docker save archive", 2));
    assert_eq!(owner(&out, "/srv"), "02750 1000 50");
    assert_eq!(owner(&out, "/srv/set-uid"), "04755 0 5");
    assert_eq!(owner(&out, "/unreadable"), "0000 0 0");
    assert_eq!(debugfs(&out, "cat /unreadable"), "secret\n");
    assert_eq!(debugfs(&out, "cat /changed"), "upper\n");
    assert_eq!(debugfs(&out, "cat /srv/linked"), "upper\n");
    assert!(debugfs(&out, "stat /changed").contains("Links: 2"));
    assert_eq!(debugfs(&out, &format!("cat /{long}")), "long\n");
    assert_eq!(owner(&out, &format!("/{long}")), "0600 3000000 7");
    for gone in ["/gone", "/opaque/gone", "/.wh.gone", "/opaque/.wh..wh..opq"] {
        assert_eq!(owner(&out, gone), "", "{gone}");
    }
    assert_eq!(owner(&out, "/opaque/new"), "0644 0 0");
    assert!(debugfs(&out, "stat /null").contains("Type: character special"));
    assert!(debugfs(&out, "stat /null").contains("Device major/minor number: 01:03"));
    assert!(debugfs(&out, "stat /fifo").contains("Type: FIFO"));
    assert!(debugfs(&out, "stat /absolute").contains("\"/etc/passwd\""));
    assert!(debugfs(&out, "stat /ping").contains("security.capability (20)"));
    assert!(debugfs(&out, "stat /srv").contains("mtime: 0x6553f100"));

    let written = fs::read(place.path("app.run.json")).unwrap();
    let written: Value = serde_json::from_slice(&written).unwrap();
    let expected = json!({"ImageConfig": {
        "Entrypoint": ["/app"],
        "Cmd": ["--port", "80"],
        "Env": ["PATH=/bin", "A=b"],
        "WorkingDir": "/srv",
        "User": "app",
        "StopSignal": "SIGQUIT",
        "ExposedPorts": {"80/tcp": {}},
    }, "Platform": "linux/amd64"});
    assert_eq!(written, expected);
}

#[test]
fn an_image_without_configuration_has_an_empty_one() {
    let place = Place::new();
    for config in [
        json!({"config": null}),
        json!({}),
        json!({"config": {"Cmd": null, "User": "", "Env": []}}),
    ] {
        let source = place.write("a.tar", docker_save(&[Tar::new().bytes()], &config, "a:1"));
        let built = make(&source, &place.path("a.ext4")).unwrap();
        assert_eq!(built.image_config, Some(json!({})));
    }
}

#[test]
fn an_oci_layout_is_read_from_a_directory_or_an_archive() {
    let place = Place::new();
    let architecture = if cfg!(target_arch = "x86_64") {
        "amd64"
    } else {
        "arm64"
    };
    let lower = gzip(&Tar::new().file("a", "lower").file("b", "b\n").bytes());
    let upper = compress_to_vec(
        Tar::new().file("a", "upper\n").bytes().as_slice(),
        CompressionLevel::Fastest,
    );
    let mut layout = Layout::default();
    let mut ours = layout.image(&[lower, upper], &config());
    ours["platform"] = json!({"os": "linux", "architecture": architecture});
    let mut other = layout.image(&[Tar::new().file("other", "").bytes()], &json!({}));
    other["platform"] = json!({"os": "linux", "architecture": "s390x"});
    let mut signature = layout.image(&[], &json!({}));
    signature["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    let nested = layout.json(
        "application/vnd.oci.image.index.v1+json",
        &json!({"manifests": [other, ours, signature]}),
    );
    let layout = layout.index(&[nested]);

    layout.folder(&place.path("folder"));
    let sources = [
        place.path("folder"),
        place.write("plain.tar", layout.archive()),
        place.write("packed.tar.gz", gzip(&layout.archive())),
    ];
    for source in sources {
        let out = place.path("oci.ext4");
        let built = make(&source, &out).unwrap();
        assert_eq!((built.form, built.layers), ("OCI image", 2), "{source:?}");
        assert_eq!(
            debugfs(&out, "cat /a") + &debugfs(&out, "cat /b"),
            "upper\nb\n"
        );
        assert_eq!(built.image_config.unwrap()["User"], "app");
        check(&out);
    }
}

#[test]
fn damage_is_detected_before_the_image_exists() {
    let place = Place::new();
    let layer = Tar::new().file("a", "contents").bytes();
    let mut layout = Layout::default();
    let image = layout.image(&[layer], &config());
    let mut layout = layout.index(&[image]);
    let out = place.path("out.ext4");
    for (name, bytes) in layout.files.clone() {
        let Some(at) = bytes
            .windows(8)
            .position(|window| window == b"contents" || window == b"\"config\"")
        else {
            continue;
        };
        let mut damaged = bytes.clone();
        damaged[at + 1] ^= 1;
        layout.files.insert(name.clone(), damaged);
        let error = refused(&place.write("x.tar", layout.archive()), &out);
        assert!(error.contains("SHA-256"), "{error}");
        layout.files.insert(name, bytes);
    }
    let archive = layout.archive();
    let error = refused(
        &place.write("short.tar", &archive[..archive.len() / 2]),
        &out,
    );
    assert!(error.contains("not a whole tar archive"), "{error}");
    layout
        .files
        .retain(|name, bytes| !name.starts_with("blobs") || bytes.starts_with(b"{"));
    let error = refused(&place.write("less.tar", layout.archive()), &out);
    assert!(error.contains("is missing in the image"), "{error}");
}

#[test]
fn one_of_several_images_is_chosen_by_its_tag() {
    let place = Place::new();
    let manifest = json!([
        {"Config": "c1", "RepoTags": ["one:1", "registry/uno:1"], "Layers": ["l"]},
        {"Config": "c2", "RepoTags": ["two:2"], "Layers": ["l"]},
    ]);
    let archive = Tar::new()
        .file("l", Tar::new().file("x", "").bytes())
        .file("c1", json!({"config": {"Cmd": ["one"]}}).to_string())
        .file("c2", json!({"config": {"Cmd": ["two"]}}).to_string())
        .file("manifest.json", manifest.to_string());
    let source = place.write("two.tar", archive.bytes());
    let out = place.path("x.ext4");
    let error = refused(&source, &out);
    assert!(
        error.contains("there are 2 images in it") && error.contains("--tag two:2"),
        "{error}"
    );
    for (tag, cmd) in [("two:2", "two"), ("one:1", "one"), ("uno:1", "one")] {
        let options = Options {
            tag: Some(tag.into()),
            ..anew()
        };
        let built = build(&source, &out, &options).unwrap();
        assert_eq!(built.image_config.unwrap()["Cmd"][0], cmd);
    }
    let options = Options {
        tag: Some("three".into()),
        ..anew()
    };
    assert!(
        build(&source, &out, &options)
            .unwrap_err()
            .to_string()
            .contains("there is no three")
    );
}

#[test]
fn a_docker_save_archive_of_several_platforms_has_the_wanted_one() {
    let place = Place::new();
    let platforms = ["amd64", "arm64", "s390x"];
    let mut layout = Layout::default();
    let manifests = platforms.map(|architecture| {
        let layer = Tar::new().file("x", format!("{architecture}\n")).bytes();
        let config = json!({"os": "linux", "architecture": architecture});
        let mut image = layout.image(&[layer], &config);
        image["platform"] = config;
        image
    });
    let nested = json!({"manifests": manifests});
    let mut nested = layout.json("application/vnd.oci.image.index.v1+json", &nested);
    nested["annotations"] = json!({"io.containerd.image.name": "docker.io/library/app:1"});
    let mut layout = layout.index(&[nested]);
    let name = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap();
        format!("blobs/{}", digest.replace(':', "/"))
    };
    // The platform of docker's host.
    let foreign: Value = serde_json::from_slice(&layout.files[&name(&manifests[2])]).unwrap();
    let saved = json!([{
        "Config": name(&foreign["config"]),
        "RepoTags": ["app:1"],
        "Layers": [name(&foreign["layers"][0])],
    }]);
    let saved = saved.to_string().into_bytes();
    layout.files.insert("manifest.json".into(), saved);
    let source = place.write("app.tar", layout.archive());
    let out = place.path("app.ext4");
    for (arch, tag) in [(Arch::X86_64, None), (Arch::Aarch64, Some("app:1"))] {
        let options = Options {
            arch,
            tag: tag.map(String::from),
            ..anew()
        };
        let built = build(&source, &out, &options).unwrap();
        assert_eq!(built.foreign_platform, None);
        let expected = format!("{}\n", arch.debian_name());
        assert_eq!(debugfs(&out, "cat /x"), expected);
    }
    // Its layers are missing.
    layout
        .files
        .retain(|_, bytes| !bytes.windows(6).any(|window| window == b"amd64\n"));
    let source = place.write("less.tar", layout.archive());
    let options = Options {
        arch: Arch::X86_64,
        ..anew()
    };
    let built = build(&source, &out, &options).unwrap();
    assert_eq!(built.foreign_platform.unwrap(), "linux/s390x");
    assert_eq!(debugfs(&out, "cat /x"), "s390x\n");
}

#[test]
fn an_old_archive_shares_a_layer_by_a_link() {
    let place = Place::new();
    let manifest =
        json!([{"Config": "c", "RepoTags": null, "Layers": ["a/layer.tar", "b/layer.tar"]}]);
    let archive = Tar::new()
        .file("a/layer.tar", Tar::new().file("x", "x\n").bytes())
        .symlink("b/layer.tar", "../a/layer.tar")
        .file("c", "{}")
        .file("manifest.json", manifest.to_string());
    let source = place.write("old.tar", archive.bytes());
    let out = place.path("x.ext4");
    assert_eq!(make(&source, &out).unwrap().layers, 2);
    assert_eq!(debugfs(&out, "cat /x"), "x\n");
}

#[test]
fn a_tar_archive_and_a_directory_are_used_as_they_are() {
    let place = Place::new();
    let files = Tar::new()
        .entry(
            EntryType::Regular,
            b"etc/owned",
            b"",
            (12, 34),
            0o640,
            b"o\n",
        )
        .file("etc/.wh.kept", "not a layer's")
        .file("manifest.json", "[\"somebody's own\"]");
    let out = place.path("tar.ext4");
    let built = make(&place.write("files.tar.gz", gzip(&files.bytes())), &out).unwrap();
    assert_eq!(
        (built.form, built.image_config),
        ("tar archive of files", None)
    );
    assert_eq!(owner(&out, "/etc/owned"), "0640 12 34");
    assert_eq!(owner(&out, "/etc/.wh.kept"), "0644 0 0");
    assert!(!place.path("tar.run.json").exists());

    let dir = place.path("dir");
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("sub/one"), "1\n").unwrap();
    fs::hard_link(dir.join("sub/one"), dir.join("two")).unwrap();
    symlink("/nowhere", dir.join("link")).unwrap();
    let out = place.path("dir.ext4");
    let built = make(&dir, &out).unwrap();
    assert_eq!(built.form, "directory");
    assert_eq!(debugfs(&out, "cat /two"), "1\n");
    assert!(debugfs(&out, "stat /two").contains("Links: 2"));
    assert!(debugfs(&out, "stat /link").contains("\"/nowhere\""));
    check(&out);
}

#[test]
fn hostile_layers_reach_nothing_outside_of_the_image() {
    let place = Place::new();
    let victim = place.write("victim", "untouched");
    let outside = place.0.path().to_str().unwrap();
    let out = place.path("out.ext4");
    let evil = |files: Tar| place.write("evil.tar", files.bytes());

    for name in ["../victim", "a/../../victim", "/../victim"] {
        let error = refused(&evil(Tar::new().file(name, "evil")), &out);
        assert!(error.contains("leads out of the image"), "{error}");
        let error = refused(&evil(Tar::new().hard_link("x", name)), &out);
        assert!(error.contains("leads out of the image"), "{error}");
    }
    // A link to a host file by its absolute path finds no such file in the image.
    let error = refused(
        &evil(Tar::new().hard_link("x", victim.to_str().unwrap())),
        &out,
    );
    assert!(error.contains("there is no such"), "{error}");
    // Writing through a link stays inside the image.
    for target in [outside, "../../../../../../../../../../..", "/"] {
        let files = Tar::new()
            .symlink("link", target)
            .file("link/victim", "evil\n");
        make(&evil(files), &out).unwrap();
        check(&out);
        let inside = if target == outside {
            format!("{outside}/victim")
        } else {
            "/victim".into()
        };
        assert_eq!(debugfs(&out, &format!("cat \"{inside}\"")), "evil\n");
        fs::remove_file(&out).unwrap();
    }
    // A symbolic link replaced by a file is not followed.
    let files = Tar::new()
        .symlink("x", victim.to_str().unwrap())
        .file("x", "evil\n");
    make(&evil(files), &out).unwrap();
    assert_eq!(debugfs(&out, "cat /x"), "evil\n");
    fs::remove_file(&out).unwrap();
    // A whiteout of the parent directory, and layer names that lead outside.
    let save = docker_save(&[Tar::new().file("d/.wh...", "").bytes()], &json!({}), "a");
    assert!(refused(&place.write("evil.tar", save), &out).contains("a whiteout of nothing"));
    let manifest = json!([{"Config": "../victim", "RepoTags": [], "Layers": []}]);
    let save = Tar::new().file("manifest.json", manifest.to_string());
    assert!(refused(&evil(save), &out).contains("lies outside of the image"));
    let mut layout = Layout::default();
    let mut image = layout.image(&[], &json!({}));
    image["digest"] = json!("sha256:../../../victim");
    layout.index(&[image]).folder(&place.path("layout"));
    assert!(refused(&place.path("layout"), &out).contains("a digest of an unknown kind"));
    assert_eq!(fs::read_to_string(victim).unwrap(), "untouched");
}

#[test]
fn a_blob_that_is_a_link_to_a_file_of_the_host_is_not_read() {
    let place = Place::new();
    let mut layout = Layout::default();
    let secret = place.write("secret", Tar::new().file("x", "secret").bytes());
    let image = layout.image(&[fs::read(&secret).unwrap()], &json!({}));
    let layout = layout.index(&[image]);
    layout.folder(&place.path("layout"));
    let (name, _) = layout
        .files
        .iter()
        .find(|(_, bytes)| bytes.starts_with(b"x\0"))
        .unwrap();
    let blob = place.path("layout").join(name);
    fs::remove_file(&blob).unwrap();
    symlink(&secret, &blob).unwrap();
    let out = place.path("out");
    assert!(refused(&place.path("layout"), &out).contains("is missing in the image"));

    // Also not through a parent directory; a link inside of the image is followed.
    let dir = place.path("saved");
    fs::create_dir_all(dir.join("a")).unwrap();
    let manifest = json!([{"Config": "c", "RepoTags": null, "Layers": ["up/secret", "b"]}]);
    fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(dir.join("c"), "{}").unwrap();
    fs::write(dir.join("a/layer.tar"), Tar::new().file("x", "x\n").bytes()).unwrap();
    symlink("a/layer.tar", dir.join("b")).unwrap();
    symlink(place.0.path(), dir.join("up")).unwrap();
    assert!(refused(&dir, &out).contains("up/secret is missing in the image"));
    fs::write(dir.join("a/secret"), Tar::new().bytes()).unwrap();
    fs::remove_file(dir.join("up")).unwrap();
    symlink("a", dir.join("up")).unwrap();
    make(&dir, &out).unwrap();
    assert_eq!(debugfs(&out, "cat /x"), "x\n");
}

#[test]
fn a_computed_size_fits_many_small_files_with_room_to_spare() {
    let place = Place::new();
    let mut tar = Tar::new();
    for n in 0..6000 {
        tar = tar.file(&format!("d{}/{n}", n % 7), "x");
    }
    let source = place.write("many.tar", tar.bytes());
    let out = place.path("many.ext4");
    let built = make(&source, &out).unwrap();
    check(&out);
    assert_eq!(
        (built.files, built.size),
        (6008, fs::metadata(&out).unwrap().len())
    );
    let superblock = debugfs(&out, "show_super_stats -h");
    let number = |key: &str| -> u64 {
        let line = superblock
            .lines()
            .find(|line| line.starts_with(key))
            .unwrap();
        line.split_whitespace()
            .next_back()
            .unwrap()
            .parse()
            .unwrap()
    };
    assert!(number("Free blocks:") * 4096 > 32 << 20);
    assert!(number("Free inodes:") > 4000);

    let large = Tar::new().file("large", vec![7; 100 << 20]);
    let source = place.write("large.tar", large.bytes());
    make(&source, &out).unwrap();
    check(&out);
}

#[test]
fn a_size_that_is_given_is_kept_or_refused() {
    let place = Place::new();
    let source = place.write("a.tar", Tar::new().file("a", vec![1; 20 << 20]).bytes());
    let out = place.path("a.ext4");
    let sized = |size: &str| {
        let size = Some(parse_size(size).unwrap());
        build(&source, &out, &Options { size, ..anew() })
    };
    assert!(
        sized("16M")
            .unwrap_err()
            .to_string()
            .starts_with("a size of 16 MiB is too small")
    );
    assert!(!out.exists());
    sized("96M").unwrap();
    assert_eq!(fs::metadata(&out).unwrap().len(), 96 << 20);
}

#[test]
fn nothing_is_left_behind_beside_the_image() {
    let place = Place::new();
    let source = place.write("a.tar", gzip(&Tar::new().file("a", "a").bytes()));
    make(&source, &place.path("a.ext4")).unwrap();
    let _ = refused(
        &place.write("bad.tar", "no tar archive".repeat(100)),
        &place.path("b.ext4"),
    );
    let mut names: Vec<_> = fs::read_dir(place.0.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["a.ext4", "a.tar", "bad.tar"]);
}

#[test]
fn an_image_and_its_configuration_appear_complete_or_not_at_all() {
    let place = Place::new();
    let layers = [Tar::new().file("a", "a").bytes()];
    let source = place.write("app.tar", docker_save(&layers, &config(), "app:1"));
    // The configuration is replaced, not written to.
    let (old, kept) = (place.write("app.run.json", "{}"), place.path("kept"));
    fs::hard_link(&old, &kept).unwrap();
    make(&source, &place.path("app.ext4")).unwrap();
    assert_eq!(fs::read(&kept).unwrap(), b"{}");
    assert_ne!(fs::read(&old).unwrap(), b"{}");
    // Its name is too long.
    let error = refused(&source, &place.path(&"n".repeat(250)));
    assert!(error.contains(".run.json"), "{error}");
}

#[test]
fn existing_files_are_replaced_only_with_force() {
    let place = Place::new();
    let source = place.write(
        "app.tar",
        docker_save(&[Tar::new().file("a", "a").bytes()], &config(), "app:1"),
    );
    let out = place.path("app.ext4");
    let plainly = |source: &Path, out: &Path| {
        let built = build(source, out, &Options::default());
        built.map_err(|error| format!("{error:#}"))
    };
    plainly(&source, &out).unwrap();
    fs::write(&out, "state").unwrap();
    let error = plainly(&source, &out).unwrap_err();
    assert!(
        error.contains("app.ext4 exists already; --force overwrites it"),
        "{error}"
    );
    assert_eq!(fs::read(&out).unwrap(), b"state");

    // A changed configuration is an error, an identical one is not.
    fs::remove_file(&out).unwrap();
    plainly(&source, &out).unwrap();
    fs::remove_file(&out).unwrap();
    fs::write(place.path("app.run.json"), "{}").unwrap();
    let error = plainly(&source, &out).unwrap_err();
    assert!(error.contains("app.run.json exists already"), "{error}");
    assert!(!out.exists());
    make(&source, &out).unwrap();
    assert!(
        fs::read_to_string(place.path("app.run.json"))
            .unwrap()
            .contains("/app")
    );
    // A source without a configuration keeps the existing one.
    fs::write(place.path("app.run.json"), "mine").unwrap();
    let files = place.write("files.tar", Tar::new().file("a", "a").bytes());
    make(&files, &out).unwrap();
    assert_eq!(fs::read(place.path("app.run.json")).unwrap(), b"mine");

    // The source is never overwritten, also not through a link.
    let bytes = fs::read(&source).unwrap();
    symlink(&source, place.path("link.tar")).unwrap();
    for out in [&source, &place.path("link.tar")] {
        let error = format!("{:#}", make(&source, out).unwrap_err());
        assert!(error.contains("is the source itself"), "{error}");
    }
    assert_eq!(fs::read(&source).unwrap(), bytes);
    let error = format!("{:#}", make(place.0.path(), &out).unwrap_err());
    assert!(error.contains("is inside the source directory"), "{error}");
    let error = format!("{:#}", make(&source, Path::new("/dev/null")).unwrap_err());
    assert!(
        error.contains("/dev/null exists and is not a regular file"),
        "{error}"
    );
}

#[test]
fn unsupported_attributes_are_named_with_their_files() {
    let place = Place::new();
    let mut files = Tar::new();
    for number in 0..5 {
        files = files
            .xattr("security.selinux", b"label")
            .file(&format!("f{number}"), "");
    }
    let files = files
        .xattr("trusted.overlay.opaque", b"y")
        .dir("d/", 0o755, (0, 0))
        .record("SCHILY.acl.access", b"user::rw-")
        .file("acl", "");
    let out = place.path("x.ext4");
    let built = make(&place.write("x.tar", files.bytes()), &out).unwrap();
    let expected = [
        "extended attribute SCHILY.acl.access dropped: acl",
        "extended attribute security.selinux dropped: f0, f1, f2 and 2 more",
        "extended attribute trusted.overlay.opaque dropped: d/",
    ];
    assert_eq!(built.warnings, expected);
    // squashfs has no access lists.
    let files = Tar::new()
        .xattr("system.posix_acl_default", b"list")
        .dir("d/", 0o755, (0, 0))
        .records(&[
            ("SCHILY.xattr.system.posix_acl_access", b"list"),
            ("SCHILY.xattr.user.kept", b"x"),
        ])
        .file("d/f", "");
    let options = Options {
        format: Format::Squashfs,
        ..anew()
    };
    let squashfs = place.path("x.squashfs");
    let built = build(&place.write("z.tar", files.bytes()), &squashfs, &options).unwrap();
    let expected = [
        "extended attribute system.posix_acl_access dropped: d/f",
        "extended attribute system.posix_acl_default dropped: d/",
    ];
    assert_eq!(built.warnings, expected);
    // An attribute that is too large for the file system is an error.
    let files = Tar::new().xattr("user.much", &[0; 5000]).file("f", "");
    fs::remove_file(&out).unwrap();
    let error = refused(&place.write("y.tar", files.bytes()), &out);
    assert!(error.contains("f:") || error.contains("write f"), "{error}");
    assert!(error.contains("attribute much of 5000 bytes"), "{error}");
}

#[test]
fn a_directorys_attributes_are_kept_in_the_image() {
    let place = Place::new();
    let dir = place.path("dir");
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("sub/file"), "").unwrap();
    let set = |path: &Path, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    set(&dir.join("sub"), "user.of-directory", b"1\n2");
    set(&dir.join("sub/file"), "user.of-file", b"f");
    symlink("sub", dir.join("link")).unwrap();
    // A symbolic link can only have attributes of the trusted namespace, which needs root.
    let root = rustix::process::geteuid().is_root();
    if root {
        set(&dir.join("link"), "trusted.of-link", b"l");
    }
    let out = place.path("dir.ext4");
    make(&dir, &out).unwrap();
    check(&out);
    let get = |path: &str, name: &str| debugfs(&out, &format!("ea_get -V {path} {name}"));
    assert_eq!(get("/sub", "user.of-directory"), "1\n2\n");
    assert_eq!(get("/sub/file", "user.of-file"), "f\n");
    if root {
        assert_eq!(get("/link", "trusted.of-link"), "l\n");
    }
}

#[test]
fn a_root_image_is_fully_allocated_and_has_only_the_images_files() {
    let place = Place::new();
    let source = place.write("a.tar", Tar::new().file("a", "a").bytes());
    let out = place.path("a.ext4");
    make(&source, &out).unwrap();
    let superblock = debugfs(&out, "show_super_stats -h");
    let is_zero = |key: &str| {
        let line = superblock
            .lines()
            .find(|line| line.starts_with(key))
            .unwrap();
        line.ends_with(" 0")
    };
    assert!(is_zero("Reserved block count:"), "{superblock}");
    assert_eq!(
        debugfs(&out, "ls -p /")
            .lines()
            .filter(|l| !l.is_empty())
            .count(),
        3
    );
    // The same source gives the same bytes.
    let again = place.path("again.ext4");
    make(&source, &again).unwrap();
    assert!(fs::read(&out).unwrap() == fs::read(&again).unwrap());
}

#[test]
fn a_file_in_thousands_of_pieces_and_a_large_image_are_sound() {
    let place = Place::new();
    let pieces: Vec<_> = (0..3000)
        .map(|n| format!("{},4096", n * 3 * 4096))
        .collect();
    let size = 3000 * 3 * 4096;
    let contents: Vec<u8> = (0..3000u32).flat_map(|n| vec![n as u8 | 1; 4096]).collect();
    let files = Tar::new()
        .records(&[
            ("GNU.sparse.size", size.to_string().as_bytes()),
            ("GNU.sparse.map", pieces.join(",").as_bytes()),
        ])
        .file("pieces", &contents);
    let source = place.write("pieces.tar", files.bytes());
    let out = place.path("pieces.ext4");
    make(&source, &out).unwrap();
    check(&out);
    let copy = place.path("copy");
    debugfs(&out, &format!("dump /pieces {}", copy.display()));
    let copy = fs::read(copy).unwrap();
    assert_eq!(copy.len(), size);
    for (n, group) in copy.chunks(3 * 4096).enumerate() {
        assert!(
            group[..4096].iter().all(|&byte| byte == n as u32 as u8 | 1),
            "{n}"
        );
        assert!(group[4096..].iter().all(|&byte| byte == 0), "{n}");
    }
    // Several groups, with a small last one.
    for size in ["1G", "20G", "129M"] {
        let options = Options {
            size: Some(parse_size(size).unwrap()),
            ..anew()
        };
        build(&source, &out, &options).unwrap();
        check(&out);
    }
}

#[test]
fn sparse_files_that_are_too_large_for_a_format_are_refused() {
    let place = Place::new();
    let sparse = |sizes: &[u64]| {
        let mut tar = Tar::new();
        for (number, size) in sizes.iter().enumerate() {
            let size = size.to_string();
            let size = ("GNU.sparse.size", size.as_bytes());
            tar = tar.records(&[size]).file(&format!("f{number}"), "");
        }
        place.write("sparse.tar", tar.bytes())
    };
    let out = place.path("x.ext4");
    let most = u64::from(u32::MAX) * 4096;
    make(&sparse(&[most]), &out).unwrap();
    check(&out);
    fs::remove_file(&out).unwrap();
    let error = refused(&sparse(&[most + 1]), &out);
    assert!(
        error.contains("f0 has 17592186040321 bytes, too many for ext4"),
        "{error}"
    );
    let huge = i64::MAX as u64 - 511;
    let error = refused(&sparse(&[huge; 3]), &out);
    assert!(error.contains("the files are too large"), "{error}");
    let erofs = Options {
        format: Format::Erofs,
        ..anew()
    };
    let error = build(&sparse(&[huge; 2]), &out, &erofs).unwrap_err();
    assert!(error.to_string().contains("16 TiB"), "{error}");
}

#[test]
fn a_volume_is_an_empty_file_system_with_an_identity_of_its_own() {
    let place = Place::new();
    let [one, two] = ["one.img", "two.img"].map(|name| place.path(name));
    for (volume, size) in [(&one, 64 << 20), (&two, 3 << 30)] {
        write_volume(volume, size).unwrap();
        check(volume);
        assert_eq!(fs::metadata(volume).unwrap().len(), size);
    }
    let uuid = |volume: &Path| {
        let superblock = debugfs(volume, "show_super_stats -h");
        let line = superblock
            .lines()
            .find(|line| line.starts_with("Filesystem UUID"));
        line.unwrap().to_string()
    };
    assert_ne!(uuid(&one), uuid(&two));
    assert!(write_volume(&one, 64 << 20).is_err());
    assert!(write_volume(&place.path("small"), 1 << 20).is_err());
    let left: Vec<_> = fs::read_dir(place.0.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn layers_of_every_common_compression_are_read() {
    let place = Place::new();
    let layer = place.write("layer", Tar::new().file("x", "x\n").bytes());
    for program in ["gzip", "bzip2", "xz", "zstd"] {
        let packed = std::process::Command::new(pigeon::assets::tool(program).unwrap())
            .arg("-c")
            .arg(&layer)
            .output()
            .unwrap()
            .stdout;
        // As a whole archive, and as a layer; concatenated streams are allowed.
        let whole = place.write("whole", &packed);
        let out = place.path(&format!("{program}.ext4"));
        make(&whole, &out).unwrap();
        assert_eq!(debugfs(&out, "cat /x"), "x\n", "{program}");
        let save = place.write("save.tar", docker_save(&[packed], &json!({}), "a:1"));
        make(&save, &out).unwrap();
        assert_eq!(debugfs(&out, "cat /x"), "x\n", "{program}");
    }
}

#[test]
fn concatenated_and_empty_zstd_frames_are_read() {
    let place = Place::new();
    let layer = Tar::new().file("x", vec![b'x'; 300_000]).bytes();
    let (first, second) = layer.split_at(200_000);
    let frame = |bytes: &[u8]| compress_to_vec(bytes, CompressionLevel::Fastest);
    // Skippable frames, as in zstd:chunked and pzstd. (RFC 8878 section 3.1.2)
    let skippable = |number: u8, size: u32| {
        let mut frame = vec![0x50 | number, 0x2a, 0x4d, 0x18];
        frame.extend(size.to_le_bytes());
        frame.resize(8 + size as usize, 0xff);
        frame
    };
    let mut stream = skippable(0, 4);
    for bytes in [frame(first), skippable(15, 100_000), frame(second)] {
        stream.extend(bytes);
    }
    let out = place.path("x.ext4");
    for end in [vec![], skippable(3, 0)] {
        let whole = place.write("whole", [&stream[..], &end].concat());
        make(&whole, &out).unwrap();
        assert_eq!(debugfs(&out, "cat /x").len(), 300_000);
    }
    let mut cut = [&stream[..], &skippable(3, 9)].concat();
    cut.pop();
    let error = refused(&place.write("cut", cut), &place.path("cut.ext4"));
    assert!(error.contains("cut is damaged or cut short"), "{error}");
}

#[test]
fn a_skopeo_directory_is_an_image() {
    let place = Place::new();
    let dir = place.path("dir");
    fs::create_dir(&dir).unwrap();
    let mut layout = Layout::default();
    let mut blob = |bytes: &[u8]| {
        let descriptor = layout.blob("", bytes);
        let digest = descriptor["digest"].as_str().unwrap();
        fs::write(dir.join(digest.strip_prefix("sha256:").unwrap()), bytes).unwrap();
        descriptor
    };
    let layer = blob(&gzip(&Tar::new().file("x", "x\n").bytes()));
    let config = blob(config().to_string().as_bytes());
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
    fs::write(dir.join("version"), "Directory Transport Version: 1.1\n").unwrap();
    let out = place.path("x.ext4");
    let built = make(&dir, &out).unwrap();
    assert_eq!((built.form, built.layers), ("skopeo directory", 1));
    assert_eq!(debugfs(&out, "cat /x"), "x\n");
    assert_eq!(built.image_config.unwrap()["User"], "app");
    let name = layer["digest"]
        .as_str()
        .unwrap()
        .strip_prefix("sha256:")
        .unwrap()
        .to_string();
    fs::write(dir.join(name), gzip(&Tar::new().file("x", "y\n").bytes())).unwrap();
    let error = format!("{:#}", make(&dir, &out).unwrap_err());
    assert!(error.contains("its SHA-256 is"), "{error}");
    // Docker's schema 1 manifests contain only layers.
    let old = json!({"schemaVersion": 1, "fsLayers": [{"blobSum": layer["digest"]}]});
    fs::write(dir.join("manifest.json"), old.to_string()).unwrap();
    let error = refused(&dir, &place.path("old.ext4"));
    assert!(error.contains("Docker's old schema 1"), "{error}");
}

#[test]
fn a_file_that_is_not_an_image_is_named_with_its_type() {
    let place = Place::new();
    let out = place.path("x.ext4");
    for (bytes, kind) in [
        (&b"\x7fELF\x02\x01\x01\0"[..], "a program (ELF)"),
        (b"PK\x03\x04", "a zip archive"),
        (b"FROM scratch\n", "a Dockerfile"),
        (b"", "empty"),
        (b"hsqs", "an image with squashfs"),
    ] {
        let error = refused(&place.write("thing", bytes), &out);
        let expected = format!("thing is {kind}, not a container image or an archive");
        assert!(error.ends_with(&expected), "{error}");
        assert!(error.is_ascii(), "{error}");
    }
    // Truncated compressed files.
    let files = gzip(&Tar::new().file("a", vec![7; 100_000]).bytes());
    for (name, packed) in [
        ("cut.tar.gz", &files[..files.len() / 2]),
        ("xz", b"\xfd7zXZ\0\0"),
    ] {
        let error = refused(&place.write(name, packed), &out);
        let expected = format!("{name} is damaged or cut short: unable to decompress");
        assert!(error.contains(&expected), "{error}");
    }
    // The error for a truncated layer contains its number.
    let packed = gzip(&Tar::new().file("a", vec![1; 50_000]).bytes());
    let half = packed[..packed.len() / 2].to_vec();
    let save = docker_save(&[Tar::new().bytes(), half], &json!({}), "a:1");
    let error = refused(&place.write("save.tar", save), &out);
    assert!(error.starts_with("layer 2 of 2: "), "{error}");
}
