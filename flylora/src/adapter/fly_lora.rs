use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::{Adapter, AdapterKind, B, Change, FlyLoraConfig, Merge, Routing, Step};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::files::StateSource;
use crate::frozen::{check_input, rows, with_last};
use crate::init::fnv1a;
use crate::linear::at_least_f32;
use crate::sparse::{Route, Selection, SparseMatrix, project, routed_layer, routed_product, top_k};
use crate::{FrozenLinear, Place};

const SEED: &str = "fly_A.seed";
const INDICES: &str = "fly_A.indices";
const BALANCE: &str = "fly_balance";

/// FlyLoRA as its paper has it: a frozen sparse random `A`, of whose outputs each row makes use of the largest few.
///
/// ```text
/// y = A x                              A: (r, in), frozen, density * in nonzeros a row ~ N(0, 1 / r^2)
/// I = the k largest of |y| + d         (or of y + d)
/// delta(x) = alpha / r * sum over i in I of B_i y_i      B: (out, r), 0 at first
/// d_i += rate * sign(mean count - count_i)               after each step of training
/// ```
///
/// `B` alone is trained. The gradient goes through `A` to x, but `A` itself, which is kept as a seed and the places of
/// its nonzeros, gets none. `d` only routes; it moves in [`after_step`](Adapter::after_step), by the counts of the last
/// forward pass before it, and so never during evaluation.
///
/// No constant weight does what the routing does, so [`merge`](crate::AdapterLinear::merge) says `Unsupported`;
/// [`merge_for`](crate::AdapterLinear::merge_for) merges the nearest one and measures the error.
///
/// On the CPU (f32 and f64) the products skip the zeros and the ranks that are not used. On CUDA (f32, bf16 and f16, up to
/// 64 ranks) one kernel makes `y` from the nonzeros and routes, and the products with B are dense over the ranks: there
/// they take no longer than reading x. Elsewhere all products are dense.
///
/// # References
///
/// Zou et al., FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise Mixture-of-Experts,
/// [arXiv 2510.08396](https://arxiv.org/abs/2510.08396)
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use flylora::{Adapter, FlyLoraAdapter, FlyLoraConfig, Place};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let place = Place::alone("q_proj", DType::F32, &Device::Cpu);
/// let adapter = FlyLoraAdapter::new(64, 48, &FlyLoraConfig::default(), &place)?;
/// let x = Tensor::randn(0f32, 1.0, (3, 64), &Device::Cpu)?;
/// assert_eq!(adapter.delta(&x)?.dims(), [3, 48]);
/// // Of 32 ranks with 48 trained values each, a token makes use of 8.
/// assert_eq!(adapter.parameters()[0].1.elem_count(), 32 * 48);
/// assert_eq!(adapter.active_parameters(), 8 * 48);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct FlyLoraAdapter {
    b: Var,
    config: FlyLoraConfig,
    in_features: usize,
    state: Arc<State>,
}

/// What is not trained; shared by clones, as the variables are.
#[derive(Debug)]
struct State {
    projection: RwLock<Arc<Projection>>,
    /// `d`: (r), f32.
    balance: Var,
    /// How many rows made use of each rank in the last forward pass: (r), f32 or u32.
    counts: Mutex<Option<Tensor>>,
}

#[derive(Debug)]
struct Projection {
    sparse: Arc<SparseMatrix>,
    /// With the zeros, where there is no kernel for it.
    dense: OnceLock<FrozenLinear>,
    #[cfg(feature = "cuda")]
    on_cuda: OnceLock<Tensor>,
}

impl Projection {
    fn new(sparse: SparseMatrix) -> Arc<Self> {
        Arc::new(Self {
            sparse: Arc::new(sparse),
            dense: OnceLock::new(),
            #[cfg(feature = "cuda")]
            on_cuda: OnceLock::new(),
        })
    }

    /// With the zeros, f32, on the device of `like`.
    #[cfg(feature = "cuda")]
    fn on_cuda(&self, like: &Tensor) -> Result<Tensor> {
        if let Some(dense) = self.on_cuda.get() {
            return Ok(dense.clone());
        }
        let dense = self.sparse.dense(DType::F32, like.device())?;
        Ok(self.on_cuda.get_or_init(|| dense).clone())
    }

    fn dense(&self, dtype: DType, device: &Device) -> Result<FrozenLinear> {
        if let Some(dense) = self.dense.get() {
            return Ok(dense.clone());
        }
        let dense = FrozenLinear::new(self.sparse.dense(dtype, device)?, None)?;
        Ok(self.dense.get_or_init(|| dense).clone())
    }
}

impl FlyLoraAdapter {
    /// Makes the adapter for a layer of the given size, with its variable in `place`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config), [`Error::DType`](crate::Error::DType), and candle's own.
    pub fn new(
        in_features: usize,
        out_features: usize,
        config: &FlyLoraConfig,
        place: &Place<'_>,
    ) -> crate::Result<Self> {
        config.validate()?;
        place.check_dtype()?;
        let nonzeros = config.nonzeros(in_features);
        let sparse = SparseMatrix::random(config.r, in_features, nonzeros, config.seed, fnv1a(place.name()));
        Ok(Self {
            b: place.constant((out_features, config.r), B, 0.0)?,
            config: config.clone(),
            in_features,
            state: Arc::new(State {
                projection: RwLock::new(Projection::new(sparse)),
                balance: Var::zeros(config.r, DType::F32, place.device())?,
                counts: Mutex::new(None),
            }),
        })
    }

    /// `B`: (out, r).
    pub fn b(&self) -> &Var {
        &self.b
    }

    /// `A` with its zeros: (r, in), f32 on the CPU.
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn a(&self) -> Result<Tensor> {
        self.projection().sparse.dense(DType::F32, &Device::Cpu)
    }

    /// `d`, what routing adds to the values of each rank: (r).
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn balance(&self) -> Result<Vec<f32>> {
        self.state.balance.to_vec1()
    }

    /// The configuration that the adapter was made with.
    pub fn config(&self) -> &FlyLoraConfig {
        &self.config
    }

    /// The same as [`delta`](Adapter::delta) by dense products alone: what the sparse ones are compared with.
    ///
    /// # Errors
    ///
    /// As [`delta`](Adapter::delta).
    pub fn delta_dense(&self, x: &Tensor) -> Result<Tensor> {
        self.reshaped(x, |flat| self.by_dense(flat))
    }

    /// What the routing makes of x: the values `y = A x` of the ranks that each row makes use of, and 0 for the others.
    /// x: (..., in), returns (rows, r), f32 (f64 for an f64 adapter on the CPU), outside of any graph. The balance does
    /// not go by it.
    ///
    /// # Errors
    ///
    /// As [`delta`](Adapter::delta).
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use flylora::{FlyLoraAdapter, FlyLoraConfig, Place};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let place = Place::alone("q_proj", DType::F32, &Device::Cpu);
    /// let adapter = FlyLoraAdapter::new(64, 48, &FlyLoraConfig::default().with_ranks(16, 3), &place)?;
    /// let used = adapter.used(&Tensor::randn(0f32, 1.0, (5, 64), &Device::Cpu)?)?; // (5, 16)
    /// let counts = used.ne(0.0)?.to_dtype(DType::F32)?.sum(1)?.to_vec1::<f32>()?;
    /// assert_eq!(counts, [3.0; 5]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn used(&self, x: &Tensor) -> Result<Tensor> {
        check_input(x, self.in_features)?;
        let flat = x.detach().reshape((rows(x.shape()), self.in_features))?;
        #[cfg(feature = "cuda")]
        if cuda::has_kernels(&flat, self.config.r) && self.b.dtype() != DType::F64 {
            return cuda::used(&flat, &self.projection().on_cuda(x)?, &self.routed());
        }
        let flat = flat.to_dtype(self.b.dtype())?;
        let y = if Self::has_cpu_kernel(&flat) {
            project(&flat, &self.projection().sparse)?
        } else {
            self.projection().dense(flat.dtype(), flat.device())?.forward(&flat)?
        };
        let mask = self.mask(&self.scores(&y)?)?.to_dtype(y.dtype())?;
        let used = (y * mask)?;
        if used.dtype() == DType::F64 { Ok(used) } else { used.to_dtype(DType::F32) }
    }

    /// How the CUDA kernels choose.
    #[cfg(feature = "cuda")]
    fn routed(&self) -> cuda::Routed {
        cuda::Routed {
            k: self.config.k,
            magnitude: self.config.routing == Routing::Magnitude,
            balance: self.state.balance.as_detached_tensor(),
            scale: self.config.scale(),
        }
    }

    /// The change by the CUDA kernels, with the layer or alone; `None` where there are none for x.
    #[cfg(feature = "cuda")]
    fn by_kernels(&self, base: Option<&FrozenLinear>, x: &Tensor) -> Result<Option<Tensor>> {
        check_input(x, self.in_features)?;
        if let Some(nothing) = cuda::nothing(x, self.out_features())? {
            return Ok(Some(nothing));
        }
        if !cuda::has_kernels(x, self.config.r) || self.b.dtype() == DType::F64 {
            return Ok(None);
        }
        let a = self.projection().on_cuda(x)?;
        let (y, counts) = cuda::routed_layer(base, x, self.b.as_tensor(), &a, self.routed())?;
        self.count(counts);
        Ok(Some(y))
    }

    /// Whether there are loops for x, which has been converted to the dtype of the variable.
    fn has_cpu_kernel(x: &Tensor) -> bool {
        x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64)
    }

    fn projection(&self) -> Arc<Projection> {
        Arc::clone(&self.state.projection.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn reshaped(&self, x: &Tensor, run: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        check_input(x, self.in_features)?;
        let flat = x.reshape((rows(x.shape()), self.in_features))?.to_dtype(self.b.dtype())?; // (m, in)
        run(&flat)?.reshape(with_last(x.shape(), self.out_features()))?.to_dtype(x.dtype())
    }

    fn count(&self, counts: Tensor) {
        *self.state.counts.lock().unwrap_or_else(PoisonError::into_inner) = Some(counts);
    }

    /// y: (m, r), without gradients
    fn scores(&self, y: &Tensor) -> Result<Tensor> {
        let y = y.detach().to_dtype(DType::F32)?;
        let size = match self.config.routing {
            Routing::Magnitude => y.abs()?,
            Routing::Signed => y,
        };
        size.broadcast_add(&self.state.balance.as_detached_tensor())
    }

    /// x: (m, in)
    fn by_sparse(&self, x: &Tensor) -> Result<Tensor> {
        let (r, k) = (self.config.r, self.config.k);
        let y = project(x, &self.projection().sparse)?; // (m, r)
        let scores = self.scores(&y)?.flatten_all()?.to_vec1::<f32>()?;
        let selection = Arc::new(Selection { chosen: top_k(&scores, r, k), r, k });
        self.count(Tensor::new(selection.counts(), x.device())?);
        routed_product(&(y * self.config.scale())?, &self.b, &selection)
    }

    /// How the rows choose on the CPU, as [`scores`](Self::scores) has it.
    fn route(&self) -> Result<Box<Route>> {
        let (r, k) = (self.config.r, self.config.k);
        let (balance, magnitude) = (self.balance()?, self.config.routing == Routing::Magnitude);
        Ok(Box::new(move |y| {
            let score = |(y, d): (&f32, &f32)| if magnitude { y.abs() + d } else { y + d };
            let scores: Vec<f32> = y.iter().zip(balance.iter().cycle()).map(score).collect();
            Selection { chosen: top_k(&scores, r, k), r, k }
        }))
    }

    /// x: (m, in)
    fn by_dense(&self, x: &Tensor) -> Result<Tensor> {
        let a = self.projection().dense(x.dtype(), x.device())?;
        let y = a.forward(x)?; // (m, r)
        let mask = self.mask(&self.scores(&y)?)?;
        self.count(mask.sum(0)?);
        let used = ((y * mask.to_dtype(x.dtype())?)? * self.config.scale())?;
        used.matmul(&self.b.t()?) // (m, out)
    }

    /// 1 where a score is among the k largest of its row, else 0: (m, r), f32. Also among equal scores, which half types
    /// often give, exactly k are chosen.
    fn mask(&self, scores: &Tensor) -> Result<Tensor> {
        if scores.elem_count() == 0 {
            return Ok(scores.clone());
        }
        let order = scores.contiguous()?.arg_sort_last_dim(false)?;
        let chosen = order.narrow(D::Minus1, 0, self.config.k)?.contiguous()?; // (m, k)
        let ones = chosen.ones_like()?.to_dtype(DType::F32)?;
        scores.zeros_like()?.scatter_add(&chosen, &ones, D::Minus1)
    }
}

impl Adapter for FlyLoraAdapter {
    fn kind(&self) -> AdapterKind {
        AdapterKind::FlyLora(self.config.clone())
    }

    fn in_features(&self) -> usize {
        self.in_features
    }

    fn out_features(&self) -> usize {
        self.b.dims().first().copied().unwrap_or(0)
    }

    fn delta(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(delta) = self.by_kernels(None, x)? {
            return Ok(delta);
        }
        self.reshaped(
            x,
            |flat| if Self::has_cpu_kernel(flat) { self.by_sparse(flat) } else { self.by_dense(flat) },
        )
    }

    fn layer(&self, base: &FrozenLinear, x: &Tensor) -> Result<Option<Tensor>> {
        if base.quantized_weight().is_some() || x.dtype() != base.dtype() {
            return Ok(None);
        }
        check_input(x, self.in_features)?;
        if Self::has_cpu_kernel(x) && x.dtype() == self.b.dtype() {
            let sparse = Arc::clone(&self.projection().sparse);
            let (y, selection) =
                routed_layer(base, x, self.b.as_tensor(), sparse, self.config.scale(), self.route()?)?;
            self.count(Tensor::new(selection.counts(), x.device())?);
            return Ok(Some(y));
        }
        #[cfg(feature = "cuda")]
        return self.by_kernels(Some(base), x);
        #[cfg(not(feature = "cuda"))]
        Ok(None)
    }

    /// `alpha / r B A`, as if every rank were used.
    fn delta_weight(&self) -> Result<Tensor> {
        let a = self.projection().dense(self.b.dtype(), self.b.device())?.weight()?;
        self.b.as_detached_tensor().matmul(&(a * self.config.scale())?)
    }

    /// `alpha / r B diag(c) A`, where `c_i` is the share of the square of `y_i` that is in the rows that make use of it:
    /// the best factor for each rank on its own.
    fn delta_weight_for(&self, sample: &Tensor) -> Result<Tensor> {
        check_input(sample, self.in_features)?;
        let flat = sample.reshape((rows(sample.shape()), self.in_features))?.to_dtype(self.b.dtype())?;
        let a = self.projection().dense(flat.dtype(), flat.device())?;
        let y = a.forward(&flat)?.detach();
        let mask = self.mask(&self.scores(&y)?)?;
        let squares = y.to_dtype(at_least_f32(y.dtype()))?.sqr()?;
        let used = (&squares * mask.to_dtype(squares.dtype())?)?.sum(0)?;
        let c = (used / (squares.sum(0)? + f64::from(f32::MIN_POSITIVE))?)?; // (r)
        let b = self.b.as_detached_tensor().broadcast_mul(&c.to_dtype(self.b.dtype())?)?;
        b.matmul(&(a.weight()? * self.config.scale())?)
    }

    fn merge_quality(&self) -> Merge {
        if self.config.k == self.config.r { Merge::Exact } else { Merge::Unsupported }
    }

    fn parameters(&self) -> Vec<(String, Var)> {
        vec![(B.to_owned(), self.b.clone())]
    }

    fn active_parameters(&self) -> usize {
        self.config.k * self.out_features()
    }

    fn after_step(&self, _: Step, _: &GradStore) -> crate::Result<()> {
        let counts = self.state.counts.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(counts) = counts.filter(|_| self.config.balance_rate > 0.0) else { return Ok(()) };
        let counts = counts.to_dtype(DType::F32)?;
        let below_mean = counts.broadcast_sub(&counts.mean(0)?)?.neg()?.sign()?; // 1 where used less than the mean
        let moved = (self.state.balance.as_detached_tensor() + (below_mean * self.config.balance_rate)?)?;
        Ok(self.state.balance.set(&moved)?)
    }

    fn state(&self) -> crate::Result<Vec<(String, Tensor)>> {
        let projection = self.projection();
        let a = &projection.sparse;
        let seed = Tensor::new(&[a.seed.cast_signed(), a.stream.cast_signed()], &Device::Cpu)?;
        let indices = Tensor::from_vec(a.indices.clone(), (a.rows, a.per_row), &Device::Cpu)?;
        Ok(vec![
            (B.to_owned(), self.b.as_detached_tensor()),
            (INDICES.to_owned(), indices),
            (SEED.to_owned(), seed),
            (BALANCE.to_owned(), self.state.balance.as_detached_tensor()),
        ])
    }

    fn load_state<'a>(&'a self, source: &mut StateSource<'_>) -> crate::Result<Vec<Change<'a>>> {
        let b = source.like(B, &self.b)?;
        let balance = source.like(BALANCE, &self.state.balance)?;
        let seed = source.raw(SEED, &[2], DType::I64)?.to_vec1::<i64>()?;
        let per_row = self.config.nonzeros(self.in_features);
        let indices = source.raw(INDICES, &[self.config.r, per_row], DType::U32)?;
        let (first, second) = match *seed.as_slice() {
            [first, second] => (first.cast_unsigned(), second.cast_unsigned()),
            _ => return Err(source.wrong(SEED, "expected two numbers")),
        };
        let sparse = SparseMatrix::random(self.config.r, self.in_features, per_row, first, second);
        if indices.flatten_all()?.to_vec1::<u32>()? != sparse.indices {
            return Err(source.wrong(INDICES, "they are not those that the seed gives"));
        }
        Ok(vec![Box::new(move || {
            self.b.set(&b)?;
            self.state.balance.set(&balance)?;
            *self.state.projection.write().unwrap_or_else(PoisonError::into_inner) = Projection::new(sparse);
            Ok(())
        })])
    }
}
