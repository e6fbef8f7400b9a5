//! Rules over elements: the bits of the CPU, whatever the gradients look like.

use super::*;

#[test]
fn updates_over_elements_have_the_bits_of_the_cpus() {
    let Some((_lock, device)) = gpu("updates_over_elements_have_the_bits_of_the_cpus") else { return };
    let shapes: [&[usize]; 10] =
        [&[0], &[1], &[7], &[1023], &[2, CHUNK], &[CHUNK + 3], &[3, 5, 7], &[2, 0, 4], &[], &[129, 257]];
    let types = [
        (DType::F32, DType::F32),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F16),
        (DType::F16, DType::F32),
        (DType::F32, DType::BF16),
        (DType::BF16, DType::F16),
    ];
    let mut failures = Vec::new();
    for (name, config) in configs() {
        for (dtype, grads) in types {
            let [cpu, cuda] = both(&shapes, dtype, grads, &config, &device);
            let mut different = differences(&cpu, &cuda);
            different.extend(different_stats(&cpu, &cuda));
            if !different.is_empty() {
                let failure = format!("{name}, {dtype:?} with {grads:?}: {}", different.join("; "));
                eprintln!("{failure}");
                failures.push(failure);
            }
        }
    }
    assert!(failures.is_empty(), "{} cases differ: {failures:?}", failures.len());
}

#[test]
fn rates_that_follow_measured_updates_are_near_the_cpus() {
    let Some((_lock, device)) = gpu("rates_that_follow_measured_updates_are_near_the_cpus") else { return };
    let shapes: [&[usize]; 8] =
        [&[0], &[1], &[1023], &[2, CHUNK], &[CHUNK + 3], &[3, 5, 7], &[], &[129, 257]];
    let types = [(DType::F32, DType::F32), (DType::BF16, DType::BF16), (DType::F16, DType::F32)];
    // A warm-up would keep the rate below what these hold back.
    let high = VelvetConfig { entropy_lr: EntropyLr::Off, brake: Brake::Off, ..measured().with_lr(0.02) };
    for (dtype, grads) in types {
        for (name, config) in [
            ("both", high.clone()),
            ("trust region", high.clone().with_polyak(PolyakCap::Off)),
            ("masters", high.clone().with_half_parameters(HalfParameters::Master)),
        ] {
            let [cpu, cuda] = both(&shapes, dtype, grads, &config, &device);
            assert_eq!(far(&cpu, &cuda), Vec::<String>::new(), "{name}, {dtype:?}");
            assert_eq!(stats_apart(&cpu, &cuda, MEASURED), Vec::<String>::new(), "{name}, {dtype:?}");
            let unheld = VelvetConfig { polyak: PolyakCap::Off, trust_region: TrustRegion::Off, ..config };
            let [unheld, _] = both(&shapes, dtype, grads, &unheld, &device);
            assert!(!far(&cpu, &unheld).is_empty(), "{name}: nothing was held back");
        }
    }
}

#[test]
fn a_step_without_a_gradient_does_not_lift_the_trust_region() {
    let Some((_lock, device)) = gpu("a_step_without_a_gradient_does_not_lift_the_trust_region") else {
        return;
    };
    let config = VelvetConfig::language_model(8192).with_lr(8e-3);
    let config = VelvetConfig { hidden_matrices: None, ..config };
    let run = |device: &Device| {
        let vars = named(&[&[64], &[16, 32]], DType::F32, device);
        vars[0].1.set(&vars[0].1.zeros_like().unwrap()).unwrap();
        let mut opt = Velvet::named(vars.clone(), config.clone()).unwrap();
        for step in 0..4u64 {
            let grads = vars.iter().enumerate().map(|(i, (_, var))| {
                let g = on(&gradient(step, i, var.dims(), DType::F32), device);
                (var, if step < 2 { g.zeros_like().unwrap() } else { g })
            });
            opt.try_step(&store(grads)).unwrap();
            if step == 2 {
                let largest = values(&vars[0].1).into_iter().map(f64::abs).fold(0.0, f64::max);
                assert!(largest > 0.0 && largest < 2e-4, "{largest}");
            }
        }
        opt
    };
    let (cpu, cuda) = (run(&Device::Cpu), run(&device));
    assert_eq!(far(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(stats_apart(&cpu, &cuda, MEASURED), Vec::<String>::new());
}

#[test]
fn rows_without_a_gradient_keep_weights_and_moments() {
    let Some((_lock, device)) = gpu("rows_without_a_gradient_keep_weights_and_moments") else { return };
    let kinds = [(DType::F32, 64), (DType::F32, 37), (DType::BF16, 64), (DType::BF16, 36)];
    let cautious = [CautiousUpdate::Off, CautiousUpdate::Aligned];
    for ((dtype, width), cautious_update) in kinds.into_iter().flat_map(|kind| cautious.map(|c| (kind, c))) {
        let config = VelvetConfig {
            sparse_rows: SparseRows::Skip,
            update_norms: UpdateNorms::On,
            cautious_update,
            ..config()
        };
        let run = |device: &Device| {
            let vars = named(&[&[1000, width]], dtype, device);
            let mut opt = Velvet::named(vars.clone(), config.clone()).unwrap();
            for step in 1..4u64 {
                let mut g = noise(step, 1000 * width);
                for (row, g) in g.chunks_mut(width).enumerate() {
                    if (row as u64 + step).is_multiple_of(3) {
                        g.fill(if row % 2 == 0 { 0.0 } else { -0.0 });
                    }
                }
                let g = Tensor::from_vec(g, (1000, width), device).unwrap().to_dtype(dtype).unwrap();
                opt.try_step(&store([(&vars[0].1, g)])).unwrap();
            }
            opt
        };
        let (cpu, cuda) = (run(&Device::Cpu), run(&device));
        assert_eq!(differences(&cpu, &cuda), Vec::<String>::new(), "{dtype:?} {width}");
        assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new(), "{dtype:?} {width}");
    }
}

#[test]
fn many_tiny_parameters_are_all_updated() {
    let Some((_lock, device)) = gpu("many_tiny_parameters_are_all_updated") else { return };
    let shapes: Vec<Vec<usize>> =
        (0..if brief() { 300 } else { 2000 }).map(|i| vec![i % 13 + 1, i % 3 + 1]).collect();
    let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
    let config = config().with_clip(GradClip::GlobalNorm(1.0));
    let [cpu, cuda] = both(&shapes, DType::F32, DType::F32, &config, &device);
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new());
}

#[test]
fn gradients_that_are_views_are_read_as_their_elements() {
    let Some((_lock, device)) = gpu("gradients_that_are_views_are_read_as_their_elements") else { return };
    let run = |device: &Device| {
        let base = on(&tensor(5, &[6, 40], DType::F32), device);
        let views = [
            base.t().unwrap(),
            base.narrow(1, 3, 17).unwrap(),
            base.narrow(0, 2, 2).unwrap(),
            base.flatten_all().unwrap().narrow(0, 3, 101).unwrap(), // contiguous, but not at a multiple of 16 bytes
            base.narrow(0, 1, 1).unwrap().broadcast_as((5, 40)).unwrap(),
        ];
        let shapes: Vec<Vec<usize>> = views.iter().map(|view| view.dims().to_vec()).collect();
        let vars = named(&shapes.iter().map(Vec::as_slice).collect::<Vec<_>>(), DType::F32, device);
        let mut opt = Velvet::named(vars.clone(), config().with_clip(GradClip::GlobalNorm(1.0))).unwrap();
        for _ in 0..3 {
            opt.try_step(&store(vars.iter().map(|(_, var)| var).zip(views.clone()))).unwrap();
        }
        opt
    };
    let (cpu, cuda) = (run(&Device::Cpu), run(&device));
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
}

#[test]
fn a_gradient_that_shares_a_parameters_storage_is_read_before_it_is_written() {
    let Some((_lock, device)) = gpu("a_gradient_that_shares_a_parameters_storage") else { return };
    let run = |device: &Device| {
        let vars = named(&[&[33], &[33]], DType::F32, device);
        let mut opt = Velvet::named(vars.clone(), config()).unwrap();
        let first = vars[0].1.as_detached_tensor();
        opt.try_step(&store([(&vars[0].1, first.clone()), (&vars[1].1, first)])).unwrap();
        opt
    };
    assert_eq!(differences(&run(&Device::Cpu), &run(&device)), Vec::<String>::new());
}

#[test]
fn masked_elements_stay_zero() {
    let Some((_lock, device)) = gpu("masked_elements_stay_zero") else { return };
    let rules = [Rule::AdamW, Rule::Orthogonal(Orthogonal::default())];
    for (rule, dtype) in rules.into_iter().flat_map(|rule| [DType::F32, DType::BF16].map(|d| (rule, d))) {
        let vars = named(&[&[16, 24]], dtype, &device);
        let config = config().with_rule(rule).with_half_parameters(HalfParameters::Master);
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        train(&mut opt, &vars, dtype, 1..3);
        let mask: Vec<u8> = (0..16 * 24).map(|i| u8::from(i % 3 != 0)).collect();
        let mask = Tensor::from_vec(mask, (16, 24), &device).unwrap();
        opt.set_mask("w0", Some(&mask)).unwrap();
        train(&mut opt, &vars, dtype, 3..6);
        let is_kept = |x: &[f64]| x.iter().enumerate().all(|(i, w)| (i % 3 == 0) == (*w == 0.0));
        assert!(is_kept(&values(&vars[0].1)), "{rule:?} {dtype:?}");
        if let Some(master) = opt.state().unwrap().get("w0.master") {
            assert!(is_kept(&values(master)), "{rule:?} {dtype:?}: master");
        }
        if rule == Rule::AdamW {
            assert!(is_kept(&values(&opt.state().unwrap()["w0.exp_avg"])));
        }
    }
}

#[test]
fn weights_that_were_loaded_later_train_from_where_they_are() {
    let Some((_lock, device)) = gpu("weights_that_were_loaded_later_train_from_where_they_are") else {
        return;
    };
    let run = |device: &Device| {
        let vars = named(&[&[100]], DType::BF16, device);
        let config = config().with_half_parameters(HalfParameters::Master);
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        train(&mut opt, &vars, DType::BF16, 1..2);
        vars[0].1.set(&on(&tensor(77, &[100], DType::BF16), device)).unwrap();
        opt.refresh_masters().unwrap();
        train(&mut opt, &vars, DType::BF16, 2..4);
        opt
    };
    assert_eq!(differences(&run(&Device::Cpu), &run(&device)), Vec::<String>::new());
}

#[test]
fn f64_parameters_and_the_plain_back_end_work_on_the_device() {
    let Some((_lock, device)) = gpu("f64_parameters_and_the_plain_back_end_work_on_the_device") else {
        return;
    };
    for (dtype, backend) in [(DType::F64, BackendChoice::Auto), (DType::F32, BackendChoice::Plain)] {
        let config = measured().with_backend(backend);
        let [cpu, cuda] = both(&[&[100], &[40, 5]], dtype, dtype, &config, &device);
        let (a, b) = (all(&cpu), all(&cuda));
        for (name, a) in &a {
            for (x, y) in values(a).iter().zip(values(&b[name])) {
                assert!((x - y).abs() < 1e-6, "{dtype:?} {backend:?} {name}: {x} {y}");
            }
        }
    }
}

#[test]
fn every_rule_goes_downhill_on_rosenbrock() {
    let Some((_lock, device)) = gpu("every_rule_goes_downhill_on_rosenbrock") else { return };
    if brief() {
        eprintln!(
            "every_rule_goes_downhill_on_rosenbrock: left out, 2000 steps of each rule on four numbers"
        );
        return;
    }
    for (name, config) in common::rules() {
        common::rosenbrock(name, config, DType::F32, &device);
    }
}
