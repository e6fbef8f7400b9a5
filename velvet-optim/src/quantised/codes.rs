//! The codes of the 8-bit state: their values, and the lines that k(y) is made of.

pub(super) const SIGNED_DECADES: usize = 7;
pub(super) const UNSIGNED_DECADES: usize = 8;

/// The codes of the uppermost decade.
pub(super) const SIGNED_TOP: usize = 1 << (SIGNED_DECADES - 1);
pub(super) const UNSIGNED_TOP: usize = 1 << (UNSIGNED_DECADES - 1);

static SIGNED: [f32; 256] = signed_table();
static UNSIGNED: [f32; 256] = unsigned_table();

pub(super) const SIGNED_LINES: [Line; SIGNED_DECADES] = lines();
pub(super) const UNSIGNED_LINES: [Line; UNSIGNED_DECADES] = lines();

/// The values of all codes in rising order, in units of the scale: what reads codes, here and in a kernel.
pub(crate) fn table(signed: bool) -> &'static [f32; 256] {
    if signed { &SIGNED } else { &UNSIGNED }
}

/// The code of 0.
pub(super) fn zero(signed: bool) -> u8 {
    if signed { 128 } else { 0 }
}

/// One piece of k(y).
#[derive(Clone, Copy)]
pub(super) struct Line {
    pub(super) slope: f32,
    pub(super) offset: f32,
}

/// 10^d, all exact.
pub(super) const POWERS: [f64; UNSIGNED_DECADES] = [1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7];

/// The value of code k > 0 in units of the scale, where the uppermost decade has `top` codes.
const fn magnitude(top: usize, k: usize) -> f32 {
    let (mut d, mut n) = (0, top);
    while k < n {
        n /= 2;
        d += 1;
    }
    ((0.1 + 0.9 * (k - n + 1) as f64 / n as f64) / POWERS[d]) as f32
}

const fn signed_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut k = 1;
    while k < 128 {
        table[128 + k] = magnitude(SIGNED_TOP, k);
        table[128 - k] = -magnitude(SIGNED_TOP, k);
        k += 1;
    }
    table[0] = -1.0;
    table
}

const fn unsigned_table() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut k = 1;
    while k < 256 {
        table[k] = magnitude(UNSIGNED_TOP, k);
        k += 1;
    }
    table
}

const fn lines<const DECADES: usize>() -> [Line; DECADES] {
    let mut lines = [Line { slope: 0.0, offset: 0.0 }; DECADES];
    let mut d = 0;
    while d < DECADES {
        let n = (1usize << (DECADES - 1 - d)) as f64;
        lines[d] = if d + 1 == DECADES {
            Line { slope: POWERS[d] as f32, offset: 0.0 }
        } else {
            Line { slope: (n * POWERS[d] / 0.9) as f32, offset: (n - 1.0 - n / 9.0) as f32 }
        };
        d += 1;
    }
    lines
}

/// What a kernel reads and makes codes by, in this order: the values of all codes, and for each i < [`BINADES`] the
/// slopes and offsets of the two lines of which k(y) is the lesser for y in [2^-i, 2^(1 - i)), or in [0, 2^(1 - i))
/// where i is the last.
///
/// A binade meets two decades at the most, and no end of a decade but 1 is so close to one of a binade that rounding
/// could make a third line the least: the same codes as of all lines, in a third of the operations.
#[cfg(any(feature = "cuda", test))]
pub(crate) fn code_tables(signed: bool) -> Vec<f32> {
    let lines: &[Line] = if signed { &SIGNED_LINES } else { &UNSIGNED_LINES };
    let line_at = |y: f64| {
        let below = |&(d, _): &(usize, &Line)| d == 0 || y * POWERS[d] <= 1.0;
        lines.iter().enumerate().take_while(below).last().map_or([0.0; 2], |(_, l)| [l.slope, l.offset])
    };
    let mut tables = table(signed).to_vec();
    for i in 0..BINADES {
        let lower = 0.5f64.powi(i);
        let upper = (2.0 * lower).min(1.0);
        tables.extend([line_at(upper), line_at(lower)].as_flattened());
    }
    tables
}

/// The rows of lines in [`code_tables`]: the last begins far below the last decade.
#[cfg(any(feature = "cuda", test))]
pub(crate) const BINADES: i32 = 32;
