//! Weights in GGUF blocks: small integers with a scale to each block, a quarter to an eighth of the size of f32.
//!
//! [`VesperLM::quantized`](crate::VesperLM::quantized) turns a model's matrices into blocks as a [`Policy`] says, [`save`]
//! writes it as one GGUF file with its tokenizer and settings, and [`Gguf`] opens such a file. A quantised model
//! generates, is evaluated and takes adapters like any other.
//!
//! ```
//! use vesper_model::candle_core::{DType, Device};
//! use vesper_model::candle_nn::VarMap;
//! use vesper_model::quantized::{BlockType, Gguf, GgufExtras, Policy, save};
//! use vesper_model::{VesperConfig, VesperLM};
//!
//! let config = VesperConfig::preset("nano")?.with_vocab(64);
//! let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
//! let (model, _) = model.quantized(&Policy::new(BlockType::Q8_0))?;
//! let path = tempfile::tempdir()?.keep().join("model.gguf");
//! save(&path, &model, &GgufExtras::default())?;
//! let model = Gguf::open(&path)?.model(DType::F32, &Device::Cpu)?;
//! assert_eq!(model.config(), &config);
//! # std::fs::remove_dir_all(path.parent().unwrap())?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod block_type;
mod frozen;
mod gguf;
mod matrix;
mod policy;
mod quantiser;
mod report;

pub use block_type::BlockType;
pub use gguf::{Gguf, GgufExtras, save};
pub use policy::Policy;
pub use report::{Report, TensorReport};

pub(crate) use frozen::frozen;
pub(crate) use matrix::{BlockMatrix, Weight, from_bytes};
pub(crate) use quantiser::Quantiser;
