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
    let possible = heads.query > 0 && kv > 0 && dim > 0 && heads.query.is_multiple_of(kv);
    if !fits || !possible || qkv.dtype() != cache.dtype() {
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn zeros(shape: &[usize]) -> Tensor {
        Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_refused_and_nothing_new_gives_nothing() {
        let (heads, start) = (Heads { query: 4, kv: 2, dim: 6 }, Place { row: 0, position: 0 });
        let cache = zeros(&[2, 3, 2, 9, 6]);
        let positions = Rope::new(6, 8, 1e4, &Device::Cpu).unwrap();
        for path in [Path::Fused, Path::Reference] {
            let run = |qkv: &[usize], cache: &Tensor, heads, place| {
                cached_attention(&zeros(qkv), cache, heads, &positions, place, path)
            };
            let end = Place { row: 2, position: 8 };
            assert_eq!(run(&[1, 0, 48], &cache, heads, end).unwrap().dims(), [1, 0, 24]);
            assert_eq!(run(&[1, 8, 48], &cache, heads, start).unwrap().dims(), [1, 8, 24]);
            let without = |query, dim| Heads { query, dim, ..heads };
            for (qkv, cache, heads, place) in [
                // No heads of queries, and heads of nothing.
                (&[1, 3, 24], &cache, without(0, 6), start),
                (&[1, 3, 0], &zeros(&[2, 3, 2, 9, 0]), without(4, 0), start),
                (&[1, 3, 42], &cache, without(3, 6), start),
                (&[2, 3, 48], &cache, heads, start),
                (&[1, 3, 48], &zeros(&[1, 3, 2, 9, 6]), heads, start),
                (&[1, 3, 48], &cache.to_dtype(DType::F64).unwrap(), heads, start),
                // A row, positions of the cache, of the table, and of no number.
                (&[1, 3, 48], &cache, heads, Place { row: 3, position: 0 }),
                (&[1, 1, 48], &cache, heads, Place { row: 0, position: 9 }),
                (&[1, 1, 48], &cache, heads, Place { row: 0, position: 8 }),
                (&[1, 1, 48], &cache, heads, Place { row: 0, position: usize::MAX }),
            ] {
                let error = run(qkv, cache, heads, place).unwrap_err().to_string();
                assert!(error.starts_with("cached_attention: "), "{qkv:?} {heads:?} {place:?}: {error}");
            }
        }
    }
}
