//! The contents of /etc/hosts and /etc/resolv.conf.

use crate::config::Host;
use crate::json::Texts;
use crate::text::Line;

/// Marks a line of /etc/hosts as ours, so that the next boot replaces it.
const MARK: &[u8] = b"# pigeon-init";

/// What a root without /etc/hosts gets (hosts(5)).
const LOCALHOST: &[u8] = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// Gives the new /etc/hosts to `write`, piece by piece.
///
/// Lines of an earlier boot go, all others stay as they are, and each entry is added unless a
/// line that stays says the same already.
pub fn hosts<'h, E>(
    old: &[u8],
    entries: impl Iterator<Item = Host<'h>>,
    mut write: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let kept = || {
        old.split_inclusive(|byte| *byte == b'\n')
            .filter(|line| !line.windows(MARK.len()).any(|window| window == MARK))
    };
    let mut ends = true;
    for line in kept() {
        write(line)?;
        ends = line.ends_with(b"\n");
    }
    if !ends {
        write(b"\n")?;
    }
    if kept().all(|line| line.trim_ascii().is_empty()) {
        write(LOCALHOST)?;
    }
    for entry in entries {
        let (ip, name) = (entry.ip.bytes(), entry.host.bytes());
        if kept().any(|line| says(line, ip, name)) {
            continue;
        }
        for piece in [ip, b"\t", name, b"\t", MARK] {
            write(piece)?;
        }
        if !entry.desc.is_empty() {
            write(b":")?;
            // A line break here would start a line of its own.
            for word in entry.desc.bytes().split(|byte| *byte < b' ') {
                write(b" ")?;
                write(word)?;
            }
        }
        write(b"\n")?;
    }
    Ok(())
}

/// Whether a line maps `name` to `ip`.
fn says(line: &[u8], ip: &[u8], name: &[u8]) -> bool {
    let content = line.split(|byte| *byte == b'#').next().unwrap_or(&[]);
    let mut words = content
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    words.next() == Some(ip) && words.any(|word| word == name)
}

/// Gives the new /etc/resolv.conf to `write` (resolv.conf(5)).
pub fn resolv<E>(
    nameservers: Texts,
    mut write: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    for server in nameservers.iter() {
        let mut line = Line::new();
        line.add("nameserver ").add(server).put(b'\n');
        write(line.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn boot(old: &str, entries: &str) -> String {
        let mut document = format!(r#"{{"EtcHosts":[{entries}]}}"#).into_bytes();
        let spans = Config::decode(&mut document).unwrap();
        let config = Config::new(&document, spans);
        let mut new = Vec::new();
        hosts(old.as_bytes(), config.etc_hosts(), |piece| {
            new.extend_from_slice(piece);
            Ok::<(), ()>(())
        })
        .unwrap();
        String::from_utf8(new).unwrap()
    }

    const ALIAS: &str = r#"{"Host":"my-app.internal","IP":"10.0.0.2","Desc":"app\nalias"}"#;

    #[test]
    fn entries_appear_once_however_often_the_root_boots() {
        let once = boot("127.0.0.1 localhost\n", ALIAS);
        assert_eq!(
            once,
            "127.0.0.1 localhost\n10.0.0.2\tmy-app.internal\t# pigeon-init: app alias\n"
        );
        assert_eq!(boot(&boot(&once, ALIAS), ALIAS), once);
    }

    #[test]
    fn an_entry_that_changed_or_went_leaves_nothing_behind() {
        let once = boot("127.0.0.1 localhost\n", ALIAS);
        assert_eq!(
            boot(&once, r#"{"Host":"my-app.internal","IP":"10.0.0.3"}"#),
            "127.0.0.1 localhost\n10.0.0.3\tmy-app.internal\t# pigeon-init\n"
        );
        assert_eq!(boot(&once, ""), "127.0.0.1 localhost\n");
    }

    #[test]
    fn an_entry_the_image_has_already_is_not_repeated() {
        let image = "127.0.0.1 localhost\n10.0.0.2   other my-app.internal # mine\n";
        assert_eq!(boot(image, ALIAS), image);
        let commented = "127.0.0.1 localhost\n#10.0.0.2 my-app.internal\n";
        assert!(boot(commented, ALIAS).ends_with("alias\n"));
    }

    #[test]
    fn a_missing_or_blank_file_gets_localhost() {
        assert!(boot("", ALIAS).starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost"));
        assert!(boot(" \n\n", "").contains("127.0.0.1\tlocalhost\n"));
        assert_eq!(boot(&boot("", ALIAS), ALIAS), boot("", ALIAS));
    }

    #[test]
    fn a_last_line_without_an_end_gets_one() {
        assert!(boot("1.2.3.4 x", ALIAS).starts_with("1.2.3.4 x\n10.0.0.2\t"));
    }

    #[test]
    fn each_name_server_is_a_line() {
        let mut document = br#"{"EtcResolv":{"Nameservers":["8.8.8.8","fd00::1"]}}"#.to_vec();
        let spans = Config::decode(&mut document).unwrap();
        let config = Config::new(&document, spans);
        let mut file = Vec::new();
        resolv(config.nameservers(), |piece| {
            file.extend_from_slice(piece);
            Ok::<(), ()>(())
        })
        .unwrap();
        assert_eq!(file, b"nameserver 8.8.8.8\nnameserver fd00::1\n");
    }
}
