//! `pigeon logs` and `pigeon events`, also for VMs that have ended.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read},
    ops::Range,
    path::Path,
};

use anyhow::{Context, Result};
use clap::Args;
use pigeon::{
    events,
    logs::{Frame, Stream, read_frame},
};
use serde_json::json;

use crate::{
    output::{self, note, say},
    segments::Reader,
    target::Target,
    vms::{self, Vm},
};

#[derive(Args)]
pub struct Logs {
    /// A VM of `pigeon run`, running or ended; optional if there is only one
    name: Option<String>,
    #[command(flatten)]
    target: Target,
    /// Follow the output until the workload exits
    #[arg(short, long)]
    follow: bool,
    /// Start at this byte of the output
    #[arg(long, value_name = "N", default_value_t = 0)]
    since_offset: u64,
    /// Start at the last N lines, or show all
    #[arg(
        short = 'n', long, value_name = "N|all", conflicts_with = "since_offset",
        allow_negative_numbers = true, value_parser = parse_tail
    )]
    tail: Option<usize>,
    /// Show the console instead, with messages of the kernel and the init
    #[arg(long, conflicts_with_all = ["since_offset", "tail"])]
    console: bool,
}

impl Logs {
    pub fn run(&self) -> Result<()> {
        match self.target.vm(self.name.as_deref())? {
            Some(vm) if self.console => self.console(&vm),
            Some(vm) => self.recorded(&vm),
            None => self.live(),
        }
    }

    /// For a VM not started by `pigeon run`: the output that its init still has.
    fn live(&self) -> Result<()> {
        let client = self.target.client(None)?;
        let mut begin = self.since_offset;
        if let Some(lines) = self.tail {
            let mut logs = client.logs(false, Some(0))?;
            let first = logs.offset();
            begin = first + last_lines(lines, || Ok(logs.next_frame()?))?.start;
        }
        let mut logs = client.logs(self.follow, Some(begin))?;
        warn_of_loss(begin, logs.offset());
        while let Some(frame) = logs.next_frame()? {
            show(&frame)?;
        }
        Ok(())
    }

    /// The recorded output.
    fn recorded(&self, vm: &Vm) -> Result<()> {
        let damaged = "the record is damaged";
        let (mut begin, mut end) = (self.since_offset, u64::MAX);
        if let Some(lines) = self.tail
            && let Some(source) = Reader::open(&vm.dir, vms::OUTPUT, || false)?
        {
            let first = source.segment_start();
            let mut source = io::BufReader::new(source);
            let last = last_lines(lines, || read_frame(&mut source).context(damaged))?;
            begin = first + last.start;
            // Lines written later are not included.
            end = match self.follow {
                true => u64::MAX,
                false => first + last.end,
            };
        }
        let grows = || self.follow && vm.is_running();
        let Some(mut source) = Reader::open(&vm.dir, vms::OUTPUT, grows)? else {
            return Ok(());
        };
        let mut offset = begin.min(source.segment_start());
        while offset < end
            && let Some(mut frame) = read_frame(&mut source).context(damaged)?
        {
            // Bytes in a gap between segments were removed.
            warn_of_loss(offset.max(begin), source.segment_start());
            offset = offset.max(source.segment_start());
            let skipped = begin.saturating_sub(offset);
            offset += frame.bytes.len() as u64;
            if skipped > 0 {
                let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
                frame.bytes.drain(..skipped.min(frame.bytes.len()));
            }
            show(&frame)?;
        }
        Ok(())
    }

    fn console(&self, vm: &Vm) -> Result<()> {
        let grows = || self.follow && vm.is_running();
        let Some(mut source) = Reader::open(&vm.dir, vms::CONSOLE, grows)? else {
            return Ok(());
        };
        let mut buffer = [0; 4096];
        loop {
            let size = source.read(&mut buffer).context("unable to read")?;
            if size == 0 {
                return Ok(());
            }
            output::write(&mut io::stdout().lock(), &buffer[..size])?;
        }
    }
}

/// Parses a number of lines; as in docker, a negative number means all.
fn parse_tail(text: &str) -> Result<usize, String> {
    match text.parse::<i64>() {
        _ if text == "all" => Ok(usize::MAX),
        Ok(lines) => Ok(usize::try_from(lines).unwrap_or(usize::MAX)),
        Err(_) => Err("neither a number of lines nor all".into()),
    }
}

/// The byte range of the last lines of the output.
fn last_lines(
    lines: usize,
    mut next_frame: impl FnMut() -> Result<Option<Frame>>,
) -> Result<Range<u64>> {
    // Offsets of the last line starts, including the one after the last line feed.
    let mut begins = VecDeque::from([0]);
    let mut offset = 0;
    while let Some(frame) = next_frame()? {
        let line_feeds = frame.bytes.iter().enumerate();
        let line_feeds = line_feeds.filter(|(_, byte)| **byte == b'\n');
        for (at, _) in line_feeds {
            begins.push_back(offset + at as u64 + 1);
            if begins.len() > lines.saturating_add(1) {
                begins.pop_front();
            }
        }
        offset += frame.bytes.len() as u64;
    }
    // A last line without a line feed counts.
    if begins.back() != Some(&offset) {
        begins.push_back(offset);
    }
    let surplus = begins.len().saturating_sub(lines.saturating_add(1));
    Ok(begins.get(surplus).copied().unwrap_or(offset)..offset)
}

/// Removes a partial frame at the end of a record whose writer was killed. Returns the remaining bytes of
/// output.
pub fn remove_partial_frame(file: &File) -> Result<u64> {
    let mut source = io::BufReader::new(file);
    let (mut whole, mut bytes) = (0, 0);
    while let Ok(Some(frame)) = read_frame(&mut source) {
        whole += frame.encode().len() as u64;
        bytes += frame.bytes.len() as u64;
    }
    file.set_len(whole)?;
    Ok(bytes)
}

/// Reports how much of the output was dropped.
pub fn warn_of_loss(wanted: u64, first: u64) {
    if first > wanted {
        note!("{} bytes of output are lost", first - wanted);
    }
}

/// Writes output to its stream.
pub fn show(frame: &Frame) -> Result<()> {
    match frame.stream {
        Stream::Stdout => output::write(&mut io::stdout().lock(), &frame.bytes),
        Stream::Stderr => output::write(&mut io::stderr().lock(), &frame.bytes),
    }
}

#[derive(Args)]
pub struct Events {
    /// A VM of `pigeon run`, running or ended; optional if there is only one
    name: Option<String>,
    #[command(flatten)]
    target: Target,
    /// Follow the events until the VM ends
    #[arg(short, long)]
    follow: bool,
    /// With --uds: listen for a VM that is started with PIGEON_EVENTS_PORT=PORT
    #[arg(long, requires = "uds")]
    port: Option<u32>,
}

impl Events {
    pub fn run(&self) -> Result<()> {
        match self.target.vm(self.name.as_deref())? {
            Some(vm) => recorded_events(&vm, self.follow),
            None => {
                let uds = self.target.uds().context("there is a socket")?;
                let port = self.port.context("--uds needs --port as well")?;
                listen(uds, port)
            }
        }
    }
}

fn recorded_events(vm: &Vm, follow: bool) -> Result<()> {
    let grows = || follow && vm.is_running();
    let Some(mut source) = Reader::open(&vm.dir, vms::EVENTS, grows)? else {
        return Ok(());
    };
    let mut text = vec![];
    let mut byte = [0];
    while source.read(&mut byte)? == 1 {
        text.push(byte[0]);
        if byte == *b"\n" {
            output::write(&mut io::stdout().lock(), &text)?;
            text.clear();
        }
    }
    Ok(())
}

/// Prints events until the VM ends.
fn listen(uds: &Path, port: u32) -> Result<()> {
    let listener = events::Listener::bind(uds, port)?;
    let mut events = listener.accept()?;
    while let Some(event) = events.next_event()? {
        say!("{}", json!(event))?;
    }
    Ok(())
}

/// Extracts the workload's output from a console: removes lines of the kernel and the init, and the carriage
/// returns added by the terminal.
#[derive(Default)]
pub struct ConsoleFilter {
    /// The beginning of a line whose origin is undecided.
    begin: Vec<u8>,
    state: LineState,
    carriage_return: bool,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum LineState {
    #[default]
    Undecided,
    Shown,
    Dropped,
}

impl ConsoleFilter {
    /// Returns the workload's part of these and of undecided earlier bytes.
    pub fn filter(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut shown = vec![];
        for &byte in bytes {
            if std::mem::take(&mut self.carriage_return) && byte != b'\n' {
                self.byte(b'\r', &mut shown);
            }
            match byte {
                b'\r' => self.carriage_return = true,
                byte => self.byte(byte, &mut shown),
            }
        }
        shown
    }

    fn byte(&mut self, byte: u8, shown: &mut Vec<u8>) {
        /// Maximum size of an undecided beginning in bytes: far more than a kernel timestamp.
        const MAX_BEGIN: usize = 64;
        if self.state == LineState::Undecided {
            self.begin.push(byte);
            self.state = classify(&self.begin);
            let is_decided = byte == b'\n' || self.begin.len() == MAX_BEGIN;
            if is_decided && self.state == LineState::Undecided {
                self.state = LineState::Shown;
            }
            if self.state == LineState::Shown {
                shown.append(&mut self.begin);
            }
        } else if self.state == LineState::Shown {
            shown.push(byte);
        }
        if byte == b'\n' {
            self.begin.clear();
            self.state = LineState::Undecided;
        }
    }

    /// Returns undecided bytes at the end.
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.begin)
    }
}

/// Classifies a line by its beginning: from the kernel, `[    1.234567] `, from the init, or from the
/// workload.
fn classify(begin: &[u8]) -> LineState {
    const INIT: &[u8] = b"pigeon-init: level=";
    if begin.starts_with(INIT) {
        return LineState::Dropped;
    }
    if INIT.starts_with(begin) {
        return LineState::Undecided;
    }
    let Some(rest) = begin.strip_prefix(b"[") else {
        return LineState::Shown;
    };
    let rest = rest.trim_ascii_start();
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let whole = digits(rest);
    let (point, fraction) = match rest[whole..].split_first() {
        None => return LineState::Undecided,
        Some((point, fraction)) => (*point, fraction),
    };
    let end = digits(fraction);
    match (point, whole, fraction.get(end)) {
        (b'.', 1.., None) => LineState::Undecided,
        (b'.', 1.., Some(b']')) if end > 0 => LineState::Dropped,
        _ => LineState::Shown,
    }
}

/// Forwards the workload's output from a growing console until its end, once `is_over`.
pub fn filter_console(
    dir: &Path,
    is_over: impl Fn() -> bool,
    mut sink: impl FnMut(Frame) -> Result<()>,
) -> Result<()> {
    let console = Reader::open(dir, vms::CONSOLE, || !is_over())?;
    let mut console = console.context("there is no console")?;
    let mut filter = ConsoleFilter::default();
    let mut buffer = [0; 4096];
    loop {
        let size = console.read(&mut buffer)?;
        let bytes = match size {
            0 => filter.finish(),
            size => filter.filter(&buffer[..size]),
        };
        if !bytes.is_empty() {
            let stream = Stream::Stdout;
            sink(Frame { stream, bytes })?;
        }
        if size == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    fn frame(bytes: &str) -> Frame {
        Frame {
            stream: Stream::Stdout,
            bytes: bytes.into(),
        }
    }

    #[test]
    fn the_last_lines_are_found_across_frames() {
        let last = |lines, pieces: &[&str]| {
            let mut frames = pieces.iter().map(|piece| frame(piece));
            let last = last_lines(lines, || Ok(frames.next())).unwrap();
            pieces.concat()[last.start as usize..last.end as usize].to_string()
        };
        let pieces = ["one\ntw", "o\n", "\nfour\n"];
        assert_eq!(parse_tail("-1"), parse_tail("all"));
        assert!(parse_tail("some").is_err());
        for (lines, expected) in [
            (0, ""),
            (1, "four\n"),
            (2, "\nfour\n"),
            (3, "two\n\nfour\n"),
            (4, "one\ntwo\n\nfour\n"),
            (usize::MAX, "one\ntwo\n\nfour\n"),
        ] {
            assert_eq!(last(lines, &pieces), expected, "{lines}");
        }
        assert_eq!(last(1, &["one\n", "two"]), "two");
        assert_eq!(last(2, &["one\n", "two"]), "one\ntwo");
        assert_eq!(last(0, &["one\n", "two"]), "");
        assert_eq!(last(5, &[]), "");
    }

    #[test]
    fn a_record_ends_with_a_whole_frame_before_more_is_written() {
        let mut file = tempfile::tempfile().unwrap();
        let whole = [frame("one"), frame("two")].map(|frame| frame.encode());
        file.write_all(&whole.concat()).unwrap();
        file.write_all(&frame("three").encode()[..10]).unwrap();
        file.rewind().unwrap();
        assert_eq!(remove_partial_frame(&file).unwrap(), 6);
        assert_eq!(file.metadata().unwrap().len(), whole.concat().len() as u64);
    }

    #[test]
    fn the_workloads_output_is_separated_from_kernel_and_init_lines() {
        let console = "[    0.000000] Linux\r\npigeon-init: level=info msg=\"x\"\r\n\
                       hello\r\n[1.5] kernel\r\n[a] not\r\n[12] nor this\r\n\r\n\
                       bar\rfoo\r\npigeon-init: no\r\npigeon\r\n# ";
        let expected = "hello\n[a] not\n[12] nor this\n\nbar\rfoo\npigeon-init: no\npigeon\n# ";
        for step in [1, 2, 7, 4096] {
            let mut filter = ConsoleFilter::default();
            let mut shown = vec![];
            for bytes in console.as_bytes().chunks(step) {
                shown.extend(filter.filter(bytes));
            }
            // A prompt is shown before its line ends.
            assert!(shown.ends_with(b"# "), "{step}");
            shown.extend(filter.finish());
            assert_eq!(String::from_utf8(shown).unwrap(), expected, "{step}");
        }
        let mut filter = ConsoleFilter::default();
        assert_eq!(filter.filter(b"[ 12"), b"");
        assert_eq!(filter.finish(), b"[ 12");
        // The beginning of a line is kept only up to a limit.
        for endless in [" ", "1", "1.1"] {
            let line = format!("[{}", endless.repeat(100));
            let mut filter = ConsoleFilter::default();
            assert_eq!(filter.filter(line.as_bytes()), line.as_bytes());
        }
    }
}
