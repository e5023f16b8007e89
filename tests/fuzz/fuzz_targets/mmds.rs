//! MMDS answers: a head is found where it ends, not before, whatever follows; a token can stand in
//! a header.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::mmds;

fuzz_target!(|data: &[u8]| {
    match mmds::head(data) {
        Ok(Some(head)) => {
            let length = usize::from(head.length);
            assert!(length <= data.len());
            assert!(data[..length].ends_with(b"\n"));
            assert_eq!(mmds::head(&data[..length]), Ok(Some(head)));
            for end in 0..length {
                assert!(!matches!(mmds::head(&data[..end]), Ok(Some(_))), "at {end}");
            }
        }
        Ok(None) => assert!(data.len() < mmds::HEAD),
        Err(_) => {}
    }
    if let Some(token) = mmds::token(data) {
        let [mut with, mut without] = [mmds::Request::new(), mmds::Request::new()];
        mmds::document_request(Some(token), &mut with);
        mmds::document_request(None, &mut without);
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
