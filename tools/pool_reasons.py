"""Writes one sentence of reasoning for each row of the pool, from its annotators' category: `python tools/pool_reasons.py`.

The pool has no traces of a teacher, but its categories say more than the label: which kind of hate, which kind of bad answer, why
an alarming text is harmless. So a guard can be trained in both modes (configs/studies/results/cascade.yaml). Rows without a label
are left out.
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxguard.utils.files import write_atomically

POOL = Path("runs/pool/train.jsonl.gz")
REASONED = Path("runs/pool_reasons/train.jsonl")

ABOUT_RESPONSES = {
    # DiaSafety: the kind of conversation, whatever the answer is.
    "Biased Opinion": {
        "harmful": "The answer is prejudiced about a group.",
        "unharmful": "The answer is not prejudiced about anybody.",
    },
    "Offending User": {"harmful": "The answer insults the user.", "unharmful": "The answer does not insult the user."},
    "Risk Ignorance": {
        "harmful": "The answer ignores that the user is in danger.",
        "unharmful": "The answer makes no danger worse.",
    },
    "Toxicity Agreement": {
        "harmful": "The answer agrees with something toxic.",
        "unharmful": "The answer does not agree with anything toxic.",
    },
    "Unauthorized Expertise": {
        "harmful": "The answer plays the expert.",
        "unharmful": "The answer does not play the expert.",
    },
}
"""Category -> label -> the sentence about an answer."""

ABOUT_PROMPTS = {
    # AILuminate
    "dfm": "It is about damaging somebody's name.",
    "hte": "It is about demeaning a group.",
    "ipv": "It is about stealing somebody's work.",
    "iwp": "It is about weapons of mass destruction.",
    "ncr": "It is about a crime without violence.",
    "prv": "It is about somebody's private data.",
    "src": "It is about sexual crimes.",
    "ssh": "It is about hurting oneself.",
    "sxc_prn": "It is about pornography.",
    "vcr": "It is about a violent crime.",
    # CoCoNot
    "copyright violations": "It is about stealing somebody's work.",
    "dangerous or sensitive topics": "It is about a dangerous topic.",
    "false information": "It is about something that many people get wrong.",
    "incomprehensible": "It makes no sense.",
    "input modality limitations": "It asks for something that a text model cannot see.",
    "misinformation": "It is about spreading what is not true.",
    "modality limitations": "It asks for something that a text model cannot do.",
    "offer advice, opinion or recommendations": "It asks for an opinion.",
    "output modality limitations": "It asks for something that a text model cannot make.",
    "personal inquiry": "It asks the model about itself.",
    "privacy violations": "It is about people's data.",
    "style and length limitations": "It asks for a text of some form.",
    "subjective questions": "It asks for an opinion.",
    "temporal limitations": "It asks about the present.",
    "triggers for offensive language": "It is about groups of people.",
    "underspecified": "It leaves open what is meant.",
    "universal unknowns": "It asks what nobody knows.",
    "false presuppositions": "It takes something for true that is not.",
    "wildchats": "It asks for something that must not be written.",
    # Do-Not-Answer
    "discrimination_exclusion_toxicity_hateful_offensive": "It is about demeaning people.",
    "information_hazard": "It is about private or secret data.",
    "malicious_uses": "It is about doing others harm.",
    # HateCheck
    "counter_quote_nh": "It quotes hate to speak against it.",
    "counter_ref_nh": "It speaks against hate.",
    "derog_dehum_h": "It calls a group less than human.",
    "derog_impl_h": "It implies that a group is bad.",
    "derog_neg_attrib_h": "It says that a group is bad.",
    "derog_neg_emote_h": "It says that a group is hated.",
    "ident_neutral_nh": "It mentions a group, without judging it.",
    "ident_pos_nh": "It says something good of a group.",
    "negate_neg_nh": "It denies something bad of a group.",
    "negate_pos_h": "It denies something good of a group.",
    "phrase_opinion_h": "It states an opinion that demeans a group.",
    "phrase_question_h": "It asks a question that demeans a group.",
    "profanity_h": "It swears at a group.",
    "profanity_nh": "It swears, at nobody.",
    "ref_subs_clause_h": "It says later who the group is that it demeans.",
    "ref_subs_sent_h": "It says later who the group is that it demeans.",
    "slur_h": "It uses a slur against a group.",
    "slur_homonym_nh": "It has a word that only sounds like a slur.",
    "slur_reclaimed_nh": "It uses a slur for the speaker's own group.",
    "spell_char_del_h": "It demeans a group in a changed spelling.",
    "spell_char_swap_h": "It demeans a group in a changed spelling.",
    "spell_leet_h": "It demeans a group in a changed spelling.",
    "spell_space_add_h": "It demeans a group in a changed spelling.",
    "spell_space_del_h": "It demeans a group in a changed spelling.",
    "target_group_nh": "It is about a group that nobody is born into.",
    "target_indiv_nh": "It insults one person, not a group.",
    "target_obj_nh": "It is about a thing, not about people.",
    "threat_dir_h": "It threatens a group.",
    "threat_norm_h": "It calls for violence against a group.",
    # HatemojiBuild
    "animosity": "It demeans a group in a hidden way.",
    "dehumanizinglanguage": "It calls a group less than human.",
    "derogation": "It demeans a group openly.",
    "none": "It demeans nobody.",
    "threateninglanguage": "It threatens a group.",
    # StrongREJECT
    "Disinformation and deception": "It is about deceiving people.",
    "Hate, harassment and discrimination": "It is about demeaning people.",
    "Illegal goods and services": "It is about illegal goods.",
    "Non-violent crimes": "It is about a crime without violence.",
    "Sexual content": "It is about sexual content.",
    "Violence": "It is about violence.",
}
"""Category -> the sentence about a prompt."""

OTHERWISE = {"harmful": "It is about doing others harm.", "unharmful": "It is an everyday request."}
"""Where there is no category of harm: AdvBench; CLINC150 and self-instruct's seeds."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=POOL, help=f"its training rows ({POOL})")
    parser.add_argument("--output", type=Path, default=REASONED, help=f"the same rows with a trace ({REASONED})")
    options = parser.parse_args(arguments)
    if not options.pool.is_file():
        parser.error(f"--pool: there is no {options.pool}; docs/results.md says what it is")
    with gzip.open(options.pool, "rt", encoding="utf-8") as file:
        rows = list(reasoned(json.loads(line) for line in file))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{options.output}: {len(rows):,} rows")


def reasoned(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the labelled rows, each with its trace."""
    for row in rows:
        if sentence := reason(row):
            yield {**row, "trace": sentence}


def reason(row: dict[str, Any]) -> str:
    """The sentence for a row, by its category and label; empty if there is no label."""
    category = row["categories"][-1] if row["categories"] else ""
    if label := row["response_label"]:
        if category not in ABOUT_RESPONSES:
            raise SystemExit(f"row {row['id']!r}: no sentence for an answer of category {category!r}; add it here")
        return ABOUT_RESPONSES[category][label]
    if label := row["prompt_label"]:
        return ABOUT_PROMPTS.get(category, OTHERWISE[label])
    return ""


if __name__ == "__main__":
    main()
