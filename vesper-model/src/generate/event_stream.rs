//! A generation on a thread of its own, as a stream for asynchronous programs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_channel::{Receiver, Sender};
use futures_core::Stream;
use tokenizers::Tokenizer;

use super::{Event, Generator, NextLogits, Request};
use crate::{ModelError, Result};

/// How many events may wait to be read: generation waits then.
const WAITING: usize = 32;

/// The [`Event`]s of a generation that runs on a thread of its own: a [`Stream`] of what [`Generator`] gives.
///
/// It belongs to no runtime: tokio, smol and others poll it. A reader that is slower than the model makes it wait, after
/// 32 events. Dropping the stream ends the generation after the token that it is at; a
/// [`Cancellation`](super::Cancellation) of the request ends it with its reason. With the feature `async`.
///
/// # Examples
/// ```
/// use futures_util::StreamExt;
/// use vesper_model::Result;
/// use vesper_model::generate::{Event, EventStream, GenerationConfig, NextLogits, Request};
///
/// /// Counts: after token n comes n + 1.
/// struct Counter(usize);
///
/// impl NextLogits for Counter {
///     fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
///         self.0 += ids.len();
///         let next = ids[ids.len() - 1] + 1;
///         Ok((0..10).map(|id| if id == next { 1.0 } else { 0.0 }).collect())
///     }
///     fn remaining(&self) -> usize {
///         100 - self.0
///     }
///     fn vocab_size(&self) -> usize {
///         10
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<()> {
/// let request = Request::new([1, 2], GenerationConfig::greedy().with_eos([6]));
/// let mut events = EventStream::spawn(Counter(0), request, None)?;
/// let mut ids = Vec::new();
/// while let Some(event) = events.next().await {
///     if let Event::Token(token) = event? {
///         ids.push(token.id);
///     }
/// }
/// assert_eq!(ids, [3, 4, 5]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct EventStream {
    events: Pin<Box<Receiver<Result<Event>>>>,
}

impl EventStream {
    /// Starts to answer `request` with `model`, a session for one, which the thread keeps; with a tokenizer there is text.
    ///
    /// # Errors
    /// Those of [`Generator::from_request`] and [`Generator::with_tokenizer`] are the stream's first item.
    /// [`ModelError::Thread`] when the system gives no thread; as an item, where the model panicked.
    pub fn spawn<M: NextLogits + Send + 'static>(
        model: M,
        request: Request,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Result<Self> {
        let (sender, events) = async_channel::bounded(WAITING);
        std::thread::Builder::new()
            .name("vesper-generate".into())
            .spawn(move || {
                let mut model = model;
                let run = || generate(&mut model, request, tokenizer.as_deref(), &sender);
                // A model of others may panic: a stream that only ended would look as if it had nothing more to say.
                let end = catch_unwind(AssertUnwindSafe(run))
                    .unwrap_or_else(|_| Err(ModelError::Thread(std::io::Error::other("the model panicked"))));
                if let Err(error) = end {
                    // Nobody reads any more where this fails.
                    let _ = sender.send_blocking(Err(error));
                }
            })
            .map_err(ModelError::Thread)?;
        Ok(Self { events: Box::pin(events) })
    }
}

/// Sends events until the last, or until nobody reads them.
fn generate<M: NextLogits>(
    model: &mut M,
    request: Request,
    tokenizer: Option<&Tokenizer>,
    sender: &Sender<Result<Event>>,
) -> Result<()> {
    let mut generator = Generator::from_request(model, request)?;
    if let Some(tokenizer) = tokenizer {
        generator = generator.with_tokenizer(tokenizer)?;
    }
    for event in generator {
        if sender.send_blocking(event).is_err() {
            break;
        }
    }
    Ok(())
}

impl Stream for EventStream {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.as_mut().poll_next(context)
    }
}
