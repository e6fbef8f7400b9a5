//! What a run needs: missing and bad gradients, losses, saving, changes, graphs.

use super::*;

#[test]
fn parameters_without_a_gradient_and_frozen_ones_keep_everything() {
    let Some((_lock, device)) = gpu("parameters_without_a_gradient_and_frozen_ones_keep_everything") else {
        return;
    };
    let run = |device: &Device| {
        let vars = named(&[&[100], &[40, 5], &[300], &[17]], DType::F32, device);
        let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w3"]) };
        let slow = ParamGroup { lr_scale: 0.1, weight_decay: Some(0.0), ..ParamGroup::of(["w0"]) };
        let config = config().with_group(frozen).with_group(slow).with_clip(GradClip::GlobalNorm(1.0));
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        record_warnings(&mut opt);
        for step in 1..6u64 {
            let given = vars.iter().enumerate().filter(|(i, _)| !(*i as u64 + step).is_multiple_of(3));
            let grads =
                given.map(|(i, (_, var))| (var, on(&gradient(step, i, var.dims(), DType::F32), device)));
            opt.try_step(&store(grads)).unwrap();
        }
        (opt, host(&vars[3].1))
    };
    let ((cpu, _), (cuda, frozen)) = (run(&Device::Cpu), run(&device));
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(cpu.missing_gradients(), cuda.missing_gradients());
    assert_eq!(bits(&frozen), bits(&tensor(4, &[17], DType::F32)));
}

fn poisoned(vars: &Named, step: u64) -> candle_core::backprop::GradStore {
    let grads = vars.iter().enumerate().map(|(i, (_, var))| {
        let mut g = noise(step * 10 + i as u64, var.elem_count());
        if i == 1 {
            *g.last_mut().unwrap() = f32::NAN;
        }
        (var, Tensor::from_vec(g, var.dims(), var.device()).unwrap())
    });
    store(grads)
}

#[test]
fn steps_with_nan_are_skipped_and_counted() {
    let Some((_lock, device)) = gpu("steps_with_nan_are_skipped_and_counted") else { return };
    let run = |device: &Device| {
        let vars = named(&[&[100], &[40, 5]], DType::F32, device);
        let config =
            VelvetConfig { update_norms: UpdateNorms::On, ..config().with_non_finite(NonFinite::Skip) };
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        train(&mut opt, &vars, DType::F32, 1..3);
        opt.try_step(&poisoned(&vars, 7)).unwrap();
        train(&mut opt, &vars, DType::F32, 3..5);
        opt
    };
    let (cpu, cuda) = (run(&Device::Cpu), run(&device));
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new());
    assert_eq!((cuda.stats().unwrap().step, cuda.stats().unwrap().skipped), (4, 1));
}

#[test]
fn a_step_with_nan_is_an_error_of_the_next_call_that_looks() {
    let Some((_lock, device)) = gpu("a_step_with_nan_is_an_error_of_the_next_call_that_looks") else {
        return;
    };
    let new = || {
        let vars = named(&[&[100], &[40, 5], &[3]], DType::F32, &device);
        let mut opt = Velvet::named(vars.clone(), config()).unwrap();
        train(&mut opt, &vars, DType::F32, 1..3);
        let before = all(&opt);
        opt.try_step(&poisoned(&vars, 7)).unwrap();
        (opt, vars, before)
    };
    let check = |error: Error| match error {
        Error::NonFiniteGradients { step, norm, names } => {
            assert_eq!((step, names), (3, vec!["w1".to_owned()]));
            assert!(norm.is_nan());
        }
        other => panic!("{other}"),
    };
    let untouched = |opt: &Velvet, before: &BTreeMap<String, Tensor>| {
        for (name, now) in all(opt) {
            assert_eq!(bits(&now), bits(&before[&name]), "{name}");
        }
    };
    // By the statistics, then everything goes on.
    let (mut opt, vars, before) = new();
    check(opt.stats().unwrap_err());
    untouched(&opt, &before);
    assert_eq!(opt.stats().unwrap().step, 2);
    train(&mut opt, &vars, DType::F32, 3..4);
    assert_eq!(opt.stats().unwrap().step, 3);
    // By saving.
    let (opt, _, _) = new();
    check(opt.to_bytes().unwrap_err());
    // By a step that comes later; those in between are left out.
    let (mut opt, vars, before) = new();
    let mut error = None;
    for step in 3..100 {
        let grads = vars
            .iter()
            .enumerate()
            .map(|(i, (_, var))| (var, on(&gradient(step, i, var.dims(), DType::F32), &device)));
        if let Err(e) = opt.try_step(&store(grads)) {
            error = Some(e);
            break;
        }
        device.synchronize().unwrap();
    }
    check(error.expect("a step reports the failure"));
    untouched(&opt, &before);
}

#[test]
fn losses_on_the_device_are_taken_in_there() {
    let Some((_lock, device)) = gpu("losses_on_the_device_are_taken_in_there") else { return };
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let run = |device: &Device| {
            let vars = named(&[&[100], &[40, 5]], DType::F32, device);
            let mut opt = Velvet::named(vars.clone(), adaptive()).unwrap();
            for step in 1..12u64 {
                let loss = if step == 5 { f64::NAN } else { 9.0 - 0.3 * step as f64 };
                let scalar = |x: f64, shape: &[usize]| {
                    Tensor::full(x, shape, device).unwrap().to_dtype(dtype).unwrap()
                };
                match step % 3 {
                    0 => opt.observe(&scalar(loss, &[])).unwrap(),
                    1 => opt.observe_with_entropy(&scalar(loss, &[1]), &scalar(loss - 0.2, &[1, 1])).unwrap(),
                    _ => opt.observe_values(loss, Some(loss - 0.1)),
                }
                let grads = vars
                    .iter()
                    .enumerate()
                    .map(|(i, (_, var))| (var, on(&gradient(step, i, var.dims(), DType::F32), device)));
                opt.try_step(&store(grads)).unwrap();
            }
            opt
        };
        let (cpu, cuda) = (run(&Device::Cpu), run(&device));
        assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new(), "{dtype:?}");
        assert_eq!(differences(&cpu, &cuda), Vec::<String>::new(), "{dtype:?}");
        let stats = cuda.stats().unwrap();
        assert_eq!(stats.ignored_losses, 1);
        assert!(stats.progress.is_some_and(|p| p > 0.0) && stats.lr < 1e-3);
    }
}

#[test]
fn a_loaded_run_goes_on_with_the_same_bits() {
    let Some((_lock, device)) = gpu("a_loaded_run_goes_on_with_the_same_bits") else { return };
    let orthogonal = config().with_hidden_matrices(Rule::Orthogonal(Orthogonal::default()));
    let master = measured().with_half_parameters(HalfParameters::Master);
    for (dtype, config) in [(DType::F32, measured()), (DType::BF16, master), (DType::F32, orthogonal)] {
        let shapes: [&[usize]; 4] = [&[100], &[40, 50], &[5], &[0]];
        let vars = named(&shapes, dtype, &device);
        let mut whole = Velvet::named(vars.clone(), config.clone()).unwrap();
        train(&mut whole, &vars, dtype, 1..21);
        let saved = whole.to_bytes().unwrap();
        let copy: Named = vars
            .iter()
            .map(|(name, var)| {
                (name.clone(), Var::from_tensor(&var.as_detached_tensor().copy().unwrap()).unwrap())
            })
            .collect();
        let on_cpu: Named = vars
            .iter()
            .map(|(name, var)| (name.clone(), Var::from_tensor(&host(&var.as_detached_tensor())).unwrap()))
            .collect();
        let mut resumed = Velvet::named(copy.clone(), config.clone()).unwrap();
        train(&mut resumed, &copy, dtype, 1..2);
        for ((_, copy), (_, var)) in copy.iter().zip(&vars) {
            copy.set(&var.as_detached_tensor()).unwrap();
        }
        resumed.load_bytes(&saved).unwrap();
        assert_eq!(resumed.stats().unwrap(), whole.stats().unwrap());
        assert!(resumed.to_bytes().unwrap() == saved);
        // Onto the CPU and back.
        let mut elsewhere = Velvet::named(on_cpu, config.clone()).unwrap();
        elsewhere.load_bytes(&saved).unwrap();
        assert!(elsewhere.to_bytes().unwrap() == saved);
        train(&mut whole, &vars, dtype, 21..41);
        train(&mut resumed, &copy, dtype, 21..41);
        assert_eq!(differences(&whole, &resumed), Vec::<String>::new(), "{dtype:?}");
        assert_eq!(resumed.stats().unwrap(), whole.stats().unwrap());
        resumed.load_bytes(&elsewhere.to_bytes().unwrap()).unwrap();
        assert!(resumed.to_bytes().unwrap() == saved);
    }
}

#[test]
fn the_configuration_can_change_in_mid_run() {
    let Some((_lock, device)) = gpu("the_configuration_can_change_in_mid_run") else { return };
    let run = |device: &Device| {
        let vars = named(&[&[100], &[40, 5]], DType::F32, device);
        let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w1"]) };
        let mut opt = Velvet::named(vars.clone(), adaptive().with_group(frozen)).unwrap();
        train(&mut opt, &vars, DType::F32, 1..4);
        opt.set_config(adaptive().with_lr(5e-4)).unwrap();
        train(&mut opt, &vars, DType::F32, 4..6);
        opt.set_learning_rate(2e-4);
        train(&mut opt, &vars, DType::F32, 6..8);
        opt.set_config(config().with_rule(Rule::Lion(Lion::default()))).unwrap();
        train(&mut opt, &vars, DType::F32, 8..10);
        opt
    };
    let (cpu, cuda) = (run(&Device::Cpu), run(&device));
    assert_eq!(differences(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(different_stats(&cpu, &cuda), Vec::<String>::new());
}

#[test]
fn a_rule_can_change_while_a_parameter_is_frozen() {
    let Some((_lock, device)) = gpu("a_rule_can_change_while_a_parameter_is_frozen") else { return };
    let run = |device: &Device| {
        let vars = named(&[&[100], &[40, 5]], DType::F32, device);
        let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w1"]) };
        let mut opt = Velvet::named(vars.clone(), config()).unwrap();
        train(&mut opt, &vars, DType::F32, 1..4);
        opt.set_config(config().with_rule(Rule::Lion(Lion::default())).with_group(frozen)).unwrap();
        train(&mut opt, &vars, DType::F32, 4..6);
        opt.set_config(config().with_rule(Rule::Lion(Lion::default()))).unwrap();
        train(&mut opt, &vars, DType::F32, 6..8);
        opt
    };
    assert_eq!(differences(&run(&Device::Cpu), &run(&device)), Vec::<String>::new());
}

#[test]
fn eight_bit_state_outlasts_a_time_in_which_everything_is_frozen() {
    let Some((_lock, device)) = gpu("eight_bit_state_outlasts_a_time_in_which_everything_is_frozen") else {
        return;
    };
    let run = |device: &Device| {
        let vars = named(&[&[5000]], DType::F32, device);
        let eight = || config().with_state_format(StateFormat::Blockwise8);
        let mut opt = Velvet::named(vars.clone(), eight()).unwrap();
        train(&mut opt, &vars, DType::F32, 1..4);
        let (before, bytes) = (opt.to_bytes().unwrap(), opt.state_bytes());
        let frozen = ParamGroup { training: Training::Frozen, ..ParamGroup::of(["*"]) };
        opt.set_config(eight().with_group(frozen)).unwrap();
        assert_eq!(opt.state_bytes(), bytes);
        opt.set_config(eight()).unwrap();
        assert!(opt.to_bytes().unwrap() == before);
        train(&mut opt, &vars, DType::F32, 4..6);
        opt
    };
    assert_eq!(differences(&run(&Device::Cpu), &run(&device)), Vec::<String>::new());
}

// It shows as well that a step never waits for its stream, which is an error during a capture.
#[test]
fn a_captured_step_replays_as_steps_do() {
    let config = measured().with_hidden_matrices(Rule::Orthogonal(Orthogonal::default()));
    replay("a_captured_step_replays_as_steps_do", &[&[100], &[40, 50], &[17, 3]], &config);
}

#[test]
fn every_rule_trains_a_small_transformer_on_the_device() {
    let Some((_lock, device)) = gpu("every_rule_trains_a_small_transformer_on_the_device") else { return };
    let (steps, share) = if brief() { (6, f64::INFINITY) } else { (400, 0.6) };
    let mut failures = Vec::new();
    for (name, config) in common::rules() {
        let (first, last) = common::Transformer::new(&device).train(name, config, steps);
        eprintln!("{name}: {first} to {last}");
        if last.is_nan() || last >= share * first {
            failures.push(format!("{name}: {first} to {last}"));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}
