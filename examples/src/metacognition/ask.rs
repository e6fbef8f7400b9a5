//! One regulated answer, with what was thought of it.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use vesper_data::TextTokenizer;
use vesper_model::VesperLM;
use vesper_model::generate::GenerationConfig;
use vesper_model::metacognition::{ErrorHead, Regulated, Regulation, RegulatorConfig};

use crate::printable;

/// Answers a prompt under a regulator that listens to a head.
///
/// # Errors
/// A head that is damaged or for another model, a prompt that is too long.
pub fn answer(
    model: &VesperLM,
    tokenizer: &TextTokenizer,
    head: &Path,
    prompt: &str,
    settings: &RegulatorConfig,
    generation: &GenerationConfig,
) -> Result<Regulated> {
    let head = ErrorHead::load_for(head, model)?;
    let confidence = head.confidence();
    // A text begins after the token that ends the one before it.
    let mut ids: Vec<u32> = generation.bos_token_id.into_iter().collect();
    ids.extend(tokenizer.encode(prompt)?);
    let capacity = ids.len().saturating_add(generation.max_new_tokens);
    let mut regulation =
        Regulation::new(settings, generation, &confidence)?.with_vocab_limit(tokenizer.vocab_size());
    Ok(regulation.answer(|| model.session(capacity), &ids)?)
}

/// Every draft with its tokens, how it ended, and what came of it.
///
/// # Errors
/// Ids that the tokenizer cannot decode.
pub fn report(answer: &Regulated, tokenizer: &TextTokenizer) -> Result<String> {
    let mut text = String::new();
    for (number, draft) in answer.drafts.iter().enumerate() {
        let end = draft.end.as_ref().map_or_else(|| "given up".to_owned(), ToString::to_string);
        let shown = printable(&tokenizer.decode(&draft.ids())?);
        writeln!(text, "draft {number}, wrong with probability {:.3} ({end}): {shown:?}", draft.p_wrong)?;
        for token in &draft.tokens {
            let piece = printable(&tokenizer.decode(&[token.id])?);
            writeln!(text, "  {:.3} at temperature {}: {piece:?}", token.p_wrong, token.temperature)?;
        }
    }
    match answer.answer() {
        Some(ids) => writeln!(text, "{:?}: {}", answer.verdict, printable(&tokenizer.decode(&ids)?))?,
        None => writeln!(text, "{:?}: no answer", answer.verdict)?,
    }
    write!(text, "{} tokens were generated", answer.cost())?;
    Ok(text)
}
