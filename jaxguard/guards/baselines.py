"""Baselines that read no meaning, fitted to the training set. A guard that does not beat them has learnt nothing more.

`majority` predicts the most frequent training label. `tfidf` is logistic regression on TF-IDF of words, word pairs and
character n-grams, one model for each question.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from functools import lru_cache
from typing import Final

import numpy as np

from jaxguard.data.examples import LABELS, Example
from jaxguard.data.format.dialogue import CHOICES, LABEL
from jaxguard.data.policies import Question
from jaxguard.guards.protocol import NEGATIVE, POSITIVE, Prediction, Predictor, Request, UnsupportedError
from jaxguard.utils.errors import JaxguardError

BASELINES: Final = ("tfidf", "majority")

_FITTED_TO: Final[dict[Question, tuple[Question, ...]]] = {
    "prompt_harm": ("prompt_harm", "response_harm"),
    "response_harm": ("response_harm", "prompt_harm"),
    "response_refusal": ("response_refusal",),
}


def fit_baseline(kind: str, examples: Sequence[Example], seed: int) -> Predictor:
    """A predictor of a kind of BASELINES, fitted to the labels of these examples, for a question when it is first requested.

    A question that they do not label both ways is answered by the model of the other harm question, if there is one.

    Raises:
        JaxguardError: no example is labelled.
        UnsupportedError: on a request, a question that cannot be answered.
    """
    if not any(getattr(example, label) for example in examples for label in LABELS):
        raise JaxguardError(f"format {kind}: no example of data.train has a label to fit it to")

    # Imported late: it takes a second, and few guards need it.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    @lru_cache
    def model(question: Question) -> Callable[[Sequence[str]], np.ndarray]:
        """Texts to float[N]: of the positive answer."""
        for fitted_to in _FITTED_TO[question]:
            labelled = [example for example in examples if getattr(example, LABEL[fitted_to])]
            positive = np.array([getattr(each, LABEL[fitted_to]) == CHOICES[fitted_to][0] for each in labelled])
            if kind == "majority" and labelled:
                share = positive.mean()
                return lambda texts: np.full(len(texts), share)
            if kind == "tfidf" and len(set(positive.tolist())) == 2:
                words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")  # noqa: S106
                chars = {"analyzer": "char_wb", "ngram_range": (2, 5), "min_df": 2, "max_features": 300_000}
                letters = TfidfVectorizer(**chars, sublinear_tf=True)
                regression = LogisticRegression(C=5.0, class_weight="balanced", solver="liblinear", random_state=seed)
                pipeline = make_pipeline(make_union(words, letters), regression)
                pipeline.fit([_text(example, fitted_to) for example in labelled], positive)
                return lambda texts: np.asarray(pipeline.predict_proba(texts)[:, 1])
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


def _text(example: Example, question: Question) -> str:
    return example.prompt if question == "prompt_harm" else f"{example.prompt}\n{example.response or ''}"
