//! The terminal of this command.

use std::{
    io::{self, IsTerminal},
    os::fd::AsFd,
};

use anyhow::{Result, ensure};
use rustix::{
    process::getpgrp,
    termios::{
        ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, Termios, tcgetattr,
        tcgetpgrp, tcgetwinsize, tcsetattr,
    },
};

/// A changed terminal mode, restored on drop.
pub struct Restore(Termios);

impl Drop for Restore {
    fn drop(&mut self) {
        // In the background the call would stop this process, and the mode is the shell's.
        if !is_ours() {
            return;
        }
        // Fails if the terminal was closed.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}

/// Raw mode: every key goes to the command in the VM, including Ctrl-C.
pub fn raw() -> io::Result<Restore> {
    let before = tcgetattr(io::stdin())?;
    let mut raw = before.clone();
    raw.make_raw();
    // Keys typed before are for the command.
    tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?;
    Ok(Restore(before))
}

/// Keys go to the VM's console, which echoes them, as they are typed; Ctrl-C, Ctrl-\ and Ctrl-Z still apply
/// to this process.
pub fn console() -> io::Result<Restore> {
    let before = tcgetattr(io::stdin())?;
    let mut console = before.clone();
    console.local_modes &= !(LocalModes::ICANON | LocalModes::ECHO | LocalModes::IEXTEN);
    console.input_modes &= !(InputModes::ICRNL | InputModes::IXON);
    console.output_modes |= OutputModes::OPOST;
    console.control_modes |= ControlModes::CREAD;
    tcsetattr(io::stdin(), OptionalActions::Now, &console)?;
    Ok(Restore(before))
}

/// Whether standard input is a terminal, and this process is in its foreground.
pub fn is_ours() -> bool {
    let stdin = io::stdin();
    stdin.is_terminal() && tcgetpgrp(&stdin).is_ok_and(|group| group == getpgrp())
}

/// Refuses -i with -t if standard input is not a terminal, as in docker.
pub fn check(interactive: bool, tty: bool) -> Result<()> {
    ensure!(
        !interactive || !tty || io::stdin().is_terminal(),
        "standard input is not a terminal: leave out -t, or -i"
    );
    Ok(())
}

/// Columns and rows of the terminal on any of the standard streams.
pub fn size() -> Option<(u16, u16)> {
    fn of(stream: impl AsFd) -> Option<(u16, u16)> {
        let size = tcgetwinsize(stream).ok()?;
        (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
    }
    of(io::stdin())
        .or_else(|| of(io::stdout()))
        .or_else(|| of(io::stderr()))
}
