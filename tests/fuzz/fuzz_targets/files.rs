//! Data of disks, files of the root and of /proc, and base64: superblocks, /etc/hosts, processes,
//! partitions, vmclock, the tables of sysinfo.
#![no_main]

use data_encoding::BASE64;
use libfuzzer_sys::fuzz_target;
use proto::etc_files::{self, Contents};
use proto::{block, digest, process_stat, superblock, sysinfo, vmclock};

fuzz_target!(|data: &[u8]| {
    disk(data);
    hosts(data);
    tables(data);
    if let Ok(text) = std::str::from_utf8(data) {
        base64(text);
    }
});

fn disk(data: &[u8]) {
    // Beyond the end of the data, the device has zeros.
    let byte = |at: usize| data.get(at).copied().unwrap_or(0);
    let read_at = |offset: usize, buffer: &mut [u8]| -> Result<(), ()> {
        for (at, to) in (offset..).zip(buffer) {
            *to = byte(at);
        }
        Ok(())
    };
    let kind = superblock::identify(read_at).unwrap();
    if kind == Some(c"ext4") {
        assert_eq!([byte(0x438), byte(0x439)], [0x53, 0xef]);
    }
    let has_log = (0x1_0060..0x1_0068).any(|at| byte(at) != 0);
    assert_eq!(superblock::btrfs_has_log(read_at), Ok(has_log));
    let fault = block::ext_fault(data);
    assert!(fault.is_none() || data[0x38..0x3a] == [0x53, 0xef]);
    if let Some(page) = data.first_chunk() {
        let generation = vmclock::generation(page);
        assert!(generation.is_none_or(|number| number.to_le_bytes() == page[104..112]));
    }
}

fn hosts(data: &[u8]) {
    let renew = |old: &[u8]| {
        let mut room = vec![0; old.len() + 256];
        let mut new = Contents::new(&mut room);
        etc_files::hosts(old, &[], &mut new);
        new.bytes().unwrap().to_vec()
    };
    let new = renew(data);
    assert_eq!(renew(&new), new);
    let old: Vec<_> = data.split(|byte| *byte == b'\n').collect();
    for line in new.split(|byte| *byte == b'\n') {
        let is_localhost = [&b"127.0.0.1\tlocalhost"[..], b"::1\tlocalhost ip6-"];
        let is_new = is_localhost.iter().any(|start| line.starts_with(start));
        assert!(line.is_empty() || is_new || old.contains(&line));
    }
}

fn tables(data: &[u8]) {
    for (name, _, encode) in sysinfo::MEMBERS {
        let mut text = String::new();
        encode(data, &mut text).unwrap();
        let parsed = serde_json::from_str::<serde_json::Value>(&text);
        // The kernel's own numbers are copied without a check.
        assert!(parsed.is_ok() || name == "load_average", "{name}: {text}");
    }
    for line in data.split(|byte| *byte == b'\n') {
        if let Some((_, name)) = block::partition(line) {
            assert!(!name.is_empty() && !name.contains(&b' '));
        }
        let stat = [b"1 (", line, b") S 1"].concat();
        assert_eq!(process_stat::parse(&stat), Some((line, b'S')));
        process_stat::parse(line);
    }
}

fn base64(text: &str) {
    let mut decoded = vec![];
    let is_base64 = digest::decode_base64(text, &mut |bytes| decoded.extend(bytes));
    // The library also accepts several concatenated texts, each with its padding.
    let is_one = !text.trim_end_matches('=').contains('=');
    if let Ok(bytes) = BASE64.decode(text.as_bytes())
        && is_one
    {
        assert!(is_base64);
        assert_eq!(decoded, bytes);
    } else if is_base64 {
        // Nonzero bits after the last byte are ignored.
        let again = BASE64.encode(&decoded);
        assert_eq!(again.len(), text.len());
        assert_eq!(
            again.as_bytes()[..text.len() - 4],
            text.as_bytes()[..text.len() - 4]
        );
    }
}
