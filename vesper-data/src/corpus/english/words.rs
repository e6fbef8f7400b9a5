//! Who, where and when, and the sentences that every English story shares.

use super::super::template::Rule;

pub(super) const RULES: &[Rule] = &[
    ("start", &["{title}{opening} {habit}\n{plot.1}\n{end}"]),
    (
        "title",
        &[
            "70:",
            "A story about {who}.\n",
            "A story about {who} and {plot.0}.\n",
            "Tell me a story about {who}.\n",
        ],
    ),
    (
        "plot",
        &[
            "12:a lost {thing.noun}@{lost}",
            "11:the {color.0} {goal.noun}@{see}",
            "10:a sad friend@{sad}",
            "10:{fruit.a} {dish.0}@{make}",
            "9:a storm@{storm}",
            "9:{contest.a}@{contest_plot}",
        ],
    ),
    // The hero.
    ("he", &["{he/she|they}"]),
    ("him", &["{him/her|them}"]),
    ("his", &["{his/her|their}"]),
    ("was", &["{was|were}"]),
    ("N:s", &["{name.noun}"]),
    ("N:p", &["{name.noun} and {name2.noun}"]),
    ("who:s", &["{N} the {species.noun}"]),
    ("who:p", &["the {pair.noun} {N}"]),
    ("S", &["30:{he}", "12:{N}"]),
    ("name:m", &["Tom", "Leo", "Max", "Sam", "Oscar", "Hugo", "Jack", "Felix"]),
    ("name:f", &["Mina", "Lucy", "Rose", "Anna", "Lily", "Nora", "Zoe", "Alice"]),
    ("name2:m", &["Louis", "Adam", "Paul"]),
    ("name2:f", &["Emma", "Jane", "Sara"]),
    ("friend", &["m:Pip", "f:Daisy", "m:Bruno", "f:Bella", "m:Otto", "f:Molly"]),
    (
        "species",
        &[
            "fox", "rabbit", "mouse", "bear", "cat", "squirrel", "hedgehog", "wolf", "pony", "lion", "puppy",
            "monkey",
        ],
    ),
    ("pair:m", &["brothers", "cousins", "friends"]),
    ("pair:f", &["sisters", "cousins", "friends"]),
    ("adj", &["little", "brave", "curious", "kind", "clever", "shy", "happy", "honest", "gentle", "funny"]),
    ("trait", &["polite", "patient", "happy", "busy", "friendly", "careful", "calm", "hungry"]),
    (
        "opening:s",
        &[
            "Once upon a time, there was {adj.a} {species.noun} named {N}, who lived {home}.",
            "Once upon a time, {adj.a} {species.noun} named {N} lived {home}.",
            "{N} was {adj.a} {species.noun} who lived {home}.",
            "Long ago, {adj.a} {species.noun} named {N} lived {home}.",
        ],
    ),
    (
        "opening:p",
        &[
            "Once upon a time, there were two {adj.noun} {pair.noun}, {N}, who lived {home}.",
            "Once upon a time, two {adj.noun} {pair.noun} named {N} lived {home}.",
            "{N} were two {adj.noun} {pair.noun} who lived {home}.",
            "Long ago, two {adj.noun} {pair.noun} named {N} lived {home}.",
        ],
    ),
    ("home", &["in {a_size} {home_noun} {where}"]),
    ("home_noun", &["house", "cottage", "cabin", "hut", "cave"]),
    // Places, things and colours: a few lists that every sentence draws on.
    ("where", &["{near} {a_size} {place}"]),
    ("near", &["near", "behind", "in front of", "beside", "not far from", "next to", "close to"]),
    (
        "a_size",
        &[
            "a small",
            "an old",
            "a big",
            "a white",
            "a quiet",
            "a strange",
            "a green",
            "a pretty",
            "a grey",
            "a dark",
            "a tiny",
            "a mossy",
            "a tall",
            "a lonely",
            "a sunny",
            "a silent",
            "a broken",
            "a crooked",
            "a narrow",
            "a wooden",
        ],
    ),
    (
        "size",
        &[
            "small", "old", "big", "white", "quiet", "strange", "green", "pretty", "grey", "dark", "tiny",
            "mossy", "tall", "lonely", "sunny", "silent", "broken", "crooked", "narrow", "wooden",
        ],
    ),
    (
        "place",
        &[
            "mill", "bridge", "tree", "fountain", "garden", "gate", "wall", "tower", "well", "rock", "barn",
            "pond", "hill", "cart", "stable", "meadow", "stream", "bench", "statue", "hedge", "orchard",
            "field", "shed", "path",
        ],
    ),
    (
        "hue",
        &[
            "red", "blue", "green", "yellow", "white", "golden", "pink", "black", "silver", "grey", "brown",
            "purple", "beige",
        ],
    ),
    // The colour that the story is about, remembered.
    ("color", &["red", "blue", "green", "golden", "white", "yellow", "silver", "pink"]),
    ("thing", &["ball", "kite", "key", "drum", "bell", "book", "boat", "ring", "flute", "crown"]),
    (
        "gear",
        &[
            "hat", "scarf", "bag", "coat", "umbrella", "basket", "lantern", "stick", "blanket", "box", "cup",
            "pillow", "apron", "bucket", "ribbon", "jacket", "bottle", "candle",
        ],
    ),
    ("a_gear", &["{a_look} {hue} {gear}"]),
    (
        "food",
        &[
            "some bread",
            "two apples",
            "some cheese",
            "some honey",
            "some nuts",
            "three pears",
            "a cake",
            "some soup",
            "some jam",
            "two carrots",
        ],
    ),
    (
        "act",
        &[
            "sing", "dance", "read", "draw", "play", "run", "dream", "walk", "laugh", "sleep", "paint",
            "rest", "talk", "think", "swim", "climb", "sew", "whistle", "fish", "knit",
        ],
    ),
    (
        "habit",
        &[
            "Every {day}, {he} liked to {act} {where}.",
            "{^he} {was} always {trait} and loved to {act} {where}.",
            "{^he} loved to {act} with {his} {relative} {where}.",
            "{^he} {was} always {trait} and never went out without {a_gear}.",
        ],
    ),
    ("day", &["day", "morning", "afternoon", "Sunday", "evening", "summer", "week"]),
    ("relative", &["mother", "grandmother", "father", "grandfather", "aunt", "uncle"]),
    // When, and what the sky was like: drawn once, so that a rainy morning stays rainy.
    ("time", &["One {weather.0} {part}"]),
    ("part", &["morning", "day", "afternoon", "evening"]),
    (
        "weather",
        &[
            "sunny@The sky was blue, and {life}.",
            "cold@The grass was white, and {life}.",
            "windy@The leaves were flying, and {life}.",
            "rainy@The rain was falling, and {life}.",
            "snowy@The snow was falling, and {life}.",
            "grey@The sky was dark, and {life}.",
        ],
    ),
    ("life", &["4:{bells}", "8:a {hue} {animal} {slept} {where}"]),
    (
        "bells",
        &["everything was quiet", "the bells were singing", "nobody was there", "somebody was singing"],
    ),
    (
        "slept",
        &[
            "was sleeping",
            "was singing",
            "was waiting",
            "was dreaming",
            "was eating",
            "was resting",
            "was playing",
            "was hiding",
        ],
    ),
    // The helper.
    (
        "helper",
        &[
            "owl",
            "f:tortoise",
            "shepherd",
            "crow",
            "f:gardener",
            "baker",
            "toad",
            "f:stork",
            "fisherman",
            "beaver",
        ],
    ),
    ("h_new", &["{h_adj} {helper.noun}"]),
    (
        "h_adj",
        &[
            "an old",
            "a wise",
            "a tall",
            "a big",
            "a friendly",
            "a sleepy",
            "a funny",
            "a very small",
            "a very quiet",
        ],
    ),
    (
        "meet",
        &[
            "{then} {he} met {h_new} with {a_gear}.",
            "{then} {h_new} came by with {a_gear}.",
            "{then} {he} met {h_new} {where}.",
        ],
    ),
    ("then", &["Then", "Suddenly", "Soon", "Luckily,", "Just then,", "A little later,"]),
    (
        "advice",
        &[
            "We can do it together",
            "I know what to do",
            "Take your time",
            "Small steps lead far",
            "Two heads are better than one",
            "Never give up",
            "Be brave",
            "Follow me",
        ],
    ),
    (
        "softly",
        &["softly", "kindly", "slowly", "gently", "calmly", "at once", "with a smile", "after a while"],
    ),
    // Endings.
    (
        "end",
        &[
            "{end_thanks} {end_night}",
            "{end_home} {end_night}",
            "{end_friends} {end_last}",
            "{end_thanks} {end_last}",
            "{end_home} {end_last}",
        ],
    ),
    (
        "end_thanks",
        &[
            "{^S} thanked {helper.the} and gave {helper.him} {gift}.",
            "\"Thank you!\" said {N}, and {helper.the} received {gift}.",
        ],
    ),
    ("gift", &["{a_gear}", "{food} and {a_gear}", "a {hue} flower"]),
    (
        "end_friends",
        &[
            "Every {day}, {N} and {helper.the} went to {act} {where}.",
            "{N} and {helper.the} became friends and went to {act} {where}.",
        ],
    ),
    (
        "end_home",
        &[
            "{^S} came home {feeling}, with {gift} for {his} {relative}.",
            "{N} brought {gift} home, {feeling}.",
        ],
    ),
    (
        "feeling",
        &[
            "tired but happy",
            "with a light heart",
            "under the stars",
            "singing",
            "very proud",
            "without a word",
        ],
    ),
    (
        "end_night",
        &["That night, {he} dreamed of {dreams}.", "{^he} slept {deeply} and dreamed of {dreams}."],
    ),
    ("dream", &["stars", "horses", "birds", "flowers", "castles"]),
    ("deeply", &["well", "until noon", "with a smile", "by the fire", "for a long time"]),
    ("end_last", &["{^he} had learned that {moral}."]),
    (
        "moral",
        &[
            "a friend is better than gold",
            "small steps lead far",
            "it is good to ask for help",
            "two heads are better than one",
            "kindness always comes back",
            "a small idea can do big things",
        ],
    ),
    ("a_look", &["a small", "an old", "a big", "a pretty", "a strange", "a tiny", "a soft"]),
    ("animal", &["dog", "bird", "horse", "goat", "hen"]),
    (
        "counsel",
        &[
            "{then} {h_new} came by with {a_gear}: \"{advice}!\"",
            "{then} {h_new} appeared {where} and said {softly}: \"{advice}.\"",
            "{then} {he} met {h_new} {where}. \"{advice},\" said {helper.the} {softly}.",
        ],
    ),
    ("dreams", &["{hue} {dream} and {hue} {dream2}"]),
    ("dream2", &["whales", "boats", "clouds", "kites", "balls"]),
];
