"""MiniLM for queries: the vectors of :class:`broadsheet.nn.minilm.Embedder` to rounding, in a fraction of its time.

A query is a few word pieces: its forward pass is spent on reading weights and on calls, not on arithmetic. Hence the
tokenizer without a framework around it, weights in half precision and laid out as the product reads them, query, key
and value in one product, and nothing else. Queries that wait at the same time share one pass, which reads the weights
once for all.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

DIM, HEADS, LAYERS, EPSILON = 384, 12, 6, 1e-12
_LONGEST = 256  # word pieces, as the published model cuts
_TOGETHER = 16  # queries in one pass
_REMEMBERED = 1024  # queries, 1.5 kB each


class Embeds(Protocol):
    """What the index needs of an encoder; vectors belong to one ``fingerprint``."""

    fingerprint: str

    def embed(self, texts: Sequence[str], /) -> np.ndarray: ...


class Encoder:
    """MiniLM's forward pass and nothing else, in float32 on the CPU.

    Args:
        half: keep the weights of the products in float16, where this build of torch can multiply with them: a query is
            embedded in half the time. It moves a vector's numbers by 1e-4, about as much as the index rounds them by
            keeping vectors in float16.

    Raises:
        CheckpointError, MissingExtra: as :func:`broadsheet.nn.minilm.minilm_folder`.
    """

    def __init__(self, half: bool = True) -> None:
        import torch
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        from broadsheet.nn.minilm import Embedder, minilm_folder

        folder = minilm_folder()
        self.fingerprint = Embedder.fingerprint
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_LONGEST)
        weights = load_file(folder / "model.safetensors")

        def product(*names: str) -> Callable[[Any], Any]:
            weight = torch.cat([weights[f"{name}.weight"] for name in names])
            return _product(weight, torch.cat([weights[f"{name}.bias"] for name in names]), half)

        def norm(name: str) -> tuple[Any, Any]:
            return weights[f"{name}.weight"], weights[f"{name}.bias"]

        self._words = weights["embeddings.word_embeddings.weight"]
        self._places = weights["embeddings.position_embeddings.weight"]
        self._places = self._places + weights["embeddings.token_type_embeddings.weight"][0]
        self._first_norm = norm("embeddings.LayerNorm")
        self._layers = []
        for number in range(LAYERS):
            name = f"encoder.layer.{number}"
            self._layers.append(
                (
                    product(*(f"{name}.attention.self.{part}" for part in ("query", "key", "value"))),
                    product(f"{name}.attention.output.dense"),
                    norm(f"{name}.attention.output.LayerNorm"),
                    product(f"{name}.intermediate.dense"),
                    product(f"{name}.output.dense"),
                    norm(f"{name}.output.LayerNorm"),
                )
            )

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Float[np.ndarray, "n 384"]:
        """Unit vectors of the texts; what exceeds 256 word pieces is cut off. Texts of like length share a batch."""
        pieces = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(pieces)), key=lambda index: len(pieces[index]))
        vectors = np.zeros((len(pieces), DIM), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            vectors[some] = self._forward([pieces[index] for index in some])
        return vectors

    def _forward(self, pieces: list[list[int]]) -> Float[np.ndarray, "n 384"]:
        import torch
        from torch.nn import functional

        n, longest = len(pieces), len(pieces[-1])  # sorted: the last is the longest
        ids = torch.zeros(n, longest, dtype=torch.long)
        real = torch.zeros(n, longest, dtype=torch.bool)
        for row, some in enumerate(pieces):
            ids[row, : len(some)] = torch.tensor(some)
            real[row, : len(some)] = True
        mask = None if len(pieces[0]) == longest else real[:, None, None]
        with torch.inference_mode():
            x = functional.layer_norm(self._words[ids] + self._places[:longest], (DIM,), *self._first_norm, eps=EPSILON)
            x = x.view(n * longest, DIM)
            for project, out, norm, up, down, last_norm in self._layers:
                q, k, v = project(x).view(n, longest, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
                heads = functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(-1, DIM)
                x = functional.layer_norm(x + out(heads), (DIM,), *norm, eps=EPSILON)
                x = functional.layer_norm(x + down(functional.gelu(up(x))), (DIM,), *last_norm, eps=EPSILON)
            x = x.view(n, longest, DIM)
            mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            return functional.normalize(mean, dim=1).numpy()


def _product(weight: Any, bias: Any, half: bool) -> Callable[[Any], Any]:
    """x -> x wᵀ + b, with the weights in float16 where torch has that (FBGEMM, on x86), else in float32."""
    import torch

    if half:
        try:
            packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        except (AttributeError, RuntimeError):  # another processor, or a torch without it
            pass
        else:
            multiply = torch.ops.quantized.linear_dynamic_fp16
            return lambda x: multiply(x, packed)
    laid_out = weight.T.contiguous()  # x @ w reads it in order
    return lambda x: torch.addmm(bias, x, laid_out)


class Queries:
    """Vectors of queries from many threads at a time: remembered, and what waits together is computed together.

    Args:
        encoder: computes the vectors of several texts at a time.
    """

    def __init__(self, encoder: Embeds) -> None:
        self.encoder = encoder
        self._lock = threading.Lock()  # of the two tables
        self._turn = threading.Lock()  # of the network
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()
        self._waiting: dict[str, Future[np.ndarray]] = {}

    def vector(self, text: str) -> Float[np.ndarray, "384"]:
        """The unit vector of one text."""
        with self._lock:
            if (known := self._known.get(text)) is not None:
                self._known.move_to_end(text)
                return known
            answer = self._waiting.get(text) or self._waiting.setdefault(text, Future())
        while not answer.done():
            with self._turn:  # whoever comes to his turn computes for those who still wait for theirs
                if not answer.done():
                    self._compute()
        return answer.result()

    def _compute(self) -> None:
        with self._lock:
            some = dict(islice(self._waiting.items(), _TOGETHER))
        try:
            vectors = self.encoder.embed(list(some))
        except BaseException as error:
            with self._lock:
                for text, answer in some.items():
                    del self._waiting[text]
                    answer.set_exception(error)
            return
        with self._lock:
            for (text, answer), vector in zip(some.items(), vectors, strict=True):
                self._known[text] = vector
                del self._waiting[text]
                answer.set_result(vector)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
