//! `pigeon cp`: files from and to a VM.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pigeon::{
    Client, Command, Error, Session,
    files::WriteOptions,
    progress::Progress,
    session::{Event, MESSAGE},
};

use crate::{output::note, target::Target};

#[derive(Args)]
pub struct Cp {
    /// A file or directory, local or in a VM as NAME:/PATH (:/PATH if only one VM runs); - is
    /// standard input
    source: String,
    /// The destination, in the other place; - is standard output
    destination: String,
    #[command(flatten)]
    target: Target,
    /// The owner of files copied to a VM [default: root]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
}

/// A place that is named.
#[derive(Debug, PartialEq)]
pub enum Place<'a> {
    Here(&'a Path),
    There(Option<&'a str>, &'a str),
}

impl<'a> Place<'a> {
    /// A path with a slash before its colon is one of here, as with scp and docker.
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
        let path = match is_directory(client, path)? {
            true => join(path, &base_name(source)?),
            false => path.to_string(),
        };
        if found.is_dir() {
            return self.send_directory(client, source, &path);
        }
        send_file(client, source, &path, &options)
    }

    /// A directory with all that is in it becomes `path`.
    fn send_directory(&self, client: &Client, source: &Path, path: &str) -> Result<()> {
        let made = client.exec(&Command::new(["mkdir", "-p", path]));
        let tar = Command::new(["tar", "-C", path, "-xf", "-"]);
        // As whom it is unpacked, decides whose the files are.
        let tar = match &self.user {
            Some(user) => tar.user(user),
            None => tar,
        };
        let has_mkdir = made.is_ok_and(|output| output.exit_code == 0);
        if has_mkdir && has_tar(client) {
            let mut session = client.session(&tar.separate_stderr())?;
            let sent = send_archive(&mut session, source);
            // tar's own message is more useful than the broken connection.
            if sent.is_ok() {
                session.end_input()?;
            }
            finish(&mut session, &mut io::sink())?;
            sent.context("unable to send the files")?;
            return Ok(());
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
        if is_directory(client, path)? {
            ensure!(
                destination != Path::new("-"),
                "{path} is a directory: it cannot be written to standard output"
            );
            return fetch_directory(client, path, destination);
        }
        let (info, mut contents) = client.read_file(path)?;
        if destination == Path::new("-") {
            io::copy(&mut contents, &mut io::stdout().lock()).context("unable to pass it on")?;
            return Ok(());
        }
        let destination = match destination.is_dir() {
            true => destination.join(base_name(Path::new(path))?),
            false => destination.into(),
        };
        let shown = destination.display();
        // What was there is there until all has come.
        let dir = destination
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty());
        let mut file = tempfile::NamedTempFile::new_in(dir.unwrap_or(Path::new(".")))
            .with_context(|| format!("unable to write {shown}"))?;
        let mut progress = Progress::new(true);
        progress.phase("receiving", info.size);
        let copied = io::copy(&mut Counted(&mut contents, &mut progress), &mut file);
        let copied = copied.with_context(|| format!("{path} broke off"))?;
        progress.end();
        ensure!(copied == info.size, "{path} broke off after {copied} bytes");
        let mode = info.mode.unwrap_or(0o644) & 0o777;
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(mode))?;
        let kept = file.persist(&destination).map_err(|error| error.error);
        kept.with_context(|| format!("unable to write {shown}"))?;
        Ok(())
    }
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
    // Of "." and "..", too.
    let name = name.or_else(|| {
        let path = path.canonicalize().ok()?;
        Some(path.file_name()?.to_string_lossy().into_owned())
    });
    name.with_context(|| format!("{} has no name of its own", path.display()))
}

fn join(dir: &str, name: &str) -> String {
    format!("{}/{name}", dir.trim_end_matches('/'))
}

/// Whether there is a directory at a path of the VM.
fn is_directory(client: &Client, path: &str) -> Result<bool> {
    if path == "/" {
        return Ok(true);
    }
    match client.file_info(path) {
        // Something that is not a regular file.
        Err(Error::Refused { status: 409, .. }) => Ok(true),
        Err(Error::Refused { status: 404, .. }) => {
            ensure!(
                !path.ends_with('/'),
                "there is no directory {path} in the VM"
            );
            Ok(false)
        }
        Err(error) => Err(error.into()),
        Ok(_) => Ok(false),
    }
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
    // A pipe has no length before its end.
    let length = found.is_file().then_some(found.len());
    let mut progress = Progress::new(true);
    progress.phase("sending", length.unwrap_or(0));
    let mut counted = Counted(&mut file, &mut progress);
    let written = client.write_file(path, &mut counted, length, &options);
    progress.end();
    written.with_context(|| format!("unable to write {path} in the VM"))?;
    Ok(())
}

/// A directory with all that is in it becomes `destination`, or lies in it where it is there.
fn fetch_directory(client: &Client, path: &str, destination: &Path) -> Result<()> {
    ensure!(
        has_tar(client),
        "copying a directory needs tar in the VM, which it does not have"
    );
    let into = match destination.is_dir() {
        true => destination.join(base_name(Path::new(path))?),
        false => destination.into(),
    };
    fs::create_dir_all(&into).with_context(|| format!("unable to create {}", into.display()))?;
    let tar = Command::new(["tar", "-C", path, "-cf", "-", "."]).separate_stderr();
    let mut session = client.session(&tar)?;
    session.end_input()?;
    let mut archive = tempfile::tempfile()?;
    finish(&mut session, &mut archive)?;
    io::Seek::rewind(&mut archive)?;
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    let unpacked = archive.unpack(&into);
    unpacked.with_context(|| format!("unable to write to {}", into.display()))
}

/// Waits for a command's end, which has to be a good one; its output goes to `out`.
fn finish(session: &mut Session, out: &mut dyn Write) -> Result<()> {
    let mut said = vec![];
    while let Some(event) = session.next()? {
        match event {
            Event::Output(pigeon::logs::Stream::Stdout, bytes) => out.write_all(&bytes)?,
            Event::Output(_, bytes) => said.extend(bytes),
            Event::Exit(ended) => {
                let text = String::from_utf8_lossy(&said);
                ensure!(ended.status() == 0, "tar in the VM: {}", text.trim_end());
                return Ok(());
            }
        }
    }
    bail!("tar in the VM has ended without an exit status")
}

/// Sends a directory as an archive.
fn send_archive(session: &mut Session, source: &Path) -> io::Result<()> {
    let mut builder = tar::Builder::new(SessionInput(session));
    builder.follow_symlinks(false);
    builder.append_dir_all(".", source)?;
    builder.into_inner().map(drop)
}

/// A command's input, as a stream.
struct SessionInput<'a>(&'a mut Session);

impl Write for SessionInput<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let size = bytes.len().min(MESSAGE);
        self.0.send(&bytes[..size]).map_err(io::Error::other)?;
        Ok(size)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// All paths below a directory, those above before those below.
fn walk(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        let entries = fs::read_dir(root.join(&dir));
        for entry in entries.with_context(|| format!("unable to read {}", root.display()))? {
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
    fn a_place_in_a_vm_has_a_name_and_a_colon() {
        assert_eq!(Place::of("app:/etc/x"), Place::There(Some("app"), "/etc/x"));
        assert_eq!(Place::of(":/etc/x"), Place::There(None, "/etc/x"));
        assert_eq!(Place::of("./a:b"), Place::Here(Path::new("./a:b")));
        assert_eq!(Place::of("file"), Place::Here(Path::new("file")));
        assert_eq!(Place::of("-"), Place::Here(Path::new("-")));
    }

    #[test]
    fn a_directorys_name_is_its_own() {
        assert_eq!(base_name(Path::new("/a/b/")).unwrap(), "b");
        assert!(base_name(Path::new("/")).is_err());
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        assert_eq!(base_name(&dir.path().join("d/.")).unwrap(), "d");
        assert_eq!(join("/", "x"), "/x");
        assert_eq!(join("/a/", "x"), "/a/x");
    }
}
