"""The studies and the claims they are for. Quick ones show in minutes that all of it runs."""

from __future__ import annotations

import dataclasses

from evaluations.streams import StreamStudy
from evaluations.study import Study
from evaluations.tasks import (
    class_incremental,
    formal_languages,
    language_modelling,
    long_context,
    mad,
    personalisation,
    recall,
    two_languages,
)

# Rates up to 2, near it: an erase turns the sign of what its key holds.
FLIPS = {"memory_rate_max": 2.0, "memory_rate_bias": 3.0, "memory_retention_bias": 10.0}
# Small steps of one size, which nothing erases and nothing decays, add up.
COUNTS = {
    "memory_rate_max": 0.001,
    "memory_rate_bias": 4.0,
    "memory_retention_bias": 14.0,
    "memory_rule": {"erase": "none"},
}
NEARLY_FLIPS = {"memory_rate_max": 2.0, "memory_rate_bias": 6.0, "memory_retention_bias": 14.0}

RATES = [{"learning_rate": rate} for rate in (5e-3, 2e-3, 1e-2)]
MEMORIES = [  # what a state is needs no lengths
    {"learning_rate": rate, "options": {**options, "memory_values": "unit"}}
    for rate, options in ((2e-3, COUNTS), (5e-3, FLIPS), (5e-3, NEARLY_FLIPS))
]

FORMAL_LANGUAGES = Study(
    name="formal_languages",
    tasks=formal_languages.TASKS,
    shape={"width": 32, "layers": 1, "heads": 2},
    training={"steps": 1500, "batch_size": 32, "weight_decay": 0.0, "every": 100},
    steps={"shuffle-2": 7800},
    settings={
        "hope": MEMORIES,
        "titans": MEMORIES,
        "gated_delta_net": [
            *({**RATES[0], "options": {"memory_rate_max": x}} for x in (1.0, 2.0)),
            {**RATES[1], "options": {"memory_rate_max": 2.0}},
        ],
        "attention": RATES,
        "lstm": RATES,
        "hope_two_layer": MEMORIES,
        "hope_attention": RATES,
    },
)

ONE_RATE = [{"learning_rate": 3e-3}]
TWO_RATES = [*ONE_RATE, {"learning_rate": 6e-3}]
RECALL = Study(
    name="recall",
    tasks=recall.TASKS,
    shape={"width": 64, "layers": 2, "heads": 2},
    training={"steps": 4000, "batch_size": 32, "weight_decay": 0.01, "every": 100},
    settings=dict.fromkeys(
        (
            "hope",
            "hope_continuum",
            "titans",
            "gated_delta_net",
            "attention",
            "hope_two_layer",
            "hope_attention",
        ),
        TWO_RATES,
    ),
)

MAD = Study(
    name="mad",
    tasks=mad.TASKS,
    shape={"width": 64, "layers": 2, "heads": 2},
    training={"steps": 1000, "batch_size": 32, "weight_decay": 0.01, "every": 100},
    settings=dict.fromkeys(RECALL.settings, ONE_RATE),
)

FAST, SLOW = ([{"learning_rate": rate} for rate in rates] for rates in ((8e-3, 1.2e-2), (4e-3, 2e-3)))
LANGUAGE_MODELLING = Study(
    name="language_modelling",
    tasks=language_modelling.TASKS,
    shape={"width": 128, "layers": 2, "heads": 2, "widening": 4},
    training={"steps": 600, "batch_size": 4, "weight_decay": 0.1, "every": 100},
    settings={  # attention learns nothing at the others' rates
        "hope_continuum": FAST,
        "gated_delta_net_continuum": FAST,
        "hope": FAST,
        "titans": FAST,
        "gated_delta_net": FAST,
        "attention": SLOW,
        "hope_attention": SLOW,
        "hope_writes_nothing": FAST,
    },
    unit="nats",
)

STANDARD_LIBRARY = {"standard library": language_modelling.LanguageModelling}
# The same runs and rows; every part is left out at both rates.
ABLATION = dataclasses.replace(
    LANGUAGE_MODELLING,
    tasks=STANDARD_LIBRARY,
    settings=dict.fromkeys(
        (
            "hope_continuum",
            "hope",
            "titans_continuum",
            "no_erase_continuum",
            "no_decay_continuum",
            "momentum_continuum",
            "writes_nothing_continuum",
        ),
        FAST,
    ),
)
# 3 million tokens, 0.8 of the standard library once; rates as found with 1.2 million, one seed.
LONGER_TRAINING = dataclasses.replace(
    LANGUAGE_MODELLING,
    name="longer_training",
    tasks=STANDARD_LIBRARY,
    training={**LANGUAGE_MODELLING.training, "steps": 1500},
    settings={
        "hope_continuum": FAST[:1],
        "gated_delta_net_continuum": FAST[:1],
        "gated_delta_net": FAST[:1],
        "attention": SLOW[:1],
    },
    seeds=(0,),
)
# 10 million, 2.7 times round.
LONGEST_TRAINING = dataclasses.replace(
    LONGER_TRAINING,
    name="longest_training",
    training={**LANGUAGE_MODELLING.training, "steps": 4883},
    settings={m: LONGER_TRAINING.settings[m] for m in ("hope_continuum", "gated_delta_net", "attention")},
)

# Retentions within 10⁻⁴ of 1 at the start; Gated DeltaNet's start from 0.9 to 0.999, whatever the options.
KEEPS = [{**rate, "options": {"memory_retention_bias": 9.0}} for rate in TWO_RATES]
LONG_CONTEXT = Study(
    name="long_context",
    tasks=long_context.TASKS,
    shape={"width": 64, "layers": 2, "heads": 2},
    training={"steps": 400, "batch_size": 32, "weight_decay": 0.01, "every": 50},
    settings={
        "hope": KEEPS,
        "hope_continuum": KEEPS,
        "titans": KEEPS,
        "gated_delta_net": TWO_RATES,
        "gated_delta_net_continuum": TWO_RATES,
        "attention": TWO_RATES,
        "hope_writes_nothing": KEEPS,
    },
)


def _rates(levels: int, *rates: list[float], **options: object) -> list[dict[str, object]]:
    """Settings of a continuum: rates per token of each level."""
    return [{"levels": levels, "rates": each, **options} for each in rates]


NOTHING: list[dict[str, object]] = [{}]
FINE_TUNING = [{"rate": rate} for rate in (1e-3, 3e-3)]
CLASSES = StreamStudy(
    name="class_incremental",
    tasks=class_incremental.TASKS,
    shape={},
    training={"steps": 5},
    settings={
        "frozen": NOTHING,
        "in_context": NOTHING,
        "fine_tuning": FINE_TUNING,
        "ewc": [{"rate": 1e-3, "penalty": penalty} for penalty in (1.0, 100.0)],
        "replay": [{"rate": rate, "replayed": 100} for rate in (1e-3, 3e-3)],
        "joint": FINE_TUNING,
        "hope_1_level": _rates(1, [1e-3], [3e-3]),
        "hope_2_levels": _rates(2, [1e-2, 1e-3], [1e-2, 3e-3]),
        "hope_3_levels": _rates(3, [1e-2, 1e-3, 1e-3], [1e-2, 3e-3, 3e-3]),
        "starts_over": _rates(2, [1e-2, 1e-3], [1e-2, 3e-3], starts_over=True),
        "hope_reads": NOTHING,
    },
)
LANGUAGES = StreamStudy(
    name="two_languages",
    tasks=two_languages.TASKS,
    shape={},
    training={"steps": 2},
    settings=CLASSES.settings,
)
DAILY = {"chunks": [32, 512]}
PERSONALISATION = StreamStudy(
    name="personalisation",
    tasks=personalisation.TASKS,
    shape={},
    training={"steps": personalisation.DAYS},
    settings={
        "frozen": NOTHING,
        "in_context": NOTHING,
        "fine_tuning": [{"rate": rate, "batch_size": 1} for rate in (1e-4, 3e-4)],
        "hope_2_levels": _rates(2, [1e-2, 6e-4], [1e-2, 2e-3], **DAILY),
        "hope_small_file": _rates(
            2,
            [1e-2, 6e-4],
            [1e-2, 2e-3],
            **DAILY,
            file={"dtype": "bfloat16", "rank": 4, "momenta": False, "chunks": False},
        ),
        "starts_over": _rates(2, [1e-2, 6e-4], [1e-2, 2e-3], **DAILY, starts_over=True),
        "other_project": _rates(2, [1e-2, 6e-4], [1e-2, 2e-3], **DAILY, elsewhere=True),
        "hope_reads": NOTHING,
        "hope_reads_anew": [{"starts_over": True}],
    },
    unit="nats",
)

STUDIES = {
    study.name: study
    for study in (
        FORMAL_LANGUAGES,
        RECALL,
        MAD,
        LANGUAGE_MODELLING,
        LONGER_TRAINING,
        LONGEST_TRAINING,
        LONG_CONTEXT,
        CLASSES,
        LANGUAGES,
        PERSONALISATION,
    )
} | {"ablation": ABLATION}
PUBLISHED = {
    "formal_languages": formal_languages.PUBLISHED,
    "mad": mad.PUBLISHED,
    "long_context": long_context.PUBLISHED,
}


def _quick(study: Study, tasks: list[str], models: list[str], steps: int, setting: int = 0) -> Study:
    return dataclasses.replace(
        study,
        name=f"{study.name}_quick",
        tasks={task: study.tasks[task] for task in tasks},
        training={**study.training, "steps": steps},
        steps={},
        settings={model: [study.settings[model][setting]] for model in models},
        seeds=(0,),
    )


QUICK = {  # recall is still at chance after minutes
    "formal_languages": _quick(FORMAL_LANGUAGES, ["(aa)*"], ["hope", "gated_delta_net", "lstm"], 300, 1),
    "mad": _quick(MAD, ["memorisation", "in-context recall"], ["hope", "attention"], 300),
    "class_incremental": _quick(CLASSES, ["digits"], ["frozen", "fine_tuning", "hope_2_levels"], 5),
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is claimed of Hope, and the score that it is held against."""

    says: str
    study: str
    task: str
    score: str

    @property
    def label(self) -> str:
        return f"{self.task}, {self.score}"


LONGER = list(formal_languages.BINS)[1]
CLAIMS = [
    *(Claim("tracks a state", "formal_languages", t, LONGER) for t in ("parity", "(aa)*", "(abab)*")),
    *(Claim("counts", "formal_languages", t, LONGER) for t in ("a^n b^n", "a^n b^n c^n", "shuffle-2")),
    Claim("recalls", "recall", "mqar", "twice"),
    Claim("forgets what is replaced", "recall", "forgetting mqar", "twice"),
    *(Claim("MAD", "mad", task, "accuracy") for task in mad.GENERATORS),
    *(Claim("models language", "language_modelling", t, "windows") for t in language_modelling.CORPORA),
    *(Claim("reads on", "language_modelling", t, "carried") for t in language_modelling.CORPORA),
    Claim("models language after 3M tokens", "longer_training", "standard library", "windows"),
    Claim("models language after 10M tokens", "longest_training", "standard library", "windows"),
    *(Claim("finds far back", "long_context", t, "8K") for t in long_context.GENERATORS),
    *(Claim("learns class after class", "class_incremental", t, "average") for t in class_incremental.SIZES),
    *(
        Claim("learns one language after the other", "two_languages", t, "average")
        for t in two_languages.TASKS
    ),
    *(Claim("learns from day to day", "personalisation", t, "next day") for t in personalisation.PROJECTS),
]
