//! The back end in candle operations: any device, any speed. It is the specification of the others.

use super::{Job, Measured, Products, Rounding};
use crate::error::Result;
use crate::rounding;
use crate::rule::{OrthogonalStep, Step};
use crate::state::{Data, MASTER, Slot, dtype};
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

/// A matrix whose direction waits to be orthogonalised together with all others of its shape.
struct Matrix<'a> {
    at: usize,
    job: Job<'a>,
    step: OrthogonalStep,
    p: Tensor,
    g: Tensor,
    /// (rows, cols)
    direction: Tensor,
}

pub(super) fn update(jobs: Vec<(usize, Job<'_>)>, measured: &mut [Measured]) -> Result<()> {
    let mut matrices = Vec::new();
    for (at, mut job) in jobs {
        // Empty tensors have no update, and some devices refuse to launch nothing.
        if job.param.elem_count() == 0 {
            continue;
        }
        let dtype = dtype(job.param.dtype());
        let g = job.grad.detach().to_dtype(dtype)?;
        let mut state = tensors(job.slots)?;
        let master = if has_master(job.slots) { state.pop() } else { None };
        let p = match master {
            Some(master) => master,
            // Detached: the new value must not drag the history of the old one along.
            None => job.param.as_detached_tensor().to_dtype(dtype)?,
        };
        if let Step::Orthogonal(step) = job.step {
            let [momentum, ..] = state.as_mut_slice() else {
                return Err(candle_core::Error::Msg("a matrix has no momentum".to_owned()).into());
            };
            let mut average = as_matrix(momentum)?;
            let direction = step.direction(&as_matrix(&g)?, &mut average)?;
            *momentum = average.reshape(momentum.shape())?;
            store(job.slots, state);
            matrices.push(Matrix { at, job, step, p, g, direction });
        } else {
            let new = elementwise(&mut job, &p, &g, &mut state)?;
            store(job.slots, state);
            finish(&mut job, &p, &g, &new, &mut measured[at])?;
        }
    }
    orthogonal(matrices, measured)
}

fn elementwise(job: &mut Job<'_>, p: &Tensor, g: &Tensor, state: &mut [Tensor]) -> Result<Tensor> {
    let rows = job.sparse_row.filter(|&row| row > 0).map(|row| (g.elem_count() / row, row));
    // (rows, 1): whether the row has a gradient
    let moves = |rows: (usize, usize)| {
        g.reshape(rows)?.ne(0.0)?.to_dtype(DType::U32)?.sum_keepdim(D::Minus1)?.gt(0u32)
    };
    let moves = rows.map(moves).transpose()?;
    if job.step.wants_alignment()
        && let Some(rule) = job.step.elementwise()
    {
        let aligned = rule.aligned_plain(g, state)?;
        let moving = match (rows, &moves) {
            (Some((_, row)), Some(moves)) => {
                row as u64 * u64::from(moves.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()?)
            }
            _ => g.elem_count() as u64,
        };
        job.step.set_alignment(aligned, moving);
    }
    let Some(rule) = job.step.elementwise() else { return Ok(p.clone()) };
    let before = state.to_vec();
    let new = rule.update_plain(p, g, state)?;
    let (Some(rows), Some(moves)) = (rows, moves) else { return Ok(new) };
    let choose = |new: &Tensor, old: &Tensor| -> candle_core::Result<Tensor> {
        let chosen = moves.broadcast_as(rows)?.where_cond(&new.reshape(rows)?, &old.reshape(rows)?)?;
        chosen.reshape(old.shape())
    };
    for (slot, before) in state.iter_mut().zip(&before) {
        *slot = choose(slot, before)?;
    }
    Ok(choose(&new, p)?)
}

/// Orthogonalises and applies all directions.
fn orthogonal(matrices: Vec<Matrix<'_>>, measured: &mut [Measured]) -> Result<()> {
    let (mut together, alone): (Vec<_>, Vec<_>) = matrices
        .into_iter()
        .partition(|m| super::products(m.direction.device(), m.direction.dtype()).batched);
    // One matrix a thread: small products do not fill several.
    let done = alone.into_par_iter().map(|matrix| {
        let dtype = super::products(matrix.direction.device(), matrix.direction.dtype()).dtype;
        let o = matrix.step.orthogonalise(&matrix.direction, dtype)?;
        Ok((matrix.at, matrix.apply(&o)?))
    });
    for (at, part) in done.collect::<Result<Vec<_>>>()? {
        measured[at] = part;
    }
    while let Some(first) = together.first() {
        let (direction, step) = (first.direction.clone(), first.step);
        let Products { dtype, .. } = super::products(direction.device(), direction.dtype());
        let (batch, others): (Vec<_>, Vec<_>) = together.into_iter().partition(|m| {
            m.direction.dims() == direction.dims()
                && m.direction.dtype() == direction.dtype()
                && m.direction.device().same_device(direction.device())
                && m.step.options == step.options
        });
        together = others;
        let stacked = Tensor::stack(&batch.iter().map(|m| &m.direction).collect::<Vec<_>>(), 0)?;
        let stacked = step.orthogonalise(&stacked, dtype)?;
        for (i, matrix) in batch.into_iter().enumerate() {
            let at = matrix.at;
            measured[at] = matrix.apply(&stacked.get(i)?)?;
        }
    }
    Ok(())
}

impl Matrix<'_> {
    /// Updates the parameter by its orthogonalised direction.
    fn apply(mut self, o: &Tensor) -> Result<Measured> {
        let mut state = tensors(self.job.slots)?;
        let end = state.len() - usize::from(has_master(self.job.slots));
        let rest = state.get_mut(1..end).unwrap_or_default();
        let new = self.step.apply(&as_matrix(&self.p)?, o, rest)?.reshape(self.p.shape())?;
        state.truncate(end);
        store(self.job.slots, state);
        let mut measured = Measured::default();
        finish(&mut self.job, &self.p, &self.g, &new, &mut measured)?;
        Ok(measured)
    }
}

/// Writes the new parameter, and its master copy where there is one.
fn finish(job: &mut Job<'_>, p: &Tensor, g: &Tensor, new: &Tensor, measured: &mut Measured) -> Result<()> {
    if job.measure {
        let change = (p - new)?;
        let sum = |t: Tensor| -> Result<f64> {
            Ok(t.to_dtype(super::widest(t.device()))?.sum_all()?.to_dtype(DType::F64)?.to_scalar()?)
        };
        measured.change_sq = sum(change.sqr()?)?;
        measured.weight_sq = sum(p.sqr()?)?;
        measured.descent = sum((g * &change)?)?;
    }
    if has_master(job.slots)
        && let Some(master) = job.slots.last_mut()
    {
        master.data = Data::Tensor(new.clone());
    }
    let stored = job.param.dtype();
    let rounded = match job.rounding {
        Rounding::Stochastic { key } if matches!(stored, DType::BF16 | DType::F16) => {
            let values = new.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            let values = rounding::stochastic(&values, stored, key, 0);
            Tensor::from_vec(values, new.shape(), new.device())?
        }
        _ => new.clone(),
    };
    job.param.set(&rounded.to_dtype(stored)?)?;
    Ok(())
}

fn has_master(slots: &[Slot]) -> bool {
    slots.last().is_some_and(|slot| slot.spec.name == MASTER)
}

/// The state of a parameter on this back end, all of it in tensors.
fn tensors(slots: &[Slot]) -> Result<Vec<Tensor>> {
    slots
        .iter()
        .map(|slot| match &slot.data {
            Data::Tensor(t) => Ok(t.clone()),
            _ => Err(candle_core::Error::Msg("state on the host and elsewhere".to_owned()).bt().into()),
        })
        .collect()
}

fn store(slots: &mut [Slot], state: Vec<Tensor>) {
    for (slot, tensor) in slots.iter_mut().zip(state) {
        slot.data = Data::Tensor(tensor);
    }
}

/// (first dimension, all others)
fn as_matrix(t: &Tensor) -> candle_core::Result<Tensor> {
    t.flatten_from(1)
}

/// One transfer to the host a device, however many tensors there are.
pub(super) fn sums_of_squares(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    let mut sums = vec![0.0; tensors.len()];
    let mut left: Vec<usize> = (0..tensors.len()).filter(|&i| tensors[i].elem_count() > 0).collect();
    while let Some(&first) = left.first() {
        let device = tensors[first].device();
        let (here, others): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|&i| tensors[i].device().same_device(device));
        let scalars = here
            .iter()
            .map(|&i| tensors[i].detach().to_dtype(super::widest(device))?.sqr()?.sum_all())
            .collect::<candle_core::Result<Vec<_>>>()?;
        let values = Tensor::stack(&scalars, 0)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        for (&i, value) in here.iter().zip(values.to_vec1::<f64>()?) {
            sums[i] = value;
        }
        left = others;
    }
    Ok(sums)
}
