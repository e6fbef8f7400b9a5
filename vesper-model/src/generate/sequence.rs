//! One sequence on its way, without the model: what every loop has in common.

use std::collections::VecDeque;

use tokenizers::Tokenizer;

use super::stop::Piece;
use super::{Cancellation, Event, Request, Sampler, StopReason, StopStrings, Token, TokenStream};
use crate::{ModelError, Result};

/// The tokens, the sampler and the text of one sequence, and the events that were not given yet.
#[derive(Debug)]
pub(super) struct Sequence<'a> {
    sampler: Sampler,
    cancellation: Cancellation,
    model_log_probabilities: bool,
    /// The prompt and what came after it.
    tokens: Vec<u32>,
    /// Length of the prompt.
    prompt: usize,
    /// How many of the tokens the model was given.
    fed: usize,
    /// The most tokens, prompt included.
    limit: usize,
    eos: Vec<u32>,
    stops: StopStrings,
    /// Special tokens that are a stop string: they have no text.
    stop_tokens: Vec<(u32, String)>,
    needs_text: bool,
    text: Option<TokenStream<'a>>,
    events: VecDeque<Event>,
    /// Given after the events.
    error: Option<ModelError>,
    stop: Option<StopReason>,
}

impl<'a> Sequence<'a> {
    /// `vocab`: rows of the embedding. `room`: how many tokens the model can take.
    pub(super) fn new(request: Request, vocab: usize, room: usize) -> Result<Self> {
        let config = request.config;
        let mut sampler = Sampler::new(&config)?.with_vocab_limit(request.vocab_limit);
        for processor in request.processors {
            sampler = sampler.with_boxed_processor(processor);
        }
        let tokens = first_tokens(request.prompt, config.bos_token_id, vocab, room)?;
        let limit = config.limit(tokens.len());
        Ok(Self {
            sampler: sampler.with_prompt(tokens.len()),
            cancellation: request.cancellation,
            model_log_probabilities: request.model_log_probabilities,
            prompt: tokens.len(),
            tokens,
            fed: 0,
            limit,
            eos: config.eos_token_id,
            needs_text: !config.stop_strings.is_empty(),
            stops: StopStrings::new(config.stop_strings)?,
            stop_tokens: Vec::new(),
            text: None,
            events: VecDeque::new(),
            error: None,
            stop: None,
        })
    }

    /// Gives text from now on, as the continuation of the tokens that are there.
    pub(super) fn set_tokenizer(&mut self, tokenizer: &'a Tokenizer) -> Result<()> {
        self.text = Some(TokenStream::new(tokenizer).with_context(&self.tokens)?);
        let special = |stop: &String| {
            let id = tokenizer.token_to_id(stop)?;
            tokenizer.get_added_vocabulary().is_special_token(stop).then(|| (id, stop.clone()))
        };
        self.stop_tokens = self.stops.strings().iter().filter_map(special).collect();
        Ok(())
    }

    pub(super) fn set_vocab_limit(&mut self, limit: usize) {
        self.sampler.set_vocab_limit(limit);
    }

    pub(super) fn set_cancellation(&mut self, cancellation: &Cancellation) {
        self.cancellation = cancellation.clone();
    }

    pub(super) fn generated(&self) -> &[u32] {
        self.tokens.get(self.prompt..).unwrap_or_default()
    }

    pub(super) fn unfed(&self) -> &[u32] {
        self.tokens.get(self.fed..).unwrap_or_default()
    }

    pub(super) fn stop_reason(&self) -> Option<&StopReason> {
        self.stop.as_ref()
    }

    /// The next event that waits, and after the last of a failure its error.
    pub(super) fn next_event(&mut self) -> Option<Result<Event>> {
        self.events.pop_front().map(Ok).or_else(|| self.error.take().map(Err))
    }

    /// Whether the sequence goes on and the model is to be given [`Sequence::unfed`]. `room`: how many tokens the model can
    /// take.
    pub(super) fn is_ready(&mut self, room: usize) -> bool {
        if self.stop.is_some() {
            return false;
        }
        if self.needs_text && self.text.is_none() {
            self.fail(ModelError::InvalidGeneration {
                field: "stop_strings",
                got: "given without a tokenizer".into(),
                expected: "a tokenizer beside them (with_tokenizer)",
            });
        } else if self.cancellation.is_cancelled() {
            self.finish(StopReason::Cancelled);
        } else if self.tokens.len() >= self.limit {
            self.finish(StopReason::MaxTokens);
        } else if room < self.unfed().len() {
            self.finish(StopReason::ContextFull);
        }
        self.stop.is_none()
    }

    /// Chooses the next token from the logits after [`Sequence::unfed`].
    pub(super) fn advance(&mut self, logits: &mut [f32]) {
        self.fed = self.tokens.len();
        if let Err(error) = self.choose(logits) {
            self.fail(error);
        }
    }

    /// Ends with an error, after the text that was withheld.
    pub(super) fn fail(&mut self, error: ModelError) {
        self.finish(StopReason::Failed);
        self.error.get_or_insert(error);
    }

    /// Ends with an error that another sequence gives.
    pub(super) fn fail_with_others(&mut self) {
        self.finish(StopReason::Failed);
        if self.error.is_none() {
            self.events.push_back(Event::Finish(StopReason::Failed));
        }
    }

    fn choose(&mut self, logits: &mut [f32]) -> Result<()> {
        let token = self.sampler.choose(logits, &self.tokens, self.model_log_probabilities)?;
        if self.eos.contains(&token.id) {
            self.finish(StopReason::Eos(token.id));
            return Ok(());
        }
        self.accept(token)
    }

    fn accept(&mut self, token: Token) -> Result<()> {
        self.tokens.push(token.id);
        self.events.push_back(Event::Token(token));
        if let Some((_, stop)) = self.stop_tokens.iter().find(|(id, _)| *id == token.id) {
            self.finish(StopReason::Stop(stop.clone()));
            return Ok(());
        }
        let Some(stream) = &mut self.text else { return Ok(()) };
        let Some(text) = stream.push(token.id)? else { return Ok(()) };
        let Piece { text, stop } = self.stops.push(&text);
        self.give(text);
        if let Some(stop) = stop {
            // What was withheld comes after the stop string.
            self.text = None;
            self.finish(StopReason::Stop(stop));
        }
        Ok(())
    }

    fn give(&mut self, text: String) {
        if !text.is_empty() {
            self.events.push_back(Event::Text(text));
        }
    }

    /// Gives the withheld text and ends. A stop string in it came before whatever else would be the reason.
    fn finish(&mut self, reason: StopReason) {
        if self.stop.is_some() {
            return;
        }
        let rest = self.text.take().map_or(Ok(None), |mut stream| stream.flush());
        let reason = match rest {
            Ok(rest) => match self.give_rest(&rest.unwrap_or_default()) {
                Some(stop) if reason != StopReason::Failed => StopReason::Stop(stop),
                _ => reason,
            },
            Err(error) => {
                self.error = Some(error);
                StopReason::Failed
            }
        };
        // A failure's last item is the error.
        if reason != StopReason::Failed {
            self.events.push_back(Event::Finish(reason.clone()));
        }
        self.stop = Some(reason);
    }

    fn give_rest(&mut self, rest: &str) -> Option<String> {
        let Piece { text, stop } = self.stops.push(rest);
        self.give(text);
        if stop.is_none() {
            let Piece { text, .. } = self.stops.flush();
            self.give(text);
        }
        stop
    }
}

/// The prompt, or the token that begins a text, if the model can take it.
pub(crate) fn first_tokens(
    prompt: Vec<u32>,
    bos: Option<u32>,
    vocab: usize,
    room: usize,
) -> Result<Vec<u32>> {
    let tokens = match bos {
        _ if !prompt.is_empty() => prompt,
        Some(bos) => vec![bos],
        None => return Err(ModelError::EmptyPrompt),
    };
    if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab) {
        return Err(ModelError::TokenOutOfRange { id, vocab });
    }
    if tokens.len() > room {
        return Err(ModelError::SequenceTooLong { got: tokens.len(), limit: room });
    }
    Ok(tokens)
}
