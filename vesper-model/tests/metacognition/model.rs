//! A model that nothing was taught, and text on which its errors follow a rule.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarMap;
use velvet_optim::{Velvet, VelvetConfig};
use vesper_model::metacognition::{BaseModel, ErrorHead, HeadConfig, HeadTraining, Predictions, Trained};
use vesper_model::{VesperConfig, VesperLM};

pub(crate) const VOCAB: u32 = 64;

pub(crate) fn config() -> VesperConfig {
    let mut config = VesperConfig::preset("nano").unwrap().with_vocab(VOCAB as usize);
    config.num_hidden_layers = 2;
    config.hidden_size = 32;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 4;
    config.head_dim = 8;
    config.intermediate_size = 48;
    config.max_position_embeddings = 64;
    config
}

pub(crate) fn of_seed(seed: u64) -> VesperLM {
    VesperLM::initialize(&config(), &VarMap::new(), seed, DType::F32, &Device::Cpu).unwrap()
}

/// Pseudo-random ids, (4, 32).
pub(crate) fn ids(seed: u32) -> Tensor {
    let ids: Vec<u32> = (0..4 * 32)
        .map(|i: u32| {
            let x = (i + 1000 * seed).wrapping_mul(2_654_435_761);
            ((x >> 15) ^ (x >> 3)) % VOCAB
        })
        .collect();
    Tensor::from_vec(ids, (4, 32), &Device::Cpu).unwrap()
}

/// Targets that the model's likeliest token is right about exactly after an even id.
pub(crate) fn targets(model: &VesperLM, ids: &Tensor) -> Tensor {
    let best = model.forward(ids).unwrap().argmax(D::Minus1).unwrap().flatten_all().unwrap();
    let best = best.to_vec1::<u32>().unwrap();
    let read = ids.flatten_all().unwrap().to_vec1::<u32>().unwrap();
    let target = |(best, id): (u32, u32)| if id % 2 == 0 { best } else { (best + 1 + id) % VOCAB };
    let targets: Vec<u32> = best.into_iter().zip(read).map(target).collect();
    Tensor::from_vec(targets, ids.dims2().unwrap(), &Device::Cpu).unwrap()
}

/// Predictions on the texts with these seeds.
pub(crate) fn predictions(model: &VesperLM, config: &HeadConfig, seeds: std::ops::Range<u32>) -> Predictions {
    let mut predictions = Predictions::new(config).unwrap();
    for seed in seeds {
        let ids = ids(seed);
        predictions.add(model, &ids, &targets(model, &ids)).unwrap();
    }
    predictions
}

pub(crate) fn trained(model: &VesperLM, config: &HeadConfig, seed: u64) -> (ErrorHead, Trained) {
    let predictions = predictions(model, config, 0..12);
    let head = ErrorHead::new(&BaseModel::of(model).unwrap(), config, &predictions, seed).unwrap();
    let settings = VelvetConfig { lr: 1e-2, ..Default::default() };
    let mut optimizer = Velvet::named(head.parameters(), settings).unwrap();
    let training = HeadTraining { epochs: 12, batch: 64, seed };
    let trained = training.run(&head, &predictions, &mut optimizer).unwrap();
    (head, trained)
}
