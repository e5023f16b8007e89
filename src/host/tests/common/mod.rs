//! Container images made by hand.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod fake;
pub mod listing;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// A tar archive under construction. Names are written as they are, even invalid ones.
pub struct Tar(Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Tar {
        Tar(Builder::new(vec![]))
    }

    pub fn entry(
        mut self,
        kind: EntryType,
        name: &[u8],
        link: &[u8],
        owner: (u64, u64),
        mode: u32,
        data: &[u8],
    ) -> Tar {
        let mut header = Header::new_gnu();
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name);
        gnu.linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub fn file(self, name: &str, data: impl AsRef<[u8]>) -> Tar {
        self.entry(
            EntryType::Regular,
            name.as_bytes(),
            b"",
            (0, 0),
            0o644,
            data.as_ref(),
        )
    }

    pub fn program(self, name: &str, data: impl AsRef<[u8]>) -> Tar {
        self.entry(
            EntryType::Regular,
            name.as_bytes(),
            b"",
            (0, 0),
            0o755,
            data.as_ref(),
        )
    }

    pub fn dir(self, name: &str, mode: u32, owner: (u64, u64)) -> Tar {
        self.entry(EntryType::Directory, name.as_bytes(), b"", owner, mode, b"")
    }

    pub fn symlink(self, name: &str, target: &str) -> Tar {
        self.entry(
            EntryType::Symlink,
            name.as_bytes(),
            target.as_bytes(),
            (0, 0),
            0o777,
            b"",
        )
    }

    pub fn hard_link(self, name: &str, target: &str) -> Tar {
        self.entry(
            EntryType::Link,
            name.as_bytes(),
            target.as_bytes(),
            (0, 0),
            0o644,
            b"",
        )
    }

    /// An extended attribute of the next entry.
    pub fn xattr(self, name: &str, value: &[u8]) -> Tar {
        self.record(&format!("SCHILY.xattr.{name}"), value)
    }

    /// A record in the next entry's extended header.
    pub fn record(self, key: &str, value: &[u8]) -> Tar {
        self.records(&[(key, value)])
    }

    /// Records in the next entry's extended header.
    pub fn records(mut self, records: &[(&str, &[u8])]) -> Tar {
        self.0
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    /// A file whose name does not fit into a header.
    pub fn long(mut self, name: &str, data: &[u8]) -> Tar {
        let mut header = Header::new_gnu();
        header.set_mode(0o600);
        header.set_uid(3_000_000);
        header.set_gid(7);
        header.set_size(data.len() as u64);
        self.0.append_data(&mut header, name, data).unwrap();
        self
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Files of an OCI image layout.
#[derive(Default)]
pub struct Layout {
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Layout {
    /// Adds a blob and returns its descriptor.
    pub fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = digest(bytes);
        self.files
            .insert(format!("blobs/sha256/{digest}"), bytes.to_vec());
        json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()})
    }

    pub fn json(&mut self, media_type: &str, value: &Value) -> Value {
        self.blob(media_type, value.to_string().as_bytes())
    }

    /// Adds an image and returns its manifest's descriptor.
    pub fn image(&mut self, layers: &[Vec<u8>], config: &Value) -> Value {
        let config = self.json("application/vnd.oci.image.config.v1+json", config);
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| self.blob("application/vnd.oci.image.layer.v1.tar", layer))
            .collect();
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
        self.json("application/vnd.oci.image.manifest.v1+json", &manifest)
    }

    /// Completes it with an index of these manifests.
    pub fn index(mut self, manifests: &[Value]) -> Layout {
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        self.files
            .insert("index.json".into(), index.to_string().into());
        let version = r#"{"imageLayoutVersion":"1.0.0"}"#;
        self.files.insert("oci-layout".into(), version.into());
        self
    }

    pub fn folder(&self, dir: &Path) {
        for (name, bytes) in &self.files {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    pub fn archive(&self) -> Vec<u8> {
        let files = self.files.iter();
        files
            .fold(Tar::new(), |tar, (name, bytes)| tar.file(name, bytes))
            .bytes()
    }
}

/// A `docker save` archive of one image.
pub fn docker_save(layers: &[Vec<u8>], config: &Value, tag: &str) -> Vec<u8> {
    let config = config.to_string();
    let names: Vec<_> = (0..layers.len())
        .map(|number| format!("{number}/layer.tar"))
        .collect();
    let manifest = json!([{"Config": "config.json", "RepoTags": [tag], "Layers": names}]);
    let mut tar = Tar::new();
    for (name, layer) in names.iter().zip(layers) {
        tar = tar.file(name, layer);
    }
    tar.file("config.json", config)
        .file("manifest.json", manifest.to_string())
        .bytes()
}

/// The guest architecture: `PIGEON_ARCH`.
pub fn arch() -> pigeon::Arch {
    pigeon::Arch::chosen().unwrap()
}

/// A layer with busybox and the usual directories and accounts.
pub fn busybox_layer(arch: pigeon::Arch) -> Vec<u8> {
    let path = pigeon::assets::busybox(arch).unwrap();
    let mut tar = Tar::new();
    for dir in [
        "bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "var",
    ] {
        tar = tar.dir(dir, 0o755, (0, 0));
    }
    tar = tar
        .program("bin/busybox", fs::read(&path).unwrap())
        .file(
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n",
        )
        .file("etc/group", "root:x:0:\ntty:x:5:\napp:x:1000:\n");
    let applets = pigeon::process::run(arch.run_here(&path).unwrap().arg("--list")).unwrap();
    let applets = applets.lines().filter(|applet| *applet != "busybox");
    applets
        .fold(tar, |tar, applet| {
            tar.symlink(&format!("bin/{applet}"), "busybox")
        })
        .bytes()
}

/// The output of debugfs for an image.
pub fn debugfs(image: &Path, request: &str) -> String {
    let debugfs = pigeon::assets::tool("debugfs").unwrap();
    pigeon::process::run(Command::new(debugfs).args(["-R", request]).arg(image)).unwrap()
}

/// Mode, user and group of a file in an image; empty if it does not exist.
pub fn owner(image: &Path, path: &str) -> String {
    let stat = debugfs(image, &format!("stat \"{path}\""));
    let after = |key: &str| {
        let rest = stat.split_once(key).map(|(_, rest)| rest);
        rest.and_then(|rest| rest.split_whitespace().next())
            .unwrap_or_default()
            .to_string()
    };
    [after("Mode:"), after("User:"), after("Group:")]
        .join(" ")
        .trim()
        .into()
}

pub fn check(image: &Path) {
    let e2fsck = pigeon::assets::tool("e2fsck").unwrap();
    pigeon::process::run(Command::new(e2fsck).arg("-fn").arg(image)).unwrap();
}

/// A directory for one test's files.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
}
