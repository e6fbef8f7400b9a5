//! candle's GGUF blocks: products with them and their values, with the rows split over rayon's threads.
//!
//! candle splits its own product over threads of its own, which a program that uses rayon's for everything else sets to
//! one, lest the two spin beside each other.

use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
};
use candle_core::quantized::{GgmlDType, GgmlType, QTensor};
use candle_core::{Result, bail};
use half::{bf16, f16};
use pulp::bytemuck;
use rayon::prelude::*;

use crate::ops::decode::matvec::{Rows, Vectors, some_products};

/// Weights that a task reads at the least: less is not worth waking a thread for.
const TASK: usize = 1 << 15;

/// Runs `$body` with `$blocks` as the tensor's blocks, in their own type.
macro_rules! with_blocks {
    ($tensor:expr, $blocks:ident => $body:expr) => {{
        let data = $tensor.data()?;
        match $tensor.dtype() {
            GgmlDType::F32 => with_blocks!(f32, data, $blocks, $body),
            GgmlDType::F16 => with_blocks!(f16, data, $blocks, $body),
            GgmlDType::BF16 => with_blocks!(bf16, data, $blocks, $body),
            GgmlDType::Q4_0 => with_blocks!(BlockQ4_0, data, $blocks, $body),
            GgmlDType::Q4_1 => with_blocks!(BlockQ4_1, data, $blocks, $body),
            GgmlDType::Q5_0 => with_blocks!(BlockQ5_0, data, $blocks, $body),
            GgmlDType::Q5_1 => with_blocks!(BlockQ5_1, data, $blocks, $body),
            GgmlDType::Q8_0 => with_blocks!(BlockQ8_0, data, $blocks, $body),
            GgmlDType::Q2K => with_blocks!(BlockQ2K, data, $blocks, $body),
            GgmlDType::Q3K => with_blocks!(BlockQ3K, data, $blocks, $body),
            GgmlDType::Q4K => with_blocks!(BlockQ4K, data, $blocks, $body),
            GgmlDType::Q5K => with_blocks!(BlockQ5K, data, $blocks, $body),
            GgmlDType::Q6K => with_blocks!(BlockQ6K, data, $blocks, $body),
            other @ (GgmlDType::Q8_1 | GgmlDType::Q8K) => {
                bail!("{other:?} is no type of weights: it is what activations become in a product")
            }
        }
    }};
    ($block:ty, $data:ident, $blocks:ident, $body:expr) => {{
        let blocks = cast::<$block>(&$data)?;
        let $blocks: &[$block] = blocks;
        $body
    }};
}

/// `y = x W^T` for few rows: x (m, in) is rounded to what the blocks' products take; y (m, out).
pub(super) fn multiply(weight: &QTensor, x: &[f32], m: usize, y: &mut [f32]) -> Result<()> {
    let (out, input) = weight.shape().dims2()?;
    if x.len() != m * input || y.len() != m * out {
        bail!("a product of {} by {out} x {input} values does not fit {} values", x.len(), y.len());
    }
    if m == 0 || out == 0 || input == 0 {
        y.fill(0.0);
        return Ok(());
    }
    // (out, m): a task owns whole rows of the weight.
    let mut results = vec![0.0; m * out];
    let step = TASK.div_ceil(input.max(1));
    by_rows(weight, x, (m, input, out), step, &mut results)?;
    if m == 1 {
        y.copy_from_slice(&results);
        return Ok(());
    }
    for (i, y) in y.chunks_exact_mut(out).enumerate() {
        for (y, from) in y.iter_mut().zip(results.iter().skip(i).step_by(m)) {
            *y = *from;
        }
    }
    Ok(())
}

/// As [`multiply`], to (out, m), `step` rows of the weight a task.
fn by_rows(
    weight: &QTensor,
    x: &[f32],
    (m, input, out): (usize, usize, usize),
    step: usize,
    to: &mut [f32],
) -> Result<()> {
    if weight.dtype().block_size() == 1 {
        return numbers(weight, x, (m, input), step, to);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(rows) = super::vectors::rows(weight.dtype()) {
        let row = weight.dtype().type_size() * (input / weight.dtype().block_size());
        let vectors = super::vectors::Vectors::new(x, m);
        super::vectors::multiply(rows, (&weight.data()?, row), &vectors, step, to);
        return Ok(());
    }
    plain(weight, x, (m, input, out), step, to)
}

/// As [`by_rows`] for plain numbers: rows become f32 as they are read, and x is not rounded. candle's product rounds x to the
/// weight's type, which f16 may be too small for, and takes as long as thirty products in f32.
fn numbers(
    weight: &QTensor,
    x: &[f32],
    (m, input): (usize, usize),
    step: usize,
    to: &mut [f32],
) -> Result<()> {
    let vectors = Vectors::new(x, m, Rows::new(&[], input, false));
    with_blocks!(weight, values => {
        to.par_chunks_mut(step * m).enumerate().for_each(|(task, to)| {
            let mut wide = vec![0.0; to.len() / m * input];
            let first = task * step * input;
            widen_blocks(&values[first..first + wide.len()], &mut wide);
            some_products(Rows::new(bytemuck::cast_slice(&wide), input, false), &vectors, to);
        });
        Ok(())
    })
}

/// As [`by_rows`], by candle's product of a row and a vector.
fn plain(
    weight: &QTensor,
    x: &[f32],
    (m, input, out): (usize, usize, usize),
    step: usize,
    to: &mut [f32],
) -> Result<()> {
    with_blocks!(weight, blocks => {
        multiply_blocks(blocks, x, (m, input, out), step, to);
        Ok(())
    })
}

/// candle's product of a row and a vector, for all of them.
fn multiply_blocks<T: GgmlType>(
    blocks: &[T],
    x: &[f32],
    (m, input, out): (usize, usize, usize),
    step: usize,
    to: &mut [f32],
) {
    let row = blocks.len() / out;
    let width = input / T::VecDotType::BLCK_SIZE;
    let mut rounded = vec![T::VecDotType::zeros(); m * width];
    for (x, rounded) in x.chunks_exact(input).zip(rounded.chunks_exact_mut(width)) {
        T::VecDotType::from_float(x, rounded);
    }
    // What is no number would become one in a block.
    let broken = |x: &[f32]| T::BLCK_SIZE > 1 && x.iter().any(|x| !x.is_finite());
    let broken: Vec<bool> = x.chunks_exact(input).map(broken).collect();
    // Three of candle's products want an even number of blocks: what is left of a row is multiplied by itself.
    let pairs = matches!(T::DTYPE, GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1);
    let whole = if pairs { row / 2 * 2 } else { row };
    let rest = (row - whole) * T::BLCK_SIZE;
    to.par_chunks_mut(step * m).enumerate().for_each(|(task, to)| {
        let mut last = vec![0.0; rest];
        for (i, to) in to.chunks_exact_mut(m).enumerate() {
            let first = (task * step + i) * row;
            let w = &blocks[first..first + row];
            if rest > 0 {
                widen_blocks(&w[whole..], &mut last);
            }
            let vectors = rounded.chunks_exact(width).zip(x.chunks_exact(input)).zip(&broken);
            for (((rounded, x), broken), to) in vectors.zip(to) {
                if *broken {
                    *to = f32::NAN;
                    continue;
                }
                let x = &x[input - rest..];
                let end: f32 = last.iter().zip(x).map(|(w, x)| w * x).sum();
                let begin = match whole {
                    0 => 0.0,
                    _ => T::vec_dot(input - rest, &w[..whole], &rounded[..width - (row - whole)]),
                };
                *to = begin + end;
            }
        }
    });
}

/// The values of whole rows, from row `first` on, as many as `to` holds.
pub(super) fn widen(weight: &QTensor, first: usize, to: &mut [f32]) -> Result<()> {
    let (out, input) = weight.shape().dims2()?;
    if input == 0 || !to.len().is_multiple_of(input) || first + to.len() / input > out {
        bail!("rows of {input} values from row {first} of {out} do not make {} values", to.len());
    }
    with_blocks!(weight, blocks => {
        let row = blocks.len() / out;
        let rows = TASK.div_ceil(input);
        to.par_chunks_mut(rows * input).enumerate().for_each(|(task, to)| {
            let start = (first + task * rows) * row;
            widen_blocks(&blocks[start..start + to.len() / input * row], to);
        });
        Ok(())
    })
}

/// The values of the rows `ids`, all of which the table has.
pub(super) fn gather(table: &QTensor, ids: &[usize], to: &mut [f32]) -> Result<()> {
    let (vocab, d) = table.shape().dims2()?;
    if to.len() != ids.len() * d || vocab == 0 || d == 0 {
        bail!("{} rows of {d} values do not make {} values", ids.len(), to.len());
    }
    with_blocks!(table, blocks => {
        let row = blocks.len() / vocab;
        to.par_chunks_mut(d).zip(ids).with_min_len(TASK.div_ceil(d)).for_each(|(to, &id)| {
            let start = id * row;
            widen_blocks(&blocks[start..start + row], to);
        });
        Ok(())
    })
}

fn widen_blocks<T: GgmlType>(blocks: &[T], to: &mut [f32]) {
    T::to_float(blocks, to);
}

/// The bytes of a tensor's storage as what they are.
fn cast<T: GgmlType>(data: &[u8]) -> Result<&[T]> {
    // SAFETY: candle's blocks are made of integers and half floats alone, so any bits are a value of theirs.
    let (before, blocks, after) = unsafe { data.align_to::<T>() };
    if !(before.is_empty() && after.is_empty()) {
        bail!("{} bytes are no whole number of {:?} blocks where they stand", data.len(), T::DTYPE);
    }
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantized::BlockType;
    use candle_core::{Device, Tensor};

    /// Numbers without a pattern, -1 to 1.
    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    /// What runs where the processor has no instructions for a product of ours.
    #[test]
    fn candles_products_take_rows_of_any_number_of_blocks() {
        for block in BlockType::ALL {
            for (out, blocks, m) in [(1, 1, 1), (5, 3, 2), (4, 4, 1), (13, 5, 8)] {
                let input = blocks * block.block_size().max(32);
                let w = Tensor::from_vec(numbers(out * input), (out, input), &Device::Cpu).unwrap();
                let w = QTensor::quantize(&w, block.ggml()).unwrap();
                let x: Vec<f32> = numbers(m * input).into_iter().map(|x| 3.0 * x + 0.5).collect();
                let mut got = vec![f32::NAN; out * m];
                plain(&w, &x, (m, input, out), 4, &mut got).unwrap();
                let w = w.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
                let (mut off, mut size) = (0.0, 0.0);
                for (got, (w, x)) in
                    got.iter().zip(w.iter().flat_map(|w| x.chunks_exact(input).map(move |x| (w, x))))
                {
                    let want: f32 = w.iter().zip(x).map(|(w, x)| w * x).sum();
                    off += (got - want).powi(2);
                    // In what a product of rounded numbers is near the exact one.
                    size += w.iter().zip(x).map(|(w, x)| (w * x).powi(2)).sum::<f32>();
                }
                assert!(off <= 1e-4 * size, "{block} {out} x {input}: {off:e} of {size:e}");
            }
        }
    }

    #[test]
    fn plain_numbers_are_multiplied_as_they_are() {
        for block in BlockType::ALL.into_iter().filter(|block| block.is_plain()) {
            for (out, input, m) in [(1, 1, 1), (5, 3, 2), (70, 1043, 3), (9, 64, 8)] {
                let w = Tensor::from_vec(numbers(out * input), (out, input), &Device::Cpu).unwrap();
                let w = QTensor::quantize(&w, block.ggml()).unwrap();
                // More than an f16 can say, and less than a bf16 can tell apart.
                let x: Vec<f32> = numbers(m * input).into_iter().map(|x| 1e6 + 100.0 * x).collect();
                let mut got = vec![f32::NAN; m * out];
                multiply(&w, &x, m, &mut got).unwrap();
                let w = w.dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
                for (got, x) in got.chunks_exact(out).zip(x.chunks_exact(input)) {
                    for (got, w) in got.iter().zip(&w) {
                        let terms = || w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                        let (want, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                        assert!((f64::from(*got) - want).abs() <= 1e-6 * size, "{block} {out} x {input}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_vector_with_what_is_no_number_has_no_product() {
        for block in BlockType::ALL {
            let input = 2 * block.block_size().max(32);
            let w = Tensor::from_vec(numbers(3 * input), (3, input), &Device::Cpu).unwrap();
            let w = QTensor::quantize(&w, block.ggml()).unwrap();
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = numbers(2 * input);
                x[40] = value;
                for candles in [false, true] {
                    let mut y = vec![0.0; 6];
                    if candles {
                        plain(&w, &x, (2, input, 3), 4, &mut y).unwrap();
                    } else {
                        multiply(&w, &x, 2, &mut y).unwrap();
                    }
                    let broken = y.iter().filter(|y| !y.is_finite()).count();
                    assert_eq!(broken, 3, "{block} {value}: {y:?}");
                }
            }
        }
    }
}
