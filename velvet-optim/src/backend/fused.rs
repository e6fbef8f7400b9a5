//! The CPU back end: one parallel pass over parameters, gradients and state.
//!
//! The floor is memory traffic: 28 bytes a parameter in f32 (p, m, v are read and written, g is read). All
//! parameters are cut into chunks that one parallel iteration hands to the threads, so that many small tensors
//! cost no more than one large one. Every element's arithmetic is its own and every sum runs over fixed chunks in
//! a fixed order: results have the same bits for any number of threads.

use super::element::{BLOCK, Compute, Grad, Stored};
use super::{Job, Slots};
use crate::rule::{Real, Rule};
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, Var, bail};
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::Cell;

/// Elements a task. 28 bytes each: small against the memory, large against the cost of a task.
const CHUNK: usize = 64 * 1024;

/// Parameters whose storage is borrowed at a time. candle lends a storage for the length of a call, so borrowing
/// many takes a nested call each; this bounds the stack.
const GROUP: usize = 64;

/// A chunk of a parameter with its gradient and state, ready for any thread.
enum Task<'a> {
    F32(Chunk<'a, f32>),
    F64(Chunk<'a, f64>),
    Bf16(Chunk<'a, bf16>),
    F16(Chunk<'a, f16>),
}

struct Chunk<'a, P: Stored> {
    p: &'a mut [P],
    g: Grad<'a>,
    slots: Vec<&'a mut [P::Compute]>,
    rule: &'a dyn Rule,
}

/// A job whose gradient is already borrowed.
struct Prepared<'a> {
    param: &'a Var,
    grad: Grad<'a>,
    rule: &'a dyn Rule,
    slots: &'a mut Slots,
}

pub(super) fn update(jobs: Vec<Job<'_>>) -> Result<()> {
    // candle lends no storage that has no elements: its strides look like overlap.
    let mut jobs: Vec<_> = jobs.into_iter().filter(|job| job.param.elem_count() > 0).collect();
    for group in jobs.chunks_mut(GROUP) {
        let (grads, mut rest): (Vec<&Tensor>, Vec<_>) =
            group.iter_mut().map(|job| (&job.grad, (job.param, job.rule, &mut *job.slots))).unzip();
        let guards: Vec<_> = grads.iter().map(|grad| grad.storage_and_layout()).collect();
        let prepared = guards
            .iter()
            .zip(rest.drain(..))
            .map(|((storage, layout), (param, rule, slots))| {
                Ok(Prepared { param, grad: contiguous(storage, layout)?, rule, slots })
            })
            .collect::<Result<Vec<_>>>()?;
        borrow_all(prepared.into_iter(), Vec::new())?;
    }
    Ok(())
}

/// Borrows the storage of all parameters, one nested call each, and runs the tasks inside the innermost.
fn borrow_all<'a>(mut rest: std::vec::IntoIter<Prepared<'a>>, tasks: Vec<Task<'a>>) -> Result<()> {
    if let Some(next) = rest.next() {
        let param = next.param;
        return param.inplace_op1(&Borrow(Cell::new(Some((next, rest, tasks)))));
    }
    tasks.into_par_iter().for_each(Task::run);
    Ok(())
}

type Pending<'a> = (Prepared<'a>, std::vec::IntoIter<Prepared<'a>>, Vec<Task<'a>>);

struct Borrow<'a>(Cell<Option<Pending<'a>>>);

impl InplaceOp1 for Borrow<'_> {
    fn name(&self) -> &'static str {
        "velvet-step"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((job, rest, mut tasks)) = self.0.take() else { bail!("a step's storage was lent twice") };
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("cannot update a parameter that is not contiguous")
        };
        let (g, rule) = (job.grad, job.rule);
        let range = start..end;
        match (storage, job.slots) {
            (CpuStorage::F32(p), Slots::F32(slots)) => cut(p, range, g, slots, rule, &mut tasks, Task::F32),
            (CpuStorage::F64(p), Slots::F64(slots)) => cut(p, range, g, slots, rule, &mut tasks, Task::F64),
            (CpuStorage::BF16(p), Slots::F32(slots)) => cut(p, range, g, slots, rule, &mut tasks, Task::Bf16),
            (CpuStorage::F16(p), Slots::F32(slots)) => cut(p, range, g, slots, rule, &mut tasks, Task::F16),
            _ => bail!("a parameter's element type does not fit its state"),
        }?;
        borrow_all(rest, tasks)
    }
}

/// Cuts one parameter into chunks.
fn cut<'a, P: Stored>(
    p: &'a mut [P],
    range: std::ops::Range<usize>,
    mut g: Grad<'a>,
    slots: &'a mut [Vec<P::Compute>],
    rule: &'a dyn Rule,
    tasks: &mut Vec<Task<'a>>,
    task: impl Fn(Chunk<'a, P>) -> Task<'a>,
) -> Result<()> {
    let Some(p) = p.get_mut(range) else { bail!("a parameter's layout reaches past its storage") };
    if g.len() != p.len() || slots.iter().any(|slot| slot.len() != p.len()) {
        bail!("a parameter of {} elements does not fit its gradient or state", p.len())
    }
    let mut slots: Vec<_> = slots.iter_mut().map(|slot| slot.chunks_mut(CHUNK)).collect();
    for p in p.chunks_mut(CHUNK) {
        let (head, tail) = g.split_at(p.len());
        g = tail;
        let slots = slots.iter_mut().filter_map(Iterator::next).collect();
        tasks.push(task(Chunk { p, g: head, slots, rule }));
    }
    Ok(())
}

impl Task<'_> {
    fn run(self) {
        match self {
            Self::F32(chunk) => chunk.run(),
            Self::F64(chunk) => chunk.run(),
            Self::Bf16(chunk) => chunk.run(),
            Self::F16(chunk) => chunk.run(),
        }
    }
}

impl<P: Stored> Chunk<'_, P> {
    fn run(mut self) {
        if let Some(g) = P::Compute::gradient(self.g)
            && let Some(p) = P::in_place(self.p)
        {
            P::Compute::apply(self.rule, p, g, &mut self.slots);
            return;
        }
        self.run_converted();
    }

    /// The same for elements that must be converted: block by block, through buffers that stay in the cache.
    fn run_converted(self) {
        let mut p_buffer = [P::Compute::coefficient(0.0); BLOCK];
        let mut g_buffer = [P::Compute::coefficient(0.0); BLOCK];
        let mut slots: Vec<_> = self.slots.into_iter().map(|slot| slot.chunks_mut(BLOCK)).collect();
        let mut g = self.g;
        for p in self.p.chunks_mut(BLOCK) {
            let (head, tail) = g.split_at(p.len());
            g = tail;
            let (p_block, g_block) = (&mut p_buffer[..p.len()], &mut g_buffer[..p.len()]);
            P::load(p, p_block);
            P::Compute::load_gradient(head, g_block);
            let mut slots: Vec<_> = slots.iter_mut().filter_map(Iterator::next).collect();
            P::Compute::apply(self.rule, p_block, g_block, &mut slots);
            P::store(p_block, p);
        }
    }
}

/// The sum of squares of each gradient, accumulated in f64.
pub(super) fn sums_of_squares(grads: &[&Tensor]) -> Result<Vec<f64>> {
    let guards: Vec<_> = grads.iter().map(|grad| grad.storage_and_layout()).collect();
    let mut chunks = Vec::new();
    for (i, (storage, layout)) in guards.iter().enumerate() {
        let mut g = contiguous(storage, layout)?;
        while g.len() > 0 {
            let (head, tail) = g.split_at(CHUNK);
            chunks.push((i, head));
            g = tail;
        }
    }
    let partial: Vec<f64> = chunks.par_iter().map(|&(_, g)| sum_of_squares(g)).collect();
    let mut sums = vec![0.0; grads.len()];
    for (&(i, _), partial) in chunks.iter().zip(&partial) {
        sums[i] += partial;
    }
    Ok(sums)
}

fn sum_of_squares(g: Grad<'_>) -> f64 {
    let mut buffer = [0f32; BLOCK];
    let mut converted = |g: Grad<'_>| {
        let mut rest = g;
        let mut sum = 0.0;
        while rest.len() > 0 {
            let (head, tail) = rest.split_at(BLOCK);
            let block = &mut buffer[..head.len()];
            f32::load_gradient(head, block);
            sum += squares(block);
            rest = tail;
        }
        sum
    };
    match g {
        Grad::F32(g) => squares(g),
        Grad::F64(g) => squares(g),
        Grad::Bf16(_) | Grad::F16(_) => converted(g),
    }
}

fn squares<F: Copy + Into<f64>>(values: &[F]) -> f64 {
    pulp::Arch::new().dispatch(Squares(values))
}

struct Squares<'a, F>(&'a [F]);

impl<F: Copy + Into<f64>> pulp::WithSimd for Squares<'_, F> {
    type Output = f64;

    /// A fixed number of running sums whatever the vector width, so that the bits do not depend on the processor.
    /// They are many because the compiler takes a long row of sums for vectors and a short one for scalars.
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> f64 {
        const LANES: usize = 128;
        let mut sums = [0f64; LANES];
        let (blocks, tail) = self.0.as_chunks::<LANES>();
        for block in blocks {
            for (sum, &x) in sums.iter_mut().zip(block) {
                let x: f64 = x.into();
                *sum += x * x;
            }
        }
        for (sum, &x) in sums.iter_mut().zip(tail) {
            let x: f64 = x.into();
            *sum += x * x;
        }
        sums.iter().sum()
    }
}

/// The elements of a contiguous gradient on the CPU.
fn contiguous<'a>(storage: &'a Storage, layout: &Layout) -> Result<Grad<'a>> {
    let Storage::Cpu(storage) = storage else { bail!("a gradient is not on the CPU") };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("a gradient is not contiguous") };
    match Grad::new(storage, start..end) {
        Some(grad) => Ok(grad),
        None => bail!("a gradient's layout or element type does not fit its storage"),
    }
}
