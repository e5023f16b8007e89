//! The parts of a VM other than the init: a stock kernel, busybox, host tools.
//!
//! Debian packages are unpacked, not installed, and kept in one cache for all projects of the user:
//! `PIGEON_CACHE`, or `pigeon-init` in the XDG cache directory.

use std::{
    collections::HashMap,
    env,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{Arch, process::run};

/// The Python clients used by the tests: WebSockets, Docker's, and one that generates requests from an
/// OpenAPI description.
const PYTHON_PACKAGES: [&str; 3] = [
    "websockets==15.0.1",
    "docker==7.1.0",
    "schemathesis==4.32.5",
];

/// The modules that a micro-VM's devices and pigeon-init's mounts need, if they are not built in.
const MODULES: [&str; 7] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "binfmt_misc",
    "crc32c_generic",
    "ext4",
];

/// The repository of this crate, which a distributed binary (`./build.sh dist`) does not have.
pub fn repository() -> &'static Path {
    const CRATE: &str = match option_env!("PIGEON_DIST") {
        Some(_) => "/nonexistent/src/host",
        None => env!("CARGO_MANIFEST_DIR"),
    };
    Path::new(CRATE)
        .ancestors()
        .nth(2)
        .expect("the crate lies in the repository")
}

/// The initrd next to a distributed binary, for the host's architecture.
pub fn initrd_beside() -> Option<PathBuf> {
    let program = env::current_exe().ok()?.canonicalize().ok()?;
    Some(program.parent()?.join("initrd.cpio")).filter(|path| path.is_file())
}

/// Whether the init is built without optional features: `./build.sh … --minimal` sets `PIGEON_MINIMAL`.
pub fn is_minimal() -> bool {
    variable("PIGEON_MINIMAL").is_some()
}

/// The build output directory for an architecture.
pub fn build_dir(arch: Arch) -> PathBuf {
    let mut build = repository().join("build");
    if arch != Arch::HOST {
        build.push(arch.name());
    }
    if is_minimal() {
        build.push("minimal");
    }
    build
}

/// An environment variable, if it is set and not empty.
fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// The archive under test, as built by `./build.sh initrd`.
pub fn initrd(arch: Arch) -> Result<Vec<u8>> {
    let minimal = if is_minimal() { " --minimal" } else { "" };
    let command = format!("./build.sh initrd --arch {}{minimal}", arch.name());
    read_initrd(&build_dir(arch), &command)
}

/// The initrd in `dir`. It must not contain an init older than the one next to it; `command` rebuilds it.
fn read_initrd(dir: &Path, command: &str) -> Result<Vec<u8>> {
    let [init, initrd] = ["init", "initrd.cpio"].map(|name| dir.join(name));
    let modified = |path: &Path| {
        let time = fs::metadata(path).and_then(|metadata| metadata.modified());
        time.with_context(|| format!("no {}: {command} makes it", path.display()))
    };
    ensure!(
        modified(&initrd)? >= modified(&init)?,
        "{} is older than the init beside it: {command} makes it anew",
        initrd.display()
    );
    Ok(fs::read(initrd)?)
}

/// The directory for everything that is downloaded or built once per user.
pub fn cache_dir() -> PathBuf {
    let directory = |name| variable(name).map(PathBuf::from);
    directory("PIGEON_CACHE")
        .or_else(|| Some(directory("XDG_CACHE_HOME")?.join("pigeon-init")))
        .or_else(|| Some(directory("HOME")?.join(".cache/pigeon-init")))
        .unwrap_or_else(|| env::temp_dir().join("pigeon-init"))
}

/// Path of a host tool. `sbin` is searched too: it has e2fsprogs, and is not in a user's PATH.
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

/// The `firecracker` binary (`FIRECRACKER`, or from PATH), if KVM works.
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

/// A kernel for VMs.
#[derive(Clone, Debug)]
pub enum Kernel {
    /// One of Debian's, unpacked in a directory of the cache: the uncompressed image `vmlinux`, the modules
    /// that VMs load as `modules/NN-NAME.ko`, all modules below `tree`, and `config`.
    Debian(PathBuf),
    /// An image with all drivers built in.
    Image(PathBuf),
}

impl Kernel {
    /// The kernel in `PIGEON_KERNEL`, as set by `./build.sh … --kernel`: a version that Debian has, such as
    /// `6.12`, or the path of an image. The [stock](Self::stock) kernel if unset.
    pub fn chosen(arch: Arch) -> Result<Kernel> {
        let Some(name) = variable("PIGEON_KERNEL") else {
            return Kernel::stock(arch);
        };
        let path = Path::new(&name);
        if path.components().count() > 1 {
            ensure!(path.is_file(), "no kernel at {}", path.display());
            return Ok(Kernel::Image(path.into()));
        }
        let version = path.to_str().filter(|name| is_version(name));
        let version = version.with_context(|| {
            format!(
                "PIGEON_KERNEL={}: neither a version (such as 6.12) nor a path",
                path.display()
            )
        })?;
        Kernel::version(arch, version)
    }

    /// For a VM on QEMU whose snapshots can be restored: 6.1 has the PCI drivers as modules, and no VMGenID.
    pub fn restorable(arch: Arch) -> Result<Kernel> {
        arch.restorable_machine()?;
        Kernel::version(arch, "6.12")
    }

    /// The cloud kernel of the host's Debian release.
    pub fn stock(arch: Arch) -> Result<Kernel> {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let bookworm = release
            .lines()
            .any(|line| line.trim_end() == "VERSION_ID=\"12\"");
        Kernel::version(arch, if bookworm { "6.1" } else { "6.12" })
    }

    /// Debian's cloud kernel of a version, fetched on the first call.
    fn version(arch: Arch, version: &str) -> Result<Kernel> {
        let name = format!("debian-{version}-{}", arch.name());
        let flavour = format!("cloud-{}", arch.debian_name());
        Kernel::unpacked(&name, |dir| {
            Debian::unpack_kernel(arch, &SUITES, version, &flavour, dir)
        })
    }

    /// Debian 13's kernel with pages of 16 KiB, which only aarch64 has.
    pub fn with_16k_pages() -> Result<Kernel> {
        Kernel::unpacked("debian-16k-aarch64", |dir| {
            let trixie = [Some(TRIXIE)];
            Debian::unpack_kernel(Arch::Aarch64, &trixie, "6.12", "arm64-16k", dir)
        })
    }

    /// A kernel in the cache's directory `name`, from the package that `unpack` unpacks below that.
    fn unpacked(name: &str, unpack: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<Kernel> {
        let dir = cached(name, |dir| {
            let files = unpack(dir)?;
            let trees = ["lib/modules", "usr/lib/modules"].map(|path| files.join(path));
            let tree = trees.iter().find(|path| path.exists());
            let tree = tree.context("no modules in the package")?;
            let mut releases = fs::read_dir(tree)?;
            let release = releases.next().context("no modules in the package")??;
            let file = |name: &str| {
                let in_boot = format!("boot/{name}-{}", release.file_name().display());
                // Since 6.19 they are in the modules directory.
                let paths = [files.join(in_boot), release.path().join(name)];
                let path = paths.iter().find(|path| path.exists());
                let path = path.with_context(|| format!("no {name} in the package"))?;
                anyhow::Ok(fs::read(path)?)
            };
            fs::write(dir.join("vmlinux"), uncompressed(file("vmlinuz")?)?)?;
            fs::write(dir.join("config"), file("config")?)?;
            fs::create_dir(dir.join("modules"))?;
            for (number, (name, module)) in ordered_modules(&files, &MODULES)?.iter().enumerate() {
                fs::write(dir.join(format!("modules/{number:02}-{name}.ko")), module)?;
            }
            fs::rename(tree, dir.join("tree"))?;
            Ok(fs::remove_dir_all(files)?)
        })?;
        Ok(Kernel::Debian(dir))
    }

    /// The image. Debian's is uncompressed, on x86_64 an ELF file.
    pub fn image(&self) -> PathBuf {
        match self {
            Kernel::Debian(dir) => dir.join("vmlinux"),
            Kernel::Image(path) => path.clone(),
        }
    }

    /// Whether it is built without an option that exists; false if unknown, as for an image.
    pub fn is_without(&self, option: &str) -> Result<bool> {
        let Kernel::Debian(dir) = self else {
            return Ok(false);
        };
        let config = fs::read_to_string(dir.join("config"))?;
        let off = format!("# CONFIG_{option} is not set");
        Ok(config.lines().any(|line| line == off))
    }

    /// File names and contents of the modules that VMs load, in dependency order.
    pub fn modules(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let Kernel::Debian(dir) = self else {
            return Ok(vec![]);
        };
        let mut paths: Vec<_> = fs::read_dir(dir.join("modules"))?
            .map(|entry| anyhow::Ok(entry?.path()))
            .collect::<Result<_>>()?;
        paths.sort();
        let named = |path: PathBuf| {
            let name = path.file_name().context("a file has a name")?;
            Ok((name.to_string_lossy().into_owned(), fs::read(&path)?))
        };
        paths.into_iter().map(named).collect()
    }

    /// The same, followed by these modules and their dependencies. Built-in modules are skipped.
    pub fn modules_and(&self, more: &[String]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut modules = self.modules()?;
        if let Kernel::Debian(dir) = self
            && !more.is_empty()
        {
            let wanted: Vec<_> = MODULES
                .into_iter()
                .chain(more.iter().map(String::as_str))
                .collect();
            let all = ordered_modules(&dir.join("tree"), &wanted)?;
            let named = all.into_iter().skip(modules.len()).enumerate();
            let number = modules.len();
            modules.extend(
                named.map(|(n, (name, module))| (format!("{:02}-{name}.ko", number + n), module)),
            );
        }
        Ok(modules)
    }

    /// A module, uncompressed.
    pub fn module(&self, name: &str) -> Result<Vec<u8>> {
        let (_, bytes) = self.module_file(name)?;
        uncompressed_module(bytes)
    }

    /// The file name and contents of a module as in the package, which may be compressed.
    pub fn module_file(&self, name: &str) -> Result<(String, Vec<u8>)> {
        let Kernel::Debian(dir) = self else {
            bail!("{} has no modules", self.image().display());
        };
        let mut files = HashMap::new();
        find_modules(&dir.join("tree"), &mut files)?;
        let missing = || format!("{} has no module {name}", dir.display());
        let path = files.get(&name.replace('-', "_")).with_context(missing)?;
        let file_name = path.file_name().context("a file has a name")?;
        Ok((file_name.to_string_lossy().into_owned(), fs::read(path)?))
    }
}

/// The wanted modules of an unpacked kernel package, in dependency order.
fn ordered_modules(package: &Path, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    fn add(
        name: &str,
        files: &HashMap<String, PathBuf>,
        ordered: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<()> {
        let name = name.replace('-', "_");
        // A module without a file is built in.
        let Some(path) = files
            .get(&name)
            .filter(|_| ordered.iter().all(|(n, _)| *n != name))
        else {
            return Ok(());
        };
        let module = uncompressed_module(fs::read(path)?)?;
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

fn uncompressed_module(bytes: Vec<u8>) -> Result<Vec<u8>> {
    if bytes.starts_with(b"\x7fELF") {
        Ok(bytes)
    } else {
        decompress(&bytes)
    }
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

/// The uncompressed kernel of a package, for any of its boot formats.
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
    // The last four bytes are the uncompressed size, which decompressors reject as garbage.
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
        let files = Debian::of_this_host(arch).unpack(&["busybox-static"], dir)?;
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

/// The contents of packages of the host's release, unpacked into one directory.
pub fn packages(arch: Arch, names: &[&str]) -> Result<PathBuf> {
    let dir = cached(&format!("{}-{}", names.join("-"), arch.name()), |dir| {
        Debian::of_this_host(arch).unpack(names, dir).map(drop)
    })?;
    Ok(dir.join("files"))
}

/// A root file system of the host's Debian release with these packages, and the user `app` with id 1000: a
/// tar archive in the cache.
pub fn debian(arch: Arch, packages: &[&str]) -> Result<PathBuf> {
    let dir = cached(
        &format!("debian-{}-{}", packages.join("-"), arch.name()),
        |dir| {
            eprintln!("making a Debian with {}", packages.join(" "));
            let release = fs::read_to_string("/etc/os-release")?;
            let mut lines = release.lines();
            let suite = lines.find_map(|line| line.strip_prefix("VERSION_CODENAME="));
            run(Command::new(tool("mmdebstrap")?)
                .args(["--quiet", "--variant=minbase"])
                .arg(format!("--architectures={}", arch.debian_name()))
                .arg(format!("--include={}", packages.join(",")))
                .arg("--customize-hook=chroot \"$1\" useradd --create-home --uid 1000 app")
                .arg(suite.context("no code name in /etc/os-release")?)
                .arg(dir.join("root.tar")))
            .map(drop)
        },
    )?;
    Ok(dir.join("root.tar"))
}

/// A Python with the packages for the tests, in a virtual environment below `build/`.
pub fn python() -> Result<PathBuf> {
    let build = repository().join("build");
    let dir = build.join("python");
    let packages = PYTHON_PACKAGES.join(" ");
    let [python, stamp] = ["bin/python3", &packages].map(|name| dir.join(name));
    fs::create_dir_all(&build)?;
    let lock = File::create(build.join("python.lock"))?;
    lock.lock()?;
    if !stamp.exists() {
        eprintln!("installing {packages} into {}", dir.display());
        run(Command::new(tool("python3")?)
            .args(["-m", "venv", "--clear"])
            .arg(&dir))?;
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet"])
            .args(PYTHON_PACKAGES))?;
        fs::write(stamp, "")?;
    }
    Ok(python)
}

/// The cache's directory `name`, filled by `fill` if it does not exist. Other processes wait meanwhile, and
/// never see it incomplete.
fn cached(name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let path = cache_dir().join(name);
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(cache_dir()).with_context(|| format!("no cache at {:?}", cache_dir()))?;
    let lock = File::create(cache_dir().join(format!("{name}.lock")))?;
    lock.lock()?;
    if !path.exists() {
        let filling = format!(".filling-{name}");
        // Left behind by a process that was killed.
        let _ = fs::remove_dir_all(cache_dir().join(&filling));
        let filling = tempfile::Builder::new()
            .prefix(&filling)
            .rand_bytes(0)
            .tempdir_in(cache_dir())?;
        fill(filling.path()).with_context(|| format!("unable to get {name}"))?;
        fs::rename(filling.keep(), &path)?;
    }
    Ok(path)
}

/// Packages of a Debian release for an architecture, independent of the host's release.
struct Debian {
    arch: Arch,
    /// Archive and suite (sources.list(5)), if not the host's.
    suite: Option<&'static str>,
}

/// Archives and suites that are searched for kernels, the host's first: Debian 12 has 6.1, 13 has 6.12, its
/// backports newer ones, and 11 has 5.10.
const SUITES: [Option<&str>; 5] = [
    None,
    Some("debian bookworm"),
    Some(TRIXIE),
    Some("debian trixie-backports"),
    Some("debian bullseye"),
];

const TRIXIE: &str = "debian trixie";

impl Debian {
    /// The host's release.
    fn of_this_host(arch: Arch) -> Debian {
        Debian { arch, suite: None }
    }

    /// apt with its own lists below `dir`: it needs no root, and does not use the host's state. (apt.conf(5))
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
        if let Some(suite) = self.suite {
            let list = dir.join("apt/sources.list");
            let keys = "/usr/share/keyrings/debian-archive-keyring.gpg";
            let source = format!("deb [signed-by={keys}] http://deb.debian.org/{suite} main\n");
            fs::write(&list, source)?;
            option("Dir::Etc::sourcelist", list.to_str().context("not UTF-8")?);
            option("Dir::Etc::sourceparts", "/dev/null");
        }
        Ok(apt)
    }

    /// Unpacks the newest kernel of a version below `dir`, from the first of `suites` that has one.
    fn unpack_kernel(
        arch: Arch,
        suites: &[Option<&'static str>],
        version: &str,
        flavour: &str,
        dir: &Path,
    ) -> Result<PathBuf> {
        for &suite in suites {
            let debian = Debian { arch, suite };
            run(debian.apt("apt-get", dir)?.args(["update", "-qq"]))?;
            let mut list = debian.apt("apt-cache", dir)?;
            list.args(["pkgnames", "linux-"]);
            let names = run(&mut list)?;
            if let Some(image) = newest_kernel(&names, version, flavour) {
                // Since 6.19 the image is a metapackage that depends on the other three.
                let parts = ["image", "base", "binary", "modules"];
                let packages = parts.map(|part| image.replacen("image", part, 1));
                let is_there = |package: &&str| names.lines().any(|name| name == *package);
                let packages = packages.iter().map(String::as_str).filter(is_there);
                return debian.unpack(&packages.collect::<Vec<_>>(), dir);
            }
        }
        bail!("Debian has no kernel {version} ({flavour})")
    }

    /// Downloads packages and unpacks them into the directory `files` below `dir`.
    fn unpack(&self, packages: &[&str], dir: &Path) -> Result<PathBuf> {
        eprintln!(
            "downloading {} for {}",
            packages.join(" "),
            self.arch.name()
        );
        let [debs, files, apt] = ["debs", "files", "apt"].map(|name| dir.join(name));
        if !apt.exists() {
            run(self.apt("apt-get", dir)?.args(["update", "-qq"]))?;
        }
        fs::create_dir(&debs)?;
        run(self
            .apt("apt-get", dir)?
            .arg("download")
            .args(packages)
            .current_dir(&debs))?;
        for deb in fs::read_dir(&debs)? {
            run(Command::new("dpkg").arg("-x").arg(deb?.path()).arg(&files))?;
        }
        fs::remove_dir_all(debs)?;
        fs::remove_dir_all(apt)?;
        Ok(files)
    }
}

/// The newest kernel of a version and flavour in a list of packages, one per line.
fn newest_kernel<'a>(packages: &'a str, version: &str, flavour: &str) -> Option<&'a str> {
    let numbers = |name: &str| {
        let numbers = name.split(|c: char| !c.is_ascii_digit());
        numbers.flat_map(str::parse).collect::<Vec<u64>>()
    };
    let [start, end] = [format!("linux-image-{version}."), format!("-{flavour}")];
    let kernels = packages.lines();
    let kernels = kernels.filter(|name| name.starts_with(&start) && name.ends_with(&end));
    kernels.max_by_key(|name| numbers(name))
}

/// Whether it is a kernel version without its last number, such as 6.12.
fn is_version(name: &str) -> bool {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    name.split_once('.')
        .is_some_and(|(major, minor)| is_number(major) && is_number(minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_of_a_flavour_is_chosen() {
        let packages = "linux-image-6.1.0-9-cloud-amd64\n\
                        linux-image-6.1.0-0.deb11.52-cloud-amd64\n\
                        linux-image-6.1.0-49-cloud-amd64\n\
                        linux-image-6.1.0-50-cloud-amd64-unsigned\n\
                        linux-image-6.1.0-50-amd64\n\
                        linux-image-6.12.9-cloud-amd64\n";
        let newest = newest_kernel(packages, "6.1", "cloud-amd64");
        assert_eq!(newest, Some("linux-image-6.1.0-49-cloud-amd64"));
        assert_eq!(newest_kernel(packages, "6.1", "cloud-arm64"), None);
    }

    #[test]
    fn a_kernels_version_has_two_numbers() {
        assert!(is_version("5.10"));
        for name in ["", "6", "6.", ".1", "6.1.0", "6.x", "../6.1"] {
            assert!(!is_version(name), "{name}");
        }
    }

    #[test]
    fn an_initrd_that_is_older_than_the_init_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let read = || read_initrd(dir.path(), "make it").map_err(|error| format!("{error:#}"));
        assert!(
            read()
                .unwrap_err()
                .contains("initrd.cpio: make it makes it")
        );
        let [init, initrd] = ["init", "initrd.cpio"].map(|name| {
            fs::write(dir.path().join(name), name).unwrap();
            File::options()
                .write(true)
                .open(dir.path().join(name))
                .unwrap()
        });
        let now = std::time::SystemTime::now();
        init.set_modified(now).unwrap();
        initrd.set_modified(now).unwrap();
        assert_eq!(read().unwrap(), b"initrd.cpio");
        init.set_modified(now + std::time::Duration::from_secs(1))
            .unwrap();
        assert!(
            read()
                .unwrap_err()
                .contains("older than the init beside it: make it")
        );
    }

    #[test]
    fn modules_come_after_their_dependencies() {
        let arch = Arch::chosen().unwrap();
        let kernel = Kernel::chosen(arch).unwrap();
        let modules = kernel.modules_and(&["vsock_loopback".into()]).unwrap();
        assert!(
            modules
                .last()
                .is_some_and(|(name, _)| name.ends_with("-vsock_loopback.ko"))
        );
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
    fn the_kernel_image_is_one_that_hypervisors_accept() {
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
    fn kernels_of_every_compression_are_unpacked() {
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
