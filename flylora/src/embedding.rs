use candle_core::{Result, Tensor, Var};

use crate::init::{generator, normal};
use crate::linear::added;
use crate::{Error, LoraConfig, LoraInit, Place};

/// The name of `A` below the name of the table.
pub(crate) const A: &str = "lora_embedding_A";
/// The name of `B` below the name of the table.
pub(crate) const B: &str = "lora_embedding_B";

/// A frozen embedding table with a LoRA adapter, as PEFT has it.
///
/// ```text
/// y = table[id] + scale B A[:, id]      table: (vocab, dim), A: (r, vocab), B: (dim, r)
/// ```
///
/// `A` is 0 at first and `B` normal with deviation 1: the other way around than for a linear layer.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{LoraConfig, LoraEmbedding, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let table = Tensor::randn(0f32, 1.0, (100, 16), &Device::Cpu)?; // (vocab, dim)
/// let place = Place::alone("embed_tokens", DType::F32, &Device::Cpu);
/// let embedding = LoraEmbedding::new(table.clone(), &LoraConfig::default().with_r(4), &place)?;
/// let ids = Tensor::new(&[[3u32, 99], [0, 3]], &Device::Cpu)?;
/// assert_eq!(embedding.forward(&ids)?.dims(), [2, 2, 16]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LoraEmbedding {
    table: Tensor,
    a: Var,
    b: Var,
    config: LoraConfig,
    merged: Option<Tensor>,
    enabled: bool,
}

impl LoraEmbedding {
    /// Freezes a table (vocab, dim) and puts an adapter beside it, with variables in `place`.
    ///
    /// # Errors
    ///
    /// [`Error::WeightShape`], [`Error::DType`], and [`Error::Config`] for a configuration that does not fit, or another
    /// start than the default one.
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn new(table: Tensor, config: &LoraConfig, place: &Place<'_>) -> crate::Result<Self> {
        let (vocab, dim) = match *table.dims() {
            [vocab, dim] if vocab > 0 && dim > 0 => (vocab, dim),
            _ => return Err(Error::WeightShape { got: table.dims().to_vec() }),
        };
        if !table.dtype().is_float() {
            let expected = "f32, f64, bf16 or f16".into();
            return Err(Error::DType { name: "frozen table".into(), expected, got: table.dtype() });
        }
        place.check_dtype()?;
        config.validate_for(vocab, dim)?;
        if config.init != LoraInit::KaimingUniform {
            let expected = "the default for an embedding".into();
            return Err(Error::Config { field: "init", expected, got: format!("{:?}", config.init) });
        }
        let mut rng = generator(config.seed, place.name());
        Ok(Self {
            table: table.detach(),
            a: place.constant((config.r, vocab), A, 0.0)?,
            b: place.var((dim, config.r), B, || Ok(normal((dim, config.r), 1.0, &mut rng)?))?,
            config: config.clone(),
            merged: None,
            enabled: true,
        })
    }

    /// The rows of the ids; ids: (...), u32, returns (..., dim).
    ///
    /// # Errors
    ///
    /// candle's own, for an id that is not in the table.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mut dims = ids.dims().to_vec();
        dims.push(self.table.dim(1)?);
        let ids = ids.flatten_all()?;
        let table = self.merged.as_ref().filter(|_| self.enabled).unwrap_or(&self.table);
        let rows = table.index_select(&ids, 0)?; // (n, dim)
        let rows = if self.enabled && self.merged.is_none() {
            let low = (self.a.index_select(&ids, 1)?.t()? * self.config.scale())?; // (n, r)
            (&rows + low.matmul(&self.b.t()?)?.to_dtype(rows.dtype())?)?
        } else {
            rows
        };
        rows.reshape(dims)
    }

    /// `A`: (r, vocab).
    pub fn a(&self) -> &Var {
        &self.a
    }

    /// `B`: (dim, r).
    pub fn b(&self) -> &Var {
        &self.b
    }

    /// The frozen table, without the adapter: (vocab, dim).
    pub fn table(&self) -> &Tensor {
        &self.table
    }

    /// The configuration that the adapter was made with.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The trained variables by name, sorted by name.
    pub fn parameters(&self) -> Vec<(String, Var)> {
        vec![(A.to_owned(), self.a.clone()), (B.to_owned(), self.b.clone())]
    }

    /// What merging adds to the table: (vocab, dim), in the dtype of the variables.
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn delta_table(&self) -> Result<Tensor> {
        let (a, b) = (self.a.as_detached_tensor(), self.b.as_detached_tensor());
        (a.t()? * self.config.scale())?.matmul(&b.t()?)
    }

    /// Adds the adapter to the table, rounded once.
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn merge(&mut self) -> crate::Result<()> {
        if self.merged.is_none() {
            self.merged = Some(added(&self.table, &self.delta_table()?)?.to_dtype(self.table.dtype())?);
        }
        Ok(())
    }

    /// Goes back to the original table, the same bits.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// Whether the adapter is in the table.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Switches the adapter on or off.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// The table with the adapter in it: (vocab, dim), for a tied output layer too.
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn into_merged(mut self) -> crate::Result<candle_nn::Embedding> {
        self.merge()?;
        let dim = self.table.dim(1)?;
        Ok(candle_nn::Embedding::new(self.merged.unwrap_or(self.table), dim))
    }
}

impl candle_nn::Module for LoraEmbedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        LoraEmbedding::forward(self, ids)
    }
}
