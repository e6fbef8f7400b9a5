//! English plots at home: a sad friend, something to cook, a contest.

use super::super::template::Rule;

pub(super) const RULES: &[Rule] = &[
    // A friend who is sad, and a remedy that fits.
    ("sad", &["{sad_friend} {counsel} {remedy} {friend_glad}"]),
    (
        "sad_friend",
        &[
            "{time}, {his} friend {friend.noun} was crying {where}: \"{cause.0}.\"",
            "{time}, {he} found {his} friend {friend.noun} in tears {where}: \"{cause.0}.\"",
        ],
    ),
    ("sadly", &["sadly", "softly", "slowly", "after a while"]),
    (
        "cause",
        &[
            "I have broken my {hue} {thing.noun}@mended the {thing.noun} {slowly}",
            "I have lost my {hue} {thing.noun}@gave {friend.him} a {hue} {thing.noun}",
            "I am afraid of the night@gave {friend.him} {a_look} {hue} lantern",
            "I am cold@gave {friend.him} {a_look} {hue} blanket",
            "Nobody wants to play@went to play with {friend.him} {where}",
            "I cannot read@read {a_look} {hue} book with {friend.him}",
        ],
    ),
    ("remedy", &["So {he} {cause.1}.", "The next {day}, {he} {cause.1}."]),
    ("friend_glad", &["{friend.noun} {glad} and {glad_too}."]),
    ("glad", &["smiled", "laughed", "sang"]),
    ("glad_too", &["danced {where}", "said thank you", "gave {him} {gift}"]),
    // Something to cook, an ingredient that is missing, a service for it.
    ("make", &["{make_wish} {missing} {meet} {make_talk} {service} {taste}"]),
    ("fruit", &["apple@apples", "honey@honey", "nut@nuts", "pear@pears", "cheese@cheese"]),
    ("dish", &["cake", "pie", "tart"]),
    (
        "make_wish",
        &[
            "{time}, {S} wanted to make {fruit.a} {dish.0} for {guests}.",
            "{time}, {S} wanted to make {fruit.a} {dish.0}. {weather.1}",
        ],
    ),
    ("guests", &["{his} {relative}", "everybody"]),
    ("missing", &["But {he} had no {fruit.1} left.", "{^he} looked for {fruit.1} {where}, but {nothing}."]),
    (
        "make_talk",
        &[
            "\"Do you have any {fruit.1}?\" {he} asked. \"Yes, if you {task.0} {my_gear}!\"",
            "\"I will give you some if you {task.0} {my_gear},\" said {helper.the}.",
        ],
    ),
    ("my_gear", &["my {look_tool} {tool_hue} {tool}"]),
    ("tool", &["gate", "boat", "hat", "umbrella", "wall", "drum", "basket", "lantern", "coat", "kite"]),
    ("task", &["mend@mended", "wash@washed", "paint@painted", "find@found"]),
    ("service", &["So {he} {task.1} it {gladly}."]),
    ("gladly", &["gladly", "at once", "slowly", "singing", "without a word", "with a smile"]),
    ("taste", &["The {dish.0} was {dish_good}, and everybody {asked}."]),
    ("asked", &["asked for more", "clapped", "laughed", "sang", "danced"]),
    ("dish_good", &["very good", "still warm", "as big as {a_gear}", "a little cold"]),
    // A contest, a fear, and some advice.
    ("contest_plot", &["{contest_news} {doubt} {counsel} {result}"]),
    ("contest", &["race@run", "singing contest@sing", "dancing contest@dance", "drawing contest@draw"]),
    (
        "contest_news",
        &["{time}, there was {contest.a} {where}.", "{time}, {S} heard about {contest.a}. {weather.1}"],
    ),
    (
        "doubt",
        &[
            "{^S} wanted to win {a_gear}, but {he} did not {contest.1} very well.",
            "{^S} wanted to win {a_gear}, but {he} {was} afraid of {fear}.",
            "\"{I|We} will never win,\" {he} said {sadly}.",
        ],
    ),
    ("fear", &["the noise", "the others", "falling", "everybody"]),
    ("result", &["So {he} {ready} and won {a_gear}!", "So {he} {ready} and did not win, but {everybody}."]),
    ("ready", &["closed {his} eyes", "looked at the sky", "tried ten times", "tried again {where}"]),
    ("everybody", &["everybody clapped", "everybody laughed", "everybody sang"]),
    ("look_tool", &["small", "old", "big", "pretty", "strange", "tiny"]),
    ("tool_hue", &["{hue}"]),
];
