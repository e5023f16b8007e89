//! Printing: results go to standard output, messages to standard error.

use std::{
    env, fmt,
    io::{self, IsTerminal, Write},
};

use anyhow::{Context, Result};

use crate::FAILED;

/// Exit code after a broken pipe, as in a shell: 128 + SIGPIPE.
const BROKEN_PIPE: u8 = 141;

/// A broken pipe, which ends the command silently. It is an error, so that cleanup (of a VM, of a terminal's
/// mode) is not skipped.
#[derive(Debug)]
pub struct NoReader;

impl fmt::Display for NoReader {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("the output is closed")
    }
}

impl std::error::Error for NoReader {}

/// The exit code for an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    match error.is::<NoReader>() {
        true => BROKEN_PIPE,
        false => FAILED,
    }
}

/// Prints a line to standard output.
macro_rules! say {
    ($($words:tt)*) => { $crate::output::print(&format!("{}\n", format_args!($($words)*))) };
}

/// Prints a message to standard error.
macro_rules! note {
    ($($words:tt)*) => { $crate::output::print_note(format_args!($($words)*)) };
}

pub(crate) use {note, say};

/// Prints a result without changes.
pub fn print(text: &str) -> Result<()> {
    write(&mut io::stdout().lock(), text.as_bytes())
}

/// Writes to one of the standard streams, and flushes it.
pub fn write(stream: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    match stream.write_all(bytes).and_then(|()| stream.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(NoReader.into()),
        result => result.context("unable to write the output"),
    }
}

pub fn print_note(text: std::fmt::Arguments) {
    // A closed terminal must not end the process.
    let _ = writeln!(io::stderr(), "pigeon: {text}");
}

/// Whether to use colours on standard output. (no-color.org)
pub fn is_coloured() -> bool {
    let no_color = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !no_color && io::stdout().is_terminal()
}

/// Prints rows in columns with titles.
pub fn table(titles: &[&str], rows: &[Vec<String>]) -> Result<()> {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widest = cells.map(|cell| cell.chars().count()).max();
        widest.unwrap_or(0).max(titles[column].len())
    };
    let widths: Vec<_> = (0..titles.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_string()
    };
    let title = line(&mut titles.iter().copied());
    match is_coloured() {
        true => say!("\x1b[1m{title}\x1b[m")?,
        false => say!("{title}")?,
    }
    for row in rows {
        say!("{}", line(&mut row.iter().map(String::as_str)))?;
    }
    Ok(())
}

/// Formats seconds: `3 minutes`.
pub fn duration(seconds: u64) -> String {
    let (number, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {unit}{plural}")
}

/// Formats bytes: `1.5 MiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..UNITS.len() - 1).find(|unit| bytes >> (unit * 10) < 1024);
    let unit = unit.unwrap_or(UNITS.len() - 1);
    match unit {
        0 => format!("{bytes} B"),
        unit => format!(
            "{:.1} {}",
            bytes as f64 / (1u64 << (unit * 10)) as f64,
            UNITS[unit]
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_are_shown_in_one_unit() {
        assert_eq!(duration(1), "1 second");
        assert_eq!(duration(59), "59 seconds");
        assert_eq!(duration(3600), "1 hour");
        assert_eq!(duration(200_000), "2 days");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(1 << 40), "1.0 TiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }
}
