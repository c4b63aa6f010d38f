"""Run in the environment of `make test-serve`: call a service with real clients, and print what they made of it as JSON.

python tests/serve/clients.py openai|litellm|nemo URL TEXT RESPONSE
"""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"


def use_openai(url, text, response):
    from openai import APIStatusError, OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    exchange = [{"role": "user", "content": text}, {"role": "assistant", "content": response}]
    moderated = client.moderations.create(model="jaxguard", input=[text, text])
    names = ["prompt_harm", "response_harm", "unknown"]
    questions = [{"type": "predicate", "name": name, "instructions": "-"} for name in names]
    decided = client.decisions.create(model="jaxguard", input=exchange, questions=questions)
    said = client.chat.completions.create(model="jaxguard", messages=exchange, max_tokens=1)
    try:
        client.chat.completions.create(model="jaxguard", messages=exchange, stream=True)
    except APIStatusError as error:
        refused = [error.status_code, error.code]
    return {
        "flagged": [each.flagged for each in moderated.results],
        "violence": moderated.results[0].category_scores.violence,
        "decided": [[each.type, each.name, getattr(each, "probability", None)] for each in decided.answers],
        "tokens": decided.usage.input_tokens,
        "said": said.choices[0].message.content,
        "refused": refused,
    }


def use_litellm(url, text, response):
    from fastapi import HTTPException
    from litellm.exceptions import GuardrailRaisedException
    from litellm.proxy.guardrails.guardrail_hooks.decision_model.decision_model import (
        DecisionModelCheck,
        DecisionModelGuardrail,
    )
    from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api.generic_guardrail_api import (
        GenericGuardrailAPI,
    )

    os.environ.update(OPENAI_API_BASE=f"{url}/v1", OPENAI_API_KEY="none", HOSTED_VLLM_API_BASE=f"{url}/v1")
    messages = [{"role": "user", "content": text}]
    request = {"texts": [text], "structured_messages": messages, "model": "m"}
    generic = GenericGuardrailAPI(api_base=url, api_key="none", guardrail_name="jaxguard")

    async def outcome(guardrail, inputs, kind):
        try:
            await guardrail.apply_guardrail(inputs, {}, kind)
        except GuardrailRaisedException as error:
            return str(error)
        except HTTPException as error:
            return f"{error.status_code} {error.detail}"
        except Exception as error:  # what LiteLLM makes of a service that fails
            return repr(error)
        return "passed"

    def decision(model, threshold, name="prompt_harm"):
        check = DecisionModelCheck(name=name, instructions="-", threshold=threshold)
        return DecisionModelGuardrail("jaxguard", model, [check])

    async def run():
        return {
            "request": await outcome(generic, request, "request"),
            "response": await outcome(generic, {"texts": [response]}, "response"),
            "image": await outcome(generic, {"texts": [text], "images": ["x"]}, "request"),
            "decisions": [
                await outcome(decision(f"{provider}/jaxguard", threshold), request, "request")
                for provider in ("openai", "hosted_vllm")
                for threshold in (0.0, 1.0)
            ],
            "unknown": await outcome(decision("openai/jaxguard", 1.0, "unknown"), request, "request"),
        }

    return asyncio.run(run())


CONTENT_SAFETY = """
models:
  - {{type: main, engine: openai, model: none, parameters: {{base_url: "{url}/v1", api_key: none}}}}
  - {{type: jaxguard, engine: openai, model: jaxguard, parameters: {{base_url: "{url}/v1", api_key: none}}}}
rails:
  config: {{content_safety: {{reasoning: {{enabled: {reasoning}}}}}}}
  input: {{flows: ["content safety check input $model=jaxguard"]}}
  output: {{flows: ["content safety check output $model=jaxguard"]}}
prompts:
  - task: content_safety_check_input $model=jaxguard
    output_parser: nemotron_reasoning_parse_prompt_safety
    messages:
      - {{type: user, content: "{{{{ user_input }}}}"}}
      - {{type: system, content: "{{{{ '/think' if reasoning_enabled else '/no_think' }}}}"}}
  - task: content_safety_check_output $model=jaxguard
    output_parser: nemotron_reasoning_parse_response_safety
    messages:
      - {{type: user, content: "{{{{ user_input }}}}"}}
      - {{type: assistant, content: "{{{{ bot_response }}}}"}}
      - {{type: system, content: "{{{{ '/think' if reasoning_enabled else '/no_think' }}}}"}}
"""
CLASSIFIER = """
models: []
rails:
  config:
    hf_classifier:
      guard: {{engine: {engine}, model: jaxguard, base_url: "{url}", blocked_labels: [{label}], threshold: {threshold}}}
  input: {{flows: ["hf classifier check input $classifier=guard"]}}
  output: {{flows: ["hf classifier check output $classifier=guard"]}}
"""


def use_nemo(url, text, response, mode="direct"):
    from nemoguardrails import LLMRails, RailsConfig

    exchange = [{"role": "user", "content": text}, {"role": "assistant", "content": response}]

    def blocked(yaml):
        """Whether the input rails stop the prompt, and the output rails the response."""
        rails = LLMRails(RailsConfig.from_content(yaml_content=yaml))
        results = [
            rails.generate(messages=messages, options={"rails": [rail], "log": {"activated_rails": True}})
            for rail, messages in (("input", exchange[:1]), ("output", exchange))
        ]
        return [any(rail.stop for rail in result.log.activated_rails) for result in results]

    def classifier(engine, label, threshold):
        return blocked(CLASSIFIER.format(url=url, engine=engine, label=label, threshold=threshold))

    safety = blocked(CONTENT_SAFETY.format(url=url, reasoning=str(mode == "reasoning").lower()))
    if mode == "reasoning":
        return {"content_safety": {mode: safety}}
    return {
        "content_safety": {mode: safety},
        "vllm": classifier("vllm", "harmful", 0.5),
        "vllm_unharmful": classifier("vllm", "unharmful", 0.5),
        "fms": [classifier("fms", "prompt_harm", threshold) for threshold in (0.0, 1.0)],
    }


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps({"openai": use_openai, "litellm": use_litellm, "nemo": use_nemo}[name](*arguments)))
