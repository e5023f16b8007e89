//! The contents of /etc/hosts and /etc/resolv.conf.

use crate::arena::Strings;
use crate::bytes::{find, split, words};
use crate::config::{EtcResolv, Host, MAX_HOSTS};

/// Marks a line of /etc/hosts as ours, so that the next boot can replace it.
const MARK: &[u8] = b"# pigeon-init";

/// The contents of a new /etc/hosts (hosts(5)).
const LOCALHOST: &[u8] = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// The contents of a file being built.
pub struct Contents<'a> {
    room: &'a mut [u8],
    /// Number of bytes added, even if they did not fit.
    length: usize,
}

impl<'a> Contents<'a> {
    /// Empty contents, in a buffer.
    pub fn new(room: &'a mut [u8]) -> Self {
        Self { room, length: 0 }
    }

    /// Adds bytes.
    pub fn put(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(slot) = self.room.get_mut(self.length) {
                *slot = *byte;
            }
            self.length += 1;
        }
    }

    /// All bytes; `None` if they did not fit.
    pub fn bytes(&self) -> Option<&[u8]> {
        self.room.get(..self.length)
    }
}

/// Writes the new /etc/hosts.
///
/// Removes lines of an earlier boot, keeps all others, and adds each entry unless an existing line has it
/// already.
pub fn hosts(old: &[u8], entries: &[Host], new: &mut Contents) {
    let mut said = [false; MAX_HOSTS];
    for text in [old, LOCALHOST] {
        let is_blank = |kept: &[u8]| kept.trim_ascii().is_empty();
        if !new.bytes().is_some_and(is_blank) {
            break;
        }
        each_foreign_line(text, &mut |line| {
            new.put(line);
            new.put(b"\n");
            let mut words = words(split_comment(line).0);
            let ip = words.next();
            for (entry, said) in entries.iter().zip(&mut said) {
                *said |= ip == Some(entry.ip.as_bytes())
                    && words.clone().any(|name| name == entry.host.as_bytes());
            }
        });
    }
    for (Host { ip, host, desc }, said) in entries.iter().zip(said) {
        if said {
            continue;
        }
        let (ip, host) = (ip.as_bytes(), host.as_bytes());
        new.put(ip);
        new.put(b"\t");
        new.put(host);
        new.put(b"\t");
        new.put(MARK);
        if !desc.is_empty() {
            new.put(b": ");
            // A line break would start another entry.
            for byte in desc.bytes() {
                new.put(&[b' '.max(byte)]);
            }
        }
        new.put(b"\n");
    }
}

/// Calls `each` with the lines that are not ours.
fn each_foreign_line(old: &[u8], each: &mut dyn FnMut(&[u8])) {
    let mut lines = split(old, b'\n');
    while let Some(line) = lines.next() {
        // There is no line after the last line feed.
        let is_line = !line.is_empty() || lines.clone().next().is_some();
        if is_line && !split_comment(line).1.starts_with(MARK) {
            each(line);
        }
    }
}

/// Splits a line at its comment.
fn split_comment(line: &[u8]) -> (&[u8], &[u8]) {
    let end = find(line, b'#').unwrap_or(line.len());
    line.split_at_checked(end).unwrap_or((line, &[]))
}

/// Writes the new /etc/resolv.conf (resolv.conf(5)).
pub fn resolv(resolv: &EtcResolv, new: &mut Contents) {
    for server in resolv.nameservers {
        new.put(b"nameserver ");
        new.put(server.to_bytes());
        new.put(b"\n");
    }
    line(b"search", resolv.search, new);
    line(b"options", resolv.options, new);
}

/// Writes a line with a keyword and words, if there are any words.
fn line(keyword: &[u8], words: Strings, new: &mut Contents) {
    if words.is_empty() {
        return;
    }
    new.put(keyword);
    for word in words {
        new.put(b" ");
        new.put(word.to_bytes());
    }
    new.put(b"\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALIAS: Host = Host {
        host: "my-app.internal",
        ip: "10.0.0.2",
        desc: "app\nalias",
    };

    fn boot(old: &str, entries: &[Host]) -> String {
        let mut room = [0; 4096];
        let mut new = Contents::new(&mut room);
        hosts(old.as_bytes(), entries, &mut new);
        String::from_utf8(new.bytes().unwrap().to_vec()).unwrap()
    }

    #[test]
    fn entries_appear_once_however_often_the_root_boots() {
        let once = boot("127.0.0.1 localhost\n", &[ALIAS]);
        assert_eq!(
            once,
            "127.0.0.1 localhost\n10.0.0.2\tmy-app.internal\t# pigeon-init: app alias\n"
        );
        assert_eq!(boot(&boot(&once, &[ALIAS]), &[ALIAS]), once);
    }

    #[test]
    fn a_changed_or_removed_entry_leaves_nothing_behind() {
        let once = boot("127.0.0.1 localhost\n", &[ALIAS]);
        let moved = Host {
            host: "my-app.internal",
            ip: "10.0.0.3",
            desc: "",
        };
        assert_eq!(
            boot(&once, &[moved]),
            "127.0.0.1 localhost\n10.0.0.3\tmy-app.internal\t# pigeon-init\n"
        );
        assert_eq!(boot(&once, &[]), "127.0.0.1 localhost\n");
    }

    #[test]
    fn an_entry_of_the_image_is_not_repeated() {
        let image = "127.0.0.1 localhost\n10.0.0.2   other my-app.internal # mine\n";
        assert_eq!(boot(image, &[ALIAS]), image);
        let commented = "127.0.0.1 localhost\n#10.0.0.2 my-app.internal\n";
        assert!(boot(commented, &[ALIAS]).ends_with("alias\n"));
    }

    #[test]
    fn a_missing_or_blank_file_gets_localhost() {
        assert!(boot("", &[ALIAS]).starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost"));
        assert!(boot(" \n\n", &[]).contains("127.0.0.1\tlocalhost\n"));
        assert_eq!(boot(&boot("", &[ALIAS]), &[ALIAS]), boot("", &[ALIAS]));
    }

    #[test]
    fn an_entry_for_localhost_does_not_repeat_a_new_files_own_line() {
        let localhost = Host {
            host: "localhost",
            ip: "127.0.0.1",
            desc: "",
        };
        let once = boot("", &[localhost, ALIAS]);
        assert_eq!(once, boot("", &[ALIAS]));
        assert_eq!(boot(&once, &[localhost, ALIAS]), once);
    }

    #[test]
    fn a_missing_final_line_feed_is_added() {
        assert!(boot("1.2.3.4 x", &[ALIAS]).starts_with("1.2.3.4 x\n10.0.0.2\t"));
    }

    #[test]
    fn name_servers_have_a_line_each_and_other_lists_share_one() {
        let both = EtcResolv {
            nameservers: Strings::new(b"8.8.8.8\0fd00::1\0"),
            search: Strings::new(b"a.example\0b.example\0"),
            options: Strings::new(b"ndots:2\0"),
        };
        let servers = EtcResolv {
            nameservers: both.nameservers,
            ..EtcResolv::default()
        };
        let expected = b"nameserver 8.8.8.8\nnameserver fd00::1\n";
        let more = b"search a.example b.example\noptions ndots:2\n";
        for (given, expected) in [
            (servers, expected.to_vec()),
            (both, [&expected[..], more].concat()),
        ] {
            let mut room = vec![0; expected.len()];
            let mut new = Contents::new(&mut room);
            resolv(&given, &mut new);
            assert_eq!(new.bytes(), Some(&expected[..]));
            let mut new = Contents::new(room.split_last_mut().unwrap().1);
            resolv(&given, &mut new);
            assert_eq!(new.bytes(), None);
        }
    }
}
