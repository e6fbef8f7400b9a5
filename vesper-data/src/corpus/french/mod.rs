//! The French grammar.

mod journeys;
mod morphology;
mod village;
mod words;

use super::template::Dialect;

/// The tables, forms and endings of French.
pub(super) const DIALECT: Dialect = Dialect {
    rules: &[words::RULES, journeys::RULES, village::RULES],
    forms: morphology::FORMS,
    endings: morphology::ENDINGS,
};
