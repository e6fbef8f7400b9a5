//! How well an error head foresees the errors of a model, and what regulation makes of that: the parts of the example
//! `metacognition`.
//!
//! [`documents`] reads held-out text, [`tokens`] measures the prediction of errors token by token, [`answers`] that of
//! whole answers and what regulation does to them, [`record`] keeps and prints the results, [`ask`] shows one regulated answer.

pub mod answers;
pub mod ask;
pub mod documents;
pub mod record;
pub mod remembered;
pub mod tokens;
