//! Reading a tensor of any strides in row-major order.

use std::borrow::Cow;

use candle_core::{CpuStorage, Layout, Result};

use crate::Error;
use crate::element::Element;

/// The elements in row-major order: borrowed where they lie so, else gathered.
pub(crate) fn elements<'a, T: Element>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [T]>> {
    let data = T::cpu_storage_as_slice(storage)?;
    let gathered = match layout.contiguous_offsets() {
        Some((start, end)) => data.get(start..end).map(Cow::Borrowed),
        None => gather(data, layout).map(Cow::Owned),
    };
    gathered.ok_or_else(|| Error::Layout { got: format!("{layout:?}"), len: data.len() }.into())
}

/// `None` where the layout points outside of `data`.
fn gather<T: Copy>(data: &[T], layout: &Layout) -> Option<Vec<T>> {
    let count = layout.shape().elem_count();
    let mut out = Vec::with_capacity(count);
    if count == 0 {
        return Some(out);
    }
    // The last dimensions that lie in row-major order are one run, copied at once.
    let mut outer: Vec<(usize, usize)> =
        layout.dims().iter().copied().zip(layout.stride().iter().copied()).collect();
    let mut run = 1;
    while let Some(&(dim, stride)) = outer.last()
        && (dim == 1 || stride == run)
    {
        run *= dim;
        outer.pop();
    }
    let mut index = vec![0; outer.len()];
    let mut start = layout.start_offset();
    loop {
        out.extend_from_slice(data.get(start..start.checked_add(run)?)?);
        // Counts up like an odometer, the last dimension fastest.
        let mut carried = true;
        for (i, &(dim, stride)) in index.iter_mut().zip(&outer).rev() {
            *i += 1;
            start += stride;
            if *i < dim {
                carried = false;
                break;
            }
            start -= dim * stride;
            *i = 0;
        }
        if carried {
            return Some(out);
        }
    }
}
