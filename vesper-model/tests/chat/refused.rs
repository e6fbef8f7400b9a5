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
    assert!(
        matches!(&error, ModelError::ConversationRefused { reason, .. } if reason == "Only user « deux » !")
    );
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
fn a_text_that_is_no_template_is_told_from_one() {
    for text in [
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{% set all = messages %}{{ all[0].content }}",
        "{% macro m() %}{{ messages[0].content }}{% endmacro %}{{ m() }}",
        "{% if messages[0].role == 'x' %}{% set messages = messages[1:] %}{% endif %}",
        "{{ raise_exception('no') if not messages }}",
    ] {
        assert!(ChatTemplate::new(text).unwrap().check().is_ok(), "{text}");
    }
    for text in ["", "Once upon a time there were messages.\n", "{{ message.content }}", "{# messages #}"] {
        let template = ChatTemplate::new(text).unwrap();
        assert_eq!(template.text(), text);
        let error = template.check().unwrap_err().to_string();
        assert!(error.starts_with("chat template: ") && error.contains("reads `messages`"), "{error}");
    }
}

#[test]
fn a_time_is_that_of_now() {
    let template = ChatTemplate::new("{{ strftime_now('%Y') }}").unwrap();
    let year: u32 = template.render(&[], true).unwrap().parse().unwrap();
    assert!((2024..3000).contains(&year));
}
