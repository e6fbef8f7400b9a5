use fancy_regex::Regex;
use serde_json::{Value, json};

use crate::{Error, Result};

/// Which modules of a model get an adapter, chosen by their paths as PEFT does.
///
/// # Examples
///
/// ```
/// use flylora::Targets;
///
/// # fn main() -> Result<(), flylora::Error> {
/// let targets = Targets::names(["q_proj", "v_proj"]).in_layers([0, 2]);
/// assert!(targets.selects("model.layers.2.self_attn.v_proj"));
/// assert!(!targets.selects("model.layers.1.self_attn.v_proj"));
/// assert!(!targets.selects("model.layers.2.self_attn.k_proj"));
///
/// let targets = Targets::regex(r".*\.mlp\..*_proj")?.excluding(["up_proj"]);
/// assert!(targets.selects("model.layers.0.mlp.down_proj"));
/// assert!(!targets.selects("model.layers.0.mlp.up_proj"));
///
/// assert!(Targets::all_linear().selects("model.layers.0.mlp.up_proj"));
/// assert!(!Targets::all_linear().selects("lm_head"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Targets {
    modules: Modules,
    exclude: Option<Modules>,
    /// Modules that are trained themselves, with all that is in them: they get no adapters.
    trained: Vec<Pattern>,
    /// Numbers of layers; none is all.
    layers: Vec<usize>,
    /// What comes before a layer's number; none is anything.
    layers_pattern: Vec<Pattern>,
}

#[derive(Clone, Debug)]
enum Modules {
    AllLinear,
    Names(Vec<String>),
    Regex(Pattern),
}

impl Default for Modules {
    fn default() -> Self {
        Self::Names(Vec::new())
    }
}

/// A regular expression with the text that it came from.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    text: String,
    regex: Regex,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text && self.regex.as_str() == other.regex.as_str()
    }
}

impl Pattern {
    /// `text` put where `{}` stands in `frame`.
    pub(crate) fn new(field: &str, text: &str, frame: &str) -> Result<Self> {
        let regex = Regex::new(&frame.replacen("{}", text, 1)).map_err(|e| Error::Pattern {
            field: field.to_owned(),
            pattern: text.to_owned(),
            message: e.to_string(),
        })?;
        Ok(Self { text: text.to_owned(), regex })
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// Whether the path matches; an expression that gives up on it does not.
    pub(crate) fn is_match(&self, path: &str) -> bool {
        self.regex.is_match(path).unwrap_or(false)
    }

    fn number(&self, path: &str) -> Option<usize> {
        self.regex.captures(path).ok()??.name("idx")?.as_str().parse().ok()
    }
}

/// Output layers, by the names that models of `transformers` give them, which `all-linear` leaves out as PEFT does.
const OUTPUTS: [&str; 6] = [
    "lm_head",
    "embed_out",
    "lm_head.decoder",
    "predictions.decoder",
    "vocab_projector",
    "generator_lm_head",
];

/// The name, or an ending of the path from a dot on.
fn named(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

impl Modules {
    fn selects(&self, path: &str) -> bool {
        match self {
            Self::AllLinear => !OUTPUTS.iter().any(|name| named(path, name)),
            Self::Names(names) => names.iter().any(|name| named(path, name)),
            Self::Regex(regex) => regex.is_match(path),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::AllLinear => json!("all-linear"),
            Self::Names(names) => json!(names),
            Self::Regex(regex) => json!(regex.text()),
        }
    }

    fn read(field: &str, value: &Value) -> Result<Option<Self>> {
        match value {
            Value::Null => Ok(None),
            Value::String(text) if field == "target_modules" && text.eq_ignore_ascii_case("all-linear") => {
                Ok(Some(Self::AllLinear))
            }
            // A single name is an expression that matches itself alone.
            Value::String(text) => Pattern::new(field, text, "^(?:{})$").map(|p| Some(Self::Regex(p))),
            Value::Array(items) => {
                let names: Option<_> = items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
                names.map(|names| Some(Self::Names(names))).ok_or_else(|| wrong(field, value))
            }
            _ => Err(wrong(field, value)),
        }
    }
}

fn wrong(field: &str, value: &Value) -> Error {
    Error::Adapters { message: format!("{field}: expected a name or a list of names, got {value}") }
}

fn none_if_empty(modules: Option<Modules>) -> Option<Modules> {
    modules.filter(|m| !matches!(m, Modules::Names(names) if names.is_empty()))
}

impl Targets {
    /// Modules with one of these names, or whose path ends with one after a dot.
    pub fn names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self { modules: Modules::Names(names.into_iter().map(Into::into).collect()), ..Self::default() }
    }

    /// Modules whose whole path matches a regular expression (Python's syntax, with look-around).
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`].
    pub fn regex(pattern: &str) -> Result<Self> {
        let pattern = Pattern::new("target_modules", pattern, "^(?:{})$")?;
        Ok(Self { modules: Modules::Regex(pattern), ..Self::default() })
    }

    /// Every linear layer but the output layer of a language model (`lm_head`, `embed_out`, ...). Paths of other modules must not be asked for:
    /// a path does not tell what it leads to.
    pub fn all_linear() -> Self {
        Self { modules: Modules::AllLinear, ..Self::default() }
    }

    /// Leaves out modules with one of these names, or whose path ends with one after a dot.
    pub fn excluding<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.exclude = Some(Modules::Names(names.into_iter().map(Into::into).collect()));
        self
    }

    /// Leaves out modules whose whole path matches a regular expression.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`].
    pub fn excluding_regex(mut self, pattern: &str) -> Result<Self> {
        self.exclude = Some(Modules::Regex(Pattern::new("exclude_modules", pattern, "^(?:{})$")?));
        Ok(self)
    }

    /// Keeps the layers with these numbers: the first number in a path that stands between dots, after a name. PEFT
    /// does so for lists of names only, and so does this.
    pub fn in_layers(mut self, layers: impl IntoIterator<Item = usize>) -> Self {
        self.layers = layers.into_iter().collect();
        self
    }

    /// Says what comes before a layer's number, where that is not the first number of a path: `layers`, `h`, `blocks`.
    ///
    /// # Errors
    ///
    /// [`Error::Pattern`].
    pub fn with_layers_pattern<S: AsRef<str>>(mut self, names: impl IntoIterator<Item = S>) -> Result<Self> {
        self.layers_pattern = names
            .into_iter()
            .map(|name| Pattern::new("layers_pattern", name.as_ref(), LAYER_AFTER))
            .collect::<Result<_>>()?;
        Ok(self)
    }

    /// Whether the module with that path gets an adapter.
    pub fn selects(&self, path: &str) -> bool {
        let excluded = self.exclude.as_ref().is_some_and(|exclude| exclude.selects(path))
            || self.trained.iter().any(|module| module.is_match(path));
        !excluded && self.modules.selects(path) && self.in_its_layers(path)
    }

    /// The names asked for, where it is names that are asked for.
    pub fn listed_names(&self) -> &[String] {
        match &self.modules {
            Modules::Names(names) => names,
            _ => &[],
        }
    }

    fn in_its_layers(&self, path: &str) -> bool {
        if self.layers.is_empty() || !matches!(self.modules, Modules::Names(_)) {
            return true;
        }
        // A module that is named in full is meant, whatever its layer.
        if self.listed_names().iter().any(|name| name == path) {
            return true;
        }
        let number = if self.layers_pattern.is_empty() {
            Pattern::new("layers", "", LAYER_ANYWHERE).ok().and_then(|p| p.number(path))
        } else {
            self.layers_pattern.iter().find_map(|p| p.number(path))
        };
        number.is_some_and(|number| self.layers.contains(&number))
    }

    /// Leaves out modules of these names, anywhere in a path, and all that is in them: PEFT's `modules_to_save`.
    pub(crate) fn leave_out_trained(&mut self, names: &[String]) -> Result<()> {
        let pattern = |name: &String| Pattern::new("modules_to_save", name, TRAINED);
        self.trained = names.iter().map(pattern).collect::<Result<_>>()?;
        Ok(())
    }

    /// The fields of a PEFT configuration.
    pub(crate) fn to_json(&self) -> [(&'static str, Value); 4] {
        let layers = (!self.layers.is_empty()).then_some(&self.layers);
        let pattern: Vec<&str> = self.layers_pattern.iter().map(Pattern::text).collect();
        [
            ("target_modules", self.modules.json()),
            ("exclude_modules", self.exclude.as_ref().map_or(Value::Null, Modules::json)),
            ("layers_to_transform", json!(layers)),
            ("layers_pattern", if pattern.is_empty() { Value::Null } else { json!(pattern) }),
        ]
    }

    /// Takes a field of a PEFT configuration, if it is one of those of [`to_json`](Self::to_json).
    pub(crate) fn read(&mut self, field: &str, value: &Value) -> Result<bool> {
        match field {
            "target_modules" => self.modules = Modules::read(field, value)?.unwrap_or_default(),
            "exclude_modules" => self.exclude = none_if_empty(Modules::read(field, value)?),
            "layers_to_transform" => {
                let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
                let layers = match value {
                    Value::Null => Some(Vec::new()),
                    Value::Array(items) => items.iter().map(number).collect(),
                    one => number(one).map(|n| vec![n]),
                };
                self.layers = layers.ok_or_else(|| Error::Adapters {
                    message: format!("{field}: expected a number or a list of numbers, got {value}"),
                })?;
            }
            "layers_pattern" => {
                let names: Vec<&str> = match value {
                    Value::String(name) if !name.is_empty() => vec![name],
                    Value::Array(items) => items.iter().filter_map(Value::as_str).collect(),
                    _ => Vec::new(),
                };
                *self = std::mem::take(self).with_layers_pattern(names)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

// As PEFT has them, from the start of the path on: an alternative in the middle (`a|b`) takes the whole apart there too.
const TRAINED: &str = r"^(?:(?:^|.*\.){}(?:$|\..*))";
const LAYER_AFTER: &str = r"^(?:(?:^|.*?\.){}\.(?<idx>\d+)\.)";
const LAYER_ANYWHERE: &str = r"^.*?\.[^.]*\.(?<idx>\d+)\.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_whole_parts_of_a_path_alone() {
        let targets = Targets::names(["q_proj", "mlp.up_proj"]);
        for (path, selected) in [
            ("q_proj", true),
            ("layers.0.q_proj", true),
            ("layers.0.xq_proj", false),
            ("layers.0.q_proj.inner", false),
            ("layers.0.mlp.up_proj", true),
            ("layers.0.up_proj", false),
        ] {
            assert_eq!(targets.selects(path), selected, "{path}");
        }
    }

    #[test]
    fn all_linear_leaves_out_the_output_layer_and_modules_that_are_trained_themselves_get_nothing() {
        let mut targets = Targets::all_linear();
        for (path, selected) in [
            ("bert.encoder.layer.0.output.dense", true),
            ("lm_head", false),
            ("model.lm_head", false),
            ("lm_head.dense", true),
            ("lm_head.decoder", false),
            ("cls.predictions.decoder", false),
            ("score", true),
        ] {
            assert_eq!(targets.selects(path), selected, "{path}");
        }
        targets.leave_out_trained(&["score".to_owned(), "classifier".to_owned()]).unwrap();
        for (path, selected) in [
            ("score", false),
            ("model.classifier.dense", false),
            ("classifier.out_proj", false),
            ("underscore", true),
            ("classifiers.0", true),
        ] {
            assert_eq!(targets.selects(path), selected, "{path}");
        }
    }

    #[test]
    fn expressions_match_the_whole_path_and_may_look_around() {
        let targets = Targets::regex(r"(?!.*lm_head).*proj").unwrap();
        assert!(targets.selects("layers.0.q_proj"));
        assert!(!targets.selects("layers.0.q_proj.more"));
        assert!(!targets.selects("lm_head.proj"));
        // An alternative does not escape the anchors.
        assert!(!Targets::regex("a|b").unwrap().selects("xb"));
        let error = Targets::regex("(").unwrap_err().to_string();
        assert!(error.contains("target_modules = \"(\""), "{error}");
    }

    #[test]
    fn layers_are_counted_by_the_first_number_or_by_the_pattern() {
        let targets = Targets::names(["w1"]).in_layers([1]);
        assert!(targets.selects("model.layers.1.experts.0.w1"));
        assert!(!targets.selects("model.layers.0.experts.1.w1"));
        assert!(!targets.selects("model.w1"), "a module of no layer is in none of them");
        let targets = targets.with_layers_pattern(["experts"]).unwrap();
        assert!(targets.selects("model.layers.0.experts.1.w1"));
        assert!(!targets.selects("model.layers.1.experts.0.w1"));
        // PEFT matches from the start of the path, and takes an alternative for all that stands beside it.
        let targets = Targets::names(["w1"]).in_layers([1]).with_layers_pattern(["block|layers"]).unwrap();
        assert!(targets.selects("layers.1.w1") && !targets.selects("model.layers.1.w1"));
    }

    #[test]
    fn the_fields_of_a_configuration_come_back() {
        let targets = Targets::names(["q", "v"])
            .excluding_regex(r".*\.0\..*")
            .unwrap()
            .in_layers([0, 3])
            .with_layers_pattern(["h"])
            .unwrap();
        let mut back = Targets::default();
        for (field, value) in targets.to_json() {
            assert!(back.read(field, &value).unwrap());
        }
        assert_eq!(back.to_json(), targets.to_json());
        assert!(!back.read("r", &json!(4)).unwrap());
        assert!(back.read("target_modules", &json!([1])).is_err());
        assert!(back.read("layers_to_transform", &json!("all")).is_err());
    }
}
