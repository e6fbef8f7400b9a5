//! Updates of rules whose elements do not depend on each other, and the passes over gradients.

use super::control::ControlBlock;
use super::launch::{self, blocks, launch, size};
use super::layout::{self, TENSORS, THREADS, Table};
use super::plan::{Plan, Planned};
use crate::error::Result;
use crate::parameter::Parameter;
use candle_core::{CudaDevice, DType, Tensor};
use std::collections::BTreeMap;

/// A parameter with a gradient.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    /// Its position among all parameters.
    pub(super) position: usize,
    pub(super) planned: Planned,
    pub(super) p: u64,
    pub(super) g: u64,
    pub(super) gradient: DType,
    /// Where its matrix begins in a workspace, in units.
    pub(super) at: u32,
}

impl Entry {
    /// With the weights in the place of the gradient.
    pub(super) fn of_weights(&self) -> Self {
        Self { g: self.p, gradient: self.planned.dtype, ..*self }
    }
}

/// The gradients of a step, in types that there are kernels for.
pub(super) struct Gradients {
    entries: Vec<Entry>,
    tensors: Vec<Tensor>,
}

impl Gradients {
    pub(super) fn new(
        device: &CudaDevice,
        plan: &Plan,
        parameters: &[Parameter],
        found: &[(usize, Tensor)],
    ) -> Result<Self> {
        let stream = device.cuda_stream();
        let (mut entries, mut tensors) = (Vec::with_capacity(found.len()), Vec::with_capacity(found.len()));
        for (position, gradient) in found {
            let (Some(parameter), Some(&planned)) = (parameters.get(*position), plan.planned.get(*position))
            else {
                continue;
            };
            if planned.elements == 0 {
                continue; // the driver refuses launches over nothing
            }
            let gradient = if gradient.dtype() == planned.dtype || gradient.dtype() == DType::F32 {
                gradient.clone()
            } else {
                gradient.to_dtype(DType::F32)?
            };
            entries.push(Entry {
                position: *position,
                planned,
                p: launch::address_mut(&parameter.var, &stream)?,
                g: launch::address(&gradient, &stream)?,
                gradient: gradient.dtype(),
                at: 0,
            });
            tensors.push(gradient);
        }
        Ok(Self { entries, tensors })
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// Tells other streams that parameters were written and gradients read, and lets the gradients go.
    pub(super) fn finish(self, device: &CudaDevice, parameters: &[Parameter]) -> Result<()> {
        let stream = device.cuda_stream();
        if stream.context().is_managing_stream_synchronization() {
            for (entry, gradient) in self.entries.iter().zip(&self.tensors) {
                launch::address(gradient, &stream)?;
                if let Some(parameter) = parameters.get(entry.position) {
                    launch::address_mut(&parameter.var, &stream)?;
                }
            }
        }
        Ok(())
    }
}

/// The launches of entries that share a kernel: tables, each with its number of blocks.
pub(super) fn tables<'a>(
    entries: impl Iterator<Item = &'a Entry>,
    blocks: impl Fn(&Planned) -> usize,
) -> Result<Vec<(Box<Table>, u32)>> {
    let entries: Vec<&Entry> = entries.collect();
    entries
        .chunks(TENSORS)
        .map(|entries| {
            let mut table = Box::new(Table::empty());
            let mut total = 0;
            for (i, entry) in entries.iter().enumerate() {
                let row =
                    (table.p.get_mut(i), table.g.get_mut(i), table.tensor.get_mut(i), table.at.get_mut(i));
                let (Some(p), Some(g), Some(tensor), Some(at)) = row else { continue };
                (*p, *g, *tensor, *at) = (entry.p, entry.g, size(entry.position)?, entry.at);
                total += blocks(&entry.planned);
                if let Some(end) = table.first.get_mut(i + 1) {
                    *end = size(total)?;
                }
            }
            table.count = size(entries.len())?;
            Ok((table, size(total)?))
        })
        .collect()
}

/// Entries that share a kernel.
pub(super) type Group<'a> = Vec<&'a Entry>;

/// Entries by what their kernels differ in.
pub(super) fn grouped<'a, K: Ord>(
    entries: impl Iterator<Item = &'a Entry>,
    key: impl Fn(&Entry) -> Option<K>,
) -> BTreeMap<K, Group<'a>> {
    let mut groups = BTreeMap::<K, Group<'a>>::new();
    for entry in entries {
        if let Some(key) = key(entry) {
            groups.entry(key).or_default().push(entry);
        }
    }
    groups
}

/// The entries of each kernel that takes gradients of one type, with its name.
pub(super) fn by_gradient<'a>(
    kernel: &str,
    entries: impl Iterator<Item = &'a Entry>,
) -> impl Iterator<Item = (String, Group<'a>)> {
    grouped(entries, |entry| launch::name(entry.gradient))
        .into_iter()
        .map(move |(gradient, entries)| (format!("{kernel}_{gradient}"), entries))
}

/// Writes the sum of squares of each chunk of the gradients.
pub(super) fn squares<'a>(
    control: &ControlBlock,
    plan: &Plan,
    entries: impl Iterator<Item = &'a Entry>,
) -> Result<()> {
    let (device, params, partials) = (control.device(), plan.params(), control.partials.address);
    for (name, entries) in by_gradient("squares", entries) {
        for (table, count) in tables(entries.into_iter(), Planned::chunks)? {
            launch!(device, ELEMENTWISE, &name, blocks(count, THREADS), &*table, &params, &partials);
        }
    }
    Ok(())
}

/// Notes which rows have a gradient, where the others are left out.
pub(super) fn rows(control: &ControlBlock, plan: &Plan, gradients: &Gradients) -> Result<()> {
    let (device, params) = (control.device(), plan.params());
    let sparse = gradients.entries().filter(|entry| entry.planned.sparse);
    for (name, entries) in by_gradient("rows", sparse) {
        let groups_of_rows = |planned: &Planned| planned.rows().div_ceil(THREADS as usize / 32);
        for (table, count) in tables(entries.into_iter(), groups_of_rows)? {
            launch!(device, ELEMENTWISE, &name, blocks(count, THREADS), &*table, &params);
        }
    }
    Ok(())
}

/// Measures how much of cautious updates points along the gradient.
pub(super) fn align(
    control: &ControlBlock,
    plan: &Plan,
    gradients: &Gradients,
    positions: &[usize],
) -> Result<()> {
    let entries = || gradients.entries().filter(|entry| entry.planned.cautious);
    if entries().next().is_none() {
        return Ok(());
    }
    let (device, params, partials) = (control.device(), plan.params(), control.partials.address);
    let (block, coefficients, codes) = (control.address(), control.coefficients.address, plan.codes());
    for (name, entries) in by_gradient("aligned", entries().filter(|entry| !entry.planned.blockwise)) {
        for (table, count) in tables(entries.into_iter(), Planned::chunks)? {
            let config = blocks(count, THREADS);
            launch!(device, ELEMENTWISE, &name, config, &*table, &block, &params, &coefficients, &partials);
        }
    }
    for (name, entries) in by_gradient("aligned8", entries().filter(|entry| entry.planned.blockwise)) {
        for (table, count) in tables(entries.into_iter(), Planned::chunks)? {
            launch!(
                device,
                BLOCKWISE,
                &name,
                blocks(count, THREADS),
                &*table,
                &block,
                &params,
                &coefficients,
                &codes,
                &partials
            );
        }
    }
    control.finish_aligned(plan, positions)
}

/// Updates the parameters of all rules over elements.
pub(super) fn update(
    control: &ControlBlock,
    plan: &Plan,
    gradients: &Gradients,
    measures: bool,
) -> Result<()> {
    let (device, params, changes) = (control.device(), plan.params(), control.changes.address);
    let (block, coefficients, measure) =
        (control.address(), control.coefficients.address, u32::from(measures));
    let key = |entry: &Entry| {
        let rule = match entry.planned.rule {
            layout::ADAMW => "adamw",
            layout::SGD => "sgd",
            layout::LION => "lion",
            _ => return None,
        };
        let Planned { dtype, blockwise, full, .. } = entry.planned;
        Some((blockwise, measures || full, rule, launch::name(dtype)?, launch::name(entry.gradient)?))
    };
    let codes = plan.codes();
    for ((blockwise, full, rule, dtype, gradient), entries) in grouped(gradients.entries(), key) {
        let bits = if blockwise { "8" } else { "" };
        let name = format!("{rule}{bits}_{dtype}_{gradient}{}", if full { "_full" } else { "" });
        for (table, count) in tables(entries.into_iter(), Planned::chunks)? {
            if blockwise {
                launch!(
                    device,
                    BLOCKWISE,
                    &name,
                    blocks(count, THREADS),
                    &*table,
                    &block,
                    &params,
                    &coefficients,
                    &codes,
                    &changes,
                    &measure
                );
                continue;
            }
            if !full {
                let config = blocks(count, THREADS);
                launch!(device, ELEMENTWISE, &name, config, &*table, &block, &params, &coefficients);
                continue;
            }
            launch!(
                device,
                ELEMENTWISE,
                &name,
                blocks(count, THREADS),
                &*table,
                &block,
                &params,
                &coefficients,
                &changes,
                &measure
            );
        }
    }
    Ok(())
}
