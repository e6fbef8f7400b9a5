//! What `quantize` is made of: the text it judges by, the measuring, and what it says of it.

pub mod held_out;
pub mod measure;
pub mod record;
