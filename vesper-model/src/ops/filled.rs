//! Vectors that tasks fill at once, without a pass of one thread that clears them first.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

/// `N` vectors of `len` values, and what the tasks return, in order.
///
/// A task gets a range of at most `size` places and its part of each vector, zeros that it has written itself just
/// before: each page of a vector is first touched by the task that fills it, while the part is in its cache.
pub(super) fn filled<T: Copy + Default + Send, R: Send, const N: usize>(
    len: usize,
    size: usize,
    task: impl Fn(Range<usize>, [&mut [T]; N]) -> R + Sync,
) -> ([Vec<T>; N], Vec<R>) {
    let size = size.max(1);
    let mut vectors: [Vec<T>; N] = std::array::from_fn(|_| Vec::with_capacity(len));
    let mut chunks = vectors.each_mut().map(|vector| vector.spare_capacity_mut()[..len].chunks_mut(size));
    let parts: Vec<_> = (0..len.div_ceil(size))
        .map(|_| chunks.each_mut().map(|chunks| chunks.next().unwrap_or_default()))
        .collect();
    let results = parts
        .into_par_iter()
        .enumerate()
        .map(|(i, parts)| task(i * size..len.min((i + 1) * size), parts.map(zeros)))
        .collect();
    for vector in &mut vectors {
        // SAFETY: the chunks are all of the first `len` places, and a task has written each.
        unsafe { vector.set_len(len) };
    }
    (vectors, results)
}

/// Room that is zeros from now on.
fn zeros<T: Copy + Default>(room: &mut [MaybeUninit<T>]) -> &mut [T] {
    room.fill(MaybeUninit::new(T::default()));
    // SAFETY: all of it has just been written; `MaybeUninit<T>` is laid out as `T`.
    unsafe { &mut *(std::ptr::from_mut(room) as *mut [T]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeros_and_where_their_ranges_say() {
        for (len, size) in [(0, 4), (0, 0), (3, 4), (8, 4), (9, 4)] {
            let ([squares, zeros], starts) = filled(len, size, |range: Range<usize>, [squares, zeros]| {
                assert!(squares.iter().chain(zeros.iter()).all(|&value| value == 0));
                assert_eq!([squares.len(), zeros.len()], [range.len(); 2]);
                for (place, i) in squares.iter_mut().zip(range.clone()) {
                    *place = i * i;
                }
                range.start
            });
            assert_eq!(squares, (0..len).map(|i| i * i).collect::<Vec<_>>());
            assert_eq!(zeros, vec![0; len]);
            assert_eq!(starts, (0..len).step_by(size.max(1)).collect::<Vec<_>>());
        }
    }
}
