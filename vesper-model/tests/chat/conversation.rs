//! As much of a conversation as the context holds.

use vesper_model::ModelError;
use vesper_model::chat::{ChatTemplate, Conversation, Message, Role};

use crate::golden::{template, tokenizer};

/// One token a letter, and none for the template itself.
fn letters() -> ChatTemplate {
    ChatTemplate::new("{% for message in messages %}{{ message.content }}{% endfor %}").unwrap()
}

fn long() -> Conversation {
    let mut conversation = Conversation::new().with_system("SS");
    for (question, answer) in [("aaaa", "AAAA"), ("bbb", "BBB"), ("cc", "CC")] {
        conversation.push_user(question);
        conversation.push_assistant(answer);
    }
    conversation.push_user("dd");
    conversation
}

/// The text of the prompt and how many messages are left out.
fn prompt(conversation: &Conversation, context: usize, answer: usize) -> (String, usize) {
    let tokenizer = tokenizer();
    let prompt = conversation.prompt(&letters(), &tokenizer, context, answer).unwrap();
    (tokenizer.decode(&prompt.ids, false).unwrap(), prompt.dropped)
}

#[test]
fn the_oldest_exchanges_go_first_and_whole() {
    let conversation = long();
    let all = ("SSaaaaAAAAbbbBBBccCCdd".to_owned(), 0);
    for (context, answer, expected) in [
        (1000, 10, all.clone()),
        (32, 10, all),
        (31, 10, ("SSbbbBBBccCCdd".into(), 2)),
        (24, 10, ("SSbbbBBBccCCdd".into(), 2)),
        (23, 10, ("SSccCCdd".into(), 4)),
        (18, 10, ("SSccCCdd".into(), 4)),
        (17, 10, ("SSdd".into(), 6)),
        (14, 10, ("SSdd".into(), 6)),
        (5, 10, ("SSdd".into(), 6)), // the answer gets less room
        (5, usize::MAX, ("SSdd".into(), 6)),
    ] {
        assert_eq!(prompt(&conversation, context, answer), expected, "{context}, {answer}");
    }
    assert_eq!(conversation, long());
}

#[test]
fn a_system_prompt_among_the_messages_stays_too() {
    let mut conversation = Conversation::new();
    for message in long().messages() {
        conversation.push(message);
    }
    assert_eq!(conversation, long());
    assert_eq!(prompt(&conversation, 23, 10), ("SSccCCdd".into(), 4));
    // Another one, or one in the middle, is a message.
    let twice = Message::new(Role::System, "TT");
    conversation.push(twice.clone());
    assert_eq!(conversation.messages().last(), Some(&twice));
}

#[test]
fn as_little_as_possible_is_forgotten() {
    let mut conversation = Conversation::new();
    for i in 0..40 {
        conversation.push_user("x".repeat(i % 7 + 1));
        conversation.push_assistant("y".repeat(i % 5));
    }
    conversation.push_user("z");
    let lengths: Vec<usize> = conversation.messages().iter().map(|message| message.content.len()).collect();
    for context in 3..320 {
        let (text, dropped) = prompt(&conversation, context, 2);
        assert_eq!(text.len(), lengths[dropped..].iter().sum::<usize>());
        assert_eq!(dropped % 2, 0);
        assert!(text.len() + 2 <= context);
        // One exchange more would not have fitted.
        if dropped > 0 {
            assert!(text.len() + lengths[dropped - 2] + lengths[dropped - 1] + 2 > context);
        }
    }
}

#[test]
fn a_message_that_is_too_long_alone_is_an_error() {
    let conversation = long();
    for context in [0, 1, 4] {
        let error = conversation.prompt(&letters(), &tokenizer(), context, 1).unwrap_err();
        assert!(
            matches!(error, ModelError::MessageTooLong { got: 4, limit } if limit == context.saturating_sub(1)),
            "{error}"
        );
    }
    let error = conversation.prompt(&letters(), &tokenizer(), 4, 1).unwrap_err().to_string();
    assert_eq!(error, "the last message makes a prompt of 4 tokens, but the model reads at most 3");
}

#[test]
fn other_roles_stay_with_the_exchange_that_they_belong_to() {
    let mut conversation = Conversation::new();
    conversation.push_assistant("hello");
    conversation.push_user("a");
    conversation.push(Message::new(Role::from("tool"), "tt"));
    conversation.push_assistant("A");
    conversation.push_user("b");
    assert_eq!(prompt(&conversation, 11, 1), ("helloattAb".into(), 0));
    assert_eq!(prompt(&conversation, 10, 1), ("attAb".into(), 1));
    assert_eq!(prompt(&conversation, 5, 1), ("b".into(), 4));
    let nothing = Conversation::new();
    assert_eq!(prompt(&nothing, 2, 1), (String::new(), 0));
}

#[test]
fn the_tokenizer_adds_no_special_tokens_to_those_of_the_template() {
    let tokenizer = tokenizer();
    let bos = tokenizer.token_to_id("<s>").unwrap();
    let twice = tokenizer.encode("<s>x", true).unwrap();
    assert_eq!(twice.get_ids().iter().filter(|&&id| id == bos).count(), 2);
    let mut conversation = Conversation::new();
    conversation.push_user("Bonjour");
    let prompt = conversation.prompt(&template("gemma.jinja"), &tokenizer, 100, 1).unwrap();
    assert_eq!(prompt.ids.iter().filter(|&&id| id == bos).count(), 1);
    assert_eq!(prompt.ids[0], bos);
}

#[test]
fn a_template_that_has_no_place_for_the_system_prompt_says_so() {
    let mut conversation = Conversation::new().with_system("Be brief.");
    conversation.push_user("Bonjour");
    let error = conversation.prompt(&template("gemma.jinja"), &tokenizer(), 100, 1).unwrap_err();
    let expected = "gemma.jinja refuses this conversation: System role not supported";
    assert!(error.to_string().ends_with(expected), "{error}");
}

#[test]
fn messages_are_json_as_others_write_it() {
    let text = r#"[{"role":"system","content":"s"},{"role":"tool","content":"é"}]"#;
    let messages: Vec<Message> = serde_json::from_str(text).unwrap();
    assert_eq!(messages[0].role, Role::System);
    assert_eq!(messages[1].role, Role::Other("tool".into()));
    assert_eq!(serde_json::to_string(&messages).unwrap(), text);
}
