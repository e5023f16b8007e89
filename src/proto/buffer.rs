//! A bounded byte queue.

/// A queue of at most `N` bytes.
#[derive(Debug)]
pub struct Buffer<const N: usize> {
    start: usize,
    end: usize,
    bytes: [u8; N],
}

impl<const N: usize> Default for Buffer<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Buffer<N> {
    /// An empty queue of `N` bytes.
    pub const fn new() -> Self {
        Self {
            bytes: [0; N],
            start: 0,
            end: 0,
        }
    }

    /// The queued bytes.
    pub fn filled(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or(&[])
    }

    /// Whether the queue is empty.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// How many bytes can still be added.
    pub fn free(&self) -> usize {
        N - (self.end - self.start)
    }

    /// Removes the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        self.start = self.end.min(self.start.saturating_add(count));
        if self.is_empty() {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Appends all of `bytes`. Returns false, without appending any, if they do not fit.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let end = self.end.saturating_add(bytes.len());
        match self.bytes.get_mut(self.end..end) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.end = end;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn it_behaves_as_a_queue_whatever_the_order_of_calls() {
        let mut random = 1u32;
        let mut buffer = Buffer::<16>::new();
        let mut model = VecDeque::new();
        for step in 0..20_000u32 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let count = (random >> 24) as usize % 20;
            if random >> 16 & 1 == 0 {
                let bytes = vec![step as u8; count];
                let fits = model.len() + count <= 16;
                assert_eq!(buffer.push(&bytes), fits);
                if fits {
                    model.extend(bytes);
                }
            } else {
                buffer.consume(count);
                model.drain(..count.min(model.len()));
            }
            assert_eq!(buffer.filled(), model.make_contiguous());
            assert_eq!(buffer.free(), 16 - model.len());
        }
    }
}
