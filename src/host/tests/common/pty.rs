//! A terminal that runs a program.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Termios, Winsize, tcgetattr, tcsetwinsize},
};

/// Generous: the machine may be busy with other VMs.
pub const TIMEOUT: Duration = Duration::from_secs(120);

/// The master of a terminal, which records the output.
pub struct Terminal {
    master: File,
    terminal: File,
    shown: Arc<Mutex<Vec<u8>>>,
    /// The end of the last match of [`expect`](Terminal::expect).
    seen: usize,
    child: Child,
}

impl Terminal {
    /// Starts `command` in the foreground of a terminal with this number of columns and rows.
    pub fn spawn(mut command: Command, size: (u16, u16)) -> Terminal {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, vec![]).unwrap();
        let terminal = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        resize(&master, size);
        let stream = || terminal.try_clone().unwrap();
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: setsid(2) and ioctl(2) are async-signal-safe, and the closure accesses no memory of this
        // process.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
            });
        }
        let child = command.spawn().unwrap();
        let master = File::from(master);
        let shown = Arc::new(Mutex::new(vec![]));
        thread::spawn({
            let (mut master, shown) = (master.try_clone().unwrap(), shown.clone());
            move || {
                let mut buffer = [0; 4096];
                while let Ok(size) = master.read(&mut buffer) {
                    shown.lock().unwrap().extend(&buffer[..size]);
                }
            }
        });
        Terminal {
            master,
            terminal,
            shown,
            seen: 0,
            child,
        }
    }

    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    pub fn type_text(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Waits until `text` is shown after the last match.
    #[track_caller]
    pub fn expect(&mut self, text: &str) {
        assert!(
            self.shows(text, TIMEOUT),
            "no {text:?} in {:?}",
            self.shown()
        );
    }

    /// Whether `text` is shown in time after the last match.
    pub fn shows(&mut self, text: &str, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut ended = false;
        loop {
            let shown = self.shown.lock().unwrap().clone();
            let found = shown[self.seen..]
                .windows(text.len())
                .position(|window| window == text.as_bytes());
            if let Some(at) = found {
                self.seen += at + text.len();
                return true;
            }
            if ended || Instant::now() > deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(10));
            ended = self.child.try_wait().unwrap().is_some();
            if ended {
                // Its last output may not have arrived yet.
                thread::sleep(Duration::from_millis(300));
            }
        }
    }

    pub fn resize(&self, size: (u16, u16)) {
        resize(&self.master, size);
    }

    /// The terminal's mode.
    pub fn modes(&self) -> Termios {
        tcgetattr(&self.terminal).unwrap()
    }

    /// Whether the program has exited.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits until the program exits.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "still running: {:?}",
                self.shown()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(master: impl AsFd, (columns, rows): (u16, u16)) {
    let size = Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(master, size).unwrap();
}
