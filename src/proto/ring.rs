//! A ring buffer for output: the last bytes of several streams, in order.
//!
//! A byte's offset is the number of bytes before it, of all streams. Bytes are stored in records, each of one
//! stream and contiguous in memory; the oldest record is dropped first.

use crate::bytes;
use core::ops::DerefMut;

/// A record's header: its stream, and its length as a u32.
const HEADER: usize = 5;

/// The last bytes of several streams.
pub struct Ring<M> {
    memory: M,
    /// Position of the oldest record. Positions only grow; the index in the memory is the position modulo its
    /// length.
    tail: u64,
    /// Position of the next record.
    head: u64,
    /// The last record's position, and its stream.
    last: Option<(u64, u8)>,
    /// Offset of the first byte kept.
    oldest: u64,
    /// Total number of bytes pushed.
    written: u64,
}

/// A reader's position in a [`Ring`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Position of the record.
    record: u64,
    /// Number of its bytes that were read.
    consumed: usize,
    /// Offset of the next byte.
    offset: u64,
}

impl Cursor {
    /// The position from which the ring must be kept for this reader; see [`Ring::push`].
    pub fn position(&self) -> u64 {
        self.record + self.consumed as u64
    }

    /// Offset of the next byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

impl<M: DerefMut<Target = [u8]>> Ring<M> {
    /// An empty ring. Memory of less than a page is not used.
    pub fn new(memory: M) -> Self {
        Self {
            memory,
            tail: 0,
            head: 0,
            last: None,
            oldest: 0,
            written: 0,
        }
    }

    /// Whether it can keep anything.
    pub fn has_memory(&self) -> bool {
        !self.memory.is_empty()
    }

    /// Total number of bytes pushed.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Offset of the oldest byte that is kept.
    pub fn oldest(&self) -> u64 {
        self.oldest
    }

    fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    fn index(&self, position: u64) -> usize {
        position.checked_rem(self.size()).unwrap_or(0) as usize
    }

    fn byte(&self, position: u64) -> u8 {
        let index = self.index(position);
        self.memory.get(index).copied().unwrap_or(0)
    }

    fn set_byte(&mut self, position: u64, byte: u8) {
        let index = self.index(position);
        if let Some(slot) = self.memory.get_mut(index) {
            *slot = byte;
        }
    }

    fn record(&self, position: u64) -> (u8, usize) {
        let add = |length, at| length << 8 | usize::from(self.byte(position + at));
        (self.byte(position), (1..=4).fold(0, add))
    }

    fn set_record(&mut self, position: u64, stream: u8, length: usize) {
        self.set_byte(position, stream);
        for (at, byte) in (1..).zip((length as u32).to_be_bytes()) {
            self.set_byte(position + at, byte);
        }
    }

    /// Whether output of that stream can be appended to the last record: nothing came after it, and it does not
    /// end at the end of the memory.
    fn continues(&self, stream: u8) -> bool {
        self.last.is_some_and(|(_, last)| last == stream) && self.index(self.head) != 0
    }

    /// Drops the oldest bytes until `wanted` bytes are free, but nothing from position `keep` on.
    fn make_room(&mut self, wanted: u64, keep: u64) {
        loop {
            let missing = wanted.saturating_sub(self.size() - (self.head - self.tail));
            let droppable = self.head.min(keep).saturating_sub(self.tail);
            if missing == 0 || droppable == 0 {
                return;
            }
            let (stream, length) = self.record(self.tail);
            let whole = (HEADER + length) as u64;
            if missing >= length as u64 && droppable >= whole {
                // The last record is gone: the next bytes start a new one.
                self.last = self.last.filter(|(last, _)| *last != self.tail);
                self.tail += whole;
                self.oldest += length as u64;
                continue;
            }
            // The header of the remaining bytes overwrites dropped ones.
            let count = missing.min(droppable).min(length as u64);
            if count == 0 {
                return;
            }
            self.set_record(self.tail + count, stream, length - count as usize);
            if let Some((last, _)) = &mut self.last
                && *last == self.tail
            {
                *last += count;
            }
            self.tail += count;
            self.oldest += count;
        }
    }

    /// The number of bytes that [`push`](Self::push) will accept, or slightly less. 0 if less than half of the
    /// memory is available, as many small pieces cost more than a few large ones.
    pub fn room(&self, keep: u64) -> usize {
        let kept = self.head - keep.max(self.tail).min(self.head);
        match kept > self.size() / 2 {
            true => 0,
            // Another record starts at the end of the memory, and a header is not split.
            false => (self.size() - kept).saturating_sub(3 * HEADER as u64) as usize,
        }
    }

    /// Appends bytes of a stream. Old ones are dropped, but nothing from position `keep` on, so that not all may
    /// fit. Returns the number of bytes appended.
    pub fn push(&mut self, stream: u8, bytes: &[u8], keep: u64) -> usize {
        let mut pushed = 0;
        while let Some(rest @ [_, ..]) = bytes.get(pushed..) {
            let wanted = (rest.len() + HEADER) as u64;
            self.make_room(wanted.min(self.size()), keep);
            let free = (self.size() - (self.head - self.tail)) as usize;
            let header = if self.continues(stream) { 0 } else { HEADER };
            let start = self.index(self.head + header as u64);
            let end = self.memory.len().min(start + free.saturating_sub(header));
            let count = bytes::copy(rest, self.memory.get_mut(start..end).unwrap_or_default());
            if count == 0 {
                break;
            }
            self.commit(stream, count);
            pushed += count;
        }
        pushed
    }

    /// Adds bytes to the stream's record, after they were copied to the memory.
    fn commit(&mut self, stream: u8, count: usize) {
        match self.last {
            Some((position, _)) if self.continues(stream) => {
                let (_, length) = self.record(position);
                self.set_record(position, stream, length + count);
            }
            _ => {
                self.set_record(self.head, stream, count);
                self.last = Some((self.head, stream));
                self.head += HEADER as u64;
            }
        }
        self.head += count as u64;
        self.written += count as u64;
    }

    /// A cursor at that offset, or at the nearest one that is kept.
    pub fn seek(&self, offset: u64) -> Cursor {
        let offset = offset.min(self.written).max(self.oldest);
        let mut cursor = Cursor {
            record: self.tail,
            consumed: 0,
            offset: self.oldest,
        };
        while cursor.offset < offset {
            let (_, length) = self.record(cursor.record);
            let step = (offset - cursor.offset).min(length as u64);
            cursor.offset += step;
            cursor.consumed = step as usize;
            if cursor.offset < offset {
                cursor.record += (HEADER + length) as u64;
                cursor.consumed = 0;
            }
        }
        cursor
    }

    /// The bytes at a cursor: their stream, and as many as are contiguous. `None` if everything was read. A
    /// cursor whose bytes were dropped continues at the oldest byte.
    pub fn read(&self, cursor: &mut Cursor) -> Option<(u8, &[u8])> {
        if cursor.record < self.tail {
            *cursor = self.seek(cursor.offset);
        }
        while cursor.record < self.head {
            let (stream, length) = self.record(cursor.record);
            if cursor.consumed < length {
                let start = self.index(cursor.record + HEADER as u64);
                let bytes = self.memory.get(start + cursor.consumed..start + length)?;
                return Some((stream, bytes));
            }
            let next = cursor.record + (HEADER + length) as u64;
            if next == self.head {
                // More bytes may be appended to it.
                return None;
            }
            cursor.record = next;
            cursor.consumed = 0;
        }
        None
    }

    /// Marks `count` bytes of the last [`read`](Self::read) as consumed.
    pub fn advance(&self, cursor: &mut Cursor, count: usize) {
        cursor.consumed = cursor.consumed.saturating_add(count);
        cursor.offset = cursor.offset.saturating_add(count as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    fn push(ring: &mut Ring<Vec<u8>>, stream: u8, bytes: &[u8], keep: u64) -> usize {
        let room = ring.room(keep);
        let pushed = ring.push(stream, bytes, keep);
        assert!(pushed >= room.min(bytes.len()), "{pushed} of {room}");
        pushed
    }

    fn read_all(ring: &Ring<Vec<u8>>, cursor: &mut Cursor) -> Vec<(u8, u8)> {
        let mut all = vec![];
        while let Some((stream, bytes)) = ring.read(cursor) {
            all.extend(bytes.iter().map(|byte| (stream, *byte)));
            let count = bytes.len();
            ring.advance(cursor, count);
        }
        all
    }

    #[test]
    fn the_last_bytes_are_kept_with_their_streams_and_offsets() {
        let mut random = 5u32;
        let mut ring = Ring::new(vec![0; 256]);
        let mut model = VecDeque::new();
        let mut written = 0u64;
        let mut follower = ring.seek(0);
        let mut late = ring.seek(0);
        let mut followed = vec![];
        let mut all = vec![];
        for step in 0..20_000u32 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let stream = 1 + (random >> 31) as u8;
            let count = (random >> 20) as usize % 40;
            let bytes = vec![step as u8; count];
            assert_eq!(push(&mut ring, stream, &bytes, u64::MAX), count);
            model.extend(bytes.iter().map(|byte| (stream, *byte)));
            all.extend(bytes.iter().map(|byte| (stream, *byte)));
            written += count as u64;
            assert_eq!(ring.written(), written);
            let kept = (written - ring.oldest()) as usize;
            assert!(written < 200 || kept >= 32, "{kept}");
            model.drain(..model.len() - kept);
            let mut cursor = ring.seek(0);
            assert_eq!(cursor.offset(), ring.oldest());
            assert_eq!(model, read_all(&ring, &mut cursor));
            // Any offset there is can be read from.
            let offset = ring.oldest() + u64::from(random >> 16) % (kept as u64 + 1);
            let mut cursor = ring.seek(offset);
            assert_eq!(cursor.offset(), offset);
            let behind = (offset - ring.oldest()) as usize;
            assert_eq!(
                read_all(&ring, &mut cursor),
                model.iter().skip(behind).copied().collect::<Vec<_>>()
            );
            followed.extend(read_all(&ring, &mut follower));
            // One that reads a few bytes now and then loses some, and reads none twice.
            if let Some((_, bytes)) = ring.read(&mut late) {
                let count = bytes.len().min(3);
                let expected = all
                    .iter()
                    .skip(late.offset() as usize)
                    .map(|(_, byte)| *byte);
                assert!(expected.take(count).eq(bytes[..count].iter().copied()));
                ring.advance(&mut late, count);
            }
        }
        assert_eq!(followed, all);
    }

    #[test]
    fn bytes_that_a_reader_needs_are_not_overwritten() {
        let mut ring = Ring::new(vec![0; 256]);
        let mut cursor = ring.seek(0);
        let mut written = 0;
        for _ in 0..100 {
            // One long record, which goes as it is read.
            written += push(&mut ring, 1, &[3; 90], cursor.position());
            let (_, bytes) = ring.read(&mut cursor).unwrap();
            let count = bytes.len().min(70);
            ring.advance(&mut cursor, count);
        }
        assert!(written > 6000, "{written}");
        let mut ring = Ring::new(vec![0; 256]);
        let mut cursor = ring.seek(0);
        let pushed = push(&mut ring, 1, &[7; 1000], cursor.position());
        assert!((150..256).contains(&pushed), "{pushed}");
        assert_eq!(ring.oldest(), 0);
        assert_eq!(read_all(&ring, &mut cursor).len(), pushed);
        // The record that is read may be continued, and so is still the reader's.
        push(&mut ring, 2, &[8; 1], u64::MAX);
        assert_eq!(read_all(&ring, &mut cursor), [(2, 8)]);
        assert!(push(&mut ring, 1, &[9; 10], cursor.position()) > 0);
    }

    #[test]
    fn an_overtaken_reader_continues_at_the_oldest_byte() {
        let mut ring = Ring::new(vec![0; 128]);
        let mut cursor = ring.seek(0);
        push(&mut ring, 1, &[1; 500], u64::MAX);
        let lost = ring.oldest();
        assert!(lost > 300);
        assert_eq!(read_all(&ring, &mut cursor).len() as u64, 500 - lost);
    }

    #[test]
    fn an_offset_beyond_the_end_is_the_end() {
        let mut ring = Ring::new(vec![0; 128]);
        push(&mut ring, 1, b"abc", u64::MAX);
        let mut cursor = ring.seek(99);
        assert_eq!((cursor.offset(), ring.read(&mut cursor)), (3, None));
        push(&mut ring, 2, b"d", u64::MAX);
        assert_eq!(ring.read(&mut cursor), Some((2, &b"d"[..])));
    }

    #[test]
    fn no_memory_keeps_nothing() {
        let mut ring = Ring::new(vec![]);
        assert_eq!((ring.room(u64::MAX), ring.push(1, b"x", u64::MAX)), (0, 0));
        assert_eq!(ring.seek(5), Cursor::default());
    }
}
