//! A stand-in for a VM's API: hybrid vsock's handshake, HTTP, WebSockets, and responses given by a test.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use pigeon::{Arch, process::write_program};
use serde_json::{Value, json};

/// A request as received, with its body.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// `GET /v1/status`
    pub line: String,
    pub headers: Vec<String>,
    pub body: Vec<u8>,
}

/// A connection after the handshake and the head of its first request.
pub struct Connection {
    pub request: Request,
    pub stream: BufReader<UnixStream>,
    /// The raw head, for a parser that needs to read it again.
    pub head: Vec<u8>,
}

impl Connection {
    /// Reads the body, whose length is in the head.
    pub fn read_body(&mut self) {
        let header = |name: &str| {
            let found = self
                .request
                .headers
                .iter()
                .find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")));
            found.map(|line| line.split_once(':').unwrap().1.trim().to_string())
        };
        let mut body = vec![];
        if header("transfer-encoding").as_deref() == Some("chunked") {
            loop {
                let mut line = String::new();
                self.stream.read_line(&mut line).unwrap();
                let size = usize::from_str_radix(line.trim_end(), 16).unwrap();
                let mut chunk = vec![0; size + 2];
                self.stream.read_exact(&mut chunk).unwrap();
                body.extend(&chunk[..size]);
                if size == 0 {
                    break;
                }
            }
        } else if let Some(length) = header("content-length") {
            body.resize(length.parse().unwrap(), 0);
            self.stream.read_exact(&mut body).unwrap();
        }
        self.request.body = body;
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    pub fn respond(&mut self, status: u16, headers: &str, body: &[u8]) {
        let head = format!(
            "HTTP/1.1 {status} X\r\n{headers}Content-Length: {}\r\n\r\n",
            body.len()
        );
        self.send(&[head.as_bytes(), body].concat());
    }
}

/// A VM for the duration of a test.
pub struct Vm {
    pub uds: PathBuf,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Vm {
    /// Handles every connection with `serve`.
    pub fn start(dir: &Path, serve: impl Fn(Connection) + Send + Sync + 'static) -> Vm {
        let uds = dir.join("vm.vsock");
        let listener = UnixListener::bind(&uds).unwrap();
        let requests = Arc::new(Mutex::new(vec![]));
        let (seen, serve) = (requests.clone(), Arc::new(serve));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, serve) = (seen.clone(), serve.clone());
                thread::spawn(move || {
                    let Some(mut connection) = accept(stream) else {
                        return;
                    };
                    let is_plain = !connection.request.line.starts_with("CONNECT")
                        && !connection.request.line.contains("/ws/");
                    if is_plain {
                        connection.read_body();
                    }
                    if connection.request.line == "GET /v1/status" {
                        return connection.respond(200, "", b"{\"ok\":true}");
                    }
                    seen.lock().unwrap().push(connection.request.clone());
                    serve(connection);
                });
            }
        });
        Vm { uds, requests }
    }

    /// The requests so far, without status checks.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub fn lines(&self) -> Vec<String> {
        self.requests()
            .into_iter()
            .map(|request| request.line)
            .collect()
    }
}

/// A stand-in for Firecracker's API at `path`: one request at a time, as in Firecracker, and one per
/// connection.
pub fn firecracker(path: &Path, mut serve: impl FnMut(Connection) + Send + 'static) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut connection = read_head(stream).unwrap();
            connection.read_body();
            serve(connection);
        }
    });
}

/// A stand-in for QEMU, which runs until it is ended: a program that connects the host to the socket of `vm`,
/// and a monitor whose commands all succeed.
pub struct Qemu {
    dir: PathBuf,
    monitors: Arc<Mutex<Vec<UnixStream>>>,
}

impl Qemu {
    /// In the directory of `vm`, for a VM with the socket `uds`. It prints `console` at its end.
    pub fn start(vm: &Vm, uds: &Path, console: &str) -> Qemu {
        let dir = vm.uds.parent().unwrap().to_path_buf();
        let listener = UnixListener::bind(dir.join("qmp")).unwrap();
        fs::write(dir.join("console"), console).unwrap();
        let script = format!(
            "#!/bin/sh\n\
             for word; do case $word in unix:*qmp.sock,*) qmp=${{word#unix:}};; esac; done\n\
             cd '{}'\n\
             ln -sf \"$PWD/vm.vsock\" '{}'\n\
             ln -s \"$PWD/qmp\" \"${{qmp%%,*}}\"\n\
             until [ -e ended ]; do sleep 0.05; done\n\
             cat console\n",
            dir.display(),
            uds.display()
        );
        let name = format!("qemu-system-{}", Arch::HOST.name());
        write_program(&dir.join(name), script).unwrap();
        let monitors = Arc::new(Mutex::new(vec![]));
        let connected = monitors.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                connected.lock().unwrap().push(stream.try_clone().unwrap());
                thread::spawn(move || serve_monitor(stream));
            }
        });
        Qemu { dir, monitors }
    }

    /// Ends it, like a reboot of the guest.
    pub fn end(&self) {
        for mut monitor in self.monitors.lock().unwrap().drain(..) {
            let event = json!({"event": "SHUTDOWN", "data": {"reason": "guest-reset"}});
            writeln!(monitor, "{event}").unwrap();
            monitor.shutdown(Shutdown::Both).unwrap();
        }
        fs::write(self.dir.join("ended"), "").unwrap();
    }
}

/// Acts as QEMU's monitor: every command succeeds. Returns the commands once the client has disconnected.
pub fn serve_monitor(mut stream: UnixStream) -> Vec<String> {
    let mut commands = vec![];
    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut send = |message: Value| writeln!(stream, "{message}");
    let _ = send(json!({"QMP": {}}));
    for line in lines.map_while(Result::ok) {
        let command: Value = serde_json::from_str(&line).unwrap();
        commands.push(command["execute"].as_str().unwrap().into());
        if send(json!({"return": {}})).is_err() {
            break;
        }
    }
    commands
}

fn accept(mut stream: UnixStream) -> Option<Connection> {
    let mut byte = [0];
    let mut line = vec![];
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).ok()?;
        line.push(byte[0]);
    }
    assert_eq!(line, b"CONNECT 10000\n");
    stream.write_all(b"OK 1073741824\n").ok()?;
    read_head(stream)
}

fn read_head(stream: UnixStream) -> Option<Connection> {
    let mut stream = BufReader::new(stream);
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_until(b'\n', &mut head).ok()? == 0 {
            return None;
        }
    }
    let text = String::from_utf8(head.clone()).unwrap();
    let mut lines = text.lines();
    let line = lines.next()?.strip_suffix(" HTTP/1.1")?.to_string();
    let headers = lines.filter(|line| !line.is_empty()).map(String::from);
    Some(Connection {
        request: Request {
            line,
            headers: headers.collect(),
            body: vec![],
        },
        stream,
        head,
    })
}
