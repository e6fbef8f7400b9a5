//! An open GGUF file, and the model in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use tokenizers::Tokenizer;

use super::header::{Header, Info};
use super::{LLAMA, architecture, invalid, keys, names, rope_freqs};
use crate::generate::GenerationConfig;
use crate::hf::{self, io};
use crate::quantized::{BlockMatrix, BlockType, Weight, from_bytes};
use crate::{ModelError, Result, VesperConfig, VesperLM};

/// How many names an error message lists.
const LISTED: usize = 5;

/// An open GGUF file: one that [`save`](super::save) wrote, or of the architecture `llama` from another program.
///
/// Opening it reads the metadata and the factors of the rotary frequencies, and believes none of it: counts, lengths and
/// places are compared with the length of the file before anything is allocated by them.
#[derive(Debug, Clone)]
pub struct Gguf {
    header: Header,
    config: VesperConfig,
}

impl Gguf {
    /// Opens a file and reads what it says about itself.
    ///
    /// # Errors
    /// [`ModelError::Io`] when the file cannot be read; [`ModelError::InvalidFile`] names the file, the key or tensor, what
    /// it is and what was expected.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::ModelError;
    /// use vesper_model::quantized::Gguf;
    /// let file = tempfile::NamedTempFile::new()?;
    /// std::fs::write(file.path(), b"GGUF")?; // cut short
    /// assert!(matches!(Gguf::open(file.path()), Err(ModelError::InvalidFile { .. })));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    ///
    /// [`save`](super::save) has an example of a file that can be opened.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let header = Header::read(path.as_ref())?;
        let config = architecture::config(&header)?;
        Ok(Self { header, config })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.header.path
    }

    /// The architecture of the model.
    pub fn config(&self) -> &VesperConfig {
        &self.config
    }

    /// Its name and the type of its weights by tensor: the name, the shape, the type, bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], BlockType, usize)> {
        let tensors = self.header.tensors.iter();
        tensors.map(|(name, info)| (name.as_str(), info.shape.as_slice(), info.block, info.bytes))
    }

    /// Whether any of the weights is in blocks.
    pub fn is_quantized(&self) -> bool {
        self.header.tensors.values().any(|info| !info.block.is_plain())
    }

    /// The text of `tokenizer.json`, where the file has it.
    ///
    /// # Errors
    /// A value that is no text.
    pub fn tokenizer_json(&self) -> Result<Option<&str>> {
        self.header.text(keys::TOKENIZER)
    }

    /// The tokenizer, which the model has a row for each entry of; without truncation and padding, as
    /// [`hf::read_tokenizer`] has it.
    ///
    /// # Errors
    /// A file without a `tokenizer.json` in it (other programs store theirs in another form), one that is damaged, or one
    /// with more entries than the model.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let json = self.tokenizer_json()?.ok_or_else(|| self.header.missing(keys::TOKENIZER))?;
        let tokenizer: Tokenizer =
            json.parse().map_err(|error| invalid(self.path(), format!("{}: {error}", keys::TOKENIZER)))?;
        hf::check_tokenizer(&tokenizer, &self.config)?;
        hf::whole(tokenizer)
    }

    /// How the model is meant to generate: what was stored with it, or the default with the model's own tokens.
    ///
    /// # Errors
    /// Settings that are damaged or out of range.
    pub fn generation_config(&self) -> Result<GenerationConfig> {
        let mut generation: GenerationConfig = match self.header.text(keys::GENERATION)? {
            None => GenerationConfig::default(),
            Some(json) => serde_json::from_str(json)
                .map_err(|error| invalid(self.path(), format!("{}: {error}", keys::GENERATION)))?,
        };
        generation.bos_token_id = generation.bos_token_id.or(self.config.bos_token_id);
        if generation.eos_token_id.is_empty() {
            generation.eos_token_id.extend(self.config.eos_token_id);
        }
        generation.validate().map_err(|error| match error {
            ModelError::InvalidGeneration { field, got, expected } => {
                invalid(self.path(), format!("{}: {field} is {got}, expected {expected}", keys::GENERATION))
            }
            other => other,
        })?;
        Ok(generation)
    }

    /// The chat template, where the model has one.
    ///
    /// # Errors
    /// A value that is no text.
    pub fn chat_template(&self) -> Result<Option<&str>> {
        self.header.text(keys::CHAT_TEMPLATE)
    }

    /// The special tokens that the chat template writes, by their names there; empty where the file does not say.
    ///
    /// # Errors
    /// A value that is no object of texts.
    pub fn special_tokens(&self) -> Result<BTreeMap<String, String>> {
        let Some(json) = self.header.text(keys::SPECIAL_TOKENS)? else { return Ok(BTreeMap::new()) };
        serde_json::from_str(json)
            .map_err(|error| invalid(self.path(), format!("{}: {error}", keys::SPECIAL_TOKENS)))
    }

    /// The model: blocks stay blocks, plain weights and the computation are in `dtype`.
    ///
    /// # Errors
    /// A tensor that is missing, that the model does not have, or of another shape: names the file and the tensor. A device
    /// that is out of memory.
    pub fn model(&self, dtype: DType, device: &Device) -> Result<VesperLM> {
        let mut source = Source {
            gguf: self,
            file: File::open(self.path()).map_err(io(self.path()))?,
            dtype,
            device,
            // Read with the configuration.
            read: BTreeSet::from([rope_freqs::NAME.into()]),
        };
        // The model is built with candle's errors, which would hide the file's.
        let mut failed = None;
        let model = VesperLM::build(
            &self.config,
            (dtype, device),
            &mut |name, shape| {
                source.weight(name, shape).map_err(|error| {
                    let text = error.to_string();
                    failed = Some(error);
                    candle_core::Error::Msg(text)
                })
            },
            None,
        );
        if let Some(error) = failed {
            return Err(error);
        }
        let model = model?;
        let unread: Vec<&str> = self
            .header
            .tensors
            .keys()
            .map(String::as_str)
            .filter(|name| !source.read.contains(*name))
            .collect();
        if unread.is_empty() {
            return Ok(model);
        }
        let more = if unread.len() > LISTED { " and more" } else { "" };
        let listed = unread.get(..LISTED).unwrap_or(&unread).join(", ");
        Err(invalid(self.path(), format!("the model has no {listed}{more}")))
    }
}

/// The tensors of a file.
struct Source<'a> {
    gguf: &'a Gguf,
    file: File,
    dtype: DType,
    device: &'a Device,
    read: BTreeSet<String>,
}

impl Source<'_> {
    /// The parameter of this name in memory.
    fn weight(&mut self, name: &str, shape: &[usize]) -> Result<Weight> {
        let config = &self.gguf.config;
        let parts = names::parts(config, name, shape);
        let infos = parts
            .iter()
            .map(|part| Ok((self.info(&part.name, &part.shape)?, names::heads(config, &part.name))))
            .collect::<Result<Vec<_>>>()?;
        if infos.iter().all(|((_, info), _)| info.block.is_plain()) {
            let parts = infos.into_iter().map(|((name, info), heads)| self.tensor(&name, &info, heads));
            let parts = parts.collect::<Result<Vec<_>>>()?;
            let whole = if let [whole] = parts.as_slice() { whole.clone() } else { Tensor::cat(&parts, 0)? };
            // Converted before it moves: the device's memory never holds both.
            return Ok(Weight::Plain(whole.to_dtype(self.dtype)?.to_device(self.device)?));
        }
        let groups = infos.into_iter().map(|((name, info), heads)| self.blocks(&name, &info, heads));
        Ok(Weight::Blocks(BlockMatrix::new(groups.collect::<Result<_>>()?)?))
    }

    /// The name in the file, and what the file says of it.
    fn info(&mut self, name: &str, shape: &[usize]) -> Result<(String, Info)> {
        let path = self.gguf.path();
        let name = names::gguf(name).ok_or_else(|| invalid(path, format!("{name} has no name in GGUF")))?;
        let Some(info) = self.gguf.header.tensors.get(&name) else {
            return Err(invalid(path, format!("no tensor {name}")));
        };
        if info.shape != shape {
            let got = &info.shape;
            return Err(invalid(path, format!("{name} has shape {got:?}, expected {shape:?}")));
        }
        if shape.len() == 1 && !info.block.is_plain() {
            return Err(invalid(path, format!("{name} is in {}, expected f32, f16 or bf16", info.block)));
        }
        self.read.insert(name.clone());
        Ok((name, info.clone()))
    }

    /// The bytes of a tensor, its rows in the order of a Hugging Face directory.
    fn bytes(&mut self, name: &str, info: &Info, heads: Option<usize>) -> Result<Vec<u8>> {
        let path = self.gguf.path();
        let mut bytes = vec![0; info.bytes];
        self.file.seek(SeekFrom::Start(info.start)).map_err(io(path))?;
        self.file.read_exact(&mut bytes).map_err(io(path))?;
        let rows = info.shape.first().copied().unwrap_or(1);
        match heads {
            Some(heads) if self.is_llama()? => {
                if !rows.is_multiple_of(2 * heads) {
                    return Err(invalid(
                        path,
                        format!("{name} has {rows} rows, expected pairs of {heads} heads"),
                    ));
                }
                Ok(names::separate(&bytes, heads, rows))
            }
            _ => Ok(bytes),
        }
    }

    fn is_llama(&self) -> Result<bool> {
        Ok(self.gguf.header.text(keys::ARCHITECTURE)? == Some(LLAMA))
    }

    fn tensor(&mut self, name: &str, info: &Info, heads: Option<usize>) -> Result<Tensor> {
        let bytes = self.bytes(name, info, heads)?;
        let dtype = match info.block {
            BlockType::F16 => DType::F16,
            BlockType::Bf16 => DType::BF16,
            _ => DType::F32,
        };
        Ok(Tensor::from_raw_buffer(&bytes, dtype, &info.shape, &Device::Cpu)?.to_dtype(self.dtype)?)
    }

    fn blocks(&mut self, name: &str, info: &Info, heads: Option<usize>) -> Result<Arc<QTensor>> {
        let bytes = self.bytes(name, info, heads)?;
        let &[rows, columns] = info.shape.as_slice() else {
            return Err(invalid(
                self.gguf.path(),
                format!("{name} has shape {:?}, expected two", info.shape),
            ));
        };
        Ok(Arc::new(from_bytes(&bytes, info.block, rows, columns, self.device)?))
    }
}
