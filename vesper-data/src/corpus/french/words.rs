//! Who, where and when, and the sentences that every French story shares.

use super::super::template::Rule;

pub(super) const RULES: &[Rule] = &[
    ("start", &["{title}{opening} {habit}\n{plot.1}\n{end}"]),
    (
        "title",
        &[
            "70:",
            "Une histoire sur {who}.\n",
            "Une histoire sur {who} et {plot.0}.\n",
            "Raconte-moi l'histoire {of_who}.\n",
        ],
    ),
    (
        "plot",
        &[
            "12:{thing.un} {thing?perdu/perdue}@{lost}",
            "11:{goal.le} {goal_hue.0}@{see}",
            "10:{friend?un ami/une amie} triste@{sad}",
            "10:{dish.un} {fruit.0}@{make}",
            "9:une tempête@{storm}",
            "9:{contest.un}@{contest_plot}",
        ],
    ),
    // The hero.
    ("il", &["{il/elle|ils/elles}"]),
    // The hero and the helper together: feminine where both are.
    ("ils:m", &["ils"]),
    ("ils:f", &["{helper?ils/elles}"]),
    ("N:s", &["{name.noun}"]),
    ("N:p", &["{name.noun} et {name2.noun}"]),
    ("who:s", &["{N} {species.le}"]),
    ("who:p", &["les {pair.noun} {N}"]),
    ("of_who:s", &["{name.de} {species.le}"]),
    ("of_who:p", &["des {pair.noun} {N}"]),
    ("S", &["30:{il}", "12:{N}"]),
    ("name:m", &["Léo", "Hugo", "Paul", "Tom", "Émile", "Louis", "Oscar", "Félix"]),
    ("name:f", &["Mina", "Lina", "Alice", "Zoé", "Rose", "Nora", "Margot", "Élise"]),
    ("name2:m", &["Marcel", "Adam", "Victor"]),
    ("name2:f", &["Emma", "Jeanne", "Sara"]),
    ("friend", &["m:Nino", "f:Lola", "m:Bruno", "f:Bella", "m:Otto", "f:Perle"]),
    ("species:m", &["renard", "lapin", "ours", "chat", "écureuil", "hérisson", "loup", "poney", "lion"]),
    (
        "species:f",
        &["f:souris", "f:renarde", "f:lapine", "f:ourse", "f:chèvre", "f:marmotte", "f:biche", "f:louve"],
    ),
    ("pair:m", &["frères", "cousins", "voisins"]),
    ("pair:f", &["sœurs", "cousines", "voisines"]),
    // An adjective before the noun, then one after it. The first begins with a consonant: le, la, un, une.
    ("pre", &["petit~e", "jeune", "joli~e", "gentil~le", "grand~e", "brave"]),
    ("post", &["curi~eux", "timide~s", "rêv~eur", "honnête~s", "joy~eux", "sage~s", "rusé~e"]),
    ("trait", &["calme~s", "de bonne humeur", "poli~e", "en avance", "patient~e", "en retard", "content~e"]),
    (
        "opening:s",
        &[
            "Il était une fois {un/une} {pre.0} {species.noun} {post} qui s'appelait {N} et vivait {home}.",
            "Il était une fois, {home}, {un/une} {pre.0} {species.noun} {post} qui s'appelait {N}.",
            "{N} était {un/une} {pre.0} {species.noun} {post} qui vivait {home}.",
            "Il y a longtemps, {un/une} {pre.0} {species.noun} {post} nommé~e {N} vivait {home}.",
        ],
    ),
    (
        "opening:p",
        &[
            "Il était une fois deux {pair.noun} {post} qui s'appelaient {N} et vivaient {home}.",
            "Il était une fois, {home}, deux {pair.noun} {post} qui s'appelaient {N}.",
            "{N} étaient deux {pair.noun} {post} qui vivaient {home}.",
            "Il y a longtemps, deux {pair.noun} {post} nommé~e {N} vivaient {home}.",
        ],
    ),
    ("home", &["dans {home_noun} {where}"]),
    (
        "home_noun",
        &[
            "une {size_f} maison",
            "une {size_f} cabane",
            "une {size_f} ferme",
            "une {size_f} grotte",
            "un {size_m} chalet",
        ],
    ),
    // Places, things and colours: a few lists that every sentence draws on. Nouns that take "un", "le" or an
    // adjective before them begin with a consonant.
    ("where", &["{near}{a_place}"]),
    ("near", &["devant ", "près d'", "derrière ", "à côté d'", "non loin d'"]),
    ("a_place", &["un {place_m}", "une {place_f}"]),
    ("place_m", &["{size_m} {noun_m}", "{noun_m} {look_m}"]),
    ("place_f", &["{size_f} {noun_f}", "{noun_f} {look_f}"]),
    ("size_m", &["petit", "vieux", "grand", "joli", "beau", "gros", "drôle de"]),
    ("size_f", &["petite", "vieille", "grande", "jolie", "belle", "grosse", "drôle de"]),
    ("look_m", &["blanc", "vert", "gris", "sombre", "tranquille", "fleuri"]),
    ("look_f", &["blanche", "verte", "grise", "sombre", "tranquille", "fleurie"]),
    ("noun_m", &["moulin", "pont", "jardin", "puits", "mur", "rocher", "chêne"]),
    ("noun_f", &["fontaine", "tour", "grange", "colline", "barrière", "charrette", "statue"]),
    ("hue_m", &["rouge", "bleu", "vert", "jaune", "blanc", "doré", "rose", "noir", "gris"]),
    ("hue_f", &["rouge", "bleue", "verte", "jaune", "blanche", "dorée", "rose", "noire", "grise"]),
    ("hue_p", &["rouges", "bleus", "verts", "jaunes", "blancs", "dorés", "roses", "noirs", "gris"]),
    ("gear_m", &["chapeau", "manteau", "panier", "sac", "bâton", "coussin", "parapluie"]),
    ("gear_f", &["couverture", "lanterne", "valise", "veste", "boîte", "tasse"]),
    ("a_gear", &["un {size_m} {gear_m} {hue_m}", "une {size_f} {gear_f} {hue_f}"]),
    (
        "thing",
        &[
            "m:ballon",
            "f:clé",
            "m:tambour",
            "f:flûte",
            "m:bateau",
            "f:cloche",
            "m:livre",
            "f:montre",
            "m:cerf-volant",
            "f:couronne",
        ],
    ),
    // The colour of the thing that the story is about, remembered.
    ("food", &["du pain", "deux pommes", "du fromage", "du miel", "des noix", "trois poires", "un gâteau"]),
    (
        "act",
        &[
            "chanter", "danser", "lire", "dessiner", "jouer", "courir", "rêver", "marcher", "rire", "dormir",
            "peindre", "parler",
        ],
    ),
    (
        "habit",
        &[
            "Chaque {day}, {il} aim~ait {act} {where}.",
            "{^il} ét~ait toujours {trait} et aim~ait {act} {where}.",
            "{^il} aim~ait {act} avec {rel.son} {where}.",
            "{^il} ét~ait toujours {trait} et ne sort~ait jamais sans {a_gear}.",
        ],
    ),
    ("day", &["jour", "matin", "soir", "dimanche", "été", "après-midi", "semaine"]),
    ("rel", &["f:mère", "f:grand-mère", "m:père", "m:grand-père", "f:tante", "m:oncle"]),
    // When, and what the sky was like: drawn once, so that a day of rain stays one.
    ("time", &["Un {part} {weather.0}"]),
    ("part", &["matin", "jour", "après-midi", "soir"]),
    (
        "weather",
        &[
            "de printemps@L'air sentait les fleurs, et {life}.",
            "de pluie@La pluie tombait, et {life}.",
            "d'été@Le ciel était bleu, et {life}.",
            "de vent@Le vent soufflait, et {life}.",
            "de neige@La neige tombait, et {life}.",
            "d'hiver@L'herbe était blanche, et {life}.",
        ],
    ),
    ("life", &["{bells}", "un {animal_m} {hue_m} {slept} {where}", "une {animal_f} {hue_f} {slept} {where}"]),
    ("bells", &["tout était calme", "les cloches sonnaient", "il n'y avait personne", "quelqu'un chantait"]),
    ("animal_m", &["chien", "cheval", "canard"]),
    ("animal_f", &["poule", "vache", "oie"]),
    ("slept", &["dormait", "chantait", "attendait", "rêvait"]),
    // The helper. Each begins with a consonant, so that "un vieux" and "un gros" stand before it.
    (
        "helper",
        &[
            "m:hibou",
            "f:tortue",
            "m:castor",
            "f:bergère",
            "m:corbeau",
            "f:grenouille",
            "m:boulanger",
            "f:jardinière",
            "m:pêcheur",
            "f:cigogne",
        ],
    ),
    ("h_new", &["{helper?un/une} {h_adj} {helper.noun}"]),
    (
        "h_adj",
        &[
            "{helper?vieux/vieille}",
            "{helper?petit/petite}",
            "{helper?grand/grande}",
            "drôle de",
            "{helper?gros/grosse}",
            "{helper?gentil/gentille}",
            "jeune",
            "brave",
        ],
    ),
    (
        "meet",
        &[
            "{then}, {il} rencontr~a {h_new} avec {a_gear}.",
            "{then}, {h_new} arriva avec {a_gear}.",
            "{then}, {il} rencontr~a {h_new} {where}.",
        ],
    ),
    ("then", &["Soudain", "Un peu plus tard", "Alors", "Par chance", "Bientôt", "Non loin de là"]),
    (
        "advice",
        &[
            "À plusieurs, tout est facile",
            "Je sais ce qu'il faut faire",
            "{Prends ton|Prenez votre} temps",
            "Les petits pas mènent loin",
            "Deux têtes valent mieux qu'une",
            "Il y a toujours un chemin",
            "{Suis|Suivez}-moi",
            "{N'aie|N'ayez} pas peur",
        ],
    ),
    (
        "softly",
        &[
            "doucement",
            "gentiment",
            "lentement",
            "calmement",
            "aussitôt",
            "tout bas",
            "en souriant",
            "en riant",
        ],
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
            "{^S} remerci~a {helper.le} et lui donn~a {gift}.",
            "« Merci ! » d~it {N}, et {helper.le} reçut {gift}.",
        ],
    ),
    ("gift", &["{a_gear}", "{food} et {a_gear}", "une fleur {hue_f}"]),
    (
        "end_friends",
        &[
            "Depuis ce jour, {N} et {helper.le} vont {act} {where}.",
            "Chaque {day}, {N} et {helper.le} allaient {act} {where}.",
        ],
    ),
    (
        "end_home",
        &[
            "{^S} rentr~a {feeling}, avec {gift} pour {rel.son}.",
            "{N} rapport~a {gift} à la maison, {feeling}.",
        ],
    ),
    (
        "feeling",
        &[
            "le cœur léger",
            "sous les étoiles",
            "en chantant",
            "très content~e",
            "sans un mot",
            "de bonne humeur",
        ],
    ),
    ("end_night", &["Cette nuit-là, {il} rêv~a {dreams}.", "{^il} dorm~it {deeply} et rêv~a {dreams}."]),
    ("dream", &["poissons", "chevaux", "nuages", "moulins", "gâteaux"]),
    ("deeply", &["très bien", "longtemps", "jusqu'à midi", "près du feu", "sans bruit"]),
    ("end_last", &["{^il} av~ait appris {moral}."]),
    (
        "moral",
        &[
            "que l'amitié vaut mieux que l'or",
            "que les petits pas mènent loin",
            "qu'il faut demander de l'aide",
            "que deux têtes valent mieux qu'une",
            "que la gentillesse revient toujours",
            "qu'il y a toujours un chemin",
        ],
    ),
    ("said", &["{dit-il/dit-elle|dirent-ils/dirent-elles}"]),
    ("asked_il", &["{demanda-t-il/demanda-t-elle|demandèrent-ils/demandèrent-elles}"]),
    (
        "counsel",
        &[
            "{then}, {h_new} arriva avec {a_gear} : « {advice} ! »",
            "{then}, {h_new} apparut {where} et dit {softly} : « {advice}. »",
            "{then}, {il} rencontr~a {h_new} {where}. « {advice} », dit {helper.le} {softly}.",
        ],
    ),
    ("dreams", &["de {dream} {hue_p} et de {dream2} {hue_p}"]),
    ("dream2", &["bateaux", "cerfs-volants", "châteaux", "ballons"]),
];
