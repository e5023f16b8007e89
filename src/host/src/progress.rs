//! Progress bars, on a terminal, for operations that take longer than a second.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// No bar is shown before this time.
const SHOW_AFTER: Duration = Duration::from_secs(1);
/// Refresh interval of a spinner.
const TICK: Duration = Duration::from_millis(100);

/// A line on standard error, removed at the end.
pub struct Progress {
    bar: ProgressBar,
    /// Whether standard error is a terminal.
    wanted: bool,
    shown: bool,
    begun: Instant,
}

impl Progress {
    /// A new one; it shows nothing without a terminal.
    pub fn new(wanted: bool) -> Progress {
        Progress {
            bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
            wanted: wanted && io::stderr().is_terminal(),
            shown: false,
            begun: Instant::now(),
        }
    }

    /// A spinner, shown at once until dropped.
    pub fn spinner(phase: &'static str) -> Progress {
        let mut progress = Progress::new(true);
        progress.phase(phase, 0);
        if progress.wanted {
            let bar = progress.bar.clone();
            bar.set_style(ProgressStyle::default_spinner());
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(TICK);
            progress.shown = true;
        }
        progress
    }

    /// Starts a new phase of `total` bytes; 0 if unknown.
    pub fn phase(&mut self, phase: &'static str, total: u64) {
        let template = match total {
            0 => "{spinner} {msg} {bytes}",
            _ => "{msg:<15} [{bar:30}] {bytes} of {total_bytes}, {eta} left",
        };
        let style = ProgressStyle::with_template(template);
        let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
        self.bar.set_style(style.progress_chars("#> "));
        match total {
            0 => self.bar.unset_length(),
            total => self.bar.set_length(total),
        }
        self.bar.set_message(phase);
        self.bar.reset();
        self.add(0);
    }

    /// Adds to the bytes done.
    pub fn add(&mut self, bytes: u64) {
        if self.wanted && !self.shown && self.begun.elapsed() >= SHOW_AFTER {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.shown = true;
        }
        self.bar.inc(bytes);
    }

    /// Removes the line.
    pub fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}
