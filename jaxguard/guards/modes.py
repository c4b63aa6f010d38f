"""How a guard may be asked to answer: with or without reasoning, or whichever is certified."""

from typing import Final, Literal, TypeAlias

from jaxguard.data.format.dialogue import Mode

AUTO: Final = "auto"
"""The mode that answers directly where that is certified, and reasons elsewhere."""
AnyMode: TypeAlias = Mode | Literal["auto"]
MODES: Final[tuple[AnyMode, ...]] = (*Mode, AUTO)
