"""Beginnings of chat templates that hang, or take all memory, where nothing stops them."""

_LOOP = "{% for _ in range(99999) %}"
HOSTILE = {
    "loops": f"{_LOOP * 3}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
    "folded": "{{ ('x' * 20000000000) | length }}",
    "doubled": "{% set n = namespace(s='xxxxxxxx') %}{% for _ in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "formatted": "{% set s = '%20000000000d' %}{{ (s % 1) | length }}",
    "padded": "{% set n = 20000000000 %}{{ 'x'.ljust(n) | length }}",
    "power": "{% set n = 99999999 %}{{ (n ** n) % 7 }}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "replaced": "{% set s = 'x' * 100000 %}{{ s.replace('x', s).replace('x', s) | length }}",
    "written": "{% for _ in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}
"""Name -> what stands before the template."""
