from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.kernels import ScoringTerms
from router_core.types import Doubles, Floats, Indices

SOURCE_SHA256: str

class TokenTable:
    def __init__(self, rows: Floats) -> None: ...
    def embed(self, ids: NDArray[np.uint32], out: Floats, /) -> None: ...

class Scorer:
    def __init__(
        self,
        by_cluster: Doubles,
        output_caps: Doubles,
        input_price: Doubles,
        output_price: Doubles,
        cached_price: Doubles,
        profiled: NDArray[np.bool_],
    ) -> None: ...
    def choose(
        self,
        ids: Indices,
        weights: Floats,
        rows: Indices | None,
        terms: ScoringTerms,
        doubts: Doubles | None = None,
        /,
    ) -> tuple[int, bytes]: ...

def softmax(cosines: memoryview[Any], temperature: float, /) -> bytes: ...
