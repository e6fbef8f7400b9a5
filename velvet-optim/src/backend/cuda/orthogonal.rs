//! Orthogonalised updates: batches of equal shape, their products by cuBLAS on tensor cores.
//!
//! Matrices of one smaller side m share their (m, m) products, and those of one shape all others, in rounds that bound
//! the workspace:
//!
//! ```text
//! X: m <= n, m the smaller side         the direction over its Frobenius norm
//! A = X X^T                             a product a shape
//! B = a I + b A,  B += c A A            an elementwise pass and a product a side
//! X = B X                               a product a shape
//! ```
//!
//! The identity in B saves the passes over X that a X + (b A + c A A) X needs.
//!
//! The next iteration's A is (B X)(B X)^T = B A B, for all of these are symmetric and polynomials of each other. So
//! up to [`SHARED`] iterations share the two products with X, which are the larger ones:
//!
//! ```text
//! Q = B                                 then, for each further iteration
//! A = (B A) B,  B from A as above,  Q = B Q
//! X = Q X
//! ```
//!
//! Medium's matrices take three quarters of the operations so. Five iterations on one A would take fewer still, and
//! are wrong: an eigenvalue that bf16 has rounded to less than 0 grows twelvefold in each, where X X^T has none.
//! After three it is still small; in f32 arithmetic rounded to bf16, three and two were as near to f32 as five alone,
//! for flat, steep and spiked spectra.

use super::control::ControlBlock;
use super::elementwise::{Entry, Gradients, by_gradient, grouped, tables};
use super::launch::{self, blocks, launch, size};
use super::layout::{THREADS, UNIT};
use super::plan::{Plan, Planned};
use crate::error::Result;
use crate::rule::RowMoment;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, LaunchConfig};
use candle_core::{CudaDevice, DType, bail};
use half::bf16;

/// The elements of a workspace that a round may take, but at least one matrix.
const ROUND: usize = 1 << 27;

/// Iterations that share their products with X: see above.
const SHARED: usize = 3;

/// The matrices that a round may take: what a grid takes in its second dimension.
const MATRICES: usize = 65_535;

/// Memory for the products; it grows to what the largest round needs and stays.
#[derive(Default)]
pub(super) struct Workspace {
    /// X before and after a product, A, and room for three more of its size.
    buffers: [Option<CudaSlice<bf16>>; 6],
}

impl Workspace {
    /// The addresses of X, X after a product, A and three more, with room for as many elements.
    fn reserve(&mut self, device: &CudaDevice, x: usize, a: usize) -> Result<[u64; 6]> {
        let stream = device.cuda_stream();
        let mut addresses = [0; 6];
        for ((buffer, address), len) in self.buffers.iter_mut().zip(&mut addresses).zip([x, x, a, a, a, a]) {
            let slice = match buffer.take() {
                Some(slice) if slice.len() >= len => slice,
                // Zeros: a step that is left out still runs its products, on whatever is there.
                _ => device.alloc_zeros::<bf16>(len.max(1))?,
            };
            *address = slice.device_ptr(&stream).0;
            *buffer = Some(slice);
        }
        Ok(addresses)
    }
}

/// The matrices of one shape in a round; they lie behind each other.
struct Group {
    rows: usize,
    cols: usize,
    count: usize,
    /// Elements from the beginning of a workspace of X, and of one of A.
    x: usize,
    a: usize,
}

impl Group {
    /// The smaller side.
    fn side(&self) -> usize {
        self.rows.min(self.cols)
    }

    fn length(&self) -> usize {
        self.rows.max(self.cols)
    }

    fn x_stride(&self) -> usize {
        (self.rows * self.cols).next_multiple_of(UNIT)
    }

    fn a_stride(&self) -> usize {
        (self.side() * self.side()).next_multiple_of(UNIT)
    }
}

pub(super) fn update(
    control: &ControlBlock,
    plan: &Plan,
    workspace: &mut Workspace,
    gradients: &Gradients,
    measures: bool,
) -> Result<()> {
    let mut entries: Vec<Entry> =
        gradients.entries().filter(|entry| entry.planned.orthogonal.is_some()).copied().collect();
    // What the matrices of a round share, then their shape.
    let family = |entry: &Entry| {
        let options =
            entry.planned.orthogonal.map(|options| (options.coefficients.map(f64::to_bits), options.steps));
        (entry.planned.rows().min(entry.planned.row), options)
    };
    entries.sort_by_key(|entry| (family(entry), entry.planned.rows(), entry.planned.row));
    for family in entries.chunk_by_mut(|a, b| family(a) == family(b)) {
        let mut rest = family;
        while !rest.is_empty() {
            let mut elements = 0;
            let fits = |entry: &&Entry| {
                elements += entry.planned.elements.next_multiple_of(UNIT);
                elements <= ROUND
            };
            let count = rest.iter().take(MATRICES).take_while(fits).count().clamp(1, rest.len());
            let (round, later) = rest.split_at_mut(count);
            run(control, plan, workspace, round, measures)?;
            rest = later;
        }
    }
    Ok(())
}

/// The groups of a round's entries, which are sorted by shape; gives each entry its place.
fn groups(round: &mut [Entry]) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    let (mut x, mut a) = (0, 0);
    for entry in round {
        let new = Group { rows: entry.planned.rows(), cols: entry.planned.row, count: 1, x, a };
        entry.at = size(x / UNIT)?;
        (x, a) = (x + new.x_stride(), a + new.a_stride());
        match groups.last_mut() {
            Some(last) if (last.rows, last.cols) == (new.rows, new.cols) => last.count += 1,
            _ => groups.push(new),
        }
    }
    Ok(groups)
}

/// The updates of matrices that share products.
fn run(
    control: &ControlBlock,
    plan: &Plan,
    workspace: &mut Workspace,
    round: &mut [Entry],
    measures: bool,
) -> Result<()> {
    let groups = groups(round)?;
    let (x_len, a_len) = groups.last().map_or((0, 0), |last| {
        (last.x + last.count * last.x_stride(), last.a + last.count * last.a_stride())
    });
    let Some(options) = round.first().and_then(|first| first.planned.orthogonal) else { return Ok(()) };
    let (device, params) = (control.device(), plan.params());
    let [mut x, mut y, squares @ ..] = workspace.reserve(device, x_len, a_len)?;
    let (block, coefficients, partials) =
        (control.address(), control.coefficients.address, control.partials.address);
    for (name, entries) in by_gradient("direction", round.iter()) {
        for (table, count) in tables(entries.into_iter(), Planned::chunks)? {
            let config = blocks(count, THREADS);
            launch!(
                device,
                ORTHOGONAL,
                &name,
                config,
                &*table,
                &block,
                &params,
                &coefficients,
                &x,
                &partials
            );
        }
    }
    let positions: Vec<usize> = round.iter().map(|entry| entry.position).collect();
    control.finish_sums(plan, &positions)?;
    let sums = control.sums.address;
    for (table, count) in tables(round.iter(), Planned::chunks)? {
        launch!(device, ORTHOGONAL, "normalise", blocks(count, THREADS), &*table, &block, &params, &sums, &x);
    }
    let (mut left, shared) = (options.steps, shared(&groups));
    while left > 0 {
        let count = left.min(shared);
        iterate(device, &groups, options.coefficients, count, [x, y], squares)?;
        (x, y, left) = (y, x, left - count);
    }
    let eight_rows = |planned: &Planned| planned.rows().div_ceil(THREADS as usize / 32);
    for (table, count) in tables(with_row_moments(round), eight_rows)? {
        let config = blocks(count, THREADS);
        launch!(device, ORTHOGONAL, "row_moments", config, &*table, &block, &params, &coefficients, &x);
        let config = blocks(table.count, THREADS);
        launch!(device, ORTHOGONAL, "finish_rows", config, &*table, &block, &params, &coefficients);
    }
    apply(control, plan, round, x, measures)
}

/// Moves the parameters by the matrices at `x`.
fn apply(control: &ControlBlock, plan: &Plan, round: &[Entry], x: u64, measures: bool) -> Result<()> {
    let (device, params) = (control.device(), plan.params());
    let (block, coefficients, measured) =
        (control.address(), control.coefficients.address, control.changes.address);
    for gradient in [DType::F32, DType::BF16, DType::F16] {
        let kind: u32 = match gradient {
            _ if !measures => 0,
            DType::BF16 => 2,
            DType::F16 => 3,
            _ => 1,
        };
        let entries = round.iter().filter(|entry| entry.gradient == gradient);
        for (dtype, entries) in grouped(entries, |entry| launch::name(entry.planned.dtype)) {
            let name = format!("apply_{dtype}");
            for (table, count) in tables(entries.into_iter(), Planned::chunks)? {
                let config = blocks(count, THREADS);
                launch!(
                    device,
                    ORTHOGONAL,
                    &name,
                    config,
                    &*table,
                    &block,
                    &params,
                    &coefficients,
                    &x,
                    &measured,
                    &kind
                );
            }
        }
    }
    Ok(())
}

fn with_row_moments(round: &[Entry]) -> impl Iterator<Item = &Entry> {
    round
        .iter()
        .filter(|entry| entry.planned.orthogonal.is_some_and(|options| options.row_moment != RowMoment::Off))
}

/// How many iterations are to share their products with X: sharing saves 4 m^2 n operations a matrix and iteration and
/// takes 6 m^3.
fn shared(groups: &[Group]) -> usize {
    let sum = |of: fn(&Group) -> usize| groups.iter().map(|group| group.count * of(group)).sum::<usize>();
    if 2 * sum(Group::length) > 3 * sum(Group::side) { SHARED } else { 1 }
}

/// `count` iterations of the matrices of one smaller side, from the first of the buffers of X to the second.
fn iterate(
    device: &CudaDevice,
    groups: &[Group],
    coefficients: [f64; 3],
    count: usize,
    [from, to]: [u64; 2],
    [a, mut b, mut q, mut spare]: [u64; 4],
) -> Result<()> {
    let Some(first) = groups.first() else { return Ok(()) };
    let (m, a_stride) = (first.side(), first.a_stride());
    let at = |base: u64, elements: usize| base + 2 * elements as u64;
    let square = |at| Operand { at, ld: m, stride: a_stride, transposed: false };
    let whole = |base, group: &Group| Operand {
        at: at(base, group.x),
        ld: group.cols,
        stride: group.x_stride(),
        transposed: false,
    };
    for group in groups {
        // Row by row, a matrix is what cuBLAS, which counts by columns, sees as its transpose.
        let tall = group.rows > group.cols;
        let x = Operand { transposed: !tall, ..whole(from, group) };
        let xt = Operand { transposed: tall, ..x };
        product(device, [x, xt, square(at(a, group.a))], [m, m, group.length()], group.count, (1.0, 0.0))?;
    }
    let matrices: usize = groups.iter().map(|group| group.count).sum();
    let squares = |[x, y, out]: [u64; 3], scales| {
        product(device, [square(x), square(y), square(out)], [m; 3], matrices, scales)
    };
    let [alpha, beta, gamma] = coefficients.map(|c| c as f32);
    let config = LaunchConfig {
        // 4 vectors of 8 elements a thread
        grid_dim: (size((m * m).div_ceil(32 * THREADS as usize).clamp(1, 1 << 16))?, size(matrices)?, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    let (side, stride) = (size(m)?, a_stride as u64);
    for i in 0..count {
        if i > 0 {
            squares([b, a, spare], (1.0, 0.0))?;
            squares([spare, b, a], (1.0, 0.0))?;
            if i == 1 {
                (q, b) = (b, q);
            }
        }
        launch!(device, ORTHOGONAL, "mix", config, &a, &b, &side, &stride, &alpha, &beta);
        squares([a, a, b], (gamma, 1.0))?;
        if i > 0 {
            squares([b, q, spare], (1.0, 0.0))?;
            (q, spare) = (spare, q);
        }
    }
    let q = if count > 1 { q } else { b };
    for group in groups {
        let (x, q, out) = (whole(from, group), square(at(q, group.a)), whole(to, group));
        let (operands, sides) = if group.rows > group.cols {
            ([q, x, out], [m, group.length(), m])
        } else {
            ([x, q, out], [group.length(), m, m])
        };
        product(device, operands, sides, group.count, (1.0, 0.0))?;
    }
    Ok(())
}

/// A batch of matrices as cuBLAS takes them: by columns.
#[derive(Clone, Copy)]
struct Operand {
    at: u64,
    ld: usize,
    stride: usize,
    transposed: bool,
}

/// `c = alpha a b + beta c` for `count` matrices: a (m, k), b (k, n), c (m, n), by columns; f32 accumulation.
fn product(
    device: &CudaDevice,
    [a, b, c]: [Operand; 3],
    [m, n, k]: [usize; 3],
    count: usize,
    (alpha, beta): (f32, f32),
) -> Result<()> {
    let int = |n: usize| match i32::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => bail!("a dimension of {n} is too large for cuBLAS"),
    };
    let operation = |x: Operand| {
        if x.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
    };
    let blas = device.cublas_handle();
    let kind = sys::cudaDataType_t::CUDA_R_16BF;
    // SAFETY: the addresses are of the workspace, which is on the handle's device, stays until later work on the same
    // stream, and was reserved for `count` matrices of these sides and strides; the output overlaps no input. alpha and
    // beta are of the compute type and are read before the call returns.
    unsafe {
        result::gemm_strided_batched_ex(
            *blas.handle(),
            operation(a),
            operation(b),
            int(m)?,
            int(n)?,
            int(k)?,
            std::ptr::from_ref(&alpha).cast(),
            a.at as *const _,
            kind,
            int(a.ld)?,
            a.stride as i64,
            b.at as *const _,
            kind,
            int(b.ld)?,
            b.stride as i64,
            std::ptr::from_ref(&beta).cast(),
            c.at as *mut _,
            kind,
            int(c.ld)?,
            c.stride as i64,
            int(count)?,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
        .w()?;
    }
    Ok(())
}
