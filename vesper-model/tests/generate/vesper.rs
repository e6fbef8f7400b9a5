//! VesperLM's sessions: a batch against each sequence alone.

use candle_core::{DType, Device};
use candle_nn::VarMap;
use vesper_model::generate::{
    BatchGenerator, Event, GenerationConfig, Generator, NextLogits, Request, StopReason, beam_search,
};
use vesper_model::{Result, Session, VesperConfig, VesperLM};

use crate::fake::Rows;

const CAPACITY: usize = 24;

fn model() -> VesperLM {
    let config = VesperConfig::preset("nano").unwrap().with_vocab(64);
    VesperLM::initialize(&config, &VarMap::new(), 3, DType::F32, &Device::Cpu).unwrap()
}

/// A session that is copied by reading everything again.
struct Again<'a> {
    model: &'a VesperLM,
    session: Session,
    read: Vec<u32>,
}

impl<'a> Again<'a> {
    fn new(model: &'a VesperLM) -> Self {
        Self { model, session: model.session(CAPACITY).unwrap(), read: Vec::new() }
    }
}

impl Clone for Again<'_> {
    fn clone(&self) -> Self {
        let mut copy = Self::new(self.model);
        if !self.read.is_empty() {
            copy.append(&self.read).unwrap();
        }
        copy
    }
}

impl NextLogits for Again<'_> {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.read.extend(ids);
        self.session.append(ids)
    }
    fn remaining(&self) -> usize {
        self.session.remaining()
    }
    fn vocab_size(&self) -> usize {
        self.session.vocab_size()
    }
}

#[test]
fn rows_of_unequal_length_give_the_tokens_that_each_gives_alone() {
    let model = model();
    let drawn = GenerationConfig::default().with_temperature(2.0).with_top_k(0).with_top_p(1.0);
    let requests = [
        (vec![1], drawn.clone().with_seed(1).with_max_new_tokens(9)),
        ((2..20).collect::<Vec<u32>>(), drawn.clone().with_seed(2)),
        (vec![5, 5, 5], GenerationConfig::greedy().with_max_new_tokens(4).with_no_repeat_ngram_size(2)),
        (vec![7, 8], drawn.with_seed(3).with_eos(0..20)),
    ];
    let mut batch = model.batch_session(requests.len(), CAPACITY).unwrap();
    let rows = requests.iter().map(|(prompt, config)| Request::new(prompt.clone(), config.clone()));
    let mut got = vec![Vec::new(); requests.len()];
    let mut ends = vec![None; requests.len()];
    for (row, event) in BatchGenerator::new(&mut batch, rows).unwrap() {
        match event.unwrap() {
            Event::Token(token) => got[row].push(token.id),
            Event::Finish(reason) => ends[row] = Some(reason),
            Event::Text(_) => panic!("no tokenizer"),
        }
    }
    for (row, (prompt, config)) in requests.iter().enumerate() {
        let mut session = model.session(CAPACITY).unwrap();
        let mut alone = Generator::new(&mut session, prompt, config).unwrap();
        let ids: Vec<u32> = alone.ids().map(|id| id.unwrap()).collect();
        assert_eq!((&got[row], ends[row].as_ref()), (&ids, alone.stop_reason()), "row {row}");
    }
    assert_eq!(ends[1], Some(StopReason::ContextFull));
}

#[test]
fn beam_search_over_a_batch_finds_what_it_finds_over_sessions_that_read_again() {
    let model = model();
    let config = GenerationConfig::greedy().with_beams(4).with_return_sequences(3).with_max_new_tokens(7);
    let request = || Request::new([3, 1, 4], config.clone().with_eos([10, 20, 30]));
    let got = beam_search(&mut model.batch_session(4, CAPACITY).unwrap(), request()).unwrap();
    let expected = beam_search(&mut Rows::new(4, || Again::new(&model)), request()).unwrap();
    assert_eq!(got.len(), 3);
    for (got, expected) in got.iter().zip(&expected) {
        assert_eq!((&got.ids, &got.stop), (&expected.ids, &expected.stop));
        assert!((got.score - expected.score).abs() < 1e-4, "{} {}", got.score, expected.score);
    }
}
