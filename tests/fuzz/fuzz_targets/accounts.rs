//! Account files: the input is three lines, a user and two files with `|` for newline. The identity
//! found must be the one in the files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::users::Identity;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(3, |byte| *byte == b'\n');
    let spec = parts.next().unwrap_or_default();
    let file = |part: Option<&[u8]>| -> Vec<u8> {
        let part = part.unwrap_or_default();
        part.iter()
            .map(|byte| if *byte == b'|' { b'\n' } else { *byte })
            .collect()
    };
    let (passwd, group) = (file(parts.next()), file(parts.next()));
    let mut identity = Identity::default();
    if identity.resolve(spec, &passwd, &group).is_err() {
        return;
    }
    assert_eq!(identity.groups.first(), Some(&identity.gid));
    for (at, group) in identity.groups.iter().enumerate() {
        assert!(
            !identity.groups[..at].contains(group),
            "a group is there twice"
        );
    }
    assert!(
        identity.uid != u32::MAX && identity.gid != u32::MAX,
        "-1 is no id"
    );
    let mut parts = spec.splitn(2, |byte| *byte == b':');
    let (user, wanted_group) = (parts.next().unwrap(), parts.next().unwrap_or_default());
    let number = |text: &[u8]| -> Option<u32> {
        let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
        is_number.then(|| std::str::from_utf8(text).unwrap().parse().unwrap())
    };
    // A number is that ID, whatever the files contain. The ID of a name is in the file, or is
    // root's.
    let has = |file: &[u8], name: &[u8], id: u32| {
        file.split(|byte| *byte == b'\n').any(|line| {
            let line = String::from_utf8_lossy(line.trim_ascii()).into_owned();
            let fields: Vec<_> = line.split(':').collect();
            fields.len() > 2
                && fields[0] == String::from_utf8_lossy(name)
                && fields[2].parse() == Ok(id)
        })
    };
    let name = if user.is_empty() { b"root" } else { user };
    match number(user) {
        Some(id) => assert_eq!(identity.uid, id),
        None => assert!(has(&passwd, name, identity.uid) || (name == b"root" && identity.uid == 0)),
    }
    if !wanted_group.is_empty() {
        assert_eq!(
            identity.groups.len(),
            1,
            "a group that is given is the only one"
        );
        match number(wanted_group) {
            Some(id) => assert_eq!(identity.gid, id),
            None => assert!(has(&group, wanted_group, identity.gid)),
        }
    }
});
