//! French plots away from home: a lost object, a place to see, a storm.

use super::super::template::Rule;

pub(super) const RULES: &[Rule] = &[
    // A lost object, found where the helper said.
    ("lost", &["{loss} {look} {meet} {lost_talk} {found}"]),
    (
        "loss",
        &[
            "{time}, {S} perd~it {thing.son} {thing_hue} {where}.",
            "{time}, {S} ne trouv~a plus {thing.son} {thing_hue}. {weather.1}",
            "Mais un {part}, {thing.son} {thing_hue} disparut, et {il} f~ut {upset}.",
        ],
    ),
    ("upset", &["très triste{|s}", "en colère", "au désespoir"]),
    (
        "look",
        &[
            "{^il} cherch~a {where} et {where}, mais {nothing}.",
            "{^il} cherch~a {look_home}, puis {where}, mais {nothing}.",
        ],
    ),
    (
        "look_home",
        &[
            "sous le lit",
            "derrière la porte",
            "sur le toit",
            "dans chaque boîte",
            "dans le jardin",
            "partout",
        ],
    ),
    ("nothing", &["sans succès", "{il} ne trouv~a rien", "personne ne put {l'|les }aider"]),
    (
        "lost_talk",
        &[
            "« As-tu vu {thing.mon} ? » {asked_il}. « {reply} {hide} ! »",
            "« {J'ai|Nous avons} perdu {thing.mon} », {said} {sadly}. « {reply} {hide} ! »",
        ],
    ),
    (
        "hide",
        &[
            "derrière {the_place}",
            "près {of_place}",
            "devant {the_place}",
            "à côté {of_place}",
            "non loin {of_place}",
        ],
    ),
    (
        "found",
        &[
            "{^il} y all~a {quickly} et {thing?le/la} trouv~a, {state} !",
            "{^il} y all~a {quickly} : {thing.il} était là, {state} !",
        ],
    ),
    ("quickly", &["aussitôt", "avec {helper.le}", "sans un mot", "lentement", "en chantant"]),
    (
        "state",
        &[
            "{thing?tout mouillé/toute mouillée}",
            "sous les feuilles",
            "comme {thing?neuf/neuve}",
            "un peu sale",
            "{thing?plein/pleine} de sable",
        ],
    ),
    // A place to see, and an obstacle on the way.
    ("see", &["{wish} {leave} {blocked} {counsel} {obstacle.1} {arrive}"]),
    (
        "goal",
        &[
            "f:mer@Les vagues {sea}.",
            "m:château@Ses tours {castle}.",
            "m:lac@L'eau était pleine {lake}.",
            "f:ville@Les fenêtres {city}.",
            "f:île@Les oiseaux {sea}.",
            "f:montagne@Les pierres {city}.",
        ],
    ),
    (
        "goal_hue",
        &[
            "rouge",
            "{goal?bleu/bleue}",
            "{goal?vert/verte}",
            "{goal?doré/dorée}",
            "{goal?blanc/blanche}",
            "jaune",
            "rose",
            "{goal?noir/noire}",
        ],
    ),
    ("sea", &["chantaient", "dansaient", "dormaient"]),
    ("castle", &["touchaient les nuages", "touchaient les étoiles"]),
    ("city", &["brillaient comme des étoiles", "brillaient comme de l'or"]),
    ("lake", &["d'étoiles", "de poissons", "de nuages"]),
    (
        "wish",
        &[
            "{^il} rêv~ait de voir {goal.le} {goal_hue.0}.",
            "{^il} voul~ait voir {goal.le} {goal_hue.0}.",
            "{^il} pens~ait {goal.au} {goal_hue.0} chaque {day}.",
        ],
    ),
    (
        "leave",
        &[
            "{time}, {il} pr~it {food} et {a_gear} et se m~it en route.",
            "{time}, {il} part~it avec {a_gear}. {weather.1}",
        ],
    ),
    ("blocked", &["Mais {where}, {obstacle.0}."]),
    (
        "obstacle",
        &[
            "une {wide_f} rivière barrait la route@{river}",
            "un {wide_m} brouillard tomba sur la route@{fog}",
            "une {wide_f} grille barrait la route@{gate}",
            "un {wide_m} vent se leva@{wind}",
            "une {wide_f} nuit tomba sur la route@{night}",
            "un {wide_m} tronc barrait la route@{tree}",
        ],
    ),
    ("wide_f", &["grande", "terrible", "longue", "sombre", "étrange", "drôle de"]),
    ("wide_m", &["grand", "terrible", "long", "sombre", "étrange", "drôle de"]),
    ("river", &["{^ils} construisirent un {new_m} bateau.", "{^ils} passèrent sur des pierres {hue_fp}."]),
    ("fog", &["{^ils} marchèrent {slowly} dans le brouillard.", "{^ils} suivirent un {animal_m} {hue_m}."]),
    ("tree", &["{^ils} passèrent dessus {slowly}."]),
    ("gate", &["{^ils} l'ouvrirent avec une {size_f} clé.", "{^ils} passèrent dessous {slowly}."]),
    ("wind", &["{^ils} attendirent {where}.", "{^ils} marchèrent {slowly} contre le vent."]),
    ("night", &["{^ils} firent un feu {where}.", "{^ils} allumèrent une lanterne {hue_f}."]),
    ("slowly", &["lentement", "main dans la main", "sans un mot", "en chantant", "pas à pas"]),
    ("arrive", &["{at_last}, {il} v~it {goal.le}. {goal.1}", "{at_last}, {goal.le} était là. {goal.1}"]),
    ("at_last", &["Enfin", "Le lendemain", "Bientôt", "Le soir", "Deux jours plus tard"]),
    // A storm, and somebody at the door.
    ("storm", &["{storm_comes} {knock} {storm_talk} {care} {repair}"]),
    (
        "storm_comes",
        &[
            "{night_time}, une {terrible} tempête arriva, et {storm_detail}.",
            "{night_time}, {S} entend~it une {terrible} tempête : {storm_detail}.",
        ],
    ),
    ("night_time", &["Une nuit", "Une nuit d'hiver", "Un soir", "Un soir d'été"]),
    ("terrible", &["terrible", "grosse", "grande", "longue"]),
    (
        "storm_detail",
        &[
            "le vent chantait",
            "la pluie tombait comme des pierres",
            "la maison dansait",
            "{a_gear} passa devant la fenêtre",
        ],
    ),
    (
        "knock",
        &[
            "Quelqu'un frappa : c'était {h_new} avec {a_gear}, {knock_state}.",
            "Dehors, {il} v~it {h_new} avec {a_gear}, {knock_state}.",
        ],
    ),
    (
        "knock_state",
        &["{helper?tout mouillé/toute mouillée}", "très {helper?fatigué/fatiguée}", "sans manteau"],
    ),
    ("storm_talk", &["« {come_in} ! » {said} {softly}."]),
    ("come_in", &["Viens près du feu", "Tu dois avoir faim", "Entre vite", "N'aie pas peur"]),
    ("care", &["{^il} lui donn~a {a_gear} et {food}, et {ils} {passed} {until}."]),
    ("until", &["toute la nuit", "longtemps", "près du feu"]),
    ("passed", &["chantèrent", "rirent", "parlèrent", "dansèrent"]),
    (
        "repair",
        &[
            "Au matin, {ils} construisirent {a_building} {where}.",
            "Le lendemain, {ils} allèrent {act} {where}.",
        ],
    ),
    ("hue_fp", &["rouges", "jaunes", "roses", "sombres"]),
    ("the_place", &["le {place_m}", "la {place_f}"]),
    ("of_place", &["du {place_m}", "de la {place_f}"]),
    (
        "reply",
        &["{Regarde|Regardez}", "{Va|Allez} voir", "Je {thing?l'ai vu/l'ai vue}", "{thing?Il/Elle} est"],
    ),
    ("a_building", &["un {new_m} {building_m}", "une {new_f} {building_f}"]),
    ("new_m", &["petit", "grand", "joli", "beau", "gros", "drôle de"]),
    ("new_f", &["petite", "grande", "jolie", "belle", "grosse", "drôle de"]),
    ("building_m", &["moulin", "pont", "mur"]),
    ("building_f", &["tour", "grange", "barrière"]),
];
