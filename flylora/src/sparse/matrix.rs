use candle_core::{DType, Device, Result, Tensor};
use rand_chacha::rand_core::RngCore;

use crate::init::{normals, stream};

/// A random matrix (rows, columns) with the same number of nonzeros in each row, made from a seed alone.
///
/// The nonzeros are independent and normal with deviation `1 / rows`, at places drawn without replacement.
#[derive(Debug, PartialEq)]
pub(crate) struct SparseMatrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Nonzeros in each row.
    pub(crate) per_row: usize,
    pub(crate) seed: u64,
    pub(crate) stream: u64,
    /// (rows, per_row): the columns of each row, ascending.
    pub(crate) indices: Vec<u32>,
    /// (rows, per_row)
    pub(crate) values: Vec<f32>,
    /// The same by columns: where the entries of column i begin, and `columns + 1` ends.
    pub(crate) starts: Vec<u32>,
    /// Rows of the entries, by columns.
    pub(crate) by_column: Vec<(u32, f32)>,
}

impl SparseMatrix {
    pub(crate) fn random(rows: usize, columns: usize, per_row: usize, seed: u64, name: u64) -> Self {
        let mut rng = stream(seed, name);
        let per_row = per_row.min(columns);
        let mut indices = Vec::with_capacity(rows * per_row);
        let mut pool: Vec<u32> = (0..columns as u32).collect();
        for _ in 0..rows {
            // The first places of a shuffle.
            for i in 0..per_row {
                let j = i + below(columns - i, &mut rng);
                pool.swap(i, j);
            }
            let mut row: Vec<u32> = pool.iter().take(per_row).copied().collect();
            row.sort_unstable();
            indices.extend(row);
        }
        let values = normals(rows * per_row, 1.0 / rows as f64, &mut rng);
        let mut matrix = Self {
            rows,
            columns,
            per_row,
            seed,
            stream: name,
            indices,
            values,
            starts: Vec::new(),
            by_column: Vec::new(),
        };
        matrix.index_columns();
        matrix
    }

    /// The row, column and value of each nonzero, by rows.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (u32, u32, f32)> + '_ {
        let rows = (0..self.rows as u32).flat_map(|row| std::iter::repeat_n(row, self.per_row));
        rows.zip(&self.indices).zip(&self.values).map(|((row, column), value)| (row, *column, *value))
    }

    fn index_columns(&mut self) {
        let mut entries: Vec<(u32, u32, f32)> = self.entries().collect();
        entries.sort_by_key(|(row, column, _)| (*column, *row));
        let mut starts = Vec::with_capacity(self.columns + 1);
        let mut at = 0;
        for column in 0..=self.columns as u32 {
            at += entries.iter().skip(at).take_while(|(_, c, _)| *c < column).count();
            starts.push(at as u32);
        }
        self.starts = starts;
        self.by_column = entries.into_iter().map(|(row, _, value)| (row, value)).collect();
    }

    /// With the zeros: (rows, columns).
    pub(crate) fn dense(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut values = vec![0f32; self.rows * self.columns];
        for (row, column, value) in self.entries() {
            if let Some(v) = values.get_mut(row as usize * self.columns + column as usize) {
                *v = value;
            }
        }
        Tensor::from_vec(values, (self.rows, self.columns), device)?.to_dtype(dtype)
    }
}

/// A whole number below `n`, each as likely.
fn below(n: usize, rng: &mut impl RngCore) -> usize {
    let n = n.max(1) as u64;
    let zone = u64::MAX - u64::MAX % n;
    loop {
        let draw = rng.next_u64();
        if draw < zone {
            return (draw % n) as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_its_nonzeros_at_distinct_places_with_the_right_spread() {
        let m = SparseMatrix::random(32, 640, 160, 7, 1);
        assert_eq!(m.indices.len(), 32 * 160);
        for row in m.indices.chunks(160) {
            assert!(row.windows(2).all(|w| w[0] < w[1]) && row[159] < 640);
        }
        let square = m.values.iter().map(|v| v * v).sum::<f32>() / m.values.len() as f32;
        assert!((square * 32.0 * 32.0 - 1.0).abs() < 0.06, "{square}");
        // Every column is about as likely: 8 a column, with a deviation of 2.5.
        let counts: Vec<u32> = m.starts.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(counts.iter().all(|c| (0..=20).contains(c)));
        assert!((counts.iter().sum::<u32>() as f64 / 640.0 - 8.0).abs() < 1e-9);
        assert_eq!(m, SparseMatrix::random(32, 640, 160, 7, 1));
        assert_ne!(m.indices, SparseMatrix::random(32, 640, 160, 8, 1).indices);
        assert_ne!(m.indices, SparseMatrix::random(32, 640, 160, 7, 2).indices);
    }

    #[test]
    fn both_orders_and_the_dense_form_hold_the_same_entries() {
        let m = SparseMatrix::random(5, 9, 3, 3, 3);
        let dense = m.dense(DType::F32, &Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        let mut from_columns = vec![vec![0f32; 9]; 5];
        for (column, ends) in m.starts.windows(2).enumerate() {
            for (row, value) in &m.by_column[ends[0] as usize..ends[1] as usize] {
                from_columns[*row as usize][column] = *value;
            }
        }
        assert_eq!(dense, from_columns);
        assert_eq!(dense.iter().flatten().filter(|v| **v != 0.0).count(), 15);
    }
}
