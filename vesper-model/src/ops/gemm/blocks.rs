//! The blocking of a product: packed panels, tasks, and the order of the tiles.
//!
//! The operand with fewer lanes is packed once, as a whole, by all threads. The lanes of the other are divided into
//! tasks; each packs its own part, a slice of the inner dimension at a time, into a buffer that stays in the
//! second-level cache, and computes the tiles of its part of the result. A slice of one right panel stays in the
//! first-level cache while all left panels pass by it.

use std::cell::Cell;
use std::mem::take;
use std::ops::Range;

use rayon::prelude::*;

use super::{Element, Kernel, Lanes};
use crate::ops::matrix::{Matrix, Target, Threads, Values};

/// Groups of the inner dimension in a slice: with 48 columns of 4 bytes, 36 KiB.
const DEPTH: usize = 192;
/// Lanes of a task's own panels, about: with the depth, 144 KiB.
const LANES: usize = 192;
/// Left rows that pass by a right panel before the next panel's turn, about: with the depth, 384 KiB.
const ROWS: usize = 512;
/// Products with fewer multiplications run on the calling thread.
const SMALL: usize = 1 << 17;

/// A pointer that tasks share; each writes its own places.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: only `T`s that may be sent are written through it, by one task each.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// As `pointer::add`.
    unsafe fn add(self, count: usize) -> *mut T {
        // SAFETY: the caller's.
        unsafe { self.0.add(count) }
    }
}

/// Room for packed panels. A thread keeps its last two, the smaller one first: given back, their pages would have to be
/// mapped again for every product.
struct Scratch(Vec<u32>);

thread_local! {
    static KEPT: Cell<[Vec<u32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

impl Scratch {
    /// Elements of the largest that is kept, 16 MiB.
    const MOST: usize = 4 << 20;

    fn of(capacity: usize) -> Self {
        let mut kept = KEPT.take();
        let mut own = take(&mut kept[usize::from(kept[0].capacity() < capacity)]);
        KEPT.set(kept);
        if own.capacity() < capacity {
            own = Vec::with_capacity(capacity);
        }
        Self(own)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut kept = KEPT.take();
        if (kept[0].capacity()..Self::MOST).contains(&self.0.capacity()) {
            kept[0] = take(&mut self.0);
            kept.sort_by_key(Vec::capacity);
        }
        KEPT.set(kept);
    }
}

/// An operand as lanes along the inner dimension.
#[derive(Clone, Copy)]
struct Operand<'a> {
    values: Values<'a, f32>,
    lanes: usize,
    lane_stride: usize,
    depth: usize,
    depth_stride: usize,
    /// Lanes of a panel.
    width: usize,
}

impl Operand<'_> {
    fn panels(&self) -> usize {
        self.lanes.div_ceil(self.width)
    }

    /// Packs the groups `steps` of one panel to `to`.
    ///
    /// # Safety
    /// As [`Kernel::pack`]; the panel and the first of the steps exist.
    unsafe fn pack<K: Kernel>(&self, to: *mut u32, panel: usize, steps: Range<usize>) {
        // SAFETY: the caller's; `Matrix` has checked that all its elements lie in its values.
        unsafe {
            match self.values {
                Values::Full(values) => self.pack_as::<K, _>(to, values.as_ptr(), panel, steps),
                Values::Half(values) => self.pack_as::<K, _>(to, values.as_ptr(), panel, steps),
            }
        }
    }

    /// # Safety
    /// As [`Operand::pack`].
    unsafe fn pack_as<K: Kernel, E: Element>(
        &self,
        to: *mut u32,
        data: *const E,
        panel: usize,
        steps: Range<usize>,
    ) {
        let (lane, depth) = (panel * self.width, steps.start * K::GROUP);
        // SAFETY: the first element of a panel and step that exist, then the kernel's own.
        unsafe {
            let from = Lanes {
                data: data.add(lane * self.lane_stride + depth * self.depth_stride),
                count: self.width.min(self.lanes - lane),
                depth: (steps.len() * K::GROUP).min(self.depth - depth),
                lane_stride: self.lane_stride,
                depth_stride: self.depth_stride,
            };
            K::pack(to, self.width, &from);
        }
    }
}

/// Packed panels of a slice.
#[derive(Clone, Copy)]
struct Panels {
    data: *const u32,
    /// From one panel to the next.
    stride: usize,
}

impl Panels {
    /// # Safety
    /// The panel is there.
    unsafe fn at(self, panel: usize) -> *const u32 {
        // SAFETY: the caller's.
        unsafe { self.data.add(panel * self.stride) }
    }
}

/// How many of `panels` a task gets: at most about `LANES` lanes, and every thread as many tasks as the others.
fn share(panels: usize, width: usize, threads: usize) -> usize {
    let tasks = panels.div_ceil((LANES / width).max(1)).next_multiple_of(threads);
    panels.div_ceil(tasks.min(panels))
}

/// `c = a b` or `c += a b`.
///
/// # Safety
/// The processor has the kernel's instructions; the sizes fit, and none is 0.
#[allow(clippy::needless_pass_by_value)] // the exclusive borrow ends here
pub(super) unsafe fn multiply<K: Kernel>(
    c: Target<'_, f32>,
    a: Matrix<'_, f32>,
    b: Matrix<'_, f32>,
    threads: Threads,
) {
    let left = Operand {
        values: a.values,
        lanes: a.rows,
        lane_stride: a.row_stride,
        depth: a.cols,
        depth_stride: a.col_stride,
        width: K::ROWS,
    };
    let right = Operand {
        values: b.values,
        lanes: b.cols,
        lane_stride: b.col_stride,
        depth: b.rows,
        depth_stride: b.row_stride,
        width: K::COLS,
    };
    let steps = a.cols.div_ceil(K::GROUP);
    let depth = steps.div_ceil(steps.div_ceil(DEPTH)); // of a slice, the last one at most as deep
    let small = a.rows.saturating_mul(b.cols).saturating_mul(a.cols) < SMALL;
    let threads = match threads {
        Threads::All if !small => rayon::current_num_threads(),
        _ => 1,
    };

    let left_is_whole = a.rows <= b.cols;
    let (whole, divided) = if left_is_whole { (left, right) } else { (right, left) };
    // Slice after slice, and in each one panel after panel: what a task reads at a time lies together.
    let lanes = whole.panels() * whole.width;
    let mut packed = Scratch::of(lanes * steps);
    let to = Shared(packed.0.as_mut_ptr());
    let slices = || (0..steps).step_by(depth).map(|first| first..steps.min(first + depth));
    let pack = |panel: usize| {
        for slice in slices() {
            // SAFETY: a slice has `lanes * slice.len()` elements of the capacity, and each panel its share of them.
            unsafe {
                let panel_of_slice = to.add(lanes * slice.start + panel * whole.width * slice.len());
                whole.pack::<K>(panel_of_slice, panel, slice);
            }
        }
    };
    if threads == 1 {
        (0..whole.panels()).for_each(pack);
    } else {
        (0..whole.panels()).into_par_iter().with_min_len(4).for_each(pack);
    }

    let (stride, add) = (c.stride, c.add);
    let c = Shared(c.values);
    let per_task = share(divided.panels(), divided.width, threads);
    let task = |own: Range<usize>| {
        let mut buffer = Scratch::of(own.len() * divided.width * depth);
        for slice in slices() {
            let own_size = divided.width * slice.len();
            // SAFETY: the buffer has room for the panels of the task, `own_size` elements each. The whole operand's
            // panels are packed. Tiles lie in the rows and columns of c; other tasks have other rows or other columns.
            unsafe {
                for (i, panel) in own.clone().enumerate() {
                    divided.pack::<K>(buffer.0.as_mut_ptr().add(i * own_size), panel, slice.clone());
                }
                let of_whole = Panels {
                    data: to.add(lanes * slice.start).cast_const(),
                    stride: whole.width * slice.len(),
                };
                let of_own =
                    Panels { data: buffer.0.as_ptr().wrapping_sub(own.start * own_size), stride: own_size };
                let add = add || slice.start > 0;
                if left_is_whole {
                    let rows = 0..left.panels();
                    tiles::<K>(
                        c,
                        stride,
                        (rows, of_whole),
                        (own.clone(), of_own),
                        (&left, &right),
                        slice.len(),
                        add,
                    );
                } else {
                    let cols = 0..right.panels();
                    tiles::<K>(
                        c,
                        stride,
                        (own.clone(), of_own),
                        (cols, of_whole),
                        (&left, &right),
                        slice.len(),
                        add,
                    );
                }
            }
        }
    };
    let tasks = divided.panels().div_ceil(per_task);
    let own = |i: usize| i * per_task..divided.panels().min((i + 1) * per_task);
    if threads == 1 {
        (0..tasks).map(own).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_max_len(1).map(own).for_each(task);
    }
}

/// The tiles of some left panels with some right ones.
///
/// # Safety
/// The panels are packed with `steps` groups, and nothing else touches their rows and columns of `c`.
unsafe fn tiles<K: Kernel>(
    c: Shared<f32>,
    stride: usize,
    (rows, a): (Range<usize>, Panels),
    (cols, b): (Range<usize>, Panels),
    (left, right): (&Operand<'_>, &Operand<'_>),
    steps: usize,
    add: bool,
) {
    let block = ROWS / K::ROWS;
    for first in rows.clone().step_by(block) {
        for j in cols.clone() {
            let col = j * K::COLS;
            for i in first..rows.end.min(first + block) {
                let row = i * K::ROWS;
                let size = (K::ROWS.min(left.lanes - row), K::COLS.min(right.lanes - col));
                // SAFETY: the caller's; the tile ends where c ends.
                unsafe { K::tile(steps, a.at(i), b.at(j), c.add(row * stride + col), stride, size, add) };
            }
        }
    }
}
