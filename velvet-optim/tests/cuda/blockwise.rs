//! 8-bit state: the codes of the CPU, through a save and a load, whatever the sizes and gradients.

use super::*;
use std::collections::BTreeSet;

/// Around the ends of blocks and chunks; those of fewer than 4096 elements keep f32.
const SHAPES: [&[usize]; 16] = [
    &[0],
    &[1],
    &[255],
    &[256],
    &[257],
    &[1000],
    &[],
    &[4095],
    &[CHUNK],
    &[CHUNK + 1],
    &[CHUNK + 7],
    &[CHUNK + 255],
    &[CHUNK + 256],
    &[3 * CHUNK + 257],
    &[100, 123],
    &[64, 300],
];

const TYPES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::BF16, DType::BF16),
    (DType::BF16, DType::F32),
    (DType::F16, DType::F16),
    (DType::F16, DType::F32),
];

fn eight(config: VelvetConfig) -> VelvetConfig {
    config.with_state_format(StateFormat::Blockwise8)
}

/// The parameters and everything saved differ in no bit; returns what does.
fn different(cpu: &Velvet, cuda: &Velvet) -> Vec<String> {
    let mut different = differences(cpu, cuda);
    different.extend(different_stats(cpu, cuda));
    // Sums in another order may differ in their last bits, and the header holds them.
    let arrays = |opt: &Velvet| {
        let bytes = opt.to_bytes().unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let arrays = tensors.tensors().into_iter();
        let kept = arrays.filter(|(name, _)| name != "update_sizes");
        kept.map(|(name, view)| (name, view.data().to_vec())).collect::<BTreeMap<_, _>>()
    };
    let (a, b) = (arrays(cpu), arrays(cuda));
    if a.keys().ne(b.keys()) {
        different.push(format!(
            "arrays {:?}",
            a.keys().collect::<BTreeSet<_>>().symmetric_difference(&b.keys().collect()).collect::<Vec<_>>()
        ));
    }
    for (name, x) in &a {
        if let Some(y) = b.get(name)
            && x != y
        {
            let count = x.iter().zip(y).filter(|(x, y)| x != y).count();
            different.push(format!("{name}: {count} of {} bytes", x.len()));
        }
    }
    different
}

/// Copies of variables, with their values as they are.
fn copies(vars: &Named, device: &Device) -> Named {
    vars.iter()
        .map(|(name, var)| {
            let value = on(&var.as_detached_tensor().copy().unwrap(), device);
            (name.clone(), Var::from_tensor(&value).unwrap())
        })
        .collect()
}

#[test]
fn twenty_steps_saved_and_twenty_more_have_the_bits_of_the_cpus_forty() {
    let Some((_lock, device)) = gpu("twenty_steps_saved_and_twenty_more_have_the_bits_of_the_cpus_forty")
    else {
        return;
    };
    let mut failures = Vec::new();
    for (rule, config) in [
        ("adamw", config().with_clip(GradClip::GlobalNorm(0.5))),
        ("adamw, adaptive", adaptive()),
        ("sgd", config().with_rule(Rule::Sgd(Sgd::default()))),
        ("lion", config().with_rule(Rule::Lion(Lion::default()))),
    ] {
        for (dtype, grads) in [(DType::F32, DType::F32), (DType::BF16, DType::BF16)] {
            let config = eight(config.clone());
            // Whole on the CPU; half on each device, the second half on the other one.
            let cpu_vars = named(&SHAPES, dtype, &Device::Cpu);
            let mut whole = Velvet::named(cpu_vars.clone(), config.clone()).unwrap();
            train(&mut whole, &cpu_vars, grads, 1..21);
            let half = whole.to_bytes().unwrap();
            let moved = copies(&cpu_vars, &device);
            train(&mut whole, &cpu_vars, grads, 21..41);

            let vars = named(&SHAPES, dtype, &device);
            let mut opt = Velvet::named(vars.clone(), config.clone()).unwrap();
            assert_eq!(opt.state_bytes(), whole.state_bytes(), "{rule} {dtype:?}");
            train(&mut opt, &vars, grads, 1..21);
            let saved = opt.to_bytes().unwrap();
            let resumed_vars = copies(&vars, &device);
            let mut resumed = Velvet::named(resumed_vars.clone(), config.clone()).unwrap();
            resumed.load_bytes(&saved).unwrap();
            assert!(resumed.to_bytes().unwrap() == saved, "{rule} {dtype:?}: loading changes the state");
            let back_vars = copies(&vars, &Device::Cpu);
            let mut back = Velvet::named(back_vars.clone(), config.clone()).unwrap();
            back.load_bytes(&saved).unwrap();
            assert!(back.to_bytes().unwrap() == saved, "{rule} {dtype:?}: the CPU reads other state");
            let mut onto = Velvet::named(moved.clone(), config.clone()).unwrap();
            onto.load_bytes(&half).unwrap();
            assert!(onto.to_bytes().unwrap() == half, "{rule} {dtype:?}: the device reads other state");
            for (name, opt, vars) in [
                ("on the device", &mut opt, &vars),
                ("resumed on the device", &mut resumed, &resumed_vars),
                ("from the device to the CPU", &mut back, &back_vars),
                ("from the CPU to the device", &mut onto, &moved),
            ] {
                train(opt, vars, grads, 21..41);
                let different = different(&whole, opt);
                eprintln!("{rule}, {dtype:?}, {name}: {} arrays differ {different:?}", different.len());
                if !different.is_empty() {
                    failures.push(format!("{rule}, {dtype:?}, {name}: {}", different.join("; ")));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} cases differ: {failures:?}", failures.len());
}

#[test]
fn eight_bit_updates_have_the_bits_of_the_cpus_under_every_option() {
    let Some((_lock, device)) = gpu("eight_bit_updates_have_the_bits_of_the_cpus_under_every_option") else {
        return;
    };
    let mut failures = Vec::new();
    for (name, config) in configs() {
        for (dtype, grads) in TYPES {
            let [cpu, cuda] = both(&SHAPES, dtype, grads, &eight(config.clone()), &device);
            let different = different(&cpu, &cuda);
            if !different.is_empty() {
                let failure = format!("{name}, {dtype:?} with {grads:?}: {}", different.join("; "));
                eprintln!("{failure}");
                failures.push(failure);
            }
        }
    }
    assert!(failures.is_empty(), "{} cases differ: {failures:?}", failures.len());
}

/// Steps with gradients of sizes from subnormal to huge, zeros, and blocks that are all zero.
#[test]
fn gradients_of_any_size_give_the_codes_of_the_cpus() {
    let Some((_lock, device)) = gpu("gradients_of_any_size_give_the_codes_of_the_cpus") else { return };
    let len = 6 * CHUNK + 77;
    let mut failures = Vec::new();
    for (name, rule) in [("adamw", Rule::AdamW), ("sgd", Rule::Sgd(Sgd::default()))] {
        let run = |device: &Device| {
            let vars = named(&[&[len]], DType::F32, device);
            let config = eight(config().with_rule(rule).with_non_finite(NonFinite::Unchecked));
            let mut opt = Velvet::named(vars.clone(), config).unwrap();
            for step in 1..6u64 {
                let mut g = noise(step, len);
                let sizes = noise(step + 100, len);
                for (i, g) in g.iter_mut().enumerate() {
                    let block = i / 256;
                    *g *= match block % 6 {
                        0 => 10f32.powf(sizes[i] * 6.0 - 6.0), // twelve decades in a block
                        1 => 1e-22,                            // second moments that underflow
                        2 => 1e-38,
                        3 => 0.0,
                        4 => 1e17, // second moments near the largest f32
                        _ => {
                            if i % 7 == 0 {
                                1.0
                            } else {
                                0.0
                            }
                        }
                    };
                }
                let g = Tensor::from_vec(g, len, device).unwrap();
                opt.try_step(&store([(&vars[0].1, g)])).unwrap();
            }
            opt
        };
        let different = different(&run(&Device::Cpu), &run(&device));
        if !different.is_empty() {
            failures.push(format!("{name}: {}", different.join("; ")));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn nan_shows_in_its_block_and_no_other() {
    let Some((_lock, device)) = gpu("nan_shows_in_its_block_and_no_other") else { return };
    let len = 2 * CHUNK + 300;
    let run = |device: &Device, bad: f32| {
        let vars = named(&[&[len]], DType::F32, device);
        let config = eight(config().with_non_finite(NonFinite::Unchecked));
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        for step in 1..4u64 {
            let mut g = noise(step, len);
            if step == 2 {
                g[CHUNK + 300] = bad; // in block 17
                g[len - 1] = bad;
            }
            let g = Tensor::from_vec(g, len, device).unwrap();
            opt.try_step(&store([(&vars[0].1, g)])).unwrap();
        }
        opt
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let (cpu, cuda) = (all(&run(&Device::Cpu, bad)), all(&run(&device, bad)));
        for (name, cuda) in &cuda {
            let (x, y) = (values(&cpu[name]), values(cuda));
            for (i, (x, y)) in x.iter().zip(&y).enumerate() {
                let poisoned = (i / 256 == 17) || i >= 2 * CHUNK + 256;
                assert_eq!(y.is_nan(), poisoned, "{bad} {name}[{i}]");
                assert!(poisoned && x.is_nan() || x == y, "{bad} {name}[{i}]: {x} {y}");
            }
        }
    }
}

#[test]
fn masks_groups_missing_and_skipped_gradients_are_as_on_the_cpu() {
    let Some((_lock, device)) = gpu("masks_groups_missing_and_skipped_gradients_are_as_on_the_cpu") else {
        return;
    };
    let run = |device: &Device| {
        let shapes: [&[usize]; 5] = [&[100, 50], &[70, 80], &[5000], &[40], &[90, 60]];
        let vars = named(&shapes, DType::F32, device);
        let config = eight(config())
            .with_non_finite(NonFinite::Skip)
            .with_group(ParamGroup { lr_scale: 0.1, weight_decay: Some(0.0), ..ParamGroup::of(["w0"]) })
            .with_group(ParamGroup { sparse_rows: Some(SparseRows::Skip), ..ParamGroup::of(["w4"]) })
            .with_group(ParamGroup { training: Training::Frozen, ..ParamGroup::of(["w2"]) });
        let mut opt = Velvet::named(vars.clone(), config.clone()).unwrap();
        record_warnings(&mut opt);
        let step = |opt: &mut Velvet, step: u64, nan: bool| {
            let given = vars.iter().enumerate().filter(|(i, _)| !(*i as u64 + step).is_multiple_of(4));
            let grads = given.map(|(i, (_, var))| {
                let g = on(&gradient(step, i, var.dims(), DType::F32), device);
                (var, if nan { (g * f64::NAN).unwrap() } else { g })
            });
            opt.try_step(&store(grads)).unwrap();
        };
        (1..4).for_each(|i| step(&mut opt, i, false));
        let mask: Vec<u8> = (0..70 * 80).map(|i| u8::from(i % 3 != 0)).collect();
        let mask = Tensor::from_vec(mask, (70, 80), device).unwrap();
        opt.set_mask("w1", Some(&mask)).unwrap();
        step(&mut opt, 4, true);
        (5..8).for_each(|i| step(&mut opt, i, false));
        // w2 is thawed, and rows of w1 are looked at from now on, so its state becomes f32.
        let sparse = ParamGroup { sparse_rows: Some(SparseRows::Skip), ..ParamGroup::of(["w1"]) };
        opt.set_config(eight(config_of(&opt)).with_group(sparse)).unwrap();
        (8..12).for_each(|i| step(&mut opt, i, false));
        opt
    };
    let (cpu, cuda) = (run(&Device::Cpu), run(&device));
    assert_eq!(different(&cpu, &cuda), Vec::<String>::new());
    assert_eq!(cpu.state_bytes(), cuda.state_bytes());
    assert_eq!(cuda.stats().unwrap().skipped, 1);
    let weights = values(&cuda.parameters().nth(1).unwrap().1.as_detached_tensor());
    assert!(weights.iter().enumerate().all(|(i, w)| (i % 3 == 0) == (*w == 0.0)));
}

/// The configuration without its groups.
fn config_of(opt: &Velvet) -> VelvetConfig {
    VelvetConfig { groups: Vec::new(), ..opt.config().clone() }
}

#[test]
fn gradients_that_are_views_are_read_as_their_elements_into_blocks() {
    let Some((_lock, device)) = gpu("gradients_that_are_views_are_read_as_their_elements_into_blocks") else {
        return;
    };
    let run = |device: &Device| {
        let base = on(&tensor(5, &[60, 400], DType::F32), device);
        let views = [
            base.t().unwrap(),
            base.narrow(1, 3, 117).unwrap(),
            base.flatten_all().unwrap().narrow(0, 3, 10_001).unwrap(), // not at a multiple of 16 bytes
            base.narrow(0, 1, 1).unwrap().broadcast_as((50, 400)).unwrap(),
        ];
        let shapes: Vec<Vec<usize>> = views.iter().map(|view| view.dims().to_vec()).collect();
        let vars = named(&shapes.iter().map(Vec::as_slice).collect::<Vec<_>>(), DType::F32, device);
        let config = eight(config().with_clip(GradClip::GlobalNorm(1.0)));
        let mut opt = Velvet::named(vars.clone(), config).unwrap();
        for _ in 0..3 {
            opt.try_step(&store(vars.iter().map(|(_, var)| var).zip(views.clone()))).unwrap();
        }
        opt
    };
    assert_eq!(different(&run(&Device::Cpu), &run(&device)), Vec::<String>::new());
}

#[test]
fn without_kernels_for_all_the_state_on_the_device_is_whole() {
    let Some((_lock, device)) = gpu("without_kernels_for_all_the_state_on_the_device_is_whole") else {
        return;
    };
    // An f64 parameter among them: all are updated by candle operations, which read no codes.
    let new = |device: &Device| {
        let mut vars = named(&[&[5000], &[6000]], DType::F32, device);
        vars.extend(named(&[&[1], &[2], &[30]], DType::F64, device).into_iter().skip(2));
        (Velvet::named(vars.clone(), eight(config())).unwrap(), vars)
    };
    let (mut opt, vars) = new(&device);
    assert_eq!(opt.state_bytes(), 8 * 11_000 + 16 * 30);
    let (mut cpu, cpu_vars) = new(&Device::Cpu);
    train(&mut opt, &vars, DType::F32, 1..4);
    // State of 8 bits is read as f32.
    train(&mut cpu, &cpu_vars, DType::F32, 1..4);
    opt.load_bytes(&cpu.to_bytes().unwrap()).unwrap();
    let (a, b) = (cpu.state().unwrap(), opt.state().unwrap());
    assert!(a.iter().all(|(name, a)| bits(a) == bits(&b[name])));
    train(&mut opt, &vars, DType::F32, 4..6);
    assert_eq!(opt.stats().unwrap().step, 5);
}

#[test]
fn eight_bit_state_is_read_and_written_in_other_formats() {
    let Some((_lock, device)) = gpu("eight_bit_state_is_read_and_written_in_other_formats") else { return };
    let shapes: [&[usize]; 2] = [&[70, 80], &[40]];
    let vars = named(&shapes, DType::F32, &device);
    let (mut blocks, mut whole) = (
        Velvet::named(vars.clone(), eight(config())).unwrap(),
        Velvet::named(copies(&vars, &device), config()).unwrap(),
    );
    assert_eq!(whole.state_bytes(), 8 * (5600 + 40));
    assert_eq!(blocks.state_bytes(), 2 * (5600 + 4 * 22) + 8 * 40);
    train(&mut blocks, &vars, DType::F32, 1..4);
    whole.load_bytes(&blocks.to_bytes().unwrap()).unwrap();
    let (a, b) = (blocks.state().unwrap(), whole.state().unwrap());
    assert!(a.iter().all(|(name, a)| bits(a) == bits(&b[name])));
    // And back: codes of what was read are what they were.
    let saved = blocks.to_bytes().unwrap();
    blocks.load_bytes(&whole.to_bytes().unwrap()).unwrap();
    assert!(blocks.to_bytes().unwrap() == saved);
}

#[test]
fn a_captured_step_of_eight_bits_replays_as_steps_do() {
    let shapes: [&[usize]; 3] = [&[5000], &[140, 50], &[17, 3]];
    let config = eight(measured());
    replay("a_captured_step_of_eight_bits_replays_as_steps_do", &shapes, &config);
}
