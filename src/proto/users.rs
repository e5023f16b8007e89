//! Users and groups from the text of passwd(5) and group(5).

use crate::bytes::{Split, decimal, split, trim};
use crate::message;
use crate::message::{Message, ToLossy};

/// Most supplementary groups of a user.
pub const GROUPS: usize = 256;
/// Longest home directory.
const HOME: usize = 256;

/// Who a command runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, the primary one among them, as initgroups(3) has it: only that one
    /// when a group was given.
    pub groups: heapless::Vec<u32, GROUPS>,
    /// Home directory.
    pub home: heapless::Vec<u8, HOME>,
}

impl Identity {
    /// From a default, resolves `user`, `uid`, `user:group` or `uid:gid`; an empty user is root.
    ///
    /// `passwd` and `group` are the files' contents, empty where there is no such file. A line that
    /// makes no sense is no account. A number that is no known id stands for itself.
    pub fn resolve(&mut self, spec: &[u8], passwd: &[u8], group: &[u8]) -> Result<(), Message> {
        let mut parts = split(spec, b':');
        let user = parts.next().filter(|user| !user.is_empty());
        let user = user.unwrap_or(b"root");
        let wanted = parts.rest();
        let id = number(user);
        let mut account = Entry::of(true);
        let mut found =
            account.seek(passwd, user, None) || (id.is_some() && account.seek(passwd, b"", id));
        let mut home: &[u8] = b"/";
        if found {
            self.uid = account.id;
            self.gid = number(account.fourth).unwrap_or(0);
            if !account.home.is_empty() {
                home = account.home;
            }
        } else if let Some(id) = id {
            self.uid = id;
            self.gid = id;
        } else if user == b"root" {
            // An image without /etc/passwd still has its root.
            home = b"/root";
        } else {
            return Err(message!("unknown user {}", user.lossy()));
        }
        if self.home.extend_from_slice(home).is_err() {
            return Err(message!("home directory of {} is too long", user.lossy()));
        }
        let mut entry = Entry::of(false);
        if !wanted.is_empty() {
            // That one, and no other.
            self.gid = match entry.seek(group, wanted, None) {
                true => entry.id,
                false => {
                    number(wanted).ok_or_else(|| message!("unknown group {}", wanted.lossy()))?
                }
            };
            found = false;
        }
        self.join(self.gid);
        entry.lines = split(group, b'\n');
        while found && entry.advance() {
            let member = split(entry.fourth, b',').any(|member| member == account.name);
            if member && !self.join(entry.id) {
                return Err(message!(
                    "user {} is in more than {GROUPS} groups",
                    user.lossy()
                ));
            }
        }
        Ok(())
    }

    /// Makes a new one root, in no group but its own.
    pub fn be_root(&mut self) {
        self.join(0);
    }

    /// Whether there was room for the group.
    fn join(&mut self, gid: u32) -> bool {
        self.groups.contains(&gid) || self.groups.push(gid).is_ok()
    }
}

/// A line of either file:
///
/// passwd(5): name:password:UID:GID:GECOS:directory:shell;
/// group(5): group_name:password:GID:user_list
struct Entry<'a> {
    id: u32,
    is_account: bool,
    name: &'a [u8],
    /// The primary group's id, or a group's members.
    fourth: &'a [u8],
    home: &'a [u8],
    /// The lines behind it.
    lines: Split<'a>,
}

impl<'a> Entry<'a> {
    /// Nothing yet.
    fn of(is_account: bool) -> Self {
        Self {
            id: 0,
            is_account,
            name: &[],
            fourth: &[],
            home: &[],
            lines: split(&[], b'\n'),
        }
    }

    /// On to the next line that makes sense.
    fn advance(&mut self) -> bool {
        for line in self.lines.by_ref() {
            let mut fields = split(trim(line), b':');
            self.name = fields.next().unwrap_or(&[]);
            let id = fields.nth(1).and_then(number);
            self.fourth = fields.next().unwrap_or(&[]);
            self.home = fields.nth(1).unwrap_or(&[]);
            if let Some(id) = id
                && !self.name.is_empty()
                && (!self.is_account || number(self.fourth).is_some())
            {
                self.id = id;
                return true;
            }
        }
        false
    }

    /// On to a file's first line of that name or id.
    fn seek(&mut self, file: &'a [u8], name: &[u8], id: Option<u32>) -> bool {
        self.lines = split(file, b'\n');
        while self.advance() {
            if self.name == name || Some(self.id) == id {
                return true;
            }
        }
        false
    }
}

/// An id: decimal digits, below 2^32 - 1, which the kernel takes for "no change" (setuid(2)).
fn number(digits: &[u8]) -> Option<u32> {
    decimal(digits).filter(|value| *value != u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        garbage\n::1:1::/:\nnoid:x:abc:1::/:\nbig:x:4294967296:0::/:\nminus:x:-1:0::/:\n\
        app:x:1000:100:App:/home/app:/bin/sh\nbare:x:7:8\n1234:x:55:56::/digits:\n\
        nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin";
    const GROUP: &[u8] = b"root:x:0:\nusers:x:100:app\nwheel:x:10:root,app\n\nbad\n:x:3:app\n\
        disk:x:6:app,other\ndisk2:x:6:app\napplication:x:77:application\n";

    fn resolved(spec: &[u8], passwd: &[u8], group: &[u8]) -> Result<Identity, Message> {
        let mut identity = Identity::default();
        identity.resolve(spec, passwd, group).map(|()| identity)
    }

    fn ids(spec: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        let text = |why: Message| String::from_utf8(why.as_bytes().to_vec()).unwrap();
        resolved(spec.as_bytes(), PASSWD, GROUP)
            .map_err(text)
            .map(|who| {
                (
                    who.uid,
                    who.gid,
                    who.groups.to_vec(),
                    String::from_utf8(who.home.to_vec()).unwrap(),
                )
            })
    }

    #[test]
    fn a_name_gives_ids_home_and_supplementary_groups() {
        assert_eq!(
            ids("app"),
            Ok((1000, 100, vec![100, 10, 6], "/home/app".into()))
        );
        assert_eq!(
            ids("nobody"),
            Ok((65534, 65534, vec![65534], "/nonexistent".into()))
        );
        assert_eq!(ids("root"), Ok((0, 0, vec![0, 10], "/root".into())));
        assert_eq!(ids(""), ids("root"));
        assert_eq!(ids("bare"), Ok((7, 8, vec![8], "/".into())));
    }

    #[test]
    fn a_group_given_replaces_the_primary_and_all_supplementary_groups() {
        assert_eq!(
            ids("app:wheel"),
            Ok((1000, 10, vec![10], "/home/app".into()))
        );
        assert_eq!(
            ids("app:4242"),
            Ok((1000, 4242, vec![4242], "/home/app".into()))
        );
        assert_eq!(ids("0:0"), Ok((0, 0, vec![0], "/root".into())));
        assert_eq!(ids(":disk"), Ok((0, 6, vec![6], "/root".into())));
        assert_eq!(ids("app:"), ids("app"));
    }

    #[test]
    fn a_known_number_is_that_account_and_an_unknown_one_stands_for_itself() {
        assert_eq!(ids("1000"), ids("app"));
        assert_eq!(ids("2000"), Ok((2000, 2000, vec![2000], "/".into())));
        assert_eq!(ids("2000:3000"), Ok((2000, 3000, vec![3000], "/".into())));
        assert_eq!(ids("1234"), Ok((55, 56, vec![56], "/digits".into())));
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_named() {
        assert_eq!(ids("nosuch"), Err("unknown user nosuch".into()));
        assert_eq!(ids("app:nosuch"), Err("unknown group nosuch".into()));
        assert_eq!(ids("4294967295"), Err("unknown user 4294967295".into()));
        assert_eq!(
            ids("99999999999999999999"),
            Err("unknown user 99999999999999999999".into())
        );
        assert_eq!(ids("-1"), Err("unknown user -1".into()));
        for garbage in ["garbage", "noid", "big", "minus"] {
            assert_eq!(ids(garbage), Err(format!("unknown user {garbage}")));
        }
    }

    #[test]
    fn an_image_without_account_files_has_its_root() {
        let root = resolved(b"", b"", b"").unwrap();
        assert_eq!((root.uid, root.gid, &root.home[..]), (0, 0, &b"/root"[..]));
    }

    #[test]
    fn more_than_there_is_room_for_is_an_error_and_not_a_truncation() {
        let group: String = (0..=GROUPS)
            .map(|at| format!("g{at}:x:{}:app\n", 5000 + at))
            .collect();
        let why = resolved(b"app", PASSWD, group.as_bytes()).unwrap_err();
        assert_eq!(why.as_bytes(), b"user app is in more than 256 groups");
        let home = format!("app:x:1:1::/{}:", "h".repeat(HOME));
        let why = resolved(b"app", home.as_bytes(), b"").unwrap_err();
        assert_eq!(why.as_bytes(), b"home directory of app is too long");
    }
}
