//! `pigeon rootfs`: a root image of a container image.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use pigeon::image::{
    self, Options,
    disk::{Format, parse_disk_size},
    run_json_path,
};
use serde_json::json;

use crate::{
    Guest,
    output::{note, say},
};

#[derive(Args)]
pub struct Rootfs {
    /// A directory, a tar archive (docker export), a docker save or OCI archive, an OCI layout, a
    /// skopeo dir:, - for an archive on standard input, or an image name for docker or skopeo
    source: PathBuf,
    /// The image file; the configuration is written beside it, to NAME.run.json
    out: PathBuf,
    /// Size of an ext4 image, such as 64M or 1.5G; numbers without a unit are bytes
    /// [default: computed]
    size: Option<String>,
    /// The file system
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Overwrite an existing image and configuration
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    guest: Guest,
    /// Which of several images in an archive
    #[arg(long)]
    tag: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Rootfs {
    pub fn run(&self) -> Result<()> {
        let options = Options {
            size: self.size.as_deref().map(parse_disk_size).transpose()?,
            arch: self.guest.arch,
            tag: self.tag.clone(),
            format: self.format,
            force: self.force,
            progress: true,
        };
        let built = image::build(&self.source, &self.out, &options)?;
        for warning in &built.warnings {
            note!("{warning}");
        }
        let out = self.out.display();
        let config_path = run_json_path(&self.out);
        let config_path = config_path.display();
        if self.json {
            let result = json!({
                "form": built.form,
                "image": self.out,
                "size": built.size,
                "files": built.files,
                "layers": built.layers,
                "image_config": built.image_config,
                "platform": built.foreign_platform,
                "format": self.format.name(),
                "warnings": built.warnings,
            });
            say!("{result}")?;
            return Ok(());
        }
        let from = match built.layers {
            1 => built.form.into(),
            layers => format!("{} of {layers} layers", built.form),
        };
        let article = match from.starts_with("OCI") {
            true => "an",
            false => "a",
        };
        say!(
            "{out}: {} MiB, {} files, from {article} {from}",
            built.size.div_ceil(1 << 20),
            built.files
        )?;
        match &built.image_config {
            Some(config) => say!("{config_path}: {}", command_line(config))?,
            None if run_json_path(&self.out).exists() => say!("{config_path} is kept")?,
            None => say!("no command is configured: pigeon run {out} COMMAND...")?,
        }
        if let Some(platform) = built.foreign_platform {
            note!(
                "the image is for {platform}, not for {}",
                self.guest.arch.platform()
            );
        }
        Ok(())
    }
}

/// The command of an image, for people to read.
fn command_line(config: &serde_json::Value) -> String {
    let words = ["Entrypoint", "Cmd"].map(|key| config[key].as_array().into_iter().flatten());
    let words: Vec<_> = words
        .into_iter()
        .flatten()
        .filter_map(|word| word.as_str())
        .collect();
    match words[..] {
        [] => "no command is configured".into(),
        _ => format!("runs {}", words.join(" ")),
    }
}
