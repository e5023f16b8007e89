//! The JSON bodies of the API's calls.

use crate::config;
use crate::json::{self, Document, Fields, Shape, Spans, Strings, Text, field};
use crate::message::Message;

/// Longest time a one-shot command may be given, in milliseconds: a day.
const TIMEOUT: u32 = 86_400_000;
/// Largest terminal, in rows or columns (struct winsize has 16 bits, ioctl_tty(2)).
const CELLS: u32 = 65_535;

/// A body of `fields`, decoded where it lies.
fn read<'a>(
    body: &'a mut [u8],
    fields: Fields,
    spans: &'a mut Spans,
) -> Result<Document<'a>, Message> {
    json::read(body, fields, spans)?;
    Ok(Document::new(body, spans))
}

/// `POST /v1/signals`: the signal's number, 0 when absent.
pub fn signal(body: &mut [u8]) -> Result<u32, Message> {
    const FIELDS: Fields = &[field("signal", Shape::number(0, 64))];
    let mut spans = Spans::default();
    read(body, FIELDS, &mut spans).map(|body| body.number(0))
}

/// `POST /v1/exec`, or the first message of `GET /v1/ws/exec`.
#[derive(Clone, Copy, Debug)]
pub struct Exec<'a>(Document<'a>);

impl<'a> Exec<'a> {
    /// Reads the body of a one-shot command.
    pub fn read(body: &'a mut [u8], spans: &'a mut Spans) -> Result<Self, Message> {
        const FIELDS: Fields = &[
            field("cmd", Shape::texts(0, config::ARGV)),
            field("env", Shape::texts(1, config::ENV)),
            field("cwd", Shape::text(2)),
            field("user", Shape::text(3)),
            field("timeout_ms", Shape::number(4, TIMEOUT)),
        ];
        read(body, FIELDS, spans).map(Self)
    }

    /// Reads the first message of a session.
    pub fn read_session(message: &'a mut [u8], spans: &'a mut Spans) -> Result<Self, Message> {
        const FIELDS: Fields = &[
            field("command", Shape::texts(0, config::ARGV)),
            field("env", Shape::texts(1, config::ENV)),
            field("cwd", Shape::text(2)),
            field("user", Shape::text(3)),
            field("tty", Shape::flag(5)),
            field("cols", Shape::number(6, CELLS)),
            field("rows", Shape::number(7, CELLS)),
        ];
        read(message, FIELDS, spans).map(Self)
    }

    /// The command: `cmd` of a one-shot command, `command` of a session.
    pub fn command(&self) -> Strings<'a> {
        self.0.texts(0)
    }

    /// Set on top of the workload's environment, as `NAME=value` items.
    pub fn env(&self) -> Strings<'a> {
        self.0.texts(1)
    }

    /// Working directory; empty is `/`.
    pub fn cwd(&self) -> Text<'a> {
        self.0.text(2)
    }

    /// As `UserOverride` in the configuration; empty is root.
    pub fn user(&self) -> Text<'a> {
        self.0.text(3)
    }

    /// Time limit in milliseconds; 0 is the default.
    pub fn timeout_ms(&self) -> u32 {
        self.0.number(4)
    }

    /// Whether the session has a terminal.
    pub fn tty(&self) -> bool {
        self.0.flag(5)
    }

    /// The terminal's size in columns and rows; 0 is unknown.
    pub fn size(&self) -> (u32, u32) {
        (self.0.number(6), self.0.number(7))
    }
}

/// A later text message of a session: `{"cols":N,"rows":N}` or `{"stdin":"eof"}`.
#[derive(Clone, Copy, Debug)]
pub struct Control<'a>(Document<'a>);

impl<'a> Control<'a> {
    /// Reads a message.
    pub fn read(message: &'a mut [u8], spans: &'a mut Spans) -> Result<Self, Message> {
        const FIELDS: Fields = &[
            field("cols", Shape::number(0, CELLS)),
            field("rows", Shape::number(1, CELLS)),
            field("stdin", Shape::text(2)),
        ];
        read(message, FIELDS, spans).map(Self)
    }

    /// The terminal's new size in columns and rows; 0 is no change.
    pub fn size(&self) -> (u32, u32) {
        (self.0.number(0), self.0.number(1))
    }

    /// Whether it ends standard input.
    pub fn ends_stdin(&self) -> bool {
        self.0.text(2).bytes() == b"eof"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_a_number_up_to_64() {
        let signal = |body: &str| signal(&mut body.as_bytes().to_vec());
        assert_eq!(signal(r#"{"signal":15}"#).unwrap(), 15);
        assert_eq!(signal("{}").unwrap(), 0);
        for bad in [
            r#"{"signal":65}"#,
            r#"{"signal":-1}"#,
            r#"{"signal":"TERM"}"#,
            r#"{"signal":1.5}"#,
            "[]",
            "",
        ] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_command_is_cmd_in_one_call_and_command_in_the_other() {
        let mut spans = Spans::default();
        let mut body = br#"{"cmd":["ls","-la"],"timeout_ms":5,"command":["x"]}"#.to_vec();
        let exec = Exec::read(&mut body, &mut spans).unwrap();
        assert_eq!((exec.command().iter().count(), exec.timeout_ms()), (2, 5));
        let mut message =
            br#"{"command":["sh"],"tty":true,"cols":80,"rows":24,"cmd":["x","y"]}"#.to_vec();
        let exec = Exec::read_session(&mut message, &mut spans).unwrap();
        assert_eq!(
            (exec.command().iter().count(), exec.tty(), exec.size()),
            (1, true, (80, 24))
        );
    }

    #[test]
    fn a_control_message_resizes_or_ends_stdin() {
        let mut spans = Spans::default();
        let mut message = br#"{"cols":100,"rows":50}"#.to_vec();
        let control = Control::read(&mut message, &mut spans).unwrap();
        assert_eq!((control.size(), control.ends_stdin()), ((100, 50), false));
        let mut message = br#"{"stdin":"eof"}"#.to_vec();
        assert!(
            Control::read(&mut message, &mut spans)
                .unwrap()
                .ends_stdin()
        );
    }
}
