//! Stopping a generation from elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that stops a generation; its clones, on whatever thread, are the same flag.
///
/// It is looked at before every token. What was generated until then is given, with the reason
/// [`StopReason::Cancelled`](super::StopReason::Cancelled).
///
/// # Examples
/// ```
/// use vesper_model::generate::Cancellation;
///
/// let cancellation = Cancellation::new();
/// let elsewhere = cancellation.clone();
/// std::thread::spawn(move || elsewhere.cancel()).join().expect("no panic");
/// assert!(cancellation.is_cancelled());
/// ```
#[derive(Debug, Clone, Default)]
pub struct Cancellation(Arc<AtomicBool>);

impl Cancellation {
    /// A flag that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the flag: whatever looks at it stops before its next token.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether the flag is set.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Takes the flag back, for another generation with the same handle.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Release);
    }
}
