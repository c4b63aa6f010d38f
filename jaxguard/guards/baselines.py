"""Baselines that read no meaning, fitted to the training set. A guard that does not beat them has learnt nothing more.

`majority` predicts the most frequent training label. `tfidf` is logistic regression on TF-IDF of words, word pairs and
character n-grams, one model for each question.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from jaxguard.data.examples import Example
from jaxguard.data.format.dialogue import CHOICES
from jaxguard.data.policies import Question
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, Prediction, Predictor, Request, UnsupportedError
from jaxguard.utils.errors import JaxguardError

BASELINES: Final = ("tfidf", "majority")
Probabilities = Callable[[Sequence[str]], np.ndarray]
"""Texts to float[N]: of the positive answer to one question."""

_FALLBACK: dict[Question, Question] = {"prompt_harm": "response_harm", "response_harm": "prompt_harm"}
_STRENGTH = 5.0


def fit_baseline(kind: str, examples: Sequence[Example], seed: int) -> Predictor:
    """A predictor of a kind of BASELINES, fitted to the labels of these examples, for a question when it is first requested.

    A question that they do not label both ways is answered by the model of the other harm question, if there is one.

    Raises:
        JaxguardError: no example is labelled.
        UnsupportedError: on a request, a question that cannot be answered.
    """
    if not any(_label(example, question) for example in examples for question in CHOICES):
        raise JaxguardError(f"format {kind}: no example of data.train has a label to fit it to")

    @lru_cache
    def model(question: Question) -> Probabilities:
        for fitted_to in (question, _FALLBACK.get(question)):
            if fitted_to is not None and (fitted := _fit(kind, examples, fitted_to, seed)) is not None:
                return fitted
        raise UnsupportedError(
            f"format {kind}: the labels of data.train do not tell {' from '.join(CHOICES[question])} ({question}): add "
            "examples of both, or leave the guard out"
        )

    async def predict(requests: Sequence[Request], /) -> AsyncIterator[Prediction]:
        # Requests with the same questions are one batch.
        for questions in dict.fromkeys(request.questions for request in requests):
            batch = [request.example for request in requests if request.questions == questions]
            columns = [model(q)([_text(example, q) for example in batch]).tolist() for q in questions]
            for example, row in zip(batch, zip(*columns, strict=True), strict=True):
                probabilities = dict(zip(questions, row, strict=True))
                verdicts = {q: (POSITIVE if p > 0.5 else NEGATIVE,) for q, p in probabilities.items()}
                yield Prediction(example.id, verdicts, probabilities)

    return predict


def _fit(kind: str, examples: Sequence[Example], question: Question, seed: int) -> Probabilities | None:
    """None where the examples do not answer the question both ways; the majority does with one."""
    labelled = [example for example in examples if _label(example, question)]
    positive = np.array([_label(example, question) == CHOICES[question][0] for example in labelled])
    if kind == "majority":
        return (lambda texts: np.full(len(texts), positive.mean())) if labelled else None
    if len(set(positive.tolist())) < 2:
        return None
    pipeline = _pipeline(seed).fit([_text(example, question) for example in labelled], positive)
    return lambda texts: np.asarray(pipeline.predict_proba(texts)[:, 1])


def _pipeline(seed: int) -> Any:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")  # noqa: S106
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2, max_features=300_000)
    return make_pipeline(
        make_union(words, letters),
        LogisticRegression(C=_STRENGTH, class_weight="balanced", solver="liblinear", random_state=seed),
    )


def _label(example: Example, question: Question) -> str | None:
    return {
        "prompt_harm": example.prompt_label,
        "response_harm": example.response_label,
        "response_refusal": example.refusal_label,
    }[question]


def _text(example: Example, question: Question) -> str:
    return example.prompt if question == "prompt_harm" else f"{example.prompt}\n{example.response or ''}"
