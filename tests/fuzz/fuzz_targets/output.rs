//! Output of commands as a JSON string: it decodes to the lossy conversion to UTF-8, however the
//! output was split.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::json::escape;

fn escaped(bytes: &[u8], step: usize) -> String {
    let (mut text, mut at, mut end) = (String::from('"'), 0, 0);
    while end < bytes.len() {
        end = bytes.len().min(end + step);
        at += escape(&bytes[at..end], end == bytes.len(), &mut |piece| {
            text.push_str(piece);
            true
        });
    }
    text.push('"');
    text
}

fuzz_target!(|data: &[u8]| {
    if let [step, bytes @ ..] = data {
        let whole = escaped(bytes, bytes.len().max(1));
        assert_eq!(
            serde_json::from_str::<String>(&whole).unwrap(),
            String::from_utf8_lossy(bytes)
        );
        assert_eq!(escaped(bytes, usize::from(*step).max(1)), whole);
    }
});
