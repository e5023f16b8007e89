//! Pseudo-random bytes for transfer tests, reproducible from their seed: received bytes are compared with
//! those sent.

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

/// Bytes generated and compared at once.
const PIECE: usize = 1 << 20;

/// A stream of bytes (xorshift64).
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            piece.copy_from_slice(&self.0.to_le_bytes()[..piece.len()]);
        }
    }
}

/// The first `size` bytes of the stream with this seed.
pub fn bytes(size: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Noise(seed).fill(&mut bytes);
    bytes
}

/// Sends the first `left` bytes of the stream with this seed.
pub fn send(stream: &mut impl Write, mut left: u64, seed: u64) -> Result<()> {
    let (mut noise, mut piece) = (Noise(seed), vec![0; PIECE]);
    while left > 0 {
        noise.fill(&mut piece);
        let size = piece.len().min(usize::try_from(left)?);
        stream.write_all(&piece[..size])?;
        left -= size as u64;
    }
    Ok(())
}

/// Reads `left` bytes, and fails unless they are those of the stream with this seed.
pub fn expect(stream: &mut impl Read, mut left: u64, seed: u64) -> Result<()> {
    let (mut noise, mut piece, mut read) = (Noise(seed), vec![0; PIECE], vec![0; PIECE]);
    while left > 0 {
        noise.fill(&mut piece);
        let size = piece.len().min(usize::try_from(left)?);
        stream
            .read_exact(&mut read[..size])
            .with_context(|| format!("{left} bytes before the end"))?;
        ensure!(
            read[..size] == piece[..size],
            "other bytes, {left} before the end"
        );
        left -= size as u64;
    }
    Ok(())
}
