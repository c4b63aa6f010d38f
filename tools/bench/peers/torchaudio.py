"""Stands in for torchaudio, which LlamaFactory imports for examples with sound; PyPI's build does not load beside a CPU's torch."""
