//! What is done about low confidence: a state machine without a model.

use serde::{Deserialize, Serialize};

use crate::{ModelError, Result};

/// Where a regulated answer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Deciding whether another draft is worth its cost.
    Plan,
    /// Decoding a draft and watching it.
    Regulate,
    /// Done.
    Stop,
}

/// What the regulator is told; all probabilities are of an error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The decoder is ready.
    Begin,
    /// A distribution is there, and its likeliest token is wrong with this probability; nothing is chosen yet.
    Predicted {
        /// The probability.
        p_wrong: f64,
    },
    /// A token is chosen, and the draft so far is wrong with this probability.
    Chosen {
        /// The probability.
        p_wrong: f64,
    },
    /// The draft is complete, and wrong with this probability.
    Finished {
        /// The probability.
        p_wrong: f64,
    },
    /// The caller wants no more.
    Interrupt,
}

/// What the decoder is to do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Begin draft `number`, from 0.
    Draft {
        /// The number.
        number: usize,
    },
    /// Choose the next token at this temperature; 0: the likeliest.
    Choose {
        /// The temperature.
        temperature: f64,
    },
    /// Go on with the draft.
    Continue,
    /// Give the draft up.
    Discard,
    /// Keep the draft for comparison, and [`Event::Begin`] again.
    Keep,
    /// Nothing more: see the verdict.
    Stop(Verdict),
}

/// How a regulated answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A draft is good enough.
    Satisfied {
        /// Its number.
        draft: usize,
    },
    /// No draft is good enough, but the best of them is not bad enough to be withheld.
    Best {
        /// Its number.
        draft: usize,
    },
    /// No answer is given.
    Abstained,
    /// The caller stopped it.
    Interrupted,
}

impl Verdict {
    /// The number of the draft that is the answer.
    pub fn draft(self) -> Option<usize> {
        match self {
            Self::Satisfied { draft } | Self::Best { draft } => Some(draft),
            Self::Abstained | Self::Interrupted => None,
        }
    }
}

/// When what is done. Thresholds are probabilities of an error, from 0 to 1.
///
/// # Examples
/// ```
/// use vesper_model::metacognition::RegulatorConfig;
///
/// let config = RegulatorConfig { max_drafts: 3, satisfied_at: 0.2, ..RegulatorConfig::default() };
/// assert!(config.validate().is_ok());
/// let wrong = RegulatorConfig { abstain_above: 0.1, ..config }; // it would not give the answers that satisfy it
/// assert!(wrong.validate().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegulatorConfig {
    /// The most drafts. At least 1. Default 2.
    pub max_drafts: usize,
    /// The temperature of tokens; 0: always the likeliest. Default .8.
    pub temperature: f64,
    /// The temperature of tokens of low confidence, at most `temperature`. Default 0.
    pub cooled: f64,
    /// A token is of low confidence where its likeliest choice is wrong with more than this. Default .5; 1: none is.
    pub cool_above: f64,
    /// A draft is given up for another one where it is wrong with more than this before it is complete, as long as there may
    /// be another. Default 1: never.
    pub discard_above: f64,
    /// A complete draft ends the search where it is wrong with at most this. Default .3.
    pub satisfied_at: f64,
    /// No answer is given where the best draft is wrong with more than this, at least `satisfied_at`. Default .9; 1: there
    /// is always an answer.
    pub abstain_above: f64,
}

impl Default for RegulatorConfig {
    fn default() -> Self {
        Self {
            max_drafts: 2,
            temperature: 0.8,
            cooled: 0.0,
            cool_above: 0.5,
            discard_above: 1.0,
            satisfied_at: 0.3,
            abstain_above: 0.9,
        }
    }
}

impl RegulatorConfig {
    /// One draft as it comes: no cooling, no second draft, no abstaining.
    pub fn off(temperature: f64) -> Self {
        Self {
            max_drafts: 1,
            temperature,
            cooled: temperature,
            cool_above: 1.0,
            discard_above: 1.0,
            satisfied_at: 1.0,
            abstain_above: 1.0,
        }
    }

    /// Checks every setting against its range.
    ///
    /// # Errors
    /// [`ModelError::InvalidMetacognition`] names the setting, its value and the range.
    pub fn validate(&self) -> Result<()> {
        let bad =
            |field, got: String, expected| Err(ModelError::InvalidMetacognition { field, got, expected });
        if self.max_drafts == 0 {
            return bad("max_drafts", "0".into(), "at least 1");
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad("temperature", self.temperature.to_string(), "0 (greedy) or a positive number");
        }
        if !(0.0..=self.temperature).contains(&self.cooled) {
            return bad("cooled", self.cooled.to_string(), "a number from 0 to temperature");
        }
        for (field, value) in [
            ("cool_above", self.cool_above),
            ("discard_above", self.discard_above),
            ("satisfied_at", self.satisfied_at),
            ("abstain_above", self.abstain_above),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return bad(field, value.to_string(), "a probability from 0 to 1");
            }
        }
        if self.abstain_above < self.satisfied_at {
            return bad("abstain_above", self.abstain_above.to_string(), "at least satisfied_at");
        }
        Ok(())
    }
}

/// Decides what is done while an answer is decoded, by the confidence in it.
///
/// | state | event | condition | action | next state |
/// |---|---|---|---|---|
/// | Plan | Begin | fewer than `max_drafts` were begun | Draft | Regulate |
/// | Plan | Begin | else, the best kept draft is at most `abstain_above` | Stop(Best) | Stop |
/// | Plan | Begin | else | Stop(Abstained) | Stop |
/// | Regulate | Predicted p | p at most `cool_above` | Choose at `temperature` | Regulate |
/// | Regulate | Predicted p | else | Choose at `cooled` | Regulate |
/// | Regulate | Chosen p | p over `discard_above`, and fewer than `max_drafts` were begun | Discard | Plan |
/// | Regulate | Chosen p | else | Continue | Regulate |
/// | Regulate | Finished p | p at most `satisfied_at` | Stop(Satisfied) | Stop |
/// | Regulate | Finished p | else | Keep | Plan |
/// | Plan, Regulate | Interrupt | | Stop(Interrupted) | Stop |
///
/// Any other event is an error and changes nothing. Of drafts that are equally good the first is the best.
///
/// # Examples
/// ```
/// use vesper_model::metacognition::{Action, Event, Regulator, RegulatorConfig, State, Verdict};
///
/// let mut regulator = Regulator::new(RegulatorConfig::default())?;
/// assert_eq!(regulator.step(Event::Begin)?, Action::Draft { number: 0 });
/// assert_eq!(regulator.step(Event::Predicted { p_wrong: 0.6 })?, Action::Choose { temperature: 0.0 });
/// assert_eq!(regulator.step(Event::Chosen { p_wrong: 0.6 })?, Action::Continue);
/// assert_eq!(regulator.step(Event::Finished { p_wrong: 0.6 })?, Action::Keep); // not satisfied
/// assert_eq!(regulator.step(Event::Begin)?, Action::Draft { number: 1 });
/// assert_eq!(regulator.step(Event::Finished { p_wrong: 0.7 })?, Action::Keep);
/// assert_eq!(regulator.step(Event::Begin)?, Action::Stop(Verdict::Best { draft: 0 }));
/// assert_eq!(regulator.state(), State::Stop);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Regulator {
    config: RegulatorConfig,
    state: State,
    /// Drafts that were begun.
    begun: usize,
    /// The kept draft that is least likely wrong.
    best: Option<(usize, f64)>,
}

impl Regulator {
    /// A regulator that plans its first draft.
    ///
    /// # Errors
    /// As [`RegulatorConfig::validate`].
    pub fn new(config: RegulatorConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config, state: State::Plan, begun: 0, best: None })
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Takes an event and says what to do.
    ///
    /// # Errors
    /// [`ModelError::InvalidMetacognition`] for an event that cannot be in this state, or a number that is no probability.
    /// Nothing changes then.
    pub fn step(&mut self, event: Event) -> Result<Action> {
        if let Event::Predicted { p_wrong } | Event::Chosen { p_wrong } | Event::Finished { p_wrong } = event
            && !(0.0..=1.0).contains(&p_wrong)
        {
            let (got, expected) = (p_wrong.to_string(), "a probability from 0 to 1");
            return Err(ModelError::InvalidMetacognition { field: "p_wrong", got, expected });
        }
        let another = self.begun < self.config.max_drafts;
        let (action, next) = match (self.state, event) {
            (State::Plan, Event::Begin) if another => {
                self.begun += 1;
                (Action::Draft { number: self.begun - 1 }, State::Regulate)
            }
            (State::Plan, Event::Begin) => match self.best {
                Some((draft, p)) if p <= self.config.abstain_above => {
                    (Action::Stop(Verdict::Best { draft }), State::Stop)
                }
                _ => (Action::Stop(Verdict::Abstained), State::Stop),
            },
            (State::Regulate, Event::Predicted { p_wrong }) => {
                let cool = p_wrong > self.config.cool_above;
                let temperature = if cool { self.config.cooled } else { self.config.temperature };
                (Action::Choose { temperature }, State::Regulate)
            }
            (State::Regulate, Event::Chosen { p_wrong })
                if p_wrong > self.config.discard_above && another =>
            {
                (Action::Discard, State::Plan)
            }
            (State::Regulate, Event::Chosen { .. }) => (Action::Continue, State::Regulate),
            (State::Regulate, Event::Finished { p_wrong }) => {
                let draft = self.begun.saturating_sub(1);
                if p_wrong <= self.config.satisfied_at {
                    (Action::Stop(Verdict::Satisfied { draft }), State::Stop)
                } else {
                    if self.best.is_none_or(|(_, best)| p_wrong < best) {
                        self.best = Some((draft, p_wrong));
                    }
                    (Action::Keep, State::Plan)
                }
            }
            (State::Plan | State::Regulate, Event::Interrupt) => {
                (Action::Stop(Verdict::Interrupted), State::Stop)
            }
            (state, event) => {
                return Err(ModelError::InvalidMetacognition {
                    field: "event",
                    got: format!("{event:?} in state {state:?}"),
                    expected: "Begin in Plan; Predicted, Chosen or Finished in Regulate; Interrupt in either",
                });
            }
        };
        self.state = next;
        Ok(action)
    }
}
