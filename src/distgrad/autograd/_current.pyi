from typing import final

from distgrad.autograd.context import ContextPart

@final
class CurrentPart:
    def get(self) -> ContextPart | None: ...
    def set(self, part: ContextPart | None) -> None: ...

current: CurrentPart
