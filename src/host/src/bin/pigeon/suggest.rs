//! Suggestions for unknown commands.

use clap::{
    CommandFactory,
    builder::StyledStr,
    error::{ContextKind, ContextValue, Error, ErrorKind},
};

use crate::Cli;

/// Commands of docker, and their equivalents here.
const OF_DOCKER: &[(&[&str], &str)] = &[
    (
        &[
            "build", "image", "images", "import", "load", "login", "pull", "push", "rmi", "save",
            "tag",
        ],
        "root images are files: `pigeon rootfs` makes one of a container image",
    ),
    (
        &["create"],
        "`pigeon run -d` makes a VM and starts it; `pigeon start` starts one that has ended",
    ),
    (
        &["info", "version"],
        "`pigeon --version` prints the version",
    ),
    (
        &["pause", "unpause"],
        "`pigeon signal STOP NAME` stops the workload's processes, CONT continues them",
    ),
    (&["port"], "`pigeon ps` shows forwarded ports"),
    (&["top"], "`pigeon exec NAME ps` shows a VM's processes"),
    (
        &["volume"],
        "volumes are files: `pigeon run -v FILE:/PATH,size=1G` makes one",
    ),
];

/// Adds suggestions to a command line error.
pub fn complete(mut error: Error) -> Error {
    let given = match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(given)) if error.kind() == ErrorKind::InvalidSubcommand => {
            given.clone()
        }
        _ => return error,
    };
    let known = OF_DOCKER.iter().find(|(names, _)| names.contains(&&*given));
    if let Some((_, tip)) = known {
        error.remove(ContextKind::SuggestedSubcommand);
        let tips = vec![StyledStr::from(*tip)];
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    } else {
        let near: Vec<_> = Cli::command()
            .get_subcommands()
            .map(|command| command.get_name().to_string())
            .filter(|name| is_near(&given, name))
            .collect();
        // Closer than clap's own suggestions.
        if !near.is_empty() {
            error.insert(
                ContextKind::SuggestedSubcommand,
                ContextValue::Strings(near),
            );
        }
    }
    error
}

/// Whether two words differ by one typing error: an extra, missing or wrong letter, or two exchanged ones.
fn is_near(a: &str, b: &str) -> bool {
    let [a, b] = [a, b].map(|word| word.chars().collect::<Vec<_>>());
    let same_begin = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let [a, b] = [&a[same_begin..], &b[same_begin..]];
    let same_end = a.iter().rev().zip(b.iter().rev());
    let same_end = same_end.take_while(|(a, b)| a == b).count();
    let [a, b] = [&a[..a.len() - same_end], &b[..b.len() - same_end]];
    match (a, b) {
        ([first, second], [third, fourth]) => first == fourth && second == third,
        _ => a.len() <= 1 && b.len() <= 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn message(word: &str) -> String {
        let error = Cli::try_parse_from(["pigeon", word, "x"]);
        let error = error.map(drop).unwrap_err();
        complete(error).to_string()
    }

    #[test]
    fn a_mistyped_command_gets_a_suggestion() {
        for (word, command) in [
            ("rnu", "run"),
            ("rn", "run"),
            ("sp", "ps"),
            ("exce", "exec"),
            ("lgos", "logs"),
            ("rstart", "restart"),
        ] {
            let message = message(word);
            assert!(
                message.contains(&format!("'{command}'")),
                "{word}: {message}"
            );
        }
        assert!(!message("frobnicate").contains("tip"));
        assert!(!is_near("stop", "top-") && is_near("kill", "kil") && is_near("", "a"));
    }

    #[test]
    fn other_docker_commands_get_a_suggestion() {
        for (names, tip) in OF_DOCKER {
            for name in *names {
                let message = message(name);
                assert!(
                    message.contains(&format!("tip: {tip}")),
                    "{name}: {message}"
                );
                assert_eq!(message.matches("tip").count(), 1, "{message}");
            }
        }
    }
}
