//! Root images of container images.
//!
//! ```no_run
//! use pigeon::image::{Options, build};
//! let built = build("app.tar".as_ref(), "app.ext4".as_ref(), &Options::default())?;
//! println!("{} MiB, runs {:?}", built.size >> 20, built.image_config);
//! # anyhow::Ok(())
//! ```

pub mod archive;
pub mod disk;
pub mod erofs;
pub mod ext4;
pub mod fingerprint;
pub mod inodes;
pub mod kind;
pub mod layer;
pub mod source;
pub mod squashfs;
pub mod tree;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use disk::{Format, directory_of};
use source::Source;
use tree::{Place, Tree};

use crate::{Arch, assets, progress::Progress, scratch::Scratch};

/// Options for making an image.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Bytes; computed when absent.
    pub size: Option<u64>,
    /// Which of an image's architectures; the host's by default.
    pub arch: Arch,
    /// Which of several images in an archive.
    pub tag: Option<String>,
    /// The file system.
    pub format: Format,
    /// Overwrites an existing image and configuration.
    pub force: bool,
    /// Shows the progress on standard error.
    pub progress: bool,
}

/// The result of making an image.
#[derive(Debug)]
pub struct Built {
    /// The detected form of the source.
    pub form: &'static str,
    /// Bytes of the image.
    pub size: u64,
    /// Layers that were merged.
    pub layers: usize,
    /// Number of files.
    pub files: u64,
    /// The `ImageConfig` of the container image, which is also in the [run.json](run_json_path).
    pub image_config: Option<Value>,
    /// The image's platform, if it is not for the requested architecture.
    pub foreign_platform: Option<String>,
    /// Parts of the source that are missing in the image, one sentence each.
    pub warnings: Vec<String>,
}

/// The path of an image's configuration: `app.run.json` for `app.ext4`.
pub fn run_json_path(image: &Path) -> PathBuf {
    image.with_extension("run.json")
}

/// Makes an image of `source`: a directory, a tar archive (`docker export`), a `docker save` or OCI archive,
/// an OCI image layout, `-` for one of the archives on standard input, or the name of an image for docker or
/// skopeo. Archives may be compressed. A container image's configuration is written next to the image. It is
/// an error if they exist, unless [`Options::force`] is set.
pub fn build(source: &Path, out: &Path, options: &Options) -> Result<Built> {
    ensure_separate(source, out)?;
    ensure_replaceable(out, options.force)?;
    let mut progress = Progress::new(options.progress);
    let scratch = Scratch::new_in(directory_of(out))
        .with_context(|| format!("unable to write beside {}", out.display()))?;
    let path = fetch(source, options.arch, scratch.path(), &mut progress)?;
    let source = Source::open(&path, options.arch, options.tag.as_deref())?;
    let image_config = source.image_config();
    let run_json = match &image_config {
        Some(config) => {
            let mut document = json!({"ImageConfig": config});
            if let Some(platform) = source.platform() {
                document["Platform"] = json!(platform);
            }
            Some(serde_json::to_string_pretty(&document)? + "\n")
        }
        None => None,
    };
    let run_json_path = run_json_path(out);
    let is_same = |text: &String| fs::read_to_string(&run_json_path).is_ok_and(|old| old == *text);
    if run_json.as_ref().is_some_and(|text| !is_same(text)) {
        ensure_replaceable(&run_json_path, options.force)?;
    }

    let mut tree = Tree::new(source.layered);
    let mut lost = Lost::default();
    let total = source.layers.iter().map(layer::Layer::size).sum();
    progress.phase("reading layers", total);
    for (number, layer) in source.layers.iter().enumerate() {
        layer
            .read(&mut |size| progress.add(size), |entry, mut described, _| {
                let place = Place {
                    layer: number,
                    entry,
                };
                if options.format == Format::Squashfs {
                    let more = layer::drop_attributes(&mut described.meta, squashfs::has_attribute);
                    described.lost.extend(more);
                }
                lost.add(&described.path, &described.lost);
                tree.apply(place, described)
            })
            .with_context(|| format!("layer {} of {}", number + 1, source.layers.len()))?;
    }
    tree.remove_aufs_files();
    let files = tree.extent()?.inodes;
    let layers = &source.layers;
    let [image, new_run_json] = ["image", "run.json"].map(|name| scratch.path().join(name));
    let size = disk::write(
        &tree,
        layers,
        &image,
        options.format,
        options.size,
        &mut progress,
    )?;
    progress.end();
    let run_json = run_json.filter(|text| !is_same(text));
    if let Some(text) = &run_json {
        let cannot = || format!("unable to write {}", run_json_path.display());
        fs::write(&new_run_json, text).with_context(cannot)?;
        publish(&new_run_json, &run_json_path, options.force)?;
    }
    if let Err(error) = publish(&image, out, options.force) {
        if run_json.is_some() && !options.force {
            let _ = fs::remove_file(&run_json_path); // it belongs to this image
        }
        return Err(error);
    }
    Ok(Built {
        form: source.form,
        size,
        layers: source.layers.len(),
        files,
        image_config,
        foreign_platform: source.foreign_platform(options.arch),
        warnings: lost.warnings(),
    })
}

/// Makes an image of a directory's contents, of any structure, and returns its size. Overwrites an existing image.
pub fn pack(directory: &Path, out: &Path, format: Format) -> Result<u64> {
    let layers = [layer::Layer::directory(directory)?];
    let mut tree = Tree::new(false);
    layers[0].read(&mut |_| (), |entry, described, _| {
        tree.apply(Place { layer: 0, entry }, described)
    })?;
    let scratch = Scratch::new_in(directory_of(out))
        .with_context(|| format!("unable to write beside {}", out.display()))?;
    let image = scratch.path().join("image");
    let progress = &mut Progress::new(false);
    let size = disk::write(&tree, &layers, &image, format, None, progress)?;
    publish(&image, out, true)?;
    Ok(size)
}

/// Moves a finished file to its place, where one may have appeared meanwhile.
fn publish(file: &Path, to: &Path, force: bool) -> Result<()> {
    let renamed = match force {
        true => fs::rename(file, to),
        false => disk::rename_new(file, to),
    };
    if renamed
        .as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
    {
        ensure_replaceable(to, force)?;
    }
    renamed.with_context(|| format!("unable to write {}", to.display()))
}

/// Fails if the image would overwrite its own source, or be inside it.
fn ensure_separate(source: &Path, out: &Path) -> Result<()> {
    let (Ok(source), Ok(dir)) = (source.canonicalize(), directory_of(out).canonicalize()) else {
        return Ok(()); // one of them does not exist, which is reported later
    };
    let shown = out.display();
    let same = out.canonicalize().is_ok_and(|out| out == source);
    ensure!(!same, "{shown} is the source itself");
    ensure!(
        !dir.starts_with(&source),
        "{shown} is inside the source directory"
    );
    Ok(())
}

/// Fails if `path` exists and must not be overwritten.
fn ensure_replaceable(path: &Path, force: bool) -> Result<()> {
    let Ok(found) = path.symlink_metadata() else {
        return Ok(());
    };
    let shown = path.display();
    ensure!(
        found.is_file() || found.is_symlink() && path.is_file(),
        "{shown} exists and is not a regular file"
    );
    ensure!(force, "{shown} exists already; --force overwrites it");
    Ok(())
}

/// Dropped attributes, with the paths of their files.
#[derive(Default)]
struct Lost(BTreeMap<String, Vec<String>>);

impl Lost {
    fn add(&mut self, path: &[u8], attributes: &[String]) {
        for attribute in attributes {
            let paths = self.0.entry(attribute.clone()).or_default();
            paths.push(path.escape_ascii().to_string());
        }
    }

    /// One warning per attribute, with the first files.
    fn warnings(&self) -> Vec<String> {
        const NAMED: usize = 3;
        let warning = |(attribute, paths): (&String, &Vec<String>)| {
            let named = paths.iter().take(NAMED).cloned().collect::<Vec<_>>();
            let more = match paths.len().saturating_sub(NAMED) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            format!(
                "extended attribute {attribute} dropped: {}{more}",
                named.join(", ")
            )
        };
        self.0.iter().map(warning).collect()
    }
}

/// The uncompressed archive or the directory for `source`.
fn fetch(source: &Path, arch: Arch, scratch: &Path, progress: &mut Progress) -> Result<PathBuf> {
    let archive = scratch.join("archive");
    if source == Path::new("-") {
        progress.phase("reading standard input", 0);
        layer::copy_plain(io::stdin().lock(), &archive, &mut |size| progress.add(size))
            .context("standard input is damaged or cut short")?;
        return Ok(archive);
    }
    if source.is_dir() {
        return Ok(source.into());
    }
    if !source.exists() {
        let name = source.to_str().context("not UTF-8")?;
        pull(name, arch, &archive)?;
        return Ok(archive);
    }
    ensure!(
        source.is_file(),
        "{} is neither a file nor a directory",
        source.display()
    );
    if !layer::is_compressed(source).with_context(|| format!("unable to read {source:?}"))? {
        return Ok(source.into());
    }
    progress.phase("decompressing", fs::metadata(source)?.len());
    layer::copy_plain(fs::File::open(source)?, &archive, &mut |size| {
        progress.add(size)
    })
    .with_context(|| format!("{} is damaged or cut short", source.display()))?;
    Ok(archive)
}

/// Gets the image `name` as an archive, from docker or with skopeo.
fn pull(name: &str, arch: Arch, archive: &Path) -> Result<()> {
    const ARCHIVES: [&str; 9] = [
        ".tar", ".gz", ".tgz", ".zst", ".xz", ".txz", ".bz2", ".tbz2", ".oci",
    ];
    let looks_like_file =
        name.starts_with(['/', '.']) || ARCHIVES.iter().any(|end| name.ends_with(end));
    ensure!(!looks_like_file, "there is no {name}");
    let platform = arch.platform();
    let works = |command: &mut Command| {
        let quiet = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        quiet.status().is_ok_and(|status| status.success())
    };
    let must = |command: &mut Command| {
        let status = command.stdin(Stdio::null()).stdout(io::stderr()).status();
        let status = status.with_context(|| format!("unable to start {command:?}"))?;
        let program = Path::new(command.get_program()).file_name();
        ensure!(
            status.success(),
            "there is no file {name}, and {} gave no image of that name for {platform}: {status}",
            program.unwrap_or_default().display()
        );
        anyhow::Ok(())
    };
    if let Ok(docker) = assets::tool("docker")
        && works(Command::new(&docker).arg("info"))
    {
        let docker = |words: &[&str]| {
            let mut command = Command::new(&docker);
            command.args(words);
            command
        };
        // The platform of an image that docker has.
        let stored = |name: &str| {
            let format = "{{.Os}}/{{.Architecture}}";
            let mut inspect = docker(&["image", "inspect", "--format", format, "--", name]);
            let output = inspect.stdin(Stdio::null()).output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout);
            output.status.success().then(|| text.trim_end().to_string())
        };
        // Of a name without a tag, docker would save all tags. It may also be the id of an image.
        let latest = format!("{name}:latest");
        let has_tag = name.rsplit('/').next().unwrap_or(name).contains([':', '@']);
        let name = match has_tag || stored(&latest).is_none() && stored(name).is_some() {
            true => name,
            false => &latest,
        };
        let save = |options: &[&str]| {
            let mut save = docker(&["save", "--output"]);
            save.arg(archive).args(options).args(["--", name]);
            save
        };
        // Docker 28 and newer; older ones store an image for one platform.
        let save_platform = || works(&mut save(&["--platform", &platform]));
        let found = stored(name);
        if found.is_some() && save_platform() {
            return Ok(());
        }
        if found.as_ref() != Some(&platform) {
            must(&mut docker(&["pull", "--platform", &platform, "--", name]))?;
            if save_platform() {
                return Ok(());
            }
        }
        return must(&mut save(&[]));
    }
    if let Ok(skopeo) = assets::tool("skopeo") {
        let target = format!("docker-archive:{}", archive.display());
        let mut skopeo = Command::new(skopeo);
        if arch != Arch::HOST {
            skopeo.args(["--override-arch", arch.debian_name()]);
        }
        return must(skopeo.args(["copy", "--", &format!("docker://{name}"), &target]));
    }
    bail!(
        "there is no file {name}, and neither a docker that works nor skopeo to get an image of \
         that name; where there is one: docker save {name} --output image.tar"
    )
}
