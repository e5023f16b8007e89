//! The JSON bodies of the API's calls.

use crate::config;
use crate::json::{self, Shape, Text, Texts};
use serde::Deserialize;

/// Longest time a one-shot command may be given, in milliseconds: a day.
const TIMEOUT: u32 = 86_400_000;
/// Largest terminal, in rows or columns (struct winsize has 16 bits, ioctl_tty(2)).
const CELLS: u32 = 65_535;

/// `POST /v1/signals`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Signal {
    /// Signal number; 0 when absent.
    pub signal: u32,
}

static SIGNAL: Shape = Shape::Record(&[("signal", Shape::Number(64))]);

impl Signal {
    /// Reads a body.
    pub fn read(body: &mut [u8]) -> Result<Self, json::Error> {
        json::parse(json::condense(body, &SIGNAL)?)
    }
}

/// `POST /v1/exec`, and the first message of `GET /v1/ws/exec`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Exec<'a> {
    /// The command: `cmd` of a one-shot command, `command` of a session.
    #[serde(borrow, alias = "cmd")]
    pub command: Texts<'a>,
    /// Set on top of the workload's environment, as `NAME=value` items.
    pub env: Texts<'a>,
    /// Working directory; empty is `/`.
    pub cwd: Text<'a>,
    /// As `UserOverride` in the configuration; empty is root.
    pub user: Text<'a>,
    /// Time limit in milliseconds; 0 is the default.
    pub timeout_ms: u32,
    /// Whether the session has a terminal.
    pub tty: bool,
    /// The terminal's width; 0 is unknown.
    pub cols: u32,
    /// The terminal's height; 0 is unknown.
    pub rows: u32,
}

static EXEC: Shape = Shape::Record(&[
    ("cmd", Shape::Texts(config::ARGV)),
    ("env", Shape::Texts(config::ENV)),
    ("cwd", Shape::Text),
    ("user", Shape::Text),
    ("timeout_ms", Shape::Number(TIMEOUT)),
]);

static SESSION: Shape = Shape::Record(&[
    ("command", Shape::Texts(config::ARGV)),
    ("env", Shape::Texts(config::ENV)),
    ("cwd", Shape::Text),
    ("user", Shape::Text),
    ("tty", Shape::Flag),
    ("cols", Shape::Number(CELLS)),
    ("rows", Shape::Number(CELLS)),
]);

impl<'a> Exec<'a> {
    /// Reads the body of a one-shot command.
    pub fn read(body: &'a mut [u8]) -> Result<Self, json::Error> {
        json::parse(json::condense(body, &EXEC)?)
    }

    /// Reads the first message of a session.
    pub fn read_session(message: &'a mut [u8]) -> Result<Self, json::Error> {
        json::parse(json::condense(message, &SESSION)?)
    }
}

/// A later text message of a session: `{"cols":N,"rows":N}` or `{"stdin":"eof"}`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control<'a> {
    /// The terminal's new width; 0 is no change.
    pub cols: u32,
    /// The terminal's new height; 0 is no change.
    pub rows: u32,
    /// `eof` ends the command's standard input.
    #[serde(borrow)]
    pub stdin: Text<'a>,
}

static CONTROL: Shape = Shape::Record(&[
    ("cols", Shape::Number(CELLS)),
    ("rows", Shape::Number(CELLS)),
    ("stdin", Shape::Text),
]);

impl<'a> Control<'a> {
    /// Reads a message.
    pub fn read(message: &'a mut [u8]) -> Result<Self, json::Error> {
        json::parse(json::condense(message, &CONTROL)?)
    }

    /// Whether it ends standard input.
    pub fn ends_stdin(&self) -> bool {
        self.stdin.bytes().eq(*b"eof")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_a_number_up_to_64() {
        let signal = |body: &str| Signal::read(&mut body.as_bytes().to_vec()).map(|body| body.signal);
        assert_eq!(signal(r#"{"signal":15}"#).unwrap(), 15);
        assert_eq!(signal("{}").unwrap(), 0);
        for bad in [r#"{"signal":65}"#, r#"{"signal":-1}"#, r#"{"signal":"TERM"}"#, r#"{"signal":1.5}"#, "[]", ""] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_command_is_cmd_in_one_call_and_command_in_the_other() {
        let mut body = br#"{"cmd":["ls","-la"],"timeout_ms":5,"command":["x"]}"#.to_vec();
        let exec = Exec::read(&mut body).unwrap();
        assert_eq!((exec.command.iter().count(), exec.timeout_ms), (2, 5));
        let mut message = br#"{"command":["sh"],"tty":true,"cols":80,"rows":24,"cmd":["x","y"]}"#.to_vec();
        let exec = Exec::read_session(&mut message).unwrap();
        assert_eq!((exec.command.iter().count(), exec.tty, exec.cols, exec.rows), (1, true, 80, 24));
    }

    #[test]
    fn a_control_message_resizes_or_ends_stdin() {
        let mut message = br#"{"cols":100,"rows":50}"#.to_vec();
        let control = Control::read(&mut message).unwrap();
        assert_eq!((control.cols, control.rows, control.ends_stdin()), (100, 50, false));
        let mut message = br#"{"stdin":"eof"}"#.to_vec();
        assert!(Control::read(&mut message).unwrap().ends_stdin());
    }
}
