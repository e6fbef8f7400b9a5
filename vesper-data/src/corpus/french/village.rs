//! French plots at home: a sad friend, something to cook, a contest.

use super::super::template::Rule;

pub(super) const RULES: &[Rule] = &[
    // A friend who is sad, and a remedy that fits.
    ("sad", &["{sad_friend} {counsel} {remedy} {friend_glad}"]),
    (
        "sad_friend",
        &[
            "{time}, {son|leur} {friend?ami/amie} {friend.noun} pleurait {where} : « {cause.0}. »",
            "{time}, {il} trouv~a {son|leur} {friend?ami/amie} {friend.noun} en larmes {where} : « {cause.0}. »",
        ],
    ),
    ("sadly", &["tristement", "tout bas", "lentement", "enfin"]),
    (
        "cause",
        &[
            "J'ai cassé {thing.my} {thing_hue}@répar~a {thing.le} {slowly}",
            "J'ai perdu {thing.my} {thing_hue}@lui donn~a {thing.un} {thing_hue}",
            "J'ai peur de la nuit@lui donn~a une {size_f} lanterne {hue_f}",
            "J'ai froid@lui donn~a une {size_f} couverture {hue_f}",
            "Personne ne veut jouer@all~a jouer avec {friend?lui/elle} {where}",
            "Je ne sais pas lire@lui donn~a un {size_m} livre {hue_m}",
        ],
    ),
    (
        "thing_hue",
        &[
            "rouge",
            "{thing?bleu/bleue}",
            "{thing?vert/verte}",
            "jaune",
            "{thing?blanc/blanche}",
            "{thing?doré/dorée}",
            "rose",
            "{thing?noir/noire}",
            "{thing?gris/grise}",
        ],
    ),
    ("remedy", &["Alors {il} {cause.1}.", "Le lendemain, {il} {cause.1}."]),
    ("friend_glad", &["{friend.noun} {glad} et {glad_too}."]),
    ("glad", &["sourit", "rit", "chanta"]),
    ("glad_too", &["dansa {where}", "dit merci", "{lui|leur} donna {gift}"]),
    // Something to cook, an ingredient that is missing, a service for it.
    ("make", &["{make_wish} {missing} {meet} {make_talk} {service} {taste}"]),
    ("dish", &["m:gâteau", "f:tarte", "m:pain"]),
    // Columns 1 and 2: the ingredient after "de", and with its own article.
    (
        "fruit",
        &[
            "aux pommes@pommes@des pommes",
            "au miel@miel@du miel",
            "aux noix@noix@des noix",
            "aux poires@poires@des poires",
            "au fromage@fromage@du fromage",
        ],
    ),
    (
        "make_wish",
        &[
            "{time}, {S} voul~ut faire {dish.un} {fruit.0} pour {guests}.",
            "{time}, {S} voul~ut faire {dish.un} {fruit.0}. {weather.1}",
        ],
    ),
    ("guests", &["{rel.son}", "tout le monde"]),
    (
        "missing",
        &["Mais {il} n'av~ait plus de {fruit.1}.", "{^il} cherch~a {fruit.2} {where}, mais {nothing}."],
    ),
    (
        "make_talk",
        &[
            "« As-tu {fruit.2} ? » {asked_il}. « Oui, si {tu|vous} {task.0} {my_tool} ! »",
            "« Je {t'en donnerai|vous en donnerai} si {tu|vous} {task.0} {my_tool} », dit {helper.le}.",
        ],
    ),
    ("my_tool", &["{tool?mon/ma} {tool_pre} {tool.noun} {tool_hue}"]),
    (
        "task",
        &[
            "{répares|réparez}@répar~a",
            "{laves|lavez}@lav~a",
            "{trouves|trouvez}@trouv~a",
            "{portes|portez}@port~a",
        ],
    ),
    ("service", &["{^il} {tool?le/la} {task.1} {gladly}."]),
    ("gladly", &["aussitôt", "avec soin", "en chantant", "sans un mot", "en souriant"]),
    ("taste", &["{^dish.le} était {dish_good}, et tout le monde {asked}."]),
    ("asked", &["en redemanda", "applaudit", "rit", "chanta", "dansa"]),
    (
        "dish_good",
        &[
            "{dish?gros/grosse} comme {a_gear}",
            "très {dish?bon/bonne}",
            "encore {dish?chaud/chaude}",
            "un peu {dish?froid/froide}",
        ],
    ),
    // A contest, a fear, and some advice.
    ("contest_plot", &["{contest_news} {doubt} {counsel} {result}"]),
    (
        "contest",
        &[
            "f:course@courir",
            "m:concours de chant@chanter",
            "m:concours de danse@danser",
            "m:concours de dessin@dessiner",
        ],
    ),
    (
        "contest_news",
        &[
            "{time}, il y eut {contest.un} {where}.",
            "{time}, {S} entend~it parler {contest?d'un/d'une} {contest.noun}. {weather.1}",
        ],
    ),
    (
        "doubt",
        &[
            "{^S} voul~ait gagner {a_gear}, mais {il} ne sav~ait pas bien {contest.1}.",
            "{^S} voul~ait gagner {a_gear}, mais {il} av~ait peur {fear}.",
            "« {Je ne gagnerai|Nous ne gagnerons} jamais », {said} {sadly}.",
        ],
    ),
    ("fear", &["de perdre", "du bruit", "des autres", "de tomber"]),
    (
        "result",
        &[
            "Alors {il} {ready} et gagn~a {a_gear} !",
            "Alors {il} {ready} et ne gagn~a pas, mais {everybody}.",
        ],
    ),
    ("ready", &["ferm~a les yeux", "regard~a le ciel", "essay~a dix fois", "essay~a encore {where}"]),
    ("everybody", &["tout le monde applaudit", "tout le monde rit", "tout le monde chanta"]),
    (
        "tool",
        &[
            "m:bateau",
            "f:barrière",
            "m:chapeau",
            "f:lanterne",
            "m:tambour",
            "f:valise",
            "m:manteau",
            "f:veste",
            "m:panier",
            "f:boîte",
        ],
    ),
    (
        "tool_pre",
        &[
            "{tool?petit/petite}",
            "{tool?vieux/vieille}",
            "{tool?grand/grande}",
            "{tool?joli/jolie}",
            "{tool?beau/belle}",
            "{tool?gros/grosse}",
        ],
    ),
    (
        "tool_hue",
        &[
            "rouge",
            "{tool?bleu/bleue}",
            "{tool?vert/verte}",
            "jaune",
            "{tool?blanc/blanche}",
            "{tool?doré/dorée}",
            "rose",
            "{tool?noir/noire}",
        ],
    ),
];
