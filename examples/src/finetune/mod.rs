//! What `finetune` is made of: the table of its methods, and the count of memory.

pub mod comparison;
pub mod memory;
