//! Ctrl-C as a flag that a loop asks for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Set by Ctrl-C, until it is cleared.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Catches Ctrl-C from now on. A second one, before the first was answered, ends the program at once.
    ///
    /// # Errors
    /// When the system refuses, or a handler is there already.
    pub fn catch() -> Result<Self> {
        let flag = Self::default();
        let set = flag.clone();
        ctrlc::set_handler(move || {
            if set.0.swap(true, Ordering::SeqCst) {
                std::process::exit(i32::from(crate::INTERRUPTED));
            }
        })
        .context("cannot catch Ctrl-C")?;
        Ok(flag)
    }

    /// Whether Ctrl-C was pressed since the last [`Interrupt::clear`].
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// Forgets it.
    pub fn clear(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}
