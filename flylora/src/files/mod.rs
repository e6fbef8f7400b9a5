//! Adapters on disk, in the layout of Hugging Face PEFT.
//!
//! ```text
//! DIR/adapter_model.safetensors   base_model.model.<path>.lora_A.weight, base_model.model.<path>.lora_B.weight, ...
//! DIR/adapter_config.json         peft_type, r, lora_alpha, target_modules, ...
//! ```
//!
//! LoRA, rank-stabilised LoRA, DoRA and AdaLoRA are PEFT's own, both ways. FlyLoRA and masked FlyLoRA have the same
//! layout with a `peft_type` of their own (`FLYLORA`, `MASKED_FLYLORA`), which PEFT refuses by that name.
//!
//! Parameters of the model that were trained themselves (`modules_to_save`, `bias`) lie beside the adapters, under the names
//! that they have in the model: [`AdapterFile::saved_parameters`], [`SaveOptions::saved_parameters`].

use candle_core::Tensor;

use crate::adapter::{Adapter, AdapterKind, Change};
use crate::embedding::LoraEmbedding;
use crate::linear::AdapterLinear;

mod adapter_file;
mod load;
mod merged_weights;
mod peft_config;
mod save;
mod saved;
mod state;

pub use adapter_file::AdapterFile;
pub use load::load_adapters;
pub use merged_weights::MergedWeights;
pub use peft_config::PeftConfig;
pub use save::{SaveOptions, save_adapters, save_adapters_with};
pub use state::StateSource;

/// The name of the file of the weights.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The name of the file of the configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// What every key begins with.
const PREFIX: &str = "base_model.model.";

/// Something that can be saved as an adapter and loaded into: an [`Adapter`], an [`AdapterLinear`], a [`LoraEmbedding`].
pub trait Stored {
    /// The kind and its configuration.
    fn kind(&self) -> AdapterKind;

    /// All that a file has to hold, by name.
    ///
    /// # Errors
    ///
    /// candle's own.
    fn state(&self) -> crate::Result<Vec<(String, Tensor)>>;

    /// Reads and checks what a file holds; nothing changes before the changes are made.
    ///
    /// # Errors
    ///
    /// Those of [`StateSource`].
    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>>;

    /// Whether a copy of the adapter is in a merged weight, which loading would not change.
    fn is_merged(&self) -> bool {
        false
    }
}

impl<A: Adapter + ?Sized> Stored for A {
    fn kind(&self) -> AdapterKind {
        Adapter::kind(self)
    }

    fn state(&self) -> crate::Result<Vec<(String, Tensor)>> {
        Adapter::state(self)
    }

    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        Adapter::load_state(self, source)
    }
}

impl<A: Adapter> Stored for AdapterLinear<A> {
    fn kind(&self) -> AdapterKind {
        self.adapter().kind()
    }

    fn state(&self) -> crate::Result<Vec<(String, Tensor)>> {
        Adapter::state(self.adapter())
    }

    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        Adapter::load_state(self.adapter(), source)
    }

    fn is_merged(&self) -> bool {
        AdapterLinear::is_merged(self)
    }
}

impl Stored for LoraEmbedding {
    fn kind(&self) -> AdapterKind {
        LoraEmbedding::kind(self)
    }

    fn state(&self) -> crate::Result<Vec<(String, Tensor)>> {
        Ok(self.parameters().into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect())
    }

    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        self.parameters()
            .into_iter()
            .map(|(name, var)| {
                let value = source.like(&name, &var)?;
                Ok(Box::new(move || Ok(var.set(&value)?)) as Change<'a>)
            })
            .collect()
    }

    fn is_merged(&self) -> bool {
        LoraEmbedding::is_merged(self)
    }
}

fn key(path: &str, name: &str) -> String {
    format!("{PREFIX}{path}.{name}")
}

/// That there are adapters, each with its own path that a PEFT file can name.
fn check_paths<S: ?Sized>(adapters: &[(&str, &S)]) -> crate::Result<()> {
    let fail = |message: String| Err(crate::Error::Adapters { message });
    let mut paths: Vec<&str> = adapters.iter().map(|(path, _)| *path).collect();
    paths.sort_unstable();
    if paths.is_empty() {
        return fail("there is no adapter to save or load".into());
    }
    if let Some(path) = paths.iter().find(|path| path.split('.').any(str::is_empty)) {
        return fail(format!("{path:?} is not the path of a module: names joined by dots"));
    }
    match paths.windows(2).find(|pair| pair.first() == pair.last()).and_then(|pair| pair.first()) {
        Some(path) => fail(format!("two adapters have the path {path}")),
        None => Ok(()),
    }
}
