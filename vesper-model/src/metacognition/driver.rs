//! A regulator at work: it decodes an answer and says what it did.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;

use super::{
    Action, Confidence, Event, Regulator, RegulatorConfig, State, TokenStatistics, TokenView, Verdict,
};
use crate::generate::scores::argmax;
use crate::generate::{
    GenerationConfig, History, LogitsProcessor, NextLogits, Sampler, StopReason, first_tokens,
};
use crate::{ModelError, Result, Session};

/// A model whose last hidden state can be looked at while it decodes.
pub trait Introspective: NextLogits {
    /// The hidden state behind the last logits, of `hidden` elements in any shape; `None` (as by default) where there is
    /// none to be seen, which is enough for confidence in the distribution alone.
    fn hidden_state(&self) -> Option<&Tensor> {
        None
    }
}

impl Introspective for Session {
    fn hidden_state(&self) -> Option<&Tensor> {
        self.last_hidden()
    }
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The probability that the likeliest token was wrong, which decided the temperature.
    pub p_likeliest_wrong: f64,
    /// The temperature that it was chosen at; 0: the likeliest.
    pub temperature: f64,
    /// The probability that it is wrong.
    pub p_wrong: f64,
}

/// An answer that was decoded, whether it was given or not.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    /// The choices, the one that ended the text included.
    pub tokens: Vec<Token>,
    /// The probability that it is wrong; of a draft that was given up, as far as it came.
    pub p_wrong: f64,
    /// Why it ended; `None` where it was given up.
    pub end: Option<StopReason>,
}

impl Draft {
    /// The ids of its text, without the one that ended it.
    pub fn ids(&self) -> Vec<u32> {
        let text = self.tokens.len() - usize::from(matches!(self.end, Some(StopReason::Eos(_))));
        self.tokens.iter().take(text).map(|token| token.id).collect()
    }
}

/// What came of a regulated answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Regulated {
    /// How it ended.
    pub verdict: Verdict,
    /// All drafts, by their numbers.
    pub drafts: Vec<Draft>,
    /// What happened, in order: the state, the event in it, and what was done.
    pub events: Vec<(State, Event, Action)>,
}

impl Regulated {
    /// The ids of the answer; `None` where none was given.
    pub fn answer(&self) -> Option<Vec<u32>> {
        self.drafts.get(self.verdict.draft()?).map(Draft::ids)
    }

    /// The complete draft that is least likely wrong, the first of equals: the answer, or what was withheld.
    pub fn best(&self) -> Option<&Draft> {
        let complete = |draft: &&Draft| !matches!(draft.end, None | Some(StopReason::Cancelled));
        self.drafts.iter().filter(complete).min_by(|a, b| a.p_wrong.total_cmp(&b.p_wrong))
    }

    /// The probability that the best draft is wrong.
    pub fn p_wrong(&self) -> Option<f64> {
        self.best().map(|draft| draft.p_wrong)
    }

    /// Tokens that were chosen in all drafts: what the answer cost beside reading the prompt once a draft.
    pub fn cost(&self) -> usize {
        self.drafts.iter().map(|draft| draft.tokens.len()).sum()
    }
}

/// Decodes answers under a [`Regulator`].
///
/// Tokens are chosen by a [`Sampler`] of `generation`, whose temperature is replaced by the regulator's, token by token; draft
/// n draws with the seed `generation.seed + n`. `bos_token_id`, `eos_token_id`, `max_new_tokens` and `max_length` count as in
/// [`Generator`](crate::generate::Generator). The probability that a draft is wrong comes from those of its choices, the end of
/// the text included, by [`Confidence::p_answer_wrong`]. Confidence is in the model's own distribution, before any processor of
/// `generation` changes it.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::VarMap;
/// use vesper_model::generate::GenerationConfig;
/// use vesper_model::metacognition::{Calibrated, Measure, Regulation, RegulatorConfig, Verdict};
/// use vesper_model::{VesperConfig, VesperLM};
///
/// let config = VesperConfig::preset("nano")?.with_vocab(64);
/// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
/// let confidence = Calibrated::new(Measure::Probability); // or the confidence of an ErrorHead
/// let generation = GenerationConfig::default().with_max_new_tokens(4);
/// let mut regulation = Regulation::new(&RegulatorConfig::default(), &generation, &confidence)?;
/// let report = regulation.answer(|| model.session(16), &[1, 2, 3])?;
/// // The model is untrained and knows nothing; with this confidence it is known to.
/// assert_eq!((report.verdict, report.answer()), (Verdict::Abstained, None));
/// assert_eq!((report.drafts.len(), report.cost()), (2, 8));
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
pub struct Regulation<'a> {
    settings: RegulatorConfig,
    /// With the regulator's temperature.
    generation: GenerationConfig,
    confidence: &'a dyn Confidence,
    vocab_limit: usize,
    interrupt: Option<Box<dyn FnMut() -> bool + 'a>>,
}

impl fmt::Debug for Regulation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Regulation")
            .field("settings", &self.settings)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl<'a> Regulation<'a> {
    /// Prepares to decode answers by these settings, with this confidence.
    ///
    /// # Errors
    /// [`ModelError::InvalidGeneration`] and [`ModelError::InvalidMetacognition`] for a setting out of range.
    pub fn new(
        settings: &RegulatorConfig,
        generation: &GenerationConfig,
        confidence: &'a dyn Confidence,
    ) -> Result<Self> {
        settings.validate()?;
        let (do_sample, temperature) = (settings.temperature > 0.0, settings.temperature);
        let generation = GenerationConfig { do_sample, temperature, ..generation.clone() };
        generation.validate()?;
        if !generation.stop_strings.is_empty() {
            let got = format!("{:?}", generation.stop_strings);
            let expected = "none for a regulated answer, which has no text";
            return Err(ModelError::InvalidGeneration { field: "stop_strings", got, expected });
        }
        Ok(Self { settings: *settings, generation, confidence, vocab_limit: usize::MAX, interrupt: None })
    }

    /// Never chooses an id of `limit` or more; see [`Sampler::with_vocab_limit`].
    pub fn with_vocab_limit(mut self, limit: usize) -> Self {
        self.vocab_limit = limit;
        self
    }

    /// Asks `interrupt` before every token; `true` stops.
    pub fn with_interrupt(mut self, interrupt: impl FnMut() -> bool + 'a) -> Self {
        self.interrupt = Some(Box::new(interrupt));
        self
    }

    /// Sets the seed of the draws.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.generation.seed = seed;
        self
    }

    /// Decodes an answer to a prompt; an empty one begins with `bos_token_id`. `model` gives a model that has read nothing,
    /// once for each draft.
    ///
    /// # Errors
    /// [`ModelError::EmptyPrompt`], [`ModelError::TokenOutOfRange`] and [`ModelError::SequenceTooLong`] for a prompt that cannot
    /// be read; [`ModelError::InvalidGeneration`] where `max_new_tokens` or `max_length` leave no room for a token, so that
    /// there would be nothing to be confident of; those of the model and the confidence.
    pub fn answer<M: Introspective>(
        &mut self,
        mut model: impl FnMut() -> Result<M>,
        prompt: &[u32],
    ) -> Result<Regulated> {
        let regulator = Regulator::new(self.settings)?;
        let mut report = Report { regulator, drafts: Vec::new(), events: Vec::new() };
        let verdict = loop {
            match report.step(Event::Begin)? {
                Action::Draft { number } => {
                    let mut model = model()?;
                    let mut drafter = self.drafter(&mut model, prompt, number)?;
                    let verdict = drafter.run(&mut report, &mut self.interrupt);
                    report.drafts.push(drafter.draft);
                    if let Some(verdict) = verdict? {
                        break verdict;
                    }
                }
                Action::Stop(verdict) => break verdict,
                other => return Err(unexpected(other)),
            }
        };
        Ok(Regulated { verdict, drafts: report.drafts, events: report.events })
    }

    /// That a draft has a token: nothing could be said of one without.
    fn check_length(&self, prompt: usize) -> Result<()> {
        if self.generation.limit(prompt) > prompt {
            return Ok(());
        }
        let (field, got) = match self.generation.max_length {
            Some(length) if self.generation.max_new_tokens > 0 => {
                ("max_length", format!("{length} for a prompt of {prompt}"))
            }
            _ => ("max_new_tokens", "0".into()),
        };
        let expected = "room for at least one token of a regulated answer";
        Err(ModelError::InvalidGeneration { field, got, expected })
    }

    fn drafter<'m, M: Introspective>(
        &self,
        model: &'m mut M,
        prompt: &[u32],
        number: usize,
    ) -> Result<Drafter<'m, M>>
    where
        'a: 'm,
    {
        let (vocab, room) = (model.vocab_size(), model.remaining());
        let tokens = first_tokens(prompt.to_vec(), self.generation.bos_token_id, vocab, room)?;
        self.check_length(tokens.len())?;
        let seed = self.generation.seed.wrapping_add(number as u64);
        let generation = self.generation.clone().with_seed(seed);
        let heat = Heat::new(generation.temperature);
        let sampler = Sampler::new(&generation)?
            .with_prompt(tokens.len())
            .with_vocab_limit(self.vocab_limit)
            .with_processor(heat.clone());
        Ok(Drafter {
            model,
            sampler,
            heat,
            confidence: self.confidence,
            generation,
            possible: self.vocab_limit.min(vocab),
            limit: self.generation.limit(tokens.len()),
            tokens,
            fed: 0,
            draft: Draft { tokens: Vec::new(), p_wrong: 0.0, end: None },
        })
    }
}

/// The regulator and what it has done.
struct Report {
    regulator: Regulator,
    drafts: Vec<Draft>,
    events: Vec<(State, Event, Action)>,
}

impl Report {
    fn step(&mut self, event: Event) -> Result<Action> {
        let state = self.regulator.state();
        let action = self.regulator.step(event)?;
        self.events.push((state, event, action));
        Ok(action)
    }
}

/// One draft under way.
struct Drafter<'a, M: Introspective> {
    model: &'a mut M,
    sampler: Sampler,
    heat: Heat,
    confidence: &'a dyn Confidence,
    generation: GenerationConfig,
    /// Ids from this on are not chosen.
    possible: usize,
    /// The most tokens, prompt included.
    limit: usize,
    /// The prompt and what came after it.
    tokens: Vec<u32>,
    fed: usize,
    draft: Draft,
}

impl<M: Introspective> Drafter<'_, M> {
    /// Decodes until the draft is complete or given up. A verdict ends the answer.
    fn run(
        &mut self,
        report: &mut Report,
        interrupt: &mut Option<Box<dyn FnMut() -> bool + '_>>,
    ) -> Result<Option<Verdict>> {
        let end = loop {
            if interrupt.as_mut().is_some_and(|interrupt| interrupt()) {
                self.draft.end = Some(StopReason::Cancelled);
                return verdict(report.step(Event::Interrupt)?);
            }
            if self.tokens.len() >= self.limit {
                break StopReason::MaxTokens;
            }
            let unfed = self.tokens.get(self.fed..).unwrap_or_default();
            if self.model.remaining() < unfed.len() {
                break StopReason::ContextFull;
            }
            let logits = self.model.append(unfed)?;
            self.fed = self.tokens.len();
            let Some(id) = self.choose(&logits, report)? else { return Ok(None) };
            if self.generation.eos_token_id.contains(&id) {
                break StopReason::Eos(id);
            }
            self.tokens.push(id);
        };
        self.draft.end = Some(end);
        verdict(report.step(Event::Finished { p_wrong: self.draft.p_wrong })?)
    }

    /// Chooses a token; `None` where the draft is given up.
    fn choose(&mut self, logits: &[f32], report: &mut Report) -> Result<Option<u32>> {
        let hidden = self.model.hidden_state();
        let p_wrong = |id: u32| -> Result<f64> {
            let statistics = TokenStatistics::of(logits, id)?;
            self.confidence.p_wrong(&TokenView { statistics, hidden })
        };
        let likeliest = argmax(logits.get(..self.possible).unwrap_or(logits))?;
        let p_likeliest_wrong = p_wrong(likeliest)?;
        let temperature = match report.step(Event::Predicted { p_wrong: p_likeliest_wrong })? {
            Action::Choose { temperature } => temperature,
            other => return Err(unexpected(other)),
        };
        self.heat.set(temperature);
        let id = self.sampler.sample(&mut logits.to_vec(), &self.tokens)?;
        let p_wrong = if id == likeliest { p_likeliest_wrong } else { p_wrong(id)? };
        self.draft.tokens.push(Token { id, p_likeliest_wrong, temperature, p_wrong });
        let tokens: Vec<f64> = self.draft.tokens.iter().map(|token| token.p_wrong).collect();
        self.draft.p_wrong = self.confidence.p_answer_wrong(&tokens);
        match report.step(Event::Chosen { p_wrong: self.draft.p_wrong })? {
            Action::Discard => Ok(None),
            _ => Ok(Some(id)),
        }
    }
}

fn verdict(action: Action) -> Result<Option<Verdict>> {
    match action {
        Action::Stop(verdict) => Ok(Some(verdict)),
        Action::Keep => Ok(None),
        other => Err(unexpected(other)),
    }
}

fn unexpected(action: Action) -> ModelError {
    ModelError::InvalidMetacognition {
        field: "action",
        got: format!("{action:?}"),
        expected: "one that belongs to the event",
    }
}

/// Divides the logits so that the sampler's own temperature becomes another.
#[derive(Debug, Clone)]
struct Heat {
    /// The sampler's.
    own: f64,
    /// The bits of what it is to be.
    wanted: Arc<AtomicU64>,
}

impl Heat {
    fn new(own: f64) -> Self {
        Self { own, wanted: Arc::new(AtomicU64::new(own.to_bits())) }
    }

    fn set(&self, temperature: f64) {
        self.wanted.store(temperature.to_bits(), Ordering::Relaxed);
    }
}

impl LogitsProcessor for Heat {
    fn process(&mut self, scores: &mut [f32], _history: History<'_>) {
        let wanted = f64::from_bits(self.wanted.load(Ordering::Relaxed));
        if wanted == self.own {
            return;
        }
        let Some(max) = scores.iter().copied().max_by(f32::total_cmp) else { return };
        // Where every token is excluded, that stays an error.
        let Some(best) = scores.iter().position(|score| *score == max && max > f32::NEG_INFINITY) else {
            return;
        };
        for (i, score) in scores.iter_mut().enumerate() {
            // Differences to the largest score: nothing overflows.
            let scaled = if wanted > 0.0 {
                (f64::from(*score - max) * self.own / wanted) as f32
            } else {
                f32::NEG_INFINITY
            };
            *score = if i == best { 0.0 } else { scaled };
        }
    }
}
