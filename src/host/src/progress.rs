//! How far something is that takes long: on a terminal, once it has taken a second.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What takes less is not worth a bar.
const PATIENT: Duration = Duration::from_secs(1);
/// How often a bar that says nothing but that it goes on is drawn.
const TICK: Duration = Duration::from_millis(100);

/// A line on standard error, removed at the end.
pub struct Progress {
    bar: ProgressBar,
    /// Somebody may look at it.
    wanted: bool,
    shown: bool,
    begun: Instant,
}

impl Progress {
    /// Nothing done. Without a terminal it shows nothing in any case.
    pub fn new(wanted: bool) -> Progress {
        Progress {
            bar: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
            wanted: wanted && io::stderr().is_terminal(),
            shown: false,
            begun: Instant::now(),
        }
    }

    /// One that only says what goes on, by itself, until it is dropped.
    pub fn spinner(phase: &'static str) -> Progress {
        let mut progress = Progress::new(true);
        progress.phase(phase, 0);
        if progress.wanted {
            let bar = progress.bar.clone();
            bar.set_draw_target(ProgressDrawTarget::stderr());
            bar.enable_steady_tick(TICK);
            progress.shown = true;
        }
        progress
    }

    /// Starts on something else, of so many bytes; 0 is unknown.
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

    /// So many bytes more are done.
    pub fn add(&mut self, bytes: u64) {
        if self.wanted && !self.shown && self.begun.elapsed() >= PATIENT {
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
