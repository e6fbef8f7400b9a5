//! Activations and adapters on a GPU; what is measured, and how, stands in `cuda/adapters.rs`.
//!
//! ```text
//! cargo bench -p vesper-benches --features cuda --bench adapters_cuda
//! ```

#[cfg(feature = "cuda")]
#[path = "cuda/adapters.rs"]
mod adapters;

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    adapters::main()
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("skipped: this bench needs --features cuda");
}
