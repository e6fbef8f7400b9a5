//! Adapters on disk, in the layout of Hugging Face PEFT.
//!
//! ```text
//! DIR/adapter_model.safetensors   base_model.model.<path>.lora_A.weight, base_model.model.<path>.lora_B.weight
//! DIR/adapter_config.json         peft_type, r, lora_alpha, target_modules, ...
//! ```

mod load;
mod peft_config;
mod save;

pub use load::load_adapters;
pub use peft_config::PeftConfig;
pub use save::save_adapters;

use crate::adapter::LoraAdapter;
use crate::linear::LoraLinear;

/// The name of the file of the weights.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The name of the file of the configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// Something that a [`LoraAdapter`] can be saved from and loaded into: a [`LoraLinear`], or the adapter itself.
pub trait Stored {
    /// The adapter.
    fn stored(&self) -> &LoraAdapter;

    /// Whether a copy of the adapter is in a merged weight, which loading would not change.
    fn is_merged(&self) -> bool {
        false
    }
}

impl Stored for LoraAdapter {
    fn stored(&self) -> &LoraAdapter {
        self
    }
}

impl Stored for LoraLinear {
    fn stored(&self) -> &LoraAdapter {
        self.adapter()
    }

    fn is_merged(&self) -> bool {
        LoraLinear::is_merged(self)
    }
}

fn key(path: &str, name: &str) -> String {
    format!("base_model.model.{path}.{name}")
}

/// That there are adapters, each with its own path that a PEFT file can name.
fn check_paths<S>(adapters: &[(&str, &S)]) -> crate::Result<()> {
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
