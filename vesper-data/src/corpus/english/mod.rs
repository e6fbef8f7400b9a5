//! The English grammar.

mod journeys;
mod morphology;
mod village;
mod words;

use super::template::Dialect;

/// The tables and forms of English.
pub(super) const DIALECT: Dialect = Dialect {
    rules: &[words::RULES, journeys::RULES, village::RULES],
    forms: morphology::FORMS,
    endings: &[],
};
