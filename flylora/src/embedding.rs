use candle_core::{Result, Tensor, Var};

use crate::adapter::{MAGNITUDE, check_factors, roots};
use crate::init::{generator, normal};
use crate::linear::{added, at_least_f32, check_merged};
use crate::{AdapterKind, Error, LoraConfig, LoraInit, Place};

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
/// [`dora`](Self::dora) makes it one of DoRA, whose magnitudes are those of the columns:
///
/// ```text
/// V = table + scale A^T B^T,   y = V[id] m / |V|      m: (dim), |V|: (dim), the norm of each column, held constant
/// ```
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
    /// The magnitudes of DoRA: (dim).
    magnitude: Option<Var>,
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
        let (vocab, dim) = check_table(&table)?;
        place.check_dtype()?;
        config.validate_for(vocab, dim)?;
        config.check_no_bias("an embedding")?;
        if config.init != LoraInit::KaimingUniform {
            let expected = "the default for an embedding".into();
            return Err(Error::Config { field: "init", expected, got: format!("{:?}", config.init) });
        }
        let mut rng = generator(config.seed, place.name());
        Ok(Self {
            table: table.detach(),
            a: place.constant((config.r, vocab), A, 0.0)?,
            b: place.var((dim, config.r), B, || Ok(normal((dim, config.r), 1.0, &mut rng)?))?,
            magnitude: None,
            config: config.clone(),
            merged: None,
            enabled: true,
        })
    }

    /// Puts an adapter of the factors A (r, vocab) and B (dim, r) beside a table; `r` of the configuration is set to theirs.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] where the factors do not fit each other or the table, and as [`new`](Self::new).
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn from_factors(table: Tensor, a: &Tensor, b: &Tensor, config: &LoraConfig) -> crate::Result<Self> {
        let (vocab, dim) = check_table(&table)?;
        let (r, _) = a.dims2()?;
        for (name, factor, expected) in [(A, a, vec![r, vocab]), (B, b, vec![dim, r])] {
            if factor.dims() != expected {
                let got = factor.dims().to_vec();
                return Err(Error::Shape { name: name.into(), expected, got });
            }
        }
        check_factors([(A, a), (B, b)])?;
        let config = LoraConfig { r, init: LoraInit::default(), ..config.clone() };
        config.validate()?;
        config.check_no_bias("an embedding")?;
        Ok(Self {
            table: table.detach(),
            a: Var::from_tensor(a)?,
            b: Var::from_tensor(b)?,
            magnitude: None,
            config,
            merged: None,
            enabled: true,
        })
    }

    /// As [`new`](Self::new), with the magnitudes of DoRA, which start at the norms of the table's columns.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn dora(table: Tensor, config: &LoraConfig, place: &Place<'_>) -> crate::Result<Self> {
        let mut embedding = Self::new(table, config, place)?;
        let dim = embedding.b.dim(0)?;
        embedding.magnitude = Some(place.var(dim, MAGNITUDE, || Ok(embedding.norms()?))?);
        Ok(embedding)
    }

    /// The norms of the columns of `V`, without gradients, some rows at a time: (dim).
    fn norms(&self) -> Result<Tensor> {
        let (vocab, dim) = self.table.dims2()?;
        let wide = at_least_f32(self.a.dtype());
        let a = (self.a.as_detached_tensor() * self.config.scale())?.to_dtype(wide)?; // (r, vocab)
        let b = self.b.as_detached_tensor().to_dtype(wide)?.t()?; // (r, dim)
        let mut squares = Tensor::zeros(dim, wide, self.table.device())?;
        let step = ((1 << 20) / dim).max(1);
        for start in (0..vocab).step_by(step) {
            let rows = step.min(vocab - start);
            let change = a.narrow(1, start, rows)?.t()?.contiguous()?.matmul(&b)?;
            let part = (self.table.narrow(0, start, rows)?.to_dtype(wide)? + change)?; // (rows, dim)
            squares = (squares + part.sqr()?.sum(0)?)?;
        }
        roots(&squares, self.a.dtype())
    }

    /// `m / |V|`: (dim), in the dtype of the variables.
    fn ratio(&self) -> Result<Option<Tensor>> {
        self.magnitude.as_ref().map(|m| m.div(&self.norms()?)).transpose()
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
            // The gradients of one id add up in f32 at least.
            let columns = self.a.to_dtype(at_least_f32(self.a.dtype()))?.index_select(&ids, 1)?; // (r, n)
            let low = (columns.t()?.to_dtype(self.a.dtype())? * self.config.scale())?; // (n, r)
            let delta = low.matmul(&self.b.t()?)?;
            match self.ratio()? {
                None => (&rows + delta.to_dtype(rows.dtype())?)?,
                Some(ratio) => {
                    let changed = added(&rows, &delta)?;
                    changed.broadcast_mul(&ratio.to_dtype(changed.dtype())?)?.to_dtype(rows.dtype())?
                }
            }
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
        let mut parameters = vec![(A.to_owned(), self.a.clone()), (B.to_owned(), self.b.clone())];
        parameters.extend(self.magnitude.clone().map(|m| (MAGNITUDE.to_owned(), m)));
        parameters
    }

    /// The kind and its configuration.
    pub fn kind(&self) -> AdapterKind {
        match self.magnitude {
            None => AdapterKind::Lora(self.config.clone()),
            Some(_) => AdapterKind::Dora(self.config.clone()),
        }
    }

    /// What merging adds to the table: (vocab, dim), in the dtype of the variables.
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn delta_table(&self) -> Result<Tensor> {
        let (a, b) = (self.a.as_detached_tensor(), self.b.as_detached_tensor());
        let delta = (a.t()? * self.config.scale())?.matmul(&b.t()?)?;
        match self.ratio()? {
            None => Ok(delta),
            Some(ratio) => {
                let changed = added(&self.table, &delta)?;
                let changed = changed.broadcast_mul(&ratio.detach().to_dtype(changed.dtype())?)?;
                (&changed - self.table.to_dtype(changed.dtype())?)?.to_dtype(delta.dtype())
            }
        }
    }

    /// Adds the adapter to the table, rounded once.
    ///
    /// # Errors
    ///
    /// [`Error::Adapters`] for a sum that is not finite in the dtype of the table, and candle's own.
    pub fn merge(&mut self) -> crate::Result<()> {
        if self.merged.is_none() {
            let merged = added(&self.table, &self.delta_table()?)?.to_dtype(self.table.dtype())?;
            check_merged(&merged)?;
            self.merged = Some(merged);
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

/// The size of a table that can be frozen: (vocab, dim).
fn check_table(table: &Tensor) -> crate::Result<(usize, usize)> {
    if !table.dtype().is_float() {
        let expected = "f32, f64, bf16 or f16".into();
        return Err(Error::DType { name: "frozen table".into(), expected, got: table.dtype() });
    }
    match *table.dims() {
        [vocab, dim] if vocab > 0 && dim > 0 => Ok((vocab, dim)),
        _ => Err(Error::WeightShape { got: table.dims().to_vec() }),
    }
}

impl candle_nn::Module for LoraEmbedding {
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        LoraEmbedding::forward(self, ids)
    }
}
