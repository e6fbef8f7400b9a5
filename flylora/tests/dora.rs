//! DoRA's norms and ratios where the variables, or the base, are of a half type.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{largest_difference, move_all, noise, values};
use flylora::{AdapterKind, AnyLinear, FrozenLinear, LoraConfig, LoraEmbedding, Merge, Place};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

fn config() -> LoraConfig {
    LoraConfig::default().with_r(3).with_alpha(6.0)
}

/// Rows from 1 down to 1e-5 of their size, and one of zeros.
fn uneven(rows: usize, columns: usize, dtype: DType) -> Tensor {
    let sizes: Vec<f64> = (0..rows).map(|i| if i == 0 { 0.0 } else { 10f64.powi(-(i as i32 % 6)) }).collect();
    let sizes = Tensor::from_vec(sizes, (rows, 1), &Device::Cpu).unwrap();
    noise(&[rows, columns], 0.3, DType::F64, 1).broadcast_mul(&sizes).unwrap().to_dtype(dtype).unwrap()
}

#[test]
fn small_rows_and_rows_of_zeros_keep_their_weights_in_every_dtype() {
    for base in DTYPES {
        for dtype in DTYPES {
            let frozen = FrozenLinear::new(uneven(12, 32, base), None).unwrap();
            let place = Place::alone("q", dtype, &Device::Cpu);
            let layer = AnyLinear::build(frozen, &AdapterKind::Dora(config()), &place).unwrap();
            for rows in [2, 40] {
                let x = noise(&[rows, 32], 1.0, base, 2);
                let (y, plain) = (layer.forward(&x).unwrap(), layer.base().forward(&x).unwrap());
                assert_eq!(values(&y), values(&plain), "{dtype:?} over {base:?}");
            }
            move_all(layer.vars(), 0.1, 3);
            let y = layer.forward(&noise(&[5, 32], 1.0, base, 2)).unwrap();
            assert!(values(&y).iter().all(|v| v.is_finite()), "{dtype:?} over {base:?}");
            let table = uneven(32, 12, base).t().unwrap().contiguous().unwrap();
            let embedding = LoraEmbedding::dora(table, &config(), &place).unwrap();
            let y = embedding.forward(&Tensor::new(&[3u32, 0, 11], &Device::Cpu).unwrap()).unwrap();
            assert!(values(&y).iter().all(|v| v.is_finite()), "{dtype:?} beside a table of {base:?}");
        }
    }
}

#[test]
fn variables_of_a_half_type_do_not_round_the_base() {
    for dtype in [DType::BF16, DType::F16] {
        let place = Place::alone("q", dtype, &Device::Cpu);
        let table = noise(&[11, 6], 1.0, DType::F32, 4);
        let mut embedding = LoraEmbedding::dora(table.clone(), &config(), &place).unwrap();
        let ids = Tensor::new(&[3u32, 10, 0], &Device::Cpu).unwrap();
        let rows = table.index_select(&ids, 0).unwrap();
        let start = largest_difference(&embedding.forward(&ids).unwrap(), &rows);
        assert!(start < 1e-6, "a new adapter adds nothing: {start}");
        move_all(embedding.parameters().into_iter().map(|(_, var)| var), 1e-3, 5);
        let y = embedding.forward(&ids).unwrap();
        embedding.merge().unwrap();
        let merged = largest_difference(&embedding.forward(&ids).unwrap(), &y);
        assert!(merged < 3e-5, "{dtype:?}: {merged}");

        let frozen = FrozenLinear::new(noise(&[12, 32], 0.3, DType::F32, 1), None).unwrap();
        let mut layer = AnyLinear::build(frozen, &AdapterKind::Dora(config()), &place).unwrap();
        assert_eq!(layer.merge().unwrap(), Merge::Exact);
        let x = noise(&[4, 32], 1.0, DType::F32, 6);
        let merged = largest_difference(&layer.forward(&x).unwrap(), &layer.base().forward(&x).unwrap());
        assert!(merged < 1e-6, "a new adapter merges to the base: {merged}");
    }
}
