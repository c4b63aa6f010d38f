"""One decoder for every family we train.

Shape letters, in names (`query_BTNH`), annotations and einsum strings alike:

    B  rows of a batch            N  query heads            F  hidden units of the MLP
    T  tokens of a row            K  key/value heads        V  vocabulary
    S  keys that a query sees     G  queries per KV head    L  layers
    D  model width                H  head width             M  target positions of a row
"""
