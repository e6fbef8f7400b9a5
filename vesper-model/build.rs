//! Compiles the CUDA kernels to PTX, where the feature `cuda` asks for them.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(tensor_cores)");
    println!("cargo::rustc-check-cfg=cfg(dependent_launch)");
    println!("cargo::rustc-check-cfg=cfg(warpgroups)");
    #[cfg(feature = "cuda")]
    kernels();
}

/// A compute capability to compile this crate's kernels for in place of `CUDA_COMPUTE_CAP`, so that those for older
/// devices are tested on a newer one.
#[cfg(feature = "cuda")]
const KERNELS_FOR: &str = "VESPER_KERNELS_FOR";

#[cfg(feature = "cuda")]
fn kernels() {
    let directory = "src/ops/cuda";
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    println!("cargo::rerun-if-env-changed={KERNELS_FOR}");
    let wanted = std::env::var(KERNELS_FOR).ok();
    let arch = wanted.as_ref().map_or_else(cudaforge::detect_compute_cap, |of| cudaforge::GpuArch::parse(of));
    let mut builder = cudaforge::KernelBuilder::new();
    if let Some(wanted) = &wanted {
        if let Err(error) = &arch {
            println!("cargo::error={KERNELS_FOR}={wanted}: {error}");
            return;
        }
        builder = builder.compute_cap_arch(wanted);
    }
    let built = builder
        .source_dir(directory)
        .watch(
            [
                "attention",
                "attention_backward",
                "attention_forward",
                "attention_plain",
                "attention_warpgroup",
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
                "pipeline",
                "warpgroup",
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
    // Products of warpgroups are what 9.0 alone has, and its architecture-specific code alone may use.
    if arch.as_ref().is_ok_and(|arch| arch.base() == 90 && arch.suffix.as_deref() == Some("a")) {
        println!("cargo::rustc-cfg=warpgroups");
    }
    // The attention kernels need 16-bit products, which came with compute capability 8.0.
    let arch = arch.map(|arch| arch.base());
    if arch.as_ref().map_or(true, |&arch| arch >= 80) {
        println!("cargo::rustc-cfg=tensor_cores");
    }
    // Kernels that wait for the one before by themselves came with 9.0.
    if arch.is_ok_and(|arch| arch >= 90) {
        println!("cargo::rustc-cfg=dependent_launch");
    }
}
