//! The product with blocks against the product with their values.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor, Var};
use vesper_model::ops::{QUANTIZED_ROWS, quantized_embedding, quantized_linear};
use vesper_model::quantized::BlockType;

use super::{relative, values};

fn random(rows: usize, columns: usize, seed: usize) -> Tensor {
    let value = |i: usize| (((i + seed) * 7919 + (i * i) % 977) % 2003) as f32 / 1001.5 - 1.0;
    Tensor::from_vec((0..rows * columns).map(value).collect(), (rows, columns), &Device::Cpu).unwrap()
}

fn blocks(block: BlockType, rows: usize, columns: usize) -> (Arc<QTensor>, Tensor) {
    let blocks = QTensor::quantize(&random(rows, columns, 5), block.ggml()).unwrap();
    let plain = blocks.dequantize(&Device::Cpu).unwrap();
    (Arc::new(blocks), plain)
}

#[test]
fn few_rows_are_near_the_exact_product_and_many_equal_it() {
    for block in BlockType::ALL {
        for (out, input) in [(37, 256), (1, 512), (300, 256)] {
            let (w, plain) = blocks(block, out, input);
            for m in [1, 2, 3, QUANTIZED_ROWS, QUANTIZED_ROWS + 1, 33] {
                let x = random(m, input, m);
                let want = x.matmul(&plain.t().unwrap()).unwrap();
                let y = quantized_linear(&x, &w).unwrap();
                assert_eq!(y.dims(), [m, out]);
                // Few rows are rounded to 8 bits.
                let bound = if m <= QUANTIZED_ROWS { 2e-2 } else { 1e-5 };
                let error = relative(&y, &want);
                assert!(error < bound, "{block} {out} x {input}, {m} rows: {error}");
            }
        }
    }
}

#[test]
fn rows_may_have_any_number_of_blocks() {
    for block in BlockType::ALL.into_iter().filter(|block| block.block_size() <= 32) {
        for input in [32, 96, 160] {
            let (w, plain) = blocks(block, 6, input);
            for m in [1, 3, 20] {
                let x = random(m, input, m);
                let y = quantized_linear(&x, &w).unwrap();
                let error = relative(&y, &x.matmul(&plain.t().unwrap()).unwrap());
                assert!(error < 2e-2, "{block} {input}, {m} rows: {error}");
            }
        }
    }
}

#[test]
fn the_shape_and_dtype_of_x_are_those_of_y() {
    let (w, plain) = blocks(BlockType::Q8_0, 5, 64);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let x = random(24, 64, 1).reshape((2, 3, 4, 64)).unwrap().to_dtype(dtype).unwrap();
        let y = quantized_linear(&x, &w).unwrap();
        assert_eq!((y.dims(), y.dtype()), (&[2, 3, 4, 5][..], dtype));
        let want =
            x.to_dtype(DType::F32).unwrap().reshape((24, 64)).unwrap().matmul(&plain.t().unwrap()).unwrap();
        let error = relative(&y.to_dtype(DType::F32).unwrap().reshape((24, 5)).unwrap(), &want);
        assert!(error < 1e-2, "{dtype:?} {error}");
    }
    let transposed = random(64, 12, 1).t().unwrap();
    let error = relative(
        &quantized_linear(&transposed, &w).unwrap(),
        &transposed.matmul(&plain.t().unwrap()).unwrap(),
    );
    assert!(error < 1e-5, "{error}");
}

#[test]
fn the_gradient_of_x_is_exact() {
    for (block, out, input) in
        [(BlockType::Q4K, 70, 256), (BlockType::Q8_0, 3000, 96), (BlockType::F16, 7, 33)]
    {
        let (w, plain) = blocks(block, out, input);
        for m in [1, QUANTIZED_ROWS + 4] {
            let x = Var::from_tensor(&random(m, input, 2)).unwrap();
            let dy = random(m, out, 9);
            let loss = (quantized_linear(&x, &w).unwrap() * &dy).unwrap().sum_all().unwrap();
            let dx = loss.backward().unwrap().remove(&x).unwrap();
            let error = relative(&dx, &dy.matmul(&plain).unwrap());
            assert!(error < 1e-5, "{block} {m}: {error}");
        }
    }
}

#[test]
fn the_result_does_not_depend_on_the_threads() {
    let (w, _) = blocks(BlockType::Q4K, 300, 256);
    for m in [1, 4, 40] {
        let x = random(m, 256, 3);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let alone = one.install(|| values(&quantized_linear(&x, &w).unwrap()));
        assert_eq!(alone, values(&quantized_linear(&x, &w).unwrap()));
    }
}

#[test]
fn rows_of_a_table() {
    for block in BlockType::ALL {
        let (table, plain) = blocks(block, 9, 256);
        let ids = Tensor::new(&[[8u32, 0], [3, 3]], &Device::Cpu).unwrap();
        let rows = quantized_embedding(&table, &ids).unwrap();
        assert_eq!(rows.dims(), [2, 2, 256]);
        let want = plain.index_select(&ids.flatten_all().unwrap(), 0).unwrap();
        assert_eq!(values(&rows), values(&want), "{block}");
    }
    let (table, _) = blocks(BlockType::Q8_0, 9, 64);
    let error = quantized_embedding(&table, &Tensor::new(&[9u32], &Device::Cpu).unwrap()).unwrap_err();
    assert!(error.to_string().contains("token id 9"), "{error}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let (w, _) = blocks(BlockType::Q8_0, 5, 64);
    let error = quantized_linear(&random(2, 32, 0), &w).unwrap_err().to_string();
    assert!(error.contains("64 columns"), "{error}");
    let empty = Tensor::zeros((0, 64), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(quantized_linear(&empty, &w).unwrap().dims(), [0, 5]);
}

#[test]
fn ids_and_inputs_of_other_dtypes_are_refused() {
    let (w, plain) = blocks(BlockType::ALL[0], 3, 256);
    let ids = |ids: &[i64]| Tensor::new(ids, &Device::Cpu).unwrap();
    for ids in [ids(&[2, 0]).to_dtype(DType::U8).unwrap(), ids(&[2, 0])] {
        let rows = quantized_embedding(&w, &ids).unwrap();
        assert_eq!(relative(&rows.get(0).unwrap(), &plain.get(2).unwrap()), 0.0);
    }
    // Neither is a row, though the low 32 bits of the second are.
    for id in [-1, (1 << 32) + 1] {
        let error = quantized_embedding(&w, &ids(&[id])).unwrap_err().to_string();
        assert!(error.contains("token id 4294967295 is outside"), "{error}");
    }
    let halves = Tensor::new(&[1.5f32], &Device::Cpu).unwrap();
    let error = quantized_embedding(&w, &halves).unwrap_err().to_string();
    assert!(error.contains("quantized_embedding: ids must be u32, u8 or i64, got F32"), "{error}");
    let x = Tensor::ones((2, 256), DType::U32, &Device::Cpu).unwrap();
    let error = quantized_linear(&x, &w).unwrap_err().to_string();
    assert!(error.contains("x must be f32, f64, bf16 or f16, got U32"), "{error}");
    let nothing = Tensor::zeros((0, 300), DType::F32, &Device::Cpu).unwrap().narrow(1, 44, 256).unwrap();
    assert_eq!(quantized_linear(&nothing, &w).unwrap().dims(), [0, 3]);
}
