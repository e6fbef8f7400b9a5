//! A matrix in blocks, whose rows may be of several types.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{QStorage, QTensor};
use candle_core::{D, Device, Result, Tensor, bail};

use super::BlockType;
use crate::ops::{quantized_embedding, quantized_linear, quantized_product};

/// A matrix (out, in) in blocks; groups of rows one after the other, each of one type. Cloning it copies nothing.
#[derive(Debug, Clone)]
pub(crate) struct BlockMatrix {
    groups: Arc<[Arc<QTensor>]>,
    rows: usize,
    columns: usize,
}

impl BlockMatrix {
    /// The groups' rows after each other; neighbours of one type become one group.
    pub(crate) fn new(groups: Vec<Arc<QTensor>>) -> Result<Self> {
        let mut rows = 0;
        let mut columns = None;
        let mut merged: Vec<Arc<QTensor>> = Vec::with_capacity(groups.len());
        for group in groups {
            let (own, width) = group.shape().dims2()?;
            if *columns.get_or_insert(width) != width {
                bail!("rows of {width} values beside rows of {columns:?}");
            }
            rows += own;
            match merged.last_mut() {
                Some(last) if last.dtype() == group.dtype() => *last = Arc::new(join(last, &group)?),
                _ => merged.push(group),
            }
        }
        let Some(columns) = columns else { bail!("a matrix without rows") };
        Ok(Self { groups: merged.into(), rows, columns })
    }

    /// (out, in)
    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The groups of rows, in their order.
    #[cfg(feature = "cuda")]
    pub(crate) fn groups(&self) -> &[Arc<QTensor>] {
        &self.groups
    }

    /// x: (.., in) to (.., out)
    pub(crate) fn linear(&self, x: &Tensor) -> Result<Tensor> {
        match &*self.groups {
            [one] => quantized_linear(x, one),
            several => {
                let parts =
                    several.iter().map(|group| quantized_linear(x, group)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&parts, D::Minus1)
            }
        }
    }

    /// x (m, in) to (m, out), on the CPU
    pub(crate) fn product(&self, x: &[f32], m: usize) -> Result<Vec<f32>> {
        let parts =
            self.groups.iter().map(|group| quantized_product(x, group, m)).collect::<Result<Vec<_>>>()?;
        if m == 1 {
            return Ok(parts.concat());
        }
        let row =
            |i: usize| parts.iter().flat_map(move |part| &part[i * part.len() / m..(i + 1) * part.len() / m]);
        Ok((0..m).flat_map(row).copied().collect())
    }

    /// The rows of ids, in f32: (ids.., in)
    pub(crate) fn embedding(&self, ids: &Tensor) -> Result<Tensor> {
        match &*self.groups {
            [table] => quantized_embedding(table, ids),
            _ => bail!("a table whose rows are of several types"),
        }
    }

    /// In f32.
    pub(crate) fn dequantized(&self) -> Result<Tensor> {
        let parts =
            self.groups.iter().map(|group| group.dequantize(&group.device())).collect::<Result<Vec<_>>>()?;
        match parts.as_slice() {
            [one] => Ok(one.clone()),
            several => Tensor::cat(several, 0),
        }
    }

    /// The group that the rows from `start` on are in, and the first of them in it.
    fn group(&self, start: usize, len: usize) -> Result<(&Arc<QTensor>, usize)> {
        let mut first = 0;
        for group in self.groups.iter() {
            let (rows, _) = group.shape().dims2()?;
            if start >= first && start + len <= first + rows {
                return Ok((group, start - first));
            }
            first += rows;
        }
        bail!("rows {start} to {} are not of one type, or are not there", start + len)
    }

    /// The type of the rows from `start` on, which are of one type.
    pub(crate) fn type_of(&self, start: usize, len: usize) -> Result<BlockType> {
        type_of(self.group(start, len)?.0)
    }

    /// The bytes of the rows from `start` on, which are of one type.
    pub(crate) fn bytes(&self, start: usize, len: usize) -> Result<Vec<u8>> {
        let (group, start) = self.group(start, len)?;
        let bytes = group.data()?;
        let row = bytes.len() / group.shape().dims2()?.0;
        match bytes.get(start * row..(start + len) * row) {
            Some(own) => Ok(own.to_vec()),
            None => bail!("{} bytes have no rows {start} to {}", bytes.len(), start + len),
        }
    }

    /// The rows from `start` on, which are of one type; a copy, unless they are all of that type.
    pub(crate) fn narrow(&self, start: usize, len: usize) -> Result<Arc<QTensor>> {
        let (group, _) = self.group(start, len)?;
        if group.shape().dims2()?.0 == len {
            return Ok(Arc::clone(group));
        }
        Ok(Arc::new(tensor(&self.bytes(start, len)?, group, len)?))
    }
}

/// The rows of both after each other.
fn join(a: &QTensor, b: &QTensor) -> Result<QTensor> {
    let bytes = [a.data()?, b.data()?].concat();
    tensor(&bytes, a, a.shape().dims2()?.0 + b.shape().dims2()?.0)
}

/// Rows of the type and width of `like`.
fn tensor(bytes: &[u8], like: &QTensor, rows: usize) -> Result<QTensor> {
    let (_, columns) = like.shape().dims2()?;
    from_bytes(bytes, type_of(like)?, rows, columns, &like.device())
}

fn type_of(tensor: &QTensor) -> Result<BlockType> {
    let dtype = tensor.dtype();
    BlockType::of(dtype).map_or_else(|| bail!("{dtype:?} is no type of weights"), Ok)
}

/// A matrix of blocks from their bytes.
pub(crate) fn from_bytes(
    bytes: &[u8],
    block: BlockType,
    rows: usize,
    columns: usize,
    device: &Device,
) -> Result<QTensor> {
    let expected = rows.checked_mul(columns).filter(|_| columns.is_multiple_of(block.block_size()));
    if expected.map(|n| block.bytes(n)) != Some(bytes.len()) {
        bail!("{} bytes are not {rows} x {columns} weights in {block}", bytes.len());
    }
    // candle reads blocks where the bytes stand and panics where that is not aligned for them, so they are copied to
    // where it is: for all types, at four bytes.
    let mut words = vec![0u32; bytes.len().div_ceil(4)];
    let aligned: &mut [u8] = words_as_bytes(&mut words);
    aligned[..bytes.len()].copy_from_slice(bytes);
    let storage = QStorage::from_data(Cow::Borrowed(&aligned[..bytes.len()]), device, block.ggml())?;
    QTensor::new(storage, (rows, columns))
}

fn words_as_bytes(words: &mut [u32]) -> &mut [u8] {
    // SAFETY: any bytes are a u32 and the other way around, and bytes need no alignment.
    let (_, bytes, _) = unsafe { words.align_to_mut::<u8>() };
    bytes
}

/// The weight of a layer: a tensor, which may be trained, or blocks, which are not.
#[derive(Debug, Clone)]
pub(crate) enum Weight {
    Plain(Tensor),
    Blocks(BlockMatrix),
}

impl Weight {
    /// The tensor, where it is one.
    pub(crate) fn plain(&self) -> Option<&Tensor> {
        match self {
            Self::Plain(tensor) => Some(tensor),
            Self::Blocks(_) => None,
        }
    }

    /// (out, in)
    #[cfg(feature = "cuda")]
    pub(crate) fn dims(&self) -> Result<[usize; 2]> {
        match self {
            Self::Plain(tensor) => tensor.dims2().map(<[usize; 2]>::from),
            Self::Blocks(blocks) => Ok(blocks.dims()),
        }
    }

    /// The tensor, made of the blocks in f32 where there are blocks.
    pub(crate) fn to_plain(&self) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.clone()),
            Self::Blocks(blocks) => blocks.dequantized(),
        }
    }

    pub(crate) fn detach(&self) -> Self {
        match self {
            Self::Plain(tensor) => Self::Plain(tensor.detach()),
            Self::Blocks(blocks) => Self::Blocks(blocks.clone()),
        }
    }
}
