//! Compiles the CUDA kernels to PTX, where the feature `cuda` asks for them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(tensor_cores)");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    let directory = "src/cuda";
    println!("cargo::rerun-if-changed={directory}");
    let built = cudaforge::KernelBuilder::new()
        .source_dir(directory)
        .watch(["common", "mma", "params"].map(|stem| format!("{directory}/{stem}.cuh")))
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx();
    // cargo sets OUT_DIR for every build script.
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    if let Err(error) = built.and_then(|ptx| ptx.write(out.join("kernels.rs"))) {
        println!("cargo::error=the CUDA kernels of flylora do not build: {error}");
        return;
    }
    // Products of bf16 came with compute capability 8.0.
    match cudaforge::detect_compute_cap() {
        Ok(arch) if arch.base() < 80 => {}
        _ => println!("cargo::rustc-cfg=tensor_cores"),
    }
}
