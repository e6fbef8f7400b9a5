use super::PREFIX;

/// Tables and output layers, which PEFT saves in full wherever the vocabulary has been resized.
const OF_A_VOCABULARY: [&str; 6] =
    ["embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out"];

/// Which parameters of the model itself a file may hold beside its adapters: those of PEFT's `modules_to_save` and `bias`,
/// and those of a vocabulary of another size.
#[derive(Clone, Debug, Default)]
pub(super) struct Saved {
    /// Endings of the names of modules whose parameters are all there.
    pub(super) modules: Vec<String>,
    /// Whether biases of other modules are there.
    pub(super) biases: bool,
}

impl Saved {
    /// The parameter of the model (`score.weight`) that a key of the file stands for, if it is one of these.
    pub(super) fn parameter(&self, key: &str) -> Option<String> {
        let path = key.strip_prefix(PREFIX)?;
        // A layer with an adapter has its own parameters one level below.
        if let Some(module) = path.strip_suffix(".base_layer.bias") {
            return self.biases.then(|| format!("{module}.bias"));
        }
        let name = path.strip_suffix(".weight").and_then(|module| module.rsplit('.').next());
        if name.is_some_and(|name| OF_A_VOCABULARY.contains(&name)) {
            return Some(path.to_owned());
        }
        let is_bias = self.biases && path.rsplit('.').next() == Some("bias");
        let of = |module: &str| self.modules.iter().any(|name| module.ends_with(name.as_str()));
        let mut ends = path.match_indices('.').filter_map(|(at, _)| path.get(..at));
        (is_bias || ends.any(of)).then(|| path.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_those_of_the_modules_listed_and_the_biases_where_they_are_saved() {
        let saved = |modules: &[&str], biases| Saved {
            modules: modules.iter().map(|m| (*m).to_owned()).collect(),
            biases,
        };
        let key = |path: &str| format!("base_model.model.{path}");
        for (path, of_head, of_biases) in [
            ("score.weight", true, false),
            ("score.dense.bias", true, true),
            ("model.norm.weight", false, false),
            ("model.norm.bias", false, true),
            ("score", false, false),
            ("model.norm_lm_head.weight", false, false),
        ] {
            let want = |yes: bool| yes.then(|| path.to_owned());
            assert_eq!(saved(&["score"], false).parameter(&key(path)), want(of_head), "{path}");
            assert_eq!(saved(&[], true).parameter(&key(path)), want(of_biases), "{path}");
            assert_eq!(saved(&["score"], true).parameter(path), None, "without what every key begins with");
        }
        let table = key("model.embed_tokens.weight");
        assert_eq!(saved(&[], false).parameter(&table).as_deref(), Some("model.embed_tokens.weight"));
        let below = key("q.base_layer.bias");
        assert_eq!(saved(&[], true).parameter(&below).as_deref(), Some("q.bias"));
        assert_eq!(saved(&["score"], false).parameter(&below), None);
    }
}
