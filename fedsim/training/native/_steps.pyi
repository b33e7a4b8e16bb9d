REVISION: int

def variants() -> list[str]: ...
def chain(
    variant: str, parameters: int, layers: int, count: int, loss: int, inputs: int, targets: int, examples: int
) -> object: ...
def train(
    chain: object,
    shape: tuple[int, ...],
    steps: tuple[int, int, int],
    rate: int,
    x: tuple[int, int],
    out: tuple[int, int],
    start: tuple[int, ...],
    extras: tuple[float, ...],
) -> None: ...

Pass = tuple[str, tuple[int, int, int, int], int, int, tuple[int, int]]

def forward(told: Pass, out: int) -> None: ...
def backward(told: Pass, d: tuple[int, int], below: int, to: tuple[int, bool, float]) -> None: ...
