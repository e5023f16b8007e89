//! MMDS responses: a head is complete at its end, not before, whatever follows; a token is valid in
//! a header.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::mmds;

fuzz_target!(|data: &[u8]| {
    match mmds::parse_head(data) {
        Ok(Some(head)) => {
            let length = head.length;
            assert!(length <= mmds::MAX_HEAD);
            assert!(length <= data.len());
            assert!(data[..length].ends_with(b"\n"));
            assert_eq!(mmds::parse_head(&data[..length]), Ok(Some(head)));
            for end in 0..length {
                assert!(
                    !matches!(mmds::parse_head(&data[..end]), Ok(Some(_))),
                    "at {end}"
                );
            }
        }
        Ok(None) => assert!(data.len() < mmds::MAX_HEAD),
        Err(_) => {}
    }
    if let Some(token) = mmds::token(data) {
        let request = |token| mmds::document_request(token).unwrap();
        let (with, without) = (request(Some(token)), request(None));
        let lines: Vec<_> = with.split(|byte| *byte == b'\n').collect();
        assert!(
            with.ends_with(b"\r\n\r\n")
                && lines
                    .iter()
                    .all(|line| line.len() < 128 || line.ends_with(b"\r"))
        );
        assert_eq!(
            lines.len(),
            without.split(|byte| *byte == b'\n').count() + 1
        );
    }
});
