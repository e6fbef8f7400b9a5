//! The prediction of errors in whole answers, and what regulation does about them.

use anyhow::Result;
use vesper_model::generate::GenerationConfig;
use vesper_model::metacognition::metrics::error_at_coverage;
use vesper_model::metacognition::{
    Aggregate, AnswerCalibration, Calibrated, Confidence, ErrorScore, Method, Regulated, Regulation,
    RegulatorConfig,
};

use super::documents::Question;
use super::record::{Policy, Quality};
use super::remembered::Remembered;
use super::tokens::quality_of;

const DRAWN: &str = "one draft";
const TWO: &str = "the best of two drafts";
/// The policy that draws again where it is unsure.
pub const SECOND: &str = "a second draft when unsure";
/// The policy that draws again as often, but anywhere.
pub const RANDOM: &str = "a second draft at random";

/// A model that answers, and how.
#[derive(Debug)]
pub struct Answerer<'a> {
    /// The model.
    pub model: Remembered<'a>,
    /// Ids from this on are not chosen.
    pub vocab_limit: usize,
    /// The temperature of drafts that are drawn.
    pub temperature: f64,
    /// Of the draws.
    pub seed: u64,
}

/// A confidence by its name.
#[derive(Debug)]
pub struct Source<'a> {
    /// The name.
    pub name: String,
    /// The confidence, calibrated token by token.
    pub confidence: Calibrated<&'a dyn ErrorScore>,
}

impl Answerer<'_> {
    /// Answers all questions under a regulator.
    fn answers(
        &self,
        questions: &[Question],
        settings: &RegulatorConfig,
        confidence: &dyn Confidence,
    ) -> Result<Vec<Regulated>> {
        let answer = |(i, question): (u64, &Question)| -> Result<Regulated> {
            let generation = GenerationConfig::default()
                .with_top_k(0)
                .with_top_p(1.0)
                .with_max_new_tokens(question.answer.len())
                // Two drafts of a question have neighbouring seeds.
                .with_seed(self.seed.wrapping_mul(1_000_000).wrapping_add(16 * i));
            let capacity = question.prompt.len() + question.answer.len();
            let mut regulation =
                Regulation::new(settings, &generation, confidence)?.with_vocab_limit(self.vocab_limit);
            Ok(regulation.answer(|| Ok(self.model.session(capacity)), &question.prompt)?)
        };
        (0..).zip(questions).map(answer).collect()
    }

    /// The probabilities of the tokens of one draft a question, and whether it was wrong.
    fn single(
        &self,
        questions: &[Question],
        temperature: f64,
        confidence: &dyn Confidence,
    ) -> Result<Single> {
        let all = self.answers(questions, &RegulatorConfig::off(temperature), confidence)?;
        let tokens = |answer: &Regulated| -> Vec<f64> {
            answer.drafts.iter().flat_map(|draft| draft.tokens.iter().map(|token| token.p_wrong)).collect()
        };
        let likeliest = |answer: &Regulated| -> Vec<f64> {
            answer
                .drafts
                .iter()
                .flat_map(|draft| draft.tokens.iter().map(|token| token.p_likeliest_wrong))
                .collect()
        };
        Ok(Single {
            tokens: all.iter().map(tokens).collect(),
            likeliest: all.iter().flat_map(likeliest).collect(),
            wrong: all.iter().zip(questions).map(|(answer, question)| is_wrong(answer, question)).collect(),
        })
    }

    /// Calibrates the answers of a confidence on drafts that are drawn.
    ///
    /// # Errors
    /// Those of the model and the confidence.
    pub fn calibrate(
        &self,
        questions: &[Question],
        confidence: &dyn Confidence,
    ) -> Result<AnswerCalibration> {
        self.single(questions, self.temperature, confidence)?.calibration()
    }

    /// How well each source foresees the errors of greedy answers, and their share in the test part.
    ///
    /// # Errors
    /// A part in which all answers are right, or wrong.
    pub fn foresight(
        &self,
        sources: &[Source<'_>],
        calibration: &[Question],
        test: &[Question],
    ) -> Result<(Vec<(String, Quality)>, f64)> {
        let mut rate = 0.0;
        let mut all = Vec::new();
        for source in sources {
            let scores = |single: &Single| -> Vec<f64> {
                single.tokens.iter().map(|tokens| Aggregate::Independent.score(tokens)).collect()
            };
            let fit = self.single(calibration, 0.0, &source.confidence)?;
            let measured = self.single(test, 0.0, &source.confidence)?;
            rate = share(&measured.wrong);
            let quality = quality_of((&scores(&fit), &fit.wrong), (&scores(&measured), &measured.wrong))?;
            all.push((source.name.clone(), quality));
        }
        Ok((all, rate))
    }

    /// What the policies do with each source. Thresholds are chosen on the calibration part: half of the tokens are cooled, a
    /// second draft is drawn for half of the questions, half of the questions are answered.
    ///
    /// # Errors
    /// Those of the model and the confidence.
    pub fn policies(
        &self,
        sources: &[Source<'_>],
        calibration: &[Question],
        test: &[Question],
    ) -> Result<Vec<Policy>> {
        let mut all = Vec::new();
        for source in sources {
            let fit = self.single(calibration, self.temperature, &source.confidence)?;
            let answer = fit.calibration()?;
            let confidence = source.confidence.clone().with_answer(answer);
            let p: Vec<f64> = fit.tokens.iter().map(|tokens| confidence.p_answer_wrong(tokens)).collect();
            let (cool_above, half) = (median(&fit.likeliest), median(&p));

            let one = RegulatorConfig::off(self.temperature);
            let two = RegulatorConfig { max_drafts: 2, ..one };
            let cooled = RegulatorConfig { cooled: 0.0, cool_above, ..one };
            let second = RegulatorConfig { satisfied_at: half, ..two };
            let regulated = RegulatorConfig { cooled: 0.0, cool_above, ..second };
            let policies = [
                ("one draft, greedy", RegulatorConfig::off(0.0)),
                (DRAWN, one),
                ("one draft, cooled when unsure", cooled),
                (SECOND, second),
                (TWO, RegulatorConfig { satisfied_at: 0.0, ..two }),
                ("cooled, a second draft when unsure", regulated),
            ];
            for (name, settings) in policies {
                let answers = self.answers(test, &settings, &confidence)?;
                all.push(policy(name, &source.name, &answers, test)?);
            }
            // Abstaining too: the threshold leaves half of the calibration part answered.
            let answers = self.answers(calibration, &regulated, &confidence)?;
            let left: Vec<f64> = answers.iter().filter_map(Regulated::p_wrong).collect();
            let abstain_above = median(&left);
            let satisfied_at = regulated.satisfied_at.min(abstain_above);
            let settings = RegulatorConfig { satisfied_at, abstain_above, ..regulated };
            let answers = self.answers(test, &settings, &confidence)?;
            let mut abstaining = policy("the same, abstaining", &source.name, &answers, test)?;
            let given: Vec<bool> = answers
                .iter()
                .zip(test)
                .filter(|(answer, _)| answer.verdict.draft().is_some())
                .map(|(answer, question)| is_wrong(answer, question))
                .collect();
            abstaining.coverage = Some(given.len() as f64 / test.len() as f64);
            abstaining.error_of_answered = (!given.is_empty()).then(|| share(&given));
            all.push(abstaining);
        }
        Ok(all)
    }
}

/// One draft a question.
struct Single {
    tokens: Vec<Vec<f64>>,
    likeliest: Vec<f64>,
    wrong: Vec<bool>,
}

impl Single {
    fn calibration(&self) -> Result<AnswerCalibration> {
        Ok(AnswerCalibration::fit(Aggregate::Independent, Method::Platt, &self.tokens, &self.wrong)?)
    }
}

/// Whether the best draft, which is the answer or what was withheld, is not what follows in the text.
fn is_wrong(answer: &Regulated, question: &Question) -> bool {
    answer.best().is_none_or(|draft| draft.ids() != question.answer)
}

fn policy(name: &str, source: &str, answers: &[Regulated], questions: &[Question]) -> Result<Policy> {
    let wrong: Vec<bool> = answers.iter().zip(questions).map(|(a, q)| is_wrong(a, q)).collect();
    let p: Vec<f64> = answers.iter().map(|answer| answer.p_wrong().unwrap_or(1.0)).collect();
    let cost = answers.iter().map(Regulated::cost).sum::<usize>() as f64 / answers.len().max(1) as f64;
    Ok(Policy {
        policy: name.into(),
        source: source.into(),
        cost,
        error: share(&wrong),
        error_at_four_fifths: Some(error_at_coverage(&p, &wrong, 0.8)?),
        error_at_half: Some(error_at_coverage(&p, &wrong, 0.5)?),
        coverage: None,
        error_of_answered: None,
    })
}

fn share(wrong: &[bool]) -> f64 {
    wrong.iter().filter(|wrong| **wrong).count() as f64 / wrong.len().max(1) as f64
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.5).clamp(0.0, 1.0)
}

/// The row of a second draft for as many questions, but at random: between one draft and two, by the cost.
pub fn at_random(policies: &[Policy], source: &str) -> Option<Policy> {
    let of = |name: &str| policies.iter().find(|p| p.policy == name && p.source == source);
    let (one, two, second) = (of(DRAWN)?, of(TWO)?, of(SECOND)?);
    let t = (second.cost - one.cost) / (two.cost - one.cost);
    let between = |a: f64, b: f64| a + t * (b - a);
    Some(Policy {
        policy: RANDOM.into(),
        source: source.into(),
        cost: second.cost,
        error: between(one.error, two.error),
        error_at_four_fifths: None,
        error_at_half: None,
        coverage: None,
        error_of_answered: None,
    })
}
