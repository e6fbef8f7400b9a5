//! The state of an optimizer as a safetensors file.
//!
//! ```text
//! metadata["velvet-optim"]  a JSON header: format version, step, counters, and each parameter's name, shape,
//!                           element type, rule and fingerprint; every f64 as the 16 hex digits of its bits
//! NAME.exp_avg              the first moment, in the parameter's shape
//! NAME.exp_avg_sq           the second moment
//! beta_products             f64 (parameters, 2), rows in the header's order
//! ```

mod header;
mod read;
mod write;

pub(crate) const HEADER_KEY: &str = "velvet-optim";
pub(crate) const PRODUCTS_KEY: &str = "beta_products";
pub(crate) const FORMAT: u64 = 1;
