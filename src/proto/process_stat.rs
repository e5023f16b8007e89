//! /proc/PID/stat (proc_pid_stat(5)).

use crate::bytes::find;

/// A process's name, and the letter of its state: `71 (cat) S 1 71 …`. The process can choose the name, which
/// may contain parentheses, so it ends at the last one.
pub fn parse(text: &[u8]) -> Option<(&[u8], u8)> {
    let start = find(text, b'(')? + 1;
    let end = text.iter().rposition(|byte| *byte == b')')?;
    Some((text.get(start..end)?, *text.get(end + 2)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_contain_parentheses() {
        assert_eq!(parse(b"71 (cat) S 1 71 71"), Some((&b"cat"[..], b'S')));
        assert_eq!(
            parse(b"71 (a) R (b c) D 1 71"),
            Some((&b"a) R (b c"[..], b'D'))
        );
        for torn in ["", "71", "71 (cat", "71 (cat)", "71 (cat) ", "71 )cat("] {
            assert_eq!(parse(torn.as_bytes()), None, "{torn}");
        }
    }
}
