"""Conventions of other guards and gateways, each a module with `add_routes(api)`: for clients that exist already."""

from jaxguard.serve.adapters import agentgateway, chat, decisions, detectors, litellm, moderations

ADAPTERS = tuple(each.add_routes for each in (agentgateway, chat, decisions, detectors, litellm, moderations))
