//! Users and groups from the text of passwd(5) and group(5).

use crate::bytes::{split, split_once};
use crate::decimal;
use crate::message::ToLossy;
use core::fmt::{self, Display};

/// Maximum number of a user's groups, including the primary one.
pub const MAX_GROUPS: usize = 256;
/// Maximum length of a home directory in bytes.
pub const MAX_HOME: usize = 256;

/// Who a command runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids, including the primary one, as with initgroups(3); only that one if a group was
    /// given.
    pub groups: heapless::Vec<u32, MAX_GROUPS>,
    /// Home directory.
    pub home: heapless::Vec<u8, MAX_HOME>,
}

/// Why a user cannot be resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityError<'a> {
    /// No account has this name.
    UnknownUser(&'a [u8]),
    /// No group has this name.
    UnknownGroup(&'a [u8]),
    /// A number that is not a valid user id.
    UserId(&'a [u8]),
    /// A number that is not a valid group id.
    GroupId(&'a [u8]),
    /// The user is in more than [`MAX_GROUPS`] groups.
    TooManyGroups(&'a [u8]),
    /// The user's home directory is over [`MAX_HOME`] bytes.
    LongHome(&'a [u8]),
}

impl Display for IdentityError<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, name, after) = match self {
            Self::UnknownUser(name) => ("unknown user ", name, ""),
            Self::UnknownGroup(name) => ("unknown group ", name, ""),
            Self::UserId(id) => ("user id ", id, " is not from 0 to 4294967294"),
            Self::GroupId(id) => ("group id ", id, " is not from 0 to 4294967294"),
            Self::TooManyGroups(user) => ("user ", user, " is in more than 256 groups"),
            Self::LongHome(user) => ("the home directory of ", user, " is over 256 bytes"),
        };
        write!(formatter, "{before}{}{after}", name.lossy())
    }
}

impl Identity {
    /// Resolves `user`, `uid`, `user:group` or `uid:gid`, where either side can be a name or an id;
    /// an empty user is root.
    ///
    /// `passwd` and `group` are the files' contents, empty if there is no such file. Malformed lines are
    /// ignored. A number is always an id, never a name (CVE-2016-3697); a user id without an account gets
    /// group 0, as in Docker, containerd and Kubernetes: images for arbitrary user ids make their writable
    /// files writable for that group.
    pub fn resolve<'a>(
        &mut self,
        spec: &'a [u8],
        passwd: &[u8],
        group: &[u8],
    ) -> Result<(), IdentityError<'a>> {
        let (user, given_group) = split_once(spec, b':').unwrap_or((spec, b""));
        let user = if user.is_empty() { b"root" } else { user };
        let given_group = Some(given_group).filter(|group| !group.is_empty());

        let wanted = NameOrId::parse(user).ok_or(IdentityError::UserId(user))?;
        let known = split(passwd, b'\n').find_map(|line| {
            // name:password:UID:GID:GECOS:directory:shell
            let [name, _, uid, gid, _, directory] = fields(line);
            let (uid, gid) = (id(uid)?, id(gid)?);
            wanted
                .matches(name, uid)
                .then_some((name, uid, gid, directory))
        });
        let (mut account, uid, gid, home) = match (known, wanted) {
            (Some((name, uid, gid, directory)), _) => (Some(name), uid, gid, directory),
            (None, NameOrId::Id(id)) => (None, id, 0, &b""[..]),
            // root exists even without /etc/passwd.
            (None, NameOrId::Name(b"root")) => (None, 0, 0, &b"/root"[..]),
            (None, NameOrId::Name(name)) => return Err(IdentityError::UnknownUser(name)),
        };
        (self.uid, self.gid) = (uid, gid);
        let home = if home.is_empty() { b"/" } else { home };
        self.home.clear();
        if self.home.extend_from_slice(home).is_err() {
            return Err(IdentityError::LongHome(user));
        }
        if let Some(name) = given_group {
            self.gid = find_group(name, group)?;
            account = None;
        }
        match self.set_groups(account, group) {
            true => Ok(()),
            false => Err(IdentityError::TooManyGroups(user)),
        }
    }

    /// Sets the groups: the primary one, and those that have `account` as a member. Returns whether all fit.
    fn set_groups(&mut self, account: Option<&[u8]>, group: &[u8]) -> bool {
        self.groups.clear();
        let mut fits = self.groups.push(self.gid).is_ok();
        for line in split(group, b'\n') {
            // Most groups have no members.
            if line.ends_with(b":") {
                continue;
            }
            let [_, _, gid, members, ..] = fields(line);
            if let (Some(gid), Some(account)) = (id(gid), account)
                && split(members, b',').any(|member| member == account)
                && !self.groups.contains(&gid)
            {
                fits &= self.groups.push(gid).is_ok();
            }
        }
        fits
    }

    /// Makes it root, in no other group, without reading any files.
    pub fn set_root(&mut self) {
        *self = Self {
            groups: heapless::Vec::from_array([0]),
            ..Self::default()
        };
        // Five bytes of MAX_HOME.
        let _fits = self.home.extend_from_slice(b"/root");
    }
}

/// The id of a group, which is given by name or id.
fn find_group<'a>(wanted: &'a [u8], group: &[u8]) -> Result<u32, IdentityError<'a>> {
    let name = match NameOrId::parse(wanted).ok_or(IdentityError::GroupId(wanted))? {
        NameOrId::Id(id) => return Ok(id),
        NameOrId::Name(name) => name,
    };
    let found = split(group, b'\n').find_map(|line| {
        let [group, _, gid, ..] = fields(line);
        id(gid).filter(|_| group == name)
    });
    found.ok_or(IdentityError::UnknownGroup(name))
}

/// How a user or group is given.
#[derive(Clone, Copy)]
enum NameOrId<'a> {
    Id(u32),
    Name(&'a [u8]),
}

impl<'a> NameOrId<'a> {
    /// `None` for a number that is not a valid id.
    fn parse(text: &'a [u8]) -> Option<Self> {
        let digits = match text {
            [b'-' | b'+', digits @ ..] if !digits.is_empty() => digits,
            text => text,
        };
        if !digits.iter().all(u8::is_ascii_digit) {
            return Some(Self::Name(text));
        }
        id(text).map(Self::Id)
    }

    fn matches(&self, name: &[u8], id: u32) -> bool {
        match self {
            Self::Id(wanted) => *wanted == id,
            Self::Name(wanted) => *wanted == name,
        }
    }
}

/// The first fields of a line of passwd(5) or group(5); missing ones are empty, as are all if the line has no
/// name.
fn fields(line: &[u8]) -> [&[u8]; 6] {
    let mut all = [&[][..]; 6];
    let line = line.trim_ascii();
    if !line.starts_with(b":") {
        for (place, field) in all.iter_mut().zip(split(line, b':')) {
            *place = field;
        }
    }
    all
}

/// The largest id: 2^32 - 1 means "no change" to the kernel (setuid(2)).
const MAX_ID: u32 = u32::MAX - 1;

fn id(digits: &[u8]) -> Option<u32> {
    decimal::parse(digits).filter(|id| *id <= MAX_ID)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        garbage\n::1:1::/:\nnoid:x:abc:1::/:\nbig:x:4294967296:0::/:\nminus:x:-1:0::/:\n\
        app:x:1000:100:App:/home/app:/bin/sh\nbare:x:7:8\n1234:x:55:56::/digits:\n\
        nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin";
    const GROUP: &[u8] = b"root:x:0:\nusers:x:100:app\nwheel:x:10:root,app\n\nbad\n:x:3:app\n\
        digits:x:9:1234\n\
        4321:x:0:\ndisk:x:6:app,other\ndisk2:x:6:app\napplication:x:77:application\n";

    fn resolved(spec: &[u8], passwd: &[u8], group: &[u8]) -> Result<Identity, String> {
        let mut identity = Identity::default();
        let result = identity.resolve(spec, passwd, group);
        result.map_err(|error| error.to_string()).map(|()| identity)
    }

    fn ids(spec: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        resolved(spec.as_bytes(), PASSWD, GROUP).map(|who| {
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
    fn an_explicit_group_replaces_all_groups() {
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
    fn a_known_id_is_that_account_and_an_unknown_one_gets_group_0() {
        assert_eq!(ids("1000"), ids("app"));
        assert_eq!(ids("2000"), Ok((2000, 0, vec![0], "/".into())));
        assert_eq!(ids("2000:"), ids("2000"));
        assert_eq!(ids("2000:3000"), Ok((2000, 3000, vec![3000], "/".into())));
        assert_eq!(ids("55"), Ok((55, 56, vec![56, 9], "/digits".into())));
        assert_eq!(ids("0000"), ids("0"));
    }

    #[test]
    fn a_number_is_an_id_and_never_a_name() {
        // An account and a group that are named as a number, with ids of their own.
        assert_eq!(ids("1234"), Ok((1234, 0, vec![0], "/".into())));
        assert_eq!(
            ids("app:4321"),
            Ok((1000, 4321, vec![4321], "/home/app".into()))
        );
        let root = b"1234:x:0:0::/root:\n4294967296:x:0:0::/root:\n-1:x:0:0::/:";
        let uid = |spec: &[u8]| resolved(spec, root, b"").map(|who| who.uid);
        assert_eq!(uid(b"1234"), Ok(1234));
        assert!(uid(b"4294967296").is_err() && uid(b"-1").is_err());
    }

    #[test]
    fn unknown_names_and_invalid_ids_are_named() {
        assert_eq!(ids("nosuch"), Err("unknown user nosuch".into()));
        assert_eq!(ids("app:nosuch"), Err("unknown group nosuch".into()));
        assert_eq!(ids("app:wheel:x"), Err("unknown group wheel:x".into()));
        for id in [
            "4294967295",
            "4294967296",
            "99999999999999999999",
            "-1",
            "+1",
            "-0",
        ] {
            let range = "is not from 0 to 4294967294";
            assert_eq!(ids(id), Err(format!("user id {id} {range}")));
            assert_eq!(
                ids(&format!("app:{id}")),
                Err(format!("group id {id} {range}"))
            );
        }
        assert_eq!(ids("4294967294").map(|who| who.0), Ok(4_294_967_294));
        for garbage in [
            "garbage", "noid", "big", "minus", "12a", "0x1", "1 ", "-", "+",
        ] {
            assert_eq!(ids(garbage), Err(format!("unknown user {garbage}")));
        }
    }

    #[test]
    fn a_second_resolution_leaves_nothing_of_the_first() {
        let mut identity = Identity::default();
        identity.resolve(b"app", PASSWD, GROUP).unwrap();
        identity.resolve(b"bare", PASSWD, GROUP).unwrap();
        assert_eq!(identity, resolved(b"bare", PASSWD, GROUP).unwrap());
        identity.set_root();
        assert_eq!(identity, resolved(b"", b"", b"").unwrap());
    }

    #[test]
    fn root_exists_without_account_files() {
        let root = resolved(b"", b"", b"").unwrap();
        assert_eq!((root.uid, root.gid, &root.home[..]), (0, 0, &b"/root"[..]));
    }

    #[test]
    fn exceeding_a_limit_is_an_error_and_not_a_truncation() {
        let group: String = (0..=MAX_GROUPS)
            .map(|at| format!("g{at}:x:{}:app\n", 5000 + at))
            .collect();
        let why = resolved(b"app", PASSWD, group.as_bytes()).unwrap_err();
        assert_eq!(why, "user app is in more than 256 groups");
        let home = format!("app:x:1:1::/{}:", "h".repeat(MAX_HOME));
        let why = resolved(b"app", home.as_bytes(), b"").unwrap_err();
        assert_eq!(why, "the home directory of app is over 256 bytes");
    }
}
