//! The stream of events under tokio.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use candle_core::{DType, Device};
use candle_nn::VarMap;
use futures_util::StreamExt;
use tokenizers::Tokenizer;
use vesper_model::generate::{
    Cancellation, Event, EventStream, GenerationConfig, Generator, NextLogits, Request, StopReason,
};
use vesper_model::{ModelError, Result, VesperConfig, VesperLM};

/// After token n comes n + 1 of 64, without end. Counts its calls, and when it goes.
struct Counter {
    calls: Arc<AtomicUsize>,
    gone: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Counter {
    fn new() -> (Self, Arc<AtomicUsize>, tokio::sync::oneshot::Receiver<()>) {
        let calls = Arc::new(AtomicUsize::new(0));
        let (gone, receiver) = tokio::sync::oneshot::channel();
        (Self { calls: calls.clone(), gone: Some(gone) }, calls, receiver)
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let _ = self.gone.take().unwrap().send(());
    }
}

impl NextLogits for Counter {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let next = (ids[ids.len() - 1] + 1) % 64;
        Ok((0..64).map(|id| if id == next { 1.0 } else { 0.0 }).collect())
    }
    fn remaining(&self) -> usize {
        usize::MAX
    }
    fn vocab_size(&self) -> usize {
        64
    }
}

fn endless() -> GenerationConfig {
    GenerationConfig::greedy().with_max_new_tokens(usize::MAX)
}

/// 0 to 63 are the characters from the space on.
fn characters() -> Tokenizer {
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0u8..64).map(|id| (char::from(32 + id).to_string(), u32::from(id).into())).collect();
    let model = serde_json::json!({"type": "BPE", "vocab": vocab, "merges": []});
    serde_json::json!({"added_tokens": [], "decoder": {"type": "Fuse"}, "model": model})
        .to_string()
        .parse()
        .unwrap()
}

#[tokio::test]
async fn the_events_are_those_of_the_generator() {
    let tokenizer = Arc::new(characters());
    let config = endless().with_stop_strings(["HI"]);
    let (mut model, ..) = Counter::new();
    let expected: Vec<Event> = Generator::new(&mut model, &[1], &config)
        .unwrap()
        .with_tokenizer(&tokenizer)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let (model, ..) = Counter::new();
    let stream = EventStream::spawn(model, Request::new([1], config), Some(tokenizer)).unwrap();
    let got: Vec<Event> = stream.map(Result::unwrap).collect().await;
    assert!(got.len() > 64, "more than wait at once: {}", got.len());
    assert_eq!(got, expected);
    assert_eq!(got.last(), Some(&Event::Finish(StopReason::Stop("HI".into()))));
}

#[tokio::test]
async fn dropping_the_stream_ends_the_generation() {
    let (model, calls, gone) = Counter::new();
    let mut stream = EventStream::spawn(model, Request::new([1], endless()), None).unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap().id(), Some(2));
    drop(stream);
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("the thread ends").unwrap();
    assert!(calls.load(Ordering::SeqCst) < 100);
}

#[tokio::test]
async fn a_reader_that_waits_makes_the_model_wait() {
    let (model, calls, gone) = Counter::new();
    let stream = EventStream::spawn(model, Request::new([1], endless()), None).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(calls.load(Ordering::SeqCst) <= 34, "32 wait, one is being sent: {calls:?}");
    drop(stream);
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("the thread ends").unwrap();
}

#[tokio::test]
async fn a_cancellation_ends_it_with_its_reason() {
    let (model, ..) = Counter::new();
    let cancellation = Cancellation::new();
    let request = Request::new([1], endless()).with_cancellation(&cancellation);
    let mut stream = EventStream::spawn(model, request, None).unwrap();
    stream.next().await.unwrap().unwrap();
    cancellation.cancel();
    let rest: Vec<Event> = stream.map(Result::unwrap).collect().await;
    assert_eq!(rest.last(), Some(&Event::Finish(StopReason::Cancelled)));
}

#[tokio::test]
async fn what_cannot_begin_is_the_first_item_and_the_last() {
    let (model, ..) = Counter::new();
    let mut stream = EventStream::spawn(model, Request::new([], endless()), None).unwrap();
    assert!(matches!(stream.next().await, Some(Err(ModelError::EmptyPrompt))));
    assert!(stream.next().await.is_none());
}

/// A model of others that is not as careful as it should be.
struct Panics;

impl NextLogits for Panics {
    fn append(&mut self, _ids: &[u32]) -> Result<Vec<f32>> {
        panic!("on purpose");
    }
    fn remaining(&self) -> usize {
        usize::MAX
    }
    fn vocab_size(&self) -> usize {
        64
    }
}

#[tokio::test]
async fn a_panic_of_the_model_is_an_error_and_no_silent_end() {
    let stream = EventStream::spawn(Panics, Request::new([1], endless()), None).unwrap();
    let items: Vec<Result<Event>> = stream.collect().await;
    assert!(
        matches!(items.as_slice(), [Err(ModelError::Thread(error))] if error.to_string().contains("panicked"))
    );
}

#[tokio::test]
async fn several_run_at_once() {
    let streams: Vec<EventStream> = (0u32..3)
        .map(|start| {
            let (model, ..) = Counter::new();
            let config = GenerationConfig::greedy().with_max_new_tokens(10);
            EventStream::spawn(model, Request::new([start], config), None).unwrap()
        })
        .collect();
    for (start, stream) in (0u32..).zip(streams) {
        let events: Vec<Event> = stream.map(Result::unwrap).collect().await;
        let ids: Vec<u32> = events.iter().filter_map(Event::id).collect();
        assert_eq!(ids, (start + 1..start + 11).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_session_streams_what_it_generates() {
    let config = VesperConfig::preset("nano").unwrap().with_vocab(64);
    let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu).unwrap();
    let settings = GenerationConfig::greedy().with_max_new_tokens(5);
    let mut session = model.session(16).unwrap();
    let mut generator = Generator::new(&mut session, &[1, 2, 3], &settings).unwrap();
    let expected: Vec<u32> = generator.ids().map(Result::unwrap).collect();
    let request = Request::new([1, 2, 3], settings);
    let stream = EventStream::spawn(model.session(16).unwrap(), request, None).unwrap();
    let events: Vec<Event> = stream.map(Result::unwrap).collect().await;
    assert_eq!(events.iter().filter_map(Event::id).collect::<Vec<_>>(), expected);
}
