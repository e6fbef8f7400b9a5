//! Orthogonalised momentum: the CPU within the rounding of bf16.

use super::*;

/// The distance of the changes that two optimizers made, relative to the first one's.
fn distance(before: &Tensor, a: &Tensor, b: &Tensor) -> f64 {
    let (before, a, b) = (values(before), values(a), values(b));
    let norm = |x: &dyn Fn(usize) -> f64| (0..before.len()).map(|i| x(i) * x(i)).sum::<f64>().sqrt();
    norm(&|i| a[i] - b[i]) / norm(&|i| a[i] - before[i])
}

#[test]
fn orthogonalised_updates_are_near_the_cpus() {
    let Some((_lock, device)) = gpu("orthogonalised_updates_are_near_the_cpus") else { return };
    let shapes: [&[usize]; 9] =
        [&[64, 64], &[64, 64], &[96, 32], &[64, 200], &[200, 64], &[33, 47], &[2, 2], &[24, 8, 3], &[5]];
    let moments = [RowMoment::Off, RowMoment::Average { decay: 0.95 }];
    let forms = [Momentum::Nesterov, Momentum::Averaged];
    let forms = moments.into_iter().flat_map(|moment| forms.map(|form| (moment, form)));
    for (row_moment, form) in forms.skip(if brief() { 3 } else { 0 }) {
        for (dtype, half) in [
            (DType::F32, HalfParameters::Nearest),
            (DType::BF16, HalfParameters::Master),
            (DType::F16, HalfParameters::Master),
        ] {
            let rule = Rule::Orthogonal(Orthogonal { row_moment, form, ..Default::default() });
            let group = ParamGroup { rule: Some(Rule::AdamW), ..ParamGroup::of(["w8"]) };
            let config = config()
                .with_rule(rule)
                .with_group(group)
                .with_half_parameters(half)
                .with_perplexity_momentum(PerplexityMomentum::progress(8192));
            let config = VelvetConfig { update_norms: UpdateNorms::On, ..config };
            let [cpu, cuda] = both(&shapes, dtype, dtype, &config, &device);
            if !brief() {
                let [_, again] = both(&shapes, dtype, dtype, &config, &device);
                assert_eq!(differences(&cuda, &again), Vec::<String>::new(), "not deterministic");
            }
            let (a, b) = (all(&cpu), all(&cuda));
            let mut report = Vec::new();
            for (i, shape) in shapes.iter().enumerate().take(8) {
                let name =
                    if half == HalfParameters::Master { format!("w{i}.master") } else { format!("w{i}") };
                let before = tensor(i as u64 + 1, shape, dtype);
                let far = distance(&before, &a[&name], &b[&name]);
                report.push((shape, far));
            }
            eprintln!("{row_moment:?} {form:?} {dtype:?}: {report:?}");
            for (shape, far) in report {
                // Small matrices average the rounding of bf16 over fewer elements.
                let bound = if shape.iter().product::<usize>() < 100 { 0.06 } else { 0.025 };
                assert!(far < bound, "{row_moment:?} {form:?} {dtype:?} {shape:?}: {far}");
            }
            let momentum = distance(
                &tensor(99, &[64, 64], DType::F32),
                &a["w0.momentum_buffer"],
                &b["w0.momentum_buffer"],
            );
            assert!(momentum < 1e-6, "{momentum}");
            let (x, y) = (cpu.stats().unwrap(), cuda.stats().unwrap());
            assert!((x.update_ratio.unwrap() / y.update_ratio.unwrap() - 1.0).abs() < 0.01, "{x:?} {y:?}");
            assert_eq!((x.beta1, x.progress), (y.beta1, y.progress));
        }
    }
}

#[test]
fn large_matrices_are_orthogonalised_within_the_rounding_of_bf16() {
    let Some((_lock, device)) = gpu("large_matrices_are_orthogonalised_within_the_rounding_of_bf16") else {
        return;
    };
    let shapes = [[256usize, 768], [768, 256], [512, 512]];
    for shape in shapes.into_iter().take(if brief() { 1 } else { 3 }) {
        let step = |device: &Device| {
            let vars = named(&[&shape], DType::F32, device);
            let rule = Rule::Orthogonal(Orthogonal::default());
            let mut opt = Velvet::named(vars.clone(), config().with_rule(rule).with_lr(0.01)).unwrap();
            opt.try_step(&store([(&vars[0].1, on(&tensor(77, &shape, DType::F32), device))])).unwrap();
            host(&vars[0].1)
        };
        let far = distance(&tensor(1, &shape, DType::F32), &step(&Device::Cpu), &step(&device));
        eprintln!("{shape:?}: {far}");
        assert!(far < 0.02, "{shape:?}: {far}");
    }
}
