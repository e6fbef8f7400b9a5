//! The state of an optimizer as a safetensors file.
//!
//! ```text
//! metadata["velvet-optim"]  a JSON header: format version, step, counters, averages of the adaptive parts, and each
//!                           parameter's name, shape, element type, rule, array names and fingerprint; every f64 as the
//!                           16 hex digits of its bits
//! NAME.SLOT                 a state array of the parameter, f32 or f64: exp_avg, exp_avg_sq, momentum_buffer, row_sq, master
//! NAME.SLOT.codes           the same in blocks of 8 bits: u8, one an element,
//! NAME.SLOT.scales          and f32, one a block of 256
//! NAME.mask                 u8, one an element: 0 where it is kept at zero; only of parameters that have a mask
//! beta_products             f64 (parameters, 2), rows in the header's order
//! update_sizes              f64 (parameters, 3): change for each unit of learning rate, weight, ratio; NaN if not measured
//! ```

mod header;
mod read;
mod write;

pub(crate) const HEADER_KEY: &str = "velvet-optim";
pub(crate) const PRODUCTS_KEY: &str = "beta_products";
pub(crate) const SIZES_KEY: &str = "update_sizes";
pub(crate) const MASK: &str = "mask";
pub(crate) const FORMAT: u64 = 2;
