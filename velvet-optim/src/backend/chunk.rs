//! One task of the CPU back end: the update of some consecutive elements of a parameter.

use super::element::{BLOCK, Compute, Grad, Stored};
use super::{Measured, Rounding, sums};
use crate::quantised;
use crate::rule::{Elementwise, Real, Step};
use crate::state::{Data, MASTER, Slot};
use candle_core::{Result, bail};

/// Elements a task. 28 bytes each: small against the memory, large against the cost of a task.
pub(super) const CHUNK: usize = 64 * 1024;

/// The most state arrays that a rule over elements has.
const SLOTS: usize = 2;

/// What all chunks of a parameter share.
#[derive(Clone, Copy)]
pub(super) struct Settings {
    /// The position of the job.
    pub(super) at: usize,
    pub(super) step: Step,
    /// The length of a row, where rows without a gradient are left out.
    pub(super) sparse_row: Option<usize>,
    pub(super) rounding: Rounding,
    pub(super) measure: bool,
}

/// Some consecutive elements of a parameter.
pub(super) struct Chunk<'a, P: Stored> {
    pub(super) settings: Settings,
    /// The position of the first element in the parameter.
    offset: usize,
    p: &'a mut [P],
    g: Grad<'a>,
    slots: Vec<SlotRun<'a, P::Compute>>,
    /// The elements in the precision of the update, where the parameter has less.
    master: Option<&'a mut [P::Compute]>,
}

/// The same elements of a state array.
enum SlotRun<'a, C> {
    Full(&'a mut [C]),
    Blockwise { codes: &'a mut [u8], scales: &'a mut [f32], signed: bool },
}

/// Cuts a parameter into chunks.
pub(super) fn cut<'a, P: Stored, T>(
    p: &'a mut [P],
    range: std::ops::Range<usize>,
    mut g: Grad<'a>,
    slots: &'a mut [Slot],
    settings: Settings,
    tasks: &mut Vec<T>,
    task: impl Fn(Chunk<'a, P>) -> T,
) -> Result<()> {
    let Some(p) = p.get_mut(range) else { bail!("a parameter's layout reaches past its storage") };
    if g.len() != p.len() {
        bail!("a parameter of {} elements has a gradient of {}", p.len(), g.len())
    }
    // Rows are not cut where each is looked at; blocks of quantised state never are, as they divide CHUNK.
    let len = settings.sparse_row.map_or(CHUNK, |row| (CHUNK / row).max(1) * row);
    let mut master = None;
    let mut runs = Vec::with_capacity(SLOTS);
    for slot in slots {
        let name = slot.spec.name;
        let fits = slot.spec.shape.iter().product::<usize>() == p.len();
        if !fits {
            bail!("the state array `{name}` does not fit a parameter of {} elements", p.len())
        }
        match &mut slot.data {
            Data::Blockwise(_) if settings.sparse_row.is_some() => bail!("rows do not begin where blocks do"),
            Data::Blockwise(x) => {
                runs.push(Pieces::Blockwise { signed: x.is_signed(), pieces: x.chunks_mut(len) });
            }
            data @ (Data::F32(_) | Data::F64(_) | Data::Tensor(_) | Data::TensorBlocks(_)) => {
                match P::Compute::of(data) {
                    Some(x) if name == MASTER => master = Some(x.chunks_mut(len)),
                    Some(x) => runs.push(Pieces::Full(x.chunks_mut(len))),
                    None => bail!("the state array `{name}` is of another type than its parameter needs"),
                }
            }
        }
    }
    if runs.len() > SLOTS {
        bail!("a rule has {} state arrays, the fused pass takes at most {SLOTS}", runs.len())
    }
    for (i, p) in p.chunks_mut(len).enumerate() {
        let (head, tail) = g.split_at(p.len());
        g = tail;
        let slots = runs.iter_mut().filter_map(Pieces::next).collect();
        let master = master.as_mut().and_then(Iterator::next);
        tasks.push(task(Chunk { settings, offset: i * len, p, g: head, slots, master }));
    }
    Ok(())
}

/// The chunks of a state array that are still to be handed out.
enum Pieces<'a, C> {
    Full(std::slice::ChunksMut<'a, C>),
    Blockwise { signed: bool, pieces: quantised::ChunksMut<'a> },
}

impl<'a, C> Pieces<'a, C> {
    fn next(&mut self) -> Option<SlotRun<'a, C>> {
        match self {
            Self::Full(pieces) => pieces.next().map(SlotRun::Full),
            Self::Blockwise { signed, pieces } => {
                let signed = *signed;
                pieces.next().map(|(codes, scales)| SlotRun::Blockwise { codes, scales, signed })
            }
        }
    }
}

impl<P: Stored> Chunk<'_, P> {
    /// Updates the elements.
    pub(super) fn run(mut self) -> Measured {
        let step = self.settings.step;
        let Some(rule) = step.elementwise() else { return Measured::default() };
        if let Some(measured) = self.run_in_place(rule) {
            return measured;
        }
        let mut buffers = Buffers::new();
        let mut measured = Measured::default();
        match self.settings.sparse_row {
            None => {
                let len = self.p.len();
                self.run_range(rule, 0..len, &mut buffers, &mut measured);
            }
            Some(row) => {
                let mut rest = self.g;
                for start in (0..self.p.len()).step_by(row) {
                    let (head, tail) = rest.split_at(row);
                    rest = tail;
                    let row = start..start + head.len();
                    if !head.is_zero() {
                        self.run_range(rule, row, &mut buffers, &mut measured);
                    } else if self.settings.measure {
                        measured.weight_sq += self.weights(row, &mut buffers.p);
                    }
                }
            }
        }
        measured
    }

    /// The sum of squares of some of the weights, in f64.
    fn weights(&self, range: std::ops::Range<usize>, buffer: &mut [P::Compute; BLOCK]) -> f64 {
        if let Some(master) = &self.master {
            return sums::squares::<P::Compute, _>(&master[range]);
        }
        let mut sum = 0.0;
        for start in range.clone().step_by(BLOCK) {
            let stored = &self.p[start..range.end.min(start + BLOCK)];
            let block = &mut buffer[..stored.len()];
            P::load(stored, block);
            sum += sums::squares::<P::Compute, _>(block);
        }
        sum
    }

    /// The whole chunk at once, where there is a loop for its types and nothing is to be measured.
    fn run_in_place(&mut self, rule: &dyn Elementwise) -> Option<Measured> {
        let plain = self.settings.sparse_row.is_none() && !self.settings.measure && self.master.is_none();
        if !plain {
            return None;
        }
        let mut slices: [&mut [P::Compute]; SLOTS] = [&mut [], &mut []];
        let count = self.slots.len();
        for (slice, slot) in slices.iter_mut().zip(&mut self.slots) {
            let SlotRun::Full(x) = slot else { return None };
            *slice = x;
        }
        rule.update(P::run(self.p, self.g, &mut slices[..count], self.settings.rounding)?);
        Some(Measured::default())
    }

    /// Some of the elements, block by block, through buffers that stay in the cache.
    fn run_range(
        &mut self,
        rule: &dyn Elementwise,
        range: std::ops::Range<usize>,
        buffers: &mut Buffers<P::Compute>,
        measured: &mut Measured,
    ) {
        let Buffers { p: p_buffer, g: g_buffer, slots: slot_buffers } = buffers;
        for start in range.clone().step_by(BLOCK) {
            let block = start..range.end.min(start + BLOCK);
            let len = block.len();
            let (g, g_buffer) = (self.g.range(block.clone()), &mut g_buffer[..len]);
            let mut slices: [&mut [P::Compute]; SLOTS] = [&mut [], &mut []];
            let count = self.slots.len();
            for ((slice, slot), buffer) in slices.iter_mut().zip(&mut self.slots).zip(slot_buffers.iter_mut())
            {
                *slice = slot.open(block.clone(), &mut buffer[..len]);
            }
            let measured = self.settings.measure.then_some(&mut *measured);
            let update = |p: &mut [P::Compute]| {
                P::Compute::apply(rule, p, g, g_buffer, &mut slices[..count], measured);
            };
            let stored = &mut self.p[block.clone()];
            let separate = if let Some(master) = &mut self.master {
                let master = &mut master[block.clone()];
                update(master);
                Some(master)
            } else if let Some(p) = P::in_place(stored) {
                update(p);
                None
            } else {
                let p = &mut p_buffer[..len];
                P::load(stored, p);
                update(p);
                Some(p)
            };
            if let Some(p) = separate {
                match self.settings.rounding {
                    Rounding::Nearest => P::store(p, stored),
                    Rounding::Stochastic { key } => P::store_stochastic(p, stored, key, self.offset + start),
                }
            }
            for (slot, buffer) in self.slots.iter_mut().zip(slot_buffers.iter()) {
                slot.close(block.clone(), &buffer[..len]);
            }
        }
    }

    /// How many elements of the update will have the sign of their gradient, and how many will move at all.
    pub(super) fn aligned(&self) -> [u64; 2] {
        let Some(rule) = self.settings.step.elementwise() else { return [0; 2] };
        let mut buffers = Buffers::new();
        // No element of a row without a gradient has its sign.
        let mut count = 0;
        for start in (0..self.p.len()).step_by(BLOCK) {
            let block = start..self.p.len().min(start + BLOCK);
            let len = block.len();
            P::Compute::load_gradient(self.g.range(block.clone()), &mut buffers.g[..len]);
            let mut slices: [&[P::Compute]; SLOTS] = [&[], &[]];
            for ((slice, slot), buffer) in slices.iter_mut().zip(&self.slots).zip(&mut buffers.slots) {
                *slice = slot.read(block.clone(), &mut buffer[..len]);
            }
            count += P::Compute::count_aligned(rule, &buffers.g[..len], &slices[..self.slots.len()]);
        }
        let moving = match self.settings.sparse_row {
            None => self.p.len(),
            Some(row) => {
                let starts = (0..self.p.len()).step_by(row);
                row * starts.filter(|&start| !self.g.range(start..start + row).is_zero()).count()
            }
        };
        [count, moving as u64]
    }
}

/// A block of everything that an update reads or writes.
struct Buffers<C> {
    p: [C; BLOCK],
    g: [C; BLOCK],
    slots: [[C; BLOCK]; SLOTS],
}

impl<C: Real> Buffers<C> {
    fn new() -> Self {
        let zeros = [C::ZERO; BLOCK];
        Self { p: zeros, g: zeros, slots: [zeros; SLOTS] }
    }
}

impl<C: Compute> SlotRun<'_, C> {
    /// The elements of a block to read and write: the array's own, or copies in `buffer`.
    fn open<'b>(&'b mut self, block: std::ops::Range<usize>, buffer: &'b mut [C]) -> &'b mut [C] {
        match self {
            Self::Full(x) => &mut x[block],
            Self::Blockwise { .. } => {
                self.read(block, buffer);
                buffer
            }
        }
    }

    /// The elements of a block: the array's own, or copies in `buffer`.
    fn read<'b>(&'b self, block: std::ops::Range<usize>, buffer: &'b mut [C]) -> &'b [C] {
        match self {
            Self::Full(x) => &x[block],
            Self::Blockwise { codes, scales, signed } => {
                let scales = &scales[quantised::blocks(&block)];
                C::dequantise(&codes[block], scales, *signed, buffer);
                buffer
            }
        }
    }

    /// Takes back what was changed in a buffer.
    fn close(&mut self, block: std::ops::Range<usize>, buffer: &[C]) {
        if let Self::Blockwise { codes, scales, signed } = self {
            let scales = &mut scales[quantised::blocks(&block)];
            C::quantise(buffer, &mut codes[block], scales, *signed);
        }
    }
}
