//! Against Hugging Face PEFT, both ways; `golden/peft_golden.py` writes the files.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, IndexOp, Tensor, Var};
use candle_nn::{Optimizer, SGD, VarBuilder};
use common::{largest_difference, values};
use flylora::files::{AdapterFile, MergedWeights, SaveOptions, Stored, WEIGHTS_FILE, save_adapters_with};
use flylora::{
    AdaLoraAdapter, AdaLoraConfig, Adapter, AdapterKind, AdapterLinear, AnyLinear, Combination, FrozenLinear,
    LoraAdapter, LoraConfig, LoraEmbedding, LoraInit, MajoritySign, Over, Place, RankBudget,
    RankBudgetConfig, Scaling, Step, combine, combine_embeddings, load_adapters,
};

fn golden(which: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(which)
}

fn base() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden("peft/base.safetensors"), &Device::Cpu).unwrap()
}

fn outputs(which: &str) -> HashMap<String, Tensor> {
    let text = std::fs::read_to_string(golden(which).join("outputs.json")).unwrap();
    let outputs: HashMap<String, Vec<Vec<Vec<f64>>>> = serde_json::from_str(&text).unwrap();
    outputs.into_iter().map(|(name, y)| (name, Tensor::new(y, &Device::Cpu).unwrap())).collect()
}

fn ids() -> Tensor {
    Tensor::new(&[[0u32, 3, 10, 3], [7, 1, 2, 9]], &Device::Cpu).unwrap()
}

/// The directories that PEFT saved.
const SAVED: [&str; 10] = [
    "lora",
    "rslora",
    "dora",
    "embedding",
    "adalora",
    "adalora_full",
    "dora_embedding",
    "wide",
    "adalora_alpha",
    "lora_bias",
];

/// Those with parameters of the model itself.
const WITH_PARAMETERS: [&str; 2] = ["saved", "bias"];

const MODULES: [&str; 3] = ["q_proj", "c_attn", "up_proj"];

/// The layers of the small model, each with an adapter or without.
struct Tiny {
    embed: LoraEmbedding,
    layers: Vec<(String, FrozenLinear, Option<AnyLinear>)>,
}

impl Tiny {
    /// `make` says which adapter a module gets.
    fn new(make: impl Fn(&str, &FrozenLinear) -> Option<Arc<dyn Adapter>>) -> Self {
        let weights = base();
        let wide = |name: &str| weights[name].to_dtype(DType::F64).unwrap();
        let place = Place::alone("embed_tokens", DType::F64, &Device::Cpu);
        let config = LoraConfig::default().with_r(2);
        let mut embed = LoraEmbedding::new(wide("embed_tokens.weight"), &config, &place).unwrap();
        embed.set_enabled(false);
        let mut layers = Vec::new();
        for i in 0..2 {
            for module in MODULES {
                let path = format!("layers.{i}.{module}");
                let weight = wide(&format!("{path}.weight"));
                let bias = (module != "up_proj").then(|| wide(&format!("{path}.bias")));
                let frozen = if module == "c_attn" {
                    FrozenLinear::conv1d(weight, bias).unwrap()
                } else {
                    FrozenLinear::new(weight, bias).unwrap()
                };
                let adapted = make(&path, &frozen)
                    .map(|adapter| AnyLinear::from_parts(frozen.clone(), adapter).unwrap());
                layers.push((path, frozen, adapted));
            }
        }
        Self { embed, layers }
    }

    fn run(&self, i: usize, x: &Tensor) -> Tensor {
        match &self.layers[i] {
            (_, _, Some(layer)) => layer.forward(x).unwrap(),
            (_, frozen, None) => frozen.forward(x).unwrap(),
        }
    }

    fn forward(&self) -> Tensor {
        let mut x = self.embed.forward(&ids()).unwrap();
        for block in 0..2 {
            let q = self.run(3 * block, &x).tanh().unwrap();
            let c = self.run(3 * block + 1, &q).tanh().unwrap();
            x = (x + self.run(3 * block + 2, &c)).unwrap();
        }
        x
    }

    fn adapted(&self) -> Vec<(&str, &AnyLinear)> {
        self.layers.iter().filter_map(|(path, _, layer)| Some((path.as_str(), layer.as_ref()?))).collect()
    }
}

#[test]
fn adapters_that_peft_saved_give_the_outputs_of_peft_in_every_kind() {
    let want = outputs("peft");
    let plain = Tiny::new(|_, _| None).forward();
    assert!(largest_difference(&plain, &want["base"]) < 1e-12);
    for name in SAVED {
        let file = AdapterFile::read(golden("peft").join(name)).unwrap();
        let modules = file.modules();
        let mut model = Tiny::new(|path, frozen| {
            modules.contains(&path).then(|| file.adapter(path, frozen, DType::F64).unwrap())
        });
        assert_eq!(
            file.is_embedding("embed_tokens"),
            ["embedding", "dora_embedding", "wide"].contains(&name)
        );
        if file.is_embedding("embed_tokens") {
            model.embed = file.embedding("embed_tokens", model.embed.table().clone(), DType::F64).unwrap();
        }
        let got = model.forward();
        assert!(largest_difference(&got, &want[name]) < 1e-6, "{name}");
        assert!(largest_difference(&got, &plain) > 0.05, "{name} has an effect");
        // The targets that the file names are those that it holds.
        for i in 0..2 {
            for module in MODULES {
                let path = format!("layers.{i}.{module}");
                assert_eq!(
                    file.config().targets().selects(&path),
                    modules.contains(&path.as_str()),
                    "{name}: {path}"
                );
            }
        }
        // And merged.
        for (path, _, layer) in &mut model.layers {
            if let Some(layer) = layer {
                layer.merge().unwrap();
                assert!(layer.is_merged(), "{path}");
            }
        }
        model.embed.merge().unwrap();
        assert!(largest_difference(&model.forward(), &want[name]) < 1e-6, "{name}, merged");
    }
}

#[test]
fn a_run_of_adalora_gives_up_the_ranks_that_it_gives_up_in_peft() {
    let text = std::fs::read_to_string(golden("peft/adalora_run.json")).unwrap();
    let run: serde_json::Value = serde_json::from_str(&text).unwrap();
    let matrix = |v: &serde_json::Value| {
        Tensor::new(serde_json::from_value::<Vec<Vec<f64>>>(v.clone()).unwrap(), &Device::Cpu).unwrap()
    };
    let bias: Vec<f64> = serde_json::from_value(run["weights"]["0.bias"].clone()).unwrap();
    let layer = |name: &str, bias: Option<Tensor>| {
        let base = FrozenLinear::new(matrix(&run["weights"][format!("{name}.weight")]), bias).unwrap();
        let config = AdaLoraConfig::default().with_init_r(4).with_alpha(6.0);
        let place = Place::alone(name, DType::F64, &Device::Cpu);
        let adapter = AdaLoraAdapter::new(base.in_features(), base.out_features(), &config, &place).unwrap();
        for (factor, var) in adapter.parameters() {
            var.set(&matrix(&run["start"][format!("{name}.{factor}")])).unwrap();
        }
        AdapterLinear::from_parts(base, adapter).unwrap()
    };
    let layers = [layer("0", Some(Tensor::new(bias, &Device::Cpu).unwrap())), layer("2", None)];
    let config = RankBudgetConfig { target_r: 2, beta1: 0.8, beta2: 0.7, ..RankBudgetConfig::default() };
    let mut budget = RankBudget::new(config.with_phases(3, 2).with_every(3)).unwrap();
    let mut sgd = SGD::new(layers.iter().flat_map(AdapterLinear::vars).collect(), 0.1).unwrap();
    let (x, target) = (matrix(&run["x"]), matrix(&run["target"]));
    for (index, want) in (1..=20).zip(run["steps"].as_array().unwrap()) {
        let y = layers[1].forward(&layers[0].forward(&x).unwrap().tanh().unwrap()).unwrap();
        let grads = (y - &target).unwrap().sqr().unwrap().mean_all().unwrap().backward().unwrap();
        sgd.step(&grads).unwrap();
        let adapters = [("0", layers[0].adapter()), ("2", layers[1].adapter())];
        budget.update(Step { index, total: 20 }, &grads, &adapters).unwrap();
        for ((_, adapter), want) in adapters.iter().zip(matrix(want).to_vec2::<f64>().unwrap()) {
            for (got, want) in values(adapter.e()).into_iter().zip(want) {
                assert!(
                    (got - want).abs() < 1e-9 && (got == 0.0) == (want == 0.0),
                    "step {index}: {got}, {want}"
                );
            }
        }
    }
    assert_eq!(layers.iter().map(|l| l.adapter().rank()).sum::<usize>(), 4);
}

/// The small model as one that knows nothing of adapters, from merged weights.
fn merged_forward(dir: &Path) -> Tensor {
    let vb = VarBuilder::from_tensors(base(), DType::F64, &Device::Cpu);
    let merged = MergedWeights::new(vb, AdapterFile::read(dir).unwrap()).unwrap();
    let vb = merged.var_builder();
    let unused = merged.check_all_used().unwrap_err().to_string();
    assert!(unused.contains("was not used: nothing read"), "{unused}");
    let mut x = vb
        .get((11, 8), "embed_tokens.weight")
        .unwrap()
        .index_select(&ids().flatten_all().unwrap(), 0)
        .unwrap();
    for i in 0..2 {
        let vb = vb.pp(format!("layers.{i}"));
        let q = candle_nn::linear(8, 6, vb.pp("q_proj")).unwrap();
        let (c, bias) = (vb.get((6, 8), "c_attn.weight").unwrap(), vb.get(8, "c_attn.bias").unwrap());
        let up = vb.get_unchecked("up_proj.weight").unwrap();
        let q = candle_nn::Module::forward(&q, &x).unwrap().tanh().unwrap();
        let c = q.matmul(&c).unwrap().broadcast_add(&bias).unwrap().tanh().unwrap();
        x = (x + c.matmul(&up.t().unwrap()).unwrap()).unwrap();
    }
    assert_eq!(x.dtype(), DType::F64);
    merged.check_all_used().unwrap();
    assert!(vb.contains_tensor("layers.0.q_proj.bias") && !vb.contains_tensor("lm_head.weight"));
    x.reshape((2, 4, 8)).unwrap()
}

#[test]
fn merged_weights_give_the_outputs_of_peft_to_a_model_that_knows_nothing_of_adapters() {
    let want = outputs("peft");
    for name in SAVED.into_iter().chain(WITH_PARAMETERS) {
        let got = merged_forward(&golden("peft").join(name));
        assert!(largest_difference(&got, &want[name]) < 1e-6, "{name}");
    }
}

#[test]
fn parameters_of_the_model_beside_the_adapters_are_served_or_named_where_nothing_reads_them() {
    let file = AdapterFile::read(golden("peft/saved")).unwrap();
    assert_eq!(file.config().modules_to_save(), ["layers.1.up_proj", "score"]);
    let names: Vec<String> = file.saved_parameters().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["layers.1.up_proj.weight"]);
    let file = AdapterFile::read(golden("peft/bias")).unwrap();
    let names: Vec<String> = file.saved_parameters().into_iter().map(|(name, _)| name).collect();
    let want =
        ["layers.0.c_attn.bias", "layers.0.q_proj.bias", "layers.1.c_attn.bias", "layers.1.q_proj.bias"];
    assert_eq!(names, want);
    let vb = VarBuilder::from_tensors(base(), DType::F32, &Device::Cpu);
    let merged = MergedWeights::new(vb, file).unwrap();
    let vb = merged.var_builder();
    for i in 0..2 {
        vb.get((6, 8), &format!("layers.{i}.q_proj.weight")).unwrap();
    }
    let error = merged.check_all_used().unwrap_err().to_string();
    assert!(error.contains("layers.0.c_attn.bias of the adapter's file was not used"), "{error}");
    let error = vb.get(9, "layers.0.c_attn.bias").unwrap_err().to_string();
    assert!(error.contains("layers.0.c_attn.bias of the adapter's file"), "{error}");
}

#[test]
fn the_bias_of_an_adapter_goes_into_that_of_the_model_or_is_named_where_there_is_none() {
    let file = AdapterFile::read(golden("peft/lora_bias")).unwrap();
    let name = "layers.0.q_proj.bias";
    let own =
        file.tensor("base_model.model.layers.0.q_proj.lora_B.bias").unwrap().to_dtype(DType::F64).unwrap();
    let vb = |weights| VarBuilder::from_tensors(weights, DType::F64, &Device::Cpu);
    let merged = MergedWeights::new(vb(base()), file.clone()).unwrap();
    let want = (base()[name].to_dtype(DType::F64).unwrap() + (own * 2.0).unwrap()).unwrap();
    for got in [merged.var_builder().get(6, name).unwrap(), merged.var_builder().get_unchecked(name).unwrap()]
    {
        assert!(largest_difference(&got, &want) < 1e-6);
    }
    for module in file.modules() {
        merged.var_builder().get_unchecked(&format!("{module}.weight")).unwrap();
    }
    let error = merged.check_all_used().unwrap_err().to_string();
    assert_eq!(error, "the bias of the adapter was not used: nothing read layers.0.c_attn.bias");
    // A sum that is not finite in the dtype that is read.
    let mut weights = base();
    weights.insert(name.into(), Tensor::full(1e30f32, 6, &Device::Cpu).unwrap());
    let narrow = VarBuilder::from_tensors(weights.clone(), DType::F16, &Device::Cpu);
    let merged = MergedWeights::new(narrow, file.clone()).unwrap();
    let error = merged.var_builder().get(6, name).unwrap_err().to_string();
    let want = format!("{name}: the merged layer has values that are not finite in F16");
    assert!(error.starts_with(&want), "{error}"); // candle adds where it was, if asked
    // A model without that bias.
    weights.remove(name);
    let error = MergedWeights::new(vb(weights), file).err().unwrap().to_string();
    let want =
        "the adapter of layers.0.q_proj has a bias, and the model no layers.0.q_proj.bias to add it to";
    assert_eq!(error, want);
}

#[test]
fn a_table_and_an_output_layer_of_a_resized_vocabulary_come_from_the_file() {
    // As PEFT saves them where the vocabulary has grown: below the adapters, which are of the new size.
    let (table, head) =
        (common::noise(&[13, 8], 1.0, DType::F32, 80), common::noise(&[13, 8], 1.0, DType::F32, 81));
    let config = LoraConfig::default().with_r(2).with_alpha(3.0);
    let place = |name| Place::alone(name, DType::F32, &Device::Cpu);
    let embedding = LoraEmbedding::new(table.clone(), &config, &place("embed_tokens")).unwrap();
    common::move_all(embedding.parameters().into_iter().map(|(_, var)| var), 0.4, 82);
    let adapter = LoraAdapter::seeded(8, 13, &config, "lm_head", DType::F32, &Device::Cpu).unwrap();
    common::wake(&adapter, 83);
    let dir = tempfile::tempdir().unwrap();
    let named: [(&str, &dyn Stored); 2] = [("embed_tokens", &embedding), ("lm_head", &adapter)];
    flylora::save_adapters(dir.path(), &named).unwrap();
    let path = dir.path().join(WEIGHTS_FILE);
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    for (module, weight) in [("embed_tokens", &table), ("lm_head", &head)] {
        tensors.insert(format!("base_model.model.{module}.base_layer.weight"), weight.clone());
    }
    candle_core::safetensors::save(&tensors, &path).unwrap();
    // The model has the old vocabulary, and no output layer of its own.
    let file = AdapterFile::read(dir.path()).unwrap();
    let merged =
        MergedWeights::new(VarBuilder::from_tensors(base(), DType::F32, &Device::Cpu), file).unwrap();
    let vb = merged.var_builder();
    assert!(vb.contains_tensor("lm_head.weight"));
    let wants = [
        ("embed_tokens.weight", (&table + embedding.delta_table().unwrap()).unwrap()),
        ("lm_head.weight", (&head + adapter.delta_weight().unwrap()).unwrap()),
    ];
    for (name, want) in wants {
        assert!(largest_difference(&vb.get((13, 8), name).unwrap(), &want) < 1e-6, "{name}");
        assert!(largest_difference(&vb.get_unchecked(name).unwrap(), &want) < 1e-6, "{name}");
    }
    merged.check_all_used().unwrap();
    let error = vb.get((11, 8), "embed_tokens.weight").unwrap_err().to_string();
    assert!(error.contains("embed_tokens.base_layer.weight of the adapter's file"), "{error}");
}

/// Adapters beside a layer that is trained itself.
fn with_a_parameter(dir: &Path) {
    let config = LoraConfig::default().with_r(2).with_alpha(3.0);
    let adapters: Vec<(String, LoraAdapter)> = (0..2)
        .map(|i| {
            let name = format!("layers.{i}.q_proj");
            let adapter = LoraAdapter::seeded(8, 6, &config, &name, DType::F32, &Device::Cpu).unwrap();
            common::wake(&adapter, 70 + i);
            (name, adapter)
        })
        .collect();
    let named: Vec<(&str, &LoraAdapter)> = adapters.iter().map(|(name, a)| (name.as_str(), a)).collect();
    let own = common::noise(&[8, 8], 0.5, DType::F32, 72);
    let options = SaveOptions {
        saved_parameters: [("layers.1.up_proj.weight".to_owned(), own)].into(),
        ..SaveOptions::default()
    };
    save_adapters_with(dir, &named, &options).unwrap();
    let nameless = SaveOptions { saved_parameters: [("scale".into(), ids())].into(), ..options };
    let error = save_adapters_with(dir, &named, &nameless).unwrap_err().to_string();
    assert!(error.contains("a saved parameter must be named with its module"), "{error}");
}

#[test]
fn parameters_that_flylora_saved_are_those_that_peft_loads() {
    let dir = tempfile::tempdir().unwrap();
    with_a_parameter(dir.path());
    let want = outputs("flylora");
    for dir in [dir.path(), &golden("flylora/saved")] {
        assert!(largest_difference(&merged_forward(dir), &want["saved"]) < 1e-6);
    }
}

/// A golden file of combinations: the adapters' factors, configurations and weights, and what to do with them, with the
/// change that PEFT gets.
type Combinations = (Vec<(Tensor, Tensor, LoraConfig, f64)>, Vec<(Combination, Tensor)>);

fn combinations(file: &str) -> Combinations {
    let text = std::fs::read_to_string(golden("peft").join(file)).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let matrix = |v: &serde_json::Value| {
        Tensor::new(serde_json::from_value::<Vec<Vec<f64>>>(v.clone()).unwrap(), &Device::Cpu).unwrap()
    };
    let adapter = |v: &serde_json::Value| {
        let config = LoraConfig::default().with_r(2).with_alpha(2.0 * v["scale"].as_f64().unwrap());
        (matrix(&v["a"]), matrix(&v["b"]), config, v["weight"].as_f64().unwrap())
    };
    let case = |case: &serde_json::Value| {
        let density = case["density"].as_f64().unwrap_or(1.0);
        let rank = case["svd_rank"].as_u64().map(|r| r as usize);
        let over = rank.map_or(Over::Factors, |rank| Over::Product { rank });
        let frequency = case["majority_sign_method"] == "frequency";
        let sign = if frequency { MajoritySign::Frequency } else { MajoritySign::Total };
        let how = match case["how"].as_str().unwrap().trim_end_matches("_svd") {
            "linear" => Combination::Linear,
            "cat" => Combination::Cat,
            "svd" => Combination::Svd { rank: rank.unwrap() },
            "magnitude_prune" => Combination::MagnitudePrune { density, over },
            "ties" => Combination::Ties { density, sign, over },
            "dare_linear" => Combination::DareLinear { density, seed: 0, over },
            "dare_ties" => Combination::DareTies { density, seed: 0, sign, over },
            other => panic!("{other}"),
        };
        (how, matrix(&case["delta"]))
    };
    let list = |name: &str| golden[name].as_array().unwrap().clone();
    (list("adapters").iter().map(adapter).collect(), list("cases").iter().map(case).collect())
}

#[test]
fn combinations_are_those_of_peft() {
    let (adapters, cases) = combinations("combine.json");
    let adapters: Vec<(LoraAdapter, f64)> = adapters
        .iter()
        .map(|(a, b, config, weight)| (LoraAdapter::from_factors(a, b, config).unwrap(), *weight))
        .collect();
    let weighted: Vec<(&LoraAdapter, f64)> = adapters.iter().map(|(a, w)| (a, *w)).collect();
    assert!(cases.len() > 15);
    for (how, want) in cases {
        let got = combine(&weighted, how).unwrap().delta_weight().unwrap();
        assert!(largest_difference(&got, &want) < 1e-4, "{how:?}");
    }
}

#[test]
fn combinations_of_embeddings_are_those_of_peft() {
    let (adapters, cases) = combinations("combine_embedding.json");
    let table = common::noise(&[7, 4], 1.0, DType::F64, 1);
    let make = |a: &Tensor, b: &Tensor, config: &LoraConfig| {
        LoraEmbedding::from_factors(table.clone(), a, b, config).unwrap()
    };
    let adapters: Vec<(LoraEmbedding, f64)> =
        adapters.iter().map(|(a, b, config, weight)| (make(a, b, config), *weight)).collect();
    let weighted: Vec<(&LoraEmbedding, f64)> = adapters.iter().map(|(e, w)| (e, *w)).collect();
    assert!(cases.len() > 15);
    for (how, want) in cases {
        let got = combine_embeddings(&weighted, how).unwrap().delta_table().unwrap();
        assert!(largest_difference(&got, &want) < 1e-4, "{how:?}");
    }
}

/// The kinds that PEFT reads, trained for a few steps.
fn trained() -> Vec<(&'static str, Tiny)> {
    let lora = LoraConfig::default().with_r(2).with_alpha(3.0);
    let kinds = [
        ("lora", AdapterKind::Lora(lora.clone())),
        ("rslora", AdapterKind::Lora(lora.clone().with_scaling(Scaling::AlphaOverSqrtR))),
        ("pissa", AdapterKind::Lora(lora.clone().with_init(LoraInit::Pissa { iterations: None }))),
        ("orthogonal", AdapterKind::Lora(lora.clone().with_init(LoraInit::Orthogonal))),
        ("lora_bias", AdapterKind::Lora(lora.clone().with_bias(true))),
        ("dora", AdapterKind::Dora(lora)),
        ("adalora", AdapterKind::AdaLora(AdaLoraConfig::default().with_init_r(3))),
    ];
    let target = common::noise(&[2, 4, 8], 1.0, DType::F64, 7);
    kinds
        .into_iter()
        .map(|(name, kind)| {
            let model = Tiny::new(|path, frozen| {
                // Of other sizes in the second block.
                let kind = match &kind {
                    AdapterKind::Lora(c) if path.starts_with("layers.1") && name == "lora" => {
                        AdapterKind::Lora(c.clone().with_r(3).with_alpha(2.5))
                    }
                    kind => kind.clone(),
                };
                let place = Place::alone(path, DType::F32, &Device::Cpu);
                Some(kind.build(frozen, &place).unwrap())
            });
            let vars: Vec<Var> = model.adapted().iter().flat_map(|(_, layer)| layer.vars()).collect();
            if name == "adalora" {
                // Its own start is so near to nothing that a few steps would not show.
                for (i, var) in vars.iter().enumerate() {
                    var.set(&common::noise(var.dims(), 0.4, var.dtype(), i as u64)).unwrap();
                }
            }
            let mut sgd = SGD::new(vars, 0.2).unwrap();
            let loss = || (model.forward() - &target).unwrap().sqr().unwrap().mean_all().unwrap();
            for _ in 0..5 {
                sgd.backward_step(&loss()).unwrap();
            }
            (name, model)
        })
        .collect()
}

/// Writes the adapters that `golden/peft_golden.py flylora` loads into PEFT.
#[test]
#[ignore = "writes golden files"]
fn write_the_adapters_for_peft() {
    for (name, model) in trained() {
        let options = SaveOptions { fan_in_fan_out: true, ..SaveOptions::default() };
        save_adapters_with(golden("flylora").join(name), &model.adapted(), &options).unwrap();
    }
    with_a_parameter(&golden("flylora/saved"));
}

#[test]
fn adapters_that_flylora_trained_give_in_peft_what_they_give_here() {
    let want = outputs("flylora");
    assert_eq!(want.len(), 8);
    let plain = Tiny::new(|_, _| None).forward();
    for (name, model) in trained() {
        let dir = golden("flylora").join(name);
        // From the files that PEFT was given.
        let file = AdapterFile::read(&dir).unwrap();
        let loaded = Tiny::new(|path, frozen| Some(file.adapter(path, frozen, DType::F64).unwrap()));
        let got = loaded.forward();
        assert!(largest_difference(&got, &want[name]) < 1e-6, "{name}");
        assert!(largest_difference(&got, &plain) > 0.02, "{name} has an effect");
        // What is written today is what PEFT was given then: the same files from the same adapters.
        let again = tempfile::tempdir().unwrap();
        load_adapters(&dir, &model.adapted()).unwrap();
        let options = SaveOptions { fan_in_fan_out: true, ..SaveOptions::default() };
        save_adapters_with(again.path(), &model.adapted(), &options).unwrap();
        for file in [WEIGHTS_FILE, "adapter_config.json"] {
            let read = |dir: &Path| std::fs::read(dir.join(file)).unwrap();
            assert!(read(again.path()) == read(&dir), "{name}: {file} is written otherwise");
        }
        assert!(largest_difference(&model.forward(), &want[name]) < 1e-5, "{name}");
    }
}

fn data() -> Option<PathBuf> {
    std::env::var_os("VESPER_DATA").map(PathBuf::from)
}

/// candle-transformers' own Llama, unchanged, with adapters that PEFT trained.
#[test]
fn peft_adapters_run_in_the_llama_of_candle_transformers() {
    use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};

    let Some(data) = data() else {
        println!("skipped: peft_adapters_run_in_the_llama_of_candle_transformers (VESPER_DATA is not set)");
        return;
    };
    let folder = data.join("models/stories260K");
    let config: LlamaConfig =
        serde_json::from_str(&std::fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    let config = config.into_config(false);
    for name in ["stories260K-lora-qv-r8", "stories260K-lora-all-linear-r4-rslora"] {
        let dir = data.join("peft").join(name);
        let reference: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("reference_logits.json")).unwrap())
                .unwrap();
        let numbers = |field: &str| -> Vec<f64> {
            reference[field].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let weights = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
        let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let merged = MergedWeights::new(vb, AdapterFile::read(&dir).unwrap()).unwrap();
        let model = Llama::load(merged.var_builder(), &config).unwrap();
        merged.check_all_used().unwrap();
        let ids: Vec<u32> = numbers("prompt_ids").iter().map(|id| *id as u32).collect();
        let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
        let logits = model.forward(&ids, 0, &mut cache).unwrap();
        let want = Tensor::new(numbers("last_logits"), &Device::Cpu).unwrap();
        assert!(largest_difference(&logits.i(0).unwrap(), &want) < 1e-4, "{name}");
        let size = values(&want).iter().fold(0f64, |m, v| m.max(v.abs()));
        assert!(size > 5.0);
    }
}

/// An adapter for GPT-2, whose weights are stored the other way around; the base is not there, only its sizes.
#[test]
fn an_adapter_for_gpt2_is_read_with_its_transposed_weights() {
    let Some(data) = data() else {
        println!("skipped: an_adapter_for_gpt2_is_read_with_its_transposed_weights (VESPER_DATA is not set)");
        return;
    };
    let file = AdapterFile::read(data.join("peft/gpt2-causal-tigrinya")).unwrap();
    assert!(file.config().fan_in_fan_out());
    let modules = file.modules();
    assert_eq!(modules.len(), 36);
    let path = "transformer.h.0.attn.c_proj"; // square
    assert!(modules.contains(&path) && file.config().targets().selects(path));
    let weight = common::noise(&[768, 768], 0.05, DType::F32, 1);
    let weights = HashMap::from([(format!("{path}.weight"), weight.clone())]);
    let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
    let merged = MergedWeights::new(vb, file.clone()).unwrap();
    let got = merged.var_builder().get((768, 768), &format!("{path}.weight")).unwrap();
    let tensor = |name: &str| file.tensor(&format!("base_model.model.{path}.{name}.weight")).unwrap();
    let delta = (tensor("lora_B").matmul(tensor("lora_A")).unwrap() * 4.0).unwrap();
    assert!(largest_difference(&got, &(weight + delta.t().unwrap()).unwrap()) < 1e-6);
}
