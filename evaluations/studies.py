"""The studies, by name. ``quick`` ones show in minutes that all of it runs, and what is plain at once."""

from __future__ import annotations

import dataclasses

from evaluations.study import Study
from evaluations.tasks import formal_languages

# Rates up to 2 turn signs. Rates up to 0.001, all near it, without erase or decay add up: a counter.
FLIPS = {"memory_rate_max": 2.0}
COUNTS = {
    "memory_rate_max": 0.001,
    "memory_rate_bias": 4.0,
    "memory_retention_bias": 14.0,
    "memory_rule": {"erase": "none"},
}
RATES = [{"learning_rate": 5e-3}, {"learning_rate": 2e-3}]
STATES = [{"learning_rate": 5e-3, "options": options} for options in (FLIPS, COUNTS)]

FORMAL_LANGUAGES = Study(
    name="formal_languages",
    tasks=formal_languages.TASKS,
    shape={"width": 32, "layers": 1, "heads": 2},
    training={"steps": 1000, "batch_size": 32, "weight_decay": 0.0, "every": 100},
    settings={
        "hope": STATES,
        "titans": STATES,
        "gated_delta_net": [{"learning_rate": 5e-3}, {"learning_rate": 5e-3, "options": FLIPS}],
        "attention": RATES,
        "lstm": RATES,
        "hope_two_layer": STATES,
        "hope_attention": RATES,
    },
)

STUDIES = {study.name: study for study in (FORMAL_LANGUAGES,)}

QUICK = {
    "formal_languages": dataclasses.replace(
        FORMAL_LANGUAGES,
        name="formal_languages_quick",
        tasks={"parity": formal_languages.FormalLanguage},
        training={**FORMAL_LANGUAGES.training, "steps": 300},
        settings={name: FORMAL_LANGUAGES.settings[name][:1] for name in ("hope", "gated_delta_net", "lstm")},
        seeds=(0,),
    ),
}
