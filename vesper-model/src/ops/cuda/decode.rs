//! The decoding step on CUDA: its buffers, its launches, and their replay.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaGraph, CudaSlice, DevicePtr, DeviceRepr, LaunchConfig, PinnedHostSlice, sys,
};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use era_act::{Activation, Era};

use super::chain::{Chain, follow};
use super::graph::record;
use super::launch::{
    Element, Held, Module, allocate, allow_shared, blocks, by_dtype, has_kernels, multiprocessors, size,
    tensor,
};
use crate::ops::decode::{Place, StepWeights};

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
/// How many sequences read the weights together, and from how many on.
const TOGETHER: [(usize, usize); 2] = [(8, 5), (4, 2)];

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
}

const _: () = assert!(size_of::<Params>() == 56);
// SAFETY: plain numbers in the layout of `DecodeParams`.
unsafe impl DeviceRepr for Params {}

/// Addresses of a block's parameters and of its cache.
struct Layer {
    norm_attention: u64,
    qkv: u64,
    out: u64,
    norm_feed_forward: u64,
    gate_up: u64,
    down: u64,
    cache: u64,
}

/// Addresses of what is not of a block.
struct Addresses {
    embed: u64,
    norm: u64,
    head: u64,
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

struct Kernels {
    embed: CudaFunction,
    qkv: CudaFunction,
    attention: CudaFunction,
    output: CudaFunction,
    gate_up: CudaFunction,
    down: CudaFunction,
    head: CudaFunction,
    next: CudaFunction,
}

/// Bytes of shared memory of the products over the residual stream, the attention's output and the feed-forward.
struct Shared {
    stream: u32,
    attended: u32,
    inner: u32,
}

/// A step of all rows of a cache, see `decode.cuh`.
pub(crate) struct CudaStep {
    device: CudaDevice,
    /// What the addresses lead to.
    _weights: StepWeights,
    _caches: Vec<Tensor>,
    params: Params,
    layers: Vec<Layer>,
    at: Addresses,
    kernels: Kernels,
    chain: Chain,
    shared: Shared,
    /// Of each row: position, whether it takes part, token; then the tokens at 0 ..= capacity of each row.
    state: CudaSlice<u32>,
    logits: CudaSlice<f32>,
    /// Where the logits arrive on the host, which the device writes to without help.
    arrived: PinnedHostSlice<f32>,
    hidden: CudaSlice<f32>,
    _others: [CudaSlice<f32>; 6],
    /// Whether steps are replayed.
    captured: bool,
    steps: usize,
    graph: Option<CudaGraph>,
}

// SAFETY: the driver's graph objects belong to no thread, and only `&mut self` leads to them.
unsafe impl Send for CudaStep {}
// SAFETY: as above; nothing happens by `&self`.
unsafe impl Sync for CudaStep {}

impl std::fmt::Debug for CudaStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaStep").field("params", &self.params).finish_non_exhaustive()
    }
}

impl CudaStep {
    /// A step over these caches `(2, rows, kv, capacity, dim)`; none where there are no kernels for the model.
    pub(crate) fn new(weights: &StepWeights, caches: &[Tensor], captured: bool) -> Result<Option<Self>> {
        let Some(cache) = caches.first() else { return Ok(None) };
        let Device::Cuda(device) = cache.device() else { return Ok(None) };
        let dtype = cache.dtype();
        let fits = |x: &Tensor| x.dtype() == dtype && x.is_contiguous();
        if !has_kernels(dtype) || !weights.tensors().all(fits) {
            return Ok(None);
        }
        by_dtype!(dtype, T => Self::of_type::<T>(device, weights, caches, captured))
    }

    fn of_type<T: Element>(
        device: &CudaDevice,
        weights: &StepWeights,
        caches: &[Tensor],
        captured: bool,
    ) -> Result<Option<Self>> {
        let Some((kind, a, b)) = activation(weights.settings.activation) else { return Ok(None) };
        let heads = weights.settings.heads;
        let (_, rows, kv, capacity, dim) = caches[0].dims5()?;
        let (vocab, d) = weights.embed.dims2()?;
        let (ffn, width) = (weights.layers[0].down.dim(1)?, heads.query * dim);
        let aligned = |x: &Tensor| (x.layout().start_offset() * size_of::<T>()).is_multiple_of(16);
        let wide = [d, ffn, width, dim].iter().all(|n| n.is_multiple_of(T::WIDE))
            && weights.tensors().chain(caches).all(aligned);
        let vector = if wide { T::WIDE } else { 1 };
        let processors = multiprocessors(device)?;
        // Shared memory of one vector of n, as `padded` has it.
        let bytes = |n: usize| 4 * if vector > 4 { n.next_multiple_of(32 * vector) } else { n };
        let longest = bytes(d.max(ffn).max(width));
        let limit = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let limit = device.cuda_stream().context().attribute(limit).w()? as usize;
        // Enough blocks for the device, and none for less than 64 positions.
        let splits = capacity.div_ceil(64).min(2 * processors / (kv * rows)).clamp(1, MAX_SPLITS);
        // With what the kernels declare for themselves, and the shares of an attention's parts.
        let needed = |together: usize| 2048 + together * (longest + 4 * heads.query * splits);
        let together = TOGETHER.into_iter().find(|&(n, least)| rows >= least && needed(n) <= limit);
        let together = together.map_or(1, |(n, _)| n);
        if needed(1) > limit || dim / vector > POSITIONS || 4 * QUERIES * dim > 32 * 1024 || rows > 65_535 {
            return Ok(None);
        }
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
        };
        let state = device.alloc_zeros::<u32>(rows * (3 + capacity + 1))?;
        let stream = device.cuda_stream();
        let floats = |n: usize| allocate::<f32>(device, n);
        let (logits, hidden) = (floats(rows * vocab)?, floats(rows * d)?);
        // SAFETY: the device writes all of it before the host reads.
        let arrived = unsafe { stream.context().alloc_pinned_with_flags::<f32>(rows * vocab, 0) }.w()?;
        let parts = rows * heads.query * splits;
        let others = [
            floats(rows * d)?,
            floats(rows * width)?,
            floats(parts * dim)?,
            floats(2 * parts)?,
            floats(rows * ffn)?,
            floats(2 * rows * head_blocks)?,
        ];
        let own = |x: &CudaSlice<f32>| x.device_ptr(&stream).0;
        let start = state.device_ptr(&stream).0;
        let numbers = |n: usize| start + 4 * n as u64;
        let at = Addresses {
            embed: address::<T>(&weights.embed)?,
            norm: address::<T>(&weights.norm)?,
            head: address::<T>(&weights.head)?,
            cos: address::<f32>(weights.rope.cos())?,
            sin: address::<f32>(weights.rope.sin())?,
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
        let layers = weights.layers.iter().zip(caches).map(|(layer, cache)| {
            Ok(Layer {
                norm_attention: address::<T>(&layer.norm_attention)?,
                qkv: address::<T>(&layer.qkv)?,
                out: address::<T>(&layer.out)?,
                norm_feed_forward: address::<T>(&layer.norm_feed_forward)?,
                gate_up: address::<T>(&layer.gate_up)?,
                down: address::<T>(&layer.down)?,
                cache: address::<T>(cache)?,
            })
        });
        let layers = layers.collect::<Result<_>>()?;
        let kind = format!("{}_{}", T::NAME, if wide { "wide" } else { "single" });
        let shared = |n: usize| size(together * bytes(n));
        // The output layer's kernel also keeps what each part of the attention counts.
        let factors = size(4 * together * heads.query * splits)?;
        let shared = Shared { stream: shared(d)?, attended: shared(width)? + factors, inner: shared(ffn)? };
        let load = |name: &str, bytes: u32| -> Result<CudaFunction> {
            let module = match T::DTYPE {
                DType::BF16 => Module::DecodeBf16,
                DType::F16 => Module::DecodeF16,
                _ => Module::DecodeF32,
            };
            let function = device.get_or_load_custom_func(name, module.name(), module.ptx())?;
            allow_shared(&function, bytes)?;
            Ok(function.into_cuda_function())
        };
        let product = |name: &str, bytes: u32| load(&format!("decode_{name}_{kind}_{together}"), bytes);
        let kernels = Kernels {
            embed: load(&format!("decode_embed_{}", T::NAME), 0)?,
            qkv: product("qkv", shared.stream)?,
            attention: load(&format!("decode_attention_{kind}"), 0)?,
            output: product("output", shared.attended)?,
            gate_up: product("gate_up", shared.stream)?,
            down: product("down", shared.inner)?,
            head: product("head", shared.stream)?,
            next: load(&format!("decode_next_{}", T::NAME), 0)?,
        };
        Ok(Some(Self {
            device: device.clone(),
            _weights: weights.clone(),
            _caches: caches.to_vec(),
            params,
            layers,
            at,
            kernels,
            chain: Chain::new(device)?,
            shared,
            state,
            logits,
            arrived,
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
        let vocab = self.params.vocab as usize;
        let hidden = self.hidden(places)?;
        self.device.memcpy_dtoh(&self.logits, &mut self.arrived)?;
        // Waiting for `arrived` itself would not do: without event tracking no event says when it is there.
        self.device.synchronize()?;
        let all = self.arrived.as_slice().w()?;
        let logits = places.iter().map(|place| all[place.row * vocab..(place.row + 1) * vocab].to_vec());
        Ok((logits.collect(), hidden))
    }

    /// Reads a token at a place and then `n - 1` times the likeliest one after it: the likeliest after each, and the last
    /// hidden state (1, 1, d) in f32. The host waits once.
    pub(crate) fn greedy(&mut self, id: u32, place: Place, n: usize) -> Result<(Vec<u32>, Tensor)> {
        self.place(&[id], &[place])?;
        for _ in 0..n {
            self.advance()?;
        }
        let (rows, capacity) = (self.params.rows as usize, self.params.capacity as usize);
        let start = 3 * rows + place.row * (capacity + 1) + place.position + 1;
        let chosen = self.device.clone_dtoh(&self.state.slice(start..start + n))?;
        Ok((chosen, self.hidden(&[place])?))
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
        let (rows, d) = (p.rows as usize, p.d as usize);
        let product = |count: usize, warps: usize, bytes: u32| -> Result<LaunchConfig> {
            let config = blocks(count.div_ceil(warps), 32 * warps as u32)?;
            Ok(LaunchConfig { shared_mem_bytes: bytes, ..config })
        };
        let pairs = (p.query + 2 * p.kv) as usize * (p.dim / 2) as usize;
        let qkv = product(pairs, WARPS, self.shared.stream)?;
        let attention = LaunchConfig {
            grid_dim: (p.splits, p.kv, p.rows),
            block_dim: (POSITIONS as u32, 1, 1),
            shared_mem_bytes: size(4 * QUERIES * p.dim as usize)?,
        };
        let output = product(d, FEW_WARPS, self.shared.attended)?;
        let gate_up = product(p.ffn as usize, WARPS, self.shared.stream)?;
        let down = product(d, FEW_WARPS, self.shared.inner)?;
        let head = LaunchConfig {
            grid_dim: (p.blocks, 1, 1),
            block_dim: (32 * WARPS as u32, 1, 1),
            shared_mem_bytes: self.shared.stream,
        };
        follow!(chain, &kernels.embed, blocks(rows, 256)?, &at.embed, &at.token, &at.h, p);
        for layer in &self.layers {
            follow!(
                chain,
                &kernels.qkv,
                qkv,
                &at.h,
                &layer.norm_attention,
                &layer.qkv,
                &at.cos,
                &at.sin,
                &at.position,
                &at.q,
                &layer.cache,
                p
            );
            follow!(
                chain,
                &kernels.attention,
                attention,
                &at.q,
                &layer.cache,
                &at.position,
                &at.part,
                &at.share,
                p
            );
            follow!(chain, &kernels.output, output, &at.part, &at.share, &layer.out, &at.h, p);
            follow!(
                chain,
                &kernels.gate_up,
                gate_up,
                &at.h,
                &layer.norm_feed_forward,
                &layer.gate_up,
                &at.inner,
                p
            );
            follow!(chain, &kernels.down, down, &at.inner, &layer.down, &at.h, p);
        }
        follow!(chain, &kernels.head, head, &at.h, &at.norm, &at.head, &at.logits, &at.hidden, &at.best, p);
        follow!(
            chain,
            &kernels.next,
            blocks(rows, 256)?,
            &at.best,
            &at.active,
            &at.token,
            &at.position,
            &at.log,
            p
        );
        Ok(())
    }
}

/// Where a contiguous tensor begins.
fn address<T: Element>(tensor: &Tensor) -> Result<u64> {
    let held = Held::new(tensor);
    let stream = held.device()?.cuda_stream();
    let view = held.view::<T>()?;
    let (address, _) = view.device_ptr(&stream);
    Ok(address)
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
