//! Beam search: several continuations side by side, and the most probable of them.

mod pool;

use super::sequence::first_tokens;
use super::{BatchLogits, GenerationConfig, Request, Sampler, StopReason};
use crate::{ModelError, Result};
use pool::{Pool, better};

/// A continuation that beam search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// Its tokens, without the prompt and the one that ended it.
    pub ids: Vec<u32>,
    /// What it was ranked by: `log_probability / length^length_penalty`, the length with the token that ended it.
    pub score: f64,
    /// The sum over its tokens, the one that ended it included, of their log-probabilities as the processors left them.
    pub log_probability: f64,
    /// Why it ended: [`StopReason::Eos`], [`StopReason::MaxTokens`], [`StopReason::ContextFull`] or
    /// [`StopReason::Cancelled`].
    pub stop: StopReason,
}

/// A continuation on its way.
#[derive(Debug, Clone)]
struct Beam {
    /// Without the prompt.
    ids: Vec<u32>,
    log_probability: f64,
}

/// A token after a beam.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    beam: usize,
    id: u32,
    log_probability: f64,
}

/// Looks for the most probable continuations of a prompt and gives the best `num_return_sequences`, best first.
///
/// Hugging Face's search, with `n = num_beams` beams and `e` tokens that end a text:
///
/// ```text
/// s(b, i)    = s(b) + process(log_softmax(l_b))_i      for every beam b and token i
/// candidates = the max(2, 1 + e) * n largest s
/// complete     those among the first n that end, ranked by s / length^length_penalty; the n best are kept
/// beams      = the n best that do not end
/// ```
///
/// The processors are the constraints of [`Sampler`] and those of the request; temperature and truncation belong to
/// drawing and have no part. One beam is the greedy choice of [`Generator`](super::Generator), there too: for it they act on
/// the logits, before `log_softmax`, and it ends at the first end of the text. When it ends `early_stopping` says; see [`EarlyStopping`](super::EarlyStopping). Beams take the first
/// `n` rows of the model, which must have read nothing; all begin from one reading of the prompt. A beam whose every
/// continuation is excluded is given up.
///
/// # Errors
/// Those of [`Generator::new`](super::Generator::new); [`ModelError::InvalidGeneration`] where `do_sample` or `stop_strings` are
/// set, which are not for beams, where more sequences are to be returned than there are beams, and for more beams than rows;
/// [`ModelError::InvalidLogits`] for scores that are no numbers, and where every token is excluded before one continuation is
/// complete.
///
/// # Examples
/// ```
/// use vesper_model::Result;
/// use vesper_model::generate::{BatchLogits, GenerationConfig, Request, beam_search};
///
/// /// Scores that depend on the last token alone, in rows that remember nothing else.
/// struct Table(usize);
///
/// impl BatchLogits for Table {
///     fn rows(&self) -> usize {
///         self.0
///     }
///     fn append(&mut self, ids: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
///         let odds = |last: u32| match last {
///             0 => [0.0f32, 0.6, 0.4, 0.0], // 1 is likelier than 2,
///             1 => [0.0, 0.3, 0.3, 0.4],    // but nothing is likely after it,
///             _ => [0.0, 0.0, 0.1, 0.9],    // and the end, 3, is likely after 2
///         };
///         let row = |ids: &&[u32]| ids.last().map_or(Vec::new(), |&last| odds(last).map(f32::ln).to_vec());
///         Ok(ids.iter().map(row).collect())
///     }
///     fn reorder(&mut self, _from: &[usize]) -> Result<()> {
///         Ok(())
///     }
///     fn remaining(&self, _row: usize) -> usize {
///         100
///     }
///     fn vocab_size(&self) -> usize {
///         4
///     }
/// }
///
/// let config = GenerationConfig::greedy().with_beams(2).with_eos([3]).with_max_new_tokens(2);
/// let found = beam_search(&mut Table(2), Request::new([0], config))?;
/// assert_eq!(found[0].ids, [2]);
/// assert!((found[0].log_probability - 0.36f64.ln()).abs() < 1e-6);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
///
/// # References
/// `GenerationMixin._beam_search` of Hugging Face's transformers.
pub fn beam_search<M: BatchLogits + ?Sized>(model: &mut M, request: Request) -> Result<Vec<Hypothesis>> {
    Search::new(model, request)?.run()
}

struct Search<'a, M: BatchLogits + ?Sized> {
    model: &'a mut M,
    request: Request,
    sampler: Sampler,
    prompt: Vec<u32>,
    /// The most new tokens, and the reason of that.
    limit: (usize, StopReason),
    beams: Vec<Beam>,
    pool: Pool,
}

impl<'a, M: BatchLogits + ?Sized> Search<'a, M> {
    fn new(model: &'a mut M, mut request: Request) -> Result<Self> {
        let config = &request.config;
        check(config, model.rows())?;
        let mut sampler = Sampler::new(config)?.with_vocab_limit(request.vocab_limit);
        for processor in std::mem::take(&mut request.processors) {
            sampler = sampler.with_boxed_processor(processor);
        }
        let room = (0..config.num_beams).map(|row| model.remaining(row)).min().unwrap_or(0);
        let prompt =
            first_tokens(std::mem::take(&mut request.prompt), config.bos_token_id, model.vocab_size(), room)?;
        let wanted = config.limit(prompt.len()).saturating_sub(prompt.len());
        // The last token need not be remembered.
        let possible = (room - prompt.len()).saturating_add(1);
        let limit = if wanted <= possible {
            (wanted, StopReason::MaxTokens)
        } else {
            (possible, StopReason::ContextFull)
        };
        let pool = Pool::new(config, limit.0);
        let beams = vec![Beam { ids: Vec::new(), log_probability: 0.0 }];
        Ok(Self { sampler: sampler.with_prompt(prompt.len()), model, request, prompt, limit, beams, pool })
    }

    fn run(mut self) -> Result<Vec<Hypothesis>> {
        let mut fed = vec![self.prompt.clone()];
        while self.pool.is_open(self.beams.first().map(|best| (best.log_probability, best.ids.len()))) {
            if self.request.cancellation.is_cancelled() {
                self.end_all(&StopReason::Cancelled);
                break;
            }
            if self.limit.0 == 0 {
                let reason = self.limit.1.clone();
                self.end_all(&reason);
                break;
            }
            let candidates = self.candidates(&fed)?;
            let parents = self.advance(&candidates)?;
            self.reorder(&parents)?;
            fed = self.beams.iter().map(|beam| beam.ids.last().copied().into_iter().collect()).collect();
        }
        Ok(self.pool.into_best(self.request.config.num_return_sequences))
    }

    /// The best continuations of all beams by one token, best first.
    fn candidates(&mut self, fed: &[Vec<u32>]) -> Result<Vec<Candidate>> {
        let mut ids: Vec<&[u32]> = fed.iter().map(Vec::as_slice).collect();
        ids.resize(self.model.rows(), &[]);
        let rows = self.model.append(&ids)?;
        let single = self.request.config.num_beams == 1;
        let mut all = Vec::new();
        for ((number, beam), mut scores) in self.beams.iter().enumerate().zip(rows) {
            let tokens = [&self.prompt[..], &beam.ids].concat();
            let scores = self.sampler.log_probabilities(&mut scores, &tokens, single)?;
            let possible = scores.iter().zip(0u32..).filter(|(score, _)| **score > f32::NEG_INFINITY);
            all.extend(possible.map(|(&score, id)| Candidate {
                beam: number,
                id,
                log_probability: beam.log_probability + f64::from(score),
            }));
        }
        let config = &self.request.config;
        let wanted = config.num_beams * (1 + config.eos_token_id.len()).max(2);
        if wanted < all.len() {
            all.select_nth_unstable_by(wanted, better);
            all.truncate(wanted);
        }
        all.sort_unstable_by(better);
        Ok(all)
    }

    /// Takes what is complete into the pool and goes on with the best of the rest; gives the beam that each comes from.
    fn advance(&mut self, candidates: &[Candidate]) -> Result<Vec<usize>> {
        let config = &self.request.config;
        let mut next = Vec::new();
        let mut parents = Vec::new();
        for (rank, candidate) in candidates.iter().enumerate() {
            let Some(parent) = self.beams.get(candidate.beam) else { continue };
            let length = parent.ids.len() + 1;
            let ends = config.eos_token_id.contains(&candidate.id);
            if ends || length >= self.limit.0 {
                // What ends further down is there only to keep enough that goes on.
                if rank < config.num_beams {
                    let mut ids = parent.ids.clone();
                    let stop = if ends { StopReason::Eos(candidate.id) } else { self.limit.1.clone() };
                    if !ends {
                        ids.push(candidate.id);
                    }
                    self.pool.add(ids, length, candidate.log_probability, stop);
                }
            } else if next.len() < config.num_beams {
                let ids = parent.ids.iter().copied().chain([candidate.id]).collect();
                next.push(Beam { ids, log_probability: candidate.log_probability });
                parents.push(candidate.beam);
            }
        }
        if next.is_empty() && self.pool.is_empty() {
            return Err(super::sampler::all_excluded());
        }
        self.beams = next;
        Ok(parents)
    }

    fn reorder(&mut self, parents: &[usize]) -> Result<()> {
        let from: Vec<usize> =
            (0..self.model.rows()).map(|row| parents.get(row).copied().unwrap_or(row)).collect();
        if from.iter().enumerate().all(|(row, &parent)| row == parent) {
            return Ok(());
        }
        self.model.reorder(&from)
    }

    fn end_all(&mut self, reason: &StopReason) {
        for beam in std::mem::take(&mut self.beams) {
            let length = beam.ids.len();
            self.pool.add(beam.ids, length, beam.log_probability, reason.clone());
        }
    }
}

fn check(config: &GenerationConfig, rows: usize) -> Result<()> {
    let wrong = |field, got: String, expected| Err(ModelError::InvalidGeneration { field, got, expected });
    if !config.is_greedy() {
        return wrong("do_sample", "true".into(), "false for a beam search, which draws nothing");
    }
    if !config.stop_strings.is_empty() {
        return wrong("stop_strings", format!("{:?}", config.stop_strings), "none for a beam search");
    }
    if config.num_return_sequences > config.num_beams {
        let got = format!("{} of {} beams", config.num_return_sequences, config.num_beams);
        return wrong("num_return_sequences", got, "at most num_beams");
    }
    if config.num_beams > rows {
        let got = format!("{} for a model of {rows} rows", config.num_beams);
        return wrong("num_beams", got, "at most a row each");
    }
    Ok(())
}
