//! `pigeon cp`: files from and to a VM.

use std::{
    cell::Cell,
    fs::{self, File},
    io::{self, Read, Seek, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pigeon::{
    Client, Command, Error, Session,
    files::WriteOptions,
    progress::Progress,
    scratch::Scratch,
    session::{Event, MESSAGE},
};
use rustix::{fs::Mode, process::umask};
use tar::EntryType;

use crate::{
    output::{self, note},
    target::Target,
};

#[derive(Args)]
pub struct Cp {
    /// A file or directory, local or in a VM as NAME:/PATH (:/PATH if only one VM runs); DIR/. is
    /// what is in a directory; - is standard input
    source: String,
    /// The destination, in the other place; - is standard output
    destination: String,
    #[command(flatten)]
    target: Target,
    /// The owner of files copied to a VM [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
}

/// A source or destination.
#[derive(Debug, PartialEq)]
pub enum Place<'a> {
    Here(&'a Path),
    There(Option<&'a str>, &'a str),
}

impl<'a> Place<'a> {
    /// A path with a slash before its colon is local, as with scp and docker.
    pub fn of(text: &'a str) -> Place<'a> {
        match text.split_once(':') {
            Some((name, path)) if !name.contains('/') => {
                Place::There(Some(name).filter(|name| !name.is_empty()), path)
            }
            _ => Place::Here(Path::new(text)),
        }
    }
}

impl Cp {
    pub fn run(&self) -> Result<()> {
        match (Place::of(&self.source), Place::of(&self.destination)) {
            (Place::Here(source), Place::There(name, path)) => {
                absolute(path)?;
                self.send(&self.target.client(name)?, source, path)
            }
            (Place::There(name, path), Place::Here(destination)) => {
                absolute(path)?;
                self.fetch(&self.target.client(name)?, path, destination)
            }
            _ => bail!("exactly one of source and destination must be in a VM, as NAME:/PATH"),
        }
    }

    fn send(&self, client: &Client, source: &Path, path: &str) -> Result<()> {
        let options = WriteOptions {
            mode: None,
            user: self.user.clone(),
        };
        if source == Path::new("-") {
            client.write_file(path, &mut io::stdin().lock(), None, &options)?;
            return Ok(());
        }
        let shown = source.display();
        let found = fs::metadata(source).with_context(|| format!("unable to read {shown}"))?;
        let path = match is_directory(client, path, found.is_dir())? {
            true if !(found.is_dir() && means_contents(source)) => join(path, &base_name(source)?),
            _ => path.to_string(),
        };
        if found.is_dir() {
            return self.send_directory(client, source, &path);
        }
        send_file(client, source, &path, &options)
    }

    /// Copies a directory with all its contents to `path`.
    fn send_directory(&self, client: &Client, source: &Path, path: &str) -> Result<()> {
        let has_tar = has_tar(client);
        let owner = match &self.user {
            Some(user) if has_tar => user_ids(client, user)?,
            _ => ROOT,
        };
        let made = client.exec(&Command::new(["mkdir", "-p", path]));
        // As root, like the copy of a single file.
        let tar = Command::new(["tar", "-C", path, "-xf", "-"]);
        let has_mkdir = made.is_ok_and(|output| output.exit_code == 0);
        if has_mkdir && has_tar {
            let mut session = client.session(&tar.separate_stderr())?;
            let mut input = SessionInput {
                session: &mut session,
                is_broken: false,
            };
            let sent = send_archive(&mut input, source, owner);
            let is_broken = input.is_broken;
            // tar waits for it, regardless of errors so far.
            let ended = session.end_input();
            let finished = finish(&mut session, &mut io::sink());
            let sent = sent.context("unable to send the files");
            // tar's message is more useful than the broken connection, but not than an error reading a file.
            let (first, second) = match is_broken {
                true => (finished, sent),
                false => (sent, finished),
            };
            first?;
            second?;
            return Ok(ended?);
        }
        for entry in walk(source)? {
            let place = source.join(&entry);
            let found = place.symlink_metadata()?;
            let target = join(path, &entry.to_string_lossy());
            if found.is_file() {
                let options = WriteOptions {
                    mode: Some(found.permissions().mode() & 0o7777),
                    user: self.user.clone(),
                };
                send_file(client, &place, &target, &options)?;
            } else if !found.is_dir() {
                note!("{}: left out: there is no tar in the VM", place.display());
            }
        }
        Ok(())
    }

    fn fetch(&self, client: &Client, path: &str, destination: &Path) -> Result<()> {
        if is_directory(client, path, false)? {
            ensure!(
                destination != Path::new("-"),
                "{path} is a directory: it cannot be written to standard output"
            );
            return fetch_directory(client, path, destination);
        }
        if destination == Path::new("-") {
            let (_, mut contents) = client.read_file(path)?;
            return print_all(&mut contents).with_context(|| format!("{path} broke off"));
        }
        let destination = file_to_write(destination, path)?;
        let (info, mut contents) = client.read_file(path)?;
        let shown = destination.display();
        // The existing file is kept until the new one is complete.
        let dir = destination
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty());
        let cannot = || format!("unable to write {shown}");
        let scratch = Scratch::new_in(dir.unwrap_or(Path::new("."))).with_context(cannot)?;
        let received = scratch.path().join("file");
        let mut file = File::create_new(&received).with_context(cannot)?;
        let mut progress = Progress::new(true);
        progress.phase("receiving", info.size);
        let copied = io::copy(&mut Counted(&mut contents, &mut progress), &mut file);
        let copied = copied.with_context(|| format!("{path} broke off"))?;
        progress.end();
        ensure!(copied == info.size, "{path} broke off after {copied} bytes");
        let mode = info.mode.unwrap_or(0o644) & 0o777;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        fs::rename(&received, &destination).with_context(cannot)
    }
}

/// The file to write for a copy of the VM's `path`. A destination that is a link is followed, as in docker,
/// even if its target does not exist; a link in a destination directory may have been created by a guest in
/// an earlier copy, and is replaced. Other files than regular ones, such as /dev/null, are an error.
fn file_to_write(destination: &Path, path: &str) -> Result<PathBuf> {
    let (file, found) = match fs::metadata(destination) {
        Ok(found) if found.is_dir() => {
            let file = destination.join(base_name(Path::new(path))?);
            let found = file.symlink_metadata();
            (file, found)
        }
        found => (follow(destination)?, found),
    };
    ensure!(
        found.is_err() || found.is_ok_and(|found| found.is_file() || found.is_symlink()),
        "{} exists and is not a regular file",
        file.display()
    );
    Ok(file)
}

/// The target of a symbolic link, or the path itself.
fn follow(path: &Path) -> Result<PathBuf> {
    /// The kernel's limit. (path_resolution(7))
    const MAX_LINKS: usize = 40;
    let mut file = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&file) {
            Ok(target) => {
                file.pop();
                file.push(target);
            }
            Err(_) => return Ok(file),
        }
    }
    bail!("{}: too many symbolic links", path.display())
}

/// A reader that advances a progress bar.
struct Counted<'a>(&'a mut dyn Read, &'a mut Progress);

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = self.0.read(buffer)?;
        self.1.add(size as u64);
        Ok(size)
    }
}

/// Copies to standard output.
fn print_all(contents: &mut dyn Read) -> Result<()> {
    let mut buffer = [0; 64 << 10];
    loop {
        match contents.read(&mut buffer)? {
            0 => return Ok(()),
            size => output::write(&mut io::stdout().lock(), &buffer[..size])?,
        }
    }
}

fn absolute(path: &str) -> Result<()> {
    ensure!(
        path.starts_with('/'),
        "{path:?}: paths in a VM must be absolute"
    );
    Ok(())
}

fn base_name(path: &Path) -> Result<String> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    // Also for "." and "..".
    let name = name.or_else(|| {
        let path = path.canonicalize().ok()?;
        Some(path.file_name()?.to_string_lossy().into_owned())
    });
    name.with_context(|| format!("{} has no name of its own", path.display()))
}

fn join(dir: &str, name: &str) -> String {
    format!("{}/{name}", dir.trim_end_matches('/'))
}

/// Whether the directory's contents are meant instead of the directory: `dir/.`, as in cp(1) and docker.
fn means_contents(path: &Path) -> bool {
    let path = path.as_os_str().as_encoded_bytes();
    path == b"." || path.ends_with(b"/.")
}

/// Whether `path` is a directory in the VM. A path with a slash at the end may be missing only if it
/// `is_to_be_made`.
fn is_directory(client: &Client, path: &str, is_to_be_made: bool) -> Result<bool> {
    if path == "/" {
        return Ok(true);
    }
    match client.file_info(path) {
        // It exists, but is not a regular file.
        Err(Error::Refused { status: 409, .. }) => Ok(true),
        Err(Error::Refused { status: 404, .. }) => {
            ensure!(
                is_to_be_made || !path.ends_with('/'),
                "there is no directory {path} in the VM"
            );
            Ok(false)
        }
        Err(error) => Err(error.into()),
        Ok(_) => Ok(false),
    }
}

/// The default owner of copied files: the host's ids have another meaning in the VM.
const ROOT: (u64, u64) = (0, 0);

/// User and group id of a user in the VM.
fn user_ids(client: &Client, user: &str) -> Result<(u64, u64)> {
    let id = |option: &str| {
        let output = client.exec(&Command::new(["id", option]).user(user))?;
        let id = output.stdout.trim();
        id.parse()
            .with_context(|| format!("unable to find {user} in the VM: {}", output.stderr.trim()))
    };
    Ok((id("-u")?, id("-g")?))
}

fn has_tar(client: &Client) -> bool {
    let asked = client.exec(&Command::new(["tar", "--version"]));
    asked.is_ok_and(|output| output.exit_code == 0)
}

fn send_file(client: &Client, source: &Path, path: &str, options: &WriteOptions) -> Result<()> {
    let shown = source.display();
    let mut file = File::open(source).with_context(|| format!("unable to read {shown}"))?;
    let found = file.metadata()?;
    let options = WriteOptions {
        mode: Some(options.mode.unwrap_or(found.mode() & 0o7777)),
        user: options.user.clone(),
    };
    // The length of a pipe is unknown.
    let length = found.is_file().then_some(found.len());
    let mut progress = Progress::new(true);
    progress.phase("sending", length.unwrap_or(0));
    let mut counted = Counted(&mut file, &mut progress);
    let written = client.write_file(path, &mut counted, length, &options);
    progress.end();
    written.with_context(|| format!("unable to write {path} in the VM"))?;
    Ok(())
}

/// Copies a directory to `destination`, or into it if it exists.
fn fetch_directory(client: &Client, path: &str, destination: &Path) -> Result<()> {
    ensure!(
        has_tar(client),
        "copying a directory needs tar in the VM, which it does not have"
    );
    let into = match destination.is_dir() && !means_contents(Path::new(path)) {
        true => {
            let into = destination.join(base_name(Path::new(path))?);
            // A guest may have created it in an earlier copy.
            ensure!(
                !into.is_symlink(),
                "{} is a symbolic link, which is not followed",
                into.display()
            );
            into
        }
        false => destination.into(),
    };
    let tar = Command::new(["tar", "-C", path, "-cf", "-", "."]).separate_stderr();
    let mut session = client.session(&tar)?;
    session.end_input()?;
    // Not in /tmp, which may be a tmpfs.
    let beside = into.ancestors().find(|dir| dir.is_dir());
    let mut archive = tempfile::tempfile_in(beside.unwrap_or(Path::new(".")))?;
    finish(&mut session, &mut archive)?;
    archive.rewind()?;
    // Created only after everything was received, so that a failed copy leaves nothing behind.
    let cannot = || format!("unable to create {}", into.display());
    fs::create_dir_all(into.parent().unwrap_or(&into)).with_context(cannot)?;
    // Each file and directory gets its mode last: until then, no other user can read it.
    let usual = umask(Mode::RWXG | Mode::RWXO);
    let unpacked = make_directory(&into)
        .with_context(cannot)
        .and_then(|is_new| {
            let unpacked = unpack(archive, &into, is_new);
            unpacked.with_context(|| format!("unable to write to {}", into.display()))
        });
    umask(usual);
    unpacked
}

/// Creates a directory; false if it exists.
fn make_directory(path: &Path) -> io::Result<bool> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(false),
        made => made.map(|()| true),
    }
}

/// Maximum size of the headers before a file in bytes: far more than the longest path takes.
const MAX_HEADERS: u64 = 1 << 20;

/// Unpacks an archive from a guest; a directory that `is_new` gets the mode in it. The tar crate makes sure that
/// nothing is written outside the directory.
fn unpack(archive: File, into: &Path, is_new: bool) -> Result<()> {
    let room = Cell::new(0);
    let mut archive = tar::Archive::new(Limited {
        archive,
        room: &room,
    });
    // As for a single file: set-user-ID files of a guest are not trusted.
    archive.set_preserve_permissions(false);
    archive.set_preserve_mtime(true);
    let mut directories = vec![];
    let mut entries = archive.entries_with_seek()?;
    loop {
        // The crate keeps names and pax records of any length in memory.
        room.set(MAX_HEADERS);
        let Some(entry) = entries.next() else {
            break;
        };
        let mut entry = entry?;
        room.set(u64::MAX);
        match entry.header().entry_type() {
            EntryType::Directory => directories.push(entry),
            EntryType::Block | EntryType::Char | EntryType::Fifo => {
                let name = entry.path_bytes();
                note!(
                    "{:?}: left out: a device or a FIFO",
                    name.escape_ascii().to_string()
                );
            }
            _ => drop(entry.unpack_in(into)?),
        }
    }
    // Directories may be read-only, so they are set up after their contents, the deepest first.
    directories.sort_by(|one, other| other.path_bytes().cmp(&one.path_bytes()));
    for mut directory in directories {
        directory.unpack_in(into)?;
        // The crate leaves this one out.
        if is_new
            && directory
                .path()?
                .components()
                .all(|part| part == Component::CurDir)
        {
            let mode = directory.header().mode()? & 0o777;
            fs::set_permissions(into, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

/// Limits how much of an archive can be read.
struct Limited<'a> {
    archive: File,
    room: &'a Cell<u64>,
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = self.room.get();
        if room == 0 {
            let error = format!("headers of over {MAX_HEADERS} bytes");
            return Err(io::Error::other(error));
        }
        let most = usize::try_from(room).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let size = self.archive.read(&mut buffer[..most])?;
        self.room.set(room - size as u64);
        Ok(size)
    }
}

impl Seek for Limited<'_> {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.archive.seek(to)
    }
}

/// Waits for a command, which must succeed; its output goes to `out`.
fn finish(session: &mut Session, out: &mut dyn Write) -> Result<()> {
    /// Maximum number of bytes of standard error that are kept.
    const MAX_STDERR: usize = 64 << 10;
    let mut stderr: Vec<u8> = vec![];
    while let Some(event) = session.next()? {
        match event {
            Event::Output(pigeon::logs::Stream::Stdout, bytes) => out.write_all(&bytes)?,
            Event::Output(_, bytes) => {
                let room = MAX_STDERR - stderr.len();
                stderr.extend(&bytes[..room.min(bytes.len())]);
            }
            Event::Exit(ended) => {
                let text = String::from_utf8_lossy(&stderr);
                ensure!(ended.status() == 0, "tar in the VM: {}", text.trim_end());
                return Ok(());
            }
        }
    }
    bail!("tar in the VM has ended without an exit status")
}

/// Sends a directory as an archive whose files have this user and group id.
fn send_archive(input: &mut SessionInput, source: &Path, owner: (u64, u64)) -> Result<()> {
    let mut builder = tar::Builder::new(input);
    append(&mut builder, &source.join("."), Path::new("."), owner)?;
    for entry in walk(source)? {
        let place = source.join(&entry);
        let added = append(&mut builder, &place, &entry, owner);
        added.with_context(|| place.display().to_string())?;
    }
    Ok(builder.finish()?)
}

fn append(
    builder: &mut tar::Builder<&mut SessionInput>,
    place: &Path,
    name: &Path,
    (uid, gid): (u64, u64),
) -> io::Result<()> {
    let found = place.symlink_metadata()?;
    let kind = found.file_type();
    if kind.is_socket() {
        // It is useless without the listening process, and tar has no entry type for it.
        note!("{}: left out: a socket", place.display());
        return Ok(());
    }
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&found);
    header.set_uid(uid);
    header.set_gid(gid);
    if kind.is_file() {
        // Not as a sparse entry, which busybox's tar does not support. Padded with zeros if the file shrinks
        // meanwhile.
        let file = File::open(place)?.chain(io::repeat(0)).take(found.len());
        return builder.append_data(&mut header, name, file);
    }
    header.set_size(0);
    if kind.is_symlink() {
        return builder.append_link(&mut header, name, fs::read_link(place)?);
    }
    if kind.is_block_device() || kind.is_char_device() {
        header.set_device_major(rustix::fs::major(found.rdev()))?;
        header.set_device_minor(rustix::fs::minor(found.rdev()))?;
    }
    builder.append_data(&mut header, name, io::empty())
}

/// A command's input, as a stream.
struct SessionInput<'a> {
    session: &'a mut Session,
    /// Whether sending failed, as opposed to reading a file.
    is_broken: bool,
}

impl Write for SessionInput<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let size = bytes.len().min(MESSAGE);
        let sent = self.session.send(&bytes[..size]);
        self.is_broken |= sent.is_err();
        sent.map(|()| size).map_err(io::Error::other)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// All paths below a directory, parents first.
fn walk(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        let entries = fs::read_dir(root.join(&dir));
        for entry in
            entries.with_context(|| format!("unable to read {}", root.join(&dir).display()))?
        {
            let entry = entry?;
            let path = dir.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                todo.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_a_vm_has_a_name_and_a_colon() {
        assert_eq!(Place::of("app:/etc/x"), Place::There(Some("app"), "/etc/x"));
        assert_eq!(Place::of(":/etc/x"), Place::There(None, "/etc/x"));
        assert_eq!(Place::of("./a:b"), Place::Here(Path::new("./a:b")));
        assert_eq!(Place::of("file"), Place::Here(Path::new("file")));
        assert_eq!(Place::of("-"), Place::Here(Path::new("-")));
    }

    #[test]
    fn a_directory_keeps_its_name() {
        assert_eq!(base_name(Path::new("/a/b/")).unwrap(), "b");
        assert!(base_name(Path::new("/")).is_err());
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        assert_eq!(base_name(&dir.path().join("d/.")).unwrap(), "d");
        assert_eq!(join("/", "x"), "/x");
        assert_eq!(join("/a/", "x"), "/a/x");
    }
}
