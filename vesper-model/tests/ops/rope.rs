use candle_core::{DType, Device, Tensor};
use vesper_model::ops::{Rope, RopeScaling, rope};

use crate::common::{finite_differences, parity, random};

/// The rotation of one pair, in f64 and in as many words as it takes.
fn rotated(x: &Tensor, theta: f64, offset: usize) -> Tensor {
    let (rows, t, d) = x.dims3().unwrap();
    let mut values = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    for (r, row) in values.chunks_exact_mut(d).enumerate() {
        for i in 0..d / 2 {
            let power = theta.powf(f64::from(2.0 * i as f32 / d as f32)) as f32;
            let (sin, cos) = f64::from((offset + r % t) as f32 * (1.0 / power)).sin_cos();
            let (a, b) = (row[i], row[i + d / 2]);
            (row[i], row[i + d / 2]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
    Tensor::from_vec(values, (rows, t, d), &Device::Cpu).unwrap()
}

#[test]
fn equals_the_rotation_at_odd_shapes() {
    for (heads, t, d, offset) in [(1, 1, 2, 0), (5, 17, 6, 3), (1, 1000, 4, 24), (2, 3, 64, 500)] {
        let table = Rope::new(d, 1024, 1e4, &Device::Cpu).unwrap();
        let x = random(1, &[heads, t, d]);
        let exact = rotated(&x, 1e4, offset);
        for (dtype, limit) in
            [(DType::F64, 1e-7), (DType::F32, 1e-6), (DType::BF16, 3e-2), (DType::F16, 5e-3)]
        {
            let y = rope(&x.to_dtype(dtype).unwrap(), &table, offset).unwrap();
            let off = crate::common::error(&y.to_dtype(DType::F64).unwrap(), &exact);
            assert!(off < limit, "{dtype:?} {heads} x {t} x {d}: off by {off:e}");
        }
    }
}

#[test]
fn gradient_equals_finite_differences() {
    let table = Rope::new(6, 20, 1e4, &Device::Cpu).unwrap();
    finite_differences("rope", &[random(1, &[2, 9, 6])], |x| rope(&x[0], &table, 5));
}

#[test]
fn strided_inputs_are_read_rightly() {
    let table = Rope::new(4, 20, 1e4, &Device::Cpu).unwrap();
    parity("rope strided", &[random(1, &[9, 2, 8])], |x, strided| {
        let x = x[0].transpose(0, 1)?.narrow(2, 3, 4)?;
        rope(&if strided { x } else { x.contiguous()? }, &table, 1)
    });
}

#[test]
fn no_rows_give_no_rows() {
    let table = Rope::new(4, 20, 1e4, &Device::Cpu).unwrap();
    for shape in [[0, 3, 4], [2, 0, 4]] {
        assert_eq!(rope(&random(1, &shape), &table, 7).unwrap().dims(), shape);
    }
}

#[test]
fn too_many_elements_are_refused() {
    let table = Rope::new(2, 1, 1e4, &Device::Cpu).unwrap();
    let x = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap().broadcast_as((1 << 32, 1, 2)).unwrap();
    let message = rope(&x, &table, 0).unwrap_err().to_string();
    assert!(message.contains("more than the 4294967295 elements"), "{message}");
}

#[test]
fn positions_past_the_table_are_refused_without_wrapping() {
    let table = Rope::new(4, 20, 1e4, &Device::Cpu).unwrap();
    let x = random(1, &[1, 3, 4]);
    assert!(rope(&x, &table, 17).is_ok());
    for offset in [18, usize::MAX] {
        assert!(rope(&x, &table, offset).unwrap_err().to_string().contains("the table has 20"));
    }
}

/// `golden/rope.py` wrote the file.
#[test]
fn cosine_and_sine_are_those_of_transformers() {
    #[derive(serde::Deserialize)]
    struct Case {
        head_dim: usize,
        theta: f64,
        scaling: Option<RopeScaling>,
        positions: Vec<usize>,
        cos: Vec<Vec<f64>>,
        sin: Vec<Vec<f64>>,
    }
    let cases: Vec<Case> = serde_json::from_str(include_str!("golden/rope.json")).unwrap();
    for case in cases {
        let positions = case.positions.iter().max().unwrap() + 1;
        let table = Rope::scaled(case.head_dim, positions, case.theta, case.scaling, &Device::Cpu).unwrap();
        // A one in each pair's first place becomes its cosine, and the second place its sine.
        let half = [case.head_dim / 2];
        let ones = Tensor::ones(&half, DType::F32, &Device::Cpu).unwrap();
        let x = Tensor::cat(&[&ones, &ones.zeros_like().unwrap()], 0).unwrap().unsqueeze(0).unwrap();
        for (i, &position) in case.positions.iter().enumerate() {
            let row = rope(&x, &table, position).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected: Vec<f64> = case.cos[i].iter().chain(&case.sin[i]).copied().collect();
            assert_eq!(row.len(), expected.len());
            let off = row.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs());
            let off = off.max_by(f64::total_cmp).unwrap();
            assert!(off <= 1e-6, "{:?} at {position}: off by {off:e}", case.scaling);
        }
    }
}

#[test]
fn scaling_out_of_its_range_is_refused_by_name() {
    let llama3 = |low, high, original| RopeScaling::Llama3 {
        factor: 2.0,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    };
    for (scaling, part) in [
        (RopeScaling::Linear { factor: 0.5 }, "rope_scaling.factor is 0.5"),
        (RopeScaling::Linear { factor: f64::NAN }, "rope_scaling.factor is NaN"),
        (llama3(0.0, 4.0, 8), "rope_scaling.low_freq_factor is 0"),
        (llama3(1.0, 1.0, 8), "rope_scaling.high_freq_factor is 1"),
        (llama3(1.0, 4.0, 0), "rope_scaling.original_max_position_embeddings is 0"),
    ] {
        let error = Rope::scaled(4, 8, 1e4, Some(scaling), &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    assert!(Rope::scaled(4, 8, 1e4, Some(llama3(1.0, 4.0, 8)), &Device::Cpu).is_ok());
}

#[test]
fn tables_that_cannot_be_are_refused_before_they_are_made() {
    for theta in [0.0, -1.0, 1e-60, f64::NAN, f64::INFINITY] {
        let error = Rope::new(4, 8, theta, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(&format!("a theta of {theta}")), "{error}");
    }
    for (head_dim, positions) in [(128, 1 << 40), (1 << 62, 2), (1 << 40, 0), (0, 1 << 40)] {
        let error = Rope::new(head_dim, positions, 1e4, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("more than the 4294967295 elements"), "{error}");
    }
}
