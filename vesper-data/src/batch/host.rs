//! Batches in the memory of the host, before they are placed on a device.

use candle_core::{Device, Shape, Tensor};

use super::pack::Rows;
use super::{Batch, PackedBatch};
use crate::error::Result;
use crate::tokens::{IGNORE, Tokens};

/// A [`Batch`] that is not on its device yet.
#[derive(Debug)]
pub struct HostBatch {
    rows: usize,
    seq: usize,
    inputs: Vec<u32>,
    targets: Vec<u32>,
    counted: usize,
}

impl HostBatch {
    /// Puts windows `indices` side by side; window `i` covers tokens `i * seq ..= (i + 1) * seq`.
    pub(super) fn gather(tokens: &Tokens, seq: usize, indices: &[usize]) -> Result<Self> {
        let mut window = vec![0; seq + 1];
        let mut inputs: Vec<u32> = Vec::with_capacity(indices.len() * seq);
        let mut targets: Vec<u32> = Vec::with_capacity(indices.len() * seq);
        let mut ignored = 0;
        for &index in indices {
            let start = index * seq;
            tokens.read_into(start, &mut window)?;
            inputs.extend_from_slice(window.get(..seq).unwrap_or_default());
            let row = window.get_mut(1..).unwrap_or_default();
            ignored += ignore(tokens, start + 1, row)?;
            targets.extend_from_slice(row);
        }
        Ok(Self { rows: indices.len(), seq, counted: targets.len() - ignored, inputs, targets })
    }

    /// Places the batch. Where that fails, it can be tried again.
    pub(super) fn place(&mut self, device: &Device) -> Result<Batch> {
        let shape = (self.rows, self.seq);
        Ok(Batch {
            inputs: tensor(&mut self.inputs, shape, device)?,
            targets: tensor(&mut self.targets, shape, device)?,
            counted: self.counted,
        })
    }
}

/// A [`PackedBatch`] that is not on its device yet.
#[derive(Debug)]
pub struct HostPackedBatch {
    rows: usize,
    seq: usize,
    /// Inputs, targets, positions and segments of all rows, one behind the other: one piece of memory, which an
    /// allocator keeps at hand from one batch to the next, and one transfer to a device.
    numbers: Vec<u32>,
    boundaries: Vec<u32>,
    longest: usize,
    tokens: usize,
    counted: usize,
}

impl HostPackedBatch {
    /// Puts rows of pieces side by side.
    pub(super) fn gather(tokens: &Tokens, seq: usize, rows: &Rows) -> Result<Self> {
        let size = rows.len() * seq;
        let mut numbers = Vec::with_capacity(4 * size);
        // What follows the inputs of each piece.
        let mut last = Vec::with_capacity(rows.pieces().len());
        let mut window = vec![0; seq + 1];
        for row in 0..rows.len() {
            for piece in rows.row(row) {
                let window = window.get_mut(..=piece.len).unwrap_or_default();
                tokens.read_stored(piece.start, window)?;
                let (next, inputs) = window.split_last().unwrap_or((&0, &[]));
                numbers.extend_from_slice(inputs);
                last.push(*next);
            }
            numbers.resize((row + 1) * seq, 0);
        }
        let mut batch = Self {
            rows: rows.len(),
            seq,
            numbers,
            boundaries: Vec::with_capacity(rows.pieces().len() + rows.len() + 1),
            longest: 0,
            tokens: 0,
            counted: 0,
        };
        batch.targets(tokens, rows, &last)?;
        batch.places(rows);
        Ok(batch)
    }

    /// Appends the targets, which are the inputs one further.
    fn targets(&mut self, tokens: &Tokens, rows: &Rows, last: &[u32]) -> Result<()> {
        let size = self.numbers.len();
        let ignores = tokens.has_ignored();
        let mut last = last.iter();
        for row in 0..rows.len() {
            let mut at = row * self.seq;
            for piece in rows.row(row) {
                self.numbers.extend_from_within(at + 1..at + piece.len);
                self.numbers.extend(last.next());
                self.tokens += piece.len;
                self.counted += piece.len;
                if ignores {
                    let targets = self.numbers.get_mut(size + at..).unwrap_or_default();
                    self.counted -= ignore_stored(tokens, piece.start + 1, targets)?;
                }
                at += piece.len;
            }
            self.numbers.resize(size + (row + 1) * self.seq, IGNORE);
        }
        Ok(())
    }

    /// Appends the positions and the segments, and the boundaries between these.
    fn places(&mut self, rows: &Rows) {
        let size = self.rows * self.seq;
        self.boundaries.push(0);
        for row in 0..rows.len() {
            let mut end = row * self.seq;
            let padding = self.seq - rows.row(row).iter().map(|piece| piece.len).sum::<usize>();
            for len in rows.row(row).iter().map(|piece| piece.len).chain((padding > 0).then_some(padding)) {
                self.numbers.extend(0..len as u32);
                self.longest = self.longest.max(len);
                end += len;
                self.boundaries.push(end as u32);
            }
        }
        for row in 0..rows.len() {
            let mut end = 3 * size + row * self.seq;
            for (segment, piece) in (1..).zip(rows.row(row)) {
                end += piece.len;
                self.numbers.resize(end, segment);
            }
            self.numbers.resize(3 * size + (row + 1) * self.seq, 0);
        }
    }

    /// Places the batch. Where that fails, it can be tried again.
    pub(super) fn place(&mut self, device: &Device) -> Result<PackedBatch> {
        let boundaries = self.boundaries.len();
        let numbers = tensor(&mut self.numbers, (4, self.rows, self.seq), device)?;
        Ok(PackedBatch {
            inputs: numbers.get(0)?,
            targets: numbers.get(1)?,
            positions: numbers.get(2)?,
            segments: numbers.get(3)?,
            boundaries: tensor(&mut self.boundaries, boundaries, device)?,
            longest: self.longest,
            tokens: self.tokens,
            counted: self.counted,
        })
    }
}

/// Puts [`IGNORE`] in the place of the targets from position `start` on that the loss leaves out; counts them.
fn ignore(tokens: &Tokens, start: usize, targets: &mut [u32]) -> Result<usize> {
    let mut count = 0;
    tokens.for_each_ignored(start..start + targets.len(), |range| {
        count += range.len();
        targets.get_mut(range.start - start..range.end - start).unwrap_or_default().fill(IGNORE);
    })?;
    Ok(count)
}

/// The same for positions in what the tokens are a view of.
fn ignore_stored(tokens: &Tokens, start: usize, targets: &mut [u32]) -> Result<usize> {
    let mut count = 0;
    tokens.for_each_ignored_stored(start..start + targets.len(), &mut |range| {
        count += range.len();
        targets.get_mut(range.start - start..range.end - start).unwrap_or_default().fill(IGNORE);
    })?;
    Ok(count)
}

/// On a CPU the numbers become the tensor's; elsewhere they are copied, and stay for another attempt.
fn tensor(numbers: &mut Vec<u32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    Ok(if device.is_cpu() {
        Tensor::from_vec(std::mem::take(numbers), shape.into(), device)?
    } else {
        Tensor::from_slice(numbers, shape.into(), device)?
    })
}
