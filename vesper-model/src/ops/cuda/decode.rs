//! The decoding step on CUDA: its buffers, its launches, and their replay.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaGraph, CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PinnedHostSlice,
};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use era_act::{Activation, Era};

use super::chain::{Chain, follow};
use super::decode_matrix::{Needs, Part, address_of, load, part, parts, table};
use super::graph::record;
use super::launch::{
    Element, Module, aligned, allocate, blocks, by_dtype, has_kernels, multiprocessors, size, tensor,
};
use crate::ops::decode::{Place, StepLayer, StepWeights};
use crate::quantized::Weight;

/// Warps of a block of the products with two rows a warp, and of the others.
const WARPS: usize = 8;
const FEW_WARPS: usize = 4;
/// Rows of the output layer that a warp takes at once.
const HEAD_ROWS: usize = 4;
/// Threads of the attention, and the query heads that it takes at once.
const POSITIONS: usize = 128;
const QUERIES: usize = 4;
/// Thread blocks that share the positions of a head, at most: the lanes of a warp put their parts together.
const MAX_SPLITS: usize = 32;
/// `NOT_CHOSEN` of the kernels, in the log.
const NOT_CHOSEN: u32 = u32::MAX;

/// `DecodeParams` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Params {
    rows: u32,
    d: u32,
    query: u32,
    kv: u32,
    dim: u32,
    ffn: u32,
    vocab: u32,
    capacity: u32,
    splits: u32,
    blocks: u32,
    kind: u32,
    a: f32,
    b: f32,
    eps: f32,
    numbers: u32,
}

const _: () = assert!(size_of::<Params>() == 60);
// SAFETY: plain numbers in the layout of `DecodeParams`.
unsafe impl DeviceRepr for Params {}

/// A block: the addresses of its norms and its cache, and its products.
struct Layer {
    norm_attention: u64,
    qkv: Vec<Part>,
    out: Part,
    norm_feed_forward: u64,
    gate_up: Part,
    down: Part,
    cache: u64,
}

/// Addresses of what is not of a block.
struct Addresses {
    embed: u64,
    norm: u64,
    cos: u64,
    sin: u64,
    position: u64,
    active: u64,
    token: u64,
    log: u64,
    h: u64,
    q: u64,
    part: u64,
    share: u64,
    inner: u64,
    logits: u64,
    hidden: u64,
    best: u64,
}

/// The kernels that are not of a block's matrices.
struct Kernels {
    embed: CudaFunction,
    attention: CudaFunction,
    next: CudaFunction,
}

/// A step of all rows of a cache, see `decode.cuh`.
pub(crate) struct CudaStep {
    device: CudaDevice,
    /// What the addresses lead to; the norms' weights are in f32.
    _weights: StepWeights,
    _norms: Vec<Tensor>,
    _caches: Vec<Tensor>,
    params: Params,
    layers: Vec<Layer>,
    head: Part,
    at: Addresses,
    kernels: Kernels,
    chain: Chain,
    /// Of each row: position, whether it takes part, token; then the tokens at 0 ..= capacity of each row.
    state: CudaSlice<u32>,
    logits: CudaSlice<f32>,
    /// Where the logits arrive on the host, in pinned memory, from the first time on that they are asked for.
    arrived: Option<PinnedHostSlice<f32>>,
    hidden: CudaSlice<f32>,
    _others: [CudaSlice<f32>; 6],
    /// Whether steps are replayed.
    captured: bool,
    steps: usize,
    graph: Option<CudaGraph>,
}

// SAFETY: the driver's graph objects belong to no thread, and only `&mut self` leads to them.
unsafe impl Send for CudaStep {}
// SAFETY: as above; by `&self` only the copy of a row of logits happens, on the device's own stream.
unsafe impl Sync for CudaStep {}

impl std::fmt::Debug for CudaStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaStep").field("params", &self.params).finish_non_exhaustive()
    }
}

impl CudaStep {
    /// A step over these caches `(2, rows, kv, capacity, dim)`; none where there are no kernels for the model.
    pub(crate) fn new(weights: StepWeights, caches: &[Tensor], captured: bool) -> Result<Option<Self>> {
        let Some(cache) = caches.first() else { return Ok(None) };
        let Device::Cuda(device) = cache.device() else { return Ok(None) };
        let device = device.clone();
        let numbers = match cache.dtype() {
            DType::F32 => 0,
            DType::BF16 => 1,
            DType::F16 => 2,
            _ => return Ok(None),
        };
        let Some((kind, a, b)) = activation(weights.settings.activation) else { return Ok(None) };
        let (heads, d) = (weights.settings.heads, weights.norm.elem_count());
        let (_, rows, kv, capacity, dim) = cache.dims5()?;
        if rows == 0 {
            return Ok(None);
        }
        let (vocab, ffn) = (weights.head.dims()?[0], weights.layers[0].down.dims()?[1]);
        let processors = multiprocessors(&device)?;
        // Enough blocks for the device, and none for less than 64 positions.
        let splits = capacity.div_ceil(64).min(2 * processors / (kv * rows)).clamp(1, MAX_SPLITS);
        if 4 * QUERIES * dim > 32 * 1024 || rows > 65_535 {
            return Ok(None);
        }
        // As the other operations have it.
        let fits = |matrix: &Tensor| matrix.dtype() == DType::F32 || matrix.dtype() == cache.dtype();
        if !weights.matrices().filter_map(Weight::plain).all(fits) {
            return Ok(None);
        }
        let Some(attention) = attention(&device, caches, dim)? else { return Ok(None) };
        // What an attention's parts count is kept beside its vector, whose elements are read four at a time in a head.
        let stream = Needs { rows, beside: 0, wide: true };
        let attended = Needs { beside: 4 * heads.query * splits, wide: dim.is_multiple_of(4), ..stream };
        let norms = weights.norms().map(|norm| aligned(&norm.to_dtype(DType::F32)?));
        let norms = norms.collect::<Result<Vec<_>>>()?;
        let mut layers = Vec::with_capacity(caches.len());
        for ((layer, cache), norms) in weights.layers.iter().zip(caches).zip(norms.chunks_exact(2)) {
            let one = |name, weight, needs| part(&device, name, weight, needs);
            let StepLayer { qkv, out, gate_up, down, .. } = layer;
            let (Some(qkv), Some(out)) = (parts(&device, "qkv", qkv, stream)?, one("output", out, attended)?)
            else {
                return Ok(None);
            };
            let (Some(gate_up), Some(down)) = (one("gate_up", gate_up, stream)?, one("down", down, stream)?)
            else {
                return Ok(None);
            };
            // A kernel takes whole heads.
            if qkv.iter().any(|part| !(part.rows as usize).is_multiple_of(dim)) {
                return Ok(None);
            }
            let [norm_attention, norm_feed_forward] = [address_of(&norms[0])?, address_of(&norms[1])?];
            let cache = address_of(cache)?;
            layers.push(Layer { norm_attention, qkv, out, norm_feed_forward, gate_up, down, cache });
        }
        let Some(head) = part(&device, "head", &weights.head, stream)? else { return Ok(None) };
        let Some((embed, embed_at)) = table(&device, &weights.embed)? else { return Ok(None) };
        let head_blocks = vocab.div_ceil(HEAD_ROWS * WARPS).min(4 * processors);
        let params = Params {
            rows: size(rows)?,
            d: size(d)?,
            query: size(heads.query)?,
            kv: size(kv)?,
            dim: size(dim)?,
            ffn: size(ffn)?,
            vocab: size(vocab)?,
            capacity: size(capacity)?,
            splits: size(splits)?,
            blocks: size(head_blocks)?,
            kind,
            a,
            b,
            eps: weights.settings.eps as f32,
            numbers,
        };
        let state = device.alloc_zeros::<u32>(rows * (3 + capacity + 1))?;
        let queue = device.cuda_stream();
        let floats = |n: usize| allocate::<f32>(&device, n);
        let (logits, hidden) = (floats(rows * vocab)?, floats(rows * d)?);
        let parts = rows * heads.query * splits;
        let others = [
            floats(rows * d)?,
            floats(rows * heads.query * dim)?,
            floats(parts * dim)?,
            floats(2 * parts)?,
            floats(rows * ffn)?,
            floats(2 * rows * head_blocks)?,
        ];
        let own = |x: &CudaSlice<f32>| x.device_ptr(&queue).0;
        let start = state.device_ptr(&queue).0;
        let numbers = |n: usize| start + 4 * n as u64;
        let at = Addresses {
            embed: embed_at,
            norm: address_of(&norms[norms.len() - 1])?,
            cos: address_of(weights.rope.cos())?,
            sin: address_of(weights.rope.sin())?,
            position: numbers(0),
            active: numbers(rows),
            token: numbers(2 * rows),
            log: numbers(3 * rows),
            h: own(&others[0]),
            q: own(&others[1]),
            part: own(&others[2]),
            share: own(&others[3]),
            inner: own(&others[4]),
            logits: own(&logits),
            hidden: own(&hidden),
            best: own(&others[5]),
        };
        let next = load(&device, Module::DecodeNext, "decode_next", 0)?;
        Ok(Some(Self {
            chain: Chain::new(&device)?,
            device,
            _weights: weights,
            _norms: norms,
            _caches: caches.to_vec(),
            params,
            layers,
            head,
            at,
            kernels: Kernels { embed, attention, next },
            state,
            logits,
            arrived: None,
            hidden,
            _others: others,
            captured,
            steps: 0,
            graph: None,
        }))
    }

    /// Reads one token a place; the logits of the places, and their hidden states (places, 1, d) in f32.
    pub(crate) fn step(&mut self, ids: &[u32], places: &[Place]) -> Result<(Vec<Vec<f32>>, Tensor)> {
        self.place(ids, places)?;
        self.advance()?;
        let hidden = self.hidden(places)?;
        let (rows, vocab) = (self.params.rows as usize, self.params.vocab as usize);
        let queue = self.device.cuda_stream();
        let arrived = match &mut self.arrived {
            Some(arrived) => arrived,
            none => {
                // SAFETY: what the host reads of it, the device has written before.
                let pinned = unsafe { queue.context().alloc_pinned_with_flags::<f32>(rows * vocab, 0) };
                none.insert(pinned.w()?)
            }
        };
        // All from the first to the last row that takes part.
        let taking_part = places.iter().map(|place| place.row);
        let first = taking_part.clone().min().unwrap_or(0);
        let end = taking_part.max().map_or(first, |row| row + 1);
        let arrived = &mut arrived.as_mut_slice().w()?[..(end - first) * vocab];
        queue.memcpy_dtoh(&self.logits.slice(first * vocab..end * vocab), arrived).w()?;
        // Waiting for `arrived` itself would not do: without event tracking no event says when it is there.
        self.device.synchronize()?;
        let logits = places.iter().map(|place| arrived[(place.row - first) * vocab..][..vocab].to_vec());
        Ok((logits.collect(), hidden))
    }

    /// The logits of a row after the last step.
    pub(crate) fn logits(&self, row: usize) -> Result<Vec<f32>> {
        let vocab = self.params.vocab as usize;
        self.device.clone_dtoh(&self.logits.slice(row * vocab..(row + 1) * vocab))
    }

    /// Reads a token a place and then `n - 1` times the likeliest one after it: of each place the likeliest after each,
    /// and the last hidden states (places, 1, d) in f32. The host waits once. Where a row's logits are none to choose
    /// from, its tokens end before, and it stays there: [`CudaStep::logits`] are those.
    pub(crate) fn greedy(
        &mut self,
        ids: &[u32],
        places: &[Place],
        n: usize,
    ) -> Result<(Vec<Vec<u32>>, Tensor)> {
        self.place(ids, places)?;
        for _ in 0..n {
            self.advance()?;
        }
        let (rows, capacity) = (self.params.rows as usize, self.params.capacity as usize);
        let log = self.device.clone_dtoh(&self.state.slice(3 * rows..))?;
        let chosen = places.iter().map(|place| {
            let start = place.row * (capacity + 1) + place.position + 1;
            log[start..start + n].iter().copied().take_while(|&id| id != NOT_CHOSEN).collect()
        });
        Ok((chosen.collect(), self.hidden(places)?))
    }

    /// Tells the device which rows read what where.
    fn place(&mut self, ids: &[u32], places: &[Place]) -> Result<()> {
        let rows = self.params.rows as usize;
        let mut state = vec![0u32; 3 * rows];
        for (id, place) in ids.iter().zip(places) {
            if place.row >= rows || place.position >= self.params.capacity as usize {
                bail!("a decoding step got {place:?}, which the cache does not have");
            }
            state[place.row] = place.position as u32;
            state[rows + place.row] = 1;
            state[2 * rows + place.row] = *id;
        }
        // A row that rests computes what nobody reads, behind the end of the cache so that it writes nothing.
        for row in 0..rows {
            if state[rows + row] == 0 {
                state[row] = self.params.capacity;
            }
        }
        self.device.memcpy_htod(&state, &mut self.state.slice_mut(..3 * rows))
    }

    fn hidden(&self, places: &[Place]) -> Result<Tensor> {
        let d = self.params.d as usize;
        let mut hidden = allocate::<f32>(&self.device, places.len() * d)?;
        if places.len() == self.params.rows as usize && places.iter().enumerate().all(|(i, p)| p.row == i) {
            self.device.memcpy_dtod(&self.hidden, &mut hidden)?;
            return Ok(tensor(hidden, &self.device, (places.len(), 1, d)));
        }
        for (i, place) in places.iter().enumerate() {
            let from = self.hidden.slice(place.row * d..(place.row + 1) * d);
            self.device.memcpy_dtod(&from, &mut hidden.slice_mut(i * d..(i + 1) * d))?;
        }
        Ok(tensor(hidden, &self.device, (places.len(), 1, d)))
    }

    /// One step: the first launches the kernels, the second records what it launches, all later ones replay.
    fn advance(&mut self) -> Result<()> {
        self.steps += 1;
        if !self.captured || self.steps == 1 {
            return self.launch_all();
        }
        if self.graph.is_none() {
            self.graph = Some(record(&self.device, || self.launch_all())?);
        }
        match &self.graph {
            Some(graph) => graph.launch().w(),
            None => bail!("a decoding step lost its recording"),
        }
    }

    fn launch_all(&self) -> Result<()> {
        let (chain, at, kernels, p) = (&self.chain, &self.at, &self.kernels, &self.params);
        let rows = p.rows as usize;
        let product = |part: &Part, count: u32, warps: usize| -> Result<LaunchConfig> {
            let config = blocks((count as usize).div_ceil(warps), 32 * warps as u32)?;
            Ok(LaunchConfig { shared_mem_bytes: part.shared, ..config })
        };
        let attention = LaunchConfig {
            grid_dim: (p.splits, p.kv, p.rows),
            block_dim: (POSITIONS as u32, 1, 1),
            shared_mem_bytes: size(4 * QUERIES * p.dim as usize)?,
        };
        follow!(chain, &kernels.embed, blocks(rows, 256)?, &at.embed, &at.token, &at.h, p);
        for Layer { norm_attention, qkv, out, norm_feed_forward, gate_up, down, cache } in &self.layers {
            for part in qkv {
                let pairs = part.rows / 2;
                follow!(
                    chain,
                    &part.kernel,
                    product(part, pairs, WARPS)?,
                    &at.h,
                    norm_attention,
                    &part.address,
                    &part.first,
                    &pairs,
                    &at.cos,
                    &at.sin,
                    &at.position,
                    &at.q,
                    cache,
                    p
                );
            }
            follow!(chain, &kernels.attention, attention, &at.q, cache, &at.position, &at.part, &at.share, p);
            let config = product(out, p.d, FEW_WARPS)?;
            follow!(chain, &out.kernel, config, &at.part, &at.share, &out.address, &at.h, p);
            let config = product(gate_up, p.ffn, WARPS)?;
            follow!(chain, &gate_up.kernel, config, &at.h, norm_feed_forward, &gate_up.address, &at.inner, p);
            let config = product(down, p.d, FEW_WARPS)?;
            follow!(chain, &down.kernel, config, &at.inner, &down.address, &at.h, p);
        }
        let head = &self.head;
        let config = LaunchConfig {
            grid_dim: (p.blocks, 1, 1),
            block_dim: (32 * WARPS as u32, 1, 1),
            shared_mem_bytes: head.shared,
        };
        follow!(
            chain,
            &head.kernel,
            config,
            &at.h,
            &at.norm,
            &head.address,
            &at.logits,
            &at.hidden,
            &at.best,
            p
        );
        let config = blocks(rows, 256)?;
        follow!(chain, &kernels.next, config, &at.best, &at.active, &at.token, &at.position, &at.log, p);
        Ok(())
    }
}

/// The attention's kernel over these caches; none where there is none for them.
fn attention(device: &CudaDevice, caches: &[Tensor], dim: usize) -> Result<Option<CudaFunction>> {
    fn of<T: Element>(device: &CudaDevice, caches: &[Tensor], dim: usize) -> Result<Option<CudaFunction>> {
        let aligned = |x: &Tensor| (x.layout().start_offset() * size_of::<T>()).is_multiple_of(16);
        let wide = dim.is_multiple_of(T::WIDE) && caches.iter().all(aligned);
        if dim / if wide { T::WIDE } else { 1 } > POSITIONS || !caches.iter().all(Tensor::is_contiguous) {
            return Ok(None);
        }
        let name = format!("decode_attention_{}_{}", T::NAME, if wide { "wide" } else { "single" });
        load(device, Module::DecodeAttention, &name, 0).map(Some)
    }
    let dtype = caches[0].dtype();
    if !has_kernels(dtype) {
        return Ok(None);
    }
    by_dtype!(dtype, T => of::<T>(device, caches, dim))
}

/// The kind of an activation and its numbers, as `decode.cuh` has them.
fn activation(activation: Activation) -> Option<(u32, f32, f32)> {
    Some(match activation {
        Activation::Era(Era::GateEntropy { temperature, strength }) => {
            (0, (1.0 / temperature) as f32, strength as f32)
        }
        Activation::Era(Era::GeluSoftplus { gamma }) => (1, gamma as f32, 0.0),
        Activation::Silu => (2, 0.0, 0.0),
        Activation::GeluTanh => (3, 0.0, 0.0),
        Activation::Gelu => (4, 0.0, 0.0),
        Activation::Relu => (5, 0.0, 0.0),
        Activation::ReluSquared => (6, 0.0, 0.0),
        _ => return None,
    })
}
