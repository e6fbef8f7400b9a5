//! Matrices to blocks.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::policy::fits;
use super::{BlockMatrix, BlockType, Policy, Report, TensorReport, Weight, from_bytes};
use crate::hf::layout::{Entry, Part};
use crate::{ModelError, Result};

/// Values that are quantised at a time.
const CHUNK: usize = 1 << 18;

/// Turns one matrix after the other into blocks, and keeps account.
pub(crate) struct Quantiser<'a> {
    policy: &'a Policy,
    tied: bool,
    /// Whether each of the policy's patterns has fitted a matrix.
    fitted: Vec<bool>,
    tensors: Vec<TensorReport>,
}

impl<'a> Quantiser<'a> {
    pub(crate) fn new(policy: &'a Policy, tied: bool) -> Self {
        Self { policy, tied, fitted: vec![false; policy.patterns().len()], tensors: Vec::new() }
    }

    /// A tensor that stays as it is.
    pub(crate) fn keep(&mut self, entry: &Entry, tensor: &Tensor) {
        let bytes = tensor.elem_count() * tensor.dtype().size_in_bytes();
        self.tensors.push(TensorReport {
            name: entry.name.clone(),
            shape: entry.shape.clone(),
            asked: None,
            got: BlockType::F32,
            bytes_before: bytes,
            bytes: BlockType::F32.bytes(tensor.elem_count()),
            error: 0.0,
        });
    }

    /// The parts of a matrix, each in its type.
    pub(crate) fn quantise(&mut self, entry: &Entry, matrix: &Tensor) -> Result<Weight> {
        let mut groups = Vec::with_capacity(entry.parts.len());
        for (part, tensor) in entry.parts.iter().zip(entry.unpack(matrix)?) {
            for (pattern, fitted) in self.policy.patterns().iter().zip(&mut self.fitted) {
                *fitted |= fits(&pattern.0, &part.name);
            }
            groups.push(Arc::new(self.part(part, &tensor)?));
        }
        if groups.iter().all(|group| BlockType::of(group.dtype()) == Some(BlockType::F32)) {
            return Ok(Weight::Plain(matrix.detach()));
        }
        Ok(Weight::Blocks(BlockMatrix::new(groups)?))
    }

    fn part(&mut self, part: &Part, tensor: &Tensor) -> Result<QTensor> {
        let asked = self.policy.choose(&part.name, self.tied);
        let (rows, columns) = tensor.dims2()?;
        let got = asked.fitting(columns);
        let values = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let wrong = |what: &str| ModelError::NotQuantisable { reason: format!("{} has {what}", part.name) };
        let square = square(&values)?;
        if !square.is_finite() {
            return Err(wrong("values that are not finite"));
        }
        let bytes = blocks(&values, got)?;
        let blocks = from_bytes(&bytes, got, rows, columns, &Device::Cpu)?;
        let difference = self::square(&(&values - blocks.dequantize(&Device::Cpu)?)?)?;
        if !difference.is_finite() {
            return Err(wrong(&format!("values that are too large for {got}")));
        }
        let error = if square > 0.0 { (difference / square).sqrt() } else { 0.0 };
        self.tensors.push(TensorReport {
            name: part.name.clone(),
            shape: vec![rows, columns],
            asked: Some(asked),
            got,
            bytes_before: tensor.elem_count() * tensor.dtype().size_in_bytes(),
            bytes: bytes.len(),
            error,
        });
        if tensor.device().is_cpu() {
            return Ok(blocks);
        }
        Ok(from_bytes(&bytes, got, rows, columns, tensor.device())?)
    }

    /// What became of each tensor.
    pub(crate) fn report(self) -> Result<Report> {
        let unused = self.policy.patterns().iter().zip(&self.fitted).find(|(_, fitted)| !**fitted);
        if let Some(((pattern, _), _)) = unused {
            let reason = format!("the pattern `{pattern}` fits none of its matrices");
            return Err(ModelError::NotQuantisable { reason });
        }
        Ok(Report { tensors: self.tensors })
    }
}

/// The blocks' bytes, made of some rows at a time by all threads.
fn blocks(values: &Tensor, block: BlockType) -> Result<Vec<u8>> {
    let (rows, columns) = values.dims2()?;
    let step = CHUNK.div_ceil(columns.max(1)).max(1);
    let starts: Vec<usize> = (0..rows).step_by(step).collect();
    let chunks = starts
        .into_par_iter()
        .map(|start| {
            // A copy: candle quantises all of a storage, not the part of it that a view sees.
            let own = values.narrow(0, start, step.min(rows - start))?.force_contiguous()?;
            Ok(QTensor::quantize(&own, block.ggml())?.data()?.into_owned())
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(chunks.concat())
}

/// The sum of the squares, added in f64: f32 would lose the small ones.
fn square(values: &Tensor) -> Result<f64> {
    let rows = values.sqr()?.sum(1)?.to_vec1::<f32>()?;
    Ok(rows.into_iter().map(f64::from).sum())
}
