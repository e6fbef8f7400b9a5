use candle_core::{DType, Device, Tensor};
use vesper_model::ops::{Path, embedding};

use crate::common::{
    finite_differences, parity, path, random, same_bits_on_any_number_of_threads, value_and_gradients,
};

fn ids(n: usize, vocab: u32) -> Tensor {
    let ids: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    Tensor::from_vec(ids, n, &Device::Cpu).unwrap()
}

#[test]
fn equals_its_reference() {
    for (n, vocab, d) in [(1, 1, 1), (100, 7, 5), (33, 1000, 16), (1000, 32_005, 2), (0, 5, 3)] {
        let ids = ids(n, vocab as u32);
        parity("embedding", &[random(1, &[vocab, d])], |x, fused| embedding(&x[0], &ids, path(fused)));
    }
}

#[test]
fn ids_keep_their_shape_and_may_be_strided() {
    let ids = ids(12, 9).reshape((3, 4)).unwrap().t().unwrap();
    parity("embedding strided", &[random(1, &[6, 9])], |x, fused| {
        let rows = embedding(&x[0].t()?, &ids, path(fused))?;
        assert_eq!(rows.dims(), [4, 3, 6]);
        Ok(rows)
    });
}

#[test]
fn gradient_equals_finite_differences() {
    let ids = ids(10, 4);
    finite_differences("embedding", &[random(1, &[4, 3])], |x| embedding(&x[0], &ids, Path::Fused));
}

#[test]
fn bf16_gradients_of_a_frequent_token_do_not_saturate() {
    // 4096 gradients of 1 for one row: bf16 sums stop growing at 256.
    let ids = Tensor::zeros(4096, DType::U32, &Device::Cpu).unwrap();
    let table = candle_core::Var::zeros((2, 1), DType::BF16, &Device::Cpu).unwrap();
    let rows = embedding(table.as_tensor(), &ids, Path::Fused).unwrap();
    let grads = rows.sum_all().unwrap().backward().unwrap();
    let gradient = grads.get(&table).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(gradient, [[4096.0], [0.0]]);
}

#[test]
fn an_id_outside_the_table_is_refused() {
    let ids = |ids: &[i64]| Tensor::new(ids, &Device::Cpu).unwrap();
    let last = u32::MAX.to_string();
    for path in [Path::Fused, Path::Reference] {
        for (ids, named) in [
            (ids(&[4]).to_dtype(DType::U32).unwrap(), "4"),
            (ids(&[4]).to_dtype(DType::U8).unwrap(), "4"),
            (ids(&[4]), "4"),
            (ids(&[-1]), &last),
            (ids(&[(1 << 32) + 1]), &last),
            (Tensor::new(&[u32::MAX], &Device::Cpu).unwrap(), &last),
        ] {
            let message = embedding(&random(1, &[4, 3]), &ids, path).unwrap_err().to_string();
            assert!(
                message.contains(&format!("token id {named}")) && message.contains("4 rows"),
                "{message}"
            );
        }
        let message = embedding(&random(1, &[4, 3]), &random(2, &[1]), path).unwrap_err().to_string();
        assert!(message.contains("must be u32, u8 or i64, got F64"), "{message}");
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    same_bits_on_any_number_of_threads(|| {
        let ids = ids(5000, 300);
        value_and_gradients(&[random(1, &[300, 17])], DType::F32, |x| embedding(&x[0], &ids, Path::Fused)).1
    });
}
