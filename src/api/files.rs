//! `GET`, `HEAD` and `PUT /v1/files`: a child reads or replaces one regular file.
//!
//! As disks may hang, PID 1 hands the connection to a child once it has a request's head. The child parses the
//! head again, reads the body and responds; then the connection is closed. PID 1 checks whether the child
//! makes progress, and shuts the connection down if it does not.

use super::error::error_body;
use super::io::{HOST_BUFFER, LAST_BYTES_TIMEOUT};
use super::process::Process;
use crate::context::Context;
use crate::error::{Result, name};
use crate::process::credentials;
use crate::process::helper::HelperLog;
use crate::sys::{self, Stopwatch, files};
use core::cell::Cell;
use core::ffi::CStr;
use core::fmt::{self, Display};
use core::time::Duration;
use proto::config::PATH_MAX;
use proto::http::{
    self, BodyDecoder, Content, DecodeError, HEAD_ROOM, Head, HeadParser, JSON, Method, Reply,
    RequestError, ResponseHead, Status, Target, decode_query,
};
use proto::message;
use proto::message::{Message, ToLossy};
use proto::users::Identity;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Access, AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// How often PID 1 checks a child's progress, in milliseconds.
const CHECK_INTERVAL: u64 = 10_000;
/// How long a child may make no progress, in milliseconds. Longer than it waits for its client.
const STALL_TIMEOUT: u64 = 35_000;
/// How many seconds a client may make no progress. Counted second by second: a single long timeout would
/// include a pause of the VM.
const CLIENT_TIMEOUT_SECS: u32 = 30;
const SECOND: Duration = Duration::from_secs(1);
/// Bytes moved at once: the size of a vsock receive buffer (VIRTIO_VSOCK_DEFAULT_BUF_SIZE).
const CHUNK: usize = 256 << 10;
/// Maximum length of a `user:group`, in bytes.
const USER: usize = 256;
/// Mode of a new file.
const DEFAULT_MODE: &str = "0644";

/// A call that is handled by a child.
pub struct Transfer {
    /// The child.
    pub process: Process,
    /// When PID 1 next checks its progress.
    pub deadline: u64,
    /// When a check last found progress.
    progress: u64,
    stalled: bool,
}

impl Transfer {
    /// Hands the connection to a child. `received` starts with a head of `head` bytes.
    pub fn start(
        socket: &OwnedFd,
        received: &mut [u8],
        head: usize,
        context: &mut Context,
    ) -> Result<Self> {
        let Context {
            proc, scratch, now, ..
        } = context;
        let process = Process::fork(proc, &mut |log| {
            // /proc was opened before anything could be mounted over it.
            sys::close_others(&[proc, socket, log.pipe()]);
            let (head, body) = received.split_at_mut_checked(head).unwrap_or_default();
            let client = Client {
                socket,
                log,
                last_reported: Cell::new(0),
            };
            serve(&client, head, body, proc, scratch);
            0
        })?;
        let now = *now;
        Ok(Self {
            process,
            deadline: now.saturating_add(CHECK_INTERVAL),
            progress: now,
            stalled: false,
        })
    }

    /// Whether the child has exited, or is given up.
    pub fn is_finished(&self) -> bool {
        self.stalled || self.process.status().is_some()
    }

    /// Checks whether the child has moved bytes since the last check.
    pub fn check_progress(&mut self, now: u64) {
        if self.process.made_progress() {
            self.progress = now;
        }
        self.stalled = now.saturating_sub(self.progress) >= STALL_TIMEOUT;
        self.deadline = now.saturating_add(CHECK_INTERVAL);
    }
}

/// In the child: handles the request.
fn serve(client: &Client, head: &[u8], body: &mut [u8], proc: &OwnedFd, scratch: &mut [u8]) {
    let Ok(Some(head)) = HeadParser::default().parse(head) else {
        return;
    };
    let Ok(mut decoder) = BodyDecoder::new(head.framing, u64::MAX) else {
        return;
    };
    client.set_blocking();
    let mut path = [0; PATH_MAX];
    let content = decoder.decode(body).map(|decoded| decoded.content);
    let served = match (content, head.target.path(&mut path), head.method) {
        (Ok(content), Ok(path), Method::Put) => {
            let content = body.get(..content).unwrap_or(&[]);
            put(client, &head, path, content, &mut decoder, scratch)
        }
        (Ok(_), Ok(path), _) => get(client, &head, path, proc, scratch),
        (Err(error), ..) => Err(error.into()),
        (_, Err(error), _) => Err(error.into()),
    };
    let failure = match served {
        Ok(()) | Err(Failure::Disconnected) => return,
        Err(failure) => failure,
    };
    let reason = match sys::c_str(&path) {
        path if path.is_empty() => message!("{failure}"),
        path => message!("{}: {failure}", path.lossy()),
    };
    let status = failure.status(head.method);
    let sent = client.respond(head.reply, status, &error_body(&reason));
    if sent.is_ok() {
        client.drain(&mut decoder, scratch);
    }
}

/// Why a call has failed.
#[derive(Clone, Copy)]
enum Failure {
    /// The client has disconnected, or the response has begun and cannot become an error.
    Disconnected,
    /// The client has made no progress for [`CLIENT_TIMEOUT_SECS`].
    Timeout,
    /// A mode that is not one to four octal digits.
    Mode,
    /// A user or group that is not in the root's files.
    User,
    /// A parameter that is malformed.
    Parameter(DecodeError),
    /// A body that is malformed.
    Body(RequestError),
    /// The path is not a regular file.
    NotRegular,
    /// A system call has failed.
    Errno(Errno),
}

impl Failure {
    fn status(self, method: Method) -> Status {
        match self {
            Self::Timeout => Status::RequestTimeout,
            Self::Body(error) => error.status(),
            Self::NotRegular => Status::Conflict,
            Self::Errno(errno) => match errno {
                Errno::NOENT => Status::NotFound,
                // A parent in the path is a file.
                Errno::NOTDIR if method != Method::Put => Status::NotFound,
                Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::EXIST | Errno::BUSY => {
                    Status::Conflict
                }
                Errno::ACCESS | Errno::PERM | Errno::ROFS => Status::Forbidden,
                Errno::NAMETOOLONG => Status::BadRequest,
                Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Status::InsufficientStorage,
                _ => Status::InternalServerError,
            },
            _ => Status::BadRequest,
        }
    }
}

impl Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Disconnected => "the client is gone",
            Self::Timeout => "the request took too long",
            Self::Mode => "the mode is not one to four octal digits",
            Self::User => "there is no such user or group",
            Self::Parameter(error) => error.message(),
            Self::Body(error) => error.message(),
            Self::NotRegular => "not a regular file",
            Self::Errno(errno) => return name(*errno).fmt(formatter),
        })
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<DecodeError> for Failure {
    fn from(error: DecodeError) -> Self {
        Self::Parameter(error)
    }
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        Self::Body(error)
    }
}

/// The parameter `mode`: one to four octal digits.
fn read_mode(target: &Target) -> Result<Mode, Failure> {
    let digits = target.parameter("mode").unwrap_or(DEFAULT_MODE);
    if !(1..=4).contains(&digits.len()) {
        return Err(Failure::Mode);
    }
    let mut mode = 0;
    for digit in digits.bytes() {
        let digit = char::from(digit).to_digit(8).ok_or(Failure::Mode)?;
        mode = mode << 3 | digit;
    }
    Ok(Mode::from_raw_mode(mode))
}

/// The parameter `user`, as for a command. Returns its ids from the root's files.
fn read_user(target: &Target, scratch: &mut [u8]) -> Result<(u32, u32), Failure> {
    let Some(user) = target.parameter("user") else {
        return Ok((0, 0));
    };
    let mut room = [0; USER];
    let user = decode_query(user, &mut room)?;
    let user = core::str::from_utf8(user).map_err(|_| Failure::User)?;
    let mut identity = Identity::default();
    credentials::resolve(user, scratch, &mut identity).map_err(|_| Failure::User)?;
    Ok((identity.uid, identity.gid))
}

/// The client, for the child.
struct Client<'a> {
    socket: &'a OwnedFd,
    log: &'a HelperLog,
    /// When progress was last reported to PID 1.
    last_reported: Cell<u64>,
}

impl Client<'_> {
    /// Makes the socket blocking, with timeouts.
    fn set_blocking(&self) {
        // The flag is shared with PID 1's descriptor, which is no longer used for reading or writing.
        let _blocks = rustix::io::ioctl_fionbio(self.socket, false);
        let limit = Some(SECOND);
        let _limited = set_socket_timeout(self.socket, Timeout::Recv, limit);
        let _limited = set_socket_timeout(self.socket, Timeout::Send, limit);
    }

    /// Reports progress to PID 1, at most once a second.
    fn report_progress(&self) {
        let now = sys::milliseconds();
        if now.saturating_sub(self.last_reported.get()) >= 1000 {
            self.last_reported.set(now);
            self.log.step(&"moved bytes");
        }
    }

    /// Sends all bytes. Fails if the client has disconnected or has made no progress for too long.
    fn send(&self, mut bytes: &[u8]) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let count = retry(&mut || files::send(self.socket, bytes))
                .map_err(|_| Failure::Disconnected)?;
            bytes = bytes.get(count..).unwrap_or(&[]);
            self.report_progress();
        }
        Ok(())
    }

    /// Receives some bytes.
    fn receive(&self, room: &mut [u8]) -> Result<usize, Failure> {
        match retry(&mut || files::read(self.socket, room)) {
            Ok(count @ 1..) => {
                self.report_progress();
                Ok(count)
            }
            Err(Errno::AGAIN) => Err(Failure::Timeout),
            Ok(_) | Err(_) => Err(Failure::Disconnected),
        }
    }

    /// Sends a whole JSON response.
    fn respond(&self, reply: Reply, status: Status, body: &Message) -> Result<(), Failure> {
        let content = Content::Length(body.as_bytes().len() as u64);
        let mut room = [0; HEAD_ROOM];
        let mut response = ResponseHead::new(&mut room);
        response.begin(status, reply.close(), content, JSON);
        self.send(response.finish().ok_or(Failure::Disconnected)?)?;
        match reply.head_only {
            true => Ok(()),
            false => self.send(body.as_bytes()),
        }
    }

    /// Waits until the client has read the last bytes and closed. One that waits for the end sees it, on hosts
    /// that forward half-closes.
    fn wait_for_close(&self, room: &mut [u8]) {
        let _gone = rustix::net::shutdown(self.socket, Shutdown::Write);
        let watch = Stopwatch::start();
        while watch.elapsed() < LAST_BYTES_TIMEOUT
            && matches!(files::read(self.socket, room), Ok(1..) | Err(Errno::AGAIN))
        {}
    }

    /// Discards the rest of the client's body: closing a connection with unread bytes would reset it, and the
    /// client could not read the response.
    fn drain(&self, decoder: &mut BodyDecoder, room: &mut [u8]) {
        let watch = Stopwatch::start();
        while !decoder.is_complete() && watch.elapsed() < LAST_BYTES_TIMEOUT {
            match files::read(self.socket, room) {
                Ok(count @ 1..) => {
                    let _malformed = decoder.decode(room.get_mut(..count).unwrap_or(&mut []));
                }
                Err(Errno::AGAIN) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }
}

/// Repeats a call that times out, up to the client's time limit.
fn retry(call: &mut dyn FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    let mut result = call();
    for _ in 1..CLIENT_TIMEOUT_SECS {
        if result != Err(Errno::AGAIN) {
            break;
        }
        result = call();
    }
    result
}

/// Sends a file, or only the head of the response for HEAD.
fn get(
    client: &Client,
    head: &Head,
    path: &CStr,
    proc: &OwnedFd,
    room: &mut [u8],
) -> Result<(), Failure> {
    let room = room.get_mut(..CHUNK).unwrap_or(&mut []);
    let (file, _) = open_regular(path, proc)?;
    // The size of files in sysfs and cgroupfs is meaningless: a file that fits in the buffer is measured.
    let filled = files::read_full(&file, room)?;
    // After that: it may have grown since it was opened.
    let status = rustix::fs::fstat(&file)?;
    let length = match filled < room.len() {
        true => filled as u64,
        false => u64::try_from(status.st_size).unwrap_or(0),
    };
    let mut left = length
        .checked_sub(filled as u64)
        .ok_or(Failure::NotRegular)?;
    let mut head_room = [0; HEAD_ROOM];
    let mut response = ResponseHead::new(&mut head_room);
    describe(&mut response, head.reply, length, &status);
    client.send(response.finish().ok_or(Failure::Disconnected)?)?;
    if head.reply.head_only {
        return Ok(());
    }
    let mut count = filled;
    loop {
        client.send(room.get(..count).unwrap_or(&[]))?;
        if left == 0 {
            if length > HOST_BUFFER {
                client.wait_for_close(room);
            }
            return Ok(());
        }
        let limit = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
        count = match files::read(&file, room.get_mut(..limit).unwrap_or(&mut [])) {
            Ok(count @ 1..) => count,
            // It was truncated meanwhile, or its disk failed: the client sees that bytes are missing.
            Ok(_) | Err(_) => return Err(Failure::Disconnected),
        };
        left -= count as u64;
    }
}

/// The head of a response with a file.
fn describe(head: &mut ResponseHead, reply: Reply, length: u64, status: &Stat) {
    let content = Content::Length(length);
    let media_type = "application/octet-stream";
    head.begin(Status::Ok, reply.close(), content, media_type);
    let mode = status.st_mode & 0o7777;
    head.header("File-Mode", &format_args!("{mode:04o}"));
    let (uid, gid) = (status.st_uid, status.st_gid);
    head.header("File-Owner", &format_args!("{uid}:{gid}"));
    head.header("File-Mtime", &u64::try_from(status.st_mtime).unwrap_or(0));
}

/// Opens a regular file for reading.
///
/// Opening a pipe or a device can have side effects (rewind a tape, start a watchdog), so it is opened with
/// O_PATH (open(2)) first, and for reading once its type is known. Files in /proc are refused: reading them
/// can block, consume data, or return the memory of a whole process.
fn open_regular(path: &CStr, proc: &OwnedFd) -> Result<(OwnedFd, Stat), Failure> {
    let handle = files::open(path, OFlags::PATH)?;
    let status = rustix::fs::fstat(&handle)?;
    if !is_regular(&status) || is_in_proc(&handle)? {
        return Err(Failure::NotRegular);
    }
    let link = message!("self/fd/{}\0", handle.as_raw_fd());
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // The link leads to another mount.
    let file = rustix::fs::openat(proc, sys::c_str(link.as_bytes()), flags, Mode::empty())?;
    Ok((file, status))
}

fn is_regular(status: &Stat) -> bool {
    FileType::from_raw_mode(status.st_mode) == FileType::RegularFile
}

fn is_in_proc(file: &OwnedFd) -> Result<bool, Errno> {
    rustix::fs::fstatfs(file).map(|found| found.f_type == rustix::fs::PROC_SUPER_MAGIC)
}

/// The parent directory of a path.
fn parent(path: &[u8]) -> Option<&[u8]> {
    path.get(..path.iter().rposition(|byte| *byte == b'/')?)
}

/// All parent directories of a path, innermost first.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    core::iter::successors(parent(path), |path| parent(path))
}

/// Creates or replaces a file with the request's body, and creates missing directories, which are removed
/// again on failure.
fn put(
    client: &Client,
    head: &Head,
    path: &CStr,
    content: &[u8],
    decoder: &mut BodyDecoder,
    scratch: &mut [u8],
) -> Result<(), Failure> {
    let missing = missing_parents(path);
    let stored = store(client, head, path, content, decoder, scratch);
    if stored.is_err() {
        remove_parents(path, missing);
    }
    stored
}

/// How many of a path's parent directories do not exist: the innermost ones.
fn missing_parents(path: &CStr) -> usize {
    let mut room = [0; PATH_MAX];
    let mut exists = |parent| {
        let parent = files::join(&[parent], &mut room);
        parent.is_some_and(|parent| rustix::fs::access(parent, Access::EXISTS).is_ok())
    };
    parents(path.to_bytes())
        .take_while(|parent| !exists(parent))
        .count()
}

/// Removes the `count` innermost parent directories of a path, up to one in which another process has created
/// something.
fn remove_parents(path: &CStr, count: usize) {
    let mut room = [0; PATH_MAX];
    let remove = |parent| {
        let parent = files::join(&[parent], &mut room);
        parent.is_some_and(|parent| rustix::fs::rmdir(parent).is_ok())
    };
    let _all = parents(path.to_bytes()).take(count).all(remove);
}

/// The same, but leaves created directories behind on failure.
fn store(
    client: &Client,
    head: &Head,
    path: &CStr,
    content: &[u8],
    decoder: &mut BodyDecoder,
    scratch: &mut [u8],
) -> Result<(), Failure> {
    let mode = read_mode(&head.target)?;
    let (uid, gid) = read_user(&head.target, scratch)?;
    let start_of_name = 1 + parent(path.to_bytes()).map_or(0, <[u8]>::len);
    let (parent, name) = path
        .to_bytes_with_nul()
        .split_at_checked(start_of_name)
        .unwrap_or_default();
    let name = sys::c_str(name);
    files::make_directories(parent)?;
    let mut room = [0; PATH_MAX];
    let parent = files::join(&[parent], &mut room).unwrap_or_default();
    let parent = files::open(parent, OFlags::PATH | OFlags::DIRECTORY)?;
    if name.is_empty() || is_in_proc(&parent)? {
        return Err(Failure::NotRegular);
    }
    // A link is replaced itself, unless its target is not a regular file.
    let replaces = match rustix::fs::statat(&parent, name, AtFlags::empty()) {
        Ok(status) if is_regular(&status) => true,
        Ok(_) => return Err(Failure::NotRegular),
        Err(Errno::NOENT) => false,
        Err(errno) => return Err(errno.into()),
    };
    let mut upload = Upload::create(parent)?;
    if head.expects_continue && content.is_empty() {
        client.send(http::CONTINUE)?;
    }
    let room = scratch.get_mut(..CHUNK).unwrap_or(&mut []);
    let bytes = upload.receive(client, content, decoder, room)?;
    upload.publish(name, mode, uid, gid)?;
    // Closed before the response: the client may execute it at once (ETXTBSY, execve(2)).
    drop(upload);
    let body = message!("{{\"ok\":true,\"bytes\":{bytes}}}");
    let status = match replaces {
        true => Status::Ok,
        false => Status::Created,
    };
    client.respond(head.reply, status, &body)
}

/// A file that does not have its name yet.
struct Upload {
    file: OwnedFd,
    directory: OwnedFd,
    /// Temporary name in the same directory, from which it is renamed.
    temporary: Message,
    /// It has the temporary name, as its file system does not support unnamed files.
    is_named: bool,
}

impl Upload {
    /// Creates an unnamed file (O_TMPFILE, open(2)), which leaves nothing behind after a crash, if the file
    /// system supports it.
    fn create(directory: OwnedFd) -> Result<Self, Failure> {
        let temporary = message!(".pigeon-{}\0", rustix::process::getpid().as_raw_pid());
        let private = Mode::from_raw_mode(0o600);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let unnamed = rustix::fs::openat(&directory, c".", flags | OFlags::TMPFILE, private);
        let is_named = unnamed.is_err();
        let file = unnamed.or_else(|_| {
            let name = sys::c_str(temporary.as_bytes());
            // A crash may have left one.
            let _absent = rustix::fs::unlinkat(&directory, name, AtFlags::empty());
            let flags = flags | OFlags::CREATE | OFlags::EXCL;
            rustix::fs::openat(&directory, name, flags, private)
        });
        Ok(Self {
            file: file?,
            directory,
            temporary,
            is_named,
        })
    }

    /// Writes a request's body, which begins with `content`. Returns its length.
    fn receive(
        &mut self,
        client: &Client,
        content: &[u8],
        decoder: &mut BodyDecoder,
        room: &mut [u8],
    ) -> Result<u64, Failure> {
        files::write_whole(&self.file, content)?;
        let mut bytes = content.len() as u64;
        while !decoder.is_complete() {
            let count = client.receive(room)?;
            let piece = room.get_mut(..count).unwrap_or(&mut []);
            let content = decoder.decode(piece)?.content;
            files::write_whole(&self.file, piece.get(..content).unwrap_or(&[]))?;
            bytes += content as u64;
        }
        Ok(bytes)
    }

    /// Sets its owner, its mode (afterwards, as chown(2) can change it) and its name.
    fn publish(&mut self, name: &CStr, mode: Mode, uid: u32, gid: u32) -> Result<(), Failure> {
        let Self {
            file, directory, ..
        } = self;
        rustix::fs::fchown(&*file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .and_then(|()| rustix::fs::fchmod(&*file, mode))?;
        let temporary = sys::c_str(self.temporary.as_bytes());
        if !self.is_named {
            // Unlike a rename, a link does not replace an existing file.
            let _absent = rustix::fs::unlinkat(&*directory, temporary, AtFlags::empty());
            let from = AtFlags::EMPTY_PATH;
            rustix::fs::linkat(&*file, c"", &*directory, temporary, from)?;
            self.is_named = true;
        }
        rustix::fs::renameat(&*directory, temporary, &*directory, name)?;
        self.is_named = false;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.is_named {
            let temporary = sys::c_str(self.temporary.as_bytes());
            let _gone = rustix::fs::unlinkat(&self.directory, temporary, AtFlags::empty());
        }
    }
}
