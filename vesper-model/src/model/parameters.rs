//! The names, shapes and first values of a model's parameters: the one list that the model, its files and its count
//! are made from.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, VarMap};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{ModelError, Projection, Result, VesperConfig};

/// One parameter of a model, as it stands in a `VarMap`.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its first values.
    pub init: Init,
    /// Whether training changes it: everything, or the adapters alone where the configuration has adapters.
    pub trainable: bool,
}

const ONES: Init = Init::Const(1.0);

impl VesperConfig {
    /// Every parameter in the order of the forward pass. Projections that read the same input are packed into one
    /// matrix: `qkv_proj` has the rows of q, k and v, `gate_up_proj` those of gate and up.
    ///
    /// Matrices start normal with standard deviation `initializer_range`, the two that write into the residual stream
    /// (`o_proj`, `down_proj`) with `initializer_range / sqrt(2 layers)`, norms at one, `lora_A` uniform in
    /// `+-1 / sqrt(in)`, `lora_B` at zero.
    ///
    /// # References
    /// Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (the residual scale).
    pub fn parameters(&self) -> Vec<Parameter> {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let base = self.adapter.is_none();
        let normal = Init::Randn { mean: 0.0, stdev: self.initializer_range };
        let residual = Init::Randn {
            mean: 0.0,
            stdev: self.initializer_range / (2.0 * self.num_hidden_layers as f64).sqrt(),
        };
        let mut all = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, init: Init, trainable: bool| {
            all.push(Parameter { name, shape, init, trainable });
        };
        add("model.embed_tokens.weight".into(), vec![self.vocab_size, d], normal, base);
        for i in 0..self.num_hidden_layers {
            let block = format!("model.layers.{i}");
            let (_, q) = self.projection_size(Projection::QProj);
            add(format!("{block}.input_layernorm.weight"), vec![d], ONES, base);
            add(format!("{block}.self_attn.qkv_proj.weight"), vec![self.qkv_size(), d], normal, base);
            add(format!("{block}.self_attn.o_proj.weight"), vec![d, q], residual, base);
            add(format!("{block}.post_attention_layernorm.weight"), vec![d], ONES, base);
            add(format!("{block}.mlp.gate_up_proj.weight"), vec![2 * f, d], normal, base);
            add(format!("{block}.mlp.down_proj.weight"), vec![d, f], residual, base);
            for projection in self.adapter.iter().flat_map(|adapter| &adapter.targets) {
                let rank = self.adapter.as_ref().map_or(0, |adapter| adapter.lora.r);
                let (input, output) = self.projection_size(*projection);
                let bound = 1.0 / (input as f64).sqrt();
                let a = Init::Uniform { lo: -bound, up: bound };
                let path = projection.path();
                add(format!("{block}.{path}.lora_A.weight"), vec![rank, input], a, true);
                add(format!("{block}.{path}.lora_B.weight"), vec![output, rank], Init::Const(0.0), true);
            }
        }
        add("model.norm.weight".into(), vec![d], ONES, base);
        if !self.tie_word_embeddings {
            add("lm_head.weight".into(), vec![self.vocab_size, d], normal, base);
        }
        all
    }
}

/// Puts a freshly initialised model into a `VarMap`: the same values for the same seed, on every device.
///
/// Each parameter's values depend on the seed and its name alone, so adding adapters does not change the rest.
/// (candle's own CPU initialisation cannot be seeded.)
///
/// # Errors
/// [`ModelError::InvalidConfig`], or a device that is out of memory.
pub fn initialize(
    config: &VesperConfig,
    varmap: &VarMap,
    seed: u64,
    dtype: DType,
    device: &Device,
) -> Result<()> {
    config.validate()?;
    for parameter in config.parameters() {
        let values = draw(&parameter, seed);
        insert(
            varmap,
            &parameter.name,
            &Tensor::from_vec(values, parameter.shape.as_slice(), device)?,
            dtype,
        )?;
    }
    Ok(())
}

/// Puts a tensor into a `VarMap`, or sets the variable of that name.
///
/// # Errors
/// A variable of that name with another shape, or a device that is out of memory.
pub(crate) fn insert(varmap: &VarMap, name: &str, value: &Tensor, dtype: DType) -> Result<()> {
    let value = value.to_dtype(dtype)?;
    let mut data = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match data.get(name) {
        Some(var) => var.set(&value)?,
        None => {
            data.insert(name.to_owned(), Var::from_tensor(&value)?);
        }
    }
    Ok(())
}

fn draw(parameter: &Parameter, seed: u64) -> Vec<f32> {
    let n = parameter.shape.iter().product();
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ fnv1a(parameter.name.as_bytes()));
    match parameter.init {
        Init::Const(value) => vec![value as f32; n],
        Init::Uniform { lo, up } => (0..n).map(|_| (lo + (up - lo) * rng.random::<f64>()) as f32).collect(),
        Init::Randn { mean, stdev } => {
            let mut values = Vec::with_capacity(n + 1);
            while values.len() < n {
                // Box and Muller; 1 - u is in (0, 1], so the logarithm is finite.
                let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
                let radius = (-2.0 * u.ln()).sqrt();
                let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
                values.push((mean + stdev * radius * cos) as f32);
                values.push((mean + stdev * radius * sin) as f32);
            }
            values.truncate(n);
            values
        }
        // `parameters` above makes no other kind.
        Init::Kaiming { .. } => vec![0.0; n],
    }
}

/// FNV-1a, to turn a name into a seed.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// The variables of a `VarMap` that training changes, by name, sorted: what an optimizer should get.
///
/// # Errors
/// [`ModelError::MissingParameter`] where a parameter of the configuration is not in the `VarMap`.
///
/// # Examples
/// ```
/// use vesper_model::candle_core::{DType, Device};
/// use vesper_model::candle_nn::VarMap;
/// use vesper_model::{VesperConfig, VesperLM, trainable};
///
/// let (config, varmap) = (VesperConfig::preset("nano")?.with_vocab(64), VarMap::new());
/// VesperLM::initialize(&config, &varmap, 42, DType::F32, &Device::Cpu)?;
/// let vars = trainable(&config, &varmap)?;
/// let count: usize = vars.iter().map(|(_, var)| var.elem_count()).sum();
/// assert_eq!(count, config.num_parameters());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn trainable(config: &VesperConfig, varmap: &VarMap) -> Result<Vec<(String, Var)>> {
    let data = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut vars = Vec::new();
    for parameter in config.parameters().into_iter().filter(|p| p.trainable) {
        let Some(var) = data.get(&parameter.name) else {
            return Err(ModelError::MissingParameter { name: parameter.name });
        };
        vars.push((parameter.name, var.clone()));
    }
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(vars)
}
