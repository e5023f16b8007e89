//! HTTP requests and chunked bodies: however the bytes are cut, the same requests come out, each
//! within its limits.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use proto::http::{BODY, BUFFER, Progress, Reader, Status, Style, Target};

#[derive(Debug, PartialEq)]
enum Answer {
    Request(Target, Style, Vec<u8>),
    Refused(Status),
}

thread_local! {
    static MEMORY: RefCell<Vec<u8>> = RefCell::new(vec![0; BUFFER]);
}

fn answers(bytes: &[u8], step: usize) -> Vec<Answer> {
    MEMORY.with_borrow_mut(|buffer| {
        let (mut filled, mut reader, mut answers) = (0, Reader::default(), vec![]);
        for piece in bytes.chunks(step) {
            buffer[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
            loop {
                let before = filled;
                let progress = reader.advance(buffer, &mut filled);
                assert!(filled <= before);
                match progress {
                    Progress::More | Progress::Continue => break,
                    Progress::Ready => {
                        let body = reader.body();
                        let end = body.end;
                        assert!(end <= filled);
                        assert!(body.len() <= BODY);
                        let body = buffer[body].to_vec();
                        answers.push(Answer::Request(reader.target, reader.style, body));
                        buffer.copy_within(end..filled, 0);
                        filled -= end;
                        reader = Reader::default();
                    }
                    Progress::Refused(refusal) => {
                        answers.push(Answer::Refused(refusal.status()));
                        return answers;
                    }
                }
            }
        }
        answers
    })
}

// The first byte says how the rest is cut.
fuzz_target!(|data: &[u8]| {
    if let [step, bytes @ ..] = data {
        let whole = answers(bytes, usize::MAX);
        assert_eq!(answers(bytes, 1), whole);
        assert_eq!(answers(bytes, usize::from(*step).max(1)), whole);
    }
});
