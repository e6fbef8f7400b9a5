//! Batches that are prepared while the one before is computed with.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use candle_core::Device;

use crate::error::{DataError, Result};

/// What a [`Prefetch`] takes its batches from: [`BatchSampler`](super::BatchSampler),
/// [`PackedSampler`](super::PackedSampler).
pub trait BatchSource: Send + 'static {
    /// A batch in the memory of the host.
    type Host: Send + 'static;
    /// A batch on its device.
    type Batch;
    /// Where the source is.
    type State: Clone + Send + 'static;

    /// Makes the next batch. After an error the source is where it was.
    ///
    /// # Errors
    ///
    /// Those of the source.
    fn prepare(&mut self) -> Result<Self::Host>;

    /// Places a batch. After an error it can be tried again.
    ///
    /// # Errors
    ///
    /// [`DataError::Candle`].
    fn place(host: &mut Self::Host, device: &Device) -> Result<Self::Batch>;

    /// Where the source is, after the batch that was made last.
    fn state(&self) -> Self::State;
}

/// Prepares batches in a thread of its own, a few ahead.
///
/// It gives the batches that its source would give, in the same order. The thread gathers the ids; they are placed on
/// the device in [`next_batch`](Self::next_batch), by the thread that uses them. Dropped, it ends the thread.
///
/// # Examples
///
/// ```
/// use candle_core::Device;
/// use vesper_data::{BatchSampler, Prefetch, SamplerConfig, Tokens};
///
/// let tokens = Tokens::from((0..1001).collect::<Vec<u32>>());
/// let config = SamplerConfig::default().with_batch(2).with_seq(10);
/// let mut plain = BatchSampler::new(tokens.clone(), config.clone())?;
/// let mut ahead = Prefetch::new(BatchSampler::new(tokens, config)?, 4)?;
/// for _ in 0..70 {
///     let (a, b) = (plain.next_batch(&Device::Cpu)?, ahead.next_batch(&Device::Cpu)?);
///     assert_eq!(a.inputs.to_vec2::<u32>()?, b.inputs.to_vec2::<u32>()?);
///     // Of the batch that was taken, however far ahead the thread is.
///     assert_eq!(plain.state(), *ahead.state());
/// }
/// # Ok::<(), vesper_data::DataError>(())
/// ```
pub struct Prefetch<S: BatchSource> {
    /// None only while it is dropped.
    receiver: Option<Receiver<Result<Prepared<S>>>>,
    thread: Option<JoinHandle<()>>,
    /// A batch that the device could not take.
    pending: Option<Prepared<S>>,
    state: S::State,
}

/// A batch, and where its source is after it.
type Prepared<S> = (<S as BatchSource>::Host, <S as BatchSource>::State);

impl<S: BatchSource> Prefetch<S> {
    /// Starts to prepare the batches of `source`, from where it is on; `depth` of them wait at most, at least 1.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] for a depth of 0, [`DataError::Prefetch`] where the system gives no thread.
    pub fn new(mut source: S, depth: usize) -> Result<Self> {
        if depth == 0 {
            return Err(DataError::Config { name: "depth", got: "0".into(), expected: "at least 1" });
        }
        let state = source.state();
        let (sender, receiver) = sync_channel(depth);
        let work = move || {
            loop {
                let prepared = source.prepare().map(|host| (host, source.state()));
                let failed = prepared.is_err();
                // No one receives any more when the prefetch was dropped.
                if sender.send(prepared).is_err() || failed {
                    return;
                }
            }
        };
        let thread =
            std::thread::Builder::new().name("vesper-batches".into()).spawn(work).map_err(|error| {
                DataError::Prefetch { problem: format!("the system gives no thread: {error}") }
            })?;
        Ok(Self { receiver: Some(receiver), thread: Some(thread), pending: None, state })
    }

    /// The next batch, on `device`.
    ///
    /// # Errors
    ///
    /// What the source met, once; [`DataError::Prefetch`] after that; [`DataError::Candle`] where the device cannot
    /// take the batch, which is then the next one again.
    pub fn next_batch(&mut self, device: &Device) -> Result<S::Batch> {
        let (mut host, state) = match self.pending.take() {
            Some(prepared) => prepared,
            None => self.receive()?,
        };
        match S::place(&mut host, device) {
            Ok(batch) => {
                self.state = state;
                Ok(batch)
            }
            Err(error) => {
                self.pending = Some((host, state));
                Err(error)
            }
        }
    }

    fn receive(&mut self) -> Result<Prepared<S>> {
        if let Some(Ok(prepared)) = self.receiver.as_ref().map(Receiver::recv) {
            return prepared;
        }
        let panicked = self.thread.take().is_some_and(|thread| thread.join().is_err());
        let problem = if panicked { "their thread panicked" } else { "their thread ended after an error" };
        Err(DataError::Prefetch { problem: problem.into() })
    }

    /// Where the source was after the batch that was taken last: what a checkpoint keeps.
    pub fn state(&self) -> &S::State {
        &self.state
    }
}

impl<S: BatchSource> Drop for Prefetch<S> {
    fn drop(&mut self) {
        // Without a receiver the thread ends at its next batch.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<S: BatchSource> std::fmt::Debug for Prefetch<S>
where
    S::State: std::fmt::Debug,
{
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prefetch").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Counts, and fails or panics at a number.
    struct Counter {
        next: u32,
        fails_at: u32,
        panics_at: u32,
        dropped: Arc<AtomicBool>,
    }

    impl Counter {
        fn new(fails_at: u32, panics_at: u32) -> Self {
            Self { next: 0, fails_at, panics_at, dropped: Arc::default() }
        }

        fn endless() -> Self {
            Self::new(u32::MAX, u32::MAX)
        }
    }

    impl Drop for Counter {
        fn drop(&mut self) {
            self.dropped.store(true, Ordering::SeqCst);
        }
    }

    impl BatchSource for Counter {
        type Host = (u32, bool);
        type Batch = u32;
        type State = u32;

        fn prepare(&mut self) -> Result<(u32, bool)> {
            if self.next == self.fails_at {
                return Err(DataError::NoSources);
            }
            assert_ne!(self.next, self.panics_at);
            self.next += 1;
            // Every third is not placed at the first attempt.
            Ok((self.next, self.next.is_multiple_of(3)))
        }

        fn place(host: &mut (u32, bool), _device: &Device) -> Result<u32> {
            if std::mem::take(&mut host.1) { Err(DataError::NoSources) } else { Ok(host.0) }
        }

        fn state(&self) -> u32 {
            self.next
        }
    }

    #[test]
    fn batches_come_in_order_and_one_that_was_not_placed_comes_again() {
        let mut prefetch = Prefetch::new(Counter::endless(), 2).unwrap();
        for expected in 1..=30 {
            assert_eq!(*prefetch.state(), expected - 1);
            if expected % 3 == 0 {
                assert!(matches!(prefetch.next_batch(&Device::Cpu), Err(DataError::NoSources)));
                assert_eq!(*prefetch.state(), expected - 1);
            }
            assert_eq!(prefetch.next_batch(&Device::Cpu).unwrap(), expected);
        }
    }

    #[test]
    fn an_error_of_the_source_comes_once_and_then_there_is_nothing_more() {
        let mut prefetch = Prefetch::new(Counter::new(2, u32::MAX), 8).unwrap();
        assert_eq!([1, 2].map(|_| prefetch.next_batch(&Device::Cpu).unwrap()), [1, 2]);
        assert!(matches!(prefetch.next_batch(&Device::Cpu), Err(DataError::NoSources)));
        for _ in 0..2 {
            let error = prefetch.next_batch(&Device::Cpu).unwrap_err();
            assert!(matches!(error, DataError::Prefetch { .. }), "{error}");
        }
        assert_eq!(*prefetch.state(), 2);
    }

    #[test]
    fn a_panic_of_the_source_is_an_error() {
        let mut prefetch = Prefetch::new(Counter::new(u32::MAX, 1), 1).unwrap();
        assert_eq!(prefetch.next_batch(&Device::Cpu).unwrap(), 1);
        let error = prefetch.next_batch(&Device::Cpu).unwrap_err();
        assert_eq!(error.to_string(), "no more batches are prepared: their thread panicked");
    }

    #[test]
    fn a_prefetch_that_is_dropped_ends_its_thread() {
        let source = Counter::endless();
        let dropped = Arc::clone(&source.dropped);
        let prefetch = Prefetch::new(source, 1).unwrap();
        drop(prefetch); // while the queue is full, or filling up
        assert!(dropped.load(Ordering::SeqCst));
        assert!(Prefetch::new(Counter::endless(), 0).is_err());
    }
}
