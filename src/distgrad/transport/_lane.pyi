from typing import final

from distgrad.transport._outlet import Outlet

@final
class Arriving: ...

class LaneOwner(Outlet): ...

@final
class Lane(Outlet): ...
