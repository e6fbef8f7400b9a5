//! Ctrl-C as a flag that a loop asks for.

use anyhow::{Context, Result};
use vesper_model::generate::Cancellation;

/// Set by Ctrl-C, until it is cleared.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Cancellation);

impl Interrupt {
    /// Catches Ctrl-C from now on. A second one, before the first was answered, ends the program at once.
    ///
    /// # Errors
    /// When the system refuses, or a handler is there already.
    pub fn catch() -> Result<Self> {
        let flag = Self::default();
        let set = flag.clone();
        ctrlc::set_handler(move || {
            if set.is_set() {
                std::process::exit(i32::from(crate::INTERRUPTED));
            }
            set.0.cancel();
        })
        .context("cannot catch Ctrl-C")?;
        Ok(flag)
    }

    /// Whether Ctrl-C was pressed since the last [`Interrupt::clear`].
    pub fn is_set(&self) -> bool {
        self.0.is_cancelled()
    }

    /// The flag itself, for a generation that it is to stop.
    pub fn cancellation(&self) -> &Cancellation {
        &self.0
    }

    /// Forgets it.
    pub fn clear(&self) {
        self.0.reset();
    }
}
