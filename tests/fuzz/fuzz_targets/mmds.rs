//! MMDS answers: a head is found where it ends, not before, whatever follows; a token can stand in
//! a header.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pigeon_init::mmds;

fuzz_target!(|data: &[u8]| {
    match mmds::head(data) {
        Ok(Some(head)) => {
            assert!(head.length <= data.len());
            assert!(data[..head.length].ends_with(b"\n"));
            assert_eq!(mmds::head(&data[..head.length]), Ok(Some(head)));
            for end in 0..head.length {
                assert!(!matches!(mmds::head(&data[..end]), Ok(Some(_))), "at {end}");
            }
        }
        Ok(None) => assert!(data.len() < mmds::HEAD),
        Err(_) => {}
    }
    if let Some(token) = mmds::token(data) {
        let request = mmds::document_request(Some(&token));
        let lines: Vec<_> = request.split(|byte| *byte == b'\n').collect();
        assert!(
            request.ends_with(b"\r\n\r\n")
                && lines
                    .iter()
                    .all(|line| line.len() < 128 || line.ends_with(b"\r"))
        );
        assert_eq!(
            lines.len(),
            mmds::document_request(None)
                .split(|byte| *byte == b'\n')
                .count()
                + 1
        );
    }
});
