//! `pigeon completions` and `pigeon man`.

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::{Cli, output::print};

#[derive(Args)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub fn run(&self) -> Result<()> {
        let mut script = vec![];
        clap_complete::generate(self.shell, &mut Cli::command(), "pigeon", &mut script);
        print(&String::from_utf8(script)?)
    }
}

#[derive(Args)]
pub struct Man {
    /// A subcommand; without it the page of pigeon itself
    command: Option<String>,
}

impl Man {
    pub fn run(&self) -> Result<()> {
        let mut command = Cli::command();
        command.build();
        let page = match &self.command {
            None => command,
            Some(name) => {
                let found = command.find_subcommand(name).cloned();
                let found = found.with_context(|| format!("there is no command {name}"))?;
                let full_name: &'static str = format!("pigeon-{name}").leak();
                found.name(full_name)
            }
        };
        let mut text = vec![];
        clap_mangen::Man::new(page).render(&mut text)?;
        print(&String::from_utf8(text)?)
    }
}
