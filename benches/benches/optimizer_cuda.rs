//! One optimizer step on a GPU; what is measured, and how, stands in `cuda/optimizer.rs`.
//!
//! ```text
//! cargo bench -p vesper-benches --features cuda --bench optimizer_cuda
//! ```

#[cfg(feature = "cuda")]
#[path = "cuda/optimizer.rs"]
mod optimizer;

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    optimizer::main()
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("skipped: this bench needs --features cuda");
}
