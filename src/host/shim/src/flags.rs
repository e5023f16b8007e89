//! The command line, in the syntax of Go's package flag.

use anyhow::{Context, Result, bail, ensure};

/// The parsed command line.
#[derive(Debug, Default, PartialEq)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// containerd's socket.
    pub address: String,
    /// `start`, `delete`, or empty to serve.
    pub action: String,
    /// `-v`
    pub version: bool,
    /// `-info`
    pub info: bool,
}

impl Flags {
    /// Parses the words after the program's name.
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Flags> {
        let mut flags = Flags::default();
        let mut words = words;
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                flags.action = word;
                ensure!(words.next().is_none(), "there is more behind the action");
                break;
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (flag, None),
            };
            let switch = match name {
                "v" | "version" => Some(&mut flags.version),
                "info" => Some(&mut flags.info),
                "debug" => Some(&mut false),
                _ => None,
            };
            if let Some(switch) = switch {
                *switch = value.is_none_or(|value| value == "true");
                continue;
            }
            let value = value.or_else(|| words.next());
            let value = value.with_context(|| format!("-{name} needs a value"))?;
            match name {
                "namespace" => flags.namespace = value,
                "id" => flags.id = value,
                "address" => flags.address = value,
                // The bundle is the working directory; events go over ttrpc.
                "bundle" | "socket" | "publish-binary" => {}
                _ => bail!("there is no flag -{name}"),
            }
        }
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Flags> {
        Flags::parse(words.iter().map(ToString::to_string))
    }

    #[test]
    fn flags_are_as_containerd_writes_them() {
        let line = "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd \
                    -id=web --debug -bundle /b start";
        let words: Vec<_> = line.split(' ').filter(|word| !word.is_empty()).collect();
        let expected = Flags {
            namespace: "k8s.io".into(),
            id: "web".into(),
            address: "/run/c.sock".into(),
            action: "start".into(),
            ..Flags::default()
        };
        assert_eq!(parse(&words).unwrap(), expected);
        assert!(parse(&["-v"]).unwrap().version);
        assert!(parse(&["-id"]).is_err() && parse(&["-x", "1"]).is_err());
        assert!(parse(&["start", "more"]).is_err());
    }
}
