from typing import final

from distgrad.transport._poller import Pollable

@final
class Write: ...

class Outlet(Pollable): ...
