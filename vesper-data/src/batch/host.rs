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
    inputs: Vec<u32>,
    targets: Vec<u32>,
    positions: Vec<u32>,
    segments: Vec<u32>,
    boundaries: Vec<u32>,
    longest: usize,
    tokens: usize,
    counted: usize,
}

impl HostPackedBatch {
    /// Puts rows of pieces side by side.
    pub(super) fn gather(tokens: &Tokens, seq: usize, rows: &Rows) -> Result<Self> {
        let size = rows.len() * seq;
        let mut window = vec![0; seq + 1];
        let mut batch = Self {
            rows: rows.len(),
            seq,
            inputs: Vec::with_capacity(size),
            targets: Vec::with_capacity(size),
            positions: Vec::with_capacity(size),
            segments: Vec::with_capacity(size),
            boundaries: vec![0],
            longest: 0,
            tokens: 0,
            counted: 0,
        };
        let ignores = tokens.has_ignored();
        for row in 0..rows.len() {
            for (segment, piece) in (1..).zip(rows.row(row)) {
                let window = window.get_mut(..=piece.len).unwrap_or_default();
                tokens.read_stored(piece.start, window)?;
                batch.inputs.extend_from_slice(window.get(..piece.len).unwrap_or_default());
                let targets = window.get_mut(1..).unwrap_or_default();
                batch.counted += piece.len;
                if ignores {
                    batch.counted -= ignore_stored(tokens, piece.start + 1, targets)?;
                }
                batch.targets.extend_from_slice(targets);
                batch.tokens += piece.len;
                batch.end_segment(piece.len, segment);
            }
            let end = (row + 1) * seq;
            let padding = end - batch.inputs.len();
            if padding > 0 {
                batch.inputs.resize(end, 0);
                batch.targets.resize(end, IGNORE);
                batch.end_segment(padding, 0);
            }
        }
        Ok(batch)
    }

    fn end_segment(&mut self, len: usize, segment: u32) {
        self.positions.extend(0..len as u32);
        self.segments.resize(self.inputs.len(), segment);
        self.boundaries.push(self.inputs.len() as u32);
        self.longest = self.longest.max(len);
    }

    /// Places the batch. Where that fails, it can be tried again.
    pub(super) fn place(&mut self, device: &Device) -> Result<PackedBatch> {
        let shape = (self.rows, self.seq);
        let boundaries = self.boundaries.len();
        Ok(PackedBatch {
            inputs: tensor(&mut self.inputs, shape, device)?,
            targets: tensor(&mut self.targets, shape, device)?,
            positions: tensor(&mut self.positions, shape, device)?,
            segments: tensor(&mut self.segments, shape, device)?,
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
