//! The writer on a thread of its own, so that the interface never waits for the model.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;

use anyhow::{Context, Result};
use vesper_model::generate::{Cancellation, GenerationConfig};

use super::writer::{Ask, Ended, Progress, Writer};
use crate::one_line;

/// What comes of something asked, in this order: progress, and one of the others.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// How far it is.
    Progress(Progress),
    /// The end of the answer.
    Ended(Ended),
    /// There is none: why, in one line.
    Failed(String),
}

/// The thread, from outside. It ends when this is dropped.
#[derive(Debug)]
pub struct Engine {
    asks: Sender<(Ask, GenerationConfig)>,
    events: Receiver<Event>,
    stop: Cancellation,
}

impl Engine {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system has no thread to give.
    pub fn start(mut writer: Writer) -> Result<Self> {
        let (asks, asked) = channel::<(Ask, GenerationConfig)>();
        let (sender, events) = channel();
        let stop = Cancellation::new();
        let stopped = stop.clone();
        let run = move || {
            while let Ok((ask, settings)) = asked.recv() {
                let progress = |progress| match sender.send(Event::Progress(progress)) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                };
                let end = writer.write(&ask, &settings, &stopped, progress);
                let event = match end {
                    Ok(ended) => Event::Ended(ended),
                    Err(error) => Event::Failed(one_line(&error)),
                };
                if sender.send(event).is_err() {
                    break;
                }
            }
        };
        thread::Builder::new().name("engine".into()).spawn(run).context("cannot start a thread")?;
        Ok(Self { asks, events, stop })
    }

    /// Asks for an answer, when the one before it has ended.
    pub fn ask(&self, ask: Ask, settings: GenerationConfig) {
        self.stop.reset();
        // A thread that is gone is noticed by `next`.
        let _ = self.asks.send((ask, settings));
    }

    /// Ends the answer before its next token.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// What happened since it was last asked, if anything.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn next(&self) -> Result<Option<Event>> {
        match self.events.try_recv() {
            Ok(event) => Ok(Some(event)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => anyhow::bail!("the thread of the model ended unexpectedly"),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}
