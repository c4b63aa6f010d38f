"""One decoder for every family.

Shape letters, in names (`query_BTNH`), annotations and einsum strings alike:

    B  rows of a batch            N  query heads            F  MLP dimension (mlp_dim)
    T  tokens of a row            K  key/value heads        V  vocabulary
    S  keys that a query sees     G  queries per KV head    L  layers
    D  model dimension (d_model)  H  head dimension         M  target positions of a row
"""
