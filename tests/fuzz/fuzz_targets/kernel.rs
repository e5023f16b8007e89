//! Data from the kernel, some of which a user can influence: kernel log records, the mount table,
//! rtnetlink replies.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::netlink::{Entry, Reply};
use proto::{kmsg, mountinfo, netlink};

fuzz_target!(|data: &[u8]| {
    if kmsg::killed_by_oom(data, 1234) {
        let text = String::from_utf8_lossy(data);
        assert!(text.contains("1234") && !kmsg::killed_by_oom(data, 123));
        // Priority and facility are the first number: 0 to 7 are the kernel's own.
        let number: String = text
            .trim_start_matches('+')
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        assert!(number.parse::<u32>().unwrap() < 8);
    }
    if kmsg::is_virtual_machine_fork(data) {
        assert!(
            data[..1]
                .iter()
                .all(|priority| (b'0'..b'8').contains(priority))
        );
    }
    for line in data.split(|byte| *byte == b'\n') {
        let Some(mount) = mountinfo::parse(line) else {
            continue;
        };
        for field in [mount.mount_point, mount.fs_type, mount.source] {
            // A path with a NUL, which the kernel never writes, would be truncated.
            if field.raw().contains(&0) {
                continue;
            }
            let mut room = vec![0xff; field.raw().len() + 1];
            let whole = field.decode(&mut room);
            assert!(!whole.is_truncated);
            let mut small = [0xff; 4];
            let start = field.decode(&mut small);
            assert_eq!(start.is_truncated, whole.text.count_bytes() > 3);
            assert!(whole.text.to_bytes().starts_with(start.text.to_bytes()));
        }
    }
    for message in netlink::messages(data) {
        if let Reply::Entry(entry) = message.reply() {
            let Some(request) = entry.delete() else {
                continue;
            };
            // The request to delete the entry describes the same one.
            let mut request = request.as_bytes().to_vec();
            assert_eq!(request[..4], (request.len() as u32).to_ne_bytes());
            // RTM_DEL… to RTM_NEW…
            request[4] -= 1;
            let again = netlink::messages(&request).next().unwrap().reply();
            let Reply::Entry(again) = again else {
                panic!("{again:?}");
            };
            let about = |entry: &Entry| (entry.index, entry.address, entry.is_automatic);
            assert_eq!(about(&again), about(&entry));
        }
    }
    let _answer = netlink::acknowledgement(data);
});
