//! Compiles the CUDA kernels to PTX, where the feature `cuda` asks for them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(tensor_cores, hopper)");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    let directory = "src/cuda";
    println!("cargo::rerun-if-changed={directory}");
    let built = cudaforge::KernelBuilder::new()
        .source_dir(directory)
        .watch(["common", "hopper", "mma", "params", "tf32"].map(|stem| format!("{directory}/{stem}.cuh")))
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx();
    // cargo sets OUT_DIR for every build script.
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    if let Err(error) = built.and_then(|ptx| ptx.write(out.join("kernels.rs"))) {
        println!("cargo::error=the CUDA kernels of flylora do not build: {error}");
        return;
    }
    // Products of bf16 came with compute capability 8.0; Hopper, 9.0, has some of its own.
    let arch = cudaforge::detect_compute_cap().map(|arch| arch.base());
    if arch.as_ref().map_or(true, |arch| *arch >= 80) {
        println!("cargo::rustc-cfg=tensor_cores");
    }
    if arch.is_ok_and(|arch| arch == 90) {
        println!("cargo::rustc-cfg=hopper");
    }
}
