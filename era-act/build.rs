//! Compiles the CUDA kernels to PTX, where the feature `cuda` asks for them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    let directory = "src/cuda";
    println!("cargo::rerun-if-changed={directory}");
    let built = cudaforge::KernelBuilder::new()
        .source_dir(directory)
        .watch(["activation", "elementwise", "gated"].map(|stem| format!("{directory}/{stem}.cuh")))
        .arg("-std=c++17")
        .arg("-O3")
        // Strength 0 and gamma 0 have the bits of SiLU and GELU.
        .arg("-fmad=false")
        .build_ptx();
    // cargo sets OUT_DIR for every build script.
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    if let Err(error) = built.and_then(|ptx| ptx.write(out.join("kernels.rs"))) {
        println!("cargo::error=the CUDA kernels of era-act do not build: {error}");
    }
}
