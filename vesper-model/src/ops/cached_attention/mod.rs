//! Causal attention of tokens that follow those whose keys and values are in a cache.

mod composed;
mod cpu;

use candle_core::{Result, Tensor, bail};

use super::{Backend, Heads, Path, Place, Rope, check_sizes};

/// Writes the keys and values of new tokens of one sequence into a cache, and attends from each of the tokens to all
/// positions up to its own.
///
/// ```text
/// qkv: (1, t, (query + 2 kv) * dim), as for `causal_attention`, of the positions place.position ..
/// cache: (2, rows, kv, capacity, dim), rotated keys, then values, of which the row place.row is written
/// result: (1, t, query * dim)
/// ```
///
/// The dtype of both is the same. What lies in the cache behind the last of the tokens is never read. Without a gradient.
/// The fused paths hold a block of scores, the composition those of a few hundred tokens at once.
///
/// # Errors
/// Shapes that do not fit each other, and positions that the cache or the rotary table does not have.
pub(crate) fn cached_attention(
    qkv: &Tensor,
    cache: &Tensor,
    heads: Heads,
    positions: &Rope,
    place: Place,
    path: Path,
) -> Result<Tensor> {
    let (b, t, width) = qkv.dims3()?;
    let (two, rows, kv, capacity, dim) = cache.dims5()?;
    let fits = two == 2 && kv == heads.kv && dim == heads.dim && width == heads.packed() && b == 1;
    if !fits || kv == 0 || !heads.query.is_multiple_of(kv) || qkv.dtype() != cache.dtype() {
        bail!(
            "cached_attention: qkv of shape {:?} in {:?} and a cache of shape {:?} in {:?} do not fit {heads:?}",
            qkv.shape(),
            qkv.dtype(),
            cache.shape(),
            cache.dtype()
        );
    }
    let end = place.position.checked_add(t).filter(|end| *end <= capacity.min(positions.positions()));
    if end.is_none() || place.row >= rows || positions.head_dim != dim {
        bail!(
            "cached_attention: {t} tokens at {place:?}, but the cache has {rows} rows of {capacity} positions, and the \
             rotary table {} of head size {}",
            positions.positions(),
            positions.head_dim
        );
    }
    check_sizes("cached_attention", &[qkv.dims(), cache.dims()])?;
    if t == 0 {
        return composed::cached_attention(qkv, cache, heads, positions, place);
    }
    match path.backend(qkv) {
        Backend::Cpu => cpu::cached_attention(qkv, cache, heads, positions, place),
        #[cfg(feature = "cuda")]
        Backend::Cuda if super::cuda::attention::supports(heads, qkv.dtype()) => {
            super::cuda::cached_attention::cached_attention(qkv, cache, heads, positions, place)
        }
        _ => composed::cached_attention(qkv, cache, heads, positions, place),
    }
}
