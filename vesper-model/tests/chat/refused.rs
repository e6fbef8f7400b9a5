//! Templates that are wrong, or mean harm: an error each, and soon.

use vesper_model::ModelError;
use vesper_model::chat::{ChatTemplate, Message, Role};

fn error(text: &str) -> ModelError {
    let messages = [Message::new(Role::User, "x")];
    ChatTemplate::new(text).and_then(|template| template.render(&messages, true)).unwrap_err()
}

#[test]
fn endless_work_is_stopped() {
    for text in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{{ b }}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 10000000000 }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ] {
        let error = error(text);
        assert!(matches!(error, ModelError::ChatTemplate { .. }), "{error}");
    }
}

#[test]
fn the_templates_own_words_are_passed_on() {
    let error = error("{{ raise_exception('Only ' + messages[0].role + ' « deux » !') }}");
    assert!(matches!(&error, ModelError::ConversationRefused { reason } if reason == "Only user « deux » !"));
}

#[test]
fn what_is_not_there_is_named() {
    for (text, part) in [
        ("{{ strftime_now('%Q') }}", "strftime_now does not know the format `%Q`"),
        ("{{ messages | tojson(colour=1) }}", "colour"),
        ("{% include 'other' %}", "other"),
        ("{% call x() %}{% endcall %}", "x"),
    ] {
        let error = error(text).to_string();
        assert!(error.starts_with("chat template, line 1: ") && error.contains(part), "{text}: {error}");
    }
}

#[test]
fn a_time_is_that_of_now() {
    let template = ChatTemplate::new("{{ strftime_now('%Y') }}").unwrap();
    let year: u32 = template.render(&[], true).unwrap().parse().unwrap();
    assert!((2024..3000).contains(&year));
}
