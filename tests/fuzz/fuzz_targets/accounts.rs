//! Account files: three lines of input are a user and two files with `|` for newline. Whoever comes
//! out is who the files say.
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
    // A uid comes from the file, from the number given, or is root's.
    let uid = identity.uid.to_string();
    let contains = |bytes: &[u8]| {
        let digits = String::from_utf8_lossy(bytes).into_owned();
        digits
            .split(|c: char| !c.is_ascii_digit())
            .any(|word| word.trim_start_matches('0') == uid)
    };
    assert!(identity.uid == 0 || contains(spec) || contains(&passwd));
    let wanted_group = spec
        .splitn(2, |byte| *byte == b':')
        .nth(1)
        .unwrap_or_default();
    if !wanted_group.is_empty() {
        assert_eq!(
            identity.groups.len(),
            1,
            "a group that is given is the only one"
        );
    }
});
