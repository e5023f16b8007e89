//! What the kernel says, some of which a user can have a hand in: kernel log records, the mount
//! table, rtnetlink answers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::{kmsg, mountinfo, netlink};

fuzz_target!(|data: &[u8]| {
    if kmsg::killed_by_oom(data, 1234) {
        let text = String::from_utf8_lossy(data);
        assert!(text.contains("1234") && !kmsg::killed_by_oom(data, 123));
        // Priority and facility come first, as one number: 0 to 7 is the kernel's own.
        let number: String = text
            .trim_start_matches('+')
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        assert!(number.parse::<u32>().unwrap() < 8);
    }
    for line in data.split(|byte| *byte == b'\n') {
        let mut target = mountinfo::Target::new();
        if mountinfo::parse(line, &mut target).is_some() {
            assert_eq!(target.last(), Some(&0));
        }
    }
    let _answer = netlink::acknowledgement(data);
});
