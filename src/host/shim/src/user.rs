//! The user of a process, as the init has it: a number alone gets the groups of the guest's
//! /etc/passwd and /etc/group, a number with a group gets that group only.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use crate::spec::User;

/// What the init is told to run a process as. An error when it would not have the groups asked for.
pub fn name(user: &User, passwd: &str, group: &str) -> Result<String> {
    let additional = user.additional_gids.iter().copied();
    let others: BTreeSet<u32> = additional.filter(|gid| *gid != user.gid).collect();
    let (gid, groups) = groups_of(user.uid, passwd, group);
    if gid == user.gid && groups == others {
        return Ok(user.uid.to_string());
    }
    ensure!(
        others.is_empty(),
        "process.user.additionalGids: {:?} are not those that the image's /etc/group has for user {}",
        user.additional_gids,
        user.uid
    );
    Ok(format!("{}:{}", user.uid, user.gid))
}

/// The group of a user, and the other groups, as the files have them (passwd(5), group(5)).
fn groups_of(uid: u32, passwd: &str, group: &str) -> (u32, BTreeSet<u32>) {
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, id, gid, ..] = fields[..] else {
            return None;
        };
        (id.parse() == Ok(uid)).then_some((name, gid.parse().ok()?))
    });
    let Some((name, gid)) = entry else {
        return (uid, BTreeSet::new());
    };
    let groups = group.lines().filter_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [_, _, id, members, ..] = fields[..] else {
            return None;
        };
        let is_member = members.trim_end().split(',').any(|member| member == name);
        is_member.then(|| id.parse().ok())?
    });
    (gid, groups.filter(|id| *id != gid).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/:/bin/sh\n";
    const GROUP: &str = "root:x:0:root\nwheel:x:10:root,app\napp:x:1001:\n";

    fn name_of(uid: u32, gid: u32, additional_gids: &[u32]) -> Result<String> {
        let additional_gids = additional_gids.into();
        let user = User {
            uid,
            gid,
            additional_gids,
        };
        name(&user, PASSWD, GROUP)
    }

    #[test]
    fn groups_of_the_image_come_with_the_number_alone() {
        assert_eq!(name_of(0, 0, &[0, 10]).unwrap(), "0");
        assert_eq!(name_of(1000, 1001, &[10]).unwrap(), "1000");
        assert_eq!(name_of(77, 77, &[77]).unwrap(), "77");
    }

    #[test]
    fn a_group_without_others_is_named() {
        assert_eq!(name_of(0, 0, &[]).unwrap(), "0:0");
        assert_eq!(name_of(1000, 50, &[50]).unwrap(), "1000:50");
        assert_eq!(name_of(77, 0, &[]).unwrap(), "77:0");
    }

    #[test]
    fn groups_that_the_init_would_not_give_are_refused() {
        let error = name_of(1000, 1001, &[10, 2000]).unwrap_err().to_string();
        assert!(error.contains("additionalGids: [10, 2000]"), "{error}");
    }
}
