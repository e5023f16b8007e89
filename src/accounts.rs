//! Users and groups from the text of passwd(5) and group(5).

use crate::bytes::decimal;
use crate::text::{Line, Show};

/// Most supplementary groups of a user.
pub const GROUPS: usize = 256;
/// Longest home directory.
const HOME: usize = 256;

/// Who a command runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

/// Why a user cannot be resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault<'a> {
    /// No such name, and not a number.
    User(&'a [u8]),
    /// No such name, and not a number.
    Group(&'a [u8]),
    /// In more than [`GROUPS`] groups.
    TooManyGroups(&'a [u8]),
    /// A home directory over 256 bytes.
    Home(&'a [u8]),
}

impl Show for Fault<'_> {
    fn show(&self, line: &mut Line) {
        match *self {
            Fault::User(name) => line.add("unknown user ").add(name),
            Fault::Group(name) => line.add("unknown group ").add(name),
            Fault::TooManyGroups(name) => line
                .add("user ")
                .add(name)
                .add(" is in more than ")
                .add(GROUPS)
                .add(" groups"),
            Fault::Home(name) => line.add("home directory of ").add(name).add(" is too long"),
        };
    }
}

/// Resolves `user`, `uid`, `user:group` or `uid:gid`; an empty user is root.
///
/// `passwd` and `group` are the files' contents, empty where there is no such file. A line that
/// makes no sense is no account. A number that is no known id stands for itself.
pub fn resolve<'a>(spec: &'a [u8], passwd: &[u8], group: &[u8]) -> Result<Identity, Fault<'a>> {
    let (user, wanted_group) = match spec.iter().position(|byte| *byte == b':') {
        Some(colon) => (
            spec.get(..colon).unwrap_or(&[]),
            spec.get(colon + 1..).filter(|group| !group.is_empty()),
        ),
        None => (spec, None),
    };
    let user = if user.is_empty() { b"root" } else { user };
    let id = number(user);
    let by_name = accounts(passwd).find(|account| account.name == user);
    let account = by_name.or_else(|| accounts(passwd).find(|account| Some(account.uid) == id));
    let mut identity = match (&account, id) {
        (Some(account), _) => Identity {
            uid: account.uid,
            gid: account.gid,
            home: heapless::Vec::from_slice(account.home).map_err(|_| Fault::Home(user))?,
            ..Identity::default()
        },
        (None, Some(id)) => Identity {
            uid: id,
            gid: id,
            home: heapless::Vec::from_array(*b"/"),
            ..Identity::default()
        },
        // An image without /etc/passwd still has its root.
        (None, None) if user == b"root" => Identity {
            home: heapless::Vec::from_array(*b"/root"),
            ..Identity::default()
        },
        (None, None) => return Err(Fault::User(user)),
    };
    match (wanted_group, account) {
        (Some(wanted), _) => {
            let named = groups(group).find(|group| group.name == wanted);
            identity.gid = named
                .map(|group| group.gid)
                .or_else(|| number(wanted))
                .ok_or(Fault::Group(wanted))?;
            identity.join(identity.gid, user)?;
        }
        (None, Some(account)) => {
            identity.join(identity.gid, user)?;
            for group in groups(group) {
                let member = group
                    .members
                    .split(|byte| *byte == b',')
                    .any(|name| name == account.name);
                if member {
                    identity.join(group.gid, user)?;
                }
            }
        }
        (None, None) => identity.join(identity.gid, user)?,
    }
    Ok(identity)
}

impl Identity {
    /// Root, in no group but its own.
    pub fn root() -> Self {
        Self {
            groups: heapless::Vec::from_array([0]),
            ..Self::default()
        }
    }

    fn join<'a>(&mut self, gid: u32, user: &'a [u8]) -> Result<(), Fault<'a>> {
        if self.groups.contains(&gid) {
            return Ok(());
        }
        self.groups
            .push(gid)
            .map_err(|_| Fault::TooManyGroups(user))
    }
}

struct Account<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// name:password:UID:GID:GECOS:directory:shell
fn accounts(passwd: &[u8]) -> impl Iterator<Item = Account<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = number(fields.nth(1)?)?;
        let gid = number(fields.next()?)?;
        let home = fields
            .nth(1)
            .filter(|home| !home.is_empty())
            .unwrap_or(b"/");
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    })
}

struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

/// group_name:password:GID:user_list
fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?)?;
        let members = fields.next().unwrap_or(b"");
        Some(Group { name, gid, members })
    })
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii)
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

    fn ids(spec: &str) -> Result<(u32, u32, Vec<u32>, String), Fault<'_>> {
        resolve(spec.as_bytes(), PASSWD, GROUP).map(|who| {
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
        assert_eq!(ids("nosuch"), Err(Fault::User(b"nosuch")));
        assert_eq!(ids("app:nosuch"), Err(Fault::Group(b"nosuch")));
        assert_eq!(ids("4294967295"), Err(Fault::User(b"4294967295")));
        assert_eq!(
            ids("99999999999999999999"),
            Err(Fault::User(b"99999999999999999999"))
        );
        assert_eq!(ids("-1"), Err(Fault::User(b"-1")));
        for garbage in ["garbage", "noid", "big", "minus"] {
            assert_eq!(ids(garbage), Err(Fault::User(garbage.as_bytes())));
        }
    }

    #[test]
    fn an_image_without_account_files_has_its_root() {
        let root = resolve(b"", b"", b"").unwrap();
        assert_eq!((root.uid, root.gid, &root.home[..]), (0, 0, &b"/root"[..]));
    }

    #[test]
    fn more_groups_than_there_is_room_for_is_an_error_and_not_a_truncation() {
        let group: String = (0..=GROUPS)
            .map(|at| format!("g{at}:x:{}:app\n", 5000 + at))
            .collect();
        assert_eq!(
            resolve(b"app", PASSWD, group.as_bytes()),
            Err(Fault::TooManyGroups(b"app"))
        );
    }
}
