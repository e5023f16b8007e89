//! The sources of an image: an archive of `docker save`, an OCI image layout as a directory or an archive, a
//! tar archive of files, a directory. (OCI image-spec: image-layout.md, manifest.md, config.md; moby's
//! image/tarexport for `manifest.json`.)

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    kind::{Kind, describe},
    layer::{Blob, Layer},
};
use crate::Arch;

/// Maximum depth of nested indexes.
const MAX_INDEXES: usize = 8;

/// A container image, or only files.
#[derive(Debug)]
pub struct Source {
    /// Its detected form.
    pub form: &'static str,
    /// In order, from the lowest.
    pub layers: Vec<Layer>,
    /// Whether whiteouts in the layers hide files of lower layers.
    pub layered: bool,
    /// The image's own configuration (OCI image-spec config.md), if it has one.
    pub config: Option<Value>,
}

impl Source {
    /// Opens the directory or uncompressed archive at `path`. `tag` selects one of several images in an
    /// archive, and `arch` one of an image's architectures.
    pub fn open(path: &Path, arch: Arch, tag: Option<&str>) -> Result<Source> {
        let blobs = if path.is_dir() {
            let root = path.canonicalize();
            Blobs::Folder(root.with_context(|| format!("unable to read {path:?}"))?)
        } else {
            Blobs::Archive(index(path)?)
        };
        let is_layout = blobs.get("oci-layout")?.is_some() && blobs.get("index.json")?.is_some();
        if let Some(images) = saved(&blobs)? {
            let source = from_saved(&blobs, &images, tag)?;
            // Of several platforms, docker's manifest.json has one and the index all. The index is not used
            // otherwise, as some versions of docker list only a part of the layers there.
            if is_layout
                && source.foreign_platform(arch).is_some()
                && let Ok(other) = from_layout(&blobs, arch, tag)
                && other.foreign_platform(arch).is_none()
            {
                return Ok(other);
            }
            return Ok(source);
        }
        if is_layout {
            return from_layout(&blobs, arch, tag);
        }
        if is_skopeo_dir(&blobs)? {
            return from_skopeo_dir(&blobs);
        }
        ensure!(
            tag.is_none(),
            "there are no images in {path:?} to choose from by a tag"
        );
        let (form, layer) = match blobs {
            Blobs::Folder(_) => ("directory", Layer::directory(path)?),
            Blobs::Archive(_) => ("tar archive of files", Layer::Tar(Blob::file(path)?)),
        };
        Ok(Source {
            form,
            layers: vec![layer],
            layered: false,
            config: None,
        })
    }

    /// The `ImageConfig` for a run.json.
    pub fn image_config(&self) -> Option<Value> {
        self.config.as_ref().map(image_config)
    }

    /// The image's platform: `linux/arm64`.
    pub fn platform(&self) -> Option<String> {
        let config = self.config.as_ref()?;
        let [os, architecture] = ["os", "architecture"].map(|key| config[key].as_str());
        Some(format!("{}/{}", os.unwrap_or("linux"), architecture?))
    }

    /// The same, if it is for another architecture.
    pub fn foreign_platform(&self, arch: Arch) -> Option<String> {
        self.platform()
            .filter(|platform| *platform != arch.platform())
    }
}

/// The part of an image's configuration that goes into a run.json: what the init reads, and what `pigeon`
/// uses in addition (ports for `-P`, volumes, the health check).
pub fn image_config(config: &Value) -> Value {
    const KEYS: [&str; 9] = [
        "Entrypoint",
        "Cmd",
        "Env",
        "WorkingDir",
        "User",
        "StopSignal",
        "ExposedPorts",
        "Volumes",
        "Healthcheck",
    ];
    let config = &config["config"];
    let mut result = json!({});
    for key in KEYS {
        let value = &config[key];
        let empty = value.as_str().is_some_and(str::is_empty)
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(serde_json::Map::is_empty);
        if !value.is_null() && !empty {
            result[key] = value.clone();
        }
    }
    result
}

/// The named parts of an image.
enum Blobs {
    /// A directory, by its path without symbolic links.
    Folder(PathBuf),
    Archive(HashMap<String, Part>),
}

enum Part {
    Blob(Blob),
    /// An old `docker save` stores a layer shared by two images once.
    Link(String),
}

impl Blobs {
    fn get(&self, name: &str) -> Result<Option<Blob>> {
        match self {
            Blobs::Folder(root) => {
                // A link could lead to files of the host that are not part of the image.
                let path = root.join(name).canonicalize().ok();
                let path = path.filter(|path| path.starts_with(root) && path.is_file());
                path.map(|path| Blob::file(&path)).transpose()
            }
            Blobs::Archive(parts) => {
                let mut name = name;
                for _ in 0..2 {
                    match parts.get(name) {
                        Some(Part::Blob(blob)) => return Ok(Some(blob.clone())),
                        Some(Part::Link(target)) => name = target,
                        None => break,
                    }
                }
                Ok(None)
            }
        }
    }

    /// A required part. If its name is a digest, its contents are checked against it.
    fn need(&self, name: &str) -> Result<Blob> {
        let clean = inside(name).with_context(|| format!("{name:?} lies outside of the image"))?;
        let blob = self.get(&clean)?;
        let mut blob = blob.with_context(|| format!("{name} is missing in the image"))?;
        blob.sha256 = clean.strip_prefix("blobs/sha256/").map(String::from);
        Ok(blob)
    }

    fn need_digest(&self, descriptor: &Value) -> Result<Blob> {
        self.need(&format!("blobs/sha256/{}", hex_digest(descriptor)?))
    }

    fn json(&self, blob: &Blob) -> Result<Value> {
        Ok(serde_json::from_slice(&blob.read()?)?)
    }
}

/// The SHA-256 in a descriptor, in hexadecimal.
fn hex_digest(descriptor: &Value) -> Result<String> {
    let digest = descriptor["digest"]
        .as_str()
        .context("a descriptor without digest")?;
    let hex = digest.strip_prefix("sha256:");
    let hex = hex.filter(|hex| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let hex = hex.with_context(|| format!("a digest of an unknown kind: {digest:?}"))?;
    Ok(hex.into())
}

/// A normalized relative path; None if it leads outside.
fn inside(path: &str) -> Option<String> {
    let mut names = vec![];
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => drop(names.pop()?),
            name => names.push(name),
        }
    }
    Some(names.join("/"))
}

/// The files in an archive.
fn index(path: &Path) -> Result<HashMap<String, Part>> {
    let file = File::open(path).with_context(|| format!("unable to open {path:?}"))?;
    let mut archive = tar::Archive::new(io::BufReader::new(file));
    let mut parts = HashMap::new();
    let whole = || match describe(path) {
        Ok(Kind::Archive) => format!("{} is not a whole tar archive", path.display()),
        Ok(kind) => format!(
            "{} is {kind}, not a container image or an archive",
            path.display()
        ),
        Err(error) => format!("{error:#}"),
    };
    // A parser's error about another format would not help.
    if matches!(describe(path), Ok(kind) if kind != Kind::Archive && kind != Kind::Unknown) {
        bail!(whole());
    }
    for entry in archive.entries_with_seek().with_context(whole)? {
        let entry = entry.with_context(whole)?;
        let Some(name) = inside(&String::from_utf8_lossy(&entry.path_bytes())) else {
            continue; // it is refused when the files are read
        };
        let target = entry.link_name_bytes();
        let target = target.as_deref().map(String::from_utf8_lossy);
        let part = match (entry.header().entry_type(), target) {
            (tar::EntryType::Regular, _) => Some(Part::Blob(Blob {
                path: path.into(),
                offset: entry.raw_file_position(),
                size: entry.size(),
                sha256: None,
            })),
            (tar::EntryType::Symlink, Some(target)) => {
                inside(&format!("{name}/../{target}")).map(Part::Link)
            }
            (tar::EntryType::Link, Some(target)) => inside(&target).map(Part::Link),
            _ => None,
        };
        if let Some(part) = part {
            parts.insert(name, part);
        }
    }
    Ok(parts)
}

/// The images of a `docker save` archive; None if it is not one.
fn saved(blobs: &Blobs) -> Result<Option<Vec<Value>>> {
    let Some(blob) = blobs.get("manifest.json")? else {
        return Ok(None);
    };
    let Ok(Value::Array(images)) = blobs.json(&blob) else {
        return Ok(None); // an unrelated file with that name
    };
    let is_image = |image: &Value| image["Config"].is_string() && image["Layers"].is_array();
    Ok((!images.is_empty() && images.iter().all(is_image)).then_some(images))
}

fn from_saved(blobs: &Blobs, images: &[Value], tag: Option<&str>) -> Result<Source> {
    let tags = |image: &Value| -> Vec<String> {
        let tags = image["RepoTags"].as_array();
        let tags = tags.into_iter().flatten().filter_map(Value::as_str);
        tags.map(String::from).collect()
    };
    let named = images.iter().map(|image| (tags(image), image)).collect();
    let image = choose(named, tag)?;
    let name = |value: &Value| {
        value
            .as_str()
            .map(String::from)
            .context("a layer without name")
    };
    let config = blobs.need(&name(&image["Config"])?)?;
    let layers = image["Layers"].as_array().into_iter().flatten();
    Ok(Source {
        form: "docker save archive",
        layers: layers
            .map(|layer| Ok(Layer::Tar(blobs.need(&name(layer)?)?)))
            .collect::<Result<_>>()?,
        layered: true,
        config: Some(blobs.json(&config).context("its configuration")?),
    })
}

/// Whether a directory was written by skopeo as `dir:`. (containers-transports(5))
fn is_skopeo_dir(blobs: &Blobs) -> Result<bool> {
    let Some(version) = blobs.get("version")? else {
        return Ok(false);
    };
    let is_one = version.size < 100 && version.read()?.starts_with(b"Directory Transport Version");
    Ok(is_one && blobs.get("manifest.json")?.is_some())
}

fn from_skopeo_dir(blobs: &Blobs) -> Result<Source> {
    let manifest = blobs.json(&blobs.need("manifest.json")?);
    let manifest = manifest.context("manifest.json")?;
    let blob = |descriptor: &Value| {
        let hex = hex_digest(descriptor)?;
        let mut blob = blobs.need(&hex)?;
        blob.sha256 = Some(hex);
        anyhow::Ok(blob)
    };
    ensure!(
        manifest["fsLayers"].is_null(),
        "its manifest is of Docker's old schema 1: copy it with `skopeo copy --format v2s2`"
    );
    let layers = manifest["layers"]
        .as_array()
        .context("a manifest without layers")?;
    Ok(Source {
        form: "skopeo directory",
        layers: layers
            .iter()
            .map(|layer| Ok(Layer::Tar(blob(layer)?)))
            .collect::<Result<_>>()?,
        layered: true,
        config: Some(
            blobs
                .json(&blob(&manifest["config"])?)
                .context("its configuration")?,
        ),
    })
}

fn from_layout(blobs: &Blobs, arch: Arch, tag: Option<&str>) -> Result<Source> {
    let index = blobs
        .json(&blobs.need("index.json")?)
        .context("index.json")?;
    let mut manifests = BTreeMap::new();
    collect_manifests(blobs, arch, &index, &[], 0, &mut manifests)?;
    ensure!(
        !manifests.is_empty(),
        "there is no image for linux/{} in it",
        arch.debian_name()
    );
    let named = manifests
        .values()
        .map(|(tags, value)| (tags.clone(), value))
        .collect();
    let manifest = choose(named, tag)?;
    let config = blobs.need_digest(&manifest["config"])?;
    let layers = manifest["layers"].as_array().into_iter().flatten();
    Ok(Source {
        form: "OCI image",
        layers: layers
            .map(|layer| Ok(Layer::Tar(blobs.need_digest(layer)?)))
            .collect::<Result<_>>()?,
        layered: true,
        config: Some(blobs.json(&config).context("its configuration")?),
    })
}

type Manifests = BTreeMap<String, (Vec<String>, Value)>;

/// The manifests of images for this architecture, by digest, with their tags.
fn collect_manifests(
    blobs: &Blobs,
    arch: Arch,
    index: &Value,
    above: &[String],
    depth: usize,
    manifests: &mut Manifests,
) -> Result<()> {
    ensure!(depth < MAX_INDEXES, "the indexes are nested too deeply");
    for descriptor in index["manifests"].as_array().into_iter().flatten() {
        let annotations = &descriptor["annotations"];
        let platform = &descriptor["platform"];
        // Signatures and provenance are stored like images of an unknown platform.
        let ours = platform.is_null()
            || (platform["os"] == "linux" && platform["architecture"] == arch.debian_name());
        if !ours || !annotations["vnd.docker.reference.type"].is_null() {
            continue;
        }
        let mut tags = above.to_vec();
        for key in [
            "io.containerd.image.name",
            "org.opencontainers.image.ref.name",
        ] {
            tags.extend(annotations[key].as_str().map(String::from));
        }
        let document = blobs
            .json(&blobs.need_digest(descriptor)?)
            .context("a manifest")?;
        if document["manifests"].is_array() {
            collect_manifests(blobs, arch, &document, &tags, depth + 1, manifests)?;
        } else if document["config"].is_object() {
            let digest = descriptor["digest"].as_str().unwrap_or_default();
            let entry = manifests.entry(digest.into()).or_insert((vec![], document));
            entry.0.extend(tags);
        }
    }
    Ok(())
}

/// The only image, or the one with the tag, which may lack the beginning of a registry's name.
fn choose<'a>(images: Vec<(Vec<String>, &'a Value)>, tag: Option<&str>) -> Result<&'a Value> {
    let list = || {
        let tags = images.iter().flat_map(|(tags, _)| tags.iter());
        tags.map(|tag| format!("\n  --tag {tag}"))
            .collect::<String>()
    };
    let Some(tag) = tag else {
        return match images[..] {
            [(_, image)] => Ok(image),
            _ => bail!(
                "there are {} images in it; choose one:{}",
                images.len(),
                list()
            ),
        };
    };
    let fits = |name: &String| name == tag || name.ends_with(&format!("/{tag}"));
    let found = images.iter().find(|(tags, _)| tags.iter().any(fits));
    let (_, image) = found.with_context(|| format!("there is no {tag} in it, but:{}", list()))?;
    Ok(image)
}
