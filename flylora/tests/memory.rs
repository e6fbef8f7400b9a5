//! The backward pass of a frozen layer allocates nothing of the size of its weight.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Linear, Module};
use flylora::FrozenLinear;

/// Remembers the largest single allocation.
struct Largest;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator as it is.
unsafe impl GlobalAlloc for Largest {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Largest = Largest;

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
}
