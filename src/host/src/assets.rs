//! What a VM is made of besides the init: a stock kernel, busybox, host tools.
//!
//! Debian packages are taken apart, not installed, and kept in one cache for all projects of the
//! user: `PIGEON_CACHE`, or `pigeon-init` in the XDG cache directory.

use std::{
    collections::HashMap,
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{Arch, process::run};

/// The vhost-user device behind QEMU's vsock.
const VHOST_VSOCK: (&str, &str) = ("vhost-device-vsock", "0.3.0");

/// The Python WebSocket client that is tested with.
const PYTHON_PACKAGE: &str = "websockets==15.0.1";

/// The modules that a micro-VM's devices and pigeon-init's mounts need, where they are not built in.
const MODULES: [&str; 7] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "binfmt_misc",
    "crc32c_generic",
    "ext4",
];

/// The modules of file systems that a root or a volume may have, where they are not built in.
const FILE_SYSTEMS: [&str; 5] = ["overlay", "squashfs", "erofs", "xfs", "btrfs"];

/// The repository this crate is part of.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("the crate lies in the repository")
}

/// The directory of what the build makes for an architecture.
pub fn build_dir(arch: Arch) -> PathBuf {
    let build = repository().join("build");
    if arch == Arch::HOST {
        build
    } else {
        build.join(arch.name())
    }
}

/// The archive under test: the product itself, as `./build.sh initrd` made it.
pub fn initrd(arch: Arch) -> Result<Vec<u8>> {
    let [init, initrd] = ["init", "initrd.cpio"].map(|name| build_dir(arch).join(name));
    let modified = |path: &Path| {
        let time = fs::metadata(path).and_then(|metadata| metadata.modified());
        let command = format!("./build.sh initrd --arch {}", arch.name());
        time.with_context(|| format!("no {}: {command} makes it", path.display()))
    };
    ensure!(
        modified(&initrd)? >= modified(&init)?,
        "{} is older than the init beside it: ./build.sh initrd makes it anew",
        initrd.display()
    );
    Ok(fs::read(initrd)?)
}

/// The directory of everything that is downloaded or built once a user.
pub fn cache_dir() -> PathBuf {
    let variable = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    variable("PIGEON_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("pigeon-init")))
        .or_else(|| Some(variable("HOME")?.join(".cache/pigeon-init")))
        .unwrap_or_else(|| env::temp_dir().join("pigeon-init"))
}

/// Path of a host tool. `sbin` is searched too: it holds e2fsprogs, and is not in a user's PATH.
pub fn tool(name: &str) -> Result<PathBuf> {
    find(name).with_context(|| format!("no {name} on this host: ./build.sh setup installs it"))
}

fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// The `firecracker` binary (`FIRECRACKER`, or PATH), where KVM works.
pub fn firecracker() -> Option<PathBuf> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .ok()?;
    env::var_os("FIRECRACKER")
        .map(PathBuf::from)
        .or_else(|| find("firecracker"))
}

/// A stock kernel, taken apart.
#[derive(Clone)]
pub struct Kernel {
    dir: PathBuf,
}

impl Kernel {
    /// Debian's cloud kernel, fetched on the first call.
    pub fn stock(arch: Arch) -> Result<Kernel> {
        let debian = Debian::of_this_host(arch);
        let package = format!("linux-image-cloud-{}", arch.debian_name());
        Kernel::of(&debian, &format!("kernel-{}-fs", arch.name()), &package)
    }

    /// Debian 13's kernel with pages of 16 KiB, which aarch64 alone has.
    pub fn with_16k_pages() -> Result<Kernel> {
        Kernel::of(
            &Debian::TRIXIE,
            "kernel-aarch64-16k-fs",
            "linux-image-arm64-16k",
        )
    }

    /// The kernel that a metapackage stands for.
    fn of(debian: &Debian, name: &str, metapackage: &str) -> Result<Kernel> {
        let dir = cached(name, |dir| {
            let files = debian.unpack_dependency(metapackage, dir)?;
            let boot = fs::read_dir(files.join("boot"))?.collect::<Result<Vec<_>, _>>()?;
            let image = boot
                .iter()
                .find(|f| f.file_name().as_encoded_bytes().starts_with(b"vmlinuz"));
            let image = fs::read(image.context("no vmlinuz in the package")?.path())?;
            fs::write(dir.join("vmlinux"), uncompressed(image)?)?;
            fs::create_dir(dir.join("modules"))?;
            for (number, (name, module)) in ordered_modules(&files, &MODULES)?.iter().enumerate() {
                fs::write(dir.join(format!("modules/{number:02}-{name}.ko")), module)?;
            }
            fs::create_dir(dir.join("file-systems"))?;
            for (name, module) in ordered_modules(&files, &FILE_SYSTEMS)? {
                fs::write(dir.join(format!("file-systems/{name}.ko")), module)?;
            }
            Ok(fs::remove_dir_all(files)?)
        })?;
        Ok(Kernel { dir })
    }

    /// The uncompressed image: on x86_64 an ELF file.
    pub fn image(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// File names and contents of the modules to load, in an order that satisfies them all.
    pub fn modules(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut paths: Vec<_> = fs::read_dir(self.dir.join("modules"))?
            .map(|entry| anyhow::Ok(entry?.path()))
            .collect::<Result<_>>()?;
        paths.sort();
        let named = |path: PathBuf| {
            let name = path.file_name().context("a file has a name")?;
            Ok((name.to_string_lossy().into_owned(), fs::read(&path)?))
        };
        paths.into_iter().map(named).collect()
    }
}

impl Kernel {
    /// Names and contents of the modules for these file systems, in the order to load them in,
    /// after [those of all VMs](Kernel::modules). What is built in has none.
    pub fn file_system_modules(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let base: Vec<_> = self.modules()?.into_iter().map(|(name, _)| name).collect();
        let mut modules = ordered_modules(&self.dir.join("file-systems"), names)?;
        let is_new = |name: &String| {
            !base
                .iter()
                .any(|base| base.ends_with(&format!("-{name}.ko")))
        };
        modules.retain(|(name, _)| is_new(name));
        let named = |(name, module)| (format!("{name}.ko"), module);
        Ok(modules.into_iter().map(named).collect())
    }
}

/// A module of the stock kernel that no VM loads by itself.
pub fn module(arch: Arch, name: &str) -> Result<Vec<u8>> {
    let dir = cached(&format!("module-{name}-{}", arch.name()), |dir| {
        let package = format!("linux-image-cloud-{}", arch.debian_name());
        let files = Debian::of_this_host(arch).unpack_dependency(&package, dir)?;
        let (_, module) = ordered_modules(&files, &[name])?
            .pop()
            .with_context(|| format!("{package} has no module {name}"))?;
        fs::write(dir.join("module.ko"), module)?;
        Ok(fs::remove_dir_all(files)?)
    })?;
    Ok(fs::read(dir.join("module.ko"))?)
}

/// The wanted modules of an unpacked kernel package, each after those it depends on.
fn ordered_modules(package: &Path, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    fn add(
        name: &str,
        files: &HashMap<String, PathBuf>,
        ordered: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        let name = name.replace('-', "_");
        // What has no file is built in.
        let Some(path) = files
            .get(&name)
            .filter(|_| ordered.iter().all(|(n, _)| *n != name))
        else {
            return Ok(());
        };
        let bytes = fs::read(path)?;
        let module = if bytes.starts_with(b"\x7fELF") {
            bytes
        } else {
            decompress(&bytes)?
        };
        for dependency in dependencies(&module) {
            add(&dependency, files, ordered)?;
        }
        ordered.push((name, module));
        Ok(())
    }
    let mut files = HashMap::new();
    find_modules(package, &mut files)?;
    let mut ordered = Vec::new();
    for name in wanted {
        add(name, &files, &mut ordered)?;
    }
    Ok(ordered)
}

/// Paths of all module files below `dir`, by module name.
fn find_modules(dir: &Path, found: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        if path.is_dir() && !path.is_symlink() {
            find_modules(&path, found)?;
        } else if let Some((name, "ko" | "ko.xz" | "ko.zst" | "ko.gz")) =
            name.as_deref().and_then(|name| name.split_once('.'))
        {
            found.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// The `depends=` entry of a module's `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(start) = module.windows(key.len()).position(|window| window == key) else {
        return vec![];
    };
    let value = module[start + key.len()..]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(String::from)
        .collect()
}

/// The kernel of a package, whichever way its boot loader would have it.
fn uncompressed(image: Vec<u8>) -> Result<Vec<u8>> {
    // Documentation/arch/arm64/booting.rst; drivers/firmware/efi/libstub/zboot-header.S
    if image.get(0x38..0x3c) == Some(b"ARMd") {
        Ok(image)
    } else if image.get(4..8) == Some(b"zimg") {
        decompress(zboot_payload(&image)?)
    } else {
        decompress(payload(&image)?)
    }
}

/// The compressed kernel inside an EFI zboot image.
fn zboot_payload(image: &[u8]) -> Result<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).context("an image cut short")?;
        anyhow::Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let (start, length) = (word(8)?, word(12)?);
    image
        .get(start..start + length)
        .context("the payload lies outside the zboot image")
}

/// The compressed kernel inside a bzImage (kernel Documentation/arch/x86/boot.rst).
fn payload(image: &[u8]) -> Result<&[u8]> {
    const SETUP_SECTS: usize = 0x1f1;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).context("a bzImage cut short")?;
        anyhow::Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let setup_sectors = usize::from(*image.get(SETUP_SECTS).context("a bzImage cut short")?);
    let start = (setup_sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    // The last four bytes are the uncompressed size, which decompressors take for garbage.
    let end = start + word(PAYLOAD_LENGTH)? - 4;
    image
        .get(start..end)
        .context("the payload lies outside the bzImage")
}

fn decompress(bytes: &[u8]) -> Result<Vec<u8>> {
    let tool_name = match bytes {
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x1f, 0x8b, ..] => "gzip",
        _ => bail!("unknown compression"),
    };
    let mut input = tempfile::tempfile()?;
    std::io::Write::write_all(&mut input, bytes)?;
    std::io::Seek::rewind(&mut input)?;
    let output = Command::new(tool(tool_name)?)
        .arg("-dc")
        .stdin(input)
        .output()?;
    ensure!(
        output.status.success(),
        "{tool_name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output.stdout)
}

/// A statically linked busybox.
pub fn busybox(arch: Arch) -> Result<PathBuf> {
    let dir = cached(&format!("busybox-{}", arch.name()), |dir| {
        let files = Debian::of_this_host(arch).unpack("busybox-static", dir)?;
        let binary = ["bin/busybox", "usr/bin/busybox"].map(|path| files.join(path));
        let binary = binary
            .iter()
            .find(|path| path.exists())
            .context("no busybox in the package")?;
        fs::rename(binary, dir.join("busybox"))?;
        Ok(fs::remove_dir_all(files)?)
    })?;
    Ok(dir.join("busybox"))
}

/// A Python with the `websockets` package, in an environment of its own below `build/`.
pub fn python() -> Result<PathBuf> {
    let build = build_dir(Arch::HOST);
    let dir = build.join("python");
    let [python, stamp] = ["bin/python3", PYTHON_PACKAGE].map(|name| dir.join(name));
    fs::create_dir_all(&build)?;
    let lock = File::create(build.join("python.lock"))?;
    lock.lock()?;
    if !stamp.exists() {
        eprintln!("installing {PYTHON_PACKAGE} into {}", dir.display());
        run(Command::new(tool("python3")?)
            .args(["-m", "venv", "--clear"])
            .arg(&dir))?;
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", PYTHON_PACKAGE]))?;
        fs::write(stamp, "")?;
    }
    Ok(python)
}

/// The vhost-user vsock device: one that is installed, else built from crates.io.
pub fn vhost_device_vsock() -> Result<PathBuf> {
    let (name, version) = VHOST_VSOCK;
    let right = |path: &PathBuf| {
        run(Command::new(path).arg("--version")).is_ok_and(|v| v.trim_end().ends_with(version))
    };
    let cargo_bin = env::var_os("HOME").map(|home| Path::new(&home).join(".cargo/bin").join(name));
    if let Some(path) = [find(name), cargo_bin].into_iter().flatten().find(right) {
        return Ok(path);
    }
    let dir = cached(&format!("{name}-{version}"), |dir| {
        eprintln!("building {name} {version} (a minute or two)");
        let status = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()))
            .args([
                "install",
                "--locked",
                "--quiet",
                "--version",
                version,
                name,
                "--root",
            ])
            .arg(dir)
            .env_remove("CARGO_TARGET_DIR")
            .stdin(Stdio::null())
            .status()
            .context("unable to start cargo")?;
        ensure!(status.success(), "cargo install {name}: {status}");
        Ok(())
    })?;
    Ok(dir.join("bin").join(name))
}

/// The cache's directory `name`, filled by `fill` unless it is there. Other processes wait
/// meanwhile, and never see it half full.
fn cached(name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = cache_dir().join(name);
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(cache_dir()).with_context(|| format!("no cache at {:?}", cache_dir()))?;
    let lock = File::create(cache_dir().join(format!("{name}.lock")))?;
    lock.lock()?;
    if !path.exists() {
        let filling = tempfile::Builder::new()
            .prefix(".filling-")
            .tempdir_in(cache_dir())?;
        fill(filling.path()).with_context(|| format!("unable to get {name}"))?;
        fs::rename(filling.keep(), &path)?;
    }
    Ok(path)
}

/// Packages of a Debian release for an architecture, whatever this host's own is.
struct Debian {
    arch: Arch,
    /// apt's sources (sources.list(5)), where they are not this host's.
    sources: Option<&'static str>,
}

impl Debian {
    const TRIXIE: Debian = Debian {
        arch: Arch::Aarch64,
        sources: Some(
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
             http://deb.debian.org/debian trixie main\n",
        ),
    };

    /// The release that this host has.
    fn of_this_host(arch: Arch) -> Debian {
        let sources = None;
        Debian { arch, sources }
    }

    /// apt with lists of its own below `dir`, for which one need not be root; the host's own state
    /// has no part in it. (apt.conf(5))
    fn apt(&self, program: &str, dir: &Path) -> Result<Command> {
        let state = dir.join("apt");
        fs::create_dir_all(state.join("lists/partial"))?;
        let mut apt = Command::new(program);
        let mut option = |name: &str, value: &str| {
            apt.args(["-o", &format!("{name}={value}")]);
        };
        let state = state.to_str().context("not UTF-8")?;
        option("APT::Architecture", self.arch.debian_name());
        option("APT::Architectures::", self.arch.debian_name());
        option("Acquire::Languages", "none");
        option("Dir::State", state);
        option("Dir::State::status", "/dev/null");
        option("Dir::Cache", state);
        if let Some(sources) = self.sources {
            let list = dir.join("apt/sources.list");
            fs::write(&list, sources)?;
            option("Dir::Etc::sourcelist", list.to_str().context("not UTF-8")?);
            option("Dir::Etc::sourceparts", "/dev/null");
        }
        Ok(apt)
    }

    /// Unpacks the package that a metapackage stands for.
    fn unpack_dependency(&self, metapackage: &str, dir: &Path) -> Result<PathBuf> {
        run(self.apt("apt-get", dir)?.args(["update", "-qq"]))?;
        let depends = run(self.apt("apt-cache", dir)?.args(["depends", metapackage]))?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .with_context(|| format!("apt knows no {metapackage}: is this Debian 12 or 13?"))?;
        self.unpack(package, dir)
    }

    /// Downloads a package and unpacks it in a directory below `dir`.
    fn unpack(&self, package: &str, dir: &Path) -> Result<PathBuf> {
        eprintln!("downloading {package} for {}", self.arch.name());
        let [debs, files, apt] = ["debs", "files", "apt"].map(|name| dir.join(name));
        if !apt.exists() {
            run(self.apt("apt-get", dir)?.args(["update", "-qq"]))?;
        }
        fs::create_dir(&debs)?;
        run(self
            .apt("apt-get", dir)?
            .args(["download", package])
            .current_dir(&debs))?;
        let deb = fs::read_dir(&debs)?
            .next()
            .context("apt-get downloaded nothing")??
            .path();
        run(Command::new("dpkg").arg("-x").arg(deb).arg(&files))?;
        fs::remove_dir_all(debs)?;
        fs::remove_dir_all(apt)?;
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_follow_what_they_depend_on() {
        let arch = Arch::chosen().unwrap();
        let modules = Kernel::stock(arch).unwrap().modules().unwrap();
        assert!(
            modules
                .iter()
                .any(|(name, _)| name.ends_with("-virtio_blk.ko"))
        );
        for (at, (name, contents)) in modules.iter().enumerate() {
            assert!(
                contents.starts_with(b"\x7fELF"),
                "{name} is not an ELF file"
            );
            for dependency in dependencies(contents) {
                let file = format!("-{}.ko", dependency.replace('-', "_"));
                let earlier = modules[..at].iter().any(|(name, _)| name.ends_with(&file));
                assert!(earlier, "{name} comes before {file}");
            }
        }
    }

    #[test]
    fn a_file_systems_modules_come_with_what_they_depend_on() {
        let arch = Arch::chosen().unwrap();
        let kernel = Kernel::stock(arch).unwrap();
        let modules = kernel
            .file_system_modules(&["erofs", "overlay", "none"])
            .unwrap();
        let names: Vec<_> = modules.iter().map(|(name, _)| name.as_str()).collect();
        assert!(
            names.contains(&"erofs.ko") && names.contains(&"overlay.ko"),
            "{names:?}"
        );
        for (at, (name, contents)) in modules.iter().enumerate() {
            for dependency in dependencies(contents) {
                let file = format!("{}.ko", dependency.replace('-', "_"));
                let later = modules[at..].iter().any(|(name, _)| *name == file);
                assert!(!later, "{name} comes before {file}");
            }
        }
        assert!(kernel.file_system_modules(&[]).unwrap().is_empty());
    }

    #[test]
    fn the_kernel_image_is_what_hypervisors_take() {
        let arch = Arch::chosen().unwrap();
        let image = fs::read(Kernel::stock(arch).unwrap().image()).unwrap();
        match arch {
            Arch::X86_64 => assert!(image.starts_with(b"\x7fELF")),
            Arch::Aarch64 => assert_eq!(&image[0x38..0x3c], b"ARMd"),
        }
    }

    #[test]
    fn a_zboot_image_is_unpacked() {
        let script = ["-c", "printf hello | gzip -c"];
        let compressed = Command::new("sh").args(script).output().unwrap().stdout;
        let length = (compressed.len() as u32).to_le_bytes();
        let header = [b"MZ\0\0zimg", &[24, 0, 0, 0][..], &length, &[0; 8]].concat();
        let image = [header.clone(), compressed].concat();
        assert_eq!(uncompressed(image).unwrap(), b"hello");
        assert!(uncompressed(header).is_err());
    }

    #[test]
    fn whatever_compression_a_kernel_has_is_undone() {
        for command in ["xz -c", "zstd -qc", "gzip -c", "lz4 -lc"] {
            let script = format!("printf 'hello' | {command}");
            let output = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(decompress(&output.stdout).unwrap(), b"hello", "{command}");
        }
        assert!(decompress(b"plain").is_err());
    }

    #[test]
    fn a_payload_outside_its_image_is_an_error() {
        assert!(payload(&[0; 100]).is_err());
        let mut image = vec![0; 1024];
        image[0x248..0x250].copy_from_slice(&[0, 0, 0, 1, 8, 0, 0, 0]);
        assert!(payload(&image).is_err());
    }
}
