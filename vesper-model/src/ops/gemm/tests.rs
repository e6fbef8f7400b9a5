//! Every level that this processor has, against products in f64.

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Level, multiply_at};
use crate::ops::matrix::{Matrix, Target, Threads, Values};

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.iter().copied().filter(|level| level.is_there())
}

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The values of an operand, in one of the two types, and as the level reads them.
struct Operand {
    full: Vec<f32>,
    half: Option<Vec<bf16>>,
}

impl Operand {
    fn new(seed: u64, n: usize, in_bf16: bool) -> Self {
        let full = random(seed, n);
        let half = in_bf16.then(|| full.iter().map(|&value| bf16::from_f32(value)).collect());
        Self { full, half }
    }

    fn values(&self) -> Values<'_, f32> {
        match &self.half {
            Some(half) => Values::Half(half),
            None => Values::Full(&self.full),
        }
    }

    fn read(&self, index: usize, level: Level) -> f64 {
        let value = self.full[index];
        f64::from(if self.half.is_some() || level.rounds() { bf16::from_f32(value).to_f32() } else { value })
    }
}

/// How an operand of some rows and columns lies in memory.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// Rows after each other, with a gap.
    Rows,
    /// Columns after each other, with a gap.
    Columns,
    /// Neither: gaps everywhere.
    Apart,
}

impl Order {
    const ALL: [Self; 3] = [Self::Rows, Self::Columns, Self::Apart];

    fn strides(self, rows: usize, cols: usize) -> (usize, usize) {
        match self {
            Self::Rows => (cols + 3, 1),
            Self::Columns => (1, rows + 5),
            Self::Apart => (2 * cols + 1, 2),
        }
    }

    /// Enough elements for the matrix, and no more.
    fn len(self, rows: usize, cols: usize) -> usize {
        let (row_stride, col_stride) = self.strides(rows, cols);
        (rows - 1) * row_stride + (cols - 1) * col_stride + 1
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    sizes: (usize, usize, usize),
    orders: (Order, Order),
    in_bf16: (bool, bool),
    add: bool,
}

fn run(level: Level, case: Case, a: &Operand, b: &Operand, threads: Threads) -> Vec<f32> {
    let (m, k, n) = case.sizes;
    let matrix = |values, order: Order, rows, cols| {
        let (row_stride, col_stride) = order.strides(rows, cols);
        Matrix { values, rows, cols, row_stride, col_stride }
    };
    let (left, right) = (matrix(a.values(), case.orders.0, m, k), matrix(b.values(), case.orders.1, k, n));
    let stride = n + 2;
    let mut c = vec![0.5; (m - 1) * stride + n];
    let target = if case.add { Target::add(&mut c, stride) } else { Target::overwrite(&mut c, stride) };
    multiply_at(level, target, left, right, threads);
    c
}

fn check(level: Level, case: Case) {
    let (m, k, n) = case.sizes;
    let a = Operand::new(1, case.orders.0.len(m, k), case.in_bf16.0);
    let b = Operand::new(2, case.orders.1.len(k, n), case.in_bf16.1);
    let c = run(level, case, &a, &b, Threads::All);
    let ((ar, ac), (br, bc)) = (case.orders.0.strides(m, k), case.orders.1.strides(k, n));
    for i in 0..m {
        for j in 0..n {
            let terms = (0..k).map(|l| a.read(i * ar + l * ac, level) * b.read(l * br + j * bc, level));
            let (sum, size) = terms.fold((0.0, 1.0), |(sum, size), term| (sum + term, size + term.abs()));
            let exact = sum + if case.add { 0.5 } else { 0.0 };
            let got = f64::from(c[i * (n + 2) + j]);
            let limit = 4e-7 * size;
            assert!((got - exact).abs() < limit, "{level:?} {case:?} ({i}, {j}): {got} instead of {exact}");
        }
        // What lies between the rows stays as it is.
        if i + 1 < m {
            assert_eq!(c[i * (n + 2) + n..(i + 1) * (n + 2)], [0.5; 2], "{level:?} {case:?}");
        }
    }
}

#[test]
fn every_order_type_and_mode_at_odd_sizes() {
    for level in levels() {
        for sizes in [(1, 1, 1), (3, 17, 5), (9, 33, 49), (17, 3, 100), (50, 65, 7)] {
            for left in Order::ALL {
                for right in Order::ALL {
                    for in_bf16 in [(false, false), (true, false), (false, true), (true, true)] {
                        for add in [false, true] {
                            check(level, Case { sizes, orders: (left, right), in_bf16, add });
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn sizes_over_every_block() {
    // Beyond a slice of the inner dimension, a task's lanes, and a block of rows; and products of one row or column.
    for level in levels() {
        for sizes in [(1, 1000, 4099), (4099, 5, 3), (530, 1, 1), (7, 4099, 9), (521, 70, 50), (50, 801, 211)]
        {
            for orders in
                [(Order::Rows, Order::Columns), (Order::Rows, Order::Rows), (Order::Columns, Order::Rows)]
            {
                check(level, Case { sizes, orders, in_bf16: (true, false), add: false });
            }
        }
    }
}

#[test]
fn the_same_bits_on_any_number_of_threads_and_beside_any_other_rows() {
    let case = Case {
        sizes: (70, 900, 500),
        orders: (Order::Rows, Order::Columns),
        in_bf16: (true, false),
        add: false,
    };
    let (m, k, n) = case.sizes;
    let (a, b) =
        (Operand::new(1, case.orders.0.len(m, k), true), Operand::new(2, case.orders.1.len(k, n), false));
    // The crate's products on one thread differ from those on several where it packs or not.
    for level in levels().filter(|&level| level != Level::Crate) {
        let bits = |c: Vec<f32>| c.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| bits(run(level, case, &a, &b, Threads::All)))
        };
        let one = bits(run(level, case, &a, &b, Threads::One));
        for threads in [1, 2, 3, 7] {
            assert_eq!(on(threads), one, "{level:?} on {threads} threads");
        }
        let few = run(level, Case { sizes: (3, k, n), ..case }, &a, &b, Threads::One);
        assert_eq!(bits(few), one[..2 * (n + 2) + n], "{level:?}");
    }
}

#[test]
fn what_is_not_finite_stays_so_in_its_row_and_column_alone() {
    let (m, k, n) = (20, 50, 70);
    for level in levels() {
        for in_bf16 in [false, true] {
            let mut a = Operand::new(1, m * k, in_bf16);
            let b = Operand::new(2, k * n, in_bf16);
            for (place, value) in
                [(3 * k + 7, f32::NAN), (5 * k + 49, f32::INFINITY), (19 * k, f32::NEG_INFINITY)]
            {
                a.full[place] = value;
                if let Some(half) = &mut a.half {
                    half[place] = bf16::from_f32(value);
                }
            }
            let mut c = vec![0.0; m * n];
            let left = Matrix { values: a.values(), rows: m, cols: k, row_stride: k, col_stride: 1 };
            let right = Matrix { values: b.values(), rows: k, cols: n, row_stride: n, col_stride: 1 };
            multiply_at(level, Target::overwrite(&mut c, n), left, right, Threads::One);
            for (i, row) in c.chunks_exact(n).enumerate() {
                let all = |f: fn(&f32) -> bool| row.iter().all(f);
                match i {
                    3 => assert!(all(|v| v.is_nan()), "{level:?}"),
                    5 | 19 => assert!(all(|v| v.is_infinite()), "{level:?}"),
                    _ => assert!(all(|v| v.is_finite()), "{level:?} row {i}"),
                }
            }
        }
    }
}

#[test]
fn bf16_is_for_activations_in_bf16_alone() {
    use super::Precision;
    use candle_core::DType;
    assert_eq!(Precision::of(DType::BF16), Precision::Bf16);
    for dtype in [DType::F16, DType::F32, DType::F64] {
        assert_eq!(Precision::of(dtype), Precision::Full);
    }
    assert!(!Level::best(Precision::Full).rounds());
    assert!(levels().any(|level| level == Level::Crate));
}
