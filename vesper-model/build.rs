//! Compiles the CUDA kernels to PTX, where the feature `cuda` asks for them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(tensor_cores)");
    println!("cargo::rustc-check-cfg=cfg(dependent_launch)");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    let directory = "src/ops/cuda";
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let built = cudaforge::KernelBuilder::new()
        .source_dir(directory)
        .watch(
            [
                "attention",
                "attention_forward",
                "attention_plain",
                "common",
                "decode",
                "decode_activation",
                "decode_attention",
                "decode_block",
                "decode_blocks",
                "decode_blocks_k",
                "decode_rows",
                "decode_step",
                "decode_tokens",
                "decode_vectors",
                "mma",
                "norms",
            ]
            .map(|stem| format!("{directory}/{stem}.cuh")),
        )
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx();
    let written = built.and_then(|ptx| ptx.write(out.join("kernels.rs")));
    if let Err(error) = written {
        println!("cargo::error=the CUDA kernels of vesper-model do not build: {error}");
        return;
    }
    // The attention kernels need 16-bit products, which came with compute capability 8.0.
    let arch = cudaforge::detect_compute_cap().map(|arch| arch.base());
    if arch.as_ref().map_or(true, |&arch| arch >= 80) {
        println!("cargo::rustc-cfg=tensor_cores");
    }
    // Kernels that wait for the one before by themselves came with 9.0.
    if arch.is_ok_and(|arch| arch >= 90) {
        println!("cargo::rustc-cfg=dependent_launch");
    }
}
