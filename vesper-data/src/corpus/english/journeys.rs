//! English plots away from home: a lost object, a place to see, a storm.

use super::super::template::Rule;

pub(super) const RULES: &[Rule] = &[
    // A lost object, found where the helper said.
    ("lost", &["{loss} {look} {meet} {lost_talk} {found}"]),
    (
        "loss",
        &[
            "{time}, {S} lost {his} {hue} {thing.noun} {where}.",
            "{time}, {S} could not find {his} {hue} {thing.noun}. {weather.1}",
            "But one {part}, {his} {hue} {thing.noun} was gone, and {he} {was} {upset}.",
        ],
    ),
    ("upset", &["very sad", "very worried", "angry", "upset", "very tired"]),
    (
        "look",
        &[
            "{^he} looked {where} and {where}, but {nothing}.",
            "{^he} looked {look_home}, then {where}, but {nothing}.",
        ],
    ),
    (
        "look_home",
        &["under the bed", "behind the door", "on the roof", "in every box", "in the garden", "everywhere"],
    ),
    ("nothing", &["{he} found nothing", "it was no use", "nobody could help {him}"]),
    (
        "lost_talk",
        &[
            "\"Have you seen {thing.my}?\" {he} asked. \"{reply} {hide}!\"",
            "\"{I|We} have lost {thing.my},\" {he} said {sadly}. \"{reply} {hide}!\"",
        ],
    ),
    ("hide", &["{near} the {size} {place}"]),
    (
        "found",
        &[
            "{^he} went there {quickly} and found it, {state}!",
            "{^he} looked there {quickly}: it was {state}!",
        ],
    ),
    ("quickly", &["at once", "quickly", "with {helper.the}", "without a word", "slowly", "singing"]),
    (
        "state",
        &[
            "all wet",
            "as good as new",
            "a little dirty",
            "full of sand",
            "safe and sound",
            "under the leaves",
        ],
    ),
    // A place to see, and an obstacle on the way.
    ("see", &["{wish} {leave} {blocked} {counsel} {obstacle.1} {arrive}"]),
    (
        "goal",
        &[
            "sea@The waves were {sea}.",
            "castle@Its towers {castle}.",
            "lake@The water was full of {lake}.",
            "city@The windows {city}.",
            "island@The birds were {sea}.",
            "mountain@The snow {city}.",
        ],
    ),
    ("sea", &["singing", "dancing", "sleeping"]),
    ("castle", &["touched the clouds", "touched the stars"]),
    ("city", &["shone like stars", "shone like gold"]),
    ("lake", &["stars", "fish", "clouds"]),
    (
        "wish",
        &[
            "{^he} dreamed of seeing the {color.0} {goal.noun}.",
            "{^he} wanted to see the {color.0} {goal.noun}.",
            "{^he} thought about the {color.0} {goal.noun} every {day}.",
        ],
    ),
    (
        "leave",
        &[
            "{time}, {he} took {food} and {a_gear} and set off.",
            "{time}, {he} set off with {a_gear}. {weather.1}",
        ],
    ),
    ("blocked", &["But {where}, {obstacle.0}."]),
    (
        "obstacle",
        &[
            "a {wide} river blocked the road@{river}",
            "a {wide} fog covered the road@{fog}",
            "a {wide} gate blocked the road@{gate}",
            "a {wide} wind began to blow@{wind}",
            "a {wide} night began to fall@{night}",
            "a {wide} tree blocked the road@{tree}",
        ],
    ),
    ("river", &["They built {a_new} boat.", "They crossed it on {hue} stones."]),
    ("fog", &["They walked {slowly} through the fog.", "They followed {a_hue_animal}."]),
    ("tree", &["They climbed over it {slowly}."]),
    ("gate", &["They opened it with {a_size} key.", "They climbed over it {slowly}."]),
    ("wind", &["They waited {where}.", "They walked {slowly} through the wind."]),
    ("night", &["They made a fire {where}.", "They lit a {hue} lantern."]),
    ("slowly", &["slowly", "hand in hand", "without a word", "singing", "step by step"]),
    (
        "arrive",
        &["{at_last}, {he} saw the {goal.noun}. {goal.1}", "{at_last}, the {goal.noun} was there. {goal.1}"],
    ),
    ("at_last", &["At last", "The next day", "Soon", "In the evening", "Two days later"]),
    // A storm, and somebody at the door.
    ("storm", &["{storm_comes} {knock} {storm_talk} {care} {repair}"]),
    (
        "storm_comes",
        &[
            "One {night_time}, a {terrible} storm came, and {storm_detail}.",
            "One {night_time}, {S} heard a {terrible} storm: {storm_detail}.",
        ],
    ),
    ("night_time", &["night", "winter night", "evening", "summer evening"]),
    ("terrible", &["terrible", "big", "great", "wild", "strange"]),
    (
        "storm_detail",
        &[
            "the wind was singing",
            "the rain was falling like stones",
            "the house was dancing",
            "{a_gear} flew past the window",
        ],
    ),
    (
        "knock",
        &[
            "Somebody knocked: it was {h_new} with {a_gear}, {knock_state}.",
            "Outside, {he} saw {h_new} with {a_gear}, {knock_state}.",
        ],
    ),
    ("knock_state", &["all wet", "very cold", "very tired", "without a coat"]),
    ("storm_talk", &["\"{come_in}!\" {he} said {softly}."]),
    ("come_in", &["Come and sit by the fire", "You must be hungry", "Come in", "Do not be afraid"]),
    ("care", &["{^he} gave {helper.him} {a_gear} and {food}, and they {passed} {until}."]),
    ("passed", &["sang", "laughed", "talked", "danced"]),
    (
        "repair",
        &[
            "In the morning, they built {a_new} {building} {where}.",
            "The next day, they went to {act} {where}.",
        ],
    ),
    ("wide", &["dark", "great", "strange", "terrible", "wild"]),
    ("a_hue_animal", &["a {hue} {animal}"]),
    ("until", &["all night long", "for a long time", "by the fire"]),
    ("a_new", &["a small", "a big", "a white", "a green", "a pretty", "a strange", "a red"]),
    ("reply", &["Look", "Go and look", "I saw it", "It is"]),
    ("building", &["mill", "bridge", "tower", "wall", "gate", "barn"]),
];
