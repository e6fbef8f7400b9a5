use std::path::{Path, PathBuf};

use serde_json::Value;

use super::CONFIG_FILE;
use super::saved::Saved;
use crate::adapter::{AdapterKind, MaskedLoraConfig};
use crate::targets::{Pattern, Targets};
use crate::{Error, LoraConfig, Result};

mod fields;
mod kinds;
mod order;
mod read;
mod write;

use fields::Reader;
use kinds::{numbers, peft_type};
use order::Orders;
pub(in crate::files) use write::write;

/// Which adapters the modules of a model have: what a PEFT `adapter_config.json` says, or made by [`new`](Self::new).
///
/// # Examples
///
/// ```no_run
/// use flylora::files::PeftConfig;
///
/// # fn main() -> Result<(), flylora::Error> {
/// let config = PeftConfig::read("adapters/french")?;
/// let kind = config.kind("model.layers.0.self_attn.q_proj")?; // what to make the layer's adapter with
/// println!("{kind}, on {:?}", config.targets());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct PeftConfig {
    /// The file that it was read from.
    path: PathBuf,
    /// The kind of a module that no pattern names.
    kind: AdapterKind,
    targets: Targets,
    fan_in_fan_out: bool,
    /// What else of the model is in the file of the weights.
    saved: Saved,
    /// Modules with another rank or alpha, in the order of the file: the first that matches counts.
    rank_pattern: Vec<(Pattern, usize)>,
    alpha_pattern: Vec<(Pattern, f64)>,
}

/// PEFT's way of matching the key of a pattern: the end of a path, from a dot on.
const PATTERN_FRAME: &str = r"^(.*\.)?({})$";

impl PeftConfig {
    /// A configuration that is made here: adapters of a kind for the modules that the targets select.
    ///
    /// # Examples
    ///
    /// ```
    /// use flylora::files::PeftConfig;
    /// use flylora::{AdapterKind, LoraConfig, Targets};
    ///
    /// # fn main() -> Result<(), flylora::Error> {
    /// let lora = LoraConfig::default().with_r(8).with_alpha(16.0);
    /// let config = PeftConfig::new(AdapterKind::Lora(lora), Targets::all_linear())
    ///     .with_rank_pattern([("down_proj", 32), (r"layers\.0\..*", 4)])?
    ///     .with_alpha_pattern([("down_proj", 64.0)])?;
    /// let down = config.lora("model.layers.0.mlp.down_proj"); // the first that matches counts
    /// assert_eq!((down.r, down.alpha), (32, 64.0));
    /// let up = config.lora("model.layers.0.mlp.up_proj");
    /// assert_eq!((up.r, up.alpha), (4, 16.0));
    /// // For each layer of a model: config.targets().selects(path), and then config.kind(path)?.build(...).
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(kind: AdapterKind, targets: Targets) -> Self {
        Self {
            path: PathBuf::new(),
            kind,
            targets,
            fan_in_fan_out: false,
            saved: Saved::default(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
        }
    }

    /// Gives modules ranks of their own: PEFT's `rank_pattern`, expressions for endings of paths from a dot on, of which the
    /// first that matches counts. AdaLoRA's ranks are its budget's matter.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`].
    pub fn with_rank_pattern<S: AsRef<str>>(
        mut self,
        patterns: impl IntoIterator<Item = (S, usize)>,
    ) -> Result<Self> {
        self.rank_pattern = compiled("rank_pattern", patterns)?;
        Ok(self)
    }

    /// Gives modules an alpha of their own: PEFT's `alpha_pattern`, as [`with_rank_pattern`](Self::with_rank_pattern).
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`].
    pub fn with_alpha_pattern<S: AsRef<str>>(
        mut self,
        patterns: impl IntoIterator<Item = (S, f64)>,
    ) -> Result<Self> {
        self.alpha_pattern = compiled("alpha_pattern", patterns)?;
        Ok(self)
    }

    /// Reads `adapter_config.json` in `dir`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], [`Error::Format`], and [`Error::Unsupported`] for a field, known or not, that asks for something
    /// that is not there. Unknown fields that are null, false or empty are off and are passed over.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join(CONFIG_FILE);
        let text =
            std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let format = |message: String| Error::Format { path: path.clone(), message };
        let value = serde_json::from_str(&text).map_err(|e| format(format!("not complete JSON: {e}")))?;
        let Value::Object(fields) = value else {
            return Err(format("expected a JSON object".into()));
        };
        let order: Orders = serde_json::from_str(&text).map_err(|e| format(e.to_string()))?;
        Reader { path: &path, fields: &fields }.read(&order)
    }

    /// The kind of the adapter of a module, with its rank and alpha.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where they are not in their range.
    pub fn kind(&self, module: &str) -> Result<AdapterKind> {
        let r = first(&self.rank_pattern, module);
        let alpha = first(&self.alpha_pattern, module);
        let mut kind = self.kind.clone();
        match &mut kind {
            AdapterKind::Lora(c)
            | AdapterKind::Dora(c)
            | AdapterKind::MaskedLora(MaskedLoraConfig { lora: c, .. }) => {
                (c.r, c.alpha) = (r.unwrap_or(c.r), alpha.unwrap_or(c.alpha));
            }
            // PEFT gives all AdaLoRA layers one alpha.
            AdapterKind::AdaLora(_) => {}
            AdapterKind::FlyLora(c) => (c.r, c.alpha) = (r.unwrap_or(c.r), alpha.unwrap_or(c.alpha)),
        }
        kind.validate()?;
        Ok(kind)
    }

    /// The rank, alpha and scaling of a module's adapter, for kinds that have LoRA's; the seed is the default one.
    pub fn lora(&self, module: &str) -> LoraConfig {
        let base = match &self.kind {
            AdapterKind::Lora(c) | AdapterKind::Dora(c) => c.clone(),
            AdapterKind::MaskedLora(c) => c.lora.clone(),
            AdapterKind::AdaLora(c) => {
                LoraConfig { r: c.init_r, alpha: c.alpha, dropout: c.dropout, ..LoraConfig::default() }
            }
            AdapterKind::FlyLora(c) => LoraConfig { r: c.r, alpha: c.alpha, ..LoraConfig::default() },
        };
        let r = first(&self.rank_pattern, module).unwrap_or(base.r);
        let alpha = first(&self.alpha_pattern, module).unwrap_or(base.alpha);
        LoraConfig { r, alpha, ..base }
    }

    /// Which modules have an adapter.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// The modules that have an adapter, where the file lists them: names, or endings of names.
    pub fn target_modules(&self) -> &[String] {
        self.targets.listed_names()
    }

    /// Whether the model keeps its weights as (in, out), as GPT-2 does.
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// The modules whose own parameters are in the file too, by their names or endings of them: PEFT's `modules_to_save`.
    pub fn modules_to_save(&self) -> &[String] {
        &self.saved.modules
    }

    pub(super) fn saved(&self) -> &Saved {
        &self.saved
    }

    pub(super) fn check(&self, module: &str, adapter: &AdapterKind) -> Result<()> {
        let file = self.kind(module)?;
        let fail = |field, expected: String, got: String| {
            Err(Error::Mismatch { path: self.path.clone(), module: module.to_owned(), field, expected, got })
        };
        if peft_type(&file) != peft_type(adapter)
            || matches!(file, AdapterKind::Dora(_)) != matches!(adapter, AdapterKind::Dora(_))
        {
            return fail("the kind", adapter.to_string(), file.to_string());
        }
        let (ours, theirs) = (numbers(adapter), numbers(&file));
        for ((field, ours), (_, theirs)) in ours.into_iter().zip(theirs) {
            // Decimal numbers may lose their last bit on the way through a file.
            if (theirs - ours).abs() > 1e-12 * ours.abs() {
                return fail(field, ours.to_string(), theirs.to_string());
            }
        }
        match (&file, adapter) {
            (AdapterKind::Lora(file), AdapterKind::Lora(ours)) if file.bias != ours.bias => {
                fail("lora_bias", ours.bias.to_string(), file.bias.to_string())
            }
            (AdapterKind::FlyLora(file), AdapterKind::FlyLora(ours)) if file.routing != ours.routing => {
                fail("fly_routing", format!("{:?}", ours.routing), format!("{:?}", file.routing))
            }
            _ => Ok(()),
        }
    }
}

fn compiled<S: AsRef<str>, T>(
    field: &str,
    patterns: impl IntoIterator<Item = (S, T)>,
) -> Result<Vec<(Pattern, T)>> {
    let compile = |(text, value): (S, T)| Ok((Pattern::new(field, text.as_ref(), PATTERN_FRAME)?, value));
    patterns.into_iter().map(compile).collect()
}

fn first<T: Copy>(patterns: &[(Pattern, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
}
