"""A second model that checks a trace before it is accepted."""

import re
from dataclasses import dataclass

from jaxguard.data.format.dialogue import Dialogue
from jaxguard.distill.prompts import TeacherPrompt
from jaxguard.distill.tasks import Task
from jaxguard.distill.teacher import Teacher

_FIT = re.compile(r"^[\s*_#>-]*fit[\s*_]*:[\s*_]*(yes|no)\b", re.IGNORECASE | re.MULTILINE)
_REASON = re.compile(r"^[\s*_#>-]*reason[\s*_]*:(?P<reason>[^\n]*)", re.IGNORECASE | re.MULTILINE)
_GRAMMAR = r"Reason: [^\n]+\nFit: (yes|no)"


@dataclass(frozen=True)
class Judge:
    """Checks whether a trace is fit to learn from.

    Attributes:
        model: an open server of the judge.
        prompt: the template of its requests.
        dialogue: the student's format.
    """

    model: Teacher
    prompt: TeacherPrompt
    dialogue: Dialogue

    async def objection(self, task: Task, trace: str) -> tuple[str | None, int]:
        """(why the trace is unfit, or None; completion tokens). Fails closed: a malformed answer is an objection.

        Raises:
            JaxguardError: the judge refuses the request or gives no answer.
        """
        messages = self.prompt.messages(task.example, task.policy, task.labels, self.dialogue, trace=trace)
        extra = {"regex": _GRAMMAR} if self.model.config.grammar else {}
        (reply,) = await self.model.complete(messages, extra=extra)
        verdicts = {match[1].lower() for match in _FIT.finditer(reply.answer)}
        reason = _REASON.search(reply.answer)
        if reply.finish_reason == "stop" and verdicts == {"yes"}:
            return None, reply.completion_tokens
        if verdicts == {"no"}:
            return (reason["reason"].strip() if reason else "") or "gives no reason", reply.completion_tokens
        return "its answer is malformed", reply.completion_tokens
