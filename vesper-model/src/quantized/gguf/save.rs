//! Writing a GGUF file, so that a reader or a crash never meets half of it.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Tensor};
use half::{bf16, f16};
use tokenizers::Tokenizer;

use super::{ALIGNMENT, LLAMA, MAGIC, VERSION, architecture, invalid, keys, names, rope_freqs};
use crate::generate::GenerationConfig;
use crate::hf::{check_tokenizer, io};
use crate::quantized::{BlockType, Weight};
use crate::{ModelError, Result, VesperConfig, VesperLM};

/// What belongs to a model beside its configuration and weights.
#[derive(Debug, Clone, Default)]
pub struct GgufExtras<'a> {
    /// What the model is called.
    pub name: Option<&'a str>,
    /// The text of `tokenizer.json`.
    pub tokenizer_json: Option<&'a str>,
    /// How the model is meant to generate; tokens it does not name are taken from the configuration.
    pub generation: GenerationConfig,
    /// The chat template.
    pub chat_template: Option<&'a str>,
    /// The special tokens that the template writes, `bos_token` and so on:
    /// [`ChatTemplate::special_tokens`](crate::chat::ChatTemplate::special_tokens).
    pub special_tokens: BTreeMap<String, String>,
}

/// Writes a model as a GGUF file: its weights as they are, blocks or plain, its configuration, tokenizer and settings.
///
/// A model with SiLU whose rotary positions are plain or scaled as in Llama 3 is written as the architecture `llama`, with
/// the names, keys and order of rows that other programs know, and the scaling's factors as `rope_freqs.weight`; any other
/// as `vesper`, which has the same names. `config.json`, `generation_config.json` and `tokenizer.json` are texts in the
/// metadata. (Other programs also want the tokenizer in a form of their own, which is not written.)
///
/// The file is written beside its place, flushed and renamed: a full disk leaves an older file as it was. The same model
/// gives the same bytes.
///
/// # Errors
/// [`ModelError::NotQuantisable`] for a model with adapters; a tokenizer or settings that do not fit the model;
/// [`ModelError::Io`] names the file that cannot be written.
///
/// # Examples
/// ```
/// use vesper_model::candle_core::{DType, Device};
/// use vesper_model::candle_nn::VarMap;
/// use vesper_model::quantized::{BlockType, Gguf, GgufExtras, Policy, save};
/// use vesper_model::{VesperConfig, VesperLM};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = VesperConfig::preset("nano")?.with_vocab(64);
/// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
/// let (small, _report) = model.quantized(&Policy::new(BlockType::Q8_0))?;
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("model.gguf");
/// save(&path, &small, &GgufExtras::default())?;
/// let file = Gguf::open(&path)?;
/// assert!(file.is_quantized() && file.config() == small.config());
/// # Ok(())
/// # }
/// ```
pub fn save(path: impl AsRef<Path>, model: &VesperLM, extras: &GgufExtras<'_>) -> Result<()> {
    let path = path.as_ref();
    if !model.adapters().is_empty() {
        let reason = "it has adapters, which a GGUF file does not hold: save them beside it".into();
        return Err(ModelError::NotQuantisable { reason });
    }
    let config = model.config();
    let tensors = tensors(model)?;
    let mut metadata = Metadata::default();
    describe(&mut metadata, path, config, &tensors, extras)?;

    let mut head = Vec::new();
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    head.extend_from_slice(&metadata.count.to_le_bytes());
    head.extend_from_slice(&metadata.bytes);
    let mut offset = 0u64;
    for tensor in &tensors {
        text(&mut head, &tensor.name);
        head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        for &size in tensor.shape.iter().rev() {
            head.extend_from_slice(&(size as u64).to_le_bytes());
        }
        head.extend_from_slice(&tensor.block.id().to_le_bytes());
        head.extend_from_slice(&offset.to_le_bytes());
        let bytes = tensor.block.bytes(tensor.shape.iter().product()) as u64;
        offset += bytes.next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);

    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".saving-");
    // Temporary files are private otherwise.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder).map_err(io(path))?;
    let mut out = BufWriter::new(file);
    out.write_all(&head).map_err(io(path))?;
    for tensor in &tensors {
        let mut bytes = tensor.bytes(config)?;
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT as usize), 0);
        out.write_all(&bytes).map_err(io(path))?;
    }
    let file = out.into_inner().map_err(|error| io(path)(error.into_error()))?;
    file.as_file().sync_all().map_err(io(path))?;
    file.persist(path).map_err(|error| io(path)(error.error))?;
    Ok(())
}

/// One tensor of the file.
struct Stored<'a> {
    name: String,
    /// The name in a Hugging Face directory, of a tensor that is there.
    part: String,
    shape: Vec<usize>,
    block: BlockType,
    weight: Source<'a>,
    /// Of its first row in the weight.
    start: usize,
}

enum Source<'a> {
    Factors(Vec<f32>),
    Norm(&'a Tensor),
    Matrix(&'a Weight),
}

fn tensors(model: &VesperLM) -> Result<Vec<Stored<'_>>> {
    let config = model.config();
    let mut all = Vec::new();
    let named =
        |part: &str| names::gguf(part).ok_or_else(|| ModelError::MissingParameter { name: part.to_owned() });
    // Other programs do not know the scaling by its formula.
    if let Some(scaling) = config.rope_scaling.filter(|_| architecture::of(config) == LLAMA) {
        let factors = scaling.factors(config.head_dim, config.rope_theta);
        all.push(Stored {
            name: rope_freqs::NAME.into(),
            part: String::new(),
            shape: vec![factors.len()],
            block: BlockType::F32,
            weight: Source::Factors(factors),
            start: 0,
        });
    }
    for (name, norm) in model.norms() {
        all.push(Stored {
            name: named(&name)?,
            part: name,
            shape: norm.dims().to_vec(),
            block: BlockType::F32,
            weight: Source::Norm(norm),
            start: 0,
        });
    }
    for (name, weight) in model.matrices() {
        let shape = match weight {
            Weight::Plain(tensor) => tensor.dims().to_vec(),
            Weight::Blocks(blocks) => blocks.dims().to_vec(),
        };
        let mut start = 0;
        for part in names::parts(config, &name, &shape) {
            let rows = part.shape.first().copied().unwrap_or(0);
            let block = match weight {
                Weight::Plain(tensor) => match tensor.dtype() {
                    DType::F16 => BlockType::F16,
                    DType::BF16 => BlockType::Bf16,
                    _ => BlockType::F32,
                },
                Weight::Blocks(blocks) => blocks.type_of(start, rows)?,
            };
            all.push(Stored {
                name: named(&part.name)?,
                part: part.name,
                shape: part.shape,
                block,
                weight: Source::Matrix(weight),
                start,
            });
            start += rows;
        }
    }
    Ok(all)
}

impl Stored<'_> {
    fn bytes(&self, config: &VesperConfig) -> Result<Vec<u8>> {
        let rows = self.shape.first().copied().unwrap_or(0);
        let bytes = match &self.weight {
            Source::Factors(factors) => factors.iter().flat_map(|factor| factor.to_le_bytes()).collect(),
            Source::Norm(norm) => little_endian(&norm.to_dtype(DType::F32)?)?,
            Source::Matrix(Weight::Plain(tensor)) => little_endian(&tensor.narrow(0, self.start, rows)?)?,
            Source::Matrix(Weight::Blocks(blocks)) => blocks.bytes(self.start, rows)?,
        };
        Ok(match names::heads(config, &self.part) {
            Some(heads) if architecture::of(config) == LLAMA => names::interleave(&bytes, heads, rows),
            _ => bytes,
        })
    }
}

fn little_endian(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match flat.dtype() {
        DType::BF16 => flat.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect(),
        DType::F16 => flat.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect(),
        _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
    })
}

/// Keys and values as they are in the file.
#[derive(Default)]
struct Metadata {
    count: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn pair(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
        self.count += 1;
        text(&mut self.bytes, key);
        self.bytes.extend_from_slice(&kind.to_le_bytes());
        &mut self.bytes
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.pair(key, 4).extend_from_slice(&value.to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f64) {
        self.pair(key, 6).extend_from_slice(&(value as f32).to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        text(self.pair(key, 8), value);
    }
}

fn text(to: &mut Vec<u8>, text: &str) {
    to.extend_from_slice(&(text.len() as u64).to_le_bytes());
    to.extend_from_slice(text.as_bytes());
}

fn describe(
    metadata: &mut Metadata,
    path: &Path,
    config: &VesperConfig,
    tensors: &[Stored<'_>],
    extras: &GgufExtras<'_>,
) -> Result<()> {
    let json =
        |what: Result<String, serde_json::Error>| what.map_err(|error| invalid(path, error.to_string()));
    let architecture = architecture::of(config);
    metadata.text(keys::ARCHITECTURE, architecture);
    if let Some(name) = extras.name {
        metadata.text(keys::NAME, name);
    }
    metadata.u32(keys::ALIGNMENT, ALIGNMENT as u32);
    metadata.u32(keys::QUANTIZATION_VERSION, 2);
    metadata.u32(keys::FILE_TYPE, file_type(tensors));
    for (key, value) in architecture::integers(config) {
        let value = u32::try_from(value)
            .map_err(|_| invalid(path, format!("{architecture}.{key} is {value}, more than GGUF can say")))?;
        metadata.u32(&format!("{architecture}.{key}"), value);
    }
    metadata.u32(&format!("{architecture}.rope.dimension_count"), config.head_dim as u32);
    metadata.f32(&format!("{architecture}.rope.freq_base"), config.rope_theta);
    metadata.f32(&format!("{architecture}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    metadata.text(keys::CONFIG, &json(serde_json::to_string(config))?);

    let mut generation = extras.generation.clone();
    generation.validate()?;
    generation.bos_token_id = generation.bos_token_id.or(config.bos_token_id);
    if generation.eos_token_id.is_empty() {
        generation.eos_token_id.extend(config.eos_token_id);
    }
    metadata.text(keys::GENERATION, &json(serde_json::to_string(&generation))?);
    if let Some(json) = extras.tokenizer_json {
        let tokenizer: Tokenizer =
            json.parse().map_err(|error: tokenizers::Error| invalid(path, error.to_string()))?;
        check_tokenizer(&tokenizer, config)?;
        metadata.text(keys::TOKENIZER, json);
    }
    if let Some(template) = extras.chat_template {
        metadata.text(keys::CHAT_TEMPLATE, template);
    }
    if !extras.special_tokens.is_empty() {
        metadata.text(keys::SPECIAL_TOKENS, &json(serde_json::to_string(&extras.special_tokens))?);
    }
    for (key, id) in [(keys::BOS, config.bos_token_id), (keys::EOS, config.eos_token_id)] {
        if let Some(id) = id {
            metadata.u32(key, id);
        }
    }
    Ok(())
}

/// The number by which other programs call the type that most of the weights have.
fn file_type(tensors: &[Stored<'_>]) -> u32 {
    let mut weights: BTreeMap<BlockType, usize> = BTreeMap::new();
    for tensor in tensors {
        *weights.entry(tensor.block).or_default() += tensor.shape.iter().product::<usize>();
    }
    match weights.into_iter().max_by_key(|&(_, weights)| weights).map(|(block, _)| block) {
        None | Some(BlockType::F32) => 0,
        Some(BlockType::F16) => 1,
        Some(BlockType::Q4_0) => 2,
        Some(BlockType::Q4_1) => 3,
        Some(BlockType::Q8_0) => 7,
        Some(BlockType::Q5_0) => 8,
        Some(BlockType::Q5_1) => 9,
        Some(BlockType::Q2K) => 10,
        Some(BlockType::Q3K) => 12,
        Some(BlockType::Q4K) => 15,
        Some(BlockType::Q5K) => 17,
        Some(BlockType::Q6K) => 18,
        Some(BlockType::Bf16) => 32,
    }
}
