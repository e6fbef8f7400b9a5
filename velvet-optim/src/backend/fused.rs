//! The CPU back end: one parallel pass over parameters, gradients and state.
//!
//! The floor is memory traffic: 28 bytes a parameter in f32 (p, m, v are read and written, g is read). All
//! parameters are cut into chunks that one parallel iteration hands to the threads, so that many small tensors
//! cost no more than one large one. Every element's arithmetic is its own and every sum runs over fixed chunks in
//! a fixed order: results have the same bits for any number of threads.

use super::chunk::{self, CHUNK, Chunk, Settings};
use super::element::Grad;
use super::{Job, Measured, sums};
use crate::error::Result;
use crate::state::Slot;
use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor, Var, bail};
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Parameters whose storage is borrowed at a time. candle lends a storage for the length of a call, so borrowing
/// many takes a nested call each; this bounds the stack.
const GROUP: usize = 64;

/// A job whose gradient is already borrowed.
struct Prepared<'a> {
    param: &'a Var,
    grad: Grad<'a>,
    slots: &'a mut [Slot],
    settings: Settings,
}

/// What tasks leave: the position of a job and what a part of it measured.
type Results = Mutex<Vec<(usize, Measured)>>;

pub(super) fn update(jobs: Vec<(usize, Job<'_>)>, measured: &mut [Measured]) -> Result<()> {
    // candle lends no storage that has no elements: its strides look like overlap.
    let mut jobs: Vec<_> = jobs.into_iter().filter(|(_, job)| job.param.elem_count() > 0).collect();
    for group in jobs.chunks_mut(GROUP) {
        let results = Results::default();
        let (grads, rest): (Vec<&Tensor>, Vec<_>) = group
            .iter_mut()
            .map(|(at, job)| {
                let settings = Settings {
                    at: *at,
                    step: job.step,
                    sparse_row: job.sparse_row.filter(|&row| row > 0),
                    rounding: job.rounding,
                    measure: job.measure,
                };
                (&job.grad, (job.param, &mut *job.slots, settings))
            })
            .unzip();
        let guards: Vec<_> = grads.iter().map(|grad| grad.storage_and_layout()).collect();
        let prepared = guards
            .iter()
            .zip(rest)
            .map(|((storage, layout), (param, slots, settings))| {
                Ok(Prepared { param, grad: contiguous(storage, layout)?, slots, settings })
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        borrow_all(prepared.into_iter(), Vec::new(), &results)?;
        for (at, part) in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            if let Some(sum) = measured.get_mut(at) {
                *sum += part;
            }
        }
    }
    Ok(())
}

/// Borrows the storage of all parameters, one nested call each, and runs the tasks inside the innermost.
fn borrow_all<'a>(
    mut rest: std::vec::IntoIter<Prepared<'a>>,
    tasks: Vec<Task<'a>>,
    results: &'a Results,
) -> candle_core::Result<()> {
    if let Some(next) = rest.next() {
        return next.param.inplace_op1(&Borrow(Cell::new(Some((next, rest, tasks))), results));
    }
    let measured = run_all(tasks);
    *results.lock().unwrap_or_else(PoisonError::into_inner) = measured;
    Ok(())
}

fn run_all(mut tasks: Vec<Task<'_>>) -> Vec<(usize, Measured)> {
    if tasks.iter().any(|task| task.settings().step.wants_alignment()) {
        let counts: Vec<(usize, [u64; 2])> =
            tasks.par_iter().map(|task| (task.settings().at, task.aligned())).collect();
        let mut sums: HashMap<usize, [u64; 2]> = HashMap::new();
        for (at, [aligned, moving]) in counts {
            let sum = sums.entry(at).or_default();
            *sum = [sum[0] + aligned, sum[1] + moving];
        }
        for task in &mut tasks {
            let settings = task.settings_mut();
            let [aligned, moving] = sums.get(&settings.at).copied().unwrap_or_default();
            settings.step.set_alignment(aligned, moving);
        }
    }
    tasks.into_par_iter().map(Task::run).collect()
}

type Pending<'a> = (Prepared<'a>, std::vec::IntoIter<Prepared<'a>>, Vec<Task<'a>>);

struct Borrow<'a>(Cell<Option<Pending<'a>>>, &'a Results);

impl InplaceOp1 for Borrow<'_> {
    fn name(&self) -> &'static str {
        "velvet-step"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((job, rest, mut tasks)) = self.0.take() else { bail!("a step's storage was lent twice") };
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("cannot update a parameter that is not contiguous")
        };
        let range = start..end;
        match storage {
            CpuStorage::F32(p) => {
                chunk::cut(p, range, job.grad, job.slots, job.settings, &mut tasks, Task::F32)
            }
            CpuStorage::F64(p) => {
                chunk::cut(p, range, job.grad, job.slots, job.settings, &mut tasks, Task::F64)
            }
            CpuStorage::BF16(p) => {
                chunk::cut(p, range, job.grad, job.slots, job.settings, &mut tasks, Task::Bf16)
            }
            CpuStorage::F16(p) => {
                chunk::cut(p, range, job.grad, job.slots, job.settings, &mut tasks, Task::F16)
            }
            _ => bail!("a parameter's element type has no update"),
        }?;
        borrow_all(rest, tasks, self.1)
    }
}

/// A chunk of a parameter of any type.
enum Task<'a> {
    F32(Chunk<'a, f32>),
    F64(Chunk<'a, f64>),
    Bf16(Chunk<'a, bf16>),
    F16(Chunk<'a, f16>),
}

impl Task<'_> {
    fn run(self) -> (usize, Measured) {
        (
            self.settings().at,
            match self {
                Self::F32(chunk) => chunk.run(),
                Self::F64(chunk) => chunk.run(),
                Self::Bf16(chunk) => chunk.run(),
                Self::F16(chunk) => chunk.run(),
            },
        )
    }

    fn aligned(&self) -> [u64; 2] {
        match self {
            Self::F32(chunk) => chunk.aligned(),
            Self::F64(chunk) => chunk.aligned(),
            Self::Bf16(chunk) => chunk.aligned(),
            Self::F16(chunk) => chunk.aligned(),
        }
    }

    fn settings(&self) -> &Settings {
        match self {
            Self::F32(chunk) => &chunk.settings,
            Self::F64(chunk) => &chunk.settings,
            Self::Bf16(chunk) => &chunk.settings,
            Self::F16(chunk) => &chunk.settings,
        }
    }

    fn settings_mut(&mut self) -> &mut Settings {
        match self {
            Self::F32(chunk) => &mut chunk.settings,
            Self::F64(chunk) => &mut chunk.settings,
            Self::Bf16(chunk) => &mut chunk.settings,
            Self::F16(chunk) => &mut chunk.settings,
        }
    }
}

/// The elements of a contiguous gradient on the CPU.
fn contiguous<'a>(storage: &'a Storage, layout: &Layout) -> candle_core::Result<Grad<'a>> {
    let Storage::Cpu(storage) = storage else { bail!("a gradient is not on the CPU") };
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("a gradient is not contiguous") };
    match Grad::new(storage, start..end) {
        Some(grad) => Ok(grad),
        None => bail!("a gradient's layout or element type does not fit its storage"),
    }
}

/// The sum of squares of each tensor, accumulated in f64.
pub(super) fn sums_of_squares(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    let guards: Vec<_> = tensors.iter().map(|tensor| tensor.storage_and_layout()).collect();
    let mut chunks = Vec::new();
    for (i, (storage, layout)) in guards.iter().enumerate() {
        let mut g = contiguous(storage, layout)?;
        while g.len() > 0 {
            let (head, tail) = g.split_at(CHUNK);
            chunks.push((i, head));
            g = tail;
        }
    }
    let partial: Vec<f64> = chunks.par_iter().map(|&(_, g)| sums::of_squares(g)).collect();
    let mut sums = vec![0.0; tensors.len()];
    for (&(i, _), partial) in chunks.iter().zip(&partial) {
        sums[i] += partial;
    }
    Ok(sums)
}
