//! The backward pass of a frozen layer allocates nothing of the size of its weight, dense or quantised.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module};
use flylora::FrozenLinear;

/// Remembers the largest single allocation, and the most that was held at one time.
struct Largest;

static LARGEST: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(size: usize) {
    LARGEST.fetch_max(size, Ordering::Relaxed);
    let held = HELD.fetch_add(size, Ordering::Relaxed) + size;
    PEAK.fetch_max(held, Ordering::Relaxed);
}

// SAFETY: every call goes on to the system's allocator as it is.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

/// One test, since the counts are of the whole process.
#[test]
fn the_backward_pass_allocates_no_gradient_for_the_weight() {
    let weight_bytes = 2048 * 2048 * 4;
    let weight = Tensor::ones((2048, 2048), DType::F32, &Device::Cpu).unwrap().detach();
    let x = Var::ones((2, 2048), DType::F32, &Device::Cpu).unwrap();
    let largest = |layer: &dyn Module| {
        let loss = layer.forward(&x).unwrap().sum_all().unwrap();
        LARGEST.store(0, Ordering::Relaxed);
        let grads = loss.backward().unwrap();
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(grads.get(&x).is_some());
        largest
    };
    let plain = largest(&Linear::new(weight.clone(), None));
    let frozen = largest(&FrozenLinear::new(weight, None).unwrap());
    assert!(plain >= weight_bytes, "candle's own allocates the weight's gradient: {plain} bytes");
    assert!(frozen < weight_bytes / 2, "{frozen} bytes");

    // Over blocks of 4 bits: against what plain candle can do, which is to dequantise the weight first.
    let weight = Tensor::randn(0f32, 0.1, (2048, 2048), &Device::Cpu).unwrap();
    let blocks = std::sync::Arc::new(QTensor::quantize(&weight, GgmlDType::Q4K).unwrap());
    drop(weight);
    let peak = |layer: &dyn Fn(&Tensor) -> Tensor| {
        let before = HELD.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let grads = layer(&x).sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&x).is_some());
        PEAK.load(Ordering::Relaxed) - before
    };
    let layer =
        FrozenLinear::quantized(QMatMul::from_arc(std::sync::Arc::clone(&blocks)).unwrap(), None).unwrap();
    layer.forward(&x).unwrap(); // candle may keep a packed copy of the blocks from the first product on
    let frozen = peak(&|x| layer.forward(x).unwrap());
    let plain = peak(&|x| {
        let weight = blocks.dequantize(&Device::Cpu).unwrap();
        Linear::new(weight, None).forward(x).unwrap()
    });
    assert!(plain >= 2 * weight_bytes, "the weight and its gradient: {plain} bytes");
    assert!(frozen < weight_bytes / 4, "a few rows at a time: {frozen} bytes");
}
