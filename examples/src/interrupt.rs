//! Ctrl-C as a flag that a loop asks for.

use std::path::Path;
use std::sync::PoisonError;

use anyhow::{Context, Result};
use vesper_model::generate::Cancellation;

use crate::files::NewFolder;
use crate::say;

/// Set by Ctrl-C, until it is cleared.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Cancellation);

impl Interrupt {
    /// Catches Ctrl-C from now on. A second one, before the first was answered, ends the program at once.
    ///
    /// # Errors
    /// When the system refuses, or a handler is there already.
    pub fn catch() -> Result<Self> {
        Self::catch_unless(|| {})
    }

    /// Makes a folder and catches Ctrl-C, which takes the folder away again and ends the program at once, as long as
    /// it is not kept; `stopped` tells the user so.
    ///
    /// # Errors
    /// As [`Interrupt::catch`]; a folder that cannot be made.
    pub fn catch_in_new_folder(path: &Path, stopped: &'static str) -> Result<(NewFolder, Self)> {
        NewFolder::create_after(path, |begun| {
            Self::catch_unless(move || {
                // Held until the end, so that nobody who finds the folder gone reports it.
                let begun = begun.lock().unwrap_or_else(PoisonError::into_inner);
                if !begun.is_kept() {
                    begun.remove();
                    say!("{stopped}");
                    // What has been made since the first time, by a thread that had not come to the end of a folder's path.
                    begun.remove();
                    std::process::exit(i32::from(crate::INTERRUPTED));
                }
            })
        })
    }

    /// With something that comes first, and may end the program.
    fn catch_unless(first: impl Fn() + Send + 'static) -> Result<Self> {
        let flag = Self::default();
        let set = flag.clone();
        ctrlc::set_handler(move || {
            first();
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

    /// Lets the next Ctrl-C end the program at once: what is to be kept has been written.
    pub fn end_at_next(&self) {
        self.0.cancel();
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
